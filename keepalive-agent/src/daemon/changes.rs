//! Changes: cgroups come and go, the one that is governed among them.

use anyhow::Result;
use tracing::{debug, error, info, warn};

use super::{Daemon, Reporter, UNTIL_RELOAD, early, journal::What};
use crate::{
    datapath::{self, Change, chain},
    hierarchy::Cgroup,
};

/// Changes of cgroups that are remembered while a set is built; more than these
/// are found by reading the hierarchy.
const REMEMBERED: usize = 65_536;

impl Daemon {
    pub(super) fn on_cgroups_changed(
        &mut self,
        changes: Result<Vec<Change>, datapath::Error>,
        reporter: &mut dyn Reporter,
    ) {
        let changes = match changes {
            Ok(changes) => changes,
            Err(error) => {
                let error = format!("{}; {UNTIL_RELOAD}", chain(&error));
                warn!("{error}");
                self.events = None;
                self.part_failed("new cgroups", error);
                return;
            }
        };
        self.remember(&changes);
        self.follow_changes(&changes, reporter);
    }

    /// Has a set that is being built get these changes, too.
    pub(super) fn remember(&mut self, changes: &[Change]) {
        if self.building.is_none() {
            return;
        }
        if self.changes.len() + changes.len() > REMEMBERED {
            self.changes = vec![Change::Lost];
        } else {
            self.changes.extend(changes.iter().cloned());
        }
    }

    /// Gives new cgroups their policy, and forgets those that are gone. What goes
    /// wrong is logged: the rest of the policy goes on.
    pub(super) fn follow_changes(&mut self, changes: &[Change], reporter: &mut dyn Reporter) {
        for change in changes {
            match change {
                Change::Made(cgroup) => self.on_cgroup_made(cgroup, reporter),
                Change::Removed(cgroup) => self.on_cgroup_removed(cgroup, reporter),
                Change::Lost => {
                    // What came meanwhile is watched with the next set.
                    self.renames = None;
                    debug!("cgroups came and went faster than they could be told of");
                    self.look_at_cgroup(reporter);
                    self.build_again();
                }
            }
        }
    }

    fn on_cgroup_made(&mut self, cgroup: &Cgroup, reporter: &mut dyn Reporter) {
        if cgroup.path == self.root.path {
            self.look_for_cgroup(reporter);
            return;
        }
        if let Some(renames) = &mut self.renames {
            renames.watch(&cgroup.path);
        }
        let policies = self.claimants.claim_of(&cgroup.path);
        let Some(enforcement) = self.enforcement.as_mut().filter(|_| !policies.is_empty()) else {
            return;
        };
        if enforcement.set.has_bounds()
            && self.claimants.bounded().contains(&cgroup.path)
            && let Ok(directory) = self.hierarchy.open(cgroup)
        {
            enforcement.set.add_bounded(cgroup.id, directory);
            if let Err(error) = enforcement.bounds.hold(&enforcement.set) {
                warn!("cgroup {}: {}", cgroup.path, chain(&error));
            }
        }
        match enforcement.set.add_cgroup(cgroup, &policies) {
            Ok(false) => {}
            Ok(true) => {
                debug!(cgroup = %cgroup.path, "a new cgroup has its policy");
                self.journal.note(What::CgroupAssigned {
                    cgroup: cgroup.path.clone(),
                    policies: self.claimants.names(&policies),
                });
                if early::may_be_in(cgroup, &self.hierarchy) {
                    self.sweep_later(cgroup);
                }
            }
            Err(error) if error.is_full() => {
                info!("{error}: building one with more room");
                self.build_again();
            }
            Err(error) => {
                let error = chain(&error);
                if self.last_reported_error.as_ref() != Some(&error) {
                    warn!("{error}; it goes by the policy above it, and is tried again");
                }
                self.part_failed("policy set", error.clone());
                self.last_reported_error = Some(error);
                self.retry_later();
            }
        }
    }

    fn on_cgroup_removed(&mut self, cgroup: &Cgroup, reporter: &mut dyn Reporter) {
        if *cgroup == self.root {
            self.look_at_cgroup(reporter);
            return;
        }
        self.claimants.forget(&cgroup.path);
        if let Some(renames) = &mut self.renames {
            renames.forget(&cgroup.path);
        }
        let Some(enforcement) = &mut self.enforcement else {
            return;
        };
        if self.grants.iter().any(|grant| grant.cgroup == *cgroup) {
            self.grants.retain(|grant| grant.cgroup != *cgroup);
            if let Err(error) = enforcement.set.record().set_grants(&self.grants) {
                debug!("{}", chain(&error));
            }
        }
        let forgotten = enforcement.set.remove_cgroup(cgroup);
        if let Err(error) = forgotten.and(enforcement.bounds.forget(cgroup.id)) {
            // An id is not used again, so what stays costs its memory only.
            debug!("{}", chain(&error));
        }
    }

    /// Finds out whether the cgroup that the program is attached to is gone, or
    /// the program was taken off it.
    pub(super) fn look_at_cgroup(&mut self, reporter: &mut dyn Reporter) {
        let found = self.hierarchy.lookup(&self.root.path);
        // The link lets go of a removed cgroup some time later.
        let exists = found.is_ok_and(|found| found.as_ref() == Some(&self.root));
        let gone = self
            .enforcement
            .take_if(|enforcement| !exists || !enforcement.attachment.holds());
        let Some(gone) = gone else {
            return;
        };
        self.building = None;
        self.end_sweep();
        self.sweep_again = false;
        self.forget_early();
        self.state.sweep = datapath::Sweep::default();
        self.state.settled = false;
        self.last_record = Some(gone.set.record().clone());
        if let Err(error) = gone.attachment.discard() {
            warn!("{}", chain(&error));
        }
        if exists {
            warn!(
                "somebody has taken the program off cgroup {}; it is attached again",
                self.root.path
            );
            self.look_for_cgroup(reporter);
            return;
        }
        self.wait_for_cgroup(reporter);
        self.look_for_cgroup(reporter);
    }

    /// Attaches to the cgroup if it has come to exist.
    pub(super) fn look_for_cgroup(&mut self, reporter: &mut dyn Reporter) {
        if self.enforcement.is_some() {
            self.look_at_cgroup(reporter);
            return;
        }
        match self.hierarchy.lookup(&self.root.path) {
            Ok(Some(_)) => {
                if let Err(error) = self.enforce_now(reporter) {
                    error!("{error:#}; it is tried again");
                    self.retry_later();
                }
            }
            Ok(None) => {
                if self.events.is_none() {
                    self.retry_later();
                }
            }
            Err(error) => {
                warn!("looking for cgroup {}: {error}", self.root.path);
                self.retry_later();
            }
        }
    }
}
