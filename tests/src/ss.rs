use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{Netns, Place, output};

/// How long a test may take from making a connection to looking at it.
const SLACK: Duration = Duration::from_secs(25);

/// The timer that `ss -o` shows for a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timer {
    /// `keepalive`, `on` (retransmission), `persist`, `timewait`, `unknown`.
    pub kind: String,
    /// How long until it fires.
    pub left: Duration,
    /// How many probes or retransmissions went unanswered.
    pub unanswered: u32,
}

impl Timer {
    /// Whether this is the timer of a connection that fell idle a moment ago, with
    /// `idle` seconds until the first probe.
    #[must_use]
    pub fn is_fresh_keepalive(&self, idle: u64) -> bool {
        // From ten minutes on, ss cuts the seconds off.
        let cut = if idle >= 600 { 60 } else { 0 };
        let idle = Duration::from_secs(idle);
        let slack = SLACK + Duration::from_secs(cut);
        self.kind == "keepalive" && self.left <= idle && self.left + slack >= idle
    }
}

/// The filter that finds one side of a connection.
#[must_use]
pub fn between(local: SocketAddr, peer: SocketAddr) -> String {
    format!("sport = :{} and dport = :{}", local.port(), peer.port())
}

/// The timers of the established sockets for which `ss`'s filter holds, seen from
/// outside with `ss -tno`. None for a socket that has no timer running.
///
/// # Errors
///
/// `ss` fails, or says something that cannot be read.
pub fn timers(netns: Option<&Netns>, filter: &str) -> Result<Vec<Option<Timer>>> {
    timers_in_state("established", netns, filter)
}

/// The same for sockets in another state, named as `ss` does.
///
/// # Errors
///
/// As [`timers`].
pub fn timers_in_state(
    state: &str,
    netns: Option<&Netns>,
    filter: &str,
) -> Result<Vec<Option<Timer>>> {
    let place = Place {
        cgroup: None,
        netns,
    };
    let mut command = place.command("ss");
    command.args(["-tnoH", "state", state]);
    command.args(filter.split_whitespace());
    let output = output(&mut command, Duration::from_secs(10))?;
    ensure!(output.code == Some(0), "ss: {}", output.stderr.trim());
    let timer = |socket: &str| {
        let timer = socket.split_once("timer:(").map(|(_, timer)| parse(timer));
        timer
            .transpose()
            .with_context(|| format!("cannot read `{socket}`"))
    };
    output.stdout.lines().map(timer).collect()
}

/// The same, for a filter that finds exactly one socket.
///
/// # Errors
///
/// As [`timers`], and when it finds none or several.
pub fn timer(netns: Option<&Netns>, filter: &str) -> Result<Option<Timer>> {
    let mut timers = timers(netns, filter)?;
    ensure!(timers.len() == 1, "{} sockets for `{filter}`", timers.len());
    Ok(timers.remove(0))
}

/// Reads `keepalive,1min20sec,0)`.
fn parse(text: &str) -> Result<Timer> {
    let mut fields = text.split(')').next().unwrap_or_default().split(',');
    let mut next = || fields.next().context("a field is missing");
    Ok(Timer {
        kind: next()?.to_owned(),
        left: parse_time(next()?)?,
        unanswered: next()?.parse()?,
    })
}

/// `ss` writes 80 s as `1min20sec`, 7.25 s as `7.250ms` and 0.25 s as `250ms`.
fn parse_time(text: &str) -> Result<Duration> {
    let (minutes, rest) = text.split_once("min").unwrap_or(("0", text));
    let minutes: u64 = minutes.parse()?;
    let below = if rest.is_empty() {
        Duration::ZERO
    } else if let Some(seconds) = rest.strip_suffix("sec") {
        Duration::from_secs(seconds.parse()?)
    } else {
        let rest = rest.strip_suffix("ms").context("no unit")?;
        let (seconds, milliseconds) = rest.split_once('.').unwrap_or(("0", rest));
        Duration::from_secs(seconds.parse()?) + Duration::from_millis(milliseconds.parse()?)
    };
    Ok(Duration::from_secs(minutes * 60) + below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_times_that_ss_writes() {
        for (text, milliseconds) in [
            ("119min", 7_140_000),
            ("1min20sec", 80_000),
            ("59sec", 59_000),
            ("7.250ms", 7_250),
            ("250ms", 250),
        ] {
            assert_eq!(
                parse_time(text).expect(text),
                Duration::from_millis(milliseconds),
                "{text}"
            );
        }
        assert!(parse_time("soon").is_err());
    }

    #[test]
    fn reads_a_timer() {
        let timer = parse("keepalive,59sec,2)").expect("a timer");
        assert_eq!(timer.kind, "keepalive");
        assert_eq!(timer.left, Duration::from_secs(59));
        assert_eq!(timer.unanswered, 2);
        assert!(parse("keepalive").is_err());
    }
}
