//! Others have `sock_ops` programs at the same cgroup: theirs go on as before,
//! and ours works beside them.

use anyhow::Result;
use keepalive_tests::{
    Agent, Cgroup, Neighbour, Options, Probe, Program, agent_command, output, require,
};

const OURS: Options = Options::on(70, 10, 6);
const POLICY: &str = "[default]\nidle = \"70s\"\n";

fn connection(cgroup: &Cgroup) -> Result<[Options; 2]> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    Ok([probe.options(connecting)?, probe.options(accepting)?])
}

/// How often one connection makes the kernel call the neighbour.
fn calls_for_one(neighbour: &mut Neighbour, cgroup: &Cgroup, expected: Options) -> Result<u64> {
    let before = neighbour.calls()?;
    assert_eq!(connection(cgroup)?, [expected; 2]);
    Ok(neighbour.calls()? - before)
}

fn goes_on_beside_us(how: &str) -> Result<()> {
    let cgroup = Cgroup::new()?;
    let mut neighbour = Neighbour::attach(&cgroup, how)?;
    let alone = calls_for_one(&mut neighbour, &cgroup, Options::UNTOUCHED)?;
    assert!(alone >= 2, "the neighbour was called {alone} times");

    let agent = Agent::start(&cgroup, POLICY)?;
    // Not fewer; more if we ask the kernel for callbacks that it did not.
    let beside = calls_for_one(&mut neighbour, &cgroup, OURS)?;
    assert!(beside >= alone, "{beside} calls instead of {alone}");
    assert_eq!(agent.stop()?.count("default", "seen"), 2);
    let after = calls_for_one(&mut neighbour, &cgroup, Options::UNTOUCHED)?;
    assert!(after >= alone, "{after} calls instead of {alone}");
    neighbour.detach()
}

#[test]
fn a_neighbour_attached_as_a_link() -> Result<()> {
    require!();
    goes_on_beside_us("link")
}

#[test]
fn a_neighbour_attached_the_older_way() -> Result<()> {
    require!();
    goes_on_beside_us("shared")
}

#[test]
fn a_neighbour_that_comes_and_goes_while_we_run() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let agent = Agent::start(&cgroup, POLICY)?;
    for how in ["link", "shared"] {
        let mut neighbour = Neighbour::attach(&cgroup, how)?;
        assert!(calls_for_one(&mut neighbour, &cgroup, OURS)? >= 2);
        neighbour.detach()?;
        assert_eq!(connection(&cgroup)?, [OURS; 2], "{how}");
    }
    assert_eq!(agent.stop()?.count("default", "seen"), 8);
    Ok(())
}

/// Attached without leave for others, it keeps the cgroup to itself: the kernel
/// refuses us, and we say so and leave.
#[test]
fn a_neighbour_that_wants_to_be_alone() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut neighbour = Neighbour::attach(&cgroup, "alone")?;
    let alone = calls_for_one(&mut neighbour, &cgroup, Options::UNTOUCHED)?;
    let mut command = agent_command();
    command.args(["run", "--cgroup", cgroup.path()]);
    let refused = output(&mut command, std::time::Duration::from_secs(20))?;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains(cgroup.path()), "{}", refused.stderr);
    let after = calls_for_one(&mut neighbour, &cgroup, Options::UNTOUCHED)?;
    assert_eq!(after, alone);
    neighbour.detach()
}

/// One above the other: each sees the connections below it.
#[test]
fn two_agents_one_above_the_other() -> Result<()> {
    require!();
    let above = Cgroup::new()?;
    let below = above.child("below")?;
    let outer = Agent::start(&above, "[default]\nidle = \"71s\"\n")?;
    let inner = Agent::start(&below, "[default]\nidle = \"72s\"\n")?;
    assert_eq!(connection(&above)?, [Options::on(71, 10, 6); 2]);
    // The kernel runs the lower program first.
    assert_eq!(connection(&below)?, [Options::on(72, 10, 6); 2]);
    assert_eq!(inner.stop()?.count("default", "seen"), 2);
    assert_eq!(outer.stop()?.count("default", "seen"), 4);
    Ok(())
}
