//! Holds what a guest wrote against what should have run: whatever is not there was
//! not done.

use serde_json::Value;

use crate::test::report;

/// Why a test may be skipped in a guest: programs that guests do not get, or only
/// where the host has them, which skips its tests itself otherwise.
const LACKING: &[&str] = &[
    "bpftool is not installed",
    "dockerd is not installed",
    "go is not installed",
    "libkeepalive0 is not installed",
    "nft is not installed",
    "nginx is not installed",
    "no cgroup v1 is mounted",
    "postgresql is not installed",
    "python3 is not installed",
    "redis-server is not installed",
    "runc is not installed",
    "tcpdump is not installed",
];

/// Most bytes of what a program wrote that are shown when it failed.
const SHOWN: usize = 4000;

/// A test program, and the tests it has by its own account.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) tests: Vec<String>,
}

impl Program {
    /// Which of its tests guests do not run.
    pub(super) fn left_out(&self) -> impl Iterator<Item = &str> {
        let is_left_out = |test: &&String| left_out().any(|line| self.is_meant(line, test));
        self.tests.iter().filter(is_left_out).map(String::as_str)
    }

    /// Whether a line of left_out.txt is about this test.
    fn is_meant(&self, line: &str, test: &str) -> bool {
        match line.split_once("::") {
            Some((program, named)) => program == self.name && named == test,
            None => line == self.name,
        }
    }
}

/// What came of a kernel.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Tests, and features that `check` tried.
    pub(super) passed: usize,
    /// Not run in guests.
    pub(super) left_out: usize,
    /// What is wrong, and why.
    pub(super) failures: Vec<String>,
}

/// The tests that guests do not run.
fn left_out() -> impl Iterator<Item = &'static str> {
    include_str!("left_out.txt")
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Tests that guests are said not to run and that are not there at all.
pub(super) fn unknown(programs: &[Program]) -> Vec<&'static str> {
    let is_known = |line: &&str| {
        let mut programs = programs.iter();
        programs.any(|program| {
            program
                .tests
                .iter()
                .any(|test| program.is_meant(line, test))
        })
    };
    left_out().filter(|line| !is_known(line)).collect()
}

/// Judges what a guest's init and its kernel wrote.
pub(super) fn judge(
    programs: &[Program],
    written: &str,
    console: &str,
    timed_out: bool,
) -> Verdict {
    let mut verdict = Verdict::default();
    let marks = |word: &'static str| {
        let marks = written.lines().filter_map(|line| line.strip_prefix("@ "));
        marks.filter_map(move |mark| mark.strip_prefix(word)?.strip_prefix(' '))
    };
    verdict.failures.extend(marks("broken:").map(str::to_owned));
    if timed_out {
        verdict.fail("the guest did not stop in time");
    }
    if marks("finished").next().is_none() {
        verdict.fail("the guest's last line is missing");
    }
    verdict.features(marks("check").next().unwrap_or_default());
    for program in programs {
        match verdict.program(program, written) {
            Ok(()) => {}
            Err(why) => verdict.fail(&format!("{}: {why}", program.name)),
        }
    }
    let trouble = console.lines().filter(|line| is_trouble(line));
    verdict
        .failures
        .extend(trouble.map(|line| line.trim().to_owned()));
    verdict
}

impl Verdict {
    fn fail(&mut self, what: &str) {
        self.failures.push(what.to_owned());
    }

    /// What `check --json` found, after its exit code.
    fn features(&mut self, said: &str) {
        let (_, json) = said.split_once(' ').unwrap_or_default();
        let report: Value = serde_json::from_str(json).unwrap_or_default();
        let findings = report["findings"].as_array().map_or(&[][..], Vec::as_slice);
        if findings.is_empty() {
            self.fail(&format!(
                "`keepalive-agent check --json` found nothing: {said}"
            ));
        }
        for finding in findings {
            if finding["answer"] == "yes" {
                self.passed += 1;
            } else {
                self.fail(&format!(
                    "check: {}: {}",
                    finding["feature"], finding["detail"]
                ));
            }
        }
    }

    /// Counts what came of a program, or tells what is wrong with it.
    fn program(&mut self, program: &Program, written: &str) -> Result<(), String> {
        let Program { name, tests } = program;
        let (_, rest) = written
            .split_once(&format!("@ begin {name}\n"))
            .ok_or("the guest did not get to it")?;
        let (output, rest) = rest
            .split_once(&format!("@ end {name} "))
            .ok_or("the guest stopped meanwhile")?;
        let code = rest.split(' ').next().unwrap_or_default();
        let left_out = program.left_out().count();
        let passed: usize = output.lines().map(report::passed).sum();
        if code != "0" || passed != tests.len() - left_out {
            return Err(format!("ended with {code}:\n{}", words(output)));
        }
        let skips = output
            .lines()
            .filter_map(|line| line.strip_prefix("@ skip "));
        let skips = report::skipped_tests(&skips.collect::<Vec<_>>().join("\n"));
        for skip in &skips {
            if !LACKING
                .iter()
                .any(|reason| skip.ends_with(&format!(": {reason}")))
            {
                self.fail(&format!("skipped: {skip}"));
            }
        }
        self.left_out += left_out + skips.len();
        self.passed += tests.len() - left_out - skips.len();
        Ok(())
    }
}

/// What failed tests said, or else the end of what a program wrote.
fn words(output: &str) -> &str {
    let words = output
        .split_once("\nfailures:\n")
        .map_or(output, |(_, words)| words);
    let from = words.len().saturating_sub(SHOWN);
    words
        .get(words.ceil_char_boundary(from)..)
        .unwrap_or(words)
        .trim()
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

    fn programs() -> [Program; 1] {
        let tests = ["ipv6", "mptcp"].map(str::to_owned).into();
        let name = "families".to_owned();
        [Program { name, tests }]
    }

    const GOOD: &str = "@ kernel 6.1.0\n\
        @ check 0 {\"findings\":[{\"feature\":\"cgroup v2\",\"answer\":\"yes\",\"detail\":\"\"}]}\n\
        @ begin families\ntest ipv6 ... ok\ntest mptcp ... ok\n\n\
        test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n\n\
        @ skip skipped: families::mptcp: nginx is not installed\n\
        @ end families 0 17.5\n@ finished 1\n";

    fn failures(written: &str) -> Vec<String> {
        judge(&programs(), written, "[ 0.1] fine\n", false).failures
    }

    #[test]
    fn a_guest_that_goes_through_its_plan_is_without_fault() {
        let verdict = judge(&programs(), GOOD, "[ 0.1] smpboot: CPU: 1 is up\n", false);
        assert_eq!((verdict.passed, verdict.left_out), (2, 1));
        assert_eq!(verdict.failures, [""; 0]);
    }

    #[test]
    fn whatever_is_missing_or_not_as_it_should_be_is_a_failure() {
        for (from, to, why) in [
            (
                "nginx is not",
                "MPTCP is not",
                "skipped: families::mptcp: MPTCP",
            ),
            ("@ begin families\n", "", "did not get to it"),
            ("@ end families 0 17.5\n", "", "stopped meanwhile"),
            ("families 0", "families 139", "ended with 139"),
            ("families 0", "families 143", "ended with 143"),
            ("ok. 2 passed", "ok. 1 passed", "ended with 0"),
            ("2 passed; 0 failed", "1 passed; 1 failed", "ended with 0"),
            ("@ finished 1\n", "", "last line is missing"),
            ("\"yes\"", "\"no\"", "check: \"cgroup v2\""),
            (
                "@ check 0",
                "@ check 139 Segmentation fault",
                "found nothing: 139",
            ),
            (
                "@ kernel",
                "@ broken: cannot load x\n@ kernel",
                "cannot load x",
            ),
        ] {
            let failures = failures(&GOOD.replace(from, to));
            assert!(
                failures.iter().any(|failure| failure.contains(why)),
                "{why}: {failures:?}"
            );
        }
        let failed = "\n\nfailures:\n\n---- ipv6 stdout ----\nnot in time\n\ntest result";
        let failures = failures(
            &GOOD
                .replace("\n\ntest result", failed)
                .replace("s 0 ", "s 101 "),
        );
        assert!(failures[0].contains("not in time"), "{failures:?}");
        assert!(!failures[0].contains("ipv6 ... ok"), "{failures:?}");
        let timed_out = judge(&programs(), GOOD, "", true).failures;
        assert_eq!(timed_out, ["the guest did not stop in time"]);
    }

    #[test]
    fn what_is_left_out_must_exist() {
        let program = |name: &str, tests: [&str; 2]| Program {
            name: name.to_owned(),
            tests: tests.map(str::to_owned).into(),
        };
        let whole = program("faults", ["one", "two"]);
        let part = program("reach", ["a_dynamic_binary", "other"]);
        assert_eq!(whole.left_out().collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(part.left_out().collect::<Vec<_>>(), ["a_dynamic_binary"]);
        let unknown = unknown(&[whole, part]);
        assert!(!unknown.contains(&"faults") && !unknown.contains(&"reach::a_dynamic_binary"));
        assert!(unknown.contains(&"reach::a_program_that_is_already_running"));
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
            assert_eq!(
                judge(&programs(), GOOD, &console, false).failures,
                [trouble]
            );
        }
    }
}
