//! `keepalive-agent run`: enforces the policy until it is stopped.

mod agent;

use std::{process::ExitCode, time::Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{
    Target,
    report::{self, Started},
};
use agent::{Agent, Beginning, Event};
pub(super) use agent::{assign, claimants};

#[derive(Args, Debug)]
#[command(
    after_help = "A change of a config file is followed at once, as is SIGHUP; a bad one changes \
                  nothing. Cgroups that are made later get their policy as they are made. \
                  Connections keep what they were given when the agent stops.\n\n\
                  Examples:\n  \
                  keepalive-agent run\n  \
                  keepalive-agent run --dry-run\n  \
                  keepalive-agent run --config /etc/keepalive/keepalive.toml\n  \
                  keepalive-agent run --cgroup /system.slice/redis.service"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    target: Target,

    /// Decide and count everything, set nothing; `sockets` shows what would
    /// change
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("starting the runtime")?
        .block_on(enforce(&arguments.target, arguments.dry_run))?;
    Ok(ExitCode::SUCCESS)
}

async fn enforce(target: &Target, dry_run: bool) -> Result<()> {
    // Before anything is attached, so that a signal cannot come too early.
    let mut signals = Signals::watch()?;
    let Beginning {
        mut agent,
        assignment,
        swept,
        source,
    } = Agent::start(target, dry_run)?;
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
            Event::Hangup => agent.reload(target, true)?,
            Event::Edited(changed) => agent.follow_files(target, changed)?,
            Event::Cgroups(changes) => agent.follow_cgroups(changes),
            Event::Late => agent.catch_up()?,
            Event::Swept => agent.go_on_sweeping()?,
            Event::Refused => agent.tell_refusals()?,
        }
    };
    let done = agent.done()?;
    let failures = agent.failures()?;
    drop(agent);
    report::stopped(target, stopped_by, started.elapsed(), &done, &failures)
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
