//! Claim: which policy a socket belongs to.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap},
    macros::btf_map,
};
use keepalive_common::{
    policy::Policy,
    slot::{Claim, FIRST, MAX_DEPTH},
};

use crate::kernel::Cgroup;

/// Cgroup id → what it claims. Elements are allocated as they come, so an
/// almost empty map costs its buckets only.
#[btf_map]
static CGROUPS: HashMap<u64, Claim, 131_072, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Slot → policy. The agent sizes it when it loads the programs.
#[btf_map]
static POLICIES: Array<Policy, 1> = Array::new();

/// What the nearest cgroup claims that claims anything, from the socket's own
/// upward to the root.
#[inline(always)]
pub(crate) fn nearest(own: Option<Cgroup>) -> Claim {
    let mut next = own;
    for _ in 0..MAX_DEPTH {
        let Some(cgroup) = next else {
            return Claim::NONE;
        };
        if let Some(claim) = CGROUPS.get_ptr(cgroup.id()) {
            // SAFETY: eight aligned bytes, read at once; an agent that replaces
            // them meanwhile leaves the old or the new claim to be seen.
            return unsafe { *claim };
        }
        next = cgroup.parent();
    }
    Claim::NONE
}

/// The policy in a slot.
#[inline(always)]
pub(crate) fn policy(slot: u32) -> Option<&'static Policy> {
    if slot < FIRST {
        return None;
    }
    POLICIES.get(slot)
}
