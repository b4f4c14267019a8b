//! Presets: timers that keep a path open, as `path` chooses them.

use keepalive_common::policy::MAX_SECONDS;

use super::timer::{AtLeast, Default, Timer, Written};
use crate::{duration, paths::IdleTimeout};

/// Unanswered probes that a policy for a path sends at least: two may be lost.
pub(super) const PROBES: u32 = 3;

/// The shortest path that there are timers for: a tenth of it is the shortest
/// interval, of a second.
const SHORTEST: u32 = 10;

/// A path by the way it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Preset {
    /// As it is written: `aws-nat`, `350s`.
    pub(super) path: String,
    pub(super) timeout: IdleTimeout,
}

impl Preset {
    pub(super) fn new(text: &str) -> Result<Self, String> {
        let timeout: IdleTimeout = text.parse()?;
        if timeout.duration().as_secs() < SHORTEST.into() {
            return Err(format!(
                "must be at least {}: the shortest idle timeout that timers of whole seconds keep \
                 a connection below, with room for two lost probes",
                duration::show_seconds(SHORTEST)
            ));
        }
        Ok(Self {
            path: text.to_owned(),
            timeout,
        })
    }

    /// What it chooses; nothing for the user-timeout. With idle no longer than
    /// half of the timeout and the interval no longer than a tenth, the third
    /// probe goes out when seven tenths have passed.
    pub(super) fn timer(&self, timer: Timer) -> Option<Written> {
        let part = |of: u32| {
            let seconds = self.timeout.duration().as_secs() / u64::from(of);
            u32::try_from(seconds)
                .unwrap_or(MAX_SECONDS)
                .min(MAX_SECONDS)
        };
        let at_most = |usual: u32, most: u32| Written {
            default: Some(Default::Value(usual.min(most))),
            at_least: None,
            at_most: Some(most),
        };
        match timer {
            Timer::Idle => Some(at_most(60, part(2))),
            Timer::Interval => Some(at_most(10, part(10))),
            Timer::Probes => Some(Written {
                default: Some(Default::Value(6)),
                at_least: Some(AtLeast::Value(PROBES)),
                at_most: None,
            }),
            Timer::UserTimeout => None,
        }
    }
}
