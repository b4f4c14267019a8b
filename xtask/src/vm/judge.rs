//! Holds what a guest wrote against what should have run. A test passed, or is
//! left out for a reason that stands here, or failed.

use std::time::Duration;

use super::transcript::{Finding, Transcript};

/// Programs and files that guests do not get: tests that need them run on the
/// host's kernel only.
const HOST_ONLY: &[&str] = &[
    "dockerd is not installed",
    "nft is not installed",
    "nginx is not installed",
    "no cgroup v1 is mounted",
    "postgresql is not installed",
    "python3 is not installed",
    "redis-server is not installed",
    "runc is not installed",
];

/// What guests get where the host has it; a host without it skips its tests
/// itself.
const OPTIONAL: &[&str] = &[
    "bpftool is not installed",
    "go is not installed",
    "libkeepalive0 is not installed",
    "tcpdump is not installed",
];

/// What came of a test on a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Passed,
    /// Not run in guests.
    LeftOut,
    Failed(String),
}

/// A test program, and the tests it has by its own account.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) tests: Vec<String>,
}

/// What came of one kernel.
pub(super) struct Outcome {
    /// Name of the series.
    pub(super) series: &'static str,
    /// The kernel's version, as the package names it.
    pub(super) version: String,
    pub(super) verdicts: Vec<(String, Verdict)>,
    /// What is wrong with the run as a whole.
    pub(super) faults: Vec<String>,
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
            took: Duration::ZERO,
        }
    }

    /// How many tests got a verdict like this.
    pub(super) fn count(&self, like: impl Fn(&Verdict) -> bool) -> usize {
        let verdicts = self.verdicts.iter().map(|(_, verdict)| verdict);
        verdicts.filter(|verdict| like(verdict)).count()
    }

    /// A line for each thing that failed, and why.
    pub(super) fn failures(&self) -> Vec<String> {
        let tests = self
            .verdicts
            .iter()
            .filter_map(|(test, verdict)| match verdict {
                Verdict::Failed(why) => Some(format!("{test}: {}", why.replace('\n', "\n    "))),
                _ => None,
            });
        let all = self.faults.iter().cloned().chain(tests);
        all.map(|what| format!("FAILED on {}: {what}", self.series))
            .collect()
    }
}

/// What a program's tests are named in the report.
pub(super) fn title(program: &str, test: &str) -> String {
    format!("{program}::{test}")
}

/// The tests that guests do not run.
pub(super) fn left_out() -> impl Iterator<Item = &'static str> {
    include_str!("left_out.txt")
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Tests that guests are said not to run and that are not there at all.
pub(super) fn unknown(programs: &[Program]) -> Vec<&'static str> {
    let titles = programs
        .iter()
        .flat_map(|program| program.tests.iter().map(|test| title(&program.name, test)))
        .collect::<Vec<_>>();
    left_out()
        .filter(|title| !titles.iter().any(|known| known == title))
        .collect()
}

/// Every test and every feature that `check` tries gets a verdict.
pub(super) fn judge(programs: &[Program], transcript: &Transcript) -> Vec<(String, Verdict)> {
    let mut verdicts: Vec<_> = transcript
        .check
        .iter()
        .map(|finding| (format!("check: {}", finding.feature), of_finding(finding)))
        .collect();
    for program in programs {
        let ran = transcript
            .programs
            .iter()
            .find(|ran| ran.name == program.name);
        for test in &program.tests {
            let title = title(&program.name, test);
            let verdict = if left_out().any(|left_out| left_out == title) {
                Verdict::LeftOut
            } else if let Some(result) = ran.and_then(|ran| ran.results.get(test)) {
                let skip = ran.and_then(|ran| ran.skip(test));
                let words = || ran.map(|ran| ran.words_of(test)).unwrap_or_default();
                of_result(result, skip, words)
            } else {
                Verdict::Failed(match ran.map(|ran| ran.code) {
                    None => "the guest did not get to it".to_owned(),
                    Some(None) => "the guest stopped meanwhile".to_owned(),
                    // What busybox's timeout answers, by its own and by SIGKILL.
                    Some(Some(124 | 137 | 143)) => {
                        "no result when the time for its program was up".to_owned()
                    }
                    Some(Some(code)) => format!("no result; its program ended with {code}"),
                })
            };
            verdicts.push((title, verdict));
        }
    }
    verdicts
}

fn of_finding(finding: &Finding) -> Verdict {
    if finding.answer == "yes" {
        Verdict::Passed
    } else {
        Verdict::Failed(finding.detail.clone())
    }
}

fn of_result(result: &str, skip: Option<&str>, words: impl Fn() -> String) -> Verdict {
    match (result, skip) {
        ("ok", None) => Verdict::Passed,
        ("ok", Some(reason)) if HOST_ONLY.iter().chain(OPTIONAL).any(|only| *only == reason) => {
            Verdict::LeftOut
        }
        ("ok", Some(reason)) => Verdict::Failed(format!("skipped: {reason}")),
        ("FAILED", _) => Verdict::Failed(words()),
        (other, _) => Verdict::Failed(format!("{other}: guests ignore no test")),
    }
}

/// What is wrong with a run as a whole, whatever the tests say.
pub(super) fn faults(
    expected: usize,
    transcript: &Transcript,
    console: &str,
    timed_out: bool,
) -> Vec<String> {
    let mut faults = transcript.broken.clone();
    if timed_out {
        faults.push("the guest did not stop in time".to_owned());
    }
    match transcript.finished {
        None => faults.push("the guest's last line is missing".to_owned()),
        Some(count) if count != expected => faults.push(format!(
            "the guest ran {count} test programs, not {expected}"
        )),
        Some(_) => {}
    }
    // A program may also end badly when its tests are over.
    for ran in &transcript.programs {
        let passed = ran.output.contains("\ntest result: ok.");
        if let Some(code) = ran.code.filter(|code| *code != 0 && passed) {
            let name = &ran.name;
            faults.push(format!(
                "{name} ended with {code} after its tests had passed"
            ));
        }
    }
    let signs = console.lines().filter(|line| is_trouble(line));
    faults.extend(signs.map(|line| line.trim().to_owned()));
    faults
}

/// Whether the kernel is in trouble when it writes this.
fn is_trouble(line: &str) -> bool {
    // The kernel's own assertions: with `CPU: 1` before 6.18, with `CPU#1` since.
    let asserts = line.contains("WARNING: ") && (line.contains("CPU: ") || line.contains("CPU#"));
    asserts
        || ["Kernel panic", "BUG:", "Oops:"]
            .iter()
            .any(|sign| line.contains(sign))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs() -> Vec<Program> {
        vec![Program {
            name: "families".to_owned(),
            tests: vec!["ipv6".to_owned(), "mptcp".to_owned()],
        }]
    }

    fn verdicts(text: &str) -> Vec<Verdict> {
        judge(&programs(), &Transcript::parse(text))
            .into_iter()
            .map(|(_, verdict)| verdict)
            .collect()
    }

    const SKIPPED: &str = "@ begin families\ntest ipv6 ... ok\ntest mptcp ... ok\n\
        @ skip skipped: families::mptcp: nginx is not installed\n\
        @ end families 0 1\n@ finished 1\n";

    #[test]
    fn a_skip_is_a_failure_unless_guests_lack_what_it_needs() {
        assert_eq!(verdicts(SKIPPED), [Verdict::Passed, Verdict::LeftOut]);
        let other = SKIPPED.replace("nginx is not installed", "no MPTCP");
        assert!(matches!(
            verdicts(&other)[..],
            [Verdict::Passed, Verdict::Failed(_)]
        ));
    }

    #[test]
    fn what_is_left_out_must_exist() {
        let mut titles = left_out();
        let (first, second) = (titles.next().unwrap(), titles.next().unwrap());
        let (program, test) = first.split_once("::").unwrap();
        let known = [Program {
            name: program.to_owned(),
            tests: vec![test.to_owned()],
        }];
        let unknown = unknown(&known);
        assert!(!unknown.contains(&first) && unknown.contains(&second));
    }

    #[test]
    fn a_test_without_a_result_failed() {
        for (text, why) in [
            ("", "did not get to it"),
            ("@ begin families\ntest ipv6 ... ok\n", "stopped meanwhile"),
            (
                "@ begin families\ntest ipv6 ... ok\n@ end families 143 300\n",
                "time for its program",
            ),
            (
                "@ begin families\ntest ipv6 ... ok\n@ end families 0 3\n",
                "ended with 0",
            ),
        ] {
            let Some(Verdict::Failed(said)) = verdicts(text).pop() else {
                panic!("{text}");
            };
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn a_run_is_believed_with_its_last_line_only() {
        let faults_of = |text: &str, console: &str, timed_out| {
            faults(1, &Transcript::parse(text), console, timed_out)
        };
        assert!(faults_of(SKIPPED, "", false).is_empty());
        let cut = SKIPPED.replace("@ finished 1\n", "");
        assert!(faults_of(&cut, "", false)[0].contains("last line"));
        let less = SKIPPED.replace("@ finished 1\n", "@ finished 0\n");
        assert!(faults_of(&less, "", false)[0].contains("not 1"));
        assert_eq!(faults_of(SKIPPED, "", true).len(), 1);
        let crashed = SKIPPED.replace(
            "@ end families 0 1",
            "\ntest result: ok. 2 passed\n@ end families 139 1",
        );
        assert!(faults_of(&crashed, "", false)[0].contains("139"));
    }

    #[test]
    fn a_kernel_in_trouble_is_a_fault() {
        for trouble in [
            "[    1.2] Kernel panic - not syncing: no init",
            "[    1.2] BUG: kernel NULL pointer dereference, address: 0000000000000008",
            "[    1.2] WARNING: CPU: 1 PID: 9 at net/ipv4/tcp_timer.c:9 tcp_x+0x1/0x2",
            "[    1.2] WARNING: net/ipv4/tcp_timer.c:9 at tcp_x+0x1/0x2, CPU#1: curl/9",
        ] {
            let console = format!("[    0.1] fine\n{trouble}\n[   9.1] reboot: System halted\n");
            let found = faults(1, &Transcript::parse(SKIPPED), &console, false);
            assert_eq!(found, [trouble]);
        }
        assert!(!is_trouble("[    0.1] smpboot: CPU: 1 is up"));
    }
}
