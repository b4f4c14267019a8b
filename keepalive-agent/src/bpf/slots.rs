//! Which slot holds which policy, and what every cgroup claims: the agent's
//! side of the maps, without the maps.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use keepalive_common::slot::{Claim, FIRST, UNCLAIMED};

use crate::{
    assignment::{Assigned, Assignment},
    hierarchy::Cgroup,
};

/// Slots and claims as they are in the kernel.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// What each slot holds, from [`FIRST`] on.
    held: Vec<Option<Assigned>>,
    /// Path → what it claimed itself before the switch that is not settled yet.
    before: BTreeMap<String, Claimed>,
    /// Path → what it claims itself.
    now: BTreeMap<String, Claimed>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Claimed {
    id: u64,
    slot: u32,
}

/// The way from one assignment to the next, in an order in which every socket
/// finds its old policy or its new one at any moment.
///
/// Giving cgroups other policies one after the other is not enough: where a
/// cgroup begins or ceases to claim for itself, its sockets would in between
/// follow a parent that is ahead or behind. So first every cgroup that claims
/// anything before or after gets a claim of its own that changes nothing; then
/// each is switched, one write each; what is not needed any more goes last.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Switch {
    /// Slots to be written first.
    pub(super) policies: Vec<(u32, Assigned)>,
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
    /// Slots that are free again.
    pub(super) freed: Vec<(u32, Assigned)>,
}

impl Slots {
    pub(super) fn new(capacity: u32) -> Self {
        let count = capacity.saturating_sub(FIRST) as usize;
        Self {
            held: vec![None; count],
            before: BTreeMap::new(),
            now: BTreeMap::new(),
        }
    }

    /// Every slot that holds a policy.
    pub(super) fn held(&self) -> impl Iterator<Item = (u32, &Assigned)> {
        (FIRST..)
            .zip(&self.held)
            .filter_map(|(slot, held)| Some((slot, held.as_ref()?)))
    }

    /// The slots that the sockets of a cgroup go by: now, and before.
    pub(super) fn claim(&self, path: &str) -> Claim {
        Claim {
            slot: effective(&self.now, path),
            before: effective(&self.before, path),
        }
    }

    /// Plans the way to another assignment, and takes its slots. What was
    /// claimed before is remembered until [`Self::settle`].
    ///
    /// # Errors
    ///
    /// When there are not enough slots for the old and the new policies
    /// together; nothing has changed then.
    pub(super) fn switch(&mut self, next: &Assignment) -> Result<Switch> {
        let mut switch = Switch::default();
        let slots = self.place(&next.policies, &mut switch.policies)?;
        let new = claims_of(next, &slots);
        let mut union: BTreeMap<&str, u64> = BTreeMap::new();
        for (path, claimed) in self.before.iter().chain(&new) {
            union.insert(path, claimed.id);
        }
        let both: Vec<_> = union
            .into_iter()
            .map(|(path, id)| {
                let cgroup = Cgroup {
                    path: path.to_owned(),
                    id,
                };
                let claim = Claim {
                    slot: effective(&new, path),
                    before: effective(&self.before, path),
                };
                (cgroup, claim)
            })
            .collect();
        let unchanged = both.iter().filter_map(|(cgroup, claim)| {
            // A cgroup made again under its old path is another cgroup.
            let same = self
                .before
                .get(&cgroup.path)
                .is_some_and(|claimed| claimed.id == cgroup.id);
            let slot = claim.before;
            (!same).then(|| (cgroup.clone(), Claim { slot, before: slot }))
        });
        switch.claims = unchanged.collect();
        switch.claims.extend(both);
        self.now = new;
        Ok(switch)
    }

    /// What is to be cleaned up after the switch to this assignment.
    pub(super) fn settle(&mut self, now: &Assignment) -> Settle {
        let slots = self.slots_of(&now.policies);
        let new = claims_of(now, &slots);
        let mut settle = Settle::default();
        for (path, claimed) in &self.before {
            if new.get(path).is_none_or(|kept| kept.id != claimed.id) {
                settle.removed.push(Cgroup {
                    path: path.clone(),
                    id: claimed.id,
                });
            }
        }
        for (path, claimed) in &new {
            let cgroup = Cgroup {
                path: path.clone(),
                id: claimed.id,
            };
            let slot = claimed.slot;
            settle.claims.push((cgroup, Claim { slot, before: slot }));
        }
        for (slot, held) in (FIRST..).zip(&mut self.held) {
            if !slots.contains(&slot)
                && let Some(assigned) = held.take()
            {
                settle.freed.push((slot, assigned));
            }
        }
        self.before = new.clone();
        self.now = new;
        settle
    }

    /// Finds a slot for each policy: the one that holds it already, or a free one.
    fn place(
        &mut self,
        policies: &[Assigned],
        written: &mut Vec<(u32, Assigned)>,
    ) -> Result<Vec<u32>> {
        let mut held = self.held.clone();
        let mut slots = Vec::with_capacity(policies.len());
        for assigned in policies {
            let index = held
                .iter()
                .position(|held| held.as_ref() == Some(assigned))
                .or_else(|| held.iter().position(Option::is_none))
                .context(
                    "more policies than there was room for when the agent started: start it again",
                )?;
            let slot = FIRST + u32::try_from(index)?;
            if held[index].is_none() {
                held[index] = Some(assigned.clone());
                written.push((slot, assigned.clone()));
            }
            slots.push(slot);
        }
        self.held = held;
        Ok(slots)
    }

    /// The slots of policies that are all held.
    fn slots_of(&self, policies: &[Assigned]) -> Vec<u32> {
        policies
            .iter()
            .map(|assigned| {
                self.held()
                    .find(|(_, held)| *held == assigned)
                    .map_or(UNCLAIMED, |(slot, _)| slot)
            })
            .collect()
    }
}

fn claims_of(assignment: &Assignment, slots: &[u32]) -> BTreeMap<String, Claimed> {
    assignment
        .claims
        .iter()
        .map(|claim| {
            let claimed = Claimed {
                id: claim.cgroup.id,
                slot: slots[claim.policy],
            };
            (claim.cgroup.path.clone(), claimed)
        })
        .collect()
}

/// The slot that a cgroup's sockets go by: its own claim or the nearest above.
fn effective(claims: &BTreeMap<String, Claimed>, path: &str) -> u32 {
    let mut path = path;
    loop {
        if let Some(claimed) = claims.get(path) {
            return claimed.slot;
        }
        path = match path.rfind('/') {
            Some(0) if path.len() > 1 => "/",
            Some(end) if end > 0 => &path[..end],
            _ => return UNCLAIMED,
        };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use keepalive_common::policy::{Policy, Range};
    use proptest::prelude::*;

    use super::*;
    use crate::assignment;

    fn cgroup(path: &str) -> Cgroup {
        // An id that follows from the path, as an inode number does.
        let id = path.bytes().fold(7, |id, byte| id * 31 + u64::from(byte));
        Cgroup {
            path: path.to_owned(),
            id,
        }
    }

    /// An assignment of paths to policies, told by their idle time.
    fn assignment(claims: &[(&str, u32)]) -> Assignment {
        let mut idles: Vec<_> = claims.iter().map(|(_, idle)| *idle).collect();
        idles.sort_unstable();
        idles.dedup();
        let policies = idles.iter().map(|idle| {
            let mut policy = Policy::BUILT_IN;
            policy.idle = Range::default_only(*idle);
            Assigned {
                name: format!("idle-{idle}"),
                policy,
            }
        });
        Assignment {
            policies: policies.collect(),
            claims: claims
                .iter()
                .map(|(path, idle)| assignment::Claim {
                    cgroup: cgroup(path),
                    policy: idles.iter().position(|found| found == idle).unwrap(),
                })
                .collect(),
        }
    }

    /// The kernel's maps.
    #[derive(Default)]
    struct Kernel {
        policies: BTreeMap<u32, Assigned>,
        cgroups: BTreeMap<u64, Claim>,
    }

    impl Kernel {
        /// What the BPF program finds for a socket in this cgroup.
        fn idle(&self, path: &str) -> u32 {
            let mut path = path;
            loop {
                if let Some(claim) = self.cgroups.get(&cgroup(path).id) {
                    return self
                        .policies
                        .get(&claim.slot)
                        .map_or(0, |assigned| assigned.policy.idle.default);
                }
                path = match path.rfind('/') {
                    Some(0) if path.len() > 1 => "/",
                    Some(end) if end > 0 => &path[..end],
                    _ => return 0,
                };
            }
        }
    }

    const PATHS: [&str; 7] = ["/", "/a", "/a/b", "/a/b/c", "/a/d", "/e", "/e/f"];

    fn assignments() -> impl Strategy<Value = Assignment> {
        proptest::collection::vec(proptest::option::of(1_u32..4), PATHS.len()).prop_map(|idles| {
            let claims: Vec<_> = PATHS
                .into_iter()
                .zip(idles)
                .filter_map(|(path, idle)| Some((path, idle?)))
                .collect();
            assignment(&claims)
        })
    }

    proptest! {
        #[test]
        fn every_socket_finds_its_old_or_its_new_policy(
            row in proptest::collection::vec(assignments(), 1..5),
        ) {
            let mut slots = Slots::new(16);
            let mut kernel = Kernel::default();
            for next in row {
                let old = PATHS.map(|path| kernel.idle(path));
                let wanted = PATHS.map(|path| {
                    let claims = claims_of(&next, &(0..).take(next.policies.len()).collect::<Vec<_>>());
                    let nearest = PATHS.iter().rev().find(|above| {
                        cgroup(above).contains(path) && claims.contains_key(**above)
                    });
                    nearest.map_or(0, |above| {
                        next.policies[claims[*above].slot as usize].policy.idle.default
                    })
                });
                let old_or_new = |kernel: &Kernel| {
                    PATHS.into_iter().zip(old.into_iter().zip(wanted)).all(|(path, (old, new))| {
                        let found = kernel.idle(path);
                        found == old || found == new
                    })
                };
                let switch = slots.switch(&next).unwrap();
                for (slot, assigned) in switch.policies {
                    prop_assert!(kernel.policies.insert(slot, assigned).is_none());
                }
                for (cgroup, claim) in switch.claims {
                    kernel.cgroups.insert(cgroup.id, claim);
                    prop_assert!(old_or_new(&kernel));
                }
                prop_assert_eq!(PATHS.map(|path| kernel.idle(path)), wanted);
                let settle = slots.settle(&next);
                for (cgroup, claim) in settle.claims {
                    kernel.cgroups.insert(cgroup.id, claim);
                    prop_assert_eq!(PATHS.map(|path| kernel.idle(path)), wanted);
                }
                for cgroup in settle.removed {
                    kernel.cgroups.remove(&cgroup.id);
                    prop_assert_eq!(PATHS.map(|path| kernel.idle(path)), wanted);
                }
                for (slot, _) in settle.freed {
                    kernel.policies.remove(&slot);
                    prop_assert_eq!(PATHS.map(|path| kernel.idle(path)), wanted);
                }
                prop_assert_eq!(kernel.cgroups.len(), next.claims.len());
                prop_assert_eq!(kernel.policies.len(), next.policies.len());
            }
        }
    }

    #[test]
    fn too_many_policies_change_nothing() {
        let mut slots = Slots::new(FIRST + 2);
        let two = assignment(&[("/", 1), ("/a", 2)]);
        slots.switch(&two).unwrap();
        slots.settle(&two);
        let error = slots.switch(&assignment(&[("/", 3)])).unwrap_err();
        assert!(error.to_string().contains("start it again"), "{error}");
        assert_eq!(slots.held().count(), 2);
        slots.switch(&two).unwrap();
    }
}
