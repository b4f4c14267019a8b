//! The agent itself: how long it takes to push policies, and what it uses.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use keepalive_tests::{Cgroup, Netns, Process};
use rustix::{param::clock_ticks_per_second, process::Signal};
use tempfile::NamedTempFile;

use crate::{
    Bench,
    peer::{Churn, OURS, Peer, with_ports},
    report::{Goal, Table},
    stats::Summary,
    sweep,
};

/// A running agent that governs one cgroup.
pub(crate) struct Agent {
    process: Process,
    records: BufReader<ChildStdout>,
    config: NamedTempFile,
    started_in: Duration,
}

impl Agent {
    /// Starts it and waits until its first sweep is over.
    pub(crate) fn start(program: &Path, cgroup: &Cgroup, config: &str) -> Result<Self> {
        let file = sweep::config(config)?;
        let mut command = Command::new(program);
        command
            .args(["run", "--json", "--cgroup", cgroup.path(), "--config"])
            .arg(file.path())
            .stdout(Stdio::piped());
        let start = Instant::now();
        let mut process = Process::start(&mut command)?.ended_by(Signal::TERM);
        let stdout = process.child().stdout.take().context("no output")?;
        let mut agent = Self {
            process,
            records: BufReader::new(stdout),
            config: file,
            started_in: Duration::ZERO,
        };
        agent.wait_for("started")?;
        agent.started_in = start.elapsed();
        agent.wait_for("swept")?;
        Ok(agent)
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Has it read another config; how long it took until that was in force.
    fn reload(&mut self, config: &str) -> Result<Duration> {
        fs::write(&self.config, config)?;
        let start = Instant::now();
        self.process.signal(Signal::HUP)?;
        self.wait_for("reloaded")?;
        let took = start.elapsed();
        self.wait_for("swept")?;
        Ok(took)
    }

    /// Reads what it tells until it tells this.
    fn wait_for(&mut self, event: &str) -> Result<()> {
        let wanted = format!("{{\"event\":\"{event}\"");
        let mut line = String::new();
        while !line.starts_with(&wanted) {
            line.clear();
            let length = self.records.read_line(&mut line)?;
            ensure!(length > 0, "the agent ended before it had {event}");
        }
        Ok(())
    }

    /// A number of its /proc/PID/status.
    fn status(&self, field: &str) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .with_context(|| format!("/proc/PID/status has no {field}"))
    }

    /// The CPU time of all its threads, those that have ended included, in milliseconds.
    fn cpu_of_process(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        // After the name, which may have spaces in it.
        let (_, fields) = stat.rsplit_once(')').context("no name")?;
        let fields: Vec<_> = fields.split_whitespace().collect();
        let [user, system] = fields.get(11..13).context("too short")? else {
            bail!("too short");
        };
        let ticks = user.parse::<f64>()? + system.parse::<f64>()?;
        let per_second = u32::try_from(clock_ticks_per_second())?;
        Ok(ticks * 1e3 / f64::from(per_second))
    }

    /// The CPU time of its main thread in milliseconds.
    fn cpu(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/schedstat", self.id()))?;
        let nanoseconds = stat.split(' ').next().context("an empty schedstat")?;
        Ok(nanoseconds.parse::<f64>()? / 1e6)
    }
}

/// `push`: from the start of the agent until it enforces, and from SIGHUP until
/// another policy holds, by the number of cgroups that it names; the same for one of
/// many policies, with what it takes of the processors.
pub(crate) fn push(bench: &mut Bench) -> Result<()> {
    let mut table = Table::new("push", "policy for so many cgroups", "ms", &[]);
    let sizes = [1, 10, 100, 1_000, 10_000, 100_000];
    for &size in &sizes[..if bench.full { 6 } else { 5 }] {
        let root = Cgroup::new()?;
        crowd(&root, size)?;
        let config = |name: &str, idle: u32| {
            format!(
                "[[policy]]\nname = \"{name}\"\ncgroup = \"{}/*\"\nidle = \"{idle}s\"\n",
                root.path()
            )
        };
        for _ in 0..bench.rounds.min(7) {
            bench.go_on()?;
            let mut agent = Agent::start(&bench.agent, &root, &config("all", 60))?;
            table.add("start", Some(size), milliseconds(agent.started_in));
            for (case, name, idle) in [
                ("other values", "all", 90),
                ("other values", "all", 120),
                ("another set", "other", 120),
            ] {
                let took = agent.reload(&config(name, idle))?;
                table.add(case, Some(size), milliseconds(took));
            }
        }
    }
    bench.report.take(table);
    one_of_many(bench)
}

fn one_of_many(bench: &mut Bench) -> Result<()> {
    const HOLDS: &str = "until it holds";
    const CPU: &str = "CPU time";
    const RELOADS: u32 = 5;
    let mut table = Table::new("policies", "one of so many policies changes", "ms", &[]);
    let sizes = [1, 100, 1_000, 10_000];
    for size in sizes {
        let root = Cgroup::new()?;
        crowd(&root, size)?;
        let config = |idle: u32| {
            let policies = (0..size).map(|number| {
                let idle = if number == 0 { idle } else { 60 };
                format!(
                    "[[policy]]\nname = \"p{number}\"\ncgroup = \"{}/c{number}\"\n\
                     idle = \"{idle}s\"\n",
                    root.path()
                )
            });
            policies.collect::<String>()
        };
        let mut agent = Agent::start(&bench.agent, &root, &config(60))?;
        for round in 0..bench.rounds.min(7) {
            bench.go_on()?;
            // Some of these, as the kernel counts in hundredths of a second.
            let before = agent.cpu_of_process()?;
            for reload in 0..RELOADS {
                let took = agent.reload(&config(61 + round * RELOADS + reload))?;
                table.add(HOLDS, Some(size), milliseconds(took));
            }
            let cpu = agent.cpu_of_process()? - before;
            table.add(CPU, Some(size), cpu / f64::from(RELOADS));
        }
    }
    for (what, case, limit) in [
        ("one policy of 10,000 changes: until it holds", HOLDS, 100.0),
        ("one policy of 10,000 changes: CPU time", CPU, 150.0),
    ] {
        let found = Summary::of(table.samples(case, 10_000));
        bench.report.goals.push(Goal::new(what, limit, "ms", found));
    }
    bench.report.take(table);
    Ok(())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Makes so many cgroups below this one, which go with it.
pub(crate) fn crowd(root: &Cgroup, count: u32) -> Result<()> {
    for number in 0..count {
        fs::create_dir(root.directory().join(format!("c{number}")))?;
    }
    Ok(())
}

/// `idle`: memory, CPU time and wake-ups of a running agent.
pub(crate) fn idle(bench: &mut Bench) -> Result<()> {
    const WATCHED: Duration = Duration::from_secs(10);
    let peer = Peer::ours(OURS, &bench.agent)?;
    let agent = peer.running().context("no agent")?;
    let netns = Netns::new()?;
    with_ports(&netns)?;
    let churn = Churn::over_loopback(&netns);
    let mut table = Table::new("idle", "the agent, in 10 s", "kB, wake-ups, ms", &[]);
    // The sweep at the start is over, and so is its thread.
    thread::sleep(Duration::from_secs(1));
    for state in ["idle", "under churn"] {
        let (woken, cpu) = (agent.status("voluntary_ctxt_switches")?, agent.cpu()?);
        let start = Instant::now();
        while start.elapsed() < WATCHED {
            bench.go_on()?;
            if state == "idle" {
                thread::sleep(Duration::from_millis(100));
            } else {
                peer.churn(&churn)?;
            }
        }
        let woken = agent.status("voluntary_ctxt_switches")? - woken;
        let resident = agent.status("VmRSS")?;
        table.add(&format!("{state}: wake-ups"), None, woken);
        table.add(&format!("{state}: CPU time, ms"), None, agent.cpu()? - cpu);
        table.add(&format!("{state}: resident, kB"), None, resident);
        if state == "idle" {
            let goal =
                |what, limit, unit, found: f64| Goal::new(what, limit, unit, Summary::of(&[found]));
            bench.report.goals.extend([
                goal("idle agent: wake-ups", 0.0, "", woken),
                goal("idle agent: memory", 12.0, "MiB", resident / 1024.0),
            ]);
        }
    }
    for (name, field) in [
        ("resident and its own, kB", "RssAnon"),
        ("peak, at its start, kB", "VmHWM"),
    ] {
        table.add(name, None, agent.status(field)?);
    }
    bench.report.take(table);
    Ok(())
}
