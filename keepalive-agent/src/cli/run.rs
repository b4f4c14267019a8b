//! `keepalive-agent run`: enforces the policy until it is stopped.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, bail};
use clap::Args;

use super::{
    Target, log,
    report::{Form, Report},
};
use crate::{
    daemon::{self, Options},
    datapath::PinDirectory,
    metrics::server::Address,
};

#[derive(Args, Debug)]
#[command(
    after_help = "A change of a config file is followed at once, as is SIGHUP; a bad one changes \
                  nothing. Cgroups that are made later get their policy as they are made. A cgroup \
                  given by --cgroup that does not exist, or goes away, is waited for. Connections \
                  keep what they were given when the agent stops.\n\n\
                  Without --pin enforcement ends with the agent. With it the kernel goes on \
                  enforcing, whatever becomes of the agent, until `keepalive-agent detach`; the \
                  next agent goes on from there.\n\n\
                  Examples:\n  \
                  keepalive-agent run\n  \
                  keepalive-agent run --pin\n  \
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

    /// Let enforcement outlive the agent, by pins in this directory of a BPF file
    /// system
    #[arg(
        long,
        value_name = "DIR",
        num_args = 0..=1,
        default_missing_value = PinDirectory::DEFAULT
    )]
    pin: Option<PathBuf>,

    /// Replace the agent that runs on the same cgroup, without a gap
    #[arg(long)]
    take_over: bool,

    /// Serve metrics (OpenMetrics) at /metrics, and /healthz and /readyz, on this
    /// address of the loopback interface or socket, such as 127.0.0.1:9464 or
    /// /run/keepalive/metrics.sock; "systemd" is the socket of a .socket unit
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<Address>,

    /// Let other machines reach them: there is no password and no encryption
    #[arg(long, requires = "metrics")]
    metrics_public: bool,
}

impl Arguments {
    pub(super) fn prints_json(&self) -> bool {
        self.target.json
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let target = &arguments.target;
    if let Some(address) = &arguments.metrics
        && address.is_public()
        && !arguments.metrics_public
    {
        bail!(
            "--metrics: other machines may reach this address, and would see names of policies: \
             use one of the loopback interface, or add --metrics-public"
        );
    }
    let options = Options {
        sources: target.files.sources(),
        cgroup: target.cgroup.clone(),
        dry_run: arguments.dry_run,
        pin: arguments.pin.clone(),
        take_over: arguments.take_over,
        metrics: arguments.metrics.clone(),
    };
    let form = match log::journal() {
        _ if target.json => Form::Json,
        Some(_) => Form::Journal,
        None => Form::Text,
    };
    daemon::run(&options, &mut Report { form })?;
    Ok(ExitCode::SUCCESS)
}
