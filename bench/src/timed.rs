//! What a whole command takes.

use std::{
    ffi::{OsStr, OsString},
    mem::MaybeUninit,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use keepalive_tests::{Place, output};
use serde::{Deserialize, Serialize};

use crate::float;

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
    println!("{}", serde_json::to_string(&of_children()?)?);
    Ok(())
}

/// What the children of this process took, of those that have ended.
#[expect(
    unsafe_code,
    reason = "what wraps it in safety rebuilds all else for its features"
)]
fn of_children() -> Result<Cost> {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes one `rusage`, for which zeroes are valid too.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    let milliseconds = |time: libc::timeval| -> Result<f64> {
        let (seconds, micros) = (time.tv_sec.try_into()?, time.tv_usec.try_into()?);
        Ok(float(seconds) * 1e3 + float(micros) / 1e3)
    };
    Ok(Cost {
        cpu: milliseconds(usage.ru_utime)? + milliseconds(usage.ru_stime)?,
        // Linux tells it in KiB.
        mebibytes: float(usage.ru_maxrss.try_into()?) / 1024.0,
    })
}
