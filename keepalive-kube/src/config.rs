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
    objects::{Labels, Pod, PodId, PolicyId, PolicyObject},
    policy::{self, Policy, Refusal},
};

/// A drop-in.
#[derive(Clone, Debug, PartialEq)]
pub struct Compiled {
    /// What is in it.
    pub text: String,
    /// What the policies in it are called.
    pub names: BTreeSet<String>,
}

const HEAD: &str = "# Written by keepalive-kube, which writes it anew each time.\n";

/// Begins the names of policies, so that none of the node's own is overridden.
const PREFIX: &str = "kube:";

/// How long a policy's name may be in a config, in characters.
const LONGEST: usize = 64;

/// More policies in the cluster are not written before they select a pod of the node.
const MOST_AHEAD: usize = 32;

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

/// What policies come to, whatever pods there are: reading them takes far longer than
/// finding the pods that they select, and they change far more rarely.
#[derive(Debug, Default)]
pub struct Rules {
    /// In the order of precedence.
    rules: Vec<Rule>,
    /// Whether each policy is in a drop-in, or would be if it selected a pod of the node.
    pub verdicts: BTreeMap<PolicyId, Result<(), Refusal>>,
}

/// One `[[policy]]` of a drop-in.
#[derive(Debug)]
struct Rule {
    name: String,
    /// Its lines but for the names of those that it selects.
    lines: String,
    whom: Whom,
}

/// For whom a policy is.
#[derive(Debug)]
enum Whom {
    /// Whatever it says itself, as its namespace.
    Given,
    /// The namespaces that it selects.
    Namespaces(Vec<String>),
    /// Pods of a namespace whose annotation names a policy.
    Annotated(String, String),
    /// Pods of a namespace.
    PodsOf(String, Selector),
    /// Pods of these namespaces.
    Pods(BTreeSet<String>, Selector),
}

impl Rules {
    /// The rules of these policies, in these namespaces.
    #[must_use]
    pub fn new(
        objects: &BTreeMap<PolicyId, PolicyObject>,
        namespaces: &BTreeMap<String, Labels>,
    ) -> Self {
        let mut verdicts = BTreeMap::new();
        let mut policies = BTreeMap::new();
        for (id, object) in objects {
            match Policy::read(id, &object.spec) {
                Ok(policy) => {
                    policies.insert(id, policy);
                }
                Err(refusal) => {
                    verdicts.insert(id.clone(), Err(refusal));
                }
            }
        }
        let mut ranks: [Vec<Rule>; 3] = Default::default();
        for (id, policy) in &policies {
            let rules = match &id.namespace {
                Some(namespace) => of_namespace(policy, namespace, namespaces, &policies),
                None => of_cluster(policy, namespaces).map(|rule| [None, None, Some(rule)]),
            };
            let verdict = rules.map(|rules| {
                for (rank, rule) in ranks.iter_mut().zip(rules) {
                    rank.extend(rule);
                }
            });
            verdicts.insert((*id).clone(), verdict);
        }
        Self {
            rules: ranks.into_iter().flatten().collect(),
            verdicts,
        }
    }

    /// The names of policies that are to be written before they select a pod: the first
    /// pod that one selects then has it with its first connection, without another
    /// policy set. Where there are too many that is only for those that once selected
    /// one.
    #[must_use]
    pub fn ahead(&self) -> BTreeSet<String> {
        if self.verdicts.len() > MOST_AHEAD {
            return BTreeSet::new();
        }
        self.rules.iter().map(|rule| rule.name.clone()).collect()
    }

    /// Makes a drop-in.
    ///
    /// A policy comes into it with the first pod that it selects. Of those that were
    /// `written` before, one that selects none any more stays, for nobody: a policy
    /// that comes or goes takes a policy set of the agent, another name takes nothing.
    #[must_use]
    pub fn drop_in(&self, pods: &BTreeMap<PodId, Pod>, written: &BTreeSet<String>) -> Compiled {
        let mut text = HEAD.to_owned();
        let mut names = BTreeSet::new();
        for rule in &self.rules {
            let Some(whom) = rule.whom(pods, written) else {
                continue;
            };
            text.push_str("[[policy]]\n");
            text.push_str(&rule.lines);
            text.push_str(&whom);
            names.insert(rule.name.clone());
        }
        Compiled { text, names }
    }
}

impl Rule {
    fn new(name: String, mut keys: toml::Table, whom: Whom) -> Self {
        keys.insert("name".to_owned(), name.clone().into());
        Self {
            name,
            lines: policy::lines(&keys),
            whom,
        }
    }

    /// The line that says for whom it is; none where it is not to be written, as a list
    /// must not be empty.
    fn whom(&self, pods: &BTreeMap<PodId, Pod>, written: &BTreeSet<String>) -> Option<String> {
        let plain = || pods.iter().filter(|(id, _)| is_plain(&id.name));
        let (key, names): (_, Vec<_>) = match &self.whom {
            Whom::Given => return Some(String::new()),
            Whom::Namespaces(names) => ("namespace", names.clone()),
            Whom::Annotated(namespace, policy) => {
                let named = plain().filter(|(id, pod)| {
                    id.namespace == *namespace && pod.policy.as_ref() == Some(policy)
                });
                ("pod", named.map(|(id, _)| id.name.clone()).collect())
            }
            Whom::PodsOf(namespace, selector) => {
                let selected = plain().filter(|(id, pod)| {
                    id.namespace == *namespace && selector.matches(&pod.labels)
                });
                ("pod", selected.map(|(id, _)| id.name.clone()).collect())
            }
            Whom::Pods(namespaces, selector) => {
                let selected = plain().filter(|(id, pod)| {
                    namespaces.contains(&id.namespace) && selector.matches(&pod.labels)
                });
                let name = |id: &PodId| format!("{}/{}", id.namespace, id.name);
                ("pod", selected.map(|(id, _)| name(id)).collect())
            }
        };
        let names = if !names.is_empty() {
            names.join("\", \"")
        } else if written.contains(&self.name) {
            NOBODY.to_owned()
        } else {
            return None;
        };
        Some(format!("{key} = [\"{names}\"]\n"))
    }
}

/// What a policy of a namespace comes to: for the pods whose annotation names it,
/// and for those that it selects.
fn of_namespace(
    policy: &Policy,
    namespace: &str,
    namespaces: &BTreeMap<String, Labels>,
    policies: &BTreeMap<&PolicyId, Policy>,
) -> Result<[Option<Rule>; 3], Refusal> {
    // Without its labels nobody knows which bounds hold.
    let Some(labels) = namespaces.get(namespace) else {
        return Ok([None, None, None]);
    };
    let is_above =
        |above: &&Policy| above.id.namespace.is_none() && above.namespaces.matches(labels);
    let cluster: Vec<_> = policies.values().filter(is_above).collect();
    let mut keys = bounds::within(policy, &cluster)?;
    check(&keys)?;
    keys.insert("namespace".to_owned(), namespace.into());
    let annotated = Whom::Annotated(namespace.to_owned(), policy.id.name.clone());
    let selected = if policy.pods.selects_all() {
        Whom::Given
    } else {
        Whom::PodsOf(namespace.to_owned(), policy.pods.clone())
    };
    let annotated = Rule::new(name(&policy.id, " by annotation"), keys.clone(), annotated);
    let selected = Rule::new(name(&policy.id, ""), keys, selected);
    Ok([Some(annotated), Some(selected), None])
}

/// What a policy of the cluster comes to.
fn of_cluster(policy: &Policy, namespaces: &BTreeMap<String, Labels>) -> Result<Rule, Refusal> {
    let selected = namespaces
        .iter()
        .filter(|(id, labels)| is_plain(id) && policy.namespaces.matches(labels));
    let selected = selected.map(|(id, _)| id.clone());
    let whom = if !policy.pods.selects_all() {
        Whom::Pods(selected.collect(), policy.pods.clone())
    } else if policy.namespaces.selects_all() {
        // New namespaces too, before anybody has told of them.
        Whom::Namespaces(vec!["*".to_owned()])
    } else {
        Whom::Namespaces(selected.collect())
    };
    check(&policy.keys)?;
    Ok(Rule::new(name(&policy.id, ""), policy.keys.clone(), whom))
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
