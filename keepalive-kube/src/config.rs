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
    /// Whether each policy is in it, or would be if it selected a pod of this node.
    pub verdicts: BTreeMap<PolicyId, Result<(), Refusal>>,
}

const HEAD: &str = "# Written by keepalive-kube, which writes it anew each time.\n";

/// Begins the names of policies, so that none of the node's own is overridden.
const PREFIX: &str = "kube:";

/// How long a policy's name may be in a config, in characters.
const LONGEST: usize = 64;

/// Makes a drop-in of all that is known.
#[must_use]
pub fn compile(objects: &Objects) -> Compiled {
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
            Some(namespace) => of_namespace(objects, policy, namespace, &policies),
            None => of_cluster(objects, policy).map(|table| [None, None, table]),
        };
        let verdict = tables.map(|tables| {
            for (rank, table) in ranks.iter_mut().zip(tables) {
                rank.extend(table);
            }
        });
        verdicts.insert((*id).clone(), verdict);
    }
    let text = format!("{HEAD}{}", policy::text(ranks.iter().flatten()));
    Compiled { text, verdicts }
}

/// What a policy of a namespace comes to: for the pods whose annotation names it,
/// and for those that it selects.
fn of_namespace(
    objects: &Objects,
    policy: &Policy,
    namespace: &str,
    policies: &BTreeMap<&PolicyId, Policy>,
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
        table.insert("name".to_owned(), name.into());
        table.insert("namespace".to_owned(), namespace.into());
        match pods {
            // A list must not be empty.
            Some(pods) if pods.is_empty() => return None,
            Some(pods) => table.insert("pod".to_owned(), pods.into()),
            None => None,
        };
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
fn of_cluster(objects: &Objects, policy: &Policy) -> Result<Option<toml::Table>, Refusal> {
    let mut table = policy.keys.clone();
    table.insert("name".to_owned(), name(&policy.id, "").into());
    let namespaces: BTreeSet<_> = objects
        .namespaces
        .iter()
        .filter(|(name, labels)| is_plain(name) && selects(&policy.namespaces, labels))
        .map(|(name, _)| name.as_str())
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
    if values.is_empty() {
        return Ok(None);
    }
    table.insert(key.to_owned(), values.into());
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
