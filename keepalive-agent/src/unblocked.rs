//! Unblocked: standard output and standard error that nobody has to read.
//!
//! What cannot be written at once is kept, up to a limit, and written as it is read
//! ([`drain`]); what is more is dropped and counted: a full pipe, a stopped terminal
//! or a full disk neither ends nor holds up whoever writes.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io::{self, Write},
    os::fd::{AsFd as _, AsRawFd, BorrowedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::write,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};
use tracing_subscriber::fmt::MakeWriter;

/// Bytes that are kept for a reader that is slow, besides the message that it reads:
/// one message is kept whatever its size, as the policies of a large config are one.
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
    /// How many bytes there may be.
    limit: usize,
    dropped: u64,
    broken: Option<String>,
}

struct Queue {
    pending: Mutex<Pending>,
    /// That something is kept.
    kept: Notify,
}

static OUTPUT: Queue = Queue::new();
static ERROR: Queue = Queue::new();

impl Queue {
    const fn new() -> Self {
        Self {
            pending: Mutex::new(Pending::new()),
            kept: Notify::const_new(),
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something with a descriptor, to be waited for. It keeps its descriptor open.
///
/// # Errors
///
/// When the descriptor cannot be waited for, as that of a file cannot.
///
/// # Panics
///
/// Outside of a runtime of tokio that drives input and output.
pub fn awaited<T: AsRawFd>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the owner keeps its descriptor open"
    )]
    AsyncFd::with_interest(owner, interest)
}

/// Writes what is kept of both streams as it is read. Never ends, and sleeps while
/// nothing is kept or nobody reads.
///
/// # Panics
///
/// Outside of a runtime of tokio that drives input and output.
pub async fn drain() -> Infallible {
    tokio::join!(Stream::Output.drain(), Stream::Error.drain()).0
}

impl Pending {
    const fn new() -> Self {
        Self {
            bytes: VecDeque::new(),
            limit: 0,
            dropped: 0,
            broken: None,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.bytes.is_empty() {
            self.bytes.shrink_to(KEPT);
            self.limit = bytes.len() + KEPT;
        }
        if self.bytes.len() + bytes.len() > self.limit {
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
    fn queue(self) -> &'static Queue {
        match self {
            Self::Output => &OUTPUT,
            Self::Error => &ERROR,
        }
    }

    fn with_fd<T>(self, with: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
        match self {
            Self::Output => with(io::stdout().as_fd()),
            Self::Error => with(io::stderr().as_fd()),
        }
    }

    /// Writes what can be written without waiting, and keeps the rest.
    pub fn send(self, bytes: &[u8]) {
        self.queue().pending().push(bytes);
        if self.flush_at_once() {
            self.queue().kept.notify_one();
        }
    }

    /// Writes what can be written without waiting; whether something is left.
    fn flush_at_once(self) -> bool {
        let mut pending = self.queue().pending();
        self.with_fd(|fd| pending.flush(fd, Instant::now()));
        !pending.bytes.is_empty()
    }

    async fn drain(self) -> Infallible {
        loop {
            self.queue().kept.notified().await;
            // What cannot be waited for is tried again with the next message.
            let _ = self.drain_once().await;
        }
    }

    async fn drain_once(self) -> io::Result<()> {
        let fd = self.with_fd(|fd| fd.try_clone_to_owned())?;
        let fd = awaited(fd, Interest::WRITABLE)?;
        loop {
            let mut writable = fd.writable().await?;
            if !self.flush_at_once() {
                return Ok(());
            }
            writable.clear_ready();
        }
    }

    /// Waits so long at the most for what is kept to be taken.
    pub fn finish(self, patience: Duration) {
        let mut pending = self.queue().pending();
        self.with_fd(|fd| pending.flush(fd, Instant::now() + patience));
    }

    /// How many messages were dropped, and why the last one could not be written.
    #[must_use]
    pub fn dropped(self) -> (u64, Option<String>) {
        let pending = self.queue().pending();
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
