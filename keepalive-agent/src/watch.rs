//! Watch: notices when the files of a config change, without ever looking.
//!
//! A file is found by way of directories and symbolic links, and any of them can
//! be swapped: Kubernetes changes a mounted config map by renaming one link over
//! another. So each name on the way is watched in the directory that has it, and
//! each directory for its own end; below the first name that does not exist there
//! is nothing to watch until it does. After a change the way is found again.
//!
//! A write counts when the file is closed, never when it is truncated: the empty
//! text in between is a config too, one that says nothing. And while a file is
//! being written, no other change is told either.
//!
//! Not noticed: a file system that is mounted over a directory on the way, and
//! what another machine changes on a network file system.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs, io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _, unix::fs::MetadataExt as _},
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec},
};
use thiserror::Error;
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    config::{Sources, is_drop_in_name},
    names::printable_path,
    unblocked::awaited,
};

/// How long nothing may change before a change is told: an editor makes several
/// at once.
const QUIET: Duration = Duration::from_millis(20);

/// A change is told after this time even when others keep coming: on a node on
/// which pods come and go all the time, the next one connects soon.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// A timer of no time at all would be none.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

/// A writer that is silent for so long is not waited for: `truncate(2)` and
/// `mknod(2)` change and make files that nobody has open, and so nobody closes.
const LONGEST_WRITE: Duration = Duration::from_secs(10);

/// Symbolic links that are followed (`MAXSYMLINKS` in include/linux/namei.h).
const MOST_LINKS: usize = 40;

/// Events that are read before others have a turn.
const MOST_EVENTS: usize = 1024;

/// The directory itself goes, or is called something else.
const OWN_END: WatchFlags = WatchFlags::DELETE_SELF.union(WatchFlags::MOVE_SELF);

/// What is behind a name in a directory changes.
const NAMES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO);

/// Why changes of the files cannot be noticed.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no instance of inotify to be had.
    #[error(
        "making an inotify instance: all that this user may have are in use, or all descriptors \
         of this process; `sysctl fs.inotify.max_user_instances` shows how many, `sysctl -w` \
         raises it"
    )]
    Instances,
    /// A directory cannot be watched.
    #[error("watching {}{limit}", printable_path(path))]
    Watching {
        /// Which one.
        path: PathBuf,
        /// The limit that may be reached.
        limit: &'static str,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// Another call to the kernel failed.
    #[error("{doing}")]
    Call {
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, Error>;

/// A failed call, while `doing` something.
fn call<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Call {
        doing,
        source: error.into(),
    }
}

/// Waits for changes of the files that make up a config.
#[derive(Debug)]
pub struct Watch {
    sources: Sources,
    inotify: AsyncFd<OwnedFd>,
    way: Way,
    /// What each watch is for, by its descriptor.
    watched: HashMap<i32, Watched>,
    /// Whether the way may be another by now.
    may_differ: bool,
    timer: AsyncFd<OwnedFd>,
    /// When the first of the changes came that were not told yet.
    noticed: Option<Instant>,
    /// Files that are being written, and when they last were.
    writing: HashMap<PathBuf, Instant>,
}

impl Watch {
    /// Watches from here on. What is read after this cannot be out of date
    /// unnoticed.
    ///
    /// # Errors
    ///
    /// When the kernel's limit of watches is reached, or a directory cannot be
    /// read.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn on(sources: &Sources) -> Result<Self> {
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )
        .map_err(call("making a timer"))?;
        let armed = Armed::new(sources)?;
        let mut watch = Self {
            sources: sources.clone(),
            inotify: armed.inotify,
            way: armed.way,
            watched: armed.watched,
            may_differ: false,
            timer: awaited(timer, Interest::READABLE).map_err(call("watching a timer"))?,
            noticed: None,
            writing: HashMap::new(),
        };
        if armed.is_outdated {
            watch.notice()?;
        }
        Ok(watch)
    }

    /// Waits until something has changed that the config may depend on. Read it
    /// then, ask whether [`Watch::has_news`], and compare: it may be the same.
    ///
    /// Nothing is lost when this future is dropped.
    ///
    /// # Errors
    ///
    /// As [`Watch::on`]. What was watched before is watched still.
    pub async fn changed(&mut self) -> Result<()> {
        loop {
            tokio::select! {
                ready = self.inotify.readable() => {
                    let mut ready = ready.map_err(call("waiting for changes of the config"))?;
                    let news = read(ready.get_inner(), &self.watched)?;
                    if news.is_all {
                        ready.clear_ready();
                    }
                    self.take_in(news)?;
                }
                ready = self.timer.readable() => {
                    let mut ready = ready.map_err(call("waiting for a timer"))?;
                    ready.clear_ready();
                    match rustix::io::read(ready.get_inner(), &mut [0_u8; 8]) {
                        Ok(_) if self.is_quiet()? => return Ok(()),
                        Ok(_) | Err(Errno::AGAIN) => {}
                        Err(error) => return Err(call("reading a timer")(error)),
                    }
                }
            }
        }
    }

    /// Whether something has changed that is not told yet, or a file is being
    /// written: what was read meanwhile may be half of it, and [`Watch::changed`]
    /// tells when it is whole.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub fn has_news(&mut self) -> Result<bool> {
        let news = read(self.inotify.get_ref(), &self.watched)?;
        self.take_in(news)?;
        if self.writing.is_empty() {
            return Ok(self.noticed.is_some());
        }
        self.notice()?;
        Ok(true)
    }

    /// Forgets what has changed so far: it is about to be read anyway.
    ///
    /// # Errors
    ///
    /// As [`Watch::on`].
    pub fn renew(&mut self) -> Result<()> {
        self.noticed = None;
        self.set_timer(Duration::ZERO)?;
        self.rearm(false)
    }

    /// Finds the way again when it is time to tell of a change. False when there
    /// is something to wait for after all.
    fn is_quiet(&mut self) -> Result<bool> {
        let noticed = self.noticed.take();
        // Mostly a drop-in was put in the place of another one: then the watches that
        // are there are those to be made.
        if self.may_differ || Way::to(&self.sources) != self.way {
            self.rearm(true)?;
        } else {
            let news = read(self.inotify.get_ref(), &self.watched)?;
            self.take_in(news)?;
        }
        self.writing
            .retain(|_, last| last.elapsed() < LONGEST_WRITE);
        let Some(last) = self.writing.values().max() else {
            return Ok(self.noticed.is_none());
        };
        let left = LONGEST_WRITE.saturating_sub(last.elapsed());
        self.noticed = noticed;
        self.set_timer(left.max(SHORTEST_WAIT))?;
        Ok(false)
    }

    /// Finds the way again. What the old watches have still to say counts, or is
    /// passed over but for files that are being written.
    fn rearm(&mut self, counts: bool) -> Result<()> {
        let armed = Armed::new(&self.sources)?;
        let mut news = read(self.inotify.get_ref(), &self.watched)?;
        news.is_change &= counts;
        self.inotify = armed.inotify;
        self.way = armed.way;
        self.watched = armed.watched;
        // What the old watches had to say is found.
        (news.may_differ, self.may_differ) = (false, false);
        news.is_change |= armed.is_outdated;
        self.take_in(news)
    }

    fn take_in(&mut self, news: News) -> Result<()> {
        for (path, is_open) in news.writes {
            if is_open {
                self.writing.insert(path, Instant::now());
            } else {
                self.writing.remove(&path);
            }
        }
        self.may_differ |= news.may_differ;
        if news.is_change {
            self.notice()?;
        }
        Ok(())
    }

    /// Tells of a change as soon as it is quiet.
    fn notice(&mut self) -> Result<()> {
        let first = *self.noticed.get_or_insert_with(Instant::now);
        let left = LONGEST_WAIT.saturating_sub(first.elapsed());
        self.set_timer(QUIET.min(left).max(SHORTEST_WAIT))
    }

    /// Zero stops it.
    fn set_timer(&self, wait: Duration) -> Result<()> {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            // All that are set here are short.
            it_value: wait.try_into().unwrap_or_default(),
        };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)
            .map_err(call("setting a timer"))?;
        Ok(())
    }
}

/// A set of watches.
struct Armed {
    inotify: AsyncFd<OwnedFd>,
    way: Way,
    watched: HashMap<i32, Watched>,
    /// Whether something changed while the watches were made.
    is_outdated: bool,
}

/// What a watch is for.
#[derive(Debug)]
struct Watched {
    path: PathBuf,
    want: Want,
}

impl Armed {
    fn new(sources: &Sources) -> Result<Self> {
        let way = Way::to(sources);
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(
            |error| match error {
                Errno::MFILE => Error::Instances,
                error => call("making an inotify instance")(error),
            },
        )?;
        let mut watched = HashMap::<_, Watched>::new();
        let mut is_outdated = false;
        for (path, want) in &way.wants {
            // Two paths can lead to one directory.
            let flags = want.flags() | WatchFlags::MASK_ADD;
            match inotify::add_watch(&inotify, path, flags) {
                Ok(descriptor) => watched
                    .entry(descriptor)
                    .or_insert_with(|| Watched {
                        path: path.clone(),
                        want: Want::default(),
                    })
                    .want
                    .add(want),
                Err(Errno::NOENT | Errno::NOTDIR) => is_outdated = true,
                // A directory that may be passed but not read.
                Err(Errno::ACCESS) if want.is_only_for_the_end() => {}
                Err(error) => {
                    let limit = match error {
                        Errno::NOSPC => " (fs.inotify.max_user_watches)",
                        _ => "",
                    };
                    return Err(Error::Watching {
                        path: path.clone(),
                        limit,
                        source: error,
                    });
                }
            }
        }
        is_outdated |= Way::to(sources) != way;
        let inotify = awaited(inotify, Interest::READABLE)
            .map_err(call("watching the files of the config"))?;
        Ok(Self {
            inotify,
            way,
            watched,
            is_outdated,
        })
    }
}

/// What is passed on the way to all files of a config.
#[derive(Debug, Default, PartialEq, Eq)]
struct Way {
    wants: BTreeMap<PathBuf, Want>,
}

/// What is to be noticed about a directory or file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Want {
    /// These names in it.
    names: BTreeSet<OsString>,
    /// The names of drop-ins in it.
    drop_ins: bool,
    /// Writes too: to these names, or to the file.
    writes: bool,
    /// Whether it is a file.
    is_file: bool,
}

impl Want {
    fn flags(&self) -> WatchFlags {
        let mut flags = WatchFlags::empty();
        if self.writes {
            flags |= WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE;
        }
        if self.is_file {
            return flags;
        }
        flags |= OWN_END | WatchFlags::ONLYDIR;
        if !self.names.is_empty() || self.drop_ins {
            flags |= NAMES;
        }
        flags
    }

    fn is_only_for_the_end(&self) -> bool {
        self.names.is_empty() && !self.drop_ins && !self.is_file
    }

    fn add(&mut self, other: &Self) {
        self.names.extend(other.names.iter().cloned());
        self.drop_ins |= other.drop_ins;
        self.writes |= other.writes;
        self.is_file |= other.is_file;
    }

    fn has(&self, name: &OsStr) -> bool {
        self.names.contains(name) || self.drop_ins && is_drop_in_name(name)
    }
}

impl Way {
    fn to(sources: &Sources) -> Self {
        let mut way = Self::default();
        way.follow(sources.main());
        for directory in sources.directories() {
            let Some(directory) = way.follow(directory) else {
                continue;
            };
            let want = way.want(&directory);
            want.drop_ins = true;
            want.writes = true;
            // Drop-ins that are elsewhere.
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            for entry in entries {
                let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
                if is_link && is_drop_in_name(&entry.file_name()) {
                    way.follow(&entry.path());
                }
            }
        }
        way
    }

    fn want(&mut self, path: &Path) -> &mut Want {
        self.wants.entry(path.to_owned()).or_default()
    }

    fn name(&mut self, directory: &Path, name: &OsStr) -> &mut Want {
        let want = self.want(directory);
        want.names.insert(name.to_owned());
        want
    }

    /// Passes the names of a path one by one, as the kernel does. Gives the
    /// directory that it leads to, if it leads to one.
    fn follow(&mut self, path: &Path) -> Option<PathBuf> {
        let path = std::path::absolute(path).ok()?;
        let mut here = PathBuf::from("/");
        let mut ahead = Vec::new();
        put_ahead(&mut ahead, &path);
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            if name == ".." {
                here.pop();
                continue;
            }
            let next = here.join(&name);
            let kind = next.symlink_metadata().map(|metadata| metadata.file_type());
            match kind {
                Ok(kind) if kind.is_symlink() => {
                    self.name(&here, &name);
                    links += 1;
                    let target = fs::read_link(&next).ok()?;
                    if links > MOST_LINKS {
                        return None;
                    }
                    if target.is_absolute() {
                        here = PathBuf::from("/");
                    }
                    put_ahead(&mut ahead, &target);
                }
                Ok(kind) if kind.is_dir() => {
                    self.want(&next);
                    if ahead.is_empty() {
                        // Its own end can be late: not before the last process
                        // that is in it has left.
                        self.name(&here, &name);
                    }
                    here = next;
                }
                found => {
                    let is_last = ahead.is_empty();
                    // The whole machine writes to /dev/null.
                    let is_special = found.as_ref().is_ok_and(|kind| !kind.is_file());
                    self.name(&here, &name).writes |= is_last && !is_special;
                    // A file that is bind-mounted here is written elsewhere.
                    if found.is_ok_and(|kind| kind.is_file()) && is_last {
                        let want = self.want(&next);
                        want.is_file = true;
                        want.writes = true;
                    }
                    return None;
                }
            }
        }
        Some(here)
    }
}

/// Puts the names of a path on top of those that are ahead, the first one last.
fn put_ahead(ahead: &mut Vec<OsString>, path: &Path) {
    let names = path.components().rev().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    ahead.extend(names);
}

/// What came of reading events.
#[derive(Default)]
struct News {
    /// One of them may have changed the config.
    is_change: bool,
    /// One of them is about more than the drop-ins of a directory.
    may_differ: bool,
    /// Files that were written, and whether they are open still.
    writes: Vec<(PathBuf, bool)>,
    /// There are no more events for now.
    is_all: bool,
}

fn read(inotify: &OwnedFd, watched: &HashMap<i32, Watched>) -> Result<News> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    let mut news = News::default();
    for _ in 0..MOST_EVENTS {
        match reader.next() {
            Ok(event) => news.add(&event, watched),
            Err(Errno::AGAIN) => {
                news.is_all = true;
                return Ok(news);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(call("reading changes of the config's files")(error)),
        }
    }
    // Those that were read into the buffer are lost with it.
    (news.is_change, news.may_differ) = (true, true);
    Ok(news)
}

impl News {
    fn add(&mut self, event: &inotify::Event<'_>, watched: &HashMap<i32, Watched>) {
        let kind = event.events();
        let end = ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT;
        if kind.intersects(end | ReadFlags::QUEUE_OVERFLOW) {
            (self.is_change, self.may_differ) = (true, true);
            return;
        }
        let Some(watched) = watched.get(&event.wd()) else {
            return;
        };
        let path = match event.file_name() {
            Some(name) => {
                let name = OsStr::from_bytes(name.to_bytes());
                if !watched.want.has(name) {
                    return;
                }
                self.may_differ |= watched.want.names.contains(name);
                watched.path.join(name)
            }
            None if watched.want.is_file => {
                self.may_differ = true;
                watched.path.clone()
            }
            None => return,
        };
        // Whoever makes a file has it open still; what has two names was complete
        // under the other one.
        let is_new = || {
            let made = path.symlink_metadata();
            made.is_ok_and(|made| made.is_file() && made.nlink() == 1)
        };
        let is_written = kind.contains(ReadFlags::MODIFY);
        let is_open = is_written || kind.contains(ReadFlags::CREATE) && is_new();
        self.is_change |= !is_written;
        self.writes.push((path, is_open));
    }
}

#[cfg(test)]
mod tests;
