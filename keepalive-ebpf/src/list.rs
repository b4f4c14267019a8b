//! List: a record of every connection, for the agent to read.

use keepalive_common::socket::SocketRecord;

use crate::kernel::{Cgroup, TcpIterator, TcpSock};

/// Appends the record of a connection to what the agent reads.
#[inline(always)]
pub(crate) fn write(iterator: &TcpIterator, sock: TcpSock) {
    let mut record = SocketRecord::new(&sock.addresses(), &sock.options(&sock.environment()));
    record.cgroup = sock.cgroup().map_or(0, Cgroup::id);
    record.inode = sock.inode();
    record.timer_ms = milliseconds(sock.armed_for());
    record.silent_ms = milliseconds(sock.silent_for());
    record.state = sock.state();
    record.uid = iterator.uid();
    record.packets_out = sock.packets_out();
    iterator.write(&record);
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
