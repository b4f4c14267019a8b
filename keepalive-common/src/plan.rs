//! Plan: what has to be set on a socket so that its policy holds.
#![expect(unsafe_code, reason = "a global function of BPF takes pointers")]

use crate::{
    counters::SocketOption,
    environment::{Environment, or},
    policy::{Policy, Range, SysctlTimer, stricter},
    timers::{self, rto_max_for},
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
    /// TCP_RTO_MAX_MS in milliseconds; 0 where it is that of the namespace, or
    /// the kernel knows none.
    pub rto_max: u32,
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
            SocketOption::RtoMax => self.rto_max,
        }
    }

    /// Whether any timer is set.
    #[must_use]
    #[inline(always)]
    pub const fn has_timers(&self) -> bool {
        self.idle | self.interval | self.probes | self.user_timeout | self.rto_max != 0
    }
}

/// [`Options`] in memory without gaps, as a global function of BPF takes them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Words {
    keepalive: u32,
    idle: u32,
    interval: u32,
    probes: u32,
    user_timeout: u32,
    rto_max: u32,
}

impl Words {
    #[inline(always)]
    pub(crate) const fn of(options: &Options) -> Self {
        Self {
            keepalive: options.keepalive as u32,
            idle: options.idle,
            interval: options.interval,
            probes: options.probes,
            user_timeout: options.user_timeout,
            rto_max: options.rto_max,
        }
    }

    #[inline(always)]
    pub(crate) const fn options(&self) -> Options {
        Options {
            keepalive: self.keepalive != 0,
            idle: self.idle,
            interval: self.interval,
            probes: self.probes,
            user_timeout: self.user_timeout,
            rto_max: self.rto_max,
        }
    }
}

/// What is to become of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The options as they should be: those that differ from what the socket has
    /// are to be set, the others need no call.
    pub wants: Options,
    /// Keepalive and its timers stay as the application has them, because its
    /// user-timeout would end the connection after fewer unanswered probes than
    /// the policy says.
    pub user_timeout_conflict: bool,
}

/// What a policy makes of a socket that `has` these options.
///
/// The plan never asks for a set timer to become unset, which the kernel could
/// not do, and a second plan on its result changes nothing.
///
/// It is never worse than no plan: a connection that lives through an outage
/// without it lives through it with it, if the outage is shorter than
/// interval × (probes − 1) and the policy writes no user-timeout of its own.
#[must_use]
#[inline(always)]
pub fn plan(policy: &Policy, has: &Options, environment: &Environment) -> Plan {
    let has = Words::of(has);
    let mut wants = has;
    let conflict = apply(policy, environment, &raw const has, &raw mut wants);
    Plan {
        wants: wants.options(),
        user_timeout_conflict: conflict != 0,
    }
}

/// What a policy makes of a socket on which nothing is set, as [`plan`].
#[must_use]
pub fn plan_unset(policy: &Policy, environment: &Environment) -> Options {
    let mut wants = Words::of(&Options::default());
    shape(policy, environment, &mut wants);
    wants.options()
}

/// Makes of what a socket has what a policy wants; 1 where its user-timeout
/// stands against keepalive. `wants` is what it has before.
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[inline(never)]
extern "C" fn apply(
    policy: *const Policy,
    environment: *const Environment,
    has: *const Words,
    wants: *mut Words,
) -> u32 {
    // SAFETY: what `plan` borrows, and what the verifier makes sure of.
    let (policy, environment, has, wants) = unsafe {
        (
            policy.as_ref(),
            environment.as_ref(),
            has.as_ref(),
            wants.as_mut(),
        )
    };
    let (Some(policy), Some(environment), Some(has), Some(wants)) =
        (policy, environment, has, wants)
    else {
        return 0;
    };
    let given = shape(policy, environment, wants);
    // What the policy itself gives to everyone is its own word.
    let is_foreign = has.user_timeout != 0 && wants.user_timeout != given;
    let is_changed = wants.keepalive != has.keepalive
        || wants.idle != has.idle
        || wants.interval != has.interval
        || wants.probes != has.probes;
    if !is_foreign || !is_changed || policy.keepalive().turns_off() {
        return 0;
    }
    let ends_early = timers::user_timeout_ends_early(
        or(wants.idle, environment.idle),
        or(wants.interval, environment.interval),
        or(wants.probes, environment.probes),
        wants.user_timeout,
        environment.hz,
    );
    if ends_early != 0 {
        wants.keepalive = has.keepalive;
        wants.idle = has.idle;
        wants.interval = has.interval;
        wants.probes = has.probes;
    }
    ends_early
}

/// The formula, timer by timer; returns the user-timeout that a socket with these
/// timers gets whose application set none.
#[inline(always)]
fn shape(policy: &Policy, environment: &Environment, options: &mut Words) -> u32 {
    if policy.ignores() {
        return options.user_timeout;
    }
    let keepalive = policy.keepalive();
    options.keepalive = keepalive.applied_to(options.keepalive != 0).into();
    if !keepalive.turns_off() {
        let (idle, interval, probes) = environment.as_timers();
        let timer = |timer, range: &Range, has, sysctl| {
            let sysctl = if policy.heeds_sysctl(timer) {
                sysctl
            } else {
                0
            };
            range.effective_beside(sysctl, has)
        };
        options.idle = timer(SysctlTimer::Idle, &policy.idle, options.idle, idle);
        options.interval = timer(
            SysctlTimer::Interval,
            &policy.interval,
            options.interval,
            interval,
        );
        options.probes = timer(SysctlTimer::Probes, &policy.probes, options.probes, probes);
    }
    if policy.give_up != 0 && environment.rto_max != 0 {
        let rto_max = rto_max_for(policy.give_up, environment.retries);
        if rto_max < environment.rto_max {
            options.rto_max = stricter(options.rto_max, rto_max);
        }
    }
    let range = user_timeout_range(policy, options, environment);
    options.user_timeout = range.effective_beside(0, options.user_timeout);
    range.effective_beside(0, 0)
}

/// The range of the user-timeout, with what is derived from these timers.
#[inline(always)]
fn user_timeout_range(policy: &Policy, options: &Words, environment: &Environment) -> Range {
    let mut range = policy.user_timeout;
    if !(policy.derives_user_timeout() || policy.derives_at_least()) {
        return range;
    }
    let derived = if policy.keepalive().turns_off() {
        0
    } else {
        timers::user_timeout(
            or(options.idle, environment.idle),
            or(options.interval, environment.interval),
            or(options.probes, environment.probes),
            environment.hz,
        )
    };
    if policy.derives_user_timeout() {
        range.default = derived;
    }
    if policy.derives_at_least() {
        range.at_least = range.at_least.max(derived.min(range.at_most));
    }
    range
}

/// The user-timeout with which a peer is given up after as many unanswered
/// probes as without one, in milliseconds: idle + interval × probes. Where the
/// kernel's timers can be so late that this comes after fewer, the next whole
/// second that is enough. 0 where one of the timers is not known.
#[must_use]
#[inline(always)]
pub fn derived_user_timeout(timers: &Options, hz: u32) -> u32 {
    timers::user_timeout(timers.idle, timers.interval, timers.probes, hz)
}

/// Whether the user-timeout ends a silent connection before as many probes were
/// lost as `probes` says.
///
/// The kernel's timer fires after the idle time and then after every interval
/// ([`timers::latest_probe`]).
/// Each firing sends a probe, unless it ends the connection: without a
/// user-timeout when as many probes are out as TCP_KEEPCNT says, with one when
/// any probe is out and the silence is as long (`tcp_keepalive_timer` in
/// net/ipv4/tcp_timer.c). So the firing that would send the last of the probes
/// must not find the silence long enough. With a single probe the second firing
/// ends it in either case.
#[must_use]
#[inline(always)]
pub fn ends_early(timers: &Options, hz: u32) -> bool {
    let Options {
        idle,
        interval,
        probes,
        user_timeout,
        ..
    } = *timers;
    timers::user_timeout_ends_early(idle, interval, probes, user_timeout, hz) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Keepalive, MAX_PROBES, MAX_SECONDS, MAX_USER_TIMEOUT};

    const NOTHING_SET: Options = Options {
        keepalive: false,
        idle: 0,
        interval: 0,
        probes: 0,
        user_timeout: 0,
        rto_max: 0,
    };
    const HERE: Environment = Environment::UNCHANGED;

    fn wants(policy: &Policy, has: &Options) -> Options {
        plan(policy, has, &HERE).wants
    }

    #[test]
    fn every_option_is_the_one_that_setsockopt_sets() {
        let options = Options {
            keepalive: true,
            idle: 2,
            interval: 3,
            probes: 4,
            user_timeout: 5,
            rto_max: 6,
        };
        let values = SocketOption::ALL.map(|option| options.get(option));
        assert_eq!(values, [1, 2, 3, 4, 5, 6]);
        assert_eq!(NOTHING_SET.get(SocketOption::Keepalive), 0);
    }

    #[test]
    fn a_timer_is_set_whichever_it_is() {
        let of = |set: u32| Options {
            keepalive: true,
            idle: set & 1,
            interval: set >> 1 & 1,
            probes: set >> 2 & 1,
            user_timeout: set >> 3 & 1,
            rto_max: set >> 4 & 1,
        };
        for set in 0..1 << 5 {
            assert_eq!(of(set).has_timers(), set != 0, "{:?}", of(set));
        }
    }

    #[test]
    fn what_the_application_left_of_its_timers_stays_where_its_user_timeout_conflicts() {
        let set = Options {
            keepalive: true,
            idle: 60,
            interval: 10,
            probes: 6,
            user_timeout: 20_000,
            rto_max: 0,
        };
        for has in [
            Options { idle: 0, ..set },
            Options { interval: 0, ..set },
            Options { probes: 0, ..set },
        ] {
            let plan = plan(&Policy::BUILT_IN, &has, &HERE);
            assert!(plan.user_timeout_conflict);
            assert_eq!(plan.wants, has);
        }
        // Nothing would change, so there is nothing to give way.
        assert!(!plan(&Policy::BUILT_IN, &set, &HERE).user_timeout_conflict);
    }

    #[test]
    fn the_built_in_policy_turns_keepalive_on_and_fills_the_timers() {
        assert_eq!(
            wants(&Policy::BUILT_IN, &NOTHING_SET),
            Options {
                keepalive: true,
                idle: 60,
                interval: 10,
                probes: 6,
                ..NOTHING_SET
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
            rto_max: 7000,
        };
        assert_eq!(wants(&Policy::BUILT_IN, &has), has);
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
        let expected = Options {
            keepalive: false,
            ..has
        };
        assert_eq!(wants(&policy, &has), expected);
    }

    #[test]
    fn leave_shapes_the_timers_for_an_application_that_asks_later() {
        let policy = Policy::BUILT_IN.with_keepalive(Keepalive::Leave);
        for keepalive in [false, true] {
            let has = Options {
                keepalive,
                ..NOTHING_SET
            };
            let wants = wants(&policy, &has);
            assert_eq!(wants.keepalive, keepalive);
            assert_eq!((wants.idle, wants.interval, wants.probes), (60, 10, 6));
        }
    }

    #[test]
    fn a_derived_user_timeout_follows_the_effective_timers() {
        let policy = Policy::BUILT_IN.with_derived_user_timeout(true);
        assert_eq!(wants(&policy, &NOTHING_SET).user_timeout, 120_000);
        let has = Options {
            idle: 100,
            ..NOTHING_SET
        };
        assert_eq!(wants(&policy, &has).user_timeout, 160_000);
        let has = Options {
            user_timeout: 7,
            ..NOTHING_SET
        };
        assert_eq!(wants(&policy, &has).user_timeout, 7);
    }

    #[test]
    fn a_derived_user_timeout_keeps_its_bounds() {
        let mut policy = Policy::BUILT_IN.with_derived_user_timeout(true);
        policy.user_timeout.at_most = 90_000;
        assert_eq!(wants(&policy, &NOTHING_SET).user_timeout, 90_000);
    }

    #[test]
    fn nothing_is_derived_from_a_timer_that_stays_unset() {
        let mut policy = Policy::BUILT_IN.with_derived_user_timeout(true);
        policy.probes = Range::LEAVE;
        let policy = policy.with_sysctl(SysctlTimer::Probes, false);
        for unknown in [Environment { probes: 0, ..HERE }, Environment::UNKNOWN] {
            let wants = plan(&policy, &NOTHING_SET, &unknown).wants;
            assert_eq!((wants.probes, wants.user_timeout), (0, 0));
        }
        // With the sysctl it is known: 60 s + 10 s × 9.
        assert_eq!(wants(&policy, &NOTHING_SET).user_timeout, 150_000);
        for timers in [(0, 1, 1), (1, 0, 1), (1, 1, 0)] {
            let (idle, interval, probes) = timers;
            let timers = Options {
                idle,
                interval,
                probes,
                ..NOTHING_SET
            };
            assert_eq!(derived_user_timeout(&timers, 250), 0);
        }
    }

    #[test]
    fn a_derived_user_timeout_allows_for_late_timers() {
        for (idle, interval, probes, expected) in [
            (60, 10, 6, 120_000),
            (2, 1, 5, 7_000),
            // The timer of two hours may be 131 s late.
            (7200, 75, 9, 7_948_000),
            (MAX_SECONDS, MAX_SECONDS, MAX_PROBES, MAX_USER_TIMEOUT),
        ] {
            let timers = Options {
                idle,
                interval,
                probes,
                ..NOTHING_SET
            };
            assert_eq!(derived_user_timeout(&timers, 250), expected);
        }
    }

    #[test]
    fn the_smaller_of_default_and_sysctl_holds_where_both_count() {
        let tuned = Environment {
            idle: 20,
            interval: 75,
            probes: 4,
            ..HERE
        };
        let wants = plan(&Policy::BUILT_IN, &NOTHING_SET, &tuned).wants;
        assert_eq!((wants.idle, wants.interval, wants.probes), (20, 10, 4));
        let mut written = Policy::BUILT_IN;
        for timer in [
            SysctlTimer::Idle,
            SysctlTimer::Interval,
            SysctlTimer::Probes,
        ] {
            written = written.with_sysctl(timer, false);
        }
        let wants = plan(&written, &NOTHING_SET, &tuned).wants;
        assert_eq!((wants.idle, wants.interval, wants.probes), (60, 10, 6));
    }

    #[test]
    fn a_sysctl_alone_is_a_default_within_the_bounds() {
        let mut policy = Policy::BUILT_IN;
        policy.idle = Range {
            at_most: 300,
            ..Range::LEAVE
        };
        policy.interval = Range::LEAVE;
        let wants = wants(&policy, &NOTHING_SET);
        assert_eq!((wants.idle, wants.interval, wants.probes), (300, 75, 6));
        let beyond = Environment {
            interval: 40_000,
            ..HERE
        };
        assert_eq!(
            plan(&policy, &NOTHING_SET, &beyond).wants.interval,
            MAX_SECONDS
        );
    }

    #[test]
    fn a_connection_of_a_policy_that_ignores_stays_as_it_is() {
        let mut policy = Policy::BUILT_IN
            .with_keepalive(Keepalive::Never)
            .with_ignore(true);
        policy.user_timeout = Range::exactly(7);
        policy.give_up = 30_000;
        for keepalive in [false, true] {
            let has = Options {
                keepalive,
                idle: 5,
                ..NOTHING_SET
            };
            let plan = plan(&policy, &has, &HERE);
            assert_eq!((plan.wants, plan.user_timeout_conflict), (has, false));
        }
    }

    #[test]
    fn a_user_timeout_of_the_application_that_ends_it_early_keeps_keepalive_away() {
        // The sixth probe goes out after 110 s, by this clock up to 113.4 s.
        for (user_timeout, conflict) in
            [(1, true), (20_000, true), (113_352, true), (113_353, false)]
        {
            let has = Options {
                user_timeout,
                ..NOTHING_SET
            };
            let plan = plan(&Policy::BUILT_IN, &has, &HERE);
            assert_eq!(plan.user_timeout_conflict, conflict, "{user_timeout}");
            if conflict {
                assert_eq!(plan.wants, has);
            } else {
                assert!(plan.wants.keepalive);
            }
        }
    }

    #[test]
    fn a_single_probe_is_as_many_as_a_user_timeout_allows() {
        let mut policy = Policy::BUILT_IN;
        policy.probes = Range::exactly(1);
        let has = Options {
            user_timeout: 1,
            ..NOTHING_SET
        };
        assert!(wants(&policy, &has).keepalive);
        policy.probes = Range::exactly(2);
        assert!(!wants(&policy, &has).keepalive);
    }

    #[test]
    fn keepalive_of_the_application_keeps_its_timers_beside_its_user_timeout() {
        let has = Options {
            keepalive: true,
            user_timeout: 20_000,
            ..NOTHING_SET
        };
        let mut policy = Policy::BUILT_IN;
        policy.user_timeout = Range {
            at_least: 30_000,
            ..Range::LEAVE
        };
        policy.give_up = 30_000;
        let plan = plan(&policy, &has, &HERE);
        assert!(plan.user_timeout_conflict);
        // What does not make it worse is done all the same.
        let expected = Options {
            user_timeout: 30_000,
            rto_max: 2_000,
            ..has
        };
        assert_eq!(plan.wants, expected);
        // Nothing is to be changed: there is nothing to stand against.
        let right = Options {
            idle: 60,
            interval: 10,
            probes: 6,
            ..has
        };
        assert!(!super::plan(&Policy::BUILT_IN, &right, &HERE).user_timeout_conflict);
    }

    #[test]
    fn turning_off_is_never_a_conflict() {
        let has = Options {
            keepalive: true,
            user_timeout: 1,
            ..NOTHING_SET
        };
        for keepalive in [Keepalive::Off, Keepalive::Never] {
            let policy = Policy::BUILT_IN.with_keepalive(keepalive);
            let plan = plan(&policy, &has, &HERE);
            assert!(!plan.wants.keepalive && !plan.user_timeout_conflict);
        }
    }

    #[test]
    fn a_user_timeout_that_the_policy_gives_to_everyone_is_its_own_word() {
        let mut policy = Policy::BUILT_IN;
        policy.user_timeout = Range::exactly(30_000);
        let has = Options {
            user_timeout: 20_000,
            ..NOTHING_SET
        };
        let plan = plan(&policy, &has, &HERE);
        assert!(plan.wants.keepalive && !plan.user_timeout_conflict);
    }

    #[test]
    fn a_derived_lower_bound_is_the_cure() {
        let policy = Policy::BUILT_IN.with_derived_at_least(true);
        for (user_timeout, expected) in [(0, 0), (20_000, 120_000), (300_000, 300_000)] {
            let has = Options {
                user_timeout,
                ..NOTHING_SET
            };
            let plan = plan(&policy, &has, &HERE);
            assert!(plan.wants.keepalive && !plan.user_timeout_conflict);
            assert_eq!(plan.wants.user_timeout, expected);
        }
        // The larger of two lower bounds holds, and no more than the upper one.
        let mut bounded = policy;
        bounded.user_timeout.at_least = 200_000;
        let has = Options {
            user_timeout: 20_000,
            ..NOTHING_SET
        };
        assert_eq!(wants(&bounded, &has).user_timeout, 200_000);
        bounded = policy;
        bounded.user_timeout.at_most = 100_000;
        let plan = plan(&bounded, &has, &HERE);
        assert_eq!(plan.wants.user_timeout, 100_000);
        assert!(plan.user_timeout_conflict && !plan.wants.keepalive);
    }

    #[test]
    fn giving_up_bounds_retransmission_and_never_loosens() {
        let mut policy = Policy::BUILT_IN;
        policy.give_up = 30_000;
        for (rto_max, expected) in [(0, 2_000), (1_000, 1_000), (5_000, 2_000)] {
            let has = Options {
                rto_max,
                ..NOTHING_SET
            };
            assert_eq!(wants(&policy, &has).rto_max, expected);
        }
        for (here, expected) in [
            // Without TCP_RTO_MAX_MS, and where the namespace is as strict.
            (0, 0),
            (1_500, 0),
            (2_000, 0),
            (2_001, 2_000),
        ] {
            let here = Environment {
                rto_max: here,
                ..HERE
            };
            assert_eq!(plan(&policy, &NOTHING_SET, &here).wants.rto_max, expected);
        }
    }
}

#[cfg(test)]
mod outages;
#[cfg(test)]
pub(crate) mod properties;
