//! The cgroups that sockets belong to: their paths by id, and which policy of a
//! running agent claims them.

use std::{
    collections::HashMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use keepalive_common::{
    plan::{Options, plan},
    socket::SocketRecord,
};

use super::{Error, Result};
use crate::{
    assignment::{Assigned, Claimants},
    config::Config,
    enforcing::Enforcing,
    grant::Grant,
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    identity::{Identities, Identity},
    rules::{Ends, most_exact},
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
    identities: Identities,
    walked: Option<Instant>,
}

/// What an agent enforces.
#[derive(Debug)]
struct Agent {
    claimants: Claimants,
    /// Its policies; behind them those that users were given, once they are met.
    policies: Vec<Assigned>,
    grants: Vec<Grant>,
}

impl Agent {
    fn new((claimants, grants): (Claimants, Vec<Grant>)) -> Self {
        Self {
            policies: claimants.policies().to_vec(),
            claimants,
            grants,
        }
    }

    /// What becomes of a claim where a user was given a policy over it.
    fn granted(&mut self, grant: &Grant, claim: Option<&Claim>) -> Found {
        let mut number_of = |assigned: Assigned| {
            self.policies.push(assigned);
            self.policies.len() - 1
        };
        let Some(claim) = claim else {
            return Arc::new(Claim {
                policies: vec![number_of(grant.over(None))],
                above: None,
            });
        };
        let mut policies = Vec::with_capacity(claim.policies.len());
        for index in &claim.policies {
            let assigned = grant.over(self.policies.get(*index));
            self.policies.push(assigned);
            policies.push(self.policies.len() - 1);
        }
        Arc::new(Claim {
            policies,
            above: Some(self.granted(grant, claim.above.as_deref())),
        })
    }
}

/// A cgroup that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its path from the root of the hierarchy.
    pub path: CgroupPath,
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
            path: path.into(),
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

/// Who claims a cgroup's sockets, and who does where none of them is for a
/// connection.
#[derive(Debug, PartialEq, Eq)]
struct Claim {
    /// Indices into the policies of the agent, as in
    /// [`crate::assignment::Claim::policies`].
    policies: Vec<usize>,
    above: Option<Arc<Claim>>,
}

/// The nearest claim.
type Found = Arc<Claim>;

impl Claim {
    /// The policy for a connection.
    fn policy<'a>(&self, policies: &'a [Assigned], ends: &Ends) -> Option<&'a Assigned> {
        let mut next = Some(self);
        while let Some(claim) = next {
            let claiming = || {
                claim
                    .policies
                    .iter()
                    .filter_map(|index| policies.get(*index))
            };
            let rules = claiming().map(|assigned| &assigned.rules);
            if let Some(index) = most_exact(rules, ends) {
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
        running.sort_by_key(|agent| agent.root.path.depth());
        let agents = running.into_iter().map(|agent| {
            let claimants = claimants(&agent.config, &agent.root)?;
            Ok((claimants, agent.grants))
        });
        Ok(Self::claimed_by(hierarchy, agents.collect::<Result<_>>()?))
    }

    /// For these agents, and the users whom they gave policies, those further up
    /// before those further down.
    #[must_use]
    pub fn claimed_by(hierarchy: Option<Hierarchy>, agents: Vec<(Claimants, Vec<Grant>)>) -> Self {
        Self {
            hierarchy,
            agents: agents.into_iter().map(Agent::new).collect(),
            by_id: HashMap::new(),
            identities: Identities::default(),
            walked: None,
        }
    }

    /// Whether any agent runs.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        !self.agents.is_empty()
    }

    /// The cgroup of a connection, and the policy that claims the connection.
    ///
    /// A cgroup that is not known was removed, or is out of sight in a container.
    /// Its connections have the policies of the root: of the agent that governs
    /// all cgroups, else of one that gives just what the connection has, or of one that
    /// wants nothing to be changed on it.
    ///
    /// # Errors
    ///
    /// When the hierarchy cannot be read.
    pub fn get(
        &mut self,
        record: &SocketRecord,
    ) -> io::Result<(Option<&Known>, Option<&Assigned>)> {
        self.look_for(record.cgroup)?;
        let Self {
            by_id, identities, ..
        } = self;
        if let Some(known) = by_id.get_mut(&record.cgroup)
            && known.identity.is_none()
        {
            known.identity = Some(identities.of(known.path.as_bytes()));
        }
        Ok(self.known(record))
    }

    /// The same, without finding out what the cgroup is.
    ///
    /// # Errors
    ///
    /// As [`Self::get`].
    pub fn claim(
        &mut self,
        record: &SocketRecord,
    ) -> io::Result<(Option<&CgroupPath>, Option<&Assigned>)> {
        self.look_for(record.cgroup)?;
        let (known, policy) = self.known(record);
        Ok((known.map(|known| &known.path), policy))
    }

    /// Looks at the hierarchy again for a cgroup that is not known, now and then.
    fn look_for(&mut self, id: u64) -> io::Result<()> {
        if !self.by_id.contains_key(&id) && self.walked.is_none_or(|at| at.elapsed() >= PAUSE) {
            self.walk()?;
        }
        Ok(())
    }

    fn known(&self, record: &SocketRecord) -> (Option<&Known>, Option<&Assigned>) {
        let Some(known) = self.by_id.get(&record.cgroup) else {
            return (None, self.of_root(record));
        };
        let ends = Ends::of(record);
        let agents = self.agents.iter().zip(&known.claims);
        let policy = agents
            .into_iter()
            .find_map(|(agent, found)| found.as_ref()?.policy(&agent.policies, &ends));
        (Some(known), policy)
    }

    /// The policy of the root that claims a connection.
    fn of_root(&self, record: &SocketRecord) -> Option<&Assigned> {
        let has = record.options();
        let is_set = has != Options::default();
        let wants = |assigned: &Assigned, of: &Options| {
            plan(&assigned.policy, of, &record.environment).wants == has
        };
        let claiming = self.agents.iter().filter_map(|agent| {
            let root = &agent.claimants.root().path;
            let claim = Claim {
                policies: agent.claimants.of(root),
                above: None,
            };
            let assigned = claim.policy(&agent.policies, &Ends::of(record))?;
            Some((root.depth() == 0, assigned))
        });
        // The first of the best.
        let found = claiming.filter_map(|(governs_all, assigned)| {
            let fits = [
                governs_all,
                is_set && wants(assigned, &Options::default()),
                is_set && wants(assigned, &has),
            ];
            let rank = fits.iter().position(|fits| *fits)?;
            Some((rank, assigned))
        });
        found
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, assigned)| assigned)
    }

    fn walk(&mut self) -> io::Result<()> {
        if let Some(hierarchy) = &self.hierarchy
            && let Some(root) = hierarchy.lookup(&CgroupPath::root())?
        {
            self.by_id = known(hierarchy.walk(&root)?, &mut self.agents);
        }
        self.walked = Some(Instant::now());
        Ok(())
    }
}

/// Who claims what by a config that is in force.
///
/// # Errors
///
/// When it cannot be understood.
pub(crate) fn claimants(config: &Config, root: &Cgroup) -> Result<Claimants> {
    Claimants::new(config, root).map_err(|source| Error::Globs {
        root: root.path.clone(),
        source,
    })
}

/// Settles who claims each cgroup; parents come before their children.
fn known(cgroups: Vec<Cgroup>, agents: &mut [Agent]) -> HashMap<u64, Known> {
    let mut by_path: HashMap<CgroupPath, Vec<Option<Found>>> = HashMap::new();
    let mut by_id = HashMap::with_capacity(cgroups.len());
    for Cgroup { path, id } in cgroups {
        let above = path.parent().and_then(|parent| by_path.get(&parent));
        let claims: Vec<_> = agents
            .iter_mut()
            .enumerate()
            .map(|(index, agent)| {
                let above = above.and_then(|above| above[index].as_ref());
                found(agent, &path, id, above)
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

/// The nearest claim of a cgroup, given that of the one above.
fn found(agent: &mut Agent, path: &CgroupPath, id: u64, above: Option<&Found>) -> Option<Found> {
    let policies = agent.claimants.of(path);
    let found = if policies.is_empty() {
        let in_reach = |_: &Found| agent.claimants.is_in_reach(path);
        above.cloned().filter(in_reach)
    } else {
        Some(Arc::new(Claim {
            policies,
            above: above.cloned(),
        }))
    };
    let mut grants = agent.grants.iter();
    let grant = grants.find(|grant| grant.cgroup.id == id && grant.cgroup.path == *path);
    match grant.cloned() {
        Some(grant) => Some(agent.granted(&grant, found.as_deref())),
        None => found,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr, SocketAddr},
        sync::Arc,
    };

    use keepalive_common::{
        environment::Environment,
        policy::{Policy, Range},
    };

    use super::*;
    use crate::{
        config::{CgroupPattern, Config, NamedPolicy},
        datapath::Origin,
        identity::Selector,
        rules::Rules,
        sockets::trial::record,
    };

    const ENDS: Ends = Ends {
        remote: Some(SocketAddr::new(
            IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            443,
        )),
        local_port: None,
    };

    fn in_cgroup(id: u64, remote: SocketAddr) -> SocketRecord {
        let local = if remote.is_ipv4() {
            "192.0.2.1:1"
        } else {
            "[::1]:1"
        };
        let mut record = record(local, &remote.to_string(), &Options::default());
        record.cgroup = id;
        record
    }

    /// Cgroups with these paths; the id of each is its position, from 1.
    fn hierarchy(paths: &[&str]) -> Vec<Cgroup> {
        (1..)
            .zip(paths)
            .map(|(id, path)| Cgroup {
                path: (*path).into(),
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
                path: root.into(),
                id: 0,
            },
            config: Arc::new(Config {
                default: None,
                policies: policies.collect(),
                self_service: None,
            }),
            grants: Vec::new(),
            origin: Origin::default(),
            error: None,
        }
    }

    fn claimed(paths: &[&str], agents: Vec<Enforcing>) -> Vec<Option<String>> {
        let mut cgroups = Cgroups::new(None, agents).unwrap();
        let found = hierarchy(paths);
        let ids: Vec<_> = found.iter().map(|cgroup| cgroup.id).collect();
        cgroups.by_id = known(found, &mut cgroups.agents);
        ids.into_iter()
            .map(|id| {
                let (_, policy) = cgroups.get(&in_cgroup(id, ENDS.remote.unwrap())).unwrap();
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
    fn what_is_too_deep_is_nobodys() {
        let paths: Vec<_> = (0..130).map(|depth| "/x".repeat(depth)).collect();
        let mut paths: Vec<_> = paths.iter().map(String::as_str).collect();
        paths[0] = "/";
        let found = claimed(&paths, vec![running("/", &[("root", "/")])]);
        let limit = 128;
        assert!(found[..limit].iter().all(Option::is_some));
        assert!(found[limit..].iter().all(Option::is_none));
    }

    #[test]
    fn the_remote_end_has_a_say() {
        let mut agent = running("/", &[("root", "/"), ("some", "/a"), ("exact", "/a")]);
        let policies = &mut Arc::make_mut(&mut agent.config).policies;
        policies[1].rules.remotes = vec!["192.0.2.0/24".parse().unwrap()];
        policies[2].rules.remotes = vec!["192.0.2.1".parse().unwrap()];
        let mut cgroups = Cgroups::new(None, vec![agent]).unwrap();
        cgroups.by_id = known(hierarchy(&["/", "/a", "/a/b"]), &mut cgroups.agents);
        for (remote, expected) in [
            ("192.0.2.1:443", "exact"),
            ("192.0.2.2:443", "some"),
            ("[::ffff:192.0.2.2]:443", "some"),
            ("198.51.100.1:443", "root"),
        ] {
            let record = in_cgroup(3, remote.parse().unwrap());
            let (_, policy) = cgroups.get(&record).unwrap();
            assert_eq!(policy.unwrap().name, expected, "{remote}");
        }
    }

    #[test]
    fn connections_of_unknown_cgroups_have_the_policy_of_the_root() {
        let name = |agents: Vec<Enforcing>, options: &Options| {
            let mut cgroups = Cgroups::new(None, agents).unwrap();
            let mut record = record("192.0.2.1:1", "198.51.100.7:443", options);
            record.cgroup = 7;
            let (cgroup, policy) = cgroups.get(&record).unwrap();
            assert_eq!(cgroup, None);
            policy.map(|policy| policy.name.clone())
        };
        let untouched = Options::default();
        let shaped = plan(&Policy::BUILT_IN, &untouched, &Environment::UNCHANGED).wants;
        let root = || running("/", &[("other", "/a"), ("root", "/")]);
        let part = || running("/part", &[("part", "/part")]);
        assert_eq!(name(Vec::new(), &shaped), None);
        assert_eq!(name(vec![root()], &untouched).as_deref(), Some("root"));
        assert_eq!(name(vec![part()], &untouched), None);
        assert_eq!(name(vec![part()], &shaped).as_deref(), Some("part"));
        // It would leave an application's own values as well.
        let mut other = running("/other", &[("of another agent", "/other")]);
        let policies = &mut Arc::make_mut(&mut other.config).policies;
        policies[0].policy.idle = Range::default_only(33);
        let agents = vec![other, part()];
        assert_eq!(name(agents, &shaped).as_deref(), Some("part"));
    }

    #[test]
    fn without_an_agent_nothing_is_enforced() {
        let cgroups = Cgroups::new(None, Vec::new()).unwrap();
        assert!(!cgroups.is_enforced());
    }
}
