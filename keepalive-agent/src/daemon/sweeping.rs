//! Sweeping: existing connections are brought along, one sweep at a time.

use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Daemon, Event, RETRY, Reporter};
use crate::{
    datapath::chain,
    memory,
    sweep::{Progress, SweepJob},
};

/// Sweeps for new cgroups, and sets built for them, take at most one part of this
/// many of the time.
pub(super) const SHARE: u32 = 10;

impl Daemon {
    /// Begins to bring existing connections along.
    pub(super) fn sweep(&mut self) {
        const PART: &str = "existing connections";
        self.sweep_due = None;
        let Some(enforcement) = &self.enforcement else {
            return;
        };
        // Sweeps follow one another.
        self.sweep_again = self.sweep.is_some() || self.earlier_sweep.is_some();
        if self.sweep_again {
            if let Some(sweep) = self.sweep.as_ref().filter(|_| self.state.settled) {
                sweep.stop();
            }
            return;
        }
        self.sweep_begun = Instant::now();
        match SweepJob::start(enforcement.set.sweeper()) {
            Ok(sweep) => {
                self.sweep = Some(sweep);
                self.state.sweep.under_way = true;
            }
            Err(error) => {
                let error = format!("starting a thread to sweep: {error}");
                warn!("existing connections are as they were: {error}; it is tried again");
                self.state.totals.sweeps_failed += 1;
                self.part_failed(PART, error);
                self.retry_later();
            }
        }
    }

    /// Has the sweep under way stop, and remembers it until it has.
    pub(super) fn end_sweep(&mut self) {
        if let Some(sweep) = self.sweep.take() {
            sweep.stop();
            self.state.sweep.under_way = false;
            self.earlier_sweep.get_or_insert(sweep);
        }
    }

    /// After a sweep, unless there are connections for another one.
    fn settle(&mut self) {
        if self.sweep_again || self.sweep_due.is_some() {
            return;
        }
        if let Some(enforcement) = &mut self.enforcement
            && let Err(error) = enforcement.set.settle()
        {
            debug!("{}", chain(&error));
        }
    }

    pub(super) fn on_sweep_progress(
        &mut self,
        progress: Option<Progress>,
        reporter: &mut dyn Reporter,
    ) {
        const PART: &str = "existing connections";
        match progress {
            Some(Progress::FirstPass(Ok(swept))) => {
                self.state.settled = true;
                self.settle();
                self.state.totals.sweeps += 1;
                self.state.sweep.connections = swept.seen;
                self.state.sweep.namespaces = swept.namespaces as u64;
                self.state.sweep.waiting = swept.waiting();
                self.state.sweep.missed = swept.missed.len() as u64;
                self.sweep_not_before = Instant::now() + self.sweep_begun.elapsed() * SHARE;
                for (_, error) in &swept.missed {
                    warn!("{error:#}; its existing connections are not governed, new ones are");
                }
                let missed = match swept.missed.first() {
                    None => Ok(()),
                    Some((_, error)) => Err(format!("{error:#}")),
                };
                let is_complete = missed.is_ok();
                self.part(PART, missed);
                self.retry_after = RETRY;
                if is_complete && let Some(enforcement) = &mut self.enforcement {
                    // No connection is held to a set before this one any more.
                    if let Err(error) = enforcement.bounds.release(&enforcement.set) {
                        warn!("{}", chain(&error));
                    }
                }
                reporter.report(&Event::Swept(&swept));
                // What building the set and this pass needed.
                memory::give_back();
                if self.sweep_again {
                    self.sweep();
                }
            }
            Some(Progress::FirstPass(Err(error))) => {
                warn!("existing connections are not governed: {error:#}");
                self.state.totals.sweeps_failed += 1;
                self.part_failed(PART, format!("{error:#}"));
                self.retry_later();
            }
            Some(Progress::Over(swept)) => {
                self.state.sweep.waiting = swept.waiting();
                if swept.waiting() == 0 {
                    if let Some(ownership) = &mut self.ownership {
                        ownership.finish(&self.config);
                    }
                } else {
                    warn!(
                        "{} connections have been silent for so long that they still wait to be \
                         governed; they are with the next sweep",
                        swept.waiting()
                    );
                }
            }
            None => {
                debug!("the sweep is over");
                self.sweep = None;
                self.state.sweep.under_way = false;
                if self.sweep_again {
                    self.sweep();
                }
            }
        }
    }

    /// Whether connections may still have values of the set before, which the sweep
    /// under way is about to see to.
    pub(super) const fn is_first_pass(&self) -> bool {
        !self.state.settled && (self.sweep.is_some() || self.earlier_sweep.is_some())
    }

    /// Whether a sweep is under way that has nothing to wait for.
    pub(super) fn sweep_ends_soon(&self) -> bool {
        (self.sweep.is_some() || self.earlier_sweep.is_some()) && self.state.sweep.waiting == 0
    }
}
