//! Claim: which policy a socket belongs to.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, lpm_trie::Key},
    macros::btf_map,
};
use keepalive_common::{
    policy::Policy,
    policy_record::{Edition, PolicyRecord},
    slot::{
        Claim, Ends, FIRST, Found, Lead, MAX_DEPTH, PortKey, RemoteKey, Resolved, Step, Tables,
        Target, resolve,
    },
};

use crate::{
    kernel::{Cgroup, TcpSock},
    recent::{self, after},
};

/// Cgroup id → what it claims. Elements are allocated as they come, so an
/// almost empty map costs its buckets only.
#[btf_map]
static CGROUPS: HashMap<u64, Claim, 131_072, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Slot and edition → policy ([`Edition::place`]). The agent sizes it when it loads the
/// programs.
#[btf_map]
static POLICIES: Array<PolicyRecord, 1> = Array::new();

/// Number → step, where the remote end has a say. The agent sizes it.
#[btf_map]
static STEPS: Array<Step, 1> = Array::new();

/// Rules and the prefix of an address → what they say about it.
#[btf_map]
static REMOTES: LpmTrie<RemoteKey, Found, 1_048_576> = LpmTrie::new();

/// Table of ports and the prefix of a port → what is found for it.
#[btf_map]
static PORTS: LpmTrie<PortKey, Found, 1_048_576> = LpmTrie::new();

/// What the nearest cgroup claims that claims anything, from the socket's own
/// upward to the root: as written before this generation, or since.
#[inline(always)]
pub(crate) fn nearest(own: Option<Cgroup>, generation: u64) -> Claim {
    let mut next = own;
    for _ in 0..MAX_DEPTH {
        let Some(cgroup) = next else {
            return Claim::NONE;
        };
        if let Some(claim) = CGROUPS.get_ptr(after(cgroup.id(), generation)) {
            // SAFETY: eight aligned bytes, read at once; an agent that replaces
            // them meanwhile leaves the old or the new claim to be seen.
            return unsafe { *claim };
        }
        next = cgroup.parent();
    }
    Claim::NONE
}

/// The slot of the policy for a socket; only where its ends have a say are they
/// looked at.
#[inline(always)]
pub(crate) fn slot(target: Target, sock: TcpSock) -> u32 {
    match target.lead() {
        Lead::Slot(slot) => slot,
        Lead::Step(_) => by_remote(target, sock),
    }
}

/// Out of line, to keep its registers and branches out of the way of cgroups
/// without rules.
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "the halves of a number")]
fn by_remote(target: Target, sock: TcpSock) -> u32 {
    let ends = sock.ends();
    let number = u128::from_ne_bytes(ends.address);
    let (high, low) = ((number >> 64) as u64, number as u64);
    recent::by_address(target, high, low, || {
        let found = by_rules(target.bits(), high, low, ends.port, ends.local_port);
        Resolved {
            slot: found & !BY_PORT,
            by_port: found & BY_PORT != 0,
        }
    })
}

/// Set in what [`by_rules`] finds where ports had a say.
const BY_PORT: u32 = 1 << 31;

/// The slot that a target leads to for a connection. A global function: the
/// verifier looks at it once, by itself, and not again with everything it knows
/// where it is called. Such a function takes numbers only below Linux 5.13.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn by_rules(target: u32, high: u64, low: u64, port: u16, local_port: u16) -> u32 {
    let ends = Ends {
        address: (u128::from(high) << 64 | u128::from(low)).to_ne_bytes(),
        port,
        local_port,
    };
    let Resolved { slot, by_port } = resolve(&Maps, Target::from_bits(target), &ends);
    slot | u32::from(by_port) << 31
}

/// The maps above.
struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn step(&self, number: u32) -> Option<Step> {
        STEPS.get(number).copied()
    }

    #[inline(always)]
    fn remote(&self, key: &RemoteKey) -> Option<Found> {
        REMOTES.get(&Key::new(RemoteKey::BITS, *key)).copied()
    }

    #[inline(always)]
    fn port(&self, key: &PortKey) -> Option<Found> {
        PORTS.get(&Key::new(PortKey::BITS, *key)).copied()
    }
}

/// The edition of all policies that is in force; the other one is what they were before.
#[inline(always)]
fn edition() -> Edition {
    Edition::of(recent::generation())
}

/// What a slot holds connections to that exist: its policy, or nothing where no
/// policy claims them, for which a record stands in the map too.
#[inline(always)]
pub(crate) fn policy_or_leave(slot: u32) -> Option<&'static Policy> {
    let record = POLICIES.get(edition().place(slot));
    record.map(|record| &record.policy)
}

/// The slot by which a connection went before: the same where its claim is.
#[inline(always)]
pub(crate) fn slot_before(claim: Claim, slot: u32, sock: TcpSock) -> u32 {
    if claim.before == claim.now {
        slot
    } else {
        self::slot(claim.before, sock)
    }
}

/// The policy that connections may still have values of: what was in the same slot
/// before, or what is in another one by which they went.
#[inline(always)]
pub(crate) fn policy_before(claim: Claim, slot_before: u32) -> Option<&'static Policy> {
    let edition = edition();
    // The agent changes claims or policies, and claims of new cgroups after that: their
    // connections are of the edition that is in force.
    let edition = if claim.before == claim.now {
        edition.other()
    } else {
        edition
    };
    let record = POLICIES.get(edition.place(slot_before));
    record.map(|record| &record.policy)
}

/// The policy in a slot, with its record.
#[inline(always)]
pub(crate) fn policy(slot: u32) -> Option<&'static PolicyRecord> {
    if slot < FIRST {
        return None;
    }
    POLICIES.get(edition().place(slot))
}
