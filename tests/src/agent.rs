use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use serde_json::Value;

use crate::process::{collect, lines};
use crate::{Cgroup, Process};

/// Loading takes a few tens of milliseconds; a busy machine is given more.
const START: Duration = Duration::from_secs(30);
const STOP: Duration = Duration::from_secs(10);

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
    stderr: Option<JoinHandle<String>>,
    started: Value,
    _config: Option<tempfile::NamedTempFile>,
}

impl Agent {
    /// Starts it with a configuration and waits until it is attached.
    ///
    /// # Errors
    ///
    /// It ends instead, with what it said, or is not attached in time.
    pub fn start(cgroup: &Cgroup, config: &str) -> Result<Self> {
        let file = tempfile::NamedTempFile::with_suffix(".toml")?;
        fs::write(&file, config)?;
        let mut command = agent_command();
        command.arg("run").arg("--config").arg(file.path());
        command.args(["--cgroup", cgroup.path()]);
        Self::start_command(command, Some(file))
    }

    /// Starts it for the whole host. The configuration must claim nothing but
    /// cgroups of the test: this is where everybody's connections are.
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

    fn start_command(
        mut command: Command,
        config: Option<tempfile::NamedTempFile>,
    ) -> Result<Self> {
        command.arg("--json");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let records = lines(process.child().stdout.take());
        let stderr = Some(collect(process.child().stderr.take()));
        let mut agent = Self {
            process,
            records,
            stderr,
            started: Value::Null,
            _config: config,
        };
        agent.started = match agent.record("started", START) {
            Ok(record) => record,
            Err(error) => {
                drop(agent.process.signal(Signal::KILL));
                bail!("{error:#}\n{}", agent.take_stderr());
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
        let record = self.record("stopped", STOP);
        let status = self.process.wait(STOP)?;
        let stderr = self.take_stderr();
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

    /// What it wrote to standard error. It has ended, so there is an end to it.
    fn take_stderr(&mut self) -> String {
        let reader = self.stderr.take();
        reader.map_or_else(String::new, |reader| reader.join().unwrap_or_default())
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
    /// One of a policy's counters.
    ///
    /// # Panics
    ///
    /// The record has no such policy or counter.
    #[must_use]
    pub fn count(&self, policy: &str, counter: &str) -> u64 {
        let policies = self.record["policies"].as_array();
        policies
            .into_iter()
            .flatten()
            .find(|entry| entry["name"] == policy)
            .and_then(|entry| entry[counter].as_u64())
            .unwrap_or_else(|| panic!("no {counter} of {policy} in {}", self.record))
    }
}
