//! Which slot holds which policy, which steps and rules lead there, and what
//! every cgroup claims: the agent's side of the maps, without the maps.

mod pool;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    iter::successors,
    sync::Arc,
};

use anyhow::{Result, ensure};
use keepalive_common::{
    policy::Policy,
    slot::{Claim, FIRST, Found, Lead, MAX_STEPS, PortKey, RemoteKey, Step, Tables, Target},
};

use crate::{
    assignment::Assignment,
    hierarchy::{Cgroup, parent, upward},
    rules::{
        Rules,
        compiled::{self, Verdict, compile},
    },
};
use pool::Pool;

/// A policy as a slot holds it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Held {
    /// The name that it is counted under.
    pub(super) name: String,
    pub(super) policy: Policy,
}

/// Prefixes of addresses in IPv6 and what is found for them.
pub(super) type RemoteTable = Vec<((u128, u8), Found)>;

/// Prefixes of ports and what is found for them.
pub(super) type PortTable = compiled::PortTable<Found>;

/// How many records of each kind there is room for in the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Slots, the ones below [`FIRST`] included.
    pub(super) slots: u32,
    pub(super) steps: u32,
}

/// Slots, steps, rules and claims as they are in the kernel.
#[derive(Debug)]
pub(super) struct Slots {
    policies: Pool<Held>,
    steps: Pool<Step>,
    rules: Pool<RemoteTable>,
    ports: Pool<PortTable>,
    /// The slot of each policy of the assignment in force, and its rules.
    assigned: Arc<[(u32, Rules)]>,
    /// Policies by index → their compiled rules, of the assignment in force.
    compiled: HashMap<Vec<usize>, u32>,
    /// Path → what it claimed itself before the switch that is not settled yet.
    before: BTreeMap<String, Claimed>,
    /// Path → what it claims itself.
    now: BTreeMap<String, Claimed>,
    /// Whether the program runs for connections.
    live: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Claimed {
    id: u64,
    target: Target,
}

/// Records that claims lead to, with their numbers. They are written before
/// anything leads there and removed when nothing does any more.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Records {
    pub(super) policies: Vec<(u32, Arc<Held>)>,
    pub(super) ports: Vec<(u32, Arc<PortTable>)>,
    pub(super) rules: Vec<(u32, Arc<RemoteTable>)>,
    pub(super) steps: Vec<(u32, Arc<Step>)>,
}

/// The way from one assignment to the next, in an order in which every socket
/// finds its old policy or its new one at any moment.
///
/// Giving cgroups other policies one after the other is not enough: where a
/// cgroup begins or ceases to claim for itself, its sockets would in between
/// follow a parent that is ahead or behind. So first every cgroup that claims
/// anything before or after gets a claim of its own that changes nothing; then
/// each is switched, one write each; what is not needed any more goes last.
/// Steps lead on to where the claim above led when they were made, and are
/// never changed, so a claim with rules is as whole as one without.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Switch {
    /// To be written first.
    pub(super) records: Records,
    /// Claims that change nothing, then the ones that do.
    pub(super) claims: Vec<(Cgroup, Claim)>,
}

/// What is left to do once the sweep has seen both policies.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Settle {
    /// Claims without a past.
    pub(super) claims: Vec<(Cgroup, Claim)>,
    /// Cgroups that claim nothing any more.
    pub(super) removed: Vec<Cgroup>,
    /// Records that nothing leads to any more.
    pub(super) freed: Records,
}

impl Room {
    /// For what reads and claims nothing.
    pub(super) const NONE: Self = Self { slots: 1, steps: 1 };
}

impl Slots {
    pub(super) fn new(room: Room) -> Self {
        Self {
            policies: Pool::new("policies", FIRST, room.slots),
            steps: Pool::new("cgroups with different rules", 0, room.steps),
            // 0 is no set of rules.
            rules: Pool::new("sets of rules", 1, u32::MAX >> 1),
            ports: Pool::new("sets of ports", 0, u32::MAX >> 2),
            assigned: Arc::default(),
            compiled: HashMap::new(),
            before: BTreeMap::new(),
            now: BTreeMap::new(),
            live: false,
        }
    }

    /// From now on the program runs for connections, and order matters.
    pub(super) const fn go_live(&mut self) {
        self.live = true;
    }

    /// Every slot that holds a policy.
    pub(super) fn held(&self) -> impl Iterator<Item = (u32, &Held)> {
        self.policies.iter()
    }

    /// The policy in a slot.
    pub(super) fn policy(&self, slot: u32) -> Option<&Held> {
        self.policies.get(slot)
    }

    /// Where the sockets of a cgroup find their policy: now, and before.
    pub(super) fn claim(&self, path: &str) -> Claim {
        Claim {
            now: effective(&self.now, path),
            before: effective(&self.before, path),
        }
    }

    /// Plans the way to another assignment, and takes what it needs. What was
    /// claimed before is remembered until [`Self::settle`].
    ///
    /// # Errors
    ///
    /// When there is no room for the old and the new policies together; nothing
    /// has changed then.
    pub(super) fn switch(&mut self, next: &Assignment) -> Result<Switch> {
        self.compiled.clear();
        let mut placing = Placing::of(self);
        match placing.assignment(next) {
            Ok((assigned, now)) => {
                let records = placing.written;
                self.assigned = assigned;
                let claims = self.claims_towards(&now);
                self.now = now;
                Ok(Switch { records, claims })
            }
            Err(error) => {
                self.compiled.clear();
                self.collect();
                Err(error)
            }
        }
    }

    /// Claims on the way to these.
    fn claims_towards(&self, now: &BTreeMap<String, Claimed>) -> Vec<(Cgroup, Claim)> {
        let mut union: BTreeMap<&str, u64> = BTreeMap::new();
        for (path, claimed) in self.before.iter().chain(now) {
            union.insert(path, claimed.id);
        }
        let both = || {
            union.iter().map(|(path, id)| {
                let claim = Claim {
                    now: effective(now, path),
                    before: effective(&self.before, path),
                };
                (cgroup(path, *id), claim)
            })
        };
        let is_new = |cgroup: &Cgroup| {
            // A cgroup made again under its old path is another cgroup.
            let before = self.before.get(&cgroup.path);
            before.is_none_or(|claimed| claimed.id != cgroup.id)
        };
        let unchanged = both()
            .filter(|(cgroup, _)| self.live && is_new(cgroup))
            .map(|(cgroup, claim)| {
                let target = claim.before;
                let claim = Claim {
                    now: target,
                    before: target,
                };
                (cgroup, claim)
            });
        // What claims the same as ever stands in the kernel already.
        let changed = both().filter(|(cgroup, claim)| is_new(cgroup) || claim.now != claim.before);
        unchanged.chain(changed).collect()
    }

    /// What is to be cleaned up once nothing needs the assignment before this
    /// one any more.
    pub(super) fn settle(&mut self) -> Settle {
        let mut settle = Settle::default();
        for (path, claimed) in &self.before {
            if self.now.get(path).is_none_or(|kept| kept.id != claimed.id) {
                settle.removed.push(cgroup(path, claimed.id));
            }
        }
        for (path, claimed) in &self.now {
            let target = claimed.target;
            if effective(&self.before, path) != target {
                let claim = Claim {
                    now: target,
                    before: target,
                };
                settle.claims.push((cgroup(path, claimed.id), claim));
            }
        }
        self.before = self.now.clone();
        settle.freed = self.collect();
        settle
    }

    /// A cgroup has been made that these policies of the assignment in force
    /// claim, by index: what is to be written, nothing if it is known already.
    ///
    /// # Errors
    ///
    /// When there is no room for its steps; nothing has changed then.
    pub(super) fn appear(&mut self, made: &Cgroup, policies: &[usize]) -> Result<Switch> {
        let mut placing = Placing::of(self);
        let above = parent(&made.path).map_or(Target::UNCLAIMED, |above| {
            effective(&placing.slots.now, above)
        });
        let assigned = placing.slots.assigned.clone();
        let target = placing.target(&assigned, policies, above)?;
        let records = placing.written;
        let claim = Claim {
            now: target,
            before: effective(&self.before, &made.path),
        };
        let claimed = Claimed {
            id: made.id,
            target,
        };
        if self.now.insert(made.path.clone(), claimed) == Some(claimed) {
            return Ok(Switch::default());
        }
        Ok(Switch {
            records,
            claims: vec![(made.clone(), claim)],
        })
    }

    /// A cgroup is gone; whether it claimed anything itself.
    pub(super) fn vanish(&mut self, gone: &Cgroup) -> bool {
        let mut claimed = false;
        for claims in [&mut self.before, &mut self.now] {
            if claims.get(&gone.path).is_some_and(|own| own.id == gone.id) {
                claims.remove(&gone.path);
                claimed = true;
            }
        }
        claimed
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

    /// Frees every record that no claim leads to, nor the assignment in force.
    fn collect(&mut self) -> Records {
        let mut kept = Kept::default();
        kept.slots
            .extend(self.assigned.iter().map(|(slot, _)| *slot));
        for claimed in self.before.values().chain(self.now.values()) {
            kept.follow(self, claimed.target);
        }
        self.compiled.retain(|_, rules| kept.rules.contains(rules));
        Records {
            policies: self.policies.retain(&kept.slots),
            steps: self.steps.retain(&kept.steps),
            rules: self.rules.retain(&kept.rules),
            ports: self.ports.retain(&kept.ports),
        }
    }
}

/// Numbers of records that are needed.
#[derive(Default)]
struct Kept {
    slots: BTreeSet<u32>,
    steps: BTreeSet<u32>,
    rules: BTreeSet<u32>,
    ports: BTreeSet<u32>,
}

impl Kept {
    /// Everything that a target leads to.
    fn follow(&mut self, slots: &Slots, target: Target) {
        let mut target = target;
        loop {
            let number = match target.lead() {
                Lead::Slot(slot) => {
                    self.slots.insert(slot);
                    return;
                }
                Lead::Step(number) => number,
            };
            let Some(step) = slots
                .steps
                .get(number)
                .filter(|_| self.steps.insert(number))
            else {
                // Followed before.
                return;
            };
            if self.rules.insert(step.rules) {
                for (_, found) in slots.rules.get(step.rules).into_iter().flatten() {
                    self.found(slots, *found);
                }
            }
            target = step.otherwise();
        }
    }

    fn found(&mut self, slots: &Slots, found: Found) {
        let Some(table) = found.port_table().or(found.local_port_table()) else {
            self.slots.insert(found.any_port());
            return;
        };
        if self.ports.insert(table) {
            // Of a remote port a local one may follow, and nothing more.
            for (_, found) in slots.ports.get(table).into_iter().flatten() {
                self.found(slots, *found);
            }
        }
    }
}

/// Finds places for what an assignment needs.
struct Placing<'a> {
    slots: &'a mut Slots,
    /// What was not there before.
    written: Records,
}

impl<'a> Placing<'a> {
    fn of(slots: &'a mut Slots) -> Self {
        Self {
            slots,
            written: Records::default(),
        }
    }

    /// The slots of the policies, and what every cgroup claims.
    #[expect(clippy::type_complexity, reason = "the two halves of an assignment")]
    fn assignment(
        &mut self,
        next: &Assignment,
    ) -> Result<(Arc<[(u32, Rules)]>, BTreeMap<String, Claimed>)> {
        let mut assigned = Vec::with_capacity(next.policies.len());
        for policy in &next.policies {
            let held = Held {
                name: policy.name.clone(),
                policy: policy.policy,
            };
            let (slot, new) = self.slots.policies.place(held)?;
            self.written.policies.extend(new.map(|held| (slot, held)));
            assigned.push((slot, policy.rules.clone()));
        }
        // In this order a cgroup follows the ones above it.
        let mut claims: Vec<_> = next.claims.iter().collect();
        claims.sort_unstable_by_key(|claim| &claim.cgroup.path);
        let mut now = BTreeMap::new();
        for claim in claims {
            let Cgroup { path, id } = &claim.cgroup;
            let above = parent(path).map_or(Target::UNCLAIMED, |above| effective(&now, above));
            let target = self.target(&assigned, &claim.policies, above)?;
            now.insert(path.clone(), Claimed { id: *id, target });
        }
        Ok((assigned.into(), now))
    }

    /// Where a cgroup's sockets find their policy, given the policies that claim
    /// them and what claims those above it.
    fn target(
        &mut self,
        assigned: &[(u32, Rules)],
        policies: &[usize],
        above: Target,
    ) -> Result<Target> {
        let (otherwise, with_rules) = match policies.split_last() {
            Some((last, rest)) if assigned[*last].1.is_empty() => {
                (Target::slot(assigned[*last].0), rest)
            }
            _ => (above, policies),
        };
        if with_rules.is_empty() {
            return Ok(otherwise);
        }
        let rules = match self.slots.compiled.get(with_rules) {
            Some(rules) => *rules,
            None => self.rules(assigned, with_rules)?,
        };
        ensure!(
            self.slots.steps_from(otherwise) < MAX_STEPS,
            "more than {MAX_STEPS} cgroups one above another have policies for some remote ends: \
             give one of them a policy for all"
        );
        let (number, new) = self.slots.steps.place(Step::new(rules, otherwise))?;
        self.written.steps.extend(new.map(|step| (number, step)));
        Ok(Target::step(number))
    }

    /// Compiles the rules of some policies.
    fn rules(&mut self, assigned: &[(u32, Rules)], policies: &[usize]) -> Result<u32> {
        let claimants: Vec<_> = policies
            .iter()
            .map(|index| (assigned[*index].0, &assigned[*index].1))
            .collect();
        let mut remotes = RemoteTable::new();
        for (prefix, verdict) in compile(&claimants).remotes {
            remotes.push((prefix, self.found(verdict)?));
        }
        let (number, new) = self.slots.rules.place(remotes)?;
        self.written.rules.extend(new.map(|rules| (number, rules)));
        self.slots.compiled.insert(policies.to_vec(), number);
        Ok(number)
    }

    /// What is to be found where this holds.
    fn found(&mut self, verdict: Verdict) -> Result<Found> {
        Ok(match verdict {
            Verdict::Slot(slot) => Found::slot(slot),
            Verdict::ByPort(table) => Found::by_port(self.ports(table)?),
            Verdict::ByLocalPort(table) => Found::by_local_port(self.ports(table)?),
        })
    }

    /// Places a table of ports, after those that it leads to.
    fn ports(&mut self, table: compiled::PortTable<Verdict>) -> Result<u32> {
        let table = table
            .into_iter()
            .map(|(prefix, verdict)| Ok((prefix, self.found(verdict)?)))
            .collect::<Result<PortTable>>()?;
        let (number, new) = self.slots.ports.place(table)?;
        self.written.ports.extend(new.map(|table| (number, table)));
        Ok(number)
    }
}

/// The rules in memory, for what does not run in the kernel.
#[derive(Debug, Default)]
pub(super) struct Index {
    steps: HashMap<u32, Step>,
    remotes: HashMap<(u32, u8), HashMap<u128, Found>>,
    ports: HashMap<(u32, u8), HashMap<u16, Found>>,
}

impl Index {
    pub(super) fn of(slots: &Slots) -> Self {
        let mut index = Self::default();
        for (number, step) in slots.steps.iter() {
            index.steps.insert(number, *step);
        }
        for (number, rules) in slots.rules.iter() {
            for ((address, length), found) in rules {
                let prefixes = index.remotes.entry((number, *length)).or_default();
                prefixes.insert(*address, *found);
            }
        }
        for (number, table) in slots.ports.iter() {
            for ((port, length), found) in table {
                let prefixes = index.ports.entry((number, *length)).or_default();
                prefixes.insert(*port, *found);
            }
        }
        index
    }
}

impl Tables for Index {
    fn step(&self, number: u32) -> Option<Step> {
        self.steps.get(&number).copied()
    }

    fn remote(&self, key: &RemoteKey) -> Option<Found> {
        let (rules, address) = key.parts();
        (0..=128).rev().find_map(|length| {
            let prefixes = self.remotes.get(&(rules, length))?;
            let beyond = 128 - u32::from(length);
            let prefix = address.checked_shr(beyond).unwrap_or(0);
            prefixes
                .get(&prefix.checked_shl(beyond).unwrap_or(0))
                .copied()
        })
    }

    fn port(&self, key: &PortKey) -> Option<Found> {
        let (table, port) = key.parts();
        (0..=16).rev().find_map(|length| {
            let prefixes = self.ports.get(&(table, length))?;
            let beyond = 16 - u32::from(length);
            let prefix = port.checked_shr(beyond).unwrap_or(0);
            prefixes
                .get(&prefix.checked_shl(beyond).unwrap_or(0))
                .copied()
        })
    }
}

fn cgroup(path: &str, id: u64) -> Cgroup {
    Cgroup {
        path: path.to_owned(),
        id,
    }
}

/// Where the sockets of a cgroup find their policy: by its own claim or by the
/// nearest above.
fn effective(claims: &BTreeMap<String, Claimed>, path: &str) -> Target {
    upward(path)
        .find_map(|path| claims.get(path))
        .map_or(Target::UNCLAIMED, |claimed| claimed.target)
}

#[cfg(test)]
mod tests {
    use keepalive_common::{
        policy::Range,
        slot::{self, UNCLAIMED, resolve},
    };
    use proptest::{collection::vec, option, prelude::*, sample::select};

    use super::*;
    use crate::{
        assignment::{self, Assigned},
        rules::{Ends, most_exact},
    };

    const ROOM: Room = Room {
        slots: 32,
        steps: 64,
    };

    fn at(path: &str) -> Cgroup {
        // An id that follows from the path, as an inode number does.
        let id = path.bytes().fold(7, |id: u64, byte| {
            id.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        cgroup(path, id)
    }

    /// A policy told by its idle time, for remote ends with this address or for
    /// all.
    fn assigned(idle: u32, remote: Option<&str>) -> Assigned {
        let mut policy = Policy::BUILT_IN;
        policy.idle = Range::default_only(idle);
        let remotes = remote.map(|text| text.parse().unwrap());
        Assigned {
            name: format!("idle-{idle}"),
            policy,
            rules: Rules {
                remotes: remotes.into_iter().collect(),
                // Some tables of ports, too.
                ports: if idle.is_multiple_of(2) {
                    vec!["443".parse().unwrap()]
                } else {
                    Vec::new()
                },
                local_ports: if idle.is_multiple_of(3) {
                    vec!["22".parse().unwrap()]
                } else {
                    Vec::new()
                },
            },
        }
    }

    const PATHS: [&str; 7] = ["/", "/a", "/a/b", "/a/b/c", "/a/d", "/e", "/e/f"];
    const REMOTES: [&str; 3] = ["10.0.0.1:443", "10.0.0.2:80", "[2001:db8::1]:443"];

    /// The ends of a connection; some have another local port.
    fn ends(remote: &str) -> Ends {
        Ends {
            remote: Some(remote.parse().unwrap()),
            local_port: Some(if remote.starts_with('[') { 23 } else { 22 }),
        }
    }

    /// Everything that can be asked.
    fn questions() -> impl Iterator<Item = (&'static str, &'static str)> {
        PATHS
            .into_iter()
            .flat_map(|path| REMOTES.map(|remote| (path, remote)))
    }

    /// The idle time that an assignment means for a socket; 0 is none.
    fn meant(assignment: &Assignment, path: &str, remote: &str) -> u32 {
        let ends = ends(remote);
        for path in upward(path) {
            let claim = assignment
                .claims
                .iter()
                .find(|claim| claim.cgroup.path == path);
            let Some(claim) = claim else { continue };
            let claiming = || {
                claim
                    .policies
                    .iter()
                    .map(|index| &assignment.policies[*index])
            };
            let rules = claiming().map(|assigned| &assigned.rules);
            if let Some(index) = most_exact(rules, &ends) {
                return claiming().nth(index).unwrap().policy.idle.default;
            }
        }
        0
    }

    fn assignments() -> impl Strategy<Value = Assignment> {
        let remote = option::of(select(vec!["10.0.0.1", "10.0.0.0/24", "!10.0.0.1", "::/0"]));
        let policies = vec((1_u32..5, remote), 0..3);
        vec(option::of(policies), PATHS.len()).prop_map(|of_paths| {
            let mut policies: Vec<Assigned> = Vec::new();
            let mut claims = Vec::new();
            for (path, wanted) in PATHS.into_iter().zip(of_paths) {
                let mut indices: Vec<_> = wanted
                    .into_iter()
                    .flatten()
                    .map(|(idle, remote)| {
                        policies.push(assigned(idle, remote));
                        policies.len() - 1
                    })
                    .collect();
                indices.sort_by_key(|index| policies[*index].rules.is_empty());
                let without_rules = |index: &usize| policies[*index].rules.is_empty();
                let first = indices.iter().position(without_rules);
                indices.truncate(first.map_or(indices.len(), |first| first + 1));
                if !indices.is_empty() {
                    claims.push(assignment::Claim {
                        cgroup: at(path),
                        policies: indices,
                    });
                }
            }
            Assignment { policies, claims }
        })
    }

    /// The kernel's maps.
    #[derive(Default)]
    struct Kernel {
        policies: BTreeMap<u32, u32>,
        index: Index,
        cgroups: BTreeMap<u64, Claim>,
    }

    impl Kernel {
        fn write(&mut self, records: Records) {
            for (slot, held) in records.policies {
                let idle = held.policy.idle.default;
                assert!(self.policies.insert(slot, idle).is_none());
            }
            for (number, step) in records.steps {
                self.index.steps.insert(number, *step);
            }
            for (number, rules) in records.rules {
                for ((address, length), found) in rules.iter() {
                    let prefixes = self.index.remotes.entry((number, *length)).or_default();
                    assert!(prefixes.insert(*address, *found).is_none());
                }
            }
            for (number, table) in records.ports {
                for ((port, length), slot) in table.iter() {
                    let prefixes = self.index.ports.entry((number, *length)).or_default();
                    assert!(prefixes.insert(*port, *slot).is_none());
                }
            }
        }

        fn free(&mut self, records: Records) {
            for (slot, _) in records.policies {
                self.policies.remove(&slot).unwrap();
            }
            for (number, _) in records.steps {
                self.index.steps.remove(&number).unwrap();
            }
            for (number, rules) in records.rules {
                for ((address, length), _) in rules.iter() {
                    let prefixes = self.index.remotes.get_mut(&(number, *length)).unwrap();
                    prefixes.remove(address).unwrap();
                }
            }
            for (number, table) in records.ports {
                for ((port, length), _) in table.iter() {
                    let prefixes = self.index.ports.get_mut(&(number, *length)).unwrap();
                    prefixes.remove(port).unwrap();
                }
            }
        }

        /// What the BPF program finds for a socket, now or before.
        fn idle(&self, path: &str, remote: &str, now: bool) -> u32 {
            let nearest = upward(path).find_map(|path| self.cgroups.get(&at(path).id));
            let claim = nearest.copied().unwrap_or(Claim::NONE);
            let target = if now { claim.now } else { claim.before };
            let Ends { remote, local_port } = ends(remote);
            let ends = slot::Ends::new(remote.unwrap(), local_port.unwrap());
            match resolve(&self.index, target, &ends) {
                UNCLAIMED => 0,
                slot => self.policies[&slot],
            }
        }

        fn all(&self, now: bool) -> Vec<u32> {
            questions()
                .map(|(path, remote)| self.idle(path, remote, now))
                .collect()
        }

        fn records(&self) -> usize {
            let remotes = self.index.remotes.values().map(HashMap::len);
            let ports = self.index.ports.values().map(HashMap::len);
            let prefixes: usize = remotes.chain(ports).sum();
            self.policies.len() + self.index.steps.len() + prefixes + self.cgroups.len()
        }
    }

    fn live() -> Slots {
        let mut slots = Slots::new(ROOM);
        slots.go_live();
        slots
    }

    proptest! {
        #[test]
        fn every_socket_finds_its_old_or_its_new_policy(
            row in vec(assignments(), 1..5),
        ) {
            let mut slots = live();
            let mut kernel = Kernel::default();
            for next in row {
                let old = kernel.all(true);
                let wanted: Vec<_> = questions()
                    .map(|(path, remote)| meant(&next, path, remote))
                    .collect();
                let switch = slots.switch(&next).unwrap();
                kernel.write(switch.records);
                for (cgroup, claim) in switch.claims {
                    kernel.cgroups.insert(cgroup.id, claim);
                    for (found, (old, new)) in
                        kernel.all(true).into_iter().zip(old.iter().zip(&wanted))
                    {
                        prop_assert!(found == *old || found == *new);
                    }
                }
                prop_assert_eq!(kernel.all(true), wanted.clone());
                // The sweep recognises what the old policy wrote.
                prop_assert_eq!(kernel.all(false), old);
                let settle = slots.settle();
                for (cgroup, claim) in settle.claims {
                    kernel.cgroups.insert(cgroup.id, claim);
                    prop_assert_eq!(kernel.all(true), wanted.clone());
                }
                for cgroup in settle.removed {
                    kernel.cgroups.remove(&cgroup.id);
                    prop_assert_eq!(kernel.all(true), wanted.clone());
                }
                kernel.free(settle.freed);
                prop_assert_eq!(kernel.all(true), wanted.clone());
                prop_assert_eq!(kernel.all(false), wanted);
                prop_assert_eq!(kernel.cgroups.len(), next.claims.len());
            }
            // Nothing is left of all that.
            let empty = Assignment { policies: Vec::new(), claims: Vec::new() };
            let switch = slots.switch(&empty).unwrap();
            for (cgroup, claim) in switch.claims {
                kernel.cgroups.insert(cgroup.id, claim);
            }
            let settle = slots.settle();
            for cgroup in settle.removed {
                kernel.cgroups.remove(&cgroup.id);
            }
            kernel.free(settle.freed);
            prop_assert_eq!(kernel.records(), 0);
        }

        #[test]
        fn cgroups_that_come_one_by_one_are_as_those_that_were_there(
            next in assignments(),
            vanishing in vec(any::<bool>(), PATHS.len()),
        ) {
            let mut slots = live();
            let mut kernel = Kernel::default();
            let none_yet = Assignment { policies: next.policies.clone(), claims: Vec::new() };
            kernel.write(slots.switch(&none_yet).unwrap().records);
            kernel.free(slots.settle().freed);
            for claim in &next.claims {
                let switch = slots.appear(&claim.cgroup, &claim.policies).unwrap();
                kernel.write(switch.records);
                for (cgroup, claim) in switch.claims {
                    kernel.cgroups.insert(cgroup.id, claim);
                }
            }
            let wanted: Vec<_> = questions()
                .map(|(path, remote)| meant(&next, path, remote))
                .collect();
            prop_assert_eq!(kernel.all(true), wanted.clone());
            let settle = slots.settle();
            for (cgroup, claim) in settle.claims {
                kernel.cgroups.insert(cgroup.id, claim);
            }
            kernel.free(settle.freed);
            prop_assert_eq!(kernel.all(false), wanted);
            // From the leaves, as the kernel lets cgroups be removed.
            for (path, vanishing) in PATHS.into_iter().zip(vanishing).rev() {
                let claimed = next.claims.iter().any(|claim| claim.cgroup.path == path);
                if vanishing {
                    prop_assert_eq!(slots.vanish(&at(path)), claimed);
                    kernel.cgroups.remove(&at(path).id);
                }
            }
            kernel.free(slots.settle().freed);
            let left: Vec<_> = slots.now.values().map(|claimed| claimed.id).collect();
            prop_assert_eq!(left.len(), kernel.cgroups.len());
            kernel.all(true);
        }
    }

    fn one(path: &str, idles: &[u32]) -> Assignment {
        Assignment {
            policies: idles.iter().map(|idle| assigned(*idle, None)).collect(),
            claims: vec![assignment::Claim {
                cgroup: at(path),
                policies: vec![0],
            }],
        }
    }

    #[test]
    fn too_many_policies_change_nothing() {
        let mut slots = Slots::new(Room {
            slots: FIRST + 2,
            steps: 1,
        });
        let two = one("/", &[1, 3]);
        slots.switch(&two).unwrap();
        slots.settle();
        let error = slots.switch(&one("/", &[5])).unwrap_err();
        assert!(error.to_string().contains("start it again"), "{error}");
        assert_eq!(slots.held().count(), 2);
        let again = slots.switch(&two).unwrap();
        assert_eq!(again.claims, []);
    }

    #[test]
    fn as_many_steps_as_the_kernel_takes() {
        let claims: Vec<_> = (0..=MAX_STEPS as usize)
            .map(|depth| assignment::Claim {
                cgroup: at(&"/x".repeat(depth + 1)),
                policies: vec![0],
            })
            .collect();
        let mut next = Assignment {
            policies: vec![assigned(2, None)],
            claims,
        };
        let mut slots = live();
        let error = slots.switch(&next).unwrap_err();
        assert!(error.to_string().contains("more than 8 cgroups"), "{error}");
        next.claims.pop();
        let claims = slots.switch(&next).unwrap().claims;
        let deepest = claims.last().unwrap().1.now;
        assert_eq!(slots.steps_from(deepest), MAX_STEPS);
    }

    #[test]
    fn the_same_assignment_again_is_no_work() {
        let mut slots = live();
        let mut next = one("/a", &[1]);
        next.policies[0] = assigned(2, Some("10.0.0.0/8"));
        slots.switch(&next).unwrap();
        slots.settle();
        assert_eq!(slots.switch(&next).unwrap(), Switch::default());
        assert_eq!(slots.settle(), Settle::default());
    }

    #[test]
    fn a_cgroup_made_again_is_another_one() {
        let mut slots = live();
        slots.switch(&one("/a", &[1])).unwrap();
        slots.settle();
        let mut again = at("/a");
        again.id += 1;
        let switch = slots.appear(&again, &[0]).unwrap();
        assert_eq!(slots.appear(&again, &[0]).unwrap(), Switch::default());
        assert_eq!(switch.claims.len(), 1);
        assert_eq!(switch.claims[0].0.id, again.id);
        // The event of the first one's end may come late.
        assert!(slots.vanish(&at("/a")));
        assert_eq!(slots.claim("/a").now, switch.claims[0].1.now);
    }
}
