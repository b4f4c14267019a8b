//! Killed at any moment, under a steady churn of connections of which every single
//! one is looked at.

use std::fs;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Churn, Crowd, Loaded, Need, Netns, Options, Pins, Process, Random,
    agent_command, detach, require, soak_or, status, wait_until,
};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(30);

/// One of four: two idle times, each in two configs that need a set of their own.
fn config(n: u64) -> String {
    let (idle, set) = (70 + n % 2, n / 2);
    format!("[default]\nidle = \"{idle}s\"\n[[policy]]\nname = \"set-{set}\"\nport = 1\n")
}

/// What is killed: agents that start, reload and sweep.
struct Victims<'a> {
    cgroup: &'a Cgroup,
    pins: &'a Pins,
    random: Random,
}

impl Victims<'_> {
    /// Starts an agent and kills it some time later.
    fn one(&mut self) -> Result<()> {
        let file = tempfile::NamedTempFile::with_suffix(".toml")?;
        fs::write(&file, config(self.random.below(4)))?;
        let mut command = agent_command();
        command.arg("run").arg("--config").arg(file.path());
        command.args(["--cgroup", self.cgroup.path(), "--pin", self.pins.name()]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut agent = Process::start(&mut command)?;
        // Some in the middle of the start, some after reloads and in their sweeps.
        for _ in 0..self.random.below(4) {
            sleep(Duration::from_millis(self.random.below(150)));
            fs::write(&file, config(self.random.below(4)))?;
        }
        sleep(Duration::from_millis(self.random.below(200)));
        let end = agent.child().try_wait()?;
        ensure!(end.is_none(), "an agent ended by itself: {end:?}");
        agent.signal(Signal::KILL)?;
        agent.wait(LIMIT)?;
        Ok(())
    }
}

fn killed(times: u32) -> Result<()> {
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let pins = Pins::new();
    let mut coming = Crowd::start((&cgroup, &netns), "127.0.1.1:0")?;
    let mut steady = Crowd::start((&cgroup, &netns), "127.0.2.1:0")?;
    let mut agent = Agent::start_pinned(&cgroup, &config(0), &pins, &[])?;
    agent.swept()?;
    steady.connect(200)?;
    agent.kill()?;
    let first = Loaded::on(&cgroup)?.context("nothing is attached")?;
    let mut victims = Victims {
        cgroup: &cgroup,
        pins: &pins,
        random: Random::new(),
    };
    let mut programs = vec![first.clone()];
    let churn = Churn {
        time: Duration::from_secs(1),
        rate: 1000,
        idle: [70, 71],
    };
    let done = AtomicBool::new(false);
    let churned = scope(|scope| -> Result<_> {
        let churned = scope.spawn(|| coming.churn_until(&done, &churn));
        let killing = (|| {
            for _ in 0..times {
                victims.one()?;
                let now = Loaded::on(&cgroup)?.context("nothing is attached")?;
                ensure!(now.link == first.link, "the link is another one: a gap");
                programs.push(now);
            }
            Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        killing?;
        churned.join().expect("a panic")
    })?;
    eprintln!("{times} kills, {churned:?}");
    assert_eq!((churned.without, churned.broken), (0, 0), "{churned:?}");
    assert!(churned.made > 500, "no churn to speak of: {churned:?}");

    // The next agent finishes what they had begun.
    let mut agent = Agent::start_pinned(&cgroup, &config(1), &pins, &[])?;
    agent.swept()?;
    steady.all_have(Options::on(71, 10, 6))?;
    let found = status(&cgroup)?;
    assert_eq!(found.code, Some(0), "{}", found.report);
    let last = Loaded::on(&cgroup)?.context("nothing is attached")?;
    assert!(
        // The first one had no set before it, of which five maps are kept.
        last.maps.len() <= first.maps.len() + 5,
        "maps pile up: {} and {}",
        first.maps.len(),
        last.maps.len()
    );
    agent.stop()?;
    detach(&cgroup)?;
    assert!(pins.all()?.is_empty());
    programs.push(last);
    let mut left = Vec::new();
    wait_until(LIMIT, "every program, map and link to go", || {
        left = programs.iter().flat_map(Loaded::left).collect();
        Ok(left.is_empty())
    })
    .with_context(|| format!("{left:?}"))
}

#[test]
fn at_random_moments() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("bpftool"));
    killed(soak_or(200, 40))
}

/// Descriptors and memory of a process.
fn holds(agent: &Agent) -> Result<(usize, u64)> {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", agent.id()))?.count();
    let status = fs::read_to_string(format!("/proc/{}/status", agent.id()))?;
    let memory = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .context("no RssAnon")?;
    Ok((descriptors, memory.trim().parse()?))
}

/// Each reload builds a set of its own: nothing of those before stays but what the
/// last one needs.
#[test]
fn reloads_leave_nothing() -> Result<()> {
    require!(Need::Program("bpftool"));
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    let mut agent = Agent::start_pinned(&cgroup, &config(0), &pins, &[])?;
    agent.swept()?;
    let mut reload = |n: u64| -> Result<Loaded> {
        agent.reload(&config(n % 4))?;
        Loaded::on(&cgroup)?.context("nothing is attached")
    };
    let mut earlier = Vec::new();
    for n in 1..4 {
        earlier.push(reload(n)?);
    }
    let before = holds(&agent)?;
    let mut reload = |n: u64| -> Result<Loaded> {
        agent.reload(&config(n % 4))?;
        Loaded::on(&cgroup)?.context("nothing is attached")
    };
    for n in 4..24 {
        earlier.push(reload(n)?);
    }
    let after = holds(&agent)?;
    eprintln!("descriptors and kB: {before:?}, after 20 reloads {after:?}");
    assert_eq!(after.0, before.0, "descriptors");
    assert!(after.1 < before.1 + 1024, "{before:?} {after:?}");
    // Other values took no other program.
    earlier.dedup_by_key(|loaded| loaded.program);
    ensure!(earlier.len() > 10, "{earlier:?}");
    let last = earlier.pop().context("none")?;
    let previous = earlier.pop().context("none")?;
    assert_eq!(last.maps.len(), previous.maps.len());
    // Of the set before, what may still count; of those before that, nothing.
    let mut left = Vec::new();
    wait_until(LIMIT, "earlier sets to go", || {
        left = earlier
            .iter()
            .flat_map(Loaded::left)
            .filter(|left| *left != format!("link {}", last.link))
            .filter(|left| !last.maps.iter().any(|map| *left == format!("map {map}")))
            .collect();
        Ok(left.is_empty())
    })
    .with_context(|| format!("{left:?}"))?;
    agent.stop()?;
    detach(&cgroup)
}
