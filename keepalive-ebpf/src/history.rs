//! History: what is kept beside a socket.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE, btf_maps::SkStorage,
    helpers::generated::bpf_sk_storage_get, macros::btf_map,
};
use keepalive_common::{
    environment::Environment,
    history::{Originals, Replaced, SocketHistory},
    plan::Options,
    policy::Policy,
};

use crate::enforce::forget;

/// Socket → the application's values that a policy replaced, and what the socket
/// is held to. Only where the application set a timer and a bound moved it, where
/// a change of policy waits for its turn, where a policy is only counted after one
/// that was enforced, where a connection was taken off its socket; and on every
/// connection whose policy has bounds.
#[btf_map]
static ORIGINALS: SkStorage<SocketHistory> = SkStorage::new();

/// The element of a socket, if it has one. Programs use it under the lock of the
/// socket only: the ESTABLISHED callbacks, sweeps, the hook of setsockopt, and what the
/// kernel tells of the end of a connection all run with it. Only a survey does not, which reads: what it finds wrong the next
/// sweep finds right.
#[inline(always)]
pub(crate) fn of<'a>(socket: *mut c_void) -> Option<&'a mut SocketHistory> {
    element(&ORIGINALS, socket, 0)
}

/// What policies replaced on the socket so far.
#[inline(always)]
pub(crate) fn originals(socket: *mut c_void) -> Originals {
    of(socket).map_or_else(none, |history| history.originals)
}

/// Nothing that was replaced, without the verifier knowing.
#[inline(always)]
fn none() -> Originals {
    let zero = forget(0);
    let nothing = Replaced {
        original: zero,
        written: zero,
    };
    Originals {
        idle: nothing,
        interval: nothing,
        probes: nothing,
        user_timeout: nothing,
        rto_max: nothing,
        keepalive: zero,
    }
}

/// Keeps what a policy replaced that the socket is not held to, and is known by what
/// it has given; nothing where nothing need be kept. Where there is no memory for
/// it, the policy's value will later be taken for the application's.
///
/// Out of line: what the verifier concludes here ends here, or it would follow each
/// combination of timers to the end of the caller.
#[inline(never)]
pub(crate) fn keep(
    socket: *mut c_void,
    policy: &Policy,
    application: &Options,
    now: &Options,
    known: &Options,
) {
    let originals = Originals::of(application, now, known);
    let flags = if originals.is_empty() {
        0
    } else {
        BPF_SK_STORAGE_GET_F_CREATE
    };
    if let Some(history) = element(&ORIGINALS, socket, flags.into()) {
        history.originals = originals;
        history.held_to = *policy;
    }
}

/// Keeps everything that the application wants on a socket that is no connection for
/// now, unless that is kept already.
#[inline(never)]
pub(crate) fn remember(socket: *mut c_void, application: &Options, now: &Options) {
    if let Some(history) = element(&ORIGINALS, socket, BPF_SK_STORAGE_GET_F_CREATE.into())
        && !history.held_to.holds()
    {
        let asked_later = history.originals.asked_later();
        history.originals = Originals::all(application, now, asked_later);
    }
}

/// Holds the socket to a policy, and keeps everything that the application wants.
/// Where there is no memory for it, what the application sets later is not bounded
/// until the next sweep.
#[inline(never)]
pub(crate) fn hold(
    socket: *mut c_void,
    policy: &Policy,
    application: &Options,
    now: &Options,
    environment: &Environment,
) {
    if let Some(history) = element(&ORIGINALS, socket, BPF_SK_STORAGE_GET_F_CREATE.into()) {
        let asked_later = history.originals.asked_later();
        history.originals = Originals::all(application, now, asked_later);
        history.held_to = *policy;
        history.environment = *environment;
    }
}

/// What a map keeps beside a socket; zero when it is new. aya offers this only for a
/// hook that is not ours.
#[inline(always)]
pub(crate) fn element<'a, T>(
    map: &'static SkStorage<T>,
    socket: *mut c_void,
    flags: u64,
) -> Option<&'a mut T> {
    let map: *const c_void = ptr::from_ref(map).cast();
    // SAFETY: the map and the socket are the kernel's own.
    let element: *mut T =
        unsafe { bpf_sk_storage_get(map.cast_mut(), socket, ptr::null_mut(), flags).cast() };
    // SAFETY: null, or a live element; see `of` for why nobody else uses one of
    // `ORIGINALS`, and what is kept elsewhere is a number.
    unsafe { element.as_mut() }
}
