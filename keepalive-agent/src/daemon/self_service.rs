//! Self-service: the socket on which users ask for a policy for a command of their
//! own, and for nothing else. The control socket stays root's.
//!
//! Everybody may connect, so everything is bounded: how many connections are
//! looked at a second, how many wait, of one user and of all, how long each may
//! take and how much it may say. Who asks is known from the kernel.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, Permissions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::fs::{AtFlags, Mode, OFlags, fstatfs, open, openat, statat};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::mpsc::{Receiver, Sender, channel},
    task::AbortHandle,
    time::{sleep, timeout},
};
use tracing::debug;

use super::ownership;
use crate::{
    config::Wish,
    grant::PREFIX,
    hierarchy::{CGROUP2_SUPER_MAGIC, Cgroup, CgroupPath, Hierarchy},
};

/// Where the sockets are: everybody may enter, root alone may write. Not in the
/// agents' own directory, which stays closed.
pub const DIRECTORY: &str = "/run/keepalive-exec";

/// Longest path of a cgroup, in bytes.
pub const LONGEST_PATH: usize = 512;

/// Longer requests are no requests: such a path, each byte escaped, and a wish.
const LONGEST: u64 = 6 * LONGEST_PATH as u64 + 1024;

/// For a client that does not say what it wants, or does not listen.
const PATIENCE: Duration = Duration::from_millis(500);

/// Between two connections that are looked at: all users together cannot keep an
/// agent busy.
const PAUSE: Duration = Duration::from_millis(5);

/// Connections that wait at a time.
const MOST_WAITING: usize = 32;
const MOST_WAITING_OF_USER: usize = 4;

/// What a user asks for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The cgroup of the command.
    pub cgroup: CgroupPath,
    /// The policy that it is to have.
    pub wish: Wish,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The policy is in force for every connection that is made from now on.
    Granted,
    /// Not now; the same may be asked again.
    Busy(String),
    /// Why not.
    Refused(String),
}

/// The file of the socket of the agent of a cgroup.
#[must_use]
pub fn socket_path(cgroup: &CgroupPath) -> PathBuf {
    Path::new(DIRECTORY).join(ownership::name(cgroup) + ".sock")
}

/// The end at which an agent is asked.
#[derive(Debug)]
pub struct SelfServiceSocket {
    asked: Receiver<Asked>,
    listening: AbortHandle,
    path: PathBuf,
}

impl SelfServiceSocket {
    /// Listens for one who owns the cgroup.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn listen(cgroup: &CgroupPath) -> io::Result<Self> {
        directory()?;
        let path = socket_path(cgroup);
        let listener = ownership::listen_at(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o666))?;
        let (sender, asked) = channel(1);
        let listening = tokio::spawn(listen(listener, sender)).abort_handle();
        Ok(Self {
            asked,
            listening,
            path,
        })
    }

    /// Waits for a request. May be dropped while it waits: none is lost by that.
    pub async fn asked(&mut self) -> Option<Asked> {
        self.asked.recv().await
    }
}

impl Drop for SelfServiceSocket {
    fn drop(&mut self) {
        self.listening.abort();
        // Nobody can do anything about it.
        let _ = fs::remove_file(&self.path);
    }
}

/// Makes the directory, or checks the one that is there.
fn directory() -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(DIRECTORY)?;
    let found = fs::symlink_metadata(DIRECTORY)?;
    let is_ours = found.is_dir()
        && found.uid() == rustix::process::geteuid().as_raw()
        && found.mode() & 0o022 == 0;
    if !is_ours {
        return Err(io::Error::other(format!(
            "{DIRECTORY} is not used: it belongs to another user, or others may write to it"
        )));
    }
    // Whatever the umask was.
    fs::set_permissions(DIRECTORY, Permissions::from_mode(0o755))
}

/// Connections that wait, by user.
type Waiting = Arc<Mutex<HashMap<u32, usize>>>;

/// One of those that wait, for as long as it does.
#[derive(Debug)]
struct Place {
    waiting: Waiting,
    uid: u32,
}

impl Place {
    fn take(waiting: &Waiting, uid: u32) -> Option<Self> {
        let mut of_user = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if of_user.values().sum::<usize>() >= MOST_WAITING {
            return None;
        }
        let own = of_user.entry(uid).or_default();
        if *own >= MOST_WAITING_OF_USER {
            return None;
        }
        *own += 1;
        Some(Self {
            waiting: waiting.clone(),
            uid,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut of_user = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = of_user.get_mut(&self.uid) {
            *own -= 1;
            if *own == 0 {
                of_user.remove(&self.uid);
            }
        }
    }
}

/// A request that waits for its answer.
#[derive(Debug)]
pub struct Asked {
    /// Who asks.
    pub uid: u32,
    /// What is asked for.
    pub request: Request,
    stream: UnixStream,
    place: Place,
}

impl Asked {
    /// Answers; whoever asked may be gone.
    pub fn answer(self, answer: &Answer) {
        let Self {
            mut stream, place, ..
        } = self;
        let mut line = serde_json::to_vec(answer).unwrap_or_default();
        line.push(b'\n');
        tokio::spawn(async move {
            let _ = timeout(PATIENCE, stream.write_all(&line)).await;
            drop(place);
        });
    }
}

async fn listen(listener: UnixListener, asked: Sender<Asked>) {
    /// Such as no descriptors: that may get better.
    const AFTER_ERROR: Duration = Duration::from_secs(1);
    let waiting = Waiting::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Of others there are enough, and root needs no agent. In a
                // container, root is everybody's name.
                if let Ok(peer) = stream.peer_cred()
                    && peer.uid() != 0
                    && let Some(place) = Place::take(&waiting, peer.uid())
                {
                    tokio::spawn(read(stream, peer.uid(), place, asked.clone()));
                }
                sleep(PAUSE).await;
            }
            Err(error) => {
                debug!("accepting a user's request: {error}");
                sleep(AFTER_ERROR).await;
            }
        }
    }
}

/// Reads the request of a user and hands it on.
async fn read(mut stream: UnixStream, uid: u32, place: Place, asked: Sender<Asked>) {
    let reading = async {
        let mut line = Vec::new();
        let mut limited = (&mut stream).take(LONGEST);
        while !line.ends_with(b"\n") {
            if limited.read_buf(&mut line).await.ok()? == 0 {
                return None;
            }
        }
        serde_json::from_slice(&line).ok()
    };
    let Ok(Some(request)) = timeout(PATIENCE, reading).await else {
        return;
    };
    let asking = asked.send(Asked {
        uid,
        request,
        stream,
        place,
    });
    // The agent may be doing something that takes longer.
    let _ = timeout(PATIENCE * 10, asking).await;
}

/// The cgroup that a user asks for, if it is one that may be asked for: made for a
/// command by this user, below `root`, and empty.
///
/// # Errors
///
/// Why it is not.
pub fn own_cgroup(
    hierarchy: &Hierarchy,
    root: &CgroupPath,
    path: &CgroupPath,
    uid: u32,
) -> Result<Cgroup, String> {
    let refused = |why: &str| Err(format!("cgroup {path} {why}"));
    let name = path.as_bytes().rsplit(|byte| *byte == b'/').next();
    if !name.is_some_and(|name| name.starts_with(PREFIX.as_bytes())) {
        return refused("was not made for a command");
    }
    // No `..` and the like: policies are found by the path.
    if hierarchy.path(path.as_path()).ok().as_ref() != Some(path) {
        return refused("is not written as the kernel writes it");
    }
    if path.as_bytes().len() > LONGEST_PATH {
        return refused("has too long a path");
    }
    if !root.contains(path) || root == path {
        return refused("is not below what this agent governs");
    }
    let cannot = |error: rustix::io::Errno| {
        format!(
            "cgroup {path} cannot be looked at: {}",
            io::Error::from(error)
        )
    };
    let directory = open_below(hierarchy, path).map_err(cannot)?;
    // What was opened, whatever becomes of the path.
    let found = statat(&directory, "", AtFlags::EMPTY_PATH).map_err(cannot)?;
    let kind = fstatfs(&directory).map_err(cannot)?;
    if kind.f_type != CGROUP2_SUPER_MAGIC {
        // Something is mounted over it, or over what it is in.
        return refused("is not on the cgroup file system");
    }
    if found.st_uid != uid {
        return refused("does not belong to whoever asks");
    }
    let cgroup = Cgroup {
        path: path.clone(),
        id: found.st_ino,
    };
    if hierarchy.has_processes(&cgroup) {
        return refused("has processes already");
    }
    Ok(cgroup)
}

/// Opens the directory of a cgroup, through no link. Name by name: openat2(2) is
/// kept from the agent by `RestrictSUIDSGID` of its unit.
fn open_below(hierarchy: &Hierarchy, path: &CgroupPath) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mount = open(hierarchy.mount(), flags, Mode::empty())?;
    let mut names = path.relative().iter();
    names.try_fold(mount, |above, name| {
        openat(&above, name, flags, Mode::empty())
    })
}

/// Asks the agent of a cgroup for a policy; none where there is none that lets
/// users ask.
///
/// # Errors
///
/// When it does not answer.
pub fn ask(cgroup: &CgroupPath, request: &Request) -> io::Result<Option<Answer>> {
    use std::io::{BufRead as _, BufReader, Write as _};
    /// An agent answers between two things that it does.
    const PATIENCE: Duration = Duration::from_secs(10);
    let stream = match std::os::unix::net::UnixStream::connect(socket_path(cgroup)) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    (&stream).write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    if answer.is_empty() {
        return Ok(Some(Answer::Busy(
            "the agent has too many such requests".to_owned(),
        )));
    }
    Ok(Some(serde_json::from_str(&answer)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_given_back() {
        let waiting = Waiting::default();
        let own: Vec<_> = (0..MOST_WAITING_OF_USER)
            .map(|_| Place::take(&waiting, 1).unwrap())
            .collect();
        assert!(Place::take(&waiting, 1).is_none());
        let mut others: Vec<_> = (2..).map_while(|uid| Place::take(&waiting, uid)).collect();
        assert_eq!(own.len() + others.len(), MOST_WAITING);
        others.pop();
        drop(own);
        assert!(Place::take(&waiting, 1).is_some());
        drop(others);
        assert!(waiting.lock().unwrap().is_empty());
    }
}
