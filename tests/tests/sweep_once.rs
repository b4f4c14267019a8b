//! `sweep`: one pass over the connections that exist, and no more.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Cgroup, Need, Netns, Options, Output, Place, Probe, Program, agent_binary, agent_command,
    output, require,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_mins(1);
const POLICY: &str = "[default]\nidle = \"70s\"\n";
const OURS: Options = Options::on(70, 10, 6);

/// What it takes to be root and still not enter other namespaces.
const WITHOUT_SYS_ADMIN: [&str; 4] = [
    "setpriv",
    "--inh-caps=-sys_admin",
    "--bounding-set=-sys_admin",
    "--",
];

fn sweep(by: &[&str], cgroup: &Cgroup, config: &str) -> Result<Output> {
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    std::fs::write(&file, config)?;
    let mut command = Place::default().command(by.first().copied().unwrap_or("env"));
    command.args(by.iter().skip(1)).arg(agent_binary());
    command.args(["sweep", "--json", "--cgroup", cgroup.path(), "--config"]);
    output(command.arg(file.path()), LIMIT)
}

fn record(output: &Output, event: &str) -> Result<Value> {
    let records = output.stdout.lines().map(serde_json::from_str::<Value>);
    let records = records.collect::<Result<Vec<_>, _>>()?;
    let found = records.into_iter().find(|record| record["event"] == event);
    found.with_context(|| format!("no {event}: {} {}", output.stdout, output.stderr))
}

#[test]
fn governs_what_exists_and_nothing_new() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut here = Probe::start(Program::Static, &cgroup)?;
    let mut there = Probe::start(Program::Dynamic, (&cgroup, &netns))?;
    let mut other = Probe::start(Program::Static, &netns)?;
    let old = [here.connection()?.0, there.connection()?.1];
    let others = other.connection()?.0;
    let done = sweep(&[], &cgroup, POLICY)?;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(done.stderr, "");
    assert_eq!(here.options(old[0])?, OURS);
    assert_eq!(there.options(old[1])?, OURS);
    assert_eq!(other.options(others)?, Options::UNTOUCHED);
    let swept = record(&done, "swept")?;
    assert_eq!(swept["missed"], json!([]));
    assert!(swept["connections"].as_u64() >= Some(4), "{swept}");

    let new = here.connection()?.0;
    assert_eq!(here.options(new)?, Options::UNTOUCHED);
    // Once more, for that one.
    let done = sweep(&[], &cgroup, POLICY)?;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(here.options(new)?, OURS);
    Ok(())
}

/// The kernel's own ids of processes are others than those that the agent sees
/// there. It holds a namespace open itself that nothing else leads to.
#[test]
fn in_a_pid_namespace() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("unshare"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::held_open()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (socket, _) = probe.visit(&netns, Probe::connection)?;
    let path = netns.path().to_str().context("no text")?;
    let apart = [
        "sh",
        "-c",
        "exec 9<\"$0\" && exec unshare --pid --fork --mount-proc \"$@\"",
        path,
    ];
    let done = sweep(&apart, &cgroup, POLICY)?;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(probe.options(socket)?, OURS);
    Ok(())
}

#[test]
fn says_what_it_did_to_people_too() -> Result<()> {
    require!(Need::NoConfig);
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (socket, _) = probe.connection()?;
    let mut command = agent_command();
    command.args(["sweep", "--cgroup", cgroup.path()]);
    let done = output(&mut command, LIMIT)?;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(probe.options(socket)?, Options::on(60, 10, 6));
    for word in ["existing connection", "network namespace", "default"] {
        assert!(done.stdout.contains(word), "no {word}: {}", done.stdout);
    }
    Ok(())
}

/// What cannot be reached is counted and named, and the rest is done.
#[test]
fn done_in_part() -> Result<()> {
    require!(Need::Program("setpriv"), Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::named()?;
    let mut here = Probe::start(Program::Static, &cgroup)?;
    let mut there = Probe::start(Program::Static, (&cgroup, &netns))?;
    let reached = here.connection()?.0;
    let missed = there.connection()?.0;
    let done = sweep(&WITHOUT_SYS_ADMIN, &cgroup, POLICY)?;
    assert_eq!(done.code, Some(4), "{}", done.stderr);
    let name = netns.path().file_name().and_then(|name| name.to_str());
    let name = name.context("no name")?;
    assert!(done.stderr.contains(name), "{}", done.stderr);
    let named = record(&done, "swept")?["missed"].to_string();
    assert!(named.contains(name), "{named}");
    assert_eq!(there.options(missed)?, Options::UNTOUCHED);
    assert_eq!(here.options(reached)?, OURS);
    Ok(())
}

/// A namespace that is gone when its turn comes is no part that is missing.
#[test]
fn namespaces_vanish_meanwhile() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let done = AtomicBool::new(false);
    scope(|scope| -> Result<()> {
        let maker = scope.spawn(|| -> Result<()> {
            for _ in 0..2000 {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                Netns::named()?;
            }
            Ok(())
        });
        let swept = (0..20).try_for_each(|_| -> Result<()> {
            let swept = sweep(&[], &cgroup, POLICY)?;
            ensure!(swept.code == Some(0), "{:?}: {}", swept.code, swept.stderr);
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        maker.join().expect("a panic")?;
        swept
    })
}

#[test]
fn wrong_words() -> Result<()> {
    require!();
    let missing = "/no-such-directory/keepalive.toml";
    assert!(!Path::new(missing).exists());
    for (arguments, code, word) in [
        (&["--colour"][..], 2, "--colour"),
        (&["more"], 2, "more"),
        (&["--cgroup", "/no-such-cgroup"], 1, "/no-such-cgroup"),
        (&["--config", missing], 1, missing),
    ] {
        let mut command = agent_command();
        let said = output(command.arg("sweep").args(arguments), LIMIT)?;
        assert_eq!(said.code, Some(code), "{arguments:?}: {}", said.stderr);
        assert!(said.stderr.contains(word), "{arguments:?}: {}", said.stderr);
        assert_eq!(said.stdout, "", "{arguments:?}");
    }
    Ok(())
}
