//! Enforcing: the policies in force on this node, read from the kernel.

use std::sync::Arc;

use crate::{
    config::{Config, Merged, read_files},
    daemon::ownership,
    datapath::{self, Error, Origin},
    grant::Grant,
    hierarchy::Cgroup,
};

/// A config in force on a cgroup.
#[derive(Clone, Debug)]
pub struct Enforcing {
    /// The process id of its agent; none where enforcement goes on without one.
    pub agent: Option<u32>,
    /// Where it is attached.
    pub root: Cgroup,
    /// Its policies and what they claim.
    pub config: Arc<Config>,
    /// What users were given for commands of their own.
    pub grants: Vec<Grant>,
    /// The files that it was read from.
    pub origin: Origin,
    /// What was wrong when the agent last read its config, so that it goes on with
    /// this one.
    pub error: Option<String>,
}

/// Everything that is in force, on whichever cgroup. What is of a build that is
/// not understood is left out.
///
/// # Errors
///
/// When the kernel cannot be asked, which takes CAP_SYS_ADMIN.
pub fn enforcing() -> Result<Vec<Enforcing>, Error> {
    let mut found = Vec::new();
    for set in datapath::in_force()? {
        let Ok(record) = &set.record else { continue };
        if set.cgroup == 0 {
            continue;
        }
        let root = &record.root;
        let state = record.state().ok();
        let error = state
            .as_ref()
            .and_then(|state| state.reload.as_ref()?.error.clone());
        let owner = state.and_then(|state| state.owner);
        found.push(Enforcing {
            agent: owner
                .filter(|owner| ownership::lives(owner, &root.path))
                .map(|owner| owner.pid),
            root: root.clone(),
            config: record.description().config.clone(),
            grants: record.grants(),
            origin: record.description().origin.clone(),
            error,
        });
    }
    Ok(found)
}

impl Enforcing {
    /// Its files with their lines; none where they say something else by now.
    #[must_use]
    pub fn files(&self) -> Option<Merged> {
        let Origin { main, drop_ins } = &self.origin;
        let merged = read_files(main.as_deref(), drop_ins).ok()?;
        goes_by(self, &merged.config).then_some(merged)
    }

    /// In words: `agent 123 on /`.
    #[must_use]
    pub fn name(&self) -> String {
        let path = &self.root.path;
        match self.agent {
            Some(pid) => format!("agent {pid} on {path}"),
            None => format!("the policy set pinned on {path}, without an agent"),
        }
    }
}

/// Whether an agent enforces a config, or counts what it would do: a dry run on the
/// command line stands in no file.
#[must_use]
pub fn goes_by(agent: &Enforcing, config: &Config) -> bool {
    *agent.config == *config || *agent.config == config.clone().in_dry_run(true)
}
