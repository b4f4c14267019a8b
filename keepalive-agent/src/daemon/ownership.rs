//! Ownership: one agent for each cgroup at a time.
//!
//! A lock file says whether an agent lives, whatever pid namespace it is in; the
//! kernel releases the lock however the agent ends. It is named by the path of
//! the cgroup, which stays when the cgroup goes and comes.
//!
//! The file also notes which config gave existing connections their values: where
//! enforcement ends with the agent nothing of that is left in the kernel, and the
//! next one would take them for the applications' own.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::net::UnixListener;
use tracing::debug;

use crate::{config::Config, datapath::Owner, hierarchy::CgroupPath};

/// Where agents leave what others need to find them: gone with the boot, as
/// cgroups are.
pub const DIRECTORY: &str = "/run/keepalive";

/// Why a cgroup cannot be owned.
#[derive(Debug, Error)]
pub enum Error {
    /// Another agent has it.
    #[error(
        "agent {pid} enforces on {cgroup} already: stop it, or take over from it with --take-over"
    )]
    Taken {
        /// Its process id, in its own pid namespace.
        pid: u32,
        /// The cgroup.
        cgroup: CgroupPath,
    },
    /// The directory or file is somebody else's.
    #[error("{path} is not used: {why}", path = path.display())]
    Untrusted {
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The lock cannot be made.
    #[error("locking {path}", path = path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Listens at a path of which whoever holds the lock disposes: a socket that is
/// there is that of an agent that is gone.
///
/// # Errors
///
/// When the socket cannot be made.
///
/// # Panics
///
/// Outside of a tokio runtime.
pub fn listen_at(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

/// The lock of a cgroup. Dropping it lets another agent have it.
#[derive(Debug)]
pub struct Ownership {
    lock: File,
    note: Note,
}

/// What the file says.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct Note {
    /// Process id of the agent that has the lock, or had it last.
    pid: u32,
    /// The config that existing connections were brought along by.
    given: Option<Arc<Config>>,
}

impl Note {
    fn read(file: &mut File) -> Self {
        let mut text = Vec::new();
        // What was cut off by a full file system says nothing.
        let read = file.rewind().and_then(|()| file.read_to_end(&mut text));
        let note = read.ok().and_then(|_| serde_json::from_slice(&text).ok());
        note.unwrap_or_default()
    }
}

/// The name of an agent's files, from the path of its cgroup.
pub(super) fn name(cgroup: &CgroupPath) -> String {
    // FNV-1a: paths may be longer than names can be.
    let hash = cgroup
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("{hash:016x}")
}

/// The file of an agent's control socket.
#[must_use]
pub fn socket_path(cgroup: &CgroupPath) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{}.sock", name(cgroup)))
}

fn lock_path(cgroup: &CgroupPath) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{}.lock", name(cgroup)))
}

/// Makes the directory, or checks the one that is there: nothing in one that
/// others may write to can be believed.
fn directory() -> Result<(), Error> {
    let path = || PathBuf::from(DIRECTORY);
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(DIRECTORY);
    let found = made.and_then(|()| fs::symlink_metadata(DIRECTORY));
    let found = found.map_err(|source| Error::Lock {
        path: path(),
        source,
    })?;
    let why = if !found.is_dir() {
        "it is not a directory"
    } else if found.uid() != rustix::process::geteuid().as_raw() {
        "it belongs to another user"
    } else if found.mode() & 0o022 != 0 {
        "others may write to it"
    } else {
        return Ok(());
    };
    Err(Error::Untrusted { path: path(), why })
}

/// Opens a file of an agent, never through a link and never waiting for whoever
/// is at its other end.
fn open_file(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file: OwnedFd = open(path, flags, Mode::RUSR | Mode::WUSR)?;
    let file = File::from(file);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a plain file"));
    }
    Ok(file)
}

impl Ownership {
    /// Takes the lock of a cgroup, and waits so long at the most for whoever has it.
    ///
    /// # Errors
    ///
    /// [`Error::Taken`] when another agent has it.
    pub fn acquire(cgroup: &CgroupPath, patience: Duration) -> Result<Self, Error> {
        const PAUSE: Duration = Duration::from_millis(10);
        let end = Instant::now() + patience;
        loop {
            match Self::try_acquire(cgroup) {
                Err(Error::Taken { .. }) if Instant::now() < end => thread::sleep(PAUSE),
                other => return other,
            }
        }
    }

    fn try_acquire(cgroup: &CgroupPath) -> Result<Self, Error> {
        directory()?;
        let path = lock_path(cgroup);
        let locking = |source| Error::Lock {
            path: path.clone(),
            source,
        };
        let mut lock = open_file(&path, OFlags::RDWR | OFlags::CREATE).map_err(locking)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::Taken {
                    pid: Note::read(&mut lock).pid,
                    cgroup: cgroup.clone(),
                });
            }
            Err(error) => return Err(locking(error.into())),
        }
        let note = Note {
            pid: std::process::id(),
            ..Note::read(&mut lock)
        };
        let mut owned = Self { lock, note };
        owned.write();
        Ok(owned)
    }

    /// The config that an agent before this one gave existing connections their
    /// values by, if it is known.
    #[must_use]
    pub const fn given(&self) -> Option<&Arc<Config>> {
        self.note.given.as_ref()
    }

    /// A config is in force. What is known of an earlier one is more, until every
    /// connection has been brought along.
    pub fn begin(&mut self, config: &Arc<Config>) {
        if self.note.given.is_none() {
            self.finish(config);
        }
    }

    /// Every connection has been brought along by a config.
    pub fn finish(&mut self, config: &Arc<Config>) {
        if self.note.given.as_ref() != Some(config) {
            self.note.given = Some(config.clone());
            self.write();
        }
    }

    /// Writes the note. Where that fails the lock still counts.
    fn write(&mut self) {
        let text = serde_json::to_vec(&self.note).unwrap_or_default();
        let written = self
            .lock
            .set_len(0)
            .and_then(|()| self.lock.rewind())
            .and_then(|()| self.lock.write_all(&text));
        if let Err(error) = written {
            debug!("writing the lock file: {error}");
        }
    }

    /// Whether an agent has the lock of a cgroup. None where that cannot be told.
    #[must_use]
    pub fn is_taken(cgroup: &CgroupPath) -> Option<bool> {
        directory().ok()?;
        match open_file(&lock_path(cgroup), OFlags::RDONLY) {
            Ok(lock) => Some(flock(&lock, FlockOperation::NonBlockingLockShared).is_err()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(false),
            Err(_) => None,
        }
    }
}

/// This process.
#[must_use]
pub fn own() -> Owner {
    let pid = std::process::id();
    Owner {
        pid,
        started: started(pid).unwrap_or_default(),
    }
}

/// Whether an agent that a policy set names lives, in whatever pid namespace.
#[must_use]
pub fn lives(owner: &Owner, cgroup: &CgroupPath) -> bool {
    runs(owner) || Ownership::is_taken(cgroup) == Some(true)
}

/// Whether it runs in this pid namespace.
#[must_use]
pub fn runs(owner: &Owner) -> bool {
    started(owner.pid) == Some(owner.started)
}

/// When a process was started, in clock ticks since boot (`starttime` in
/// proc_pid_stat(5)).
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything, parentheses and spaces too.
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = str::from_utf8(stat.get(end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives() {
        let own = own();
        assert_ne!(own.started, 0);
        assert!(lives(&own, &"/no/such/cgroup".into()));
        let gone = Owner {
            started: own.started + 1,
            ..own
        };
        assert!(!lives(&gone, &"/no/such/cgroup".into()));
    }

    #[test]
    fn names_are_short_and_differ() {
        let long = "/x".repeat(2000);
        assert_eq!(name(&long.as_str().into()).len(), 16);
        assert_ne!(name(&"/a".into()), name(&"/b".into()));
    }
}
