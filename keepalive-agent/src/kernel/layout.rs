//! Takes the [`Layout`] from the kernel's BTF.

use std::{io, path::Path};

use keepalive_common::layout::{Field, Layout};
use rustix::time::{ClockId, Timespec, clock_getres};
use thiserror::Error;

use super::{
    btf::{Btf, BtfError, Kind},
    mapped_file::MappedFile,
};

/// Where a kernel built with `CONFIG_DEBUG_INFO_BTF` shows its types
/// (since Linux 5.4).
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// What there is to know of the running kernel before programs can be loaded.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Where it keeps its fields.
    pub layout: Layout,
    numbers: [Option<u32>; Hook::ALL.len()],
}

/// A place that the kernel loads programs for, which it knows by the number of a
/// type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// The iterator over TCP sockets.
    Tcp,
    /// The iterator over open files.
    Files,
    /// The tracepoint for new cgroups.
    CgroupMade,
    /// The tracepoint for cgroups that are removed.
    CgroupRemoved,
    /// The tracepoint for errors that the kernel has for the application of a socket.
    SocketError,
}

impl Hook {
    const ALL: [Self; 5] = [
        Self::Tcp,
        Self::Files,
        Self::CgroupMade,
        Self::CgroupRemoved,
        Self::SocketError,
    ];

    /// As libraries and the kernel's documentation call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Files => "task_file",
            Self::CgroupMade => "cgroup_mkdir",
            Self::CgroupRemoved => "cgroup_rmdir",
            Self::SocketError => "inet_sk_error_report",
        }
    }

    /// The type that stands for it.
    fn type_name(self) -> String {
        let prefix = match self {
            Self::Tcp | Self::Files => "bpf_iter_",
            Self::CgroupMade | Self::CgroupRemoved | Self::SocketError => "btf_trace_",
        };
        format!("{prefix}{}", self.name())
    }

    const fn kind(self) -> Kind {
        match self {
            Self::Tcp | Self::Files => Kind::Function,
            Self::CgroupMade | Self::CgroupRemoved | Self::SocketError => Kind::Typedef,
        }
    }
}

/// Why a kernel's types do not do.
#[derive(Debug, Error)]
pub enum Error {
    /// They cannot be read.
    #[error("{WITHOUT_TYPES}")]
    Reading(#[source] io::Error),
    /// They are not in the form that is known.
    #[error("{WITHOUT_TYPES}")]
    Btf(#[from] BtfError),
    /// Timers cannot be read.
    #[error(transparent)]
    Tick(#[from] UnknownTick),
    /// Something is not among them.
    #[error("the kernel's BTF has no {0}")]
    Lacks(String),
    /// A structure has no such field.
    #[error("struct {structure} of this kernel has no field {field}")]
    NoField {
        /// The structure.
        structure: String,
        /// The field, by its dotted path.
        field: String,
    },
    /// A field is there and cannot be read as it is.
    #[error("{structure}.{field} {why} in this kernel")]
    Field {
        /// The structure.
        structure: String,
        /// The field, by its dotted path.
        field: String,
        /// What is odd about it.
        why: String,
    },
}

type Result<T> = std::result::Result<T, Error>;

const WITHOUT_TYPES: &str = "reading the kernel's types from /sys/kernel/btf/vmlinux: without them \
                             no program can be loaded; the kernel must be built with \
                             CONFIG_DEBUG_INFO_BTF=y";

impl Kernel {
    /// The running one.
    ///
    /// # Errors
    ///
    /// When the kernel shows no BTF, or one in which a field cannot be found: an
    /// offset is never guessed.
    pub fn running() -> Result<Self> {
        let types = MappedFile::open(Path::new(KERNEL_BTF)).map_err(Error::Reading)?;
        let btf = Btf::parse(&types)?;
        let mut numbers = [None; Hook::ALL.len()];
        for (number, hook) in numbers.iter_mut().zip(Hook::ALL) {
            *number = btf.find(hook.kind(), &hook.type_name())?;
        }
        Ok(Self {
            layout: resolve(&btf, jiffies_per_second()?)?,
            numbers,
        })
    }

    /// The number that stands for a hook.
    ///
    /// # Errors
    ///
    /// When the kernel has no such hook.
    pub fn number(&self, hook: Hook) -> Result<u32> {
        self.numbers[hook as usize].ok_or_else(|| Error::Lacks(hook.type_name()))
    }
}

/// HZ, from the resolution of the clock that advances once per tick
/// (`LOW_RES_NSEC` in include/linux/hrtimer_defs.h).
///
/// # Errors
///
/// When the tick is not one of a known rate.
pub fn jiffies_per_second() -> std::result::Result<u32, UnknownTick> {
    let tick = clock_getres(ClockId::MonotonicCoarse);
    hz_of_tick(tick.tv_sec, tick.tv_nsec).ok_or(UnknownTick(tick))
}

/// The kernel counts time in steps of which no kernel is known.
#[derive(Clone, Copy, Debug, Error)]
#[error("the kernel's tick of {0:?} is not one of a known rate: timers cannot be read")]
pub struct UnknownTick(Timespec);

fn hz_of_tick(seconds: i64, nanoseconds: i64) -> Option<u32> {
    if seconds != 0 || nanoseconds <= 0 {
        return None;
    }
    let hz = u32::try_from((1_000_000_000 + nanoseconds / 2) / nanoseconds).ok()?;
    (24..=2000).contains(&hz).then_some(hz)
}

/// Finds every field in the given types.
///
/// # Errors
///
/// Names the structure and field that cannot be found.
pub fn resolve(btf: &Btf<'_>, hz: u32) -> Result<Layout> {
    let tcp_sock = Structure::named(btf, "tcp_sock")?;
    let cgroup = Structure::named(btf, "cgroup")?;
    let file = Structure::named(btf, "file")?;
    let inode = Structure::named(btf, "inode")?;
    let net = Structure::named(btf, "net")?;
    let socket = Structure::named(btf, "socket")?;
    let sock = "inet_conn.icsk_inet.sk";
    // The keepalive timer had the socket's general timer to itself until it got
    // one of its own.
    let timer_expires = tcp_sock
        .number("inet_conn.icsk_keepalive_timer.expires")
        .or_else(|_| tcp_sock.number(&format!("{sock}.sk_timer.expires")))?;
    let [keepopen_bit, dead_bit] = enumerators(btf, "sock_flags", ["SOCK_KEEPOPEN", "SOCK_DEAD"])?;
    let common = |name: &str| tcp_sock.number(&format!("{sock}.__sk_common.{name}"));
    // Both came with TCP_RTO_MAX_MS.
    let [rto_max, net_rto_max] = tcp_sock
        .number("inet_conn.icsk_rto_max")
        .and_then(|of_socket| Ok([of_socket, net.number("ipv4.sysctl_tcp_rto_max_ms")?]))
        .unwrap_or([Field::NOWHERE; 2]);
    Ok(Layout {
        flags: common("skc_flags")?,
        keepalive_time: tcp_sock.number("keepalive_time")?,
        keepalive_intvl: tcp_sock.number("keepalive_intvl")?,
        keepalive_probes: tcp_sock.number("keepalive_probes")?,
        user_timeout: tcp_sock.number("inet_conn.icsk_user_timeout")?,
        rto_max,
        // A pointer with a type since Linux 5.15 (`sock_cgroup_data` in
        // include/linux/cgroup-defs.h).
        sock_cgroup: tcp_sock.number(&format!("{sock}.sk_cgrp_data.cgroup"))?,
        cgroup_serial: cgroup.number("self.serial_nr")?,
        cgroup_parent: cgroup.number("self.parent")?,
        css_cgroup: Structure::named(btf, "cgroup_subsys_state")?.number("cgroup")?,
        cgroup_kn: cgroup.number("kn")?,
        kernfs_id: Structure::named(btf, "kernfs_node")?.number("id")?,
        cgroup_root: cgroup.number("root")?,
        hierarchy_id: Structure::named(btf, "cgroup_root")?.number("hierarchy_id")?,
        sock_net: common("skc_net.net")?,
        net_inode: net.number("ns.inum")?,
        net_keepalive_time: net.number("ipv4.sysctl_tcp_keepalive_time")?,
        net_keepalive_intvl: net.number("ipv4.sysctl_tcp_keepalive_intvl")?,
        net_keepalive_probes: net.number("ipv4.sysctl_tcp_keepalive_probes")?,
        net_retries: net.number("ipv4.sysctl_tcp_retries2")?,
        net_rto_max,
        sock_uid: tcp_sock.number(&format!("{sock}.sk_uid.val"))?,
        sock_protocol: Structure::named(btf, "sock")?.number("sk_protocol")?,
        state: common("skc_state")?,
        family: common("skc_family")?,
        local_port: tcp_sock.number("inet_conn.icsk_inet.inet_sport")?,
        remote_port: common("skc_dport")?,
        local_v4: common("skc_rcv_saddr")?,
        remote_v4: common("skc_daddr")?,
        local_v6: tcp_sock.field(&format!("{sock}.__sk_common.skc_v6_rcv_saddr"))?,
        remote_v6: tcp_sock.field(&format!("{sock}.__sk_common.skc_v6_daddr"))?,
        timer_expires,
        last_ack: tcp_sock.number("rcv_tstamp")?,
        last_data: tcp_sock.number("inet_conn.icsk_ack.lrcvtime")?,
        packets_out: tcp_sock.number("packets_out")?,
        write_seq: tcp_sock.number("write_seq")?,
        snd_una: tcp_sock.number("snd_una")?,
        probes_out: tcp_sock.number("inet_conn.icsk_probes_out")?,
        error: tcp_sock.number(&format!("{sock}.sk_err"))?,
        rcv_nxt: tcp_sock.number("rcv_nxt")?,
        socket: tcp_sock.number(&format!("{sock}.sk_socket"))?,
        socket_file: socket.number("file")?,
        socket_sock: socket.number("sk")?,
        file_mode: file.number("f_mode")?,
        file_inode: file.number("f_inode")?,
        inode_number: inode.number("i_ino")?,
        inode_super: inode.number("i_sb")?,
        super_magic: Structure::named(btf, "super_block")?.number("s_magic")?,
        task_process: Structure::named(btf, "task_struct")?.number("tgid")?,
        keepopen_bit,
        dead_bit,
        hz,
    })
}

/// A structure of the kernel.
struct Structure<'a> {
    btf: &'a Btf<'a>,
    name: &'a str,
    number: u32,
}

impl<'a> Structure<'a> {
    fn named(btf: &'a Btf<'a>, name: &'a str) -> Result<Self> {
        let number = btf
            .find(Kind::Struct, name)?
            .ok_or_else(|| Error::Lacks(format!("struct {name}")))?;
        Ok(Self { btf, name, number })
    }

    /// A field of a width that one load can read, by its dotted path.
    fn number(&self, path: &str) -> Result<Field> {
        let field = self.field(path)?;
        match field.width {
            1 | 2 | 4 | 8 => Ok(field),
            width => Err(self.odd(
                path,
                format!("is {width} bytes wide, so that no load can read it,"),
            )),
        }
    }

    fn odd(&self, path: &str, why: impl Into<String>) -> Error {
        Error::Field {
            structure: self.name.to_owned(),
            field: path.to_owned(),
            why: why.into(),
        }
    }

    /// Any field, by its dotted path. Members of anonymous structures and
    /// unions count as members of what contains them, as in C.
    fn field(&self, path: &str) -> Result<Field> {
        let mut within = Some(self.number);
        let mut field = Field {
            offset: 0,
            width: 0,
        };
        for name in path.split('.') {
            let Some(structure) = within else {
                return Err(self.odd(path, "has a part that is no structure"));
            };
            let member = self.btf.member(structure, name)?;
            let member = member.ok_or_else(|| Error::NoField {
                structure: self.name.to_owned(),
                field: path.to_owned(),
            })?;
            if member.is_bit_field {
                return Err(self.odd(path, "is a bit field"));
            }
            let content = self.btf.content(&member)?;
            let content = content.ok_or_else(|| self.odd(path, "has no type"))?;
            field = Field {
                offset: field.offset.saturating_add(member.bit_offset / 8),
                width: content.size,
            };
            within = content.has_members.then_some(content.number);
        }
        Ok(field)
    }
}

/// The values of some enumerators.
fn enumerators<const COUNT: usize>(
    btf: &Btf<'_>,
    name: &str,
    wanted: [&str; COUNT],
) -> Result<[u32; COUNT]> {
    let number = btf
        .find(Kind::Enum, name)?
        .ok_or_else(|| Error::Lacks(format!("enum {name}")))?;
    let mut values = [0; COUNT];
    for (value, wanted) in values.iter_mut().zip(wanted) {
        *value = btf
            .enumerator(number, wanted)?
            .ok_or_else(|| Error::Lacks(format!("{wanted} in enum {name}")))?;
    }
    Ok(values)
}

#[cfg(test)]
mod on_kernels;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hz_follows_from_the_tick() {
        for (nanoseconds, hz) in [
            (10_000_000, Some(100)),
            (4_000_000, Some(250)),
            (3_333_333, Some(300)),
            (1_000_000, Some(1000)),
            (1, None),
            (0, None),
        ] {
            assert_eq!(hz_of_tick(0, nanoseconds), hz, "{nanoseconds}");
        }
        assert_eq!(hz_of_tick(1, 0), None);
    }
}
