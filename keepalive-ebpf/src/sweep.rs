//! Sweep: policy for the connections that were there first.

use aya_ebpf::{
    btf_maps::{Array, PerCpuArray},
    macros::btf_map,
};
use keepalive_common::{
    counters::{Counters, Direction},
    environment::Environment,
    history::Originals,
    plan::Options,
    policy::Policy,
    slot::{Claim, FIRST},
    sweep::{Pass, Silence, arms, class, now},
};

use crate::{
    claim,
    decide::{Subject, decide_about, subject},
    enforce::{self, Setter},
    history,
    kernel::{Cgroup, TcpIterator, TcpSock},
};

/// What the pass under way is to do. Passes follow one another, so there is
/// one writer at a time.
#[btf_map]
static PASS: Array<Pass, 1> = Array::new();

/// Slot → what its policy did to existing connections.
#[btf_map]
static SWEPT: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// What a decision is about, found for a connection.
struct Claimed {
    slot: u32,
    policy: &'static Policy,
    counters: *const Counters,
    subject: &'static mut Subject,
}

/// Decides what becomes of a connection; none where nothing can become of it.
#[inline(always)]
fn decide(pass: &mut Pass, sock: TcpSock) -> Option<Claimed> {
    let claim = nearest(pass, sock.cgroup());
    let slot = claim::slot(claim.now, sock);
    let slot_before = claim::slot_before(claim, slot, sock);
    let originals = history::originals(sock.target());
    if slot < FIRST && slot_before < FIRST && originals.is_empty() {
        return None;
    }
    let (Some(policy), Some(before), Some(counters)) = (
        claim::policy_or_leave(slot),
        claim::policy_before(claim, slot_before),
        SWEPT.get_ptr(slot),
    ) else {
        return None;
    };
    let subject = subject()?;
    subject.environment = sock.environment();
    subject.has = enforce::forget_options(sock.options(&subject.environment));
    subject.originals = originals;
    decide_about(subject, policy, Some(before));
    Some(Claimed {
        slot,
        policy,
        counters,
        subject,
    })
}

/// Whether a pass would do anything to a connection but count it.
#[inline(always)]
pub(crate) fn is_due(sock: TcpSock) -> bool {
    let Some(pass) = PASS.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: as in `existing_connection`.
    let pass = unsafe { &mut *pass };
    let Some(Claimed {
        policy, subject, ..
    }) = decide(pass, sock)
    else {
        return false;
    };
    if policy.is_enforced() && subject.wants != subject.has {
        return true;
    }
    replaces(sock, policy, subject)
}

/// Whether another thing would be kept on the socket than is, or it would be held
/// to another policy. Out of line, as [`history::keep`].
#[inline(never)]
fn replaces(sock: TcpSock, policy: &Policy, subject: &Subject) -> bool {
    let Subject {
        has,
        originals,
        environment,
        application,
        known,
        ..
    } = subject;
    let held = history::of(sock.target()).filter(|history| history.held_to.holds());
    if !policy.holds() {
        return held.is_some() || Originals::of(application, has, known) != *originals;
    }
    held.is_none_or(|history| {
        history.held_to != *policy
            || history.environment != *environment
            || Originals::all(application, has, originals.asked_later()) != *originals
    })
}

/// A connection met by the sweep.
#[inline(always)]
pub(crate) fn existing_connection(iterator: &TcpIterator, sock: TcpSock) {
    let Some(pass) = PASS.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: an element of an array lives as long as the map, and passes do not
    // run at the same time.
    let pass = unsafe { &mut *pass };
    pass.seen += 1;
    let Some(Claimed {
        slot,
        policy,
        counters,
        ..
    }) = decide(pass, sock)
    else {
        return;
    };
    carry_out(iterator, sock, slot, counters, policy);
}

/// Sets what was decided. Out of line, in a frame of its own: there is little
/// stack.
#[inline(never)]
fn carry_out(
    iterator: &TcpIterator,
    sock: TcpSock,
    slot: u32,
    counters: *const Counters,
    policy: &Policy,
) {
    let (Some(pass), Some(subject)) = (PASS.get_ptr_mut(0), subject()) else {
        return;
    };
    // SAFETY: as in `existing_connection`.
    let pass = unsafe { &mut *pass };
    let Subject {
        has,
        environment,
        application,
        wants,
        known,
        user_timeout_conflict,
        ..
    } = subject;
    if pass.counts != 0 {
        // Who connected is not known any more.
        enforce::count_seen(counters, Direction::Connecting as usize, wants == has);
        enforce::count_limits(counters, policy, *user_timeout_conflict, environment);
    }
    let is_dry = pass.dry_run != 0;
    if !is_dry && (wants == has || !policy.is_enforced()) {
        keep(sock, policy, application, has, known, environment);
    }
    if wants == has {
        return;
    }
    let enforced = policy.is_enforced() && !is_dry;
    let mut setter = Setter::new(sock.target(), slot, counters, environment, enforced);
    if !setter.enforced {
        if pass.counts != 0 {
            setter.set(application, has, wants);
            setter.count();
        }
        return;
    }
    // Timers that stay unset are those of the namespace.
    let complete = environment.complete(wants);
    let class = class(complete.idle);
    let may_probe = pass.batch != 0 && pass.class == class;
    let silence = Silence::new(sock.silent_for(), TcpSock::hz(), &complete);
    let now = enforce::forget_options(now(has, wants, silence, may_probe));
    if now != *wants {
        pass.waiting[class as usize] += 1;
    }
    keep(sock, policy, application, &now, known, environment);
    if now == *has {
        return;
    }
    if !has.keepalive && now.keepalive {
        // The idle time comes last, when keepalive is on: that arms from the
        // last activity instead of from now, so that timers keep the pace of
        // the connections.
        let but_idle = Options {
            idle: has.idle,
            ..now
        };
        setter.set(application, has, &but_idle);
        setter.arm(application.idle, has.idle, now.idle);
    } else {
        setter.set(application, has, &now);
    }
    setter.count();
    if silence.is_due && arms(has, &now) {
        pass.in_batch += 1;
        if pass.in_batch >= pass.batch {
            pass.in_batch = 0;
            iterator.pause();
        }
    }
}

/// Keeps what is replaced on the socket, and what it is held to.
#[inline(always)]
fn keep(
    sock: TcpSock,
    policy: &Policy,
    application: &Options,
    now: &Options,
    known: &Options,
    environment: &Environment,
) {
    if policy.holds() {
        history::hold(sock.target(), policy, application, now, environment);
    } else {
        history::keep(sock.target(), policy, application, now, known);
    }
}

/// The claim on the sockets of a cgroup. One walk does for all that follow one
/// another in a pass of the first kind, in which the agent changes no claims.
#[inline(always)]
fn nearest(pass: &mut Pass, own: Option<Cgroup>) -> Claim {
    let id = own.map_or(0, Cgroup::id);
    if pass.batch == 0 && pass.cgroup == id {
        return pass.claim;
    }
    pass.cgroup = id;
    pass.claim = claim::nearest(own, 0);
    pass.claim
}
