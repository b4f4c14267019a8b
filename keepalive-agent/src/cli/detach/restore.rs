//! Restore: gives connections back what their applications had set.
//!
//! An empty policy set is put in force in the place of the one that is, in one
//! step. Its sweep takes back what that one wrote, as for any change of policy, and
//! then it is taken off. Whoever is interrupted on the way can begin again: what is
//! left to do stands in the kernel.

use std::{fmt::Write as _, sync::Arc};

use anyhow::{Context as _, Result};
use keepalive_common::counters::Counters;

use super::{PATIENCE, wait_for_end};
use crate::{
    cli::{follow, report},
    config::Config,
    daemon::{
        building::{Built, Job},
        control::{Client, Request},
        ownership::{self, Ownership},
    },
    datapath::{Bounds, InForce, Origin, PinDirectory, SetRecord},
    hierarchy::Hierarchy,
    kernel::layout::Kernel,
    sweep::{self, Reach, SweepJob},
};

/// A config in which no policy claims anything.
const NOTHING: Config = Config {
    default: None,
    policies: Vec::new(),
    self_service: None,
};

/// What was restored on connections.
pub(super) struct Restored {
    done: Counters,
    /// Whether every connection was met.
    pub(super) is_complete: bool,
}

impl Restored {
    /// In words and numbers.
    pub(super) fn text(&self, name: &str, dry_run: bool) -> String {
        let (seen, left_alone) = (self.done.seen(), self.done.left_alone());
        let Counters {
            turned_on,
            turned_off,
            filled,
            restored,
            failed,
            ..
        } = self.done;
        let (detached, was) = match (dry_run, seen) {
            (true, _) => ("would be detached from", "would be"),
            (false, 1) => ("detached from", "was"),
            (false, _) => ("detached from", "were"),
        };
        let mut text = format!(
            "{detached} {name}\n\
             {} of {} {was} restored: keepalive turned off on {turned_off}, on again on \
             {turned_on}; {} given back, {} that no application set now the sysctl's, or unset\n",
            seen.saturating_sub(left_alone),
            report::count(seen, "connection"),
            report::count(restored, "timer"),
            report::count(filled, "timer"),
        );
        if failed > 0 {
            // Memory can always be written to.
            let _ = writeln!(text, "the kernel refused {failed} options");
        }
        text
    }
}

/// Takes a set off its cgroup and gives connections back what they had; in dry run
/// only counts.
pub(super) fn restore(
    found: InForce,
    pins: Option<&PinDirectory>,
    dry_run: bool,
) -> Result<Restored> {
    let record = match &found.record {
        Ok(record) => record.clone(),
        Err(error) => {
            let why = crate::datapath::chain(error);
            anyhow::bail!("what it wrote is not known: {why}; detach without --restore")
        }
    };
    let path = record.root.path.clone();
    if dry_run {
        let built = set_after(&record, NOTHING)?;
        built.set.sweeper().set_counts(true);
        let swept = sweep::first_pass(built.set.sweeper(), true)?;
        return Ok(Restored {
            done: built.set.record().restored()?,
            is_complete: swept.missed.is_empty(),
        });
    }
    let owner = found.owner().filter(|owner| ownership::lives(owner, &path));
    let asking = || "asking the agent to step aside: stop it first".to_owned();
    let mut agent = match owner {
        Some(owner) => {
            let mut client = Client::connect(&path).with_context(asking)?;
            client.ask(Request::StepAside).with_context(asking)?;
            Some((client, owner.pid))
        }
        None => None,
    };
    let pins = pins.filter(|pins| found.is_pinned_in(pins));
    let cgroup = found.cgroup;
    let mut record = record;
    let description = record.description();
    if let Some(before) = description.before.clone()
        && !record.state()?.settled
    {
        // Connections may have values of the set before: its sweep comes first.
        let job = job(&record, description.config.clone(), before)?;
        let built = job.build()?;
        sweep::first_pass(built.set.sweeper(), false)?;
        record = built.set.record().clone();
    }
    let built = set_after(&record, NOTHING)?;
    built.set.sweeper().set_counts(true);
    let attachment = found.replace(&built.set, pins)?;
    if let Some((client, pid)) = &mut agent {
        client.ask(Request::TakenOver).with_context(asking)?;
        wait_for_end(*pid, &path)?;
    }
    let mut ownership = Ownership::acquire(&path, PATIENCE)?;
    let job = SweepJob::start(built.set.sweeper(), Reach::Node)?;
    let is_complete = follow::follow(job, "restoring connections", |_| String::new())?;
    let bounds = Bounds::of(built.set.record(), cgroup, pins.cloned())?;
    let done = built.set.record().restored()?;
    attachment.detach()?;
    bounds.detach()?;
    if is_complete {
        ownership.finish(&Arc::new(NOTHING));
    }
    Ok(Restored { done, is_complete })
}

/// A set with this config that follows the one of a record.
fn set_after(record: &Arc<SetRecord>, config: Config) -> Result<Built> {
    job(record, config.into(), record.description().config.clone())?.build()
}

fn job(record: &Arc<SetRecord>, config: Arc<Config>, before: Arc<Config>) -> Result<Job> {
    Ok(Job {
        kernel: Kernel::running()?,
        hierarchy: Hierarchy::find()?,
        root: record.root.clone(),
        config,
        origin: Origin::default(),
        before: Some(before),
        previous: Some(record.clone()),
        known: Arc::default(),
        grants: record.grants(),
    })
}
