//! Renames: containers that are called something else while they run.
//!
//! docker writes what it knows of a container anew whenever that changes, and puts
//! it in the place of the old file. Of podman nobody is told; pods cannot be renamed.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
};

use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::Errno,
};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::debug;

use crate::{
    hierarchy::CgroupPath,
    identity::{DOCKER_FILE, docker_directories},
    names::printable_path,
    unblocked::awaited,
};

/// Events that are read before others have a turn.
const MOST_EVENTS: usize = 1024;

/// Watches the files of containers.
#[derive(Debug)]
pub(super) struct Renames {
    inotify: AsyncFd<OwnedFd>,
    watched: HashMap<i32, CgroupPath>,
}

impl Renames {
    pub(super) fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        Ok(Self {
            inotify: awaited(inotify, Interest::READABLE)?,
            watched: HashMap::new(),
        })
    }

    /// Watches the container whose cgroup this is, if it is one of docker's. To be
    /// called before its names are read.
    pub(super) fn watch(&mut self, cgroup: &CgroupPath) {
        for directory in docker_directories(cgroup.as_bytes()) {
            let flags = WatchFlags::MOVED_TO | WatchFlags::ONLYDIR | WatchFlags::DONT_FOLLOW;
            match inotify::add_watch(&self.inotify, &directory, flags) {
                Ok(descriptor) => {
                    self.watched.insert(descriptor, cgroup.clone());
                    return;
                }
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(error) => debug!("watching {}: {error}", printable_path(&directory)),
            }
        }
    }

    /// Forgets a cgroup that is gone.
    pub(super) fn forget(&mut self, cgroup: &CgroupPath) {
        self.watched.retain(|descriptor, watched| {
            let stays = watched != cgroup;
            if !stays {
                // The kernel may have done so, as the directory is gone.
                let _ = inotify::remove_watch(&self.inotify, *descriptor);
            }
            stays
        });
    }

    /// All cgroups that are watched.
    pub(super) fn watched(&self) -> BTreeSet<CgroupPath> {
        self.watched.values().cloned().collect()
    }

    /// Waits until containers may be called something else; their cgroups. May be
    /// dropped while it waits: nothing is lost by that.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked any more.
    pub(super) async fn next(&mut self) -> io::Result<BTreeSet<CgroupPath>> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(ready.get_inner(), &mut buffer);
            let mut written = BTreeSet::new();
            let mut events = 0;
            let is_lost = loop {
                if events == MOST_EVENTS {
                    // What was read into the buffer is lost with it.
                    break true;
                }
                events += 1;
                match reader.next() {
                    Ok(event) => {
                        if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
                            break true;
                        }
                        let name = event.file_name().map(std::ffi::CStr::to_bytes);
                        if name == Some(DOCKER_FILE.as_bytes()) {
                            written.extend(self.watched.get(&event.wd()).cloned());
                        }
                    }
                    Err(Errno::AGAIN) => {
                        ready.clear_ready();
                        break false;
                    }
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            };
            if is_lost {
                return Ok(self.watched());
            }
            if !written.is_empty() {
                return Ok(written);
            }
        }
    }
}
