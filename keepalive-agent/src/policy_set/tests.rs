use std::collections::HashMap;

use keepalive_common::{
    policy::Range,
    slot::{self, PortKey, RemoteKey, Tables, UNCLAIMED, resolve},
};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;
use crate::{
    assignment::{self, Assigned},
    config::Wish,
    rules::{Ends, most_exact},
};

/// An id that follows from the path, as an inode number does.
fn id_of(path: &[u8]) -> u64 {
    path.iter().fold(7, |id: u64, byte| {
        id.wrapping_mul(31).wrapping_add(u64::from(*byte))
    })
}

fn at(path: &str) -> Cgroup {
    Cgroup {
        path: path.into(),
        id: id_of(path.as_bytes()),
    }
}

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

/// What users of tests ask for.
const ASKED: u32 = 77;

fn grant(path: &str) -> Grant {
    Grant {
        cgroup: at(path),
        uid: 1000,
        wish: Wish::read(&format!("[default]\nidle = '{ASKED}s'\n")).unwrap(),
    }
}

/// The idle time that an assignment means for a socket; 0 is none.
fn meant(assignment: &Assignment, path: &str, remote: &str) -> u32 {
    let (own, ends) = (CgroupPath::from(path), ends(remote));
    let is_granted = |claimed_at: &CgroupPath| {
        let mut grants = assignment.grants.iter();
        grants.any(|grant| grant.cgroup.contains(&own) && claimed_at.contains(&grant.cgroup.path))
    };
    for path in own.upward() {
        let claim = assignment
            .claims
            .iter()
            .find(|claim| claim.cgroup.path.as_bytes() == path);
        let Some(claim) = claim else { continue };
        let claiming = || {
            claim
                .policies
                .iter()
                .map(|index| &assignment.policies[*index])
        };
        let rules = claiming().map(|assigned| &assigned.rules);
        if let Some(index) = most_exact(rules, &ends) {
            if is_granted(&path.into()) {
                return ASKED;
            }
            return claiming().nth(index).unwrap().policy.idle.default;
        }
    }
    if is_granted(&CgroupPath::root()) {
        return ASKED;
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
        Assignment {
            policies,
            claims,
            grants: Vec::new(),
        }
    })
}

/// The kernel's maps.
#[derive(Default)]
struct Maps {
    policies: HashMap<u32, Policy>,
    steps: HashMap<u32, Step>,
    remotes: HashMap<(u32, u8, u128), Found>,
    ports: HashMap<(u32, u8, u16), Found>,
    cgroups: HashMap<u64, Claim>,
}

impl Tables for Maps {
    fn step(&self, number: u32) -> Option<Step> {
        self.steps.get(&number).copied()
    }

    fn remote(&self, key: &RemoteKey) -> Option<Found> {
        let (rules, address) = key.parts();
        (0..=128_u8).rev().find_map(|length| {
            let beyond = 128 - u32::from(length);
            let prefix = address.checked_shr(beyond).unwrap_or(0);
            let prefix = prefix.checked_shl(beyond).unwrap_or(0);
            self.remotes.get(&(rules, length, prefix)).copied()
        })
    }

    fn port(&self, key: &PortKey) -> Option<Found> {
        let (table, port) = key.parts();
        (0..=16_u8).rev().find_map(|length| {
            let beyond = 16 - u32::from(length);
            let prefix = port.checked_shr(beyond).unwrap_or(0);
            let prefix = prefix.checked_shl(beyond).unwrap_or(0);
            self.ports.get(&(table, length, prefix)).copied()
        })
    }
}

impl Maps {
    fn of(set: &PolicySet) -> Self {
        let mut maps = Self::default();
        let mut all = usize::MAX;
        assert!(maps.write(set, Mark::START, &mut all));
        for (cgroup, claim) in set.claims() {
            assert!(maps.cgroups.insert(cgroup.id, claim).is_none());
        }
        maps
    }

    /// Writes the records since a mark, as many as are allowed; whether all were.
    fn write(&mut self, set: &PolicySet, since: Mark, allowed: &mut usize) -> bool {
        let mut may = || {
            let may = *allowed > 0;
            *allowed = allowed.saturating_sub(1);
            may
        };
        set.policies(since)
            .all(|(slot, counted)| may() && self.policies.insert(slot, counted.policy).is_none())
            && set.ports(since).all(|(table, port, length, found)| {
                may() && self.ports.insert((table, length, port), found).is_none()
            })
            && set.remotes(since).all(|(rules, address, length, found)| {
                may()
                    && self
                        .remotes
                        .insert((rules, length, address), found)
                        .is_none()
            })
            && set
                .steps(since)
                .all(|(number, step)| may() && self.steps.insert(number, *step).is_none())
    }

    /// What the BPF program finds for a socket, now or before; 0 is none.
    fn idle(&self, path: &str, remote: &str, now: bool) -> u32 {
        let nearest = CgroupPath::from(path)
            .upward()
            .find_map(|path| self.cgroups.get(&id_of(path)));
        let claim = nearest.copied().unwrap_or(Claim::NONE);
        let target = if now { claim.now } else { claim.before };
        let Ends { remote, local_port } = ends(remote);
        let ends = slot::Ends::new(remote.unwrap(), local_port.unwrap());
        match resolve(self, target, &ends).slot {
            UNCLAIMED => 0,
            slot => self.policies[&slot].idle.default,
        }
    }

    fn all(&self, now: bool) -> Vec<u32> {
        questions()
            .map(|(path, remote)| self.idle(path, remote, now))
            .collect()
    }
}

fn all_meant(assignment: &Assignment) -> Vec<u32> {
    questions()
        .map(|(path, remote)| meant(assignment, path, remote))
        .collect()
}

fn one(path: &str, idle: u32, remote: Option<&str>) -> Assignment {
    Assignment {
        policies: vec![assigned(idle, remote)],
        claims: vec![assignment::Claim {
            cgroup: at(path),
            policies: vec![0],
        }],
        grants: Vec::new(),
    }
}

proptest! {
    #[test]
    fn a_set_finds_what_is_meant_now_and_was_before(
        before in option::of(assignments()),
        now in assignments(),
    ) {
        let set = PolicySet::new(before.as_ref(), &now).unwrap();
        let maps = Maps::of(&set);
        prop_assert_eq!(maps.all(true), all_meant(&now));
        let nothing = Assignment { policies: Vec::new(), claims: Vec::new(), grants: Vec::new() };
        prop_assert_eq!(maps.all(false), all_meant(before.as_ref().unwrap_or(&nothing)));
        let sizes = set.sizes();
        prop_assert_eq!(maps.policies.len() + FIRST as usize, sizes.slots as usize);
        prop_assert_eq!(maps.steps.len(), sizes.steps as usize);
        prop_assert_eq!(maps.remotes.len(), sizes.remotes);
        prop_assert_eq!(maps.ports.len(), sizes.ports);
        prop_assert_eq!(maps.cgroups.len(), sizes.cgroups);
    }

    /// What a user asks for stands over all that would hold otherwise, rules for
    /// remote ends and ports included, and over nothing that is nearer.
    #[test]
    fn a_grant_stands_over_what_is_above(
        mut now in assignments(),
        granted in select(PATHS[1..].to_vec()),
    ) {
        let without = now.clone();
        now.grants.push(grant(granted));
        let set = PolicySet::new(None, &now).unwrap();
        prop_assert_eq!(Maps::of(&set).all(true), all_meant(&now));
        if PATHS.iter().filter(|path| path.starts_with(granted)).count() > 1 {
            return Ok(());
        }
        // And one that comes later, and goes.
        let mut set = PolicySet::new(None, &without).unwrap();
        let mut maps = Maps::of(&set);
        let mark = set.mark();
        let cgroup = at(granted);
        let claim = without.claims.iter().find(|claim| claim.cgroup == cgroup);
        let policies = claim.map(|claim| claim.policies.clone()).unwrap_or_default();
        set.set_grant(&cgroup.path, Some(grant(granted)));
        let new = set.claim_for(&cgroup, &policies).unwrap().unwrap();
        prop_assert!(maps.write(&set, mark, &mut usize::MAX.clone()));
        maps.cgroups.insert(cgroup.id, new.claim);
        set.add(&new);
        prop_assert_eq!(maps.all(true), all_meant(&now));
        prop_assert_eq!(set.claim_for(&cgroup, &policies).unwrap(), None);
        set.remove(&cgroup);
        prop_assert!(!set.has_claim_of(&cgroup));
    }

    /// A set that goes over to other claims is as one that was built for them after the
    /// claims before, however often.
    #[test]
    fn a_set_that_claims_anew_is_as_one_that_was_built(
        first in assignments(),
        second in assignments(),
    ) {
        // Both of the same policies.
        let policies: Vec<_> = first.policies.iter().chain(&second.policies).cloned().collect();
        let shifted = |assignment: &Assignment, by: usize| {
            let mut claims = assignment.claims.clone();
            let all = claims.iter_mut().flat_map(|claim| &mut claim.policies);
            all.for_each(|policy| *policy += by);
            Assignment { policies: policies.clone(), claims, grants: Vec::new() }
        };
        let both = [shifted(&first, 0), shifted(&second, first.policies.len())];
        let mut set = PolicySet::new(None, &both[0]).unwrap();
        let mut maps = Maps::of(&set);
        for (before, now) in [(0, 1), (1, 0), (0, 0), (0, 1)] {
            let mark = set.mark();
            let rewritten = set.claim_anew(&both[now]).unwrap();
            prop_assert!(maps.write(&set, mark, &mut usize::MAX.clone()));
            for (cgroup, claim) in rewritten.claims {
                maps.cgroups.insert(cgroup.id, claim);
            }
            for id in rewritten.forgotten {
                prop_assert!(maps.cgroups.remove(&id).is_some());
            }
            prop_assert_eq!(maps.all(true), all_meant(&both[now]));
            prop_assert_eq!(maps.all(false), all_meant(&both[before]));
            let claims: HashMap<_, _> =
                set.claims().map(|(cgroup, claim)| (cgroup.id, claim)).collect();
            prop_assert_eq!(&maps.cgroups, &claims);
        }
        prop_assert_eq!(set.policies(Mark::START).count(), maps.policies.len());
    }

    /// Cgroups are made one by one, and writing what they need fails at random.
    /// Those that failed go by the policy above them, the others by their own,
    /// and a second try makes up for it.
    #[test]
    fn cgroups_that_come_one_by_one_are_as_those_that_were_there(
        now in assignments(),
        allowed in vec(option::of(0_usize..8), PATHS.len()),
    ) {
        let none_yet = Assignment { policies: now.policies.clone(), claims: Vec::new(), grants: Vec::new() };
        let mut set = PolicySet::new(None, &none_yet).unwrap();
        let mut maps = Maps::of(&set);
        let mut known = none_yet;
        let mut failed = Vec::new();
        for (claim, allowed) in now.claims.iter().zip(allowed) {
            let mark = set.mark();
            let new = set.claim_for(&claim.cgroup, &claim.policies).unwrap().unwrap();
            if maps.write(&set, mark, &mut allowed.unwrap_or(usize::MAX)) {
                maps.cgroups.insert(new.cgroup.id, new.claim);
                set.add(&new);
                known.claims.push(claim.clone());
            } else {
                set.abandon(mark);
                failed.push(claim);
            }
            prop_assert_eq!(maps.all(true), all_meant(&known));
        }
        // A cgroup below one that failed has been claimed with what was above then,
        // so whoever tries again builds the set anew.
        if failed.is_empty() {
            prop_assert_eq!(maps.all(true), all_meant(&now));
            for claim in &now.claims {
                prop_assert_eq!(set.claim_for(&claim.cgroup, &claim.policies).unwrap(), None);
            }
        }
        for claim in &now.claims {
            set.remove(&claim.cgroup);
            prop_assert!(!set.has_claim_of(&claim.cgroup));
        }
        prop_assert_eq!(set.claims().count(), 0);
    }
}

proptest! {
    #[test]
    fn other_values_are_found_where_the_earlier_ones_were(mut assignment in assignments()) {
        let mut set = PolicySet::new(None, &assignment).unwrap();
        let before = Maps::of(&set);
        let mut values = Vec::new();
        for (index, assigned) in assignment.policies.iter_mut().enumerate() {
            assigned.policy.idle = Range::default_only(100 + assigned.policy.idle.default);
            values.push((index, assigned.policy));
        }
        let mark = set.mark();
        let replaced: Vec<_> = set.replacing(&values).collect();
        for (slot, policy) in replaced {
            set.replace(slot, policy);
        }
        prop_assert_eq!(set.policies(mark).count(), 0);
        let after = Maps::of(&set);
        prop_assert_eq!(after.all(true), all_meant(&assignment));
        prop_assert_eq!(&after.cgroups, &before.cgroups);
        // What comes later goes by them too.
        let new = set.claim_for(&at("/a/b/c/d"), &[]).unwrap();
        prop_assert!(new.is_some());
        prop_assert_eq!(set.policies(mark).count(), 0);
    }
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
        policies: vec![assigned(2, Some("10.0.0.0/8"))],
        claims,
        grants: Vec::new(),
    };
    let error = PolicySet::new(None, &next).unwrap_err();
    assert!(error.to_string().contains("more than 8 cgroups"), "{error}");
    let deepest = next.claims.pop().unwrap();
    let mut set = PolicySet::new(None, &next).unwrap();
    let claim = set.claim(&deepest.cgroup.path);
    assert_eq!(set.steps_from(claim.now), MAX_STEPS);
    let error = set.claim_for(&deepest.cgroup, &[0]).unwrap_err();
    assert!(
        error.to_string().contains(&deepest.cgroup.path.to_string()),
        "{error}"
    );
}

#[test]
fn a_cgroup_made_again_is_another_one() {
    let mut set = PolicySet::new(None, &one("/a", 1, None)).unwrap();
    let mut again = at("/a");
    again.id += 1;
    let new = set.claim_for(&again, &[0]).unwrap().unwrap();
    set.add(&new);
    assert_eq!(set.claim_for(&again, &[0]).unwrap(), None);
    // The event of the first one's end may come late.
    set.remove(&at("/a"));
    assert!(set.has_claim_of(&again));
}

#[test]
fn a_cgroup_that_comes_later_had_the_policy_above() {
    let mut now = one("/a", 1, None);
    now.policies.push(assigned(2, None));
    let mut set = PolicySet::new(Some(&one("/a", 3, None)), &now).unwrap();
    let above = set.claim(&"/a".into());
    let cgroup = at("/a/b");
    let new = set.claim_for(&cgroup, &[1]).unwrap().unwrap();
    assert_eq!(new.claim.before, above.now);
    set.add(&new);
    assert_eq!(set.claim(&cgroup.path), new.claim);
    let settled = |claim: Claim| Claim {
        before: claim.now,
        ..claim
    };
    let claims = [(at("/a"), settled(above)), (cgroup, settled(new.claim))];
    assert_eq!(set.settle().claims, claims);
    assert_eq!(set.claims().collect::<Vec<_>>(), claims);
    assert_eq!(set.settle().claims, []);
    // And one that comes after that.
    let later = at("/b");
    let new = set.claim_for(&later, &[1]).unwrap().unwrap();
    assert_eq!(new.claim.before, Target::UNCLAIMED);
    set.add(&new);
    assert_eq!(set.claim(&later.path), new.claim);
    assert_eq!(set.settle().claims, [(later, settled(new.claim))]);
}

/// What only was claimed before is looked for above when the sweep is over: a claim of
/// its own would hide what comes there.
#[test]
fn what_claims_nothing_any_more_is_forgotten() {
    let mut both = one("/a", 1, None);
    both.claims.extend(one("/b", 1, None).claims);
    let mut set = PolicySet::new(Some(&both), &one("/a", 1, None)).unwrap();
    let settled = set.settle();
    assert_eq!(settled.claims, []);
    assert_eq!(settled.forgotten, [at("/b").id]);
}

/// A cgroup that was made while the set was built went by the policies before.
#[test]
fn what_came_while_a_set_was_built_was_claimed_before() {
    let mut set = PolicySet::new(Some(&one("/a", 1, None)), &one("/a", 3, None)).unwrap();
    let late = at("/late");
    set.claimed_before(&late, &[0]).unwrap();
    let new = set.claim_for(&late, &[0]).unwrap().unwrap();
    assert_eq!(new.claim, set.claim(&"/a".into()));
    set.add(&new);
    assert_eq!(set.claim(&late.path), new.claim);
    // One that claims nothing by itself.
    set.withdraw(&late);
    assert_eq!(set.claim(&late.path).now, Target::UNCLAIMED);
    assert_eq!(set.claim(&late.path).before, new.claim.before);
}

#[test]
fn a_policy_that_stays_keeps_one_slot() {
    let same = one("/a", 1, None);
    let set = PolicySet::new(Some(&same), &same).unwrap();
    let claim = set.claim(&"/a".into());
    assert_eq!(claim.now, claim.before);
    assert_eq!(set.policies(Mark::START).count(), 1);
}
