//! Recent: what the walk through the cgroups found lately, so that most new
//! connections need none.
//!
//! A cgroup stays below the same parents and its id is not used again, so what
//! the walk finds for it changes only with what the agent wrote. After each
//! change the agent moves on to another generation, and what was found in the
//! earlier one counts no more.

use aya_ebpf::{
    btf_maps::{Array, PerCpuArray},
    macros::btf_map,
};
use keepalive_common::slot::Target;

use crate::{claim, kernel::Cgroup};

/// The generation of what the agent has written, a number without a pattern.
#[btf_map]
static GENERATION: Array<u64, 1> = Array::new();

/// Cgroup id, its low bits → what was found. Cgroups of the same low bits put
/// one another out.
#[btf_map]
static RECENT: PerCpuArray<Entry, { PLACES as usize }> = PerCpuArray::new();

const PLACES: u32 = 64;

/// What the walk found for a cgroup. A program can be interrupted on its CPU by
/// another run of itself between any two accesses: the halves of different
/// results must not pass for one, and neither must one of another generation.
#[repr(C)]
struct Entry {
    /// Id of the cgroup above, target below, 32 bits each.
    word: u64,
    /// The same, exclusive-or the generation.
    check: u64,
}

/// Where the policy for the sockets of a cgroup is found.
#[inline(always)]
pub(crate) fn target(own: Option<Cgroup>) -> Target {
    let Some(cgroup) = own else {
        return Target::UNCLAIMED;
    };
    let id = cgroup.id();
    #[expect(clippy::cast_possible_truncation, reason = "its low bits")]
    let place = id as u32 % PLACES;
    let (Some(generation), Some(found)) = (GENERATION.get_ptr(0), RECENT.get_ptr_mut(place)) else {
        return Target::UNCLAIMED;
    };
    // SAFETY: eight aligned bytes of a map element.
    let generation = unsafe { generation.read_volatile() };
    // SAFETY: elements of a per-CPU map, eight aligned bytes at a time.
    let (word, check) = unsafe {
        (
            (&raw const (*found).word).read_volatile(),
            (&raw const (*found).check).read_volatile(),
        )
    };
    if word >> 32 == id && word ^ check == generation {
        return Target::from_bits(low(word));
    }
    let target = walk(cgroup, generation);
    // Ids of more than 32 bits come after four thousand million cgroups.
    if id >> 32 == 0 {
        let word = id << 32 | u64::from(target.bits());
        // SAFETY: as above.
        unsafe {
            (&raw mut (*found).word).write_volatile(word);
            (&raw mut (*found).check).write_volatile(word ^ generation);
        }
    }
    target
}

/// Out of line, to keep its registers and branches out of the way of those that
/// need no walk.
#[inline(never)]
fn walk(cgroup: Cgroup, generation: u64) -> Target {
    claim::nearest(Some(cgroup), generation).now
}

/// The same value, in a way that makes what is read with it be read after what
/// `earlier` was read from: processors that reorder loads keep those in order
/// that need one another's results. So a walk in one generation cannot find
/// what was written in the one before it.
#[inline(always)]
pub(crate) fn after(value: u64, earlier: u64) -> u64 {
    let mut value = value;
    #[cfg(target_arch = "bpf")]
    // SAFETY: two registers and nothing else.
    unsafe {
        core::arch::asm!(
            "{value} ^= {earlier}",
            "{value} ^= {earlier}",
            value = inout(reg) value,
            earlier = in(reg) earlier,
            options(pure, nomem, nostack),
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        value ^= earlier;
        value ^= earlier;
    }
    value
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the lower half")]
fn low(word: u64) -> u32 {
    word as u32
}
