//! Which processes hold which sockets.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fs, io,
    mem::MaybeUninit,
    path::Path,
};

use keepalive_common::socket::SocketRecord;
use rustix::fs::{CWD, Mode, OFlags, RawDir, openat, readlinkat_raw};

use super::{Error, Result};

const PROC: &str = "/proc";

/// Bytes for the entries of a directory that are read at once.
const ENTRIES: usize = 16 * 1024;

/// Every socket that some process holds.
#[derive(Debug, Default)]
pub struct Holders {
    by_key: HashMap<Key, Held>,
    names: HashMap<u32, Vec<u8>>,
}

/// What a socket is known by. An inode number alone may come twice: the kernel
/// counts them in 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    inode: u64,
    netns: u32,
    local_port: u16,
    remote_port: u16,
}

impl Key {
    /// Of a socket with this inode number, of which more is known.
    #[must_use]
    pub fn of(inode: u64, record: &SocketRecord) -> Self {
        Self {
            inode,
            netns: record.netns,
            local_port: record.local().port(),
            remote_port: record.remote().port(),
        }
    }

    /// Of a socket of which only the inode number is known.
    #[must_use]
    pub const fn of_inode(inode: u64) -> Self {
        Self {
            inode,
            netns: 0,
            local_port: 0,
            remote_port: 0,
        }
    }
}

#[derive(Debug)]
struct Held {
    first: u32,
    last: u32,
    count: u32,
}

/// A process that holds a socket, as far as can be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder<'a> {
    /// Process id of the first one that was found.
    pub pid: u32,
    /// What it calls itself (`comm`): any bytes.
    pub comm: &'a [u8],
    /// How many processes hold the socket, this one included.
    pub count: u32,
}

impl Holders {
    /// Reads all processes in /proc. Those that end meanwhile, or that this one
    /// may not look into, hold nothing.
    ///
    /// # Errors
    ///
    /// When /proc itself cannot be read.
    pub fn read() -> Result<Self> {
        let mut holders = Self::default();
        let reading = |source| Error::Processes {
            path: PROC.to_owned(),
            source,
        };
        for entry in fs::read_dir(PROC).map_err(reading)? {
            let name = entry.map_err(reading)?.file_name();
            if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) {
                // It may have ended, or not be ours to see.
                let _ = each_socket(pid, |_, inode| {
                    holders.add(pid, Key::of_inode(inode));
                });
            }
        }
        Ok(holders.named())
    }

    /// The same, with the names of the processes.
    #[must_use]
    pub fn named(mut self) -> Self {
        let named: HashSet<u32> = self.by_key.values().map(|held| held.first).collect();
        self.names = named.into_iter().map(|pid| (pid, comm(pid))).collect();
        self
    }

    /// Adds that a process holds a socket; whether that is a new one.
    pub fn add(&mut self, pid: u32, key: Key) -> bool {
        match self.by_key.entry(key) {
            Entry::Vacant(vacant) => {
                vacant.insert(Held {
                    first: pid,
                    last: pid,
                    count: 1,
                });
                true
            }
            Entry::Occupied(mut occupied) => {
                let held = occupied.get_mut();
                // A process can hold it twice.
                held.count += u32::from(held.last != pid);
                held.last = pid;
                false
            }
        }
    }

    /// Whether this very connection is among them, not only its inode number.
    #[must_use]
    pub fn knows(&self, record: &SocketRecord) -> bool {
        self.by_key.contains_key(&Key::of(record.inode, record))
    }

    /// Who holds a connection.
    #[must_use]
    pub fn of(&self, record: &SocketRecord) -> Option<Holder<'_>> {
        let known = self.by_key.get(&Key::of(record.inode, record));
        let held = known.or_else(|| self.by_key.get(&Key::of_inode(record.inode)))?;
        Some(Holder {
            pid: held.first,
            comm: self.names.get(&held.first).map_or(&[], Vec::as_slice),
            count: held.count,
        })
    }
}

/// What a process calls itself; nothing where it has ended.
fn comm(pid: u32) -> Vec<u8> {
    let mut comm = fs::read(format!("{PROC}/{pid}/comm")).unwrap_or_default();
    // The kernel ends it with a line break; the name may have some of its own.
    comm.pop_if(|last| *last == b'\n');
    comm
}

/// The inode numbers of the sockets that a process holds.
///
/// # Errors
///
/// When there is no such process, or it may not be looked into.
pub fn sockets_of(pid: u32) -> Result<HashSet<u64>> {
    let mut inodes = HashSet::new();
    each_socket(pid, |_, inode| {
        inodes.insert(inode);
    })
    .map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::NoProcess(pid),
        _ => Error::Processes {
            path: format!("{PROC}/{pid}/fd"),
            source: error,
        },
    })?;
    Ok(inodes)
}

/// Calls `found` for every descriptor of a process that is a socket, with its
/// number and the socket's inode number.
///
/// # Errors
///
/// When there is no such process, or it may not be looked into.
pub fn each_socket(pid: u32, mut found: impl FnMut(i32, u64)) -> io::Result<()> {
    let path = format!("{PROC}/{pid}/fd");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat(CWD, Path::new(&path), flags, Mode::empty())?;
    // There can be a hundred thousand: nothing is allocated for any of them.
    let mut buffer = [MaybeUninit::uninit(); ENTRIES];
    let mut entries = RawDir::new(&directory, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let mut target = [0_u8; 64];
        // `.`, `..` and what was closed meanwhile are no links.
        if let Ok(length) = readlinkat_raw(&directory, entry.file_name(), &mut target)
            && let Some(inode) = target.get(..length).and_then(inode)
            && let Ok(descriptor) = entry.file_name().to_string_lossy().parse()
        {
            found(descriptor, inode);
        }
    }
    Ok(())
}

/// The number in `socket:[123]`.
fn inode(target: &[u8]) -> Option<u64> {
    let digits = target.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsFd, process};

    use super::*;

    #[test]
    fn sockets_are_told_from_other_descriptors() {
        assert_eq!(inode(b"socket:[4711]"), Some(4711));
        for other in [
            &b"pipe:[4711]"[..],
            b"/tmp/socket:[1]",
            b"socket:[",
            b"socket:[x]",
            b"",
        ] {
            assert_eq!(inode(other), None);
        }
    }

    fn record(netns: u32, inode: u64) -> SocketRecord {
        let mut record = SocketRecord::NOTHING;
        (record.netns, record.inode) = (netns, inode);
        record
    }

    #[test]
    fn a_process_counts_once_and_the_first_is_named() {
        let mut holders = Holders::default();
        let seven = record(1, 70);
        let key = Key::of(70, &seven);
        let added = [7, 7, 9, 9].map(|pid| holders.add(pid, key));
        assert_eq!(added, [true, false, false, false]);
        holders.names.insert(7, b"seven".to_vec());
        assert_eq!(
            holders.of(&seven),
            Some(Holder {
                pid: 7,
                comm: b"seven",
                count: 2
            })
        );
        assert!(holders.knows(&seven));
    }

    #[test]
    fn an_inode_number_that_comes_twice_is_two_sockets() {
        let mut holders = Holders::default();
        let (one, other) = (record(1, 70), record(2, 70));
        assert!(holders.add(7, Key::of(70, &one)));
        assert!(!holders.knows(&other));
        assert_eq!(holders.of(&other), None);
        assert!(holders.add(9, Key::of(70, &other)));
        assert_eq!(holders.of(&other).map(|holder| holder.pid), Some(9));
    }

    #[test]
    fn finds_the_sockets_of_this_process() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let inode = rustix::fs::fstat(socket.as_fd()).unwrap().st_ino;
        let pid = process::id();
        assert!(sockets_of(pid).unwrap().contains(&inode));
        let holders = Holders::read().unwrap();
        let holder = holders.of(&record(1, inode)).unwrap();
        assert_eq!(holder.pid, pid);
        assert!(!holder.comm.is_empty());
        assert!(!holders.knows(&record(1, inode)));
        drop(socket);
        assert!(!sockets_of(pid).unwrap().contains(&inode));
    }

    #[test]
    fn an_absent_process_is_named() {
        let error = sockets_of(u32::MAX).unwrap_err();
        assert_eq!(error.to_string(), "there is no process 4294967295");
    }
}
