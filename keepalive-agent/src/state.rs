//! State: what agents enforce, written down for other processes and for the
//! next agent.
//!
//! Each running agent keeps a file that only root can read. `sockets` reads it to
//! name the policy behind a value; the next agent on the same cgroup reads the
//! one left behind, to recognise the values of its predecessor.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{
    config::Config,
    hierarchy::{Cgroup, Hierarchy},
};

/// Where the files are: gone with the boot, as the cgroups are.
const DIRECTORY: &str = "/run/keepalive";

/// What an agent enforces.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Running {
    /// Its process id.
    pub pid: u32,
    /// Where its program is attached.
    pub root: Cgroup,
    /// Its policies and what they claim.
    pub config: Config,
}

/// An agent's own file. The lock on it says that the agent lives.
pub struct Own {
    path: PathBuf,
    lock: File,
}

/// What all agents enforce that are running now.
///
/// # Errors
///
/// When a file cannot be read or understood.
pub fn running() -> Result<Vec<Running>> {
    let mut running = Vec::new();
    for path in files()? {
        if is_locked(&path)? {
            running.extend(read(&path)?);
        }
    }
    Ok(running)
}

/// What the last agent on this cgroup enforced, if it is gone; its file is
/// removed, with those of agents on cgroups that do not exist any more.
///
/// # Errors
///
/// When the files cannot be read.
pub fn take_over(hierarchy: &Hierarchy, root: &Cgroup) -> Result<Option<Config>> {
    let mut last = None;
    for path in files()? {
        if is_locked(&path)? {
            continue;
        }
        // One that cannot be understood is of another version: nobody's.
        let left = read(&path).ok().flatten();
        if let Some(left) = left {
            let exists = hierarchy.lookup(&left.root.path)?.as_ref() == Some(&left.root);
            if exists && left.root != *root {
                continue;
            }
            if exists {
                last = Some(left.config);
            }
        }
        remove(&path);
    }
    Ok(last)
}

impl Own {
    /// Writes what this agent enforces.
    ///
    /// # Errors
    ///
    /// When the file cannot be made.
    pub fn write(root: &Cgroup, config: &Config) -> Result<Self> {
        let pid = std::process::id();
        let path = Path::new(DIRECTORY).join(format!("{pid}.json"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(DIRECTORY)
            .with_context(|| format!("making {DIRECTORY}"))?;
        let lock = open(&lock_of(&path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .with_context(|| format!("locking {}", lock_of(&path).display()))?;
        let own = Self { path, lock };
        own.rewrite(root, config)?;
        Ok(own)
    }

    /// Writes what it enforces from now on; readers see the old or the new.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn rewrite(&self, root: &Cgroup, config: &Config) -> Result<()> {
        debug_assert!(self.lock.metadata().is_ok());
        let running = Running {
            pid: std::process::id(),
            root: root.clone(),
            config: config.clone(),
        };
        let temporary = self.path.with_extension("new");
        let mut file = open(&temporary)?;
        file.set_len(0)?;
        file.write_all(&serde_json::to_vec(&running)?)
            .with_context(|| format!("writing {}", temporary.display()))?;
        fs::rename(&temporary, &self.path)
            .with_context(|| format!("writing {}", self.path.display()))
    }
}

/// The files of agents, running or not. None where none has run.
fn files() -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("reading {DIRECTORY}")),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            files.push(path);
        }
    }
    Ok(files)
}

fn read(path: &Path) -> Result<Option<Running>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    let running = serde_json::from_slice(&text)
        .with_context(|| format!("understanding {}", path.display()))?;
    Ok(Some(running))
}

/// Whether the agent that wrote the file is alive.
fn is_locked(path: &Path) -> Result<bool> {
    let lock = match File::open(lock_of(path)) {
        Ok(lock) => lock,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => bail!("opening {}: {error}", lock_of(path).display()),
    };
    Ok(flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
}

/// Removes the file of an agent that is gone; somebody else may have been faster.
fn remove(path: &Path) {
    let _ = fs::remove_file(path);
    let _ = fs::remove_file(lock_of(path));
}

fn lock_of(path: &Path) -> PathBuf {
    path.with_extension("lock")
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}
