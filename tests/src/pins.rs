use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::Cgroup;
use crate::cgroup::is_abandoned;

/// Where a BPF file system is mounted; an agent mounts it where it is not.
const BPF_FS: &str = "/sys/fs/bpf";

/// A directory for pins of a test's own. What is pinned there goes with it.
#[derive(Debug)]
pub struct Pins {
    name: String,
}

impl Pins {
    /// Names a new directory, which an agent is to make.
    #[must_use]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(remove_abandoned);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            name: format!("{BPF_FS}/kat-{}-{n}", std::process::id()),
        }
    }

    /// Its path.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The link that is pinned for a cgroup.
    ///
    /// # Errors
    ///
    /// The cgroup is gone.
    pub fn link(&self, cgroup: &Cgroup) -> Result<PathBuf> {
        let directory = Path::new(&self.name).join(cgroup.id()?.to_string());
        Ok(directory.join("link"))
    }

    /// The names of all pins, and of the directories they are in.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn all(&self) -> Result<Vec<PathBuf>> {
        let mut all = Vec::new();
        let mut unread = vec![PathBuf::from(&self.name)];
        while let Some(directory) = unread.pop() {
            let entries = match fs::read_dir(&directory) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                entries => entries.with_context(|| directory.display().to_string())?,
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    unread.push(entry.path());
                }
                all.push(entry.path());
            }
        }
        Ok(all)
    }
}

impl Default for Pins {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        remove(Path::new(&self.name));
    }
}

fn remove(directory: &Path) {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            eprintln!("{} stays behind: {error}", directory.display());
        }
        _ => {}
    }
}

/// A test process that was killed could not clean up: the next one does.
fn remove_abandoned() {
    for entry in fs::read_dir(BPF_FS).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_abandoned) {
            remove(&entry.path());
        }
    }
}
