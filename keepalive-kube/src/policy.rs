//! Policy: one object of the API, read by the reader of the agent's config.

use std::{fmt::Write as _, path::Path};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use keepalive_agent::config::{
    Config,
    keys::{self, Key},
};
use keepalive_common::policy::Policy as Values;
use kube::core::Selector;
use serde::Deserialize as _;
use serde_json::{Map, Value};

use crate::objects::PolicyId;

/// What selects pods, beside the keys that claim.
pub const POD_SELECTOR: &str = "podSelector";

/// What selects namespaces, in a policy of the cluster.
pub const NAMESPACE_SELECTOR: &str = "namespaceSelector";

/// Keys of a `[[policy]]` that select connections of the pods.
const CLAIMS: [&str; 4] = ["container", "remote", "port", "local-port"];

/// The keys of TOML that a policy of the API has.
pub fn keys() -> impl Iterator<Item = &'static Key> {
    let claims = keys::CLAIM.iter().filter(|key| CLAIMS.contains(&key.name));
    claims.chain(&keys::POLICY)
}

/// Why a policy is not in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It says what no agent understands.
    #[error("{0}")]
    Invalid(String),
    /// It leaves what a policy of the cluster allows.
    #[error("{0}")]
    OutOfBounds(String),
}

impl Refusal {
    /// In a word, for a condition.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "Invalid",
            Self::OutOfBounds(_) => "OutOfBounds",
        }
    }
}

/// A policy that an agent understands.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Whose it is.
    pub id: PolicyId,
    /// Which pods; all where it selects none.
    pub pods: Selector,
    /// Which namespaces, of a policy of the cluster.
    pub namespaces: Selector,
    /// The rest of it, as it goes into a `[[policy]]`.
    pub keys: toml::Table,
    /// What it comes to where nothing but the built-in policy is above it.
    pub values: Values,
}

impl Policy {
    /// Reads the spec of an object.
    ///
    /// # Errors
    ///
    /// [`Refusal::Invalid`] with everything that is wrong in it.
    pub fn read(id: &PolicyId, spec: &Map<String, Value>) -> Result<Self, Refusal> {
        let mut keys = toml::Table::new();
        let (mut pods, mut namespaces) = (Selector::default(), Selector::default());
        for (name, value) in spec {
            match name.as_str() {
                POD_SELECTOR => pods = selector(name, value)?,
                NAMESPACE_SELECTOR if id.namespace.is_none() => {
                    namespaces = selector(name, value)?;
                }
                known if self::keys().any(|key| key.name == known) => {
                    if let Some(value) = toml_of(value) {
                        keys.insert(name.clone(), value);
                    }
                }
                _ => return Err(Refusal::Invalid(format!("spec.{name}: unknown key"))),
            }
        }
        let mut whole = keys.clone();
        // Something that every policy must have; where it is for is not of interest.
        whole.insert("name".to_owned(), "policy".into());
        whole.insert("namespace".to_owned(), "*".into());
        let config = parse(&text([&whole]))?;
        let values = config.policies.first().map(|policy| policy.policy);
        Ok(Self {
            id: id.clone(),
            pods,
            namespaces,
            keys,
            values: values.unwrap_or(Values::BUILT_IN),
        })
    }
}

/// Policies as a config.
pub(crate) fn text<'a>(policies: impl IntoIterator<Item = &'a toml::Table>) -> String {
    let mut text = String::new();
    for policy in policies {
        text.push_str("[[policy]]\n");
        text.push_str(&lines(policy));
    }
    text
}

/// Each key of a policy on a line of its own.
pub(crate) fn lines(policy: &toml::Table) -> String {
    let mut lines = String::new();
    for (key, value) in policy {
        // Writing to a string cannot fail.
        let _ = writeln!(lines, "{key} = {value}");
    }
    lines
}

/// Reads a config as the agent does; what is wrong is told by the keys of a spec.
pub(crate) fn parse(text: &str) -> Result<Config, Refusal> {
    let (config, _) = Config::parse(Path::new("spec"), text).map_err(|errors| {
        let lines = errors.0.iter().map(|error| {
            let key = error.key.replacen("policy", "spec", 1);
            let value = error.value.as_ref().map(|value| format!(" = {value}"));
            format!("{key}{}: {}", value.unwrap_or_default(), error.message)
        });
        Refusal::Invalid(lines.collect::<Vec<_>>().join("; "))
    })?;
    Ok(config)
}

fn selector(key: &str, value: &Value) -> Result<Selector, Refusal> {
    let wrong = |error: &dyn std::fmt::Display| Refusal::Invalid(format!("spec.{key}: {error}"));
    let labels = LabelSelector::deserialize(value).map_err(|error| wrong(&error))?;
    Selector::try_from(labels).map_err(|error| wrong(&error))
}

/// The same value in TOML, which has no null.
fn toml_of(value: &Value) -> Option<toml::Value> {
    toml::Value::try_from(value).ok()
}
