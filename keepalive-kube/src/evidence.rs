//! Evidence: whether the agent has in force what was written for it, by its own
//! metrics.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};

/// How long an agent may take over a change of its files (docs/config.md: a second
/// at most until they are read).
const TIME_TO_READ: Duration = Duration::from_secs(3);

/// For the whole answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Longer answers are not an agent's: 100,000 policies have some 60 MB.
const LONGEST: usize = 128 << 20;

/// Whether the agent has in force what was written then.
///
/// # Errors
///
/// The agent does not answer, or not as an agent.
pub async fn is_in_force(agent: &Path, written: SystemTime) -> Result<bool> {
    if written.elapsed().unwrap_or_default() < TIME_TO_READ {
        return Ok(false);
    }
    let metrics = timeout(PATIENCE, metrics(agent))
        .await
        .context("the agent does not answer")??;
    Ok(says_in_force(&metrics, written))
}

async fn metrics(agent: &Path) -> Result<String> {
    let stream = UnixStream::connect(agent).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get("/metrics").header(HOST, "agent");
    let request = request.body(Empty::<Bytes>::new())?;
    let answer = async move {
        let response = sender.send_request(request).await?;
        ensure!(response.status().is_success(), "{}", response.status());
        let body = Limited::new(response.into_body(), LONGEST).collect().await;
        let body = body.map_err(anyhow::Error::from_boxed)?;
        Ok(String::from_utf8(body.to_bytes().into())?)
    };
    let (answer, _) = tokio::join!(answer, connection);
    answer
}

fn says_in_force(metrics: &str, written: SystemTime) -> bool {
    let value = |name: &str| {
        let mut lines = metrics.lines();
        lines.find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(' ')?
                .trim()
                .parse::<f64>()
                .ok()
        })
    };
    let is = |name: &str, default: f64| value(name).unwrap_or(default) > 0.0;
    let looked = [
        "keepalive_policy_set_built_timestamp_seconds",
        "keepalive_last_reload_timestamp_seconds",
    ];
    // Whole seconds.
    let written = written
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    #[expect(clippy::cast_precision_loss, reason = "seconds have 31 bits")]
    let since = looked
        .iter()
        .filter_map(|name| value(name))
        .any(|at| at >= written as f64);
    // Nothing was read again since the agent started: nothing can have failed.
    since && is("keepalive_in_force", 0.0) && is("keepalive_last_reload_successful", 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_read_afterwards_and_taken_over_is_in_force() {
        let built = "keepalive_policy_set_built_timestamp_seconds";
        let reload = "keepalive_last_reload_timestamp_seconds";
        let good = "keepalive_last_reload_successful";
        for (metrics, expected) in [
            (format!("keepalive_in_force 1\n{built} 100\n"), true),
            (format!("keepalive_in_force 1\n{built} 99\n"), false),
            (format!("keepalive_in_force 0\n{built} 100\n"), false),
            (
                format!("keepalive_in_force 1\n{built} 9\n{reload} 101\n{good} 1\n"),
                true,
            ),
            (
                format!("keepalive_in_force 1\n{built} 9\n{reload} 101\n{good} 0\n"),
                false,
            ),
            (
                format!("keepalive_in_force 1\n{built} 9\n{reload} 12\n{good} 1\n"),
                false,
            ),
            (String::new(), false),
        ] {
            let written = UNIX_EPOCH + Duration::from_millis(100_900);
            assert_eq!(says_in_force(&metrics, written), expected, "{metrics}");
        }
    }
}
