//! What people and machines read: aligned tables, JSON lines.

use std::{
    fmt::Display,
    io::{self, Write},
};

use anyhow::{Context as _, Result};
use keepalive_common::policy::{Keepalive, Policy, Range};
use serde::Serialize;

use super::table;
use crate::{
    duration,
    names::{PrintableLines, printable, write_json},
};

const PRINTING: &str = "printing to standard output";

/// Prints lines of text. Unlike `println!` it does not panic when nobody reads.
pub(super) fn text(text: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{}", PrintableLines(&text.to_string()))?;
    out.flush().context(PRINTING)
}

/// Prints a table with a header, columns aligned.
pub(super) fn table<const COLUMNS: usize>(
    header: [&str; COLUMNS],
    rows: impl IntoIterator<Item = [String; COLUMNS]>,
) -> Result<()> {
    text(table_text(header, rows))
}

/// A table with a header, columns aligned, as wide as the terminal at the most.
pub(super) fn table_text<const COLUMNS: usize>(
    header: [&str; COLUMNS],
    rows: impl IntoIterator<Item = [String; COLUMNS]>,
) -> String {
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|row| row.iter().map(|cell| printable(cell).to_string()).collect())
        .collect();
    table::lay_out(&header, &rows, table::width())
}

/// Prints a paragraph, broken into lines that fit the terminal.
pub(super) fn paragraph(sentences: impl Display) -> Result<()> {
    let lines = table::wrap(&sentences.to_string(), table::width());
    text(format_args!("{}\n", lines.join("\n")))
}

/// Prints one JSON object on a line of its own.
pub(super) fn json(record: &impl Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    write_json(record, &mut out).context(PRINTING)?;
    out.flush().context(PRINTING)
}

/// The wishes of a policy, as people read them: keepalive, idle, interval,
/// probes, user-timeout.
pub(super) fn wishes(policy: &Policy) -> [String; 5] {
    [
        keepalive(policy).to_owned(),
        range(&policy.idle, None, duration::show_seconds),
        range(&policy.interval, None, duration::show_seconds),
        range(&policy.probes, None, |probes| probes.to_string()),
        range(
            &policy.user_timeout,
            policy.derives_user_timeout().then_some("derive"),
            duration::show_milliseconds,
        ),
    ]
}

fn keepalive(policy: &Policy) -> &'static str {
    match policy.keepalive() {
        Keepalive::On => "on",
        Keepalive::Off => "off",
        Keepalive::Leave => "leave",
    }
}

/// `1m`, `exactly 1m`, `1m (30s to 5m)`, `1m (at most 5m)`, `leave`.
fn range(range: &Range, word: Option<&str>, show: impl Fn(u32) -> String) -> String {
    let default = match word {
        Some(word) => word.to_owned(),
        None if range.default == 0 => "leave".to_owned(),
        None if *range == Range::exactly(range.default) => {
            return format!("exactly {}", show(range.default));
        }
        None => show(range.default),
    };
    match (range.at_least, range.at_most) {
        (0, u32::MAX) => default,
        (least, u32::MAX) => format!("{default} (at least {})", show(least)),
        (0, most) => format!("{default} (at most {})", show(most)),
        (least, most) => format!("{default} ({} to {})", show(least), show(most)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_reads_at_a_glance() {
        let mut policy = Policy::BUILT_IN;
        assert_eq!(wishes(&policy), ["on", "1m", "10s", "6", "leave"]);
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
                "derive (1ms to 1m 30s)"
            ]
        );
    }
}
