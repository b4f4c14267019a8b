//! Grant: a policy that a user asked for, for a command in a cgroup of its own.
//!
//! It stands over the policies that would hold otherwise, each of which it shapes
//! ([`Wish::over`]).

use keepalive_common::policy::Policy;
use serde::{Deserialize, Serialize};

use crate::{
    assignment::Assigned,
    config::Wish,
    hierarchy::{Cgroup, CgroupPath},
};

/// Begins the names of the cgroups of commands; the process id of the command
/// follows.
pub const PREFIX: &str = "keepalive-exec-";

/// What a user was given for a command.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Grant {
    /// The cgroup of the command.
    pub cgroup: Cgroup,
    /// Whose it is.
    pub uid: u32,
    /// What was asked for.
    pub wish: Wish,
}

impl Grant {
    /// What becomes of a policy under it; none stands for no policy.
    #[must_use]
    pub fn over(&self, policy: Option<&Assigned>) -> Assigned {
        let before = policy.map_or(Policy::BUILT_IN, |assigned| assigned.policy);
        let after = self.wish.over(before);
        match policy {
            // It stays what it is.
            Some(assigned) if after == before => assigned.clone(),
            _ => Assigned {
                name: format!("exec of uid {}", self.uid),
                policy: after,
                rules: policy.map_or_else(Default::default, |assigned| assigned.rules.clone()),
            },
        }
    }

    /// Those of them that shape what holds in a cgroup, the outermost first.
    #[must_use]
    pub fn above<'a>(grants: &'a [Self], path: &CgroupPath) -> Vec<&'a Self> {
        let above = grants.iter().filter(|grant| grant.cgroup.contains(path));
        let mut above: Vec<_> = above.collect();
        above.sort_by_key(|grant| grant.cgroup.path.depth());
        above
    }
}
