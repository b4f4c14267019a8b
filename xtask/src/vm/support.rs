//! The support table: what may be missing where. All else must work everywhere.

use super::{
    kernels::Series,
    transcript::{Finding, Transcript},
};

/// Programs and files that guests do not get: tests that need them run on the
/// host's kernel only.
const HOST_ONLY: &[&str] = &[
    "nginx is not installed",
    "no cgroup v1 is mounted",
    "postgresql is not installed",
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

/// Tests that guests do not run, by the reason.
const NOT_IN_GUESTS: &[(&str, &[&str])] = &[
    (
        "reads words and configs: the kernel has no part in it",
        &[
            "bad_input::a_cgroup_or_glob_that_matches_nothing_is_a_warning",
            "bad_input::a_config_that_does_not_exist_or_is_none",
            "bad_input::a_policy_outside_of_what_is_governed_is_a_warning",
            "bad_input::a_user_timeout_that_cancels_the_probes_is_a_warning",
            "bad_input::configs_that_are_not_even_toml",
            "bad_input::each_kind_of_bad_value_by_itself",
            "bad_input::every_error_of_a_config_with_its_line",
            "bad_input::usage_errors_have_exit_code_2",
            "broken_configs::broken_configurations_change_nothing",
            "drop_ins::a_bad_drop_in_changes_nothing_and_says_why",
            "drop_ins::a_policy_of_another_file_is_overridden_but_not_removed",
            "drop_ins::a_policy_that_is_set_by_command",
            "drop_ins::the_directories_of_every_machine",
            "explain::wrong_words",
            "sockets::filters",
            "sockets::what_a_path_forgets",
            "sockets::wrong_words",
            "sweep_once::wrong_words",
        ],
    ),
    (
        "what it needs of the kernel other tests need too, and an emulated processor is slow",
        &[
            "bad_input::no_cgroup_v2",
            "bad_input::root_without_the_capabilities",
            "cgroup_events::a_reload_between",
            "cgroups::a_cgroup_made_after_the_start_inherits",
            "cgroups::a_cgroup_outside_is_not_governed",
            "cgroups::a_connection_between_two_services",
            "cgroups::a_list_of_cgroups_and_globs",
            "cgroups::two_policies_for_one_cgroup",
            "cgroups::two_services_with_different_policies",
            "cgroups::without_a_default_what_nobody_claims_is_left_alone",
            "coexistence::a_neighbour_attached_the_older_way",
            "coexistence::a_neighbour_that_comes_and_goes_while_we_run",
            "coexistence::a_neighbour_that_wants_to_be_alone",
            "coexistence::two_agents_at_one_cgroup",
            "drop_ins::a_file_that_an_editor_replaces",
            "drop_ins::a_file_that_is_truncated_and_written_is_read_when_it_is_whole",
            "drop_ins::drop_ins_come_and_go_with_their_directories",
            "dry_run::counts_as_enforcement_does",
            "dry_run::from_outside_the_kernel_they_are_counted_once_too",
            "dry_run::no_file_ends_that_of_the_command_line",
            "dry_run::nothing_is_turned_off",
            "dry_run::of_one_policy_alone",
            "dry_run::on_and_off_again_changes_nothing",
            "dry_run::the_next_policy_is_counted_before_it_is_enforced",
            "dry_run::the_same_from_outside_the_kernel",
            "explain::a_config_before_any_agent_has_it",
            "explain::changes_nothing",
            "explain::what_a_dry_run_would_do",
            "formula::interval_in_every_mode",
            "formula::probes_in_every_mode",
            "formula::user_timeout_in_every_mode",
            "lifecycle::output_that_cannot_be_written_is_no_panic",
            "lifecycle::says_where_it_is_attached_and_what_it_assigned",
            "lifecycle::survives_the_end_of_the_cgroups_it_governs",
            "namespaces::held_by_a_name",
            "namespaces::with_the_same_addresses",
            "reach::a_dynamic_binary",
            "reach::a_program_that_is_already_running",
            "reach::what_go_sets_by_itself_stands",
            "reload::a_bad_configuration_changes_nothing",
            "reload::a_cgroup_is_let_go",
            "reload::bounds_come_and_go",
            "reload::from_bounds_to_bounds",
            "reload::off_and_on_again",
            "reload::the_application_sets_something_meanwhile",
            "reload::the_same_policy_again_changes_nothing",
            "rules::a_policy_for_all_ends_the_search",
            "rules::an_exception_inside_a_network",
            "rules::only_exceptions_mean_everything_else",
            "sockets::changes_nothing",
            "sockets::containers_and_units",
            "sweep::of_a_dynamic_program",
        ],
    ),
    (
        "a race or a crowd, for which an emulated processor is too slow",
        &[
            "cgroup_events::connections_made_at_once",
            "cgroup_events::more_than_the_agent_is_told_of",
            "cgroup_events::ten_thousand_come_and_go",
            "namespaces::that_vanish_meanwhile",
            "reload::under_churn_every_connection_has_one_of_two_policies",
            "rules::kernel_listing_and_documentation_agree_on_every_connection",
            "rules::under_churn_every_connection_has_one_of_two_policies",
            "sockets::namespaces_vanish_meanwhile",
            "sweep::one_hundred_thousand_connections",
            "sweep::while_connections_come_and_go",
            "sweep_once::namespaces_vanish_meanwhile",
        ],
    ),
];

/// Kernels below 5.15.
const OLD: &[&str] = &["5.10.223", "5.10"];

/// What a kernel does not have: the tests that need it skip with this reason.
const MISSING: &[Missing] = &[
    Missing {
        series: OLD,
        reason: "/proc/sys/net/mptcp/enabled does not exist",
        means: "MPTCP is not built into this kernel",
    },
    Missing {
        series: OLD,
        reason: "existing connections are changed from outside the kernel here",
        means: "below Linux 5.15, existing connections are changed through the processes that \
                hold them: not those that wait to be accepted, and from within a pid namespace \
                not those of processes outside",
    },
];

/// Where the agent works in another way than usual, and how `check` says so.
const FALLBACKS: &[Fallback] = &[Fallback {
    series: OLD,
    feature: "existing connections",
    says: "changed from outside",
}];

struct Missing {
    series: &'static [&'static str],
    reason: &'static str,
    means: &'static str,
}

struct Fallback {
    series: &'static [&'static str],
    feature: &'static str,
    says: &'static str,
}

/// What came of a test on a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Passed,
    /// By the support table, and why.
    NotSupported(String),
    /// Not run in guests, and why.
    HostOnly(String),
    Failed(String),
}

/// A test program, and the tests it has by its own account.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) tests: Vec<String>,
}

/// What a program's tests are named in the report.
pub(super) fn title(program: &str, test: &str) -> String {
    format!("{program}::{test}")
}

/// Why guests do not run a test, if they do not.
pub(super) fn not_in_guests(title: &str) -> Option<&'static str> {
    NOT_IN_GUESTS
        .iter()
        .find(|(_, tests)| tests.contains(&title))
        .map(|(why, _)| *why)
}

/// Tests that guests are said not to run and that are not there at all.
pub(super) fn unknown(programs: &[Program]) -> Vec<&'static str> {
    let is_there = |title: &str| {
        programs.iter().any(|program| {
            let mut tests = program.tests.iter();
            tests.any(|test| self::title(&program.name, test) == title)
        })
    };
    NOT_IN_GUESTS
        .iter()
        .flat_map(|(_, tests)| *tests)
        .copied()
        .filter(|title| !is_there(title))
        .collect()
}

/// Holds a transcript against what should have run. Every test and every
/// feature that `check` tries gets a verdict.
pub(super) fn judge(
    series: Series,
    programs: &[Program],
    transcript: &Transcript,
) -> Vec<(String, Verdict)> {
    let mut verdicts: Vec<_> = transcript
        .check
        .iter()
        .map(|finding| {
            let title = format!("check: {}", finding.feature);
            (title, of_finding(series, finding))
        })
        .collect();
    for program in programs {
        let ran = transcript
            .programs
            .iter()
            .find(|ran| ran.name == program.name);
        for test in &program.tests {
            let title = title(&program.name, test);
            let verdict = if let Some(why) = not_in_guests(&title) {
                Verdict::HostOnly(why.to_owned())
            } else if let Some(result) = ran.and_then(|ran| ran.results.get(test)) {
                let skip = ran.and_then(|ran| ran.skip(test));
                let words = || ran.map(|ran| ran.words_of(test)).unwrap_or_default();
                of_result(series, result, skip, words)
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

fn of_finding(series: Series, finding: &Finding) -> Verdict {
    let detail = || finding.detail.clone();
    if finding.answer != "yes" {
        return Verdict::Failed(detail());
    }
    for fallback in FALLBACKS {
        if fallback.feature != finding.feature {
            continue;
        }
        let falls_back = finding.detail.starts_with(fallback.says);
        match (fallback.series.contains(&series.name), falls_back) {
            (true, false) => {
                return Verdict::Failed(format!(
                    "the support table says that this kernel needs a fallback here: {}",
                    finding.detail
                ));
            }
            (false, true) => {
                return Verdict::Failed(format!(
                    "a fallback that the support table does not allow here: {}",
                    finding.detail
                ));
            }
            _ => {}
        }
    }
    Verdict::Passed
}

fn of_result(
    series: Series,
    result: &str,
    skip: Option<&str>,
    words: impl Fn() -> String,
) -> Verdict {
    match (result, skip) {
        ("ok", None) => Verdict::Passed,
        ("ok", Some(reason)) => of_skip(series, reason),
        ("FAILED", _) => Verdict::Failed(words()),
        (other, _) => Verdict::Failed(format!("{other}: guests ignore no test")),
    }
}

fn of_skip(series: Series, reason: &str) -> Verdict {
    if HOST_ONLY.iter().chain(OPTIONAL).any(|only| *only == reason) {
        return Verdict::HostOnly(reason.to_owned());
    }
    let missing = MISSING
        .iter()
        .find(|missing| missing.reason == reason && missing.series.contains(&series.name));
    match missing {
        Some(missing) => Verdict::NotSupported(missing.means.to_owned()),
        None => Verdict::Failed(format!(
            "skipped, but the support table claims it for this kernel: {reason}"
        )),
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

/// What the support table says is missing on a kernel where nothing missed it:
/// the table promises too little. Only a whole run can tell.
pub(super) fn not_missed(series: Series, verdicts: &[(String, Verdict)]) -> Vec<String> {
    MISSING
        .iter()
        .filter(|missing| missing.series.contains(&series.name))
        .filter(|missing| {
            !verdicts
                .iter()
                .any(|(_, verdict)| matches!(verdict, Verdict::NotSupported(means) if means == missing.means))
        })
        .map(|missing| format!("the support table says that {}, but no test missed it", missing.means))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::kernels::ALL;

    fn programs() -> Vec<Program> {
        vec![Program {
            name: "families".to_owned(),
            tests: vec!["ipv6".to_owned(), "mptcp".to_owned()],
        }]
    }

    fn verdicts(series: Series, text: &str) -> Vec<Verdict> {
        judge(series, &programs(), &Transcript::parse(text))
            .into_iter()
            .map(|(_, verdict)| verdict)
            .collect()
    }

    const SKIPPED: &str = "@ begin families\ntest ipv6 ... ok\ntest mptcp ... ok\n\
        @ skip skipped: families::mptcp: /proc/sys/net/mptcp/enabled does not exist\n\
        @ end families 0 1\n@ finished 1\n";

    #[test]
    fn a_skip_is_as_good_as_the_support_table_says() {
        let [old, .., new] = ALL;
        assert!(matches!(
            verdicts(old, SKIPPED)[..],
            [Verdict::Passed, Verdict::NotSupported(_)]
        ));
        assert!(matches!(
            verdicts(new, SKIPPED)[..],
            [Verdict::Passed, Verdict::Failed(_)]
        ));
        let host = SKIPPED.replace(
            "/proc/sys/net/mptcp/enabled does not exist",
            "nginx is not installed",
        );
        assert!(matches!(
            verdicts(new, &host)[..],
            [Verdict::Passed, Verdict::HostOnly(_)]
        ));
    }

    #[test]
    fn a_table_that_promises_too_little_is_a_fault() {
        let [old, .., new] = ALL;
        let run = |series, text: &str| {
            let verdicts = judge(series, &programs(), &Transcript::parse(text));
            not_missed(series, &verdicts).len()
        };
        let all_pass = "@ begin families\ntest ipv6 ... ok\ntest mptcp ... ok\n@ end families 0 1";
        assert_eq!(run(old, all_pass), MISSING.len());
        assert_eq!(run(old, SKIPPED), MISSING.len() - 1);
        assert_eq!(run(new, all_pass), 0);
    }

    #[test]
    fn what_the_table_names_must_exist() {
        let [first, second, ..] = NOT_IN_GUESTS[0].1 else {
            panic!("a table that is all but empty");
        };
        let (program, test) = first.split_once("::").unwrap();
        let known = [Program {
            name: program.to_owned(),
            tests: vec![test.to_owned()],
        }];
        let unknown = unknown(&known);
        assert!(!unknown.contains(first));
        assert!(unknown.contains(second));
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
            let Some(Verdict::Failed(said)) = verdicts(ALL[1], text).pop() else {
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

    #[test]
    fn a_fallback_is_demanded_where_it_is_needed_and_nowhere_else() {
        let [old, .., new] = ALL;
        let finding = |answer: &str, detail: &str| Finding {
            feature: "existing connections".to_owned(),
            answer: answer.to_owned(),
            detail: detail.to_owned(),
        };
        let outside = finding("yes", "changed from outside, which is slower");
        let usual = finding("yes", "the verifier accepts the program");
        assert_eq!(of_finding(old, &outside), Verdict::Passed);
        assert_eq!(of_finding(new, &usual), Verdict::Passed);
        assert!(matches!(of_finding(old, &usual), Verdict::Failed(_)));
        assert!(matches!(of_finding(new, &outside), Verdict::Failed(_)));
        let no = finding("no", "refused");
        assert_eq!(of_finding(new, &no), Verdict::Failed("refused".to_owned()));
    }
}
