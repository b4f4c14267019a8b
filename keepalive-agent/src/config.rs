//! Configuration: what a person wrote, checked as a whole.
//!
//! Reading finds every error in every file, not only the first, each with its
//! line, key and value. What the kernel would refuse is refused here.
//!
//! A config is made of files ([`Sources`]): a main file and drop-ins, merged key
//! by key. Each value remembers the line it came from ([`Origins`]).

mod diagnostic;
mod document;
pub mod keys;
mod locate;
mod merge;
mod origin;
mod preset;
mod self_service;
mod sources;
#[cfg(test)]
mod tests;
mod text;
mod timer;
mod trusted_file;

use std::{collections::HashMap, fmt, path::Path};

use globset::{Glob, GlobBuilder};
use keepalive_common::policy::Policy;
use serde::{Deserialize, Serialize};

use crate::{
    assignment::DEFAULT,
    identity::{Attribute, NamePattern, Selector},
    rules::Rules,
};

pub use diagnostic::{Diagnostic, Diagnostics};
pub use origin::{ConfigOrigins, Origin, Origins, Place, SelfServiceOrigins, TimerOrigin};
pub use self_service::{SelfService, Wish};
pub use sources::{
    DEFAULT_FILE, Merged, PERMANENT_DIRECTORY, RUNTIME_DIRECTORY, Sources, is_drop_in_name,
    read_files,
};
pub(crate) use trusted_file::{Refusal, read as read_trusted};

/// What should hold on this node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Config {
    /// For sockets that no named policy claims; none leaves them alone.
    pub default: Option<Policy>,
    /// The named policies, in the order of the file.
    pub policies: Vec<NamedPolicy>,
    /// What users may ask for commands of their own; none where they may not.
    #[serde(default)]
    pub self_service: Option<SelfService>,
}

/// A policy for some cgroups, units or containers, some remote ends, or both.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct NamedPolicy {
    /// What it is called in reports and errors.
    pub name: String,
    /// The cgroups that it claims by their paths.
    pub cgroups: Vec<CgroupPattern>,
    /// Or by what they are. Without either it is for all that are governed.
    #[serde(default)]
    pub selector: Selector,
    /// The remote ends that it is for.
    pub rules: Rules,
    /// What it wants, completed from the default.
    pub policy: Policy,
}

/// A cgroup path from the root of the hierarchy, or a glob over such paths:
/// `*` and `?` stay within one level, `**` spans levels.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct CgroupPattern {
    text: String,
    glob: Option<Glob>,
}

impl NamedPolicy {
    /// Whether another one is the same but for its values, and for the names of units,
    /// containers and pods that it selects.
    fn is_same_claim(&self, other: &Self) -> bool {
        let Self {
            name,
            cgroups,
            selector: _,
            rules,
            policy: _,
        } = self;
        (name, cgroups, rules) == (&other.name, &other.cgroups, &other.rules)
    }
}

/// Policies of a config, by their places: the default is the first, where there is one.
pub type Values = Vec<(usize, Policy)>;

impl Config {
    /// The same config, or one that is only counted.
    #[must_use]
    pub fn in_dry_run(mut self, dry_run: bool) -> Self {
        if dry_run {
            for policy in self.every_policy_mut() {
                *policy = policy.with_enforcement(false);
            }
        }
        self
    }

    fn every_policy(&self) -> impl Iterator<Item = &Policy> {
        let named = self.policies.iter().map(|named| &named.policy);
        self.default.iter().chain(named)
    }

    fn every_policy_mut(&mut self) -> impl Iterator<Item = &mut Policy> {
        let named = self.policies.iter_mut().map(|named| &mut named.policy);
        self.default.iter_mut().chain(named)
    }

    /// What this config has for those policies that are others than in one that is the
    /// same but for that; none where it is not.
    #[must_use]
    pub fn values_beside(&self, other: &Self) -> Option<Values> {
        let is_same = |(one, other): (&NamedPolicy, &NamedPolicy)| {
            one.is_same_claim(other) && one.selector == other.selector
        };
        let is_same = self.default.is_some() == other.default.is_some()
            && self.self_service == other.self_service
            && self.policies.len() == other.policies.len()
            && self.policies.iter().zip(&other.policies).all(is_same);
        let values = self.every_policy().zip(other.every_policy()).enumerate();
        let values = values.filter(|(_, (one, other))| one != other);
        is_same.then(|| values.map(|(place, (one, _))| (place, *one)).collect())
    }

    /// The same config with other policies in some places.
    #[must_use]
    pub fn with_values(&self, values: &[(usize, Policy)]) -> Self {
        let mut config = self.clone();
        let mut places: Vec<_> = config.every_policy_mut().collect();
        for (place, value) in values {
            if let Some(policy) = places.get_mut(*place) {
                **policy = *value;
            }
        }
        config
    }

    /// The places of the policies that another config does not have just so.
    #[must_use]
    pub fn changed_since(&self, before: &Self) -> Vec<usize> {
        let known: HashMap<_, _> = by_name(before).collect();
        let is_new = |named: &&NamedPolicy| known.get(&*named.name) != Some(named);
        let default = self.default.iter().map(|_| self.default != before.default);
        let named = self.policies.iter().map(|named| is_new(&named));
        let changed = default.chain(named).enumerate();
        changed
            .filter_map(|(place, is_new)| is_new.then_some(place))
            .collect()
    }

    /// The names of the policies that another config does not have any more.
    #[must_use]
    pub fn removed_by(&self, now: &Self) -> Vec<String> {
        let there: HashMap<_, _> = by_name(now).collect();
        let default = self.default.filter(|_| now.default.is_none());
        let default = default.map(|_| DEFAULT);
        let named = self.policies.iter().map(|named| &*named.name);
        let gone = named.filter(|name| !there.contains_key(name));
        default.into_iter().chain(gone).map(str::to_owned).collect()
    }

    /// Whether some policy is for units, containers or pods, whose names come and go.
    #[must_use]
    pub fn goes_by_names(&self) -> bool {
        self.policies.iter().any(|named| !named.selector.is_empty())
    }

    /// Whether another config has the same policies, each perhaps for units,
    /// containers or pods of other names.
    #[must_use]
    pub fn differs_in_names_only(&self, other: &Self) -> bool {
        let is_same = |(one, other): (&NamedPolicy, &NamedPolicy)| {
            one.is_same_claim(other)
                && one.policy == other.policy
                && one.selector.is_empty() == other.selector.is_empty()
        };
        self.goes_by_names()
            && self.default == other.default
            && self.self_service == other.self_service
            && self.policies.len() == other.policies.len()
            && self.policies.iter().zip(&other.policies).all(is_same)
    }

    /// The same config, its policies also for those units, containers and pods that
    /// another config has the policies of the same names for, where this is true of the
    /// name.
    #[must_use]
    pub fn with_names_of(
        &self,
        other: &Self,
        may: impl Fn(Attribute, &NamePattern) -> bool,
    ) -> Self {
        let others = other.policies.iter();
        let others: HashMap<_, _> = others.map(|named| (&named.name, &named.selector)).collect();
        let mut config = self.clone();
        for named in &mut config.policies {
            if let Some(selector) = others.get(&named.name) {
                named.selector.add_names_of(selector, &may);
            }
        }
        config
    }

    /// The policy of this name; [`DEFAULT`] is the one for unclaimed sockets.
    #[must_use]
    pub fn policy(&self, name: &str) -> Option<Policy> {
        if name == DEFAULT {
            return self.default;
        }
        let named = self.policies.iter().find(|policy| policy.name == name);
        named.map(|named| named.policy)
    }

    /// What holds where there is no config at all.
    #[must_use]
    pub const fn built_in() -> Self {
        Self {
            default: Some(Policy::BUILT_IN),
            policies: Vec::new(),
            self_service: None,
        }
    }

    /// Reads a text as the only one; the path stands in diagnostics, which are
    /// warnings.
    ///
    /// # Errors
    ///
    /// [`Diagnostics`] with everything that is wrong.
    pub fn parse(path: &Path, text: &str) -> Result<(Self, Diagnostics), Diagnostics> {
        let merged = sources::parse(path, text)?;
        Ok((merged.config, merged.warnings))
    }
}

fn by_name(config: &Config) -> impl Iterator<Item = (&str, &NamedPolicy)> {
    let policies = config.policies.iter();
    policies.map(|named| (&*named.name, named))
}

impl CgroupPattern {
    /// Checks a path or glob as it stands in the config.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("must not be empty; the root of the hierarchy is \"/\"".to_owned());
        }
        if !text.starts_with('/') {
            return Err(format!(
                "a cgroup path starts with `/`, the root of the cgroup v2 hierarchy; \
                 did you mean \"/{text}\"?"
            ));
        }
        if text.split('/').any(|part| part == "." || part == "..") {
            return Err("`.` and `..` are not allowed in a cgroup path".to_owned());
        }
        if text.starts_with("/sys/fs/cgroup") {
            return Err(
                "a cgroup path starts at the root of the hierarchy, not of the file system; \
                 leave out /sys/fs/cgroup"
                    .to_owned(),
            );
        }
        let trimmed = text.trim_end_matches('/');
        let text = if trimmed.is_empty() { "/" } else { trimmed }.to_owned();
        let glob = text
            .contains(['*', '?', '[', '{'])
            .then(|| {
                GlobBuilder::new(&text)
                    .literal_separator(true)
                    // systemd writes `-` in unit names as `\x2d`.
                    .backslash_escape(false)
                    .build()
                    .map_err(|error| format!("not a glob: {}", error.kind()))
            })
            .transpose()?;
        Ok(Self { text, glob })
    }

    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The glob, unless it is a path.
    #[must_use]
    pub fn glob(&self) -> Option<&Glob> {
        self.glob.as_ref()
    }
}

impl PartialEq for CgroupPattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for CgroupPattern {}

impl TryFrom<String> for CgroupPattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::new(&text)
    }
}

impl From<CgroupPattern> for String {
    fn from(pattern: CgroupPattern) -> Self {
        pattern.text
    }
}

impl fmt::Display for CgroupPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
