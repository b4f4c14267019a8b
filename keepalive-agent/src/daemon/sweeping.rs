//! Sweeping: existing connections are brought along, one sweep at a time.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Daemon, Event, RETRY, Reporter};
use crate::{
    datapath::chain,
    hierarchy::Cgroup,
    memory,
    sweep::{Progress, Reach, SweepJob, Swept},
};

/// After a cgroup was made with processes in it, what these hold is swept this much
/// later, together with that of the cgroups that follow.
const DELAY: Duration = Duration::from_millis(50);

/// Sweeps for new cgroups take at most one part of this many of the time.
const SHARE: u32 = 10;

/// More new cgroups than this are not swept by themselves.
const MOST_EARLY: usize = 256;

const PART: &str = "existing connections";

impl Daemon {
    /// Begins to bring existing connections along.
    pub(super) fn sweep(&mut self) {
        self.early_due = None;
        if self.enforcement.is_none() {
            return;
        }
        // Sweeps follow one another.
        self.sweep_again = self.sweep.is_some() || self.earlier_sweep.is_some();
        if self.sweep_again {
            if let Some(sweep) = self.sweep.as_ref().filter(|_| self.state.settled) {
                sweep.stop();
            }
            return;
        }
        self.early.clear();
        self.start_sweep(Reach::Node);
    }

    fn start_sweep(&mut self, reach: Reach) {
        let Some(enforcement) = &self.enforcement else {
            return;
        };
        match SweepJob::start(enforcement.set.sweeper(), reach) {
            Ok(sweep) => {
                self.state.sweep.under_way = sweep.is_of_node();
                self.sweep = Some(sweep);
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

    /// Has what may have been made in a new cgroup before it had its policy brought
    /// along soon.
    pub(super) fn sweep_later(&mut self, cgroup: &Cgroup) {
        if self.early.len() <= MOST_EARLY {
            self.early.push(cgroup.clone());
        }
        let due = (Instant::now() + DELAY).max(self.early_not_before);
        self.early_due.get_or_insert(due);
    }

    /// Forgets that new cgroups are to be swept.
    pub(super) fn forget_early(&mut self) {
        self.early.clear();
        self.early_due = None;
    }

    /// Begins to do so.
    pub(super) fn sweep_early(&mut self) {
        self.early_due = None;
        if self.sweeps_new_cgroups() {
            // This one follows.
            return;
        }
        self.early_begun.get_or_insert_with(Instant::now);
        let is_alone = self.sweep.is_none() && self.earlier_sweep.is_none();
        if !is_alone || !self.state.settled || self.early.len() > MOST_EARLY {
            self.sweep();
            return;
        }
        let cgroups = std::mem::take(&mut self.early);
        self.start_sweep(Reach::NewCgroups(self.hierarchy.clone(), cgroups));
    }

    fn sweeps_new_cgroups(&self) -> bool {
        let sweep = self.sweep.as_ref();
        sweep.is_some_and(|sweep| !sweep.is_of_node())
    }

    /// A pass for new cgroups is over. Where there is more to do than it does itself, a
    /// sweep of the node follows.
    fn on_new_cgroups_swept(&mut self, swept: &Swept, reporter: &mut dyn Reporter) {
        self.state.totals.sweeps += 1;
        self.sweep_again |= swept.waiting() > 0 || !swept.missed.is_empty();
        if !self.sweep_again {
            self.early_is_over();
            self.settle();
        }
        reporter.report(&Event::Swept(swept));
    }

    /// Has the next sweep for new cgroups wait in proportion to what this one took.
    fn early_is_over(&mut self) {
        if let Some(begun) = self.early_begun.take() {
            self.early_not_before = Instant::now() + begun.elapsed() * SHARE;
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
        if self.sweep_again || !self.early.is_empty() {
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
        match progress {
            Some(Progress::FirstPass(Ok(swept))) if swept.new_cgroups > 0 => {
                self.on_new_cgroups_swept(&swept, reporter);
            }
            Some(Progress::FirstPass(Err(error))) if self.sweeps_new_cgroups() => {
                debug!("{}: the node is swept", chain(&error));
                self.sweep_again = true;
            }
            Some(Progress::FirstPass(Ok(swept))) => {
                self.state.settled = true;
                self.settle();
                self.state.totals.sweeps += 1;
                self.state.sweep.connections = swept.seen;
                self.state.sweep.namespaces = swept.namespaces as u64;
                self.state.sweep.waiting = swept.waiting();
                self.state.sweep.missed = swept.missed.len() as u64;
                self.early_is_over();
                for (_, error) in &swept.missed {
                    warn!(
                        "{}; its existing connections are not governed, new ones are",
                        chain(error)
                    );
                }
                let missed = match swept.missed.first() {
                    None => Ok(()),
                    Some((_, error)) => Err(chain(error)),
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
                let error = chain(&error);
                warn!("existing connections are not governed: {error}");
                self.state.totals.sweeps_failed += 1;
                self.part_failed(PART, error);
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
                } else if !self.early.is_empty() {
                    self.early_due = Some(self.early_not_before);
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
