//! Fault injection: every call to the kernel that changes something passes here,
//! and can be made to fail in tests.
//!
//! Without the feature `fault-injection` nothing of this is in the program.

#[cfg(not(feature = "fault-injection"))]
use std::io;

/// A call to the kernel that changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The maps of an object are made.
    CreateMaps,
    /// A program is loaded.
    LoadProgram,
    /// An element of a map is written or removed.
    WriteMap,
    /// A map is bound to a program.
    BindMap,
    /// A program is attached.
    LinkCreate,
    /// The program under a link is replaced.
    LinkUpdate,
    /// Running programs are waited for.
    Wait,
    /// A link is taken off.
    LinkDetach,
    /// A link is pinned.
    Pin,
    /// A pin is removed.
    Unpin,
}

/// Fails where a test wants this call to fail.
///
/// # Errors
///
/// ENOMEM, if so armed.
#[cfg(not(feature = "fault-injection"))]
#[expect(clippy::unnecessary_wraps, reason = "it fails in tests")]
#[inline]
pub(super) const fn point(_: Operation) -> io::Result<()> {
    Ok(())
}

#[cfg(feature = "fault-injection")]
pub use armed::{Hold, arm, arm_to_kill, point, stop};

#[cfg(feature = "fault-injection")]
mod armed {
    use std::{
        io,
        sync::{
            Condvar, Mutex, PoisonError,
            atomic::{AtomicBool, AtomicI64, Ordering},
        },
        thread,
    };

    use rustix::process::{Signal, getpid, kill_process};

    use super::Operation;

    /// Calls until one fails; negative where none is to.
    static COUNTDOWN: AtomicI64 = AtomicI64::new(-1);
    /// Whether that call ends the process, as SIGKILL does.
    static KILLS: AtomicBool = AtomicBool::new(false);
    static FAILED: Mutex<Option<Operation>> = Mutex::new(None);

    /// The threads of which name wait, and how many do.
    static HELD: Mutex<Option<(&str, u32)>> = Mutex::new(None);
    static RELEASED: Condvar = Condvar::new();

    /// Has the threads of one name wait at their next call, as long as it lives. There
    /// is one at a time.
    #[derive(Debug)]
    pub struct Hold;

    impl Hold {
        /// Begins.
        #[must_use]
        pub fn on(name: &'static str) -> Self {
            *HELD.lock().unwrap_or_else(PoisonError::into_inner) = Some((name, 0));
            Self
        }

        /// Whether a thread waits.
        #[must_use]
        pub fn is_met(&self) -> bool {
            let held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
            held.is_some_and(|(_, waiting)| waiting > 0)
        }
    }

    impl Drop for Hold {
        fn drop(&mut self) {
            *HELD.lock().unwrap_or_else(PoisonError::into_inner) = None;
            RELEASED.notify_all();
        }
    }

    fn wait() {
        let own = thread::current();
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((name, waiting)) = &mut *held
            && own.name() == Some(*name)
        {
            *waiting += 1;
            held = RELEASED.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the call fail that comes after so many others, once; tells which one
    /// failed since the last time.
    pub fn arm(after: Option<u32>) -> Option<Operation> {
        COUNTDOWN.store(after.map_or(-1, i64::from), Ordering::SeqCst);
        FAILED.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Kills the process at the call that comes after so many others.
    pub fn arm_to_kill(after: u32) {
        KILLS.store(true, Ordering::SeqCst);
        COUNTDOWN.store(i64::from(after), Ordering::SeqCst);
    }

    /// Lets no call fail any more; [`arm`] still tells which one did.
    pub fn stop() {
        COUNTDOWN.store(-1, Ordering::SeqCst);
    }

    /// Fails where a test wants this call to fail.
    ///
    /// # Errors
    ///
    /// ENOMEM, if so armed.
    pub fn point(operation: Operation) -> io::Result<()> {
        wait();
        if COUNTDOWN.fetch_sub(1, Ordering::SeqCst) != 0 {
            return Ok(());
        }
        if KILLS.load(Ordering::SeqCst) {
            let _ = kill_process(getpid(), Signal::KILL);
        }
        *FAILED.lock().unwrap_or_else(PoisonError::into_inner) = Some(operation);
        Err(io::Error::from_raw_os_error(libc::ENOMEM))
    }
}
