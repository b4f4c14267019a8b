//! Slots: how a cgroup points to its policy.
//!
//! A cgroup maps to a slot number; policies and counters are arrays indexed by
//! it. Thousands of cgroups can share a policy, and giving a cgroup another one
//! is a single 4-byte write that no socket can see half of.

/// Counts the sockets that no policy claims; holds no policy.
pub const UNCLAIMED: u32 = 0;

/// The first slot that holds a policy.
pub const FIRST: u32 = 1;

/// How many cgroups the walk from a socket's cgroup to the root looks at, its
/// own included. Deeper ones are never seen to have a policy higher up; real
/// hierarchies (nested container runtimes included) stay below 20.
pub const MAX_DEPTH: u32 = 32;

/// The slot of the policy with this index in the agent's list.
///
/// # Panics
///
/// When the index is not below 2³² − 1; the agent refuses that many policies.
#[must_use]
pub fn of_index(index: usize) -> u32 {
    FIRST + u32::try_from(index).expect("fewer policies than slots")
}

/// The index in the agent's list of the policy in this slot, if it holds one.
#[must_use]
pub const fn index(slot: u32) -> Option<usize> {
    match slot.checked_sub(FIRST) {
        Some(index) => Some(index as usize),
        None => None,
    }
}
