//! Enforcement: sets on a socket what its policy wants and counts what was done.

use core::{ffi::c_void, sync::atomic::AtomicU64};

use aya_ebpf::{
    EbpfContext as _, btf_maps::PerCpuArray, helpers::generated::bpf_setsockopt, macros::btf_map,
    programs::SockOpsContext,
};
use keepalive_common::{
    counters::{Counters, SocketOption},
    history::{Originals, application_keepalive, application_timers, replan},
    plan::{Options, plan},
    policy::Policy,
};

use crate::{claim, history, kernel::TcpSock, recent, refusal};

/// Slot → what its policy did. The agent sizes it when it loads the program.
#[btf_map]
static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// A connection has been established, on either end. Out of line: the callbacks
/// that are about something else need not save its registers.
#[inline(never)]
#[expect(
    clippy::needless_pass_by_value,
    reason = "a reference would be one to the stack of the caller"
)]
pub(crate) fn new_connection(ctx: SockOpsContext) {
    let Some(sock) = TcpSock::of(&ctx) else {
        return;
    };
    let slot = claim::slot(recent::target(sock.cgroup()), sock);
    let Some(counters) = COUNTERS.get_ptr(slot) else {
        return;
    };
    let Some(policy) = claim::policy(slot) else {
        // SAFETY: only the address of the counter is used.
        count(unsafe { &raw const (*counters).seen });
        return;
    };
    if sock.is_touched() || !policy.only_gives() {
        touched(ctx.as_ptr(), sock, slot, counters, policy);
        return;
    }
    // Most applications leave everything to the system: little is left of the
    // plan when the compiler knows that.
    let has = Options::default();
    let wants = forget_options(plan(policy, &has));
    let left_alone = !wants.keepalive && !wants.has_timers();
    count_seen(counters, left_alone);
    if left_alone {
        return;
    }
    let mut setter = Setter::new(ctx.as_ptr(), slot, counters, true);
    setter.set(&has, &has, &wants);
    setter.count_filled();
    setter.tell();
}

/// The same where the application has set something, where a policy has bounds, or
/// is only counted. Out of line, to keep its registers and branches out of the way of
/// most connections.
#[inline(never)]
fn touched(
    target: *mut c_void,
    sock: TcpSock,
    slot: u32,
    counters: *const Counters,
    policy: &Policy,
) {
    if policy.holds() {
        held(target, sock, slot, counters, policy);
        return;
    }
    let has = forget_options(sock.options());
    let wants = forget_options(plan(policy, &has));
    count_seen(counters, wants == has);
    if wants == has {
        return;
    }
    let mut setter = Setter::new(target, slot, counters, policy.is_enforced());
    setter.set(&has, &has, &wants);
    setter.count();
    if !setter.enforced {
        return;
    }
    let replaced = Originals::of(&has, &wants, &wants);
    if !replaced.is_empty() {
        history::remember(sock.target(), &replaced, policy);
    }
    setter.tell();
}

/// The same where a policy has bounds: everything that the application asked for
/// is kept, with the policy, for [`crate::bounds`].
#[inline(always)]
fn held(target: *mut c_void, sock: TcpSock, slot: u32, counters: *const Counters, policy: &Policy) {
    let has = forget_options(sock.options());
    // There is something already where the socket has been connected before.
    let before = history::originals(sock.target());
    let application = application(&has, &before, None);
    let wants = forget_options(replan(policy, &has, &application, &before));
    count_seen(counters, wants == has);
    let mut setter = Setter::new(target, slot, counters, true);
    setter.set(&application, &has, &wants);
    setter.count();
    let kept = Originals::all(&application, &wants, before.asked_later());
    history::remember(sock.target(), &kept, policy);
    setter.tell();
}

/// What the application set on a socket: `history::application` of keepalive-common.
#[inline(always)]
pub(crate) fn application(
    has: &Options,
    originals: &Originals,
    before: Option<&Policy>,
) -> Options {
    let timers = forget_options(application_timers(has, originals, before));
    forget_options(Options {
        keepalive: application_keepalive(has, originals, before, &timers),
        ..timers
    })
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
    let zero = opaque_zero();
    Options {
        keepalive: combine(options.keepalive.into(), zero) != 0,
        idle: combine(options.idle, zero),
        interval: combine(options.interval, zero),
        probes: combine(options.probes, zero),
        user_timeout: combine(options.user_timeout, zero),
    }
}

/// The same value, without what the verifier has concluded about it.
#[inline(always)]
pub(crate) fn forget(value: u32) -> u32 {
    combine(value, opaque_zero())
}

/// Always 0, which the verifier cannot know: the agent could write it.
#[unsafe(no_mangle)]
static ZERO: AtomicU64 = AtomicU64::new(0);

#[inline(always)]
fn opaque_zero() -> u64 {
    // SAFETY: read-only for the programs. Volatile, as nobody seems to write it.
    unsafe { ZERO.as_ptr().read_volatile() }
}

/// Exclusive or, which the compiler is not to see through either.
#[inline(always)]
fn combine(value: u32, zero: u64) -> u32 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = u64::from(value);
        // SAFETY: two registers and nothing else.
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

/// Adds one.
#[inline(always)]
pub(crate) fn count(counter: *const u64) {
    add(counter, 1);
}

/// Adds to a counter. The program can be interrupted on its CPU by another run
/// of itself, so being per CPU is not enough.
#[inline(always)]
fn add(counter: *const u64, number: u64) {
    // The BPF target has no compare-and-swap, so core offers no `fetch_add`.
    #[cfg(target_arch = "bpf")]
    // SAFETY: points to an aligned 8-byte counter of a map element.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({counter} + 0) += {number}",
            counter = in(reg) counter,
            number = in(reg) number,
            options(nostack),
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = (counter, number);
}

/// Sets options on one socket, under one policy.
///
/// What happens is counted without a branch that depends on the number: a
/// verifier that had to follow every combination of outcomes to the end would
/// give up.
pub(crate) struct Setter {
    /// What bpf_setsockopt takes on the hook: the context of sock_ops, the
    /// socket of an iterator.
    target: *mut c_void,
    /// The policy's slot.
    slot: u32,
    /// Where to count.
    counters: *const Counters,
    /// Timers that the application had left unset.
    filled: u64,
    /// Timers that the application had set.
    clamped: u64,
    /// Timers that got back what the application had set.
    restored: u64,
    /// Refusals before.
    failed: u64,
    /// Whether anything is set, or only counted as if it were.
    pub(crate) enforced: bool,
}

impl Setter {
    /// `target` is what bpf_setsockopt takes on the hook: the context of
    /// sock_ops, the socket of an iterator.
    #[inline(always)]
    pub(crate) fn new(
        target: *mut c_void,
        slot: u32,
        counters: *const Counters,
        enforced: bool,
    ) -> Self {
        Self {
            target,
            slot,
            counters,
            enforced,
            filled: 0,
            clamped: 0,
            restored: 0,
            // SAFETY: a live element of a per-CPU map.
            failed: unsafe { (&raw const (*counters).failed).read_volatile() },
        }
    }

    /// Lets a refusal be logged, if there was one.
    #[inline(always)]
    pub(crate) fn tell(&self) {
        // SAFETY: a live element of a per-CPU map.
        if self.failed != unsafe { (&raw const (*self.counters).failed).read_volatile() } {
            refusal::tell_refusal();
        }
    }

    /// Sets what differs. The timers come first, so that SO_KEEPALIVE arms the
    /// first probe with the new idle time, once. What the application wants
    /// tells a timer that is filled in from one that is moved.
    #[inline(always)]
    pub(crate) fn set(&mut self, application: &Options, has: &Options, wants: &Options) {
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

    /// Counts the timers that were set on an untouched connection: none of them
    /// was moved.
    #[inline(always)]
    pub(crate) fn count_filled(&self) {
        // SAFETY: only the address of the counter is used.
        add(unsafe { &raw const (*self.counters).filled }, self.filled);
    }

    /// Counts the timers that were set.
    #[inline(always)]
    pub(crate) fn count(&self) {
        self.count_filled();
        // SAFETY: only the addresses of the counters are used.
        unsafe {
            add(&raw const (*self.counters).clamped, self.clamped);
            add(&raw const (*self.counters).restored, self.restored);
        }
    }

    /// Sets the idle time although it may be the same: with keepalive on, that
    /// arms the timer from the last activity.
    #[inline(always)]
    pub(crate) fn arm(&mut self, application: u32, has: u32, wants: u32) {
        if has == wants {
            self.set_option(SocketOption::Idle, wants);
        } else {
            self.set_timer(SocketOption::Idle, application, has, wants);
        }
    }

    #[inline(always)]
    fn set_timer(&mut self, option: SocketOption, application: u32, has: u32, wants: u32) {
        if has == wants || !self.set_option(option, wants) {
            return;
        }
        if application == 0 {
            self.filled += 1;
        } else if application != wants {
            self.clamped += 1;
        } else {
            self.restored += 1;
        }
    }

    /// Sets one option; whether the kernel took it. A refusal is counted and the
    /// connection goes on without it.
    #[inline(always)]
    fn set_option(&self, option: SocketOption, value: u32) -> bool {
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
        refusal::count_cause(self.slot, option as u32, errno);
        false
    }
}
