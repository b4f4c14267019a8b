//! `exec`: a command with a policy of its own.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use keepalive_tests::{
    Agent, Cgroup, Need, Options, Pins, Place, Probe, Process, Program, agent_binary,
    agent_command, output, require, wait_until,
};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_mins(1);

/// `exec` with these options in a cgroup, before the words of a command.
fn exec(cgroup: &Cgroup, options: &[&str]) -> Command {
    let mut command = Place::from(cgroup).command(agent_binary());
    command.arg("exec").args(options).arg("--");
    command
}

/// Waits until nothing is left of it in the cgroup that it was run in.
fn wait_until_nothing_is_left(cgroup: &Cgroup) -> Result<()> {
    wait_until(LIMIT, "the cgroup to be removed", || {
        let mut entries = fs::read_dir(cgroup.directory())?.flatten();
        let processes = fs::read_to_string(cgroup.directory().join("cgroup.procs"))?;
        Ok(processes.is_empty() && !entries.any(|entry| entry.path().is_dir()))
    })
}

#[test]
fn a_policy_of_its_own() -> Result<()> {
    require!(Need::Built(Program::Static), Need::Built(Program::First));
    let cgroup = Cgroup::new()?;
    let mut probe =
        Probe::start_by(exec(&cgroup, &["--idle", "33s"]).arg(Program::Static.path()?))?;
    let (socket, _) = probe.connection()?;
    assert_eq!(probe.options(socket)?, Options::on(33, 10, 6));
    // What is beside it is left alone.
    let mut beside = Probe::start(Program::Static, &cgroup)?;
    let (other, _) = beside.connection()?;
    assert_eq!(beside.options(other)?, Options::UNTOUCHED);
    beside.finish()?;
    probe.finish()?;
    wait_until_nothing_is_left(&cgroup)?;

    for (variables, expected) in [
        (
            &[("KEEPIDLE", "34"), ("KEEPINTVL", "5"), ("KEEPCNT", "4")][..],
            "1 34 5 4",
        ),
        (&[("TCP_KEEPIDLE", "35"), ("KEEPIDLE", "34")], "1 35 10 6"),
        (&[("KEEPALIVE", "off"), ("KEEPIDLE", "34")], "0 34 10 6"),
    ] {
        let mut command = exec(&cgroup, &[]);
        command
            .arg(Program::First.path()?)
            .envs(variables.iter().copied());
        let done = output(&mut command, LIMIT)?;
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        assert_eq!(done.stdout.lines().next(), Some(expected), "{variables:?}");
    }
    wait_until_nothing_is_left(&cgroup)
}

#[test]
fn ends_as_the_command_does() -> Result<()> {
    require!(Need::Program("sh"));
    let cgroup = Cgroup::new()?;
    for (words, code) in [
        (&["sh", "-c", "exit 7"][..], 7),
        // Its own children are all that it finds.
        (
            &[
                "sh",
                "-c",
                "read -r all </proc/$$/task/$$/children; test -z \"$all\"",
            ],
            0,
        ),
        (&["/nonexistent"], 127),
        (&["/"], 126),
    ] {
        let done = output(exec(&cgroup, &[]).args(words), LIMIT)?;
        assert_eq!(done.code, Some(code), "{words:?}: {}", done.stderr);
    }
    let done = output(exec(&cgroup, &["--idle", "5"]).arg("true"), LIMIT)?;
    assert_eq!(done.code, Some(1));
    assert!(done.stderr.contains("idle"), "{}", done.stderr);

    let mut command = Process::start(exec(&cgroup, &[]).args(["sleep", "100"]))?;
    let is_sleep = || {
        let name = fs::read_to_string(format!("/proc/{}/comm", command.id()))?;
        Ok(name.trim() == "sleep")
    };
    wait_until(LIMIT, "the command to begin", is_sleep)?;
    command.signal(Signal::TERM)?;
    assert_eq!(command.wait(LIMIT)?.signal(), Some(15));
    wait_until_nothing_is_left(&cgroup)
}

/// Whatever of it is killed, no cgroup stays, at the latest from the next start on.
#[test]
fn leaves_nothing_behind() -> Result<()> {
    require!(Need::Built(Program::Static));
    let cgroup = Cgroup::new()?;
    let start = || Probe::start_by(exec(&cgroup, &[]).arg(Program::Static.path()?));
    let mut killed = start()?;
    killed.connection()?;
    drop(killed);
    wait_until_nothing_is_left(&cgroup)?;

    let mut orphan = start()?;
    orphan.connection()?;
    let supervisors = fs::read_to_string(cgroup.directory().join("cgroup.procs"))?;
    let [supervisor] = supervisors.lines().collect::<Vec<_>>()[..] else {
        anyhow::bail!("not one supervisor: {supervisors}");
    };
    let supervisor = rustix::process::Pid::from_raw(supervisor.parse()?).context("no process")?;
    rustix::process::kill_process(supervisor, Signal::KILL)?;
    wait_until(LIMIT, "enforcement to end with it", || {
        let (socket, _) = orphan.connection()?;
        Ok(orphan.options(socket)? == Options::UNTOUCHED)
    })?;
    orphan.finish()?;
    let done = output(exec(&cgroup, &[]).arg("true"), LIMIT)?;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    wait_until_nothing_is_left(&cgroup)
}

/// For an agent above, what the policy of a command sets is as if the command had
/// set it.
#[test]
fn an_agent_above_has_the_last_word() -> Result<()> {
    require!(Need::Built(Program::Static));
    let cgroup = Cgroup::new()?;
    let agent = Agent::start(
        &cgroup,
        "[default]\nidle = { default = '30s', at-most = '40s' }\n",
    )?;
    for (idle, expected) in [("35s", 35), ("50s", 40)] {
        let mut command = exec(&cgroup, &["--idle", idle]);
        let mut probe = Probe::start_by(command.arg(Program::Static.path()?))?;
        let (socket, _) = probe.connection()?;
        assert_eq!(probe.options(socket)?, Options::on(expected, 10, 6));
        probe.finish()?;
    }
    agent.stop()?;
    wait_until_nothing_is_left(&cgroup)
}

/// Two ordinary users.
const SOMEBODY: u32 = 65_431;
const ANOTHER: u32 = 65_432;

const SELF_SERVICE: &str = "[default]\nidle = { default = '61s', at-most = '90s' }\n\
                            [self-service]\nidle = { at-least = '10s' }\n\
                            commands = 3\ncommands-per-user = 2\n";

/// A cgroup that is delegated to a user.
fn delegated(above: &Cgroup, uid: u32) -> Result<Cgroup> {
    let cgroup = above.child(format!("user-{uid}"))?;
    for file in ["", "cgroup.procs", "cgroup.subtree_control"] {
        chown(cgroup.directory().join(file), Some(uid), Some(uid))?;
    }
    Ok(cgroup)
}

/// A program in a user's cgroup, as that user.
fn as_user(uid: u32, cgroup: &Cgroup) -> Command {
    let mut command = Place::from(cgroup).command("setpriv");
    command.args([
        format!("--reuid={uid}"),
        format!("--regid={uid}"),
        "--clear-groups".to_owned(),
    ]);
    // Not what is root's alone.
    command.env("PATH", "/usr/bin:/bin");
    command
}

fn exec_as_user(uid: u32, cgroup: &Cgroup, options: &[&str]) -> Command {
    let mut command = as_user(uid, cgroup);
    command.arg(agent_binary());
    command.arg("exec").args(options).arg("--");
    command
}

/// A probe that a user runs by `exec`, and what its connections have.
fn probe_of_user(uid: u32, cgroup: &Cgroup, options: &[&str]) -> Result<Probe> {
    Probe::start_by(exec_as_user(uid, cgroup, options).arg(Program::Static.path()?))
}

fn options(probe: &mut Probe) -> Result<Options> {
    let (socket, _) = probe.connection()?;
    probe.options(socket)
}

/// What `status` tells of commands of users.
fn commands(cgroup: &Cgroup) -> Result<Vec<(u64, String)>> {
    let mut command = agent_command();
    command.args(["status", "--json", "--cgroup", cgroup.path()]);
    let done = output(&mut command, LIMIT)?;
    let status: serde_json::Value = serde_json::from_str(&done.stdout)?;
    let commands = status["in_force"][0]["exec"].as_array();
    let one = |command: &serde_json::Value| {
        let cgroup = command["cgroup"].as_str()?.to_owned();
        Some((command["uid"].as_u64()?, cgroup))
    };
    Ok(commands
        .context("no commands")?
        .iter()
        .filter_map(one)
        .collect())
}

#[test]
fn a_user_asks_the_agent() -> Result<()> {
    require!(Need::Built(Program::Static), Need::Program("setpriv"));
    let cgroup = Cgroup::new()?;
    let own = delegated(&cgroup, SOMEBODY)?;
    let mut agent = Agent::start(&cgroup, SELF_SERVICE)?;
    agent.swept()?;
    let mut probe = probe_of_user(SOMEBODY, &own, &["--idle", "33s", "--probes", "4"])?;
    assert_eq!(options(&mut probe)?, Options::on(33, 10, 4));
    let mut beside = Probe::start(Program::Static, &own)?;
    assert_eq!(options(&mut beside)?, Options::on(61, 10, 6));
    beside.finish()?;

    let [(uid, path)] = &commands(&cgroup)?[..] else {
        anyhow::bail!("not one command");
    };
    assert_eq!(*uid, u64::from(SOMEBODY));
    assert_eq!(
        *path,
        format!("{}/keepalive-exec-{}", own.path(), probe.id())
    );
    for words in [
        &["sockets", "--json", "--cgroup", cgroup.path()][..],
        &["explain", "--json", "--pid", &probe.id().to_string()],
    ] {
        let said = output(agent_command().args(words), LIMIT)?.stdout;
        let name = format!("exec of uid {SOMEBODY}");
        let said: serde_json::Value =
            serde_json::from_str(said.lines().next().context("nothing said")?)?;
        assert_eq!(said["policy"], name, "{said}");
    }

    // Another config: the operator's bounds hold, and what was asked for stays.
    agent.reload(&SELF_SERVICE.replace("61s', at-most = '90s", "20s', at-most = '30s"))?;
    assert_eq!(options(&mut probe)?, Options::on(30, 10, 4));
    agent.reload(SELF_SERVICE)?;
    assert_eq!(options(&mut probe)?, Options::on(33, 10, 4));
    // One that does not let users have that.
    agent.reload(&SELF_SERVICE.replace("10s", "40s"))?;
    assert_eq!(options(&mut probe)?, Options::on(61, 10, 6));
    assert_eq!(commands(&cgroup)?, []);
    probe.finish()?;

    agent.reload(SELF_SERVICE)?;
    let done = output(
        exec_as_user(SOMEBODY, &own, &[]).args(["sh", "-c", "exit 7"]),
        LIMIT,
    )?;
    assert_eq!(done.code, Some(7), "{}", done.stderr);
    let mut command = Process::start(exec_as_user(SOMEBODY, &own, &[]).args(["sleep", "100"]))?;
    wait_until(LIMIT, "the command to begin", || {
        let name = fs::read_to_string(format!("/proc/{}/comm", command.id()))?;
        Ok(name.trim() == "sleep")
    })?;
    command.signal(Signal::TERM)?;
    assert_eq!(command.wait(LIMIT)?.signal(), Some(15));
    wait_until_nothing_is_left(&own)?;
    wait_until(LIMIT, "the agent to forget the command", || {
        Ok(commands(&cgroup)?.is_empty())
    })?;
    agent.stop()?;
    Ok(())
}

/// What a user's command was given goes over to the next agent, however the one
/// before ended.
#[test]
fn a_users_policy_is_pinned_with_the_rest() -> Result<()> {
    require!(Need::Built(Program::Static), Need::Program("setpriv"));
    let cgroup = Cgroup::new()?;
    let own = delegated(&cgroup, SOMEBODY)?;
    let pins = Pins::new();
    let mut agent = Agent::start_pinned(&cgroup, SELF_SERVICE, &pins, &[])?;
    agent.swept()?;
    let mut probe = probe_of_user(SOMEBODY, &own, &["--idle", "33s"])?;
    assert_eq!(options(&mut probe)?, Options::on(33, 10, 6));
    agent.kill()?;
    assert_eq!(options(&mut probe)?, Options::on(33, 10, 6));
    let mut agent = Agent::start_pinned(&cgroup, SELF_SERVICE, &pins, &[])?;
    agent.swept()?;
    assert_eq!(options(&mut probe)?, Options::on(33, 10, 6));
    let mut next = Agent::start_pinned(&cgroup, SELF_SERVICE, &pins, &["--take-over"])?;
    next.swept()?;
    agent.replaced()?;
    assert_eq!(options(&mut probe)?, Options::on(33, 10, 6));
    assert_eq!(commands(&cgroup)?.len(), 1);
    // And the next one is asked.
    let mut second = probe_of_user(SOMEBODY, &own, &["--idle", "34s"])?;
    assert_eq!(options(&mut second)?, Options::on(34, 10, 6));
    for probe in [probe, second] {
        probe.finish()?;
    }
    next.stop()?;
    let detached = output(
        agent_command().args(["detach", "--pin", pins.name(), "--cgroup", cgroup.path()]),
        LIMIT,
    )?;
    assert_eq!(detached.code, Some(0), "{}", detached.stderr);
    wait_until_nothing_is_left(&own)
}

#[test]
fn users_are_refused_and_told_why() -> Result<()> {
    require!(Need::Program("setpriv"));
    let cgroup = Cgroup::new()?;
    let own = delegated(&cgroup, SOMEBODY)?;
    let refused = |uid: u32, own: &Cgroup, options: &[&str], why: &str| -> Result<()> {
        let mut command = exec_as_user(uid, own, options);
        let done = output(command.args(["echo", "it is run"]), LIMIT)?;
        assert_eq!((done.code, &*done.stdout), (Some(1), ""), "{options:?}");
        assert!(done.stderr.contains(why), "{}", done.stderr);
        Ok(())
    };
    refused(SOMEBODY, &own, &[], "no agent here lets users ask")?;
    let agent = Agent::start(&cgroup, "[default]\n")?;
    refused(SOMEBODY, &own, &[], "write a table [self-service] into")?;
    agent.stop()?;

    let agent = Agent::start(&cgroup, SELF_SERVICE)?;
    refused(SOMEBODY, &own, &["--idle", "9s"], "idle 9s is below 10s")?;
    refused(SOMEBODY, &own, &["--idle", "leave"], "it takes a value")?;
    refused(SOMEBODY, &own, &["--keepalive", "always"], "only root")?;
    let held = "{ exactly = \"20s\" }";
    refused(SOMEBODY, &own, &["--idle", held], "only root")?;
    // Somebody else's, and root's.
    refused(ANOTHER, &own, &[], "it is not yours")?;
    let roots = cgroup.child("roots")?;
    refused(SOMEBODY, &roots, &[], "it is not yours")?;

    // No more than so many of one user, and of all.
    let start = |uid: u32, own: &Cgroup| {
        let process = Process::start(exec_as_user(uid, own, &[]).args(["sleep", "100"]))?;
        wait_until(LIMIT, "the command to begin", || {
            let name = fs::read_to_string(format!("/proc/{}/comm", process.id()))?;
            Ok(name.trim() == "sleep")
        })?;
        anyhow::Ok(process)
    };
    let first = start(SOMEBODY, &own)?;
    let second = start(SOMEBODY, &own)?;
    refused(SOMEBODY, &own, &[], "2 commands of this user")?;
    let others = delegated(&cgroup, ANOTHER)?;
    let third = start(ANOTHER, &others)?;
    refused(ANOTHER, &others, &[], "3 commands have policies")?;
    drop(first);
    wait_until(LIMIT, "the agent to forget the command", || {
        Ok(commands(&cgroup)?.len() == 2)
    })?;
    let fourth = start(ANOTHER, &others)?;
    drop((second, third, fourth));
    agent.stop()?;
    wait_until_nothing_is_left(&own)
}

/// Sends what it is told to a socket, and prints what is answered.
const SEND: &str = "import socket, sys\n\
    s = socket.socket(socket.AF_UNIX)\n\
    s.settimeout(20)\n\
    s.connect(sys.argv[1])\n\
    try:\n    s.sendall(sys.argv[2].encode() * int(sys.argv[3]))\n\
    except BrokenPipeError: pass\n\
    try:\n    print(s.recv(9999).decode(), end='')\n\
    except ConnectionResetError: pass\n";

/// Connects over and over, and says nothing.
const CROWD: &str = "import socket, sys\n\
    for n in range(300):\n\
    \x20   s = socket.socket(socket.AF_UNIX)\n\
    \x20   s.connect(sys.argv[1])\n\
    \x20   globals()[f's{n}'] = s\n\
    print('there', flush=True)\n\
    sys.stdin.read()\n";

/// The file of an agent's socket for users: FNV-1a of the cgroup's path.
fn socket_for_users(cgroup: &Cgroup) -> String {
    let hash = cgroup
        .path()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("/run/keepalive-exec/{hash:016x}.sock")
}

#[test]
fn a_hostile_user_gets_nothing_and_holds_nobody_up() -> Result<()> {
    require!(
        Need::Built(Program::Static),
        Need::Program("setpriv"),
        Need::Program("python3")
    );
    let cgroup = Cgroup::new()?;
    let own = delegated(&cgroup, SOMEBODY)?;
    let others = delegated(&cgroup, ANOTHER)?;
    let victim = others.child("keepalive-exec-1")?;
    chown(victim.directory(), Some(ANOTHER), Some(ANOTHER))?;
    let mine = own.child("keepalive-exec-1")?;
    chown(mine.directory(), Some(SOMEBODY), Some(SOMEBODY))?;
    let mut agent = Agent::start(&cgroup, SELF_SERVICE)?;
    agent.swept()?;
    let socket = socket_for_users(&cgroup);
    let send = |uid: u32, text: &str, times: usize| -> Result<String> {
        let mut command = as_user(uid, &own);
        command.args(["python3", "-c", SEND, &socket, text, &times.to_string()]);
        let done = output(&mut command, LIMIT)?;
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        Ok(done.stdout)
    };
    let request = |path: &str, idle: u32| {
        format!(
            "{{\"cgroup\":\"{path}\",\"wish\":{{\"keepalive\":\"on\",\
             \"timers\":[{{\"value\":{idle}}},null,null,null]}}}}\n"
        )
    };
    for (path, why) in [
        (victim.path(), "does not belong to whoever asks"),
        (
            &*format!("{}/../user-{ANOTHER}/keepalive-exec-1", own.path()),
            "is not written as the kernel writes it",
        ),
        (
            &*format!("{}/./keepalive-exec-1", own.path()),
            "is not written as the kernel writes it",
        ),
        (own.path(), "was not made for a command"),
        (
            &*format!("{}/keepalive-exec-2", own.path()),
            "cannot be looked at",
        ),
        ("/keepalive-exec-1", "is not below"),
        (
            &*format!("{}/{}/keepalive-exec-1", own.path(), "x".repeat(600)),
            "too long",
        ),
    ] {
        let answer = send(SOMEBODY, &request(path, 20), 1)?;
        assert!(answer.contains(why), "{path}: {answer}");
    }
    let answer = send(SOMEBODY, &request(mine.path(), 40_000), 1)?;
    assert!(
        answer.contains("the kernel takes no such value"),
        "{answer}"
    );
    let answer = send(SOMEBODY, &request(mine.path(), 5), 1)?;
    assert!(answer.contains("is below 10s"), "{answer}");
    // Root is everybody's name in a container.
    for (uid, text, times) in [
        (0, &*request(mine.path(), 20), 1),
        (SOMEBODY, "garbage\n", 1),
        (SOMEBODY, "\"step-aside\"\n", 1),
        (SOMEBODY, "\"detach\"\n", 1),
        (SOMEBODY, "x", 1_000_000),
        (SOMEBODY, "{\"cgroup\":", 1),
    ] {
        assert_eq!(send(uid, text, times)?, "", "{text}");
    }
    assert_eq!(commands(&cgroup)?, []);
    // One with processes is no cgroup for a command to be.
    let mut sleeper = Process::start(Place::from(&mine).command("sleep").arg("100"))?;
    wait_until(LIMIT, "the process to be there", || {
        Ok(!fs::read_to_string(mine.directory().join("cgroup.procs"))?.is_empty())
    })?;
    let answer = send(SOMEBODY, &request(mine.path(), 20), 1)?;
    assert!(answer.contains("has processes already"), "{answer}");
    sleeper.signal(Signal::KILL)?;
    sleeper.wait(LIMIT)?;

    // A crowd that says nothing.
    let mut crowd = as_user(SOMEBODY, &own);
    crowd.args(["python3", "-c", CROWD, &socket]);
    let crowd = Process::start(crowd.stdin(std::process::Stdio::piped()))?;
    let mut probe = probe_of_user(ANOTHER, &others, &["--idle", "35s"])?;
    assert_eq!(options(&mut probe)?, Options::on(35, 10, 6));
    agent.reload(&SELF_SERVICE.replace("61s", "62s"))?;
    probe.finish()?;
    drop(crowd);
    agent.stop()?;
    Ok(())
}

/// An agent with the capabilities of its unit reads no directory that a user has
/// closed, and goes on.
#[test]
fn a_user_who_closes_a_cgroup_stops_nothing() -> Result<()> {
    require!(Need::Built(Program::Static), Need::Program("setpriv"));
    let cgroup = Cgroup::new()?;
    let own = delegated(&cgroup, SOMEBODY)?;
    let inside = own.child("inside")?;
    fs::set_permissions(own.directory(), fs::Permissions::from_mode(0o700))?;
    let capabilities = "--bounding-set=-all,+sys_admin,+sys_ptrace";
    let mut agent = Agent::start_with(&cgroup, SELF_SERVICE, &["setpriv", capabilities])?;
    agent.swept()?;
    let mut probe = Probe::start(Program::Static, &inside)?;
    assert_eq!(options(&mut probe)?, Options::on(61, 10, 6));
    agent.reload(&SELF_SERVICE.replace("61s", "62s"))?;
    assert_eq!(options(&mut probe)?, Options::on(62, 10, 6));
    probe.finish()?;
    agent.stop()?;
    Ok(())
}
