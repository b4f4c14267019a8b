//! `keepalive-agent sweep`: brings the policy to existing connections, once.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use tracing::warn;

use super::{PARTIAL, Target, follow, output, report};
use crate::{
    daemon::{building::allowed, target},
    datapath::{Blueprint, InForce, LoadedSet},
    kernel::{layout::Kernel, preflight},
    sweep::{Reach, SweepJob},
};

/// What a sweep says while it goes on.
const SWEEPING: &str = "bringing the policy to existing connections";

#[derive(Args, Debug)]
#[command(
    after_help = "New connections are not governed: that is what `run` is for, which sweeps by \
                  itself. Probes of idle connections go out one after the other, which takes most \
                  of an idle period.\n\n\
                  Exit codes: 0 done, 1 failed, 2 wrong usage, 4 some namespace could not be swept.\n\n\
                  Examples:\n  \
                  keepalive-agent sweep\n  \
                  keepalive-agent sweep --config my.toml --cgroup /system.slice"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    target: Target,
}

pub(super) fn sweep(arguments: &Arguments) -> Result<ExitCode> {
    let target = &arguments.target;
    preflight::may_enforce()?;
    let read = target::read(&target.files.sources(), false)?;
    for warning in &read.warnings {
        warn!("{warning}");
    }
    let (hierarchy, root) = target.root()?;
    let claimants = target::claimants(&read.config, &root)?;
    let (mut assignment, warnings) = target::assign(&claimants, &hierarchy)?;
    for warning in &warnings {
        warn!("{warning}");
    }
    // What an agent enforces there now has left its values on connections.
    let in_force = InForce::on(root.id).ok().flatten();
    let in_force = in_force.and_then(|found| found.record.ok());
    let before = match &in_force {
        Some(set) => {
            let claimants = target::claimants(&set.description().config, &root)?;
            let mut before = target::assign(&claimants, &hierarchy)?.0;
            before.grants = allowed(&set.description().config, &set.grants());
            assignment.grants = allowed(&read.config, &set.grants());
            Some(before)
        }
        None => None,
    };
    let given = in_force
        .as_ref()
        .map(|set| set.description().config.clone());
    let set = LoadedSet::build(Blueprint {
        kernel: &Kernel::running()?,
        root: &root,
        config: &read.config,
        origin: &read.origin,
        assignment: &assignment,
        // Those of the agent, if one runs, are there.
        bounded: None,
        before: given.as_ref().zip(before.as_ref()),
        previous: in_force.as_deref(),
    })?;
    set.sweeper().set_counts(true);
    let job = SweepJob::start(set.sweeper(), Reach::Node)?;
    let is_complete = follow::follow(job, SWEEPING, |swept| report::swept(target.json, swept))?;
    output::text(report::changed(target.json, set.record()))?;
    Ok(if is_complete {
        ExitCode::SUCCESS
    } else {
        PARTIAL.into()
    })
}
