//! Enforcement that outlives its agent.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Crowd, Loaded, Need, Netns, Options, Pins, Probe, Program, agent_command,
    bpftool, detach, output, require, status, wait_until,
};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);
const OURS: Options = Options::on(70, 10, 6);
const POLICY: &str = "[default]\nidle = \"70s\"\n";

fn connection(cgroup: &Cgroup) -> Result<[Options; 2]> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    Ok([probe.options(connecting)?, probe.options(accepting)?])
}

/// Killed: the kernel goes on, counts, and the next agent goes on from there.
#[test]
fn goes_on_without_an_agent() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    let agent = Agent::start_pinned(&cgroup, POLICY, &pins, &[])?;
    assert_eq!(agent.started()["pinned"], pins.name());
    assert_eq!(agent.started()["continued"], false);
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    agent.kill()?;
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    let found = status(&cgroup)?;
    assert_eq!(found.code, Some(4), "no agent: {}", found.report);
    assert_eq!(found.set["agent"], json!(null), "{}", found.set);
    assert_eq!(found.set["pinned"], true, "{}", found.set);
    assert_eq!(found.set["policies"][0]["seen"], 4, "{}", found.set);

    let mut agent = Agent::start_pinned(&cgroup, "[default]\nidle = \"71s\"\n", &pins, &[])?;
    assert_eq!(agent.started()["continued"], true);
    agent.swept()?;
    let found = status(&cgroup)?;
    assert_eq!(found.code, Some(0), "{}", found.report);
    assert_eq!(found.set["agent"], agent.id(), "{}", found.set);
    assert_eq!(connection(&cgroup)?, [Options::on(71, 10, 6); 2]);
    let finished = agent.stop()?;
    assert_eq!(finished.record["enforcement_goes_on"], true);
    assert_eq!(
        finished.count("default", "seen"),
        6,
        "the counters go on too"
    );
    assert_eq!(connection(&cgroup)?, [Options::on(71, 10, 6); 2]);
    detach(&cgroup)?;
    assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
    Ok(())
}

/// With an agent, which it ends, and without one.
#[test]
fn detach_leaves_nothing_but_what_connections_have() -> Result<()> {
    require!(Need::Program("bpftool"));
    for kill in [false, true] {
        let cgroup = Cgroup::new()?;
        let pins = Pins::new();
        let mut agent = Agent::start_pinned(&cgroup, POLICY, &pins, &[])?;
        agent.swept()?;
        // A set of its own, that keeps what is left of the one before.
        agent.reload("[default]\nidle = \"70s\"\nprobes = 7\n")?;
        let mut probe = Probe::start(Program::Static, &cgroup)?;
        let (connecting, _) = probe.connection()?;
        let loaded = Loaded::on(&cgroup)?.context("nothing is attached")?;
        assert!(pins.link(&cgroup)?.exists());
        if kill {
            agent.kill()?;
            detach(&cgroup)?;
        } else {
            detach(&cgroup)?;
            let finished = agent.replaced()?;
            assert_eq!(finished.code, Some(0), "{}", finished.stderr);
            assert_eq!(finished.record["enforcement_goes_on"], false);
        }
        assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
        assert_eq!(probe.options(connecting)?, Options::on(70, 10, 7));
        assert_eq!(pins.all()?, Vec::<std::path::PathBuf>::new());
        // The kernel frees programs and maps in its own time.
        let mut left = Vec::new();
        wait_until(LIMIT, "the kernel's objects to go", || {
            left = loaded.left();
            Ok(left.is_empty())
        })
        .with_context(|| format!("{left:?}"))?;
        assert_eq!(status(&cgroup)?.code, Some(3));
        // A second time there is nothing to do.
        detach(&cgroup)?;
    }
    Ok(())
}

/// An agent that would not end what is pinned, or would leave it to another
/// directory, does not begin; what is in force stays.
#[test]
fn what_is_pinned_is_not_taken_up_by_accident() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    let other = Pins::new();
    Agent::start_pinned(&cgroup, POLICY, &pins, &[])?.kill()?;
    for more in [&[][..], &["--pin", other.name()]] {
        let mut command = agent_command();
        command.args(["run", "--cgroup", cgroup.path()]).args(more);
        let refused = output(&mut command, LIMIT)?;
        assert_eq!(refused.code, Some(1), "{refused:?}");
        for word in [cgroup.path(), pins.name(), "detach"] {
            assert!(refused.stderr.contains(word), "no {word}: {refused:?}");
        }
        assert_eq!(connection(&cgroup)?, [OURS; 2], "{more:?}");
    }
    assert!(other.all()?.is_empty());
    detach(&cgroup)
}

#[test]
fn a_directory_that_cannot_be_trusted_is_not_used() -> Result<()> {
    require!(Need::Program("bpftool"));
    let cgroup = Cgroup::new()?;
    let elsewhere = tempfile::tempdir()?;
    let elsewhere = elsewhere.path().to_str().context("no text")?;
    let [foreign, open, link] = [Pins::new(), Pins::new(), Pins::new()];
    fs::create_dir(foreign.name())?;
    chown(foreign.name(), Some(65534), None)?;
    fs::create_dir(open.name())?;
    fs::set_permissions(open.name(), fs::Permissions::from_mode(0o777))?;
    std::os::unix::fs::symlink(foreign.name(), link.name())?;
    for (directory, words) in [
        (elsewhere, &["BPF file system"][..]),
        (foreign.name(), &["another user", "65534"]),
        (open.name(), &["others may write", "777"]),
        (link.name(), &["not a directory"]),
    ] {
        let mut command = agent_command();
        command.args(["run", "--cgroup", cgroup.path(), "--pin", directory]);
        let refused = output(&mut command, LIMIT)?;
        assert_eq!(refused.code, Some(1), "{refused:?}");
        let named = words.iter().any(|word| refused.stderr.contains(word));
        assert!(named && refused.stderr.contains(directory), "{refused:?}");
        assert_eq!(Loaded::on(&cgroup)?, None, "{directory}");
        assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
    }
    fs::remove_file(link.name())?;
    Ok(())
}

/// A start that was cut off between the directory and the pin, and pins of
/// cgroups that are gone.
#[test]
fn what_half_a_start_left_is_cleared_up() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let gone = Cgroup::new()?;
    let pins = Pins::new();
    Agent::start_pinned(&gone, POLICY, &pins, &[])?.kill()?;
    let stale = pins.link(&gone)?;
    fs::create_dir(Path::new(pins.name()).join(cgroup.id()?.to_string()))?;
    drop(gone);
    let agent = Agent::start_pinned(&cgroup, POLICY, &pins, &[])?;
    wait_until(LIMIT, "the stale pin to go", || Ok(!stale.exists())).or_else(|_| {
        // The kernel lets a removed cgroup go in its own time; the next start sees it.
        agent.kill()?;
        Agent::start_pinned(&cgroup, POLICY, &pins, &[])?.kill()?;
        ensure!(!stale.exists(), "{} is there still", stale.display());
        Ok(())
    })?;
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    detach(&cgroup)?;
    assert!(pins.all()?.is_empty());
    Ok(())
}

/// Killed while silent connections wait for their turn to get the new policy: the
/// next agent knows whose values the rest of them have.
#[test]
fn a_sweep_that_was_cut_off_is_finished() -> Result<()> {
    const SILENCE: Duration = Duration::from_secs(4);
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let pins = Pins::new();
    let mut crowd = Crowd::start((&cgroup, &netns), "127.0.1.1:0")?;
    let mut agent = Agent::start_pinned(&cgroup, "[default]\nidle = \"2m\"\n", &pins, &[])?;
    agent.swept()?;
    crowd.connect(1000)?;
    crowd.all_have(Options::on(120, 10, 6))?;
    sleep(SILENCE);
    let config = "[default]\nidle = { exactly = \"3s\" }\n";
    let swept = agent.reload(config)?;
    ensure!(swept["waiting"].as_u64() > Some(1000), "too early: {swept}");
    agent.kill()?;
    ensure!(
        crowd.all_have(Options::on(3, 10, 6)).is_err(),
        "all were done when it was killed: nothing was tried"
    );
    let _agent = Agent::start_pinned(&cgroup, config, &pins, &[])?;
    let mut last = Ok(());
    wait_until(LIMIT, "all to have the new policy", || {
        last = crowd.all_have(Options::on(3, 10, 6));
        Ok(last.is_ok())
    })
    .with_context(|| format!("{last:?}"))?;
    detach(&cgroup)
}

/// A set whose records this build does not know: said, replaced without a gap.
#[test]
fn another_schema_is_replaced() -> Result<()> {
    require!(Need::Program("bpftool"));
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    Agent::start_pinned(&cgroup, POLICY, &pins, &[])?.kill()?;
    let loaded = Loaded::on(&cgroup)?.context("nothing is attached")?;
    rewrite_schema(loaded.map("keepalive_set")?, '9')?;
    let found = status(&cgroup)?;
    assert_eq!(found.code, Some(4), "{}", found.report);
    let error = found.set["error"].as_str().context("no error")?;
    assert!(error.contains("schema 9"), "{error}");
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    let agent = Agent::start_pinned(&cgroup, "[default]\nidle = \"71s\"\n", &pins, &[])?;
    assert_eq!(agent.started()["continued"], true);
    let said = agent.said();
    assert!(said.contains("schema 9"), "{said}");
    let now = Loaded::on(&cgroup)?.context("nothing is attached")?;
    assert_eq!(now.link, loaded.link, "the link is the same: no gap");
    assert_eq!(connection(&cgroup)?, [Options::on(71, 10, 6); 2]);
    detach(&cgroup)
}

/// Changes a document in a map of one piece, so that it is of a schema of one
/// digit: its length and checksum (FNV-1a) stand before it.
fn rewrite_schema(map: u64, schema: char) -> Result<()> {
    const KEY: &str = "\"schema\":";
    let map = map.to_string();
    let dump = bpftool(&["map", "dump", "id", &map])?;
    let value = dump[0]["value"].as_array().context("no value")?;
    let bytes = value.iter().map(|byte| {
        let byte = byte.as_str().and_then(|byte| byte.strip_prefix("0x"));
        Ok(u8::from_str_radix(byte.context("no byte")?, 16)?)
    });
    let mut bytes: Vec<u8> = bytes.collect::<Result<_>>()?;
    let length = u32::from_le_bytes(bytes[..4].try_into()?) as usize;
    let text = String::from_utf8(bytes[8..8 + length].to_vec())?;
    let (before, after) = text.split_once(KEY).context(text.clone())?;
    let after = after.trim_start_matches(|c: char| c.is_ascii_digit());
    let text = format!("{before}{KEY}{schema}{after}");
    ensure!(text.len() == length, "a schema of more than one digit");
    let sum = text.bytes().fold(0x811c_9dc5_u32, |sum, byte| {
        (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes[8..8 + length].copy_from_slice(text.as_bytes());
    let value: Vec<_> = bytes.iter().map(ToString::to_string).collect();
    let mut arguments = vec![
        "map", "update", "id", &map, "key", "0", "0", "0", "0", "value",
    ];
    arguments.extend(value.iter().map(String::as_str));
    let mut command = keepalive_tests::Place::default().command("bpftool");
    let done = output(command.args(arguments), LIMIT)?;
    ensure!(done.code == Some(0), "{}", done.stderr);
    Ok(())
}
