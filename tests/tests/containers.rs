//! A real container, with namespaces of its own and nothing in its file system
//! but a static program: governed through the cgroup its runtime puts it in.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{Agent, Cgroup, Need, Options, Place, Probe, Program, output, require};
use serde_json::json;

/// A container of runc's.
struct Container {
    probe: Probe,
    state: PathBuf,
    _directory: tempfile::TempDir,
}

impl Container {
    /// Starts the probe as the only program of a container in this cgroup, which
    /// runc makes.
    fn start(cgroup: &str) -> Result<Self> {
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

    /// The process id of the program in the container, as seen from here.
    fn process(&self) -> Result<u64> {
        let mut command = Place::default().command("runc");
        command
            .arg("--root")
            .arg(&self.state)
            .args(["state", "probe"]);
        let output = output(&mut command, Duration::from_secs(10))?;
        ensure!(output.code == Some(0), "runc state: {}", output.stderr);
        let state: serde_json::Value = serde_json::from_str(&output.stdout)?;
        state["pid"].as_u64().context("no pid")
    }
}

#[test]
fn two_containers_with_different_policies() -> Result<()> {
    require!(Need::Program("runc"), Need::Program("unshare"));
    let root = Cgroup::new()?;
    let (red, blue) = (root.child("red")?, root.child("blue")?);
    let config = format!(
        "[[policy]]\nname = \"red\"\ncgroup = \"{}\"\nidle = \"71s\"\n\
         [[policy]]\nname = \"blue\"\ncgroup = \"{}\"\nidle = \"72s\"\n",
        red.path(),
        blue.path()
    );
    let agent = Agent::start(&root, &config)?;
    // The cgroups of the containers themselves do not exist yet.
    for (parent, idle) in [(&red, 71), (&blue, 72)] {
        let path = format!("{}/container", parent.path());
        let mut container = Container::start(&path)?;
        let (connecting, accepting) = container.probe.connection()?;
        for socket in [connecting, accepting] {
            let options = container.probe.options(socket)?;
            assert_eq!(options, Options::on(idle, 10, 6));
        }
        let process = PathBuf::from(format!("/proc/{}", container.process()?));
        let cgroups = fs::read_to_string(process.join("cgroup"))?;
        let expected = format!("0::{path}");
        assert!(cgroups.lines().any(|line| line == expected), "{cgroups}");
        for namespace in ["net", "pid", "mnt"] {
            let link = |process: PathBuf| fs::read_link(process.join("ns").join(namespace));
            assert_ne!(link(process.clone())?, link(PathBuf::from("/proc/self"))?);
        }
        container.probe.finish()?;
    }
    let finished = agent.stop()?;
    for name in ["red", "blue"] {
        assert_eq!(finished.count(name, "seen"), 2);
        assert_eq!(finished.count(name, "turned_on"), 2);
    }
    Ok(())
}
