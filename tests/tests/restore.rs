//! `detach --restore`: every connection gets back what its application had set.

use std::time::Duration;

use anyhow::{Result, ensure};
use keepalive_tests::Sockopt::{Idle, Interval, Keepalive, Probes, UserTimeout};
use keepalive_tests::{
    Agent, Cgroup, Kind, Options, Probe, Program, Socket, agent_command, output, require,
};

const LIMIT: Duration = Duration::from_mins(1);

/// Everything there is to set.
const EVERYTHING: [(keepalive_tests::Sockopt, i32); 5] = [
    (Keepalive, 1),
    (Idle, 7000),
    (Interval, 70),
    (Probes, 7),
    (UserTimeout, 700_000),
];

/// A connection on both of whose ends the application sets these options, before
/// it is established or after.
fn connection(
    probe: &mut Probe,
    before: &[(keepalive_tests::Sockopt, i32)],
    after: &[(keepalive_tests::Sockopt, i32)],
) -> Result<[Socket; 2]> {
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    probe.set_all(listener, before)?;
    let connecting = probe.socket(Kind::of(address))?;
    probe.set_all(connecting, before)?;
    probe.connect(connecting, address)?;
    let accepting = probe.accept(listener)?;
    probe.close(listener)?;
    for end in [connecting, accepting] {
        probe.set_all(end, after)?;
    }
    Ok([connecting, accepting])
}

fn detach(cgroup: &Cgroup, more: &[&str]) -> Result<String> {
    let mut command = agent_command();
    command.args(["detach", "--restore", "--cgroup", cgroup.path()]);
    let done = output(command.args(more), LIMIT)?;
    ensure!(done.code == Some(0), "{}{}", done.stdout, done.stderr);
    Ok(done.stdout)
}

/// What applications set, and when, and what their connections have without any
/// agent.
fn round(config: &str) -> Result<()> {
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, config)?;
    agent.swept()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let everything = Options::on(7000, 70, 7).user_timeout(700_000);
    let mut connections = Vec::new();
    for (before, after, expected) in [
        (&[][..], &[][..], Options::UNTOUCHED),
        (&EVERYTHING[..], &[][..], everything),
        (&[][..], &EVERYTHING[..], everything),
        (&[(Keepalive, 1)][..], &[][..], Options::on(7200, 75, 9)),
    ] {
        let ends = connection(&mut probe, before, after)?;
        connections.push((ends, expected));
    }
    let mut counted = Vec::new();
    for (ends, _) in &connections {
        for end in ends {
            counted.push(probe.options(*end)?);
        }
    }
    let said = detach(&cgroup, &["--dry-run"])?;
    ensure!(said.contains("would be detached"), "{said}");
    let mut after = Vec::new();
    for (ends, _) in &connections {
        for end in ends {
            after.push(probe.options(*end)?);
        }
    }
    assert_eq!(after, counted, "a dry run changed something");
    let said = detach(&cgroup, &[])?;
    ensure!(said.contains("detached from"), "{said}");
    for (ends, expected) in &connections {
        for end in ends {
            assert_eq!(probe.options(*end)?, *expected);
            // Nobody is held to anything any more.
            probe.set(*end, Idle, 30_000)?;
            assert_eq!(probe.options(*end)?.idle, 30_000);
        }
    }
    Ok(())
}

#[test]
fn what_a_default_filled_in_is_taken_back() -> Result<()> {
    require!();
    round("[default]\nidle = \"60s\"\nuser-timeout = \"100s\"")
}

#[test]
fn what_bounds_moved_is_given_back() -> Result<()> {
    require!();
    round(
        "[default]\nidle = { exactly = \"60s\" }\ninterval = { at-most = \"20s\" }\n\
         probes = { exactly = 3 }\nuser-timeout = { exactly = \"100s\" }",
    )
}

#[test]
fn what_keepalive_off_took_is_given_back() -> Result<()> {
    require!();
    round("[default]\nkeepalive = \"off\"")
}
