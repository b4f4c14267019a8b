//! Layout: where the running kernel keeps the fields that the plan reads.
//!
//! Offsets differ between kernels. The agent takes them from the kernel's own
//! BTF and hands them to the BPF programs as a read-only global, so that the
//! verifier sees constants and checks every load against the field's type.

/// Where a field stands in its structure.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Field {
    /// Offset in bytes.
    pub offset: u32,
    /// Width in bytes: 1, 2, 4 or 8.
    pub width: u32,
}

/// All fields that are read, and what is needed to understand them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// `tcp_sock` → `sock_common.skc_flags`.
    pub flags: Field,
    /// `tcp_sock.keepalive_time`, in jiffies; 0 is unset.
    pub keepalive_time: Field,
    /// `tcp_sock.keepalive_intvl`, in jiffies; 0 is unset.
    pub keepalive_intvl: Field,
    /// `tcp_sock.keepalive_probes`; 0 is unset.
    pub keepalive_probes: Field,
    /// `tcp_sock` → `inet_connection_sock.icsk_user_timeout`, in milliseconds;
    /// 0 is unset.
    pub user_timeout: Field,
    /// `tcp_sock` → `sock.sk_cgrp_data`, whose first word is the cgroup.
    pub sock_cgroup: Field,
    /// `cgroup` → `cgroup.self.parent`.
    pub cgroup_parent: Field,
    /// `cgroup_subsys_state.cgroup`.
    pub css_cgroup: Field,
    /// `cgroup.kn`.
    pub cgroup_kn: Field,
    /// `kernfs_node.id`, the cgroup's id and inode number.
    pub kernfs_id: Field,
    /// Bit number of `SOCK_KEEPOPEN` in the flags: keepalive is on.
    pub keepopen_bit: u32,
    /// Jiffies per second.
    pub hz: u32,
    /// 1 where `sk_cgrp_data` holds a typed pointer that programs may follow;
    /// 0 where it is a bare number (before Linux 5.15 or so) whose lowest bit says that it is
    /// not a pointer at all.
    pub typed_cgroup: u32,
    /// Explicit end of the record, always 0.
    pub reserved: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_has_no_padding() {
        assert_eq!(size_of::<Layout>(), 10 * size_of::<Field>() + 4 * 4);
    }
}
