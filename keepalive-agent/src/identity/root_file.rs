//! Root file: reads what only root can have put there, whoever chose its content.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::{Component, Path},
};

use rustix::{
    fs::{FileType, Mode, OFlags, Stat, fstat, open, openat},
    io::Errno,
};

/// A file with more bytes is not read.
pub(super) const LARGEST: u64 = 4 << 20;

/// A directory of root's.
#[derive(Debug)]
pub(super) struct RootDirectory {
    directory: OwnedFd,
    owner: u32,
}

impl RootDirectory {
    /// Opens a directory; none where there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, or others may write to it.
    pub(super) fn open(path: &Path, owner: u32) -> io::Result<Option<Self>> {
        // The administrator may have put it elsewhere, by a symbolic link.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match open(path, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => other?,
        };
        check(&fstat(&directory)?, owner, FileType::Directory)?;
        Ok(Some(Self { directory, owner }))
    }

    /// Reads a file below it; none where there is none. No symbolic link is
    /// followed, and nothing is waited for.
    ///
    /// # Errors
    ///
    /// When it is no plain file, others may write to it, it is too large, or it
    /// cannot be read.
    pub(super) fn read(&self, below: &Path) -> io::Result<Option<Vec<u8>>> {
        let flags =
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
        let Some((directory, name)) = self.beside(below)? else {
            return Ok(None);
        };
        let directory = directory.as_ref().unwrap_or(&self.directory);
        let file = match openat(directory, name, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => File::from(other?),
        };
        let found = fstat(&file)?;
        check(&found, self.owner, FileType::RegularFile)?;
        let mut content = Vec::new();
        // It may grow meanwhile.
        file.take(LARGEST + 1).read_to_end(&mut content)?;
        if content.len() as u64 > LARGEST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(Some(content))
    }

    /// The directory that a file below is in, where it is another one, and its name.
    /// Name by name: openat2(2), which could do it at once, is kept from the agent
    /// by `RestrictSUIDSGID` of its unit.
    fn beside<'a>(&self, below: &'a Path) -> io::Result<Option<(Option<OwnedFd>, &'a OsStr)>> {
        let mut names = Vec::new();
        for part in below.components() {
            match part {
                Component::Normal(name) => names.push(name),
                _ => return Err(io::Error::other("not below the directory")),
            }
        }
        let Some((file, above)) = names.split_last() else {
            return Err(io::Error::other("not below the directory"));
        };
        let mut directory = None;
        for name in above {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = openat(
                directory.as_ref().unwrap_or(&self.directory),
                *name,
                flags,
                Mode::empty(),
            );
            let opened = match opened {
                Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
                other => other?,
            };
            if FileType::from_raw_mode(fstat(&opened)?.st_mode) == FileType::Symlink {
                return Err(Errno::LOOP.into());
            }
            directory = Some(opened);
        }
        Ok(Some((directory, file)))
    }
}

/// Whether something is of this type and only its owner may write to it.
fn check(found: &Stat, owner: u32, wanted: FileType) -> io::Result<()> {
    let mode = Mode::from_raw_mode(found.st_mode);
    let is_kind = FileType::from_raw_mode(found.st_mode) == wanted;
    if !is_kind {
        return Err(io::Error::other("not a plain file"));
    }
    if found.st_uid != owner || mode.intersects(Mode::WGRP | Mode::WOTH) {
        return Err(io::Error::other("others than root may write to it"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use rustix::{
        fs::{CWD, mknodat},
        process::getuid,
    };

    use super::*;

    fn own(path: &Path) -> RootDirectory {
        let own = getuid().as_raw();
        RootDirectory::open(path, own).unwrap().unwrap()
    }

    #[test]
    fn only_plain_files_of_the_owner_are_read() {
        let made = tempfile::tempdir().unwrap();
        let path = made.path();
        let directory = own(path);
        let read = |name: &str| directory.read(name.as_ref());
        let write = |name: &str, mode: u32| {
            fs::write(path.join(name), "x").unwrap();
            fs::set_permissions(path.join(name), fs::Permissions::from_mode(mode)).unwrap();
        };
        write("plain", 0o600);
        assert_eq!(read("plain").unwrap().unwrap(), b"x");
        assert!(read("nothing").unwrap().is_none());
        assert!(read("plain/below").unwrap().is_none());
        write("shared", 0o622);
        assert!(read("shared").is_err());
        symlink("plain", path.join("link")).unwrap();
        assert!(read("link").is_err());
        symlink(".", path.join("here")).unwrap();
        assert!(read("here/plain").is_err());
        assert!(read("../plain").is_err());
        assert!(read("/etc/passwd").is_err());
        mknodat(CWD, path.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(read("fifo").is_err());
        fs::create_dir(path.join("directory")).unwrap();
        assert!(read("directory").is_err());
        let large = File::create(path.join("large")).unwrap();
        large.set_len(LARGEST + 1).unwrap();
        assert!(read("large").is_err());
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let made = tempfile::tempdir().unwrap();
        let owner = getuid().as_raw();
        assert!(RootDirectory::open(made.path(), owner + 1).is_err());
        fs::set_permissions(made.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(RootDirectory::open(made.path(), owner).is_err());
        assert!(
            RootDirectory::open(&made.path().join("no"), owner)
                .unwrap()
                .is_none()
        );
    }
}
