//! Enforcement: sets on a socket what its policy wants and counts what was done.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    btf_maps::{PerCpuArray, PerCpuHashMap},
    helpers::generated::{bpf_ktime_get_boot_ns, bpf_setsockopt},
    macros::btf_map,
    programs::SockOpsContext,
};
use aya_log_ebpf::warn;
use keepalive_common::{
    counters::{Counters, Failure, FailureKey, SocketOption},
    history::Originals,
    plan::{Options, plan},
};

use crate::{claim, kernel::TcpSock, sweep};

/// Slot → what its policy did. The agent sizes it when it loads the program.
#[btf_map]
static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// Refused options by cause. When it is full, further causes count only in
/// [`Counters::failed`].
#[btf_map]
static FAILURES: PerCpuHashMap<FailureKey, Failure, 1024> = PerCpuHashMap::new();

/// A cause that lasts is logged this often per CPU, in nanoseconds.
const LOG_EVERY: u64 = 10_000_000_000;

/// A connection has been established, on either end.
#[inline(always)]
pub(crate) fn new_connection(ctx: &SockOpsContext, sock: TcpSock) {
    let slot = claim::nearest(sock.cgroup()).slot;
    let Some(counters) = COUNTERS.get_ptr(slot) else {
        return;
    };
    let Some(policy) = claim::policy(slot) else {
        // SAFETY: only the address of the counter is used.
        count(unsafe { &raw const (*counters).seen });
        return;
    };
    let has = sock.options();
    let wants = plan(policy, &has);
    let done = apply(ctx.as_ptr(), slot, counters, &has, &wants);
    if done.clamped {
        sweep::remember(sock, &Originals::of(&has, &wants));
    }
    if let Some(refusal) = done.to_be_logged {
        refusal.log(ctx, slot);
    }
}

/// Sets what differs and counts what became of the socket.
#[inline(always)]
pub(crate) fn apply(
    target: *mut c_void,
    slot: u32,
    counters: *const Counters,
    has: &Options,
    wants: &Options,
) -> Done {
    // SAFETY: the element lives as long as the map, and only its addresses are
    // used.
    let counters = unsafe { &*counters };
    count(&raw const counters.seen);
    if wants == has {
        count(&raw const counters.left_alone);
        return Done::default();
    }
    let mut done = set(target, has, wants);
    for (happened, counter) in [
        (done.turned_on, &raw const counters.turned_on),
        (done.turned_off, &raw const counters.turned_off),
        (done.filled, &raw const counters.filled),
        (done.clamped, &raw const counters.clamped),
        (done.refused.is_some(), &raw const counters.failed),
    ] {
        if happened {
            count(counter);
        }
    }
    done.to_be_logged = done.refused.filter(|refusal| refusal.count(slot));
    done
}

/// Adds one. The program can be interrupted on its CPU by another run of
/// itself, so being per CPU is not enough.
#[inline(always)]
fn count(counter: *const u64) {
    // The BPF target has no compare-and-swap, so core offers no `fetch_add`.
    #[cfg(target_arch = "bpf")]
    // SAFETY: points to an aligned 8-byte counter of a map element.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({counter} + 0) += {one}",
            counter = in(reg) counter,
            one = in(reg) 1_u64,
            options(nostack),
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = counter;
}

/// What became of a socket.
#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent of each other")]
pub(crate) struct Done {
    turned_on: bool,
    turned_off: bool,
    filled: bool,
    clamped: bool,
    /// The last option that the kernel refused.
    refused: Option<Refusal>,
    /// The same, unless it has been logged lately.
    to_be_logged: Option<Refusal>,
}

/// Sets what differs. The timers come first, so that SO_KEEPALIVE arms the first
/// probe with the new idle time, once.
#[inline(always)]
fn set(target: *mut c_void, has: &Options, wants: &Options) -> Done {
    let mut done = Done::default();
    for (option, has, wants) in [
        (SocketOption::Idle, has.idle, wants.idle),
        (SocketOption::Interval, has.interval, wants.interval),
        (SocketOption::Probes, has.probes, wants.probes),
        (
            SocketOption::UserTimeout,
            has.user_timeout,
            wants.user_timeout,
        ),
    ] {
        if has == wants {
            continue;
        }
        match set_option(target, option, wants) {
            Err(refusal) => done.refused = Some(refusal),
            Ok(()) if has == 0 => done.filled = true,
            Ok(()) => done.clamped = true,
        }
    }
    if has.keepalive != wants.keepalive {
        match set_option(target, SocketOption::Keepalive, u32::from(wants.keepalive)) {
            Err(refusal) => done.refused = Some(refusal),
            Ok(()) if wants.keepalive => done.turned_on = true,
            Ok(()) => done.turned_off = true,
        }
    }
    done
}

/// Sets one option. The target is what bpf_setsockopt takes on the hook: the
/// context of sock_ops, the socket of an iterator.
#[inline(always)]
pub(crate) fn set_option(
    target: *mut c_void,
    option: SocketOption,
    value: u32,
) -> Result<(), Refusal> {
    let (level, number) = option.level_and_number();
    let mut value = value;
    // SAFETY: the target is the kernel's own and the value is four bytes on the
    // stack, as all five options take it.
    let result =
        unsafe { bpf_setsockopt(target, level, number, (&raw mut value).cast::<c_void>(), 4) };
    if result == 0 {
        return Ok(());
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an error number: negative and small"
    )]
    let errno = -result as u32;
    Err(Refusal { option, errno })
}

/// An option that the kernel did not take. The connection goes on without it.
#[derive(Clone, Copy)]
pub(crate) struct Refusal {
    option: SocketOption,
    errno: u32,
}

impl Refusal {
    /// Counts it by its cause; whether it is time to log that cause again.
    #[inline(always)]
    fn count(self, slot: u32) -> bool {
        let key = FailureKey {
            slot,
            option: self.option as u32,
            errno: self.errno,
        };
        // SAFETY: takes no arguments and only reads the clock.
        let now = unsafe { bpf_ktime_get_boot_ns() };
        let Some(failure) = FAILURES.get_ptr_mut(key) else {
            let first = Failure {
                count: 1,
                logged_at: now,
            };
            // A full map loses the cause, not the count of failed sockets.
            let _ = FAILURES.insert(key, first, 0);
            return true;
        };
        // SAFETY: a live element of a per-CPU map; a race with a run that
        // interrupts this one costs at worst one more line in the log.
        let failure = unsafe { &mut *failure };
        count(&raw const failure.count);
        if now.wrapping_sub(failure.logged_at) < LOG_EVERY {
            return false;
        }
        failure.logged_at = now;
        true
    }

    #[inline(always)]
    fn log(self, ctx: &SockOpsContext, slot: u32) {
        warn!(
            ctx,
            "the kernel refused {} with errno {} (policy slot {}); the connection goes on without it",
            self.option.name(),
            self.errno,
            slot
        );
    }
}
