//! What holds for every policy and every socket.

use proptest::prelude::*;

use super::*;
use crate::policy::{
    Keepalive, MAX_PROBES, MAX_RTO_MAX, MAX_SECONDS, MAX_USER_TIMEOUT, MIN_RTO_MAX, time_to_notice,
};

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
        Just(Keepalive::Always),
        Just(Keepalive::Off),
        Just(Keepalive::Never),
    ]
}

prop_compose! {
    pub(crate) fn policies()(
        keepalive in keepalive(),
        derive: bool,
        at_least: bool,
        sysctls: [bool; 3],
        idle in range(MAX_SECONDS),
        interval in range(MAX_SECONDS),
        probes in range(MAX_PROBES),
        user_timeout in range(MAX_USER_TIMEOUT),
        give_up in set(300_000),
    ) -> Policy {
        let mut policy = Policy::BUILT_IN
            .with_keepalive(keepalive)
            .with_derived_user_timeout(derive)
            .with_derived_at_least(at_least)
            .with_sysctl(SysctlTimer::Idle, sysctls[0])
            .with_sysctl(SysctlTimer::Interval, sysctls[1])
            .with_sysctl(SysctlTimer::Probes, sysctls[2]);
        policy.give_up = give_up;
        policy.idle = idle;
        policy.interval = interval;
        policy.probes = probes;
        policy.user_timeout = user_timeout;
        policy
    }
}

/// Half of the sockets have a timer unset, as most real ones do.
pub(super) fn set(max: u32) -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), 1..=max]
}

prop_compose! {
    pub(super) fn sockets()(
        keepalive: bool,
        idle in set(MAX_SECONDS),
        interval in set(MAX_SECONDS),
        probes in set(MAX_PROBES),
        // As long as the other timers can be, and in the order of what real
        // applications set.
        user_timeout in prop_oneof![set(MAX_USER_TIMEOUT), set(300_000)],
        rto_max in prop_oneof![Just(0), MIN_RTO_MAX..=MAX_RTO_MAX],
    ) -> Options {
        Options { keepalive, idle, interval, probes, user_timeout, rto_max }
    }
}

prop_compose! {
    pub(crate) fn environments()(
        idle in 1..=2 * MAX_SECONDS,
        interval in 1..=2 * MAX_SECONDS,
        probes in 1..=255_u32,
        retries in 0..=255_u32,
        rto_max in prop_oneof![Just(0), Just(MAX_RTO_MAX), MIN_RTO_MAX..=MAX_RTO_MAX],
        hz in prop_oneof![Just(100), Just(250), Just(300), Just(1000)],
    ) -> Environment {
        Environment { idle, interval, probes, retries, rto_max, hz }
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
    fn the_short_way_for_what_has_nothing_set_comes_to_the_same(
        policy in policies(),
        here in environments(),
    ) {
        let long = plan(&policy, &Options::default(), &here);
        prop_assert_eq!(plan_unset(&policy, &here), long.wants);
    }

    #[test]
    fn a_second_plan_changes_nothing(
        policy in policies(),
        has in sockets(),
        here in environments(),
    ) {
        let first = plan(&policy, &has, &here);
        prop_assert_eq!(plan(&policy, &first.wants, &here), first);
    }

    #[test]
    fn the_kernel_accepts_every_value_and_no_set_timer_becomes_unset(
        policy in policies(),
        has in sockets(),
        here in environments(),
    ) {
        let wants = plan(&policy, &has, &here).wants;
        for (_, had, want, max) in timers(&policy, &has, &wants) {
            prop_assert!(want <= max);
            prop_assert!(had == 0 || want != 0);
        }
        prop_assert!(wants.rto_max == has.rto_max || here.rto_max != 0);
        prop_assert!(has.rto_max == 0 || wants.rto_max <= has.rto_max);
    }

    #[test]
    fn every_set_timer_is_within_its_bounds(
        policy in policies(),
        has in sockets(),
        here in environments(),
    ) {
        let plan = plan(&policy, &has, &here);
        let timers = timers(&policy, &has, &plan.wants);
        let bounded = if policy.keepalive().turns_off() || plan.user_timeout_conflict {
            &timers[3..]
        } else {
            &timers[..]
        };
        for &(range, _, want, _) in bounded {
            prop_assert!(want == 0 || (range.at_least <= want && want <= range.at_most));
        }
    }

    #[test]
    fn what_is_left_is_not_touched(
        policy in policies(),
        has in sockets(),
        here in environments(),
    ) {
        let mut policy = policy
            .with_keepalive(Keepalive::Leave)
            .with_derived_user_timeout(false)
            .with_derived_at_least(false)
            .with_sysctl(SysctlTimer::Idle, false);
        policy.idle = Range::LEAVE;
        policy.user_timeout = Range::LEAVE;
        policy.give_up = 0;
        let wants = plan(&policy, &has, &here).wants;
        prop_assert_eq!(wants.keepalive, has.keepalive);
        prop_assert_eq!(wants.idle, has.idle);
        prop_assert_eq!(wants.user_timeout, has.user_timeout);
        prop_assert_eq!(wants.rto_max, has.rto_max);
    }

    #[test]
    fn exactly_ignores_the_application(
        policy in policies(),
        has in sockets(),
        here in environments(),
        idle in 1..=MAX_SECONDS,
        user_timeout in 1..=MAX_USER_TIMEOUT,
    ) {
        let mut policy = policy
            .with_keepalive(Keepalive::On)
            .with_derived_user_timeout(false)
            .with_sysctl(SysctlTimer::Idle, false);
        policy.idle = Range::exactly(idle);
        policy.user_timeout = Range::exactly(user_timeout);
        let wants = plan(&policy, &has, &here).wants;
        prop_assert!(wants.keepalive);
        prop_assert_eq!(wants.idle, idle);
        prop_assert_eq!(wants.user_timeout, user_timeout);
    }

    #[test]
    fn an_unbounded_policy_keeps_what_the_application_set(
        has in sockets(),
        here in environments(),
        default in 1..=MAX_PROBES,
    ) {
        let mut policy = Policy::BUILT_IN
            .with_sysctl(SysctlTimer::Idle, false)
            .with_sysctl(SysctlTimer::Interval, false)
            .with_sysctl(SysctlTimer::Probes, false);
        policy.idle = Range::default_only(default);
        policy.interval = Range::default_only(default);
        policy.probes = Range::default_only(default);
        policy.user_timeout = Range::default_only(default);
        let plan = plan(&policy, &has, &here);
        for (_, had, want, _) in timers(&policy, &has, &plan.wants) {
            let conflict = plan.user_timeout_conflict;
            prop_assert_eq!(want, if had == 0 && !conflict { default } else { had });
        }
    }

    #[test]
    fn the_built_in_policy_never_loosens(has in sockets(), here in environments()) {
        let wants = plan(&Policy::BUILT_IN, &has, &here).wants;
        let (without, with) = (here.complete(&has), here.complete(&wants));
        prop_assert!(with.keepalive >= without.keepalive);
        prop_assert!(with.idle <= without.idle);
        prop_assert!(with.interval <= without.interval);
        prop_assert!(with.probes <= without.probes);
    }

    #[test]
    fn a_derived_user_timeout_ends_nothing_early(has in sockets(), here in environments()) {
        let timers = here.complete(&has);
        let derived = derived_user_timeout(&timers, here.hz);
        let timers = Options { user_timeout: derived, ..timers };
        prop_assert!(!ends_early(&timers, here.hz) || derived == MAX_USER_TIMEOUT);
        prop_assert!(derived >= time_to_notice(timers.idle, timers.interval, timers.probes));
    }
}
