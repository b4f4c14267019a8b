//! The resolver on the types of real kernels, cut down to what it looks for
//! (`cargo xtask test --vm --write-types` makes the files anew). What is
//! expected was worked out apart from it, from the whole of the types.

use keepalive_common::layout::{Field, Layout};

use super::resolve;
use crate::kernel::btf::Btf;

/// Debian's kernels, by the names that the live tests know them by.
const KERNELS: [(&str, &[u8]); 3] = [
    ("6.1", include_bytes!("../fixtures/6.1.btf")),
    ("6.12", include_bytes!("../fixtures/6.12.btf")),
    ("7", include_bytes!("../fixtures/7.btf")),
];

fn layout(types: &[u8]) -> anyhow::Result<Layout> {
    Ok(resolve(&Btf::parse(types)?, 250)?)
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn every_field_stands_where_the_kernel_has_it() {
    type Read = fn(&Layout) -> Field;
    type Expected = (&'static str, Read, [(u32, u32); KERNELS.len()]);
    let fields: [Expected; 37] = [
        ("flags", |l| l.flags, [(96, 8); 3]),
        ("state", |l| l.state, [(18, 1); 3]),
        (
            "keepalive_time",
            |l| l.keepalive_time,
            [(2152, 4), (2236, 4), (2324, 4)],
        ),
        (
            "keepalive_intvl",
            |l| l.keepalive_intvl,
            [(2156, 4), (2240, 4), (2328, 4)],
        ),
        (
            "keepalive_probes",
            |l| l.keepalive_probes,
            [(1735, 1), (1933, 1), (1989, 1)],
        ),
        (
            "user_timeout",
            |l| l.user_timeout,
            [(1332, 4), (1340, 4), (1324, 4)],
        ),
        (
            "sock_cgroup",
            |l| l.sock_cgroup,
            [(648, 8), (672, 8), (688, 8)],
        ),
        (
            "cgroup_parent",
            |l| l.cgroup_parent,
            [(192, 8), (192, 8), (184, 8)],
        ),
        ("css_cgroup", |l| l.css_cgroup, [(0, 8); 3]),
        ("cgroup_kn", |l| l.cgroup_kn, [(248, 8), (256, 8), (296, 8)]),
        ("kernfs_id", |l| l.kernfs_id, [(104, 8), (96, 8), (96, 8)]),
        (
            "cgroup_root",
            |l| l.cgroup_root,
            [(656, 8), (720, 8), (808, 8)],
        ),
        ("hierarchy_id", |l| l.hierarchy_id, [(12, 4); 3]),
        (
            "timer_expires",
            |l| l.timer_expires,
            [(1192, 8), (1200, 8), (1192, 8)],
        ),
        (
            "last_ack",
            |l| l.last_ack,
            [(1516, 4), (1524, 4), (1824, 4)],
        ),
        (
            "last_data",
            |l| l.last_data,
            [(1304, 4), (1312, 4), (1296, 4)],
        ),
        (
            "packets_out",
            |l| l.packets_out,
            [(1716, 4), (1732, 4), (1788, 4)],
        ),
        ("socket", |l| l.socket, [(624, 8), (288, 8), (288, 8)]),
        ("socket_file", |l| l.socket_file, [(16, 8); 3]),
        ("file_mode", |l| l.file_mode, [(68, 4), (12, 4), (4, 4)]),
        ("sock_net", |l| l.sock_net, [(48, 8); 3]),
        ("net_inode", |l| l.net_inode, [(144, 4), (136, 4), (280, 4)]),
        (
            "net_keepalive_time",
            |l| l.net_keepalive_time,
            [(1112, 4), (1220, 4), (1588, 4)],
        ),
        (
            "net_keepalive_intvl",
            |l| l.net_keepalive_intvl,
            [(1116, 4), (1224, 4), (1592, 4)],
        ),
        (
            "net_keepalive_probes",
            |l| l.net_keepalive_probes,
            [(1120, 1), (1228, 1), (1596, 1)],
        ),
        ("sock_uid", |l| l.sock_uid, [(560, 4), (612, 4), (536, 4)]),
        (
            "sock_protocol",
            |l| l.sock_protocol,
            [(516, 2), (574, 2), (540, 2)],
        ),
        ("socket_sock", |l| l.socket_sock, [(24, 8); 3]),
        (
            "write_seq",
            |l| l.write_seq,
            [(1852, 4), (1636, 4), (1668, 4)],
        ),
        ("snd_una", |l| l.snd_una, [(1508, 4), (1720, 4), (1776, 4)]),
        (
            "probes_out",
            |l| l.probes_out,
            [(1285, 1), (1293, 1), (1285, 1)],
        ),
        ("error", |l| l.error, [(544, 4), (284, 4), (284, 4)]),
        ("rcv_nxt", |l| l.rcv_nxt, [(1464, 4), (1712, 4), (1768, 4)]),
        (
            "cgroup_serial",
            |l| l.cgroup_serial,
            [(88, 8), (88, 8), (80, 8)],
        ),
        ("local_v6", |l| l.local_v6, [(72, 16); 3]),
        ("remote_port", |l| l.remote_port, [(12, 2); 3]),
        (
            "local_port",
            |l| l.local_port,
            [(804, 2), (806, 2), (830, 2)],
        ),
    ];
    for (index, (kernel, types)) in KERNELS.iter().enumerate() {
        let layout = layout(types).unwrap_or_else(|error| panic!("{kernel}: {error:#}"));
        for (name, read, expected) in fields {
            let Field { offset, width } = read(&layout);
            assert_eq!((offset, width), expected[index], "{kernel}: {name}");
        }
        assert_eq!((layout.keepopen_bit, layout.dead_bit), (3, 0), "{kernel}");
        assert_eq!(layout.hz, 250);
    }
}

/// The types with every name `from` replaced by one of the same length.
fn renamed(types: &[u8], from: &str) -> Vec<u8> {
    let name = format!("\0{from}\0").into_bytes();
    let at = types
        .windows(name.len())
        .position(|window| window == name)
        .unwrap_or_else(|| panic!("no name {from}"));
    let mut types = types.to_vec();
    types[at + 1] = b'?';
    types
}

#[test]
fn a_field_that_is_not_there_is_fatal_and_named() {
    for (name, said) in [
        (
            "keepalive_time",
            "tcp_sock of this kernel has no field keepalive_time",
        ),
        ("keepalive_probes", "has no field keepalive_probes"),
        ("icsk_user_timeout", "no field inet_conn.icsk_user_timeout"),
        (
            "sk_cgrp_data",
            "no field inet_conn.icsk_inet.sk.sk_cgrp_data",
        ),
        (
            "skc_flags",
            "no field inet_conn.icsk_inet.sk.__sk_common.skc_flags",
        ),
        ("kn", "struct cgroup of this kernel has no field kn"),
        (
            "hierarchy_id",
            "struct cgroup_root of this kernel has no field hierarchy_id",
        ),
        ("tcp_sock", "tcp_sock"),
        ("kernfs_node", "kernfs_node"),
        ("SOCK_KEEPOPEN", "no SOCK_KEEPOPEN in enum sock_flags"),
    ] {
        for (kernel, types) in KERNELS {
            let error = layout(&renamed(types, name)).unwrap_err();
            let error = format!("{error:#}");
            assert!(error.contains(said), "{kernel}: {error}");
        }
    }
}

#[test]
fn the_keepalive_timer_is_the_one_that_the_kernel_has() {
    let [.., (_, newest)] = KERNELS;
    let own = layout(newest).unwrap().timer_expires;
    let general = layout(&renamed(newest, "icsk_keepalive_timer")).unwrap();
    assert_ne!(own, general.timer_expires);
    let neither = renamed(&renamed(newest, "icsk_keepalive_timer"), "sk_timer");
    let error = layout(&neither).unwrap_err().to_string();
    assert!(error.contains("sk_timer.expires"), "{error}");
}
