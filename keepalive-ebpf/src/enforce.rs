//! Enforcement: sets on a socket what its policy wants and counts what was done.

use core::{ffi::c_void, sync::atomic::AtomicU64};

use aya_ebpf::{
    EbpfContext as _, btf_maps::PerCpuArray, helpers::generated::bpf_setsockopt, macros::btf_map,
    programs::SockOpsContext,
};
use keepalive_common::{
    counters::{Counters, FailureKey, SocketOption},
    history::Originals,
    plan::{Options, plan},
};

use crate::{claim, kernel::TcpSock, recent, refusal, sweep};

/// Slot → what its policy did. The agent sizes it when it loads the program.
#[btf_map]
static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// A connection has been established, on either end.
#[inline(always)]
pub(crate) fn new_connection(ctx: &SockOpsContext, sock: TcpSock) {
    let slot = claim::slot(recent::target(sock.cgroup()), sock);
    let Some(counters) = COUNTERS.get_ptr(slot) else {
        return;
    };
    let Some(policy) = claim::policy(slot) else {
        // SAFETY: only the address of the counter is used.
        count(unsafe { &raw const (*counters).seen });
        return;
    };
    let has = forget_options(sock.options());
    let wants = forget_options(plan(policy, &has));
    count_seen(counters, wants == has);
    if wants == has {
        return;
    }
    // SAFETY: a live element of a per-CPU map.
    let failed = unsafe { (&raw const (*counters).failed).read_volatile() };
    let setter = Setter {
        target: ctx.as_ptr(),
        slot,
        counters,
        enforced: policy.is_enforced(),
    };
    setter.set(&has, &has, &wants);
    if !setter.enforced {
        return;
    }
    let replaced = Originals::of(&has, &wants);
    if !replaced.is_empty() {
        sweep::remember(sock, &replaced);
    }
    // SAFETY: as above.
    if failed != unsafe { (&raw const (*counters).failed).read_volatile() } {
        refusal::tell(ctx);
    }
}

/// Counts a socket, and whether it was left alone.
#[inline(always)]
pub(crate) fn count_seen(counters: *const Counters, left_alone: bool) {
    // SAFETY: the element lives as long as the map, and only its addresses are
    // used.
    let counters = unsafe { &*counters };
    count(&raw const counters.seen);
    if left_alone {
        count(&raw const counters.left_alone);
    }
}

/// The same options, without what the verifier has concluded about them. It
/// follows every path to the end on which it knows something else, and there
/// are as many as there are combinations of set, unset and bounded timers.
#[inline(always)]
pub(crate) fn forget_options(options: Options) -> Options {
    Options {
        keepalive: options.keepalive,
        idle: forget(options.idle),
        interval: forget(options.interval),
        probes: forget(options.probes),
        user_timeout: forget(options.user_timeout),
    }
}

/// Always 0, which the verifier cannot know: the agent could write it.
#[unsafe(no_mangle)]
static ZERO: AtomicU64 = AtomicU64::new(0);

/// The same value, without what the verifier has concluded about it.
#[inline(always)]
pub(crate) fn forget(value: u32) -> u32 {
    // SAFETY: read-only for the programs. Volatile, as nobody seems to write it.
    let zero = unsafe { ZERO.as_ptr().read_volatile() };
    #[cfg(target_arch = "bpf")]
    {
        let mut value = u64::from(value);
        // SAFETY: two registers and nothing else. The compiler is not to see
        // through it either.
        unsafe {
            core::arch::asm!(
                "{value} ^= {zero}",
                value = inout(reg) value,
                zero = in(reg) zero,
                options(pure, nomem, nostack),
            );
        }
        #[expect(clippy::cast_possible_truncation, reason = "still the same value")]
        let value = value as u32;
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        u32::try_from(u64::from(value) ^ zero).unwrap_or_default()
    }
}

/// Adds one. The program can be interrupted on its CPU by another run of
/// itself, so being per CPU is not enough.
#[inline(always)]
pub(crate) fn count(counter: *const u64) {
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

/// Sets options on one socket, under one policy.
///
/// What happens is counted where it happens: a verifier that had to follow every
/// combination of outcomes to the end would give up.
#[derive(Clone, Copy)]
pub(crate) struct Setter {
    /// What bpf_setsockopt takes on the hook: the context of sock_ops, the
    /// socket of an iterator.
    pub(crate) target: *mut c_void,
    /// The policy's slot.
    pub(crate) slot: u32,
    /// Where to count.
    pub(crate) counters: *const Counters,
    /// Whether anything is set, or only counted as if it were.
    pub(crate) enforced: bool,
}

impl Setter {
    /// Sets what differs. The timers come first, so that SO_KEEPALIVE arms the
    /// first probe with the new idle time, once. What the application wants
    /// tells a timer that is filled in from one that is moved.
    #[inline(always)]
    pub(crate) fn set(self, application: &Options, has: &Options, wants: &Options) {
        self.set_timer(SocketOption::Idle, application.idle, has.idle, wants.idle);
        self.set_timer(
            SocketOption::Interval,
            application.interval,
            has.interval,
            wants.interval,
        );
        self.set_timer(
            SocketOption::Probes,
            application.probes,
            has.probes,
            wants.probes,
        );
        self.set_timer(
            SocketOption::UserTimeout,
            application.user_timeout,
            has.user_timeout,
            wants.user_timeout,
        );
        if has.keepalive != wants.keepalive
            && self.set_option(SocketOption::Keepalive, u32::from(wants.keepalive))
        {
            // SAFETY: only addresses of counters are used.
            let counters = unsafe { &*self.counters };
            if wants.keepalive {
                count(&raw const counters.turned_on);
            } else {
                count(&raw const counters.turned_off);
            }
        }
    }

    /// Sets the idle time although it may be the same: with keepalive on, that
    /// arms the timer from the last activity.
    #[inline(always)]
    pub(crate) fn arm(self, application: u32, has: u32, wants: u32) {
        if has == wants {
            self.set_option(SocketOption::Idle, wants);
        } else {
            self.set_timer(SocketOption::Idle, application, has, wants);
        }
    }

    #[inline(always)]
    fn set_timer(self, option: SocketOption, application: u32, has: u32, wants: u32) {
        if has == wants || !self.set_option(option, wants) {
            return;
        }
        // SAFETY: only addresses of counters are used.
        let counters = unsafe { &*self.counters };
        if application == 0 {
            count(&raw const counters.filled);
        } else if application != wants {
            count(&raw const counters.clamped);
        }
    }

    /// Sets one option; whether the kernel took it. A refusal is counted and the
    /// connection goes on without it.
    #[inline(always)]
    fn set_option(self, option: SocketOption, value: u32) -> bool {
        if !self.enforced {
            return true;
        }
        let (level, number) = option.level_and_number();
        let mut value = value;
        // SAFETY: the target is the kernel's own and the value is four bytes on
        // the stack, as all five options take it.
        let result = unsafe {
            bpf_setsockopt(
                self.target,
                level,
                number,
                (&raw mut value).cast::<c_void>(),
                4,
            )
        };
        if result == 0 {
            return true;
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an error number: negative and small"
        )]
        let errno = -result as u32;
        // SAFETY: only the address of the counter is used.
        count(unsafe { &raw const (*self.counters).failed });
        refusal::count_cause(FailureKey {
            slot: self.slot,
            option: option as u32,
            errno,
        });
        false
    }
}
