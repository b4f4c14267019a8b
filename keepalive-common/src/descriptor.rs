//! One file descriptor of a process that is a TCP socket or a namespace, in a
//! record that a listing program writes and the agent reads.

use crate::socket::SocketRecord;

/// `s_magic` of the file system that namespaces are in (include/uapi/linux/magic.h).
pub const NSFS: u64 = 0x6E73_6673;

/// `IPPROTO_MPTCP` (include/uapi/linux/in.h).
pub const MPTCP: u64 = 262;

/// What a descriptor leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A namespace, of whatever kind.
    Namespace = 1,
    /// A connection.
    Connection = 2,
    /// A TCP socket that the kernel counts but that is no connection, such as a
    /// listener.
    OtherTcp = 3,
    /// An MPTCP socket: its connections, the subflows, have no descriptors.
    Mptcp = 4,
    /// A connection that the policy that claims it wants to change.
    Due = 5,
}

impl Kind {
    /// The kind of that number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Namespace),
            2 => Some(Self::Connection),
            3 => Some(Self::OtherTcp),
            4 => Some(Self::Mptcp),
            5 => Some(Self::Due),
            _ => None,
        }
    }
}

/// A process holds a file open.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct DescriptorRecord {
    /// Inode number of the file.
    pub inode: u64,
    /// Process id, in the first pid namespace.
    pub process: u32,
    /// Number of the descriptor in that process.
    pub descriptor: u32,
    /// Inode number of the network namespace that a socket is in; 0 for what is
    /// no socket.
    pub netns: u32,
    /// Number of the [`Kind`].
    pub kind: u32,
}

/// The same, and what there is to say of a connection; nothing of anything else.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct HeldRecord {
    /// Who holds it.
    pub descriptor: DescriptorRecord,
    /// The connection; zero for anything else.
    pub socket: SocketRecord,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_records_have_no_padding() {
        assert_eq!(size_of::<DescriptorRecord>(), 8 + 4 * 4);
        assert_eq!(
            size_of::<HeldRecord>(),
            size_of::<DescriptorRecord>() + size_of::<SocketRecord>()
        );
    }

    #[test]
    fn kinds_survive_the_record() {
        let kinds: Vec<_> = (0..10).filter_map(Kind::from_number).collect();
        assert_eq!(
            kinds,
            [
                Kind::Namespace,
                Kind::Connection,
                Kind::OtherTcp,
                Kind::Mptcp,
                Kind::Due
            ]
        );
        assert!(
            kinds
                .iter()
                .all(|kind| Kind::from_number(*kind as u32) == Some(*kind))
        );
    }
}
