//! Files: records of the descriptors that are TCP sockets or namespaces, for the
//! agent to read. One pass covers all processes, whatever namespace they are in.

use keepalive_common::{
    descriptor::{HeldRecord, Kind},
    socket::{CLOSE, SocketRecord},
};

use crate::{
    kernel::{FileIterator, OpenSocket},
    list,
};

/// Appends the record of a file that is a namespace or a TCP socket of interest.
#[inline(always)]
pub(crate) fn write(iterator: &FileIterator) {
    let Some(file) = iterator.file() else { return };
    let (kind, netns) = match file.socket() {
        Some(OpenSocket::Tcp(sock)) if sock.is_connection() => {
            let record = HeldRecord {
                descriptor: file.record(Kind::Connection, sock.net().inode()),
                socket: list::record(sock),
            };
            iterator.write(&record);
            return;
        }
        Some(OpenSocket::Tcp(sock)) if sock.state() != CLOSE => {
            (Kind::OtherTcp, sock.net().inode())
        }
        Some(OpenSocket::Mptcp(net)) => (Kind::Mptcp, net.inode()),
        None if file.is_namespace() => (Kind::Namespace, 0),
        _ => return,
    };
    iterator.write(&HeldRecord {
        descriptor: file.record(kind, netns),
        socket: SocketRecord::NOTHING,
    });
}

/// Appends the record of a file that is a namespace.
#[inline(always)]
pub(crate) fn write_namespace(iterator: &FileIterator) {
    if let Some(file) = iterator.file()
        && file.is_namespace()
    {
        iterator.write(&file.record(Kind::Namespace, 0));
    }
}
