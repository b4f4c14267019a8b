//! The configuration changes on disk, in all the ways in which people and programs
//! change files, and the agent follows without being told.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::Sockopt::Idle;
use keepalive_tests::{
    Agent, Cgroup, Need, Options, Output, Probe, Program, agent_command, output, require,
    wait_until,
};
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_secs(20);

/// Longer than the agent waits for more changes.
const WHILE: Duration = Duration::from_millis(500);

/// A main file and two directories of drop-ins, `etc` and `run`, in a directory
/// that is gone with the guard, and a cgroup.
struct Node {
    directory: tempfile::TempDir,
    cgroup: Cgroup,
}

impl Node {
    fn new() -> Result<Self> {
        Ok(Self {
            directory: tempfile::tempdir()?,
            cgroup: Cgroup::new()?,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name);
        fs::create_dir_all(path.parent().context("no directory")?)?;
        fs::write(path, text)?;
        Ok(())
    }

    /// As an editor does, or `policy set`.
    fn replace(&self, name: &str, text: &str) -> Result<()> {
        let hidden = self.path(".new");
        fs::write(&hidden, text)?;
        fs::rename(hidden, self.path(name))?;
        Ok(())
    }

    fn arguments(&self) -> Vec<PathBuf> {
        vec![
            "--config".into(),
            self.path("main.toml"),
            "--drop-in-dir".into(),
            self.path("etc"),
            "--drop-in-dir".into(),
            self.path("run"),
        ]
    }

    fn agent(&self) -> Result<Agent> {
        Agent::start_on(&self.cgroup, &self.arguments(), &["env"])
    }

    /// `policy` with these arguments.
    fn policy(&self, subcommand: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = agent_command();
        command.args(["policy", subcommand]);
        // No path is cut off.
        command.env_remove("COLUMNS");
        command.args(self.arguments()).args(arguments);
        output(&mut command, LIMIT)
    }

    /// Idle of a connection that is made now, on both ends.
    fn idle(&self) -> Result<i32> {
        let mut probe = Probe::start(Program::Static, &self.cgroup)?;
        let (connecting, accepting) = probe.connection()?;
        let options = probe.options(connecting)?;
        assert_eq!(probe.options(accepting)?, options);
        Ok(options.idle)
    }
}

fn default(idle: u32) -> String {
    format!("[default]\nidle = \"{idle}s\"\n")
}

#[test]
fn a_file_that_an_editor_replaces() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.write("main.toml", &default(71))?;
    let mut agent = node.agent()?;
    assert_eq!(node.idle()?, 71);
    node.replace("main.toml", &default(72))?;
    agent.reloaded()?;
    assert_eq!(node.idle()?, 72);
    // As vim does with a backup.
    fs::rename(node.path("main.toml"), node.path("main.toml~"))?;
    node.write("main.toml", &default(73))?;
    fs::remove_file(node.path("main.toml~"))?;
    agent.reloaded()?;
    assert_eq!(node.idle()?, 73);
    Ok(())
}

#[test]
fn a_file_that_is_truncated_and_written_is_read_when_it_is_whole() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.write("main.toml", &default(71))?;
    let mut agent = node.agent()?;
    let mut file = File::create(node.path("main.toml"))?;
    agent.not_reloaded(WHILE)?;
    file.write_all(b"[default]\nidle = \"7")?;
    agent.not_reloaded(WHILE)?;
    assert_eq!(node.idle()?, 71);
    file.write_all(b"2s\"\n")?;
    drop(file);
    agent.reloaded()?;
    assert_eq!(node.idle()?, 72);
    assert_eq!(agent.said(), "");
    Ok(())
}

#[test]
fn a_config_map_as_kubernetes_changes_it() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.write("main.toml", "")?;
    node.write("etc/..2024_1/a.toml", &default(71))?;
    symlink("..2024_1", node.path("etc/..data"))?;
    symlink("..data/a.toml", node.path("etc/a.toml"))?;
    let mut agent = node.agent()?;
    assert_eq!(node.idle()?, 71);
    for (old, new, idle) in [("1", "2", 72), ("2", "3", 73)] {
        node.write(&format!("etc/..2024_{new}/a.toml"), &default(idle))?;
        let temporary = node.path("etc/..data_tmp");
        symlink(format!("..2024_{new}"), &temporary)?;
        fs::rename(temporary, node.path("etc/..data"))?;
        agent.reloaded()?;
        assert_eq!(node.idle()?, i32::try_from(idle)?);
        fs::remove_dir_all(node.path(&format!("etc/..2024_{old}")))?;
    }
    assert_eq!(agent.said(), "");
    Ok(())
}

#[test]
fn drop_ins_come_and_go_with_their_directories() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.write("main.toml", &default(71))?;
    let mut agent = node.agent()?;
    node.write("etc/a.toml", &default(72))?;
    agent.reloaded()?;
    assert_eq!(node.idle()?, 72);
    // Of the same name, and so in its place.
    node.write("run/a.toml", &default(73))?;
    agent.reloaded()?;
    assert_eq!(node.idle()?, 73);
    fs::remove_file(node.path("run/a.toml"))?;
    symlink("/dev/null", node.path("run/a.toml"))?;
    agent.reloaded()?;
    assert_eq!(node.idle()?, 71);
    fs::remove_dir_all(node.path("run"))?;
    agent.reloaded()?;
    assert_eq!(node.idle()?, 72);
    // What is none, or says the same, is nothing to go over to.
    node.write("etc/b.conf", &default(79))?;
    node.write("etc/b.toml", &format!("# the same\n{}", default(72)))?;
    agent.not_reloaded(WHILE)?;
    assert_eq!(node.idle()?, 72);
    Ok(())
}

#[test]
fn a_bad_drop_in_changes_nothing_and_says_why() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.write("main.toml", &default(71))?;
    let mut agent = node.agent()?;
    let bad = "[[policy]]\nname = \"a\"\nport = 0\nidel = \"1s\"\n";
    node.write("run/bad.toml", bad)?;
    wait_until(LIMIT, "the agent to refuse", || {
        Ok(agent.said().contains("goes on"))
    })?;
    for line in [
        "bad.toml:3: policy.port = 0: out of range: 1 to 65535",
        "bad.toml:4: policy.idel: unknown key",
    ] {
        assert!(agent.said().contains(line), "{}", agent.said());
    }
    agent.not_reloaded(WHILE)?;
    assert_eq!(node.idle()?, 71);
    // Together with the bad one, a good one changes nothing either.
    node.write("run/good.toml", &default(72))?;
    agent.not_reloaded(WHILE)?;
    assert_eq!(node.idle()?, 71);
    assert_eq!(agent.said().matches("goes on").count(), 1, "told twice");
    fs::remove_file(node.path("run/bad.toml"))?;
    agent.reloaded()?;
    assert_eq!(node.idle()?, 72);
    Ok(())
}

#[test]
fn a_policy_that_is_set_by_command() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.write("main.toml", &default(71))?;
    let child = node.cgroup.child("child")?;
    let mut agent = node.agent()?;
    let mut probe = Probe::start(Program::Static, &child)?;
    let (existing, _) = probe.connection()?;
    assert_eq!(probe.options(existing)?, Options::on(71, 10, 6));
    let path = child.path();
    let taken = format!(
        "agent {} on {} has taken it over",
        agent.id(),
        node.cgroup.path()
    );

    let set = node.policy("set", &["--cgroup", path, "--idle", "72s"])?;
    assert_eq!(set.code, Some(0), "{set:?}");
    assert!(set.stdout.contains(&taken), "{set:?}");
    let (new, _) = probe.connection()?;
    assert_eq!(probe.options(new)?, Options::on(72, 10, 6));
    agent.reloaded()?;
    assert_eq!(node.idle()?, 71, "in the cgroup above");

    // A key more, and the first one stays.
    let bounds = "{ default = 5, at-most = 9 }";
    let set = node.policy("set", &["--cgroup", path, "--probes", bounds])?;
    assert!(set.stdout.contains(&taken), "{set:?}");
    let (new, _) = probe.connection()?;
    assert_eq!(probe.options(new)?, Options::on(72, 10, 5));
    let show = node.policy("show", &[])?;
    let line = show
        .stdout
        .lines()
        .find(|line| line.contains("5 (at most 9)"));
    let place = format!("{}/90-", node.path("run").display());
    assert!(line.context("no such line")?.contains(&place), "{show:?}");

    // What is wrong is not written.
    let before = fs::read_dir(node.path("run"))?.count();
    for (wrong, words) in [
        (
            &["--cgroup", path, "--idle", "0s"][..],
            "--idle \"0s\": out of range",
        ),
        (&["--cgroup", "x", "--idle", "1s"], "did you mean \"/x\""),
        (
            &["--name", "nobody", "--idle", "1s"],
            "has no cgroup, unit, container, remote",
        ),
        (
            &["--remote", "10.0.0.1/8", "--idle", "1s"],
            "did you mean 10.0.0.0/8",
        ),
        (&["--cgroup", path, "--path", "1s"], "must be at least 10s"),
    ] {
        let set = node.policy("set", wrong)?;
        assert_eq!(set.code, Some(1), "{set:?}");
        assert!(set.stderr.contains(words), "{set:?}");
    }
    assert_eq!(fs::read_dir(node.path("run"))?.count(), before);

    let unset = node.policy("unset", &["--cgroup", path])?;
    assert!(unset.stdout.contains(&taken), "{unset:?}");
    let (new, _) = probe.connection()?;
    assert_eq!(probe.options(new)?, Options::on(71, 10, 6));
    assert_eq!(fs::read_dir(node.path("run"))?.count(), 0);
    let unset = node.policy("unset", &["--cgroup", path])?;
    assert_eq!(unset.code, Some(1), "{unset:?}");
    Ok(())
}

#[test]
fn the_default_and_bounds_by_command() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.write("main.toml", &default(71))?;
    let mut agent = node.agent()?;
    let set = node.policy("set", &["--default", "--idle", "72s"])?;
    assert_eq!(set.code, Some(0), "{set:?}");
    agent.reloaded()?;
    assert_eq!(node.idle()?, 72);
    // A bound is added to what is there.
    let set = node.policy("set", &["--default", "--idle-at-most", "73s"])?;
    assert_eq!(set.code, Some(0), "{set:?}");
    agent.reloaded()?;
    let mut probe = Probe::start(Program::Static, &node.cgroup)?;
    let (socket, _) = probe.connection()?;
    assert_eq!(probe.options(socket)?.idle, 72);
    probe.set(socket, Idle, 7200)?;
    assert_eq!(probe.options(socket)?.idle, 73);
    let shown = node.policy("show", &["--agent"])?;
    let words = format!("agent {} on {}", agent.id(), node.cgroup.path());
    // Agents of other tests are shown too.
    let own = shown.stdout.split_once(&words);
    let (_, own) = own.with_context(|| format!("{shown:?}"))?;
    let line = own
        .lines()
        .find(|line| line.contains("72s") || line.contains("1m 12s"));
    let line = line.with_context(|| format!("{shown:?}"))?;
    assert!(line.contains("at most 1m 13s"), "{line}");
    assert!(line.contains("90-default.toml:3"), "{line}");

    // No key, no change.
    let set = node.policy("set", &["--default"])?;
    assert_eq!(set.code, Some(2), "{set:?}");
    assert_eq!(node.idle()?, 72);

    let unset = node.policy("unset", &["--default"])?;
    assert_eq!(unset.code, Some(0), "{unset:?}");
    agent.reloaded()?;
    assert_eq!(node.idle()?, 71);
    assert_eq!(fs::read_dir(node.path("run"))?.count(), 0);
    Ok(())
}

/// Such as one that hangs.
#[test]
fn what_an_agent_cannot_take_is_an_error_and_is_taken_back() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.write("main.toml", &default(71))?;
    let mut agent = node.agent()?;
    let set = node.policy("set", &["--default", "--idle", "72s"])?;
    assert_eq!(set.code, Some(0), "{set:?}");
    agent.reloaded()?;
    let before = fs::read_to_string(node.path("run/90-default.toml"))?;
    let process = Pid::from_raw(i32::try_from(agent.id())?).context("no such process")?;
    for (word, arguments) in [
        ("set", &["--default", "--idle", "73s"][..]),
        ("unset", &["--default"]),
    ] {
        kill_process(process, Signal::STOP)?;
        let done = node.policy(word, arguments)?;
        kill_process(process, Signal::CONT)?;
        assert_eq!(done.code, Some(1), "{done:?}");
        assert!(done.stderr.contains("has not taken it over"), "{done:?}");
        assert_eq!(
            fs::read_to_string(node.path("run/90-default.toml"))?,
            before
        );
    }
    wait_until(Duration::from_secs(10), "the policy from before", || {
        Ok(node.idle()? == 72)
    })
}

#[test]
fn the_file_in_an_editor() -> Result<()> {
    require!();
    let node = Node::new()?;
    node.write("main.toml", &default(71))?;
    let mut agent = node.agent()?;
    let edit = |editor: &str| -> Result<Output> {
        let mut command = agent_command();
        command.args(["policy", "edit"]).args(node.arguments());
        command.env_remove("VISUAL").env("EDITOR", editor);
        output(command.stdin(Stdio::null()), Duration::from_mins(1))
    };
    let done = edit("sed -i s/71s/72s/")?;
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.stdout.contains("has taken it over"), "{done:?}");
    agent.reloaded()?;
    assert_eq!(node.idle()?, 72);
    for (editor, code, words) in [
        ("true", 0, "nothing is changed"),
        ("false", 1, "the editor ended with"),
        ("sed -i s/72s/0s/", 1, "out of range"),
        ("/nonexistent/editor", 1, "nothing is changed"),
    ] {
        let done = edit(editor)?;
        assert_eq!(done.code, Some(code), "{done:?}");
        let said = done.stdout.clone() + &done.stderr;
        assert!(said.contains(words), "{done:?}");
        assert_eq!(fs::read_to_string(node.path("main.toml"))?, default(72));
    }
    Ok(())
}

#[test]
fn a_policy_of_another_file_is_overridden_but_not_removed() -> Result<()> {
    require!();
    let node = Node::new()?;
    let path = node.cgroup.path().to_owned();
    let own = format!("[[policy]]\nname = \"own\"\ncgroup = \"{path}\"\nidle = \"71s\"\n");
    node.write("main.toml", &own)?;
    let mut agent = node.agent()?;
    // It is found by its cgroup.
    let set = node.policy("set", &["--cgroup", &path, "--idle", "72s"])?;
    assert_eq!(set.code, Some(0), "{set:?}");
    agent.reloaded()?;
    assert_eq!(node.idle()?, 72);
    let unset = node.policy("unset", &["own"])?;
    let still = format!("still in {}:1", node.path("main.toml").display());
    assert!(unset.stdout.contains(&still), "{unset:?}");
    agent.reloaded()?;
    assert_eq!(node.idle()?, 71);
    let unset = node.policy("unset", &["own"])?;
    let place = format!(
        "edit it where it is: {}:1",
        node.path("main.toml").display()
    );
    assert_eq!(unset.code, Some(1), "{unset:?}");
    assert!(unset.stderr.contains(&place), "{unset:?}");
    assert_eq!(fs::read_to_string(node.path("main.toml"))?, own);

    // A file that is read later is named.
    node.write(
        "run/95-later.toml",
        "[[policy]]\nname = \"own\"\nidle = \"75s\"\n",
    )?;
    agent.reloaded()?;
    let set = node.policy("set", &["--name", "own", "--idle", "76s"])?;
    let word = "95-later.toml:3, which is read after it, has the last word on idle";
    assert!(set.stdout.contains(word), "{set:?}");
    assert_eq!(node.idle()?, 75);
    Ok(())
}

/// Where everything is on a machine: with nothing named, in a mount namespace that
/// has an /etc and a /run of its own.
#[test]
fn the_directories_of_every_machine() -> Result<()> {
    require!(Need::Program("unshare"), Need::Program("nsenter"));
    let cgroup = Cgroup::new()?;
    let own = "mount -t tmpfs none /etc && mount -t tmpfs none /run && exec \"$@\"";
    let by = ["unshare", "--mount", "sh", "-c", own, "sh"];
    let mut agent = Agent::start_on::<&str>(&cgroup, &[], &by)?;
    let root = PathBuf::from(format!("/proc/{}/root", agent.id()));
    let idle = || -> Result<i32> {
        let mut probe = Probe::start(Program::Static, &cgroup)?;
        let (connecting, _) = probe.connection()?;
        Ok(probe.options(connecting)?.idle)
    };
    assert_eq!(idle()?, 60, "the built-in policy");
    let policy = |arguments: &[&str]| {
        let mut command = Command::new("nsenter");
        let mount = format!("--mount=/proc/{}/ns/mnt", agent.id());
        command.arg(mount).arg(agent_command().get_program());
        command.arg("policy").args(arguments);
        output(&mut command, LIMIT)
    };
    let of_test = ["--cgroup", cgroup.path()];
    let set = policy(&[&["set"][..], &of_test, &["--idle", "72s", "--permanent"]].concat())?;
    assert_eq!(set.code, Some(0), "{set:?}");
    assert!(
        set.stdout.contains("wrote /etc/keepalive/conf.d/80-"),
        "{set:?}"
    );
    assert!(set.stdout.contains("has taken it over"), "{set:?}");
    assert_eq!(idle()?, 72);
    let set = policy(&[&["set"][..], &of_test, &["--idle", "73s"]].concat())?;
    assert!(
        set.stdout.contains("wrote /run/keepalive/conf.d/90-"),
        "{set:?}"
    );
    assert_eq!(idle()?, 73);
    let mode = |path: &Path| -> Result<u32> {
        use std::os::unix::fs::PermissionsExt;
        Ok(fs::metadata(path)?.permissions().mode() & 0o777)
    };
    assert_eq!(mode(&root.join("run/keepalive"))?, 0o700);
    assert_eq!(mode(&root.join("run/keepalive/conf.d"))?, 0o755);
    // The main file ends what is built in.
    fs::write(root.join("etc/keepalive/keepalive.toml"), default(74))?;
    let unset = policy(&[&["unset"][..], &of_test].concat())?;
    assert!(unset.stdout.contains("removed /run"), "{unset:?}");
    assert!(
        unset.stdout.contains("still in /etc/keepalive/conf.d/80-"),
        "{unset:?}"
    );
    let unset = policy(&[&["unset"][..], &of_test].concat())?;
    assert_eq!(unset.code, Some(1), "{unset:?}");
    assert!(unset.stderr.contains("--permanent"), "{unset:?}");
    let unset = policy(&[&["unset"][..], &of_test, &["--permanent"]].concat())?;
    assert!(unset.stdout.contains("removed /etc"), "{unset:?}");
    wait_until(LIMIT, "the main file", || Ok(idle()? == 74))?;
    while agent.not_reloaded(WHILE).is_err() {}
    ensure!(!agent.said().contains("ERROR"), "{}", agent.said());
    Ok(())
}
