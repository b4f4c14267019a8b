//! A file of sysfs, mapped where the kernel can, read where not.

use std::{fs::File, io, ops::Deref, path::Path, ptr, slice};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// What a file of sysfs says. It cannot change: the kernel made it at boot.
#[derive(Debug)]
pub(super) enum MappedFile {
    /// Without a copy (sysfs shows the kernel's types so since Linux 6.16).
    Mapped {
        start: ptr::NonNull<u8>,
        length: usize,
    },
    /// As a copy.
    Read(Vec<u8>),
}

impl MappedFile {
    /// # Errors
    ///
    /// When it can neither be mapped nor read.
    #[expect(unsafe_code, reason = "mapping a file")]
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let length = usize::try_from(file.metadata()?.len()).unwrap_or(0);
        // SAFETY: a new mapping, where the kernel likes.
        let mapped = unsafe {
            mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::PRIVATE,
                &file,
                0,
            )
        };
        if let Some(start) = mapped
            .ok()
            .and_then(|start| ptr::NonNull::new(start.cast()))
        {
            return Ok(Self::Mapped { start, length });
        }
        let mut bytes = Vec::with_capacity(length);
        io::Read::read_to_end(&mut file, &mut bytes)?;
        Ok(Self::Read(bytes))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    #[expect(unsafe_code, reason = "looking at what is mapped")]
    fn deref(&self) -> &[u8] {
        match self {
            // SAFETY: mapped for as long as this value lives, that long, and
            // nobody writes to it.
            Self::Mapped { start, length } => unsafe {
                slice::from_raw_parts(start.as_ptr(), *length)
            },
            Self::Read(bytes) => bytes,
        }
    }
}

impl Drop for MappedFile {
    #[expect(unsafe_code, reason = "giving a mapping back")]
    fn drop(&mut self) {
        if let Self::Mapped { start, length } = self {
            // SAFETY: mapped by `open`, and nobody refers to it any more. Should
            // it fail, it stays until the process ends.
            let _ = unsafe { munmap(start.as_ptr().cast(), *length) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_mapped_and_what_cannot_say_the_same_as_a_read() {
        // Files of proc have no length and cannot be mapped.
        for path in ["/etc/passwd", "/proc/version"] {
            let file = MappedFile::open(Path::new(path)).unwrap();
            assert_eq!(*file, std::fs::read(path).unwrap(), "{path}");
        }
        assert!(MappedFile::open(Path::new("/proc/does-not-exist")).is_err());
    }
}
