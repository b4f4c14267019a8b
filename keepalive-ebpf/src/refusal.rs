//! Refusals: options that the kernel did not take. They are rare, counted by
//! cause, and logged now and then.

use aya_ebpf::{
    btf_maps::{PerCpuArray, PerCpuHashMap},
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::btf_map,
};
use aya_log_ebpf::debug;
use keepalive_common::counters::{Failure, FailureKey, Refusal};

use crate::enforce::count;

/// Refused options by cause. When it is full, further causes count only per
/// policy.
#[btf_map]
static FAILURES: PerCpuHashMap<FailureKey, Failure, 1024> = PerCpuHashMap::new();

/// The last refusal on this CPU.
#[btf_map]
static LAST_REFUSAL: PerCpuArray<Refusal, 1> = PerCpuArray::new();

/// Refusals are logged this often per CPU, in nanoseconds.
const LOG_EVERY: u64 = 10_000_000_000;

/// Counts one by its cause.
#[inline(never)]
pub(crate) fn count_cause(slot: u32, option: u32, errno: u32) {
    let key = FailureKey {
        slot,
        option,
        errno,
    };
    if let Some(failure) = FAILURES.get_ptr_mut(key) {
        // SAFETY: only the address of the counter is used.
        count(unsafe { &raw const (*failure).count });
    } else {
        // A full map loses the cause, not the count of failures.
        let _ = FAILURES.insert(key, Failure { count: 1 }, 0);
    }
    if let Some(last) = LAST_REFUSAL.get_ptr_mut(0) {
        // SAFETY: a live element of a per-CPU map; a race with a run that
        // interrupts this one costs at worst a wrong line in the log.
        unsafe { (*last).key = key };
    }
}

/// Logs the last refusal, unless one has been logged lately. A global function:
/// the verifier looks at it once, by itself, and not again with everything it
/// knows where it is called.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn tell_refusal() -> u32 {
    let Some(last) = LAST_REFUSAL.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: takes no arguments and only reads the clock.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // SAFETY: as in `count_cause`.
    let last = unsafe { &mut *last };
    if last.logged_at != 0 && now.wrapping_sub(last.logged_at) < LOG_EVERY {
        return 0;
    }
    last.logged_at = now;
    let FailureKey {
        slot,
        option,
        errno,
    } = last.key;
    // Numbers alone: names would take the verifier longer than everything else
    // together. It wakes the agent, which knows the names.
    debug!(
        (),
        "refused: option {} errno {} slot {}", option, errno, slot
    );
    0
}
