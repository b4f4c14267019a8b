//! Sweep: policy for the connections that were there first.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    btf_maps::{Array, PerCpuArray, SkStorage},
    helpers::generated::bpf_sk_storage_get,
    macros::btf_map,
};
use keepalive_common::{
    counters::Counters,
    history::{Originals, application, replan},
    plan::Options,
    policy::Policy,
    slot::Claim,
    sweep::{Pass, Silence, arms, class, now},
};

use crate::{
    claim,
    enforce::{self, Setter},
    kernel::{Cgroup, TcpIterator, TcpSock},
};

/// What the pass under way is to do. Passes follow one another, so there is
/// one writer at a time.
#[btf_map]
static PASS: Array<Pass, 1> = Array::new();

/// Slot → what its policy did to existing connections.
#[btf_map]
static SWEPT: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// Socket → the application's values that a policy replaced. Rare: only where
/// the application set a timer and a bound moved it, where a change of policy
/// waits for its turn, or where a policy is only counted after one that was
/// enforced.
#[btf_map]
static ORIGINALS: SkStorage<Originals> = SkStorage::new();

/// What a connection has, and what comes of it.
struct Decision {
    /// Of the policy that claims it.
    slot: u32,
    policy: &'static Policy,
    counters: *const Counters,
    has: Options,
    /// What policies replaced so far.
    originals: Originals,
    /// What the application wants.
    application: Options,
    wants: Options,
}

#[inline(always)]
fn decide(pass: &mut Pass, sock: TcpSock) -> Option<Decision> {
    let claim = nearest(pass, sock.cgroup());
    let slot = claim::slot(claim.now, sock);
    let (Some(policy), Some(counters)) = (claim::policy(slot), SWEPT.get_ptr(slot)) else {
        return None;
    };
    let has = enforce::forget_options(sock.options());
    let originals = if has.has_timers() {
        recall(sock)
    } else {
        // Nothing can have been written over what is unset.
        enforce::forget_originals()
    };
    let before = if pass.settled != 0 || claim.before == claim.now {
        Some(policy)
    } else {
        claim::policy(claim::slot(claim.before, sock))
    };
    let application = enforce::forget_options(application(&has, &originals, before));
    let wants = enforce::forget_options(replan(policy, &has, &application));
    Some(Decision {
        slot,
        policy,
        counters,
        has,
        originals,
        application,
        wants,
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
    let Some(decision) = decide(pass, sock) else {
        return false;
    };
    if decision.policy.is_enforced() {
        decision.wants != decision.has || replaces(&decision, &decision.wants, &decision.wants)
    } else {
        replaces(&decision, &decision.has, &Options::default())
    }
}

/// Whether another thing would be kept on the socket than is. Out of line, as
/// [`keep_originals`].
#[inline(never)]
fn replaces(decision: &Decision, now: &Options, wants: &Options) -> bool {
    Originals::of(&decision.application, now, wants) != decision.originals
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
    let Some(Decision {
        slot,
        policy,
        counters,
        has,
        originals,
        application,
        wants,
    }) = decide(pass, sock)
    else {
        return;
    };
    if pass.counts != 0 {
        enforce::count_seen(counters, wants == has);
    }
    if !policy.is_enforced() {
        // It gives nothing by which the next one could know what an earlier one
        // set.
        let nothing = enforce::forget_options(Options::default());
        keep_originals(sock, &application, &has, &nothing, &originals);
    }
    if wants == has && originals.is_empty() {
        return;
    }
    let mut setter = Setter::new(sock.target(), slot, counters, policy.is_enforced());
    if !setter.enforced {
        if pass.counts != 0 {
            setter.set(&application, &has, &wants);
            setter.count();
        }
        return;
    }
    let class = class(wants.idle);
    let may_probe = pass.batch != 0 && pass.class == class;
    let silence = Silence::new(sock.silent_for(), TcpSock::hz(), &wants);
    let now = enforce::forget_options(now(&has, &wants, silence, may_probe));
    if now != wants {
        pass.waiting[class as usize] += 1;
    }
    keep_originals(sock, &application, &now, &wants, &originals);
    if now == has {
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
        setter.set(&application, &has, &but_idle);
        setter.arm(application.idle, has.idle, now.idle);
    } else {
        setter.set(&application, &has, &now);
    }
    setter.count();
    if silence.is_due && arms(&has, &now) {
        pass.in_batch += 1;
        if pass.in_batch >= pass.batch {
            pass.in_batch = 0;
            iterator.pause();
        }
    }
}

/// Keeps what is replaced on the socket, if that is another thing than before.
/// Out of line: what the verifier concludes here ends here, or it would follow
/// each combination of timers to the end of the caller.
#[inline(never)]
fn keep_originals(
    sock: TcpSock,
    application: &Options,
    now: &Options,
    wants: &Options,
    before: &Originals,
) {
    let replaces = Originals::of(application, now, wants);
    if replaces != *before {
        remember(sock, &replaces);
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

/// What policies replaced on the socket so far.
#[inline(always)]
fn recall(sock: TcpSock) -> Originals {
    let originals = storage(sock, 0);
    if originals.is_null() {
        return enforce::forget_originals();
    }
    // SAFETY: a live element; only sweeps and the one ESTABLISHED callback of
    // the socket use it, all under the socket's lock.
    unsafe { *originals }
}

/// Keeps what was replaced. Where there is no memory for it, the policy's value
/// will later be taken for the application's: it stays.
#[inline(always)]
pub(crate) fn remember(sock: TcpSock, replaces: &Originals) {
    let originals = storage(sock, u64::from(BPF_SK_STORAGE_GET_F_CREATE));
    if !originals.is_null() {
        // SAFETY: as in `recall`.
        unsafe { *originals = *replaces };
    }
}

/// The socket's element of [`ORIGINALS`]; aya offers this only for a hook that
/// is not ours.
#[inline(always)]
fn storage(sock: TcpSock, flags: u64) -> *mut Originals {
    let map: *const c_void = (&raw const ORIGINALS).cast();
    // SAFETY: the map and the socket are the kernel's own; new elements are zero.
    unsafe { bpf_sk_storage_get(map.cast_mut(), sock.target(), ptr::null_mut(), flags).cast() }
}
