//! Sweep: policy for the connections that were there first.

use aya_ebpf::{
    btf_maps::{Array, PerCpuArray},
    macros::btf_map,
};
use keepalive_common::{
    counters::Counters,
    environment::Environment,
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
    let claim = nearest(pass, sock.cgroup());
    let slot = claim::slot(claim.now, sock);
    let slot_before = if pass.settled != 0 || claim.before == claim.now {
        slot
    } else {
        claim::slot(claim.before, sock)
    };
    let originals = history::originals(sock.target());
    if slot < FIRST && slot_before < FIRST && originals.is_empty() {
        return;
    }
    let (Some(policy), Some(before), Some(counters)) = (
        claim::policy_or_leave(slot),
        claim::policy_or_leave(slot_before),
        SWEPT.get_ptr(slot),
    ) else {
        return;
    };
    let Some(subject) = subject() else {
        return;
    };
    subject.environment = sock.environment();
    subject.has = enforce::forget_options(sock.options(&subject.environment));
    subject.originals = originals;
    decide_about(subject, policy, Some(before));
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
        enforce::count_seen(counters, wants == has);
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
    let timers = environment.complete(wants);
    let class = class(timers.idle);
    let may_probe = pass.batch != 0 && pass.class == class;
    let silence = Silence::new(sock.silent_for(), TcpSock::hz(), &timers);
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
