//! Assignment: which cgroups that exist point to which policy.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
};

use globset::{GlobSet, GlobSetBuilder};
use keepalive_common::{
    history,
    policy::{MIN_SECONDS, Policy},
};

use crate::{
    config::Config,
    hierarchy::{Cgroup, Hierarchy},
    identity::{Identities, Identity, Selector},
    rules::Rules,
};

/// The name under which the policy for unclaimed sockets is shown.
pub const DEFAULT: &str = "default";

/// The name under which connections are counted that no policy claims.
pub const UNCLAIMED: &str = "(unclaimed)";

/// What goes into the kernel's maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Every policy of the config; `default` comes first where there is one.
    pub policies: Vec<Assigned>,
    /// Which cgroups point to them.
    pub claims: Vec<Claim>,
}

/// A policy by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assigned {
    /// The name in the config, or [`DEFAULT`].
    pub name: String,
    /// What it wants.
    pub policy: Policy,
    /// The remote ends that it is for.
    pub rules: Rules,
}

/// A cgroup and the policies it points to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The cgroup; the ones below it that claim nothing themselves follow it.
    pub cgroup: Cgroup,
    /// Indices into [`Assignment::policies`]: those with rules, of equally exact
    /// ones the first wins, and in the end one without rules, if there is one.
    pub policies: Vec<usize>,
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
            Self::Absent { policy, path } => {
                write!(f, "policy {policy}: cgroup {path} does not exist yet")
            }
            Self::NoMatch { policy, glob } => {
                write!(f, "policy {policy}: no cgroup matches {glob} yet")
            }
            Self::Outside { policy, path, root } => write!(
                f,
                "policy {policy}: cgroup {path} is not below {root}, where the program is attached; \
                 it is not governed"
            ),
            Self::Taken { policy, path, by } => write!(
                f,
                "policy {policy}: cgroup {path} is claimed by policy {by} (a path beats a glob, \
                 then the first one wins)"
            ),
        }
    }
}

impl Assignment {
    /// The cgroups that point to a policy, by its index.
    pub fn paths_of(&self, policy: usize) -> impl Iterator<Item = &str> {
        self.claims
            .iter()
            .filter(move |claim| claim.policies.contains(&policy))
            .map(|claim| claim.cgroup.path.as_str())
    }
}

/// Who claims which paths, whether cgroups are there or not.
#[derive(Debug)]
pub struct Claimants {
    root: Cgroup,
    policies: Vec<Assigned>,
    /// Path → policies that name it.
    by_path: HashMap<String, Vec<usize>>,
    globs: GlobSet,
    /// The policy of each glob, and the glob as configured.
    by_glob: Vec<(usize, String)>,
    /// The policies that say what a cgroup has to be.
    by_selector: Vec<(usize, Selector)>,
    /// Whether one of them goes by what only the runtimes know.
    needs_names: bool,
    identities: Identities,
    /// Policies for everything that is governed.
    everywhere: Vec<usize>,
}

/// Why the config has a policy for a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason<'a> {
    /// It is named by its path.
    Path,
    /// It is what the policy selects.
    Selector(&'a Selector),
    /// Its path matches this glob.
    Glob(&'a str),
    /// The policy is for all that is governed.
    Everywhere,
}

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path => f.write_str("its path"),
            Self::Selector(selector) => selector.fmt(f),
            Self::Glob(glob) => write!(f, "glob {glob}"),
            Self::Everywhere => f.write_str("everything that is governed"),
        }
    }
}

impl Claimants {
    /// As the config says, of what is below `root`.
    ///
    /// # Errors
    ///
    /// When the globs are too large together.
    pub fn new(config: &Config, root: &Cgroup) -> Result<Self, globset::Error> {
        let default = config.default.map(|policy| Assigned {
            name: DEFAULT.to_owned(),
            policy,
            rules: Rules::default(),
        });
        let first_named = usize::from(default.is_some());
        let named = config.policies.iter().map(|named| Assigned {
            name: named.name.clone(),
            policy: named.policy,
            rules: named.rules.clone(),
        });
        let mut claimants = Self {
            root: root.clone(),
            policies: default.into_iter().chain(named).collect(),
            by_path: HashMap::new(),
            globs: GlobSet::empty(),
            by_glob: Vec::new(),
            by_selector: Vec::new(),
            needs_names: false,
            identities: Identities::default(),
            everywhere: Vec::new(),
        };
        let mut globs = GlobSetBuilder::new();
        for (index, named) in (first_named..).zip(&config.policies) {
            for pattern in &named.cgroups {
                if let Some(glob) = pattern.glob() {
                    globs.add(glob.clone());
                    claimants.by_glob.push((index, pattern.to_string()));
                } else {
                    let path = pattern.to_string();
                    claimants.by_path.entry(path).or_default().push(index);
                }
            }
            if !named.selector.is_empty() {
                claimants.needs_names |= named.selector.needs_names();
                claimants.by_selector.push((index, named.selector.clone()));
            } else if named.cgroups.is_empty() {
                claimants.everywhere.push(index);
            }
        }
        claimants.globs = globs.build()?;
        if first_named == 1 {
            claimants.everywhere.push(0);
        }
        Ok(claimants)
    }

    /// Every policy of the config, as [`Assignment::policies`].
    #[must_use]
    pub fn policies(&self) -> &[Assigned] {
        &self.policies
    }

    /// The shortest idle time that a policy gives, in seconds.
    #[must_use]
    pub fn shortest_idle(&self) -> u32 {
        self.policies
            .iter()
            .filter(|assigned| assigned.policy.is_enforced())
            .map(|assigned| history::given(&assigned.policy).idle)
            .filter(|idle| *idle > 0)
            .min()
            .unwrap_or(MIN_SECONDS)
    }

    /// The policies that claim a path, in the order of [`Claim::policies`]. A
    /// path in the config stands before a glob, the first before the others.
    #[must_use]
    pub fn of(&self, path: &str) -> Vec<usize> {
        if !self.root.contains(path) {
            return Vec::new();
        }
        let mut all = self.by_path.get(path).cloned().unwrap_or_default();
        all.extend(self.selecting(path).map(|(index, _)| *index));
        let matching = self.globs.matches(path);
        all.extend(matching.into_iter().map(|glob| self.by_glob[glob].0));
        if path == self.root.path {
            all.extend(&self.everywhere);
        }
        let mut claiming: Vec<usize> = Vec::new();
        let mut without_rules = None;
        for policy in all {
            if self.policies[policy].rules.is_empty() {
                without_rules.get_or_insert(policy);
            } else if !claiming.contains(&policy) {
                claiming.push(policy);
            }
        }
        claiming.extend(without_rules);
        claiming
    }

    /// What a cgroup is, as far as it matters to any policy.
    fn identity(&self, path: &str) -> Identity {
        if self.needs_names {
            self.identities.of(path.as_bytes())
        } else {
            Identity::of_path(path.as_bytes())
        }
    }

    /// The policies that select a cgroup by what it is.
    fn selecting(&self, path: &str) -> impl Iterator<Item = &(usize, Selector)> {
        // Nothing is looked at for a config without any.
        let identity = (!self.by_selector.is_empty()).then(|| self.identity(path));
        let selects = move |(_, selector): &&(usize, Selector)| {
            identity
                .as_ref()
                .is_some_and(|identity| selector.selects(identity))
        };
        self.by_selector.iter().filter(selects)
    }

    /// Why a policy, by its index, is among [`Self::of`] a cgroup.
    #[must_use]
    pub fn reason(&self, policy: usize, path: &str) -> Reason<'_> {
        let has = |policies: &Vec<usize>| policies.contains(&policy);
        if self.by_path.get(path).is_some_and(has) {
            return Reason::Path;
        }
        let mut selecting = self.selecting(path);
        if let Some((_, selector)) = selecting.find(|(index, _)| *index == policy) {
            return Reason::Selector(selector);
        }
        let mut matching = self.globs.matches(path).into_iter();
        match matching.find(|glob| self.by_glob[*glob].0 == policy) {
            Some(glob) => Reason::Glob(&self.by_glob[glob].1),
            None => Reason::Everywhere,
        }
    }

    /// Forgets what is known of a cgroup that is gone.
    pub fn forget(&self, path: &str) {
        self.identities.forget(path.as_bytes());
    }

    /// Whether cgroups other than the root have policies of their own, so that
    /// it matters when one is made or removed.
    #[must_use]
    pub fn name_cgroups(&self) -> bool {
        !self.by_glob.is_empty()
            || !self.by_selector.is_empty()
            || self.by_path.keys().any(|path| *path != self.root.path)
    }

    /// Assigns the cgroups that exist.
    ///
    /// # Errors
    ///
    /// When the hierarchy cannot be read.
    pub fn assign(&self, hierarchy: &Hierarchy) -> io::Result<(Assignment, Vec<Warning>)> {
        let mut existing = BTreeMap::new();
        if !self.by_glob.is_empty() || !self.by_selector.is_empty() {
            for cgroup in hierarchy.walk(&self.root)? {
                existing.insert(cgroup.path.clone(), cgroup);
            }
        }
        for path in self.by_path.keys() {
            if !existing.contains_key(path)
                && let Some(cgroup) = hierarchy.lookup(path)?
            {
                existing.insert(cgroup.path.clone(), cgroup);
            }
        }
        Ok(self.assign_existing(existing))
    }

    /// The same without looking at the file system.
    fn assign_existing(
        &self,
        mut existing: BTreeMap<String, Cgroup>,
    ) -> (Assignment, Vec<Warning>) {
        existing.insert(self.root.path.clone(), self.root.clone());
        let warnings = self.warnings(&existing);
        let claims = existing.into_values().filter_map(|cgroup| {
            let policies = self.of(&cgroup.path);
            (!policies.is_empty()).then_some(Claim { cgroup, policies })
        });
        let assignment = Assignment {
            claims: claims.collect(),
            policies: self.policies.clone(),
        };
        (assignment, warnings)
    }

    /// What has no effect with these cgroups.
    fn warnings(&self, existing: &BTreeMap<String, Cgroup>) -> Vec<Warning> {
        // In the order of the config.
        let mut warnings: BTreeMap<(usize, usize, &str), Warning> = BTreeMap::new();
        for (path, policies) in &self.by_path {
            for index in policies {
                if let Some(warning) = self.path_warning(*index, path, existing) {
                    warnings.insert((*index, 0, path), warning);
                }
            }
        }
        let mut matched = vec![false; self.by_glob.len()];
        for path in existing.keys().filter(|path| self.root.contains(path)) {
            for glob in self.globs.matches(path) {
                matched[glob] = true;
            }
        }
        let unmatched = self.by_glob.iter().enumerate().zip(matched);
        for ((position, (index, glob)), matched) in unmatched {
            if !matched {
                let warning = Warning::NoMatch {
                    policy: self.policies[*index].name.clone(),
                    glob: glob.clone(),
                };
                warnings.insert((*index, 1 + position, glob), warning);
            }
        }
        for (index, selector) in &self.by_selector {
            let matches = |path: &String| self.of(path).contains(index);
            if !existing.keys().any(matches) {
                let glob = selector.to_string();
                let policy = self.policies[*index].name.clone();
                warnings.insert((*index, 0, ""), Warning::NoMatch { policy, glob });
            }
        }
        warnings.into_values().collect()
    }

    fn path_warning(
        &self,
        index: usize,
        path: &str,
        existing: &BTreeMap<String, Cgroup>,
    ) -> Option<Warning> {
        let assigned = &self.policies[index];
        let policy = assigned.name.clone();
        let path = path.to_owned();
        if !self.root.contains(&path) {
            let root = self.root.path.clone();
            return Some(Warning::Outside { policy, path, root });
        }
        if !existing.contains_key(&path) {
            return Some(Warning::Absent { policy, path });
        }
        let claiming = self.of(&path);
        if claiming.contains(&index) {
            return None;
        }
        let by = self.policies[*claiming.last()?].name.clone();
        Some(Warning::Taken { policy, path, by })
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
                let names = claim
                    .policies
                    .iter()
                    .map(|index| &*assignment.policies[*index].name);
                format!(
                    "{}={}",
                    claim.cgroup.path,
                    names.collect::<Vec<_>>().join(",")
                )
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
        let (assignment, warnings) = Claimants::new(&config, &root)
            .unwrap()
            .assign_existing(existing.clone());
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

    /// A container's cgroup, and one in it.
    const CONTAINER: &str =
        "/s/docker-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.scope";

    #[test]
    fn a_path_beats_a_selector_which_beats_a_glob() {
        let inner = format!("{CONTAINER}/inner");
        let config = config(
            r#"
            [[policy]]
            name = "glob"
            cgroup = "/s.slice/**"
            [[policy]]
            name = "path"
            cgroup = "/s.slice/exact.service"
            [[policy]]
            name = "units"
            unit = ["*.service", "u@.scope"]
            [[policy]]
            name = "one"
            unit = "one.service"
            "#,
        );
        let paths = [
            "/",
            "/s.slice",
            "/s.slice/exact.service",
            "/s.slice/one.service",
            "/s.slice/one.service/inner",
            "/s.slice/u@1.scope",
            "/s.slice/other.scope",
            &inner,
        ];
        let (root, existing) = hierarchy(&paths);
        let claimants = Claimants::new(&config, &root).unwrap();
        assert!(claimants.name_cgroups());
        let first = |path: &str| {
            let first = claimants.of(path).first().copied()?;
            let name = claimants.policies()[first].name.clone();
            Some((name, claimants.reason(first, path).to_string()))
        };
        let units = || {
            Some((
                "units".to_owned(),
                "unit = *.service or u@.scope".to_owned(),
            ))
        };
        assert_eq!(first("/s.slice"), None);
        assert_eq!(
            first("/s.slice/exact.service"),
            Some(("path".to_owned(), "its path".to_owned()))
        );
        // Of equals the first in the config counts, not the most exact.
        assert_eq!(first("/s.slice/one.service"), units());
        assert_eq!(first("/s.slice/one.service/inner"), units());
        assert_eq!(first("/s.slice/u@1.scope"), units());
        assert_eq!(
            first("/s.slice/other.scope"),
            Some(("glob".to_owned(), "glob /s.slice/**".to_owned()))
        );
        assert_eq!(first(&inner), None);
        let (_, warnings) = claimants.assign_existing(existing);
        assert_eq!(
            warnings,
            [Warning::NoMatch {
                policy: "one".to_owned(),
                glob: "unit = one.service".to_owned(),
            }]
        );
    }

    #[test]
    fn a_policy_on_the_root_stands_before_the_default() {
        let config = config("[default]\n[[policy]]\nname = 'all'\ncgroup = '/'\n");
        let (root, existing) = hierarchy(&["/"]);
        let (assignment, warnings) = Claimants::new(&config, &root)
            .unwrap()
            .assign_existing(existing.clone());
        assert_eq!(claims(&assignment), ["/=all"]);
        assert_eq!(warnings, []);
    }

    #[test]
    fn without_a_default_the_root_claims_nothing() {
        let config = config("[[policy]]\nname = 'a'\ncgroup = '/a'\n");
        let (root, existing) = hierarchy(&["/", "/a", "/b"]);
        let (assignment, _) = Claimants::new(&config, &root)
            .unwrap()
            .assign_existing(existing.clone());
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
        let (assignment, warnings) = Claimants::new(&config, &root)
            .unwrap()
            .assign_existing(existing.clone());
        assert_eq!(claims(&assignment), [""; 0]);
        let policy = || "gone".to_owned();
        assert_eq!(
            warnings,
            [
                Warning::Outside {
                    policy: policy(),
                    path: "/other".into(),
                    root: "/s".into()
                },
                Warning::Absent {
                    policy: policy(),
                    path: "/s/gone".into()
                },
                Warning::NoMatch {
                    policy: policy(),
                    glob: "/s/x-*".into()
                },
            ]
        );
    }
}
