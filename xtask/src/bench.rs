//! `cargo xtask bench`: what keepalive costs, beside everything else one could
//! do, in one run.
//!
//! Absolute figures are worth little on a machine that others use too. So all
//! cases of a table take turns, each case is a process of its own in each round,
//! and what counts is the ratio within a round.

mod agent;
mod churn;
mod hook;
mod peer;
mod place;
mod reaction;
mod report;
mod server;
mod stats;
mod sweep;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::{bpf, build, exec, workspace};
use place::Place;
use report::Report;

/// Connections that the load makes before it measures; see WARM_UP in load.c.
const WARM_UP: u32 = 50;

/// Measure what keepalive costs, beside everything else one could do
#[derive(Args)]
#[command(
    after_help = "Examples:\n  sudo -E cargo xtask bench\n  sudo -E cargo xtask bench hook churn --json bench.json\n\nAll of it takes some minutes. It needs root, and stays in cgroups and network namespaces of its own. Ratios are medians of ratios within a round, and ± is how far off the median may be."
)]
pub(crate) struct Options {
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// Time in the kernel, per call and per socket
    Hook,
    /// Connect, accept, close over loopback
    Churn,
    /// The same across two network namespaces
    Veth,
    /// Existing connections, against ss
    Sweep,
    /// Policies for many cgroups
    Push,
    /// Policies for cgroups that are made meanwhile
    Reaction,
    /// Memory and wake-ups of the agent
    Idle,
    /// Long-lived connections
    Throughput,
    /// nginx and wrk
    Server,
}

/// A run of the benchmark.
struct Bench {
    place: Place,
    agent: PathBuf,
    before: Option<PathBuf>,
    rounds: u32,
    full: bool,
    report: Report,
}

impl Bench {
    /// Each of these once in every round, every round in another order: nobody
    /// always comes after the same one.
    fn in_turns<'a, T>(&self, cases: &'a [T]) -> impl Iterator<Item = &'a T> + use<'a, T> {
        (0..self.rounds as usize).flat_map(move |round| {
            let (step, start) = order(round, cases.len());
            (0..cases.len()).map(move |turn| &cases[(start + turn * step) % cases.len()])
        })
    }

    fn measure(&mut self, name: Name) -> Result<()> {
        match name {
            Name::Hook => hook::hook(self),
            Name::Churn => churn::loopback(self),
            Name::Veth => churn::veth(self),
            Name::Sweep => sweep::sweep(self),
            Name::Push => agent::push(self),
            Name::Reaction => reaction::reaction(self),
            Name::Idle => agent::idle(self),
            Name::Throughput => agent::throughput(self),
            Name::Server => server::server(self),
        }
    }
}

/// The step and the start by which a round goes through so many cases: forwards
/// and backwards in turn, each time from another one.
fn order(round: usize, cases: usize) -> (usize, usize) {
    let step = if round.is_multiple_of(2) {
        1
    } else {
        cases - 1
    };
    (step, round / 2 % cases)
}

pub(crate) fn main(options: &Options) -> Result<()> {
    let place = Place::prepare()?;
    bpf::build_bench_object()?;
    let agent = if let Some(agent) = &options.agent {
        absolute(agent)?
    } else {
        build::build()?;
        workspace::agent()
    };
    let mut bench = Bench {
        place,
        agent,
        before: options.before.as_deref().map(absolute).transpose()?,
        rounds: options.rounds,
        full: options.full,
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
        exec::say(&format!("measuring: {name:?}").to_lowercase());
        bench
            .measure(*name)
            .with_context(|| format!("measuring {name:?}").to_lowercase())?;
    }
    bench.report.print_goals();
    if let Some(file) = &options.json {
        let mut all = bench.report.json();
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
    let cpu = read("/proc/cpuinfo").lines().find_map(|line| {
        Some(
            line.strip_prefix("model name")?
                .split_once(": ")?
                .1
                .to_owned(),
        )
    });
    Ok(json!({
        "agent": exec::output(Command::new(agent).arg("--version"))?.trim(),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "cpu": cpu,
        "cpus": std::thread::available_parallelism()?.get(),
        "load_average": read("/proc/loadavg"),
        "bpf_jit": read("/proc/sys/net/core/bpf_jit_enable"),
        "command": env::args().skip(1).collect::<Vec<_>>().join(" "),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_its_turn_in_every_round() {
        for cases in 1..8 {
            for round in 0..20 {
                let (step, start) = order(round, cases);
                let mut turns = (0..cases)
                    .map(|turn| (start + turn * step) % cases)
                    .collect::<Vec<_>>();
                turns.sort_unstable();
                assert_eq!(turns, (0..cases).collect::<Vec<_>>());
            }
        }
    }
}
