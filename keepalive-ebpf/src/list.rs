//! List: what there is to say of a connection, for the agent to read.

use keepalive_common::socket::SocketRecord;

use crate::{
    history,
    kernel::{Cgroup, TcpSock},
};

/// The record of a connection.
#[inline(always)]
pub(crate) fn record(sock: TcpSock) -> SocketRecord {
    let environment = sock.environment();
    let mut record = SocketRecord::new(&sock.addresses(), &sock.options(&environment));
    record.cgroup = sock.cgroup().map_or(0, Cgroup::id);
    record.inode = sock.inode();
    record.timer_ms = milliseconds(sock.armed_for());
    record.silent_ms = milliseconds(sock.silent_for());
    record.state = sock.state();
    record.uid = sock.uid();
    record.packets_out = sock.packets_out();
    record.netns = sock.net().inode();
    record.environment = environment;
    if let Some(history) = history::of(sock.target()) {
        record.originals = history.originals;
        record.is_held = history.held_to.holds().into();
    }
    record
}

/// Jiffies in milliseconds.
#[inline(always)]
pub(crate) fn milliseconds(jiffies: i64) -> i64 {
    // The BPF machine divides unsigned numbers only (signed ones since 6.6).
    let hz = TcpSock::hz().unsigned_abs().max(1);
    let magnitude = jiffies.unsigned_abs() * 1000 / hz;
    if jiffies < 0 {
        -magnitude.cast_signed()
    } else {
        magnitude.cast_signed()
    }
}
