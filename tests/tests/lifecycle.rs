//! Coming, saying so, and going without a trace.

use std::{fs, thread};

use anyhow::{Context, Result};
use keepalive_tests::{Agent, Cgroup, Need, Options, Probe, Program, bpftool, require, wait_until};
use rustix::process::Signal;
use serde_json::json;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);
const OURS: Options = Options::on(70, 10, 6);
const POLICY: &str = "[default]\nidle = \"70s\"\n";

fn connection(cgroup: &Cgroup) -> Result<[Options; 2]> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    Ok([probe.options(connecting)?, probe.options(accepting)?])
}

#[test]
fn ends_on_sigint_and_sigterm() -> Result<()> {
    require!();
    for signal in [Signal::INT, Signal::TERM] {
        let cgroup = Cgroup::new()?;
        assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
        let agent = Agent::start(&cgroup, POLICY)?;
        let mut probe = Probe::start(Program::Static, &cgroup)?;
        let (connecting, accepting) = probe.connection()?;
        assert_eq!(probe.options(connecting)?, OURS);

        let finished = agent.stop_with(signal)?;
        assert_eq!(finished.code, Some(0), "{signal:?}: {}", finished.stderr);
        assert_eq!(finished.count("default", "seen"), 2);
        assert_eq!(finished.record["failures"], serde_json::json!([]));
        assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
        // A connection that has it keeps it.
        assert_eq!(probe.options(connecting)?, OURS);
        assert_eq!(probe.options(accepting)?, OURS);
    }
    Ok(())
}

#[test]
fn leaves_nothing_behind_when_killed() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let agent = Agent::start(&cgroup, POLICY)?;
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    agent.kill()?;
    // The kernel lets go of a dead process's links in its own time.
    wait_until(LIMIT, "the program to be gone", || {
        Ok(connection(&cgroup)? == [Options::UNTOUCHED; 2])
    })
}

#[test]
fn nothing_is_attached_afterwards() -> Result<()> {
    require!(Need::Program("bpftool"));
    let attached = |cgroup: &Cgroup| -> Result<usize> {
        let id = cgroup.id()?;
        // Not `cgroup show`, which fails on kernels older than itself.
        let shown = bpftool(&["link", "show"])?;
        let links = shown.as_array().context("no list")?;
        Ok(links.iter().filter(|link| link["cgroup_id"] == id).count())
    };
    let cgroup = Cgroup::new()?;
    assert_eq!(attached(&cgroup)?, 0);
    let agent = Agent::start(&cgroup, POLICY)?;
    assert_ne!(attached(&cgroup)?, 0);
    agent.stop()?;
    assert_eq!(attached(&cgroup)?, 0);
    let agent = Agent::start(&cgroup, POLICY)?;
    agent.kill()?;
    wait_until(LIMIT, "the program to be gone", || {
        Ok(attached(&cgroup)? == 0)
    })
}

#[test]
fn says_where_it_is_attached_and_what_it_assigned() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (one, two) = (root.child("one")?, root.child("two")?);
    let config = format!(
        "[default]\nidle = \"70s\"\n\
         [[policy]]\nname = \"both\"\ncgroup = [\"{}\", \"{}\"]\nidle = \"71s\"\n",
        one.path(),
        two.path()
    );
    let agent = Agent::start(&root, &config)?;
    let started = agent.started();
    let directory = root.directory().display().to_string();
    assert_eq!(started["cgroup"], directory, "{started}");
    let policies = started["policies"].as_array().context("no policies")?;
    assert!(policies.iter().any(|policy| policy["name"] == "default"));
    let both = policies.iter().find(|policy| policy["name"] == "both");
    assert_eq!(both.context("no `both`")?["cgroups"], 2, "{started}");
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0));
    assert_eq!(finished.stderr, "", "nothing to warn of");
    Ok(())
}

#[test]
fn survives_the_end_of_the_cgroups_it_governs() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let service = root.child("service")?;
    let config = format!(
        "[default]\nidle = \"70s\"\n[[policy]]\nname = \"service\"\ncgroup = \"{}\"\nidle = \"71s\"\n",
        service.path()
    );
    let agent = Agent::start(&root, &config)?;
    assert_eq!(connection(&service)?, [Options::on(71, 10, 6); 2]);
    drop(service);
    let again = root.child("other")?;
    assert_eq!(connection(&again)?, [OURS; 2]);
    drop(again);
    drop(root);
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(finished.count("service", "seen"), 2);
    assert_eq!(finished.count("default", "seen"), 2);
    Ok(())
}

const PROCESSES: usize = 4;
const CONNECTIONS: usize = 50;

/// Every connection is seen, also when several processes make them at once.
#[test]
fn counts_every_connection() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let agent = Agent::start(&cgroup, POLICY)?;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..PROCESSES)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let mut probe = Probe::start(Program::Static, &cgroup)?;
                    for _ in 0..CONNECTIONS {
                        let (connecting, accepting) = probe.connection()?;
                        probe.close(connecting)?;
                        probe.close(accepting)?;
                    }
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().expect("a worker panicked"))
    })?;
    let finished = agent.stop()?;
    let expected = u64::try_from(2 * PROCESSES * CONNECTIONS)?;
    for (counter, count) in [
        ("seen", expected),
        ("turned_on", expected),
        ("left_alone", 0),
        ("failed", 0),
    ] {
        assert_eq!(finished.count("default", counter), count, "{counter}");
    }
    Ok(())
}

/// What is in force is the whole config, though somebody is writing it when the agent
/// starts: a file that was emptied first says nothing.
#[test]
fn a_config_that_is_being_written_at_the_start() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    let path = file.path().to_owned();
    let writer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        fs::write(path, "[default]\nidle = \"71s\"\n")
    });
    let config = file.path().to_str().context("a name")?;
    let agent = Agent::start_on(&cgroup, &["--config", config], &["env"])?;
    writer.join().expect("a panic")?;
    assert_eq!(agent.started()["policies"][0]["idle"], "1m 11s");
    agent.stop()?;
    // Nothing comes to one that has been empty for some time.
    fs::write(file.path(), "")?;
    thread::sleep(Duration::from_millis(1100));
    let agent = Agent::start_on(&cgroup, &["--config", config], &["env"])?;
    assert_eq!(agent.started()["policies"], json!([]));
    agent.stop()?;
    Ok(())
}
