use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{Place, Probe, Program, output};

/// A container of runc's.
#[derive(Debug)]
pub struct Container {
    probe: Probe,
    state: PathBuf,
    _directory: tempfile::TempDir,
}

impl Container {
    /// Starts the probe as the only program of a container in this cgroup, which
    /// runc makes.
    ///
    /// # Errors
    ///
    /// The probe does not build, or runc does not start.
    pub fn start(cgroup: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let bundle = directory.path().join("bundle");
        let state = directory.path().join("state");
        fs::create_dir_all(bundle.join("rootfs/proc"))?;
        fs::copy(Program::Static.path()?, bundle.join("rootfs/probe"))?;
        let namespaces = ["pid", "network", "mount", "ipc", "uts"];
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": ["/probe"], "cwd": "/", "user": { "uid": 0, "gid": 0 }
            },
            "root": { "path": "rootfs", "readonly": true },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": {
                "namespaces": namespaces.map(|kind| json!({ "type": kind })),
                "cgroupsPath": cgroup,
                "resources": { "devices": [{ "allow": true, "access": "rwm" }] },
            },
        });
        fs::write(bundle.join("config.json"), config.to_string())?;
        // runc wants cgroup v2 at its usual place, where a hybrid host has others.
        let mut command = Place::default().command("unshare");
        command.args(["--mount", "sh", "-c"]);
        command.arg("mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"");
        command.args(["sh", "runc", "--root"]).arg(&state);
        command.arg("run").arg("--bundle").arg(&bundle).arg("probe");
        let probe = Probe::start_by(&mut command)?;
        Ok(Self {
            probe,
            state,
            _directory: directory,
        })
    }

    /// The program in the container.
    pub fn probe(&mut self) -> &mut Probe {
        &mut self.probe
    }

    /// The process id of the program in the container, as seen from here.
    ///
    /// # Errors
    ///
    /// runc does not know of it.
    pub fn process(&self) -> Result<u32> {
        let mut command = Place::default().command("runc");
        command
            .arg("--root")
            .arg(&self.state)
            .args(["state", "probe"]);
        let output = output(&mut command, Duration::from_secs(10))?;
        ensure!(output.code == Some(0), "runc state: {}", output.stderr);
        let state: serde_json::Value = serde_json::from_str(&output.stdout)?;
        let process = state["pid"].as_u64().context("no pid")?;
        Ok(u32::try_from(process)?)
    }

    /// Lets the program, and with it the container, end by itself.
    ///
    /// # Errors
    ///
    /// It does not, or fails.
    pub fn finish(self) -> Result<()> {
        self.probe.finish()
    }
}
