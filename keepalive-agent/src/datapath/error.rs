//! What can go wrong between the agent and the kernel.

use std::{io, path::PathBuf};

use aya::maps::MapError;
use thiserror::Error;

use crate::{kernel::preflight, netns, policy_set};

/// What can go wrong between the agent and the kernel.
#[derive(Debug, Error)]
pub enum Error {
    /// The build left the BPF object out.
    #[error(
        "this agent was built without its BPF object and can neither enforce nor list anything: \
         build it with `cargo xtask build`"
    )]
    NoObject,
    /// The embedded object lacks something: agent and object are of different builds.
    #[error("the BPF object has no {kind} {name}")]
    Missing {
        /// Map or program.
        kind: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// The embedded object cannot be used: a fault of the build.
    #[error("the embedded BPF object cannot be used: {0}")]
    Object(String),
    /// The kernel did not load a program.
    #[error("the kernel refused program {program}")]
    LoadProgram {
        /// Its name.
        program: &'static str,
        /// The reason, with the verifier's last words.
        #[source]
        source: RefusedProgram,
    },
    /// A map could not be used.
    #[error("{doing}")]
    Map {
        /// What was being done.
        doing: String,
        /// The kernel's answer.
        #[source]
        source: MapError,
    },
    /// Another call to the kernel failed.
    #[error("{doing}")]
    Call {
        /// What was being done.
        doing: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A map has no room left: a set with more room is needed.
    #[error("the policy set has room for {limit} {what} and no more")]
    Full {
        /// What there are too many of.
        what: &'static str,
        /// How many there can be.
        limit: u32,
    },
    /// More than the kernel or this program can take, in a set of any size.
    #[error("{count} {what} are more than the {limit} that can stand in the kernel")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there can be.
        limit: u32,
    },
    /// The assignment cannot stand in the kernel.
    #[error(transparent)]
    PolicySet(#[from] policy_set::Error),
    /// The cgroup that the program was attached to does not exist any more.
    #[error("the cgroup that the program was attached to is gone")]
    CgroupGone,
    /// Somebody else has put another program under the link.
    #[error(
        "another program is under the link than this agent put there: another agent has taken over"
    )]
    Replaced,
    /// A pin or directory that cannot be trusted.
    #[error("{path} is not used: {why}", path = path.display())]
    Untrusted {
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// What an iterator wrote ended within a record.
    #[error("the listing ended within a record")]
    CutOff,
    /// Open files cannot be gone through.
    #[error("{0}")]
    NoFiles(String),
    /// Not all processes are seen, or under other ids than in /proc.
    #[error(
        "the kernel does not show this process under its own id among those that hold namespaces"
    )]
    OtherProcesses,
    /// The kernel names cgroups by paths that are not the ones seen here.
    #[error(
        "this process sees only a part of the cgroup hierarchy, and the kernel names cgroups by \
         their paths in the whole: run it in the host's cgroup namespace"
    )]
    PartOfHierarchy,
    /// Network namespaces cannot be seen or entered.
    #[error(transparent)]
    Namespaces(#[from] netns::Error),
    /// One of them has not been gone through.
    #[error("sweeping network namespace {name}")]
    Sweeping {
        /// What it is called here.
        name: String,
        /// Why not.
        #[source]
        source: Box<Self>,
    },
    /// The kernel's types.
    #[error("looking at the kernel's types: {0}")]
    Kernel(String),
    /// A policy set of another build.
    #[error(
        "the policy set in force is of version {version} and its records (schema {schema}) are not \
         known to this version"
    )]
    UnknownSchema {
        /// Its schema.
        schema: u32,
        /// The version of the agent that built it.
        version: String,
    },
    /// What a policy set says of itself cannot be understood.
    #[error("the policy set in force cannot be understood: {0}")]
    Description(String),
}

impl Error {
    /// A failed call, while `doing` something.
    pub(super) fn call(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Call { doing, source }
    }

    /// The same for a map.
    pub(super) fn map(doing: impl Into<String>) -> impl FnOnce(MapError) -> Self {
        let doing = doing.into();
        move |source| Self::Map { doing, source }
    }

    /// Whether a set with more room would take what this one did not.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }
}

/// Why the kernel did not load a program.
#[derive(Debug)]
pub struct RefusedProgram {
    reason: String,
}

impl std::fmt::Display for RefusedProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for RefusedProgram {}

impl RefusedProgram {
    /// The verifier's log can be thousands of lines; what matters stands near its
    /// end.
    pub(super) fn with_log(error: &io::Error, log: &str) -> Self {
        const LINES: usize = 20;
        let lines: Vec<_> = log.lines().filter(|line| !line.is_empty()).collect();
        let first = lines.len().saturating_sub(LINES);
        let end = lines.get(first..).unwrap_or_default().join("\n  ");
        let reason = if end.is_empty() {
            // It was not about what the program does.
            error.to_string()
        } else {
            format!("{error}; the verifier's last words:\n  {end}")
        };
        let reason = match preflight::cause_of_refusal() {
            Some(cause) => format!("{cause}: {reason}"),
            None => reason,
        };
        Self { reason }
    }
}

impl From<io::Error> for RefusedProgram {
    fn from(error: io::Error) -> Self {
        Self {
            reason: error.to_string(),
        }
    }
}

/// An error and everything that led to it, on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
