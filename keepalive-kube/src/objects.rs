//! Objects: what is known of the cluster, as small as it is needed.

use std::{collections::BTreeMap, fmt};

use kube::api::ObjectMeta;
use serde_json::{Map, Value};

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Whose policy it is. Those of the cluster come first in the order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyId {
    /// None for one of the cluster.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// `shop/web`, or `web` for one of the cluster.
impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        f.write_str(&self.name)
    }
}

/// Which pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodId {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// A pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its labels.
    pub labels: Labels,
    /// The policy that its annotation names.
    pub policy: Option<String>,
}

/// A policy as it stands in the API.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicyObject {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.generation`: counts changes of the spec.
    pub generation: i64,
    /// `spec`.
    pub spec: Map<String, Value>,
    /// `status`; empty where nobody has written any.
    pub status: Map<String, Value>,
}

/// Which generation of which policies a node has in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeReport(pub BTreeMap<String, i64>);

/// All that is known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    /// Pods of this node.
    pub pods: BTreeMap<PodId, Pod>,
    /// Labels of all namespaces.
    pub namespaces: BTreeMap<String, Labels>,
    /// Policies of both kinds.
    pub policies: BTreeMap<PolicyId, PolicyObject>,
    /// What nodes report; the controller asks for it.
    pub nodes: BTreeMap<String, NodeReport>,
}

/// The id of an object that has a namespace; none where it is no object at all.
pub(crate) fn pod_id(metadata: &ObjectMeta) -> Option<PodId> {
    Some(PodId {
        namespace: metadata.namespace.clone()?,
        name: metadata.name.clone()?,
    })
}
