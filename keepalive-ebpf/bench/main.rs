//! BPF programs that the benchmark compares with. No user ever gets them.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB},
    helpers::generated::bpf_setsockopt,
    macros::{cgroup_sockopt, sock_ops},
    programs::{SockOpsContext, SockoptContext},
};
use keepalive_common::counters::SocketOption;

/// The same licence as the programs they are compared with.
#[used]
#[unsafe(link_section = "license")]
#[unsafe(export_name = "_license")]
static LICENSE: [u8; 4] = *b"GPL\0";

/// Lets the kernel go on.
const PROCEED: u32 = 1;

/// What it costs that there is a program at all.
#[sock_ops]
fn noop(_: SockOpsContext) -> u32 {
    PROCEED
}

/// What it costs that there is a program on setsockopt at all.
#[cgroup_sockopt(setsockopt)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's signature")]
fn sockopt_noop(ctx: SockoptContext) -> i32 {
    // Or values of more than a page would be refused.
    // SAFETY: the context is the kernel's own.
    unsafe { (*ctx.sockopt).optlen = 0 };
    PROCEED.cast_signed()
}

/// What it costs at the least to set the built-in policy: constants, for every
/// socket, without looking.
#[sock_ops]
#[expect(clippy::needless_pass_by_value, reason = "the macro's signature")]
fn floor(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB | BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            set(&ctx, SocketOption::Idle, 60);
            set(&ctx, SocketOption::Interval, 10);
            set(&ctx, SocketOption::Probes, 6);
            set(&ctx, SocketOption::Keepalive, 1);
        }
        _ => {}
    }
    PROCEED
}

#[inline(always)]
fn set(ctx: &SockOpsContext, option: SocketOption, value: u32) {
    let (level, number) = option.level_and_number();
    let mut value = value;
    // SAFETY: the context is the kernel's own and the value is four bytes on the
    // stack, as these options take it.
    unsafe {
        bpf_setsockopt(
            ctx.as_ptr(),
            level,
            number,
            (&raw mut value).cast::<c_void>(),
            4,
        );
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The crate is built for the host too, so that its lints run there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
