//! Policy record: a policy as it stands in the kernel, with what it makes of most
//! sockets.

use crate::{counters::SocketOption, environment::Environment, plan::plan_unset, policy::Policy};

/// A policy, and what it gives to a socket on which nothing is set, so that new
/// connections of most applications need no plan of their own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyRecord {
    // What is needed for every new connection stands together: the policy begins
    // with its flags.
    settings: [Setting; MOST],
    /// How many of them are timers.
    timers: u32,
    /// How many turn keepalive on: one, after the timers, or none.
    turn_on: u32,
    holds_for: u32,
    /// As [`Policy::for_kernel`].
    pub policy: Policy,
}

/// TCP_RTO_MAX_MS is none of them: a policy with it has a plan for each socket.
const MOST: usize = SocketOption::ALL.len() - 1;

/// An option and its value, as setsockopt takes them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// Level.
    pub level: u16,
    /// The option's number.
    pub name: u16,
    /// Value.
    pub value: u32,
}

impl Setting {
    fn of(option: SocketOption, value: u32) -> Self {
        let (level, name) = option.level_and_number();
        // Levels and numbers are small.
        let short = |number: i32| u16::try_from(number).unwrap_or_default();
        Self {
            level: short(level),
            name: short(name),
            value,
        }
    }
}

/// Of each slot there are two policies: the one that is in force, and what it was before
/// the last change or still is. The last bit of one number says which is which for all of
/// them, so that any number of policies change in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Edition(u32);

impl Edition {
    /// How many there are.
    pub const COUNT: u32 = 2;

    /// One and the other.
    pub const BOTH: [Self; 2] = [Self(0), Self(1)];

    /// The one that a number tells.
    #[must_use]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "its last bit")]
    pub const fn of(number: u64) -> Self {
        Self(number as u32 & 1)
    }

    /// Where the policy of a slot stands, in the map of all.
    #[must_use]
    #[inline(always)]
    pub const fn place(self, slot: u32) -> u32 {
        slot << 1 | self.0
    }

    /// The one that is not in force.
    #[must_use]
    #[inline(always)]
    pub const fn other(self) -> Self {
        Self(self.0 ^ 1)
    }

    /// The number that tells the other one, and is the same but for that.
    #[must_use]
    pub const fn toggled(number: u64) -> u64 {
        number ^ 1
    }
}

/// What stands in `settings` holds for no socket: there is more to do than to give
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
        /// The timers come first, so that SO_KEEPALIVE arms the first probe with
        /// the new idle time, once.
        const ORDER: [SocketOption; MOST] = [
            SocketOption::Idle,
            SocketOption::Interval,
            SocketOption::Probes,
            SocketOption::UserTimeout,
            SocketOption::Keepalive,
        ];
        let policy = policy.for_kernel();
        let holds_for = if !policy.only_gives() || policy.give_up != 0 {
            NONE
        } else if policy.depends_on_namespace() {
            UNCHANGED
        } else {
            ALL
        };
        let wants = plan_unset(&policy, &Environment::UNCHANGED);
        let mut settings = [Setting::default(); MOST];
        let mut number = 0;
        let given = ORDER.into_iter().filter(|option| wants.get(*option) != 0);
        for (setting, option) in settings.iter_mut().zip(given) {
            *setting = Setting::of(option, wants.get(option));
            number += 1;
        }
        let turn_on = u32::from(wants.keepalive);
        Self {
            settings,
            timers: number - turn_on,
            turn_on,
            holds_for,
            policy,
        }
    }

    /// Whether [`Self::settings`] is what the policy wants of a socket on which nothing
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

    /// What the policy gives to a socket on which nothing is set, in this order.
    #[inline(always)]
    pub fn settings(&self) -> impl Iterator<Item = &Setting> {
        let number = self.timers + self.turn_on;
        let numbered = (0..).zip(&self.settings);
        numbered
            .take_while(move |(index, _)| *index < number)
            .map(|(_, setting)| setting)
    }

    /// How many of [`Self::settings`] are timers.
    #[must_use]
    #[inline(always)]
    pub const fn timers(&self) -> u32 {
        self.timers
    }

    /// How many of [`Self::settings`] turn keepalive on: one or none.
    #[must_use]
    #[inline(always)]
    pub const fn turn_on(&self) -> u32 {
        self.turn_on
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        plan::{
            Options, plan,
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
        let given: Vec<Setting> = built_in.settings().copied().collect();
        let expected = [
            (SocketOption::Idle, 60),
            (SocketOption::Interval, 10),
            (SocketOption::Probes, 6),
            (SocketOption::Keepalive, 1),
        ];
        assert_eq!(
            given,
            expected.map(|(option, value)| Setting::of(option, value))
        );
        assert_eq!((built_in.timers(), built_in.turn_on()), (3, 1));
        let leave = PolicyRecord::of(&Policy::LEAVE);
        assert!(leave.spares_plan(|| false));
        assert_eq!(leave.settings().count(), 0);
    }

    #[test]
    fn the_policies_of_two_slots_or_editions_do_not_share_a_place() {
        let editions = [Edition::of(0), Edition::of(1)];
        let places = (0..3).flat_map(|slot| editions.map(|edition| edition.place(slot)));
        assert_eq!(places.collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        for number in [0, 1, 6, u64::MAX] {
            let toggled = Edition::toggled(number);
            assert_eq!(Edition::of(toggled), Edition::of(number).other());
            assert_eq!(toggled >> 1, number >> 1);
        }
    }

    #[test]
    fn the_record_has_no_padding() {
        assert_eq!(size_of::<Setting>(), 2 + 2 + 4);
        let settings = MOST * size_of::<Setting>();
        assert_eq!(
            size_of::<PolicyRecord>(),
            settings + 3 * 4 + size_of::<Policy>()
        );
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
                let mut given = Options::default();
                for setting in record.settings() {
                    let place = match (setting.level, setting.name) {
                        (6, 4) => &mut given.idle,
                        (6, 5) => &mut given.interval,
                        (6, 6) => &mut given.probes,
                        (6, 18) => &mut given.user_timeout,
                        (1, 9) => {
                            // Armed with the timers before it.
                            prop_assert!(!given.keepalive && setting.value == 1);
                            given.keepalive = true;
                            continue;
                        }
                        other => panic!("{other:?}"),
                    };
                    prop_assert!(*place == 0 && !given.keepalive);
                    *place = setting.value;
                }
                prop_assert_eq!(given, planned.wants);
                prop_assert_eq!(record.turn_on(), u32::from(given.keepalive));
                let number = record.timers() + record.turn_on();
                prop_assert_eq!(record.settings().count(), number as usize);
                prop_assert!(!planned.user_timeout_conflict);
                prop_assert!(policy.sets_anything() && !policy.has_bounds());
            }
        }
    }
}
