//! A config that somebody else than root can have written is refused with the
//! reason, and the policy in force goes on.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use keepalive_tests::{
    Agent, Cgroup, Need, Output, Probe, Program, agent_binary, agent_command, output, require,
    wait_until,
};

const LIMIT: Duration = Duration::from_mins(1);

/// An unprivileged user.
const SOMEBODY: u32 = 4711;

struct Node {
    directory: tempfile::TempDir,
}

impl Node {
    /// A directory of drop-ins with one of them in it, as root has it.
    fn new() -> Result<Self> {
        let node = Self {
            directory: tempfile::tempdir()?,
        };
        fs::create_dir(node.drop_ins())?;
        fs::write(node.main(), "[default]\nidle = \"71s\"\n")?;
        fs::write(node.drop_in(), "[default]\nidle = \"72s\"\n")?;
        Ok(node)
    }

    fn main(&self) -> PathBuf {
        self.directory.path().join("main.toml")
    }

    fn drop_ins(&self) -> PathBuf {
        self.directory.path().join("conf.d")
    }

    fn drop_in(&self) -> PathBuf {
        self.drop_ins().join("a.toml")
    }

    fn arguments(&self) -> [PathBuf; 4] {
        [
            "--config".into(),
            self.main(),
            "--drop-in-dir".into(),
            self.drop_ins(),
        ]
    }

    fn read(&self) -> Result<Output> {
        let mut command = agent_command();
        output(
            command.args(["policy", "show"]).args(self.arguments()),
            LIMIT,
        )
    }

    /// Makes sure that the config is refused as it stands now, for this reason.
    fn refused(&self, reason: &str) -> Result<()> {
        let checked = self.read()?;
        assert_eq!(checked.code, Some(1), "{reason}: {}", checked.stderr);
        let said = checked.stderr.contains(reason);
        assert!(said, "`{reason}` is not in {}", checked.stderr);
        Ok(())
    }

    fn accepted(&self) -> Result<()> {
        let checked = self.read()?;
        assert_eq!(checked.code, Some(0), "{}", checked.stderr);
        Ok(())
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

#[test]
fn every_way_to_write_it_is_noticed() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.accepted()?;
    for path in [node.drop_in(), node.main(), node.drop_ins()] {
        let name = path.file_name().context("a name")?.display().to_string();
        chown(&path, Some(SOMEBODY), None)?;
        node.refused(&format!("{name} belongs to uid {SOMEBODY}"))?;
        chown(&path, Some(0), None)?;
        let mode = fs::metadata(&path)?.permissions().mode() & 0o777;
        for others in [0o002, 0o020] {
            set_mode(&path, mode | others)?;
            node.refused(&format!("{name} (mode {:04o})", mode | others))?;
        }
        set_mode(&path, mode)?;
        node.accepted()?;
    }
    // A link of somebody's in a directory of root's, to a file of root's.
    let link = node.drop_ins().join("b.toml");
    symlink(node.drop_in(), &link)?;
    node.accepted()?;
    lchown(&link, Some(SOMEBODY), None)?;
    node.refused(&format!("b.toml belongs to uid {SOMEBODY}"))?;
    fs::remove_file(&link)?;
    // A pipe without a writer, of whomever.
    let made = Command::new("mkfifo").arg(&link).status()?;
    assert!(made.success());
    node.refused("b.toml: not a regular file")?;
    Ok(())
}

/// What an unprivileged user can do in a directory that all may write.
#[test]
fn somebody_elses_drop_in_changes_nothing() -> Result<()> {
    require!(Need::Program("setpriv"));
    let cgroup = Cgroup::new()?;
    let node = Node::new()?;
    set_mode(node.directory.path(), 0o755)?;
    let arguments = node.arguments();
    let mut agent = Agent::start_on(&cgroup, &arguments, &["env"])?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let mut idle = || -> Result<i32> {
        let (connecting, _) = probe.connection()?;
        Ok(probe.options(connecting)?.idle)
    };
    assert_eq!(idle()?, 72);

    set_mode(&node.drop_ins(), 0o1777)?;
    let mut somebody = Command::new("setpriv");
    let id = SOMEBODY.to_string();
    somebody.args(["--reuid", &id, "--regid", &id, "--clear-groups", "sh", "-c"]);
    somebody.arg(r#"printf '[default]\nkeepalive = "off"\n' >"$0"/z.toml"#);
    let written = output(somebody.arg(node.drop_ins()), LIMIT)?;
    assert_eq!(written.code, Some(0), "{}", written.stderr);
    wait_until(LIMIT, "the agent to refuse it", || {
        Ok(agent.said().contains("conf.d (mode 1777)"))
    })?;
    agent.not_reloaded(Duration::from_millis(300))?;
    assert_eq!(idle()?, 72);

    // Root takes it out and mends the mode.
    fs::remove_file(node.drop_ins().join("z.toml"))?;
    set_mode(&node.drop_ins(), 0o755)?;
    fs::write(node.drop_in(), "[default]\nidle = \"73s\"\n")?;
    agent.reloaded()?;
    assert_eq!(idle()?, 73);
    Ok(())
}

/// As the kubelet makes it: all may write the directory, which is mounted
/// read-only, and files are links into a version of it.
/// Runs a script in a mount namespace of its own, with a directory and the agent as
/// its arguments.
fn with_mounts(script: &str, place: &Path) -> Result<Output> {
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(place);
    output(command.arg(agent_binary()), LIMIT)
}

/// A service that systemd shields sees everything read-only, and others write all the
/// same.
#[test]
fn what_only_looks_read_only_is_not_read() -> Result<()> {
    require!(Need::Program("unshare"));
    let place = tempfile::tempdir()?;
    let script = r#"
        set -e
        mount --make-rprivate /
        mount -t tmpfs -o mode=0755 volume "$0"
        mkdir -m 0777 "$0/conf.d"
        printf '[default]\nidle = "74s"\n' >"$0/main.toml"
        cp "$0/main.toml" "$0/conf.d/a.toml"
        mount -o remount,ro,bind "$0"
        exec "$1" policy show --config "$0/main.toml" --drop-in-dir "$0/conf.d"
    "#;
    let refused = with_mounts(script, place.path())?;
    assert_eq!(refused.code, Some(1), "{}", refused.stdout);
    assert!(refused.stderr.contains("(mode 0777)"), "{}", refused.stderr);
    Ok(())
}

#[test]
fn a_volume_of_kubernetes_is_read() -> Result<()> {
    require!(Need::Program("unshare"));
    let place = tempfile::tempdir()?;
    let script = r#"
        set -e
        mount --make-rprivate /
        mount -t tmpfs -o mode=0777 volume "$0"
        mkdir "$0/..1"
        printf '[default]\nidle = "74s"\n' >"$0/..1/a.toml"
        ln -s ..1 "$0/..data"
        ln -s ..data/a.toml "$0/a.toml"
        "$1" policy show --config "$0/..1/a.toml" --drop-in-dir "$0" && exit 9
        mount -o remount,ro,bind "$0"
        exec "$1" policy show --config "$0/..1/a.toml" --drop-in-dir "$0"
    "#;
    let shown = with_mounts(script, place.path())?;
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    assert!(shown.stderr.contains("(mode 0777)"), "{}", shown.stderr);
    assert!(
        shown.stdout.contains("74s") || shown.stdout.contains("1m 14s"),
        "{}",
        shown.stdout
    );
    Ok(())
}
