//! Building: a policy set is built on a thread of its own, while the one in force
//! goes on and the daemon listens.

use std::{io, sync::Arc, thread};

use anyhow::Result;
use tokio::sync::oneshot;

use super::target;
use crate::{
    assignment::{Assignment, Claimants, Warning},
    config::Config,
    datapath::{Blueprint, LoadedSet, Origin, SetRecord},
    hierarchy::{Cgroup, Hierarchy},
    kernel::layout::Kernel,
};

/// Everything that a set is built from.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) kernel: Kernel,
    pub(super) hierarchy: Hierarchy,
    pub(super) root: Cgroup,
    pub(super) config: Config,
    pub(super) origin: Origin,
    /// The config of which connections may still have values.
    pub(super) before: Option<Config>,
    /// The set in force.
    pub(super) previous: Option<Arc<SetRecord>>,
}

/// A set that is not in force yet.
pub(super) struct Built {
    pub(super) set: LoadedSet,
    pub(super) config: Config,
    pub(super) origin: Origin,
    pub(super) claimants: Claimants,
    pub(super) assignment: Assignment,
    pub(super) warnings: Vec<Warning>,
}

impl Job {
    /// Builds here and now.
    ///
    /// # Errors
    ///
    /// When the hierarchy cannot be read or the kernel refuses something; nothing
    /// is left then.
    pub(super) fn build(self) -> Result<Built> {
        let claimants = target::claimants(&self.config, &self.root)?;
        let (assignment, warnings) = target::assign(&claimants, &self.hierarchy)?;
        let before = match &self.before {
            Some(config) => {
                let claimants = Claimants::new(config, &self.root)?;
                Some(target::assign(&claimants, &self.hierarchy)?.0)
            }
            None => None,
        };
        let set = LoadedSet::build(&Blueprint {
            kernel: &self.kernel,
            root: &self.root,
            config: &self.config,
            origin: &self.origin,
            assignment: &assignment,
            before: self.before.as_ref().zip(before.as_ref()),
            previous: self.previous.as_deref(),
        })?;
        Ok(Built {
            set,
            config: self.config,
            origin: self.origin,
            claimants,
            assignment,
            warnings,
        })
    }

    /// Builds on a thread of its own.
    ///
    /// # Errors
    ///
    /// When no thread can be started.
    pub(super) fn start(self) -> io::Result<oneshot::Receiver<Result<Built>>> {
        let (sender, receiver) = oneshot::channel();
        thread::Builder::new()
            .name("build".to_owned())
            .spawn(move || {
                // Nobody waits for it any more when the agent is stopping.
                let _ = sender.send(self.build());
            })?;
        Ok(receiver)
    }
}
