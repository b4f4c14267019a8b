//! What `run` and `sweep` tell: for people, or as JSON lines.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Result;
use keepalive_common::counters::Counters;
use serde::Serialize;
use tracing::warn;

use super::{ConfigSource, Target, VERSION, output};
use crate::{
    assignment::{Assigned, Assignment},
    bpf::{Counted, Done, Failure},
    duration, kernel, netns,
    sweep::Swept,
};

/// What a sweep says while it goes on.
pub(super) const SWEEPING: &str = "bringing the policy to existing connections";

/// What is enforced, and where.
pub(super) struct Started<'a> {
    pub(super) place: &'a str,
    pub(super) source: &'a ConfigSource,
    pub(super) assignment: &'a Assignment,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Started {
        version: &'a str,
        kernel: String,
        cgroup: &'a str,
        config: Option<String>,
        drop_ins: Vec<String>,
        policies: Vec<PolicyRecord<'a>>,
    },
    Reloaded {
        policies: Vec<PolicyRecord<'a>>,
    },
    Swept {
        namespaces: usize,
        connections: u64,
        waiting: u64,
        missed: Vec<String>,
    },
    Stopped {
        policies: Vec<DoneRecord<'a>>,
        failures: Vec<FailureRecord<'a>>,
    },
}

#[derive(Serialize)]
struct PolicyRecord<'a> {
    name: &'a str,
    enforced: bool,
    cgroups: usize,
    remotes: Vec<String>,
    ports: Vec<String>,
    local_ports: Vec<String>,
    keepalive: String,
    idle: String,
    interval: String,
    probes: String,
    user_timeout: String,
    give_up: String,
}

#[derive(Serialize)]
struct DoneRecord<'a> {
    name: &'a str,
    enforced: bool,
    /// Connections that were established under the policy.
    #[serde(flatten)]
    established: CountersRecord,
    /// Connections that were there before it.
    existing: CountersRecord,
}

#[derive(Serialize)]
struct CountersRecord {
    seen: u64,
    turned_on: u64,
    turned_off: u64,
    filled: u64,
    clamped: u64,
    left_alone: u64,
    failed: u64,
    user_timeout_conflict: u64,
    give_up_unsupported: u64,
}

#[derive(Serialize)]
struct FailureRecord<'a> {
    policy: &'a str,
    option: &'a str,
    errno: u32,
    count: u64,
}

impl From<Counters> for CountersRecord {
    fn from(counters: Counters) -> Self {
        let Counters {
            seen,
            turned_on,
            turned_off,
            filled,
            clamped,
            left_alone,
            failed,
            user_timeout_conflict,
            give_up_unsupported,
        } = counters;
        Self {
            seen,
            turned_on,
            turned_off,
            filled,
            clamped,
            left_alone,
            failed,
            user_timeout_conflict,
            give_up_unsupported,
        }
    }
}

/// The name of a policy, and whether it only counts.
fn name_of(name: &str, enforced: bool) -> String {
    let dry_run = if enforced { "" } else { " (dry run)" };
    format!("{name}{dry_run}")
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn policies(assignment: &Assignment) -> Vec<PolicyRecord<'_>> {
    let records = (0..).zip(&assignment.policies).map(|(index, assigned)| {
        let [keepalive, idle, interval, probes, user_timeout, give_up] =
            output::wishes(&assigned.policy);
        PolicyRecord {
            name: &assigned.name,
            enforced: assigned.policy.is_enforced(),
            cgroups: assignment.paths_of(index).count(),
            remotes: texts(&assigned.rules.remotes),
            ports: texts(&assigned.rules.ports),
            local_ports: texts(&assigned.rules.local_ports),
            keepalive,
            idle,
            interval,
            probes,
            user_timeout,
            give_up,
        }
    });
    records.collect()
}

fn policy_table(assignment: &Assignment) -> Result<()> {
    let header = [
        "POLICY",
        "KEEPALIVE",
        "IDLE",
        "INTERVAL",
        "PROBES",
        "USER-TIMEOUT",
        "GIVE-UP",
        "CGROUPS",
        "FOR",
    ];
    let rows = (0..).zip(&assignment.policies).map(|(index, assigned)| {
        let [keepalive, idle, interval, probes, user_timeout, give_up] =
            output::wishes(&assigned.policy);
        let remotes = texts(&assigned.rules.remotes);
        let ports = texts(&assigned.rules.ports);
        let ports = ports.iter().map(|ports| format!("port {ports}"));
        let local_ports = texts(&assigned.rules.local_ports);
        let local_ports = local_ports
            .iter()
            .map(|ports| format!("local port {ports}"));
        let ends: Vec<_> = remotes
            .into_iter()
            .chain(ports)
            .chain(local_ports)
            .collect();
        [
            name_of(&assigned.name, assigned.policy.is_enforced()),
            keepalive,
            idle,
            interval,
            probes,
            user_timeout,
            give_up,
            some_of(assignment.paths_of(index)),
            match ends.len() {
                0 => "all".to_owned(),
                _ => some_of(ends.iter().map(String::as_str)),
            },
        ]
    });
    output::table(header, rows)
}

/// Says which policies want what this kernel does not have.
fn warn_of_give_up(assignment: &Assignment) {
    let wanted = |assigned: &&Assigned| assigned.policy.give_up != 0 && !assigned.policy.ignores();
    let Some(first) = assignment.policies.iter().find(wanted) else {
        return;
    };
    if netns::environment().is_ok_and(|environment| environment.rto_max == 0) {
        warn!(
            "policy {}: give-up has no effect on this kernel, which knows no TCP_RTO_MAX_MS \
             (before Linux 6.15): data in flight is given up by net.ipv4.tcp_retries2",
            first.name
        );
    }
}

pub(super) fn started(target: &Target, started: &Started<'_>) -> Result<()> {
    let Started {
        place,
        source,
        assignment,
    } = *started;
    warn_of_give_up(assignment);
    if target.json {
        return output::json(&Event::Started {
            version: VERSION,
            kernel: kernel::release(),
            cgroup: place,
            config: source
                .main
                .as_deref()
                .map(Path::display)
                .map(|file| file.to_string()),
            drop_ins: source
                .drop_ins
                .iter()
                .map(|file| file.display().to_string())
                .collect(),
            policies: policies(assignment),
        });
    }
    output::text(format_args!(
        "keepalive-agent {VERSION} on Linux {}\n\
         config    {source}\n\
         attached  {place}: every new TCP connection in it and below\n\n",
        kernel::release()
    ))?;
    policy_table(assignment)?;
    let is_enforced = |assigned: &Assigned| assigned.policy.is_enforced();
    let doing = if assignment.policies.iter().any(is_enforced) {
        "enforcing"
    } else {
        "setting nothing"
    };
    output::text(format_args!(
        "\n{doing} until stopped with SIGINT (ctrl-c) or SIGTERM\n"
    ))
}

pub(super) fn reloaded(target: &Target, assignment: &Assignment) -> Result<()> {
    if target.json {
        return output::json(&Event::Reloaded {
            policies: policies(assignment),
        });
    }
    output::text("\nthe config was read again\n\n")?;
    policy_table(assignment)
}

pub(super) fn swept(target: &Target, swept: &Swept) -> Result<()> {
    if target.json {
        return output::json(&Event::Swept {
            namespaces: swept.namespaces.len(),
            connections: swept.seen,
            waiting: swept.waiting,
            missed: swept
                .missed
                .iter()
                .map(|(namespace, error)| format!("{}: {error:#}", namespace.name))
                .collect(),
        });
    }
    output::text(format_args!(
        "looked at {} in {}",
        count(swept.seen, "existing connection"),
        count(swept.namespaces.len() as u64, "network namespace")
    ))?;
    if swept.waiting > 0 {
        output::text(format_args!(
            "; {} silent for long, governed one after the other",
            count(swept.waiting, "connection")
        ))?;
    }
    output::text("\n")
}

pub(super) fn stopped(
    target: &Target,
    by: &str,
    after: Duration,
    done: &[(Counted, Done)],
    failures: &[Failure],
) -> Result<()> {
    if !target.json {
        output::text(format_args!(
            "\nstopped by {by} after {}; connections keep what they were given\n\n",
            duration::show(Duration::from_secs(after.as_secs()))
        ))?;
    }
    changed(target, done, failures)
}

/// What was done, in numbers.
pub(super) fn changed(
    target: &Target,
    done: &[(Counted, Done)],
    failures: &[Failure],
) -> Result<()> {
    if target.json {
        return output::json(&Event::Stopped {
            policies: done
                .iter()
                .map(|(whose, done)| DoneRecord {
                    name: &whose.name,
                    enforced: whose.enforced,
                    established: done.established.into(),
                    existing: done.existing.into(),
                })
                .collect(),
            failures: failures
                .iter()
                .map(|failure| FailureRecord {
                    policy: &failure.policy,
                    option: failure.option,
                    errno: failure.errno,
                    count: failure.count,
                })
                .collect(),
        });
    }
    done_table(done)?;
    for (whose, done) in done {
        let connections =
            done.established.user_timeout_conflict + done.existing.user_timeout_conflict;
        if connections > 0 {
            output::text(format_args!(
                "policy {}: {} left without keepalive of the policy, because the application's \
                 user-timeout would end {} at the first lost probes; \
                 user-timeout = {{ at-least = \"derive\" }} allows for them\n",
                whose.name,
                count(connections, "connection"),
                if connections == 1 { "it" } else { "them" },
            ))?;
        }
    }
    for failure in failures {
        output::text(format_args!("{failure}\n"))?;
    }
    Ok(())
}

/// What was done, to new connections and, where there were any, to existing ones.
fn done_table(done: &[(Counted, Done)]) -> Result<()> {
    let header = [
        "POLICY",
        "CONNECTIONS",
        "TURNED ON",
        "TURNED OFF",
        "TIMERS FILLED",
        "CLAMPED",
        "LEFT ALONE",
        "FAILED",
    ];
    let rows = done.iter().flat_map(|(whose, done)| {
        let new = (format!("{} new", done.established.seen), done.established);
        let old = (format!("{} existing", done.existing.seen), done.existing);
        [new, old]
            .into_iter()
            .enumerate()
            .filter(|(row, (_, counters))| *row == 0 || counters.seen > 0)
            .map(move |(row, (seen, counters))| {
                let name = if row == 0 {
                    name_of(&whose.name, whose.enforced)
                } else {
                    String::new()
                };
                [
                    name,
                    seen,
                    counters.turned_on.to_string(),
                    counters.turned_off.to_string(),
                    counters.filled.to_string(),
                    counters.clamped.to_string(),
                    counters.left_alone.to_string(),
                    counters.failed.to_string(),
                ]
            })
    });
    output::table(header, rows)
}

/// A line on a terminal that says what is under way, once it has taken a
/// second; gone when this is dropped.
pub(super) struct Patience {
    over: Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Patience {
    pub(super) fn with(what: &'static str) -> Self {
        const PATIENCE: Duration = Duration::from_secs(1);
        let (over, is_over) = mpsc::channel();
        let thread = io::stderr().is_terminal().then(|| {
            thread::spawn(move || {
                let begun = Instant::now();
                while is_over.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    let seconds = begun.elapsed().as_secs();
                    // Nobody is left to tell when this fails.
                    let _ = write!(io::stderr(), "\r{what}, {seconds}s\x1b[K");
                }
                if begun.elapsed() >= PATIENCE {
                    let _ = write!(io::stderr(), "\r\x1b[K");
                }
            })
        });
        Self { over, thread }
    }
}

impl Drop for Patience {
    fn drop(&mut self) {
        // It has nothing to fail with; if it did, it is over.
        let _ = self.over.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Progress of what takes long, where somebody watches.
pub(super) fn waiting(connections: u64) {
    let mut out = io::stderr();
    if out.is_terminal() {
        // Nobody is left to tell when this fails.
        let _ = write!(out, "\r\x1b[K");
        if connections > 0 {
            let _ = write!(out, "{} to go", count(connections, "probe"));
        }
        let _ = out.flush();
    }
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

/// `1 connection`, `2 connections`.
fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}
