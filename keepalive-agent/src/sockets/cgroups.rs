//! The cgroups that sockets belong to: their paths by id, and which policy of a
//! running agent claims them.

use std::{
    collections::HashMap,
    io,
    time::{Duration, Instant},
};

use keepalive_common::slot::MAX_DEPTH;

use crate::{
    assignment::Assigned,
    hierarchy::{Cgroup, Hierarchy},
    state::Running,
};

/// How often the hierarchy is walked again for cgroups that are not known yet.
const PAUSE: Duration = Duration::from_secs(1);

/// Every cgroup, and what claims it.
#[derive(Debug)]
pub struct Cgroups {
    /// None where no cgroup v2 hierarchy is mounted.
    hierarchy: Option<Hierarchy>,
    agents: Vec<Agent>,
    by_id: HashMap<u64, Known>,
    walked: Option<Instant>,
}

/// A cgroup that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its path from the root of the hierarchy.
    pub path: String,
    claim: Option<Claimed>,
}

impl Known {
    /// A cgroup with this path that no policy claims.
    #[cfg(test)]
    pub(crate) fn unclaimed(path: &str) -> Self {
        Self {
            path: path.to_owned(),
            claim: None,
        }
    }
}

/// Which policy of which agent, both by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Claimed {
    agent: usize,
    policy: usize,
}

/// What an agent enforces, by cgroup id as its BPF program looks it up.
#[derive(Debug)]
struct Agent {
    policies: Vec<Assigned>,
    claims: HashMap<u64, usize>,
}

impl Cgroups {
    /// For the agents that run now. Nothing is read before it is asked for.
    #[must_use]
    pub fn new(hierarchy: Option<Hierarchy>, mut running: Vec<Running>) -> Self {
        // Programs of a child cgroup run before those of its parents: of two
        // agents, the one further up has the last word.
        running.sort_by_key(|agent| agent.root.path.trim_end_matches('/').len());
        let agents = running.into_iter().map(|agent| Agent {
            policies: agent.assignment.policies,
            claims: agent
                .assignment
                .claims
                .into_iter()
                .map(|claim| (claim.cgroup.id, claim.policy))
                .collect(),
        });
        Self {
            hierarchy,
            agents: agents.collect(),
            by_id: HashMap::new(),
            walked: None,
        }
    }

    /// Whether any agent runs.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        !self.agents.is_empty()
    }

    /// The cgroup with this id and the policy that claims it. None for one that
    /// was removed, or is out of sight in a container.
    ///
    /// # Errors
    ///
    /// When the hierarchy cannot be read.
    pub fn get(&mut self, id: u64) -> io::Result<Option<(&Known, Option<&Assigned>)>> {
        if !self.by_id.contains_key(&id) && self.walked.is_none_or(|at| at.elapsed() >= PAUSE) {
            self.walk()?;
        }
        Ok(self.by_id.get(&id).map(|known| {
            let policy = known
                .claim
                .and_then(|claim| self.agents.get(claim.agent)?.policies.get(claim.policy));
            (known, policy)
        }))
    }

    fn walk(&mut self) -> io::Result<()> {
        if let Some(hierarchy) = &self.hierarchy
            && let Some(root) = hierarchy.lookup("/")?
        {
            self.by_id = known(hierarchy.walk(&root)?, &self.agents);
        }
        self.walked = Some(Instant::now());
        Ok(())
    }
}

/// Settles who claims each cgroup; parents come before their children.
fn known(cgroups: Vec<Cgroup>, agents: &[Agent]) -> HashMap<u64, Known> {
    // For each agent the policy in force and how far up it was found.
    let mut in_force: HashMap<String, Vec<Option<(usize, u32)>>> = HashMap::new();
    let mut by_id = HashMap::with_capacity(cgroups.len());
    for Cgroup { path, id } in cgroups {
        let mut claim = None;
        if !agents.is_empty() {
            let above = parent(&path).and_then(|parent| in_force.get(parent));
            let here: Vec<_> = agents
                .iter()
                .enumerate()
                .map(|(index, agent)| match agent.claims.get(&id) {
                    Some(policy) => Some((*policy, 0)),
                    None => above
                        .and_then(|above| above[index])
                        .map(|(policy, distance)| (policy, distance + 1))
                        .filter(|(_, distance)| *distance < MAX_DEPTH),
                })
                .collect();
            claim = here
                .iter()
                .enumerate()
                .find_map(|(agent, found)| found.map(|(policy, _)| Claimed { agent, policy }));
            in_force.insert(path.clone(), here);
        }
        by_id.insert(id, Known { path, claim });
    }
    by_id
}

fn parent(path: &str) -> Option<&str> {
    match path.rsplit_once('/')? {
        ("", "") => None,
        ("", _) => Some("/"),
        (parent, _) => Some(parent),
    }
}

#[cfg(test)]
mod tests {
    use keepalive_common::policy::Policy;

    use super::*;
    use crate::assignment::{Assignment, Claim};

    /// Cgroups with these paths; the id of each is its position, from 1.
    fn hierarchy(paths: &[&str]) -> Vec<Cgroup> {
        (1..)
            .zip(paths)
            .map(|(id, path)| Cgroup {
                path: (*path).to_owned(),
                id,
            })
            .collect()
    }

    /// An agent at the given root whose policies, named after their cgroups, claim these ids.
    fn running(root: &str, claims: &[(&str, u64)]) -> Running {
        let cgroup = |path: &str, id| Cgroup {
            path: path.to_owned(),
            id,
        };
        Running {
            pid: 1,
            root: cgroup(root, 0),
            assignment: Assignment {
                policies: claims
                    .iter()
                    .map(|(name, _)| Assigned {
                        name: (*name).to_owned(),
                        policy: Policy::BUILT_IN,
                    })
                    .collect(),
                claims: (0..)
                    .zip(claims)
                    .map(|(policy, (path, id))| Claim {
                        cgroup: cgroup(path, *id),
                        policy,
                    })
                    .collect(),
            },
        }
    }

    fn claimed(paths: &[&str], agents: Vec<Running>) -> Vec<Option<String>> {
        let mut cgroups = Cgroups::new(None, agents);
        let found = hierarchy(paths);
        let ids: Vec<_> = found.iter().map(|cgroup| cgroup.id).collect();
        cgroups.by_id = known(found, &cgroups.agents);
        ids.into_iter()
            .map(|id| {
                let (_, policy) = cgroups.get(id).unwrap().unwrap();
                policy.map(|policy| policy.name.clone())
            })
            .collect()
    }

    #[test]
    fn the_nearest_claim_upward_holds() {
        let paths = ["/", "/a", "/b", "/a/c", "/a/c/d", "/ab"];
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(
            claimed(
                &paths,
                vec![running("/", &[("root", 1), ("a", 2), ("d", 5)])]
            ),
            [
                name("root"),
                name("a"),
                name("root"),
                name("a"),
                name("d"),
                name("root")
            ]
        );
        assert_eq!(
            claimed(&paths, vec![running("/a", &[("a", 2)])]),
            [None, name("a"), None, name("a"), name("a"), None]
        );
        // Another cgroup of that path was claimed; it is gone.
        assert_eq!(claimed(&["/"], vec![running("/", &[("root", 77)])]), [None]);
        assert_eq!(claimed(&["/", "/a"], Vec::new()), [None, None]);
    }

    #[test]
    fn of_two_agents_the_one_further_up_has_the_last_word() {
        let paths = ["/", "/a", "/a/b"];
        let agents = vec![
            running("/a", &[("inner", 2)]),
            running("/", &[("outer", 3)]),
        ];
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(
            claimed(&paths, agents),
            [None, name("inner"), name("outer")]
        );
    }

    #[test]
    fn the_walk_upward_ends_where_the_kernels_does() {
        let paths: Vec<_> = (0..40).map(|depth| "/x".repeat(depth)).collect();
        let mut paths: Vec<_> = paths.iter().map(String::as_str).collect();
        paths[0] = "/";
        let found = claimed(&paths, vec![running("/", &[("root", 1)])]);
        let limit = usize::try_from(MAX_DEPTH).unwrap();
        assert!(found[..limit].iter().all(Option::is_some));
        assert!(found[limit..].iter().all(Option::is_none));
    }

    #[test]
    fn unknown_cgroups_are_nobodys() {
        let mut cgroups = Cgroups::new(None, Vec::new());
        assert_eq!(cgroups.get(1).unwrap(), None);
        assert!(!cgroups.is_enforced());
    }
}
