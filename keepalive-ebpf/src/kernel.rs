//! Reads kernel structures, at the offsets that the agent found in the kernel's
//! BTF. All unsafe reads of kernel memory are in this file.
//!
//! Every pointer has a type that the verifier knows. It is followed by a plain
//! load, which the verifier checks against the type's BTF and the kernel guards
//! against faults: what cannot be read is zero. `bpf_probe_read_kernel` would
//! read anything, and is refused under lockdown=confidentiality.
#![expect(
    clippy::cast_ptr_alignment,
    reason = "the kernel aligns its fields to their own width"
)]

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    bindings::{seq_file, tcp_sock},
    helpers::generated::{
        bpf_jiffies64, bpf_seq_write, bpf_skc_to_tcp_sock, bpf_snprintf, bpf_sock_from_file,
    },
    programs::{BtfTracePointContext, SockOpsContext},
};
use keepalive_common::{
    descriptor::{DescriptorRecord, Kind, MPTCP, NSFS},
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

    /// The socket that an error is reported for, if it is a full TCP socket.
    #[inline(always)]
    pub(crate) fn reported(ctx: &BtfTracePointContext) -> Option<Self> {
        let sk: *const u8 = ctx.arg(0);
        Self::try_from(sk.cast_mut().cast())
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

    /// What the application is told next, positive; 0 is no error.
    #[inline(always)]
    pub(crate) fn error(self) -> u32 {
        number(read_field!(self.0, error))
    }

    /// Probes that are not answered yet.
    #[inline(always)]
    pub(crate) fn probes_out(self) -> u32 {
        number(read_field!(self.0, probes_out))
    }

    /// Whether there is something that the peer has not acknowledged, sent or
    /// not. Holds also after the kernel has thrown it away.
    #[inline(always)]
    pub(crate) fn has_data(self) -> bool {
        read_field!(self.0, write_seq) != read_field!(self.0, snd_una)
    }

    /// Tells the connection from earlier ones of the same socket, once nothing is
    /// sent on it any more: the kernel begins each one at another number. Never 0.
    #[inline(always)]
    pub(crate) fn connection_number(self) -> u64 {
        1 << 32 | read_field!(self.0, write_seq)
    }

    /// Whether the connection was ever established: the peer's numbers begin where
    /// it says (`tcp_connect_init()` in net/ipv4/tcp_output.c begins with 0).
    #[inline(always)]
    pub(crate) fn was_established(self) -> bool {
        read_field!(self.0, rcv_nxt) != 0
    }

    /// Whether the application has taken the connection off, by connect(2) to AF_UNSPEC
    /// or by closing without lingering (`tcp_disconnect()` in net/ipv4/tcp.c).
    #[inline(always)]
    pub(crate) fn is_disconnected(self) -> bool {
        read_field!(self.0, remote_port) == 0
    }

    /// TCP_USER_TIMEOUT in milliseconds; 0 is unset.
    #[inline(always)]
    pub(crate) fn user_timeout(self) -> u32 {
        number(read_field!(self.0, user_timeout))
    }

    /// Whether a process holds the socket. The kernel uses the keepalive timer
    /// of an orphan for other things.
    #[inline(always)]
    pub(crate) fn has_owner(self) -> bool {
        (read_field!(self.0, flags) >> layout!(dead_bit)) & 1 == 0
    }

    /// Whether it is a connection that lasts: no listener, request or TIME_WAIT,
    /// and nothing that the kernel is about to end. The kernel uses the keepalive
    /// timer of an orphan for other things.
    #[inline(always)]
    pub(crate) fn is_connection(self) -> bool {
        is_held_open(self.state()) && self.has_owner()
    }

    /// Its network namespace.
    #[inline(always)]
    pub(crate) fn net(self) -> Net {
        Net::of(self.0)
    }

    /// User id of the owner.
    #[inline(always)]
    pub(crate) fn uid(self) -> u32 {
        number(read_field!(self.0, sock_uid))
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

    /// Inode number that /proc/PID/fd shows; 0 for a socket without a descriptor.
    #[inline(always)]
    pub(crate) fn inode(self) -> u64 {
        let socket = typed(self.0, layout!(socket.offset));
        let file = typed(socket, layout!(socket_file.offset));
        read_field!(typed(file, layout!(file_inode.offset)), inode_number)
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
                v6(self.0, layout!(local_v6.offset)),
                v6(self.0, layout!(remote_v6.offset)),
            )
        };
        Addresses {
            family,
            local_address,
            remote_address,
            local_port: u16::from_be(port(read_field!(self.0, local_port))),
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
            v6(self.0, layout!(remote_v6.offset))
        };
        Ends {
            address,
            port: u16::from_be(port(read_field!(self.0, remote_port))),
            local_port: u16::from_be(port(read_field!(self.0, local_port))),
        }
    }

    /// What holds for the socket where nothing is set on it.
    #[inline(always)]
    pub(crate) fn environment(self) -> Environment {
        self.net().environment()
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
        Cgroup::new(typed(self.0, layout!(sock_cgroup.offset)))
    }
}

/// What an iterator over the TCP sockets of a network namespace offers
/// (`struct bpf_iter__tcp` in net/ipv4/tcp_ipv4.c).
#[repr(C)]
pub(crate) struct TcpIterator {
    meta: *const IteratorMeta,
    socket: *mut c_void,
}

/// `struct bpf_iter_meta` in include/linux/bpf.h.
#[repr(C)]
struct IteratorMeta {
    sequence: *mut seq_file,
}

impl TcpIterator {
    /// The socket, if it is a connection that a process holds, or is about to
    /// accept.
    #[inline(always)]
    pub(crate) fn connection(&self) -> Option<TcpSock> {
        // SAFETY: the context is the kernel's own. Volatile, so that the null
        // check stays one.
        let socket = unsafe { (&raw const self.socket).read_volatile() };
        TcpSock::try_from(socket).filter(|sock| sock.is_connection())
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
    pub(crate) fn file(&self) -> Option<OpenFile> {
        // SAFETY: the context is the kernel's own. Volatile, so that the null
        // checks stay.
        let (task, file) = unsafe {
            (
                (&raw const self.task).read_volatile(),
                (&raw const self.file).read_volatile(),
            )
        };
        (!task.is_null() && !file.is_null()).then_some(OpenFile {
            task,
            descriptor: self.descriptor,
            file,
        })
    }

    /// Appends to what the reader gets.
    #[inline(always)]
    pub(crate) fn write<T>(&self, record: &T) {
        append(self.meta, record);
    }
}

/// A file that a process holds open.
#[derive(Clone, Copy)]
pub(crate) struct OpenFile {
    task: *const u8,
    descriptor: u64,
    file: *const u8,
}

/// What a socket of a process is.
pub(crate) enum OpenSocket {
    /// Of TCP, in whichever state.
    Tcp(TcpSock),
    /// Of MPTCP, in a network namespace.
    Mptcp(Net),
}

impl OpenFile {
    /// Whether it is a namespace, of whatever kind.
    #[inline(always)]
    pub(crate) fn is_namespace(self) -> bool {
        /// `FMODE_CAN_READ` and `FMODE_CAN_WRITE` (include/linux/fs.h, since
        /// Linux 3.16): the file has functions for that, which a namespace has
        /// not. This spares a look at the inode, which is not in the processor's
        /// cache where there are many files.
        const HAS_DATA: u64 = 1 << 17 | 1 << 18;
        if read_field!(self.file, file_mode) & HAS_DATA != 0 {
            return false;
        }
        let super_block = typed(self.inode(), layout!(inode_super.offset));
        read_field!(super_block, super_magic) == NSFS
    }

    /// The TCP or MPTCP socket that it is, if it is one.
    #[inline(always)]
    pub(crate) fn socket(self) -> Option<OpenSocket> {
        // SAFETY: takes any file and answers null for those that are no sockets.
        let socket = unsafe { bpf_sock_from_file(self.file.cast_mut().cast()) };
        if socket.is_null() {
            return None;
        }
        let sock = typed(socket.cast_const().cast(), layout!(socket_sock.offset));
        if let Some(tcp) = TcpSock::try_from(sock.cast_mut().cast()) {
            return Some(OpenSocket::Tcp(tcp));
        }
        if sock.is_null() || read_field!(sock, sock_protocol) != MPTCP {
            return None;
        }
        Some(OpenSocket::Mptcp(Net::of(sock)))
    }

    /// What there is to say of any file.
    #[inline(always)]
    pub(crate) fn record(self, kind: Kind, netns: u32) -> DescriptorRecord {
        DescriptorRecord {
            inode: read_field!(self.inode(), inode_number),
            process: number(read_field!(self.task, task_process)),
            descriptor: number(self.descriptor & 0xffff_ffff),
            netns,
            kind: kind as u32,
        }
    }

    #[inline(always)]
    fn inode(self) -> *const u8 {
        typed(self.file, layout!(file_inode.offset))
    }
}

/// A network namespace.
#[derive(Clone, Copy)]
pub(crate) struct Net(*const u8);

impl Net {
    /// That of a socket.
    #[inline(always)]
    fn of(sock: *const u8) -> Self {
        Self(typed(sock, layout!(sock_net.offset)))
    }

    /// Inode number that /proc/PID/ns/net shows.
    #[inline(always)]
    pub(crate) fn inode(self) -> u32 {
        number(read_field!(self.0, net_inode))
    }

    /// Whether its sysctls of keepalive are what the kernel begins with.
    #[inline(always)]
    pub(crate) fn is_unchanged(self) -> bool {
        const USUAL: Environment = Environment::UNCHANGED;
        number(read_field!(self.0, net_keepalive_time)) == USUAL.idle * layout!(hz)
            && number(read_field!(self.0, net_keepalive_intvl)) == USUAL.interval * layout!(hz)
            && number(read_field!(self.0, net_keepalive_probes)) == USUAL.probes
    }

    /// What it decides for sockets on which nothing is set.
    #[inline(always)]
    pub(crate) fn environment(self) -> Environment {
        Environment {
            idle: seconds(read_field!(self.0, net_keepalive_time)),
            interval: seconds(read_field!(self.0, net_keepalive_intvl)),
            probes: number(read_field!(self.0, net_keepalive_probes)),
            retries: number(read_field!(self.0, net_retries)),
            rto_max: if layout!(net_rto_max.width) == 0 {
                0
            } else {
                number(read_field!(self.0, net_rto_max))
            },
            hz: layout!(hz),
        }
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
        read_field!(typed(self.0, layout!(cgroup_kn.offset)), kernfs_id)
    }

    /// A number that no other cgroup has or will have, and that is found sooner than
    /// the id (`css_serial_nr_next` in kernel/cgroup/cgroup.c; the root has 0 there).
    /// Never 0. It belongs to this boot: only the programs use it.
    #[inline(always)]
    pub(crate) fn serial(self) -> u64 {
        read_field!(self.0, cgroup_serial) + 1
    }

    /// Whether it is of the v2 hierarchy (`cgrp_dfl_root`, which has the first
    /// id). Of those that a socket refers to, all are.
    #[inline(always)]
    pub(crate) fn is_v2(self) -> bool {
        let root = typed(self.0, layout!(cgroup_root.offset));
        number(read_field!(root, hierarchy_id)) == 0
    }

    /// The cgroup above, none for the root.
    #[inline(always)]
    pub(crate) fn parent(self) -> Option<Self> {
        let css = typed(self.0, layout!(cgroup_parent.offset));
        if css.is_null() {
            return None;
        }
        Self::new(typed(css, layout!(css_cgroup.offset)))
    }
}

/// An IPv4 address, its bytes in network order being the lowest of a number
/// whose lowest byte comes first.
#[inline(always)]
fn v4(base: *const u8, offset: u32) -> u128 {
    u128::from(number(load(base, offset, 4)))
}

/// An IPv6 address, its bytes in network order.
#[inline(always)]
fn v6(base: *const u8, offset: u32) -> [u8; 16] {
    let (first, last) = (load(base, offset, 8), load(base, offset + 8, 8));
    (u128::from(last) << 64 | u128::from(first)).to_le_bytes()
}

/// Copies a NUL-terminated string whose address is only a number to the
/// verifier; returns how many bytes that were, the NUL included, or `SIZE` where
/// it may have been cut off.
///
/// `bpf_snprintf` (since Linux 5.13) reads it as `bpf_probe_read_kernel_str`
/// would, and is allowed under lockdown=confidentiality too.
#[inline(always)]
pub(crate) fn copy_string<const SIZE: usize>(
    from: *const u8,
    to: &mut [u8; SIZE],
) -> Option<usize> {
    /// As many bytes as it takes from one string (`MAX_BPRINTF_BIN_ARGS` in
    /// kernel/bpf/helpers.c, less the NUL).
    const PIECE: usize = 511;
    const { assert!(SIZE > 2 * PIECE, "the second piece fits") };
    let first = print_string(from, to.as_mut_ptr())?;
    if first <= PIECE {
        return Some(first);
    }
    // SAFETY: there is room for another piece.
    let rest = unsafe { to.as_mut_ptr().add(PIECE) };
    let second = print_string(from.wrapping_add(PIECE), rest)?;
    Some(if second <= PIECE {
        PIECE + second
    } else {
        SIZE
    })
}

/// Copies up to 511 bytes of a string and a NUL; tells how many there are in
/// all.
#[inline(always)]
fn print_string(from: *const u8, to: *mut u8) -> Option<usize> {
    let mut arguments = [from.expose_provenance() as u64];
    // SAFETY: the helper checks the address and never faults; there is room for
    // 512 bytes, the format is a read-only string of ours.
    let length = unsafe {
        bpf_snprintf(
            to.cast(),
            512,
            STRING_FORMAT.as_ptr().cast(),
            arguments.as_mut_ptr(),
            8,
        )
    };
    usize::try_from(length).ok()
}

/// A string and nothing else.
#[unsafe(no_mangle)]
static STRING_FORMAT: [u8; 3] = *b"%s\0";

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

/// Jiffies as seconds. Setsockopt and sysctls write these fields in whole seconds.
#[inline(always)]
fn seconds(jiffies: u64) -> u32 {
    if jiffies == 0 {
        // Most sockets: spares the division.
        return 0;
    }
    number(jiffies) / layout!(hz).max(1)
}

/// No field is wider than its values: seconds, numbers and milliseconds of at
/// most 31 bits.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "see above")]
fn number(field: u64) -> u32 {
    field as u32
}
