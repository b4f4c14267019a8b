//! Adoption: going over to another config, or to other names of what is there, with
//! the set in force.

use std::collections::BTreeSet;

use tracing::{debug, warn};

use super::{
    Daemon, Event, Reporter, building::allowed, journal::What, reload::Why, renames::Renames,
    seconds_since_1970, target,
};
use crate::{
    assignment::Claimants,
    config::Config,
    datapath::{Origin, Reload, chain},
    hierarchy::CgroupPath,
};

/// What came of going over to a config without building a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Adopted {
    Yes,
    No,
    /// It can be as soon as the sweep under way is over.
    AfterSweep,
}

impl Daemon {
    /// Goes over to a config that needs no other set, as it differs in names of units,
    /// containers and pods only. So it is when a pod is bound to a node, or gone, or
    /// gets other labels.
    pub(super) fn adopt(
        &mut self,
        config: &Config,
        origin: &Origin,
        reporter: &mut dyn Reporter,
    ) -> Adopted {
        if !config.differs_in_names_only(&self.config) {
            return Adopted::No;
        }
        let Some(enforcement) = &self.enforcement else {
            return Adopted::No;
        };
        let Ok(claimants) = Claimants::new(config, &self.root) else {
            return Adopted::No;
        };
        let claims_same = self.claimants.claim_same(&claimants, &self.hierarchy);
        if !claims_same.unwrap_or(false) {
            return self.claim_anew(config, origin, claimants, Why::FilesChanged, reporter);
        }
        let said = enforcement.set.record().say_config(config, origin, None);
        if let Err(error) = said {
            debug!("{}", chain(&error));
            return Adopted::No;
        }
        for (before, now) in self.config.policies.iter().zip(&config.policies) {
            if before.selector.words() != now.selector.words() {
                self.journal.note(What::names_changed(
                    &now.name,
                    Why::FilesChanged.words(),
                    &before.selector,
                    &now.selector,
                ));
            }
        }
        self.went_over_to(config, origin, claimants);
        // What is being swept is finished by the sweep.
        if self.state.settled
            && let Some(ownership) = &mut self.ownership
        {
            ownership.finish(&self.config);
        }
        Adopted::Yes
    }

    /// The same where a name is that of something that is there: by other claims in the
    /// set in force, and a sweep.
    fn claim_anew(
        &mut self,
        config: &Config,
        origin: &Origin,
        claimants: Claimants,
        why: Why,
        reporter: &mut dyn Reporter,
    ) -> Adopted {
        // Of what was claimed before, a set knows one state at a time, and a sweep under
        // way would not know of that.
        if !self.state.settled {
            return Adopted::No;
        }
        if self.sweep.is_some() || self.earlier_sweep.is_some() {
            return if self.sweep_ends_soon() {
                Adopted::AfterSweep
            } else {
                Adopted::No
            };
        }
        let Ok((mut assignment, warnings)) = target::assign(&claimants, &self.hierarchy) else {
            return Adopted::No;
        };
        assignment.grants = allowed(config, &self.grants);
        let Some(enforcement) = &mut self.enforcement else {
            return Adopted::No;
        };
        // In this order: whoever goes on from here, should this agent be killed, makes
        // the sweep again that is to follow.
        self.state.settled = false;
        let record = enforcement.set.record().clone();
        let claimed = record
            .set_state(&self.state)
            .and_then(|()| record.say_config(config, origin, Some(&self.config)))
            .and_then(|()| enforcement.set.claim_anew(&assignment));
        if let Err(error) = claimed {
            debug!("{}: another set is built", chain(&error));
            // By a set that knows what was claimed before.
            self.state.settled = true;
            return Adopted::No;
        }
        self.went_over_to(config, origin, claimants);
        self.warn_of_new(&warnings);
        reporter.report(&Event::Reloaded {
            why: why.words(),
            assignment: &assignment,
        });
        self.sweep();
        Adopted::Yes
    }

    fn went_over_to(&mut self, config: &Config, origin: &Origin, claimants: Claimants) {
        self.config = config.clone();
        self.origin = origin.clone();
        self.claimants = claimants;
        self.state.reload = Some(Reload {
            at: seconds_since_1970(),
            error: None,
        });
        self.state.totals.reloads += 1;
    }

    /// Has containers watched for other names, if a policy goes by those.
    pub(super) fn follow_renames(&mut self, reporter: &mut dyn Reporter) {
        if !self.claimants.needs_names() {
            self.renames = None;
            return;
        }
        if self.renames.is_some() {
            return;
        }
        let (renames, found) = (Renames::new(), self.hierarchy.walk(&self.root));
        match renames.and_then(|renames| Ok((renames, found?))) {
            Ok((mut renames, found)) => {
                for cgroup in found {
                    renames.watch(&cgroup.path);
                }
                let watched = renames.watched();
                self.renames = Some(renames);
                // Their names were read before.
                self.on_renamed(Ok(watched), reporter);
            }
            Err(error) => {
                warn!(
                    "watching for containers that are renamed: {error}; new names count from the \
                     next start of a container on"
                );
            }
        }
    }

    /// Containers may be called something else: if so, they have the policies of their
    /// new names from now on.
    pub(super) fn on_renamed(
        &mut self,
        cgroups: std::io::Result<BTreeSet<CgroupPath>>,
        reporter: &mut dyn Reporter,
    ) {
        let cgroups = match cgroups {
            Ok(cgroups) => cgroups,
            Err(error) => {
                warn!("watching for containers that are renamed: {error}");
                self.renames = None;
                return;
            }
        };
        let mut are_others = false;
        for cgroup in cgroups {
            let policies = self.claimants.of(&cgroup);
            let before = self.claimants.identity(&cgroup);
            self.claimants.forget(&cgroup);
            let now = self.claimants.identity(&cgroup);
            if before == now || now.names.name.is_none() {
                continue;
            }
            self.journal.note(What::ContainerRenamed {
                cgroup: cgroup.clone(),
                before: before.to_string(),
                now: now.to_string(),
            });
            are_others |= policies != self.claimants.of(&cgroup);
        }
        if !are_others {
            return;
        }
        let (config, origin) = (self.config.clone(), self.origin.clone());
        let claimed = Claimants::new(&config, &self.root).map_or(Adopted::No, |claimants| {
            self.claim_anew(&config, &origin, claimants, Why::Renamed, reporter)
        });
        if claimed != Adopted::Yes {
            self.build_again();
        }
    }
}
