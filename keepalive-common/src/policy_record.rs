//! Policy record: a policy as it stands in the kernel, with what it makes of most
//! sockets.

use crate::{
    environment::Environment,
    plan::{Options, Words, plan_unset},
    policy::Policy,
};

/// A policy, and what it gives to a socket on which nothing is set, so that new
/// connections of most applications need no plan of their own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyRecord {
    // What is needed for every new connection stands together: the policy begins
    // with its flags.
    unset: Words,
    holds_for: u32,
    /// As [`Policy::for_kernel`].
    pub policy: Policy,
}

/// What stands in `unset` holds for no socket: there is more to do than to give
/// something, or something to count.
const NONE: u32 = 0;
/// It holds in every namespace.
const ALL: u32 = 1;
/// It holds where the sysctls of keepalive are what the kernel begins with.
const UNCHANGED: u32 = 2;

impl PolicyRecord {
    /// That of a policy.
    #[must_use]
    pub fn of(policy: &Policy) -> Self {
        let policy = policy.for_kernel();
        let holds_for = if !policy.only_gives() || policy.give_up != 0 {
            NONE
        } else if policy.depends_on_namespace() {
            UNCHANGED
        } else {
            ALL
        };
        Self {
            unset: Words::of(&plan_unset(&policy, &Environment::UNCHANGED)),
            policy,
            holds_for,
        }
    }

    /// Whether [`Self::unset`] is what the policy wants of a socket on which nothing
    /// is set, in a namespace of which the argument tells whether its sysctls of
    /// keepalive are those of [`Environment::UNCHANGED`].
    #[must_use]
    #[inline(always)]
    pub fn spares_plan(&self, is_unchanged: impl FnOnce() -> bool) -> bool {
        match self.holds_for {
            ALL => true,
            UNCHANGED => is_unchanged(),
            _ => false,
        }
    }

    /// What the policy wants of a socket on which nothing is set.
    #[must_use]
    #[inline(always)]
    pub const fn unset(&self) -> Options {
        self.unset.options()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        plan::{
            plan,
            properties::{environments, policies},
        },
        policy::Range,
    };

    /// Policies of which every other one bounds nothing: of those made at random
    /// hardly any does not.
    fn often_unbounded() -> impl Strategy<Value = Policy> {
        let defaults = |range: Range| Range::default_only(range.default);
        let unbounded = policies().prop_map(move |policy| {
            let mut policy = policy
                .with_derived_user_timeout(false)
                .with_derived_at_least(false);
            policy.idle = defaults(policy.idle);
            policy.interval = defaults(policy.interval);
            policy.probes = defaults(policy.probes);
            policy.user_timeout = defaults(policy.user_timeout);
            policy
        });
        prop_oneof![policies(), unbounded]
    }

    #[test]
    fn most_policies_spare_the_plan_of_most_sockets() {
        let built_in = PolicyRecord::of(&Policy::BUILT_IN);
        assert!(built_in.spares_plan(|| true) && !built_in.spares_plan(|| false));
        let unset = Options {
            keepalive: true,
            idle: 60,
            interval: 10,
            probes: 6,
            ..Options::default()
        };
        assert_eq!(built_in.unset(), unset);
        assert!(PolicyRecord::of(&Policy::LEAVE).spares_plan(|| false));
    }

    #[test]
    fn the_record_has_no_padding() {
        let numbers = size_of::<Words>() + 4;
        assert_eq!(size_of::<PolicyRecord>(), size_of::<Policy>() + numbers);
    }

    proptest! {
        #[test]
        fn what_spares_the_plan_is_what_it_would_be(
            policy in often_unbounded(),
            sysctls in environments(),
            is_unchanged in any::<bool>(),
        ) {
            let usual = Environment::UNCHANGED;
            let environment = if is_unchanged {
                Environment {
                    idle: usual.idle,
                    interval: usual.interval,
                    probes: usual.probes,
                    ..sysctls
                }
            } else {
                sysctls
            };
            let is_unchanged = (environment.idle, environment.interval, environment.probes)
                == (usual.idle, usual.interval, usual.probes);
            let record = PolicyRecord::of(&policy);
            if record.spares_plan(|| is_unchanged) {
                let planned = plan(&policy, &Options::default(), &environment);
                prop_assert_eq!(record.unset(), planned.wants);
                prop_assert!(!planned.user_timeout_conflict);
                prop_assert!(policy.sets_anything() && !policy.has_bounds());
            }
        }
    }
}
