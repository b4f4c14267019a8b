//! Renames: containers that are called something else while they run.
//!
//! docker writes what it knows of a container anew whenever that changes, and puts it in
//! the place of the old file. podman does so with the names of all containers together,
//! also when one comes or goes. Pods cannot be renamed.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::Errno,
};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::debug;

use crate::{
    hierarchy::CgroupPath,
    identity::{DOCKER_FILE, NamesFile, STORED, stored_names},
    names::printable_path,
    unblocked::awaited,
};

/// Events that are read before others have a turn.
const MOST_EVENTS: usize = 1024;

/// Watches the files of containers.
#[derive(Debug)]
pub(super) struct Renames {
    inotify: AsyncFd<OwnedFd>,
    /// By the descriptors of the watches.
    watched: HashMap<i32, Followed>,
}

#[derive(Debug)]
enum Followed {
    /// A container of docker's.
    Docker(CgroupPath),
    /// A storage of podman's: its directory, and its containers by their ids.
    Podman(PathBuf, HashMap<String, FollowedContainer>),
}

/// A container in a storage.
#[derive(Debug)]
struct FollowedContainer {
    cgroup: CgroupPath,
    /// What it was called when the names of all were read last.
    name: Option<String>,
}

impl Followed {
    fn cgroups(&self) -> Vec<&CgroupPath> {
        match self {
            Self::Docker(cgroup) => vec![cgroup],
            Self::Podman(_, containers) => {
                containers.values().map(|stored| &stored.cgroup).collect()
            }
        }
    }

    /// The containers that may be called something else, now that this file of the
    /// directory was written.
    fn written(&mut self, file: &[u8]) -> Vec<CgroupPath> {
        match self {
            Self::Docker(cgroup) if file == DOCKER_FILE.as_bytes() => vec![cgroup.clone()],
            Self::Podman(directory, containers)
                if STORED.iter().any(|name| name.as_bytes() == file) =>
            {
                let mut names = stored_names(directory);
                let others = containers.iter_mut().filter_map(|(id, stored)| {
                    let now = names.remove(id);
                    let is_other = now != stored.name;
                    stored.name = now;
                    is_other.then(|| stored.cgroup.clone())
                });
                others.collect()
            }
            _ => Vec::new(),
        }
    }
}

impl Renames {
    pub(super) fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        Ok(Self {
            inotify: awaited(inotify, Interest::READABLE)?,
            watched: HashMap::new(),
        })
    }

    /// Watches the container whose cgroup this is, if it is one of docker's or podman's.
    /// To be called before its names are read.
    pub(super) fn watch(&mut self, cgroup: &CgroupPath) {
        match NamesFile::of(cgroup.as_bytes()) {
            Some(NamesFile::Docker(directories)) => {
                let mut directories = directories.iter();
                if let Some(descriptor) = directories.find_map(|path| self.add(path)) {
                    self.watched
                        .insert(descriptor, Followed::Docker(cgroup.clone()));
                }
            }
            Some(NamesFile::Podman(directory, id)) => {
                let Some(descriptor) = self.add(&directory) else {
                    return;
                };
                let storage = || Followed::Podman(directory, HashMap::new());
                let storage = self.watched.entry(descriptor).or_insert_with(storage);
                if let Followed::Podman(_, containers) = storage {
                    let (cgroup, name) = (cgroup.clone(), None);
                    containers.insert(id, FollowedContainer { cgroup, name });
                }
            }
            None => {}
        }
    }

    /// Watches a directory, if it is there.
    fn add(&self, directory: &Path) -> Option<i32> {
        let flags = WatchFlags::MOVED_TO | WatchFlags::ONLYDIR | WatchFlags::DONT_FOLLOW;
        match inotify::add_watch(&self.inotify, directory, flags) {
            Ok(descriptor) => Some(descriptor),
            Err(Errno::NOENT | Errno::NOTDIR) => None,
            Err(error) => {
                debug!("watching {}: {error}", printable_path(directory));
                None
            }
        }
    }

    /// Forgets a cgroup that is gone.
    pub(super) fn forget(&mut self, cgroup: &CgroupPath) {
        self.watched.retain(|descriptor, watched| {
            let stays = match watched {
                Followed::Docker(own) => own != cgroup,
                Followed::Podman(_, containers) => {
                    containers.retain(|_, stored| stored.cgroup != *cgroup);
                    !containers.is_empty()
                }
            };
            if !stays {
                // The kernel may have done so, as the directory is gone.
                let _ = inotify::remove_watch(&self.inotify, *descriptor);
            }
            stays
        });
    }

    /// All cgroups that are watched.
    pub(super) fn watched(&self) -> BTreeSet<CgroupPath> {
        let all = self.watched.values().flat_map(Followed::cgroups);
        all.cloned().collect()
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
            let mut written = BTreeSet::<(i32, Vec<u8>)>::new();
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
                        if let Some(name) = event.file_name() {
                            written.insert((event.wd(), name.to_bytes().to_owned()));
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
            let mut renamed = BTreeSet::new();
            for (descriptor, file) in written {
                if let Some(watched) = self.watched.get_mut(&descriptor) {
                    renamed.extend(watched.written(&file));
                }
            }
            if !renamed.is_empty() {
                return Ok(renamed);
            }
        }
    }
}
