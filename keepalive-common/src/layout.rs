//! Layout: where the running kernel keeps the fields that the plan reads.
//!
//! Offsets differ between kernels. The agent takes them from the kernel's own
//! BTF and hands them to the BPF programs as a read-only global, so that the
//! verifier sees constants and checks every load against the field's type.

/// Where a field stands in its structure.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Offset in bytes.
    pub offset: u32,
    /// Width in bytes: 1, 2, 4 or 8.
    pub width: u32,
}

impl Field {
    /// One that the kernel does not have.
    pub const NOWHERE: Self = Self {
        offset: 0,
        width: 0,
    };
}

/// All fields that are read, and what is needed to understand them. What is needed
/// for every new connection stands together, in two lines of the processor's cache.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Bit number of `SOCK_KEEPOPEN` in the flags: keepalive is on.
    pub keepopen_bit: u32,
    /// Jiffies per second.
    pub hz: u32,
    /// `tcp_sock` → `sock.sk_cgrp_data.cgroup`.
    pub sock_cgroup: Field,
    /// `cgroup` → `cgroup.self.serial_nr`, a number that no other cgroup has or
    /// will have.
    pub cgroup_serial: Field,
    /// `tcp_sock` → `sock_common.skc_net.net`, the network namespace.
    pub sock_net: Field,
    /// `net` → `netns_ipv4.sysctl_tcp_keepalive_time`, in jiffies.
    pub net_keepalive_time: Field,
    /// `net` → `netns_ipv4.sysctl_tcp_keepalive_intvl`, in jiffies.
    pub net_keepalive_intvl: Field,
    /// `net` → `netns_ipv4.sysctl_tcp_keepalive_probes`.
    pub net_keepalive_probes: Field,
    /// `tcp_sock` → `inet_connection_sock.icsk_rto_max`, in jiffies; without
    /// width where the kernel knows no TCP_RTO_MAX_MS (before Linux 6.15).
    pub rto_max: Field,
    /// `cgroup.kn`.
    pub cgroup_kn: Field,
    /// `kernfs_node.id`, the cgroup's id and inode number.
    pub kernfs_id: Field,
    /// `cgroup` → `cgroup.self.parent`.
    pub cgroup_parent: Field,
    /// `cgroup_subsys_state.cgroup`.
    pub css_cgroup: Field,
    /// `cgroup.root`, the hierarchy.
    pub cgroup_root: Field,
    /// `cgroup_root.hierarchy_id`; 0 is the v2 hierarchy.
    pub hierarchy_id: Field,
    /// `net.ns.inum`, the inode number that /proc/PID/ns/net shows.
    pub net_inode: Field,
    /// `net` → `netns_ipv4.sysctl_tcp_retries2`.
    pub net_retries: Field,
    /// `net` → `netns_ipv4.sysctl_tcp_rto_max_ms`; without width as
    /// [`Self::rto_max`].
    pub net_rto_max: Field,
    /// `tcp_sock` → `sock.sk_uid`.
    pub sock_uid: Field,
    /// `sock.sk_protocol`.
    pub sock_protocol: Field,
    /// `tcp_sock` → `sock_common.skc_state`.
    pub state: Field,
    /// `tcp_sock` → `sock_common.skc_family`.
    pub family: Field,
    /// `tcp_sock` → `inet_sock.inet_sport`, the local port, big-endian: unlike
    /// `sock_common.skc_num` it stays when the connection is over.
    pub local_port: Field,
    /// `tcp_sock` → `sock_common.skc_dport`, the remote port, big-endian.
    pub remote_port: Field,
    /// `tcp_sock` → `sock_common.skc_rcv_saddr`.
    pub local_v4: Field,
    /// `tcp_sock` → `sock_common.skc_daddr`.
    pub remote_v4: Field,
    /// `tcp_sock` → `sock_common.skc_v6_rcv_saddr`.
    pub local_v6: Field,
    /// `tcp_sock` → `sock_common.skc_v6_daddr`.
    pub remote_v6: Field,
    /// `tcp_sock` → when the keepalive timer fires, in jiffies.
    pub timer_expires: Field,
    /// `tcp_sock.rcv_tstamp`: when the last acknowledgement came, in jiffies.
    pub last_ack: Field,
    /// `tcp_sock` → `inet_connection_sock.icsk_ack.lrcvtime`: when the last data
    /// came, in jiffies.
    pub last_data: Field,
    /// `tcp_sock.packets_out`: segments that are not acknowledged yet.
    pub packets_out: Field,
    /// `tcp_sock.write_seq`: the number behind the last byte that the application
    /// has written.
    pub write_seq: Field,
    /// `tcp_sock.snd_una`: the first byte that is not acknowledged yet.
    pub snd_una: Field,
    /// `tcp_sock` → `inet_connection_sock.icsk_probes_out`: probes that are not
    /// answered yet.
    pub probes_out: Field,
    /// `tcp_sock` → `sock.sk_err`: what the application is told next.
    pub error: Field,
    /// `tcp_sock.rcv_nxt`: the number behind the last byte that came.
    pub rcv_nxt: Field,
    /// `tcp_sock` → `sock.sk_socket`, null for a socket that no process holds.
    pub socket: Field,
    /// `socket.file`, null for a socket that has no descriptor.
    pub socket_file: Field,
    /// `socket.sk`, null while it is closed.
    pub socket_sock: Field,
    /// `file.f_mode`: what can be done with it.
    pub file_mode: Field,
    /// `file.f_inode`.
    pub file_inode: Field,
    /// `inode.i_ino`.
    pub inode_number: Field,
    /// `inode.i_sb`.
    pub inode_super: Field,
    /// `super_block.s_magic`.
    pub super_magic: Field,
    /// `task_struct.tgid`, the process id.
    pub task_process: Field,
    /// Bit number of `SOCK_DEAD` in the flags: no process holds the socket.
    pub dead_bit: u32,
}

impl Layout {
    /// Before the agent has looked: every field at offset 0 and without width.
    pub const NOWHERE: Self = {
        const NOWHERE: Field = Field::NOWHERE;
        Self {
            flags: NOWHERE,
            keepalive_time: NOWHERE,
            keepalive_intvl: NOWHERE,
            keepalive_probes: NOWHERE,
            user_timeout: NOWHERE,
            rto_max: NOWHERE,
            sock_cgroup: NOWHERE,
            cgroup_parent: NOWHERE,
            css_cgroup: NOWHERE,
            cgroup_serial: NOWHERE,
            cgroup_kn: NOWHERE,
            kernfs_id: NOWHERE,
            cgroup_root: NOWHERE,
            hierarchy_id: NOWHERE,
            sock_net: NOWHERE,
            net_inode: NOWHERE,
            net_keepalive_time: NOWHERE,
            net_keepalive_intvl: NOWHERE,
            net_keepalive_probes: NOWHERE,
            net_retries: NOWHERE,
            net_rto_max: NOWHERE,
            sock_uid: NOWHERE,
            sock_protocol: NOWHERE,
            state: NOWHERE,
            family: NOWHERE,
            local_port: NOWHERE,
            remote_port: NOWHERE,
            local_v4: NOWHERE,
            remote_v4: NOWHERE,
            local_v6: NOWHERE,
            remote_v6: NOWHERE,
            timer_expires: NOWHERE,
            last_ack: NOWHERE,
            last_data: NOWHERE,
            packets_out: NOWHERE,
            write_seq: NOWHERE,
            snd_una: NOWHERE,
            probes_out: NOWHERE,
            error: NOWHERE,
            rcv_nxt: NOWHERE,
            socket: NOWHERE,
            socket_file: NOWHERE,
            socket_sock: NOWHERE,
            file_mode: NOWHERE,
            file_inode: NOWHERE,
            inode_number: NOWHERE,
            inode_super: NOWHERE,
            super_magic: NOWHERE,
            task_process: NOWHERE,
            keepopen_bit: 0,
            dead_bit: 0,
            hz: 0,
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_has_no_padding() {
        assert_eq!(size_of::<Layout>(), 49 * size_of::<Field>() + 3 * 4);
    }
}
