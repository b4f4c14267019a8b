//! `keepalive-agent sweep`: brings the policy to existing connections, once.

use std::{process::ExitCode, thread, time::Duration};

use anyhow::Result;
use clap::Args;
use tracing::warn;

use super::{
    PARTIAL, Target,
    report::{self, Patience},
    run,
};
use crate::{
    bpf::Loaded,
    kernel::{layout::Kernel, preflight},
    sweep::{self, Rest},
};

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
    let (config, _, warnings) = target.config()?;
    for warning in &warnings.0 {
        warn!("{warning}");
    }
    let (hierarchy, root) = target.root()?;
    let claimants = run::claimants(&config, &root)?;
    let assignment = run::assign(&claimants, &hierarchy)?;
    let mut enforcer = Loaded::without_hook(&Kernel::running()?, assignment.policies.len())?
        .fill(None, &assignment)?
        .detached();
    let patience = Patience::with(report::SWEEPING);
    let swept = sweep::apply(&mut enforcer)?;
    drop(patience);
    for (_, error) in &swept.missed {
        warn!("{error:#}; its connections are as they were");
    }
    report::swept(target, &swept)?;
    let mut rest = Rest::of(&mut enforcer, &swept, claimants.shortest_idle())?;
    while let Some(round) = rest.take() {
        while !round.is_finished() {
            report::waiting(swept.waiting.saturating_sub(round.probed()));
            thread::sleep(Duration::from_millis(100));
        }
        rest = round.next(&mut enforcer)?;
    }
    report::waiting(0);
    report::changed(target, &enforcer.done()?, &enforcer.failures()?)?;
    Ok(if swept.missed.is_empty() {
        ExitCode::SUCCESS
    } else {
        PARTIAL.into()
    })
}
