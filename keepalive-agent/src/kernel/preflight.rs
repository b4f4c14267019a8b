//! What must be there before anything is loaded, looked at first so that the
//! error names it instead of a refused system call.

use anyhow::{Context as _, Result, bail};
use rustix::thread::{CapabilitySet, capabilities};

/// What loading and attaching takes, with the names that a systemd unit or a
/// container's manifest knows them by. CAP_SYS_ADMIN includes them all.
const NEEDED: [(CapabilitySet, &str); 3] = [
    (CapabilitySet::BPF, "CAP_BPF"),
    (CapabilitySet::PERFMON, "CAP_PERFMON"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
];

/// Whether this process may load and attach programs.
///
/// # Errors
///
/// Names the capabilities that are missing.
pub fn may_enforce() -> Result<()> {
    let sets = capabilities(None).context("reading the capabilities of this process")?;
    let missing = missing(sets.effective);
    if !missing.is_empty() {
        bail!(
            "missing {}: the kernel lets this process neither load BPF programs nor attach them; \
             run it as root",
            missing.join(", ")
        );
    }
    Ok(())
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
