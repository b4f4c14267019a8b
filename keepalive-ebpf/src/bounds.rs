//! Bounds: what an application sets on a connection that is held to a policy.
//!
//! The connection's policy was found when it was established, or by a sweep, and
//! is kept beside the socket ([`crate::history`]), with everything that the
//! application asked for. So the hook looks at nothing but the socket, and goes by
//! the same policy until a sweep has brought another one to the connection.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::bpf_sockopt, helpers::generated::bpf_setsockopt, programs::SockoptContext,
};
use keepalive_common::counters::SocketOption;

use crate::{enforce::forget_options, history};

/// The length of all five options. The kernel takes longer ones and looks at the
/// beginning.
const LENGTH: i32 = 4;

/// An application sets an option of a socket, of whatever kind. Unless it is one
/// of the five on a connection that is held to a policy, the kernel is left to
/// answer alone.
#[inline(always)]
pub(crate) fn application_sets(ctx: &SockoptContext) {
    let sockopt = ctx.sockopt;
    // SAFETY: the context is the kernel's own.
    let (level, name, length) =
        unsafe { ((*sockopt).level, (*sockopt).optname, (*sockopt).optlen) };
    // The kernel takes what the application gave it, however long that is: this
    // hook has a copy of no more than a page.
    // SAFETY: as above.
    unsafe { (*sockopt).optlen = 0 };
    if let Some(option) = SocketOption::from_level_and_number(level, name)
        && length >= LENGTH
    {
        bound(sockopt, option);
    }
}

/// Out of line, to keep its registers out of the way of other options.
#[inline(never)]
fn bound(sockopt: *mut bpf_sockopt, option: SocketOption) {
    // SAFETY: the context is the kernel's own, and a socket option has a socket.
    let socket: *mut c_void = unsafe { (*sockopt).__bindgen_anon_1.sk.cast() };
    let Some(history) = history::of(socket) else {
        return;
    };
    if !history.held_to.holds() {
        return;
    }
    let Some(value) = value(sockopt) else {
        return;
    };
    // SAFETY: four bytes of the kernel's copy, as `value` found.
    let asked = unsafe { value.read_unaligned() };
    let Some(answer) = history.set(option, asked) else {
        return;
    };
    let (had, wants) = (forget_options(answer.had), forget_options(answer.wants));
    // What follows from it, such as a derived user-timeout.
    for other in SocketOption::ALL {
        if other != option && other != SocketOption::RtoMax && had.get(other) != wants.get(other) {
            set(socket, other, wants.get(other));
        }
    }
    // SAFETY: four bytes of the kernel's copy, as `value` found.
    unsafe {
        value.write_unaligned(wants.get(option));
        (*sockopt).optlen = LENGTH;
    }
}

/// Where the value of the option stands. The copy has more room than the value,
/// so its length has to be looked at too.
#[inline(always)]
fn value(sockopt: *mut bpf_sockopt) -> Option<*mut u32> {
    // SAFETY: the context is the kernel's own.
    let (begin, end): (*mut u8, *mut u8) = unsafe {
        (
            (*sockopt).__bindgen_anon_2.optval.cast(),
            (*sockopt).__bindgen_anon_3.optval_end.cast(),
        )
    };
    let after = begin.wrapping_add(LENGTH.unsigned_abs() as usize);
    (after <= end).then_some(begin.cast())
}

/// Sets another option of the socket. A refusal leaves it as it was.
#[inline(always)]
fn set(socket: *mut c_void, option: SocketOption, value: u32) {
    let (level, number) = option.level_and_number();
    let mut value = value;
    // SAFETY: the socket is the kernel's own and the value is four bytes on the
    // stack.
    unsafe {
        bpf_setsockopt(
            socket,
            level,
            number,
            (&raw mut value).cast::<c_void>(),
            LENGTH,
        );
    }
}
