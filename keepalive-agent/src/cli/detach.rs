//! `keepalive-agent detach`: takes enforcement off, with all its pins.

mod restore;

use std::{
    fs, io,
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::{PARTIAL, output};
use crate::{
    daemon::{
        control::{Client, Request},
        ownership::{self, Ownership},
    },
    datapath::{self, InForce, PinDirectory},
    hierarchy::{CgroupPath, Hierarchy},
    kernel::preflight,
};

/// How long an agent may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Args, Debug)]
#[command(
    after_help = "Connections keep what they were given, unless --restore; new ones get nothing any \
                  more. A running agent is ended; where a service manager would start it again, stop the service \
                  first. Programs of others are never touched.\n\n\
                  With --restore every connection gets back what its application had set, where \
                  the value is still what a policy wrote. Where it had set nothing, keepalive is \
                  turned off again, and timers get the sysctls of their namespace: a timer that was \
                  set cannot become unset. An application that turned keepalive on after its \
                  connection was established, and set no timer, cannot be told from one that set \
                  nothing, unless a policy with bounds held it.\n\n\
                  Exit codes: 0 nothing is in force any more, 1 failed, 2 wrong usage, 4 some \
                  namespace could not be restored.\n\n\
                  Examples:\n  \
                  keepalive-agent detach\n  \
                  keepalive-agent detach --restore --dry-run\n  \
                  keepalive-agent detach --cgroup /system.slice/redis.service"
)]
pub(super) struct Arguments {
    /// Only what is attached to this cgroup, instead of everywhere
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    /// Directory of the pins
    #[arg(long, value_name = "DIR", default_value = PinDirectory::DEFAULT)]
    pin: PathBuf,

    /// Give every connection back what its application had set
    #[arg(long)]
    restore: bool,

    /// Only count what --restore would do; nothing is taken off
    #[arg(long, requires = "restore")]
    dry_run: bool,
}

pub(super) fn detach(arguments: &Arguments) -> Result<ExitCode> {
    preflight::may_enforce()?;
    let hierarchy = Hierarchy::find()?;
    let only = match &arguments.cgroup {
        Some(path) => Some(hierarchy.path(path)?),
        None => None,
    };
    let pins = PinDirectory::open(&arguments.pin)?;
    let mut detached = 0;
    let mut directories = Vec::new();
    let mut failed = Vec::new();
    let mut is_complete = true;
    let mut in_force = datapath::in_force()?;
    // Of sets one above another the upper one had the last word, and takes what the
    // lower one wrote for the applications'.
    in_force.sort_by_key(|found| path_of(found).map_or(0, |path| path.as_bytes().len()));
    for found in in_force {
        if only
            .as_ref()
            .is_some_and(|only| !found.is_of(only, &hierarchy))
        {
            continue;
        }
        let path = path_of(&found);
        let name = path
            .as_ref()
            .map_or_else(|| format!("cgroup {}", found.cgroup), ToString::to_string);
        let pinned = found.pins(pins.as_ref());
        if arguments.restore && found.cgroup != 0 {
            match restore::restore(found, pinned.as_ref(), arguments.dry_run) {
                Ok(restored) => {
                    detached += 1;
                    is_complete &= restored.is_complete;
                    output::text(restored.text(&name, arguments.dry_run))?;
                }
                Err(error) => failed.push(error.context(format!("restoring {name}"))),
            }
            directories.extend(pinned);
            continue;
        }
        match take_off(found, path.as_ref(), pinned.as_ref()) {
            Ok(()) => {
                detached += 1;
                output::text(format_args!("detached from {name}\n"))?;
            }
            Err(error) => failed.push(error.context(format!("detaching from {name}"))),
        }
        directories.extend(pinned);
    }
    for pins in pins
        .iter()
        .chain(&directories)
        .filter(|_| !arguments.dry_run)
    {
        remove_directory(pins)?;
    }
    if let Some(error) = failed.into_iter().next() {
        return Err(error);
    }
    if detached == 0 {
        output::text("nothing is in force\n")?;
    } else if !arguments.restore {
        output::text("connections keep what they were given\n")?;
    }
    Ok(if is_complete {
        ExitCode::SUCCESS
    } else {
        PARTIAL.into()
    })
}

fn path_of(found: &InForce) -> Option<CgroupPath> {
    let record = found.record.as_ref().ok()?;
    Some(record.root.path.clone())
}

/// Removes what is left of pins, and their directory if nothing else is in it.
fn remove_directory(pins: &PinDirectory) -> Result<()> {
    let removing = || format!("removing {}", pins.path().display());
    let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    if let Err(error) = fs::symlink_metadata(pins.path())
        && is_gone(&error)
    {
        return Ok(());
    }
    pins.remove_stale()?;
    match fs::remove_dir(pins.path()) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty || is_gone(&error) => Ok(()),
        other => other.with_context(removing),
    }
}

fn take_off(found: InForce, path: Option<&CgroupPath>, pins: Option<&PinDirectory>) -> Result<()> {
    if let (Some(owner), Some(path)) = (found.owner(), path)
        && ownership::lives(&owner, path)
    {
        end_agent(owner.pid, path)?;
    }
    Ok(found.detach(pins)?)
}

/// Has a running agent end and waits until it has.
fn end_agent(pid: u32, path: &CgroupPath) -> Result<()> {
    let asking = || format!("asking agent {pid} to end: stop it first");
    let mut client = Client::connect(path).with_context(asking)?;
    client.ask(Request::Detach).with_context(asking)?;
    wait_for_end(pid, path)
}

fn wait_for_end(pid: u32, path: &CgroupPath) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while Ownership::is_taken(path) == Some(true) {
        if Instant::now() > end {
            bail!("agent {pid} does not end: stop it first");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
