//! What the steps of `cargo xtask test` came to.

use std::{env, process::ExitCode, time::Duration};

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
    pub(crate) name: &'static str,
    pub(crate) outcome: Outcome,
    pub(crate) counts: Counts,
    pub(crate) took: Duration,
    /// Why it was skipped, or what mends it.
    pub(crate) note: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    Failed,
    Skipped,
}

/// Tests, summed from what cargo prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// How many test programs reported; none of them, and the step has no tests.
    programs: usize,
    passed: usize,
    failed: usize,
    ignored: usize,
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
        self.steps
            .iter()
            .all(|step| step.counts.tests() == 0 && step.outcome == Outcome::Ok)
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
        let total = self.total();
        println!(
            "{} passed, {} failed, {} skipped",
            total.passed, total.failed, total.ignored
        );
        if total.ignored > 0 && in_ci() {
            println!("in CI a skip is a failure");
            return ExitCode::FAILURE;
        }
        if total.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    /// Every test counts, and so does every step without tests of its own.
    fn total(&self) -> Counts {
        let mut total = Counts::default();
        for Step {
            outcome, counts, ..
        } in &self.steps
        {
            total.passed += counts.passed;
            total.failed += counts.failed;
            total.ignored += counts.ignored;
            match outcome {
                Outcome::Ok => total.passed += usize::from(counts.programs == 0),
                // Tests that do not compile are none, but they are a failure.
                Outcome::Failed => total.failed += usize::from(counts.failed == 0),
                Outcome::Skipped => total.ignored += 1,
            }
        }
        // The test harness knows no skipping: to it, these tests passed.
        total.passed = total.passed.saturating_sub(self.skips.len());
        total.ignored += self.skips.len();
        total
    }
}

/// Whether this is a run that nobody watches, as CI systems say by `CI=true`.
fn in_ci() -> bool {
    env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false")
}

impl Step {
    pub(crate) fn skipped(name: &'static str, reason: &str) -> Self {
        Self::without_run(name, Outcome::Skipped, reason)
    }

    pub(crate) fn failed(name: &'static str, reason: &str) -> Self {
        Self::without_run(name, Outcome::Failed, reason)
    }

    fn without_run(name: &'static str, outcome: Outcome, note: &str) -> Self {
        Self {
            name,
            outcome,
            counts: Counts::default(),
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
        let Counts {
            passed,
            failed,
            ignored,
            ..
        } = self.counts;
        let counts = if self.counts.programs == 0 {
            String::new()
        } else {
            format!("{passed} passed, {failed} failed, {ignored} ignored")
        };
        let line = format!(
            "{:width$}  {}  {:>6.1} s  {counts}{}",
            self.name,
            exec::paint_out(code, outcome),
            self.took.as_secs_f64(),
            self.note,
        );
        line.trim_end().to_owned()
    }
}

impl Counts {
    /// What a program other than cargo counted.
    pub(crate) fn of(passed: usize, failed: usize, ignored: usize) -> Self {
        Self {
            programs: 1,
            passed,
            failed,
            ignored,
        }
    }

    fn tests(self) -> usize {
        self.passed + self.failed + self.ignored
    }

    /// Adds `test result: ok. 3 passed; 0 failed; 1 ignored; …`; any other line
    /// adds nothing.
    pub(crate) fn add_line(&mut self, line: &str) {
        let Some((_, result)) = line.split_once("test result: ") else {
            return;
        };
        self.programs += 1;
        let words = result.split([' ', ';']).filter(|word| !word.is_empty());
        let mut number = 0;
        for word in words {
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
            number = word.parse().unwrap_or(0);
        }
    }
}

/// `test: reason` for each test named in the file that the live tests write, a
/// line for each thing missing, and each test once.
pub(crate) fn skipped_tests(file: &str) -> Vec<String> {
    let mut skips = Vec::<String>::new();
    for line in file.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let skip = line.strip_prefix("skipped: ").unwrap_or(line);
        let test = skip.split(": ").next();
        if skips.iter().all(|other| other.split(": ").next() != test) {
            skips.push(skip.to_owned());
        }
    }
    skips
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(passed: usize, failed: usize, ignored: usize) -> Counts {
        Counts {
            programs: 2,
            passed,
            failed,
            ignored,
        }
    }

    fn step(outcome: Outcome, counts: Counts) -> Step {
        Step {
            counts,
            ..Step::without_run("step", outcome, "")
        }
    }

    #[test]
    fn results_of_all_test_programs_are_summed() {
        let mut sum = Counts::default();
        for line in [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s",
            "test failed_once ... ok",
            "test result: \u{1b}[31mFAILED\u{1b}[m. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
        ] {
            sum.add_line(line);
        }
        assert_eq!(sum, counts(4, 2, 1));
    }

    #[test]
    fn steps_without_tests_count_as_one() {
        let report = Report {
            steps: vec![
                step(Outcome::Ok, Counts::default()),
                step(Outcome::Ok, counts(5, 0, 1)),
                step(Outcome::Failed, counts(3, 2, 0)),
                step(Outcome::Skipped, Counts::default()),
                // Its tests are all filtered out.
                step(Outcome::Ok, counts(0, 0, 0)),
            ],
            skips: vec!["go: no compiler".to_owned()],
        };
        let Counts {
            passed,
            failed,
            ignored,
            ..
        } = report.total();
        assert_eq!((passed, failed, ignored), (8, 2, 3));
    }

    #[test]
    fn tests_that_do_not_compile_are_a_failure() {
        let report = Report {
            steps: vec![step(Outcome::Failed, Counts::default())],
            skips: Vec::new(),
        };
        let total = report.total();
        assert_eq!((total.passed, total.failed), (0, 1));
    }

    #[test]
    fn a_test_is_skipped_once() {
        assert_eq!(
            skipped_tests("skipped: nginx: no nginx\n\nnginx: no curl\nruntime: no runc\n"),
            ["nginx: no nginx", "runtime: no runc"]
        );
    }
}
