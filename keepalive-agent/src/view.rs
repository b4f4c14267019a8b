//! View: what of the node this process cannot see, so that nobody takes silence
//! about it for health.

use std::{fmt, fs, os::unix::fs::MetadataExt as _};

use rustix::thread::{CapabilitySet, capabilities};
use serde::Serialize;

use crate::{hierarchy::Hierarchy, names::printable};

/// Inode numbers of the first namespaces of a kernel (include/linux/proc_ns.h).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;
const INITIAL_CGROUP_NAMESPACE: u64 = 0xEFFF_FFFB;

/// A part of the node that is not seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PartialView {
    /// What is not seen.
    pub what: String,
    /// Why not.
    pub why: String,
    /// What to do about it.
    pub cure: String,
}

impl fmt::Display for PartialView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, why, cure } = self;
        write!(
            f,
            "not seen: {}, because {}; {}",
            printable(what),
            printable(why),
            printable(cure)
        )
    }
}

/// What it depends on.
#[derive(Clone, Copy, Debug)]
struct Surroundings {
    /// None where no hierarchy can be used.
    hierarchy_is_whole: Option<bool>,
    /// None where it cannot be found out.
    has_initial_pid_namespace: Option<bool>,
    capabilities: CapabilitySet,
}

/// What this process does not see.
#[must_use]
pub fn missing(hierarchy: Option<&Hierarchy>) -> Vec<PartialView> {
    missing_in(&Surroundings {
        hierarchy_is_whole: hierarchy.map(Hierarchy::is_whole),
        has_initial_pid_namespace: is_namespace("pid", INITIAL_PID_NAMESPACE),
        capabilities: capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective),
    })
}

/// Whether this process is in the first user namespace of the kernel; none where
/// that cannot be found out.
#[must_use]
pub fn has_initial_user_namespace() -> Option<bool> {
    is_namespace("user", INITIAL_USER_NAMESPACE)
}

/// Whether /proc shows paths of cgroups from the root of the hierarchy on.
#[must_use]
pub fn has_initial_cgroup_namespace() -> bool {
    is_namespace("cgroup", INITIAL_CGROUP_NAMESPACE) != Some(false)
}

fn is_namespace(kind: &str, inode: u64) -> Option<bool> {
    let metadata = fs::metadata(format!("/proc/self/ns/{kind}")).ok()?;
    Some(metadata.ino() == inode)
}

fn missing_in(surroundings: &Surroundings) -> Vec<PartialView> {
    let mut missing = Vec::new();
    let mut add = |what: &str, why: &str, cure: &str| {
        missing.push(PartialView {
            what: what.to_owned(),
            why: why.to_owned(),
            cure: cure.to_owned(),
        });
    };
    match surroundings.hierarchy_is_whole {
        Some(true) => {}
        Some(false) => add(
            "cgroups outside of this container, and new cgroups",
            "this process has a cgroup namespace of its own",
            "give it the host's (--cgroupns=host, or mount the host's /sys/fs/cgroup)",
        ),
        None => add(
            "which cgroup a connection belongs to",
            "no cgroup v2 hierarchy can be used",
            "`keepalive-agent check` says why",
        ),
    }
    match surroundings.has_initial_pid_namespace {
        Some(true) => {}
        Some(false) => add(
            "processes outside of this container, and network namespaces that only they hold",
            "this process has a pid namespace of its own",
            "give it the host's (--pid=host, hostPID: true)",
        ),
        None => add(
            "processes, and network namespaces that only they hold",
            "/proc does not show this process",
            "mount /proc",
        ),
    }
    for (capability, name, what) in [
        (
            CapabilitySet::SYS_PTRACE,
            "CAP_SYS_PTRACE",
            "network namespaces that only processes of other users hold",
        ),
        (
            CapabilitySet::SYS_ADMIN,
            "CAP_SYS_ADMIN",
            "connections in other network namespaces, which it may not enter",
        ),
    ] {
        if !surroundings.capabilities.contains(capability) {
            add(
                what,
                &format!("this process lacks {name}"),
                "run it as root with all capabilities",
            );
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Surroundings = Surroundings {
        hierarchy_is_whole: Some(true),
        has_initial_pid_namespace: Some(true),
        capabilities: CapabilitySet::all(),
    };

    #[test]
    fn each_part_that_is_missing_is_named_with_its_cure() {
        assert_eq!(missing_in(&ALL), []);
        for (surroundings, expected) in [
            (
                Surroundings {
                    hierarchy_is_whole: Some(false),
                    ..ALL
                },
                "cgroup namespace of its own",
            ),
            (
                Surroundings {
                    hierarchy_is_whole: None,
                    ..ALL
                },
                "no cgroup v2 hierarchy can be used",
            ),
            (
                Surroundings {
                    has_initial_pid_namespace: Some(false),
                    ..ALL
                },
                "pid namespace of its own",
            ),
            (
                Surroundings {
                    has_initial_pid_namespace: None,
                    ..ALL
                },
                "mount /proc",
            ),
            (
                Surroundings {
                    capabilities: CapabilitySet::all().difference(CapabilitySet::SYS_PTRACE),
                    ..ALL
                },
                "lacks CAP_SYS_PTRACE",
            ),
            (
                Surroundings {
                    capabilities: CapabilitySet::all().difference(CapabilitySet::SYS_ADMIN),
                    ..ALL
                },
                "lacks CAP_SYS_ADMIN",
            ),
        ] {
            let missing = missing_in(&surroundings);
            assert_eq!(missing.len(), 1, "{surroundings:?}: {missing:?}");
            assert!(missing[0].to_string().contains(expected), "{}", missing[0]);
        }
    }
}
