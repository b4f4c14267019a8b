use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait_until;

/// A cgroup of a test's own. With it go the processes in it and the cgroups below.
#[derive(Debug)]
pub struct Cgroup {
    directory: PathBuf,
    path: String,
}

impl Cgroup {
    /// Makes a new cgroup below the root of the hierarchy.
    ///
    /// # Errors
    ///
    /// There is no cgroup v2, or this process may not write there.
    pub fn new() -> Result<Self> {
        Self::with_suffix("")
    }

    /// The same with a name that ends so, such as that of a unit in `.service`.
    ///
    /// # Errors
    ///
    /// As [`Cgroup::new`].
    pub fn with_suffix(suffix: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        let root = hierarchy()?;
        SWEEP.call_once(|| remove_abandoned(&root));
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kat-{}-{n}{suffix}", std::process::id());
        Self::make(&root, "", name.as_ref())
    }

    /// Makes a cgroup below this one. A configuration can only name it where its
    /// name is UTF-8; [`Cgroup::path`] is not its path elsewhere.
    ///
    /// # Errors
    ///
    /// It exists already, or this cgroup is gone.
    pub fn child(&self, name: impl AsRef<OsStr>) -> Result<Self> {
        Self::make(&self.directory, &self.path, name.as_ref())
    }

    /// Makes a cgroup some levels below this one, and those between them that do
    /// not exist, as `mkdir -p` does. Those go with this one.
    ///
    /// # Errors
    ///
    /// This cgroup is gone.
    pub fn descendant(&self, path: &str) -> Result<Self> {
        let directory = self.directory.join(path);
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make the cgroup {}", directory.display()))?;
        Ok(Self {
            directory,
            path: format!("{}/{path}", self.path),
        })
    }

    /// The number by which the kernel knows it.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn id(&self) -> Result<u64> {
        Ok(fs::metadata(&self.directory)?.ino())
    }

    fn make(parent: &Path, parent_path: &str, name: &OsStr) -> Result<Self> {
        let directory = parent.join(name);
        fs::create_dir(&directory)
            .with_context(|| format!("cannot make the cgroup {}", directory.display()))?;
        Ok(Self {
            directory,
            path: format!("{parent_path}/{}", name.display()),
        })
    }

    /// Where it is in the file system.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its path in the hierarchy, as a configuration names it.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Moves a process into it.
    ///
    /// # Errors
    ///
    /// The process or the cgroup is gone.
    pub fn take_in(&self, process: u32) -> Result<()> {
        fs::write(self.directory.join("cgroup.procs"), process.to_string())
            .with_context(|| format!("cannot move {process} into {}", self.path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.directory);
    }
}

/// Where cgroup v2 is mounted.
///
/// # Errors
///
/// Nowhere.
pub fn hierarchy() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    mounts
        .lines()
        .find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let point = mount.split(' ').nth(4)?;
            kind.starts_with("cgroup2 ").then(|| PathBuf::from(point))
        })
        .context("no cgroup v2 is mounted")
}

/// Ends what runs in a cgroup of ours and removes it, from the bottom up. A killed
/// process leaves its cgroup a moment later, hence the second and third try.
fn remove(directory: &Path) {
    let removed = wait_until(Duration::from_secs(5), "a cgroup to be empty", || {
        kill(directory);
        remove_tree(directory)
    });
    if let Err(error) = removed {
        eprintln!("{} stays behind: {error:#}", directory.display());
    }
}

fn remove_tree(directory: &Path) -> Result<bool> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !remove_tree(&entry.path())? {
            return Ok(false);
        }
    }
    match fs::remove_dir(directory) {
        Ok(()) => Ok(true),
        Err(error) => Ok(error.kind() == ErrorKind::NotFound),
    }
}

/// `cgroup.kill` ends the whole subtree at once; it came with Linux 5.14.
fn kill(directory: &Path) {
    if fs::write(directory.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    let members = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|line| line.parse().ok()) {
        if let Some(pid) = Pid::from_raw(pid) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            kill(&entry.path());
        }
    }
}

/// A test process that was killed could not clean up: the next one does.
fn remove_abandoned(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_abandoned) {
            remove(&entry.path());
        }
    }
}

/// Whether a test process made something by this name, and is gone.
pub(crate) fn is_abandoned(name: &str) -> bool {
    let owner = name
        .strip_prefix("kat-")
        .and_then(|rest| rest.split('-').next())
        .and_then(|pid| pid.parse::<u32>().ok());
    owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}
