//! Recent: what the walk through the cgroups found lately, and what the rules said of
//! an address, so that most new connections need neither.
//!
//! A cgroup stays below the same parents and its serial number is not used again, so
//! what the walk finds for it changes only with what the agent wrote. After each
//! change the agent moves on to another generation, and what was found in the
//! earlier one counts no more.

use core::sync::atomic::AtomicU64;

use aya_ebpf::{btf_maps::Array, macros::btf_map};
use keepalive_common::slot::{Resolved, Target, UNCLAIMED};

use crate::{claim, kernel::Cgroup};

/// The generation of what the agent has written, a number without a pattern; its last bit
/// is the edition of the policies (`Edition` of keepalive-common). In a section of its
/// own, which is a map with nothing else, for the agent to write.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data.written")]
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// The generation that is in force. What is found by it was written before it.
#[inline(always)]
pub(crate) fn generation() -> u64 {
    // SAFETY: read-only for the programs. Volatile, as nobody seems to write it.
    unsafe { GENERATION.as_ptr().read_volatile() }
}

/// Serial number of a cgroup, its low bits → what was found. Cgroups of the same low
/// bits put one another out.
///
/// One for all CPUs: it is hardly ever written, and one per CPU would be found through
/// a pointer that stands somewhere else.
#[btf_map]
static RECENT: Array<Entry, { PLACES as usize }> = Array::new();

const PLACES: u32 = 256;

/// What the walk found for a cgroup. Other CPUs write here too, and a program can be
/// interrupted on its own by another run of itself: the halves of different results
/// must not pass for one, and neither must one of another generation.
#[repr(C)]
struct Entry {
    /// Serial number of the cgroup above, target below, 32 bits each.
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
    let serial = cgroup.serial();
    #[expect(clippy::cast_possible_truncation, reason = "its low bits")]
    let place = serial as u32 % PLACES;
    let generation = generation();
    let Some(found) = RECENT.get_ptr_mut(place) else {
        return Target::UNCLAIMED;
    };
    // SAFETY: elements of a map, eight aligned bytes at a time.
    let (word, check) = unsafe {
        (
            (&raw const (*found).word).read_volatile(),
            (&raw const (*found).check).read_volatile(),
        )
    };
    if word >> 32 == serial && word ^ check == generation {
        return Target::from_bits(low(word));
    }
    let target = walk(cgroup, generation);
    // Numbers of more than 32 bits come after four thousand million cgroups.
    if serial >> 32 == 0 {
        let word = serial << 32 | u64::from(target.bits());
        // SAFETY: as above.
        unsafe {
            (&raw mut (*found).word).write_volatile(word);
            (&raw mut (*found).check).write_volatile(word ^ generation);
        }
    }
    target
}

/// A target and an address, hashed → the slot that the rules gave. What a target leads
/// to is never changed once a cgroup has it, so this needs no generation.
#[btf_map]
static RECENT_ADDRESSES: Array<AddressEntry, 1024> = Array::new();

/// Bits of a hash that are a place.
const PLACE_BITS: u32 = 10;

/// What the rules said. As an [`Entry`], of two results at once it shows none.
#[repr(C)]
struct AddressEntry {
    /// The address, IPv4 as `::ffff:0:0/96`: 64 bits each.
    high: u64,
    low: u64,
    /// Target above, slot below, 32 bits each. 0 where nothing is: a target with rules
    /// never is.
    word: u64,
    /// The same, exclusive-or the hash of the address.
    check: u64,
}

/// The slot that the rules of a target give to connections with an address.
#[inline(always)]
pub(crate) fn by_address(
    target: Target,
    high: u64,
    low: u64,
    rules: impl FnOnce() -> Resolved,
) -> u32 {
    let hash = hash(high, low);
    let above = u64::from(target.bits()) << 32;
    let place = (self::hash(above, hash) >> (64 - PLACE_BITS)) as u32;
    let Some(found) = RECENT_ADDRESSES.get_ptr_mut(place) else {
        return UNCLAIMED;
    };
    // SAFETY: elements of a map, eight aligned bytes at a time.
    let entry = unsafe {
        AddressEntry {
            high: (&raw const (*found).high).read_volatile(),
            low: (&raw const (*found).low).read_volatile(),
            word: (&raw const (*found).word).read_volatile(),
            check: (&raw const (*found).check).read_volatile(),
        }
    };
    if (entry.high, entry.low, entry.word ^ entry.check) == (high, low, hash)
        && entry.word ^ above == u64::from(self::low(entry.word))
    {
        return self::low(entry.word);
    }
    let Resolved { slot, by_port } = rules();
    if !by_port {
        let word = above | u64::from(slot);
        // SAFETY: as above.
        unsafe {
            (&raw mut (*found).high).write_volatile(high);
            (&raw mut (*found).low).write_volatile(low);
            (&raw mut (*found).word).write_volatile(word);
            (&raw mut (*found).check).write_volatile(word ^ hash);
        }
    }
    slot
}

/// Spreads neighbouring addresses: multiplied by an odd number without a pattern, the
/// upper bits depend on all others.
#[inline(always)]
const fn hash(high: u64, low: u64) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    (high.wrapping_mul(ODD) ^ low).wrapping_mul(ODD)
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
