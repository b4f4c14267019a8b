use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use serde_json::Value;

use crate::process::lines;
use crate::{Cgroup, Pins, Process, wait_until};

/// Loading takes a few tens of milliseconds; a busy machine is given more.
const START: Duration = Duration::from_mins(1);
const STOP: Duration = Duration::from_secs(10);
const SWEEP: Duration = Duration::from_mins(1);

/// The agent under test: `KEEPALIVE_AGENT`, or the workspace's release build.
///
/// # Panics
///
/// It is not there: no test may pass for want of something to test.
#[must_use]
pub fn agent_binary() -> PathBuf {
    let path = std::env::var_os("KEEPALIVE_AGENT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/keepalive-agent"),
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "no agent at {}: build it with `cargo xtask build`, or name one in KEEPALIVE_AGENT",
        path.display()
    );
    path
}

/// A command that runs the agent.
#[must_use]
pub fn agent_command() -> Command {
    let mut command = Command::new(agent_binary());
    command.stdin(Stdio::null());
    command
}

/// A running agent that governs one cgroup and what is below it. Killed when the
/// guard goes, which detaches it.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    records: Receiver<String>,
    stderr: Growing,
    started: Value,
    config: Option<tempfile::NamedTempFile>,
}

impl Agent {
    /// Starts it with a configuration and waits until it is attached.
    ///
    /// # Errors
    ///
    /// It ends instead, with what it said, or is not attached in time.
    pub fn start(cgroup: &Cgroup, config: &str) -> Result<Self> {
        Self::start_with(cgroup, config, &["env"])
    }

    /// The same by way of a command that becomes what is named behind it.
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    pub fn start_with(cgroup: &Cgroup, config: &str, by: &[&str]) -> Result<Self> {
        Self::start_by(cgroup, config, by, &[])
    }

    /// The same with enforcement that outlives it, and more arguments.
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    pub fn start_pinned(cgroup: &Cgroup, config: &str, pins: &Pins, more: &[&str]) -> Result<Self> {
        let mut arguments = vec!["--pin", pins.name()];
        arguments.extend(more);
        Self::start_by(cgroup, config, &["env"], &arguments)
    }

    /// The same of another build, and with more arguments.
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    pub fn start_build(
        binary: &Path,
        cgroup: &Cgroup,
        config: &str,
        more: &[&str],
    ) -> Result<Self> {
        let file = tempfile::NamedTempFile::with_suffix(".toml")?;
        fs::write(&file, config)?;
        let mut command = Command::new(binary);
        command.stdin(Stdio::null());
        command.arg("run").arg("--config").arg(file.path());
        command.args(["--cgroup", cgroup.path()]).args(more);
        Self::start_command(command, Some(file))
    }

    /// The same by way of a command, and with more arguments.
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    pub fn start_by(cgroup: &Cgroup, config: &str, by: &[&str], more: &[&str]) -> Result<Self> {
        let file = tempfile::NamedTempFile::with_suffix(".toml")?;
        fs::write(&file, config)?;
        let mut command = Command::new(by[0]);
        command.args(&by[1..]).arg(agent_binary());
        command.stdin(Stdio::null());
        command.arg("run").arg("--config").arg(file.path());
        command.args(["--cgroup", cgroup.path()]).args(more);
        Self::start_command(command, Some(file))
    }

    /// Starts it for the whole host. The configuration must claim nothing but
    /// cgroups and addresses of the test: this is where everybody's connections are.
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    ///
    /// # Panics
    ///
    /// The configuration has a `[default]`.
    pub fn start_everywhere(config: &str) -> Result<Self> {
        assert!(!config.contains("[default]"), "that would be everybody's");
        let file = tempfile::NamedTempFile::with_suffix(".toml")?;
        fs::write(&file, config)?;
        let mut command = agent_command();
        command.arg("run").arg("--config").arg(file.path());
        Self::start_command(command, Some(file))
    }

    /// Starts it with the files that these arguments name, by way of a command
    /// that becomes what is named behind it. Nothing of them is written here.
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    pub fn start_on<A: AsRef<OsStr>>(
        cgroup: &Cgroup,
        arguments: &[A],
        by: &[&str],
    ) -> Result<Self> {
        let mut command = Command::new(by[0]);
        command.args(&by[1..]).arg(agent_binary());
        command.stdin(Stdio::null());
        command.arg("run").args(arguments);
        command.args(["--cgroup", cgroup.path()]);
        Self::start_command(command, None)
    }

    /// Starts it with its built-in policy.
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    pub fn start_built_in(cgroup: &Cgroup) -> Result<Self> {
        let mut command = agent_command();
        command.arg("run").args(["--cgroup", cgroup.path()]);
        Self::start_command(command, None)
    }

    /// Starts it for a cgroup that does not exist, for which it waits.
    ///
    /// # Errors
    ///
    /// It ends instead, or does not say that it waits.
    pub fn start_waiting(cgroup: &Cgroup, config: &str) -> Result<Self> {
        let file = tempfile::NamedTempFile::with_suffix(".toml")?;
        fs::write(&file, config)?;
        let mut command = agent_command();
        command.arg("run").arg("--config").arg(file.path());
        command.args(["--cgroup", cgroup.path()]);
        Self::start_until("waiting", command, Some(file))
    }

    fn start_command(command: Command, config: Option<tempfile::NamedTempFile>) -> Result<Self> {
        Self::start_until("started", command, config)
    }

    fn start_until(
        event: &str,
        mut command: Command,
        config: Option<tempfile::NamedTempFile>,
    ) -> Result<Self> {
        command.arg("--json");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let records = lines(process.child().stdout.take());
        let stderr = Growing::read(process.child().stderr.take());
        let mut agent = Self {
            process,
            records,
            stderr,
            started: Value::Null,
            config,
        };
        agent.started = match agent.record(event, START) {
            Ok(record) => record,
            Err(error) => {
                drop(agent.process.signal(Signal::KILL));
                bail!("{error:#}\n{}", agent.stderr.end());
            }
        };
        Ok(agent)
    }

    /// The record with which it said that it is attached.
    #[must_use]
    pub fn started(&self) -> &Value {
        &self.started
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Waits until it says that it is attached, which it does again when its cgroup
    /// has come again.
    ///
    /// # Errors
    ///
    /// It does not in time.
    pub fn started_again(&mut self) -> Result<Value> {
        self.record("started", START)
            .with_context(|| self.stderr.so_far())
    }

    /// Waits until it says that its cgroup does not exist.
    ///
    /// # Errors
    ///
    /// It does not in time.
    pub fn waits(&mut self) -> Result<Value> {
        self.record("waiting", START)
            .with_context(|| self.stderr.so_far())
    }

    /// Waits until it ends by itself, replaced by another one.
    ///
    /// # Errors
    ///
    /// It does not in time.
    pub fn replaced(mut self) -> Result<Finished> {
        self.ended()
    }

    /// Its next report of a sweep. Each start and each reload makes one.
    ///
    /// # Errors
    ///
    /// It ends instead, or does not sweep in time.
    pub fn swept(&mut self) -> Result<Value> {
        self.record("swept", SWEEP)
            .with_context(|| self.stderr.so_far())
    }

    /// Writes another configuration and has the agent read it. Returns its report
    /// of the sweep that follows.
    ///
    /// # Errors
    ///
    /// It does not take it, or does not sweep in time.
    pub fn reload(&mut self, config: &str) -> Result<Value> {
        self.hang_up(config)?;
        self.reloaded()
    }

    /// Waits until it has taken another configuration, and returns its report of
    /// the sweep that follows.
    ///
    /// # Errors
    ///
    /// It does not take one in time.
    pub fn reloaded(&mut self) -> Result<Value> {
        self.tells_difference()?;
        self.swept()
    }

    /// The same before the sweep: its report of what is different.
    ///
    /// # Errors
    ///
    /// As [`Self::reloaded`].
    pub fn tells_difference(&mut self) -> Result<Value> {
        self.record("reloaded", SWEEP)
            .with_context(|| self.stderr.so_far())
    }

    /// Makes sure that it takes no other configuration in this time.
    ///
    /// # Errors
    ///
    /// It does.
    pub fn not_reloaded(&mut self, time: Duration) -> Result<()> {
        match self.record("reloaded", time) {
            Ok(record) => bail!("it went over to {record}"),
            Err(error) if self.is_alive()? => {
                drop(error);
                Ok(())
            }
            Err(error) => Err(error).with_context(|| self.stderr.so_far()),
        }
    }

    fn is_alive(&mut self) -> Result<bool> {
        Ok(self.process.child().try_wait()?.is_none())
    }

    /// What it has said on standard error so far.
    #[must_use]
    pub fn said(&self) -> String {
        self.stderr.so_far()
    }

    /// Writes another configuration that the agent is not to take, and returns
    /// what it says about it.
    ///
    /// # Errors
    ///
    /// It says nothing in time.
    pub fn reload_refused(&mut self, config: &str) -> Result<String> {
        let before = self.stderr.so_far().len();
        self.hang_up(config)?;
        let mut said = String::new();
        wait_until(START, "the agent to refuse a configuration", || {
            said = self.stderr.so_far().split_off(before);
            Ok(said.contains("goes on"))
        })?;
        Ok(said)
    }

    /// Writes another configuration, which it may find by itself.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn rewrite(&self, config: &str) -> Result<()> {
        let file = self.config.as_ref().context("an agent without a file")?;
        Ok(fs::write(file, config)?)
    }

    /// Writes another configuration and has the agent read it. It finds the new file and
    /// the signal at once, and not the one long before the other: it would read the file
    /// twice then.
    ///
    /// # Errors
    ///
    /// The file cannot be written, or the agent is gone.
    pub fn hang_up(&self, config: &str) -> Result<()> {
        let file = self.config.as_ref().context("an agent without a file")?;
        self.process.signal(Signal::STOP)?;
        let written = fs::write(file, config);
        self.process.signal(Signal::HUP)?;
        self.process.signal(Signal::CONT)?;
        Ok(written?)
    }

    /// Sends it a signal, such as one that stops it for a while.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Ends it with SIGTERM.
    ///
    /// # Errors
    ///
    /// It does not end in time, or without a last record.
    pub fn stop(self) -> Result<Finished> {
        self.stop_with(Signal::TERM)
    }

    /// Ends it with this signal.
    ///
    /// # Errors
    ///
    /// As [`Agent::stop`].
    pub fn stop_with(mut self, signal: Signal) -> Result<Finished> {
        self.process.signal(signal)?;
        self.ended()
    }

    fn ended(&mut self) -> Result<Finished> {
        let record = self.record("stopped", STOP);
        let status = self.process.wait(STOP)?;
        let stderr = self.stderr.end();
        Ok(Finished {
            code: status.code(),
            record: record.with_context(|| format!("{status}: {stderr}"))?,
            stderr,
        })
    }

    /// Kills it without any warning, and waits until it is gone.
    ///
    /// # Errors
    ///
    /// It does not go.
    pub fn kill(mut self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.wait(STOP)?;
        Ok(())
    }

    fn record(&mut self, event: &str, limit: Duration) -> Result<Value> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self
                .records
                .recv_timeout(left)
                .map_err(|error| match error {
                    RecvTimeoutError::Timeout => {
                        anyhow!("the agent sent no `{event}` in {limit:?}")
                    }
                    RecvTimeoutError::Disconnected => anyhow!("the agent ended without `{event}`"),
                })?;
            let record: Value =
                serde_json::from_str(&line).with_context(|| format!("not JSON: `{line}`"))?;
            if record["event"] == event {
                return Ok(record);
            }
        }
    }
}

/// An agent that ended by itself.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code, if no signal ended it.
    pub code: Option<i32>,
    /// Its last record.
    pub record: Value,
    /// Its standard error, from beginning to end.
    pub stderr: String,
}

impl Finished {
    /// One of a policy's counters of new connections.
    ///
    /// # Panics
    ///
    /// The record has no such policy or counter.
    #[must_use]
    pub fn count(&self, policy: &str, counter: &str) -> u64 {
        self.counter(policy, |entry| entry[counter].as_u64())
            .unwrap_or_else(|| panic!("no {counter} of {policy} in {}", self.record))
    }

    /// One of a policy's counters of connections that were there before it.
    ///
    /// # Panics
    ///
    /// The record has no such policy or counter.
    #[must_use]
    pub fn count_existing(&self, policy: &str, counter: &str) -> u64 {
        self.counter(policy, |entry| entry["existing"][counter].as_u64())
            .unwrap_or_else(|| panic!("no existing {counter} of {policy} in {}", self.record))
    }

    fn counter(&self, policy: &str, get: impl Fn(&Value) -> Option<u64>) -> Option<u64> {
        let policies = self.record["policies"].as_array()?;
        get(policies.iter().find(|entry| entry["name"] == policy)?)
    }
}

/// What a program writes to a pipe, readable while it grows.
#[derive(Debug)]
struct Growing {
    text: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Growing {
    fn read(pipe: Option<ChildStderr>) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&text);
        let reader = std::thread::spawn(move || {
            let Some(mut pipe) = pipe else { return };
            // Not line by line: a message of several lines is seen whole, as it
            // was written, or not yet.
            let mut written = vec![0; 64 * 1024];
            while let Ok(length @ 1..) = pipe.read(&mut written) {
                let mut text = into.lock().unwrap_or_else(PoisonError::into_inner);
                text.push_str(&String::from_utf8_lossy(&written[..length]));
            }
        });
        Self {
            text,
            reader: Some(reader),
        }
    }

    fn so_far(&self) -> String {
        self.text
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// All of it. The program has ended, so there is an end to it.
    fn end(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            drop(reader.join());
        }
        self.so_far()
    }
}
