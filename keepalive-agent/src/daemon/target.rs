//! Target: what the files and the hierarchy say is to be enforced, read together.

use anyhow::{Context as _, Result};
use tracing::warn;

use crate::{
    assignment::{Assignment, Claimants, Warning},
    config::{Config, Sources},
    datapath::Origin,
    hierarchy::{Cgroup, Hierarchy},
    names::printable_path,
};

/// A config, and the files it comes from.
#[derive(Clone, Debug)]
pub struct Read {
    /// What is to be enforced.
    pub config: Config,
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
    let merged = sources.read()?;
    Ok(Read {
        config: merged.config.in_dry_run(dry_run),
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

/// Assigns the cgroups that exist; and what has no effect now.
///
/// # Errors
///
/// When the hierarchy cannot be read.
pub fn assign(claimants: &Claimants, hierarchy: &Hierarchy) -> Result<(Assignment, Vec<Warning>)> {
    claimants.assign(hierarchy).with_context(|| {
        format!(
            "reading the hierarchy {}",
            printable_path(hierarchy.mount())
        )
    })
}
