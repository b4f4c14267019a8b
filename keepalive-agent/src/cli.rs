//! The command line: one file per subcommand.

mod check;
mod detach;
mod events;
mod exec;
mod explain;
mod follow;
mod generate;
mod output;
mod policy;
mod report;
mod run;
mod screen;
mod sockets;
mod status;
mod sweep;
mod table;
mod trial;

use std::{
    fmt,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use tracing::{Level, field::Field};
use tracing_subscriber::{
    Layer as _,
    field::MakeExt as _,
    filter::Targets,
    fmt::format::{Writer, debug_fn},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

use crate::{
    VERSION,
    config::Sources,
    hierarchy::{Cgroup, Hierarchy},
    identity::{NamePattern, Wanted},
    names::PrintableLines,
    unblocked::Stream,
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
                  keepalive-agent sweep                     for the ones that exist, once\n  \
                  keepalive-agent sockets                   what every connection really has\n  \
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
    /// Take enforcement off, with all its pins
    Detach(detach::Arguments),
    /// Find out whether this kernel is able, and whether a config is right
    Check(check::Arguments),
    /// List every connection and the keepalive it really has
    Sockets(sockets::Arguments),
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

    /// Print JSON lines for machines instead of text for people
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
    log_to_stderr(cli.verbose);
    let done = match &cli.command {
        Command::Run(arguments) => run::run(arguments),
        Command::Sweep(arguments) => sweep::sweep(arguments),
        Command::Status(arguments) => status::status(arguments),
        Command::Events(arguments) => events::events(arguments),
        Command::Detach(arguments) => detach::detach(arguments),
        Command::Check(arguments) => check::check(arguments),
        Command::Sockets(arguments) => sockets::sockets(arguments),
        Command::Explain(arguments) => explain::explain(arguments),
        Command::Policy(arguments) => policy::policy(arguments),
        Command::Exec(arguments) => exec::exec(arguments),
        Command::Supervise(arguments) => exec::supervise(arguments),
        Command::Generate(arguments) => generate::generate(arguments),
        Command::Trial => trial::child().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        // Nobody is left to tell when this fails too.
        let error = format!("{error:#}");
        let _ = writeln!(io::stderr(), "error: {}", PrintableLines(&error));
        ExitCode::FAILURE
    })
}

/// Writes a field of a log line; the message is one without a name. Its values
/// may have names in them that others chose.
fn printable_field(out: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let value = format!("{value:?}");
    let value = PrintableLines(&value);
    match field.name() {
        "message" => write!(out, "{value}"),
        // Where a record of the crate log comes from.
        name if name.starts_with("log.") => Ok(()),
        name => write!(out, "{name}={value}"),
    }
}

/// Levels: error, the agent cannot do what it is for; warn, something in its
/// surroundings keeps a part of the policy from holding; info, unused, reports
/// go to stdout; debug, each step that is taken, never one line per socket.
fn log_to_stderr(verbose: bool) {
    let colour = io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let own = if verbose { Level::DEBUG } else { Level::WARN };
    // What libraries do step by step helps nobody who runs the agent.
    let levels = Targets::new()
        .with_default(Level::WARN)
        .with_target(env!("CARGO_CRATE_NAME"), own)
        // Warns of the limit for locked memory when an error is about to tell of it.
        .with_target("aya::sys::bpf", Level::ERROR);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(Stream::Error)
        .fmt_fields(debug_fn(printable_field).delimited(" "))
        .with_ansi(colour)
        .with_target(false)
        // The journal and terminals have clocks of their own.
        .without_time();
    tracing_subscriber::registry()
        .with(lines.with_filter(levels))
        .init();
}
