//! What `run` and `sweep` report: for people, or as JSON lines.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, SystemTime},
};

use keepalive_common::{counters::Counters, dead_peer::Cause};
use serde::Serialize;
use serde_json::Value;
use tracing::Level;

use super::{log, output, table};
use crate::{
    VERSION,
    assignment::{Assigned, Assignment},
    config::DEFAULT_FILE,
    daemon::{self, Difference, Leaves, Reporter, journal::What},
    datapath::{Counted, Done, Origin, PinDirectory, Refusals, SetRecord, chain},
    duration,
    hierarchy::CgroupPath,
    kernel,
    names::{path_to_json, printable_path},
    sweep::Swept,
    unblocked::Stream,
};

/// How long the last report waits for whoever reads: together with what goes on
/// before, SIGTERM is answered within a second.
const PATIENCE: Duration = Duration::from_millis(300);

/// How it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// For people who look at the terminal.
    Text,
    /// A line for each change, with all that is known of it.
    Json,
    /// A record of the journal for each change.
    Journal,
}

/// Writes reports without waiting for whoever reads them.
pub(super) struct Report {
    pub(super) form: Form,
}

impl Reporter for Report {
    fn report(&mut self, event: &daemon::Event<'_>) {
        let text = match self.form {
            Form::Text => text_of(event),
            Form::Json => timed_line(&record_of(event)),
            Form::Journal => return to_journal(event),
        };
        let is_last = matches!(event, daemon::Event::Stopped { .. });
        if is_last {
            // Give a slow reader a moment, so that there is room for it.
            Stream::Output.finish(PATIENCE);
        }
        Stream::Output.send(text.as_bytes());
        if is_last {
            Stream::Output.finish(PATIENCE);
        }
    }
}

/// One line, with the fields that `events --json` has.
fn to_journal(event: &daemon::Event<'_>) {
    let what = What::from(event);
    let message = super::events::what(&what, None, None);
    let mut record = log::Record::new(Level::INFO, &message);
    // Numbers and strings cannot fail to be written.
    if let Ok(Value::Object(fields)) = serde_json::to_value(&what) {
        for (name, value) in &fields {
            record.field(name, value);
        }
    }
    record.send(&message);
}

#[derive(Serialize)]
struct Timed<'a> {
    #[serde(flatten)]
    record: &'a Record<'a>,
    at_ms: u64,
}

fn timed_line(record: &Record<'_>) -> String {
    let at_ms = daemon::journal::milliseconds(SystemTime::now());
    line(&Timed { record, at_ms })
}

/// One JSON object on a line of its own.
fn line(record: &impl Serialize) -> String {
    // Numbers and strings cannot fail to be written.
    serde_json::to_string(record).map_or_else(|_| String::new(), |line| line + "\n")
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Record<'a> {
    Started {
        version: &'a str,
        kernel: String,
        cgroup: &'a str,
        config: Option<String>,
        drop_ins: Vec<String>,
        /// The directory of the pins by which enforcement outlives the agent.
        pinned: Option<String>,
        /// Whether enforcement was in force already.
        continued: bool,
        policies: Vec<PolicyRecord<'a>>,
    },
    Waiting {
        cgroup: &'a CgroupPath,
    },
    Reloaded {
        why: &'a str,
        /// Those that are new or different.
        policies: Vec<PolicyRecord<'a>>,
        /// Names of those that are gone.
        removed: &'a [String],
        /// How many are as they were.
        unchanged: usize,
    },
    Swept {
        new_cgroups: usize,
        namespaces: usize,
        connections: u64,
        waiting: u64,
        missed: Vec<String>,
    },
    Stopped {
        by: Option<&'a str>,
        enforcement_goes_on: bool,
        policies: Vec<DoneRecord>,
        failures: Vec<Refusals>,
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
pub(super) struct DoneRecord {
    name: String,
    enforced: bool,
    /// Connections that were established under the policy.
    #[serde(flatten)]
    established: CountersRecord,
    /// Connections that were there before it.
    existing: CountersRecord,
    /// Peers of both that were found dead, by cause.
    dead_peers: BTreeMap<&'static str, u64>,
}

#[derive(Serialize)]
struct CountersRecord {
    seen: u64,
    turned_on: u64,
    turned_off: u64,
    filled: u64,
    clamped: u64,
    restored: u64,
    left_alone: u64,
    failed: u64,
    user_timeout_conflict: u64,
    give_up_unsupported: u64,
}

impl From<Counters> for CountersRecord {
    fn from(counters: Counters) -> Self {
        let (seen, left_alone) = (counters.seen(), counters.left_alone());
        let Counters {
            seen: _,
            turned_on,
            turned_off,
            filled,
            clamped,
            restored,
            left_alone: _,
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
            restored,
            left_alone,
            failed,
            user_timeout_conflict,
            give_up_unsupported,
        }
    }
}

impl From<(Counted, Done)> for DoneRecord {
    fn from((whose, done): (Counted, Done)) -> Self {
        Self {
            name: whose.name,
            enforced: whose.enforced,
            established: done.established.into(),
            existing: done.existing.into(),
            dead_peers: Cause::ALL
                .into_iter()
                .map(|cause| (cause.name(), done.dead_peers.count(cause)))
                .collect(),
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
    let paths = assignment.paths_of_each();
    let records = paths.iter().zip(&assignment.policies);
    let records = records.map(|(paths, assigned)| {
        let [keepalive, idle, interval, probes, user_timeout, give_up] =
            output::wishes(&assigned.policy);
        PolicyRecord {
            name: &assigned.name,
            enforced: assigned.policy.is_enforced(),
            cgroups: paths.len(),
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

fn policy_table(assignment: &Assignment) -> String {
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
    let paths = assignment.paths_of_each();
    let rows = paths.iter().zip(&assignment.policies);
    let rows = rows.map(|(paths, assigned)| {
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
            some_of(paths.iter()),
            match ends.len() {
                0 => "all".to_owned(),
                _ => some_of(ends.iter()),
            },
        ]
    });
    output::table_text(header, rows)
}

/// The files of a config, in words.
pub(super) fn origin(origin: &Origin) -> String {
    let main = match &origin.main {
        None => format!("built in ({DEFAULT_FILE} does not exist)"),
        Some(file) => printable_path(file).to_string(),
    };
    match &origin.drop_ins[..] {
        [] => main,
        [one] => format!("{main} and {}", printable_path(one)),
        several => format!("{main} and {} drop-ins", several.len()),
    }
}

fn record_of<'a>(event: &'a daemon::Event<'a>) -> Record<'a> {
    match event {
        daemon::Event::Started {
            cgroup,
            origin,
            assignment,
            pinned,
            continued,
        } => Record::Started {
            version: VERSION,
            kernel: kernel::release(),
            cgroup,
            config: origin
                .main
                .as_deref()
                .map(|file| path_to_json(file).into_owned()),
            drop_ins: origin
                .drop_ins
                .iter()
                .map(|file| path_to_json(file).into_owned())
                .collect(),
            pinned: pinned.map(|pins| pins.path().display().to_string()),
            continued: *continued,
            policies: policies(assignment),
        },
        daemon::Event::Waiting { cgroup } => Record::Waiting { cgroup },
        daemon::Event::Reloaded { why, difference } => Record::Reloaded {
            why,
            policies: policies(&difference.assignment),
            removed: &difference.removed,
            unchanged: difference.unchanged,
        },
        daemon::Event::Swept(swept) => Record::Swept {
            new_cgroups: swept.new_cgroups,
            namespaces: swept.namespaces,
            connections: swept.seen,
            waiting: swept.waiting(),
            missed: swept
                .missed
                .iter()
                .map(|(namespace, error)| format!("{namespace}: {}", chain(error)))
                .collect(),
        },
        daemon::Event::Stopped {
            by, leaves, record, ..
        } => stopped(Some(by), *leaves != Leaves::Nothing, *record),
    }
}

fn stopped<'a>(by: Option<&'a str>, goes_on: bool, record: Option<&SetRecord>) -> Record<'a> {
    let (done, refusals) = counted(record);
    Record::Stopped {
        by,
        enforcement_goes_on: goes_on,
        policies: done.into_iter().map(DoneRecord::from).collect(),
        failures: refusals,
    }
}

/// What was done, as far as it can be read.
fn counted(record: Option<&SetRecord>) -> (Vec<(Counted, Done)>, Vec<Refusals>) {
    let Some(record) = record else {
        return Default::default();
    };
    (
        record.done().unwrap_or_default(),
        record.refusals().unwrap_or_default(),
    )
}

fn text_of(event: &daemon::Event<'_>) -> String {
    match event {
        daemon::Event::Started {
            cgroup,
            origin: files,
            assignment,
            pinned,
            continued,
        } => started(cgroup, files, assignment, *pinned, *continued),
        daemon::Event::Waiting { cgroup } => {
            format!("cgroup {cgroup} does not exist: nothing is enforced until it does\n")
        }
        daemon::Event::Reloaded { why, difference } => reloaded(why, difference),
        daemon::Event::Swept(swept) => swept_text(swept),
        daemon::Event::Stopped {
            by,
            after,
            leaves,
            record,
        } => {
            let what = match leaves {
                Leaves::Nothing => "connections keep what they were given",
                Leaves::Enforcement => {
                    "enforcement goes on in the kernel; `keepalive-agent status` shows it, \
                     `keepalive-agent detach` takes it off"
                }
                Leaves::AnotherAgent => "that one says what is enforced from here on",
            };
            let after = duration::show(Duration::from_secs(after.as_secs()));
            let line = wrapped(&format!("stopped by {by} after {after}; {what}"));
            format!("\n{line}\n{}", changed_text(*record))
        }
    }
}

fn started(
    cgroup: &str,
    files: &Origin,
    assignment: &Assignment,
    pinned: Option<&PinDirectory>,
    continued: bool,
) -> String {
    let is_enforced = |assigned: &Assigned| assigned.policy.is_enforced();
    let doing = if assignment.policies.iter().any(is_enforced) {
        "enforcing"
    } else {
        "setting nothing"
    };
    let mut text = format!(
        "keepalive-agent {VERSION} on Linux {}\n\
         config    {}\n\
         attached  {cgroup}: every new TCP connection in it and below\n",
        kernel::release(),
        origin(files),
    );
    if continued {
        text += "          without a gap after the policy set that was in force\n";
    }
    if let Some(pins) = pinned {
        let _ = writeln!(text, "pinned    {}", pins.path().display());
    }
    let until = if pinned.is_some() {
        "until `keepalive-agent detach`, also without this agent"
    } else {
        "until stopped with SIGINT (ctrl-c) or SIGTERM"
    };
    let _ = write!(text, "\n{}\n{doing} {until}\n", policy_table(assignment));
    text
}

fn reloaded(why: &str, difference: &Difference) -> String {
    let Difference {
        assignment,
        removed,
        unchanged,
    } = difference;
    let mut text = format!("\nthe config was read again ({why})\n");
    if !assignment.policies.is_empty() {
        let _ = write!(text, "\n{}\n", policy_table(assignment));
    }
    if !removed.is_empty() {
        let _ = writeln!(text, "removed: {}", removed.join(", "));
    }
    if *unchanged > 0 {
        let _ = writeln!(text, "{unchanged} unchanged");
    }
    text
}

/// What came of a sweep.
pub(super) fn swept_text(swept: &Swept) -> String {
    let mut text = format!(
        "looked at {} in {}",
        count(swept.seen, "existing connection"),
        count(swept.namespaces as u64, "network namespace")
    );
    if swept.new_cgroups > 0 {
        let cgroups = count(swept.new_cgroups as u64, "new cgroup");
        let _ = write!(text, ", for {cgroups}");
    }
    if swept.waiting() > 0 {
        let _ = write!(
            text,
            "; {} silent for long, governed one after the other",
            count(swept.waiting(), "connection")
        );
    }
    text + "\n"
}

/// What `sweep` did, in numbers.
pub(super) fn swept(json: bool, swept: &Swept) -> String {
    if json {
        return timed_line(&record_of(&daemon::Event::Swept(swept)));
    }
    swept_text(swept)
}

/// What was done, in numbers.
pub(super) fn changed(json: bool, record: &SetRecord) -> String {
    if json {
        timed_line(&stopped(None, false, Some(record)))
    } else {
        changed_text(Some(record))
    }
}

fn changed_text(record: Option<&SetRecord>) -> String {
    let (done, refusals) = counted(record);
    let done: Vec<_> = done.into_iter().map(DoneRecord::from).collect();
    let mut text = done_text(&done);
    for record in &done {
        let connections =
            record.established.user_timeout_conflict + record.existing.user_timeout_conflict;
        if connections > 0 {
            text += &wrapped(&format!(
                "policy {}: {} left without keepalive of the policy, because the application's \
                 user-timeout would end {} at the first lost probes; \
                 user-timeout = {{ at-least = \"derive\" }} allows for them",
                record.name,
                count(connections, "connection"),
                if connections == 1 { "it" } else { "them" },
            ));
        }
    }
    for refused in refusals {
        let _ = writeln!(text, "{refused}");
    }
    text
}

/// Lines that fit the terminal.
fn wrapped(text: &str) -> String {
    table::wrap(text, table::width()).join("\n") + "\n"
}

/// What was done, to new connections and, where there were any, to existing ones.
pub(super) fn done_text(done: &[DoneRecord]) -> String {
    let header = [
        "POLICY",
        "CONNECTIONS",
        "TURNED ON",
        "TURNED OFF",
        "TIMERS FILLED",
        "CLAMPED",
        "LEFT ALONE",
        "FAILED",
        "DEAD PEERS",
    ];
    let rows = done.iter().flat_map(|record| {
        let new = (
            format!("{} new", record.established.seen),
            &record.established,
        );
        let old = (
            format!("{} existing", record.existing.seen),
            &record.existing,
        );
        [new, old]
            .into_iter()
            .enumerate()
            .filter(|(row, (_, counters))| *row == 0 || counters.seen > 0)
            .map(move |(row, (seen, counters))| {
                let name = if row == 0 {
                    name_of(&record.name, record.enforced)
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
                    if row == 0 {
                        record.dead_peers.values().sum::<u64>().to_string()
                    } else {
                        String::new()
                    },
                ]
            })
    });
    output::table_text(header, rows)
}

/// Progress of what takes long, where somebody watches; nothing takes the line
/// away.
pub(super) fn progress(text: &str) {
    let mut out = io::stderr();
    if out.is_terminal() {
        // Nobody is left to tell when this fails.
        let _ = write!(out, "\r\x1b[K{text}");
        let _ = out.flush();
    }
}

/// A list that fits on a line.
pub(super) fn some_of(names: impl Iterator<Item: ToString>) -> String {
    const SHOWN: usize = 3;
    let names: Vec<_> = names.map(|name| name.to_string()).collect();
    match names.len() {
        0 => "none yet".to_owned(),
        count if count <= SHOWN => names.join(" "),
        count => format!("{} and {} more", names[..SHOWN].join(" "), count - SHOWN),
    }
}

/// `1 connection`, `2 connections`.
pub(super) fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}
