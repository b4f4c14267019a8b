//! Adoption: going over to another config, or to other names of what is there, with
//! the set in force.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use keepalive_common::policy::Policy;
use tracing::{debug, warn};

use super::{
    Daemon, Difference, Event, Reporter,
    building::{Built, allowed},
    early,
    journal::What,
    reload::Why,
    renames::Renames,
    seconds_since_1970, target,
};
use crate::{
    assignment::Claimants,
    config::Config,
    datapath::{self, Change, Origin, Reload, chain},
    hierarchy::{Cgroup, CgroupPath},
    netns,
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
        config: &Arc<Config>,
        origin: &Origin,
        reporter: &mut dyn Reporter,
    ) -> Adopted {
        if !config.differs_in_names_only(&self.config) {
            return Adopted::No;
        }
        let Some((claimants, others)) = self.others_by(config) else {
            return Adopted::No;
        };
        if !others.iter().all(|cgroup| self.is_free(cgroup)) {
            return self.claim_anew(config, origin, claimants, Why::FilesChanged, reporter);
        }
        if self.adopt_at_once(config, origin, claimants, &others) {
            Adopted::Yes
        } else {
            Adopted::No
        }
    }

    /// Has those names of a config count that can at once, while something else has to
    /// be waited for until the config can be in force: the first connection of a
    /// container does not wait. Names that are gone count until then.
    pub(super) fn adopt_early(&mut self, config: &Config) {
        let mut more = Arc::new(self.config.with_names_of(config, |_, _| true));
        let Some((mut claimants, mut others)) = self.others_by(&more) else {
            return;
        };
        let busy = others.iter().filter(|cgroup| !self.is_free(cgroup));
        let busy: Vec<_> = busy
            .map(|cgroup| self.claimants.identity(&cgroup.path))
            .collect();
        if !busy.is_empty() {
            let names = self.config.with_names_of(config, |attribute, name| {
                let mut busy = busy.iter();
                !busy.any(|identity| attribute.matches([name], identity))
            });
            more = Arc::new(names);
            let Some(left) = self.others_by(&more) else {
                return;
            };
            (claimants, others) = left;
        }
        if more != self.config && others.iter().all(|cgroup| self.is_free(cgroup)) {
            let origin = self.origin.clone();
            self.adopt_at_once(&more, &origin, claimants, &others);
        }
    }

    /// Who claims what by a config of the same policies, and the cgroups for which that
    /// makes a difference.
    fn others_by(&self, config: &Config) -> Option<(Claimants, Vec<Cgroup>)> {
        self.enforcement.as_ref()?;
        let claimants = Claimants::new(config, &self.root).ok()?;
        let others = self.claimants.differing(&claimants, &self.hierarchy);
        let others = others.inspect_err(|error| debug!("reading the hierarchy: {error}"));
        Some((claimants, others.ok()?))
    }

    /// Whether no connection changes with the policies of a cgroup: its processes have
    /// none, and none was made for somebody else.
    fn is_free(&self, cgroup: &Cgroup) -> bool {
        let mut grants = self.grants.iter();
        !grants.any(|grant| cgroup.contains(&grant.cgroup.path))
            && !early::may_be_in(cgroup, &self.hierarchy)
    }

    /// Goes over to another config of the same policies, for which these cgroups have
    /// others, in none of which there are connections. That can be at any time: during a
    /// sweep, which has nothing to do there, and while a set is built, which gets it
    /// too. Whether it could be.
    fn adopt_at_once(
        &mut self,
        config: &Arc<Config>,
        origin: &Origin,
        claimants: Claimants,
        others: &[Cgroup],
    ) -> bool {
        let Some(enforcement) = &mut self.enforcement else {
            return false;
        };
        let record = enforcement.set.record().clone();
        let is_settled = self.state.settled;
        let mut assigned = Vec::new();
        let mut adopt = || {
            // Whoever goes on from here, should this agent be killed before the claims are
            // written, brings along what is made until then.
            let before = (is_settled && !others.is_empty()).then_some(&self.config);
            if before.is_some() {
                self.state.settled = false;
                record.set_state(&self.state)?;
            }
            record.say_config(config, origin, before)?;
            for top in others {
                for cgroup in self.hierarchy.walk(top).unwrap_or_default() {
                    let policies = claimants.claim_of(&cgroup.path);
                    if enforcement.set.assign(&cgroup, &policies)? {
                        assigned.push((cgroup, policies));
                    }
                }
            }
            Ok(())
        };
        let adopted: Result<(), datapath::Error> = adopt();
        self.state.settled = is_settled;
        if let Err(error) = adopted {
            debug!("{}: another set is built", chain(&error));
            // What was written down last is not what stands there.
            self.published = Default::default();
            return false;
        }
        for (before, now) in self.config.policies.iter().zip(&config.policies) {
            let words = Why::FilesChanged.words();
            if before.selector != now.selector
                && let Some(changed) =
                    What::names_changed(&now.name, words, &before.selector, &now.selector)
            {
                self.journal.note(changed);
            }
        }
        self.claimants = claimants;
        self.went_over_to(config, origin);
        for (cgroup, policies) in assigned {
            self.journal.note(What::CgroupAssigned {
                cgroup: cgroup.path.clone(),
                policies: self.claimants.names(&policies),
            });
        }
        for cgroup in others {
            // Since they were looked at.
            if early::may_be_in(cgroup, &self.hierarchy) {
                self.sweep_later(cgroup);
            }
        }
        let others = others.iter().cloned().map(Change::Made);
        self.remember(&others.collect::<Vec<_>>());
        // What is being swept is finished by the sweep.
        if self.state.settled
            && let Some(ownership) = &mut self.ownership
        {
            ownership.finish(&self.config);
        }
        true
    }

    /// Gives a set that is about to be put in force what came while it was built:
    /// cgroups, and names.
    ///
    /// # Errors
    ///
    /// When a map takes no more, or cannot be written. What is missing then comes when
    /// the set is in force.
    pub(super) fn catch_up(&mut self, built: &mut Built) -> Result<(), datapath::Error> {
        let mut cgroups: BTreeMap<CgroupPath, Cgroup> = BTreeMap::new();
        for change in &self.changes {
            match change {
                Change::Made(cgroup) => {
                    cgroups.insert(cgroup.path.clone(), cgroup.clone());
                }
                Change::Removed(cgroup) => {
                    cgroups.remove(&cgroup.path);
                }
                // Another set is built.
                Change::Lost => return Ok(()),
            }
        }
        self.claimants.teach(&built.claimants);
        let latest = self.latest.take().map(|latest| {
            if latest.differs_in_names_only(&built.config) {
                latest
            } else {
                Arc::new(built.config.with_names_of(&latest, |_, _| true))
            }
        });
        if let Some(config) = latest.filter(|latest| *latest != built.config)
            && let Ok(claimants) = Claimants::new(&config, &self.root)
            && let Ok(others) = built.claimants.differing(&claimants, &self.hierarchy)
        {
            let others = others.into_iter();
            cgroups.extend(others.map(|cgroup| (cgroup.path.clone(), cgroup)));
            built
                .set
                .record()
                .say_config(&config, &built.origin, None)?;
            (built.config, built.claimants) = (config, claimants);
        }
        for top in cgroups.values() {
            for cgroup in self.hierarchy.walk(top).unwrap_or_default() {
                if self.grants.iter().any(|grant| grant.cgroup == cgroup) {
                    continue;
                }
                let before = self.claimants.claim_of(&cgroup.path);
                let now = built.claimants.claim_of(&cgroup.path);
                if !before.is_empty() || !now.is_empty() {
                    built.set.assign_late(&cgroup, &before, &now)?;
                }
            }
        }
        Ok(())
    }

    /// The same where a name is that of something that is there: by other claims in the
    /// set in force, and a sweep.
    fn claim_anew(
        &mut self,
        config: &Arc<Config>,
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
        self.claimants = claimants;
        let before = self.went_over_to(config, origin);
        self.warn_of_new(&warnings);
        let assigned = |policies: &[usize]| assignment.only(policies);
        reporter.report(&Event::Reloaded {
            why: why.words(),
            difference: &Difference::between(&before, config, assigned),
        });
        self.sweep();
        Adopted::Yes
    }

    /// Goes over to a config that has other values for the same policies: those of all of
    /// them count in one step, in the set in force, and a sweep follows.
    pub(super) fn change_values(
        &mut self,
        config: &Arc<Config>,
        origin: &Origin,
        why: Why,
        reporter: &mut dyn Reporter,
    ) -> Adopted {
        let values = match config.values_beside(&self.config) {
            Some(values) if !values.is_empty() && self.grants.is_empty() => values,
            _ => return Adopted::No,
        };
        // Whether there are bounds is part of the set, and what is counted together too.
        let policies = self.claimants.policies();
        let needs_no_set = |(place, policy): &(usize, Policy)| {
            policies.get(*place).is_some_and(|assigned| {
                let before = assigned.policy;
                (before.has_bounds(), before.is_enforced())
                    == (policy.has_bounds(), policy.is_enforced())
            })
        };
        if !self.state.settled || !values.iter().all(needs_no_set) {
            return Adopted::No;
        }
        if self.sweep.is_some() || self.earlier_sweep.is_some() || !self.early.is_empty() {
            return if self.sweep_ends_soon() {
                Adopted::AfterSweep
            } else {
                Adopted::No
            };
        }
        let Some(enforcement) = &mut self.enforcement else {
            return Adopted::No;
        };
        let set = &mut enforcement.set;
        // What was taken off is put back by another set, and only that finds out whose
        // set is there instead.
        let is_in_force = enforcement.attachment.evidence();
        if !is_in_force.is_ok_and(|evidence| evidence.holds()) || !set.can_change_policies() {
            return Adopted::No;
        }
        let record = set.record().clone();
        let changed = set.prepare_policies(&values).and_then(|()| {
            // In this order: whoever goes on from here, should this agent be killed,
            // makes the sweep again that is to follow.
            self.state.settled = false;
            record.set_state(&self.state)?;
            record.say_values(config, origin, &values, || set.change_policies())
        });
        if let Err(error) = changed {
            debug!("{}: another set is built", chain(&error));
            self.state.settled = true;
            // What was written down last is not what stands there.
            self.published = Default::default();
            return Adopted::No;
        }
        self.claimants.set_values(&values);
        self.went_over_to(config, origin);
        let places: Vec<_> = values.iter().map(|(place, _)| *place).collect();
        if let Ok(sysctls) = netns::environment() {
            let loosened = self.claimants.loosened(places.iter().copied(), &sysctls);
            self.warn_of_more(&loosened);
        }
        let claiming = self.enforcement.iter();
        let claiming = claiming.flat_map(|enforcement| enforcement.set.claiming());
        let difference = Difference {
            assignment: self.claimants.assignment_of(&places, claiming),
            removed: Vec::new(),
            unchanged: self.claimants.policies().len() - places.len(),
        };
        target::warn_of_give_up(&difference.assignment);
        reporter.report(&Event::Reloaded {
            why: why.words(),
            difference: &difference,
        });
        self.sweep();
        Adopted::Yes
    }

    /// The config before.
    fn went_over_to(&mut self, config: &Arc<Config>, origin: &Origin) -> Arc<Config> {
        let before = std::mem::replace(&mut self.config, config.clone());
        self.origin = origin.clone();
        self.state.reload = Some(Reload {
            at: seconds_since_1970(),
            error: None,
        });
        self.state.totals.reloads += 1;
        before
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
        let claimants = Claimants::new(&config, &self.root);
        let claimed = match claimants {
            // The set that is being built knows the old names.
            Ok(claimants) if self.building.is_none() => {
                self.claimants.teach(&claimants);
                self.claim_anew(&config, &origin, claimants, Why::Renamed, reporter)
            }
            _ => Adopted::No,
        };
        if claimed != Adopted::Yes {
            self.build_again();
        }
    }
}
