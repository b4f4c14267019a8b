//! Network namespaces: every one that can be found, each once.
//!
//! A namespace has no list of its own in the kernel. It shows where something
//! holds it: a process, a bind mount (as `ip netns` makes them below
//! /run/netns), or an open file descriptor.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use keepalive_common::environment::Environment;
use rustix::{
    fs::{Dir, Mode, OFlags, open, readlinkat},
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::kernel::layout::jiffies_per_second;

/// The namespace of this process.
pub const OWN: &str = "/proc/self/ns/net";

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its inode number, as `/proc/PID/ns/net` shows it.
    pub id: u64,
    /// What to call it: `host` for the agent's own, the name of its file (as
    /// `ip netns` shows it), or `pid 123` of a process in it.
    pub name: String,
    /// Where to enter it; none for the one that the agent is in.
    path: Option<PathBuf>,
}

/// All namespaces that can be found, the agent's own first.
///
/// One that is held by nothing but sockets, after all its processes and mounts
/// are gone, cannot be found; nor one that is held only by a descriptor beyond
/// the first thousand of a process.
///
/// # Errors
///
/// When not even the own one can be read.
pub fn all() -> Result<Vec<Namespace>> {
    find(None)
}

/// The same for one who knows already which descriptors of which processes hold
/// namespaces: looking at every descriptor of every process takes longer than
/// everything else where there are many.
///
/// # Errors
///
/// As [`all`].
pub fn all_with(descriptors: &[Descriptor]) -> Result<Vec<Namespace>> {
    find(Some(descriptors))
}

/// A file descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Process id.
    pub process: u32,
    /// Its number there.
    pub number: u32,
}

fn find(descriptors: Option<&[Descriptor]>) -> Result<Vec<Namespace>> {
    let own = PathBuf::from(OWN);
    let id = fs::metadata(&own)
        .with_context(|| format!("reading {}: is /proc mounted?", own.display()))?
        .ino();
    let mut found = Found(BTreeMap::new());
    found.0.insert(
        id,
        Namespace {
            id,
            name: "host".to_owned(),
            path: None,
        },
    );
    found.mounted();
    found.of_processes(descriptors);
    let mut namespaces: Vec<_> = found.0.into_values().collect();
    namespaces.sort_by_key(|namespace| (namespace.id != id, namespace.name.clone()));
    Ok(namespaces)
}

struct Found(BTreeMap<u64, Namespace>);

impl Found {
    /// The first name holds.
    fn add(&mut self, id: u64, name: String, path: PathBuf) {
        self.0.entry(id).or_insert(Namespace {
            id,
            name,
            path: Some(path),
        });
    }

    /// Bind mounts, wherever they are in this mount namespace.
    fn mounted(&mut self) {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for path in mounts_of_namespaces(&mountinfo) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if let Ok(metadata) = fs::metadata(&path) {
                self.add(metadata.ino(), name.into_owned(), path);
            }
        }
    }

    /// Who holds namespaces open (container runtimes, mostly) does so with a
    /// few descriptors; who has a hundred thousand has sockets.
    const DESCRIPTORS: usize = 1024;

    /// Namespaces that processes are in, and those that they hold open. What
    /// vanishes meanwhile, or is not ours to see, is passed over.
    fn of_processes(&mut self, descriptors: Option<&[Descriptor]>) {
        let Ok(entries) = fs::read_dir("/proc") else {
            return;
        };
        let processes: Vec<u32> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        for process in &processes {
            self.linked(*process, &format!("/proc/{process}/ns/net"));
        }
        if let Some(descriptors) = descriptors {
            for Descriptor { process, number } in descriptors {
                self.linked(*process, &format!("/proc/{process}/fd/{number}"));
            }
            return;
        }
        for process in &processes {
            // What vanishes meanwhile, or is not ours to see, is passed over.
            let _ = self.held_open(*process);
        }
    }

    /// Namespaces that a process holds open.
    fn held_open(&mut self, process: u32) -> rustix::io::Result<()> {
        let path = format!("/proc/{process}/fd");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(&path, flags, Mode::empty())?;
        let mut target = Vec::new();
        for entry in Dir::read_from(&directory)?.take(Self::DESCRIPTORS) {
            let name = entry?;
            let name = name.file_name();
            // From here on the kernel need not find the process each time.
            let Ok(link) = readlinkat(&directory, name, target) else {
                target = Vec::new();
                continue;
            };
            if let (Some(id), Ok(name)) =
                (namespace_of_link(&link.to_string_lossy()), name.to_str())
            {
                self.add(
                    id,
                    format!("pid {process}"),
                    PathBuf::from(&path).join(name),
                );
            }
            target = link.into_bytes();
        }
        Ok(())
    }

    /// A link in /proc that may lead to a network namespace.
    fn linked(&mut self, process: u32, path: &str) {
        let id = fs::read_link(path)
            .ok()
            .and_then(|target| namespace_of_link(target.to_str()?));
        if let Some(id) = id {
            self.add(id, format!("pid {process}"), PathBuf::from(path));
        }
    }
}

/// Mount points of network namespaces.
fn mounts_of_namespaces(mountinfo: &str) -> impl Iterator<Item = PathBuf> {
    mountinfo.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let root = fields.nth(3)?;
        let mount = fields.next()?;
        root.starts_with("net:[").then(|| PathBuf::from(mount))
    })
}

/// The id in a link such as `net:[4026531840]`.
fn namespace_of_link(target: &str) -> Option<u64> {
    target
        .strip_prefix("net:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

impl Namespace {
    /// Runs something inside the namespace, on a thread of its own: namespaces
    /// belong to threads, so the caller stays where it is. None when what the
    /// namespace was found by is gone; it may still be held by something else.
    ///
    /// # Errors
    ///
    /// When entering it is not permitted.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<Option<T>> {
        let Some(path) = &self.path else {
            // Entering takes a capability even for one that is inside.
            return Ok(Some(inside()));
        };
        let entering = || format!("entering network namespace {}", self.name);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(error).with_context(entering),
        };
        // Process ids and names are used again.
        if file.metadata().with_context(entering)?.ino() != self.id {
            return Ok(None);
        }
        thread::scope(|scope| {
            thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, || {
                    let kind = Some(LinkNameSpaceType::Network);
                    match move_into_link_name_space(file.as_fd(), kind) {
                        Ok(()) => Ok(Some(inside())),
                        // A name in /run/netns whose mount is gone is a plain file.
                        Err(Errno::INVAL) => Ok(None),
                        Err(error) => Err(error).with_context(entering),
                    }
                })
                .context("starting a thread")?
                .join()
                .unwrap_or_else(|_| Err(anyhow!("a thread in namespace {} failed", self.name)))
        })
    }
}

/// What is said of a process that has ended, or of a name that was removed.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// What the namespace that the calling thread is in, and the kernel, decide for
/// sockets on which nothing is set.
///
/// # Errors
///
/// When /proc does not show it.
pub fn environment() -> Result<Environment> {
    Ok(Environment {
        idle: sysctl("ipv4/tcp_keepalive_time")?,
        interval: sysctl("ipv4/tcp_keepalive_intvl")?,
        probes: sysctl("ipv4/tcp_keepalive_probes")?,
        retries: sysctl("ipv4/tcp_retries2")?,
        // Came with TCP_RTO_MAX_MS (Linux 6.15).
        rto_max: sysctl("ipv4/tcp_rto_max_ms").unwrap_or(0),
        hz: jiffies_per_second()?,
    })
}

/// A sysctl of the namespace that the calling thread is in.
///
/// # Errors
///
/// When the namespace has none of that name, or it is no number.
pub fn sysctl(name: &str) -> Result<u32> {
    let path = Path::new("/proc/sys/net").join(name);
    fs::read_to_string(&path)
        .map_err(anyhow::Error::new)
        .and_then(|value| Ok(value.trim().parse()?))
        .with_context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_mounts_of_network_namespaces_only() {
        let mountinfo = "\
            22 1 0:20 / /run rw - tmpfs tmpfs rw\n\
            90 22 0:4 net:[4026532001] /run/netns/blue rw shared:7 - nsfs nsfs rw\n\
            91 22 0:4 mnt:[4026532002] /run/mnt rw - nsfs nsfs rw\n";
        let found: Vec<_> = mounts_of_namespaces(mountinfo).collect();
        assert_eq!(found, [PathBuf::from("/run/netns/blue")]);
    }

    #[test]
    fn reads_links_of_network_namespaces_only() {
        assert_eq!(namespace_of_link("net:[4026531840]"), Some(4_026_531_840));
        assert_eq!(namespace_of_link("socket:[123]"), None);
        assert_eq!(namespace_of_link("net:[x]"), None);
    }

    #[test]
    fn the_own_namespace_comes_first_and_once() {
        let namespaces = all().unwrap();
        assert_eq!(namespaces[0].name, "host");
        let own = namespaces[0].id;
        assert_eq!(namespaces.iter().filter(|found| found.id == own).count(), 1);
    }
}
