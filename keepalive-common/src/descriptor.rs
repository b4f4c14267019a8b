//! One file descriptor of a process that is a socket or a namespace, in a record
//! that the listing program writes and the agent reads.

/// `s_magic` of the file system that sockets are in.
pub const SOCKFS: u64 = 0x534F_434B;
/// `s_magic` of the file system that namespaces are in.
pub const NSFS: u64 = 0x6E73_6673;

/// A process holds a file open.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct DescriptorRecord {
    /// Inode number of the file.
    pub inode: u64,
    /// Magic number of its file system: [`SOCKFS`] or [`NSFS`].
    pub magic: u64,
    /// Process id, in the first pid namespace.
    pub process: u32,
    /// Number of the descriptor in that process.
    pub descriptor: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_has_no_padding() {
        assert_eq!(size_of::<DescriptorRecord>(), 2 * 8 + 2 * 4);
    }
}
