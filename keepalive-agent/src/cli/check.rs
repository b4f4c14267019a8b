//! `keepalive-agent check`: is this kernel able, and is the config right?

use std::{fmt, process::ExitCode};

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::{Target, output, report, trial};
use crate::{
    assignment::Claimants,
    config::Diagnostics,
    daemon::target,
    datapath::{self, chain},
    hierarchy::Hierarchy,
    kernel::{
        self,
        layout::{self, Kernel},
        preflight,
    },
    names::printable_path,
    view,
};

#[derive(Args, Debug)]
#[command(
    after_help = "Each feature is tried, not guessed from the kernel's version. Nothing on the \
                  machine is changed: the trial connection is made in a cgroup of its own. \
                  --config-only takes no root, and no kernel that is able.\n\n\
                  Exit codes: 0 all is well, 1 the config is wrong or, without --config-only, this \
                  kernel is not able, 2 wrong usage.\n\n\
                  Examples:\n  \
                  keepalive-agent check\n  \
                  keepalive-agent check --config-only --config my.toml"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    target: Target,

    /// Judge the config by itself, on whichever machine
    #[arg(long)]
    config_only: bool,
}

/// Whether something works here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    /// It was tried and works.
    Yes,
    /// It was tried and does not.
    No,
    /// It could not be tried.
    Inconclusive,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Yes => "yes",
            Self::No => "no",
            Self::Inconclusive => "inconclusive",
        })
    }
}

/// A feature, and what came of trying it.
#[derive(Debug, Serialize)]
struct Finding {
    feature: &'static str,
    answer: Answer,
    detail: String,
    /// Whether nothing can be enforced without it.
    needed: bool,
}

impl Finding {
    fn yes(feature: &'static str, detail: impl fmt::Display) -> Self {
        Self::new(feature, Answer::Yes, detail)
    }

    fn no(feature: &'static str, detail: impl fmt::Display) -> Self {
        Self::new(feature, Answer::No, detail)
    }

    fn inconclusive(feature: &'static str, detail: impl fmt::Display) -> Self {
        Self::new(feature, Answer::Inconclusive, detail)
    }

    fn new(feature: &'static str, answer: Answer, detail: impl fmt::Display) -> Self {
        Self {
            feature,
            answer,
            detail: detail.to_string(),
            needed: true,
        }
    }

    fn not_needed(self) -> Self {
        Self {
            needed: false,
            ..self
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    kernel: Option<String>,
    /// Whether the kernel is; null where only the config was judged.
    able: Option<bool>,
    findings: &'a [Finding],
    config_errors: &'a Diagnostics,
}

pub(super) fn check(arguments: &Arguments) -> Result<ExitCode> {
    let target = &arguments.target;
    let mut findings = if arguments.config_only {
        Vec::new()
    } else {
        kernel_findings(target)
    };
    let able = findings
        .iter()
        .all(|finding| finding.answer == Answer::Yes || !finding.needed);
    let config_errors = config_finding(target, &mut findings);
    let config_is_right = findings
        .last()
        .is_some_and(|config| config.answer == Answer::Yes);
    if target.json {
        output::json(&Report {
            kernel: (!arguments.config_only).then(kernel::release),
            able: (!arguments.config_only).then_some(able),
            findings: &findings,
            config_errors: &config_errors,
        })?;
    } else {
        let rows = findings.iter().map(|finding| {
            // A table has one line per row; what a cause says below is told after it.
            let detail = finding.detail.lines().next().unwrap_or_default();
            [
                finding.feature.to_owned(),
                finding.answer.to_string(),
                detail.to_owned(),
            ]
        });
        output::table(["FEATURE", "WORKS", "DETAIL"], rows)?;
        for more in findings
            .iter()
            .filter_map(|finding| finding.detail.split_once('\n'))
        {
            output::paragraph(more.1)?;
        }
        if !arguments.config_only {
            let verdict = match (able, config_is_right) {
                (false, _) => "not able to enforce, see above",
                (true, false) => "able to enforce, but the config is wrong",
                (true, true) => "able to enforce",
            };
            output::text(format_args!("\nLinux {}: {verdict}\n", kernel::release()))?;
        }
    }
    Ok(if able && config_is_right {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Tries what the kernel must be able to do. What a missing feature blocks is
/// reported as not tried.
fn kernel_findings(target: &Target) -> Vec<Finding> {
    const HIERARCHY: &str = "cgroup v2";
    const VIEW: &str = "view";
    const CAPABILITIES: &str = "capabilities";
    const TYPES: &str = "kernel types (BTF)";
    const PROGRAM: &str = "new connections";
    const SWEEP: &str = "existing connections";
    const DEATHS: &str = "dead peers";
    const EFFECT: &str = "options are set";
    const CGROUPS: &str = "new cgroups";

    let mut findings = Vec::new();
    let root = target.root();
    findings.push(match &root {
        Ok((hierarchy, root)) => {
            Finding::yes(HIERARCHY, printable_path(&hierarchy.directory(&root.path)))
        }
        Err(error) => Finding::no(HIERARCHY, format_args!("{error:#}")),
    });
    findings.push(view_of(
        VIEW,
        root.as_ref().ok().map(|(hierarchy, _)| hierarchy),
    ));
    let capable = preflight::may_enforce();
    findings.push(match &capable {
        Ok(()) => Finding::yes(CAPABILITIES, "may load and attach programs"),
        Err(error) => Finding::no(CAPABILITIES, chain(error)),
    });
    let kernel = Kernel::running();
    findings.push(match &kernel {
        Ok(kernel) => Finding::yes(
            TYPES,
            format_args!(
                "all fields found in {}, HZ {}",
                layout::KERNEL_BTF,
                kernel.layout.hz
            ),
        ),
        Err(error) => Finding::no(TYPES, chain(error)),
    });
    let (Ok((hierarchy, root)), Ok(()), Ok(kernel)) = (root, capable, kernel) else {
        for feature in [PROGRAM, SWEEP, DEATHS, EFFECT, CGROUPS] {
            findings.push(Finding::inconclusive(feature, "not tried: see above"));
        }
        return findings;
    };
    let needs_cgroup = "not tried: where the hierarchy is mounted read-only, no cgroup can be made \
                        for a trial; enforcing takes none";
    let cgroups = if hierarchy.is_read_only() {
        Finding::inconclusive(CGROUPS, needs_cgroup).not_needed()
    } else {
        new_cgroups(CGROUPS, trial::new_cgroup(&kernel, &hierarchy, &root))
    };
    let mut set = match trial::build(&kernel, &root) {
        Ok(set) => set,
        Err(error) => {
            findings.push(Finding::no(PROGRAM, format_args!("{error:#}")));
            for feature in [SWEEP, DEATHS, EFFECT] {
                findings.push(Finding::inconclusive(feature, "not tried: see above"));
            }
            findings.push(cgroups);
            return findings;
        }
    };
    findings.push(accepted(PROGRAM, set.verified_instructions()));
    findings.push(match set.sweeper().load() {
        Ok(()) => accepted(SWEEP, set.sweeper().verified_instructions()),
        Err(error) => Finding::no(SWEEP, format_args!("{:#}", anyhow::Error::new(error))),
    });
    findings.push(dead_peers(DEATHS, set.try_death_watch()));
    drop(set);
    if hierarchy.is_read_only() {
        findings.push(Finding::inconclusive(EFFECT, needs_cgroup).not_needed());
        findings.push(cgroups);
        return findings;
    }
    findings.push(match trial::parent(&kernel, &hierarchy, &root) {
        Ok(()) => Finding::yes(EFFECT, "on both ends of a trial connection over loopback"),
        Err(trial::Failure::NoEffect(what)) => Finding::no(EFFECT, what),
        Err(trial::Failure::NotTried(error)) => {
            Finding::inconclusive(EFFECT, format_args!("{error:#}"))
        }
    });
    findings.push(cgroups);
    findings
}

/// Whether all of the node can be seen. What cannot is not governed, or not
/// reported; the rest is.
fn view_of(feature: &'static str, hierarchy: Option<&Hierarchy>) -> Finding {
    let missing = view::missing(hierarchy);
    let finding = match &missing[..] {
        [] => Finding::yes(feature, "the whole machine"),
        missing => {
            let lines: Vec<_> = missing.iter().map(ToString::to_string).collect();
            Finding::no(
                feature,
                format_args!("a part, see below\n{}", lines.join("\n")),
            )
        }
    };
    finding.not_needed()
}

/// Whether the kernel tells of new cgroups. An agent does without, with less.
fn new_cgroups(feature: &'static str, told: Result<(), trial::Failure>) -> Finding {
    let finding = match told {
        Ok(()) => Finding::yes(feature, "get their own policy at once"),
        Err(failure) => Finding::no(
            feature,
            format_args!(
                "they follow their nearest ancestor until the agent is sent SIGHUP: {failure}"
            ),
        ),
    };
    finding.not_needed()
}

/// Whether the kernel tells of dead peers. An agent does without: they are not
/// counted.
fn dead_peers(feature: &'static str, told: Result<(), datapath::Error>) -> Finding {
    let finding = match told {
        Ok(()) => Finding::yes(feature, "are counted as they are found"),
        Err(error) => Finding::no(
            feature,
            format_args!("they are not counted: {:#}", anyhow::Error::new(error)),
        ),
    };
    finding.not_needed()
}

/// What the verifier said to a program that it took.
fn accepted(feature: &'static str, instructions: Option<u32>) -> Finding {
    match instructions {
        None => Finding::yes(feature, "the verifier accepts the program"),
        Some(count) => Finding::yes(
            feature,
            format_args!("the verifier accepts the program, after {count} instructions"),
        ),
    }
}

/// Reads the config that `run` would use.
fn config_finding(target: &Target, findings: &mut Vec<Finding>) -> Diagnostics {
    const CONFIG: &str = "config";
    match target::read(&target.files.sources(), false) {
        Ok(read) => {
            let config = read.config;
            let policies = config.policies.len() + usize::from(config.default.is_some());
            let plural = if policies == 1 { "policy" } else { "policies" };
            let mut detail = format!("{}: {policies} {plural}", report::origin(&read.origin));
            let mut remarks = read.warnings;
            if let Ok((hierarchy, root)) = target.root()
                && let Ok(claimants) = Claimants::new(&config, &root)
                && let Ok((_, warnings)) = target::assign(&claimants, &hierarchy)
            {
                remarks.extend(warnings.iter().map(ToString::to_string));
            }
            for named in &config.policies {
                if !named.selector.labels.is_empty() {
                    remarks.push(format!(
                        "policy {}: podman and containerd keep no labels where they can be read, \
                         so it is for containers of docker and CRI-O only",
                        named.name
                    ));
                }
            }
            for remark in remarks {
                detail.push_str("\nwarning: ");
                detail.push_str(&remark);
            }
            findings.push(Finding::yes(CONFIG, detail));
            Diagnostics::default()
        }
        Err(error) => {
            findings.push(Finding::no(CONFIG, format_args!("{error:#}")));
            error.downcast::<Diagnostics>().unwrap_or_default()
        }
    }
}
