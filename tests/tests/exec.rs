//! `exec`: a command with a policy of its own.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use keepalive_tests::{
    Agent, Cgroup, Need, Options, Place, Probe, Process, Program, agent_binary, output, require,
    wait_until,
};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_mins(1);

/// `exec` with these options in a cgroup, before the words of a command.
fn exec(cgroup: &Cgroup, options: &[&str]) -> Command {
    let mut command = Place::from(cgroup).command(agent_binary());
    command.arg("exec").args(options).arg("--");
    command
}

/// Waits until nothing is left of it in the cgroup that it was run in.
fn wait_until_nothing_is_left(cgroup: &Cgroup) -> Result<()> {
    wait_until(LIMIT, "the cgroup to be removed", || {
        let mut entries = fs::read_dir(cgroup.directory())?.flatten();
        let processes = fs::read_to_string(cgroup.directory().join("cgroup.procs"))?;
        Ok(processes.is_empty() && !entries.any(|entry| entry.path().is_dir()))
    })
}

#[test]
fn a_policy_of_its_own() -> Result<()> {
    require!(Need::Built(Program::Static), Need::Built(Program::First));
    let cgroup = Cgroup::new()?;
    let mut probe =
        Probe::start_by(exec(&cgroup, &["--idle", "33s"]).arg(Program::Static.path()?))?;
    let (socket, _) = probe.connection()?;
    assert_eq!(probe.options(socket)?, Options::on(33, 10, 6));
    // What is beside it is left alone.
    let mut beside = Probe::start(Program::Static, &cgroup)?;
    let (other, _) = beside.connection()?;
    assert_eq!(beside.options(other)?, Options::UNTOUCHED);
    beside.finish()?;
    probe.finish()?;
    wait_until_nothing_is_left(&cgroup)?;

    for (variables, expected) in [
        (
            &[("KEEPIDLE", "34"), ("KEEPINTVL", "5"), ("KEEPCNT", "4")][..],
            "1 34 5 4",
        ),
        (&[("TCP_KEEPIDLE", "35"), ("KEEPIDLE", "34")], "1 35 10 6"),
        (&[("KEEPALIVE", "off"), ("KEEPIDLE", "34")], "0 34 10 6"),
    ] {
        let mut command = exec(&cgroup, &[]);
        command
            .arg(Program::First.path()?)
            .envs(variables.iter().copied());
        let done = output(&mut command, LIMIT)?;
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        assert_eq!(done.stdout.lines().next(), Some(expected), "{variables:?}");
    }
    wait_until_nothing_is_left(&cgroup)
}

#[test]
fn ends_as_the_command_does() -> Result<()> {
    require!(Need::Program("sh"));
    let cgroup = Cgroup::new()?;
    for (words, code) in [
        (&["sh", "-c", "exit 7"][..], 7),
        // Its own children are all that it finds.
        (
            &[
                "sh",
                "-c",
                "read -r all </proc/$$/task/$$/children; test -z \"$all\"",
            ],
            0,
        ),
        (&["/nonexistent"], 127),
        (&["/"], 126),
    ] {
        let done = output(exec(&cgroup, &[]).args(words), LIMIT)?;
        assert_eq!(done.code, Some(code), "{words:?}: {}", done.stderr);
    }
    let done = output(exec(&cgroup, &["--idle", "5"]).arg("true"), LIMIT)?;
    assert_eq!(done.code, Some(1));
    assert!(done.stderr.contains("idle"), "{}", done.stderr);

    let mut command = Process::start(exec(&cgroup, &[]).args(["sleep", "100"]))?;
    let is_sleep = || {
        let name = fs::read_to_string(format!("/proc/{}/comm", command.id()))?;
        Ok(name.trim() == "sleep")
    };
    wait_until(LIMIT, "the command to begin", is_sleep)?;
    command.signal(Signal::TERM)?;
    assert_eq!(command.wait(LIMIT)?.signal(), Some(15));
    wait_until_nothing_is_left(&cgroup)
}

/// Whatever of it is killed, no cgroup stays, at the latest from the next start on.
#[test]
fn leaves_nothing_behind() -> Result<()> {
    require!(Need::Built(Program::Static));
    let cgroup = Cgroup::new()?;
    let start = || Probe::start_by(exec(&cgroup, &[]).arg(Program::Static.path()?));
    let mut killed = start()?;
    killed.connection()?;
    drop(killed);
    wait_until_nothing_is_left(&cgroup)?;

    let mut orphan = start()?;
    orphan.connection()?;
    let supervisors = fs::read_to_string(cgroup.directory().join("cgroup.procs"))?;
    let [supervisor] = supervisors.lines().collect::<Vec<_>>()[..] else {
        anyhow::bail!("not one supervisor: {supervisors}");
    };
    let supervisor = rustix::process::Pid::from_raw(supervisor.parse()?).context("no process")?;
    rustix::process::kill_process(supervisor, Signal::KILL)?;
    wait_until(LIMIT, "enforcement to end with it", || {
        let (socket, _) = orphan.connection()?;
        Ok(orphan.options(socket)? == Options::UNTOUCHED)
    })?;
    orphan.finish()?;
    let done = output(exec(&cgroup, &[]).arg("true"), LIMIT)?;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    wait_until_nothing_is_left(&cgroup)
}

/// For an agent above, what the policy of a command sets is as if the command had
/// set it.
#[test]
fn an_agent_above_has_the_last_word() -> Result<()> {
    require!(Need::Built(Program::Static));
    let cgroup = Cgroup::new()?;
    let agent = Agent::start(
        &cgroup,
        "[default]\nidle = { default = '30s', at-most = '40s' }\n",
    )?;
    for (idle, expected) in [("35s", 35), ("50s", 40)] {
        let mut command = exec(&cgroup, &["--idle", idle]);
        let mut probe = Probe::start_by(command.arg(Program::Static.path()?))?;
        let (socket, _) = probe.connection()?;
        assert_eq!(probe.options(socket)?, Options::on(expected, 10, 6));
        probe.finish()?;
    }
    agent.stop()?;
    wait_until_nothing_is_left(&cgroup)
}
