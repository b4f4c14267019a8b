//! List: what there is to say of a connection, for the agent to read.

use keepalive_common::socket::SocketRecord;

use crate::kernel::{Cgroup, TcpSock};

/// The record of a connection.
#[inline(always)]
pub(crate) fn record(sock: TcpSock) -> SocketRecord {
    let mut record = SocketRecord::new(&sock.addresses(), &sock.options());
    record.cgroup = sock.cgroup().map_or(0, Cgroup::id);
    record.inode = sock.inode();
    record.timer_ms = milliseconds(sock.armed_for());
    record.silent_ms = milliseconds(sock.silent_for());
    record.state = sock.state();
    record.uid = sock.uid();
    record.packets_out = sock.packets_out();
    let net = sock.net();
    record.netns = net.inode();
    record.sysctl_idle = net.idle();
    record.sysctl_interval = net.interval();
    record.sysctl_probes = net.probes();
    record
}

/// Jiffies in milliseconds.
#[inline(always)]
fn milliseconds(jiffies: i64) -> i64 {
    // The BPF machine divides unsigned numbers only (signed ones since 6.6).
    let hz = TcpSock::hz().unsigned_abs().max(1);
    let magnitude = jiffies.unsigned_abs() * 1000 / hz;
    if jiffies < 0 {
        -magnitude.cast_signed()
    } else {
        magnitude.cast_signed()
    }
}
