//! `keepalive-agent run`: enforces the policy until it is stopped.

use std::{future::pending, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result};
use aya_log::EbpfLogger;
use clap::Args;
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{Signal, SignalKind, signal},
};
use tracing::{debug, error, warn};

use super::{
    Target,
    report::{self, Patience, Started},
};
use crate::{
    assignment::{Assignment, Claimants},
    bpf::{Enforcer, Loaded},
    config::Config,
    hierarchy::{Cgroup, Hierarchy},
    kernel::{layout, preflight},
    state,
    sweep::{self, Rest, Swept},
};

#[derive(Args, Debug)]
#[command(
    after_help = "SIGHUP reads the config again; a bad one changes nothing. Connections keep what \
                  they were given when the agent stops.\n\n\
                  Examples:\n  \
                  keepalive-agent run\n  \
                  keepalive-agent run --config /etc/keepalive/keepalive.toml\n  \
                  keepalive-agent run --cgroup /system.slice/redis.service"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    target: Target,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("starting the runtime")?
        .block_on(enforce(&arguments.target))?;
    Ok(ExitCode::SUCCESS)
}

async fn enforce(target: &Target) -> Result<()> {
    // Before anything is attached, so that a signal cannot come too early.
    let mut signals = Signals::watch()?;
    let (mut agent, assignment, swept, source) = Agent::start(target)?;
    let started = Instant::now();
    report::started(
        target,
        &Started {
            place: &agent.place(),
            source: &source,
            assignment: &assignment,
        },
    )?;
    report::swept(target, &swept)?;
    let stopped_by = loop {
        match agent.next(&mut signals).await? {
            Event::Stop(signal) => break signal,
            Event::Reload => agent.reload(target)?,
            Event::Swept => agent.go_on_sweeping()?,
        }
    };
    let done = agent.enforcer.done().context("reading the counters")?;
    let failures = agent.enforcer.failures().context("reading the failures")?;
    drop(agent);
    report::stopped(target, stopped_by, started.elapsed(), &done, &failures)
}

/// What the agent is woken by.
enum Event {
    Stop(&'static str),
    Reload,
    Swept,
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn watch() -> Result<Self> {
        let watch = |kind, name| signal(kind).with_context(|| format!("watching for {name}"));
        Ok(Self {
            interrupt: watch(SignalKind::interrupt(), "SIGINT")?,
            terminate: watch(SignalKind::terminate(), "SIGTERM")?,
            hangup: watch(SignalKind::hangup(), "SIGHUP")?,
        })
    }
}

/// A running agent.
struct Agent {
    hierarchy: Hierarchy,
    root: Cgroup,
    config: Config,
    claimants: Claimants,
    enforcer: Enforcer,
    log: AsyncFd<EbpfLogger<&'static dyn log::Log>>,
    state: Option<state::Own>,
    /// The sweep under way.
    rest: Option<Rest>,
}

impl Agent {
    /// Enforces from here on, and sweeps what was there first.
    fn start(target: &Target) -> Result<(Self, Assignment, Swept, super::ConfigSource)> {
        let (config, source, warnings) = target.config()?;
        for warning in &warnings.0 {
            warn!("{warning}");
        }
        preflight::may_enforce()?;
        let (hierarchy, root) = target.root()?;
        let layout = layout::running()?;
        debug!(?layout, "found the kernel's fields");
        let claimants = claimants(&config, &root)?;
        let assignment = assign(&claimants, &hierarchy)?;
        let before = take_over(&hierarchy, &root).unwrap_or_else(|error| {
            warn!("{error:#}; values that an earlier agent set count as the applications' own");
            None
        });
        let directory = hierarchy.open(&root)?;
        let mut enforcer = Loaded::load(&layout, assignment.policies.len())?
            .fill(before.as_ref(), &assignment)?
            .attach(&directory)
            .with_context(|| format!("cgroup {}", hierarchy.directory(&root.path).display()))?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the logger keeps its descriptor open"
        )]
        let log = AsyncFd::with_interest(enforcer.logger()?, Interest::READABLE)
            .context("watching the log of the BPF program")?;
        let state = state::Own::write(&root, &config)
            .inspect_err(|error| {
                warn!("{error:#}; `sockets` cannot tell the policy behind a value");
            })
            .ok();
        let mut agent = Self {
            hierarchy,
            root,
            config,
            claimants,
            enforcer,
            log,
            state,
            rest: None,
        };
        let swept = agent.sweep()?;
        Ok((agent, assignment, swept, source))
    }

    fn place(&self) -> String {
        let directory = self.hierarchy.directory(&self.root.path);
        directory.display().to_string()
    }

    /// Waits for something to do. What the BPF program logs is passed on
    /// meanwhile.
    async fn next(&mut self, signals: &mut Signals) -> Result<Event> {
        let rest = &mut self.rest;
        let swept = async {
            match rest {
                Some(rest) => rest.finished().await,
                None => pending().await,
            }
        };
        let log = &mut self.log;
        let relay = async {
            loop {
                let mut guard = log
                    .readable_mut()
                    .await
                    .context("reading the log of the BPF program")?;
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
        };
        tokio::select! {
            _ = signals.interrupt.recv() => Ok(Event::Stop("SIGINT")),
            _ = signals.terminate.recv() => Ok(Event::Stop("SIGTERM")),
            _ = signals.hangup.recv() => Ok(Event::Reload),
            () = swept => Ok(Event::Swept),
            error = relay => error,
        }
    }

    /// Reads the config again and goes over to it. What is wrong with it is
    /// logged and changes nothing.
    fn reload(&mut self, target: &Target) -> Result<()> {
        match self.follow(target) {
            Ok((assignment, swept)) => {
                report::reloaded(target, &assignment)?;
                report::swept(target, &swept)
            }
            Err(error) => {
                error!("the policy in force goes on: {error:#}");
                Ok(())
            }
        }
    }

    /// Goes over to the config of now.
    fn follow(&mut self, target: &Target) -> Result<(Assignment, Swept)> {
        let (config, _, warnings) = target.config()?;
        let claimants = claimants(&config, &self.root)?;
        let assignment = assign(&claimants, &self.hierarchy)?;
        for warning in &warnings.0 {
            warn!("{warning}");
        }
        // What is left of the last sweep is for the next one to do.
        self.rest = None;
        self.enforcer.settle()?;
        self.enforcer.switch(&assignment)?;
        self.config = config;
        self.claimants = claimants;
        if let Some(state) = &self.state
            && let Err(error) = state.rewrite(&self.root, &self.config)
        {
            warn!("{error:#}; `sockets` goes by the policy before this one");
        }
        Ok((assignment, self.sweep()?))
    }

    /// Brings existing connections along after a change of policy.
    fn sweep(&mut self) -> Result<Swept> {
        let patience = Patience::with(report::SWEEPING);
        // New connections are governed, whatever becomes of the others.
        let swept = sweep::apply(&mut self.enforcer).unwrap_or_else(|error| {
            warn!("existing connections are not governed: {error:#}");
            Swept::default()
        });
        drop(patience);
        for (_, error) in &swept.missed {
            warn!("{error:#}; its existing connections are not governed, new ones are");
        }
        let idle = self.claimants.shortest_idle();
        self.rest = Rest::of(&mut self.enforcer, &swept, idle)?;
        if self.rest.is_none() {
            self.enforcer.settle()?;
        }
        Ok(swept)
    }

    /// A pass of the sweep is over: another one, or the sweep is.
    fn go_on_sweeping(&mut self) -> Result<()> {
        if let Some(rest) = self.rest.take() {
            self.rest = rest.next(&mut self.enforcer)?;
        }
        if self.rest.is_none() {
            self.enforcer.settle()?;
            debug!("the sweep is over");
        }
        Ok(())
    }
}

/// Who claims what below `root`.
pub(super) fn claimants(config: &Config, root: &Cgroup) -> Result<Claimants> {
    if config.default.is_none() && config.policies.is_empty() {
        warn!("the config has neither [default] nor [[policy]]: every connection is left alone");
    }
    Claimants::new(config, root).context("the globs of the config are too large together")
}

/// Assigns, and warns of what has no effect.
pub(super) fn assign(claimants: &Claimants, hierarchy: &Hierarchy) -> Result<Assignment> {
    let (assignment, warnings) = claimants
        .assign(hierarchy)
        .with_context(|| format!("reading the hierarchy {}", hierarchy.mount().display()))?;
    for warning in &warnings {
        warn!("{warning}");
    }
    Ok(assignment)
}

/// What the last agent on this cgroup enforced, in terms of the cgroups of now.
fn take_over(hierarchy: &Hierarchy, root: &Cgroup) -> Result<Option<Assignment>> {
    let Some(before) = state::take_over(hierarchy, root)? else {
        return Ok(None);
    };
    let (assignment, _) = Claimants::new(&before, root)?.assign(hierarchy)?;
    Ok(Some(assignment))
}
