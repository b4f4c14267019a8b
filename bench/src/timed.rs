//! What a whole command takes.

use std::{
    ffi::{OsStr, OsString},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use keepalive_tests::{Place, output};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike as _,
};
use serde::{Deserialize, Serialize};

/// Nothing that is measured takes longer, whatever goes wrong.
pub(crate) const LIMIT: Duration = Duration::from_mins(10);

/// What a command took.
#[derive(Serialize, Deserialize)]
pub(crate) struct Cost {
    /// Milliseconds of CPU.
    pub(crate) cpu: f64,
    /// Memory at the peak.
    pub(crate) mebibytes: f64,
}

/// Runs a command there. What it prints is thrown away.
pub(crate) fn time(place: Place<'_>, command: &[&OsStr]) -> Result<Cost> {
    // By way of this program: the kernel sums what the children of a process
    // took, and tells the largest of their peaks, so each needs a parent of its
    // own.
    let mut parent = place.command(std::env::current_exe()?);
    let done = output(parent.arg("--time").args(command), LIMIT)?;
    ensure!(done.code == Some(0), "{command:?}: {}", done.stderr.trim());
    Ok(serde_json::from_str(&done.stdout)?)
}

/// The part of the parent: prints the cost.
pub(crate) fn main(words: &[OsString]) -> Result<()> {
    let mut command = Command::new(&words[0]);
    let status = command.args(&words[1..]).stdout(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot start {}", words[0].display()))?;
    ensure!(status.success(), "it failed: {status}");
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = (usage.user_time() + usage.system_time()).num_microseconds();
    let cost = Cost {
        cpu: crate::float(micros.try_into()?) / 1e3,
        // Linux tells it in KiB.
        mebibytes: crate::float(usage.max_rss().try_into()?) / 1024.0,
    };
    println!("{}", serde_json::to_string(&cost)?);
    Ok(())
}
