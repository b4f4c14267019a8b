//! One agent for each cgroup, and how another one takes its place.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Churn, Crowd, Loaded, Need, Netns, Options, Output, Pins, Probe, Program,
    agent_binary, agent_command, detach, output, require, soak_or, status, wait_until,
};

const LIMIT: Duration = Duration::from_secs(30);

fn idle(seconds: u32) -> String {
    format!("[default]\nidle = \"{seconds}s\"\n")
}

fn connection(cgroup: &Cgroup) -> Result<[Options; 2]> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    Ok([probe.options(connecting)?, probe.options(accepting)?])
}

fn start_another(cgroup: &Cgroup, more: &[&str]) -> Result<Output> {
    let mut command = agent_command();
    command.args(["run", "--cgroup", cgroup.path()]).args(more);
    output(&mut command, LIMIT)
}

#[test]
fn a_second_agent_says_who_is_there_and_leaves() -> Result<()> {
    require!(Need::NoConfig);
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    let mut agent = Agent::start(&cgroup, &idle(71))?;
    for more in [&[][..], &["--pin", pins.name()]] {
        let refused = start_another(&cgroup, more)?;
        assert_eq!(refused.code, Some(1), "{refused:?}");
        let named = format!("agent {} enforces on {}", agent.id(), cgroup.path());
        assert!(refused.stderr.contains(&named), "{refused:?}");
        assert!(refused.stderr.contains("--take-over"), "{refused:?}");
        assert_eq!(refused.stdout, "");
    }
    // The first one is as it was.
    assert_eq!(connection(&cgroup)?, [Options::on(71, 10, 6); 2]);
    agent.swept()?;
    agent.reload(&idle(72))?;
    assert_eq!(connection(&cgroup)?, [Options::on(72, 10, 6); 2]);
    // Below and beside it is room for others.
    let below = cgroup.child("below")?;
    Agent::start(&below, &idle(73))?.stop()?;
    Ok(())
}

/// Replaced again and again, in force all the time: by an agent of another policy,
/// by another build, pinned or not. Every connection has one of the two policies,
/// and none breaks.
fn take_over(pins: Option<&Pins>, times: u32) -> Result<()> {
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let other_build = OtherBuild::make()?;
    let mut coming = Crowd::start((&cgroup, &netns), "127.0.1.1:0")?;
    let mut steady = Crowd::start((&cgroup, &netns), "127.0.2.1:0")?;
    steady.connect(200)?;
    let start = |n: u32| -> Result<Agent> {
        let binary = if n.is_multiple_of(2) {
            agent_binary()
        } else {
            other_build.path.clone()
        };
        let mut more = vec!["--take-over"];
        if let Some(pins) = pins {
            more.extend(["--pin", pins.name()]);
        }
        Agent::start_build(&binary, &cgroup, &idle(70 + n % 2), &more)
    };
    let mut agent = start(0)?;
    agent.swept()?;
    let link = Loaded::on(&cgroup)?.context("nothing is attached")?.link;
    let churn = Churn {
        time: Duration::from_secs(1),
        rate: 1000,
        idle: [70, 71],
    };
    let done = AtomicBool::new(false);
    let churned = scope(|scope| -> Result<_> {
        let churned = scope.spawn(|| coming.churn_until(&done, &churn));
        let replaced = (1..=times).try_for_each(|n| -> Result<()> {
            let next = start(n)?;
            ensure!(next.started()["continued"] == true, "{}", next.started());
            let finished = std::mem::replace(&mut agent, next).replaced()?;
            ensure!(finished.code == Some(0), "{}", finished.stderr);
            ensure!(finished.record["enforcement_goes_on"] == true);
            agent.swept()?;
            steady.all_have(Options::on(70 + i32::try_from(n % 2)?, 10, 6))
        });
        done.store(true, Ordering::Relaxed);
        replaced?;
        churned.join().expect("a panic")
    })?;
    eprintln!("{churned:?}");
    assert_eq!((churned.without, churned.broken), (0, 0), "{churned:?}");
    assert!(churned.made > 500, "no churn to speak of: {churned:?}");
    let now = Loaded::on(&cgroup)?.context("nothing is attached")?;
    assert_eq!(now.link, link, "the link was never another one");
    let found = status(&cgroup)?;
    assert_eq!(found.code, Some(0), "{}", found.report);
    assert_eq!(found.set["agent"], agent.id());
    agent.stop()?;
    if pins.is_some() {
        assert_ne!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
        detach(&cgroup)?;
    }
    assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
    Ok(())
}

#[test]
fn of_an_agent_that_enforcement_ends_with() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("bpftool"));
    take_over(None, 6)
}

#[test]
fn of_an_agent_that_enforcement_outlives() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("bpftool"));
    take_over(Some(&Pins::new()), soak_or(50, 6))
}

/// The agent that was about to take over is gone again: this one goes on, and has
/// listened to signals meanwhile.
#[test]
fn a_successor_that_dies() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, &idle(71))?;
    agent.swept()?;
    for _ in 0..3 {
        drop(step_aside(&cgroup, &agent)?);
        agent.reloaded()?;
        assert_eq!(connection(&cgroup)?, [Options::on(71, 10, 6); 2]);
    }
    agent.reload(&idle(72))?;
    assert_eq!(connection(&cgroup)?, [Options::on(72, 10, 6); 2]);
    let successor = step_aside(&cgroup, &agent)?;
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    drop(successor);
    assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
    Ok(())
}

/// Asks an agent to step aside, as one does that takes over.
fn step_aside(cgroup: &Cgroup, agent: &Agent) -> Result<UnixStream> {
    use std::io::{BufRead, BufReader};
    // FNV-1a, as the files of an agent are named.
    let name = cgroup
        .path()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let mut stream = UnixStream::connect(format!("/run/keepalive/{name:016x}.sock"))?;
    stream.write_all(b"\"step-aside\"\n")?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    let answer: serde_json::Value = serde_json::from_str(&answer)?;
    ensure!(answer["pid"] == agent.id(), "{answer}");
    Ok(stream)
}

/// Killed just before, with nothing pinned: the kernel may not have let go of the
/// link yet, and the next agent starts all the same.
#[test]
fn started_again_at_once() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    for n in 0..10 {
        let agent = Agent::start(&cgroup, &idle(70 + n))?;
        let expected = Options::on(70 + i32::try_from(n)?, 10, 6);
        assert_eq!(connection(&cgroup)?, [expected; 2]);
        agent.kill()?;
    }
    wait_until(LIMIT, "the last one to be gone", || {
        Ok(connection(&cgroup)? == [Options::UNTOUCHED; 2])
    })
}

/// Whoever asks whether an agent runs does not keep one from starting.
#[test]
fn while_others_look() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    Agent::start_pinned(&cgroup, &idle(70), &pins, &[])?.kill()?;
    let done = AtomicBool::new(false);
    scope(|scope| -> Result<()> {
        let looking = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                status(&cgroup)?;
            }
            Ok(())
        });
        let started = (0..5).try_for_each(|_| -> Result<()> {
            let agent = Agent::start_pinned(&cgroup, &idle(70), &pins, &[])?;
            sleep(Duration::from_millis(50));
            agent.kill()
        });
        done.store(true, Ordering::Relaxed);
        looking.join().expect("a panic")?;
        started
    })?;
    detach(&cgroup)
}

/// The agent as another build of it would be: with another commit in its version.
struct OtherBuild {
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl OtherBuild {
    fn make() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("keepalive-agent");
        let said = output(agent_command().arg("--version"), LIMIT)?.stdout;
        let commit = said
            .split_once('(')
            .and_then(|(_, rest)| rest.split_once(')'))
            .context("no commit")?
            .0;
        let from = format!("({commit})").into_bytes();
        let to = format!("({})", "f".repeat(commit.len())).into_bytes();
        let mut binary = fs::read(agent_binary())?;
        let mut at = 0;
        while let Some(found) = binary[at..]
            .windows(from.len())
            .position(|part| part == from)
        {
            at += found;
            binary[at..at + to.len()].copy_from_slice(&to);
        }
        ensure!(at > 0, "the version is not in the binary");
        fs::write(&path, binary)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self {
            path,
            _directory: directory,
        })
    }
}
