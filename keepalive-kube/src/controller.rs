//! Controller: tells people what became of their policies: accepted or not and
//! why, and on how many nodes they are in force. One for the cluster; a second
//! beside it writes the same.

use std::time::Duration;

use anyhow::Result;
use futures::StreamExt as _;
use k8s_openapi::{api::core::v1::ObjectReference, jiff::Timestamp};
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::warn;

use crate::{
    api::{CONTROLLER, Kind},
    config::Rules,
    objects::{NodeReport, PolicyId, PolicyObject},
    policy::Refusal,
    watch::{self, Audience, Watched},
};

/// How often statuses are written at the most: nodes come one by one.
const EVERY: Duration = Duration::from_secs(5);

/// How long it waits at the most to try again what the API did not take.
const LONGEST_WAIT: Duration = Duration::from_mins(5);

/// The API takes no longer note in an event.
const LONGEST_NOTE: usize = 1024;

/// Runs until the future ends.
///
/// # Errors
///
/// None yet; what fails is logged and tried again.
pub async fn run(client: Client, until: impl Future<Output = ()>) -> Result<()> {
    let audience = Audience::Controller;
    let mut changes = watch::changes(&client, &audience);
    let mut watched = Watched::default();
    let reporter = Reporter {
        controller: CONTROLLER.to_owned(),
        instance: None,
    };
    let recorder = Recorder::new(client.clone(), reporter);
    let mut is_new = false;
    let mut pace = Pace::default();
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::pin!(until);
    loop {
        tokio::select! {
            () = &mut until => return Ok(()),
            change = changes.next() => {
                let Some(change) = change else { return Ok(()) };
                is_new |= watched.apply_all(change, &mut changes).is_any();
            }
            _ = ticks.tick() => {
                if is_new && watched.is_complete(&audience) && pace.is_due(Instant::now()) {
                    let all = write_all(&client, &recorder, &watched).await;
                    is_new = !all;
                    pace.after(all, Instant::now());
                }
            }
        }
    }
}

/// When statuses may be written again: after each failure in a row twice as long.
#[derive(Default)]
struct Pace {
    failures: u32,
    not_before: Option<Instant>,
}

impl Pace {
    fn is_due(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|not_before| now >= not_before)
    }

    fn after(&mut self, success: bool, now: Instant) {
        if success {
            *self = Self::default();
            return;
        }
        let wait = EVERY.saturating_mul(2_u32.saturating_pow(self.failures));
        self.failures += 1;
        self.not_before = now.checked_add(wait.min(LONGEST_WAIT));
    }
}

/// Writes what statuses have to say; whether all could be written.
async fn write_all(client: &Client, recorder: &Recorder, watched: &Watched) -> bool {
    let objects = &watched.objects;
    let mut all = true;
    for (id, verdict) in Rules::new(&objects.policies, &objects.namespaces).verdicts {
        let Some(object) = objects.policies.get(&id) else {
            continue;
        };
        let nodes = count_nodes(objects.nodes.values(), &id, object.generation);
        let Some(status) = status(object, &verdict, nodes, Timestamp::now()) else {
            continue;
        };
        if let Err(error) = write(client, &id, &status).await {
            warn!("the status of {id}: {error}");
            all = false;
            continue;
        }
        if let Err(refusal) = &verdict
            && is_news(object, refusal)
            && let Err(error) = tell(recorder, &id, object, refusal).await
        {
            warn!("an event about {id}: {error}");
        }
    }
    all
}

/// On how many nodes this generation of a policy is in force.
fn count_nodes<'a>(
    nodes: impl IntoIterator<Item = &'a NodeReport>,
    id: &PolicyId,
    generation: i64,
) -> usize {
    let id = id.to_string();
    let has = |node: &&NodeReport| node.0.get(&id) == Some(&generation);
    nodes.into_iter().filter(has).count()
}

/// The status of a policy; none where it is written already.
fn status(
    object: &PolicyObject,
    verdict: &Result<(), Refusal>,
    nodes: usize,
    now: Timestamp,
) -> Option<Value> {
    let (status, reason, message) = match verdict {
        // Kubernetes 1.20 takes an empty message for none, and refuses it.
        Ok(()) => (
            "True",
            "Accepted",
            "in force for what it selects".to_owned(),
        ),
        Err(refusal) => ("False", refusal.reason(), refusal.to_string()),
    };
    let before = condition(object);
    let since = before
        .filter(|before| before.get("status").and_then(Value::as_str) == Some(status))
        .and_then(|before| before.get("lastTransitionTime")?.as_str());
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let wanted = json!({
        "observedGeneration": object.generation,
        "nodes": nodes,
        "conditions": [{
            "type": "Accepted",
            "status": status,
            "reason": reason,
            "message": message,
            "observedGeneration": object.generation,
            "lastTransitionTime": since.map_or_else(|| now.to_string(), str::to_owned),
        }],
    });
    (wanted.as_object() != Some(&object.status)).then_some(wanted)
}

fn condition(object: &PolicyObject) -> Option<&Map<String, Value>> {
    let conditions = object.status.get("conditions")?.as_array()?;
    let is_accepted = |condition: &&Map<String, Value>| {
        condition.get("type").and_then(Value::as_str) == Some("Accepted")
    };
    conditions
        .iter()
        .filter_map(Value::as_object)
        .find(is_accepted)
}

/// Whether a refusal has not been told.
fn is_news(object: &PolicyObject, refusal: &Refusal) -> bool {
    let message = condition(object).and_then(|before| before.get("message")?.as_str());
    message != Some(refusal.to_string().as_str())
}

fn kind(id: &PolicyId) -> Kind {
    match id.namespace {
        Some(_) => Kind::Policy,
        None => Kind::ClusterPolicy,
    }
}

async fn write(client: &Client, id: &PolicyId, status: &Value) -> kube::Result<()> {
    let resource = kind(id).resource();
    let api: Api<DynamicObject> = match &id.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let patch = Patch::Merge(json!({ "status": status }));
    let params = PatchParams {
        field_manager: Some(CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    match api.patch_status(&id.name, &params, &patch).await {
        // It is gone by now.
        Err(kube::Error::Api(error)) if error.code == 404 => Ok(()),
        other => other.map(drop),
    }
}

async fn tell(
    recorder: &Recorder,
    id: &PolicyId,
    object: &PolicyObject,
    refusal: &Refusal,
) -> kube::Result<()> {
    let resource = kind(id).resource();
    let about = ObjectReference {
        api_version: Some(resource.api_version),
        kind: Some(resource.kind),
        name: Some(id.name.clone()),
        namespace: id.namespace.clone(),
        uid: Some(object.uid.clone()),
        ..ObjectReference::default()
    };
    let mut note = refusal.to_string();
    note.truncate(note.floor_char_boundary(LONGEST_NOTE));
    let event = Event {
        type_: EventType::Warning,
        reason: refusal.reason().to_owned(),
        note: Some(note),
        action: "Accept".to_owned(),
        secondary: None,
    };
    recorder.publish(&event, &about).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> Result<(), Refusal> {
        Err(Refusal::Invalid("spec.idle: wrong".to_owned()))
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn what_fails_is_tried_later_and_later() {
        let begin = Instant::now();
        let mut pace = Pace::default();
        assert!(pace.is_due(begin));
        for wait in [5, 10, 20, 40, 80, 160, 300, 300] {
            pace.after(false, begin);
            assert!(!pace.is_due(begin + Duration::from_secs(wait - 1)));
            assert!(pace.is_due(begin + Duration::from_secs(wait)));
        }
        pace.after(true, begin);
        assert!(pace.is_due(begin));
    }

    #[test]
    fn a_status_is_written_once() {
        let mut object = PolicyObject {
            generation: 2,
            ..PolicyObject::default()
        };
        let first = status(&object, &Ok(()), 3, at(1)).unwrap();
        assert_eq!(first["conditions"][0]["status"], "True");
        assert_eq!(
            first["conditions"][0]["lastTransitionTime"],
            "1970-01-01T00:00:01Z"
        );
        assert_eq!(first["nodes"], 3);
        object.status = first.as_object().unwrap().clone();
        assert_eq!(status(&object, &Ok(()), 3, at(2)), None);
        // A node more is no transition.
        let more = status(&object, &Ok(()), 4, at(2)).unwrap();
        assert_eq!(more["conditions"], first["conditions"]);
        let other = status(&object, &refused(), 4, at(2)).unwrap();
        assert_eq!(other["conditions"][0]["reason"], "Invalid");
        assert_eq!(
            other["conditions"][0]["lastTransitionTime"],
            "1970-01-01T00:00:02Z"
        );
    }

    #[test]
    fn a_refusal_is_told_once() {
        let mut object = PolicyObject::default();
        let refusal = refused().unwrap_err();
        assert!(is_news(&object, &refusal));
        object.status = status(&object, &refused(), 0, at(1))
            .unwrap()
            .as_object()
            .unwrap()
            .clone();
        assert!(!is_news(&object, &refusal));
        assert!(is_news(
            &object,
            &Refusal::Invalid("spec.probes: wrong".to_owned())
        ));
    }

    #[test]
    fn nodes_with_an_older_generation_do_not_count() {
        let id = PolicyId {
            namespace: Some("shop".to_owned()),
            name: "web".to_owned(),
        };
        let node = |generation| NodeReport([("shop/web".to_owned(), generation)].into());
        let nodes = [node(1), node(2), node(2), NodeReport::default()];
        assert_eq!(count_nodes(&nodes, &id, 2), 2);
    }
}
