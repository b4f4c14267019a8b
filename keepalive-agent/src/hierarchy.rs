//! The cgroup v2 hierarchy: where it is mounted, and the ids of its cgroups.

mod path;

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata},
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

pub use path::CgroupPath;

use crate::names::printable_path;

/// A mounted cgroup v2 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    mount: PathBuf,
}

/// A cgroup that exists.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Cgroup {
    /// Its path from the root of the hierarchy.
    pub path: CgroupPath,
    /// What the kernel knows it by: the inode number of its directory.
    pub id: u64,
}

impl Hierarchy {
    /// Finds it in /proc/self/mountinfo: on hybrid hosts it is not at
    /// /sys/fs/cgroup.
    ///
    /// # Errors
    ///
    /// When no cgroup v2 hierarchy is mounted.
    pub fn find() -> Result<Self> {
        let path = "/proc/self/mountinfo";
        let mountinfo = fs::read(path).with_context(|| format!("reading {path}"))?;
        Self::in_mountinfo(&mountinfo).context(
            "no cgroup v2 hierarchy is mounted, so there is nothing to attach the program to: \
             mount one with `mount -t cgroup2 none /sys/fs/cgroup`, \
             or boot with systemd.unified_cgroup_hierarchy=1",
        )
    }

    /// The first mount of the whole hierarchy (as far as this process may see it).
    fn in_mountinfo(mountinfo: &[u8]) -> Option<Self> {
        mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
            let mut fields = line.split(|&byte| byte == b' ');
            let root = fields.nth(3)?;
            let mount = fields.next()?;
            // Optional fields end with a lone dash; the type comes next.
            let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
            (kind == b"cgroup2" && root == b"/").then(|| Self {
                mount: PathBuf::from(OsStr::from_bytes(&unescape(mount))),
            })
        })
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
            .with_context(|| {
                format!(
                    "cgroup {path} (directory {}) cannot be used",
                    printable_path(&self.directory(&path))
                )
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
            bail!(
                "a cgroup path starts with `/`, the root of the hierarchy, and has no `..`: {}",
                printable_path(path)
            );
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
    /// vanishes meanwhile is left out.
    ///
    /// # Errors
    ///
    /// When a directory of the hierarchy cannot be read.
    pub fn walk(&self, top: &Cgroup) -> io::Result<Vec<Cgroup>> {
        let mut found = Vec::new();
        self.descend(top, (), |cgroup, ()| found.push(cgroup.clone()))?;
        Ok(found)
    }

    /// Visits the cgroup and everything below it, parents before children, with
    /// what the visit of the parent returned; `above` for the first. What
    /// vanishes meanwhile is left out.
    ///
    /// # Errors
    ///
    /// When a directory of the hierarchy cannot be read.
    pub fn descend<S>(
        &self,
        top: &Cgroup,
        above: S,
        mut visit: impl FnMut(&Cgroup, &S) -> S,
    ) -> io::Result<()> {
        /// A directory without directories in it has two links, its name and
        /// its dot (`kernfs_refresh_inode()` in fs/kernfs/inode.c). To read
        /// one takes much longer: it is full of files.
        const NONE_BELOW: u64 = 2;
        let mut unread = vec![(top.path.clone(), visit(top, &above))];
        while let Some((parent, above)) = unread.pop() {
            let entries = match fs::read_dir(self.directory(&parent)) {
                Ok(entries) => entries,
                Err(error) if is_absent(&error) => continue,
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

    /// Opens a cgroup to attach programs to it.
    ///
    /// # Errors
    ///
    /// When its directory cannot be opened.
    pub fn open(&self, cgroup: &Cgroup) -> Result<File> {
        let directory = self.directory(&cgroup.path);
        File::open(&directory)
            .with_context(|| format!("opening cgroup {}", printable_path(&directory)))
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

/// Undoes the octal escapes of space, tab, newline and backslash in mountinfo.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = escaped {
            out.push(byte);
            rest = &tail[3..];
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_in(mountinfo: &str) -> Option<PathBuf> {
        Hierarchy::in_mountinfo(mountinfo.as_bytes()).map(|found| found.mount)
    }

    #[test]
    fn finds_the_hierarchy_on_unified_and_hybrid_hosts() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(mount_in(unified), Some("/sys/fs/cgroup".into()));
        let hybrid = "\
            25 23 0:22 / /sys/fs/cgroup rw shared:4 - tmpfs tmpfs rw,mode=755\n\
            33 25 0:30 / /sys/fs/cgroup/cpu rw shared:5 - cgroup cgroup rw,cpu\n\
            34 25 0:31 / /sys/fs/cgroup/unified rw shared:6 master:2 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_in(hybrid), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn passes_over_a_mount_of_a_part_and_reads_escapes() {
        let mounts = "\
            40 25 0:31 /part /mnt/part rw - cgroup2 cgroup2 rw\n\
            41 25 0:31 / /mnt/with\\040space rw - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_in(mounts), Some("/mnt/with space".into()));
        assert_eq!(mount_in("25 23 0:22 / /tmp rw - tmpfs tmpfs rw\n"), None);
        assert_eq!(mount_in("nonsense\n\n"), None);
    }

    #[test]
    fn walks_parents_before_children() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("a/b/c")).unwrap();
        fs::create_dir_all(directory.path().join("d")).unwrap();
        fs::write(directory.path().join("a/cgroup.procs"), "").unwrap();
        let hierarchy = Hierarchy {
            mount: directory.path().to_owned(),
        };
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
