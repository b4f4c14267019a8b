//! The cgroups that sockets belong to: their paths by id, and which policy of a
//! running agent claims them.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use keepalive_common::slot::MAX_DEPTH;

use crate::{
    assignment::{Assigned, Claimants},
    enforcing::Enforcing,
    hierarchy::{Cgroup, Hierarchy, parent},
    identity::{Identities, Identity},
    rules::most_exact,
};

/// How often the hierarchy is walked again for cgroups that are not known yet.
const PAUSE: Duration = Duration::from_secs(1);

/// Every cgroup, and what claims it.
#[derive(Debug)]
pub struct Cgroups {
    /// None where no cgroup v2 hierarchy is mounted.
    hierarchy: Option<Hierarchy>,
    agents: Vec<Claimants>,
    by_id: HashMap<u64, Known>,
    identities: Identities,
    walked: Option<Instant>,
}

/// A cgroup that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its path from the root of the hierarchy.
    pub path: String,
    /// What it is; found out for those that have connections.
    identity: Option<Identity>,
    /// By agent, in the order in which they have the last word.
    claims: Vec<Option<Found>>,
}

impl Known {
    /// A cgroup with this path that no policy claims.
    #[cfg(test)]
    pub(crate) fn unclaimed(path: &str) -> Self {
        Self {
            path: path.to_owned(),
            identity: Some(Identity::of_path(path.as_bytes())),
            claims: Vec::new(),
        }
    }

    /// What the cgroup is, of one that [`Cgroups::get`] gave out.
    #[must_use]
    pub const fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }
}

/// Who claims a cgroup's sockets, and who does where none of them is for the
/// remote end.
#[derive(Debug, PartialEq, Eq)]
struct Claim {
    /// Indices into the policies of the agent, as in
    /// [`crate::assignment::Claim::policies`].
    policies: Vec<usize>,
    above: Option<Arc<Claim>>,
}

/// The nearest claim, and how many cgroups up it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    claim: Arc<Claim>,
    distance: u32,
}

impl Claim {
    /// The policy for a remote end.
    fn policy<'a>(&self, policies: &'a [Assigned], remote: SocketAddr) -> Option<&'a Assigned> {
        let mut next = Some(self);
        while let Some(claim) = next {
            let claiming = || {
                claim
                    .policies
                    .iter()
                    .filter_map(|index| policies.get(*index))
            };
            let rules = claiming().map(|assigned| &assigned.rules);
            if let Some(index) = most_exact(rules, remote) {
                return claiming().nth(index);
            }
            next = claim.above.as_deref();
        }
        None
    }
}

impl Cgroups {
    /// For the agents that run now. Nothing is read before it is asked for.
    ///
    /// # Errors
    ///
    /// When what an agent enforces cannot be understood.
    pub fn new(hierarchy: Option<Hierarchy>, mut running: Vec<Enforcing>) -> Result<Self> {
        // Programs of a child cgroup run before those of its parents: of two
        // agents, the one further up has the last word.
        running.sort_by_key(|agent| agent.root.path.trim_end_matches('/').len());
        let agents = running
            .iter()
            .map(|agent| Claimants::new(&agent.config, &agent.root));
        Ok(Self {
            hierarchy,
            agents: agents.collect::<Result<_, _>>()?,
            by_id: HashMap::new(),
            identities: Identities::default(),
            walked: None,
        })
    }

    /// Whether any agent runs.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        !self.agents.is_empty()
    }

    /// The cgroup with this id and the policy that claims its connections to a
    /// remote end. None for one that was removed, or is out of sight in a
    /// container.
    ///
    /// # Errors
    ///
    /// When the hierarchy cannot be read.
    pub fn get(
        &mut self,
        id: u64,
        remote: SocketAddr,
    ) -> io::Result<Option<(&Known, Option<&Assigned>)>> {
        if !self.by_id.contains_key(&id) && self.walked.is_none_or(|at| at.elapsed() >= PAUSE) {
            self.walk()?;
        }
        let Self {
            by_id, identities, ..
        } = self;
        if let Some(known) = by_id.get_mut(&id)
            && known.identity.is_none()
        {
            known.identity = Some(identities.of(known.path.as_bytes()));
        }
        Ok(self.by_id.get(&id).map(|known| {
            let agents = self.agents.iter().zip(&known.claims);
            let policy = agents.into_iter().find_map(|(agent, found)| {
                let claim = &found.as_ref()?.claim;
                claim.policy(agent.policies(), remote)
            });
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
fn known(cgroups: Vec<Cgroup>, agents: &[Claimants]) -> HashMap<u64, Known> {
    let mut by_path: HashMap<String, Vec<Option<Found>>> = HashMap::new();
    let mut by_id = HashMap::with_capacity(cgroups.len());
    for Cgroup { path, id } in cgroups {
        let above = parent(&path).and_then(|parent| by_path.get(parent));
        let claims: Vec<_> = agents
            .iter()
            .enumerate()
            .map(|(index, agent)| {
                let above = above.and_then(|above| above[index].as_ref());
                found(agent.of(&path), above)
            })
            .collect();
        if !agents.is_empty() {
            by_path.insert(path.clone(), claims.clone());
        }
        by_id.insert(
            id,
            Known {
                path,
                identity: None,
                claims,
            },
        );
    }
    by_id
}

/// The nearest claim of a cgroup that these policies claim, and what was found
/// above.
fn found(policies: Vec<usize>, above: Option<&Found>) -> Option<Found> {
    if policies.is_empty() {
        return above
            .map(|above| Found {
                claim: above.claim.clone(),
                distance: above.distance + 1,
            })
            .filter(|found| found.distance < MAX_DEPTH);
    }
    let claim = Claim {
        policies,
        above: above.map(|above| above.claim.clone()),
    };
    Some(Found {
        claim: Arc::new(claim),
        distance: 0,
    })
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use keepalive_common::policy::Policy;

    use super::*;
    use crate::{
        config::{CgroupPattern, Config, NamedPolicy},
        identity::Selector,
        rules::Rules,
    };

    const REMOTE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 443);

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

    /// An agent at the given root whose policies, named so, claim these paths.
    fn running(root: &str, claims: &[(&str, &str)]) -> Enforcing {
        let policies = claims.iter().map(|(name, path)| NamedPolicy {
            name: (*name).to_owned(),
            cgroups: vec![CgroupPattern::new(path).unwrap()],
            selector: Selector::default(),
            rules: Rules::default(),
            policy: Policy::BUILT_IN,
        });
        Enforcing {
            agent: Some(1),
            root: Cgroup {
                path: root.to_owned(),
                id: 0,
            },
            config: Config {
                default: None,
                policies: policies.collect(),
            },
        }
    }

    fn claimed(paths: &[&str], agents: Vec<Enforcing>) -> Vec<Option<String>> {
        let mut cgroups = Cgroups::new(None, agents).unwrap();
        let found = hierarchy(paths);
        let ids: Vec<_> = found.iter().map(|cgroup| cgroup.id).collect();
        cgroups.by_id = known(found, &cgroups.agents);
        ids.into_iter()
            .map(|id| {
                let (_, policy) = cgroups.get(id, REMOTE).unwrap().unwrap();
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
                vec![running("/", &[("root", "/"), ("a", "/a"), ("d", "/a/c/d")])]
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
            claimed(&paths, vec![running("/a", &[("a", "/a")])]),
            [None, name("a"), None, name("a"), name("a"), None]
        );
        assert_eq!(claimed(&["/", "/a"], Vec::new()), [None, None]);
    }

    #[test]
    fn of_two_agents_the_one_further_up_has_the_last_word() {
        let paths = ["/", "/a", "/a/b"];
        let agents = vec![
            running("/a", &[("inner", "/a")]),
            running("/", &[("outer", "/a/b")]),
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
        let found = claimed(&paths, vec![running("/", &[("root", "/")])]);
        let limit = usize::try_from(MAX_DEPTH).unwrap();
        assert!(found[..limit].iter().all(Option::is_some));
        assert!(found[limit..].iter().all(Option::is_none));
    }

    #[test]
    fn the_remote_end_has_a_say() {
        let mut agent = running("/", &[("root", "/"), ("some", "/a"), ("exact", "/a")]);
        agent.config.policies[1].rules.remotes = vec!["192.0.2.0/24".parse().unwrap()];
        agent.config.policies[2].rules.remotes = vec!["192.0.2.1".parse().unwrap()];
        let mut cgroups = Cgroups::new(None, vec![agent]).unwrap();
        cgroups.by_id = known(hierarchy(&["/", "/a", "/a/b"]), &cgroups.agents);
        for (remote, expected) in [
            ("192.0.2.1:443", "exact"),
            ("192.0.2.2:443", "some"),
            ("[::ffff:192.0.2.2]:443", "some"),
            ("198.51.100.1:443", "root"),
        ] {
            let (_, policy) = cgroups.get(3, remote.parse().unwrap()).unwrap().unwrap();
            assert_eq!(policy.unwrap().name, expected, "{remote}");
        }
    }

    #[test]
    fn unknown_cgroups_are_nobodys() {
        let mut cgroups = Cgroups::new(None, Vec::new()).unwrap();
        assert_eq!(cgroups.get(1, REMOTE).unwrap(), None);
        assert!(!cgroups.is_enforced());
    }
}
