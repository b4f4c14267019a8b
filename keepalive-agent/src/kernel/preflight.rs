//! What must be there before anything is loaded, looked at first so that the
//! error names it instead of a refused system call.

use std::fs;

use rustix::{
    io::Errno,
    thread::{CapabilitySet, capabilities},
};
use thiserror::Error;

use crate::view;

/// What loading and attaching takes, with the names that a systemd unit or a
/// container's manifest knows them by. CAP_SYS_ADMIN includes them all.
const NEEDED: [(CapabilitySet, &str); 3] = [
    (CapabilitySet::BPF, "CAP_BPF"),
    (CapabilitySet::PERFMON, "CAP_PERFMON"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
];

/// Where the kernel shows how far it is locked down (since Linux 5.4).
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

/// Why this process may not load and attach programs.
#[derive(Debug, Error)]
pub enum NotPermitted {
    /// Capabilities in a user namespace do not count.
    #[error(
        "this process is in a user namespace, where capabilities do not count for BPF: the kernel \
         lets it neither load programs nor attach them; run it as root of the host, not in a \
         rootless container"
    )]
    UserNamespace,
    /// It cannot be told.
    #[error("reading the capabilities of this process")]
    Unknown(#[source] Errno),
    /// Those that it has not.
    #[error(
        "missing {}: the kernel lets this process neither load BPF programs nor attach them; run \
         it as root",
        .0.join(", ")
    )]
    Missing(Vec<&'static str>),
}

/// Whether this process may load and attach programs.
///
/// # Errors
///
/// Names the capabilities that are missing.
pub fn may_enforce() -> Result<(), NotPermitted> {
    if view::has_initial_user_namespace() == Some(false) {
        return Err(NotPermitted::UserNamespace);
    }
    let sets = capabilities(None).map_err(NotPermitted::Unknown)?;
    let missing = missing(sets.effective);
    if missing.is_empty() {
        Ok(())
    } else {
        Err(NotPermitted::Missing(missing))
    }
}

/// Why the kernel refuses a program that it takes elsewhere, as far as that can be
/// told from here.
#[must_use]
pub fn cause_of_refusal() -> Option<String> {
    is_confidential(&fs::read_to_string(LOCKDOWN).ok()?).then(|| {
        format!(
            "this kernel is locked down ({LOCKDOWN}: confidentiality), so that programs may not \
             read its memory; integrity, which Secure Boot asks for, is enough: boot with \
             lockdown=integrity"
        )
    })
}

/// The mode in force stands in brackets.
fn is_confidential(lockdown: &str) -> bool {
    lockdown.contains("[confidentiality]")
}

fn missing(effective: CapabilitySet) -> Vec<&'static str> {
    if effective.contains(CapabilitySet::SYS_ADMIN) {
        return Vec::new();
    }
    NEEDED
        .into_iter()
        .filter(|(capability, _)| !effective.contains(*capability))
        .map(|(_, name)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_mode_of_lockdown_is_in_the_way() {
        assert!(is_confidential("none integrity [confidentiality]\n"));
        assert!(!is_confidential("none [integrity] confidentiality\n"));
        assert!(!is_confidential("[none] integrity confidentiality\n"));
    }

    #[test]
    fn names_exactly_what_is_missing() {
        for (effective, expected) in [
            (
                CapabilitySet::empty(),
                &["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"][..],
            ),
            (CapabilitySet::SYS_ADMIN, &[]),
            (CapabilitySet::NET_ADMIN, &["CAP_BPF", "CAP_PERFMON"]),
            (
                CapabilitySet::BPF | CapabilitySet::PERFMON | CapabilitySet::NET_ADMIN,
                &[],
            ),
        ] {
            assert_eq!(missing(effective), expected, "{effective:?}");
        }
    }
}
