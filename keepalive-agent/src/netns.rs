//! Network namespaces: every one that can be found, each once, with the ways in.
//!
//! A namespace has no list of its own in the kernel. It shows where something
//! holds it: a process, a bind mount (as `ip netns` makes them below
//! /run/netns), an open file descriptor, or a socket.
//!
//! What a link in /proc leads to can be another thing by the time that it is
//! followed, and another user may choose what: a FIFO, whose opening blocks, or a
//! file of a file system that this user answers for. So nothing is opened before
//! it is known to be a namespace (`open_checked`).

mod census;
mod of_socket;
mod tcp_holder;

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
    thread,
};

use keepalive_common::{descriptor::NSFS, environment::Environment};
use rustix::{
    fs::{CWD, Dir, Mode, OFlags, fstat, fstatfs, open, openat, readlinkat},
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use thiserror::Error;

use crate::kernel::layout::{UnknownTick, jiffies_per_second};

pub use census::Census;
pub use tcp_holder::holds_tcp;

/// The namespace of this process.
pub const OWN: &str = "/proc/self/ns/net";

/// Why a namespace cannot be seen, or what is in it.
#[derive(Debug, Error)]
pub enum Error {
    /// Not even the own one.
    #[error("reading {OWN}: is /proc mounted?")]
    Own(#[source] io::Error),
    /// A file of /proc or a sysctl cannot be read.
    #[error("reading {path}", path = path.display())]
    Reading {
        /// Which one.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A file of the kernel's says something else than is expected.
    #[error("{path} has no {what}", path = path.display())]
    Lacks {
        /// Which one.
        path: PathBuf,
        /// What is looked for.
        what: &'static str,
    },
    /// The kernel does not let this process in.
    #[error("entering network namespace {name}")]
    Entering {
        /// What the namespace is called here.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Namespaces belong to threads, and none can be had.
    #[error("starting a thread")]
    Thread(#[source] io::Error),
    /// A thread that was elsewhere has panicked.
    #[error("a thread that entered network namespaces failed")]
    ThreadFailed,
    /// Timers of the kernel cannot be read.
    #[error(transparent)]
    Tick(#[from] UnknownTick),
}

type Result<T> = std::result::Result<T, Error>;

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its inode number, as `/proc/PID/ns/net` shows it.
    pub id: u64,
    /// What to call it: `host` for the agent's own, the name of its file (as
    /// `ip netns` shows it), or `pid 123` of a process that is in it or holds it.
    pub name: String,
    /// Whether it is the one that the agent is in, and need not be entered.
    is_own: bool,
    /// Where to enter it: the first that still leads there.
    ways: Vec<Way>,
}

/// Where a namespace can be entered.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    /// A bind mount, by its id in mountinfo.
    Mount(u64, PathBuf),
    /// A process that is in it.
    Process(u32),
    /// A descriptor of it.
    Descriptor(Descriptor),
    /// A socket in it.
    Socket(Descriptor),
}

/// A file descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Process id.
    pub process: u32,
    /// Its number there.
    pub number: u32,
}

/// What processes hold, for who knows it already from the kernel: looking at
/// every descriptor of every process in /proc takes longer than everything else
/// where there are many.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// Descriptors of namespaces, of whatever kind.
    pub namespaces: Vec<Descriptor>,
    /// Network namespace → a TCP socket in it.
    pub sockets: HashMap<u64, Descriptor>,
}

/// All namespaces that can be found, the agent's own first.
///
/// Not found are those that are held by nothing but sockets, after all processes
/// and mounts are gone, and those that are held only by a descriptor beyond the
/// first thousand of a process. [`all_held`] finds both.
///
/// # Errors
///
/// When not even the own one can be read.
pub fn all() -> Result<Vec<Namespace>> {
    find(None)
}

/// The same for one who knows which descriptors of which processes hold
/// namespaces.
///
/// # Errors
///
/// As [`all`].
pub fn all_with(descriptors: &[Descriptor]) -> Result<Vec<Namespace>> {
    all_held(&Held {
        namespaces: descriptors.to_vec(),
        sockets: HashMap::new(),
    })
}

/// The same for one who knows what processes hold. Namespaces that are held by
/// nothing but TCP sockets are among them.
///
/// # Errors
///
/// As [`all`].
pub fn all_held(held: &Held) -> Result<Vec<Namespace>> {
    find(Some(held))
}

/// The namespaces that these sockets are in, by their ids, the agent's own first if it
/// is among them.
///
/// # Errors
///
/// As [`all`].
pub fn of_sockets(sockets: &BTreeMap<u64, Descriptor>) -> Result<Vec<Namespace>> {
    let own = own_id()?;
    let mut found = Found::default();
    for (id, socket) in sockets {
        // The process is in it, mostly.
        found.of_process(socket.process);
        let name = format!("pid {}", socket.process);
        found.add(*id, &name, Way::Socket(*socket));
    }
    found.0.retain(|id, _| sockets.contains_key(id));
    Ok(found.sorted(own))
}

/// The namespaces that these processes are in, the agent's own first if it is
/// among them. Processes that have ended are in none.
///
/// # Errors
///
/// As [`all`].
pub fn of_processes(processes: &[u32]) -> Result<Vec<Namespace>> {
    let own = own_id()?;
    let mut found = Found::default();
    for process in processes {
        found.of_process(*process);
    }
    Ok(found.sorted(own))
}

fn own_id() -> Result<u64> {
    Ok(fs::metadata(OWN).map_err(Error::Own)?.ino())
}

fn find(held: Option<&Held>) -> Result<Vec<Namespace>> {
    let own = own_id()?;
    let mut found = Found::default();
    found.0.insert(own, Namespace::host(own));
    found.mounted();
    let processes = processes();
    for process in &processes {
        found.of_process(*process);
    }
    if let Some(held) = held {
        for descriptor in &held.namespaces {
            found.of_descriptor(*descriptor);
        }
        for (id, socket) in &held.sockets {
            let name = format!("pid {}", socket.process);
            found.add(*id, &name, Way::Socket(*socket));
        }
    } else {
        for process in processes {
            // What vanishes meanwhile, or is not ours to see, is passed over.
            let _ = found.held_open(process);
        }
    }
    Ok(found.sorted(own))
}

/// The processes that there are now.
fn processes() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

#[derive(Default)]
struct Found(BTreeMap<u64, Namespace>);

impl Found {
    /// As many ways into a namespace as are kept: processes end.
    const WAYS: usize = 4;

    /// The first name holds.
    fn add(&mut self, id: u64, name: &str, way: Way) {
        let namespace = self.0.entry(id).or_insert_with(|| Namespace {
            id,
            name: name.to_owned(),
            is_own: false,
            ways: Vec::new(),
        });
        if namespace.ways.len() < Self::WAYS {
            namespace.ways.push(way);
        }
    }

    /// The agent's own is called so, and comes first.
    fn sorted(mut self, own: u64) -> Vec<Namespace> {
        if let Some(host) = self.0.get_mut(&own) {
            *host = Namespace::host(own);
        }
        let mut namespaces: Vec<_> = self.0.into_values().collect();
        namespaces.sort_by_key(|namespace| (namespace.id != own, namespace.name.clone()));
        namespaces
    }

    /// Bind mounts, wherever they are in this mount namespace.
    fn mounted(&mut self) {
        let mountinfo = fs::read("/proc/self/mountinfo").unwrap_or_default();
        for (id, mount, path) in mounts_of_namespaces(&mountinfo) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            self.add(id, &name, Way::Mount(mount, path.clone()));
        }
    }

    /// The one that a process is in.
    fn of_process(&mut self, process: u32) {
        if let Some(id) = linked(&format!("/proc/{process}/ns/net")) {
            self.add(id, &format!("pid {process}"), Way::Process(process));
        }
    }

    /// The one that a descriptor may be of.
    fn of_descriptor(&mut self, descriptor: Descriptor) {
        if let Some(id) = linked(&descriptor.path()) {
            let name = format!("pid {}", descriptor.process);
            self.add(id, &name, Way::Descriptor(descriptor));
        }
    }

    /// Who holds namespaces open (container runtimes, mostly) does so with a
    /// few descriptors; who has a hundred thousand has sockets.
    const DESCRIPTORS: usize = 1024;

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
            if let (Some(id), Ok(number)) = (
                namespace_of_link(link.to_bytes()),
                name.to_string_lossy().parse(),
            ) {
                let way = Way::Descriptor(Descriptor { process, number });
                self.add(id, &format!("pid {process}"), way);
            }
            target = link.into_bytes();
        }
        Ok(())
    }
}

impl Descriptor {
    fn path(self) -> String {
        format!("/proc/{}/fd/{}", self.process, self.number)
    }
}

/// The namespace that a link in /proc leads to now, if it is one of the network.
fn linked(path: &str) -> Option<u64> {
    let target = fs::read_link(path).ok()?;
    namespace_of_link(target.as_os_str().as_encoded_bytes())
}

/// Network namespaces by id, and the ids and places of their mounts.
fn mounts_of_namespaces(mountinfo: &[u8]) -> impl Iterator<Item = (u64, u64, PathBuf)> {
    mountinfo.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let mount = str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let id = namespace_of_link(fields.nth(2)?)?;
        Some((id, mount, unescape(fields.next()?)))
    })
}

/// A path as mountinfo has it: spaces, tabs, newlines and backslashes are octal
/// numbers behind a backslash (`mangle_path()` in fs/seq_file.c).
fn unescape(path: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        let escaped = (*first == b'\\')
            .then(|| str::from_utf8(after.get(..3)?).ok())
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = escaped {
            bytes.push(byte);
            rest = after.get(3..).unwrap_or_default();
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

/// The id in a link such as `net:[4026531840]`. Only the kernel makes such a
/// name: those of files begin with a slash.
fn namespace_of_link(target: &[u8]) -> Option<u64> {
    let id = target.strip_prefix(b"net:[")?.strip_suffix(b"]")?;
    str::from_utf8(id).ok()?.parse().ok()
}

impl Namespace {
    fn host(id: u64) -> Self {
        Self {
            id,
            name: "host".to_owned(),
            is_own: true,
            ways: Vec::new(),
        }
    }

    /// One that is known by its id only, and cannot be entered.
    pub(crate) fn without_a_way(id: u64) -> Self {
        Self {
            id,
            name: format!("net:[{id}]"),
            is_own: false,
            ways: Vec::new(),
        }
    }

    /// Runs something inside the namespace, on a thread of its own: namespaces
    /// belong to threads, so the caller stays where it is. When all that the
    /// namespace was found by is gone, it is looked for once more. None when it
    /// is not found again: it may still be held by something that cannot be seen,
    /// but most likely it is gone.
    ///
    /// # Errors
    ///
    /// When entering it is not permitted, or no thread can be started.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<Option<T>> {
        if self.is_own {
            // Entering takes a capability even for one that is inside.
            return Ok(Some(inside()));
        }
        let Some(file) = self.find()? else {
            return Ok(None);
        };
        on_a_thread(|| {
            self.move_into(&file)?;
            Ok(Some(inside()))
        })?
    }

    /// How many TCP sockets it has, if /proc shows that from outside: by a process
    /// that is in it before and after.
    fn tcp_sockets(&self) -> Option<u64> {
        if self.is_own {
            return count_tcp_sockets("/proc/self/net".as_ref()).ok();
        }
        self.ways.iter().find_map(|way| {
            let Way::Process(process) = way else {
                return None;
            };
            let count = count_tcp_sockets(format!("/proc/{process}/net").as_ref()).ok()?;
            (linked(&format!("/proc/{process}/ns/net")) == Some(self.id)).then_some(count)
        })
    }

    /// A descriptor of it; looks for the namespace once more where all ways that
    /// are known are gone.
    fn find(&self) -> Result<Option<OwnedFd>> {
        let mut opened = self.open();
        if let Ok(None) = opened {
            let again = all()?.into_iter().find(|found| found.id == self.id);
            if let Some(again) = again {
                opened = again.open();
            }
        }
        opened.map_err(|source| self.not_entered(source))
    }

    fn move_into(&self, file: &OwnedFd) -> Result<()> {
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(file.as_fd(), kind)
            .map_err(|source| self.not_entered(source.into()))
    }

    fn not_entered(&self, source: io::Error) -> Error {
        let name = self.name.clone();
        Error::Entering { name, source }
    }

    /// A descriptor of it; none when no way leads there any more.
    fn open(&self) -> io::Result<Option<OwnedFd>> {
        let mut refused = None;
        for way in &self.ways {
            match way.open(self.id) {
                Ok(Some(file)) => return Ok(Some(file)),
                Ok(None) => {}
                Err(error) => refused = Some(error),
            }
        }
        refused.map_or(Ok(None), Err)
    }
}

/// Runs something inside each of these namespaces, one after the other on one
/// thread; as [`Namespace::enter`], for many and at less cost.
///
/// # Errors
///
/// When no thread can be started. What stands in the way of one namespace is its
/// own result.
pub fn enter_each<T: Send>(
    namespaces: &[Namespace],
    inside: impl Fn() -> T + Send + Sync,
) -> Result<Vec<Result<Option<T>>>> {
    // Not on the thread that will be elsewhere.
    let mut own = namespaces.iter().any(|found| found.is_own).then(&inside);
    on_a_thread(|| {
        let enter = |namespace: &Namespace| {
            if namespace.is_own {
                return Ok(own.take());
            }
            let Some(file) = namespace.find()? else {
                return Ok(None);
            };
            namespace.move_into(&file)?;
            Ok(Some(inside()))
        };
        namespaces.iter().map(enter).collect()
    })
}

/// Runs something on a thread that can go elsewhere.
fn on_a_thread<T: Send>(run: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, run)
            .map_err(Error::Thread)?
            .join()
            .map_err(|_| Error::ThreadFailed)
    })
}

impl Way {
    /// A descriptor of the namespace of that id; none when this leads to
    /// something else by now, or nowhere.
    fn open(&self, id: u64) -> io::Result<Option<OwnedFd>> {
        let opened = match self {
            Self::Mount(mount, path) => open_checked(path, id, |handle| is_on(handle, *mount)),
            Self::Process(process) => open_link(&format!("/proc/{process}/ns/net"), id),
            Self::Descriptor(descriptor) => open_link(&descriptor.path(), id),
            Self::Socket(descriptor) => {
                of_socket::open(*descriptor).map(|file| file.filter(|file| leads_to(file, id)))
            }
        };
        match opened {
            Err(error) if is_gone(&error) => Ok(None),
            opened => opened,
        }
    }
}

/// Opens what a link in /proc leads to, if it is the network namespace of that id.
fn open_link(link: &str, id: u64) -> io::Result<Option<OwnedFd>> {
    open_checked(link.as_ref(), id, |handle| leads_to(handle, id))
}

/// Opens what a path leads to, if it is the network namespace of that id.
///
/// Looked at first through a descriptor that opens nothing (O_PATH), and first of
/// all by what only the kernel answers: asking for the file system, or the inode,
/// would ask that of another user, if it is one.
fn open_checked(
    path: &Path,
    id: u64,
    is_kernels: impl FnOnce(&OwnedFd) -> bool,
) -> io::Result<Option<OwnedFd>> {
    let handle = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    if !is_kernels(&handle)
        || u64::try_from(fstatfs(&handle)?.f_type) != Ok(NSFS)
        || fstat(&handle)?.st_ino != id
    {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(Some(openat(CWD, own_link(&handle), flags, Mode::empty())?))
}

/// Whether an open file is on the mount of that id.
fn is_on(handle: &OwnedFd, mount: u64) -> bool {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", handle.as_raw_fd()));
    info.is_ok_and(|info| {
        let mut ids = info.lines().filter_map(|line| line.strip_prefix("mnt_id:"));
        ids.next().and_then(|id| id.trim().parse().ok()) == Some(mount)
    })
}

fn leads_to(handle: &OwnedFd, id: u64) -> bool {
    linked(&own_link(handle)) == Some(id)
}

/// The link that leads to an open file of this process. No other thread can put
/// something else there: they do not close what they have not opened.
fn own_link(handle: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", handle.as_raw_fd())
}

/// What is said of a process that has ended, or of a name or descriptor that was
/// removed.
fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::SRCH, Errno::BADF];
    error
        .raw_os_error()
        .is_some_and(|errno| gone.iter().any(|gone| gone.raw_os_error() == errno))
}

/// How many TCP sockets each of these namespaces has: all that are listening,
/// connecting or connected, whoever holds them; not those in TIME_WAIT
/// (`sock_prot_inuse_add()` in net/core/sock.c). None where the namespace is gone.
///
/// Only those that no process is in are entered: /proc shows the others.
///
/// # Errors
///
/// When no thread can be started. That of one namespace: it cannot be entered, or
/// /proc does not tell.
pub fn tcp_sockets(namespaces: &[Namespace]) -> Result<Vec<Result<Option<u64>>>> {
    let mut counts: Vec<_> = namespaces.iter().map(Namespace::tcp_sockets).collect();
    let hidden: Vec<_> = namespaces
        .iter()
        .zip(&counts)
        .filter(|(_, count)| count.is_none())
        .map(|(namespace, _)| namespace.clone())
        .collect();
    let mut inside = if hidden.is_empty() {
        Vec::new()
    } else {
        enter_each(&hidden, || {
            count_tcp_sockets("/proc/thread-self/net".as_ref())
        })?
    }
    .into_iter();
    Ok(counts
        .drain(..)
        .map(|count| match count {
            Some(count) => Ok(Some(count)),
            None => inside.next().unwrap_or(Ok(None))?.transpose(),
        })
        .collect())
}

/// What a directory such as /proc/PID/net says.
fn count_tcp_sockets(directory: &Path) -> Result<u64> {
    let in_use = |file: &str, protocol: &'static str| -> Result<u64> {
        let path = directory.join(file);
        let text = read(&path)?;
        let mut words = text
            .lines()
            .filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(": inuse "));
        let words = words.next();
        let number = words.and_then(|words| words.split(' ').next()?.parse().ok());
        number.ok_or(Error::Lacks {
            path,
            what: protocol,
        })
    };
    // Without IPv6 there is no such file.
    Ok(in_use("sockstat", "TCP")? + in_use("sockstat6", "TCP6").unwrap_or(0))
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
    let number = read(&path)?.trim().parse();
    number.map_err(|_| Error::Lacks {
        path,
        what: "number",
    })
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| Error::Reading {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_mounts_of_network_namespaces_only() {
        let mountinfo = b"\
            22 1 0:20 / /run rw - tmpfs tmpfs rw\n\
            90 22 0:4 net:[4026532001] /run/netns/dark\\040blue\\\xff rw shared:7 - nsfs nsfs rw\n\
            91 22 0:4 mnt:[4026532002] /run/mnt rw - nsfs nsfs rw\n";
        let found: Vec<_> = mounts_of_namespaces(mountinfo).collect();
        let path = std::ffi::OsString::from_vec(b"/run/netns/dark blue\\\xff".to_vec());
        assert_eq!(found, [(4_026_532_001, 90, PathBuf::from(path))]);
    }

    #[test]
    fn reads_links_of_network_namespaces_only() {
        assert_eq!(namespace_of_link(b"net:[4026531840]"), Some(4_026_531_840));
        for other in [
            &b"socket:[123]"[..],
            b"net:[x]",
            b"net:[]",
            b"/net:[1]",
            b"",
        ] {
            assert_eq!(namespace_of_link(other), None);
        }
    }

    /// A FIFO that nobody writes to: opening it would block for ever.
    #[test]
    fn nothing_but_the_namespace_is_opened() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(
            CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let id = own_id().unwrap();
        for other in [
            fifo.as_path(),
            Path::new("/proc/self/ns/mnt"),
            Path::new("/dev/null"),
        ] {
            assert!(open_link(other.to_str().unwrap(), id).unwrap().is_none());
            // Nor when the first look is deceived.
            assert!(open_checked(other, id, |_| true).unwrap().is_none());
        }
        assert!(open_link(OWN, id + 1).unwrap().is_none());
        assert!(open_link(OWN, id).unwrap().is_some());
    }

    #[test]
    fn a_way_that_is_gone_is_no_reason_to_stay_out() {
        let id = own_id().unwrap();
        let own = fs::File::open(OWN).unwrap();
        let number = own.as_raw_fd().cast_unsigned();
        let process = std::process::id();
        let gone = Descriptor {
            process: u32::MAX,
            number: 0,
        };
        let closed = Descriptor {
            process,
            number: u32::MAX,
        };
        let good = Descriptor { process, number };
        let namespace = |ways: &[Way]| Namespace {
            id,
            name: "blue".to_owned(),
            is_own: false,
            ways: ways.to_vec(),
        };
        let ways = [gone, closed].map(Way::Descriptor);
        assert!(namespace(&ways).open().unwrap().is_none());
        let [first, second] = ways;
        let ways = [first, second, Way::Process(u32::MAX), Way::Descriptor(good)];
        assert!(namespace(&ways).open().unwrap().is_some());
    }

    #[test]
    fn sockets_are_counted() {
        let own = Namespace::host(own_id().unwrap());
        let count = || tcp_sockets(std::slice::from_ref(&own)).unwrap().remove(0);
        assert!(count().unwrap().is_some());
        let gone = Namespace::without_a_way(1);
        assert!(tcp_sockets(&[gone]).unwrap().remove(0).unwrap().is_none());
    }

    #[test]
    fn processes_are_in_namespaces() {
        let found = of_processes(&[std::process::id(), u32::MAX]).unwrap();
        assert_eq!(found, [Namespace::host(own_id().unwrap())]);
        assert_eq!(of_processes(&[u32::MAX]).unwrap(), []);
    }

    proptest::proptest! {
        #[test]
        fn any_mountinfo_is_survived(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = mounts_of_namespaces(&bytes).count();
            let line = [&b"1 2 0:4 net:[7] /"[..], bytes.as_slice()].concat();
            proptest::prop_assert!(mounts_of_namespaces(&line).next().is_some());
        }
    }

    #[test]
    fn the_own_namespace_comes_first_and_once() {
        let namespaces = all().unwrap();
        assert_eq!(namespaces[0].name, "host");
        let own = namespaces[0].id;
        assert_eq!(namespaces.iter().filter(|found| found.id == own).count(), 1);
    }
}
