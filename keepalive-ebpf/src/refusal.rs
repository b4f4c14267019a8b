//! Refusals: options that the kernel did not take. They are rare, counted by
//! cause, and logged now and then.

use aya_ebpf::{
    btf_maps::{PerCpuArray, PerCpuHashMap, ProgramArray},
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::btf_map,
    programs::SockOpsContext,
};
use aya_log_ebpf::warn;
use keepalive_common::counters::{Failure, FailureKey, Refusal, SocketOption};

use crate::enforce::count;

/// Refused options by cause. When it is full, further causes count only per
/// policy.
#[btf_map]
static FAILURES: PerCpuHashMap<FailureKey, Failure, 1024> = PerCpuHashMap::new();

/// The last refusal on this CPU.
#[btf_map]
static LAST_REFUSAL: PerCpuArray<Refusal, 1> = PerCpuArray::new();

/// Holds the program that logs. Formatting a message takes more code, and more
/// of the verifier's patience, than all the rest: it stays out of the program
/// that runs for every connection.
#[btf_map]
static LOGGER: ProgramArray<1> = ProgramArray::new();

/// Refusals are logged this often per CPU, in nanoseconds.
const LOG_EVERY: u64 = 10_000_000_000;

/// Counts one by its cause.
#[inline(always)]
pub(crate) fn count_cause(key: FailureKey) {
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

/// Ends the program with telling of the last refusal, unless one has been told
/// of lately.
#[inline(always)]
pub(crate) fn tell(ctx: &SockOpsContext) {
    let Some(last) = LAST_REFUSAL.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: takes no arguments and only reads the clock.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // SAFETY: as in `count_cause`.
    let last = unsafe { &mut *last };
    if last.logged_at != 0 && now.wrapping_sub(last.logged_at) < LOG_EVERY {
        return;
    }
    last.logged_at = now;
    // SAFETY: the logger takes the same context and lets the kernel go on, as
    // its caller would have. A failed call is one line less in the log.
    unsafe { LOGGER.tail_call(ctx, 0) };
}

/// Logs the last refusal.
#[inline(always)]
pub(crate) fn log(ctx: &SockOpsContext) {
    let Some(last) = LAST_REFUSAL.get(0) else {
        return;
    };
    let FailureKey {
        slot,
        option,
        errno,
    } = last.key;
    let option = match SocketOption::from_number(option) {
        Some(option) => option.name(),
        None => "an option",
    };
    warn!(
        ctx,
        "the kernel refused {} with errno {} (policy slot {}); the connection goes on without it",
        option,
        errno,
        slot
    );
}
