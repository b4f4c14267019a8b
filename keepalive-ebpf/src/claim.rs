//! Claim: which policy a socket belongs to.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap},
    macros::btf_map,
};
use keepalive_common::{
    policy::Policy,
    slot::{FIRST, MAX_DEPTH, UNCLAIMED},
};

use crate::kernel::Cgroup;

/// Cgroup id → slot of its policy. Elements are allocated as they come, so an
/// almost empty map costs its buckets only.
#[btf_map]
static CGROUPS: HashMap<u64, u32, 131_072, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Slot → policy. The agent sizes it when it loads the program.
#[btf_map]
static POLICIES: Array<Policy, 1> = Array::new();

/// The slot of the nearest cgroup that has a policy, from the socket's own
/// upward to the root.
#[inline(always)]
pub(crate) fn slot(own: Option<Cgroup>) -> u32 {
    let mut next = own;
    for _ in 0..MAX_DEPTH {
        let Some(cgroup) = next else {
            return UNCLAIMED;
        };
        // SAFETY: four bytes are read at once, and an agent that replaces them
        // meanwhile leaves the old or the new slot to be seen.
        if let Some(slot) = unsafe { CGROUPS.get(cgroup.id()) } {
            return *slot;
        }
        next = cgroup.parent();
    }
    UNCLAIMED
}

/// The policy in a slot.
#[inline(always)]
pub(crate) fn policy(slot: u32) -> Option<&'static Policy> {
    if slot < FIRST {
        return None;
    }
    POLICIES.get(slot)
}
