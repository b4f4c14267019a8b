//! Custom resource definitions. What a policy can say is taken from the table that
//! the reader of the agent's config goes by.

use std::fmt::Write as _;

use keepalive_agent::config::keys::{Form, TimerForm, WISHES};
use serde_json::{Map, Value, json};

use crate::{
    api::{GROUP, Kind, VERSION},
    policy::{self, NAMESPACE_SELECTOR, POD_SELECTOR},
};

/// A duration as the agent reads it.
const DURATION: &str = r"( *[0-9]+(\.[0-9]+)? *[A-Za-zµ]+ *)+";

/// All definitions as one manifest: JSON, which is YAML too.
#[must_use]
pub fn manifest() -> String {
    let mut text = String::new();
    for kind in Kind::ALL {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "---\n{:#}", definition(kind));
    }
    text
}

/// The definition of a kind.
#[must_use]
pub fn definition(kind: Kind) -> Value {
    let singular = kind.name().to_lowercase();
    let (short, scope, columns, properties) = match kind {
        Kind::Policy => (
            "kap",
            "Namespaced",
            policy_columns(),
            policy_properties(kind),
        ),
        Kind::ClusterPolicy => ("ckap", "Cluster", policy_columns(), policy_properties(kind)),
        Kind::Node => ("kan", "Cluster", json!([]), node_properties()),
    };
    let mut version = json!({
        "name": VERSION,
        "served": true,
        "storage": true,
        "additionalPrinterColumns": columns,
        "schema": { "openAPIV3Schema": { "type": "object", "properties": properties } },
    });
    if kind != Kind::Node {
        version["subresources"] = json!({ "status": {} });
        version["schema"]["openAPIV3Schema"]["required"] = json!(["spec"]);
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{GROUP}", kind.plural()),
            // Policies of people are not the chart's to delete.
            "annotations": { "helm.sh/resource-policy": "keep" },
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.name(),
                "listKind": format!("{}List", kind.name()),
                "plural": kind.plural(),
                "singular": singular,
                "shortNames": [short],
            },
            "scope": scope,
            "versions": [version],
        },
    })
}

fn policy_columns() -> Value {
    let column = |name: &str, kind: &str, path: &str| json!({ "name": name, "type": kind, "jsonPath": path });
    let condition = |field: &str| format!(".status.conditions[?(@.type==\"Accepted\")].{field}");
    json!([
        column("Accepted", "string", &condition("status")),
        column("Reason", "string", &condition("reason")),
        column("Nodes", "integer", ".status.nodes"),
        column("Age", "date", ".metadata.creationTimestamp"),
    ])
}

fn policy_properties(kind: Kind) -> Value {
    let mut spec = Map::new();
    let selector = |about: &str| selector(about);
    if kind == Kind::ClusterPolicy {
        let about = "Labels of the namespaces; left out: all namespaces";
        spec.insert(NAMESPACE_SELECTOR.to_owned(), selector(about));
    }
    let about = "Labels of the pods; left out: all pods";
    spec.insert(POD_SELECTOR.to_owned(), selector(about));
    for key in policy::keys() {
        let mut schema = schema(key.form);
        schema["description"] = key.about.into();
        spec.insert(key.name.to_owned(), schema);
    }
    json!({
        "spec": { "type": "object", "properties": spec },
        "status": {
            "type": "object",
            "properties": {
                "observedGeneration": { "type": "integer", "format": "int64" },
                "nodes": {
                    "type": "integer",
                    "description": "On how many nodes this generation is in force",
                },
                "conditions": {
                    "type": "array",
                    "x-kubernetes-list-type": "map",
                    "x-kubernetes-list-map-keys": ["type"],
                    "items": {
                        "type": "object",
                        "required": ["type", "status", "reason", "message", "lastTransitionTime"],
                        "properties": {
                            "type": { "type": "string" },
                            "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                            "reason": { "type": "string" },
                            "message": { "type": "string" },
                            "observedGeneration": { "type": "integer", "format": "int64" },
                            "lastTransitionTime": { "type": "string", "format": "date-time" },
                        },
                    },
                },
            },
        },
    })
}

fn node_properties() -> Value {
    json!({
        "status": {
            "type": "object",
            "properties": {
                "policies": {
                    "type": "object",
                    "description": "Policies in force, each with its generation",
                    "additionalProperties": { "type": "integer", "format": "int64" },
                },
            },
        },
    })
}

fn selector(about: &str) -> Value {
    let texts = json!({ "type": "array", "items": { "type": "string" } });
    json!({
        "type": "object",
        "description": about,
        "properties": {
            "matchLabels": { "type": "object", "additionalProperties": { "type": "string" } },
            "matchExpressions": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["key", "operator"],
                    "properties": {
                        "key": { "type": "string" },
                        "operator": {
                            "type": "string",
                            "enum": ["In", "NotIn", "Exists", "DoesNotExist"],
                        },
                        "values": texts,
                    },
                },
            },
        },
    })
}

fn schema(form: Form) -> Value {
    match form {
        Form::Text => json!({ "type": "string" }),
        // A single value of TOML is a list of one here.
        Form::Texts => json!({
            "type": "array",
            "minItems": 1,
            "items": { "type": "string", "minLength": 1 },
        }),
        Form::Labels => json!({
            "type": "object",
            "additionalProperties": { "type": "string" },
            "minProperties": 1,
        }),
        Form::Ports => json!({
            "type": "array",
            "minItems": 1,
            "items": {
                "x-kubernetes-int-or-string": true,
                "minimum": 1,
                "maximum": 65535,
                "pattern": "^ *[0-9]+( *- *[0-9]+)? *$",
            },
        }),
        Form::Wish => json!({ "type": "string", "enum": WISHES.map(|(word, _)| word) }),
        Form::Truth => json!({ "type": "boolean" }),
        Form::Path => json!({ "type": "string", "minLength": 1 }),
        Form::GiveUp => duration(&["leave"]),
        Form::Timer(timer) => timer_schema(timer),
    }
}

fn duration(words: &[&str]) -> Value {
    json!({ "type": "string", "pattern": pattern(words) })
}

fn pattern(words: &[&str]) -> String {
    let forms = [&[DURATION], words].concat();
    format!("^({})$", forms.join("|"))
}

/// A value, or a table: a schema that has both has no type.
fn timer_schema(timer: TimerForm) -> Value {
    let value = |words: &[&str]| match timer.numbers() {
        None => duration(words),
        Some((least, most)) if words.is_empty() => {
            json!({ "type": "integer", "minimum": least, "maximum": most })
        }
        Some((least, most)) => json!({
            "x-kubernetes-int-or-string": true,
            "minimum": least,
            "maximum": most,
            "pattern": format!("^({})$", words.join("|")),
        }),
    };
    let words: Vec<_> = timer.words().collect();
    let table: Map<_, _> = timer
        .keys()
        .map(|(key, words)| (key.to_owned(), value(&words)))
        .collect();
    let mut schema = value(&words);
    let fields = schema.as_object_mut();
    if let Some(fields) = fields {
        fields.remove("type");
        fields.remove("x-kubernetes-int-or-string");
        fields.insert(
            "x-kubernetes-preserve-unknown-fields".to_owned(),
            true.into(),
        );
        fields.insert("properties".to_owned(), table.into());
        fields.insert("minProperties".to_owned(), 1.into());
    }
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shipped_is_what_the_agent_understands() {
        let shipped = include_str!("../../packaging/kubernetes/base/crds.yaml");
        assert!(
            shipped == manifest(),
            "keepalive-kube crds > packaging/kubernetes/base/crds.yaml"
        );
    }

    /// The schema must not refuse what the agent takes.
    #[test]
    fn durations() {
        let pattern = regex::Regex::new(&pattern(&["leave"])).unwrap();
        for (text, expected) in [
            ("60s", true),
            ("1h 30m", true),
            ("1h30m", true),
            ("1500ms", true),
            ("2 min", true),
            ("leave", true),
            ("60", false),
            ("", false),
            ("s", false),
            ("-5s", false),
            ("sysctl", false),
        ] {
            assert_eq!(pattern.is_match(text), expected, "{text}");
            let spec = json!({ "give-up": text }).as_object().unwrap().clone();
            let id = crate::objects::PolicyId {
                namespace: None,
                name: "a".to_owned(),
            };
            let read = policy::Policy::read(&id, &spec);
            assert_eq!(read.is_ok(), expected, "{text}: {read:?}");
        }
    }

    #[test]
    fn a_spec_has_the_keys_of_the_config() {
        for (kind, selectors) in [(Kind::Policy, 1), (Kind::ClusterPolicy, 2)] {
            let schema = definition(kind);
            let schema = &schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
            let keys = schema["properties"]["spec"]["properties"]
                .as_object()
                .unwrap();
            assert_eq!(keys.len(), policy::keys().count() + selectors);
            for key in policy::keys() {
                assert_eq!(keys[key.name]["description"], key.about);
            }
        }
    }
}
