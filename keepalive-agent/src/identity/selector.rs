//! Selector: which units, containers and pods a policy is for.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    str::FromStr,
};

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};

use super::Identity;

/// What a selector can name; the keys of a `[[policy]]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attribute {
    /// A unit of systemd.
    Unit,
    /// A container by its name, in Kubernetes by that in its pod.
    Container,
    /// The image that a container was made from, as its runtime keeps it.
    Image,
    /// The Kubernetes namespace of a pod.
    Namespace,
    /// A pod by its name.
    Pod,
}

impl Attribute {
    /// Every one.
    pub const ALL: [Self; 5] = [
        Self::Unit,
        Self::Container,
        Self::Image,
        Self::Namespace,
        Self::Pod,
    ];

    /// Its key in a config.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Container => "container",
            Self::Image => "image",
            Self::Namespace => "namespace",
            Self::Pod => "pod",
        }
    }

    fn of(self, identity: &Identity) -> Option<&str> {
        let names = &identity.names;
        match self {
            Self::Unit => identity.unit.as_deref(),
            Self::Container => names.name.as_deref(),
            Self::Image => names.image.as_deref(),
            Self::Namespace => names.namespace.as_deref(),
            Self::Pod => names.pod.as_deref(),
        }
    }

    /// Whether any of these patterns is for an identity.
    #[must_use]
    pub fn matches<'a>(
        self,
        patterns: impl IntoIterator<Item = &'a NamePattern>,
        identity: &Identity,
    ) -> bool {
        let Some(value) = self.of(identity) else {
            return false;
        };
        let longer = match self {
            // A template stands for its instances.
            Self::Unit => Some(template_of(value)),
            Self::Pod => identity.names.pod_with_namespace().map(Cow::from),
            _ => None,
        };
        patterns.into_iter().any(|pattern| {
            pattern.matches(value) || longer.as_ref().is_some_and(|name| pattern.matches(name))
        })
    }
}

/// Which cgroups a policy is for, by what they are. All that is named must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Selector {
    /// Of each, any of these.
    pub attributes: BTreeMap<Attribute, Vec<NamePattern>>,
    /// All of these labels.
    pub labels: BTreeMap<String, NamePattern>,
}

impl Selector {
    /// Whether nothing is named, so that the selector selects nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.attributes.is_empty() && self.labels.is_empty()
    }

    /// Whether a path does not tell enough.
    #[must_use]
    pub fn needs_names(&self) -> bool {
        !self.labels.is_empty() || self.attributes.keys().any(|key| *key != Attribute::Unit)
    }

    /// Whether it selects nothing but containers in pods, and by what their runtime
    /// tells of them.
    #[must_use]
    pub fn is_of_pods(&self) -> bool {
        let names = |attribute| self.attributes.contains_key(&attribute);
        (names(Attribute::Pod) || names(Attribute::Namespace)) && !names(Attribute::Unit)
    }

    /// Whether it selects a cgroup.
    #[must_use]
    pub fn selects(&self, identity: &Identity) -> bool {
        let attribute = |(attribute, patterns): (&Attribute, &Vec<NamePattern>)| {
            attribute.matches(patterns, identity)
        };
        let labels = &identity.names.labels;
        let label = |(key, pattern): (&String, &NamePattern)| {
            labels.get(key).is_some_and(|value| pattern.matches(value))
        };
        !self.is_empty() && self.attributes.iter().all(attribute) && self.labels.iter().all(label)
    }

    /// Whether another one goes by the same attributes and labels, of which the
    /// attributes may have other names.
    fn differs_in_names_only(&self, other: &Self) -> bool {
        self.labels == other.labels && self.attributes.keys().eq(other.attributes.keys())
    }

    /// Adds names that another one has, those of which this is true, where it goes by
    /// the same attributes.
    pub fn add_names_of(&mut self, other: &Self, may: impl Fn(Attribute, &NamePattern) -> bool) {
        if !self.differs_in_names_only(other) {
            return;
        }
        for (attribute, own) in &mut self.attributes {
            let others = other.attributes.get(attribute).into_iter().flatten();
            let known: HashSet<_> = own.iter().map(NamePattern::as_str).collect();
            let new = others.filter(|name| !known.contains(name.as_str()) && may(*attribute, name));
            let new: Vec<_> = new.cloned().collect();
            own.extend(new);
        }
    }

    /// All that it names, each as `pod = shop/web-0` or `label app = web`.
    #[must_use]
    pub fn words(&self) -> BTreeSet<String> {
        let attributes = self.attributes.iter().flat_map(|(attribute, patterns)| {
            let word = move |pattern| format!("{} = {pattern}", attribute.key());
            patterns.iter().map(word)
        });
        let labels = self.labels.iter();
        let labels = labels.map(|(key, pattern)| format!("label {key} = {pattern}"));
        attributes.chain(labels).collect()
    }
}

/// A selector and what is in its place now.
#[derive(Debug)]
pub struct Renaming<'a> {
    before: &'a Selector,
    now: &'a Selector,
    /// Names that only one of them has, where they differ in nothing else.
    names: Option<Vec<(Attribute, Vec<&'a NamePattern>)>>,
}

impl<'a> Renaming<'a> {
    /// What is different.
    #[must_use]
    pub fn new(before: &'a Selector, now: &'a Selector) -> Self {
        let only_in_one = |one: &'a [NamePattern], other: &'a [NamePattern]| {
            let known: HashSet<_> = other.iter().map(NamePattern::as_str).collect();
            one.iter()
                .filter(move |name| !known.contains(name.as_str()))
        };
        let names = before.differs_in_names_only(now).then(|| {
            let both = before.attributes.iter().zip(now.attributes.values());
            both.map(|((attribute, before), now)| {
                let names = only_in_one(before, now).chain(only_in_one(now, before));
                (*attribute, names.collect())
            })
            .collect()
        });
        Self { before, now, names }
    }

    /// Whether it changes whether an identity is selected. Only few names are looked at
    /// where few are others.
    #[must_use]
    pub fn concerns(&self, identity: &Identity) -> bool {
        let is_named = self.names.as_ref().is_none_or(|names| {
            let mut names = names.iter();
            names.any(|(attribute, names)| attribute.matches(names.iter().copied(), identity))
        });
        is_named && self.before.selects(identity) != self.now.selects(identity)
    }
}

/// The template that a unit is an instance of, else the unit:
/// `getty@.service` for `getty@tty1.service`.
fn template_of(unit: &str) -> Cow<'_, str> {
    match (unit.split_once('@'), unit.rsplit_once('.')) {
        (Some((name, _)), Some((_, kind))) => format!("{name}@.{kind}").into(),
        _ => unit.into(),
    }
}

/// As a person would write it: `container = db-*, label app = web`.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        for (attribute, patterns) in &self.attributes {
            let patterns: Vec<_> = patterns.iter().map(NamePattern::as_str).collect();
            words.push(format!("{} = {}", attribute.key(), patterns.join(" or ")));
        }
        for (key, pattern) in &self.labels {
            words.push(format!("label {key} = {pattern}"));
        }
        f.write_str(&words.join(", "))
    }
}

/// A name, or a glob over names: `*` and `?` match any characters.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePattern {
    text: String,
    glob: Option<GlobMatcher>,
}

impl NamePattern {
    /// Checks a name or glob as it stands in the config.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("must not be empty".to_owned());
        }
        let glob = text
            .contains(['*', '?', '[', '{'])
            .then(|| {
                GlobBuilder::new(text)
                    .literal_separator(false)
                    // systemd writes `-` in unit names as `\x2d`.
                    .backslash_escape(false)
                    .build()
                    .map_err(|error| format!("not a glob: {}", error.kind()))
            })
            .transpose()?;
        Ok(Self {
            text: text.to_owned(),
            glob: glob.map(|glob| glob.compile_matcher()),
        })
    }

    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether a name is meant.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match &self.glob {
            Some(glob) => glob.is_match(name),
            None => self.text == name,
        }
    }
}

impl PartialEq for NamePattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for NamePattern {}

impl FromStr for NamePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::new(text)
    }
}

impl TryFrom<String> for NamePattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::new(&text)
    }
}

impl From<NamePattern> for String {
    fn from(pattern: NamePattern) -> Self {
        pattern.text
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
