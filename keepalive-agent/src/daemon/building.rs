//! Building: a policy set is built on a thread of its own, while the one in force
//! goes on and the daemon listens.

use std::{fs::File, io, sync::Arc, thread};

use anyhow::Result;
use tokio::sync::oneshot;

use super::target;
use crate::{
    assignment::{Assignment, Claimants, Warning},
    config::Config,
    datapath::{Blueprint, LoadedSet, Origin, SetRecord},
    grant::Grant,
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    identity::Identities,
    kernel::layout::Kernel,
};

/// Everything that a set is built from.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) kernel: Kernel,
    pub(crate) hierarchy: Hierarchy,
    pub(crate) root: Cgroup,
    pub(crate) config: Arc<Config>,
    pub(crate) origin: Origin,
    /// The config of which connections may still have values.
    pub(crate) before: Option<Arc<Config>>,
    /// The set in force.
    pub(crate) previous: Option<Arc<SetRecord>>,
    /// What is known of containers.
    pub(crate) known: Arc<Identities>,
    /// What users were given; what a config does not let them have is left out.
    pub(crate) grants: Vec<Grant>,
}

/// A set that is not in force yet.
pub(crate) struct Built {
    pub(crate) set: LoadedSet,
    pub(crate) config: Arc<Config>,
    pub(crate) origin: Origin,
    pub(crate) claimants: Claimants,
    pub(crate) assignment: Assignment,
    pub(crate) warnings: Vec<Warning>,
}

/// The cgroups that exist in which connections are to be held to bounds.
fn bounded(claimants: &Claimants, hierarchy: &Hierarchy) -> Option<Vec<(u64, File)>> {
    let paths = claimants.bounded();
    let open = |path: &CgroupPath| {
        // One that is gone by now has no connections to be held.
        let cgroup = hierarchy.lookup(path).ok()??;
        Some((cgroup.id, hierarchy.open(&cgroup).ok()?))
    };
    (!paths.is_empty()).then(|| paths.iter().filter_map(open).collect())
}

/// Those that users may still have.
pub(crate) fn allowed(config: &Config, grants: &[Grant]) -> Vec<Grant> {
    let Some(service) = &config.self_service else {
        return Vec::new();
    };
    let may_have = |grant: &&Grant| service.allow(&grant.wish).is_ok();
    let most = service.commands as usize;
    grants.iter().filter(may_have).take(most).cloned().collect()
}

impl Job {
    /// Builds here and now.
    ///
    /// # Errors
    ///
    /// When the hierarchy cannot be read or the kernel refuses something; nothing
    /// is left then.
    pub(crate) fn build(self) -> Result<Built> {
        let claimants = Claimants::new(&self.config, &self.root)?;
        claimants.learn(&self.known);
        let (mut assignment, warnings) = target::assign(&claimants, &self.hierarchy)?;
        assignment.grants = allowed(&self.config, &self.grants);
        let before = match &self.before {
            Some(config) => {
                let earlier = Claimants::new(config, &self.root)?;
                earlier.learn(&self.known);
                let mut before = match earlier.assigned_like(&claimants, &assignment) {
                    Some(before) => before,
                    None => target::assign(&earlier, &self.hierarchy)?.0,
                };
                before.grants = allowed(config, &self.grants);
                Some(before)
            }
            None => None,
        };
        let set = LoadedSet::build(Blueprint {
            kernel: &self.kernel,
            root: &self.root,
            config: &self.config,
            origin: &self.origin,
            assignment: &assignment,
            bounded: bounded(&claimants, &self.hierarchy),
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
    pub(crate) fn start(self) -> io::Result<oneshot::Receiver<Result<Built>>> {
        let (sender, receiver) = oneshot::channel();
        thread::Builder::new()
            .name("build".to_owned())
            .spawn(move || {
                let mut built = self.build();
                if let Ok(built) = &mut built {
                    built.set.load_death_watch();
                }
                // Nobody waits for it any more when the agent is stopping.
                let _ = sender.send(built);
            })?;
        Ok(receiver)
    }
}
