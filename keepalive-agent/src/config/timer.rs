//! The timers of a policy: how each is written, in which unit and within which
//! bounds.

use std::time::Duration;

use keepalive_common::policy::{
    MAX_PROBES, MAX_SECONDS, MAX_USER_TIMEOUT, MIN_PROBES, MIN_SECONDS, MIN_USER_TIMEOUT, Range,
};
use toml::de::DeValue;

use crate::duration;

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
    const fn bounds(self) -> (u32, u32) {
        match self {
            Self::Idle | Self::Interval => (MIN_SECONDS, MAX_SECONDS),
            Self::Probes => (MIN_PROBES, MAX_PROBES),
            Self::UserTimeout => (MIN_USER_TIMEOUT, MAX_USER_TIMEOUT),
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
    pub(super) at_least: Option<u32>,
    pub(super) at_most: Option<u32>,
}

/// What an application gets that set nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Default {
    /// This value.
    Value(u32),
    /// Nothing: it stays unset.
    Leave,
    /// idle + interval × probes; of the user-timeout only.
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
            at_least: Some(value),
            at_most: Some(value),
        }
    }

    /// The range that goes to the kernel, and whether its default is derived.
    /// `inherited` is that of the policy this one is completed from, which
    /// gives only the default: bounds belong to the table they are written in.
    pub(super) fn complete(self, inherited: (Range, bool)) -> (Range, bool) {
        let (default, derive) = match self.default {
            Some(Default::Value(value)) => (value, false),
            Some(Default::Leave) => (0, false),
            Some(Default::Derive) => (0, true),
            None => (inherited.0.default, inherited.1),
        };
        let range = Range {
            default,
            at_least: self.at_least.unwrap_or(0),
            at_most: self.at_most.unwrap_or(u32::MAX),
        };
        (range, derive)
    }

    /// What contradicts itself within the table.
    pub(super) fn contradiction(self, timer: Timer) -> Option<String> {
        let show = |value| timer.show(value);
        if let (Some(least), Some(most)) = (self.at_least, self.at_most)
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
        if let Some(least) = self.at_least.filter(|least| default < *least) {
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
