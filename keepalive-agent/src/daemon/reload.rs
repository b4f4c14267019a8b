//! Reload: the config is read again, and another set is built and put in the place of
//! the one in force.

use std::sync::Arc;

use anyhow::{Result, bail};
use sd_notify::NotifyState;
use tracing::{debug, error, warn};

use super::{
    ANOTHER_AGENT, Daemon, Difference, Event, Leaves, RETRY, Reporter,
    adoption::Adopted,
    building::{Built, Job, allowed},
    journal::What,
    log_of, notify, ownership, seconds_since_1970, target,
};
use crate::{
    config::Config,
    datapath::{self, InForce, Origin, Reload, chain},
    watch::Watch,
};

/// Why the config is read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    FilesChanged,
    Signal,
    /// Another agent was about to take over, and did not.
    GoesOn,
    Retry,
    /// More cgroups were made and removed than could be told of.
    Cgroups,
    Renamed,
}

impl Why {
    /// Whether a set is built also where the config says nothing new.
    fn demands(self) -> bool {
        self != Self::FilesChanged
    }

    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::FilesChanged => "its files have changed",
            Self::Signal => "SIGHUP",
            Self::GoesOn => "another agent did not take over",
            Self::Retry => "what had failed is tried again",
            Self::Cgroups => "more cgroups were made than could be told of",
            Self::Renamed => "a container was renamed",
        }
    }
}

impl Daemon {
    pub(super) fn job(&self, config: Arc<Config>, origin: Origin) -> Job {
        let previous = self
            .enforcement
            .as_ref()
            .map(|enforcement| enforcement.set.record().clone())
            .or_else(|| self.last_record.clone());
        Job {
            kernel: self.kernel,
            hierarchy: self.hierarchy.clone(),
            root: self.root.clone(),
            config,
            origin,
            before: match &self.enforcement {
                // What the set was built from may have had other names.
                Some(_) => Some(self.config.clone()),
                None => previous
                    .as_ref()
                    .map(|set| set.description().config.clone()),
            },
            previous,
            known: Arc::new(self.claimants.known()),
            grants: self.grants.clone(),
        }
    }

    /// Reads the config again, and builds what it says if that is anything new or
    /// asked for. What is wrong with it is logged and changes nothing.
    pub(super) fn reload(&mut self, why: Why, reporter: &mut dyn Reporter) {
        // The sweep needs what was before the set in force. Other names do not
        // concern it, and what they are for may be there in a moment.
        if self.building.is_some() || (self.is_first_pass() && why.demands()) {
            self.reload_later(why);
            if why == Why::FilesChanged {
                self.names_changed_meanwhile();
            }
            return;
        }
        self.reload_waiting = None;
        self.reload_awaits_sweep = false;
        match self.read_again(why.demands()) {
            Ok(None) => {}
            Ok(Some(target::Read {
                config,
                origin,
                warnings,
            })) => {
                let mut adopted = if why == Why::FilesChanged {
                    self.adopt(&config, &origin, reporter)
                } else {
                    Adopted::No
                };
                // Whoever demands a set gets one where something may be amiss with this.
                let is_sound = self.retry_due.is_none() && self.events.is_some();
                if adopted == Adopted::No
                    && (why == Why::FilesChanged || why == Why::Signal && is_sound)
                {
                    adopted = self.change_values(&config, &origin, why, reporter);
                }
                self.reload_awaits_sweep = adopted == Adopted::AfterSweep;
                if adopted != Adopted::Yes && why == Why::FilesChanged {
                    self.adopt_early(&config);
                }
                if self.reload_awaits_sweep || adopted == Adopted::No && self.is_first_pass() {
                    self.reload_later(why);
                    return;
                }
                self.follow_cgroups();
                for warning in &warnings {
                    warn!("{warning}");
                }
                if adopted == Adopted::No {
                    self.build(config, origin, Some(why));
                }
            }
            Err(error) => self.reload_failed(&error, why.demands()),
        }
    }

    /// Looks for new names while a set is being built. What else is new is seen to, and
    /// what is wrong is told, when the set is in force.
    fn names_changed_meanwhile(&mut self) {
        self.latest = None;
        let Some(watch) = &mut self.watch else {
            return;
        };
        let Ok(read) = target::read(&self.options.sources, self.options.dry_run) else {
            return;
        };
        // What is being written is told of again.
        if watch.has_news().unwrap_or(true) {
            return;
        }
        self.adopt_early(&read.config);
        self.latest = Some(read.config);
    }

    /// Remembers that the config is to be read when what is under way is over.
    fn reload_later(&mut self, why: Why) {
        if why.demands() || self.reload_waiting.is_none() {
            self.reload_waiting = Some(why);
        }
    }

    /// Reads the config again where that has waited for something that is over.
    pub(super) fn resume_reload(&mut self, reporter: &mut dyn Reporter) {
        if self.building.is_none()
            && !self.is_first_pass()
            && !(self.reload_awaits_sweep && self.sweep_ends_soon())
            && let Some(why) = self.reload_waiting.take()
        {
            self.reload(why, reporter);
        }
    }

    fn read_again(&mut self, demanded: bool) -> Result<Option<target::Read>> {
        // What it has noticed up to here is read now. A file that is being written
        // stays noticed, which a new watch would not know of.
        let watching = match &mut self.watch {
            Some(watch) if demanded => watch.renew().is_ok(),
            watch => watch.is_some() || !demanded,
        };
        if !watching {
            match Watch::on(&self.options.sources) {
                Ok(watch) => {
                    self.watch = Some(watch);
                    self.part("config files", Ok(()));
                }
                Err(error) => self.files_unwatched(&error),
            }
        }
        let read = target::read(&self.options.sources, self.options.dry_run);
        if !demanded
            && let Some(watch) = &mut self.watch
            && watch.has_news()?
        {
            debug!("the files are being changed still");
            return Ok(None);
        }
        let read = read?;
        self.last_reported_error = None;
        if read.config == self.config && !demanded {
            return Ok(None);
        }
        Ok(Some(read))
    }

    fn reload_failed(&mut self, error: &anyhow::Error, demanded: bool) {
        let error = format!("{error:#}");
        self.journal.note(What::ReloadFailed {
            error: error.clone(),
        });
        if demanded || self.last_reported_error.as_ref() != Some(&error) {
            error!("the policy in force goes on: {error}");
        }
        self.state.totals.reloads_failed += 1;
        self.state.reload = Some(Reload {
            at: seconds_since_1970(),
            error: Some(error.chars().take(1000).collect()),
        });
        self.last_reported_error = Some(error);
        notify(&[NotifyState::Ready]);
    }

    /// Builds a set, on a thread of its own where one can be started.
    pub(super) fn build(&mut self, config: Arc<Config>, origin: Origin, reloads: Option<Why>) {
        if reloads.is_some() {
            notify(&[
                NotifyState::Reloading,
                NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Reloading),
            ]);
        }
        if self.enforcement.is_none() {
            // There is nothing to build for before the cgroup exists.
            self.config = config;
            self.origin = origin;
            if let Ok(claimants) = target::claimants(&self.config, &self.root) {
                self.claimants = claimants;
            }
            self.listen_to_users();
            notify(&[NotifyState::Ready]);
            return;
        }
        self.changes.clear();
        self.latest = None;
        self.reloads = reloads;
        match self.job(config, origin).start() {
            Ok(building) => self.building = Some(building),
            Err(error) => {
                let error =
                    anyhow::Error::new(error).context("starting a thread to build a policy set");
                self.building_failed(&error);
            }
        }
    }

    /// Builds the set in force anew, for the cgroups that exist now.
    pub(super) fn build_again(&mut self) {
        if self.building.is_some() || self.is_first_pass() {
            self.reload_waiting = Some(Why::Cgroups);
            return;
        }
        self.build(self.config.clone(), self.origin.clone(), None);
    }

    fn building_failed(&mut self, error: &anyhow::Error) {
        self.reload_failed(error, false);
        // Whatever it was, it was not the config.
        self.part_failed("policy set", format!("{error:#}"));
        self.retry_later();
    }

    pub(super) fn on_built(
        &mut self,
        built: Result<Built>,
        reporter: &mut dyn Reporter,
    ) -> Option<(&'static str, Leaves)> {
        self.building = None;
        let replaced = built.and_then(|mut built| {
            if self.enforcement.is_some()
                && let Err(error) = self.catch_up(&mut built)
            {
                debug!("{}", chain(&error));
                self.reload_waiting = Some(Why::Cgroups);
            }
            let Some(mut enforcement) = self.enforcement.take() else {
                bail!("the cgroup went away meanwhile");
            };
            self.hold_bounds(&mut enforcement.bounds, &built.set);
            let replaced = enforcement.attachment.replace(&built.set);
            if replaced.is_ok() {
                self.watch_deaths(&mut enforcement.attachment, &mut built.set);
            }
            self.enforcement = Some(enforcement);
            replaced?;
            Ok(built)
        });
        let built = match replaced {
            Ok(built) => built,
            Err(error) => {
                if let Some(datapath::Error::Replaced) = error.downcast_ref() {
                    return self.on_replaced(reporter);
                }
                if self.enforcement.is_some() {
                    self.building_failed(&error);
                }
                self.look_at_cgroup(reporter);
                return None;
            }
        };
        self.warn_of_new(&built.warnings);
        if self.reloads.is_some() {
            target::warn_of_give_up(&built.assignment);
        }
        if let Some(enforcement) = &mut self.enforcement {
            enforcement.log = log_of(&built.set);
            enforcement.set = built.set;
            self.dead_peers.follow_set(&mut enforcement.set);
        }
        let before = std::mem::replace(&mut self.config, built.config);
        self.origin = built.origin;
        self.claimants = built.claimants;
        self.hand_on_grants();
        self.listen_to_users();
        self.end_sweep();
        self.state.settled = false;
        self.retry_after = RETRY;
        self.part("policy set", Ok(()));
        if let Some(why) = self.reloads {
            self.state.totals.reloads += 1;
            self.state.reload = Some(Reload {
                at: seconds_since_1970(),
                error: None,
            });
            let assigned = |policies: &[usize]| built.assignment.only(policies);
            reporter.report(&Event::Reloaded {
                why: why.words(),
                difference: &Difference::between(&before, &self.config, assigned),
            });
            notify(&[NotifyState::Ready]);
        }
        let changes = std::mem::take(&mut self.changes);
        self.follow_changes(&changes, reporter);
        self.follow_renames(reporter);
        self.sweep();
        if self.reload_waiting == Some(Why::FilesChanged) {
            self.reload(Why::FilesChanged, reporter);
        }
        None
    }

    /// Makes sure that a new set has what users were given while it was built.
    fn hand_on_grants(&mut self) {
        self.grants = allowed(&self.config, &self.grants);
        let Some(enforcement) = &mut self.enforcement else {
            return;
        };
        for grant in &self.grants {
            let policies = self.claimants.claim_of(&grant.cgroup.path);
            if let Err(error) = enforcement.set.add_grant(grant, &policies) {
                warn!("{}: {}", grant.cgroup.path, chain(&error));
            }
        }
        if let Err(error) = enforcement.set.record().set_grants(&self.grants) {
            warn!("{}", chain(&error));
        }
    }

    /// Another agent has put its set in the place of this one's. If it lives, this
    /// one is not needed any more; if not, this one goes on from there.
    fn on_replaced(&mut self, reporter: &mut dyn Reporter) -> Option<(&'static str, Leaves)> {
        let owner = match InForce::on(self.root.id) {
            Ok(found) => found.and_then(|found| found.owner()),
            Err(error) => {
                warn!("{}", chain(&error));
                None
            }
        };
        if owner.is_some_and(|owner| owner != ownership::own() && ownership::runs(&owner)) {
            return Some((ANOTHER_AGENT, Leaves::AnotherAgent));
        }
        warn!("another agent has put its policy in force and is gone; this one goes on from there");
        // Its link is held until the next one is: there is no gap.
        let before = self.enforcement.take();
        self.end_sweep();
        if let Err(error) = self.enforce_now(reporter) {
            error!("{error:#}; it is tried again");
            self.enforcement = before;
            self.part_failed("policy set", format!("{error:#}"));
            self.retry_later();
        }
        None
    }
}
