//! Watch: keeps what is known of the cluster up to date.
//!
//! What was known stays known while the API is away or lists anew: a list takes
//! its place only when it is complete.

use std::{collections::BTreeMap, fmt::Debug, pin::Pin};

use futures::{FutureExt as _, Stream, StreamExt as _, future::ready, stream::select_all};
use k8s_openapi::api::core::v1 as core;
use kube::{
    Api, Client, Resource,
    api::DynamicObject,
    runtime::{WatchStreamExt as _, watcher},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tracing::warn;

use crate::{
    api::{ANNOTATION, Kind},
    metadata::Named,
    objects::{Labels, NodeReport, Objects, Pod, PodId, PolicyId, PolicyObject, pod_id},
};

/// For whom.
#[derive(Clone, Debug)]
pub enum Audience {
    /// A node with this name: its pods.
    Node(String),
    /// The controller: what all nodes report.
    Controller,
}

/// One step in a list of objects, or a change of one.
#[derive(Clone, Debug)]
pub enum Step<K, V> {
    /// A list begins.
    Begin,
    /// One of the list.
    Listed(K, V),
    /// The list is complete.
    Complete,
    /// One is new or another now.
    Set(K, V),
    /// One is gone.
    Gone(K),
}

/// Something that the API told.
#[derive(Clone, Debug)]
pub enum Change {
    /// Of the pods of this node.
    Pod(Step<PodId, Pod>),
    /// Of the namespaces.
    Namespace(Step<String, Labels>),
    /// Of the policies of namespaces.
    Policy(Step<PolicyId, PolicyObject>),
    /// Of the policies of the cluster.
    ClusterPolicy(Step<PolicyId, PolicyObject>),
    /// Of the reports of nodes.
    Node(Step<String, NodeReport>),
}

/// Changes, for as long as anybody reads them.
pub type Changes = Pin<Box<dyn Stream<Item = Change> + Send>>;

/// Watches all that an audience needs. Errors are logged, and tried again with
/// more and more time between.
#[must_use]
pub fn changes(client: &Client, audience: &Audience) -> Changes {
    let dynamic = |kind: Kind| Api::<DynamicObject>::all_with(client.clone(), &kind.resource());
    let all = watcher::Config::default;
    let mut streams = vec![
        steps(
            "namespaces",
            Api::<Named<core::Namespace>>::all(client.clone()),
            all(),
            |object| {
                Some((
                    object.metadata.name?,
                    object.metadata.labels.unwrap_or_default(),
                ))
            },
            Change::Namespace,
        ),
        steps(
            Kind::Policy.plural(),
            dynamic(Kind::Policy),
            all(),
            policy,
            Change::Policy,
        ),
        steps(
            Kind::ClusterPolicy.plural(),
            dynamic(Kind::ClusterPolicy),
            all(),
            policy,
            Change::ClusterPolicy,
        ),
    ];
    streams.push(match audience {
        Audience::Node(node) => steps(
            "pods",
            Api::<Named<core::Pod>>::all(client.clone()),
            all().fields(&format!("spec.nodeName={node}")),
            pod,
            Change::Pod,
        ),
        Audience::Controller => steps(
            Kind::Node.plural(),
            dynamic(Kind::Node),
            all(),
            report,
            Change::Node,
        ),
    });
    select_all(streams).boxed()
}

/// The steps of one kind of objects.
fn steps<O, K, V>(
    what: &'static str,
    api: Api<O>,
    config: watcher::Config,
    read: fn(O) -> Option<(K, V)>,
    change: fn(Step<K, V>) -> Change,
) -> Changes
where
    O: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    K: Send + 'static,
    V: Send + 'static,
{
    let step = move |event| {
        let step = match event {
            Ok(watcher::Event::Init) => Some(Step::Begin),
            Ok(watcher::Event::InitApply(object)) => {
                read(object).map(|(key, value)| Step::Listed(key, value))
            }
            Ok(watcher::Event::InitDone) => Some(Step::Complete),
            Ok(watcher::Event::Apply(object)) => {
                read(object).map(|(key, value)| Step::Set(key, value))
            }
            Ok(watcher::Event::Delete(object)) => read(object).map(|(key, _)| Step::Gone(key)),
            Err(error) => {
                let error = anyhow::Error::new(error);
                warn!("watching {what}: {error:#}; what was known goes on");
                None
            }
        };
        ready(step.map(change))
    };
    watcher(api, config)
        .default_backoff()
        .filter_map(step)
        .boxed()
}

fn pod(object: Named<core::Pod>) -> Option<(PodId, Pod)> {
    let id = pod_id(&object.metadata)?;
    let mut annotations = object.metadata.annotations.unwrap_or_default();
    Some((
        id,
        Pod {
            labels: object.metadata.labels.unwrap_or_default(),
            policy: annotations.remove(ANNOTATION),
        },
    ))
}

fn policy(mut object: DynamicObject) -> Option<(PolicyId, PolicyObject)> {
    let mut take = |key: &str| match object.data.get_mut(key).map(Value::take) {
        Some(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let (spec, status) = (take("spec"), take("status"));
    let metadata = object.metadata;
    Some((
        PolicyId {
            namespace: metadata.namespace,
            name: metadata.name?,
        },
        PolicyObject {
            uid: metadata.uid.unwrap_or_default(),
            generation: metadata.generation.unwrap_or_default(),
            spec,
            status,
        },
    ))
}

fn report(object: DynamicObject) -> Option<(String, NodeReport)> {
    let policies = object
        .data
        .pointer("/status/policies")
        .and_then(Value::as_object);
    let generation = |(id, value): (&String, &Value)| Some((id.clone(), value.as_i64()?));
    let policies = policies
        .into_iter()
        .flatten()
        .filter_map(generation)
        .collect();
    Some((object.metadata.name?, NodeReport(policies)))
}

/// What is known now that was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Of policies or namespaces.
    pub rules: bool,
    /// Of anything else.
    pub others: bool,
}

impl News {
    /// Whether there is any.
    #[must_use]
    pub const fn is_any(self) -> bool {
        self.rules || self.others
    }
}

/// What is known, and how far the lists are.
#[derive(Debug, Default)]
pub struct Watched {
    /// What is known; all of it once [`Self::is_complete`].
    pub objects: Objects,
    pods: List<PodId, Pod>,
    namespaces: List<String, Labels>,
    policies: List<PolicyId, PolicyObject>,
    cluster_policies: List<PolicyId, PolicyObject>,
    nodes: List<String, NodeReport>,
}

impl Watched {
    /// Takes over a change, and what else is there already, to be written with it.
    /// What is known now that was not: most of what the API tells of a pod is about its
    /// status.
    pub fn apply_all(&mut self, change: Change, more: &mut Changes) -> News {
        let mut news = self.apply_one(change);
        while let Some(Some(change)) = more.next().now_or_never() {
            let more = self.apply_one(change);
            news.rules |= more.rules;
            news.others |= more.others;
        }
        news
    }

    fn apply_one(&mut self, change: Change) -> News {
        let is_of_rules = matches!(
            change,
            Change::Namespace(_) | Change::Policy(_) | Change::ClusterPolicy(_)
        );
        let is_news = self.apply(change);
        News {
            rules: is_news && is_of_rules,
            others: is_news && !is_of_rules,
        }
    }

    /// Takes over a change; whether anything is known now that was not.
    pub fn apply(&mut self, change: Change) -> bool {
        let objects = &mut self.objects;
        match change {
            Change::Pod(step) => self.pods.apply(&mut objects.pods, |_| true, step),
            Change::Namespace(step) => {
                self.namespaces
                    .apply(&mut objects.namespaces, |_| true, step)
            }
            Change::Policy(step) => {
                let is_one = |id: &PolicyId| id.namespace.is_some();
                self.policies.apply(&mut objects.policies, is_one, step)
            }
            Change::ClusterPolicy(step) => {
                let is_one = |id: &PolicyId| id.namespace.is_none();
                self.cluster_policies
                    .apply(&mut objects.policies, is_one, step)
            }
            Change::Node(step) => self.nodes.apply(&mut objects.nodes, |_| true, step),
        }
    }

    /// Whether everything was listed once: until then less is known than there is.
    #[must_use]
    pub fn is_complete(&self, audience: &Audience) -> bool {
        let own = match audience {
            Audience::Node(_) => self.pods.was_complete,
            Audience::Controller => self.nodes.was_complete,
        };
        own && self.namespaces.was_complete
            && self.policies.was_complete
            && self.cluster_policies.was_complete
    }
}

/// A list that is under way.
#[derive(Debug)]
struct List<K, V> {
    listed: BTreeMap<K, V>,
    was_complete: bool,
}

impl<K, V> Default for List<K, V> {
    fn default() -> Self {
        Self {
            listed: BTreeMap::new(),
            was_complete: false,
        }
    }
}

impl<K: Ord, V: PartialEq> List<K, V> {
    /// `is_one` tells which of those that are known belong to this list. Whether what
    /// is known is another now.
    fn apply(
        &mut self,
        known: &mut BTreeMap<K, V>,
        is_one: impl Fn(&K) -> bool,
        step: Step<K, V>,
    ) -> bool {
        match step {
            Step::Begin => {
                self.listed.clear();
                false
            }
            Step::Listed(key, value) => {
                self.listed.insert(key, value);
                false
            }
            Step::Complete => {
                known.retain(|key, _| !is_one(key));
                known.append(&mut self.listed);
                self.was_complete = true;
                true
            }
            Step::Set(key, value) => {
                let is_news = known.get(&key) != Some(&value);
                known.insert(key, value);
                is_news
            }
            Step::Gone(key) => known.remove(&key).is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(step: &Step<&str, u8>) -> Change {
        let labels = |value: u8| Labels::from([("n".to_owned(), value.to_string())]);
        Change::Namespace(match step {
            Step::Begin => Step::Begin,
            Step::Listed(key, value) => Step::Listed((*key).to_owned(), labels(*value)),
            Step::Complete => Step::Complete,
            Step::Set(key, value) => Step::Set((*key).to_owned(), labels(*value)),
            Step::Gone(key) => Step::Gone((*key).to_owned()),
        })
    }

    fn names(watched: &Watched) -> Vec<&str> {
        watched
            .objects
            .namespaces
            .keys()
            .map(String::as_str)
            .collect()
    }

    #[test]
    fn what_was_known_stays_until_a_list_is_complete() {
        let mut watched = Watched::default();
        for step in [Step::Begin, Step::Listed("a", 1), Step::Listed("b", 1)] {
            watched.apply(namespace(&step));
        }
        assert!(names(&watched).is_empty());
        watched.apply(namespace(&Step::Complete));
        assert_eq!(names(&watched), ["a", "b"]);
        for step in [
            Step::Set("c", 1),
            Step::Gone("a"),
            Step::Begin,
            Step::Listed("c", 1),
        ] {
            watched.apply(namespace(&step));
        }
        assert_eq!(names(&watched), ["b", "c"]);
        watched.apply(namespace(&Step::Complete));
        assert_eq!(names(&watched), ["c"]);
    }

    #[test]
    fn what_is_known_already_is_no_news() {
        let mut watched = Watched::default();
        for (step, is_news) in [
            (Step::Begin, false),
            (Step::Listed("a", 1), false),
            (Step::Complete, true),
            (Step::Set("a", 1), false),
            (Step::Set("a", 2), true),
            (Step::Set("b", 1), true),
            (Step::Gone("b"), true),
            (Step::Gone("b"), false),
        ] {
            assert_eq!(watched.apply(namespace(&step)), is_news, "{step:?}");
        }
    }

    #[test]
    fn a_list_of_one_kind_of_policies_leaves_the_other() {
        let policy = |namespace: Option<&str>| {
            let id = PolicyId {
                namespace: namespace.map(str::to_owned),
                name: "web".to_owned(),
            };
            Step::Set(id, PolicyObject::default())
        };
        let mut watched = Watched::default();
        watched.apply(Change::Policy(policy(Some("shop"))));
        watched.apply(Change::ClusterPolicy(policy(None)));
        assert_eq!(watched.objects.policies.len(), 2);
        watched.apply(Change::Policy(Step::Begin));
        watched.apply(Change::Policy(Step::Complete));
        let left: Vec<_> = watched
            .objects
            .policies
            .keys()
            .map(ToString::to_string)
            .collect();
        assert_eq!(left, ["web"]);
    }

    #[test]
    fn all_lists_are_waited_for() {
        let audience = Audience::Node("n1".to_owned());
        let mut watched = Watched::default();
        let complete = [
            Change::Pod(Step::Complete),
            Change::Namespace(Step::Complete),
            Change::Policy(Step::Complete),
            Change::ClusterPolicy(Step::Complete),
        ];
        for change in complete {
            assert!(!watched.is_complete(&audience));
            watched.apply(change);
        }
        assert!(watched.is_complete(&audience));
        assert!(!watched.is_complete(&Audience::Controller));
    }
}
