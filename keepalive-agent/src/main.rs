//! keepalive-agent: TCP keepalive for every connection of the machine.
#![deny(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    return_memory();
    keepalive_agent::cli::main()
}

/// Has the allocator give back what is not needed any more after the start.
///
/// Left to itself, glibc takes the kernel's types, which are read whole at the
/// start, for a sign that so much will be wanted again, and keeps it (`mallopt(3)`,
/// on the dynamic threshold). And it gives each thread an arena of its own, which
/// keeps what a thread that has ended needed: sets are built and connections swept
/// on threads, one at a time.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "settings of the C library")]
fn return_memory() {
    const BYTES: libc::c_int = 128 * 1024;
    // SAFETY: only sets numbers of the allocator; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, BYTES);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(not(target_env = "gnu"))]
fn return_memory() {}
