//! Kernel × test, for the terminal and for docs/kernels.md.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use super::{
    support::Verdict,
    transcript::{Finding, Transcript},
};

/// What came of one kernel.
pub(super) struct Outcome {
    /// Name of the series.
    pub(super) series: &'static str,
    /// The kernel's version, as the package names it.
    pub(super) version: String,
    pub(super) verdicts: Vec<(String, Verdict)>,
    /// What is wrong with the run as a whole.
    pub(super) faults: Vec<String>,
    pub(super) check: Vec<Finding>,
    pub(super) took: Duration,
}

impl Outcome {
    /// Of a kernel that could not even be fetched or booted.
    pub(super) fn none(series: &'static str, error: &anyhow::Error) -> Self {
        Self {
            series,
            version: "unknown".to_owned(),
            verdicts: Vec::new(),
            faults: vec![format!("{error:#}")],
            check: Transcript::default().check,
            took: Duration::ZERO,
        }
    }

    /// How many tests got a verdict like this.
    pub(super) fn count(&self, like: impl Fn(&Verdict) -> bool) -> usize {
        let verdicts = self.verdicts.iter().map(|(_, verdict)| verdict);
        verdicts.filter(|verdict| like(verdict)).count()
    }

    fn mark(&self, test: &str) -> &'static str {
        let verdict = self.verdicts.iter().find(|(name, _)| name == test);
        match verdict.map(|(_, verdict)| verdict) {
            Some(Verdict::Passed) => "passed",
            Some(Verdict::NotSupported(_)) => "not supported",
            Some(Verdict::HostOnly(_)) => "host only",
            Some(Verdict::Failed(_)) => "FAILED",
            None => "-",
        }
    }
}

/// The tests of all kernels, in order.
fn tests(outcomes: &[Outcome]) -> Vec<&str> {
    let mut tests = Vec::new();
    for (test, _) in outcomes.iter().flat_map(|outcome| &outcome.verdicts) {
        if !tests.contains(&test.as_str()) {
            tests.push(test);
        }
    }
    tests
}

/// Reasons and the tests that have them, by kernel.
fn reasons<'a>(
    outcomes: &'a [Outcome],
    of: impl Fn(&'a Verdict) -> Option<&'a str>,
) -> BTreeMap<&'a str, BTreeMap<&'a str, Vec<&'a str>>> {
    let mut reasons = BTreeMap::<_, BTreeMap<_, Vec<_>>>::new();
    for outcome in outcomes {
        for (test, verdict) in &outcome.verdicts {
            if let Some(reason) = of(verdict) {
                let tests = reasons.entry(reason).or_default();
                tests.entry(test.as_str()).or_default().push(outcome.series);
            }
        }
    }
    reasons
}

fn not_supported(verdict: &Verdict) -> Option<&str> {
    match verdict {
        Verdict::NotSupported(reason) => Some(reason),
        _ => None,
    }
}

fn host_only(verdict: &Verdict) -> Option<&str> {
    match verdict {
        Verdict::HostOnly(reason) => Some(reason),
        _ => None,
    }
}

/// For the terminal: the table, then what failed and why.
pub(super) fn text(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    let tests = tests(outcomes);
    let width = tests.iter().map(|test| test.len()).max().unwrap_or(0);
    let mut row = |test: &str, cells: &mut dyn Iterator<Item = &str>| {
        let _ = write!(text, "{test:width$}");
        for cell in cells {
            let _ = write!(text, "  {cell:13}");
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    };
    row("", &mut outcomes.iter().map(|outcome| outcome.series));
    for test in tests {
        row(test, &mut outcomes.iter().map(|outcome| outcome.mark(test)));
    }
    for (title, reasons) in [
        ("not supported", reasons(outcomes, not_supported)),
        ("host only", reasons(outcomes, host_only)),
    ] {
        for (reason, tests) in reasons {
            let _ = writeln!(text, "{title}: {reason} ({} tests)", tests.len());
        }
    }
    for outcome in outcomes {
        for fault in &outcome.faults {
            let _ = writeln!(text, "FAILED on {}: {fault}", outcome.series);
        }
        for (test, verdict) in &outcome.verdicts {
            if let Verdict::Failed(why) = verdict {
                let why = why.replace('\n', "\n    ");
                let _ = writeln!(text, "FAILED on {}: {test}: {why}", outcome.series);
            }
        }
    }
    text
}

/// For docs/kernels.md.
pub(super) fn markdown(outcomes: &[Outcome], emulator: &str, commit: &str) -> String {
    let mut text = format!(
        "# Kernels\n\n\
         Written by `cargo xtask test --vm --write-docs`, which boots each kernel in QEMU and \
         runs the live tests inside. Do not edit: run it again.\n\n\
         Commit {commit}, QEMU {emulator}. The kernels are Debian's, as of the day of the run:\n\n\
         | kernel | version | passed | failed | not supported | host only |\n\
         |---|---|---|---|---|---|\n"
    );
    for outcome in outcomes {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} |",
            outcome.series,
            outcome.version,
            outcome.count(|verdict| *verdict == Verdict::Passed),
            outcome.count(|verdict| matches!(verdict, Verdict::Failed(_))) + outcome.faults.len(),
            outcome.count(|verdict| not_supported(verdict).is_some()),
            outcome.count(|verdict| host_only(verdict).is_some()),
        );
    }
    text.push_str("\n## What `keepalive-agent check` says\n\n");
    let mut features = Vec::new();
    for finding in outcomes.iter().flat_map(|outcome| &outcome.check) {
        if !features.contains(&&finding.feature) {
            features.push(&finding.feature);
        }
    }
    heading(&mut text, "needed", outcomes);
    for feature in features {
        let _ = write!(text, "| {feature} |");
        for outcome in outcomes {
            let finding = outcome.check.iter().find(|found| found.feature == *feature);
            let says = finding.map_or_else(
                || "-".to_owned(),
                |finding| {
                    let first = finding.detail.lines().next().unwrap_or_default();
                    // What the verifier says comes below.
                    let first = first.trim_end_matches("; the verifier's last words:");
                    format!("{}: {}", finding.answer, first.replace('|', "\\|"))
                },
            );
            let _ = write!(text, " {says} |");
        }
        text.push('\n');
    }
    text.push_str("\n## Not supported\n\n");
    list(&mut text, &reasons(outcomes, not_supported), outcomes.len());
    text.push_str("\n## On the host's kernel only\n\n");
    list(&mut text, &reasons(outcomes, host_only), outcomes.len());
    text.push_str("\n## Every test\n\n");
    heading(&mut text, "test", outcomes);
    for test in tests(outcomes) {
        let _ = write!(text, "| {test} |");
        for outcome in outcomes {
            let _ = write!(text, " {} |", outcome.mark(test));
        }
        text.push('\n');
    }
    text
}

fn heading(text: &mut String, first: &str, outcomes: &[Outcome]) {
    let _ = write!(text, "| {first} |");
    for outcome in outcomes {
        let _ = write!(text, " {} |", outcome.series);
    }
    let _ = writeln!(text, "\n|{}", "---|".repeat(outcomes.len() + 1));
}

/// Reasons, and the tests that have them; with its kernels where that is not all
/// of them.
fn list(text: &mut String, reasons: &BTreeMap<&str, BTreeMap<&str, Vec<&str>>>, kernels: usize) {
    if reasons.is_empty() {
        text.push_str("Nothing.\n");
    }
    for (reason, tests) in reasons {
        let tests: Vec<_> = tests
            .iter()
            .map(|(test, on)| {
                if on.len() == kernels {
                    format!("`{test}`")
                } else {
                    format!("`{test}` ({})", on.join(", "))
                }
            })
            .collect();
        let _ = writeln!(text, "- {reason}: {}", tests.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(series: &'static str, verdicts: &[(&str, Verdict)]) -> Outcome {
        Outcome {
            series,
            version: format!("{series}.9"),
            verdicts: verdicts
                .iter()
                .map(|(test, verdict)| ((*test).to_owned(), verdict.clone()))
                .collect(),
            faults: Vec::new(),
            check: Vec::new(),
            took: Duration::ZERO,
        }
    }

    fn outcomes() -> [Outcome; 2] {
        let missing = Verdict::NotSupported("no MPTCP".to_owned());
        let failed = Verdict::Failed("left\nright".to_owned());
        [
            outcome("5.10", &[("a::b", Verdict::Passed), ("a::mptcp", missing)]),
            outcome("7", &[("a::b", failed)]),
        ]
    }

    #[test]
    fn the_table_has_a_column_per_kernel_and_names_what_failed() {
        let text = text(&outcomes());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "          5.10           7");
        assert_eq!(lines[1], "a::b      passed         FAILED");
        assert_eq!(lines[2], "a::mptcp  not supported  -");
        assert!(text.contains("not supported: no MPTCP (1 tests)\n"));
        assert!(text.contains("FAILED on 7: a::b: left\n    right\n"));
    }

    #[test]
    fn the_document_counts_and_explains() {
        let text = markdown(&outcomes(), "10.0.2", "abc");
        assert!(text.contains("| 5.10 | 5.10.9 | 1 | 0 | 1 | 0 |"));
        assert!(text.contains("| 7 | 7.9 | 0 | 1 | 0 | 0 |"));
        assert!(text.contains("- no MPTCP: `a::mptcp` (5.10)\n"));
        assert!(text.contains("| a::mptcp | not supported | - |"));
    }
}
