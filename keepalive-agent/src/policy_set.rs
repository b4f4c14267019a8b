//! Policy set: everything that one config means for this node, as the records
//! that stand in the kernel. Built whole, without the kernel.
//!
//! A set also carries what the set before it claimed, so that a sweep recognises
//! the values that those policies wrote.

mod pool;

use std::{
    collections::{BTreeMap, HashMap},
    iter::successors,
};

use keepalive_common::{
    policy::Policy,
    slot::{Claim, FIRST, Found, Lead, MAX_STEPS, Step, Target},
};
use thiserror::Error;

use crate::{
    assignment::{Assignment, GRANTED},
    grant::Grant,
    hierarchy::{Cgroup, CgroupPath},
    rules::{
        Rules,
        compiled::{self, Verdict, compile},
    },
};
use pool::Pool;

/// A policy, under the name that it is counted by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CountedPolicy {
    /// Its name in the config.
    pub name: String,
    /// What it wants.
    pub policy: Policy,
}

/// Prefixes of addresses in IPv6 and what is found for them.
type RemoteTable = Vec<((u128, u8), Found)>;

/// Prefixes of ports and what is found for them.
type PortTable = compiled::PortTable<Found>;

/// Why an assignment cannot stand in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// The chain of cgroups with rules for remote ends would be too long.
    #[error(
        "more than {MAX_STEPS} cgroups one above another, up from {cgroup}, have policies for some \
         remote ends: give one of them a policy for all"
    )]
    TooManySteps {
        /// The lowest of them.
        cgroup: CgroupPath,
    },
    /// A user's wish would have to stand over too many rules for remote ends.
    #[error("the policies that hold for {cgroup} name too many networks to shape them for a user")]
    TooManyNetworks {
        /// The cgroup of the user's command.
        cgroup: CgroupPath,
    },
}

/// More rules than this are not shaped for a user's command: it takes time.
const MOST_SHAPED: usize = 4096;

/// The records of a policy set.
#[derive(Debug)]
pub struct PolicySet {
    policies: Pool<CountedPolicy>,
    steps: Pool<Step>,
    rules: Pool<RemoteTable>,
    ports: Pool<PortTable>,
    /// The slot of each policy of the assignment, and its rules.
    assigned: Vec<(u32, Rules)>,
    /// The same of the assignment before.
    assigned_before: Vec<(u32, Rules)>,
    /// Policies by index → the number of their compiled rules.
    compiled: HashMap<Vec<usize>, u32>,
    /// Path → what it claimed itself in the set before. Once settled, what was in force
    /// for those that came later, until they are settled too.
    before: BTreeMap<CgroupPath, OwnClaim>,
    /// Whether all connections have been brought along: apart from those in
    /// [`Self::before`], what was claimed before is what is claimed now.
    is_settled: bool,
    /// Path → what it claims itself.
    now: BTreeMap<CgroupPath, OwnClaim>,
    /// What users were given, by the paths of the cgroups.
    grants: BTreeMap<CgroupPath, Grant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OwnClaim {
    id: u64,
    target: Target,
}

/// How many records of each kind a set has: what its maps need room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Slots, the ones below [`FIRST`] included.
    pub slots: u32,
    /// Steps.
    pub steps: u32,
    /// Prefixes of remote addresses.
    pub remotes: usize,
    /// Prefixes of ports.
    pub ports: usize,
    /// Cgroups with a claim of their own.
    pub cgroups: usize,
}

/// Up to where records are known: numbers from here on are new.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    policies: u32,
    steps: u32,
    rules: u32,
    ports: u32,
}

impl Mark {
    /// Before the first record.
    pub const START: Self = Self {
        policies: FIRST,
        steps: 0,
        rules: 1,
        ports: 0,
    };
}

/// A claim for one more cgroup, not yet part of the set.
#[derive(Debug, PartialEq, Eq)]
pub struct NewClaim {
    /// The cgroup.
    pub cgroup: Cgroup,
    /// What is to stand in the kernel for it.
    pub claim: Claim,
}

/// Claims that take the place of others.
#[derive(Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// Those that are others than they were.
    pub claims: Vec<(Cgroup, Claim)>,
    /// The ids of cgroups that do no more.
    pub forgotten: Vec<u64>,
}

impl PolicySet {
    /// The set for an assignment that follows another one.
    ///
    /// # Errors
    ///
    /// When too many cgroups one above another have rules for remote ends.
    pub fn new(before: Option<&Assignment>, now: &Assignment) -> Result<Self, Error> {
        let mut set = Self {
            policies: Pool::new(Mark::START.policies),
            steps: Pool::new(Mark::START.steps),
            rules: Pool::new(Mark::START.rules),
            ports: Pool::new(Mark::START.ports),
            assigned: Vec::new(),
            assigned_before: Vec::new(),
            compiled: HashMap::new(),
            before: BTreeMap::new(),
            is_settled: false,
            now: BTreeMap::new(),
            grants: BTreeMap::new(),
        };
        // The policies of now come first, so that they have the lower slots.
        (set.assigned, set.now) = set.place(now)?;
        if let Some(before) = before {
            let compiled = std::mem::take(&mut set.compiled);
            (set.assigned_before, set.before) = set.place(before)?;
            set.compiled = compiled;
        }
        let grants = now.grants.iter();
        set.grants = grants
            .map(|grant| (grant.cgroup.path.clone(), grant.clone()))
            .collect();
        Ok(set)
    }

    /// What its maps need room for.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        Sizes {
            slots: self.policies.end(),
            steps: self.steps.end(),
            remotes: self.rules.from(0).map(|(_, table)| table.len()).sum(),
            ports: self.ports.from(0).map(|(_, table)| table.len()).sum(),
            cgroups: self.claims().count(),
        }
    }

    /// Where the records end that are known by now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            policies: self.policies.end(),
            steps: self.steps.end(),
            rules: self.rules.end(),
            ports: self.ports.end(),
        }
    }

    /// Gives up the records since a mark, of an addition that did not come about.
    pub fn abandon(&mut self, mark: Mark) {
        self.policies.abandon(mark.policies);
        self.steps.abandon(mark.steps);
        self.rules.abandon(mark.rules);
        self.ports.abandon(mark.ports);
        self.compiled.retain(|_, rules| *rules < mark.rules);
    }

    /// The policies since a mark, by slot.
    pub fn policies(&self, since: Mark) -> impl Iterator<Item = (u32, &CountedPolicy)> {
        self.policies.from(since.policies)
    }

    /// The policy in a slot.
    #[must_use]
    pub fn policy(&self, slot: u32) -> Option<&CountedPolicy> {
        self.policies.get(slot)
    }

    /// The steps since a mark, by number.
    pub fn steps(&self, since: Mark) -> impl Iterator<Item = (u32, &Step)> {
        self.steps.from(since.steps)
    }

    /// The prefixes of remote addresses since a mark: the number of the rules, an
    /// address and the length of its prefix, and what is found for it.
    pub fn remotes(&self, since: Mark) -> impl Iterator<Item = (u32, u128, u8, Found)> {
        self.rules.from(since.rules).flat_map(|(number, table)| {
            table
                .iter()
                .map(move |((address, length), found)| (number, *address, *length, *found))
        })
    }

    /// The prefixes of ports since a mark: the number of the table, a port and the
    /// length of its prefix, and what is found for it.
    pub fn ports(&self, since: Mark) -> impl Iterator<Item = (u32, u16, u8, Found)> {
        self.ports.from(since.ports).flat_map(|(number, table)| {
            table
                .iter()
                .map(move |((port, length), found)| (number, *port, *length, *found))
        })
    }

    /// Every cgroup that claims anything, or did in the set before.
    pub fn claims(&self) -> impl Iterator<Item = (Cgroup, Claim)> {
        let own = self.now.iter().map(|(path, claim)| (path, claim.id));
        let only_before = self.before.iter().filter(|(path, claim)| {
            // A cgroup made again under its old path is another cgroup.
            self.now.get(*path).is_none_or(|now| now.id != claim.id)
        });
        let only_before = only_before.map(|(path, claim)| (path, claim.id));
        own.chain(only_before).map(|(path, id)| {
            let cgroup = Cgroup {
                path: path.clone(),
                id,
            };
            let claim = self.claim(path);
            (cgroup, claim)
        })
    }

    /// Where the sockets of a cgroup find their policy: now, and before.
    #[must_use]
    pub fn claim(&self, path: &CgroupPath) -> Claim {
        Claim {
            now: nearest(&self.now, path),
            before: self.before(path),
        }
    }

    fn before(&self, path: &CgroupPath) -> Target {
        if !self.is_settled {
            return nearest(&self.before, path);
        }
        let own = self.before.get(path).map(|own| own.target);
        own.unwrap_or_else(|| nearest(&self.now, path))
    }

    /// A cgroup has been made that these policies of the assignment claim, by
    /// index: what is to be written, nothing if it is known already. It is part of
    /// the set after [`Self::add`]; until then [`Self::abandon`] gives it up.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; nothing has changed then.
    pub fn claim_for(
        &mut self,
        made: &Cgroup,
        policies: &[usize],
    ) -> Result<Option<NewClaim>, Error> {
        let mark = self.mark();
        let above = made
            .path
            .parent()
            .map_or(Target::UNCLAIMED, |above| nearest(&self.now, &above));
        let assigned = std::mem::take(&mut self.assigned);
        let target = self.target(&assigned, &made.path, policies, above);
        self.assigned = assigned;
        let target = target.and_then(|target| match self.grants.get(&made.path).cloned() {
            Some(grant) if grant.cgroup == *made => self.shaped(target, &grant),
            _ => Ok(target),
        });
        let now = target.inspect_err(|_| self.abandon(mark))?;
        let own = OwnClaim {
            id: made.id,
            target: now,
        };
        if self.now.get(&made.path) == Some(&own) {
            return Ok(None);
        }
        // What its connections have they have from what was in force for it so far.
        let before = if self.has_claim_of(made) {
            self.before(&made.path)
        } else {
            nearest(&self.now, &made.path)
        };
        Ok(Some(NewClaim {
            cgroup: made.clone(),
            claim: Claim { now, before },
        }))
    }

    /// Says which policies of the assignment before, by index, have claimed a cgroup: one
    /// that came, or got another name, since that assignment was made.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; nothing has changed then.
    pub fn claimed_before(&mut self, cgroup: &Cgroup, policies: &[usize]) -> Result<(), Error> {
        let mark = self.mark();
        let above = cgroup.path.parent();
        let above = above.map_or(Target::UNCLAIMED, |above| nearest(&self.before, &above));
        let assigned = std::mem::take(&mut self.assigned_before);
        // By the indices of now.
        let compiled = std::mem::take(&mut self.compiled);
        let target = self.target(&assigned, &cgroup.path, policies, above);
        (self.assigned_before, self.compiled) = (assigned, compiled);
        let target = target.inspect_err(|_| self.abandon(mark))?;
        let id = cgroup.id;
        self.before
            .insert(cgroup.path.clone(), OwnClaim { id, target });
        Ok(())
    }

    /// Has a cgroup go by the claims above it.
    pub fn withdraw(&mut self, cgroup: &Cgroup) {
        if (self.now.get(&cgroup.path)).is_some_and(|own| own.id == cgroup.id) {
            self.now.remove(&cgroup.path);
        }
    }

    /// Goes over to another assignment of the same policies: what was claimed up to
    /// here was claimed before. What is to be written, which leads to records since
    /// [`Self::mark`] too.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; nothing has changed then.
    pub fn claim_anew(&mut self, assignment: &Assignment) -> Result<Rewritten, Error> {
        let mark = self.mark();
        let placed = self.place(assignment).inspect_err(|_| self.abandon(mark));
        let (assigned, now) = placed?;
        let mut known: BTreeMap<u64, Claim> = self
            .claims()
            .map(|(cgroup, claim)| (cgroup.id, claim))
            .collect();
        self.assigned_before = std::mem::replace(&mut self.assigned, assigned);
        self.before = std::mem::replace(&mut self.now, now);
        self.is_settled = false;
        let grants = assignment.grants.iter();
        self.grants = grants
            .map(|grant| (grant.cgroup.path.clone(), grant.clone()))
            .collect();
        let claims = self
            .claims()
            .filter(|(cgroup, claim)| known.remove(&cgroup.id) != Some(*claim))
            .collect();
        Ok(Rewritten {
            claims,
            forgotten: known.into_keys().collect(),
        })
    }

    /// The slots of policies of the assignment, by index, with what they would be counted
    /// by if these policies took their place.
    pub fn replacing<'a>(
        &'a self,
        policies: &'a [(usize, Policy)],
    ) -> impl Iterator<Item = (u32, CountedPolicy)> + 'a {
        policies.iter().filter_map(|(index, policy)| {
            let (slot, _) = self.assigned.get(*index)?;
            let name = self.policies.get(*slot)?.name.clone();
            let policy = *policy;
            Some((*slot, CountedPolicy { name, policy }))
        })
    }

    /// Has a slot be of another policy, that goes by the same name.
    pub fn replace(&mut self, slot: u32, policy: CountedPolicy) {
        self.policies.replace(slot, policy);
    }

    /// Whether all connections have been brought along, and no claim is different from
    /// what it was.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.is_settled && self.before.is_empty()
    }

    /// A user is given a policy, or none any more: what is claimed for its cgroup
    /// from now on is shaped by that.
    pub fn set_grant(&mut self, path: &CgroupPath, grant: Option<Grant>) {
        match grant {
            Some(grant) => self.grants.insert(path.clone(), grant),
            None => self.grants.remove(path),
        };
    }

    /// Makes a claim that stands in the kernel part of the set.
    pub fn add(&mut self, new: &NewClaim) {
        let id = new.cgroup.id;
        let Claim { now, before } = new.claim;
        for (claims, target) in [(&mut self.now, now), (&mut self.before, before)] {
            claims.insert(new.cgroup.path.clone(), OwnClaim { id, target });
        }
    }

    /// All connections have been brought along: no value is of an earlier claim any
    /// more. Claims that change by that, and those that go with what they were before.
    pub fn settle(&mut self) -> Rewritten {
        let unsettled: Vec<_> = if self.is_settled {
            // What has come since. So it is after most sweeps, and mostly it is nothing.
            let own = self.before.iter();
            own.map(|(path, own)| {
                let (path, id) = (path.clone(), own.id);
                let claim = self.claim(&path);
                (Cgroup { path, id }, claim)
            })
            .collect()
        } else {
            self.claims().collect()
        };
        self.before.clear();
        self.is_settled = true;
        let (stay, go): (Vec<_>, Vec<_>) = unsettled
            .into_iter()
            .partition(|(cgroup, _)| self.has_claim_of(cgroup));
        let changed = stay.into_iter();
        let changed = changed.filter(|(_, claim)| claim.before != claim.now);
        Rewritten {
            claims: changed
                .map(|(cgroup, Claim { now, .. })| (cgroup, Claim { now, before: now }))
                .collect(),
            forgotten: go.into_iter().map(|(cgroup, _)| cgroup.id).collect(),
        }
    }

    /// The cgroups that claim anything now.
    pub fn claiming(&self) -> impl Iterator<Item = Cgroup> {
        self.now.iter().map(|(path, claim)| Cgroup {
            path: path.clone(),
            id: claim.id,
        })
    }

    /// Whether a cgroup has a claim of its own.
    #[must_use]
    pub fn has_claim_of(&self, cgroup: &Cgroup) -> bool {
        [&self.before, &self.now].iter().any(|claims| {
            claims
                .get(&cgroup.path)
                .is_some_and(|own| own.id == cgroup.id)
        })
    }

    /// Forgets a cgroup that is gone.
    pub fn remove(&mut self, gone: &Cgroup) {
        self.grants.retain(|_, grant| grant.cgroup != *gone);
        for claims in [&mut self.before, &mut self.now] {
            if claims.get(&gone.path).is_some_and(|own| own.id == gone.id) {
                claims.remove(&gone.path);
            }
        }
    }

    /// How many steps a target is away from a slot.
    fn steps_from(&self, target: Target) -> u32 {
        let next = |target: &Target| match target.lead() {
            Lead::Slot(_) => None,
            Lead::Step(number) => self.steps.get(number).map(Step::otherwise),
        };
        let steps = successors(Some(target), next).skip(1);
        (1..).zip(steps).last().map_or(0, |(count, _)| count)
    }

    /// Numbers what an assignment needs: the slots of its policies, and what every
    /// cgroup claims.
    #[expect(clippy::type_complexity, reason = "the two halves of an assignment")]
    fn place(
        &mut self,
        assignment: &Assignment,
    ) -> Result<(Vec<(u32, Rules)>, BTreeMap<CgroupPath, OwnClaim>), Error> {
        let mut assigned = Vec::with_capacity(assignment.policies.len());
        for policy in &assignment.policies {
            let counted = CountedPolicy {
                name: policy.name.clone(),
                policy: policy.policy,
            };
            assigned.push((self.policies.number_of(counted), policy.rules.clone()));
        }
        // In this order a cgroup follows the ones above it, and what a user was given
        // the claim of the same cgroup.
        let claims = assignment.claims.iter();
        let claims = claims.map(|claim| (&claim.cgroup, Err(&claim.policies)));
        let grants = assignment.grants.iter();
        let grants = grants.map(|grant| (&grant.cgroup, Ok(grant)));
        let mut all: Vec<_> = claims.chain(grants).collect();
        all.sort_by(|(one, _), (other, _)| one.path.cmp(&other.path));
        let mut now = BTreeMap::new();
        for (Cgroup { path, id }, claim) in all {
            let target = match claim {
                Err(policies) => {
                    let above = path
                        .parent()
                        .map_or(Target::UNCLAIMED, |above| nearest(&now, &above));
                    self.target(&assigned, path, policies, above)?
                }
                Ok(grant) => self.shaped(nearest(&now, path), grant)?,
            };
            now.insert(path.clone(), OwnClaim { id: *id, target });
        }
        Ok((assigned, now))
    }

    /// Where a cgroup's sockets find their policy, given the policies that claim
    /// them and what claims those above it.
    fn target(
        &mut self,
        assigned: &[(u32, Rules)],
        path: &CgroupPath,
        policies: &[usize],
        above: Target,
    ) -> Result<Target, Error> {
        let claiming: Vec<_> = policies
            .iter()
            .filter_map(|index| Some((*index, assigned.get(*index)?)))
            .collect();
        let (otherwise, with_rules) = match claiming.split_last() {
            Some(((_, (slot, rules)), rest)) if rules.is_empty() => (Target::slot(*slot), rest),
            _ => (above, &claiming[..]),
        };
        if with_rules.is_empty() {
            return Ok(otherwise);
        }
        let indices: Vec<_> = with_rules.iter().map(|(index, _)| *index).collect();
        let known = self.compiled.get(&indices).copied();
        let rules = known.unwrap_or_else(|| {
            let claimants: Vec<_> = with_rules
                .iter()
                .map(|(_, (slot, rules))| (*slot, rules))
                .collect();
            let rules = self.compile(&claimants);
            self.compiled.insert(indices, rules);
            rules
        });
        if self.steps_from(otherwise) >= MAX_STEPS {
            return Err(Error::TooManySteps {
                cgroup: path.clone(),
            });
        }
        Ok(Target::step(
            self.steps.number_of(Step::new(rules, otherwise)),
        ))
    }

    /// Where sockets find their policy that would find it by this target, if it were
    /// not for what a user asked for.
    fn shaped(&mut self, target: Target, grant: &Grant) -> Result<Target, Error> {
        let mut room = MOST_SHAPED;
        let shaped = self.shape(target, grant, &mut room);
        shaped.ok_or_else(|| Error::TooManyNetworks {
            cgroup: grant.cgroup.path.clone(),
        })
    }

    /// None where there is no room for so many rules.
    fn shape(&mut self, target: Target, grant: &Grant, room: &mut usize) -> Option<Target> {
        let step = match target.lead() {
            Lead::Slot(slot) => return Some(Target::slot(self.shaped_slot(slot, grant))),
            // A number that is not known leads nowhere.
            Lead::Step(number) => *self.steps.get(number)?,
        };
        let otherwise = self.shape(step.otherwise(), grant, room)?;
        let table = self.rules.get(step.rules)?;
        *room = room.checked_sub(table.len())?;
        let mut shaped = table.clone();
        for (_, found) in &mut shaped {
            *found = self.shaped_found(*found, grant, room)?;
        }
        let rules = self.rules.number_of(shaped);
        Some(Target::step(
            self.steps.number_of(Step::new(rules, otherwise)),
        ))
    }

    fn shaped_found(&mut self, found: Found, grant: &Grant, room: &mut usize) -> Option<Found> {
        let (by, number): (fn(u32) -> Found, _) =
            match (found.port_table(), found.local_port_table()) {
                (Some(number), _) => (Found::by_port, number),
                (None, Some(number)) => (Found::by_local_port, number),
                (None, None) if found == Found::NOTHING => return Some(found),
                (None, None) => {
                    return Some(Found::slot(self.shaped_slot(found.any_port(), grant)));
                }
            };
        let table = self.ports.get(number)?;
        *room = room.checked_sub(table.len())?;
        let mut shaped = table.clone();
        for (_, found) in &mut shaped {
            *found = self.shaped_found(*found, grant, room)?;
        }
        Some(by(self.ports.number_of(shaped)))
    }

    fn shaped_slot(&mut self, slot: u32, grant: &Grant) -> u32 {
        let before = self.policies.get(slot).map(|counted| counted.policy);
        let policy = grant.wish.over(before.unwrap_or(Policy::BUILT_IN));
        if before == Some(policy) {
            return slot;
        }
        self.policies.number_of(CountedPolicy {
            name: GRANTED.to_owned(),
            policy,
        })
    }

    /// Compiles the rules of some policies; the number of the result.
    fn compile(&mut self, claimants: &[(u32, &Rules)]) -> u32 {
        let mut remotes = RemoteTable::new();
        for (prefix, verdict) in compile(claimants).remotes {
            remotes.push((prefix, self.found(verdict)));
        }
        self.rules.number_of(remotes)
    }

    /// What is to be found where this holds.
    fn found(&mut self, verdict: Verdict) -> Found {
        match verdict {
            Verdict::Slot(slot) => Found::slot(slot),
            Verdict::ByPort(table) => Found::by_port(self.port_table(table)),
            Verdict::ByLocalPort(table) => Found::by_local_port(self.port_table(table)),
        }
    }

    /// Numbers a table of ports, after those that it leads to.
    fn port_table(&mut self, table: compiled::PortTable<Verdict>) -> u32 {
        let mut numbered = PortTable::new();
        for (prefix, verdict) in table {
            numbered.push((prefix, self.found(verdict)));
        }
        self.ports.number_of(numbered)
    }
}

/// Where the sockets of a cgroup find their policy: by its own claim or by the
/// nearest above.
fn nearest(claims: &BTreeMap<CgroupPath, OwnClaim>, path: &CgroupPath) -> Target {
    path.upward()
        .find_map(|path| claims.get(path))
        .map_or(Target::UNCLAIMED, |claim| claim.target)
}

#[cfg(test)]
mod tests;
