//! Reads kernel structures, at the offsets that the agent found in the kernel's
//! BTF. All unsafe reads of kernel memory are in this file.
//!
//! Two kinds of pointers: one whose type the verifier knows is followed by a
//! plain load, which it checks against the type's BTF and the kernel guards
//! against faults; a bare number is followed with `bpf_probe_read_kernel`.
#![expect(
    clippy::cast_ptr_alignment,
    reason = "the kernel aligns its fields to their own width"
)]

use core::{ffi::c_void, mem::MaybeUninit, ptr};

use aya_ebpf::{
    Global,
    bindings::{seq_file, tcp_sock},
    helpers::generated::{
        bpf_jiffies64, bpf_probe_read_kernel, bpf_probe_read_kernel_str, bpf_seq_write,
        bpf_skc_to_tcp_sock,
    },
    programs::{BtfTracePointContext, SockOpsContext},
};
use keepalive_common::{
    descriptor::DescriptorRecord,
    environment::Environment,
    layout::Layout,
    plan::Options,
    slot::Ends,
    socket::{AF_INET, Addresses, is_held_open},
};

/// Set by the agent before the program is loaded, frozen since.
#[unsafe(no_mangle)]
static LAYOUT: Global<Layout> = Global::new(Layout::NOWHERE);

/// One member of [`LAYOUT`], read by itself: the verifier must see each offset
/// as a constant, which a copy of the whole record through the stack loses.
macro_rules! layout {
    ($($member:ident).+) => {
        // SAFETY: points into a global that lives as long as the program; the
        // read is volatile because the agent changes the value after compilation.
        unsafe { (&raw const (*(&raw const LAYOUT).cast::<Layout>()).$($member).+).read_volatile() }
    };
}

/// An unsigned field of a width that only the running kernel knows.
macro_rules! read_field {
    ($base:expr, $member:ident) => {
        load($base, layout!($member.offset), layout!($member.width))
    };
}

#[inline(always)]
fn load(base: *const u8, offset: u32, width: u32) -> u64 {
    let at = base.wrapping_add(offset as usize);
    // SAFETY: the verifier checks the load against the BTF of the type that the
    // pointer has, and the branches of other widths are dead to it.
    unsafe {
        match width {
            1 => u64::from(at.read_volatile()),
            2 => u64::from(at.cast::<u16>().read_volatile()),
            4 => u64::from(at.cast::<u32>().read_volatile()),
            _ => at.cast::<u64>().read_volatile(),
        }
    }
}

/// A full TCP socket: not a listener's request, not one in TIME_WAIT.
#[derive(Clone, Copy)]
pub(crate) struct TcpSock(*const u8);

impl TcpSock {
    /// The socket that the callback is about, if it is a full TCP socket.
    #[inline(always)]
    pub(crate) fn of(ctx: &SockOpsContext) -> Option<Self> {
        // SAFETY: the context is the kernel's own.
        Self::try_from(unsafe { (*ctx.ops).__bindgen_anon_2.sk }.cast())
    }

    #[inline(always)]
    fn try_from(sk: *mut c_void) -> Option<Self> {
        if sk.is_null() {
            return None;
        }
        // SAFETY: the helper takes any socket and answers null for those that
        // are not full TCP sockets.
        let sock: *mut tcp_sock = unsafe { bpf_skc_to_tcp_sock(sk) };
        (!sock.is_null()).then_some(Self(sock.cast()))
    }

    /// What bpf_setsockopt and the like take, where the context is no socket.
    #[inline(always)]
    pub(crate) fn target(self) -> *mut c_void {
        self.0.cast_mut().cast()
    }

    /// State of the connection, by the kernel's number.
    #[inline(always)]
    pub(crate) fn state(self) -> u32 {
        number(read_field!(self.0, state))
    }

    /// Segments that are not acknowledged yet.
    #[inline(always)]
    pub(crate) fn packets_out(self) -> u32 {
        number(read_field!(self.0, packets_out))
    }

    /// Whether a process holds the socket. The kernel uses the keepalive timer
    /// of an orphan for other things.
    #[inline(always)]
    fn has_owner(self) -> bool {
        (read_field!(self.0, flags) >> layout!(dead_bit)) & 1 == 0
    }

    /// Jiffies per second.
    #[inline(always)]
    pub(crate) fn hz() -> i64 {
        i64::from(layout!(hz))
    }

    /// Jiffies from now until the keepalive timer fires.
    #[inline(always)]
    pub(crate) fn armed_for(self) -> i64 {
        let expires = read_field!(self.0, timer_expires);
        expires.wrapping_sub(jiffies()).cast_signed()
    }

    /// Jiffies since anything came from the peer (`keepalive_time_elapsed` in
    /// include/net/tcp.h). Both times are kept in 32 bits.
    #[inline(always)]
    pub(crate) fn silent_for(self) -> i64 {
        let now = number(jiffies());
        let ack = now.wrapping_sub(number(read_field!(self.0, last_ack)));
        let data = now.wrapping_sub(number(read_field!(self.0, last_data)));
        i64::from(if ack < data { ack } else { data })
    }

    /// Inode number that /proc/PID/fd shows; 0 for a socket without a process.
    #[inline(always)]
    pub(crate) fn inode(self) -> u64 {
        let socket = read_field!(self.0, socket);
        if socket == 0 {
            return 0;
        }
        probe(pointer(socket), layout!(socket_inode.offset))
    }

    /// Where the connection goes from and to.
    #[inline(always)]
    pub(crate) fn addresses(self) -> Addresses {
        let family = number(read_field!(self.0, family));
        let (local_address, remote_address) = if family == AF_INET {
            (
                v4(self.0, layout!(local_v4.offset)).to_le_bytes(),
                v4(self.0, layout!(remote_v4.offset)).to_le_bytes(),
            )
        } else {
            (
                probe_bytes(self.0, layout!(local_v6.offset)),
                probe_bytes(self.0, layout!(remote_v6.offset)),
            )
        };
        Addresses {
            family,
            local_address,
            remote_address,
            local_port: port(read_field!(self.0, local_port)),
            remote_port: u16::from_be(port(read_field!(self.0, remote_port))),
        }
    }

    /// What rules look at.
    #[inline(always)]
    pub(crate) fn ends(self) -> Ends {
        let address = if number(read_field!(self.0, family)) == AF_INET {
            // `::ffff:0:0/96`
            (v4(self.0, layout!(remote_v4.offset)) << 96 | 0xffff << 80).to_le_bytes()
        } else {
            probe_bytes(self.0, layout!(remote_v6.offset))
        };
        Ends {
            address,
            port: u16::from_be(port(read_field!(self.0, remote_port))),
            local_port: port(read_field!(self.0, local_port)),
        }
    }

    /// What holds for the socket where nothing is set on it.
    #[inline(always)]
    pub(crate) fn environment(self) -> Environment {
        if layout!(sock_netns.width) == 0 {
            return Environment {
                hz: layout!(hz),
                ..Environment::UNKNOWN
            };
        }
        let net = typed(self.0, layout!(sock_netns.offset));
        Environment {
            idle: sysctl_seconds(read_field!(net, sysctl_idle), 7200),
            interval: sysctl_seconds(read_field!(net, sysctl_interval), 75),
            probes: number(read_field!(net, sysctl_probes)),
            retries: number(read_field!(net, sysctl_retries)),
            rto_max: if layout!(sysctl_rto_max.width) == 0 {
                0
            } else {
                number(read_field!(net, sysctl_rto_max))
            },
            hz: layout!(hz),
        }
    }

    /// TCP_RTO_MAX_MS in milliseconds; 0 where it is that of the namespace.
    #[inline(always)]
    fn rto_max(self, environment: &Environment) -> u32 {
        if layout!(rto_max.width) == 0 {
            return 0;
        }
        let hz = layout!(hz).max(1);
        let set = number(read_field!(self.0, rto_max) * 1000 / u64::from(hz));
        // The kernel rounds up to its ticks.
        if set.wrapping_sub(environment.rto_max) <= 1000 / hz {
            0
        } else {
            set
        }
    }

    /// Whether anything is set that [`Self::options`] tells of, apart from
    /// TCP_RTO_MAX_MS, which is looked at where a policy bounds it.
    #[inline(always)]
    pub(crate) fn is_touched(self) -> bool {
        let keepalive = (read_field!(self.0, flags) >> layout!(keepopen_bit)) & 1;
        let timers = read_field!(self.0, keepalive_time)
            | read_field!(self.0, keepalive_intvl)
            | read_field!(self.0, keepalive_probes)
            | read_field!(self.0, user_timeout);
        keepalive | timers != 0
    }

    /// What the application, or an earlier plan, set on the socket.
    #[inline(always)]
    pub(crate) fn options(self, environment: &Environment) -> Options {
        Options {
            rto_max: self.rto_max(environment),
            keepalive: (read_field!(self.0, flags) >> layout!(keepopen_bit)) & 1 == 1,
            idle: seconds(read_field!(self.0, keepalive_time)),
            interval: seconds(read_field!(self.0, keepalive_intvl)),
            probes: number(read_field!(self.0, keepalive_probes)),
            user_timeout: number(read_field!(self.0, user_timeout)),
        }
    }

    /// The cgroup v2 of the process that created the socket; for an accepted
    /// one, of the process that created the listener.
    #[inline(always)]
    pub(crate) fn cgroup(self) -> Option<Cgroup> {
        let at = self.0.wrapping_add(layout!(sock_cgroup.offset) as usize);
        if layout!(typed_cgroup) == 1 {
            // SAFETY: checked by the verifier against the BTF of tcp_sock.
            return Cgroup::new(unsafe { at.cast::<*const u8>().read_volatile() });
        }
        // SAFETY: as above. Read as the number it is there: the verifier allows
        // no arithmetic on pointers, not even in a branch that is never taken.
        let word = unsafe { at.cast::<u64>().read_volatile() };
        if word & 1 == 1 {
            // Data of net_cls and net_prio stands in the place of the pointer.
            return None;
        }
        Cgroup::new(pointer(word))
    }
}

/// What an iterator over the TCP sockets of a network namespace offers
/// (`struct bpf_iter__tcp` in net/ipv4/tcp_ipv4.c).
#[repr(C)]
pub(crate) struct TcpIterator {
    meta: *const IteratorMeta,
    socket: *mut c_void,
    uid: u32,
}

/// `struct bpf_iter_meta` in include/linux/bpf.h.
#[repr(C)]
struct IteratorMeta {
    sequence: *mut seq_file,
}

impl TcpIterator {
    /// The socket, if it is a connection that a process holds: no listener,
    /// request or TIME_WAIT, and nothing that the kernel is about to end.
    #[inline(always)]
    pub(crate) fn connection(&self) -> Option<TcpSock> {
        // SAFETY: the context is the kernel's own. Volatile, so that the null
        // check stays one.
        let socket = unsafe { (&raw const self.socket).read_volatile() };
        TcpSock::try_from(socket).filter(|sock| is_held_open(sock.state()) && sock.has_owner())
    }

    /// User id of the socket's owner.
    #[inline(always)]
    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Appends to what the reader gets.
    #[inline(always)]
    pub(crate) fn write<T>(&self, record: &T) {
        append(self.meta, record);
    }

    /// Lets a reader of single bytes return before the next socket.
    #[inline(always)]
    pub(crate) fn pause(&self) {
        self.write(&0_u8);
    }
}

/// What a program is given that iterates over all open files
/// (`struct bpf_iter__task_file` in kernel/bpf/task_iter.c).
#[repr(C)]
pub(crate) struct FileIterator {
    meta: *const IteratorMeta,
    task: *const u8,
    descriptor: u64,
    file: *const u8,
}

impl FileIterator {
    /// The file, unless the iteration is over.
    #[inline(always)]
    pub(crate) fn record(&self) -> Option<DescriptorRecord> {
        let (task, file) = self.file()?;
        Some(Self::describe(self.descriptor, task, file))
    }

    /// The file, unless it is one that can be read or written: a namespace
    /// cannot. This spares a look at the inode, which is not in the processor's
    /// cache where there are many files.
    #[inline(always)]
    pub(crate) fn record_without_data(&self) -> Option<DescriptorRecord> {
        /// `FMODE_CAN_READ` and `FMODE_CAN_WRITE` (include/linux/fs.h, since
        /// Linux 3.16): the file has functions for that.
        const HAS_DATA: u64 = 1 << 17 | 1 << 18;
        let (task, file) = self.file()?;
        if read_field!(file, file_mode) & HAS_DATA != 0 {
            return None;
        }
        Some(Self::describe(self.descriptor, task, file))
    }

    #[inline(always)]
    fn file(&self) -> Option<(*const u8, *const u8)> {
        // SAFETY: the context is the kernel's own. Volatile, so that the null
        // checks stay.
        let (task, file) = unsafe {
            (
                (&raw const self.task).read_volatile(),
                (&raw const self.file).read_volatile(),
            )
        };
        (!task.is_null() && !file.is_null()).then_some((task, file))
    }

    #[inline(always)]
    fn describe(descriptor: u64, task: *const u8, file: *const u8) -> DescriptorRecord {
        let inode = typed(file, layout!(file_inode.offset));
        let super_block = typed(inode, layout!(inode_super.offset));
        DescriptorRecord {
            inode: read_field!(inode, inode_number),
            magic: read_field!(super_block, super_magic),
            process: number(read_field!(task, task_process)),
            descriptor: number(descriptor & 0xffff_ffff),
        }
    }

    /// Appends to what the reader gets.
    #[inline(always)]
    pub(crate) fn write<T>(&self, record: &T) {
        append(self.meta, record);
    }
}

/// Appends to what the reader of an iterator gets. What does not fit any more
/// makes the kernel hand over what it has and run the program again.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "records are small")]
fn append<T>(meta: *const IteratorMeta, record: &T) {
    // SAFETY: the sequence file is the kernel's own and never null while the
    // program runs; the record is ours.
    unsafe {
        bpf_seq_write(
            (*meta).sequence,
            ptr::from_ref(record).cast_mut().cast(),
            const { size_of::<T>() as u32 },
        );
    }
}

/// The pointer at `offset` of a structure whose type the verifier knows.
#[inline(always)]
fn typed(base: *const u8, offset: u32) -> *const u8 {
    // SAFETY: checked by the verifier against the BTF of the type of `base`; a
    // fault reads as zero.
    unsafe {
        base.wrapping_add(offset as usize)
            .cast::<*const u8>()
            .read_volatile()
    }
}

/// A cgroup.
#[derive(Clone, Copy)]
pub(crate) struct Cgroup(*const u8);

impl Cgroup {
    /// The cgroup that a tracepoint about cgroups is about, of whichever
    /// hierarchy.
    #[inline(always)]
    pub(crate) fn of(ctx: &BtfTracePointContext) -> Option<Self> {
        Self::new(ctx.arg(0))
    }

    #[inline(always)]
    fn new(cgroup: *const u8) -> Option<Self> {
        (!cgroup.is_null()).then_some(Self(cgroup))
    }

    /// The inode number of its directory, which is never used again.
    #[inline(always)]
    pub(crate) fn id(self) -> u64 {
        let kn = follow(self.0, layout!(cgroup_kn.offset));
        if layout!(typed_cgroup) == 1 {
            read_field!(kn, kernfs_id)
        } else {
            probe(kn, layout!(kernfs_id.offset))
        }
    }

    /// Whether it is of the v2 hierarchy (`cgrp_dfl_root`, which has the first
    /// id). Of those that a socket refers to, all are.
    #[inline(always)]
    pub(crate) fn is_v2(self) -> bool {
        let root = follow(self.0, layout!(cgroup_root.offset));
        let id = if layout!(typed_cgroup) == 1 {
            number(read_field!(root, hierarchy_id))
        } else {
            u32::from_ne_bytes(probe_bytes(root, layout!(hierarchy_id.offset)))
        };
        id == 0
    }

    /// The cgroup above, none for the root.
    #[inline(always)]
    pub(crate) fn parent(self) -> Option<Self> {
        let css = follow(self.0, layout!(cgroup_parent.offset));
        if css.is_null() {
            return None;
        }
        Self::new(follow(css, layout!(css_cgroup.offset)))
    }
}

/// The pointer that stands at `offset` of what `base` points to; null when it
/// cannot be read.
#[inline(always)]
fn follow(base: *const u8, offset: u32) -> *const u8 {
    if layout!(typed_cgroup) == 1 {
        typed(base, offset)
    } else {
        pointer(probe(base, offset))
    }
}

/// A kernel address that was read as a number.
#[inline(always)]
fn pointer(address: u64) -> *const u8 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "pointers of the BPF machine have 64 bits"
    )]
    core::ptr::with_exposed_provenance(address as usize)
}

/// Eight bytes at an address that the verifier knows nothing about; zero when
/// they cannot be read.
#[inline(always)]
fn probe(base: *const u8, offset: u32) -> u64 {
    let mut value = 0_u64;
    // SAFETY: the helper checks the address and never faults; the destination
    // is ours and eight bytes long.
    unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast(),
            8,
            base.wrapping_add(offset as usize).cast(),
        );
    }
    value
}

/// An IPv4 address, its bytes in network order being the lowest of a number
/// whose lowest byte comes first.
#[inline(always)]
fn v4(base: *const u8, offset: u32) -> u128 {
    u128::from(u32::from_le_bytes(probe_bytes(base, offset)))
}

/// Four or sixteen bytes of kernel memory. Not cleared before: the helper does
/// that where it fails, and the compiler would clear them one by one, in a loop.
#[inline(always)]
fn probe_bytes<const LENGTH: usize>(base: *const u8, offset: u32) -> [u8; LENGTH] {
    let mut bytes = MaybeUninit::<[u8; LENGTH]>::uninit();
    #[expect(clippy::cast_possible_truncation, reason = "16 at the most")]
    let length = LENGTH as u32;
    // SAFETY: the helper checks the address and never faults; the destination
    // is ours, of that length, and written whatever happens.
    unsafe {
        bpf_probe_read_kernel(
            bytes.as_mut_ptr().cast(),
            length,
            base.wrapping_add(offset as usize).cast(),
        );
        bytes.assume_init()
    }
}

/// Copies a NUL-terminated string; returns how many bytes that were, the NUL
/// included. What does not fit is cut off.
#[inline(always)]
pub(crate) fn copy_string<const SIZE: usize>(
    from: *const u8,
    to: &mut [u8; SIZE],
) -> Option<usize> {
    #[expect(clippy::cast_possible_truncation, reason = "strings are small")]
    let size = const { SIZE as u32 };
    // SAFETY: the helper checks the address and never faults; the destination
    // is ours and that long.
    let copied = unsafe { bpf_probe_read_kernel_str(to.as_mut_ptr().cast(), size, from.cast()) };
    usize::try_from(copied).ok()
}

/// Ticks of the kernel's clock.
#[inline(always)]
fn jiffies() -> u64 {
    // SAFETY: takes no arguments and only reads the clock.
    unsafe { bpf_jiffies64() }
}

/// Ports have 16 bits in the kernel too.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "see above")]
fn port(field: u64) -> u16 {
    field as u16
}

/// Jiffies as seconds. Only setsockopt writes these fields, in whole seconds.
#[inline(always)]
fn seconds(jiffies: u64) -> u32 {
    if jiffies == 0 {
        // Most sockets: spares the division.
        return 0;
    }
    number(jiffies) / layout!(hz).max(1)
}

/// A sysctl in jiffies as seconds. Most namespaces have what the kernel begins
/// with, which spares the division.
#[inline(always)]
fn sysctl_seconds(jiffies: u64, usual: u32) -> u32 {
    if number(jiffies) == usual * layout!(hz) {
        return usual;
    }
    seconds(jiffies)
}

/// No field is wider than its values: seconds, numbers and milliseconds of at
/// most 31 bits.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "see above")]
fn number(field: u64) -> u32 {
    field as u32
}
