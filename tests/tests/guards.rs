//! The test bed itself: what the guards own is gone when they are, also after a
//! panic.

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use keepalive_tests::{
    Cgroup, Need, Netns, Options, Probe, Program, Sockopt, between, missing, require, timer,
    wait_until,
};

#[test]
fn a_panic_leaves_nothing_behind() -> Result<()> {
    require!(Need::Program("ip"));
    let panicked = catch_unwind(|| {
        let cgroup = Cgroup::new().expect("a cgroup");
        let child = cgroup.child("child").expect("a cgroup");
        let (near, _far) = Netns::pair().expect("two namespaces");
        let probe = Probe::start(Program::Static, (&child, &near)).expect("a probe");
        std::panic::panic_any((cgroup.directory().to_owned(), probe.id()));
    });
    let payload = panicked.expect_err("it did not panic");
    let (directory, process) = payload.downcast_ref::<(PathBuf, u32)>().expect("a pair");
    assert!(!directory.exists());
    assert!(!Path::new(&format!("/proc/{process}")).exists());
    Ok(())
}

#[test]
fn a_cgroup_goes_with_the_processes_in_it() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    probe.connection()?;
    drop(cgroup);
    assert!(probe.connection().is_err());
    Ok(())
}

#[test]
fn a_process_starts_in_its_cgroup_and_namespace() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    for program in [Program::Dynamic, Program::Static, Program::Raw] {
        let mut probe = Probe::start(program, (&cgroup, &netns))?;
        probe.connection()?;
        let proc = PathBuf::from(format!("/proc/{}", probe.id()));
        let cgroups = std::fs::read_to_string(proc.join("cgroup"))?;
        let expected = format!("0::{}", cgroup.path());
        assert!(cgroups.lines().any(|line| line == expected), "{cgroups}");
        let ours = std::fs::read_link("/proc/self/ns/net")?;
        assert_ne!(std::fs::read_link(proc.join("ns/net"))?, ours);
        let executable = std::fs::read_link(proc.join("exe"))?;
        assert_eq!(executable, program.path()?.canonicalize()?);
    }
    Ok(())
}

/// What the other tests rely on: the probe alters nothing by itself, and what it
/// is told to set is seen from inside and from outside.
#[test]
fn a_probe_sets_what_it_is_told_and_nothing_else() -> Result<()> {
    require!(Need::Program("ss"));
    let netns = Netns::new()?;
    for program in [Program::Dynamic, Program::Static, Program::Raw] {
        let mut probe = Probe::start(program, &netns)?;
        let (connecting, accepting) = probe.connection()?;
        assert_eq!(probe.options(connecting)?, Options::UNTOUCHED);
        assert_eq!(probe.options(accepting)?, Options::UNTOUCHED);
        probe.set_all(
            connecting,
            &[
                (Sockopt::Idle, 61),
                (Sockopt::Interval, 11),
                (Sockopt::Probes, 7),
                (Sockopt::UserTimeout, 5000),
                (Sockopt::Keepalive, 1),
            ],
        )?;
        let expected = Options::on(61, 11, 7).user_timeout(5000);
        assert_eq!(probe.options(connecting)?, expected);
        assert_eq!(probe.options(accepting)?, Options::UNTOUCHED);
    }
    let mut probe = Probe::start(Program::Raw, &netns)?;
    let (connecting, accepting) = probe.connection()?;
    probe.set_all(connecting, &[(Sockopt::Idle, 61), (Sockopt::Keepalive, 1)])?;
    let (here, there) = (probe.name(connecting)?, probe.name(accepting)?);
    let seen = timer(Some(&netns), &between(here, there))?;
    assert!(seen.is_some_and(|timer| timer.is_fresh_keepalive(61)));
    assert_eq!(timer(Some(&netns), &between(there, here))?, None);
    Ok(())
}

#[test]
fn waiting_and_needs_have_an_end() {
    let start = std::time::Instant::now();
    assert!(wait_until(Duration::from_millis(50), "nothing", || Ok(false)).is_err());
    assert!(start.elapsed() < Duration::from_secs(5));
    let reason = missing(&[Need::Program("no-such-program")]);
    assert!(reason.is_some());
}
