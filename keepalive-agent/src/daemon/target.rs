//! Target: what the files and the hierarchy say is to be enforced, read together.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use tracing::warn;

use crate::{
    assignment::{Assigned, Assignment, Claimants, Warning},
    config::{Config, Sources},
    datapath::Origin,
    hierarchy::{Cgroup, Hierarchy},
    names::printable_path,
    netns,
};

/// A config, and the files it comes from.
#[derive(Clone, Debug)]
pub struct Read {
    /// What is to be enforced.
    pub config: Arc<Config>,
    /// The files.
    pub origin: Origin,
    /// What is odd about them.
    pub warnings: Vec<String>,
}

/// Reads the files.
///
/// # Errors
///
/// Everything that is wrong in them.
pub fn read(sources: &Sources, dry_run: bool) -> Result<Read> {
    let merged = sources.read_config()?;
    Ok(Read {
        config: merged.config.in_dry_run(dry_run).into(),
        origin: Origin {
            main: merged.main,
            drop_ins: merged.drop_ins,
        },
        warnings: merged.warnings.0.iter().map(ToString::to_string).collect(),
    })
}

/// Who claims what below `root`.
///
/// # Errors
///
/// When the globs of the config are too large together.
pub fn claimants(config: &Config, root: &Cgroup) -> Result<Claimants> {
    if config.default.is_none() && config.policies.is_empty() {
        warn!("the config has neither [default] nor [[policy]]: every connection is left alone");
    }
    Claimants::new(config, root).context("the globs of the config are too large together")
}

/// Assigns the cgroups that exist; and what somebody may not have meant.
///
/// # Errors
///
/// When the hierarchy cannot be read.
pub fn assign(claimants: &Claimants, hierarchy: &Hierarchy) -> Result<(Assignment, Vec<Warning>)> {
    let (assignment, mut warnings) = claimants.assign(hierarchy).with_context(|| {
        format!(
            "reading the hierarchy {}",
            printable_path(hierarchy.mount())
        )
    })?;
    if let Ok(sysctls) = netns::environment() {
        warnings.extend(claimants.loosened(0..claimants.policies().len(), &sysctls));
    }
    Ok((assignment, warnings))
}

/// Says which policies want what this kernel does not have.
pub fn warn_of_give_up(assignment: &Assignment) {
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
