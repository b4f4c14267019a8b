//! Dead peers: connections that a policy has set something on, and that end
//! because the other end does not answer. Counted by policy, cause and silence,
//! and told of in a record each.
//!
//! The kernel calls for every error that it has for an application, which is rare,
//! instead of for every change of a connection's state, which would cost all of
//! them. Only then it is found out whether a policy had a part in the connection.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_SK_STORAGE_GET_F_CREATE,
        BPF_TCP_CLOSE,
    },
    btf_maps::{Array, PerCpuArray, RingBuf, SkStorage},
    helpers::generated::{bpf_ktime_get_boot_ns, bpf_ringbuf_query},
    macros::btf_map,
    programs::BtfTracePointContext,
};
use keepalive_common::{
    dead_peer::{Cause, DeadPeer, DeadPeers, End, bucket},
    policy::Policy,
    slot::{FIRST, UNCLAIMED},
};

use crate::{
    claim,
    decide::{Subject, recognise},
    enforce::{add, count},
    history,
    kernel::{Cgroup, TcpSock},
    list::milliseconds,
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

/// A connection whose peer is dead. The kernel does not call a tracing program on a
/// CPU on which that runs already (`__bpf_trace_run()` in kernel/trace/bpf_trace.c).
#[btf_map]
static DEAD: PerCpuArray<Subject, 1> = PerCpuArray::new();

/// The kernel has an error for the application of a socket, of whatever kind.
#[inline(always)]
pub(crate) fn reported(ctx: &BtfTracePointContext) {
    if let Some(sock) = TcpSock::reported(ctx)
        && sock.was_established()
    {
        if sock.is_disconnected() {
            disconnected(sock);
        } else {
            ended_by_error(sock);
        }
    }
}

/// The application may connect the socket again, under other policies than those of
/// now: what is set on it is kept as what it is, of the application or not.
#[inline(never)]
fn disconnected(sock: TcpSock) {
    if part(sock) < FIRST {
        return;
    }
    let Some(subject) = DEAD.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: as in `has_part`, which has found out what is here.
    let subject = unsafe { &mut *subject };
    history::remember(sock.target(), &subject.application, &subject.has);
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
    if let Some(cause) = end.cause()
        && let slot = part(sock)
        && slot >= FIRST
    {
        found(sock, &end, cause, slot);
    }
}

/// The slot of the policy that a connection belongs to, if it is enforced and had a
/// part in it: something that is set is not from the application.
///
/// Out of line, as what it calls: there is little stack.
#[inline(never)]
fn part(sock: TcpSock) -> u32 {
    let claim = claim::nearest(sock.cgroup(), 0);
    let slot = claim::slot(claim.now, sock);
    // The kernel calls for the whole machine: what no policy claims may be another
    // agent's.
    let Some(record) = claim::policy(slot).filter(|record| record.policy.is_enforced()) else {
        return UNCLAIMED;
    };
    let before = || claim::policy_before(claim, claim::slot_before(claim, slot, sock));
    let has_part = has_part(sock, &record.policy)
        || before().is_some_and(|policy| self::has_part(sock, policy));
    if has_part { slot } else { UNCLAIMED }
}

#[inline(never)]
fn found(sock: TcpSock, end: &End, cause: Cause, slot: u32) {
    if is_counted(sock) {
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

/// Whether something on the connection is from a policy, and not from the application.
#[inline(never)]
fn has_part(sock: TcpSock, policy: &Policy) -> bool {
    let Some(subject) = DEAD.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: an element lives as long as the map, and nobody else uses that of this
    // CPU.
    let subject = unsafe { &mut *subject };
    subject.environment = sock.environment();
    subject.has = sock.options(&subject.environment);
    subject.originals = history::originals(sock.target());
    recognise(policy, subject);
    subject.application != subject.has
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
