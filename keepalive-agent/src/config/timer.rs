//! The timers of a policy: how each is written, in which unit and within which
//! bounds.

use std::time::Duration;

use keepalive_common::policy::{
    MAX_PROBES, MAX_SECONDS, MAX_USER_TIMEOUT, MIN_PROBES, MIN_SECONDS, MIN_USER_TIMEOUT, Policy,
    Range, SysctlTimer,
};
use serde::{Deserialize, Serialize};
use toml::de::DeValue;

use crate::duration;

/// The keys of a table that stands for a timer.
pub(super) const TABLE_KEYS: [&str; 4] = ["default", "at-least", "at-most", "exactly"];

/// One of the four timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    Idle,
    Interval,
    Probes,
    UserTimeout,
}

impl Timer {
    pub(super) const ALL: [Self; 4] = [Self::Idle, Self::Interval, Self::Probes, Self::UserTimeout];

    pub(super) const fn key(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Interval => "interval",
            Self::Probes => "probes",
            Self::UserTimeout => "user-timeout",
        }
    }

    /// What the kernel accepts, in the timer's own unit.
    pub(super) const fn bounds(self) -> (u32, u32) {
        match self {
            Self::Idle | Self::Interval => (MIN_SECONDS, MAX_SECONDS),
            Self::Probes => (MIN_PROBES, MAX_PROBES),
            Self::UserTimeout => (MIN_USER_TIMEOUT, MAX_USER_TIMEOUT),
        }
    }

    /// The sysctl that stands in for it, if there is one.
    pub(super) const fn sysctl(self) -> Option<SysctlTimer> {
        match self {
            Self::Idle => Some(SysctlTimer::Idle),
            Self::Interval => Some(SysctlTimer::Interval),
            Self::Probes => Some(SysctlTimer::Probes),
            Self::UserTimeout => None,
        }
    }

    /// Its range in a policy.
    pub(super) const fn range_of(self, policy: &mut Policy) -> &mut Range {
        match self {
            Self::Idle => &mut policy.idle,
            Self::Interval => &mut policy.interval,
            Self::Probes => &mut policy.probes,
            Self::UserTimeout => &mut policy.user_timeout,
        }
    }

    /// The word that stands for a default of this timer, if it does.
    pub(super) fn word(self, word: &str) -> Option<Default> {
        match (word, self) {
            ("leave", _) => Some(Default::Leave),
            ("derive", Self::UserTimeout) => Some(Default::Derive),
            ("sysctl", Self::Idle | Self::Interval | Self::Probes) => Some(Default::Sysctl),
            _ => None,
        }
    }

    /// The words that stand for a default, as a message names them.
    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::UserTimeout => "a duration such as \"30s\", or \"derive\" or \"leave\"",
            Self::Probes => "a number, or \"sysctl\" or \"leave\"",
            Self::Idle | Self::Interval => "a duration such as \"60s\", or \"sysctl\" or \"leave\"",
        }
    }

    /// A value of this timer as a person reads it.
    pub(super) fn show(self, value: u32) -> String {
        match self {
            Self::Idle | Self::Interval => duration::show_seconds(value),
            Self::Probes => value.to_string(),
            Self::UserTimeout => duration::show_milliseconds(value),
        }
    }

    /// Reads one value.
    pub(super) fn value(self, value: &DeValue<'_>) -> Result<u32, String> {
        let number = match (self, value) {
            (Self::Probes, DeValue::Integer(integer)) => {
                i128::from_str_radix(integer.as_str(), integer.radix())
                    .map_err(|_| self.out_of_range())?
            }
            (Self::Probes, _) => return Err(format!("must be a number, {}", self.range())),
            (_, DeValue::String(text)) => self.duration(text)?,
            (_, DeValue::Integer(_) | DeValue::Float(_)) => {
                return Err("a duration needs a unit, as in \"60s\" or \"2m\"".to_owned());
            }
            (_, other) => {
                return Err(format!(
                    "must be a duration such as \"60s\" or a table of bounds, not a TOML {}",
                    other.type_str()
                ));
            }
        };
        let (min, max) = self.bounds();
        u32::try_from(number)
            .ok()
            .filter(|number| (min..=max).contains(number))
            .ok_or_else(|| self.out_of_range())
    }

    /// A duration in the timer's unit; fractions of it would be lost silently.
    fn duration(self, text: &str) -> Result<i128, String> {
        let duration = humantime::parse_duration(text).map_err(|error| match error {
            humantime::DurationError::NumberOverflow => self.out_of_range(),
            _ => "not a duration; write it like \"60s\", \"2m\" or \"1h 30m\"".to_owned(),
        })?;
        let (unit, name) = match self {
            Self::UserTimeout => (Duration::from_millis(1), "milliseconds"),
            _ => (Duration::from_secs(1), "seconds"),
        };
        if !duration.as_nanos().is_multiple_of(unit.as_nanos()) {
            return Err(format!(
                "must be whole {name}: the kernel knows no finer ones"
            ));
        }
        Ok(i128::try_from(duration.as_nanos() / unit.as_nanos()).unwrap_or(i128::MAX))
    }

    fn out_of_range(self) -> String {
        format!("out of range: {}", self.range())
    }

    /// What the kernel accepts, for a message.
    fn range(self) -> String {
        let (min, max) = self.bounds();
        match self {
            Self::Idle | Self::Interval => {
                format!("{min}s to {max}s ({})", duration::show_seconds(max))
            }
            Self::Probes => format!("{min} to {max}"),
            Self::UserTimeout => {
                format!("{min}ms to {max}ms ({})", duration::show_milliseconds(max))
            }
        }
    }
}

/// A timer as written; what is not mentioned comes from elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) default: Option<Default>,
    pub(super) at_least: Option<AtLeast>,
    pub(super) at_most: Option<u32>,
}

/// What an application gets that set nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Default {
    /// This value.
    Value(u32),
    /// Nothing: it stays unset.
    Leave,
    /// The sysctl of the namespace; of the timers of keepalive only.
    Sysctl,
    /// What follows from the other timers; of the user-timeout only.
    Derive,
}

impl Default {
    /// Writes it into a policy in the place of the default there.
    pub(super) fn fill(self, timer: Timer, policy: &mut Policy) {
        timer.range_of(policy).default = match self {
            Self::Value(value) => value,
            Self::Leave | Self::Sysctl | Self::Derive => 0,
        };
        if let Some(sysctl) = timer.sysctl() {
            *policy = policy.with_sysctl(sysctl, self == Self::Sysctl);
        }
        if timer == Timer::UserTimeout {
            *policy = policy.with_derived_user_timeout(self == Self::Derive);
        }
    }

    /// The word for it, where it is none of a value.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Value(_) => "a value",
            Self::Leave => "leave",
            Self::Sysctl => "sysctl",
            Self::Derive => "derive",
        }
    }
}

/// A lower bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtLeast {
    /// This value.
    Value(u32),
    /// What follows from the other timers; of the user-timeout only.
    Derive,
}

impl Written {
    /// A single value, as in `idle = "60s"`.
    pub(super) const fn fills(default: Default) -> Self {
        Self {
            default: Some(default),
            at_least: None,
            at_most: None,
        }
    }

    /// As in `idle = { exactly = "60s" }`.
    pub(super) const fn exactly(value: u32) -> Self {
        Self {
            default: Some(Default::Value(value)),
            at_least: Some(AtLeast::Value(value)),
            at_most: Some(value),
        }
    }

    /// Writes it into a policy, which so far is the one that this one is
    /// completed from: that gives the default where none is written, and nothing
    /// else. Bounds belong to the table they are written in.
    pub(super) fn complete(self, timer: Timer, policy: &mut Policy) {
        if let Some(default) = self.default {
            default.fill(timer, policy);
        }
        let range = timer.range_of(policy);
        range.at_least = match self.at_least {
            Some(AtLeast::Value(value)) => value,
            Some(AtLeast::Derive) | None => 0,
        };
        range.at_most = self.at_most.unwrap_or(u32::MAX);
        if timer == Timer::UserTimeout {
            *policy = policy.with_derived_at_least(self.at_least == Some(AtLeast::Derive));
        }
    }

    /// What contradicts itself within the table.
    pub(super) fn contradiction(self, timer: Timer) -> Option<String> {
        let show = |value| timer.show(value);
        let least = match self.at_least {
            Some(AtLeast::Value(least)) => Some(least),
            Some(AtLeast::Derive) | None => None,
        };
        if let (Some(least), Some(most)) = (least, self.at_most)
            && least > most
        {
            return Some(format!(
                "at-least {} is above at-most {}",
                show(least),
                show(most)
            ));
        }
        let Some(Default::Value(default)) = self.default else {
            return None;
        };
        if let Some(least) = least.filter(|least| default < *least) {
            return Some(format!(
                "default {} is below at-least {}",
                show(default),
                show(least)
            ));
        }
        let most = self.at_most.filter(|most| default > *most)?;
        Some(format!(
            "default {} is above at-most {}",
            show(default),
            show(most)
        ))
    }
}
