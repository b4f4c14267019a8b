//! Uninstalling: what the hooks of the Helm chart wait for.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::{apps::v1::DaemonSet, core::v1 as core};
use kube::{
    Api, Client,
    api::{ListParams, PartialObjectMeta},
};
use tokio::time::{Instant, sleep};

/// The label and value of an agent's pods.
const AGENTS: &str = "app.kubernetes.io/name=keepalive-agent";

/// The DaemonSet that takes enforcement off each node.
const DETACH: &str = "keepalive-detach";

/// A node that does not answer keeps what it has; the rest is done by then.
const PATIENCE: Duration = Duration::from_mins(5);

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum State {
    /// No agent runs any more, which would put itself in force again.
    AgentsGone,
    /// Enforcement is taken off on every node.
    Detached,
}

/// Waits, in the namespace of this pod.
///
/// # Errors
///
/// It takes longer than five minutes, or the API does not tell.
pub async fn wait(client: Client, state: State) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let left = match state {
            State::AgentsGone => agents(&client).await?,
            State::Detached => attached(&client).await?,
        };
        if left == 0 {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("{left} nodes have not answered in 5 minutes; `keepalive-agent detach` there");
        }
        sleep(Duration::from_secs(1)).await;
    }
}

async fn agents(client: &Client) -> Result<usize> {
    let pods: Api<PartialObjectMeta<core::Pod>> = Api::default_namespaced(client.clone());
    let found = pods.list(&ListParams::default().labels(AGENTS)).await;
    Ok(found.context("listing the agents")?.items.len())
}

/// Nodes on which it is not done.
async fn attached(client: &Client) -> Result<usize> {
    let sets: Api<DaemonSet> = Api::default_namespaced(client.clone());
    let set = sets
        .get(DETACH)
        .await
        .with_context(|| format!("looking at {DETACH}"))?;
    Ok(not_done(&set))
}

fn not_done(set: &DaemonSet) -> usize {
    let Some(status) = set.status.as_ref().filter(|status| {
        status.observed_generation.is_some()
            && status.observed_generation == set.metadata.generation
    }) else {
        // Nobody has counted the nodes.
        return 1;
    };
    let left = status.desired_number_scheduled - status.number_ready;
    usize::try_from(left).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nodes_are_counted_once_the_controller_knows_the_set() {
        for (status, expected) in [
            (json!(null), 1),
            (json!({ "desiredNumberScheduled": 0, "numberReady": 0 }), 1),
            (
                json!({ "observedGeneration": 1, "desiredNumberScheduled": 0, "numberReady": 0 }),
                1,
            ),
            (
                json!({ "observedGeneration": 2, "desiredNumberScheduled": 3, "numberReady": 1 }),
                2,
            ),
            (
                json!({ "observedGeneration": 2, "desiredNumberScheduled": 3, "numberReady": 3 }),
                0,
            ),
        ] {
            let mut object = json!({ "metadata": { "generation": 2 } });
            if let Some(fields) = status.as_object() {
                let mut whole = json!({
                    "currentNumberScheduled": 0, "numberMisscheduled": 0,
                });
                whole.as_object_mut().unwrap().extend(fields.clone());
                object["status"] = whole;
            }
            let set = serde_json::from_value(object).unwrap();
            assert_eq!(not_done(&set), expected, "{status}");
        }
    }
}
