//! `keepalive-agent run`: enforces the policy until it is stopped.

use std::{io, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result};
use aya_log::EbpfLogger;
use clap::Args;
use keepalive_common::{
    counters::{Counters, FailureKey, SocketOption},
    slot,
};
use serde::Serialize;
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
};
use tracing::{debug, warn};

use super::{ConfigSource, Target, VERSION, output};
use crate::{
    assignment::{self, Assignment},
    bpf::{Enforcer, Loaded},
    duration,
    kernel::{self, layout, preflight},
};

/// The name under which sockets are counted that no policy claims.
const UNCLAIMED: &str = "(unclaimed)";

#[derive(Args, Debug)]
#[command(
    after_help = "Connections keep what they were given when the agent stops.\n\n\
                  Examples:\n  \
                  keepalive-agent run\n  \
                  keepalive-agent run --config /etc/keepalive/keepalive.toml\n  \
                  keepalive-agent run --cgroup /system.slice/redis.service"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    target: Target,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("starting the runtime")?
        .block_on(enforce(&arguments.target))?;
    Ok(ExitCode::SUCCESS)
}

async fn enforce(target: &Target) -> Result<()> {
    // Before anything is attached, so that a signal cannot come too early.
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;

    let (config, source, warnings) = target.config()?;
    for warning in &warnings.0 {
        warn!("{warning}");
    }
    preflight::may_enforce()?;
    let (hierarchy, root) = target.root()?;
    let layout = layout::running()?;
    debug!(?layout, "found the kernel's fields");
    let (assignment, warnings) = assignment::assign(&config, &hierarchy, &root)
        .with_context(|| format!("reading the hierarchy {}", hierarchy.mount().display()))?;
    for warning in &warnings {
        warn!("{warning}");
    }
    let place = hierarchy.directory(&root.path).display().to_string();
    let directory = hierarchy.open(&root)?;
    let mut enforcer = Loaded::load(&layout, assignment.policies.len())?
        .fill(&assignment)?
        .attach(&directory)
        .with_context(|| format!("cgroup {place}"))?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the logger keeps its descriptor open"
    )]
    let mut log = AsyncFd::with_interest(enforcer.logger()?, Interest::READABLE)
        .context("watching the log of the BPF program")?;
    let started = Instant::now();
    report_start(target, &place, &source, &assignment)?;

    let stopped_by = tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        error = relay(&mut log) => return Err(error),
    };
    let done = Done::read(&enforcer, &assignment)?;
    drop(enforcer);
    report_stop(target, stopped_by, started, &done)
}

/// Passes on what the BPF program logs; ends only by an error.
async fn relay(log: &mut AsyncFd<EbpfLogger<&'static dyn log::Log>>) -> anyhow::Error {
    loop {
        match log.readable_mut().await {
            Ok(mut guard) => {
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
            Err(error) => {
                return anyhow::Error::new(error).context("reading the log of the BPF program");
            }
        }
    }
}

#[derive(Serialize)]
#[serde(tag = "event", rename = "started")]
struct Started<'a> {
    version: &'a str,
    kernel: String,
    cgroup: &'a str,
    config: Option<String>,
    policies: Vec<StartedPolicy<'a>>,
}

#[derive(Serialize)]
struct StartedPolicy<'a> {
    name: &'a str,
    cgroups: usize,
    keepalive: String,
    idle: String,
    interval: String,
    probes: String,
    user_timeout: String,
}

fn report_start(
    target: &Target,
    place: &str,
    source: &ConfigSource,
    assignment: &Assignment,
) -> Result<()> {
    if target.json {
        let policies = (0..).zip(&assignment.policies).map(|(index, assigned)| {
            let [keepalive, idle, interval, probes, user_timeout] =
                output::wishes(&assigned.policy);
            StartedPolicy {
                name: &assigned.name,
                cgroups: paths_of(assignment, index).count(),
                keepalive,
                idle,
                interval,
                probes,
                user_timeout,
            }
        });
        return output::json(&Started {
            version: VERSION,
            kernel: kernel::release(),
            cgroup: place,
            config: match source {
                ConfigSource::BuiltIn => None,
                ConfigSource::File(file) => Some(file.display().to_string()),
            },
            policies: policies.collect(),
        });
    }
    output::text(format_args!(
        "keepalive-agent {VERSION} on Linux {}\n\
         config    {source}\n\
         attached  {place}: every new TCP connection in it and below\n\n",
        kernel::release()
    ))?;
    let rows = (0..).zip(&assignment.policies).map(|(index, assigned)| {
        let [keepalive, idle, interval, probes, user_timeout] = output::wishes(&assigned.policy);
        let name = assigned.name.clone();
        let cgroups = some_of(paths_of(assignment, index));
        [
            name,
            keepalive,
            idle,
            interval,
            probes,
            user_timeout,
            cgroups,
        ]
    });
    output::table(
        [
            "POLICY",
            "KEEPALIVE",
            "IDLE",
            "INTERVAL",
            "PROBES",
            "USER-TIMEOUT",
            "CGROUPS",
        ],
        rows,
    )?;
    output::text("\nenforcing until stopped with SIGINT (ctrl-c) or SIGTERM\n")
}

/// The cgroups that point to a policy.
fn paths_of(assignment: &Assignment, policy: usize) -> impl Iterator<Item = &str> {
    assignment
        .claims
        .iter()
        .filter(move |claim| claim.policy == policy)
        .map(|claim| claim.cgroup.path.as_str())
}

/// A list that fits on a line.
fn some_of<'a>(paths: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 3;
    let paths: Vec<_> = paths.collect();
    match paths.len() {
        0 => "none yet".to_owned(),
        count if count <= SHOWN => paths.join(" "),
        count => format!("{} and {} more", paths[..SHOWN].join(" "), count - SHOWN),
    }
}

/// What was done, in numbers.
#[derive(Serialize)]
#[serde(tag = "event", rename = "stopped")]
struct Done {
    policies: Vec<DonePolicy>,
    failures: Vec<DoneFailure>,
}

#[derive(Serialize)]
struct DonePolicy {
    name: String,
    seen: u64,
    turned_on: u64,
    turned_off: u64,
    filled: u64,
    clamped: u64,
    left_alone: u64,
    failed: u64,
}

#[derive(Serialize)]
struct DoneFailure {
    policy: String,
    option: &'static str,
    errno: u32,
    count: u64,
}

impl Done {
    fn read(enforcer: &Enforcer, assignment: &Assignment) -> Result<Self> {
        let name = |slot: u32| {
            slot::index(slot)
                .and_then(|index| assignment.policies.get(index))
                .map_or(UNCLAIMED, |assigned| assigned.name.as_str())
                .to_owned()
        };
        let counters = enforcer.counters().context("reading the counters")?;
        let policies = (0..)
            .zip(counters)
            .filter(|(slot, counters)| slot::index(*slot).is_some() || counters.seen > 0)
            .map(|(slot, counters)| DonePolicy::new(name(slot), counters));
        let failures = enforcer.failures().context("reading the failures")?;
        let failures = failures.into_iter().map(|(key, count)| {
            let FailureKey {
                slot,
                option,
                errno,
            } = key;
            DoneFailure {
                policy: name(slot),
                option: SocketOption::from_number(option).map_or("unknown", SocketOption::name),
                errno,
                count,
            }
        });
        Ok(Self {
            policies: policies.collect(),
            failures: failures.collect(),
        })
    }
}

impl DonePolicy {
    fn new(name: String, counters: Counters) -> Self {
        let Counters {
            seen,
            turned_on,
            turned_off,
            filled,
            clamped,
            left_alone,
            failed,
        } = counters;
        Self {
            name,
            seen,
            turned_on,
            turned_off,
            filled,
            clamped,
            left_alone,
            failed,
        }
    }
}

fn report_stop(target: &Target, by: &str, started: Instant, done: &Done) -> Result<()> {
    if target.json {
        return output::json(done);
    }
    let seconds = u32::try_from(started.elapsed().as_secs()).unwrap_or(u32::MAX);
    output::text(format_args!(
        "\nstopped by {by} after {}; connections keep what they were given\n\n",
        duration::show_seconds(seconds)
    ))?;
    let rows = done.policies.iter().map(|policy| {
        let numbers = [
            policy.seen,
            policy.turned_on,
            policy.turned_off,
            policy.filled,
            policy.clamped,
            policy.left_alone,
            policy.failed,
        ];
        let [seen, on, off, filled, clamped, left, failed] = numbers.map(|n| n.to_string());
        [
            policy.name.clone(),
            seen,
            on,
            off,
            filled,
            clamped,
            left,
            failed,
        ]
    });
    output::table(
        [
            "POLICY",
            "CONNECTIONS",
            "TURNED ON",
            "TURNED OFF",
            "TIMERS FILLED",
            "CLAMPED",
            "LEFT ALONE",
            "FAILED",
        ],
        rows,
    )?;
    for failure in &done.failures {
        let DoneFailure {
            policy,
            option,
            errno,
            count,
        } = failure;
        let reason = io::Error::from_raw_os_error(i32::try_from(*errno).unwrap_or(0));
        output::text(format_args!(
            "policy {policy}: the kernel refused {option} {count} times: {reason}\n"
        ))?;
    }
    Ok(())
}
