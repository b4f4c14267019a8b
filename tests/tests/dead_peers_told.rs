//! Dead peers are counted with their policy and cause, as the programs saw them,
//! and told of as they are found.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Crowd, Kind, Need, Netns, Pins, Probe, Process, Program, Socket, Sockopt,
    agent_binary, agent_command, detach, errno, output, require, wait_until,
};
use rustix::io::Errno;
use rustix::process::Signal;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

/// A dead peer is found 3 s after the last sign of it.
const POLICY: &str = "[default]\nidle = \"1s\"\ninterval = \"1s\"\nprobes = 2\n";

/// What `status` shows of a policy's dead peers.
fn counted(cgroup: &Cgroup, policy: &str) -> Result<Value> {
    let mut command = agent_command();
    command.args(["status", "--json", "--cgroup", cgroup.path()]);
    let status: Value = serde_json::from_str(&output(&mut command, LIMIT)?.stdout)?;
    let policies = status["in_force"][0]["policies"]
        .as_array()
        .with_context(|| format!("no policies in {status}"))?;
    let found = policies.iter().find(|found| found["name"] == policy);
    Ok(found.context("no such policy")?["dead_peers"].clone())
}

/// What `events` shows of the past.
fn told(cgroup: &Cgroup) -> Result<Vec<Value>> {
    let mut command = agent_command();
    command.args(["events", "--json", "--since", "1h", "--no-follow"]);
    command.args(["--cgroup", cgroup.path()]);
    let output = output(&mut command, LIMIT)?;
    ensure!(output.code == Some(0), "{}", output.stderr);
    let lines = output.stdout.lines();
    lines.map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Waits for the end of a connection; the error that the program gets.
fn error_of(probe: &mut Probe, socket: Socket) -> Result<Errno> {
    ensure!(probe.wait(socket, LIMIT)?, "it is alive");
    let error = probe.receive(socket).err().context("no error")?;
    errno(&error).with_context(|| format!("{error:#}"))
}

#[test]
#[expect(clippy::too_many_lines, reason = "one case after the other")]
fn each_with_its_policy_and_cause() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let derived = cgroup.child("derived")?;
    let patient = cgroup.child("patient")?;
    let idle = cgroup.child("dry")?;
    let config = format!(
        "{POLICY}\
         [[policy]]\nname = \"derived\"\ncgroup = \"{}\"\nuser-timeout = \"derive\"\n\
         [[policy]]\nname = \"patient\"\ncgroup = \"{}\"\nprobes = 100\n\
         [[policy]]\nname = \"dry\"\ncgroup = \"{}\"\nenforce = false\n",
        derived.path(),
        patient.path(),
        idle.path(),
    );
    let _agent = Agent::start(&cgroup, &config)?;
    near.sysctl("net/ipv4/tcp_retries2", "3")?;
    far.sysctl("net/ipv4/tcp_orphan_retries", "1")?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &near))?;
    let mut with_timeout = Probe::start(Program::Static, (&derived, &near))?;
    let mut waiting = Probe::start(Program::Static, (&patient, &near))?;
    let mut counting = Probe::start(Program::Static, (&idle, &near))?;
    let mut theirs = Probe::start(Program::Static, &far)?;

    let (_, address) = theirs.listener("10.99.0.2:0")?;
    let (_, v6) = theirs.listener("[fd99::2]:0")?;
    let silent = ours.connected(address)?;
    let silent_v6 = ours.connected(v6)?;
    let sending = ours.connected(address)?;
    let probed_then_sending = ours.connected(address)?;
    let timed = with_timeout.connected(address)?;
    let timed_sending = with_timeout.connected(address)?;
    let forgotten = waiting.connected(address)?;
    let counting_socket = counting.connected(address)?;
    // This one lives, and these end as connections do.
    let (alive, _) = ours.connection()?;
    let (closed, _) = ours.connection()?;
    ours.close(closed)?;
    let in_ours = [silent, silent_v6, sending, probed_then_sending];
    let in_derived = [timed, timed_sending];
    let names: Vec<_> = in_ours
        .iter()
        .map(|socket| ours.name(*socket))
        .collect::<Result<_>>()?;
    let derived_names: Vec<_> = in_derived
        .iter()
        .map(|socket| with_timeout.name(*socket))
        .collect::<Result<_>>()?;
    let forgotten_name = waiting.name(forgotten)?;
    let name = names[0];

    far.run("ip", "link set eth0 down")?;
    ours.send(sending, "x")?;
    with_timeout.send(timed_sending, "x")?;
    // Its first probe is out by now, and not answered.
    sleep(Duration::from_millis(1500));
    ours.send(probed_then_sending, "x")?;
    // What the programs get: a timeout, or what the neighbour table had to say.
    let mut seen = Vec::new();
    for (socket, name) in in_ours.into_iter().zip(names) {
        seen.push((name, error_of(&mut ours, socket)?));
    }
    for (socket, name) in in_derived.into_iter().zip(derived_names) {
        seen.push((name, error_of(&mut with_timeout, socket)?));
    }
    // The peer is gone without a word; when it is back, it answers the next probe
    // with a reset.
    drop(theirs);
    sleep(Duration::from_secs(3));
    far.run("ip", "link set eth0 up")?;
    let error = error_of(&mut waiting, forgotten)?;
    assert_eq!(error, Errno::CONNRESET);
    seen.push((forgotten_name, error));
    ensure!(!ours.wait(alive, Duration::from_millis(100))?, "it ended");
    // Nothing was set on it, so it goes on waiting.
    ensure!(!counting.wait(counting_socket, Duration::from_millis(100))?);

    let counts = |probes: u64, timeout: u64, retransmission: u64, reset: u64| {
        json!({
            "probes": probes,
            "user-timeout": timeout,
            "retransmission": retransmission,
            "reset": reset,
        })
    };
    assert_eq!(counted(&cgroup, "default")?, counts(2, 0, 2, 0));
    assert_eq!(counted(&cgroup, "derived")?, counts(0, 2, 0, 0));
    assert_eq!(counted(&cgroup, "patient")?, counts(0, 0, 0, 1));
    assert_eq!(counted(&cgroup, "dry")?, counts(0, 0, 0, 0));

    let events = told(&cgroup)?;
    let dead: Vec<_> = events
        .iter()
        .filter(|event| event["event"] == "dead_peer")
        .collect();
    assert_eq!(dead.len(), 7, "{events:?}");
    for (local, error) in seen {
        let event = dead
            .iter()
            .find(|event| event["local"] == local.to_string());
        let event = event.with_context(|| format!("no event of {local}"))?;
        assert_eq!(event["errno"], error.raw_os_error(), "{event}");
    }
    let event = dead
        .iter()
        .find(|event| event["local"] == name.to_string())
        .context("no event of the first connection")?;
    assert_eq!(event["remote"], address.to_string());
    assert_eq!(
        (&event["policy"], &event["cause"]),
        (&json!("default"), &json!("probes"))
    );
    assert_eq!(
        (&event["errno"], &event["probes"]),
        (&json!(110), &json!(2))
    );
    assert_eq!(event["cgroup"], cgroup.path());
    assert_eq!(event["cgroup_id"], cgroup.id()?);
    let silence = event["silent_ms"].as_u64().context("no silence")?;
    assert!((2900..4000).contains(&silence), "{event}");
    let kinds: Vec<_> = events
        .iter()
        .filter_map(|event| event["event"].as_str())
        .collect();
    assert!(
        kinds.contains(&"started") && kinds.contains(&"swept"),
        "{kinds:?}"
    );
    Ok(())
}

/// A connection whose peer is cut off.
fn cut_off(place: (&Cgroup, &Netns), theirs: &mut Probe) -> Result<(Probe, Socket, SocketAddr)> {
    let (_, address) = theirs.listener("10.99.0.2:0")?;
    let mut ours = Probe::start(Program::Static, place)?;
    let socket = ours.connected(address)?;
    Ok((ours, socket, address))
}

/// Connections of which everything is the application's are not the policy's, and
/// neither are those that never came about.
#[test]
fn only_where_a_policy_had_a_part() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    near.sysctl("net/ipv4/tcp_syn_retries", "1")?;
    let _agent = Agent::start(&cgroup, POLICY)?;
    let mut theirs = Probe::start(Program::Static, &far)?;
    let (_, address) = theirs.listener("10.99.0.2:0")?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &near))?;
    let timers = [
        (Sockopt::Idle, 2),
        (Sockopt::Interval, 2),
        (Sockopt::Probes, 1),
    ];
    let keepalive = (Sockopt::Keepalive, 1);
    let policys = [
        (Sockopt::Idle, 1),
        (Sockopt::Interval, 1),
        (Sockopt::Probes, 2),
        keepalive,
    ];

    let own = ours.socket(Kind::of(address))?;
    ours.set_all(own, &timers)?;
    ours.set_all(own, &[keepalive])?;
    ours.connect(own, address)?;
    let turned_on = ours.socket(Kind::of(address))?;
    ours.set_all(turned_on, &timers)?;
    ours.connect(turned_on, address)?;
    let attempt = ours.socket(Kind {
        nonblocking: true,
        ..Kind::default()
    })?;
    ours.set_all(attempt, &policys)?;

    far.run("ip", "link set eth0 down")?;
    ensure!(!ours.begin_to_connect(attempt, address)?, "it is connected");
    let error = error_of(&mut ours, attempt)?;
    assert!([Errno::TIMEDOUT, Errno::HOSTUNREACH].contains(&error));
    error_of(&mut ours, own)?;
    error_of(&mut ours, turned_on)?;
    let counted = counted(&cgroup, "default")?;
    assert_eq!(counted["probes"], 1, "{counted}");
    assert_eq!(counted["retransmission"], 0, "{counted}");
    Ok(())
}

/// One that was there before the agent, and counts that go on over a reload.
#[test]
fn of_existing_connections_and_over_a_reload() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let mut theirs = Probe::start(Program::Static, &far)?;
    let (mut ours, socket, address) = cut_off((&cgroup, &near), &mut theirs)?;
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    let later = ours.connected(address)?;
    far.run("ip", "link set eth0 down")?;
    assert_eq!(error_of(&mut ours, socket)?, Errno::TIMEDOUT);
    assert_eq!(error_of(&mut ours, later)?, Errno::TIMEDOUT);
    assert_eq!(counted(&cgroup, "default")?["probes"], 2);
    agent.reload(&format!("{POLICY}user-timeout = \"1h\"\n"))?;
    agent.reload(POLICY)?;
    assert_eq!(counted(&cgroup, "default")?["probes"], 2);
    Ok(())
}

/// Found while no agent ran, and told by the next one. Each set has a link of its own,
/// of which one is left; and none when enforcement is taken off.
#[test]
fn without_an_agent() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    let (near, far) = Netns::pair()?;
    let mut theirs = Probe::start(Program::Static, &far)?;
    let mut agent = Agent::start_pinned(&cgroup, POLICY, &pins, &[])?;
    agent.swept()?;
    let (mut ours, socket, _) = cut_off((&cgroup, &near), &mut theirs)?;
    agent.reload(&format!("{POLICY}user-timeout = \"1h\"\n"))?;
    agent.reload(POLICY)?;
    agent.kill()?;
    far.run("ip", "link set eth0 down")?;
    assert_eq!(error_of(&mut ours, socket)?, Errno::TIMEDOUT);
    assert_eq!(counted(&cgroup, "default")?["probes"], 1);

    let mut agent = Agent::start_pinned(&cgroup, POLICY, &pins, &[])?;
    agent.swept()?;
    assert_eq!(counted(&cgroup, "default")?["probes"], 1);
    let events = told(&cgroup)?;
    let dead = |event: &&Value| event["event"] == "dead_peer";
    assert_eq!(events.iter().filter(dead).count(), 1, "{events:?}");
    let links = || -> Result<usize> {
        let names = pins.all()?;
        let names = names.iter().filter_map(|pin| pin.file_name()?.to_str());
        Ok(names.filter(|name| name.starts_with("dead-peers-")).count())
    };
    assert_eq!(links()?, 1);
    agent.stop()?;
    assert_eq!(links()?, 1);
    detach(&cgroup)?;
    assert!(!Path::new(pins.name()).exists());
    Ok(())
}

/// Whoever follows is told at once; whoever does not look costs no wake-up.
#[test]
fn told_of_at_once() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let _agent = Agent::start(&cgroup, POLICY)?;
    let mut theirs = Probe::start(Program::Static, &far)?;
    let (mut ours, socket, address) = cut_off((&cgroup, &near), &mut theirs)?;
    let second = ours.connected(address)?;

    let mut command = agent_command();
    command.args(["events", "--json", "--cgroup", cgroup.path()]);
    command.stdout(Stdio::piped());
    let mut follower = Process::start(&mut command)?;
    let lines = BufReader::new(follower.child().stdout.take().context("no stdout")?);
    sleep(Duration::from_millis(500));
    far.run("ip", "link set eth0 down")?;
    assert_eq!(error_of(&mut ours, socket)?, Errno::TIMEDOUT);
    assert_eq!(error_of(&mut ours, second)?, Errno::TIMEDOUT);
    let mut dead = lines.lines().map_while(Result::ok).filter_map(|line| {
        let event: Value = serde_json::from_str(&line).ok()?;
        (event["event"] == "dead_peer").then_some(event)
    });
    assert!(dead.next().is_some() && dead.next().is_some());
    Ok(())
}

/// A rack goes down while the agent does not get to run: each one is counted, and
/// of how many nothing more is known is said.
#[test]
fn of_many_at_once_each_is_counted() -> Result<()> {
    const CONNECTIONS: u32 = 3000;
    require!(Need::Program("ip"), Need::Program("nft"));
    let ends = u64::from(2 * CONNECTIONS);
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    netns.run("ip", "link set lo up")?;
    let agent = Agent::start(&cgroup, POLICY)?;
    let mut crowd = Crowd::start((&cgroup, &netns), "127.0.0.1:7000")?;
    crowd.connect(CONNECTIONS)?;
    // Ended if it waits for more than there are.
    let mut command = Command::new("timeout");
    command.arg("60").arg(agent_binary());
    command.args(["events", "--json", "--cgroup", cgroup.path()]);
    command.stdout(Stdio::piped());
    let mut follower = Process::start(&mut command)?;
    let lines = BufReader::new(follower.child().stdout.take().context("no stdout")?);
    sleep(Duration::from_millis(500));

    agent.signal(Signal::STOP)?;
    netns.run("nft", "add table inet t")?;
    netns.run(
        "nft",
        "add chain inet t i { type filter hook input priority 0; policy drop; }",
    )?;
    let probes = || -> Result<Option<u64>> { Ok(counted(&cgroup, "default")?["probes"].as_u64()) };
    wait_until(LIMIT, "all to be counted", || Ok(probes()? == Some(ends)))
        .with_context(|| format!("{:?} of {ends}", probes()))?;
    agent.signal(Signal::CONT)?;

    let (mut told, mut skipped, mut lost) = (0, 0, 0);
    for line in lines.lines() {
        let event: Value = serde_json::from_str(&line?)?;
        match event["event"].as_str() {
            Some("dead_peer") => told += 1,
            Some("skipped") => skipped += event["skipped"].as_u64().context("no number")?,
            Some("dead_peers_lost") => lost += event["lost"].as_u64().context("no number")?,
            _ => {}
        }
        if told + skipped + lost >= ends {
            break;
        }
    }
    ensure!(
        told > 0 && lost > 0,
        "{told} told, {skipped} skipped, {lost} lost"
    );
    assert_eq!(
        told + skipped + lost,
        ends,
        "{told} told, {skipped} skipped, {lost} lost"
    );
    assert_eq!(probes()?, Some(ends));
    Ok(())
}

#[test]
fn no_agent_is_an_error() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut command = agent_command();
    command.args(["events", "--cgroup", cgroup.path()]);
    let output = output(&mut command, LIMIT)?;
    assert_eq!(output.code, Some(1));
    assert!(
        output.stderr.contains("no agent answers"),
        "{}",
        output.stderr
    );
    Ok(())
}
