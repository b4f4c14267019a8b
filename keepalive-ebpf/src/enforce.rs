//! Enforcement: sets on a socket what its policy wants and counts what was done.

use core::{ffi::c_void, sync::atomic::AtomicU64};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, bpf_sock_ops,
    },
    btf_maps::PerCpuArray,
    helpers::generated::bpf_setsockopt,
    macros::btf_map,
    programs::SockOpsContext,
};
use keepalive_common::{
    counters::{ByDirection, Counters, Direction, SocketOption},
    environment::Environment,
    history::{application, known_by, replan},
    plan::{Options, plan},
    policy::Policy,
};

use crate::{claim, history, kernel::TcpSock, recent, refusal};

/// Slot → what its policy did. The agent sizes it when it loads the program.
#[btf_map]
static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// A connection has been established, on either end.
#[inline(always)]
pub(crate) fn new_connection(ctx: *mut bpf_sock_ops) {
    let (remaining, slot) = remaining(claim_and_give(ctx));
    match remaining {
        PLAN => planned(ctx, slot),
        HOLD => held(ctx, slot),
        GIVE_AGAIN => refused(ctx, slot),
        _ => 0,
    };
}

// What remains to be done for a new connection, in a frame of its own: there is little
// stack.
const NOTHING: u32 = 0;
const PLAN: u32 = 1;
const HOLD: u32 = 2;
const GIVE_AGAIN: u32 = 3;

/// As one number: the programs return no more. The slot is the lower half.
#[inline(always)]
fn remain(what: u32, slot: u32) -> u64 {
    u64::from(what) << 32 | u64::from(slot)
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the halves of a number")]
fn remaining(number: u64) -> (u32, u32) {
    ((number >> 32) as u32, number as u32)
}

/// Finds the policy of a new connection. Most applications leave everything to the
/// system, and most policies give the same to all of those: that is done here.
///
/// Out of line, so that the callbacks that do not matter need neither registers nor
/// stack.
#[inline(never)]
fn claim_and_give(ctx: *mut bpf_sock_ops) -> u64 {
    let target: *mut c_void = ctx.cast();
    let Some(sock) = TcpSock::of(&SockOpsContext::new(ctx)) else {
        return NOTHING.into();
    };
    let slot = claim::slot(recent::target(sock.cgroup()), sock);
    let Some(counters) = COUNTERS.get_ptr(slot) else {
        return NOTHING.into();
    };
    // SAFETY: the element lives as long as the map, and only its addresses are
    // used.
    let counted = unsafe { &*counters };
    let Some(record) = claim::policy(slot) else {
        count_by_direction(&raw const counted.seen, direction(target));
        return NOTHING.into();
    };
    let is_touched = sock.is_touched();
    if record.policy.holds() || is_touched && history::of(sock.target()).is_some() {
        return remain(HOLD, slot);
    }
    if is_touched || !record.spares_plan(|| sock.net().is_unchanged()) {
        return remain(PLAN, slot);
    }
    let mut refusals = 0;
    for setting in record.settings() {
        // SAFETY: the target is the kernel's own and the value is four bytes of a
        // map, as all options take it; it is only read.
        refusals |= unsafe {
            bpf_setsockopt(
                target,
                setting.level.into(),
                setting.name.into(),
                (&raw const setting.value).cast_mut().cast(),
                4,
            )
        };
    }
    if refusals != 0 {
        return remain(GIVE_AGAIN, slot);
    }
    let (timers, turn_on) = (record.timers(), record.turn_on());
    count_seen(counters, direction(target), timers + turn_on == 0);
    add(&raw const counted.turned_on, turn_on.into());
    add(&raw const counted.filled, timers.into());
    NOTHING.into()
}

/// The socket of a context, its policy, and where to count for that. To find them a
/// second time costs less than to hand them to a static function, which the verifier
/// would go through anew for everything that it knows of them.
#[inline(always)]
fn found(
    ctx: *mut bpf_sock_ops,
    slot: u32,
) -> Option<(*mut c_void, TcpSock, *const Counters, &'static Policy)> {
    let ctx = SockOpsContext::new(ctx);
    let sock = TcpSock::of(&ctx)?;
    let counters = COUNTERS.get_ptr(slot)?;
    let record = claim::policy(slot)?;
    Some((ctx.as_ptr(), sock, counters, &record.policy))
}

/// The kernel refused some of what a policy gives to a connection on which nothing was
/// set: once more, to count what.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn refused(ctx: *mut bpf_sock_ops, slot: u32) -> u32 {
    let Some((target, sock, counters, policy)) = found(ctx, slot) else {
        return 0;
    };
    let environment = sock.environment();
    let has = Options::default();
    let wants = forget_options(plan(policy, &has, &environment).wants);
    count_seen(counters, direction(target), false);
    let mut setter = Setter::new(target, slot, counters, &environment, true);
    setter.set(&has, &has, &wants);
    setter.count();
    setter.tell();
    1
}

/// A connection where the application has set something, where a policy bounds
/// retransmission, where it is only counted, and where the namespace has a say.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn planned(ctx: *mut bpf_sock_ops, slot: u32) -> u32 {
    let Some((target, sock, counters, policy)) = found(ctx, slot) else {
        return 0;
    };
    let environment = sock.environment();
    let has = sock.options(&environment);
    let plan = plan(policy, &has, &environment);
    let wants = &forget_options(plan.wants);
    count_seen(counters, direction(target), *wants == has);
    let conflict = plan.user_timeout_conflict;
    count_limits(counters, policy, conflict, &environment);
    if *wants == has {
        return 0;
    }
    let mut setter = Setter::new(target, slot, counters, &environment, policy.is_enforced());
    setter.set(&has, &has, wants);
    setter.count();
    if !setter.enforced {
        return 0;
    }
    let known = forget_options(known_by(policy, &plan, &environment));
    history::keep(sock.target(), policy, &has, wants, &known);
    setter.tell();
    1
}

/// The same where a policy has bounds: everything that the application asked for
/// is kept, with the policy, for [`crate::bounds`]. And where something is kept already,
/// because the socket has been connected before.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn held(ctx: *mut bpf_sock_ops, slot: u32) -> u32 {
    let Some((target, sock, counters, policy)) = found(ctx, slot) else {
        return 0;
    };
    let environment = sock.environment();
    let has = forget_options(sock.options(&environment));
    let before = history::originals(sock.target());
    let application = forget_options(application(&has, &before, None, &environment));
    let plan = replan(policy, &has, &application, &before, &environment);
    let wants = forget_options(plan.wants);
    count_seen(counters, direction(target), wants == has);
    count_limits(counters, policy, plan.user_timeout_conflict, &environment);
    let mut setter = Setter::new(target, slot, counters, &environment, policy.is_enforced());
    setter.set(&application, &has, &wants);
    setter.count();
    if !setter.enforced {
        return 0;
    }
    history::hold(sock.target(), policy, &application, &wants, &environment);
    setter.tell();
    1
}

/// Counts what a policy could not do for a connection.
#[inline(always)]
pub(crate) fn count_limits(
    counters: *const Counters,
    policy: &Policy,
    user_timeout_conflict: bool,
    environment: &Environment,
) {
    // SAFETY: the element lives as long as the map, and only its addresses are
    // used.
    let counters = unsafe { &*counters };
    add(
        &raw const counters.user_timeout_conflict,
        u32::from(user_timeout_conflict).into(),
    );
    if policy.give_up != 0 && environment.rto_max == 0 && !policy.ignores() {
        count(&raw const counters.give_up_unsupported);
    }
}

/// Which end has been established: the place of its [`Direction`] among counters.
/// Without a branch, so that the verifier follows one path. `target` is the context
/// of sock_ops.
#[inline(always)]
fn direction(target: *mut c_void) -> usize {
    const {
        assert!(BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB & 1 == Direction::Connecting as u32);
        assert!(BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB & 1 == Direction::Accepting as u32);
    }
    SockOpsContext::new(target.cast()).op() as usize & 1
}

/// Counts a socket, and whether it was left alone.
#[inline(always)]
pub(crate) fn count_seen(counters: *const Counters, direction: usize, left_alone: bool) {
    // SAFETY: the element lives as long as the map, and only its addresses are
    // used.
    let counters = unsafe { &*counters };
    count_by_direction(&raw const counters.seen, direction);
    if left_alone {
        count_by_direction(&raw const counters.left_alone, direction);
    }
}

#[inline(always)]
fn count_by_direction(counters: *const ByDirection, direction: usize) {
    count(counters.cast::<u64>().wrapping_add(direction));
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
        rto_max: combine(options.rto_max, zero),
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
pub(crate) fn add(counter: *const u64, number: u64) {
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
    /// TCP_RTO_MAX_MS of the namespace.
    rto_max: u32,
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
        environment: &Environment,
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
            rto_max: environment.rto_max,
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
        self.set_rto_max(application.rto_max, has.rto_max, wants.rto_max);
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

    /// Counts the timers that were set.
    #[inline(always)]
    pub(crate) fn count(&self) {
        // SAFETY: only the addresses of the counters are used.
        unsafe {
            add(&raw const (*self.counters).filled, self.filled);
            add(&raw const (*self.counters).clamped, self.clamped);
            add(&raw const (*self.counters).restored, self.restored);
        }
    }

    /// Sets the idle time although it may be the same: with keepalive on, that
    /// arms the timer from the last activity.
    #[inline(always)]
    pub(crate) fn arm(&mut self, application: u32, has: u32, wants: u32) {
        if wants == 0 {
            // The sysctl's, which the kernel takes from nobody: keepalive has
            // been armed from now.
            return;
        }
        if has == wants {
            self.set_option(SocketOption::Idle, wants);
        } else {
            self.set_timer(SocketOption::Idle, application, has, wants);
        }
    }

    #[inline(always)]
    fn set_timer(&mut self, option: SocketOption, application: u32, has: u32, wants: u32) {
        if has != wants && self.set_option(option, wants) {
            self.count_timer(application, wants);
        }
    }

    /// Unset it is that of the namespace.
    #[inline(always)]
    fn set_rto_max(&mut self, application: u32, has: u32, wants: u32) {
        let value = if wants == 0 { self.rto_max } else { wants };
        if has != wants && self.set_option(SocketOption::RtoMax, value) {
            self.count_timer(application, wants);
        }
    }

    #[inline(always)]
    fn count_timer(&mut self, application: u32, wants: u32) {
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
        // the stack, as all options take it.
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
