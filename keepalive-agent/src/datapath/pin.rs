//! Pins: names in a BPF file system by which enforcement outlives the agent.
//!
//! One directory for each cgroup that something is attached to, named by the
//! cgroup's id, with the link in it. A link keeps its program, and a program its
//! maps, so this one name says whether a set is in force: it cannot be half there.
//! Beside it are the links for bounds and for dead peers, which decide nothing by
//! themselves ([`super::bounds`], [`super::death_watch`]).

use std::{
    fs::{self, DirBuilder},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::statfs,
    mount::{MountFlags, mount},
};

use super::{
    Error,
    fault::{self, Operation},
    syscalls,
};

/// Where BPF file systems are mounted.
const BPF_FS: &str = "/sys/fs/bpf";

/// `BPF_FS_MAGIC` in include/uapi/linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// The name of the link.
const LINK: &str = "link";

/// What the names of links for bounds begin with; the id of their cgroup follows.
const BOUNDS: &str = "bounds-";

/// What the names of links for dead peers begin with; the id of their program
/// follows.
const DEATHS: &str = "dead-peers-";

/// A directory of pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinDirectory {
    path: PathBuf,
}

impl PinDirectory {
    /// Where pins are kept when nobody says otherwise.
    pub const DEFAULT: &'static str = "/sys/fs/bpf/keepalive";

    /// A directory to pin in; it is made where it is missing, and the BPF file
    /// system mounted where that is missing at its usual place.
    ///
    /// # Errors
    ///
    /// When there is no BPF file system, or the directory is not this user's
    /// alone.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let making = || {
            Error::call(format!(
                "making {} to pin in: enforcement would end with this agent",
                path.display()
            ))
        };
        // Others are told where it is.
        let path = &std::path::absolute(path).map_err(making())?;
        mount_where_missing(path)?;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(making())?;
        Self::open(path)?.ok_or_else(|| Error::Untrusted {
            path: path.to_owned(),
            why: "it was removed while it was looked at".to_owned(),
        })
    }

    /// The same for one who only looks; none where there is no such directory.
    ///
    /// # Errors
    ///
    /// As [`Self::create`].
    pub fn open(path: &Path) -> Result<Option<Self>, Error> {
        let untrusted = |why: String| Error::Untrusted {
            path: path.to_owned(),
            why,
        };
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                let looking = format!("looking at {}", path.display());
                return Err(Error::call(looking)(error));
            }
        };
        if !found.is_dir() {
            return Err(untrusted("it is not a directory".to_owned()));
        }
        if !is_bpf_fs(path) {
            return Err(untrusted(format!(
                "it is not in a BPF file system; name one below {BPF_FS}, or mount one there: \
                 mount -t bpf bpf {BPF_FS}"
            )));
        }
        let own = rustix::process::geteuid().as_raw();
        if found.uid() != own {
            return Err(untrusted(format!(
                "it belongs to user {}; remove it, or name another directory",
                found.uid()
            )));
        }
        if found.mode() & 0o022 != 0 {
            return Err(untrusted(format!(
                "others may write to it (mode {:o}): chmod go-w {}",
                found.mode() & 0o7777,
                path.display()
            )));
        }
        Ok(Some(Self {
            path: path.to_owned(),
        }))
    }

    /// The path of the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn directory_of(&self, cgroup: u64) -> PathBuf {
        self.path.join(cgroup.to_string())
    }

    /// Pins the link of a cgroup.
    pub(super) fn pin(&self, link: impl AsFd, cgroup: u64) -> Result<(), Error> {
        self.pin_as(LINK, link, cgroup)
    }

    /// Pins a link for bounds, of the set on the cgroup `root`, unless it is.
    pub(super) fn pin_bounds(&self, link: impl AsFd, root: u64, cgroup: u64) -> Result<(), Error> {
        let name = format!("{BOUNDS}{cgroup}");
        if self.directory_of(root).join(&name).exists() {
            return Ok(());
        }
        self.pin_as(&name, link, root)
    }

    /// Pins the link for dead peers of the set on this cgroup.
    pub(super) fn pin_death_watch(
        &self,
        link: impl AsFd,
        cgroup: u64,
        program: u32,
    ) -> Result<(), Error> {
        self.pin_as(&format!("{DEATHS}{program}"), link, cgroup)
    }

    /// Removes the pins of links for dead peers, but for that of one program.
    pub(super) fn unpin_death_watches(&self, cgroup: u64, but: u32) -> Result<(), Error> {
        const REMOVING: &str = "removing the pin of an earlier link for dead peers";
        fault::point(Operation::Unpin).map_err(Error::call(REMOVING))?;
        let pins = self.beside(cgroup, DEATHS);
        for path in pins.map_err(Error::call(REMOVING))? {
            if !path.ends_with(format!("{DEATHS}{but}")) {
                fs::remove_file(&path).map_err(Error::call(REMOVING))?;
            }
        }
        Ok(())
    }

    fn pin_as(&self, name: &str, link: impl AsFd, cgroup: u64) -> Result<(), Error> {
        /// An agent of another cgroup may take the empty directory for what half a
        /// start left.
        const TRIES: u32 = 3;
        let directory = self.directory_of(cgroup);
        let mut pinned = Ok(());
        for _ in 0..TRIES {
            pinned = match DirBuilder::new().mode(0o700).create(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                _ => syscalls::pin(&link, &directory.join(name)),
            };
            if !matches!(&pinned, Err(error) if error.kind() == io::ErrorKind::NotFound) {
                break;
            }
        }
        pinned.map_err(|error| {
            // Only if it is empty.
            let _ = fs::remove_dir(&directory);
            Error::call(format!("pinning the link in {}", directory.display()))(error)
        })
    }

    /// The link that is pinned for a cgroup.
    pub(super) fn link(&self, cgroup: u64) -> Result<Option<OwnedFd>, Error> {
        let path = self.directory_of(cgroup).join(LINK);
        match syscalls::pinned(&path) {
            Ok(link) => Ok(Some(link)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::call(format!("opening {}", path.display()))(error)),
        }
    }

    /// Removes the pin of a link for bounds, if there is one.
    pub(super) fn unpin_bounds(&self, root: u64, cgroup: u64) -> Result<(), Error> {
        let directory = self.directory_of(root);
        let path = directory.join(format!("{BOUNDS}{cgroup}"));
        let removing = || Error::call(format!("removing {}", path.display()));
        fault::point(Operation::Unpin).map_err(removing())?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(removing()(error)),
            _ => {
                // Only if it is empty.
                let _ = fs::remove_dir(&directory);
                Ok(())
            }
        }
    }

    /// The pins of a set whose names begin with this.
    fn beside(&self, root: u64, prefix: &str) -> io::Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(self.directory_of(root)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut pins = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                pins.push(entry.path());
            }
        }
        Ok(pins)
    }

    /// Removes the pins of a cgroup, if there are any. What else pinned links hold
    /// goes on until they are detached.
    pub(super) fn unpin(&self, cgroup: u64) -> Result<(), Error> {
        let directory = self.directory_of(cgroup);
        let removing = || Error::call(format!("removing the pins in {}", directory.display()));
        fault::point(Operation::Unpin).map_err(removing())?;
        let bounds = self.beside(cgroup, BOUNDS).map_err(removing())?;
        let deaths = self.beside(cgroup, DEATHS).map_err(removing())?;
        let files = [directory.join(LINK)]
            .into_iter()
            .chain(bounds)
            .chain(deaths);
        let files = files.map(fs::remove_file).collect::<Vec<_>>();
        for removed in files.into_iter().chain([fs::remove_dir(&directory)]) {
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(removing()(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes the pins of cgroups that are gone, and empty directories that a start
    /// left which was cut off.
    ///
    /// # Errors
    ///
    /// When they cannot be looked at or removed.
    pub fn remove_stale(&self) -> Result<(), Error> {
        const LOOKING: &str = "looking at a pinned link";
        for cgroup in self.cgroups()? {
            let is_stale = match self.link(cgroup)? {
                None => true,
                Some(link) => syscalls::cgroup_link(link)
                    .map_err(Error::call(LOOKING))?
                    .is_some_and(|found| found.cgroup == 0),
            };
            if is_stale {
                self.unpin(cgroup)?;
                continue;
            }
            for path in self.beside(cgroup, BOUNDS).map_err(Error::call(LOOKING))? {
                let link = syscalls::pinned(&path).and_then(syscalls::cgroup_link);
                if link.is_ok_and(|found| found.is_some_and(|found| found.cgroup == 0)) {
                    fs::remove_file(&path).map_err(Error::call(LOOKING))?;
                }
            }
        }
        Ok(())
    }

    /// The ids of the cgroups that there are pins for.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn cgroups(&self) -> Result<Vec<u64>, Error> {
        let reading = || Error::call(format!("reading {}", self.path.display()));
        let mut cgroups = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(reading())? {
            let name = entry.map_err(reading())?.file_name();
            cgroups.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        Ok(cgroups)
    }
}

fn is_bpf_fs(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.f_type == BPF_FS_MAGIC)
}

fn mount_where_missing(path: &Path) -> Result<(), Error> {
    let at = Path::new(BPF_FS);
    if !path.starts_with(at) || is_bpf_fs(at) {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("bpf", at, "bpf", flags, None)
        .map_err(io::Error::from)
        .map_err(Error::call(format!(
            "no BPF file system is mounted at {BPF_FS}, and mounting one failed: enforcement \
             cannot outlive the agent without one; run it without --pin, or mount one before: \
             mount -t bpf bpf {BPF_FS}"
        )))
}
