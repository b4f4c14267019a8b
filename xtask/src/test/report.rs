//! What the steps of `cargo xtask test` came to.

use std::{
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::exec;

/// All steps, in the order they ran.
#[derive(Default)]
pub(crate) struct Report {
    steps: Vec<Step>,
    /// `test: reason`, for each live test that found something missing.
    pub(crate) skips: Vec<String>,
}

/// One line of the summary.
pub(crate) struct Step {
    name: &'static str,
    outcome: Outcome,
    /// How many tests passed, those among them that found something missing.
    pub(crate) passed: usize,
    pub(crate) took: Duration,
    /// Why it was skipped, what mends it, or what else there is to say.
    pub(crate) note: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    Failed,
    Skipped,
}

impl Report {
    /// Adds a step and tells whether it went well.
    pub(crate) fn add(&mut self, step: Step) -> bool {
        let ok = step.outcome == Outcome::Ok;
        self.steps.push(step);
        ok
    }

    /// Whether no test at all ran, though nothing failed.
    pub(crate) fn ran_no_test(&self) -> bool {
        self.count(Outcome::Failed) == 0 && self.passed() == 0
    }

    fn count(&self, outcome: Outcome) -> usize {
        let steps = self.steps.iter();
        steps.filter(|step| step.outcome == outcome).count()
    }

    fn passed(&self) -> usize {
        self.steps.iter().map(|step| step.passed).sum()
    }

    /// Prints the summary.
    pub(crate) fn finish(&self) -> ExitCode {
        println!();
        let width = self.steps.iter().map(|step| step.name.len()).max();
        for step in &self.steps {
            println!("{}", step.line(width.unwrap_or_default()));
        }
        for skip in &self.skips {
            println!("skipped: {skip}");
        }
        println!(
            "{} of {} steps went well; {} tests passed, {} were skipped",
            self.count(Outcome::Ok),
            self.steps.len(),
            // The harness knows no skipping: to it, these tests passed.
            self.passed().saturating_sub(self.skips.len()),
            self.skips.len()
        );
        if self.is_failure(in_ci()) {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }

    fn is_failure(&self, in_ci: bool) -> bool {
        let skipped = self.count(Outcome::Skipped) + self.skips.len();
        if in_ci && skipped > 0 {
            println!("in CI a skip is a failure");
            return true;
        }
        self.count(Outcome::Failed) > 0
    }
}

/// Whether this is a run that nobody watches, as CI systems say by `CI=true`.
fn in_ci() -> bool {
    env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false")
}

impl Step {
    /// Does a step, which counts the tests that pass.
    pub(crate) fn run(name: &'static str, body: impl FnOnce(&mut usize) -> Result<()>) -> Self {
        let start = Instant::now();
        let mut step = Self::new(name, Outcome::Ok, "");
        if let Err(error) = body(&mut step.passed) {
            exec::say_error(&error);
            step.outcome = Outcome::Failed;
        }
        step.took = start.elapsed();
        step
    }

    pub(crate) fn new(name: &'static str, outcome: Outcome, note: &str) -> Self {
        Self {
            name,
            outcome,
            passed: 0,
            took: Duration::ZERO,
            note: note.to_owned(),
        }
    }

    /// Says what to do when the step failed.
    pub(crate) fn remedy(mut self, remedy: &str) -> Self {
        if self.outcome == Outcome::Failed {
            remedy.clone_into(&mut self.note);
        }
        self
    }

    fn line(&self, width: usize) -> String {
        let (code, outcome) = match self.outcome {
            Outcome::Ok => ("32", "ok     "),
            Outcome::Failed => ("1;31", "FAILED "),
            Outcome::Skipped => ("33", "skipped"),
        };
        let passed = match self.passed {
            0 => String::new(),
            passed => format!("{passed} passed "),
        };
        let line = format!(
            "{:width$}  {}  {:>6.1} s  {passed}{}",
            self.name,
            exec::paint_out(code, outcome),
            self.took.as_secs_f64(),
            self.note,
        );
        line.trim_end().to_owned()
    }
}

/// How many tests passed by a line such as `test result: ok. 3 passed; 0 failed; …`;
/// by any other line none. What failed, cargo's exit code tells.
pub(crate) fn passed(line: &str) -> usize {
    let result = line.split_once("test result: ").unwrap_or_default().1;
    let (before, _) = result.split_once(" passed;").unwrap_or_default();
    let count = before.rsplit(' ').next();
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// `test: reason` for each test that says in the file of skips that it is skipped.
pub(crate) fn skipped_tests(file: &str) -> Vec<String> {
    let skips = file
        .lines()
        .filter_map(|line| line.strip_prefix("skipped: "));
    skips.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_tests_are_read_from_what_the_harness_prints() {
        for (line, count) in [
            ("running 3 tests", 0),
            (
                "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured",
                3,
            ),
            ("test failed_once ... ok", 0),
            (
                "test result: \u{1b}[31mFAILED\u{1b}[m. 12 passed; 2 failed;",
                12,
            ),
        ] {
            assert_eq!(passed(line), count, "{line}");
        }
    }

    #[test]
    fn a_failed_step_is_a_failure_and_in_ci_a_skip_too() {
        let report = |outcome, skips: &[&str]| Report {
            steps: vec![Step::new("step", outcome, "")],
            skips: skips.iter().map(ToString::to_string).collect(),
        };
        let skip = "nginx: no nginx";
        for (report, anywhere, in_ci) in [
            (report(Outcome::Ok, &[]), false, false),
            (report(Outcome::Failed, &[]), true, true),
            (report(Outcome::Skipped, &[]), false, true),
            (report(Outcome::Ok, &[skip]), false, true),
        ] {
            assert_eq!(report.is_failure(false), anywhere);
            assert_eq!(report.is_failure(true), in_ci);
        }
        let file = format!("skipped: {skip}\n");
        assert_eq!(skipped_tests(&file), [skip]);
    }
}
