use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::{Cgroup, Place, Process, Program, output, wait_until};

/// Time for one command of docker's.
const LIMIT: Duration = Duration::from_mins(1);

/// A dockerd of a test's own, with directories, a network namespace and cgroups of
/// its own. What it is made of is gone with it and its cgroup.
#[derive(Debug)]
pub struct Docker {
    daemon: Process,
    socket: String,
    // Removed last.
    directory: tempfile::TempDir,
}

/// The image that has the helper program in it.
const IMAGE: &str = "first:1";

impl Docker {
    /// Starts it, with its containers in cgroups below this one, and makes an image
    /// of [`Program::First`].
    ///
    /// # Errors
    ///
    /// dockerd does not start, or does not answer in time.
    pub fn start(cgroup: &Cgroup) -> Result<Self> {
        const MOUNT_AND_START: &str = "umount -R /sys/fs/cgroup; \
            mount -t cgroup2 none /sys/fs/cgroup && mount -t tmpfs none /run && \
            mount -t tmpfs none /var/lib && ip link set lo up && exec \"$@\"";
        let directory = tempfile::tempdir()?;
        let socket = format!("unix://{}/socket", directory.path().display());
        let own = cgroup.child("daemon")?;
        let log = fs::File::create(directory.path().join("log"))?;
        let mut command = Place::from(&own).command("unshare");
        command.args(["--mount", "--net", "sh", "-c", MOUNT_AND_START, "sh"]);
        command.args(["dockerd", "--host", &socket]);
        command.args(["--iptables=false", "--bridge=none", "--storage-driver=vfs"]);
        command.args(["--exec-opt", "native.cgroupdriver=cgroupfs"]);
        command.args(["--cgroup-parent", &format!("{}/docker", cgroup.path())]);
        command.stdout(log.try_clone()?).stderr(log);
        let docker = Self {
            daemon: Process::start(&mut command)?.ended_by(Signal::TERM),
            socket,
            directory,
        };
        // The guard of the test's cgroup removes this one too.
        std::mem::forget(own);
        let up = wait_until(LIMIT, "dockerd to answer", || {
            Ok(docker.run(&["version"]).is_ok())
        });
        up.with_context(|| docker.log())?;
        docker.import()?;
        Ok(docker)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn import(&self) -> Result<()> {
        let root = tempfile::tempdir()?;
        fs::copy(Program::First.path()?, root.path().join("first"))?;
        let archive = self.directory.path().join("image.tar");
        let mut tar = Command::new("tar");
        tar.arg("-C")
            .arg(root.path())
            .arg("-cf")
            .arg(&archive)
            .arg(".");
        let made = output(&mut tar, LIMIT)?;
        ensure!(made.code == Some(0), "{}", made.stderr);
        let archive = archive.to_str().context("no text")?;
        self.run(&["import", archive, IMAGE]).map(drop)
    }

    /// Words that run a command where the daemon's files are.
    #[must_use]
    pub fn beside(&self) -> [String; 3] {
        let pid = self.daemon.id();
        [
            "nsenter".to_owned(),
            format!("--mount=/proc/{pid}/ns/mnt"),
            "--".to_owned(),
        ]
    }

    /// Runs a command of docker's; what it printed.
    ///
    /// # Errors
    ///
    /// It fails.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let mut docker = Command::new("docker");
        docker.args(["--host", &self.socket]).args(words);
        docker.env("DOCKER_CONFIG", Path::new("/nonexistent"));
        let done = output(&mut docker, LIMIT)?;
        ensure!(done.code == Some(0), "docker {words:?}: {}", done.stderr);
        Ok(done.stdout)
    }

    /// Runs the program in a new container with these options of `docker run`, and
    /// returns the lines that it printed.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn first(&self, options: &[&str]) -> Result<Vec<String>> {
        let words = ["run", "--rm", "--network=host"];
        let words = [&words, options, &[IMAGE, "/first"]].concat();
        Ok(self.run(&words)?.lines().map(str::to_owned).collect())
    }

    /// Starts a container that stays, and returns its id.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn stay(&self, options: &[&str]) -> Result<String> {
        let words = ["run", "--detach", "--network=host"];
        let words = [&words, options, &[IMAGE, "/first", "300"]].concat();
        Ok(self.run(&words)?.trim().to_owned())
    }
}
