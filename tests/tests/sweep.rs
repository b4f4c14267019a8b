//! Connections that were there before the agent: they get the policy too, all of
//! them, and nothing else does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use keepalive_tests::Sockopt::{Idle, Interval, Keepalive, Probes, UserTimeout};
use keepalive_tests::{
    Agent, Capture, Cgroup, Churn, Crowd, GoProbe, Kind, Need, Netns, Options, Probe, Program,
    Side, between, first_probes, require, timer, timers_in_state,
};
use serde_json::json;

const POLICY: &str = "[default]\nidle = \"70s\"\n";
const OURS: Options = Options::on(70, 10, 6);

/// Both sides, IPv4 and IPv6, seen by the process and from outside, and beside it
/// a process that is not governed.
fn reaches(program: Program) -> Result<()> {
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut probe = Probe::start(program, (&cgroup, &netns))?;
    let mut other = Probe::start(program, &netns)?;
    let mut sockets = Vec::new();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let (listener, address) = probe.listener(address)?;
        let connecting = probe.connected(address)?;
        sockets.push((connecting, probe.accept(listener)?));
    }
    let others = other.connection()?;
    for (connecting, accepting) in sockets.clone() {
        assert_eq!(probe.options(connecting)?, Options::UNTOUCHED);
        assert_eq!(probe.options(accepting)?, Options::UNTOUCHED);
    }

    let mut agent = Agent::start(&cgroup, POLICY)?;
    let swept = agent.swept()?;
    assert_eq!(swept["missed"], json!([]), "{swept}");
    for (connecting, accepting) in sockets {
        let (here, there) = (probe.name(connecting)?, probe.name(accepting)?);
        for (socket, filter) in [
            (connecting, between(here, there)),
            (accepting, between(there, here)),
        ] {
            assert_eq!(probe.options(socket)?, OURS, "{here} {there}");
            let seen = timer(Some(&netns), &filter)?.context("no timer")?;
            assert!(seen.is_fresh_keepalive(70), "{here} {there}: {seen:?}");
        }
    }
    for socket in [others.0, others.1] {
        assert_eq!(other.options(socket)?, Options::UNTOUCHED);
    }
    let finished = agent.stop()?;
    for (counter, count) in [
        ("seen", 4),
        ("turned_on", 4),
        ("filled", 12),
        ("clamped", 0),
        ("left_alone", 0),
        ("failed", 0),
    ] {
        let counted = finished.count_existing("default", counter);
        assert_eq!(counted, count, "{counter}: {}", finished.record);
    }
    assert_eq!(finished.count("default", "seen"), 0);
    Ok(())
}

#[test]
fn of_a_dynamic_program() -> Result<()> {
    require!(Need::Program("ss"));
    reaches(Program::Dynamic)
}

#[test]
fn of_a_static_program() -> Result<()> {
    require!(Need::Program("ss"));
    reaches(Program::Static)
}

#[test]
fn of_a_program_on_raw_system_calls() -> Result<()> {
    require!(Need::Program("ss"));
    reaches(Program::Raw)
}

#[test]
fn of_a_go_program() -> Result<()> {
    require!(Need::Built(Program::Go));
    let cgroup = Cgroup::new()?;
    let mut plain = GoProbe::start(false, &cgroup, &[])?;
    let mut own = GoProbe::start(true, &cgroup, &[])?;
    let sides = [Side::Connecting, Side::Accepting];
    for side in sides {
        assert_eq!(plain.options(side)?, Options::UNTOUCHED);
    }
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    for side in sides {
        assert_eq!(plain.options(side)?, OURS);
        // Whether Go sets the number of probes too depends on its version.
        let Options { idle, interval, .. } = own.options(side)?;
        assert_eq!((idle, interval), (15, 15), "Go set these itself");
    }
    Ok(())
}

#[test]
fn what_the_application_set_follows_the_formula() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let everything = [
        (Keepalive, 1),
        (Idle, 7000),
        (Interval, 5),
        (Probes, 20),
        (UserTimeout, 9_000_000),
    ];
    let mut cases = Vec::new();
    for (application, expected) in [
        (&[][..], Options::on(70, 10, 8).user_timeout(150_000)),
        (&[(Idle, 90)], Options::on(90, 10, 8).user_timeout(170_000)),
        (
            &[(Idle, 30), (Interval, 12)],
            Options::on(50, 12, 8).user_timeout(146_000),
        ),
        (&[(Probes, 3)], Options::on(70, 10, 8).user_timeout(150_000)),
        (&everything, Options::on(300, 5, 8).user_timeout(9_000_000)),
    ] {
        let (listener, address) = probe.listener("127.0.0.1:0")?;
        probe.set_all(listener, application)?;
        let connecting = probe.socket(Kind::of(address))?;
        probe.set_all(connecting, application)?;
        probe.connect(connecting, address)?;
        let accepting = probe.accept(listener)?;
        // Some applications set their options only then.
        let late = probe.connected(address)?;
        probe.accept(listener)?;
        probe.set_all(late, application)?;
        cases.push((application, [connecting, accepting, late], expected));
    }
    let policy = "[default]\n\
        idle = { default = \"70s\", at-least = \"50s\", at-most = \"5m\" }\n\
        probes = { exactly = 8 }\n\
        user-timeout = \"derive\"\n";
    let mut agent = Agent::start(&cgroup, policy)?;
    agent.swept()?;
    for (application, sockets, expected) in cases {
        for socket in sockets {
            let got = probe.options(socket)?;
            assert_eq!(got, expected, "application: {application:?}");
        }
    }
    assert_eq!(agent.stop()?.count_existing("default", "failed"), 0);
    Ok(())
}

/// Were a listener touched, what is accepted from it would look ever after as if
/// the application had set it.
#[test]
fn listeners_stay_as_they_are() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    let child = probe.connected(address)?;
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    assert_eq!(probe.options(child)?, OURS);
    assert_eq!(probe.options(listener)?, Options::UNTOUCHED);
    // The next policy finds nothing on its children but what it sets itself.
    agent.reload("[default]\nidle = \"71s\"\ninterval = \"11s\"\n")?;
    assert_eq!(probe.options(listener)?, Options::UNTOUCHED);
    probe.accept(listener)?;
    let connecting = probe.connected(address)?;
    let accepting = probe.accept(listener)?;
    for socket in [connecting, accepting] {
        assert_eq!(probe.options(socket)?, Options::on(71, 11, 6));
    }
    agent.stop()?;
    probe.connected(address)?;
    let accepting = probe.accept(listener)?;
    assert_eq!(probe.options(accepting)?, Options::UNTOUCHED);
    Ok(())
}

/// Established by the kernel, and in no process's hands yet.
#[test]
fn waiting_to_be_accepted() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    let connecting = probe.connected(address)?;
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    agent.stop()?;
    let accepting = probe.accept(listener)?;
    assert_eq!(probe.options(connecting)?, OURS);
    assert_eq!(probe.options(accepting)?, OURS);
    Ok(())
}

/// Closed on one side: the other can hold it open for ever. Closed on both: it has
/// an end by itself.
#[test]
fn half_closed_and_closed() -> Result<()> {
    require!(Need::Program("ss"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut probe = Probe::start(Program::Static, (&cgroup, &netns))?;
    let (half, closing) = probe.connection()?;
    probe.close(closing)?;
    let (first, second) = probe.connection()?;
    let port = probe.name(first)?.port();
    probe.close(first)?;
    probe.close(second)?;
    let closed = || -> Result<Duration> {
        let filter = format!("sport = :{port}");
        let found = timers_in_state("time-wait", Some(&netns), &filter)?;
        ensure!(found.len() == 1, "{found:?}");
        let timer = found[0].clone().context("no timer")?;
        ensure!(timer.kind == "timewait", "{timer:?}");
        Ok(timer.left)
    };
    let before = closed()?;
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    assert_eq!(probe.options(half)?, OURS);
    let after = closed()?;
    assert!(after <= before, "{before:?} to {after:?}");
    assert!(
        after + Duration::from_secs(20) > before,
        "{before:?} to {after:?}"
    );
    assert_eq!(agent.stop()?.record["failures"], json!([]));
    Ok(())
}

/// A connection attempt under way is met twice: it is established later.
#[test]
fn established_after_the_sweep() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let mut server = Probe::start(Program::Static, &far)?;
    let (_, address) = server.listener("10.99.0.2:0")?;
    let mut client = Probe::start(Program::Static, (&cgroup, &near))?;
    far.run("ip", "route add blackhole 10.99.0.1")?;
    let kind = Kind {
        nonblocking: true,
        ..Kind::of(address)
    };
    let socket = client.socket(kind)?;
    let connected = client.begin_to_connect(socket, address)?;
    assert!(!connected, "connected to nobody");
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    assert_eq!(client.options(socket)?, Options::UNTOUCHED);
    far.run("ip", "route delete blackhole 10.99.0.1")?;
    client.finish_connecting(socket, Duration::from_secs(20))?;
    assert_eq!(client.options(socket)?, OURS);
    let finished = agent.stop()?;
    assert_eq!(finished.count("default", "seen"), 1);
    assert_eq!(finished.count_existing("default", "seen"), 0);
    Ok(())
}

/// Idle connections turned on all at once would be probed all at once.
#[test]
fn probes_do_not_come_in_a_herd() -> Result<()> {
    /// Of each process.
    const PAIRS: u32 = 1500;
    const IDLE: Duration = Duration::from_secs(10);
    const WINDOW: Duration = Duration::from_millis(200);

    require!(Need::Program("tcpdump"), Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut crowds = Vec::new();
    for n in 1..=2 {
        let mut crowd = Crowd::start((&cgroup, &netns), &format!("127.0.{n}.1:0"))?;
        crowd.connect(PAIRS)?;
        crowds.push(crowd);
    }
    sleep(IDLE + Duration::from_secs(1));
    let capture = Capture::start(&netns)?;
    let policy = format!("[default]\nidle = \"{}s\"\n", IDLE.as_secs());
    let mut agent = Agent::start(&cgroup, &policy)?;
    agent.swept()?;
    sleep(IDLE + Duration::from_secs(1));
    let probes = first_probes(&capture.stop()?);
    for crowd in &mut crowds {
        crowd.all_have(Options::on(10, 10, 6))?;
    }

    let mut times: Vec<_> = probes.into_values().collect();
    times.sort();
    assert_eq!(
        times.len(),
        4 * 1500,
        "each socket probes once in that time"
    );
    let since_first: Vec<_> = times
        .iter()
        .map(|time| time.saturating_sub(times[0]))
        .collect();
    let spread = since_first.last().copied().unwrap_or_default();
    let most = (0..times.len())
        .map(|first| times[first..].partition_point(|time| *time < times[first] + WINDOW))
        .max()
        .unwrap_or_default();
    let mut by_second = BTreeMap::new();
    for time in since_first {
        *by_second.entry(time.as_secs()).or_insert(0) += 1;
    }
    let figures = format!(
        "{} first probes in {spread:.1?} with an idle time of {IDLE:?}, \
         at most {most} in {WINDOW:?}, by second {by_second:?}",
        times.len()
    );
    eprintln!("{figures}");
    assert!(most * 100 <= times.len() * 15, "a herd: {figures}");
    assert!(spread * 10 >= IDLE * 6, "bunched: {figures}");
    Ok(())
}

/// A change of policy while connections are still waiting for the last one: all
/// come to have the new one, without the agent having to be asked again.
#[test]
fn a_reload_while_connections_wait() -> Result<()> {
    const SILENCE: Duration = Duration::from_secs(9);

    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut crowd = Crowd::start((&cgroup, &netns), "127.0.1.1:0")?;
    crowd.connect(1500)?;
    sleep(SILENCE);
    let mut agent = Agent::start(&cgroup, "[default]\nidle = \"8s\"\n")?;
    agent.swept()?;
    sleep(Duration::from_secs(2));
    agent.reload("[default]\nidle = \"7s\"\nuser-timeout = \"5m\"\n")?;
    let expected = Options::on(7, 10, 6).user_timeout(300_000);
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(error) = crowd.all_have(expected) {
        ensure!(Instant::now() < end, "{error}");
        sleep(Duration::from_millis(200));
    }
    // It can be stopped in the midst of it.
    sleep(SILENCE);
    agent.reload("[default]\nidle = \"6s\"\nkeepalive = \"off\"\n")?;
    agent.reload("[default]\nidle = \"6s\"\n")?;
    assert_eq!(agent.stop()?.code, Some(0));
    Ok(())
}

/// 10,000 connections a second come and go while the agent starts and sweeps over
/// and over again.
#[test]
fn while_connections_come_and_go() -> Result<()> {
    require!(Need::Program("ip"));
    let (cgroup, other) = (Cgroup::new()?, Cgroup::new()?);
    let netns = Netns::new()?;
    let mut steady = Crowd::start((&cgroup, &netns), "127.0.1.1:0")?;
    let mut bystander = Crowd::start((&other, &netns), "127.0.2.1:0")?;
    let mut coming = Crowd::start((&cgroup, &netns), "127.0.3.1:0")?;
    let mut passing = Crowd::start((&other, &netns), "127.0.4.1:0")?;
    steady.connect(2000)?;
    bystander.connect(1000)?;
    let churn = Churn {
        time: Duration::from_secs(2),
        rate: 5000,
        idle: [70, 71],
    };
    let done = AtomicBool::new(false);
    let (coming, passing) = scope(|scope| -> Result<_> {
        let coming = scope.spawn(|| coming.churn_until(&done, &churn));
        let passing = scope.spawn(|| passing.churn_until(&done, &churn));
        sleep(Duration::from_millis(500));
        let swept = sweep_often(&cgroup, &mut steady);
        done.store(true, Ordering::Relaxed);
        swept?;
        let [coming, passing] = [coming, passing].map(|churn| churn.join().expect("a panic"));
        Ok((coming?, passing?))
    })?;
    eprintln!("governed: {coming:?}, others: {passing:?}");
    bystander.all_have(Options::UNTOUCHED)?;
    // It goes on for a while without an agent, before and after.
    assert!(coming.with[0] > 0 && coming.with[1] > 0, "{coming:?}");
    assert_eq!(passing.with, [0, 0], "another cgroup was touched");
    let made = coming.made.min(passing.made);
    assert!(made > 5000, "no churn to speak of: {made}");
    Ok(())
}

/// Starts an agent and has it sweep a dozen times. None of those who are there
/// all the time is missed.
fn sweep_often(cgroup: &Cgroup, steady: &mut Crowd) -> Result<()> {
    let mut agent = Agent::start(cgroup, POLICY)?;
    agent.swept()?;
    steady.all_have(OURS)?;
    for n in 1..12 {
        let idle = 70 + n % 2;
        agent.reload(&format!("[default]\nidle = \"{idle}s\"\n"))?;
        steady.all_have(Options::on(idle, 10, 6))?;
    }
    let finished = agent.stop()?;
    ensure!(finished.code == Some(0), "{}", finished.stderr);
    ensure!(finished.record["failures"] == json!([]), "{finished:?}");
    Ok(())
}

/// As many as a large host has. Filter by the name to leave it out.
#[test]
fn one_hundred_thousand_connections() -> Result<()> {
    /// A process has some 20,000 descriptors.
    const PROCESSES: usize = 11;
    const PAIRS: u32 = 9100;

    require!(Need::Program("ip"));
    let begin = Instant::now();
    let (cgroup, other) = (Cgroup::new()?, Cgroup::new()?);
    let netns = Netns::new()?;
    let mut crowds = (1..=PROCESSES)
        .map(|n| Crowd::start((&cgroup, &netns), &format!("127.0.{n}.1:0")))
        .collect::<Result<Vec<_>>>()?;
    for pair in crowds.chunks_mut(2) {
        scope(|scope| {
            let workers: Vec<_> = pair
                .iter_mut()
                .map(|crowd| scope.spawn(|| crowd.connect(PAIRS)))
                .collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().expect("a panic"))
        })?;
    }
    let mut bystander = Crowd::start((&other, &netns), "127.0.0.100:0")?;
    bystander.connect(1000)?;
    let mut coming = Crowd::start((&cgroup, &netns), "127.0.0.101:0")?;
    let made = begin.elapsed();

    let churn = Churn {
        time: Duration::from_secs(8),
        rate: 2000,
        idle: [70, 71],
    };
    let (first, second, churned) = scope(|scope| -> Result<_> {
        let churning = scope.spawn(|| coming.churn(&churn));
        let start = Instant::now();
        let mut agent = Agent::start(&cgroup, POLICY)?;
        let swept = agent.swept()?;
        let first = start.elapsed();
        let ends = 2 * u64::from(PAIRS) * u64::try_from(PROCESSES)?;
        ensure!(swept["connections"].as_u64() >= Some(ends), "{swept}");
        for crowd in &mut crowds {
            crowd.all_have(OURS)?;
        }
        let start = Instant::now();
        agent.reload("[default]\nidle = \"71s\"\n")?;
        let second = start.elapsed();
        for crowd in &mut crowds {
            crowd.all_have(Options::on(71, 10, 6))?;
        }
        let finished = agent.stop()?;
        ensure!(finished.code == Some(0), "{}", finished.stderr);
        ensure!(finished.record["failures"] == json!([]), "{finished:?}");
        Ok((first, second, churning.join().expect("a panic")?))
    })?;
    bystander.all_have(Options::UNTOUCHED)?;
    eprintln!(
        "made in {made:.1?}, agent started and swept in {first:.1?}, \
         reloaded and swept in {second:.1?}, meanwhile {churned:?}"
    );
    assert!(churned.with[0] > 0, "{churned:?}");
    assert!(begin.elapsed() < Duration::from_mins(1), "too slow");
    Ok(())
}
