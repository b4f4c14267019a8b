//! The companion against an API server that comes, goes, hangs and forgets.

mod fake_api;

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fake_api::{FakeApi, Mood, eventually, fake_agent};
use keepalive_kube::{controller, node};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Where an agent would serve its metrics.
const SOCKET: &str = "metrics.sock";

const POLICIES: &str = "keepalivepolicies";
const CLUSTER_POLICIES: &str = "clusterkeepalivepolicies";

fn pod(name: &str, on: &str, app: &str) -> Value {
    json!({
        "metadata": { "namespace": "shop", "name": name, "labels": { "app": app } },
        "spec": { "nodeName": on },
    })
}

fn policy(name: &str, generation: i64, spec: &Value) -> Value {
    json!({
        "apiVersion": "keepalive.internal/v1alpha1",
        "kind": "KeepalivePolicy",
        "metadata": { "namespace": "shop", "name": name, "generation": generation, "uid": name },
        "spec": spec,
    })
}

fn web(idle: &str) -> Value {
    json!({ "podSelector": { "matchLabels": { "app": "web" } }, "idle": idle })
}

async fn cluster() -> FakeApi {
    let api = FakeApi::start().await;
    api.set("namespaces", json!({ "metadata": { "name": "shop" } }));
    api.set("pods", pod("web-0", "n1", "web"));
    api.set("pods", pod("web-9", "n2", "web"));
    api.set(POLICIES, policy("web", 1, &web("30s")));
    api
}

/// A companion of the node `n1`; ended with its task.
struct Companion {
    directory: tempfile::TempDir,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Companion {
    fn start(api: &FakeApi, directory: tempfile::TempDir) -> Self {
        let options = node::Options {
            node: "n1".to_owned(),
            directory: directory.path().to_owned(),
            agent: directory.path().join(SOCKET),
        };
        let client = api.client();
        let task =
            tokio::spawn(
                async move { node::run(client, &options, futures::future::pending()).await },
            );
        Self { directory, task }
    }

    fn text(&self) -> String {
        text(self.directory.path())
    }

    async fn writes(&self, what: &str) {
        eventually(10, what, || self.text().contains(what)).await;
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn text(directory: &Path) -> String {
    fs::read_to_string(directory.join(node::FILE)).unwrap_or_default()
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[tokio::test]
async fn pods_of_this_node_get_their_policy_as_they_come_and_go() {
    let api = cluster().await;
    let companion = Companion::start(&api, directory());
    companion.writes("pod = [\"web-0\"]").await;
    api.set("pods", pod("web-1", "n1", "web"));
    companion.writes("pod = [\"web-0\", \"web-1\"]").await;
    api.set("pods", pod("web-0", "n1", "other"));
    companion.writes("pod = [\"web-1\"]").await;
    api.set(POLICIES, policy("web", 2, &web("40s")));
    companion.writes("idle = \"40s\"").await;
    api.remove("pods", "shop/web-1");
    // It stays, for nobody, so that the agent needs no other set for the next pod.
    companion.writes("pod = [\"-\"]").await;
    api.set("pods", pod("web-2", "n1", "web"));
    companion.writes("pod = [\"web-2\"]").await;
    api.remove(POLICIES, "shop/web");
    eventually(10, "no policy is left", || {
        !companion.text().contains("[[policy]]")
    })
    .await;
    // Those of other nodes are not even asked for.
    let asked = api.requests();
    let pods: Vec<_> = asked
        .iter()
        .filter(|asked| asked.contains("/pods?"))
        .collect();
    assert!(
        pods.iter()
            .all(|asked| asked.contains("spec.nodeName%3Dn1")),
        "{pods:?}"
    );
}

#[tokio::test]
async fn what_holds_goes_on_while_the_api_is_away() {
    let api = cluster().await;
    let companion = Companion::start(&api, directory());
    companion.writes("pod = [\"web-0\"]").await;
    let before = companion.text();
    api.behave(Mood::Away);
    api.set("pods", pod("web-1", "n1", "web"));
    let asked = api.requests().len();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(companion.text(), before);
    // Four watches, each with more and more time between.
    let asked = api.requests().len() - asked;
    assert!((4..=20).contains(&asked), "{asked} requests in 4 s");
    api.behave(Mood::Well);
    eventually(40, "web-1", || companion.text().contains("\"web-1\"")).await;
}

#[tokio::test]
async fn a_watch_that_is_too_old_lists_anew() {
    let api = cluster().await;
    let companion = Companion::start(&api, directory());
    companion.writes("pod = [\"web-0\"]").await;
    let before = api.requests().len();
    api.behave(Mood::Away);
    // Each of the four watches ends, and is tried again.
    eventually(10, "the watches to end", || {
        api.requests().len() >= before + 4
    })
    .await;
    api.remove("pods", "shop/web-0");
    api.set("pods", pod("web-1", "n1", "web"));
    api.forget();
    api.behave(Mood::Well);
    eventually(40, "web-1 alone", || {
        companion.text().contains("pod = [\"web-1\"]")
    })
    .await;
}

/// A companion that starts knows nothing: what an earlier one wrote is better.
#[tokio::test]
async fn nothing_is_written_before_everything_is_known() {
    for mood in [Mood::Away, Mood::Hangs] {
        let api = cluster().await;
        api.behave(mood);
        let directory = directory();
        fs::write(directory.path().join(node::FILE), "# earlier\n").unwrap();
        let companion = Companion::start(&api, directory);
        eventually(10, "four requests", || api.requests().len() >= 4).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(companion.text(), "# earlier\n");
    }
}

#[tokio::test]
async fn a_node_reports_what_its_agent_has_in_force() {
    let metrics = Arc::new(Mutex::new(String::new()));
    let directory = directory();
    fake_agent(&directory.path().join(SOCKET), Arc::clone(&metrics));
    let say = |built: SystemTime| {
        let built = built.duration_since(UNIX_EPOCH).unwrap().as_secs();
        *metrics.lock().unwrap() = format!(
            "keepalive_in_force 1\nkeepalive_policy_set_built_timestamp_seconds {built}\n# EOF\n"
        );
    };
    say(SystemTime::now() - Duration::from_mins(1));
    let api = cluster().await;
    let node = json!({ "metadata": { "name": "n1", "uid": "u1" } });
    api.set("nodes", node);
    api.set(POLICIES, policy("bad", 7, &json!({ "idle": "x" })));
    let companion = Companion::start(&api, directory);
    companion.writes("kube:shop/web").await;
    // The agent has not read it.
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(api.patches(), []);
    say(SystemTime::now());
    eventually(15, "a report", || !api.patches().is_empty()).await;
    let (address, report) = api.patches().remove(0);
    assert_eq!(
        address,
        "PATCH /apis/keepalive.internal/v1alpha1/keepalivenodes/n1"
    );
    assert_eq!(report["metadata"]["ownerReferences"][0]["uid"], "u1");
    assert_eq!(report["status"], json!({ "policies": { "shop/web": 1 } }));
}

#[tokio::test]
async fn people_are_told_what_became_of_their_policies() {
    let api = cluster().await;
    api.set(POLICIES, policy("bad", 3, &json!({ "idle": "60" })));
    let cluster_policy = json!({
        "apiVersion": "keepalive.internal/v1alpha1",
        "kind": "ClusterKeepalivePolicy",
        "metadata": { "name": "base", "generation": 1, "uid": "base" },
        "spec": { "probes": { "at-least": 3 } },
    });
    api.set(CLUSTER_POLICIES, cluster_policy);
    for (node, generation) in [("n1", 1), ("n2", 1), ("n3", 0)] {
        let policies = json!({ "shop/web": generation });
        api.set(
            "keepalivenodes",
            json!({
                "apiVersion": "keepalive.internal/v1alpha1",
                "kind": "KeepaliveNode",
                "metadata": { "name": node },
                "status": { "policies": policies },
            }),
        );
    }
    let client = api.client();
    let task = tokio::spawn(controller::run(client, futures::future::pending()));
    eventually(15, "three statuses and an event", || {
        api.patches().len() >= 4
    })
    .await;
    task.abort();
    let patches = api.patches();
    let find = |end: &str| {
        let found = patches.iter().find(|(address, _)| address.ends_with(end));
        found
            .unwrap_or_else(|| panic!("{end}: {patches:?}"))
            .1
            .clone()
    };
    let web = &find("/namespaces/shop/keepalivepolicies/web/status")["status"];
    assert_eq!(web["nodes"], 2);
    assert_eq!(web["conditions"][0]["status"], "True");
    let bad = &find("/namespaces/shop/keepalivepolicies/bad/status")["status"]["conditions"][0];
    assert_eq!(
        (&bad["status"], &bad["reason"]),
        (&"False".into(), &"Invalid".into())
    );
    let message = "spec.idle = \"60\": not a duration; write it like \"60s\", \"2m\" or \"1h 30m\"";
    assert_eq!(bad["message"], message);
    find("/clusterkeepalivepolicies/base/status");
    let event = find("/apis/events.k8s.io/v1/namespaces/shop/events");
    assert_eq!(
        (&event["type"], &event["note"]),
        (&"Warning".into(), &message.into())
    );
    assert_eq!(event["regarding"]["name"], "bad");
}
