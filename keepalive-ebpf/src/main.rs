//! The BPF programs of keepalive.
//!
//! Entry points only: each maps what its hook offers to the decision in
//! `enforce`, which is the same for all of them, or to a record for the listing.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

mod bounds;
mod claim;
mod dead_peer;
mod decide;
mod enforce;
mod files;
mod hierarchy;
mod history;
mod kernel;
mod list;
mod recent;
mod refusal;
mod sweep;

use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB},
    macros::{btf_tracepoint, cgroup_sockopt, sock_ops},
    programs::{BtfTracePointContext, SockOpsContext, SockoptContext},
};
use keepalive_common::cgroup_event::Kind;

use crate::kernel::{FileIterator, TcpIterator};

/// The kernel lets only programs with a GPL-compatible licence call the helpers
/// that read kernel memory. This is one of the texts that it takes for such
/// (include/linux/license.h).
#[used]
#[unsafe(link_section = "license")]
#[unsafe(export_name = "_license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Lets the kernel go on. Anything else would overrule what other programs on
/// the hook reply.
const PROCEED: u32 = 1;

/// Goes on to the next socket.
const NEXT: i32 = 0;

/// Runs some nine times in the life of a connection, of which two callbacks
/// matter: one end has connected, one end has accepted.
#[sock_ops]
#[expect(clippy::needless_pass_by_value, reason = "the macro's signature")]
fn established(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB | BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            enforce::new_connection(ctx.ops);
        }
        _ => {}
    }
    PROCEED
}

/// Runs for every error of a socket that the kernel has for its application: some
/// tell that the peer is dead.
///
/// # Minimum kernel version
///
/// 5.14, for the tracepoint.
#[btf_tracepoint(function = "inet_sk_error_report")]
#[expect(clippy::needless_pass_by_value, reason = "the macro's signature")]
fn peer_died(ctx: BtfTracePointContext) {
    dead_peer::reported(&ctx);
}

/// Runs for every setsockopt of an application, before the kernel's own handling:
/// bounds what it asks for.
///
/// # Minimum kernel version
///
/// 5.15, for bpf_setsockopt on this hook.
#[cgroup_sockopt(setsockopt)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's signature")]
fn bounded(ctx: SockoptContext) -> i32 {
    bounds::application_sets(&ctx);
    PROCEED.cast_signed()
}

/// Runs for every TCP socket of a network namespace: applies policy to the
/// connections among them.
///
/// # Minimum kernel version
///
/// 5.15, for bpf_setsockopt in iterators.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
extern "C" fn sweep(iterator: &TcpIterator) -> i32 {
    if let Some(sock) = iterator.connection() {
        sweep::existing_connection(iterator, sock);
    }
    NEXT
}

/// Runs for every TCP socket of a network namespace: writes a record of the
/// connections among them. Changes nothing.
///
/// # Minimum kernel version
///
/// 5.9, for TCP iterators.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
extern "C" fn list(iterator: &TcpIterator) -> i32 {
    if let Some(sock) = iterator.connection() {
        iterator.write(&list::record(sock));
    }
    NEXT
}

/// Runs for every open file of every process, whatever namespaces they are in:
/// writes a record of those that are connections, of those that tell where there
/// are connections that no process holds, and of those that are namespaces.
/// Changes nothing.
///
/// # Minimum kernel version
///
/// 5.11, for bpf_sock_from_file.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn files(iterator: &FileIterator) -> i32 {
    files::list(iterator);
    NEXT
}

/// The same for the sweep: with whether a connection is to be changed, and
/// nothing else of it.
///
/// # Minimum kernel version
///
/// 5.12, for socket storage in such programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn survey(iterator: &FileIterator) -> i32 {
    files::survey(iterator);
    NEXT
}

/// Runs for every cgroup that is made: tells the agent. The kernel calls it when
/// nothing can fail any more, and shows the directory just after that
/// (`cgroup_mkdir()` in kernel/cgroup/cgroup.c).
///
/// # Minimum kernel version
///
/// 5.8, for ring buffers.
#[btf_tracepoint(function = "cgroup_mkdir")]
#[expect(clippy::needless_pass_by_value, reason = "the macro's signature")]
fn cgroup_made(ctx: BtfTracePointContext) {
    hierarchy::tell(&ctx, Kind::Made);
}

/// Runs for every cgroup that is removed: tells the agent.
///
/// # Minimum kernel version
///
/// As [`cgroup_made`].
#[btf_tracepoint(function = "cgroup_rmdir")]
#[expect(clippy::needless_pass_by_value, reason = "the macro's signature")]
fn cgroup_removed(ctx: BtfTracePointContext) {
    hierarchy::tell(&ctx, Kind::Removed);
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The crate is built for the host too, so that its lints run there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
