use std::path::Path;

use keepalive_agent::config::{Config, NamedPolicy};
use keepalive_common::policy::{Range, SysctlTimer};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::objects::Objects;

fn labels(value: &Value) -> Labels {
    serde_json::from_value(value.clone()).unwrap()
}

/// Namespaces `shop` and `bank`, with the label `kubernetes.io/metadata.name` that
/// the API gives them.
fn cluster() -> Objects {
    let mut objects = Objects::default();
    for name in ["shop", "bank"] {
        let own = json!({ "kubernetes.io/metadata.name": name });
        objects.namespaces.insert(name.to_owned(), labels(&own));
    }
    objects
}

fn id(text: &str) -> PolicyId {
    let (namespace, name) = match text.split_once('/') {
        Some((namespace, name)) => (Some(namespace.to_owned()), name),
        None => (None, text),
    };
    PolicyId {
        namespace,
        name: name.to_owned(),
    }
}

impl Objects {
    fn policy(mut self, name: &str, spec: &Value) -> Self {
        let object = PolicyObject {
            spec: spec.as_object().unwrap().clone(),
            ..PolicyObject::default()
        };
        self.policies.insert(id(name), object);
        self
    }

    fn pod(mut self, namespace: &str, name: &str, own: &Value, policy: Option<&str>) -> Self {
        let id = PodId {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        };
        let pod = Pod {
            labels: labels(own),
            policy: policy.map(str::to_owned),
        };
        self.pods.insert(id, pod);
        self
    }

    fn rules(&self) -> Rules {
        Rules::new(&self.policies, &self.namespaces)
    }

    /// What is written for the agent, where these policies are written already.
    fn drop_in(&self, written: &BTreeSet<String>) -> Compiled {
        self.rules().drop_in(&self.pods, written)
    }

    /// The same without the head.
    fn text(&self) -> String {
        let text = self.drop_in(&BTreeSet::new()).text;
        // Whatever it is, the agent takes it.
        read(&text);
        text.strip_prefix(HEAD).unwrap().to_owned()
    }

    fn verdict(&self, policy: &str) -> Result<(), String> {
        self.rules().verdicts[&id(policy)]
            .clone()
            .map_err(|refusal| format!("{}: {refusal}", refusal.reason()))
    }
}

fn read(text: &str) -> Config {
    let (config, _) = Config::parse(Path::new("test"), text).unwrap();
    config
}

/// The first policy that is for these names.
fn claim(config: &Config, namespace: &str, pod: &str) -> Option<NamedPolicy> {
    let selected = config.policies.iter().find(|policy| {
        let attributes = &policy.selector.attributes;
        attributes.iter().all(|(attribute, patterns)| {
            patterns.iter().any(|pattern| match attribute.key() {
                "namespace" => pattern.matches(namespace),
                "pod" => pattern.matches(pod) || pattern.matches(&format!("{namespace}/{pod}")),
                _ => false,
            })
        })
    });
    selected.cloned()
}

#[test]
fn a_policy_for_a_namespace_names_no_pods() {
    let objects = cluster().policy("shop/all", &json!({ "idle": "30s", "probes": 3 }));
    let text =
        "[[policy]]\nidle = \"30s\"\nname = \"kube:shop/all\"\nnamespace = \"shop\"\nprobes = 3\n";
    assert_eq!(objects.text(), text);
    // A pod changes nothing: the agent knows it by its namespace.
    assert_eq!(objects.pod("shop", "web-0", &json!({}), None).text(), text);
}

#[test]
fn pods_are_selected_by_labels() {
    let objects = cluster()
        .pod("shop", "web-0", &json!({ "app": "web" }), None)
        .pod("shop", "web-1", &json!({ "app": "web", "tier": "x" }), None)
        .pod("shop", "db-0", &json!({ "app": "db" }), None)
        .pod("bank", "web-0", &json!({ "app": "web" }), None);
    let spec = json!({
        "podSelector": {
            "matchLabels": { "app": "web" },
            "matchExpressions": [{ "key": "tier", "operator": "DoesNotExist" }],
        },
        "container": ["app"],
        "remote": ["10.0.0.0/8"],
        "port": [5432, "8000-8999"],
        "idle": { "default": "30s", "at-most": "2m" },
    });
    assert_eq!(
        objects.clone().policy("shop/web", &spec).text(),
        "[[policy]]\ncontainer = [\"app\"]\nidle = { at-most = \"2m\", default = \"30s\" }\n\
         name = \"kube:shop/web\"\nnamespace = \"shop\"\n\
         port = [5432, \"8000-8999\"]\nremote = [\"10.0.0.0/8\"]\npod = [\"web-0\"]\n"
    );
    // Over all namespaces a pod's name alone could mean several.
    let spec = json!({ "podSelector": { "matchLabels": { "app": "web" } }, "idle": "30s" });
    assert_eq!(
        objects.policy("web", &spec).text(),
        "[[policy]]\nidle = \"30s\"\nname = \"kube:web\"\n\
         pod = [\"bank/web-0\", \"shop/web-0\", \"shop/web-1\"]\n"
    );
}

/// Pods come and go, and the policies of a node stay the same, so that no agent needs
/// another policy set for it.
#[test]
fn a_policy_stays_that_was_written_once() {
    let policies = cluster()
        .policy(
            "shop/web",
            &json!({ "idle": "30s", "podSelector": { "matchLabels": { "app": "web" } } }),
        )
        .policy(
            "shop/named",
            &json!({ "idle": "31s", "podSelector": { "matchLabels": { "app": "no" } } }),
        )
        .policy(
            "all",
            &json!({ "idle": "32s", "podSelector": { "matchLabels": { "app": "web" } } }),
        )
        .policy(
            "teams",
            &json!({ "idle": "33s", "namespaceSelector": { "matchLabels": { "team": "a" } } }),
        );
    let mut with_team = policies.clone();
    with_team
        .namespaces
        .insert("team".to_owned(), labels(&json!({ "team": "a" })));
    let with_pods = with_team
        .clone()
        .pod("shop", "web-0", &json!({ "app": "web" }), None)
        .pod("shop", "db-0", &json!({}), Some("named"));
    let named = |compiled: &Compiled| -> Vec<_> {
        let policies = read(&compiled.text).policies;
        policies.into_iter().map(|policy| policy.name).collect()
    };
    let before = policies.drop_in(&BTreeSet::new());
    assert!(before.names.is_empty() && named(&before).is_empty());
    let during = with_pods.drop_in(&before.names);
    let all = [
        "kube:shop/named by annotation",
        "kube:shop/web",
        "kube:all",
        "kube:teams",
    ];
    assert_eq!(named(&during), all);
    let after = policies.drop_in(&during.names);
    assert_eq!(named(&after), all);
    assert_eq!(after.names, during.names);
    assert!(read(&after.text).differs_in_names_only(&read(&during.text)));
    for pod in ["web-0", "db-0", "other"] {
        assert_eq!(claim(&read(&after.text), "shop", pod), None);
        assert_eq!(claim(&read(&after.text), "team", pod), None);
    }
    // Another companion goes on from there.
    assert_eq!(names(&after.text), after.names);
    assert_eq!(names("half a fi"), BTreeSet::new());
    // A policy that is gone goes.
    let mut left = policies;
    left.policies.remove(&id("shop/web"));
    let left = left.drop_in(&after.names);
    assert_eq!(named(&left), [all[0], all[2], all[3]]);
}

/// The first pod of a policy on a node is only a name more, so that its first connection
/// need not wait for a policy set.
#[test]
fn policies_are_written_before_there_are_pods() {
    let selecting = json!({ "idle": "30s", "podSelector": { "matchLabels": { "app": "web" } } });
    let mut policies = cluster()
        .policy("shop/web", &selecting)
        .policy("all", &selecting);
    let ahead = policies.rules().ahead();
    let before = policies.drop_in(&ahead);
    assert_eq!(before.names, ahead);
    assert_eq!(claim(&read(&before.text), "shop", "web-0"), None);
    let with_pod = policies
        .clone()
        .pod("shop", "web-0", &json!({ "app": "web" }), Some("web"));
    let after = read(&with_pod.drop_in(&ahead).text);
    assert!(after.differs_in_names_only(&read(&before.text)));
    let found = claim(&after, "shop", "web-0").unwrap();
    assert_eq!(found.name, "kube:shop/web by annotation");
    for number in 0..MOST_AHEAD {
        policies = policies.policy(&format!("bank/{number}"), &selecting);
    }
    assert!(policies.rules().ahead().is_empty());
}

#[test]
fn namespaces_are_selected_by_labels() {
    let selector = json!({ "matchLabels": { "kubernetes.io/metadata.name": "shop" } });
    for (spec, expected) in [
        (json!({ "idle": "30s" }), "namespace = [\"*\"]\n"),
        (
            json!({ "idle": "30s", "namespaceSelector": {} }),
            "namespace = [\"*\"]\n",
        ),
        (
            json!({ "idle": "30s", "namespaceSelector": selector }),
            "namespace = [\"shop\"]\n",
        ),
    ] {
        let text = cluster().policy("a", &spec).text();
        assert_eq!(
            text,
            format!("[[policy]]\nidle = \"30s\"\nname = \"kube:a\"\n{expected}")
        );
    }
    let none = json!({ "matchLabels": { "team": "none" } });
    let objects = cluster().policy("a", &json!({ "idle": "30s", "namespaceSelector": none }));
    assert_eq!(
        (objects.text().as_str(), objects.verdict("a")),
        ("", Ok(()))
    );
}

/// The table of docs/kubernetes.md.
#[test]
fn precedence() {
    let spec = |idle: &str| json!({ "idle": idle });
    let selecting =
        |idle: &str| json!({ "idle": idle, "podSelector": { "matchLabels": { "a": "b" } } });
    let objects = cluster()
        .policy("a-cluster", &spec("11s"))
        .policy("b-cluster", &spec("12s"))
        .policy("shop/a", &selecting("21s"))
        .policy("shop/b", &spec("22s"))
        .policy("shop/z", &selecting("23s"))
        .pod("shop", "plain", &json!({}), None)
        .pod("shop", "labelled", &json!({ "a": "b" }), None)
        .pod("shop", "annotated", &json!({ "a": "b" }), Some("z"))
        .pod("shop", "elsewhere", &json!({ "a": "b" }), Some("none"))
        .pod("bank", "annotated", &json!({ "a": "b" }), Some("z"));
    let config = read(&objects.drop_in(&BTreeSet::new()).text);
    for (namespace, pod, expected) in [
        ("shop", "annotated", "kube:shop/z by annotation"),
        ("shop", "labelled", "kube:shop/a"),
        ("shop", "plain", "kube:shop/b"),
        ("shop", "elsewhere", "kube:shop/a"),
        // The policy of another namespace is nobody's to choose.
        ("bank", "annotated", "kube:a-cluster"),
    ] {
        let claim = claim(&config, namespace, pod).unwrap();
        assert_eq!(claim.name, expected, "{namespace}/{pod}");
    }
}

#[test]
fn what_an_agent_refuses_is_refused_with_its_words() {
    for (spec, expected) in [
        (
            json!({ "idle": "60" }),
            "Invalid: spec.idle = \"60\": not a duration; write it like \"60s\", \"2m\" or \"1h 30m\"",
        ),
        (
            json!({ "probes": 200 }),
            "Invalid: spec.probes = 200: out of range: 1 to 127",
        ),
        (
            json!({ "keepalive": true }),
            "Invalid: spec.keepalive = true: must be \"on\", \"always\", \"off\", \"never\" or \"leave\"",
        ),
        (
            json!({ "idle": { "default": "60s", "at-most": "30s" } }),
            "Invalid: spec.idle = { at-most = \"30s\", default = \"60s\" }: default 1m is above at-most 30s",
        ),
        (json!({ "idel": "60s" }), "Invalid: spec.idel: unknown key"),
        // Its namespace is not the policy's to choose.
        (
            json!({ "namespace": "bank" }),
            "Invalid: spec.namespace: unknown key",
        ),
        (
            json!({ "cgroup": "/" }),
            "Invalid: spec.cgroup: unknown key",
        ),
        (json!({ "name": "x" }), "Invalid: spec.name: unknown key"),
        (
            json!({ "namespaceSelector": {} }),
            "Invalid: spec.namespaceSelector: unknown key",
        ),
    ] {
        let objects = cluster().policy("shop/web", &spec);
        assert_eq!(objects.verdict("shop/web"), Err(expected.to_owned()));
        assert_eq!(objects.text(), "");
    }
    let operator =
        json!({ "podSelector": { "matchExpressions": [{ "key": "a", "operator": "Is" }] } });
    let error = cluster()
        .policy("shop/web", &operator)
        .verdict("shop/web")
        .unwrap_err();
    assert!(error.starts_with("Invalid: spec.podSelector: "), "{error}");
}

/// One that is wrong does not keep the others from being written.
#[test]
fn a_refused_policy_leaves_the_others() {
    let objects = cluster()
        .policy("shop/bad", &json!({ "idle": "x" }))
        .policy("shop/good", &json!({ "idle": "30s" }));
    assert!(objects.verdict("shop/bad").is_err());
    assert!(objects.text().contains("kube:shop/good"));
    assert!(!objects.text().contains("bad"));
}

#[test]
fn a_namespace_stays_within_the_bounds_of_the_cluster() {
    let bounds = json!({
        "idle": { "default": "60s", "at-least": "20s", "at-most": "2m" },
        "probes": { "at-least": 3 },
        "keepalive": "always",
    });
    for (spec, expected) in [
        // What it leaves out comes from the node's [default], within the bounds.
        (
            json!({}),
            Ok("idle = { at-least = \"20s\", at-most = \"120s\" }\nkeepalive = \"always\"\n"),
        ),
        (
            json!({ "idle": "30s", "probes": 4 }),
            Ok(
                "idle = { at-least = \"20s\", at-most = \"120s\", default = \"30s\" }\n\
                keepalive = \"always\"\n",
            ),
        ),
        // Its own bounds count where they are narrower.
        (
            json!({ "idle": { "default": "30s", "at-least": "10s", "at-most": "45s" } }),
            Ok(
                "idle = { at-least = \"20s\", at-most = \"45s\", default = \"30s\" }\n\
                keepalive = \"always\"\n",
            ),
        ),
        (
            json!({ "idle": { "exactly": "30s" } }),
            Ok(
                "idle = { at-least = \"30s\", at-most = \"30s\", default = \"30s\" }\n\
                keepalive = \"always\"\n",
            ),
        ),
        (
            json!({ "path": "aws-nat" }),
            Ok("idle = { at-least = \"20s\", at-most = \"120s\" }\nkeepalive = \"always\"\n"),
        ),
        (
            json!({ "idle": "5m" }),
            Err(
                "spec.idle: ClusterKeepalivePolicy base does not allow 300s: at least 20s at most 120s",
            ),
        ),
        (
            json!({ "idle": { "exactly": "5s" } }),
            Err(
                "spec.idle: ClusterKeepalivePolicy base does not allow 5s: at least 20s at most 120s",
            ),
        ),
        (
            json!({ "idle": { "at-least": "3m" } }),
            Err(
                "spec.idle: ClusterKeepalivePolicy base does not allow 180s: at least 20s at most 120s",
            ),
        ),
        (
            json!({ "idle": "leave" }),
            Err(
                "spec.idle: ClusterKeepalivePolicy base bounds it, and what is left to the kernel has no bounds",
            ),
        ),
        (
            json!({ "probes": 2 }),
            Err("spec.probes: ClusterKeepalivePolicy base does not allow 2: at least 3"),
        ),
        (
            json!({ "keepalive": "off" }),
            Err("spec.keepalive: ClusterKeepalivePolicy base says \"always\" for everyone"),
        ),
        (
            json!({ "ignore": true }),
            Err("spec.ignore: ClusterKeepalivePolicy base has bounds, which nobody may ignore"),
        ),
        (
            json!({ "enforce": false }),
            Err("spec.enforce: ClusterKeepalivePolicy base has bounds, which a trial would lift"),
        ),
    ] {
        let objects = cluster().policy("base", &bounds).policy("shop/web", &spec);
        match expected {
            Ok(text) => {
                assert_eq!(objects.verdict("shop/web"), Ok(()), "{spec}");
                assert!(objects.text().contains(text), "{spec}: {}", objects.text());
            }
            Err(text) => {
                assert_eq!(
                    objects.verdict("shop/web"),
                    Err(format!("OutOfBounds: {text}")),
                    "{spec}"
                );
                assert!(!objects.text().contains("kube:shop/web"), "{spec}");
            }
        }
    }
}

#[test]
fn only_what_is_enforced_on_the_namespace_binds() {
    let spec = json!({ "idle": "5m" });
    let elsewhere = json!({ "matchLabels": { "kubernetes.io/metadata.name": "bank" } });
    for (bounds, is_bound) in [
        (json!({ "idle": { "at-most": "2m" } }), true),
        // Some of its pods are enough: which ones may change at any time.
        (
            json!({ "idle": { "at-most": "2m" }, "podSelector": { "matchLabels": { "a": "b" } } }),
            true,
        ),
        (
            json!({ "idle": { "at-most": "2m" }, "namespaceSelector": elsewhere }),
            false,
        ),
        (
            json!({ "idle": { "at-most": "2m" }, "enforce": false }),
            false,
        ),
        (
            json!({ "idle": { "at-most": "2m" }, "ignore": true }),
            false,
        ),
        // A default is no bound.
        (json!({ "idle": "2m" }), false),
        (json!({ "path": "aws-nat" }), true),
        (json!({ "idle": { "at-most": "x" } }), false),
    ] {
        let objects = cluster().policy("base", &bounds).policy("shop/web", &spec);
        assert_eq!(objects.verdict("shop/web").is_err(), is_bound, "{bounds}");
    }
}

#[test]
fn bounds_that_contradict_each_other_leave_nothing() {
    let objects = cluster()
        .policy("a", &json!({ "idle": { "at-least": "60s" } }))
        .policy("b", &json!({ "idle": { "at-most": "30s" } }))
        .policy("shop/web", &json!({ "probes": 3 }));
    let error = objects.verdict("shop/web").unwrap_err();
    assert!(error.starts_with("OutOfBounds: spec.idle"), "{error}");
}

#[test]
fn a_namespace_that_nobody_told_of_has_no_policy_yet() {
    let mut objects = cluster().policy("shop/web", &json!({ "idle": "30s" }));
    objects.namespaces.clear();
    assert_eq!(objects.text(), "");
}

#[test]
fn names_are_whole_or_told_apart() {
    let long = "n".repeat(63);
    let names: BTreeSet<_> = ["a", "b"]
        .map(|end| name(&id(&format!("{long}/{}{end}", "p".repeat(200))), ""))
        .into();
    assert_eq!(names.len(), 2);
    assert!(
        names.iter().all(|name| name.chars().count() == LONGEST),
        "{names:?}"
    );
    assert_eq!(name(&id("shop/web"), ""), "kube:shop/web");
}

fn timer() -> impl Strategy<Value = Value> {
    let value = || (1u32..400).prop_map(|seconds| json!(format!("{seconds}s")));
    let bound = || proptest::option::of(value());
    prop_oneof![
        value(),
        Just(json!("leave")),
        Just(json!("sysctl")),
        Just(json!("nonsense")),
        value().prop_map(|value| json!({ "exactly": value })),
        (bound(), bound(), bound()).prop_map(|(default, at_least, at_most)| {
            let mut table = serde_json::Map::new();
            for (key, value) in [
                ("default", default),
                ("at-least", at_least),
                ("at-most", at_most),
            ] {
                table.extend(value.map(|value| (key.to_owned(), value)));
            }
            table.into()
        }),
    ]
}

fn spec() -> impl Strategy<Value = Value> {
    let wish = prop_oneof![
        Just("on"),
        Just("always"),
        Just("off"),
        Just("never"),
        Just("leave")
    ];
    let option = proptest::option::of::<BoxedStrategy<Value>>;
    (
        option(timer().boxed()),
        option(timer().boxed()),
        option(wish.prop_map(Value::from).boxed()),
        option(Just(json!("aws-nat")).boxed()),
        option(any::<bool>().prop_map(Value::from).boxed()),
    )
        .prop_map(|(idle, interval, keepalive, path, ignore)| {
            let mut spec = serde_json::Map::new();
            for (key, value) in [
                ("idle", idle),
                ("interval", interval),
                ("keepalive", keepalive),
                ("path", path),
                ("ignore", ignore),
            ] {
                spec.extend(value.map(|value| (key.to_owned(), value)));
            }
            spec.into()
        })
}

/// A timer of a policy.
type RangeOf = fn(&NamedPolicy) -> Range;

proptest! {
    /// Whatever people write, the agent takes the file, and what a namespace says
    /// stays within what the cluster allows.
    #[test]
    fn no_namespace_leaves_the_bounds(above in spec(), also in spec(), own in spec()) {
        let objects = cluster().policy("a", &above).policy("b", &also).policy("shop/web", &own);
        let compiled = objects.drop_in(&BTreeSet::new());
        let config = read(&compiled.text);
        let find = |name: &str| config.policies.iter().find(|policy| policy.name == name);
        if let Some(own) = find("kube:shop/web") {
            for above in ["kube:a", "kube:b"].into_iter().filter_map(find) {
                if above.policy.ignores() {
                    continue;
                }
                let timers: [(RangeOf, _); 2] = [
                    (|named| named.policy.idle, SysctlTimer::Idle),
                    (|named| named.policy.interval, SysctlTimer::Interval),
                ];
                for (range, timer) in timers {
                    for set in [0, 1, 20, 60, 400, 32_767] {
                        let sysctl = if own.policy.heeds_sysctl(timer) { 7200 } else { 0 };
                        let (own, above) = (range(own), range(above));
                        // What is unset and left stays so under both.
                        if set == 0 && above.default == 0 {
                            continue;
                        }
                        let effective = own.effective_beside(sysctl, set);
                        prop_assert!(
                            (above.at_least..=above.at_most).contains(&effective),
                            "{own:?} {above:?} {set}: {effective}"
                        );
                    }
                }
            }
        }
    }
}
