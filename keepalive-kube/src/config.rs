//! Config: the drop-in that all objects together come to.
//!
//! What comes first in it wins, so its order is the precedence: policies that a
//! pod's annotation names, those of namespaces, those of the cluster, and each of
//! these by name.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use kube::core::{Selector, SelectorExt as _};

use crate::{
    bounds,
    objects::{Objects, PodId, PolicyId},
    policy::{self, Policy, Refusal},
};

/// What objects come to.
#[derive(Clone, Debug, PartialEq)]
pub struct Compiled {
    /// The drop-in.
    pub text: String,
    /// What the policies in it are called.
    pub names: BTreeSet<String>,
    /// Whether each policy is in it, or would be if it selected a pod of this node.
    pub verdicts: BTreeMap<PolicyId, Result<(), Refusal>>,
}

const HEAD: &str = "# Written by keepalive-kube, which writes it anew each time.\n";

/// Begins the names of policies, so that none of the node's own is overridden.
const PREFIX: &str = "kube:";

/// How long a policy's name may be in a config, in characters.
const LONGEST: usize = 64;

/// What no pod or namespace is called.
const NOBODY: &str = "-";

/// What the policies of a drop-in are called that somebody has written earlier; none
/// where the agent would not take it.
#[must_use]
pub fn names(text: &str) -> BTreeSet<String> {
    let config = policy::parse(text).ok();
    let policies = config.into_iter().flat_map(|config| config.policies);
    policies.map(|policy| policy.name).collect()
}

/// Makes a drop-in of all that is known.
///
/// A policy comes into it with the first pod of this node that it selects. Of those
/// that were `written` before, one that selects none any more stays, for nobody: a
/// policy that comes or goes takes a policy set of the agent, another name takes
/// nothing.
#[must_use]
pub fn compile(objects: &Objects, written: &BTreeSet<String>) -> Compiled {
    let mut verdicts = BTreeMap::new();
    let mut policies = BTreeMap::new();
    for (id, object) in &objects.policies {
        match Policy::read(id, &object.spec) {
            Ok(policy) => {
                policies.insert(id, policy);
            }
            Err(refusal) => {
                verdicts.insert(id.clone(), Err(refusal));
            }
        }
    }
    let mut ranks: [Vec<toml::Table>; 3] = Default::default();
    for (id, policy) in &policies {
        let tables = match &id.namespace {
            Some(namespace) => of_namespace(objects, policy, namespace, &policies, written),
            None => of_cluster(objects, policy, written).map(|table| [None, None, table]),
        };
        let verdict = tables.map(|tables| {
            for (rank, table) in ranks.iter_mut().zip(tables) {
                rank.extend(table);
            }
        });
        verdicts.insert((*id).clone(), verdict);
    }
    let tables = || ranks.iter().flatten();
    let name = |table: &toml::Table| table.get("name")?.as_str().map(str::to_owned);
    Compiled {
        text: format!("{HEAD}{}", policy::text(tables())),
        names: tables().filter_map(name).collect(),
        verdicts,
    }
}

/// The names of pods or namespaces that a policy is for; none where it is not to be
/// written, as a list must not be empty.
fn whom(
    selected: Vec<toml::Value>,
    policy: &str,
    written: &BTreeSet<String>,
) -> Option<toml::Value> {
    if !selected.is_empty() {
        return Some(selected.into());
    }
    written.contains(policy).then(|| vec![NOBODY].into())
}

/// What a policy of a namespace comes to: for the pods whose annotation names it,
/// and for those that it selects.
fn of_namespace(
    objects: &Objects,
    policy: &Policy,
    namespace: &str,
    policies: &BTreeMap<&PolicyId, Policy>,
    written: &BTreeSet<String>,
) -> Result<[Option<toml::Table>; 3], Refusal> {
    // Without its labels nobody knows which bounds hold.
    let Some(labels) = objects.namespaces.get(namespace) else {
        return Ok([None, None, None]);
    };
    let is_above =
        |above: &&Policy| above.id.namespace.is_none() && selects(&above.namespaces, labels);
    let cluster: Vec<_> = policies.values().filter(is_above).collect();
    let keys = bounds::within(policy, &cluster)?;
    let table = |name: String, pods: Option<Vec<toml::Value>>| {
        let mut table = keys.clone();
        if let Some(pods) = pods {
            table.insert("pod".to_owned(), whom(pods, &name, written)?);
        }
        table.insert("name".to_owned(), name.into());
        table.insert("namespace".to_owned(), namespace.into());
        Some(table)
    };
    let own = objects
        .pods
        .iter()
        .filter(|(id, _)| id.namespace == namespace && is_plain(&id.name));
    let named = own
        .clone()
        .filter(|(_, pod)| pod.policy.as_ref() == Some(&policy.id.name))
        .map(|(id, _)| id.name.clone().into());
    let selected = own
        .filter(|(_, pod)| selects(&policy.pods, &pod.labels))
        .map(|(id, _)| id.name.clone().into());
    let selected = (!policy.pods.selects_all()).then(|| selected.collect());
    let tables = [
        table(name(&policy.id, " by annotation"), Some(named.collect())),
        table(name(&policy.id, ""), selected),
        None,
    ];
    check(&keys).map(|()| tables)
}

/// What a policy of the cluster comes to.
fn of_cluster(
    objects: &Objects,
    policy: &Policy,
    written: &BTreeSet<String>,
) -> Result<Option<toml::Table>, Refusal> {
    let mut table = policy.keys.clone();
    let name = name(&policy.id, "");
    let namespaces: BTreeSet<_> = objects
        .namespaces
        .iter()
        .filter(|(id, labels)| is_plain(id) && selects(&policy.namespaces, labels))
        .map(|(id, _)| id.as_str())
        .collect();
    let value = |text: &str| toml::Value::String(text.to_owned());
    let (key, values): (_, Vec<_>) = if !policy.pods.selects_all() {
        let is_selected = |(id, labels): (&PodId, _)| {
            is_plain(&id.name)
                && namespaces.contains(id.namespace.as_str())
                && selects(&policy.pods, labels)
        };
        let pods = objects.pods.iter().map(|(id, pod)| (id, &pod.labels));
        let pods = pods.filter(|pod| is_selected(*pod));
        (
            "pod",
            pods.map(|(id, _)| value(&format!("{}/{}", id.namespace, id.name)))
                .collect(),
        )
    } else if policy.namespaces.selects_all() {
        // New namespaces too, before anybody has told of them.
        ("namespace", vec![value("*")])
    } else {
        ("namespace", namespaces.into_iter().map(value).collect())
    };
    check(&policy.keys)?;
    let Some(whom) = whom(values, &name, written) else {
        return Ok(None);
    };
    table.insert(key.to_owned(), whom);
    table.insert("name".to_owned(), name.into());
    Ok(Some(table))
}

/// One error in a drop-in, and the agent uses nothing of its whole config. So what
/// is put into it is read first.
fn check(keys: &toml::Table) -> Result<(), Refusal> {
    let mut table = keys.clone();
    table.insert("name".to_owned(), "policy".into());
    table.insert("namespace".to_owned(), "*".into());
    let read = policy::parse(&policy::text([&table])).map(drop);
    // Each was right by itself.
    read.map_err(|refusal| Refusal::OutOfBounds(refusal.to_string()))
}

/// An empty selector selects everything.
fn selects(selector: &Selector, labels: &BTreeMap<String, String>) -> bool {
    selector.matches(labels)
}

/// Whether a name is one that the API gives, so that none becomes a glob.
fn is_plain(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    !name.is_empty() && name.bytes().all(is_allowed)
}

/// What a policy is called in reports: `kube:shop/web`. No two names become the
/// same.
fn name(id: &PolicyId, suffix: &str) -> String {
    let whole = format!("{PREFIX}{id}{suffix}");
    if whole.chars().count() <= LONGEST {
        return whole;
    }
    let mut hasher = DefaultHasher::new();
    whole.hash(&mut hasher);
    let hash = format!("~{:016x}", hasher.finish());
    let begin: String = whole.chars().take(LONGEST - hash.len()).collect();
    begin + &hash
}
