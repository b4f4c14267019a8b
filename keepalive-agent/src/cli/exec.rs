//! `keepalive-agent exec`: a command in a cgroup of its own, with a policy of its
//! own for as long as anything of it lives.
//!
//! This process becomes the command, so exit code and signals are the command's.
//! What holds the program's link is a supervisor beside it, which nobody waits
//! for: a child of init, in the caller's cgroup. It ends when the cgroup is empty,
//! and removes it. However it ends, the kernel takes the program off with it.

use std::{
    env,
    ffi::OsString,
    fmt::Write as _,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom},
    os::{fd::AsFd, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{self, Command, ExitCode, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, geteuid, pidfd_open, setsid},
    stdio::{dup2_stderr, dup2_stdout},
};
use tracing::debug;

use super::{
    explain, output,
    policy::{self, Key},
};
use crate::{
    config::{Config, DEFAULT_FILE, Wish},
    daemon::{
        building::Job,
        ownership,
        self_service::{self, Answer, Request},
    },
    datapath::{Attachment, Bounds, Origin, State, chain},
    grant::PREFIX,
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    kernel::{layout::Kernel, preflight},
    names::printable_path,
};

/// The hidden subcommand that is the supervisor.
pub(super) const SUPERVISE: &str = "supervise-exec";

/// What the supervisor says when the policy is in force.
const READY: &str = "ready\n";

/// Exit codes of env(1) and others that run a command.
const CANNOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;

#[derive(Args, Debug)]
#[command(
    after_help = "What is not given as an option is taken from the environment: TCP_KEEPIDLE, \
                  TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT as libkeepalive-ng has them, else \
                  KEEPIDLE, KEEPINTVL, KEEPCNT, KEEPALIVE=off as libkeepalive has them; else from \
                  the built-in policy: on, idle 60s, interval 10s, probes 6.\n\n\
                  Where an agent enforces on a cgroup above, it has the last word: its bounds hold, \
                  as for what an application sets.\n\n\
                  Root, or who has the capabilities of `run`, needs no agent. An ordinary user asks \
                  the agent, if its config has a table [self-service], and in a cgroup that is \
                  delegated to the user, as under `systemd-run --user --scope`.\n\n\
                  Exit codes: the command's; 126 it cannot be run, 127 it is not found, 1 there is \
                  no cgroup or policy for it.\n\n\
                  Examples:\n  \
                  keepalive-agent exec -- psql -h db.example.org\n  \
                  keepalive-agent exec --idle 30s --probes 3 -- ./worker\n  \
                  KEEPIDLE=30 keepalive-agent exec -- ./worker"
)]
pub(super) struct Arguments {
    /// SO_KEEPALIVE: on, always, off, never or leave
    #[arg(long, value_name = "WISH")]
    keepalive: Option<String>,

    /// Silence before the first probe
    #[arg(long, value_name = "TIME")]
    idle: Option<String>,

    /// Time between two unanswered probes
    #[arg(long, value_name = "TIME")]
    interval: Option<String>,

    /// Unanswered probes after which the peer counts as dead
    #[arg(long, value_name = "COUNT")]
    probes: Option<String>,

    /// How long sent data may stay unacknowledged: a time, derive or leave
    #[arg(long, value_name = "TIME")]
    user_timeout: Option<String>,

    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What the supervisor is told.
#[derive(Args, Debug)]
pub(super) struct Supervise {
    /// The cgroup.
    cgroup: OsString,
    /// Process id of the command to be.
    pid: u32,
    /// The config; none where an agent enforces it.
    config: Option<String>,
    /// Whether to do it in a child of init.
    #[arg(long)]
    detach: bool,
}

/// Runs a command; returns where it cannot be run.
pub(super) fn exec(arguments: &Arguments) -> Result<ExitCode> {
    let config = config_text(arguments, |name| env::var_os(name))?;
    Config::parse(Path::new("the policy of the command"), &config)?;
    let may_enforce = preflight::may_enforce();
    let wish = match &may_enforce {
        Err(_) if !geteuid().is_root() => Some(Wish::read(&config).map_err(anyhow::Error::msg)?),
        _ => {
            may_enforce?;
            None
        }
    };
    let hierarchy = Hierarchy::find()?;
    let own = explain::cgroup_of(process::id(), &hierarchy)?
        .context("the cgroup of this process was removed")?;
    remove_leftovers(&hierarchy, &own);
    let scope = Scope::make(&hierarchy, &own)?;
    match wish {
        None => scope.supervised(Some(&config))?,
        Some(wish) => {
            scope.ask_agent(wish)?;
            scope.supervised(None)?;
        }
    }
    scope.enter()?;
    let (program, rest) = arguments
        .command
        .split_first()
        .context("there is no command")?;
    let error = Command::new(program).args(rest).exec();
    // The supervisor removes the cgroup when this process has ended.
    let code = if error.kind() == io::ErrorKind::NotFound {
        NOT_FOUND
    } else {
        CANNOT_RUN
    };
    tracing::error!("running {}: {error}", printable_path(program));
    Ok(code.into())
}

/// The policy as a config.
fn config_text(
    arguments: &Arguments,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<String> {
    let number = |names: &[&str], unit: &str| -> Result<Option<String>> {
        let Some((name, value)) = names.iter().find_map(|name| Some((*name, variable(name)?)))
        else {
            return Ok(None);
        };
        let digits = value
            .to_str()
            .filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
        let digits = digits.with_context(|| {
            format!(
                "environment variable {name} = {}: not a number",
                printable_path(&value)
            )
        })?;
        Ok(Some(format!("{digits}{unit}")))
    };
    let is_off = variable("KEEPALIVE").is_some_and(|word| word.eq_ignore_ascii_case("off"));
    let from_environment = [
        (Key::Keepalive, is_off.then(|| "leave".to_owned())),
        (Key::Idle, number(&["TCP_KEEPIDLE", "KEEPIDLE"], "s")?),
        (Key::Interval, number(&["TCP_KEEPINTVL", "KEEPINTVL"], "s")?),
        (Key::Probes, number(&["TCP_KEEPCNT", "KEEPCNT"], "")?),
        (Key::UserTimeout, number(&["TCP_USER_TIMEOUT"], "ms")?),
    ];
    let given = [
        &arguments.keepalive,
        &arguments.idle,
        &arguments.interval,
        &arguments.probes,
        &arguments.user_timeout,
    ];
    let mut text = "[default]\n".to_owned();
    for ((key, found), given) in from_environment.into_iter().zip(given) {
        if let Some(value) = given.clone().or(found) {
            let value = policy::timer(key, &value)?;
            writeln!(text, "{} = {value}", key.name())?;
        }
    }
    Ok(text)
}

/// Removes what supervisors left that were killed.
fn remove_leftovers(hierarchy: &Hierarchy, above: &CgroupPath) {
    let Ok(entries) = fs::read_dir(hierarchy.directory(above)) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let Some(pid) = pid.and_then(|pid| pid.parse().ok()) else {
            continue;
        };
        // One whose command is about to begin is empty too.
        if !is_alive(pid) {
            remove(&entry.path());
        }
    }
}

fn is_alive(pid: i32) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| pidfd_open(pid, PidfdFlags::empty()).is_ok())
}

/// Removes a cgroup and those below it, as long as no process is in them. Whether
/// it is gone.
fn remove(directory: &Path) -> bool {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    match fs::remove_dir(directory) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// The cgroup of a command; removed again, unless the command runs in it.
struct Scope {
    cgroup: Cgroup,
    directory: PathBuf,
}

impl Scope {
    fn make(hierarchy: &Hierarchy, above: &CgroupPath) -> Result<Self> {
        let name = format!("{PREFIX}{}", process::id());
        let path = above.join(name.as_bytes());
        let directory = hierarchy.directory(&path);
        fs::create_dir(&directory).map_err(|error| {
            let cure = match error.kind() {
                io::ErrorKind::PermissionDenied if !geteuid().is_root() => {
                    ": it is not yours; under systemd, `systemd-run --user --scope \
                     keepalive-agent exec …` begins in one that is"
                }
                _ => "",
            };
            anyhow!(
                "making a cgroup in {}: {error}{cure}",
                printable_path(&hierarchy.directory(above))
            )
        })?;
        let mut scope = Self {
            cgroup: Cgroup { path, id: 0 },
            directory,
        };
        scope.cgroup = hierarchy.existing(scope.cgroup.path.as_path())?;
        Ok(scope)
    }

    /// Has the agent put a policy in force that governs this cgroup, and lets users
    /// ask.
    fn ask_agent(&self, wish: Wish) -> Result<()> {
        const PATIENCE: Duration = Duration::from_secs(10);
        const PAUSE: Duration = Duration::from_millis(100);
        let request = Request {
            cgroup: self.cgroup.path.clone(),
            wish,
        };
        let end = Instant::now() + PATIENCE;
        loop {
            let why = match ask_nearest(&request)? {
                Answer::Granted => return Ok(()),
                Answer::Refused(why) => bail!("the command is not run: {why}"),
                Answer::Busy(why) => why,
            };
            if Instant::now() >= end {
                bail!("the command is not run, try it again later: {why}");
            }
            thread::sleep(PAUSE);
        }
    }

    /// Has a supervisor put a policy in force, where no agent does, and remove the
    /// cgroup in the end.
    fn supervised(&self, config: Option<&str>) -> Result<()> {
        let mut starter = Command::new("/proc/self/exe")
            .arg(SUPERVISE)
            .arg("--detach")
            .arg(self.cgroup.path.as_path())
            .arg(process::id().to_string())
            .args(config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the supervisor")?;
        let said = starter.stdout.take().context("the supervisor is mute")?;
        let mut line = String::new();
        BufReader::new(said)
            .take(READY.len() as u64)
            .read_line(&mut line)
            .context("waiting for the supervisor")?;
        starter.wait().context("waiting for the supervisor")?;
        if line != READY {
            bail!("the command is not run: its policy is not in force");
        }
        Ok(())
    }

    fn enter(&self) -> Result<()> {
        let file = self.directory.join("cgroup.procs");
        fs::write(&file, "0")
            .with_context(|| format!("entering the cgroup by {}", printable_path(&file)))
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // Not while this process is in it; the supervisor does that.
        remove(&self.directory);
    }
}

/// Asks the nearest agent above that lets users ask.
fn ask_nearest(request: &Request) -> Result<Answer> {
    for path in request.cgroup.upward() {
        let path = CgroupPath::from(path);
        let answer = self_service::ask(&path, request);
        let answer = answer.with_context(|| format!("asking the agent on {path}"))?;
        if let Some(answer) = answer {
            return Ok(answer);
        }
    }
    bail!(
        "the command is not run: no agent here lets users ask for policies. Its operator has to \
         write a table [self-service] into {DEFAULT_FILE}, and have `keepalive-agent run` \
         running; or run this as root"
    )
}

/// The supervisor.
pub(super) fn supervise(arguments: &Supervise) -> Result<ExitCode> {
    let Supervise {
        cgroup,
        pid,
        config,
        detach,
    } = arguments;
    if *detach {
        // Whoever starts a child and ends leaves it to init: the command must not
        // find a child that it did not start.
        Command::new("/proc/self/exe")
            .arg(SUPERVISE)
            .arg(cgroup)
            .arg(pid.to_string())
            .args(config)
            .spawn()
            .context("starting the supervisor")?;
        return Ok(ExitCode::SUCCESS);
    }
    // What ends the command at its terminal must not end this.
    setsid().context("leaving the session")?;
    let command = i32::try_from(*pid)
        .ok()
        .and_then(Pid::from_raw)
        .with_context(|| format!("no process has the id {pid}"))?;
    let command = pidfd_open(command, PidfdFlags::empty())
        .context("the process that is to be the command has ended")?;
    let hierarchy = Hierarchy::find()?;
    let root = hierarchy.existing(Path::new(cgroup))?;
    let enforcement = match config {
        Some(config) => Some(enforce(config, &hierarchy, &root)?),
        None => None,
    };
    let directory = hierarchy.directory(&root.path);
    let mut events = File::open(directory.join("cgroup.events"))
        .with_context(|| format!("watching {}", printable_path(&directory)))?;
    say_ready()?;
    let mut was_entered = false;
    loop {
        let is_populated = is_populated(&mut events)?;
        was_entered |= is_populated;
        let has_ended = is_readable(&command)?;
        if !is_populated && (was_entered || has_ended) && remove(&directory) {
            break;
        }
        let mut wait = vec![PollFd::new(&events, PollFlags::PRI)];
        if !has_ended {
            wait.push(PollFd::new(&command, PollFlags::IN));
        }
        poll(&mut wait, None).context("waiting for the command")?;
    }
    drop(enforcement);
    Ok(ExitCode::SUCCESS)
}

/// Puts a config in force on a cgroup.
fn enforce(config: &str, hierarchy: &Hierarchy, root: &Cgroup) -> Result<(Attachment, Bounds)> {
    let (config, _) = Config::parse(Path::new("the policy of the command"), config)?;
    let job = Job {
        kernel: Kernel::running()?,
        hierarchy: hierarchy.clone(),
        root: root.clone(),
        config: config.into(),
        origin: Origin::default(),
        before: None,
        previous: None,
        known: Arc::default(),
        grants: Vec::new(),
    };
    let mut set = job.build()?.set;
    // For those who ask whether anybody looks after it. Nothing was there before.
    let state = State {
        owner: Some(ownership::own()),
        settled: true,
        ..State::default()
    };
    if let Err(error) = set.record().set_state(&state) {
        debug!("{error}");
    }
    let mut bounds = Bounds::none(root.id, None);
    bounds.hold(&set)?;
    let directory = hierarchy.open(root)?;
    let mut attachment = Attachment::attach(&set, directory, root.id, None)?;
    if let Err(error) = attachment.watch_deaths(&mut set) {
        debug!("dead peers are not counted: {}", chain(&error));
    }
    Ok((attachment, bounds))
}

/// Tells the command to begin, and lets go of its streams.
fn say_ready() -> Result<()> {
    const LETTING_GO: &str = "letting go of the command's streams";
    output::text(READY)?;
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .context(LETTING_GO)?;
    dup2_stdout(&null).context(LETTING_GO)?;
    dup2_stderr(&null).context(LETTING_GO)?;
    // A file system that the command is started on may be unmounted after it.
    env::set_current_dir("/").context(LETTING_GO)
}

fn is_populated(events: &mut File) -> Result<bool> {
    let mut text = String::new();
    let read = events
        .seek(SeekFrom::Start(0))
        .and_then(|_| events.read_to_string(&mut text));
    match read {
        Ok(_) => Ok(text.lines().any(|line| line == "populated 1")),
        // Somebody has removed it.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(error) => Err(error).context("reading cgroup.events"),
    }
}

/// Whether the process behind a pidfd has ended.
fn is_readable(process: &impl AsFd) -> Result<bool> {
    let mut wait = [PollFd::new(process, PollFlags::IN)];
    let now = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    Ok(poll(&mut wait, Some(&now)).context("looking at the command")? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(options: &[&str], variables: &[(&str, &str)]) -> Result<String> {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            arguments: Arguments,
        }
        use clap::Parser as _;
        let line = ["exec"].iter().chain(options).chain(&["--", "true"]);
        let line = Line::parse_from(line);
        config_text(&line.arguments, |name| {
            let variable = variables.iter().find(|(known, _)| *known == name);
            variable.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn options_come_before_the_environment() {
        for (options, variables, expected) in [
            (&[][..], &[][..], ""),
            (&["--idle", "30s"], &[], "idle = \"30s\"\n"),
            (
                &["--idle", "30s"],
                &[("KEEPIDLE", "5"), ("KEEPCNT", "4")],
                "idle = \"30s\"\nprobes = 4\n",
            ),
            (
                &[],
                &[("KEEPIDLE", "5"), ("KEEPINTVL", "6"), ("KEEPCNT", "7")],
                "idle = \"5s\"\ninterval = \"6s\"\nprobes = 7\n",
            ),
            (
                &[],
                &[
                    ("TCP_KEEPIDLE", "5"),
                    ("KEEPIDLE", "50"),
                    ("TCP_KEEPINTVL", "6"),
                    ("TCP_KEEPCNT", "7"),
                    ("TCP_USER_TIMEOUT", "8000"),
                ],
                "idle = \"5s\"\ninterval = \"6s\"\nprobes = 7\nuser-timeout = \"8000ms\"\n",
            ),
            (&[], &[("KEEPALIVE", "OFF")], "keepalive = \"leave\"\n"),
            (&[], &[("KEEPALIVE", "on")], ""),
            (
                &["--keepalive", "on", "--probes", "{ exactly = 3 }"],
                &[("KEEPALIVE", "off")],
                "keepalive = \"on\"\nprobes = { exactly = 3 }\n",
            ),
        ] {
            let text = text(options, variables).unwrap();
            assert_eq!(text, format!("[default]\n{expected}"));
            Config::parse("test".as_ref(), &text).unwrap();
        }
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for wrong in ["", "x", "-1", "5s"] {
            let error = text(&[], &[("KEEPIDLE", wrong)]).unwrap_err();
            assert!(error.to_string().contains("KEEPIDLE"), "{error}");
        }
    }
}
