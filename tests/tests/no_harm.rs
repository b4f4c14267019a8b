//! Never worse than without the agent: what lives through an outage by itself
//! lives through it with the agent, what an operator said elsewhere counts, and
//! what is to be left alone is.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Kind, Need, Netns, Options, Place, Probe, Program, Socket, Sockopt,
    agent_binary, errno, output, require,
};
use rustix::io::Errno;

/// TCP_RTO_MAX_MS, of Linux 6.15.
const RTO_MAX: (i32, i32) = (6, 44);

/// What is told to the far end stays there: nothing comes back, and it does not
/// show.
fn cut(far: &Netns) -> Result<()> {
    far.run("ip", "route add blackhole 10.99.0.1/32").map(drop)
}

fn mend(far: &Netns) -> Result<()> {
    far.run("ip", "route del blackhole 10.99.0.1/32").map(drop)
}

/// A connection with these options set before it is made.
fn connected(probe: &mut Probe, options: &[(Sockopt, i32)], to: &str) -> Result<Socket> {
    let to = to.parse()?;
    let socket = probe.socket(Kind::of(to))?;
    probe.set_all(socket, options)?;
    probe.connect(socket, to)?;
    Ok(socket)
}

#[test]
fn an_outage_is_survived_whatever_user_timeout_the_application_has() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let cured = cgroup.child("cured")?;
    let (near, far) = Netns::pair()?;
    let config = format!(
        "[default]\nidle = \"2s\"\ninterval = \"1s\"\nprobes = 4\n\
         [[policy]]\nname = \"cured\"\ncgroup = \"{}\"\nuser-timeout = {{ at-least = \"derive\" }}\n",
        cured.path()
    );
    let agent = Agent::start(&cgroup, &config)?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &near))?;
    let mut also_ours = Probe::start(Program::Raw, (&cured, &near))?;
    let mut control = Probe::start(Program::Static, &near)?;
    let mut theirs = Probe::start(Program::Static, &far)?;
    let (listener, address) = theirs.listener("10.99.0.2:0")?;
    let address = address.to_string();

    let timeout = [(Sockopt::UserTimeout, 1500)];
    let ending = [
        (Sockopt::UserTimeout, 1500),
        (Sockopt::Keepalive, 1),
        (Sockopt::Idle, 2),
        (Sockopt::Interval, 1),
    ];
    let with = connected(&mut ours, &timeout, &address)?;
    let plain = connected(&mut ours, &[], &address)?;
    let cured = connected(&mut also_ours, &timeout, &address)?;
    let without = connected(&mut control, &timeout, &address)?;
    // That the outage is one: with keepalive of its own this one ends by itself.
    let lost = connected(&mut control, &ending, &address)?;
    for _ in 0..5 {
        theirs.accept(listener)?;
    }
    assert_eq!(ours.options(with)?, Options::UNTOUCHED.user_timeout(1500));
    assert_eq!(ours.options(plain)?, Options::on(2, 1, 4));
    assert_eq!(
        also_ours.options(cured)?,
        Options::on(2, 1, 4).user_timeout(6000)
    );

    // Shorter than interval × (probes − 1), from before the first probe on.
    sleep(Duration::from_millis(1500));
    cut(&far)?;
    sleep(Duration::from_millis(2500));
    mend(&far)?;
    for (probe, socket, name) in [
        (&mut ours, with, "with a user-timeout"),
        (&mut also_ours, cured, "cured"),
        (&mut control, without, "without the agent"),
    ] {
        ensure!(!probe.wait(socket, Duration::from_secs(1))?, "{name}: lost");
        probe.send(socket, "x")?;
    }
    ensure!(!ours.wait(plain, Duration::ZERO)?, "nothing set: lost");
    ensure!(
        control.wait(lost, Duration::from_secs(1))?,
        "nothing was cut"
    );

    let finished = agent.stop()?;
    assert_eq!(finished.count("default", "user_timeout_conflict"), 1);
    assert_eq!(finished.count("cured", "user_timeout_conflict"), 0);
    assert_eq!(finished.count("default", "turned_on"), 1);
    Ok(())
}

/// As servers do that set their options after `accept()`: found by the next sweep.
#[test]
fn keepalive_gives_way_to_a_user_timeout_that_is_set_later() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, "[default]\nidle = \"50s\"\n")?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (server, client) = probe.connection()?;
    probe.set(server, Sockopt::UserTimeout, 20_000)?;
    // Its own keepalive, beside that: the timers of the policy are given back.
    probe.set_all(
        client,
        &[(Sockopt::Idle, 15), (Sockopt::UserTimeout, 18_000)],
    )?;
    agent.reload("[default]\nidle = \"40s\"\n")?;
    assert!(!probe.options(server)?.keepalive);
    assert_eq!(
        probe.options(client)?,
        Options::on(15, 75, 9).user_timeout(18_000)
    );
    // The cure brings both back.
    agent.reload("[default]\nidle = \"40s\"\nuser-timeout = { at-least = \"derive\" }\n")?;
    assert_eq!(
        probe.options(server)?,
        Options::on(40, 10, 6).user_timeout(100_000)
    );
    assert_eq!(
        probe.options(client)?,
        Options::on(15, 10, 6).user_timeout(75_000)
    );
    Ok(())
}

#[test]
fn a_derived_user_timeout_follows_its_timers() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let derive = |probes: u32| format!("[default]\nprobes = {probes}\nuser-timeout = \"derive\"\n");
    let mut agent = Agent::start(&cgroup, &derive(6))?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (socket, _) = probe.connection()?;
    assert_eq!(
        probe.options(socket)?,
        Options::on(60, 10, 6).user_timeout(120_000)
    );
    for (idle, probes, user_timeout) in [(100, 5, 150_000), (15, 4, 55_000), (100, 6, 160_000)] {
        probe.set(socket, Sockopt::Idle, idle)?;
        agent.reload(&derive(probes))?;
        let expected = Options::on(idle, 10, i32::try_from(probes)?).user_timeout(user_timeout);
        assert_eq!(probe.options(socket)?, expected);
    }
    // It was never the application's.
    agent.reload("[default]\n")?;
    assert_eq!(probe.options(socket)?, Options::on(100, 10, 6));
    Ok(())
}

#[test]
fn what_an_operator_tuned_is_not_loosened() -> Result<()> {
    require!();
    let netns = Netns::new()?;
    netns.sysctl("net/ipv4/tcp_keepalive_time", "20")?;
    netns.sysctl("net/ipv4/tcp_keepalive_intvl", "90")?;
    netns.sysctl("net/ipv4/tcp_keepalive_probes", "4")?;
    let cgroup = Cgroup::new()?;
    let [written, sysctl, left] = ["written", "sysctl", "left"].map(|name| cgroup.child(name));
    let (written, sysctl, left) = (written?, sysctl?, left?);
    let timers = |name: &str, cgroup: &Cgroup, idle: &str, interval: &str, probes: &str| {
        format!(
            "[[policy]]\nname = \"{name}\"\ncgroup = \"{}\"\nidle = {idle}\ninterval = {interval}\n\
             probes = {probes}\n",
            cgroup.path()
        )
    };
    let config = [
        "[default]\n".to_owned(),
        timers("written", &written, "'60s'", "'10s'", "6"),
        timers(
            "sysctl",
            &sysctl,
            "'sysctl'",
            "{ default = 'sysctl', at-most = '45s' }",
            "'sysctl'",
        ),
        timers(
            "left",
            &left,
            "'leave'",
            "{ default = 'leave', at-most = '45s' }",
            "'leave'",
        ),
    ];
    let config = config.concat();
    // Who loosens is told so, where the agent is.
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    fs::write(&file, &config)?;
    let mut check = Place::from(&netns).command(agent_binary());
    check.arg("check").arg("--config").arg(file.path());
    let said = output(&mut check, Duration::from_secs(30))?.stdout;
    for (words, count) in [
        ("policy written: idle = \"1m\" is larger than the 20 of", 1),
        ("policy written: probes = 6 is larger than the 4 of", 1),
        ("is larger than", 2),
    ] {
        // Lines are wrapped.
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(said.matches(words).count(), count, "{words}: {said}");
    }
    let _agent = Agent::start(&cgroup, &config)?;
    for (cgroup, expected) in [
        (&cgroup, Options::on(20, 10, 4)),
        (&written, Options::on(60, 10, 6)),
        (&sysctl, Options::on(20, 45, 4)),
        (&left, Options::on(20, 90, 4)),
    ] {
        let mut probe = Probe::start(Program::Static, (cgroup, &netns))?;
        let (connecting, accepting) = probe.connection()?;
        assert_eq!(probe.options(connecting)?, expected);
        assert_eq!(probe.options(accepting)?, expected);
    }
    Ok(())
}

#[test]
fn connections_that_are_ignored_are_counted_and_not_touched() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut early = Probe::start(Program::Static, &cgroup)?;
    let (existing, _) = early.connection()?;
    let config = "[default]\nignore = true\nidle = { exactly = \"5s\" }\n";
    let mut agent = Agent::start(&cgroup, config)?;
    agent.swept()?;
    let mut probe = Probe::start(Program::Raw, &cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    assert_eq!(early.options(existing)?, Options::UNTOUCHED);
    assert_eq!(probe.options(connecting)?, Options::UNTOUCHED);
    assert_eq!(probe.options(accepting)?, Options::UNTOUCHED);
    let finished = agent.stop()?;
    assert_eq!(finished.count("default", "seen"), 2);
    assert_eq!(finished.count("default", "left_alone"), 2);
    assert_eq!(finished.count_existing("default", "left_alone"), 2);
    Ok(())
}

/// Fills what the peer does not read; whether the connection is there after that
/// time.
fn lives_unread(probe: &mut Probe, socket: Socket, time: Duration) -> Result<bool> {
    // As much as the probe reads in a line.
    let text = "x".repeat(400);
    for _ in 0..50_000 {
        match probe.send(socket, &text) {
            Ok(()) => {}
            Err(error) if errno(&error) == Some(Errno::AGAIN) => {
                return Ok(!probe.wait(socket, time)?);
            }
            Err(error) if errno(&error) == Some(Errno::TIMEDOUT) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    anyhow::bail!("the peer's buffers are endless")
}

/// A peer that answers and reads nothing: a derived user-timeout ends it, as the
/// documentation says, and give-up spares it.
#[test]
fn giving_up_spares_slow_readers() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let derived = cgroup.child("derived")?;
    let config = format!(
        "[default]\nidle = \"1s\"\ninterval = \"1s\"\nprobes = 2\ngive-up = \"4s\"\n\
         [[policy]]\nname = \"derived\"\ncgroup = \"{}\"\ngive-up = \"leave\"\n\
         user-timeout = \"derive\"\n",
        derived.path()
    );
    let netns = Netns::new()?;
    netns.sysctl("net/ipv4/tcp_retries2", "3")?;
    let _agent = Agent::start(&cgroup, &config)?;
    for (cgroup, lives) in [(&derived, false), (&cgroup, true)] {
        let mut probe = Probe::start(Program::Static, (cgroup, &netns))?;
        let (listener, address) = probe.listener("127.0.0.1:0")?;
        let socket = probe.socket(Kind {
            nonblocking: true,
            ..Kind::of(address)
        })?;
        probe.connect(socket, address)?;
        probe.accept(listener)?;
        let lived = lives_unread(&mut probe, socket, Duration::from_secs(8))?;
        assert_eq!(lived, lives, "{}", cgroup.path());
    }
    Ok(())
}

#[test]
fn data_in_flight_to_a_dead_peer_is_given_up_in_time() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    // Without a bound 102 s, which tells the two apart.
    near.sysctl("net/ipv4/tcp_retries2", "8")?;
    let config = "[default]\ninterval = \"1s\"\ngive-up = \"9s\"\n";
    let agent = Agent::start(&cgroup, config)?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &near))?;
    let mut control = Probe::start(Program::Static, &near)?;
    let mut theirs = Probe::start(Program::Static, &far)?;
    let (_, address) = theirs.listener("10.99.0.2:0")?;
    let with = ours.connected(address)?;
    let without = control.connected(address)?;
    let (level, number) = RTO_MAX;
    let unused = control.socket(Kind::default())?;
    let is_known = control.set_raw(unused, level, number, 1000).is_ok();
    cut(&far)?;
    ours.send(with, "x")?;
    control.send(without, "x")?;
    let given_up = ours.wait(with, Duration::from_secs(10))?;
    assert_eq!(given_up, is_known);
    assert!(!control.wait(without, Duration::ZERO)?, "without the agent");
    if is_known {
        let error = ours.receive(with).unwrap_err();
        assert_eq!(errno(&error), Some(Errno::TIMEDOUT));
    }
    let finished = agent.stop()?;
    let unsupported = finished.count("default", "give_up_unsupported");
    assert_eq!(unsupported == 0, is_known);
    assert_eq!(finished.count("default", "failed"), 0);
    Ok(())
}

/// As with socket activation: the cgroup is that of the listener's maker.
#[test]
fn a_local_port_names_what_is_accepted_on_it() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    let (other_listener, other) = probe.listener("127.0.0.1:0")?;
    let config = format!(
        "[default]\nidle = \"50s\"\n\
         [[policy]]\nname = \"backend\"\nlocal-port = {port}\nidle = \"30s\"\n\
         [[policy]]\nname = \"range\"\nlocal-port = \"1-65535\"\nremote = \"127.0.0.0/8\"\n\
         port = {port}\nidle = \"20s\"\n",
        port = address.port()
    );
    let mut agent = Agent::start(&cgroup, &config)?;
    let connecting = probe.connected(address)?;
    let accepted = probe.accept(listener)?;
    let elsewhere = probe.connected(other)?;
    let also_accepted = probe.accept(other_listener)?;
    for (socket, idle) in [
        (connecting, 20),
        (accepted, 30),
        (elsewhere, 50),
        (also_accepted, 50),
    ] {
        assert_eq!(probe.options(socket)?.idle, idle, "{socket:?}");
    }
    // The sweep decides the same.
    agent.reload(&config.replace("30s", "31s").replace("20s", "21s"))?;
    for (socket, idle) in [
        (connecting, 21),
        (accepted, 31),
        (elsewhere, 50),
        (also_accepted, 50),
    ] {
        assert_eq!(probe.options(socket)?.idle, idle, "{socket:?}");
    }
    Ok(())
}
