//! Assignment: which cgroups that exist point to which policy.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt, io,
};

use globset::{GlobSet, GlobSetBuilder};
use keepalive_common::{
    cgroup_event::PATH_SIZE,
    environment::Environment,
    history,
    policy::{MIN_SECONDS, Policy},
    slot::MAX_DEPTH,
};

use crate::{
    config::Config,
    duration,
    grant::Grant,
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    identity::{Identities, Identity, Renaming, Selector},
    rules::Rules,
};

/// The name under which the policy for unclaimed sockets is shown.
pub const DEFAULT: &str = "default";

/// The name under which connections are counted that no policy claims.
pub const UNCLAIMED: &str = "(unclaimed)";

/// The name under which connections are counted whose policy a user asked for.
pub const GRANTED: &str = "(exec)";

/// Longest path of a cgroup that can be claimed, in bytes. The kernel reports
/// longer ones cut off ([`PATH_SIZE`]), so it could not be told which cgroup was
/// made. Those go by the nearest cgroup above with a shorter path.
const LONGEST_PATH: usize = PATH_SIZE - 2;

/// Levels below the root in which cgroups can be claimed. The kernel looks at
/// [`MAX_DEPTH`] from a socket's cgroup upward, so at every [`MAX_DEPTH`]th the
/// claim above is repeated; to find out where takes time for each level.
const DEEPEST: usize = 4 * MAX_DEPTH as usize;

/// What goes into the kernel's maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Every policy of the config; `default` comes first where there is one.
    pub policies: Vec<Assigned>,
    /// Which cgroups point to them; without those whose sockets find the same
    /// policies by the claim of a cgroup above.
    pub claims: Vec<Claim>,
    /// What users were given for commands of their own.
    pub grants: Vec<Grant>,
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

impl Claim {
    fn only(cgroup: &Cgroup, claiming: &[usize], policies: &[usize]) -> Option<Self> {
        let place = |policy| policies.binary_search(policy).ok();
        let claiming: Vec<_> = claiming.iter().filter_map(place).collect();
        (!claiming.is_empty()).then(|| Self {
            cgroup: cgroup.clone(),
            policies: claiming,
        })
    }
}

/// Something in the config that is not what somebody meant, perhaps, on this
/// machine, though nothing is wrong with how it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// A default that is written is larger than the sysctl that an operator tuned.
    Loosens {
        /// Name of the policy.
        policy: String,
        /// The key, such as `idle`.
        key: &'static str,
        /// What it gives, as the config writes it.
        gives: String,
        /// The sysctl and its value.
        sysctl: (&'static str, u32),
    },
    /// No cgroup has this path.
    Absent {
        /// Name of the policy.
        policy: String,
        /// The path as configured.
        path: CgroupPath,
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
        path: CgroupPath,
        /// Where the program is attached.
        root: CgroupPath,
    },
    /// Another policy claims the cgroup.
    Taken {
        /// Name of the policy that lost.
        policy: String,
        /// The cgroup.
        path: CgroupPath,
        /// Name of the policy that claims it.
        by: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loosens {
                policy,
                key,
                gives,
                sysctl: (name, value),
            } => write!(
                f,
                "policy {policy}: {key} = {gives} is larger than the {value} of {name} here, so a \
                 connection that asks for nothing is probed less than its operator said; write \
                 \"sysctl\" to go by that"
            ),
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
    /// Of these of its policies, by their places, alone.
    #[must_use]
    pub fn only(&self, policies: &[usize]) -> Self {
        let claims = self.claims.iter();
        let claims =
            claims.filter_map(|claim| Claim::only(&claim.cgroup, &claim.policies, policies));
        Self::of_some(&self.policies, policies, claims)
    }

    fn of_some(all: &[Assigned], policies: &[usize], claims: impl Iterator<Item = Claim>) -> Self {
        let policies = policies.iter();
        Self {
            policies: policies
                .filter_map(|place| all.get(*place).cloned())
                .collect(),
            claims: claims.collect(),
            grants: Vec::new(),
        }
    }

    /// The cgroups with a claim of their own that points to a policy, for each of
    /// them in the order of the policies.
    #[must_use]
    pub fn paths_of_each(&self) -> Vec<Vec<&CgroupPath>> {
        let mut paths = vec![Vec::new(); self.policies.len()];
        for claim in &self.claims {
            for policy in &claim.policies {
                if let Some(paths) = paths.get_mut(*policy) {
                    paths.push(&claim.cgroup.path);
                }
            }
        }
        paths
    }
}

/// Who claims which paths, whether cgroups are there or not.
#[derive(Debug)]
pub struct Claimants {
    root: Cgroup,
    policies: Vec<Assigned>,
    /// Path → policies that name it.
    by_path: HashMap<CgroupPath, Vec<usize>>,
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
                    claimants.by_glob.push((index, pattern.as_str().to_owned()));
                } else {
                    let path = CgroupPath::from(pattern.as_str());
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

    /// The names of policies, by their indices.
    #[must_use]
    pub fn names(&self, policies: &[usize]) -> Vec<String> {
        let of = |index: &usize| Some(self.policies.get(*index)?.name.clone());
        policies.iter().filter_map(of).collect()
    }

    /// Which of these cgroups claim some of the policies, by their places in order: of
    /// those alone.
    #[must_use]
    pub fn assignment_of(
        &self,
        policies: &[usize],
        cgroups: impl Iterator<Item = Cgroup>,
    ) -> Assignment {
        let claims =
            cgroups.filter_map(|cgroup| Claim::only(&cgroup, &self.of(&cgroup.path), policies));
        Assignment::of_some(&self.policies, policies, claims)
    }

    /// Goes over to a config that has other values for some of the policies.
    pub fn set_values(&mut self, values: &[(usize, Policy)]) {
        for (place, policy) in values {
            if let Some(assigned) = self.policies.get_mut(*place) {
                assigned.policy = *policy;
            }
        }
    }

    /// The cgroup that the program is attached to.
    #[must_use]
    pub const fn root(&self) -> &Cgroup {
        &self.root
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
            .map(|assigned| history::given(&assigned.policy, &Environment::UNKNOWN).idle)
            .filter(|idle| *idle > 0)
            .min()
            .unwrap_or(MIN_SECONDS)
    }

    /// The policies that the config has for a cgroup, in the order of
    /// [`Claim::policies`]. A path in the config stands before a glob, the first
    /// before the others. None for a cgroup that cannot be claimed: outside the
    /// root, too deep below it, or with too long a path.
    #[must_use]
    pub fn of(&self, path: &CgroupPath) -> Vec<usize> {
        if !self.is_claimable(path) {
            return Vec::new();
        }
        let mut all = self.by_path.get(path).cloned().unwrap_or_default();
        all.extend(self.selecting(path).map(|(index, _)| *index));
        let matching = self.globs.matches(path);
        all.extend(matching.into_iter().map(|glob| self.by_glob[glob].0));
        if *path == self.root.path {
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

    /// Whether a policy goes by what only the runtimes know.
    #[must_use]
    pub const fn needs_names(&self) -> bool {
        self.needs_names
    }

    /// What a cgroup is, as far as it matters to any policy.
    #[must_use]
    pub fn identity(&self, path: &CgroupPath) -> Identity {
        if self.needs_names {
            self.identities.of(path.as_bytes())
        } else {
            Identity::of_path(path.as_bytes())
        }
    }

    /// The policies that select a cgroup by what it is.
    fn selecting(&self, path: &CgroupPath) -> impl Iterator<Item = &(usize, Selector)> {
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
    pub fn reason(&self, policy: usize, path: &CgroupPath) -> Reason<'_> {
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
    pub fn forget(&self, path: &CgroupPath) {
        self.identities.forget(path.as_bytes());
    }

    fn is_claimable(&self, path: &CgroupPath) -> bool {
        self.root.contains(path)
            && path.as_bytes().len() <= LONGEST_PATH
            && self.level(path) < DEEPEST
    }

    /// Levels below the root.
    fn level(&self, path: &CgroupPath) -> usize {
        path.depth().saturating_sub(self.root.path.depth())
    }

    /// The cgroups in and below which connections may be held to bounds, as few as
    /// there need be: those that policies with bounds name, the last one before
    /// the first wildcard of a glob. Of more than some dozens, those furthest down
    /// are taken together by the one above them.
    #[must_use]
    pub fn bounded(&self) -> Vec<CgroupPath> {
        /// Each costs a link and a pin.
        const MOST: usize = 64;
        let bounds = |index: &usize| {
            let policy = self.policies.get(*index);
            policy.is_some_and(|assigned| assigned.policy.has_bounds())
        };
        let root = &self.root.path;
        let by_path = self.by_path.iter();
        let by_path = by_path.filter(|(_, policies)| policies.iter().any(bounds));
        let by_glob = self.by_glob.iter().filter(|(index, _)| bounds(index));
        // What is selected by what it is may be anywhere.
        let selecting = self.by_selector.iter().any(|(index, _)| bounds(index));
        let everywhere = selecting || self.everywhere.iter().any(bounds);
        let mut paths: Vec<CgroupPath> = by_path
            .map(|(path, _)| path.clone())
            .chain(by_glob.map(|(_, glob)| CgroupPath::from(above_wildcards(glob))))
            .filter_map(|path| {
                if root.contains(&path) {
                    Some(path)
                } else {
                    path.contains(root).then(|| root.clone())
                }
            })
            .chain(everywhere.then(|| root.clone()))
            .collect();
        loop {
            paths.sort_unstable();
            paths.dedup();
            let all: HashSet<CgroupPath> = paths.iter().cloned().collect();
            paths.retain(|path| !path.upward().skip(1).any(|above| all.contains(above)));
            if paths.len() <= MOST {
                return paths;
            }
            let deepest = paths.iter().map(CgroupPath::depth).max().unwrap_or(0);
            for path in &mut paths {
                if path.depth() == deepest {
                    *path = path.parent().unwrap_or_else(|| root.clone());
                }
            }
        }
    }

    /// The policies that a cgroup must claim by itself, as [`Claim::policies`]:
    /// those that the config has for it and not for the ones above, or theirs,
    /// where they are further up than the kernel looks. None where its sockets
    /// find the right policy without.
    #[must_use]
    pub fn claim_of(&self, path: &CgroupPath) -> Vec<usize> {
        // Almost all cgroups.
        if self.level(path) < MAX_DEPTH as usize && self.of(path).is_empty() {
            return Vec::new();
        }
        let nearest = self.nearest(path);
        if nearest.distance == 0 {
            nearest.policies
        } else {
            Vec::new()
        }
    }

    /// Whether the kernel finds the claims above a cgroup from there.
    #[must_use]
    pub fn is_in_reach(&self, path: &CgroupPath) -> bool {
        self.level(path) < MAX_DEPTH as usize || self.nearest(path).is_in_reach()
    }

    /// The nearest claim of a cgroup.
    fn nearest(&self, path: &CgroupPath) -> Nearest {
        let mut downward: Vec<_> = path
            .upward()
            .map(CgroupPath::from)
            .take_while(|path| self.root.contains(path))
            .collect();
        downward.reverse();
        downward
            .iter()
            .fold(Nearest::default(), |above, path| above.below(self, path))
    }

    /// Assigns the cgroups that exist.
    ///
    /// # Errors
    ///
    /// When the hierarchy cannot be read.
    pub fn assign(&self, hierarchy: &Hierarchy) -> io::Result<(Assignment, Vec<Warning>)> {
        let mut survey = Survey::of(self);
        hierarchy.descend(&self.root, &Nearest::default(), |cgroup, above| {
            survey.visit(cgroup, above)
        })?;
        Ok(survey.finish())
    }

    /// The assignment of these, where that of others is known and both claim the same
    /// cgroups for the same of their policies: mostly it is values that have changed.
    #[must_use]
    pub fn assigned_like(&self, others: &Self, known: &Assignment) -> Option<Assignment> {
        let claim = |of: &Self| {
            let have_rules = of.policies.iter().map(|policy| !policy.rules.is_empty());
            have_rules.collect::<Vec<_>>()
        };
        let claim_the_same = self.root == others.root
            && self.by_path == others.by_path
            && self.by_glob == others.by_glob
            && self.by_selector == others.by_selector
            && self.everywhere == others.everywhere
            && claim(self) == claim(others);
        claim_the_same.then(|| Assignment {
            policies: self.policies.clone(),
            claims: known.claims.clone(),
            grants: Vec::new(),
        })
    }

    /// Where some of the policies, by their places, loosen what the sysctls of the host's
    /// network namespace say. Those of containers are not about connections there.
    #[must_use]
    pub fn loosened(
        &self,
        policies: impl IntoIterator<Item = usize>,
        sysctls: &Environment,
    ) -> Vec<Warning> {
        let selects_containers = |index: usize| {
            let mut selectors = self.by_selector.iter();
            selectors.any(|(of, selector)| *of == index && selector.needs_names())
        };
        let mut warnings = Vec::new();
        for index in policies {
            let Some(assigned) = self.policies.get(index) else {
                continue;
            };
            if !assigned.policy.sets_anything() || selects_containers(index) {
                continue;
            }
            let gives = history::given(&assigned.policy, sysctls);
            let seconds = |seconds| format!("\"{}\"", duration::show_seconds(seconds));
            for (key, value, written, name, sysctl) in [
                (
                    "idle",
                    gives.idle,
                    seconds(gives.idle),
                    "net.ipv4.tcp_keepalive_time",
                    sysctls.idle,
                ),
                (
                    "interval",
                    gives.interval,
                    seconds(gives.interval),
                    "net.ipv4.tcp_keepalive_intvl",
                    sysctls.interval,
                ),
                (
                    "probes",
                    gives.probes,
                    gives.probes.to_string(),
                    "net.ipv4.tcp_keepalive_probes",
                    sysctls.probes,
                ),
            ] {
                if sysctl != 0 && value > sysctl {
                    warnings.push(Warning::Loosens {
                        policy: assigned.name.clone(),
                        key,
                        gives: written,
                        sysctl: (name, sysctl),
                    });
                }
            }
        }
        warnings
    }

    /// The cgroups that exist of which others, whose policies are the same but for names
    /// of units, containers and pods, select other ones. Of those one below another the
    /// topmost: what is below may be claimed for others, too.
    ///
    /// # Errors
    ///
    /// When the hierarchy cannot be read.
    pub fn differing(&self, others: &Self, hierarchy: &Hierarchy) -> io::Result<Vec<Cgroup>> {
        self.teach(others);
        let both = || self.by_selector.iter().zip(&others.by_selector);
        let changed: Vec<_> = both().filter(|(one, other)| one != other).collect();
        let are_pods = |(one, other): &(&(usize, Selector), &(usize, Selector))| {
            one.1.is_of_pods() && other.1.is_of_pods()
        };
        let renamings = changed.iter();
        let renamings: Vec<_> = renamings
            .map(|(one, other)| Renaming::new(&one.1, &other.1))
            .collect();
        let concerned =
            |identity: &Identity| renamings.iter().any(|renaming| renaming.concerns(identity));
        if changed.iter().all(are_pods) {
            // What containers there are in pods is known without looking.
            let found = self.identities.pods(concerned).into_iter();
            let cgroups = found.map(|path| hierarchy.lookup(&path));
            return cgroups.filter_map(io::Result::transpose).collect();
        }
        let mut differing = Vec::new();
        hierarchy.descend(&self.root, &false, |cgroup, is_above| {
            let (one, other) = (self.identity(&cgroup.path), others.identity(&cgroup.path));
            let is_other = if one == other {
                concerned(&one)
            } else {
                both().any(|(before, now)| before.1.selects(&one) != now.1.selects(&other))
            };
            if is_other && !is_above {
                differing.push(cgroup.clone());
            }
            is_other || *is_above
        })?;
        Ok(differing)
    }

    /// Lets others know what was read of containers, as far as that stays as it is.
    pub fn teach(&self, others: &Self) {
        others.learn(&self.identities);
    }

    /// Takes over what was read of containers, likewise.
    pub fn learn(&self, known: &Identities) {
        if self.needs_names {
            self.identities.learn(known);
        }
    }

    /// What was read of containers.
    #[must_use]
    pub fn known(&self) -> Identities {
        let known = Identities::default();
        known.learn(&self.identities);
        known
    }

    fn path_warning(
        &self,
        index: usize,
        path: &CgroupPath,
        existing: &HashSet<CgroupPath>,
    ) -> Option<Warning> {
        let assigned = &self.policies[index];
        let policy = assigned.name.clone();
        let path = path.clone();
        if !self.root.contains(&path) {
            let root = self.root.path.clone();
            return Some(Warning::Outside { policy, path, root });
        }
        if !existing.contains(&path) {
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

/// The nearest claim that stands in the kernel, seen from a cgroup.
#[derive(Clone, Debug, Default)]
struct Nearest {
    /// As [`Claim::policies`]; none where nothing claims the cgroup.
    policies: Vec<usize>,
    /// How many levels up.
    distance: usize,
}

impl Nearest {
    const fn is_in_reach(&self) -> bool {
        self.distance < MAX_DEPTH as usize
    }

    /// The same, seen from a cgroup one level below.
    fn below(&self, claimants: &Claimants, path: &CgroupPath) -> Self {
        let own = claimants.of(path);
        let above = Self {
            distance: self.distance + usize::from(!self.policies.is_empty()),
            ..self.clone()
        };
        if own.is_empty() || own == above.policies {
            if above.is_in_reach() || !claimants.is_claimable(path) {
                return above;
            }
            return Self {
                distance: 0,
                ..above
            };
        }
        Self {
            policies: own,
            distance: 0,
        }
    }
}

/// The cgroups that exist, one after the other.
struct Survey<'a> {
    claimants: &'a Claimants,
    claims: Vec<Claim>,
    /// Which of the globs match any.
    matched: Vec<bool>,
    /// Those that are named by their paths.
    existing: HashSet<CgroupPath>,
    /// The policies that select any by what it is.
    selecting: HashSet<usize>,
}

impl<'a> Survey<'a> {
    fn of(claimants: &'a Claimants) -> Self {
        Self {
            claimants,
            claims: Vec::new(),
            matched: vec![false; claimants.by_glob.len()],
            existing: HashSet::new(),
            selecting: HashSet::new(),
        }
    }

    /// Claims for a cgroup, given what is nearest to the one above.
    fn visit(&mut self, cgroup: &Cgroup, above: &Nearest) -> Nearest {
        let Self { claimants, .. } = *self;
        if claimants.by_path.contains_key(&cgroup.path) {
            self.existing.insert(cgroup.path.clone());
        }
        for glob in claimants.globs.matches(&cgroup.path) {
            self.matched[glob] = true;
        }
        let selecting = claimants.selecting(&cgroup.path).map(|(index, _)| *index);
        self.selecting.extend(selecting);
        let nearest = above.below(claimants, &cgroup.path);
        if nearest.distance == 0 && !nearest.policies.is_empty() {
            self.claims.push(Claim {
                cgroup: cgroup.clone(),
                policies: nearest.policies.clone(),
            });
        }
        nearest
    }

    fn finish(mut self) -> (Assignment, Vec<Warning>) {
        self.claims
            .sort_by(|a, b| a.cgroup.path.cmp(&b.cgroup.path));
        let warnings = self.warnings();
        let assignment = Assignment {
            policies: self.claimants.policies.clone(),
            claims: self.claims,
            grants: Vec::new(),
        };
        (assignment, warnings)
    }

    /// What has no effect with these cgroups.
    fn warnings(&self) -> Vec<Warning> {
        let Self { claimants, .. } = self;
        // In the order of the config.
        let mut warnings: BTreeMap<(usize, usize, &[u8]), Warning> = BTreeMap::new();
        for (path, policies) in &claimants.by_path {
            for index in policies {
                if let Some(warning) = claimants.path_warning(*index, path, &self.existing) {
                    warnings.insert((*index, 0, path.as_bytes()), warning);
                }
            }
        }
        let globs = claimants.by_glob.iter().enumerate().zip(&self.matched);
        for ((position, (index, glob)), matched) in globs {
            if !matched {
                let warning = Warning::NoMatch {
                    policy: claimants.policies[*index].name.clone(),
                    glob: glob.clone(),
                };
                warnings.insert((*index, 1 + position, glob.as_bytes()), warning);
            }
        }
        for (index, selector) in &claimants.by_selector {
            if !self.selecting.contains(index) {
                let warning = Warning::NoMatch {
                    policy: claimants.policies[*index].name.clone(),
                    glob: selector.to_string(),
                };
                warnings.insert((*index, 0, b""), warning);
            }
        }
        warnings.into_values().collect()
    }
}

/// The path of a glob down to its first wildcard.
fn above_wildcards(glob: &str) -> &str {
    let wild = glob.find(|c| "*?[{\\".contains(c)).unwrap_or(glob.len());
    match glob.get(..wild).and_then(|literal| literal.rfind('/')) {
        Some(end) if end > 0 => &glob[..end],
        _ => "/",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse("test.toml".as_ref(), text).unwrap().0
    }

    /// The cgroups with these paths; the first is where the program is attached.
    fn hierarchy(paths: &[&str]) -> (Cgroup, BTreeMap<CgroupPath, Cgroup>) {
        let cgroups: BTreeMap<_, _> = (1..)
            .zip(paths)
            .map(|(id, path)| {
                let path = CgroupPath::from(*path);
                (path.clone(), Cgroup { path, id })
            })
            .collect();
        (cgroups[paths[0].as_bytes()].clone(), cgroups)
    }

    /// Assigns these cgroups.
    fn assign(
        claimants: &Claimants,
        existing: &BTreeMap<CgroupPath, Cgroup>,
    ) -> (Assignment, Vec<Warning>) {
        let mut survey = Survey::of(claimants);
        let mut nearest: HashMap<CgroupPath, Nearest> = HashMap::new();
        for cgroup in existing.values() {
            if !claimants.root.contains(&cgroup.path) {
                continue;
            }
            let above = cgroup.path.parent().and_then(|above| nearest.get(&above));
            let below = survey.visit(cgroup, above.unwrap_or(&Nearest::default()));
            nearest.insert(cgroup.path.clone(), below);
        }
        survey.finish()
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
        let (assignment, warnings) = assign(&Claimants::new(&config, &root).unwrap(), &existing);
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
            [[policy]]
            name = "none"
            unit = "none.service"
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
        let first = |path: &str| {
            let path = CgroupPath::from(path);
            let first = claimants.of(&path).first().copied()?;
            let name = claimants.policies()[first].name.clone();
            Some((name, claimants.reason(first, &path).to_string()))
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
        let (assignment, warnings) = assign(&claimants, &existing);
        // What is inside of a unit finds the unit's.
        assert_eq!(assignment.claims.len(), 4);
        assert_eq!(
            warnings,
            [Warning::NoMatch {
                policy: "none".to_owned(),
                glob: "unit = none.service".to_owned(),
            }]
        );
    }

    #[test]
    fn a_glob_matches_names_that_are_not_utf_8() {
        let config = config("[[policy]]\nname = 'a'\ncgroup = ['/ten/**', '/one?']\n");
        let root = Cgroup {
            path: CgroupPath::root(),
            id: 1,
        };
        let claimants = Claimants::new(&config, &root).unwrap();
        for (path, claiming) in [
            (&b"/ten/bad\xff"[..], &[0][..]),
            (b"/ten/bad\xff/inner", &[0]),
            (b"/one\xff", &[0]),
            (b"/one\xff\xfe", &[]),
        ] {
            let path = CgroupPath::from(path);
            assert_eq!(claimants.of(&path), claiming, "{path}");
        }
    }

    #[test]
    fn connections_are_held_to_bounds_as_far_down_as_possible() {
        let bounded = |root: &str, policies: &[(&str, &str)]| {
            let policies = policies.iter().enumerate();
            let policies = policies.map(|(number, (cgroup, keys))| {
                format!("[[policy]]\nname = 'p{number}'\ncgroup = '{cgroup}'\n{keys}\n")
            });
            let text: String = policies.collect();
            let (root, _) = hierarchy(&[root]);
            let bounded = Claimants::new(&config(&text), &root).unwrap().bounded();
            bounded.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let bounds = "idle = { at-most = '1m' }";
        let free = "idle = '1m'";
        assert_eq!(bounded("/", &[("/a", free)]), [""; 0]);
        assert_eq!(
            bounded("/", &[("/a", free), ("/b/c", bounds), ("/b/d", bounds)]),
            ["/b/c", "/b/d"]
        );
        // What is below another one is covered by it.
        assert_eq!(
            bounded("/", &[("/b", bounds), ("/b/c", bounds), ("/bc", bounds)]),
            ["/b", "/bc"]
        );
        assert_eq!(bounded("/", &[("/b/*/x", bounds)]), ["/b"]);
        assert_eq!(bounded("/", &[("/b/c-*", bounds)]), ["/b"]);
        assert_eq!(bounded("/", &[("/**", bounds)]), ["/"]);
        // Nothing above the root, and nothing beside it.
        assert_eq!(
            bounded("/b/c", &[("/b/**", bounds), ("/d", bounds)]),
            ["/b/c"]
        );
        let many: Vec<_> = (0..100).map(|number| format!("/s/t/{number}")).collect();
        let many: Vec<_> = many.iter().map(|path| (&**path, bounds)).collect();
        assert_eq!(bounded("/", &many), ["/s/t"]);
        for anywhere in [
            "[default]\nprobes = { exactly = 3 }",
            "[[policy]]\nname = 'u'\nunit = 'a.service'\nprobes = { exactly = 3 }",
        ] {
            let (root, _) = hierarchy(&["/b"]);
            assert_eq!(
                Claimants::new(&config(anywhere), &root).unwrap().bounded(),
                [CgroupPath::from("/b")]
            );
        }
    }

    #[test]
    fn some_of_the_policies_and_what_they_claim() {
        let config = config(
            "[default]\n\
             [[policy]]\nname = 'a'\ncgroup = '/a'\n\
             [[policy]]\nname = 'all'\ncgroup = '/?'\n\
             [[policy]]\nname = 'web'\ncgroup = '/a'\nport = 443\n",
        );
        let (root, existing) = hierarchy(&["/", "/a", "/b"]);
        let claimants = Claimants::new(&config, &root).unwrap();
        let (assignment, _) = assign(&claimants, &existing);
        for (places, expected) in [
            (&[0][..], &["/=default"][..]),
            (&[1, 3], &["/a=web,a"]),
            (&[2], &["/b=all"]),
            (&[], &[]),
        ] {
            let some = assignment.only(places);
            assert_eq!(claims(&some), expected);
            let claiming = assignment.claims.iter().map(|claim| claim.cgroup.clone());
            let again = claimants.assignment_of(places, claiming);
            assert_eq!(
                (claims(&again), again.policies),
                (claims(&some), some.policies)
            );
        }
    }

    #[test]
    fn a_policy_on_the_root_stands_before_the_default() {
        let config = config("[default]\n[[policy]]\nname = 'all'\ncgroup = '/'\n");
        let (root, existing) = hierarchy(&["/"]);
        let (assignment, warnings) = assign(&Claimants::new(&config, &root).unwrap(), &existing);
        assert_eq!(claims(&assignment), ["/=all"]);
        assert_eq!(warnings, []);
    }

    #[test]
    fn without_a_default_the_root_claims_nothing() {
        let config = config("[[policy]]\nname = 'a'\ncgroup = '/a'\n");
        let (root, existing) = hierarchy(&["/", "/a", "/b"]);
        let (assignment, _) = assign(&Claimants::new(&config, &root).unwrap(), &existing);
        assert_eq!(claims(&assignment), ["/a=a"]);
    }

    #[test]
    fn what_is_found_by_the_claim_above_needs_none() {
        let config = config(
            r#"
            [[policy]]
            name = "tenants"
            cgroup = "/ten/**"
            [[policy]]
            name = "strict"
            cgroup = "/ten/a/strict"
            "#,
        );
        let (root, existing) = hierarchy(&[
            "/",
            "/ten",
            "/ten/a",
            "/ten/a/b",
            "/ten/a/strict",
            "/ten/a/strict/x",
            "/ten/c",
        ]);
        let claimants = Claimants::new(&config, &root).unwrap();
        let (assignment, _) = assign(&claimants, &existing);
        assert_eq!(
            claims(&assignment),
            [
                "/ten/a/strict/x=tenants",
                "/ten/a/strict=strict",
                "/ten/a=tenants",
                "/ten/c=tenants"
            ]
        );
        for (path, claiming) in [
            ("/ten", &[][..]),
            ("/ten/a", &[0]),
            ("/ten/a/b", &[]),
            ("/ten/a/strict", &[1]),
            ("/ten/a/strict/x", &[0]),
        ] {
            assert_eq!(claimants.claim_of(&path.into()), claiming, "{path}");
        }
    }

    #[test]
    fn a_claim_is_repeated_where_the_kernel_would_not_find_it() {
        let config = config("[default]\n[[policy]]\nname = 'a'\ncgroup = '/x/x'\n");
        let paths: Vec<_> = (0..150).map(|depth| "/x".repeat(depth)).collect();
        let mut paths: Vec<_> = paths.iter().map(String::as_str).collect();
        paths[0] = "/";
        let (root, existing) = hierarchy(&paths);
        let claimants = Claimants::new(&config, &root).unwrap();
        let (assignment, _) = assign(&claimants, &existing);
        let claiming = |policy: usize| -> Vec<_> {
            let paths = &assignment.paths_of_each()[policy];
            paths.iter().map(|path| path.depth()).collect()
        };
        assert_eq!(claiming(0), [0]);
        assert_eq!(claiming(1), [2, 34, 66, 98]);
        for (depth, path) in paths.iter().enumerate() {
            let path = CgroupPath::from(*path);
            let claims = claimants.claim_of(&path);
            let expected = assignment
                .claims
                .iter()
                .find(|claim| claim.cgroup.path == path);
            assert_eq!(
                claims,
                expected.map_or(Vec::new(), |claim| claim.policies.clone())
            );
            assert_eq!(claimants.is_in_reach(&path), depth < 98 + 32, "{depth}");
        }
    }

    #[test]
    fn a_cgroup_with_too_long_a_path_goes_by_the_one_above() {
        let config = config("[[policy]]\nname = 'a'\ncgroup = '/**'\n");
        let root = Cgroup {
            path: CgroupPath::root(),
            id: 1,
        };
        let claimants = Claimants::new(&config, &root).unwrap();
        let path = |length: usize| CgroupPath::from(format!("/{}", "x".repeat(length)).as_str());
        assert_eq!(claimants.of(&path(1021)), [0]);
        assert_eq!(claimants.of(&path(1022)), [0_usize; 0]);
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
        let root = existing[&b"/s"[..]].clone();
        let (assignment, warnings) = assign(&Claimants::new(&config, &root).unwrap(), &existing);
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
