//! The kernel refuses an option: that is counted by its cause and logged once,
//! and the connection goes on with the others.

use std::{os::unix::fs::MetadataExt as _, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use keepalive_tests::{Agent, Cgroup, Need, Options, Probe, Program, bpftool, output, require};

const POLICY: &str = "[default]\nidle = \"70s\"\n";

/// The first slot that holds a policy, and the edition that is in force at first: two of
/// each slot stand beside each other.
const SLOT: usize = 2;

/// The id of the map with this name of the program attached to the cgroup.
fn map(cgroup: &Cgroup, name: &str) -> Result<String> {
    // Not `cgroup show`, which fails on kernels older than itself.
    let cgroup = std::fs::metadata(cgroup.directory())?.ino();
    let links = bpftool(&["link", "show"])?;
    let mut links = links.as_array().into_iter().flatten();
    let link = links
        .find(|link| link["cgroup_id"] == cgroup)
        .context("nothing is attached")?;
    let program = bpftool(&["prog", "show", "id", &link["prog_id"].to_string()])?;
    let maps = program["map_ids"]
        .as_array()
        .context("a program without maps")?;
    for id in maps {
        if bpftool(&["map", "show", "id", &id.to_string()])?["name"] == name {
            return Ok(id.to_string());
        }
    }
    anyhow::bail!("no map {name} in {program}")
}

/// Writes an idle time behind the agent's back that no config could hold, into what
/// the policy gives to a socket on which nothing is set, and into the policy itself.
fn spoil_idle(cgroup: &Cgroup) -> Result<()> {
    const UNITS_BEFORE_IDLE: [usize; 2] = [1, 15];
    let id = map(cgroup, "POLICIES")?;
    let slots = bpftool(&["map", "dump", "id", &id])?;
    let slot = slots.as_array().context("an empty map")?.get(SLOT);
    let bytes = slot.context("no slot")?["value"]
        .as_array()
        .context("no bytes")?;
    let mut bytes: Vec<u8> = bytes
        .iter()
        .map(|byte| {
            let byte = byte.as_str().context("not a byte")?;
            Ok(u8::from_str_radix(byte.trim_start_matches("0x"), 16)?)
        })
        .collect::<Result<_>>()?;
    for units in UNITS_BEFORE_IDLE {
        let idle = &mut bytes[units * 4..][..4];
        ensure!(
            idle == 70_u32.to_ne_bytes(),
            "the idle time stands elsewhere"
        );
        idle.copy_from_slice(&40_000_u32.to_ne_bytes());
    }
    let mut command = Command::new("bpftool");
    command.args(["map", "update", "id", &id, "key"]);
    let key = u32::try_from(SLOT)?.to_ne_bytes();
    command.args(key.map(|byte| byte.to_string())).arg("value");
    command.args(bytes.iter().map(ToString::to_string));
    let done = output(&mut command, Duration::from_secs(20))?;
    ensure!(done.code == Some(0), "{done:?}");
    Ok(())
}

#[test]
fn a_refused_option_breaks_no_connection() -> Result<()> {
    const CONNECTIONS: u64 = 20;
    require!(Need::Program("bpftool"));
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, POLICY)?;
    // A sweep would be refused them too.
    agent.swept()?;
    spoil_idle(&cgroup)?;
    let without_idle = Options {
        idle: Options::UNTOUCHED.idle,
        ..Options::on(70, 10, 6)
    };
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    for _ in 0..CONNECTIONS {
        let (connecting, accepting) = probe.connection()?;
        assert_eq!(probe.options(connecting)?, without_idle);
        assert_eq!(probe.options(accepting)?, without_idle);
    }
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0));
    assert_eq!(finished.count("default", "seen"), 2 * CONNECTIONS);
    assert_eq!(finished.count("default", "failed"), 2 * CONNECTIONS);
    assert_eq!(finished.count("default", "turned_on"), 2 * CONNECTIONS);
    let failures = &finished.record["failures"];
    assert_eq!(
        failures,
        &serde_json::json!([{
            "policy": "default",
            "option": "TCP_KEEPIDLE",
            "errno": 22,
            "count": 2 * CONNECTIONS,
        }])
    );
    let logged = finished
        .stderr
        .lines()
        .filter(|line| {
            line.contains("policy default: the kernel refused TCP_KEEPIDLE")
                && line.contains("Invalid argument")
        })
        .count();
    let processors = std::thread::available_parallelism()?.get();
    assert!(
        (1..=processors).contains(&logged),
        "logged {logged} times:\n{}",
        finished.stderr
    );
    Ok(())
}
