//! Dead peers: connections that a policy has set something on, and that end
//! because the other end does not answer. Counted by policy, cause and silence,
//! and told of in a record each.
//!
//! The kernel calls for every error that it has for an application, which is rare,
//! instead of for every change of a connection's state, which would cost all of
//! them. Which connections are watched is marked on the socket itself.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_SK_STORAGE_GET_F_CREATE,
        BPF_SOCK_OPS_RTO_CB_FLAG, BPF_TCP_CLOSE,
    },
    btf_maps::{Array, RingBuf, SkStorage},
    helpers::generated::{bpf_ktime_get_boot_ns, bpf_ringbuf_query, bpf_setsockopt},
    macros::btf_map,
    programs::{BtfTracePointContext, SockOpsContext},
};
use keepalive_common::dead_peer::{Cause, DeadPeer, DeadPeers, End, bucket};

use crate::{
    claim,
    enforce::{add, count},
    history,
    kernel::{Cgroup, TcpSock},
    list::milliseconds,
    recent,
};

/// Slot → its dead peers. Not per CPU: they are too rare for that to matter, and
/// the record is large. The agent sizes it when it loads the program.
#[btf_map]
static DEAD_PEERS: Array<DeadPeers, 1> = Array::new();

/// One record for each, as long as there is room. The agent makes it smaller
/// where nobody reads it.
#[btf_map]
static DEATHS: RingBuf<DeadPeer, RING> = RingBuf::new();

const RING: usize = 256 * 1024;

/// Not 0 while somebody wants to know of each dead peer as it is found.
#[btf_map]
static FOLLOWED: Array<u32, 1> = Array::new();

/// Socket → the connection of it that has been counted ([`TcpSock::connection_number`]):
/// the kernel may report an error more than once, and while one set takes the place
/// of another the programs of both are called.
#[btf_map]
static COUNTED: SkStorage<u64> = SkStorage::new();

/// The mark of a connection that is watched: the wish to be called when a segment is
/// sent again for want of an answer. Of all that can be wished for, nothing happens
/// less often.
const MARK: u32 = BPF_SOCK_OPS_RTO_CB_FLAG;

/// Marks a connection. Other programs may have asked for callbacks too. `target` is
/// the context of sock_ops.
#[inline(always)]
pub(crate) fn watch(target: *mut c_void) {
    let ctx = SockOpsContext::new(target.cast());
    let flags = ctx.cb_flags() | MARK;
    // A connection that is not watched is a count that is missing, no more.
    let _ = ctx.set_cb_flags(flags.cast_signed());
}

/// A socket that has been connected before connects again: so far nothing is set
/// for this connection.
#[inline(always)]
pub(crate) fn unwatch(ctx: &SockOpsContext) {
    let flags = ctx.cb_flags();
    if flags & MARK != 0 {
        let _ = ctx.set_cb_flags((flags & !MARK).cast_signed());
    }
}

/// The same for a connection that the sweep has met.
///
/// # Minimum kernel version
///
/// 6.12, for TCP_BPF_SOCK_OPS_CB_FLAGS (`sol_tcp_sockopt()` in net/core/filter.c);
/// older ones refuse it, and existing connections are not watched.
#[inline(always)]
pub(crate) fn watch_existing(sock: TcpSock) {
    const SOL_TCP: i32 = 6;
    const TCP_BPF_SOCK_OPS_CB_FLAGS: i32 = 1008;
    let callbacks = sock.callbacks();
    if callbacks & MARK != 0 {
        return;
    }
    let mut callbacks = callbacks | MARK;
    // SAFETY: the socket is the kernel's own, and the value is four bytes on the
    // stack.
    unsafe {
        bpf_setsockopt(
            sock.target(),
            SOL_TCP,
            TCP_BPF_SOCK_OPS_CB_FLAGS,
            (&raw mut callbacks).cast::<c_void>(),
            4,
        );
    }
}

/// The kernel has an error for the application of a socket, of whatever kind.
#[inline(always)]
pub(crate) fn reported(ctx: &BtfTracePointContext) {
    if let Some(sock) = TcpSock::reported(ctx)
        && sock.callbacks() & MARK != 0
    {
        ended_by_error(sock);
    }
}

#[inline(never)]
fn ended_by_error(sock: TcpSock) {
    let end = End {
        has_owner: sock.has_owner(),
        is_closed: sock.state() == BPF_TCP_CLOSE,
        errno: sock.error(),
        probes_out: sock.probes_out(),
        has_data: sock.has_data(),
        user_timeout: sock.user_timeout(),
        silent_ms: milliseconds(sock.silent_for()).cast_unsigned(),
    };
    if let Some(cause) = end.cause() {
        found(sock, &end, cause);
    }
}

#[inline(never)]
fn found(sock: TcpSock, end: &End, cause: Cause) {
    let slot = claim::slot(recent::target(sock.cgroup()), sock);
    // The kernel calls for the whole machine: what no policy claims may be another
    // agent's.
    if claim::policy(slot).is_none_or(|record| !record.policy.is_enforced()) || is_counted(sock) {
        return;
    }
    let Some(counted) = DEAD_PEERS.get_ptr(slot) else {
        return;
    };
    // SAFETY: the element lives as long as the map, and only addresses of its
    // counters are used.
    let counted = unsafe { &*counted };
    let (Some(buckets), Some(silent_ms)) = (
        counted.silence.get(cause as usize),
        counted.silent_ms.get(cause as usize),
    ) else {
        return;
    };
    if let Some(counter) = buckets.get(bucket(end.silent_ms)) {
        count(counter);
        add(silent_ms, end.silent_ms);
    }
    let mut record = DeadPeer::new(&sock.addresses());
    // SAFETY: takes no arguments and only reads the clock.
    record.at = unsafe { bpf_ktime_get_boot_ns() };
    record.cgroup = sock.cgroup().map_or(0, Cgroup::id);
    record.silent_ms = end.silent_ms;
    record.slot = slot;
    record.cause = cause as u32;
    record.errno = end.errno;
    record.probes_out = end.probes_out;
    if DEATHS.output(record, wake_up()).is_err() {
        count(&raw const counted.events_lost);
    }
}

/// Whether this connection has been counted; from now on it has. Where there is no
/// memory to remember that, it is counted again.
#[inline(always)]
fn is_counted(sock: TcpSock) -> bool {
    let number = sock.connection_number();
    history::element(&COUNTED, sock.target(), BPF_SK_STORAGE_GET_F_CREATE.into())
        .is_some_and(|counted| core::mem::replace(counted, number) == number)
}

/// Whether to wake the agent: when it wants to know at once, or when there is so
/// much to read that it would be lost.
#[inline(always)]
fn wake_up() -> u64 {
    if FOLLOWED.get(0).is_some_and(|followed| *followed != 0) {
        // Where the agent has read everything before, the kernel wakes it.
        return 0;
    }
    let ring: *const c_void = (&raw const DEATHS).cast();
    // SAFETY: the map is the kernel's own.
    let waiting = unsafe { bpf_ringbuf_query(ring.cast_mut(), u64::from(BPF_RB_AVAIL_DATA)) };
    if waiting > RING as u64 / 2 {
        u64::from(BPF_RB_FORCE_WAKEUP)
    } else {
        u64::from(BPF_RB_NO_WAKEUP)
    }
}
