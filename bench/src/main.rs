//! `cargo xtask bench`: what keepalive costs, beside everything else one could
//! do, in one run.
//!
//! Absolute figures are worth little on a machine that others use too. So all
//! cases of a table take turns, each case is a process of its own in each round,
//! and what counts is the ratio within a round.
#![deny(unsafe_code)]

mod agent;
mod churn;
mod hook;
mod load;
mod namespaces;
mod peer;
mod reaction;
mod report;
mod stats;
mod sweep;
mod timed;

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use report::Report;

/// Measure what keepalive costs, beside everything else one could do
#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    after_help = "Examples:\n  sudo -E cargo xtask bench\n  sudo -E cargo xtask bench hook churn --json bench.json\n\nAll of it takes some minutes. It needs root, and stays in cgroups and network namespaces of its own. Ratios are medians of ratios within a round, and ± is how far off the median may be."
)]
struct Options {
    /// What to measure, instead of everything
    names: Vec<Name>,

    /// Also write all samples to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Samples of each case
    #[arg(long, value_name = "COUNT", default_value = "25", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Also the sizes that take long: 500,000 sockets, 100,000 cgroups
    #[arg(long)]
    full: bool,

    /// Measure this agent instead of a fresh build
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,

    /// Measure another agent beside it, as "ours before"
    #[arg(long, value_name = "FILE")]
    before: Option<PathBuf>,

    /// Be a load; the benchmark starts itself so
    #[arg(long, hide = true, exclusive = true)]
    load: Option<String>,

    /// Run a command and tell what it took; the benchmark starts itself so
    #[arg(long, hide = true, exclusive = true, num_args = 1.., allow_hyphen_values = true)]
    time: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// Time in the kernel, per call and per socket
    Hook,
    /// Connect, accept, close over loopback and across namespaces
    Churn,
    /// Existing connections, against ss
    Sweep,
    /// Connections in many network namespaces
    Namespaces,
    /// Policies for many cgroups
    Push,
    /// Policies for cgroups that are made meanwhile
    Reaction,
    /// Memory and wake-ups of the agent
    Idle,
}

/// A run of the benchmark.
struct Bench {
    agent: PathBuf,
    before: Option<PathBuf>,
    rounds: u32,
    full: bool,
    /// Somebody wants it to end: guards take away what it made.
    stop: Arc<AtomicBool>,
    report: Report,
}

impl Bench {
    /// Fails once somebody wants the benchmark to end.
    fn go_on(&self) -> Result<()> {
        ensure!(!self.stop.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    /// Each of these once in every round, every round from another one on and every
    /// other backwards: nobody always comes after the same one.
    fn in_turns<'a, T>(&self, cases: &'a [T]) -> impl Iterator<Item = &'a T> + use<'a, T> {
        (0..self.rounds as usize).flat_map(|round| {
            let mut turns: Vec<_> = cases.iter().collect();
            turns.rotate_left(round / 2 % cases.len());
            if round % 2 == 1 {
                turns.reverse();
            }
            turns
        })
    }

    fn measure(&mut self, name: Name) -> Result<()> {
        match name {
            Name::Hook => hook::hook(self),
            Name::Churn => churn::churn(self),
            Name::Sweep => sweep::sweep(self),
            Name::Namespaces => namespaces::namespaces(self),
            Name::Push => agent::push(self),
            Name::Reaction => reaction::reaction(self),
            Name::Idle => agent::idle(self),
        }
    }
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<()> {
    if let Some(load) = &options.load {
        return load::main(load);
    }
    if !options.time.is_empty() {
        return timed::main(&options.time);
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "the benchmark needs root, for cgroups, network namespaces and BPF: sudo -E cargo xtask bench"
    );
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let agent = options.agent.unwrap_or_else(keepalive_tests::agent_binary);
    let mut bench = Bench {
        agent: absolute(&agent)?,
        before: options.before.as_deref().map(absolute).transpose()?,
        rounds: options.rounds,
        full: options.full,
        stop,
        report: Report::default(),
    };
    let machine = machine(&bench.agent)?;
    println!("{machine:#}");
    let names = if options.names.is_empty() {
        Name::value_variants()
    } else {
        &options.names
    };
    for name in names {
        let what = format!("measuring {name:?}").to_lowercase();
        eprintln!("{what}");
        bench.measure(*name).context(what)?;
    }
    bench.report.print_goals();
    if let Some(file) = &options.json {
        let mut all = serde_json::to_value(&bench.report)?;
        all["machine"] = machine;
        fs::write(file, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

fn absolute(file: &Path) -> Result<PathBuf> {
    fs::canonicalize(file).with_context(|| format!("cannot find {}", file.display()))
}

/// What the figures are worth depends on it.
fn machine(agent: &Path) -> Result<Value> {
    let read = |file: &str| {
        fs::read_to_string(file)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo
        .lines()
        .find_map(|line| Some(line.strip_prefix("model name")?.split_once(": ")?.1));
    let version = Command::new(agent).arg("--version").output()?.stdout;
    Ok(json!({
        "agent": String::from_utf8_lossy(&version).trim(),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "cpu": cpu,
        "cpus": std::thread::available_parallelism()?.get(),
        "load_average": read("/proc/loadavg"),
        "bpf_jit": read("/proc/sys/net/core/bpf_jit_enable"),
        "command": env::args().skip(1).collect::<Vec<_>>().join(" "),
    }))
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn float(number: u64) -> f64 {
    number as f64
}
