//! The governed cgroup goes and comes again under another id, as that of a service
//! that is restarted.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use keepalive_tests::{
    Agent, Cgroup, Options, Pins, Probe, Program, detach, require, status, wait_until,
};

const LIMIT: Duration = Duration::from_secs(30);
const OURS: Options = Options::on(70, 10, 6);
const POLICY: &str = "[default]\nidle = \"70s\"\n";

fn connection(cgroup: &Cgroup) -> Result<[Options; 2]> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    Ok([probe.options(connecting)?, probe.options(accepting)?])
}

fn follows(pins: Option<&Pins>) -> Result<()> {
    let slice = Cgroup::new()?;
    // Not there yet.
    let service = slice.child("redis.service")?;
    let path = service.path().to_owned();
    let mut agent = match pins {
        None => Agent::start(&service, POLICY)?,
        Some(pins) => Agent::start_pinned(&service, POLICY, pins, &[])?,
    };
    agent.swept()?;
    assert_eq!(connection(&service)?, [OURS; 2]);
    let mut service = Some(service);
    for _ in 0..3 {
        let id = service.as_ref().context("none")?.id()?;
        drop(service.take());
        assert_eq!(agent.waits()?["cgroup"], path);
        let again = slice.child("redis.service")?;
        assert_ne!(again.id()?, id);
        agent.started_again()?;
        assert_eq!(connection(&again)?, [OURS; 2]);
        let found = status(&again)?;
        assert_eq!(found.set["cgroup_id"], again.id()?, "{}", found.report);
        if let Some(pins) = pins {
            assert!(pins.link(&again)?.exists());
            // Dead peers are counted a moment later.
            wait_until(LIMIT, "all pins", || Ok(pins.all()?.len() == 3))?;
        }
        service = Some(again);
    }
    // So fast that the kernel has not let go of the one before.
    let service = service.context("none")?;
    for _ in 0..50 {
        fs::remove_dir(service.directory())?;
        fs::create_dir(service.directory())?;
    }
    wait_until(LIMIT, "the last one to be governed", || {
        Ok(connection(&service)? == [OURS; 2])
    })?;
    wait_until(LIMIT, "status to agree", || {
        Ok(status(&service)?.set["cgroup_id"] == service.id()?)
    })?;
    agent.stop()?;
    detach(&service)?;
    assert_eq!(connection(&service)?, [Options::UNTOUCHED; 2]);
    if let Some(pins) = pins {
        assert!(pins.all()?.is_empty());
    }
    Ok(())
}

#[test]
fn enforcement_follows() -> Result<()> {
    require!();
    follows(None)
}

#[test]
fn pins_follow() -> Result<()> {
    require!();
    follows(Some(&Pins::new()))
}

/// Gone when the next agent starts, which waits for it.
#[test]
fn made_after_the_start() -> Result<()> {
    require!();
    let slice = Cgroup::new()?;
    let service = slice.child("redis.service")?;
    let directory = service.directory().to_owned();
    fs::remove_dir(&directory)?;
    let mut agent = Agent::start_waiting(&service, POLICY)?;
    fs::create_dir(&directory)?;
    agent.started_again()?;
    assert_eq!(connection(&service)?, [OURS; 2]);
    // A reload while there is none is what the next one gets.
    fs::remove_dir(&directory)?;
    agent.waits()?;
    agent.rewrite("[default]\nidle = \"71s\"\n")?;
    fs::create_dir(&directory)?;
    agent.started_again()?;
    wait_until(LIMIT, "the policy written meanwhile", || {
        Ok(connection(&service)? == [Options::on(71, 10, 6); 2])
    })?;
    fs::remove_dir(&directory)?;
    agent.waits()?;
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    fs::create_dir(&directory)?;
    assert_eq!(connection(&service)?, [Options::UNTOUCHED; 2]);
    Ok(())
}
