//! Follow: shows how a sweep goes on, until it is over.

use std::{thread, time::Duration};

use anyhow::Result;
use tracing::warn;

use super::{output, report};
use crate::{
    datapath::chain,
    sweep::{Progress, SweepJob, Swept},
};

/// Shows a sweep on the terminal until it is over; `first` is handed what came of
/// its first pass. Returns whether it met every connection.
pub(super) fn follow(
    mut job: SweepJob,
    doing: &str,
    first: impl FnOnce(&Swept) -> String,
) -> Result<bool> {
    const PAUSE: Duration = Duration::from_millis(50);
    let mut first = Some(first);
    let mut waiting = 0;
    let mut is_complete = true;
    let mut passed = Duration::ZERO;
    loop {
        match job.try_progress() {
            Some(Progress::FirstPass(swept)) => {
                report::progress("");
                let swept = swept?;
                for (_, error) in &swept.missed {
                    warn!("{}; its connections are as they were", chain(error));
                }
                is_complete = swept.missed.is_empty();
                waiting = swept.waiting();
                if let Some(first) = first.take() {
                    output::text(first(&swept))?;
                }
            }
            Some(Progress::Over(swept)) => {
                report::progress("");
                if swept.waiting() > 0 {
                    warn!(
                        "{} connections have been silent for so long that they still wait; sweep \
                         again",
                        swept.waiting()
                    );
                    is_complete = false;
                }
                return Ok(is_complete);
            }
            None => {
                thread::sleep(PAUSE);
                passed += PAUSE;
                if waiting > 0 {
                    let left = waiting.saturating_sub(job.probed());
                    report::progress(&format!("{} to go", report::count(left, "probe")));
                } else if passed.as_millis().is_multiple_of(1000) {
                    report::progress(&format!("{doing}, {}s", passed.as_secs()));
                }
            }
        }
    }
}
