//! Files: records of the descriptors that are TCP sockets or namespaces, for the
//! agent to read. One pass covers all processes, whatever namespace they are in.

use keepalive_common::{
    descriptor::{HeldRecord, Kind},
    socket::{CLOSE, SocketRecord},
};

use crate::{
    kernel::{FileIterator, OpenFile, OpenSocket, TcpSock},
    list::record,
    sweep,
};

/// What a file is, if that is of interest.
enum File {
    Connection(TcpSock),
    /// Something else, and the network namespace that a socket is in.
    Other(Kind, u32),
}

#[inline(always)]
fn look(file: OpenFile) -> Option<File> {
    Some(match file.socket() {
        Some(OpenSocket::Tcp(sock)) if sock.is_connection() => File::Connection(sock),
        Some(OpenSocket::Tcp(sock)) if sock.state() != CLOSE => {
            File::Other(Kind::OtherTcp, sock.net().inode())
        }
        Some(OpenSocket::Mptcp(net)) => File::Other(Kind::Mptcp, net.inode()),
        None if file.is_namespace() => File::Other(Kind::Namespace, 0),
        _ => return None,
    })
}

/// For the listing: with all there is to say of a connection.
#[inline(always)]
pub(crate) fn list(iterator: &FileIterator) {
    let Some(file) = iterator.file() else { return };
    match look(file) {
        Some(File::Connection(sock)) => iterator.write(&HeldRecord {
            descriptor: file.record(Kind::Connection, sock.net().inode()),
            socket: record(sock),
        }),
        Some(File::Other(kind, netns)) => iterator.write(&HeldRecord {
            descriptor: file.record(kind, netns),
            socket: SocketRecord::NOTHING,
        }),
        None => {}
    }
}

/// For the sweep: with whether a connection is to be changed.
#[inline(always)]
pub(crate) fn survey(iterator: &FileIterator) {
    let Some(file) = iterator.file() else { return };
    let record = match look(file) {
        Some(File::Connection(sock)) => {
            let kind = if sweep::is_due(sock) {
                Kind::Due
            } else {
                Kind::Connection
            };
            file.record(kind, sock.net().inode())
        }
        Some(File::Other(kind, netns)) => file.record(kind, netns),
        None => return,
    };
    iterator.write(&record);
}
