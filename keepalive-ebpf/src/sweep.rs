//! Sweep: policy for the connections that were there first.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    btf_maps::{Array, PerCpuArray, SkStorage},
    helpers::generated::bpf_sk_storage_get,
    macros::btf_map,
};
use keepalive_common::{
    counters::{Counters, SocketOption},
    history::{Originals, application, replan},
    plan::Options,
    policy::Policy,
    slot::Claim,
    sweep::{Pass, is_late},
};

use crate::{claim, enforce, kernel::TcpSock};

/// What the pass under way is to do. Passes follow one another, so there is
/// one writer at a time.
#[btf_map]
static PASS: Array<Pass, 1> = Array::new();

/// Slot → what its policy did to existing connections.
#[btf_map]
static SWEPT: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// Socket → the application's values that a policy replaced. Rare: only where
/// the application set a timer and a bound moved it.
#[btf_map]
static ORIGINALS: SkStorage<Originals> = SkStorage::new();

/// A connection met by the sweep.
#[inline(always)]
pub(crate) fn existing_connection(sock: TcpSock) {
    let Some(pass) = PASS.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: an element of an array lives as long as the map, and passes do not
    // run at the same time.
    let pass = unsafe { &mut *pass };
    pass.seen += 1;
    let claim = claim::nearest(sock.cgroup());
    let Some(policy) = claim::policy(claim.slot) else {
        return;
    };
    if pass.apply != 0 {
        apply(sock, claim, policy);
    }
    let has = sock.options();
    if has.keepalive && has.idle != 0 && sock_is_late(sock, &has) {
        if pass.budget == 0 {
            pass.waiting += 1;
        } else {
            // The same value again: arms from the last activity.
            if enforce::set_option(sock.target(), SocketOption::Idle, has.idle).is_ok() {
                pass.forwarded += 1;
            }
            pass.budget -= 1;
        }
    }
}

#[inline(always)]
fn apply(sock: TcpSock, claim: Claim, policy: &Policy) {
    let Some(counters) = SWEPT.get_ptr(claim.slot) else {
        return;
    };
    let has = sock.options();
    let originals = recall(sock);
    let application = application(&has, &originals, claim::policy(claim.before));
    let wants = replan(policy, &has, &application);
    enforce::apply(sock.target(), claim.slot, counters, &has, &wants);
    let replaces = Originals::of(&application, &wants);
    if replaces != originals {
        remember(sock, &replaces);
    }
}

/// What policies replaced on the socket so far.
#[inline(always)]
fn recall(sock: TcpSock) -> Originals {
    let originals = storage(sock, 0);
    if originals.is_null() {
        return Originals::default();
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

/// Whether the socket's next probe is further off than its silence asks for.
#[inline(always)]
fn sock_is_late(sock: TcpSock, has: &Options) -> bool {
    let hz = TcpSock::hz();
    is_late(
        sock.armed_for(),
        sock.silent_for(),
        i64::from(has.idle) * hz,
        hz,
    )
}
