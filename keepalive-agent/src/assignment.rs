//! Assignment: which cgroups that exist point to which policy.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    fmt, io,
};

use keepalive_common::{
    history,
    policy::{MIN_SECONDS, Policy},
};
use serde::{Deserialize, Serialize};

use crate::{
    config::{CgroupPattern, Config},
    hierarchy::{Cgroup, Hierarchy},
};

/// The name under which the policy for unclaimed sockets is shown.
pub const DEFAULT: &str = "default";

/// The name under which connections are counted that no policy claims.
pub const UNCLAIMED: &str = "(unclaimed)";

/// What goes into the kernel's maps.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Assignment {
    /// Every policy of the config; `default` comes first where there is one.
    pub policies: Vec<Assigned>,
    /// Which cgroups point to them.
    pub claims: Vec<Claim>,
}

/// A policy by its name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Assigned {
    /// The name in the config, or [`DEFAULT`].
    pub name: String,
    /// What it wants.
    pub policy: Policy,
}

/// A cgroup and the policy it points to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Claim {
    /// The cgroup; the ones below it that claim nothing themselves follow it.
    pub cgroup: Cgroup,
    /// Index into [`Assignment::policies`].
    pub policy: usize,
}

/// Something in the config that has no effect now, though nothing is wrong
/// with how it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// No cgroup has this path.
    Absent {
        /// Name of the policy.
        policy: String,
        /// The path as configured.
        path: String,
    },
    /// No cgroup matches this glob.
    NoMatch {
        /// Name of the policy.
        policy: String,
        /// The glob as configured.
        glob: String,
    },
    /// The path is not below the cgroup that the program is attached to.
    Outside {
        /// Name of the policy.
        policy: String,
        /// The path as configured.
        path: String,
        /// Where the program is attached.
        root: String,
    },
    /// Another policy claims the cgroup.
    Taken {
        /// Name of the policy that lost.
        policy: String,
        /// The cgroup.
        path: String,
        /// Name of the policy that claims it.
        by: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent { policy, path } => write!(
                f,
                "policy {policy}: cgroup {path} does not exist; \
                 send the agent SIGHUP once it does"
            ),
            Self::NoMatch { policy, glob } => write!(
                f,
                "policy {policy}: no cgroup matches {glob}; \
                 send the agent SIGHUP once one does"
            ),
            Self::Outside { policy, path, root } => write!(
                f,
                "policy {policy}: cgroup {path} is not below {root}, where the program is attached; \
                 it is not governed"
            ),
            Self::Taken { policy, path, by } => write!(
                f,
                "policy {policy}: cgroup {path} is claimed by policy {by} (a path beats a glob, \
                 then the first in the file wins)"
            ),
        }
    }
}

impl Assignment {
    /// The cgroups that point to a policy, by its index.
    pub fn paths_of(&self, policy: usize) -> impl Iterator<Item = &str> {
        self.claims
            .iter()
            .filter(move |claim| claim.policy == policy)
            .map(|claim| claim.cgroup.path.as_str())
    }

    /// The shortest idle time that a policy gives, in seconds.
    #[must_use]
    pub fn shortest_idle(&self) -> u32 {
        self.policies
            .iter()
            .map(|assigned| history::given(&assigned.policy).idle)
            .filter(|idle| *idle > 0)
            .min()
            .unwrap_or(MIN_SECONDS)
    }
}

/// Assigns the cgroups below `root` to the policies of the config.
///
/// # Errors
///
/// When the hierarchy cannot be read.
pub fn assign(
    config: &Config,
    hierarchy: &Hierarchy,
    root: &Cgroup,
) -> io::Result<(Assignment, Vec<Warning>)> {
    let mut existing = BTreeMap::new();
    let patterns = || config.policies.iter().flat_map(|policy| &policy.cgroups);
    if patterns().any(CgroupPattern::is_glob) {
        for cgroup in hierarchy.walk(root)? {
            existing.insert(cgroup.path.clone(), cgroup);
        }
    }
    for path in patterns().filter_map(CgroupPattern::as_path) {
        if let Some(cgroup) = hierarchy.lookup(path)? {
            existing.insert(cgroup.path.clone(), cgroup);
        }
    }
    Ok(assign_existing(config, root, &existing))
}

/// The same without looking at the file system.
fn assign_existing(
    config: &Config,
    root: &Cgroup,
    existing: &BTreeMap<String, Cgroup>,
) -> (Assignment, Vec<Warning>) {
    let default = config.default.map(|policy| Assigned {
        name: DEFAULT.to_owned(),
        policy,
    });
    let first_named = usize::from(default.is_some());
    let named = config.policies.iter().map(|named| Assigned {
        name: named.name.clone(),
        policy: named.policy,
    });
    let mut claims = Claims {
        root,
        policies: default.into_iter().chain(named).collect(),
        by_id: HashMap::new(),
        made: Vec::new(),
        warnings: Vec::new(),
    };
    let numbered = || (first_named..).zip(&config.policies);
    // A path beats a glob, so all paths come first.
    for (index, policy) in numbered() {
        for path in policy.cgroups.iter().filter_map(CgroupPattern::as_path) {
            claims.path(index, path, existing.get(path));
        }
    }
    for (index, policy) in numbered() {
        for pattern in policy.cgroups.iter().filter(|pattern| pattern.is_glob()) {
            claims.glob(index, pattern, existing);
        }
    }
    if config.default.is_some() {
        claims.add(root, 0);
    }
    let assignment = Assignment {
        policies: claims.policies,
        claims: claims.made,
    };
    (assignment, claims.warnings)
}

/// Claims in the order in which they were made; the first one of a cgroup holds.
struct Claims<'a> {
    root: &'a Cgroup,
    policies: Vec<Assigned>,
    by_id: HashMap<u64, usize>,
    made: Vec<Claim>,
    warnings: Vec<Warning>,
}

impl Claims<'_> {
    /// A policy names one cgroup.
    fn path(&mut self, index: usize, path: &str, cgroup: Option<&Cgroup>) {
        let policy = self.policies[index].name.clone();
        let path = path.to_owned();
        let Some(cgroup) = cgroup else {
            self.warnings.push(Warning::Absent { policy, path });
            return;
        };
        if !self.root.contains(&path) {
            self.warnings.push(Warning::Outside {
                policy,
                path,
                root: self.root.path.clone(),
            });
            return;
        }
        let holder = self.add(cgroup, index);
        if holder != index {
            let by = self.policies[holder].name.clone();
            self.warnings.push(Warning::Taken { policy, path, by });
        }
    }

    /// A policy names all cgroups that look like this. That some of them have a
    /// more exact policy is in the nature of a glob and no warning.
    fn glob(&mut self, index: usize, pattern: &CgroupPattern, existing: &BTreeMap<String, Cgroup>) {
        let mut matched = false;
        for cgroup in existing.values() {
            if self.root.contains(&cgroup.path) && pattern.matches(&cgroup.path) {
                matched = true;
                self.add(cgroup, index);
            }
        }
        if !matched {
            self.warnings.push(Warning::NoMatch {
                policy: self.policies[index].name.clone(),
                glob: pattern.to_string(),
            });
        }
    }

    /// Adds a claim unless the cgroup has one; the policy that holds it then.
    fn add(&mut self, cgroup: &Cgroup, policy: usize) -> usize {
        match self.by_id.entry(cgroup.id) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => {
                self.made.push(Claim {
                    cgroup: cgroup.clone(),
                    policy,
                });
                *entry.insert(policy)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse("test.toml".as_ref(), text).unwrap().0
    }

    /// The cgroups with these paths; the first is where the program is attached.
    fn hierarchy(paths: &[&str]) -> (Cgroup, BTreeMap<String, Cgroup>) {
        let cgroups: BTreeMap<_, _> = (1..)
            .zip(paths)
            .map(|(id, path)| {
                let path = (*path).to_owned();
                (path.clone(), Cgroup { path, id })
            })
            .collect();
        (cgroups[paths[0]].clone(), cgroups)
    }

    /// Who claims what, as `path=policy`.
    fn claims(assignment: &Assignment) -> Vec<String> {
        let mut claims: Vec<_> = assignment
            .claims
            .iter()
            .map(|claim| {
                let policy = &assignment.policies[claim.policy].name;
                format!("{}={policy}", claim.cgroup.path)
            })
            .collect();
        claims.sort();
        claims
    }

    #[test]
    fn a_path_beats_a_glob_then_the_first_wins() {
        let config = config(
            r#"
            [default]
            [[policy]]
            name = "wide"
            cgroup = "/s/**"
            [[policy]]
            name = "narrow"
            cgroup = "/s/a*"
            [[policy]]
            name = "exact"
            cgroup = ["/s/a", "/s/b/c"]
            [[policy]]
            name = "late"
            cgroup = "/s/a"
            "#,
        );
        let (root, existing) = hierarchy(&["/", "/s", "/s/a", "/s/ab", "/s/b", "/s/b/c"]);
        let (assignment, warnings) = assign_existing(&config, &root, &existing);
        assert_eq!(
            claims(&assignment),
            [
                "/=default",
                "/s/a=exact",
                "/s/ab=wide",
                "/s/b/c=exact",
                "/s/b=wide"
            ]
        );
        assert_eq!(
            warnings,
            [Warning::Taken {
                policy: "late".into(),
                path: "/s/a".into(),
                by: "exact".into()
            }]
        );
    }

    #[test]
    fn a_policy_on_the_root_stands_before_the_default() {
        let config = config("[default]\n[[policy]]\nname = 'all'\ncgroup = '/'\n");
        let (root, existing) = hierarchy(&["/"]);
        let (assignment, warnings) = assign_existing(&config, &root, &existing);
        assert_eq!(claims(&assignment), ["/=all"]);
        assert_eq!(warnings, []);
    }

    #[test]
    fn without_a_default_the_root_claims_nothing() {
        let config = config("[[policy]]\nname = 'a'\ncgroup = '/a'\n");
        let (root, existing) = hierarchy(&["/", "/a", "/b"]);
        let (assignment, _) = assign_existing(&config, &root, &existing);
        assert_eq!(claims(&assignment), ["/a=a"]);
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let config = config(
            r#"
            [[policy]]
            name = "gone"
            cgroup = ["/s/gone", "/other", "/s/x-*"]
            "#,
        );
        let (_, existing) = hierarchy(&["/", "/s", "/other"]);
        let root = existing["/s"].clone();
        let (assignment, warnings) = assign_existing(&config, &root, &existing);
        assert_eq!(claims(&assignment), [""; 0]);
        let policy = || "gone".to_owned();
        assert_eq!(
            warnings,
            [
                Warning::Absent {
                    policy: policy(),
                    path: "/s/gone".into()
                },
                Warning::Outside {
                    policy: policy(),
                    path: "/other".into(),
                    root: "/s".into()
                },
                Warning::NoMatch {
                    policy: policy(),
                    glob: "/s/x-*".into()
                },
            ]
        );
    }
}
