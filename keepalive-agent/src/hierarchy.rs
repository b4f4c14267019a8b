//! The cgroup v2 hierarchy: where it is mounted, and the ids of its cgroups.

mod path;

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Component, Path, PathBuf},
};

use rustix::fs::statfs;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use path::CgroupPath;

use crate::{
    mountinfo::{self, Mount},
    names::{printable, printable_path},
};

/// A mounted cgroup v2 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    mount: PathBuf,
    is_whole: bool,
    is_read_only: bool,
}

/// `CGROUP2_SUPER_MAGIC` in include/uapi/linux/magic.h.
pub(crate) const CGROUP2_SUPER_MAGIC: rustix::fs::FsWord = 0x6367_7270;

/// The id of the root of the hierarchy (`kernfs_create_root()` in
/// fs/kernfs/dir.c). A process in a cgroup namespace of its own finds another
/// cgroup at the root of what it mounts.
const ROOT: u64 = 1;

/// A cgroup that exists.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Cgroup {
    /// Its path from the root of the hierarchy.
    pub path: CgroupPath,
    /// What the kernel knows it by: the inode number of its directory.
    pub id: u64,
}

/// Why the hierarchy, or a cgroup, cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// The mounts of this process cannot be read.
    #[error("reading {}: is /proc mounted?", mountinfo::PATH)]
    Mounts(#[source] io::Error),
    /// No cgroup v2 hierarchy can be reached.
    #[error("{0}: {CURE}")]
    Unreachable(Unreachable),
    /// No cgroup can have this path.
    #[error(
        "a cgroup path starts with `/`, the root of the hierarchy, and has no `..`: {}",
        printable_path(.0)
    )]
    NoPath(PathBuf),
    /// There is no such cgroup, or it cannot be looked at.
    #[error(
        "cgroup {path} (directory {}) cannot be used",
        printable_path(directory)
    )]
    Unusable {
        /// Its path from the root.
        path: CgroupPath,
        /// Where that is here.
        directory: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Its directory cannot be opened.
    #[error("opening cgroup {}", printable_path(directory))]
    Opening {
        /// Which one.
        directory: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, Error>;

impl Hierarchy {
    /// Finds it among the mounts of this process: on hybrid hosts it is not at
    /// /sys/fs/cgroup, and what is mounted may be hidden, or a part only.
    ///
    /// # Errors
    ///
    /// When no cgroup v2 hierarchy can be reached, and why not.
    pub fn find() -> Result<Self> {
        let text = fs::read(mountinfo::PATH).map_err(Error::Mounts)?;
        let mounts: Vec<_> = mountinfo::parse(&text)
            .filter(|mount| mount.kind == b"cgroup2")
            .collect();
        choose(&mounts, root_at)
    }

    /// The same, and a cgroup in it if one is wanted; without one there need not be a
    /// hierarchy.
    ///
    /// # Errors
    ///
    /// As [`Self::find`] and [`Self::existing`], where a cgroup is wanted.
    pub fn with(cgroup: Option<&Path>) -> Result<(Option<Self>, Option<Cgroup>)> {
        let Some(path) = cgroup else {
            return Ok((Self::find().ok(), None));
        };
        let hierarchy = Self::find()?;
        let cgroup = hierarchy.existing(path)?;
        Ok((Some(hierarchy), Some(cgroup)))
    }

    /// Whether all of it can be seen, not only what is in a cgroup namespace.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whether no cgroup can be made where it is mounted. Programs can be attached
    /// all the same.
    #[must_use]
    pub const fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The directory of a cgroup, given by its path from the root.
    #[must_use]
    pub fn directory(&self, path: &CgroupPath) -> PathBuf {
        match path.depth() {
            0 => self.mount.clone(),
            _ => self.mount.join(path.relative()),
        }
    }

    /// Looks a cgroup up by its path from the root, or by the path of its
    /// directory below the mount point.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn existing(&self, path: &Path) -> Result<Cgroup> {
        let path = self.path(path)?;
        self.lookup(&path)
            .and_then(|cgroup| cgroup.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map_err(|source| Error::Unusable {
                directory: self.directory(&path),
                path,
                source,
            })
    }

    /// The path from the root of a cgroup that need not exist, given by that or
    /// by the path of its directory below the mount point.
    ///
    /// # Errors
    ///
    /// When no cgroup can have this path.
    pub fn path(&self, path: &Path) -> Result<CgroupPath> {
        let below = path.strip_prefix(&self.mount).unwrap_or(path);
        if path.is_relative() || below.components().any(|part| part == Component::ParentDir) {
            return Err(Error::NoPath(path.to_owned()));
        }
        // Slashes in a row, and a dot between them, are one.
        let names = below.components().filter_map(|part| match part {
            Component::Normal(name) => Some(name.as_bytes()),
            _ => None,
        });
        Ok(names.fold(CgroupPath::root(), |path, name| path.join(name)))
    }

    /// The cgroup with this path from the root, if it exists.
    ///
    /// # Errors
    ///
    /// When that cannot be found out.
    pub fn lookup(&self, path: &CgroupPath) -> io::Result<Option<Cgroup>> {
        match fs::metadata(self.directory(path)) {
            Ok(metadata) if metadata.is_dir() => Ok(Some(Cgroup {
                path: path.clone(),
                id: id(&metadata),
            })),
            Ok(_) => Ok(None),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The cgroup and everything below it, parents before children. What
    /// vanishes meanwhile, or may not be looked into, is left out.
    ///
    /// # Errors
    ///
    /// When a directory of the hierarchy cannot be read.
    pub fn walk(&self, top: &Cgroup) -> io::Result<Vec<Cgroup>> {
        let mut found = Vec::new();
        self.descend(top, &(), |cgroup, ()| found.push(cgroup.clone()))?;
        Ok(found)
    }

    /// Visits the cgroup and everything below it, parents before children, with
    /// what the visit of the parent returned; `above` for the first. What
    /// vanishes meanwhile, or may not be looked into, is left out.
    ///
    /// # Errors
    ///
    /// When a directory of the hierarchy cannot be read.
    pub fn descend<S>(
        &self,
        top: &Cgroup,
        above: &S,
        mut visit: impl FnMut(&Cgroup, &S) -> S,
    ) -> io::Result<()> {
        /// A directory without directories in it has two links, its name and
        /// its dot (`kernfs_refresh_inode()` in fs/kernfs/inode.c). To read
        /// one takes much longer: it is full of files.
        const NONE_BELOW: u64 = 2;
        let visited = visit(top, above);
        let has_none_below = fs::metadata(self.directory(&top.path))
            .is_ok_and(|metadata| metadata.nlink() == NONE_BELOW);
        if has_none_below {
            return Ok(());
        }
        let mut unread = vec![(top.path.clone(), visited)];
        while let Some((parent, above)) = unread.pop() {
            let entries = match fs::read_dir(self.directory(&parent)) {
                Ok(entries) => entries,
                Err(error) if is_absent(&error) => continue,
                // A user may close a directory of the user's own, to an agent without
                // all of root's capabilities too. What is in it goes by the policies
                // above.
                Err(error)
                    if error.kind() == io::ErrorKind::PermissionDenied && parent != top.path =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            };
            for entry in entries {
                let entry = entry?;
                if !entry.file_type()?.is_dir() {
                    continue;
                }
                match entry.metadata() {
                    Ok(metadata) => {
                        let cgroup = Cgroup {
                            path: parent.join(entry.file_name().as_bytes()),
                            id: id(&metadata),
                        };
                        let visited = visit(&cgroup, &above);
                        if metadata.nlink() != NONE_BELOW {
                            unread.push((cgroup.path, visited));
                        }
                    }
                    Err(error) if is_absent(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Whether any process is in a cgroup or below it. Where that cannot be found
    /// out, because it is not there yet or not any more, none is.
    #[must_use]
    pub fn has_processes(&self, cgroup: &Cgroup) -> bool {
        let events = self.directory(&cgroup.path).join("cgroup.events");
        fs::read_to_string(events)
            .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
    }

    /// The processes that are in a cgroup or below it now. One that cannot be seen
    /// from this pid namespace is 0.
    ///
    /// # Errors
    ///
    /// When the kernel does not tell, as of a cgroup for threads.
    pub fn processes(&self, cgroup: &Cgroup) -> io::Result<Vec<u32>> {
        let mut processes = Vec::new();
        for cgroup in self.walk(cgroup)? {
            let file = self.directory(&cgroup.path).join("cgroup.procs");
            match fs::read_to_string(file) {
                Ok(text) => {
                    for line in text.lines() {
                        processes.push(line.parse().map_err(io::Error::other)?);
                    }
                }
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(processes)
    }

    /// Opens a cgroup to attach programs to it.
    ///
    /// # Errors
    ///
    /// When its directory cannot be opened.
    pub fn open(&self, cgroup: &Cgroup) -> Result<File> {
        let directory = self.directory(&cgroup.path);
        File::open(&directory).map_err(|source| Error::Opening { directory, source })
    }
}

#[cfg(test)]
impl Hierarchy {
    /// A directory that stands for one.
    pub(crate) fn at(mount: &Path) -> Self {
        Self {
            mount: mount.to_owned(),
            is_whole: true,
            is_read_only: false,
        }
    }
}

impl Cgroup {
    /// Whether `path` is this cgroup or below it.
    #[must_use]
    pub fn contains(&self, path: &CgroupPath) -> bool {
        self.path.contains(path)
    }
}

/// The id of a cgroup is the inode number of its directory on 64-bit kernels
/// (`kernfs_node.id`, since Linux 5.5).
fn id(metadata: &Metadata) -> u64 {
    metadata.ino()
}

/// A cgroup that was removed while it was looked at answers ENODEV.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    ) || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

/// The inode number of the directory at a mount point, if it is the one of a cgroup
/// v2 hierarchy: something else can be mounted over it, or over what it is in.
fn root_at(point: &Path) -> io::Result<Option<u64>> {
    let is_cgroup2 = statfs(point)?.f_type == CGROUP2_SUPER_MAGIC;
    Ok(is_cgroup2
        .then(|| fs::metadata(point))
        .transpose()?
        .map(|metadata| id(&metadata)))
}

/// What there is instead of a hierarchy that can be used.
#[derive(Debug, Error)]
pub enum Unreachable {
    /// Nothing.
    #[error("no cgroup v2 hierarchy is mounted, so there is nothing to attach the program to")]
    NotMounted,
    /// Something is mounted over it.
    #[error(
        "the cgroup v2 hierarchy is mounted at {}, but something else is mounted over it",
        printable_path(.0)
    )]
    Hidden(PathBuf),
    /// A part of it: which one, and where.
    #[error(
        "of the cgroup v2 hierarchy only a part can be seen ({}, at {})",
        printable(.0),
        printable_path(.1)
    )]
    Part(Vec<u8>, PathBuf),
    /// It is there and may not be looked at.
    #[error("the cgroup v2 hierarchy at {} cannot be looked at: {}", printable_path(.0), .1)]
    NotPermitted(PathBuf, io::Error),
}

/// In another place than /sys/fs/cgroup, where it would hide the controllers of version
/// 1.
const CURE: &str = "mount another one in a place of its own, \
                    `mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2`; in a \
                    container, mount the host's /sys/fs/cgroup";

/// The mount to use, by what the root of each is.
fn choose(
    mounts: &[Mount],
    root_at: impl Fn(&Path) -> io::Result<Option<u64>>,
) -> Result<Hierarchy> {
    let mut found: Option<Hierarchy> = None;
    let mut reason = Unreachable::NotMounted;
    for mount in mounts {
        let point = || mount.point.clone();
        let hierarchy = match root_at(&mount.point) {
            Ok(Some(root)) if root == ROOT || mount.root == b"/" => Hierarchy {
                mount: point(),
                is_whole: root == ROOT,
                is_read_only: mount.is_read_only,
            },
            Ok(Some(_)) => {
                reason = Unreachable::Part(mount.root.clone(), point());
                continue;
            }
            Ok(None) => {
                reason = Unreachable::Hidden(point());
                continue;
            }
            Err(error) if is_absent(&error) => {
                reason = Unreachable::Hidden(point());
                continue;
            }
            Err(error) => {
                reason = Unreachable::NotPermitted(point(), error);
                continue;
            }
        };
        let rank = |found: &Hierarchy| (found.is_whole, !found.is_read_only);
        if found
            .as_ref()
            .is_none_or(|best| rank(&hierarchy) > rank(best))
        {
            found = Some(hierarchy);
        }
    }
    found.ok_or(Error::Unreachable(reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is chosen of these mounts, where the roots at their places are these.
    fn chosen(mountinfo: &str, roots: &[(&str, Option<u64>)]) -> Result<Hierarchy> {
        let mounts: Vec<_> = mountinfo::parse(mountinfo.as_bytes())
            .filter(|mount| mount.kind == b"cgroup2")
            .collect();
        choose(&mounts, |point| {
            let root = roots.iter().find(|(path, _)| Path::new(path) == point);
            root.map(|(_, root)| *root)
                .ok_or_else(|| io::ErrorKind::NotFound.into())
        })
    }

    fn at(mount: &str, is_whole: bool, is_read_only: bool) -> Hierarchy {
        Hierarchy {
            mount: mount.into(),
            is_whole,
            is_read_only,
        }
    }

    const WHOLE: Option<u64> = Some(1);

    #[test]
    fn finds_the_hierarchy_on_unified_and_hybrid_hosts() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = chosen(unified, &[("/sys/fs/cgroup", WHOLE)]).unwrap();
        assert_eq!(found, at("/sys/fs/cgroup", true, false));
        let hybrid = "\
            25 23 0:22 / /sys/fs/cgroup rw shared:4 - tmpfs tmpfs rw,mode=755\n\
            33 25 0:30 / /sys/fs/cgroup/cpu rw shared:5 - cgroup cgroup rw,cpu\n\
            34 25 0:31 / /sys/fs/cgroup/unified ro shared:6 master:2 - cgroup2 cgroup2 rw\n";
        let found = chosen(hybrid, &[("/sys/fs/cgroup/unified", WHOLE)]).unwrap();
        assert_eq!(found, at("/sys/fs/cgroup/unified", true, true));
    }

    #[test]
    fn the_best_mount_is_chosen() {
        let mounts = "\
            1 0 0:31 /part /part rw - cgroup2 none rw\n\
            2 0 0:31 / /own rw - cgroup2 none rw\n\
            3 0 0:31 / /hidden rw - cgroup2 none rw\n\
            4 0 0:31 / /read-only ro - cgroup2 none rw\n\
            5 0 0:31 /../.. /host rw - cgroup2 none rw\n\
            6 0 0:31 / /second rw - cgroup2 none rw\n";
        let (part, own) = (("/part", Some(7)), ("/own", Some(9)));
        let read_only = ("/read-only", WHOLE);
        let rest = [("/host", WHOLE), ("/second", WHOLE)];
        for (roots, expected) in [
            (
                [&[part, own, read_only], &rest[..]].concat(),
                at("/host", true, false),
            ),
            (vec![part, own, read_only], at("/read-only", true, true)),
            (vec![part, own], at("/own", false, false)),
        ] {
            assert_eq!(chosen(mounts, &roots).unwrap(), expected);
        }
    }

    #[test]
    fn what_stands_in_the_way_is_named_and_no_advice_hides_controllers() {
        let mounts = "1 0 0:31 / /a rw - cgroup2 none rw\n";
        for (mountinfo, roots, expected) in [
            (
                "1 0 0:22 / /tmp rw - tmpfs tmpfs rw\n",
                &[][..],
                "no cgroup v2 hierarchy is mounted",
            ),
            (mounts, &[], "something else is mounted over it"),
            (mounts, &[("/a", None)], "something else is mounted over it"),
            (
                "1 0 0:31 /p /a rw - cgroup2 none rw\n",
                &[("/a", Some(5))],
                "only a part can be seen (/p, at /a)",
            ),
        ] {
            let error = chosen(mountinfo, roots).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains("none /sys/fs/cgroup"), "{error}");
        }
    }

    #[test]
    fn walks_parents_before_children() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("a/b/c")).unwrap();
        fs::create_dir_all(directory.path().join("d")).unwrap();
        fs::write(directory.path().join("a/cgroup.procs"), "").unwrap();
        let hierarchy = Hierarchy::at(directory.path());
        let root = hierarchy.existing(Path::new("/")).unwrap();
        let mut paths: Vec<_> = hierarchy
            .walk(&root)
            .unwrap()
            .into_iter()
            .map(|cgroup| cgroup.path.to_string())
            .collect();
        let position = |path: &str| paths.iter().position(|found| found == path).unwrap();
        assert!(position("/a") < position("/a/b") && position("/a/b") < position("/a/b/c"));
        paths.sort();
        assert_eq!(paths, ["/", "/a", "/a/b", "/a/b/c", "/d"]);
        assert_eq!(
            hierarchy.existing(&directory.path().join("d")).unwrap(),
            hierarchy.existing(Path::new("/d")).unwrap()
        );
        assert!(hierarchy.existing(Path::new("/nowhere")).is_err());
    }
}
