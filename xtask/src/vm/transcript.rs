//! What a guest wrote, read with distrust: whatever is not there was not done.

use std::collections::BTreeMap;

use serde_json::Value;

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    /// The kernel, as it calls itself.
    pub(super) release: String,
    /// What the agent's `check` found.
    pub(super) check: Vec<Finding>,
    /// Test programs, in the order they ran.
    pub(super) programs: Vec<Ran>,
    /// What the guest itself found broken.
    pub(super) broken: Vec<String>,
    /// How many programs ran, if the guest got as far as to say so.
    pub(super) finished: Option<usize>,
}

/// A line of `check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) feature: String,
    pub(super) answer: String,
    pub(super) detail: String,
}

/// A test program.
#[derive(Debug, Default)]
pub(super) struct Ran {
    pub(super) name: String,
    /// Test → the harness's word for what came of it.
    pub(super) results: BTreeMap<String, String>,
    /// Test, with the module it is in → why it was skipped.
    pub(super) skips: Vec<(String, String)>,
    /// All that it wrote.
    pub(super) output: String,
    /// Its exit code, if it ended.
    pub(super) code: Option<i32>,
}

impl Transcript {
    /// Reads it.
    pub(super) fn parse(text: &str) -> Self {
        let mut transcript = Self::default();
        for line in text.lines() {
            if let Some(mark) = line.strip_prefix("@ ") {
                transcript.mark(mark);
            } else if let Some(running) = transcript.running() {
                running.line(line);
            }
        }
        transcript
    }

    fn mark(&mut self, mark: &str) {
        let (word, rest) = mark.split_once(' ').unwrap_or((mark, ""));
        match word {
            "kernel" => rest.clone_into(&mut self.release),
            "broken:" => self.broken.push(rest.to_owned()),
            "check" => self.checked(rest),
            "begin" => self.programs.push(Ran {
                name: rest.to_owned(),
                ..Ran::default()
            }),
            "skip" => {
                let skip = rest.strip_prefix("skipped: ").unwrap_or(rest);
                if let (Some(running), Some((test, reason))) =
                    (self.running(), skip.split_once(": "))
                {
                    running.skips.push((test.to_owned(), reason.to_owned()));
                }
            }
            "end" => {
                let mut words = rest.split(' ');
                let (name, code) = (words.next(), words.next());
                let code = code.and_then(|code| code.parse().ok());
                if let Some(running) = self.running().filter(|ran| Some(&*ran.name) == name) {
                    running.code = code;
                }
            }
            "finished" => self.finished = rest.parse().ok(),
            _ => {}
        }
    }

    fn checked(&mut self, rest: &str) {
        let (code, text) = rest.split_once(' ').unwrap_or((rest, ""));
        let report: Value = serde_json::from_str(text).unwrap_or_default();
        let findings = report["findings"].as_array();
        for finding in findings.into_iter().flatten() {
            let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
            self.check.push(Finding {
                feature: text("feature"),
                answer: text("answer"),
                detail: text("detail"),
            });
        }
        if self.check.is_empty() {
            self.broken.push(format!(
                "`keepalive-agent check --json` ended with {code} and no findings: {text}"
            ));
        }
    }

    /// The program that has begun and not ended.
    fn running(&mut self) -> Option<&mut Ran> {
        self.programs.last_mut().filter(|ran| ran.code.is_none())
    }
}

impl Ran {
    fn line(&mut self, line: &str) {
        self.output.push_str(line);
        self.output.push('\n');
        let result = line
            .strip_prefix("test ")
            .and_then(|line| line.split_once(" ... "));
        if let Some((test, result)) = result {
            let test = test.trim_end_matches(" - should panic");
            self.results.insert(test.to_owned(), result.to_owned());
        }
    }

    /// Why a test was skipped, if it was.
    pub(super) fn skip(&self, test: &str) -> Option<&str> {
        let skip = self.skips.iter().find(|(name, _)| {
            name.strip_suffix(test)
                .is_some_and(|module| module.ends_with("::"))
        });
        skip.map(|(_, reason)| reason.as_str())
    }

    /// What a failed test said, without the rest of the output.
    pub(super) fn words_of(&self, test: &str) -> String {
        let head = format!("---- {test} stdout ----");
        let mut lines = self.output.lines().skip_while(|line| *line != head);
        lines.next();
        let words: Vec<_> = lines
            .take_while(|line| !line.starts_with("---- ") && *line != "failures:")
            .filter(|line| !line.is_empty() && !line.starts_with("note: run with `RUST_BACKTRACE"))
            .collect();
        words.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"@ kernel 6.1.0-56-cloud-amd64
@ check 0 {"kernel":"6.1","able":true,"findings":[{"feature":"cgroup v2","answer":"yes","detail":"/sys/fs/cgroup"}],"config_errors":[]}
@ begin families
running 3 tests
test ipv6 ... ok
skipped: families::mptcp: no mptcp
test slow has been running for over 60 seconds
test mptcp ... ok
test slow ... FAILED

failures:

---- slow stdout ----
Error: not in time
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace

failures:
    slow
@ skip skipped: families::mptcp: no mptcp
@ end families 101 17.5
@ begin reach
test half ... ok
"#;

    #[test]
    fn results_skips_and_failures_are_read() {
        let transcript = Transcript::parse(TEXT);
        assert_eq!(transcript.release, "6.1.0-56-cloud-amd64");
        assert_eq!(transcript.check[0].feature, "cgroup v2");
        let families = &transcript.programs[0];
        assert_eq!(families.code, Some(101));
        assert_eq!(families.results.len(), 3);
        assert_eq!(families.results["slow"], "FAILED");
        assert_eq!(families.words_of("slow"), "Error: not in time");
        assert_eq!(families.skip("mptcp"), Some("no mptcp"));
        assert_eq!(families.skip("tcp"), None);
        assert_eq!(transcript.programs[1].code, None);
        assert_eq!(transcript.finished, None);
        assert!(transcript.broken.is_empty());
    }

    #[test]
    fn a_check_without_findings_is_broken() {
        let transcript = Transcript::parse("@ check 139 Segmentation fault");
        assert!(transcript.broken[0].contains("139"));
    }
}
