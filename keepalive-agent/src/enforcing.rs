//! Enforcing: the policies in force on this node, read from the kernel.

use crate::{
    config::Config,
    daemon::ownership,
    datapath::{self, Error},
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
    pub config: Config,
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
        let root = &record.description.root;
        let owner = record.state().ok().and_then(|state| state.owner);
        found.push(Enforcing {
            agent: owner
                .filter(|owner| ownership::lives(owner, &root.path))
                .map(|owner| owner.pid),
            root: root.clone(),
            config: record.description.config.clone(),
        });
    }
    Ok(found)
}

impl Enforcing {
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
