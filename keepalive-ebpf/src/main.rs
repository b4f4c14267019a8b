//! The BPF programs of keepalive.
//!
//! Entry points only: each maps what its hook offers to the decision in
//! `enforce`, which is the same for all of them.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

mod claim;
mod enforce;
mod kernel;

use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB},
    macros::sock_ops,
    programs::SockOpsContext,
};

/// The kernel lets only programs with a GPL-compatible licence call the helpers
/// that read kernel memory.
#[used]
#[unsafe(link_section = "license")]
#[unsafe(export_name = "_license")]
static LICENSE: [u8; 4] = *b"GPL\0";

/// Lets the kernel go on. Anything else would overrule what other programs on
/// the hook reply.
const PROCEED: u32 = 1;

/// Runs some nine times in the life of a connection, of which two callbacks
/// matter: one end has connected, one end has accepted.
#[sock_ops]
#[expect(clippy::needless_pass_by_value, reason = "the macro's signature")]
fn established(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB | BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            enforce::new_connection(&ctx);
        }
        _ => {}
    }
    PROCEED
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The crate is built for the host too, so that its lints run there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
