//! The command line: one file per subcommand.

mod check;
mod detach;
mod events;
mod exec;
mod explain;
mod follow;
mod generate;
mod log;
mod output;
mod policy;
mod recommend;
mod report;
mod run;
mod screen;
mod sockets;
mod status;
mod sweep;
mod table;
mod top;
mod trial;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};

use crate::{
    VERSION,
    config::Sources,
    daemon::control::Client,
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    identity::{NamePattern, Wanted},
};

/// Exit code: some network namespace could not be entered, the rest is done.
const PARTIAL: u8 = 4;

/// TCP keepalive for every connection of this machine, whatever the
/// applications do.
#[derive(Debug, Parser)]
#[command(
    name = "keepalive-agent",
    version = VERSION,
    disable_help_subcommand = true,
    after_help = "Exit codes: 0 done, 1 failed or not able, 2 wrong usage, 3 connections at risk \
                  (sockets), 4 done in part.\n\n\
                  Examples:\n  \
                  keepalive-agent check                     is this kernel able?\n  \
                  keepalive-agent run                       keepalive for all new connections\n  \
                  keepalive-agent run --config my.toml      with a policy of your own\n  \
                  keepalive-agent run --pin                 that go on when the agent ends\n  \
                  keepalive-agent status                    what is in force\n  \
                  keepalive-agent events                    what happens, such as dead peers\n  \
                  keepalive-agent recommend                 which idle time would have kept them\n  \
                  keepalive-agent sweep                     for the ones that exist, once\n  \
                  keepalive-agent sockets                   what every connection really has\n  \
                  keepalive-agent top                       the same as a live view\n  \
                  keepalive-agent explain --pid 1234                which policy, and why\n  \
                  keepalive-agent policy show               what holds, and where it is written\n  \
                  keepalive-agent exec -- COMMAND           keepalive for one command"
)]
pub struct Cli {
    /// Log what is decided on the way, not only what goes wrong
    #[arg(long, short, global = true)]
    verbose: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Enforce the policy on every connection, new and existing, until stopped
    Run(run::Arguments),
    /// Bring the policy to the connections that exist now, once
    Sweep(sweep::Arguments),
    /// Show what is in force in the kernel, with or without a running agent
    Status(status::Arguments),
    /// Follow what happens: dead peers, reloads, sweeps, errors
    Events(events::Arguments),
    /// Recommend timers, from the silences that connections died of
    Recommend(recommend::Arguments),
    /// Take enforcement off, with all its pins
    Detach(detach::Arguments),
    /// Find out whether this kernel is able, and whether a config is right
    Check(check::Arguments),
    /// List every connection and the keepalive it really has
    Sockets(sockets::Arguments),
    /// Watch all connections: who survives, what is forgotten next
    Top(top::Arguments),
    /// Tell which policy claims a connection, why, and what comes of it
    Explain(explain::Arguments),
    /// Show the policy with the file and line of each value, and change it
    Policy(Box<policy::Arguments>),
    /// Run a command in a cgroup of its own with a policy of its own
    Exec(exec::Arguments),
    /// Write man pages and shell completions
    Generate(generate::Arguments),
    /// Enforce for a command until it has ended (used by `exec`)
    #[command(name = exec::SUPERVISE, hide = true)]
    Supervise(exec::Supervise),
    /// Connect to itself and show the options of both ends (used by `check`)
    #[command(name = trial::COMMAND, hide = true)]
    Trial,
}

impl Command {
    /// Whether what it logs is for machines: what goes on for long, and prints JSON.
    fn logs_json(&self) -> bool {
        matches!(self, Self::Run(arguments) if arguments.prints_json())
    }
}

/// Which policy, and where.
#[derive(Args, Debug)]
struct Target {
    #[command(flatten)]
    files: ConfigFiles,

    /// Govern only this cgroup and what is below it, such as /system.slice
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/",
        hide_default_value = true
    )]
    cgroup: PathBuf,

    /// Print JSON lines with timestamps for machines instead of text for people;
    /// what is logged too
    #[arg(long)]
    json: bool,
}

/// Which units, containers or pods.
#[derive(Args, Debug)]
struct Whose {
    /// Only this unit of systemd: a name such as redis.service, or a glob
    #[arg(long, value_name = "NAME")]
    unit: Option<NamePattern>,

    /// Only this container: its name, a glob, or the beginning of its id
    #[arg(long, value_name = "NAME")]
    container: Option<NamePattern>,

    /// Only this pod: its name or NAMESPACE/NAME, or a glob
    #[arg(long, value_name = "NAME")]
    pod: Option<NamePattern>,
}

impl Whose {
    fn wanted(&self) -> Wanted {
        Wanted {
            unit: self.unit.clone(),
            container: self.container.clone(),
            pod: self.pod.clone(),
        }
    }
}

/// Which files make up the config.
#[derive(Args, Debug)]
struct ConfigFiles {
    /// Policy file, instead of /etc/keepalive/keepalive.toml (where that does not
    /// exist, the built-in policy: on, idle 60s, interval 10s, probes 6) and the
    /// drop-ins in /etc/keepalive/conf.d and /run/keepalive/conf.d
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Directory of drop-ins to add, *.toml; the later one wins
    #[arg(long, value_name = "DIR")]
    drop_in_dir: Vec<PathBuf>,
}

impl ConfigFiles {
    fn sources(&self) -> Sources {
        Sources::new(self.config.as_deref(), &self.drop_in_dir)
    }
}

/// The running agent that is asked.
#[derive(Args, Debug)]
struct RunningAgent {
    /// The agent of this cgroup
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/",
        hide_default_value = true
    )]
    cgroup: PathBuf,
}

impl RunningAgent {
    fn connect(cgroup: &CgroupPath) -> Result<Client> {
        Client::connect(cgroup).with_context(|| format!("no agent answers for cgroup {cgroup}"))
    }
}

impl Target {
    /// The hierarchy, and the cgroup to attach to.
    fn root(&self) -> Result<(Hierarchy, Cgroup)> {
        let hierarchy = Hierarchy::find()?;
        let root = hierarchy.existing(&self.cgroup)?;
        Ok((hierarchy, root))
    }
}

/// Runs the program. Errors are printed here, once, with all their causes.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.command.logs_json();
    log::init(cli.verbose, json);
    let done = match &cli.command {
        Command::Run(arguments) => run::run(arguments),
        Command::Sweep(arguments) => sweep::sweep(arguments),
        Command::Status(arguments) => status::status(arguments),
        Command::Events(arguments) => events::events(arguments),
        Command::Recommend(arguments) => recommend::recommend(arguments),
        Command::Detach(arguments) => detach::detach(arguments),
        Command::Check(arguments) => check::check(arguments),
        Command::Sockets(arguments) => sockets::sockets(arguments),
        Command::Top(arguments) => top::top(arguments),
        Command::Explain(arguments) => explain::explain(arguments),
        Command::Policy(arguments) => policy::policy(arguments),
        Command::Exec(arguments) => exec::exec(arguments),
        Command::Supervise(arguments) => exec::supervise(arguments),
        Command::Generate(arguments) => generate::generate(arguments),
        Command::Trial => trial::child().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        log::last_error(&error, json);
        ExitCode::FAILURE
    })
}
