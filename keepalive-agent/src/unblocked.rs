//! Unblocked: standard output and standard error that nobody has to read.
//!
//! What cannot be written at once is kept, up to a limit, and what is more is
//! dropped and counted: a full pipe, a stopped terminal or a full disk neither
//! ends nor holds up whoever writes.

use std::{
    collections::VecDeque,
    io::{self, Write},
    os::fd::{AsFd as _, BorrowedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::write,
};
use tracing_subscriber::fmt::MakeWriter;

/// Bytes that are kept for a reader that is slow.
const KEPT: usize = 256 * 1024;

/// A pipe that is ready takes this much without waiting (`PIPE_BUF`; a terminal
/// takes what fits and says so).
const AT_ONCE: usize = 4096;

/// Which stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Output,
    /// Standard error.
    Error,
}

#[derive(Debug, Default)]
struct Pending {
    bytes: VecDeque<u8>,
    dropped: u64,
    broken: Option<String>,
}

static OUTPUT: Mutex<Pending> = Mutex::new(Pending::new());
static ERROR: Mutex<Pending> = Mutex::new(Pending::new());

impl Pending {
    const fn new() -> Self {
        Self {
            bytes: VecDeque::new(),
            dropped: 0,
            broken: None,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        // One message is kept whatever its size: the policies of a large config are
        // one.
        if !self.bytes.is_empty() && self.bytes.len() + bytes.len() > KEPT {
            self.dropped += 1;
        } else {
            self.bytes.extend(bytes);
        }
    }

    /// Writes what can be written now, or by `deadline`.
    fn flush(&mut self, to: BorrowedFd<'_>, deadline: Instant) {
        while !self.bytes.is_empty() && is_ready(to, deadline) {
            let (first, _) = self.bytes.as_slices();
            let part = first.get(..first.len().min(AT_ONCE)).unwrap_or(first);
            match write(to, part) {
                Ok(written) => {
                    self.bytes.drain(..written);
                    self.broken = None;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(error) => {
                    // Nobody will ever read this, or it does not fit anywhere.
                    self.bytes.clear();
                    self.dropped += 1;
                    self.broken = Some(io::Error::from(error).to_string());
                    return;
                }
            }
        }
    }
}

fn is_ready(to: BorrowedFd<'_>, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    let mut waited = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
    matches!(poll(&mut waited, Some(&left)), Ok(1..))
}

impl Stream {
    fn pending(self) -> MutexGuard<'static, Pending> {
        let pending = match self {
            Self::Output => &OUTPUT,
            Self::Error => &ERROR,
        };
        pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_fd<T>(self, with: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
        match self {
            Self::Output => with(io::stdout().as_fd()),
            Self::Error => with(io::stderr().as_fd()),
        }
    }

    /// Writes what can be written without waiting, and keeps the rest.
    pub fn send(self, bytes: &[u8]) {
        let mut pending = self.pending();
        pending.push(bytes);
        self.with_fd(|fd| pending.flush(fd, Instant::now()));
    }

    /// Waits so long at the most for what is kept to be taken.
    pub fn finish(self, patience: Duration) {
        let mut pending = self.pending();
        self.with_fd(|fd| pending.flush(fd, Instant::now() + patience));
    }

    /// How many messages were dropped, and why the last one could not be written.
    #[must_use]
    pub fn dropped(self) -> (u64, Option<String>) {
        let pending = self.pending();
        (pending.dropped, pending.broken.clone())
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Stream {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}
