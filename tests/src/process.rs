use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::{Cgroup, Netns};

/// How often something is looked at that gives no notice.
const PACE: Duration = Duration::from_millis(10);

/// Where a process starts: in which cgroup, in which network namespace.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place<'a> {
    /// The cgroup, or that of the test itself.
    pub cgroup: Option<&'a Cgroup>,
    /// The network namespace, or that of the test itself.
    pub netns: Option<&'a Netns>,
}

impl<'a> From<&'a Cgroup> for Place<'a> {
    fn from(cgroup: &'a Cgroup) -> Self {
        Self {
            cgroup: Some(cgroup),
            netns: None,
        }
    }
}

impl<'a> From<&'a Netns> for Place<'a> {
    fn from(netns: &'a Netns) -> Self {
        Self {
            cgroup: None,
            netns: Some(netns),
        }
    }
}

impl<'a> From<(&'a Cgroup, &'a Netns)> for Place<'a> {
    fn from((cgroup, netns): (&'a Cgroup, &'a Netns)) -> Self {
        Self {
            cgroup: Some(cgroup),
            netns: Some(netns),
        }
    }
}

impl Place<'_> {
    /// A command that puts itself in this place before it becomes `program`: no
    /// socket of the program is older than its membership of the cgroup. The
    /// process id stays the same throughout.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut words: Vec<std::ffi::OsString> = Vec::new();
        if let Some(netns) = self.netns {
            words.push("nsenter".into());
            words.push(netns.enter_argument().into());
            words.push("--".into());
        }
        if let Some(cgroup) = self.cgroup {
            words.extend(["sh", "-c", r#"echo $$ >"$0" && exec "$@""#].map(Into::into));
            words.push(cgroup.directory().join("cgroup.procs").into());
        }
        words.push(program.as_ref().to_owned());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null());
        command
    }
}

/// A child process that is killed and waited for when the guard goes.
#[derive(Debug)]
pub struct Process {
    child: Child,
    farewell: Option<Signal>,
}

impl Process {
    /// Starts the command.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        Ok(Self {
            child,
            farewell: None,
        })
    }

    /// Has the guard send this signal first and wait a while: for a program that
    /// leaves something behind when it is killed.
    #[must_use]
    pub fn ended_by(mut self, signal: Signal) -> Self {
        self.farewell = Some(signal);
        self
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// The process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.id())?).context("no process")?;
        kill_process(pid, signal).context("cannot send a signal")
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    ///
    /// It does not within the limit.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let mut status = None;
        wait_until(limit, "the process to end", || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        status.context("no exit status")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(signal) = self.farewell
            && self.signal(signal).is_ok()
        {
            drop(self.wait(Duration::from_secs(10)));
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A program that is spoken to line by line.
#[derive(Debug)]
pub struct Dialogue {
    process: Process,
    lines: Receiver<String>,
}

impl Dialogue {
    /// Starts the command.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut process = Process::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let lines = lines(process.child().stdout.take());
        Ok(Self { process, lines })
    }

    /// Sends it a line.
    ///
    /// # Errors
    ///
    /// It reads no more.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self.process.child().stdin.as_mut().context("no input")?;
        writeln!(stdin, "{line}").context("it reads no more")
    }

    /// Its next line.
    ///
    /// # Errors
    ///
    /// It says nothing within the limit, or has ended.
    pub fn hear(&self, limit: Duration) -> Result<String> {
        self.lines.recv_timeout(limit).context("it says nothing")
    }
}

/// Looks again and again until the condition holds.
///
/// # Errors
///
/// It does not within the limit, or looking fails.
pub fn wait_until(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let start = Instant::now();
    while !condition()? {
        if start.elapsed() > limit {
            bail!("waited {limit:?} in vain for {what}");
        }
        std::thread::sleep(PACE);
    }
    Ok(())
}

/// What a program that ran to its end left.
#[derive(Debug)]
pub struct Output {
    /// The exit code, if no signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// Runs a command to its end.
///
/// # Errors
///
/// It cannot be started, or does not end within the limit; it is killed then.
pub fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::start(command)?;
    let stdout = collect(process.child().stdout.take());
    let stderr = collect(process.child().stderr.take());
    let status = process
        .wait(limit)
        .with_context(|| format!("{command:?}"))?;
    Ok(Output {
        code: status.code(),
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    })
}

/// Reads a pipe to its end on a thread of its own.
pub(crate) fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            drop(pipe.read_to_end(&mut bytes));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The lines of a pipe as they come, so that waiting for one can be bounded.
pub(crate) fn lines(pipe: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in pipe
            .into_iter()
            .flat_map(|pipe| BufReader::new(pipe).lines())
        {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
