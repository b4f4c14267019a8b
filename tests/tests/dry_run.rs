//! Dry run: everything is decided and counted, and nothing is set.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use keepalive_tests::Sockopt::{Idle, Keepalive, Probes};
use keepalive_tests::{
    Agent, Cgroup, Kind, Need, Netns, Options, Probe, Program, Socket, Sockopt, between, require,
    timer, wait_until,
};
use serde_json::json;

/// An agent with `--dry-run`, and the file that it reads.
fn start_dry(cgroup: &Cgroup, config: &str) -> Result<(Agent, tempfile::NamedTempFile)> {
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    std::fs::write(&file, config)?;
    let path = file.path().to_str().context("a path that is no text")?;
    let agent = Agent::start_on(cgroup, &["--config", path, "--dry-run"], &["env"])?;
    Ok((agent, file))
}

/// A connection whose ends both have what the application set before.
fn connection(probe: &mut Probe, application: &[(Sockopt, i32)]) -> Result<[Socket; 2]> {
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    probe.set_all(listener, application)?;
    let connecting = probe.socket(Kind::of(address))?;
    probe.set_all(connecting, application)?;
    probe.connect(connecting, address)?;
    let accepting = probe.accept(listener)?;
    probe.close(listener)?;
    Ok([connecting, accepting])
}

/// What applications set here. The policies below fill in, move, or leave it.
const APPLICATIONS: [&[(Sockopt, i32)]; 4] = [
    &[],
    &[(Idle, 2000)],
    &[(Keepalive, 1), (Idle, 300), (Probes, 4)],
    &[(Keepalive, 1)],
];

/// What getsockopt shows before anybody does anything.
const BEFORE: [Options; 4] = [
    Options::UNTOUCHED,
    Options::on(2000, 75, 9).off(),
    Options::on(300, 75, 4),
    Options::on(7200, 75, 9),
];

const BOUNDED: &str = "[default]\nidle = { default = \"70s\", at-most = \"600s\" }\n\
                       probes = { exactly = 5 }\n";

/// The same under [`BOUNDED`].
const AFTER: [Options; 4] = [
    Options::on(70, 10, 5),
    Options::on(600, 10, 5),
    Options::on(300, 10, 5),
    Options::on(70, 10, 5),
];

/// Both ends of a connection for each of the applications.
fn connections(probe: &mut Probe) -> Result<Vec<[Socket; 2]>> {
    APPLICATIONS
        .iter()
        .map(|application| connection(probe, application))
        .collect()
}

fn check(
    probe: &mut Probe,
    sockets: &[[Socket; 2]],
    expected: &[Options; 4],
    when: &str,
) -> Result<()> {
    for (ends, expected) in sockets.iter().zip(expected) {
        for end in *ends {
            assert_eq!(probe.options(end)?, *expected, "{when}");
        }
    }
    Ok(())
}

#[test]
fn nothing_is_set_and_all_is_counted() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("ss"));
    let (cgroup, netns) = (Cgroup::new()?, Netns::new()?);
    let mut probe = Probe::start(Program::Static, (&cgroup, &netns))?;
    let old = connections(&mut probe)?;
    let filter = between(probe.name(old[0][0])?, probe.name(old[0][1])?);
    let (mut agent, _file) = start_dry(&cgroup, BOUNDED)?;
    let swept = agent.swept()?;
    assert_eq!(swept["waiting"], 0, "{swept}");
    let new = connections(&mut probe)?;
    check(&mut probe, &old, &BEFORE, "existing")?;
    check(&mut probe, &new, &BEFORE, "new")?;
    assert_eq!(timer(Some(&netns), &filter)?, None);
    let finished = agent.stop()?;
    check(&mut probe, &old, &BEFORE, "existing, afterwards")?;
    check(&mut probe, &new, &BEFORE, "new, afterwards")?;
    // Of both ends: idle is filled in on two applications' sockets and moved on
    // one, interval is filled in on all, probes are filled in on three and moved
    // on one; keepalive is turned on for two.
    for (counter, expected) in [
        ("seen", 8),
        ("turned_on", 4),
        ("turned_off", 0),
        ("filled", 2 * (2 + 4 + 3)),
        ("clamped", 2 * (1 + 1)),
        ("left_alone", 0),
        ("failed", 0),
    ] {
        assert_eq!(finished.count("default", counter), expected, "{counter}");
        assert_eq!(
            finished.count_existing("default", counter),
            expected,
            "existing, {counter}"
        );
    }
    assert_eq!(finished.record["failures"], json!([]));
    Ok(())
}

/// The counters of a dry run are those of the same without it.
#[test]
fn counts_as_enforcement_does() -> Result<()> {
    require!();
    let mut counted = Vec::new();
    for dry in [true, false] {
        let cgroup = Cgroup::new()?;
        let mut probe = Probe::start(Program::Static, &cgroup)?;
        connections(&mut probe)?;
        let (mut agent, _file) = if dry {
            let (agent, file) = start_dry(&cgroup, BOUNDED)?;
            (agent, Some(file))
        } else {
            (Agent::start(&cgroup, BOUNDED)?, None)
        };
        agent.swept()?;
        connections(&mut probe)?;
        let mut policies = agent.stop()?.record["policies"].take();
        assert_eq!(policies[0]["enforced"].take(), !dry);
        counted.push(policies);
    }
    assert_eq!(counted[0], counted[1]);
    Ok(())
}

#[test]
fn nothing_is_turned_off() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let own = &[(Keepalive, 1)];
    let old = connection(&mut probe, own)?;
    let (mut agent, _file) = start_dry(&cgroup, "[default]\nkeepalive = \"off\"\n")?;
    agent.swept()?;
    let new = connection(&mut probe, own)?;
    for end in [old, new].concat() {
        assert_eq!(probe.options(end)?, Options::on(7200, 75, 9));
    }
    let finished = agent.stop()?;
    assert_eq!(finished.count("default", "turned_off"), 2);
    assert_eq!(finished.count_existing("default", "turned_off"), 2);
    Ok(())
}

/// Of two policies one is only counted, and it does not leave its connections to
/// the next best.
#[test]
fn of_one_policy_alone() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (one, two) = (root.child("one")?, root.child("two")?);
    let mut in_one = Probe::start(Program::Static, &one)?;
    let mut in_two = Probe::start(Program::Static, &two)?;
    let mut of_one = connection(&mut in_one, &[])?.to_vec();
    let mut of_two = connection(&mut in_two, &[])?.to_vec();
    let config = format!(
        "[default]\nidle = \"70s\"\n\
         [[policy]]\nname = \"one\"\ncgroup = \"{}\"\nidle = \"71s\"\nenforce = false\n\
         [[policy]]\nname = \"two\"\ncgroup = \"{}\"\nidle = \"72s\"\n\
         [[policy]]\nname = \"rule\"\ncgroup = \"{}\"\nremote = \"127.0.0.2\"\nidle = \"73s\"\n\
         enforce = false\n",
        one.path(),
        two.path(),
        two.path(),
    );
    let mut agent = Agent::start(&root, &config)?;
    agent.swept()?;
    of_one.extend(connection(&mut in_one, &[])?);
    of_two.extend(connection(&mut in_two, &[])?);
    for end in of_one {
        assert_eq!(in_one.options(end)?, Options::UNTOUCHED);
    }
    for end in of_two {
        assert_eq!(in_two.options(end)?, Options::on(72, 10, 6));
    }
    let (listener, address) = in_two.listener("127.0.0.2:0")?;
    let connecting = in_two.connected(address)?;
    let accepting = in_two.accept(listener)?;
    assert_eq!(in_two.options(connecting)?, Options::UNTOUCHED);
    let peer = in_two.name(connecting)?;
    let expected = if peer.ip() == address.ip() {
        Options::UNTOUCHED
    } else {
        Options::on(72, 10, 6)
    };
    assert_eq!(in_two.options(accepting)?, expected, "from {peer}");
    let finished = agent.stop()?;
    assert_eq!(finished.count("one", "turned_on"), 2);
    assert_eq!(finished.count_existing("one", "turned_on"), 2);
    assert!(finished.count("rule", "turned_on") >= 1);
    assert_eq!(finished.count("default", "seen"), 0);
    Ok(())
}

#[test]
fn existing_connections_come_along_when_it_ends() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let old = connections(&mut probe)?;
    let dry = BOUNDED.replace("[default]", "[default]\nenforce = false");
    let mut agent = Agent::start(&cgroup, &dry)?;
    agent.swept()?;
    let new = connections(&mut probe)?;
    check(&mut probe, &old, &BEFORE, "existing, dry")?;
    check(&mut probe, &new, &BEFORE, "new, dry")?;
    agent.reload(BOUNDED)?;
    check(&mut probe, &old, &AFTER, "existing")?;
    check(&mut probe, &new, &AFTER, "new while dry")?;
    let newer = connections(&mut probe)?;
    check(&mut probe, &newer, &AFTER, "new")?;
    Ok(())
}

/// The option stands above what files say, also after they change.
#[test]
fn no_file_ends_that_of_the_command_line() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let old = connections(&mut probe)?;
    let (mut agent, file) = start_dry(&cgroup, BOUNDED)?;
    agent.swept()?;
    std::fs::write(
        &file,
        format!("{BOUNDED}enforce = true\ninterval = \"9s\"\n"),
    )?;
    agent.reloaded()?;
    let new = connections(&mut probe)?;
    check(&mut probe, &old, &BEFORE, "existing")?;
    check(&mut probe, &new, &BEFORE, "new")?;
    Ok(())
}

/// What was set stays set while nothing is enforced, and the same policy knows it
/// again afterwards.
#[test]
fn on_and_off_again_changes_nothing() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let old = connections(&mut probe)?;
    let dry = BOUNDED.replace("[default]", "[default]\nenforce = false");
    let mut agent = Agent::start(&cgroup, BOUNDED)?;
    agent.swept()?;
    check(&mut probe, &old, &AFTER, "enforced")?;
    for _ in 0..2 {
        agent.reload(&dry)?;
        check(&mut probe, &old, &AFTER, "dry")?;
        let new = connections(&mut probe)?;
        check(&mut probe, &new, &BEFORE, "new while dry")?;
        agent.reload(BOUNDED)?;
        check(&mut probe, &old, &AFTER, "enforced again")?;
        check(&mut probe, &new, &AFTER, "new while dry, enforced")?;
    }
    Ok(())
}

/// Fills in, and no more.
const FREE: &str = "[default]\nidle = \"310s\"\ninterval = \"7s\"\nprobes = 3\n";

/// What is there under [`FREE`].
const AFTER_FREE: [Options; 4] = [
    Options::on(310, 7, 3),
    Options::on(2000, 7, 3),
    Options::on(300, 7, 4),
    Options::on(310, 7, 3),
];

/// A policy is in force, the next one is counted first and then enforced: what the
/// one before set does not pass for the application's. Nor when the one in force
/// was itself only counted in between.
#[test]
fn the_next_policy_is_counted_before_it_is_enforced() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let dry = |config: &str| config.replace("[default]", "[default]\nenforce = false");
    let old = connections(&mut probe)?;
    let mut agent = Agent::start(&cgroup, BOUNDED)?;
    agent.swept()?;
    let new = connections(&mut probe)?;
    let mut follows = |config: &str, expected: &[Options; 4]| -> Result<()> {
        agent.reload(config)?;
        check(&mut probe, &old, expected, config)?;
        check(&mut probe, &new, expected, config)
    };
    for _ in 0..2 {
        follows(&dry(FREE), &AFTER)?;
        follows(FREE, &AFTER_FREE)?;
        follows(&dry(FREE), &AFTER_FREE)?;
        follows(&dry(BOUNDED), &AFTER_FREE)?;
        follows(BOUNDED, &AFTER)?;
    }
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(finished.record["failures"], json!([]));
    Ok(())
}

/// While connections of another policy wait for their turn, the sweep comes by
/// several times.
#[test]
fn existing_connections_are_counted_once() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (dry, due) = (root.child("dry")?, root.child("due")?);
    let mut in_dry = Probe::start(Program::Static, &dry)?;
    let mut in_due = Probe::start(Program::Static, &due)?;
    let counted = connection(&mut in_dry, &[])?;
    let waiting = connection(&mut in_due, &[])?;
    sleep(Duration::from_millis(1500));
    let config = format!(
        "[[policy]]\nname = \"dry\"\ncgroup = \"{}\"\nenforce = false\n\
         [[policy]]\nname = \"due\"\ncgroup = \"{}\"\nidle = \"1s\"\n",
        dry.path(),
        due.path()
    );
    let mut agent = Agent::start(&root, &config)?;
    let swept = agent.swept()?;
    assert_eq!(swept["waiting"], 2, "{swept}");
    for socket in waiting {
        wait_until(Duration::from_secs(10), "its turn", || {
            Ok(in_due.options(socket)? == Options::on(1, 10, 6))
        })?;
    }
    for socket in counted {
        assert_eq!(in_dry.options(socket)?, Options::UNTOUCHED);
    }
    let finished = agent.stop()?;
    for (counter, expected) in [("seen", 2), ("turned_on", 2), ("filled", 6)] {
        assert_eq!(
            finished.count_existing("dry", counter),
            expected,
            "{counter}"
        );
    }
    Ok(())
}
