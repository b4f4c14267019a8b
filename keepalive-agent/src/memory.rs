//! Memory: what is not needed any more goes back to the kernel.

/// Gives back what is free in the middle of the heap.
///
/// What a start or a change of policy needs for a moment, such as the kernel's
/// types, is freed again, but what was allocated after it and stays, keeps glibc
/// from giving back anything below: some 3.5 MiB.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "a function of the C library")]
pub fn give_back() {
    // SAFETY: takes the locks of the allocator, as any allocation does.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Other C libraries have no such function.
#[cfg(not(target_env = "gnu"))]
pub fn give_back() {}
