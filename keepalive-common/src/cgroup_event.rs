//! A cgroup was made or removed, in a record that the programs on the kernel's
//! tracepoints write and the agent reads.

/// Bytes of a path that the kernel gives to its tracepoints, the final NUL
/// included; a longer path is cut off (`TRACE_CGROUP_PATH_LEN` in
/// kernel/cgroup/cgroup-internal.h).
pub const PATH_SIZE: usize = 1024;

/// What happened. The numbers stand in the records.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A cgroup was made; its directory can be looked up a moment later.
    Made = 1,
    /// A cgroup was removed.
    Removed = 2,
}

/// What stands before the path.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Header {
    /// The cgroup's id.
    pub id: u64,
    /// Number of the [`Kind`].
    pub kind: u32,
    /// Bytes of the path that follow, the final NUL included.
    pub length: u32,
}

/// A record with room for the longest path. What is handed over ends with the
/// path's NUL.
#[repr(C)]
pub struct CgroupEvent {
    /// What happened, to which cgroup.
    pub header: Header,
    /// Path from the root of the hierarchy, NUL-terminated.
    pub path: [u8; PATH_SIZE],
}

impl Kind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Made, Self::Removed]
            .into_iter()
            .find(|kind| *kind as u32 == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_records_have_no_padding() {
        assert_eq!(size_of::<Header>(), 8 + 2 * 4);
        assert_eq!(size_of::<CgroupEvent>(), size_of::<Header>() + PATH_SIZE);
    }

    #[test]
    fn a_kind_is_found_by_its_number() {
        for kind in [Kind::Made, Kind::Removed] {
            assert_eq!(Kind::from_number(kind as u32), Some(kind));
        }
        assert_eq!(Kind::from_number(0), None);
        assert_eq!(Kind::from_number(3), None);
    }
}
