//! What people and machines read: aligned tables, JSON lines.

use std::{
    fmt::Display,
    io::{self, Write},
};

use anyhow::{Context as _, Result};
use keepalive_common::policy::{Keepalive, Policy, Range, SysctlTimer};
use serde::Serialize;
use tabwriter::TabWriter;

use crate::duration;

const PRINTING: &str = "printing to standard output";

/// Prints text as it is. Unlike `println!` it does not panic when nobody reads.
pub(super) fn text(text: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}")?;
    out.flush().context(PRINTING)
}

/// Prints a table with a header, columns aligned.
pub(super) fn table<const COLUMNS: usize>(
    header: [&str; COLUMNS],
    rows: impl IntoIterator<Item = [String; COLUMNS]>,
) -> Result<()> {
    text(table_text(header, rows))
}

/// A table with a header, columns aligned.
pub(super) fn table_text<const COLUMNS: usize>(
    header: [&str; COLUMNS],
    rows: impl IntoIterator<Item = [String; COLUMNS]>,
) -> String {
    let mut lines = header.join("\t") + "\n";
    for row in rows {
        lines += &row.join("\t");
        lines.push('\n');
    }
    let mut out = TabWriter::new(Vec::new()).padding(2);
    // Memory can always be written to.
    let _ = out.write_all(lines.as_bytes());
    let aligned = out.into_inner().unwrap_or_default();
    String::from_utf8(aligned).unwrap_or(lines)
}

/// Prints one JSON object on a line of its own.
pub(super) fn json(record: &impl Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, record)?;
    writeln!(out)?;
    out.flush().context(PRINTING)
}

/// The wishes of a policy, as people read them: keepalive, idle, interval,
/// probes, user-timeout, give-up.
pub(super) fn wishes(policy: &Policy) -> [String; 6] {
    if policy.ignores() {
        return ["ignore", "-", "-", "-", "-", "-"].map(str::to_owned);
    }
    let word = |timer, range: &Range| {
        (range.default == 0 && policy.heeds_sysctl(timer)).then_some("sysctl")
    };
    let seconds = |timer, range: &Range| {
        let least = (range.at_least != 0).then(|| duration::show_seconds(range.at_least));
        self::range(range, word(timer, range), least, duration::show_seconds)
    };
    let probes = &policy.probes;
    let user_timeout = &policy.user_timeout;
    let least = match user_timeout.at_least {
        _ if policy.derives_at_least() => Some("derive".to_owned()),
        0 => None,
        least => Some(duration::show_milliseconds(least)),
    };
    [
        keepalive(policy).to_owned(),
        seconds(SysctlTimer::Idle, &policy.idle),
        seconds(SysctlTimer::Interval, &policy.interval),
        range(
            probes,
            word(SysctlTimer::Probes, probes),
            (probes.at_least != 0).then(|| probes.at_least.to_string()),
            |probes| probes.to_string(),
        ),
        range(
            user_timeout,
            policy.derives_user_timeout().then_some("derive"),
            least,
            duration::show_milliseconds,
        ),
        match policy.give_up {
            0 => "leave".to_owned(),
            give_up => duration::show_milliseconds(give_up),
        },
    ]
}

fn keepalive(policy: &Policy) -> &'static str {
    match policy.keepalive() {
        Keepalive::On => "on",
        Keepalive::Always => "always",
        Keepalive::Off => "off",
        Keepalive::Never => "never",
        Keepalive::Leave => "leave",
    }
}

/// `1m`, `exactly 1m`, `1m (30s to 5m)`, `1m (at most 5m)`, `leave`.
fn range(
    range: &Range,
    word: Option<&str>,
    least: Option<String>,
    show: impl Fn(u32) -> String,
) -> String {
    let default = match word {
        Some(word) => word.to_owned(),
        None if range.default == 0 => "leave".to_owned(),
        None if *range == Range::exactly(range.default) => {
            return format!("exactly {}", show(range.default));
        }
        None => show(range.default),
    };
    match (least, range.at_most) {
        (None, u32::MAX) => default,
        (Some(least), u32::MAX) => format!("{default} (at least {least})"),
        (None, most) => format!("{default} (at most {})", show(most)),
        (Some(least), most) => format!("{default} ({least} to {})", show(most)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_reads_at_a_glance() {
        let mut policy = Policy::BUILT_IN;
        assert_eq!(wishes(&policy), ["on", "1m", "10s", "6", "leave", "leave"]);
        policy = policy
            .with_keepalive(Keepalive::Leave)
            .with_derived_user_timeout(true);
        policy.idle = Range::exactly(250);
        policy.interval.at_least = 5;
        policy.probes.at_most = 9;
        policy.user_timeout.at_least = 1;
        policy.user_timeout.at_most = 90_000;
        assert_eq!(
            wishes(&policy),
            [
                "leave",
                "exactly 4m 10s",
                "10s (at least 5s)",
                "6 (at most 9)",
                "derive (1ms to 1m 30s)",
                "leave"
            ]
        );
        let mut policy = Policy::BUILT_IN
            .with_keepalive(Keepalive::Always)
            .with_derived_at_least(true)
            .with_sysctl(SysctlTimer::Interval, false);
        policy.idle = Range {
            at_most: 300,
            ..Range::LEAVE
        };
        policy.interval = Range::LEAVE;
        policy.give_up = 60_000;
        assert_eq!(
            wishes(&policy),
            [
                "always",
                "sysctl (at most 5m)",
                "leave",
                "6",
                "leave (at least derive)",
                "1m"
            ]
        );
        let ignores = policy.with_ignore(true);
        assert_eq!(wishes(&ignores), ["ignore", "-", "-", "-", "-", "-"]);
    }
}
