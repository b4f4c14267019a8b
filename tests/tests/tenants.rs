//! What a tenant does in a cgroup that was given to it: the node's policy holds
//! there, however deep and however long the names, and the agent goes on with
//! everything else.

use std::os::unix::fs::chown;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use keepalive_tests::{Agent, Cgroup, Need, Probe, Program, Socket, output, require, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
const TENANT: u32 = 4711;

/// Has the tenant run a script in its cgroup.
fn tenant(cgroup: &Cgroup, script: &str) -> Result<()> {
    let id = TENANT.to_string();
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid",
        &id,
        "--regid",
        &id,
        "--clear-groups",
        "sh",
        "-ec",
        script,
    ]);
    let done = output(command.current_dir(cgroup.directory()), LIMIT)?;
    ensure!(done.code == Some(0), "{script}: {}", done.stderr);
    Ok(())
}

fn delegated(root: &Cgroup, name: &str) -> Result<Cgroup> {
    let cgroup = root.child(name)?;
    for file in ["", "cgroup.procs", "cgroup.subtree_control"] {
        chown(cgroup.directory().join(file), Some(TENANT), Some(TENANT))?;
    }
    Ok(cgroup)
}

fn idle(probe: &mut Probe) -> Result<i32> {
    let (connecting, accepting): (Socket, Socket) = probe.connection()?;
    let idle = probe.options(connecting)?.idle;
    assert_eq!(probe.options(accepting)?.idle, idle);
    probe.close(connecting)?;
    probe.close(accepting)?;
    Ok(idle)
}

/// Waits until connections of a cgroup have this idle time.
fn gets(cgroup: &Cgroup, expected: i32) -> Result<()> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    wait_until(LIMIT, "the policy of a cgroup", || {
        Ok(idle(&mut probe)? == expected)
    })
}

fn policy(root: &Cgroup) -> String {
    let root = root.path();
    format!(
        "[default]\nidle = \"71s\"\n\
         [[policy]]\nname = \"tenant\"\ncgroup = \"{root}/named\"\nidle = \"72s\"\n\
         [[policy]]\nname = \"glob\"\ncgroup = \"{root}/glob/**\"\nidle = \"73s\"\n"
    )
}

/// Deeper than the kernel's walk goes, made before the start and after it.
#[test]
fn deep_below_the_policy() -> Result<()> {
    require!(Need::Program("setpriv"));
    let root = Cgroup::new()?;
    let tenants = [("plain", 71), ("named", 72), ("glob", 73)];
    let mut cgroups = Vec::new();
    for (name, idle) in tenants {
        let cgroup = delegated(&root, name)?;
        tenant(&cgroup, "mkdir -p $(printf 'd/%.0s' $(seq 60))")?;
        cgroups.push((cgroup, idle));
    }
    let _agent = Agent::start(&root, &policy(&root))?;
    for (cgroup, idle) in &cgroups {
        tenant(cgroup, "mkdir -p $(printf 'e/%.0s' $(seq 70))")?;
        for path in [
            "d/".repeat(30),
            "d/".repeat(60),
            "e/".repeat(33),
            "e/".repeat(70),
        ] {
            let below = cgroup.descendant(path.trim_end_matches('/'))?;
            gets(&below, *idle)?;
        }
    }
    Ok(())
}

/// Longer than the kernel reports: they go by the policy above, and what is made
/// elsewhere meanwhile has its own at once.
#[test]
fn paths_that_the_kernel_cuts_off() -> Result<()> {
    require!(Need::Program("setpriv"));
    let root = Cgroup::new()?;
    let cgroup = delegated(&root, "named")?;
    let glob = root.child("glob")?;
    let agent = Agent::start(&root, &policy(&root))?;
    let long = format!("{0}/{0}/{0}/{0}/{0}", "x".repeat(210));
    tenant(&cgroup, &format!("mkdir -p {long}"))?;
    tenant(
        &cgroup,
        &format!("for i in $(seq 300); do mkdir {long}/$i; rmdir {long}/$i; done"),
    )?;
    gets(&cgroup.descendant(&format!("{long}/y"))?, 72)?;
    gets(&glob.child("z")?, 73)?;
    wait_until(LIMIT, "the agent to say so", || {
        Ok(agent.said().contains("1022 bytes"))
    })?;
    let finished = agent.stop()?;
    let lines = finished
        .stderr
        .lines()
        .filter(|line| line.contains("1022 bytes"));
    assert_eq!(lines.count(), 1, "{}", finished.stderr);
    Ok(())
}
