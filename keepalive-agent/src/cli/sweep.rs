//! `keepalive-agent sweep`: brings the policy to existing connections, once.

use std::{process::ExitCode, thread, time::Duration};

use anyhow::Result;
use clap::Args;
use tracing::warn;

use super::{PARTIAL, Target, output, report};
use crate::{
    daemon::target,
    datapath::{Blueprint, InForce, LoadedSet},
    kernel::{layout::Kernel, preflight},
    sweep::{Progress, SweepJob},
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
    let (assignment, warnings) = target::assign(&claimants, &hierarchy)?;
    for warning in &warnings {
        warn!("{warning}");
    }
    // What an agent enforces there now has left its values on connections.
    let in_force = InForce::on(root.id).ok().flatten();
    let in_force = in_force.and_then(|found| found.record.ok());
    let before = match &in_force {
        Some(set) => {
            let claimants = target::claimants(&set.description.config, &root)?;
            Some(target::assign(&claimants, &hierarchy)?.0)
        }
        None => None,
    };
    let set = LoadedSet::build(&Blueprint {
        kernel: &Kernel::running()?,
        root: &root,
        config: &read.config,
        origin: &read.origin,
        assignment: &assignment,
        before: in_force
            .as_ref()
            .map(|set| &set.description.config)
            .zip(before.as_ref()),
        previous: in_force.as_deref(),
    })?;
    set.sweeper().set_counts(true);
    let mut job = SweepJob::start(set.sweeper(), false)?;
    let mut waiting = 0;
    let mut missed = false;
    let mut passed = Duration::ZERO;
    loop {
        const PAUSE: Duration = Duration::from_millis(50);
        match job.try_progress() {
            Some(Progress::FirstPass(swept)) => {
                report::progress("");
                let swept = swept?;
                for (_, error) in &swept.missed {
                    warn!("{error:#}; its connections are as they were");
                }
                missed = !swept.missed.is_empty();
                waiting = swept.waiting();
                output::text(report::swept(target.json, &swept))?;
            }
            Some(Progress::Over(swept)) => {
                report::progress("");
                if swept.waiting() > 0 {
                    warn!(
                        "{} connections have been silent for so long that they still wait; sweep \
                         again",
                        swept.waiting()
                    );
                    missed = true;
                }
                break;
            }
            None => {
                thread::sleep(PAUSE);
                passed += PAUSE;
                if waiting > 0 {
                    let left = waiting.saturating_sub(job.probed());
                    report::progress(&format!("{} to go", report::count(left, "probe")));
                } else if passed.as_millis().is_multiple_of(1000) {
                    report::progress(&format!("{SWEEPING}, {}s", passed.as_secs()));
                }
            }
        }
    }
    output::text(report::changed(target.json, set.record()))?;
    Ok(if missed {
        PARTIAL.into()
    } else {
        ExitCode::SUCCESS
    })
}
