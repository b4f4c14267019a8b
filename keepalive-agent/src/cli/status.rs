//! `keepalive-agent status`: what is in force, read from the kernel.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;

use super::{
    output,
    report::{self, DoneRecord},
    table,
};
use crate::{
    daemon::ownership,
    datapath::{
        self, Foreign, InForce, Origin, Part, PartStatus, PinDirectory, Refusals, Reload,
        SetRecord, State, Sweep,
    },
    duration,
    grant::Grant,
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    kernel::preflight,
};

/// Something is in force, but a part of it does not work.
const DEGRADED: u8 = 4;

/// Nothing is in force.
const NOT_IN_FORCE: u8 = 3;

#[derive(Args, Debug)]
#[command(
    after_help = "Everything is read from the kernel, so it is true with and without a running \
                  agent.\n\n\
                  Exit codes: 0 in force and every part works, 1 failed, 2 wrong usage, \
                  3 nothing is in force, 4 in force, but a part has failed or no agent runs.\n\n\
                  Examples:\n  \
                  keepalive-agent status\n  \
                  keepalive-agent status --cgroup /system.slice/redis.service\n  \
                  keepalive-agent status --json | jq .in_force[].policies"
)]
pub(super) struct Arguments {
    /// Only what is attached to this cgroup, instead of everywhere
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    /// Directory of the pins
    #[arg(long, value_name = "DIR", default_value = PinDirectory::DEFAULT)]
    pin: PathBuf,

    /// Print one JSON object instead of text for people
    #[arg(long)]
    json: bool,
}

/// Everything that is in force. The names are documented and stay.
#[derive(Serialize)]
struct Status {
    version: &'static str,
    healthy: bool,
    in_force: Vec<Set>,
}

#[derive(Serialize)]
struct Set {
    /// None where the set is not understood.
    cgroup: Option<CgroupPath>,
    /// 0 where it is not attached.
    cgroup_id: u64,
    /// Whether it is in force: somebody may have taken it off.
    attached: bool,
    /// Why nothing more is known of it.
    error: Option<String>,
    pinned: bool,
    agent: Option<u32>,
    #[serde(flatten)]
    known: Option<Known>,
    /// Other sets of ours that run for the same connections, those further up
    /// having the last word.
    agents_above: Vec<CgroupPath>,
    foreign_programs: Vec<Foreign>,
}

#[derive(Serialize)]
struct Known {
    version: String,
    config: Origin,
    built_at: u64,
    enforced_since: u64,
    policies: Vec<DoneRecord>,
    refusals: Vec<Refusals>,
    settled: bool,
    sweep: Sweep,
    reload: Option<Reload>,
    parts: BTreeMap<String, Part>,
    exec: Vec<Exec>,
}

/// A command for which a user was given a policy.
#[derive(Serialize)]
struct Exec {
    uid: u32,
    cgroup: CgroupPath,
}

pub(super) fn status(arguments: &Arguments) -> Result<ExitCode> {
    preflight::may_enforce()?;
    let hierarchy = Hierarchy::find()?;
    let only = match &arguments.cgroup {
        Some(path) => Some(hierarchy.path(path)?),
        None => None,
    };
    let pins = PinDirectory::open(&arguments.pin)?;
    let found = datapath::in_force()?;
    let attached = found.iter().filter(|set| set.cgroup != 0);
    let roots: Vec<_> = attached.filter_map(root_of).collect();
    let mut sets = Vec::new();
    for set in &found {
        let root = root_of(set);
        if only
            .as_ref()
            .is_some_and(|only| !set.is_of(only, &hierarchy))
        {
            continue;
        }
        sets.push(look_at(
            set,
            root.as_ref(),
            &roots,
            pins.as_ref(),
            &hierarchy,
        )?);
    }
    let healthy = !sets.is_empty() && sets.iter().all(Set::is_healthy);
    let code = match (sets.iter().any(|set| set.attached), healthy) {
        (false, _) => NOT_IN_FORCE.into(),
        (true, true) => ExitCode::SUCCESS,
        (true, false) => DEGRADED.into(),
    };
    let status = Status {
        version: crate::VERSION,
        healthy,
        in_force: sets,
    };
    if arguments.json {
        output::json(&status)?;
    } else {
        output::text(text(&status))?;
    }
    Ok(code)
}

fn root_of(set: &InForce) -> Option<Cgroup> {
    let record = set.record.as_ref().ok()?;
    Some(record.root.clone())
}

fn look_at(
    set: &InForce,
    root: Option<&Cgroup>,
    roots: &[Cgroup],
    pins: Option<&PinDirectory>,
    hierarchy: &Hierarchy,
) -> Result<Set> {
    let (known, agent, error) = match &set.record {
        Ok(record) => {
            // An agent may be writing it.
            let state = record.state().unwrap_or_default();
            let path = &record.root.path;
            let owner = state.owner.filter(|owner| ownership::lives(owner, path));
            let known = known(record, state)?;
            (Some(known), owner.map(|owner| owner.pid), None)
        }
        Err(error) => (None, None, Some(datapath::chain(error))),
    };
    let attached = set.cgroup != 0;
    let error = error.or_else(|| {
        let taken_off = "not in force: the cgroup is gone, or somebody took the program off it; \
                         SIGHUP has a running agent attach it again, `keepalive-agent detach` \
                         removes what is left";
        (!attached).then(|| taken_off.to_owned())
    });
    let directory = root.map(|root| hierarchy.open(root));
    let foreign_programs = match directory {
        Some(Ok(directory)) => datapath::programs_on_the_way(directory)?,
        _ => Vec::new(),
    };
    let above = roots.iter().filter(|other| {
        root.is_some_and(|root| other.path.contains(&root.path) && other.id != root.id)
    });
    Ok(Set {
        cgroup: root.map(|root| root.path.clone()),
        cgroup_id: set.cgroup,
        attached,
        error,
        pinned: set.pins(pins).is_some(),
        agent,
        known,
        agents_above: above.map(|root| root.path.clone()).collect(),
        foreign_programs,
    })
}

fn known(record: &SetRecord, state: State) -> Result<Known> {
    let description = record.description();
    let done = record.done().context("reading the counters")?;
    Ok(Known {
        version: description.version.clone(),
        config: description.origin.clone(),
        built_at: description.built_at,
        enforced_since: description.enforced_since,
        policies: done.into_iter().map(DoneRecord::from).collect(),
        refusals: record.refusals()?,
        settled: state.settled,
        sweep: state.sweep,
        reload: state.reload,
        parts: state.parts,
        exec: record.grants().into_iter().map(Exec::from).collect(),
    })
}

impl From<Grant> for Exec {
    fn from(grant: Grant) -> Self {
        Self {
            uid: grant.uid,
            cgroup: grant.cgroup.path,
        }
    }
}

impl Set {
    fn is_healthy(&self) -> bool {
        let works = |known: &Known| {
            known
                .parts
                .values()
                .all(|part| part.status != PartStatus::Failed)
        };
        self.attached && self.agent.is_some() && self.known.as_ref().is_some_and(works)
    }
}

fn text(status: &Status) -> String {
    if status.in_force.is_empty() {
        return "nothing is in force\n".to_owned();
    }
    let mut text = String::new();
    for (index, set) in status.in_force.iter().enumerate() {
        if index > 0 {
            text.push('\n');
        }
        describe(set, &mut text);
    }
    text
}

fn describe(set: &Set, text: &mut String) {
    const INDENT: usize = 11;
    let available = table::width().saturating_sub(INDENT);
    let mut line = |what: &str, value: &str| {
        for (index, value) in table::wrap(value, available).iter().enumerate() {
            let what = if index == 0 { what } else { "" };
            // Memory can always be written to.
            let _ = writeln!(text, "{what:<INDENT$}{value}");
        }
    };
    let cgroup = set.cgroup.as_ref().map(ToString::to_string);
    line(
        "cgroup",
        &cgroup.unwrap_or_else(|| set.cgroup_id.to_string()),
    );
    if let Some(error) = &set.error {
        line("error", error);
    }
    let Some(known) = &set.known else { return };
    let agent = match (set.agent, set.pinned) {
        (Some(pid), true) => format!("{pid}; enforcement goes on without it"),
        (Some(pid), false) => format!("{pid}; enforcement ends with it"),
        (None, _) => "none; the kernel goes on enforcing what the last one left".to_owned(),
    };
    line("agent", &agent);
    line("version", &known.version);
    line("in force", &format!("for {}", ago(known.enforced_since)));
    line(
        "config",
        &format!(
            "{}, for {}",
            report::origin(&known.config),
            ago(known.built_at)
        ),
    );
    if let Some(reload) = &known.reload {
        let outcome = reload.error.as_deref().unwrap_or("taken over");
        line("reload", &format!("{} ago: {outcome}", ago(reload.at)));
    }
    line("sweep", &sweep(known));
    for above in &set.agents_above {
        line(
            "above",
            &format!("{above}: the policies in force there have the last word"),
        );
    }
    for program in &set.foreign_programs {
        line(
            "foreign",
            &format!(
                "sock_ops program {} (id {}) runs for the same connections",
                program.name, program.id
            ),
        );
    }
    for (name, part) in &known.parts {
        let status = match part.status {
            PartStatus::Active => "active",
            PartStatus::Disabled => "disabled",
            PartStatus::Failed => "failed",
        };
        let reason = part.reason.iter().map(|reason| format!(": {reason}"));
        line(
            "part",
            &format!("{name} {status}{}", reason.collect::<String>()),
        );
    }
    for Exec { uid, cgroup } in &known.exec {
        line("exec", &format!("of uid {uid}: {cgroup}"));
    }
    let _ = writeln!(text, "\n{}", report::done_text(&known.policies));
    for refused in &known.refusals {
        let _ = writeln!(text, "{refused}");
    }
}

fn sweep(known: &Known) -> String {
    let Sweep {
        under_way,
        connections,
        namespaces,
        waiting,
        missed,
    } = known.sweep;
    let mut text = format!(
        "{} in {}",
        report::count(connections, "connection"),
        report::count(namespaces, "network namespace")
    );
    if waiting > 0 {
        let _ = write!(text, ", {waiting} silent ones wait for their turn");
    }
    if missed > 0 {
        let _ = write!(text, ", {missed} namespaces missed");
    }
    if under_way {
        text += ", under way";
    } else if !known.settled {
        text += ", not finished: the next agent does it";
    }
    text
}

/// How long something has been, that began at this second.
fn ago(since: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    duration::show(Duration::from_secs(now.saturating_sub(since)))
}
