//! An agent on a thread of the test, whose calls to the kernel the test can make fail
//! or wait: built with its feature `fault-injection`.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use anyhow::{Context, Result};
use keepalive_agent::config::Sources;
use keepalive_agent::daemon::control::{Client, Request};
use keepalive_agent::daemon::{self, Event, Reporter};
use keepalive_agent::hierarchy::CgroupPath;

const LIMIT: Duration = Duration::from_mins(1);

/// The agent, and what it tells.
#[derive(Debug)]
pub struct AgentThread {
    /// The names of its reports, as in `--json`.
    pub events: Receiver<&'static str>,
    /// Where it runs.
    pub thread: JoinHandle<Result<()>>,
}

struct Recorder(Sender<&'static str>);

impl Reporter for Recorder {
    fn report(&mut self, event: &Event<'_>) {
        let name = match event {
            Event::Started { .. } => "started",
            Event::Waiting { .. } => "waiting",
            Event::Reloaded { .. } => "reloaded",
            Event::Swept(_) => "swept",
            Event::Stopped { .. } => "stopped",
        };
        let _ = self.0.send(name);
    }
}

impl AgentThread {
    /// Starts one on a cgroup, given by its path, with a config in one file.
    #[must_use]
    pub fn start(cgroup: &str, pins: &str, config: &Path) -> Self {
        let options = daemon::Options {
            sources: Sources::new(Some(config), &[]),
            cgroup: cgroup.into(),
            dry_run: false,
            pin: Some(PathBuf::from(pins)),
            take_over: false,
            metrics: None,
        };
        let (sender, events) = channel();
        Self {
            events,
            thread: spawn(move || daemon::run(&options, &mut Recorder(sender))),
        }
    }

    /// Waits until it has told this.
    ///
    /// # Errors
    ///
    /// It is silent for too long.
    pub fn hears(&self, event: &str) -> Result<()> {
        let next = || {
            self.events
                .recv_timeout(LIMIT)
                .context("the agent is silent")
        };
        while next()? != event {}
        Ok(())
    }

    /// Waits until it has ended; its error where it has one.
    ///
    /// # Errors
    ///
    /// That, or it has panicked.
    pub fn ended(self) -> Result<()> {
        self.thread.join().ok().context("the agent panicked")?
    }

    /// Asks it to end, and waits until it has.
    ///
    /// # Errors
    ///
    /// It cannot be asked, or as [`Self::ended`].
    pub fn end(self, cgroup: &str, request: Request) -> Result<()> {
        Client::connect(&CgroupPath::from(cgroup))?.ask(request)?;
        self.ended()
    }
}
