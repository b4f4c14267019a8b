//! Takes the [`Layout`] from the kernel's BTF.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use btf_rs::{Backend, Btf, Member, Type};
use keepalive_common::layout::{Field, Layout};
use rustix::time::{ClockId, clock_getres};

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
}

impl Hook {
    const ALL: [Self; 4] = [
        Self::Tcp,
        Self::Files,
        Self::CgroupMade,
        Self::CgroupRemoved,
    ];

    /// As libraries and the kernel's documentation call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Files => "task_file",
            Self::CgroupMade => "cgroup_mkdir",
            Self::CgroupRemoved => "cgroup_rmdir",
        }
    }

    /// The type that stands for it.
    #[must_use]
    pub fn type_name(self) -> String {
        let prefix = match self {
            Self::Tcp | Self::Files => "bpf_iter_",
            Self::CgroupMade | Self::CgroupRemoved => "btf_trace_",
        };
        format!("{prefix}{}", self.name())
    }

    /// Whether that is a function; a typedef otherwise.
    #[must_use]
    pub const fn is_function(self) -> bool {
        matches!(self, Self::Tcp | Self::Files)
    }

    fn is(self, found: &Type) -> bool {
        match found {
            Type::Func(_) => self.is_function(),
            Type::Typedef(_) => !self.is_function(),
            _ => false,
        }
    }
}

impl Kernel {
    /// The running one.
    ///
    /// # Errors
    ///
    /// When the kernel shows no BTF, or one in which a field cannot be found: an
    /// offset is never guessed.
    pub fn running() -> Result<Self> {
        let btf = types()?;
        Ok(Self {
            layout: resolve(&btf, jiffies_per_second()?)?,
            numbers: Hook::ALL.map(|hook| number(&btf, hook)),
        })
    }

    /// The number that stands for a hook.
    ///
    /// # Errors
    ///
    /// When the kernel has no such hook.
    pub fn number(&self, hook: Hook) -> Result<u32> {
        self.numbers[hook as usize]
            .with_context(|| format!("the kernel's BTF has no {}", hook.type_name()))
    }
}

fn number(btf: &Btf, hook: Hook) -> Option<u32> {
    let ids = btf.resolve_ids_by_name(&hook.type_name()).ok()?;
    ids.into_iter().find(|id| {
        btf.resolve_type_by_id(*id)
            .is_ok_and(|found| hook.is(&found))
    })
}

fn types() -> Result<Btf> {
    open(Path::new(KERNEL_BTF)).with_context(|| {
        format!(
            "reading the kernel's types from {KERNEL_BTF}: without them no program can be loaded; \
             the kernel must be built with CONFIG_DEBUG_INFO_BTF=y"
        )
    })
}

/// Maps the file where the kernel can (cheaper by far), reads it where not
/// (sysfs files can be mapped since Linux 6.16).
fn open(path: &Path) -> Result<Btf> {
    Ok(Btf::from_file_with_backend(path, Backend::Mmap)
        .or_else(|_| Btf::from_file_with_backend(path, Backend::Cache))?)
}

/// HZ, from the resolution of the clock that advances once per tick
/// (`LOW_RES_NSEC` in include/linux/hrtimer_defs.h).
///
/// # Errors
///
/// When the tick is not one of a known rate.
pub fn jiffies_per_second() -> Result<u32> {
    let tick = clock_getres(ClockId::MonotonicCoarse);
    hz_of_tick(tick.tv_sec, tick.tv_nsec).with_context(|| {
        format!("the kernel's tick of {tick:?} is not one of a known rate: timers cannot be read")
    })
}

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
pub fn resolve(btf: &Btf, hz: u32) -> Result<Layout> {
    let tcp_sock = Structure::named(btf, "tcp_sock")?;
    let cgroup = Structure::named(btf, "cgroup")?;
    let file = Structure::named(btf, "file")?;
    let inode = Structure::named(btf, "inode")?;
    let sock = "inet_conn.icsk_inet.sk";
    let sock_cgroup = tcp_sock.field(&format!("{sock}.sk_cgrp_data"))?;
    let typed_cgroup = Structure::named(btf, "sock_cgroup_data")?
        .field("cgroup")
        .is_ok();
    // The keepalive timer had the socket's general timer to itself until it got
    // one of its own.
    let timer_expires = tcp_sock
        .number("inet_conn.icsk_keepalive_timer.expires")
        .or_else(|_| tcp_sock.number(&format!("{sock}.sk_timer.expires")))?;
    let [keepopen_bit, dead_bit] = enumerators(btf, "sock_flags", ["SOCK_KEEPOPEN", "SOCK_DEAD"])?;
    let common = |name: &str| tcp_sock.number(&format!("{sock}.__sk_common.{name}"));
    // Without namespaces in the kernel there are no sysctls of theirs: policies
    // go by what they say themselves.
    let [
        sock_netns,
        sysctl_idle,
        sysctl_interval,
        sysctl_probes,
        sysctl_retries,
    ] = common("skc_net.net")
        .and_then(|sock_netns| {
            let net = Structure::named(btf, "net")?;
            Ok([
                sock_netns,
                net.number("ipv4.sysctl_tcp_keepalive_time")?,
                net.number("ipv4.sysctl_tcp_keepalive_intvl")?,
                net.number("ipv4.sysctl_tcp_keepalive_probes")?,
                net.number("ipv4.sysctl_tcp_retries2")?,
            ])
        })
        .unwrap_or([Field::NOWHERE; 5]);
    // Both came with TCP_RTO_MAX_MS.
    let [rto_max, sysctl_rto_max] = tcp_sock
        .number("inet_conn.icsk_rto_max")
        .and_then(|of_socket| {
            let net = Structure::named(btf, "net")?;
            Ok([of_socket, net.number("ipv4.sysctl_tcp_rto_max_ms")?])
        })
        .unwrap_or([Field::NOWHERE; 2]);
    Ok(Layout {
        flags: common("skc_flags")?,
        keepalive_time: tcp_sock.number("keepalive_time")?,
        keepalive_intvl: tcp_sock.number("keepalive_intvl")?,
        keepalive_probes: tcp_sock.number("keepalive_probes")?,
        user_timeout: tcp_sock.number("inet_conn.icsk_user_timeout")?,
        rto_max,
        sock_netns,
        sysctl_idle,
        sysctl_interval,
        sysctl_probes,
        sysctl_retries,
        sysctl_rto_max,
        sock_cgroup,
        cgroup_parent: cgroup.number("self.parent")?,
        css_cgroup: Structure::named(btf, "cgroup_subsys_state")?.number("cgroup")?,
        cgroup_kn: cgroup.number("kn")?,
        kernfs_id: Structure::named(btf, "kernfs_node")?.number("id")?,
        cgroup_root: cgroup.number("root")?,
        hierarchy_id: Structure::named(btf, "cgroup_root")?.number("hierarchy_id")?,
        state: common("skc_state")?,
        family: common("skc_family")?,
        local_port: common("skc_num")?,
        remote_port: common("skc_dport")?,
        local_v4: common("skc_rcv_saddr")?,
        remote_v4: common("skc_daddr")?,
        local_v6: tcp_sock.field(&format!("{sock}.__sk_common.skc_v6_rcv_saddr"))?,
        remote_v6: tcp_sock.field(&format!("{sock}.__sk_common.skc_v6_daddr"))?,
        timer_expires,
        last_ack: tcp_sock.number("rcv_tstamp")?,
        last_data: tcp_sock.number("inet_conn.icsk_ack.lrcvtime")?,
        packets_out: tcp_sock.number("packets_out")?,
        socket: tcp_sock.number(&format!("{sock}.sk_socket"))?,
        socket_inode: Structure::named(btf, "socket_alloc")?.number("vfs_inode.i_ino")?,
        file_mode: file.number("f_mode")?,
        file_inode: file.number("f_inode")?,
        inode_number: inode.number("i_ino")?,
        inode_super: inode.number("i_sb")?,
        super_magic: Structure::named(btf, "super_block")?.number("s_magic")?,
        task_process: Structure::named(btf, "task_struct")?.number("tgid")?,
        keepopen_bit,
        dead_bit,
        hz,
        typed_cgroup: u32::from(typed_cgroup),
    })
}

/// A structure of the kernel.
struct Structure<'a> {
    btf: &'a Btf,
    name: &'a str,
    definition: btf_rs::Struct,
}

impl<'a> Structure<'a> {
    fn named(btf: &'a Btf, name: &'a str) -> Result<Self> {
        let types = btf
            .resolve_types_by_name(name)
            .with_context(|| format!("struct {name} in the kernel's BTF"))?;
        let definition = types
            .into_iter()
            .find_map(|found| match found {
                Type::Struct(definition) => Some(definition),
                _ => None,
            })
            .with_context(|| format!("the kernel's BTF has no struct {name}"))?;
        Ok(Self {
            btf,
            name,
            definition,
        })
    }

    /// A field of a width that one load can read, by its dotted path.
    fn number(&self, path: &str) -> Result<Field> {
        let field = self.field(path)?;
        ensure!(
            matches!(field.width, 1 | 2 | 4 | 8),
            "{}.{path} is {} bytes wide in this kernel: it cannot be read in one load",
            self.name,
            field.width
        );
        Ok(field)
    }

    /// Any field, by its dotted path. Members of anonymous structures and
    /// unions count as members of what contains them, as in C.
    fn field(&self, path: &str) -> Result<Field> {
        let mut definition = self.definition.clone();
        let mut offset = 0;
        let mut width = 0;
        for (depth, name) in path.split('.').enumerate() {
            if depth > 0 && width == 0 {
                bail!("{}.{path}: a part of it is not a structure", self.name);
            }
            let (bits, member) = find_member(self.btf, &definition, name)?.with_context(|| {
                format!("struct {} of this kernel has no field {path}", self.name)
            })?;
            ensure!(
                bits % 8 == 0 && member.bitfield_size().unwrap_or(0) == 0,
                "{}.{path} is a bit field in this kernel",
                self.name
            );
            offset += bits / 8;
            let target = strip(self.btf, &member)?;
            width = size_of_type(&target)?;
            if let Type::Struct(inner) | Type::Union(inner) = target {
                definition = inner;
            }
        }
        Ok(Field { offset, width })
    }
}

/// A member and its offset in bits, looked for in anonymous members too.
fn find_member(btf: &Btf, within: &btf_rs::Struct, name: &str) -> Result<Option<(u32, Member)>> {
    for member in &within.members {
        let found = btf.resolve_name(member)?;
        if found == name {
            return Ok(Some((member.bit_offset(), member.clone())));
        }
        if !found.is_empty() {
            continue;
        }
        if let Type::Struct(inner) | Type::Union(inner) = strip(btf, member)?
            && let Some((bits, member_of_inner)) = find_member(btf, &inner, name)?
        {
            return Ok(Some((member.bit_offset() + bits, member_of_inner)));
        }
    }
    Ok(None)
}

/// The type of a member, behind typedefs and qualifiers.
fn strip(btf: &Btf, member: &Member) -> Result<Type> {
    let mut target = btf.resolve_chained_type(member)?;
    loop {
        target = match &target {
            Type::Typedef(outer) => btf.resolve_chained_type(outer)?,
            Type::Volatile(outer) | Type::Const(outer) | Type::Restrict(outer) => {
                btf.resolve_chained_type(outer)?
            }
            Type::TypeTag(outer) => btf.resolve_chained_type(outer)?,
            _ => return Ok(target),
        }
    }
}

/// Bytes of a type; 0 for what has no size of its own.
fn size_of_type(target: &Type) -> Result<u32> {
    let size = match target {
        Type::Int(number) => number.size(),
        Type::Enum(choice) => choice.size(),
        Type::Struct(inner) | Type::Union(inner) => inner.size(),
        // BPF runs on 64-bit kernels here.
        Type::Ptr(_) => 8,
        _ => 0,
    };
    Ok(u32::try_from(size)?)
}

/// The values of some enumerators.
fn enumerators<const COUNT: usize>(
    btf: &Btf,
    name: &str,
    wanted: [&str; COUNT],
) -> Result<[u32; COUNT]> {
    let types = btf
        .resolve_types_by_name(name)
        .with_context(|| format!("enum {name} in the kernel's BTF"))?;
    let mut found = BTreeMap::new();
    for choice in types {
        let Type::Enum(choice) = choice else { continue };
        for member in &choice.members {
            found.insert(btf.resolve_name(member)?, member.val());
        }
    }
    let mut values = [0; COUNT];
    for (value, wanted) in values.iter_mut().zip(wanted) {
        *value = *found
            .get(wanted)
            .with_context(|| format!("the kernel's BTF has no {wanted} in enum {name}"))?;
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
