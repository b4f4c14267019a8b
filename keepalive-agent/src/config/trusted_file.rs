//! Files that nobody but root can have written.
//!
//! Whoever may write a drop-in decides over the connections of the whole node. So
//! a file is read only where it, and each directory and link on the way to it,
//! belongs to root or to the user of the agent, and others may not write there.
//! Nothing is opened before it is known what it is: a pipe would wait for a writer.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fs::File,
    io::Read as _,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, StatVfsMountFlags, StatxAttributes,
        StatxFlags, fstat, fstatvfs, major, minor, openat, readlinkat, statat, statx,
    },
    io::Errno,
    process::geteuid,
};

use crate::names::printable_path;

/// Larger files are none that a person or a tool wrote as a config. 100,000
/// policies have some 10 MB.
const LARGEST: u64 = 64 << 20;

/// As many symbolic links as the kernel follows.
const MOST_LINKS: u32 = 40;

/// Why something is not read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// It does not exist, nor do links on the way lead anywhere else.
    #[error("cannot be read: {}", Errno::NOENT)]
    Absent,
    /// A link on the way leads to what does not exist.
    #[error("a symbolic link to {}, which does not exist", printable_path(.0))]
    Dangling(PathBuf),
    /// Somebody else may have written it.
    #[error(
        "{what}: whoever may write it decides for this whole machine, so it is not read; {cure}"
    )]
    Untrusted {
        /// What is wrong with what.
        what: String,
        /// The command that mends it.
        cure: String,
    },
    /// It is something else.
    #[error("{0}")]
    NotOne(&'static str),
    /// It is not text.
    #[error("not UTF-8, so not TOML")]
    NotText {
        /// In which line, from 1.
        line: usize,
    },
    /// The kernel says no.
    #[error("cannot be read: {0}")]
    Kernel(#[from] Errno),
}

/// The text of a file. What /dev/null stands for is empty.
pub(crate) fn read(path: &Path) -> Result<String, Refusal> {
    let found = find(path)?;
    if is_null_device(&found.stat) {
        return Ok(String::new());
    }
    if FileType::from_raw_mode(found.stat.st_mode) != FileType::RegularFile {
        return Err(Refusal::NotOne("not a regular file"));
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(&found.directory, &found.name, flags, Mode::empty())?;
    // It may be another one by now, which root put there.
    trust(&found.path, &file, &fstat(&file)?, Sticky::DoesNotMatter)?;
    let mut bytes = Vec::new();
    File::from(file)
        .take(LARGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    if bytes.len() as u64 > LARGEST {
        return Err(Refusal::NotOne("larger than 64 MiB, so not a config"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let bytes = error.as_bytes();
        let before = bytes.get(..error.utf8_error().valid_up_to());
        let lines = before.unwrap_or(bytes).split(|byte| *byte == b'\n');
        Refusal::NotText {
            line: lines.count(),
        }
    })
}

/// The names in a directory.
pub(super) fn names_in(path: &Path) -> Result<Vec<OsString>, Refusal> {
    let found = find(path)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(&found.directory, &found.name, flags, Mode::empty())?;
    trust(
        &found.path,
        &directory,
        &fstat(&directory)?,
        Sticky::IsNotEnough,
    )?;
    let mut names = Vec::new();
    for entry in Dir::read_from(&directory)? {
        let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Where a path leads, every link followed.
struct Found {
    /// The directory that it is in, open.
    directory: OwnedFd,
    /// Its name there; a dot where it is the directory itself.
    name: OsString,
    /// The same as a path.
    path: PathBuf,
    stat: Stat,
}

/// Follows a path step by step, looking at each directory and link on the way.
fn find(path: &Path) -> Result<Found, Refusal> {
    const STEP: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
    let absolute = std::path::absolute(path).map_err(|_| Refusal::Absent)?;
    let mut steps: VecDeque<OsString> = steps(&absolute).collect();
    let mut at = PathBuf::from("/");
    let mut directory = openat(CWD, "/", STEP, Mode::empty())?;
    let mut link = None;
    let mut links = 0;
    let absent = |link: Option<PathBuf>| link.map_or(Refusal::Absent, Refusal::Dangling);
    loop {
        let stat = fstat(&directory)?;
        trust(&at, &directory, &stat, Sticky::IsEnough)?;
        let Some(name) = steps.pop_front() else {
            return Ok(Found {
                directory,
                name: ".".into(),
                path: at,
                stat,
            });
        };
        let path = if name == ".." {
            at.parent().unwrap_or(&at).to_owned()
        } else {
            at.join(&name)
        };
        let stat = match statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Err(absent(link)),
            Err(error) => return Err(error.into()),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                directory = openat(&directory, &name, STEP | OFlags::DIRECTORY, Mode::empty())?;
                at = path;
            }
            FileType::Symlink => {
                links += 1;
                if links > MOST_LINKS {
                    return Err(Errno::LOOP.into());
                }
                trust_owner(&path, &stat)?;
                let target = readlinkat(&directory, &name, Vec::new())?;
                let target = Path::new(OsStr::from_bytes(target.to_bytes())).to_owned();
                if target.is_absolute() {
                    directory = openat(CWD, "/", STEP, Mode::empty())?;
                    at = PathBuf::from("/");
                }
                for step in self::steps(&target).collect::<Vec<_>>().into_iter().rev() {
                    steps.push_front(step);
                }
                link = Some(target);
            }
            _ if steps.is_empty() => {
                return Ok(Found {
                    directory,
                    name,
                    path,
                    stat,
                });
            }
            _ => return Err(Errno::NOTDIR.into()),
        }
    }
}

fn steps(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

fn is_null_device(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3)
}

/// Whether it may be written by others if it is a directory whose entries only
/// their owners may replace, such as /tmp.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sticky {
    /// An entry of another user is noticed by its owner.
    IsEnough,
    /// Entries of other users must not come to be there.
    IsNotEnough,
    /// It is no directory.
    DoesNotMatter,
}

/// Whether nobody but root and the agent's user can have written here.
fn trust(path: &Path, file: impl AsFd, stat: &Stat, sticky: Sticky) -> Result<(), Refusal> {
    trust_owner(path, stat)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    let others = mode.intersects(Mode::WGRP | Mode::WOTH);
    let is_sticky = sticky == Sticky::IsEnough && mode.contains(Mode::SVTX);
    if !others || is_sticky || is_read_only_volume(file) {
        return Ok(());
    }
    let shown = printable_path(path);
    Err(Refusal::Untrusted {
        what: format!(
            "others than its owner may write {shown} (mode {:04o})",
            mode.bits() & 0o7777
        ),
        cure: format!("take that away: `chmod go-w {shown}`"),
    })
}

/// Whether it is the top of a read-only mount. Volumes of Kubernetes are, with a mode
/// that would let everybody write. What is below the top must have a mode that does
/// not: a service that is shielded from the file system (systemd's ProtectSystem) sees
/// all of it read-only, while others write there.
fn is_read_only_volume(file: impl AsFd) -> bool {
    let is_read_only =
        fstatvfs(&file).is_ok_and(|mount| mount.f_flag.contains(StatVfsMountFlags::RDONLY));
    let is_top = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::empty())
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    is_read_only && is_top
}

fn trust_owner(path: &Path, stat: &Stat) -> Result<(), Refusal> {
    if stat.st_uid == 0 || stat.st_uid == geteuid().as_raw() {
        return Ok(());
    }
    let shown = printable_path(path);
    Err(Refusal::Untrusted {
        what: format!("{shown} belongs to uid {}", stat.st_uid),
        cure: format!("give it to root, `chown -h root {shown}`, or put the config elsewhere"),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn refusal(path: &Path) -> String {
        read(path).unwrap_err().to_string()
    }

    #[test]
    fn what_others_may_write_is_not_read() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("conf.d");
        let file = directory.join("a.toml");
        fs::create_dir(&directory).unwrap();
        fs::write(&file, "text").unwrap();
        for (mode, is_read) in [(0o644, true), (0o600, true), (0o664, false), (0o646, false)] {
            set_mode(&file, mode);
            assert_eq!(read(&file).is_ok(), is_read, "{mode:o}");
        }
        assert!(
            refusal(&file).contains("a.toml (mode 0646)"),
            "{}",
            refusal(&file)
        );
        set_mode(&file, 0o644);
        for (mode, is_read, is_listed) in [
            (0o755, true, true),
            (0o775, false, false),
            (0o777, false, false),
            // Others may add to it, but not replace what is there.
            (0o1777, true, false),
        ] {
            set_mode(&directory, mode);
            assert_eq!(read(&file).is_ok(), is_read, "{mode:o}");
            assert_eq!(names_in(&directory).is_ok(), is_listed, "{mode:o}");
        }
        set_mode(&directory, 0o777);
        let refusal = refusal(&file);
        assert!(refusal.contains("conf.d (mode 0777)"), "{refusal}");
        assert!(refusal.contains("`chmod go-w "), "{refusal}");
    }

    /// Also where a link leads there.
    #[test]
    fn the_way_of_links_is_looked_at_too() {
        let root = tempfile::tempdir().unwrap();
        let (open, closed) = (root.path().join("open"), root.path().join("closed"));
        fs::create_dir(&open).unwrap();
        fs::create_dir(&closed).unwrap();
        fs::write(open.join("a"), "a").unwrap();
        fs::write(closed.join("b"), "b").unwrap();
        symlink("../open/a", closed.join("link")).unwrap();
        symlink(closed.join("b"), closed.join("absolute")).unwrap();
        assert_eq!(read(&closed.join("link")).unwrap(), "a");
        set_mode(&open, 0o777);
        assert!(refusal(&closed.join("link")).contains("open (mode 0777)"));
        assert_eq!(read(&closed.join("absolute")).unwrap(), "b");
        assert_eq!(read(&closed.join("../closed/./b")).unwrap(), "b");
    }

    #[test]
    fn a_config_map_of_kubernetes_is_read() {
        let root = tempfile::tempdir().unwrap();
        let version = root.path().join("..2026_11_25_21_00_00.1");
        fs::create_dir(&version).unwrap();
        fs::write(version.join("a.toml"), "a").unwrap();
        symlink("..2026_11_25_21_00_00.1", root.path().join("..data")).unwrap();
        symlink("..data/a.toml", root.path().join("a.toml")).unwrap();
        assert_eq!(read(&root.path().join("a.toml")).unwrap(), "a");
        let names = names_in(root.path()).unwrap();
        assert!(names.contains(&"a.toml".into()), "{names:?}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_text_or_refused_with_their_line(bytes in vec(any::<u8>(), 0..200)) {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(&file, &bytes).unwrap();
            match read(file.path()) {
                Ok(text) => prop_assert_eq!(text.as_bytes(), bytes),
                Err(Refusal::NotText { line }) => {
                    let valid = bytes.utf8_chunks().next().unwrap().valid();
                    prop_assert_eq!(line, 1 + valid.matches('\n').count());
                }
                Err(refusal) => prop_assert!(false, "{refusal}"),
            }
        }
    }
}
