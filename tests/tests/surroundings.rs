//! Surroundings that are short of something, or broken: they neither end
//! enforcement nor hold the agent up.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Write, pipe};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Loaded, Need, Options, Pins, Place, Probe, Process, Program, agent_binary,
    agent_command, detach, output, require, skip, soak_or, status, wait_until,
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_mins(1);
const OURS: Options = Options::on(70, 10, 6);
const POLICY: &str = "[default]\nidle = \"70s\"\n";
const OTHER: Options = Options::on(71, 10, 6);
const OTHER_POLICY: &str = "[default]\nidle = \"71s\"\n";

/// In which SIGTERM is to be answered within a second; a busy machine gets more.
const ANSWER: Duration = Duration::from_secs(5);

fn connection(cgroup: &Cgroup) -> Result<[Options; 2]> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    Ok([probe.options(connecting)?, probe.options(accepting)?])
}

fn becomes(cgroup: &Cgroup, expected: Options) -> Result<()> {
    let mut found = [Options::UNTOUCHED; 2];
    wait_until(LIMIT, "the policy to be in force", || {
        found = connection(cgroup)?;
        Ok(found == [expected; 2])
    })
    .with_context(|| format!("{found:?} instead of {expected:?}"))
}

/// Starts, follows a change of its config and stops, whatever becomes of what it
/// says.
fn works_with_output(stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> Result<()> {
    let cgroup = Cgroup::new()?;
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    fs::write(&file, POLICY)?;
    let mut command = agent_command();
    command.args(["--verbose", "run", "--cgroup", cgroup.path(), "--config"]);
    command.arg(file.path()).stdout(stdout).stderr(stderr);
    let mut agent = Process::start(&mut command)?;
    drop(command);
    becomes(&cgroup, OURS)?;
    fs::write(&file, OTHER_POLICY)?;
    becomes(&cgroup, OTHER)?;
    fs::write(&file, "[default]\nidel = 1\n")?;
    wait_until(LIMIT, "the error to be told", || {
        Ok(status(&cgroup)?.set["reload"]["error"].is_string())
    })?;
    assert_eq!(connection(&cgroup)?, [OTHER; 2]);
    agent.signal(Signal::TERM)?;
    let ended = agent.wait(ANSWER).context("deaf to SIGTERM")?;
    assert_eq!(ended.code(), Some(0), "{ended}");
    assert_eq!(connection(&cgroup)?, [Options::UNTOUCHED; 2]);
    Ok(())
}

/// A pipe that takes nothing more; nobody reads it.
fn full_pipe() -> Result<(PipeReader, PipeWriter)> {
    let (reader, mut writer) = pipe()?;
    let flags = fcntl_getfl(&writer)?;
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK)?;
    while writer.write(&[b'x'; 4096]).is_ok() {}
    while writer.write(b"x").is_ok() {}
    fcntl_setfl(&writer, flags)?;
    Ok((reader, writer))
}

#[test]
fn pipes_that_nobody_reads() -> Result<()> {
    require!();
    let (_reader, stdout) = full_pipe()?;
    let (_reader, stderr) = full_pipe()?;
    works_with_output(stdout, stderr)
}

/// The report of many policies is longer than a pipe; what comes after it waits for
/// it.
#[test]
fn a_report_that_fills_a_pipe_is_read_whole() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut config = "[default]\n".to_owned();
    for number in 0..3000 {
        let path = cgroup.path();
        writeln!(
            config,
            "[[policy]]\nname = \"p{number}\"\ncgroup = \"{path}/c{number}\""
        )?;
    }
    let mut agent = Agent::start(&cgroup, &config)?;
    let policies = agent.started()["policies"].as_array().context("policies")?;
    assert_eq!(policies.len(), 3001);
    agent.swept()?;
    agent.stop()?;
    Ok(())
}

#[test]
fn pipes_whose_reader_is_gone() -> Result<()> {
    require!();
    let (reader, stdout) = pipe()?;
    drop(reader);
    let (reader, stderr) = pipe()?;
    drop(reader);
    works_with_output(stdout, stderr)
}

#[test]
fn a_full_disk_for_what_it_says() -> Result<()> {
    require!();
    let full = || File::options().write(true).open("/dev/full");
    works_with_output(full()?, full()?)
}

#[test]
fn no_output_at_all() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut command = Place::default().command("sh");
    command.args(["-c", r#"exec "$@" >&- 2>&-"#, "sh"]);
    command.arg(agent_binary());
    command.args(["run", "--cgroup", cgroup.path()]);
    let mut agent = Process::start(&mut command)?;
    wait_until(LIMIT, "the policy to be in force", || {
        Ok(connection(&cgroup)? != [Options::UNTOUCHED; 2])
    })?;
    agent.signal(Signal::TERM)?;
    assert_eq!(agent.wait(ANSWER)?.code(), Some(0));
    Ok(())
}

/// A cgroup of a v1 hierarchy, with the limits that v2 has no controller for here.
struct V1 {
    directory: PathBuf,
}

impl V1 {
    fn new(controller: &str) -> Result<Option<Self>> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = Path::new("/sys/fs/cgroup").join(controller);
        if !root.join("cgroup.procs").exists() {
            return Ok(None);
        }
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = root.join(format!("kat-{}-{n}", std::process::id()));
        fs::create_dir(&directory)?;
        Ok(Some(Self { directory }))
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let file = self.directory.join(file);
        fs::write(&file, value).with_context(|| file.display().to_string())
    }

    /// A command that enters it and becomes what is named behind it.
    fn by(&self) -> Vec<String> {
        let procs = self.directory.join("cgroup.procs");
        let script = format!("echo $$ >{} && exec \"$@\"", procs.display());
        ["sh", "-c", &script, "sh"].map(str::to_owned).into()
    }
}

impl Drop for V1 {
    fn drop(&mut self) {
        let removed = wait_until(Duration::from_secs(5), "a cgroup to be empty", || {
            Ok(fs::remove_dir(&self.directory).is_ok())
        });
        if let Err(error) = removed {
            eprintln!("{} stays behind: {error:#}", self.directory.display());
        }
    }
}

/// What needs a thread waits until there can be one.
#[test]
fn no_thread() -> Result<()> {
    require!();
    let Some(pids) = V1::new("pids")? else {
        skip(module_path!(), "no cgroup v1 hierarchy for pids");
        return Ok(());
    };
    pids.set("pids.max", "1")?;
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (existing, _) = probe.connection()?;
    let by = pids.by();
    let by: Vec<_> = by.iter().map(String::as_str).collect();
    let mut agent = Agent::start_with(&cgroup, POLICY, &by)?;
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    assert_eq!(probe.options(existing)?, Options::UNTOUCHED);
    let mut found = status(&cgroup)?;
    wait_until(LIMIT, "the failure to be told", || {
        found = status(&cgroup)?;
        Ok(found.set["parts"]["existing connections"]["status"] == "failed")
    })?;
    assert_eq!(found.code, Some(4), "{}", found.report);
    agent.rewrite(OTHER_POLICY)?;
    wait_until(LIMIT, "the failure to be told", || {
        Ok(status(&cgroup)?.set["parts"]["policy set"]["status"] == "failed")
    })?;
    assert_eq!(connection(&cgroup)?, [OURS; 2], "the policy before goes on");
    pids.set("pids.max", "max")?;
    agent.reloaded()?;
    assert_eq!(connection(&cgroup)?, [OTHER; 2]);
    assert_eq!(probe.options(existing)?, OTHER);
    wait_until(LIMIT, "all to be well", || {
        Ok(status(&cgroup)?.code == Some(0))
    })?;
    assert_eq!(agent.stop()?.code, Some(0));
    Ok(())
}

#[test]
fn little_memory() -> Result<()> {
    require!();
    let Some(memory) = V1::new("memory")? else {
        skip(module_path!(), "no cgroup v1 hierarchy for memory");
        return Ok(());
    };
    let cgroup = Cgroup::new()?;
    let by = memory.by();
    let by: Vec<_> = by.iter().map(String::as_str).collect();
    // What the verifier keeps of a program while it looks at it counts too.
    memory.set("memory.limit_in_bytes", "16M")?;
    let mut agent = Agent::start_with(&cgroup, POLICY, &by)?;
    agent.swept()?;
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    assert_eq!(agent.stop()?.code, Some(0));
    // Another set beside the one in force.
    memory.set("memory.limit_in_bytes", "26M")?;
    let mut agent = Agent::start_with(&cgroup, POLICY, &by)?;
    agent.swept()?;
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    agent.reload(OTHER_POLICY)?;
    assert_eq!(connection(&cgroup)?, [OTHER; 2]);
    agent.reload(POLICY)?;
    agent.reload(POLICY)?;
    assert_eq!(agent.stop()?.code, Some(0));
    Ok(())
}

/// With too few descriptors it does not start, says so and leaves nothing; with a
/// few more it does.
#[test]
fn few_descriptors() -> Result<()> {
    require!(Need::Program("prlimit"), Need::Program("bpftool"));
    let mut started = false;
    for descriptors in [4, 8, 12, 16, 24, 32, 40, 48, 64, 96, 128] {
        let cgroup = Cgroup::new()?;
        let pins = Pins::new();
        let limit = format!("--nofile={descriptors}");
        let by = ["prlimit", &limit];
        match Agent::start_by(&cgroup, POLICY, &by, &["--pin", pins.name()]) {
            Ok(agent) => {
                started = true;
                assert_eq!(connection(&cgroup)?, [OURS; 2], "{descriptors}");
                let stderr = agent.stop()?.stderr;
                assert!(!stderr.contains("panicked"), "{stderr}");
                detach(&cgroup)?;
            }
            Err(error) => {
                let said = format!("{error:#}");
                assert!(!said.contains("panicked"), "{descriptors}: {said}");
                assert!(
                    ["open files", "loading shared libraries"]
                        .iter()
                        .any(|why| said.contains(why)),
                    "{descriptors}: {said}"
                );
                assert!(!started, "with fewer it did start: {descriptors}: {said}");
            }
        }
        assert_eq!(Loaded::on(&cgroup)?, None, "{descriptors}");
        assert!(pins.all()?.is_empty(), "{descriptors}");
    }
    assert!(started, "never started");
    Ok(())
}

/// The same in mounts of its own, prepared by a script.
fn in_mounts(script: &str) -> Vec<String> {
    let script = format!("mount --make-rprivate / && {script} && exec \"$@\"");
    ["unshare", "--mount", "sh", "-c", &script, "sh"]
        .map(str::to_owned)
        .into()
}

fn start_in_mounts(script: &str, cgroup: &Cgroup, more: &[&str]) -> Result<Agent> {
    let by = in_mounts(script);
    let by: Vec<_> = by.iter().map(String::as_str).collect();
    Agent::start_by(cgroup, POLICY, &by, more)
}

#[test]
fn no_bpf_file_system() -> Result<()> {
    require!(Need::Program("unshare"));
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    let agent = start_in_mounts("umount /sys/fs/bpf", &cgroup, &["--pin", pins.name()])?;
    assert_eq!(agent.started()["pinned"], pins.name());
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    let finished = agent.stop()?;
    assert_eq!(finished.record["enforcement_goes_on"], true);
    detach(&cgroup)
}

#[test]
fn a_bpf_file_system_that_cannot_be_written() -> Result<()> {
    require!(Need::Program("unshare"), Need::Program("bpftool"));
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    let script = "mount -o remount,bind,ro /sys/fs/bpf";
    let refused = start_in_mounts(script, &cgroup, &["--pin", pins.name()]);
    let said = format!("{:#}", refused.err().context("it started")?);
    for word in [pins.name(), "Read-only file system", "end with this agent"] {
        assert!(said.contains(word), "no {word}: {said}");
    }
    assert_eq!(Loaded::on(&cgroup)?, None);
    // Without pins it needs none.
    let agent = start_in_mounts(script, &cgroup, &[])?;
    assert_eq!(connection(&cgroup)?, [OURS; 2]);
    agent.stop()?;
    Ok(())
}

/// A /run that is full or read-only, and one where others have been before.
#[test]
fn a_run_directory_of_no_use() -> Result<()> {
    require!(Need::Program("unshare"));
    let victim = tempfile::NamedTempFile::new()?;
    fs::write(&victim, "precious")?;
    let link = format!(
        "mount -t tmpfs none /run && mkdir -m 700 /run/keepalive && \
         for n in $(seq 0 15); do ln -s {} /run/keepalive/$n.lock; done && \
         chown 65534 /run/keepalive",
        victim.path().display()
    );
    for (script, named) in [
        ("mount -t tmpfs -o ro none /run", Some("Read-only")),
        (
            "mount -t tmpfs -o size=4k,nr_inodes=1 none /run",
            Some("No space"),
        ),
        (
            "mount -t tmpfs none /run && mkdir /run/keepalive && chmod 777 /run/keepalive",
            Some("others may write"),
        ),
        (&link, Some("belongs to another user")),
        (
            "mount -t tmpfs none /run && touch /run/keepalive",
            Some("/run/keepalive"),
        ),
        // No room for a note in the lock file: the lock is what counts.
        (
            "mount -t tmpfs -o size=4k none /run && head -c 4096 /dev/zero >/run/x",
            None,
        ),
    ] {
        let cgroup = Cgroup::new()?;
        let mut agent = start_in_mounts(script, &cgroup, &[]).context(script.to_owned())?;
        agent.swept()?;
        assert_eq!(connection(&cgroup)?, [OURS; 2], "{script}");
        if let Some(named) = named {
            assert!(agent.said().contains(named), "{script}: {}", agent.said());
            let found = status(&cgroup)?;
            assert_eq!(found.code, Some(4), "{script}: {}", found.report);
            assert_eq!(found.set["parts"]["lock"]["status"], "failed", "{script}");
        }
        // A second one is kept from starting by what the kernel says of the first.
        let mut command = agent_command();
        command.args(["run", "--cgroup", cgroup.path()]);
        let refused = output(&mut command, LIMIT)?;
        assert_eq!(refused.code, Some(1), "{script}: {refused:?}");
        let named = format!("agent {} enforces on", agent.id());
        assert!(refused.stderr.contains(&named), "{script}: {refused:?}");
        agent.reload(OTHER_POLICY)?;
        assert_eq!(connection(&cgroup)?, [OTHER; 2], "{script}");
        assert_eq!(agent.stop()?.code, Some(0), "{script}");
    }
    assert_eq!(fs::read_to_string(&victim)?, "precious");
    Ok(())
}

/// One file for each service, written while the agent runs.
#[test]
fn a_thousand_policies_one_by_one() -> Result<()> {
    const POLICIES: usize = 1000;
    require!(Need::NoConfig);
    let cgroup = Cgroup::new()?;
    let files = tempfile::tempdir()?;
    let directory = files.path().to_str().context("no text")?;
    let mut agent = Agent::start_on(&cgroup, &["--drop-in-dir", directory], &["env"])?;
    agent.swept()?;
    let mut services = Vec::new();
    for n in 0..POLICIES {
        let name = format!("s{n}");
        if n % 250 == 249 {
            services.push((n, cgroup.child(&name)?));
        }
        let policy = format!(
            "[[policy]]\nname = \"{name}\"\ncgroup = \"{}/{name}\"\nidle = \"{}s\"\n",
            cgroup.path(),
            1000 + n
        );
        // Whole or not at all, as programs that write such files do.
        let half = files.path().join(format!("{name}.new"));
        fs::write(&half, policy)?;
        fs::rename(half, files.path().join(format!("{name}.toml")))?;
        if n % 100 == 0 {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    for (n, service) in &services {
        becomes(service, Options::on(i32::try_from(1000 + n)?, 10, 6))?;
    }
    let set = status(&cgroup)?.set;
    ensure!(set["reload"]["error"].is_null(), "{}", set["reload"]);
    // One more, by command, which says what became of it.
    let late = cgroup.child("late")?;
    let mut command = agent_command();
    command.args(["policy", "set", "--drop-in-dir", directory]);
    command.args(["--cgroup", late.path(), "--idle", "33s"]);
    let done = output(&mut command, LIMIT)?;
    assert_eq!(done.code, Some(0), "{done:?}");
    becomes(&late, Options::on(33, 10, 6))?;
    assert_eq!(agent.stop()?.code, Some(0));
    Ok(())
}

/// More than a node has; soaking, more than the kernel's maps were ever made for.
#[test]
fn very_many_cgroups() -> Result<()> {
    const EACH: usize = 100;
    require!();
    let slices: usize = soak_or(1500, 200);
    let root = Cgroup::new()?;
    let config = format!(
        "[default]\nidle = \"70s\"\n\
         [[policy]]\nname = \"pods\"\ncgroup = \"{}/*/*\"\nidle = \"71s\"\n",
        root.path()
    );
    let mut agent = Agent::start(&root, &config)?;
    agent.swept()?;
    for slice in 0..slices {
        let slice = root.directory().join(format!("s{slice}"));
        fs::create_dir(&slice)?;
        for pod in 0..EACH {
            fs::create_dir(slice.join(format!("p{pod}")))?;
        }
    }
    let last = root.descendant(&format!("s{}/p{}", slices - 1, EACH - 1))?;
    becomes(&last, OTHER)?;
    let said = agent.said();
    assert!(said.lines().count() < 10, "{said}");
    agent.stop()?;
    // And they are there when it starts.
    let mut agent = Agent::start(&root, &config)?;
    let started = agent.started()["policies"].to_string();
    assert!(
        started.contains(&format!("\"cgroups\":{}", slices * EACH)),
        "{started}"
    );
    agent.swept()?;
    becomes(&last, OTHER)?;
    agent.stop()?;
    Ok(())
}

/// Nothing of the commands that only look waits for a reader either.
#[test]
fn a_command_whose_reader_is_gone_fails_quietly() -> Result<()> {
    require!();
    for arguments in [&["status"][..], &["sockets"]] {
        let (reader, stdout) = pipe()?;
        drop(reader);
        let mut command: Command = agent_command();
        command
            .args(arguments)
            .stdout(stdout)
            .stderr(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        drop(command);
        let ended = process.wait(LIMIT)?;
        assert!(ended.code().is_some(), "{arguments:?}: {ended}");
    }
    Ok(())
}
