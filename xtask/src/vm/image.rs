//! The guest's files: an initramfs in the kernel's own format (`newc` cpio, see
//! Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{
    collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::exec;

/// An archive of files, growing.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    paths: BTreeSet<String>,
}

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;

impl Archive {
    /// Adds a file with the rights given; one that is there already stays.
    pub(super) fn file(&mut self, path: &str, rights: u32, content: &[u8]) -> Result<()> {
        self.entry(path, FILE | rights, content)
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(path, LINK, target.as_bytes())
    }

    /// Adds an empty directory.
    pub(super) fn directory(&mut self, path: &str) -> Result<()> {
        self.entry(path, DIRECTORY, &[])
    }

    /// Adds a copy of a file of this machine.
    pub(super) fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let read = || -> std::io::Result<_> {
            Ok((fs::read(from)?, fs::metadata(from)?.permissions().mode()))
        };
        let (content, mode) = read().with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, mode & 0o755, &content)
    }

    /// Adds a program of this machine with the libraries it is linked with, at
    /// their own paths.
    pub(super) fn program(&mut self, path: &str, from: &Path) -> Result<()> {
        self.copy(path, from)?;
        // Fails for programs without libraries, and says so.
        let libraries = exec::output(Command::new("ldd").arg(from)).unwrap_or_default();
        for library in paths_in(&libraries) {
            self.copy(library, Path::new(library))?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let path = path.trim_start_matches('/');
        if !self.paths.insert(path.to_owned()) {
            return Ok(());
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above)?;
        }
        self.record(path, mode, content)
    }

    fn record(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len())
            .ok()
            .with_context(|| format!("{path} is too large for the guest"))?;
        let number = u32::try_from(self.paths.len())?;
        let name = u32::try_from(path.len() + 1)?;
        // Inode, mode, owner, group, links, time, size, four device numbers, the
        // length of the name, no checksum.
        let fields = [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The finished archive. The kernel unpacks several, one after the other.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        self.record("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }
}

/// The paths that `ldd` names.
fn paths_in(libraries: &str) -> impl Iterator<Item = &str> {
    libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
}

/// What a file holds when busybox has unpacked it.
pub(super) fn unpacked(busybox: &Path, file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    }
    let output = Command::new(busybox)
        .args(["xz", "-d", "-c"])
        .arg(file)
        .output()?;
    ensure!(
        output.status.success(),
        "cannot unpack {}: {}",
        file.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_each_path_once_below_its_directories() {
        let mut archive = Archive::default();
        archive.file("/a/b/c", 0o755, b"hello").unwrap();
        archive.file("a/b/c", 0o755, b"other").unwrap();
        archive.link("/a/d", "b").unwrap();
        let bytes = archive.finish().unwrap();
        let mut names = Vec::new();
        let mut at = 0;
        let number = |at: usize| {
            let digits = std::str::from_utf8(&bytes[at..at + 8]).unwrap();
            usize::from_str_radix(digits, 16).unwrap()
        };
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (size, name) = (number(at + 6 + 6 * 8), number(at + 6 + 11 * 8));
            let text = &bytes[at + 110..at + 110 + name - 1];
            names.push(String::from_utf8_lossy(text).into_owned());
            let content = (at + 110 + name).next_multiple_of(4);
            if names.last().unwrap() == "a/b/c" {
                assert_eq!(&bytes[content..content + size], b"hello");
            }
            at = (content + size).next_multiple_of(4);
        }
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/d", "TRAILER!!!"]);
    }

    #[test]
    fn libraries_are_what_ldd_names_by_path() {
        let libraries = "\tlinux-vdso.so.1 (0x7ffc)\n\
                         \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\
                         \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        assert_eq!(
            paths_in(libraries).collect::<Vec<_>>(),
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
        assert_eq!(paths_in("\tstatically linked\n").count(), 0);
    }
}
