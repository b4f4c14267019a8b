//! `status`: what is in force, from the kernel, with or without an agent.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Loaded, Need, Neighbour, Options, Output, Pins, Place, Probe, Program,
    agent_command, detach, output, require, status, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);

fn idle(seconds: u32) -> String {
    format!("[default]\nidle = \"{seconds}s\"\n")
}

fn connection(cgroup: &Cgroup) -> Result<[Options; 2]> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    Ok([probe.options(connecting)?, probe.options(accepting)?])
}

fn in_words(cgroup: &Cgroup) -> Result<Output> {
    let mut command = agent_command();
    command.args(["status", "--cgroup", cgroup.path()]);
    output(&mut command, LIMIT)
}

#[test]
fn nothing_in_force() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let found = status(&cgroup)?;
    assert_eq!(found.code, Some(3), "{}", found.report);
    assert_eq!(found.report["healthy"], false);
    assert_eq!(found.report["in_force"], json!([]));
    let said = in_words(&cgroup)?;
    assert_eq!(said.code, Some(3));
    assert_eq!(said.stdout, "nothing is in force\n");
    Ok(())
}

#[test]
fn everything_works() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, &idle(71))?;
    agent.swept()?;
    connection(&cgroup)?;
    let mut found = status(&cgroup)?;
    // What it says of the sweep comes just after its report of it.
    wait_until(LIMIT, "the sweep to be over", || {
        found = status(&cgroup)?;
        Ok(found.set["sweep"]["under_way"] == false && found.set["settled"] == true)
    })?;
    assert_eq!(found.code, Some(0), "{}", found.report);
    assert_eq!(found.report["healthy"], true);
    let set = &found.set;
    assert_eq!(set["cgroup"], cgroup.path());
    assert_eq!(set["cgroup_id"], cgroup.id()?);
    assert_eq!(set["attached"], true);
    assert_eq!(set["agent"], agent.id());
    assert_eq!(set["pinned"], false);
    assert_eq!(set["error"], json!(null));
    assert_eq!(set["policies"][0]["name"], "default");
    assert_eq!(set["policies"][0]["seen"], 2, "{set}");
    assert_eq!(set["agents_above"], json!([]));
    assert_eq!(set["foreign_programs"], json!([]));
    assert_eq!(set["reload"], json!(null));
    for part in [
        "config files",
        "control socket",
        "new connections",
        "existing connections",
    ] {
        assert_eq!(set["parts"][part]["status"], "active", "{part}: {set}");
    }
    let said = in_words(&cgroup)?;
    assert_eq!(said.code, Some(0), "{said:?}");
    for words in [
        cgroup.path(),
        &agent.id().to_string(),
        "ends with it",
        "default",
    ] {
        assert!(said.stdout.contains(words), "no {words}: {}", said.stdout);
    }
    Ok(())
}

/// A config that is not taken is no failure of the agent; it is told.
#[test]
fn the_last_reload_and_its_error() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, &idle(71))?;
    agent.swept()?;
    agent.reload_refused("[default]\nidle = 0\n")?;
    let mut found = status(&cgroup)?;
    wait_until(LIMIT, "the error", || {
        found = status(&cgroup)?;
        Ok(found.set["reload"]["error"].is_string())
    })?;
    let error = found.set["reload"]["error"].as_str().context("no error")?;
    assert!(error.contains("idle"), "{error}");
    assert!(in_words(&cgroup)?.stdout.contains("idle"));
    agent.reload(&idle(72))?;
    wait_until(LIMIT, "no error", || {
        let found = status(&cgroup)?;
        Ok(found.set["reload"]["at"].is_u64() && found.set["reload"]["error"].is_null())
    })?;
    assert_eq!(status(&cgroup)?.code, Some(0));
    Ok(())
}

/// Longer than the agent has room for: it is cut off, and the rest is told.
#[test]
fn a_very_long_error() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, &idle(71))?;
    let keys = (0..3000).map(|n| format!("[[policy]]\nname = \"\u{1f980}{n}\"\nidel = 1\n"));
    agent.reload_refused(&keys.collect::<String>())?;
    let mut found = status(&cgroup)?;
    wait_until(LIMIT, "the error", || {
        found = status(&cgroup)?;
        Ok(found.set["reload"]["error"].is_string())
    })?;
    assert_eq!(found.set["agent"], agent.id());
    let error = found.set["reload"]["error"].as_str().context("no error")?;
    assert!(error.contains("idel"), "{error}");
    Ok(())
}

/// Each is told of those above it, whose values hold; `explain` and `sockets` name
/// the same one.
#[test]
fn agents_one_above_the_other() -> Result<()> {
    require!();
    let above = Cgroup::new()?;
    let below = above.child("below")?;
    let mut outer = Agent::start(&above, "[default]\nidle = { exactly = \"71s\" }\n")?;
    let mut inner = Agent::start(&below, &idle(72))?;
    outer.swept()?;
    inner.swept()?;
    let mut probe = Probe::start(Program::Static, &below)?;
    let (socket, _) = probe.connection()?;
    assert_eq!(
        probe.options(socket)?.idle,
        71,
        "the one above has the last word"
    );
    assert_eq!(status(&above)?.set["agents_above"], json!([]));
    let set = status(&below)?.set;
    assert_eq!(set["agents_above"], json!([above.path()]), "{set}");
    assert!(in_words(&below)?.stdout.contains("last word"));

    let address = probe.name(socket)?;
    let mut command = agent_command();
    command.args([
        "explain",
        "--pid",
        &probe.id().to_string(),
        "--remote",
        &address.to_string(),
    ]);
    let explained = output(&mut command, LIMIT)?;
    let named = format!("agent {} on {}", outer.id(), above.path());
    assert!(explained.stdout.contains(&named), "{explained:?}");
    let mut command = agent_command();
    command.args(["sockets", "--json", "--cgroup", below.path()]);
    let listed = output(&mut command, LIMIT)?;
    let record: serde_json::Value = listed
        .stdout
        .lines()
        .map(serde_json::from_str::<serde_json::Value>)
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .find(|record| record["local_port"] == address.port())
        .context("not listed")?;
    assert_eq!(record["idle_source"], "policy", "{record}");
    Ok(())
}

#[test]
fn programs_of_others_on_the_way() -> Result<()> {
    require!();
    let above = Cgroup::new()?;
    let cgroup = above.child("governed")?;
    let neighbour = Neighbour::attach(&above, "link")?;
    let mut agent = Agent::start(&cgroup, &idle(71))?;
    agent.swept()?;
    let found = status(&cgroup)?;
    assert_eq!(
        found.code,
        Some(0),
        "others are no failure: {}",
        found.report
    );
    assert_eq!(found.set["foreign_programs"][0]["name"], "neighbour");
    assert!(in_words(&cgroup)?.stdout.contains("neighbour"));
    neighbour.detach()?;
    assert_eq!(status(&cgroup)?.set["foreign_programs"], json!([]));
    Ok(())
}

/// Said, whoever was it; SIGHUP mends it.
#[test]
fn taken_off_by_somebody_else() -> Result<()> {
    require!(Need::Program("bpftool"));
    for pins in [None, Some(Pins::new())] {
        let cgroup = Cgroup::new()?;
        let mut agent = match &pins {
            None => Agent::start(&cgroup, &idle(71))?,
            Some(pins) => Agent::start_pinned(&cgroup, &idle(71), pins, &[])?,
        };
        agent.swept()?;
        let link = Loaded::on(&cgroup)?.context("nothing is attached")?.link;
        let mut command = Place::default().command("bpftool");
        command.args(["link", "detach", "id", &link.to_string()]);
        let done = output(&mut command, LIMIT)?;
        ensure!(done.code == Some(0), "{done:?}");
        assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
        let found = status(&cgroup)?;
        assert_eq!(found.code, Some(3), "{}", found.report);
        assert_eq!(found.set["attached"], false, "{}", found.set);
        assert_eq!(found.set["agent"], agent.id());
        assert!(in_words(&cgroup)?.stdout.contains("not in force"));

        let process = Pid::from_raw(i32::try_from(agent.id())?).context("no process")?;
        kill_process(process, Signal::HUP)?;
        agent.started_again()?;
        assert_eq!(connection(&cgroup)?, [Options::on(71, 10, 6); 2]);
        let found = status(&cgroup)?;
        assert_eq!(found.set["attached"], true, "{}", found.set);
        assert_eq!(found.set["pinned"], pins.is_some(), "{}", found.set);
        assert!(
            agent.said().contains("taken the program off"),
            "{}",
            agent.said()
        );
        agent.stop()?;
        detach(&cgroup)?;
        assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
    }
    Ok(())
}

#[test]
fn wrong_words() -> Result<()> {
    require!();
    for arguments in [
        &["status", "more"][..],
        &["status", "--colour"],
        &["detach", "x"],
    ] {
        let said = output(agent_command().args(arguments), LIMIT)?;
        assert_eq!(said.code, Some(2), "{said:?}");
    }
    Ok(())
}
