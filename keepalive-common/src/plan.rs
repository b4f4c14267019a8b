//! Plan: what has to be set on a socket so that its policy holds.

use crate::{
    counters::SocketOption,
    policy::{Keepalive, Policy, time_to_notice},
};

/// The keepalive options of a socket, as the kernel has them or as they should
/// be. A timer of 0 is unset: the namespace's sysctl rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// SO_KEEPALIVE.
    pub keepalive: bool,
    /// TCP_KEEPIDLE in seconds.
    pub idle: u32,
    /// TCP_KEEPINTVL in seconds.
    pub interval: u32,
    /// TCP_KEEPCNT.
    pub probes: u32,
    /// TCP_USER_TIMEOUT in milliseconds.
    pub user_timeout: u32,
}

impl Options {
    /// One of them, as setsockopt takes it.
    #[must_use]
    #[inline(always)]
    pub const fn get(&self, option: SocketOption) -> u32 {
        match option {
            SocketOption::Keepalive => self.keepalive as u32,
            SocketOption::Idle => self.idle,
            SocketOption::Interval => self.interval,
            SocketOption::Probes => self.probes,
            SocketOption::UserTimeout => self.user_timeout,
        }
    }

    /// Whether any timer is set.
    #[must_use]
    #[inline(always)]
    pub const fn has_timers(&self) -> bool {
        self.idle | self.interval | self.probes | self.user_timeout != 0
    }
}

/// The options as they should be: those that differ from what the socket `has`
/// are to be set, the others need no call.
///
/// The plan never asks for a set timer to become unset, which the kernel could
/// not do, and a second plan on its result changes nothing.
#[must_use]
#[inline(always)]
pub fn plan(policy: &Policy, has: &Options) -> Options {
    let mut wants = *has;
    let keepalive = policy.keepalive();
    if keepalive == Keepalive::Off {
        wants.keepalive = false;
    } else {
        wants.keepalive |= keepalive == Keepalive::On;
        wants.idle = policy.idle.effective(has.idle);
        wants.interval = policy.interval.effective(has.interval);
        wants.probes = policy.probes.effective(has.probes);
    }
    let mut user_timeout = policy.user_timeout;
    if policy.derives_user_timeout() {
        user_timeout.default = derived(keepalive, &wants);
    }
    wants.user_timeout = user_timeout.effective(has.user_timeout);
    wants
}

/// The user-timeout that follows from the other timers; none where keepalive is
/// off, or where one of them is unset and so not known here.
#[inline(always)]
fn derived(keepalive: Keepalive, wants: &Options) -> u32 {
    if keepalive == Keepalive::Off || wants.idle == 0 || wants.interval == 0 || wants.probes == 0 {
        return 0;
    }
    time_to_notice(wants.idle, wants.interval, wants.probes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Range;

    const NOTHING_SET: Options = Options {
        keepalive: false,
        idle: 0,
        interval: 0,
        probes: 0,
        user_timeout: 0,
    };

    #[test]
    fn the_built_in_policy_turns_keepalive_on_and_fills_the_timers() {
        assert_eq!(
            plan(&Policy::BUILT_IN, &NOTHING_SET),
            Options {
                keepalive: true,
                idle: 60,
                interval: 10,
                probes: 6,
                user_timeout: 0,
            }
        );
    }

    #[test]
    fn what_the_application_set_stays_where_nothing_bounds_it() {
        let has = Options {
            keepalive: true,
            idle: 7200,
            interval: 75,
            probes: 9,
            user_timeout: 5000,
        };
        assert_eq!(plan(&Policy::BUILT_IN, &has), has);
    }

    #[test]
    fn off_turns_keepalive_off_and_leaves_its_timers() {
        let policy = Policy::BUILT_IN
            .with_keepalive(Keepalive::Off)
            .with_derived_user_timeout(true);
        let has = Options {
            keepalive: true,
            idle: 5,
            ..NOTHING_SET
        };
        let wants = Options {
            keepalive: false,
            ..has
        };
        assert_eq!(plan(&policy, &has), wants);
    }

    #[test]
    fn leave_shapes_the_timers_for_an_application_that_asks_later() {
        let policy = Policy::BUILT_IN.with_keepalive(Keepalive::Leave);
        for keepalive in [false, true] {
            let has = Options {
                keepalive,
                ..NOTHING_SET
            };
            let wants = plan(&policy, &has);
            assert_eq!(wants.keepalive, keepalive);
            assert_eq!((wants.idle, wants.interval, wants.probes), (60, 10, 6));
        }
    }

    #[test]
    fn a_derived_user_timeout_follows_the_effective_timers() {
        let policy = Policy::BUILT_IN.with_derived_user_timeout(true);
        assert_eq!(plan(&policy, &NOTHING_SET).user_timeout, 120_000);
        let has = Options {
            idle: 100,
            ..NOTHING_SET
        };
        assert_eq!(plan(&policy, &has).user_timeout, 160_000);
        let has = Options {
            user_timeout: 7,
            ..NOTHING_SET
        };
        assert_eq!(plan(&policy, &has).user_timeout, 7);
    }

    #[test]
    fn a_derived_user_timeout_keeps_its_bounds() {
        let mut policy = Policy::BUILT_IN.with_derived_user_timeout(true);
        policy.user_timeout.at_most = 90_000;
        assert_eq!(plan(&policy, &NOTHING_SET).user_timeout, 90_000);
    }

    #[test]
    fn nothing_is_derived_from_a_timer_that_stays_unset() {
        let mut policy = Policy::BUILT_IN.with_derived_user_timeout(true);
        policy.probes = Range::LEAVE;
        assert_eq!(plan(&policy, &NOTHING_SET).user_timeout, 0);
    }
}

#[cfg(test)]
mod properties {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::{MAX_PROBES, MAX_SECONDS, MAX_USER_TIMEOUT, Range};

    /// Ranges that a config can hold: at-least ≤ at-most, no default or one.
    fn range(max: u32) -> impl Strategy<Value = Range> {
        prop_oneof![
            Just(Range::LEAVE),
            (1..=max).prop_map(Range::default_only),
            (1..=max).prop_map(Range::exactly),
            (0..=max, 1..=max, 1..=max).prop_map(|(default, a, b)| Range {
                default,
                at_least: a.min(b),
                at_most: a.max(b),
            }),
        ]
    }

    fn keepalive() -> impl Strategy<Value = Keepalive> {
        prop_oneof![
            Just(Keepalive::Leave),
            Just(Keepalive::On),
            Just(Keepalive::Off)
        ]
    }

    prop_compose! {
        fn policies()(
            keepalive in keepalive(),
            derive: bool,
            idle in range(MAX_SECONDS),
            interval in range(MAX_SECONDS),
            probes in range(MAX_PROBES),
            user_timeout in range(MAX_USER_TIMEOUT),
        ) -> Policy {
            let mut policy = Policy::BUILT_IN
                .with_keepalive(keepalive)
                .with_derived_user_timeout(derive);
            policy.idle = idle;
            policy.interval = interval;
            policy.probes = probes;
            policy.user_timeout = user_timeout;
            policy
        }
    }

    /// Half of the sockets have a timer unset, as most real ones do.
    fn set(max: u32) -> impl Strategy<Value = u32> {
        prop_oneof![Just(0), 1..=max]
    }

    prop_compose! {
        fn sockets()(
            keepalive: bool,
            idle in set(MAX_SECONDS),
            interval in set(MAX_SECONDS),
            probes in set(MAX_PROBES),
            user_timeout in set(MAX_USER_TIMEOUT),
        ) -> Options {
            Options { keepalive, idle, interval, probes, user_timeout }
        }
    }

    /// Each timer with its range and what it was before and after.
    fn timers(policy: &Policy, has: &Options, wants: &Options) -> [(Range, u32, u32, u32); 4] {
        [
            (policy.idle, has.idle, wants.idle, MAX_SECONDS),
            (policy.interval, has.interval, wants.interval, MAX_SECONDS),
            (policy.probes, has.probes, wants.probes, MAX_PROBES),
            (
                policy.user_timeout,
                has.user_timeout,
                wants.user_timeout,
                MAX_USER_TIMEOUT,
            ),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn a_second_plan_changes_nothing(policy in policies(), has in sockets()) {
            let wants = plan(&policy, &has);
            prop_assert_eq!(plan(&policy, &wants), wants);
        }

        #[test]
        fn the_kernel_accepts_every_value_and_no_set_timer_becomes_unset(
            policy in policies(),
            has in sockets(),
        ) {
            let wants = plan(&policy, &has);
            for (_, had, want, max) in timers(&policy, &has, &wants) {
                prop_assert!(want <= max);
                prop_assert!(had == 0 || want != 0);
            }
        }

        #[test]
        fn every_set_timer_is_within_its_bounds(policy in policies(), has in sockets()) {
            let wants = plan(&policy, &has);
            let timers = timers(&policy, &has, &wants);
            let bounded = if policy.keepalive() == Keepalive::Off {
                &timers[3..]
            } else {
                &timers[..]
            };
            for &(range, _, want, _) in bounded {
                prop_assert!(want == 0 || (range.at_least <= want && want <= range.at_most));
            }
        }

        #[test]
        fn what_is_left_is_not_touched(policy in policies(), has in sockets()) {
            let mut policy = policy
                .with_keepalive(Keepalive::Leave)
                .with_derived_user_timeout(false);
            policy.idle = Range::LEAVE;
            policy.user_timeout = Range::LEAVE;
            let wants = plan(&policy, &has);
            prop_assert_eq!(wants.keepalive, has.keepalive);
            prop_assert_eq!(wants.idle, has.idle);
            prop_assert_eq!(wants.user_timeout, has.user_timeout);
        }

        #[test]
        fn exactly_ignores_the_application(
            policy in policies(),
            has in sockets(),
            idle in 1..=MAX_SECONDS,
            user_timeout in 1..=MAX_USER_TIMEOUT,
        ) {
            let mut policy = policy.with_keepalive(Keepalive::On);
            policy.idle = Range::exactly(idle);
            policy.user_timeout = Range::exactly(user_timeout);
            let wants = plan(&policy, &has);
            prop_assert!(wants.keepalive);
            prop_assert_eq!(wants.idle, idle);
            // Derived or not: the bounds of `exactly` leave one value.
            prop_assert!(wants.user_timeout == user_timeout || policy.derives_user_timeout() && wants.user_timeout == 0);
        }

        #[test]
        fn an_unbounded_policy_keeps_what_the_application_set(
            has in sockets(),
            default in 1..=MAX_PROBES,
        ) {
            let mut policy = Policy::BUILT_IN;
            policy.idle = Range::default_only(default);
            policy.interval = Range::default_only(default);
            policy.probes = Range::default_only(default);
            policy.user_timeout = Range::default_only(default);
            let wants = plan(&policy, &has);
            for (_, had, want, _) in timers(&policy, &has, &wants) {
                prop_assert_eq!(want, if had == 0 { default } else { had });
            }
        }
    }
}
