//! Whose setting a value is.
//!
//! The kernel keeps values, not who wrote them: this reads the author off the
//! value and the policy that claims the socket. An application that chose the
//! policy's value by itself therefore looks like the policy.

use keepalive_common::{
    environment::Environment,
    history::{Asked, given},
    plan::{Options, derived_user_timeout, plan},
    policy::{Keepalive, MAX_RTO_MAX, Policy, Range, SysctlTimer},
    timers::retransmission_ends,
};
use serde::Serialize;

/// Who decided a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The application, as far as can be told.
    App,
    /// The policy that claims the socket, which filled in what was unset.
    Policy,
    /// A bound of that policy, which the application's own value was beyond.
    PolicyBound,
    /// The sysctl of the socket's network namespace: nobody set it, or the policy
    /// took it from there.
    Sysctl,
    /// The application's user-timeout, which would end the connection early:
    /// because of it the policy keeps keepalive off
    /// ([`keepalive_common::plan::Plan::user_timeout_conflict`]).
    UserTimeout,
    /// The kernel: nobody set it and no sysctl exists for it.
    Kernel,
}

impl Source {
    /// Who it is, in words.
    #[must_use]
    pub const fn author(self) -> &'static str {
        match self {
            Self::App => "the application",
            Self::Policy => "the policy",
            Self::PolicyBound => "a bound of the policy",
            Self::Sysctl => "a sysctl of the namespace",
            Self::UserTimeout => "the application's user-timeout",
            Self::Kernel => "nobody",
        }
    }
}

/// A value, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting<T> {
    /// What holds for the socket.
    pub value: T,
    /// Who decided it.
    pub source: Source,
    /// What the application asked for, where it is known to have asked for
    /// something else.
    pub asked: Option<T>,
}

/// Everything that holds for a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// SO_KEEPALIVE.
    pub keepalive: Setting<bool>,
    /// Silence before the first probe, in seconds.
    pub idle: Setting<u32>,
    /// Time between two probes, in seconds.
    pub interval: Setting<u32>,
    /// Unanswered probes after which the peer counts as dead.
    pub probes: Setting<u32>,
    /// TCP_USER_TIMEOUT in milliseconds; 0 is none.
    pub user_timeout: Setting<u32>,
    /// After how long sent data that nobody acknowledges ends the connection at
    /// the latest, in milliseconds from its first transmission.
    pub gives_up_ms: u64,
    /// Whether the policy leaves keepalive and its timers as the application has
    /// them, because its user-timeout would end the connection early.
    pub user_timeout_conflict: bool,
}

/// Settings as they stand in JSON, part of a larger record. The names are
/// documented and stay.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SettingsRecord {
    keepalive: bool,
    keepalive_source: Source,
    idle_s: u32,
    idle_source: Source,
    interval_s: u32,
    interval_source: Source,
    probes: u32,
    probes_source: Source,
    user_timeout_ms: Option<u32>,
    user_timeout_source: Source,
    gives_up_ms: u64,
    user_timeout_conflict: bool,
    keepalive_asked: Option<bool>,
    idle_asked_s: Option<u32>,
    interval_asked_s: Option<u32>,
    probes_asked: Option<u32>,
    user_timeout_asked_ms: Option<u32>,
}

impl From<&Settings> for SettingsRecord {
    fn from(settings: &Settings) -> Self {
        Self {
            keepalive: settings.keepalive.value,
            keepalive_source: settings.keepalive.source,
            idle_s: settings.idle.value,
            idle_source: settings.idle.source,
            interval_s: settings.interval.value,
            interval_source: settings.interval.source,
            probes: settings.probes.value,
            probes_source: settings.probes.source,
            user_timeout_ms: Some(settings.user_timeout.value).filter(|set| *set != 0),
            user_timeout_source: settings.user_timeout.source,
            gives_up_ms: settings.gives_up_ms,
            user_timeout_conflict: settings.user_timeout_conflict,
            keepalive_asked: settings.keepalive.asked,
            idle_asked_s: settings.idle.asked,
            interval_asked_s: settings.interval.asked,
            probes_asked: settings.probes.asked,
            user_timeout_asked_ms: settings.user_timeout.asked,
        }
    }
}

/// What holds for a socket that has these options, in a namespace with these
/// sysctls, claimed by this policy or by none. What its application asked for is
/// known where it was kept, and elsewhere read off the values.
#[must_use]
pub fn settings(
    has: &Options,
    asked: &Asked,
    policy: Option<&Policy>,
    environment: &Environment,
) -> Settings {
    let policy = policy.filter(|policy| !policy.ignores());
    // A policy that turns keepalive off leaves its timers.
    let shaping = policy.filter(|policy| !policy.keepalive().turns_off());
    let conflict =
        policy.is_some_and(|policy| plan(policy, has, environment).user_timeout_conflict);
    let timer = |timer: SysctlTimer,
                 value: u32,
                 asked: Option<u32>,
                 range: fn(&Policy) -> &Range,
                 sysctl: u32| {
        let heeded = shaping.is_some_and(|policy| policy.heeds_sysctl(timer)) && value == sysctl;
        let range = shaping.map(range);
        let source = if heeded && range.is_none_or(|range| range.default != value) {
            Source::Sysctl
        } else {
            timer_source(range, value)
        };
        Setting {
            value: if value == 0 { sysctl } else { value },
            ..with_asked(value, source, asked)
        }
    };
    let user_timeout = policy.map(|policy| user_timeout_range(policy, has, environment));
    Settings {
        keepalive: Setting {
            value: has.keepalive,
            source: keepalive_source(policy, has, conflict),
            asked: asked.keepalive.filter(|asked| *asked != has.keepalive),
        },
        idle: timer(
            SysctlTimer::Idle,
            has.idle,
            asked.idle,
            |policy| &policy.idle,
            environment.idle,
        ),
        interval: timer(
            SysctlTimer::Interval,
            has.interval,
            asked.interval,
            |policy| &policy.interval,
            environment.interval,
        ),
        probes: timer(
            SysctlTimer::Probes,
            has.probes,
            asked.probes,
            |policy| &policy.probes,
            environment.probes,
        ),
        user_timeout: with_asked(
            has.user_timeout,
            match timer_source(user_timeout.as_ref(), has.user_timeout) {
                // The one timer that no sysctl stands in for.
                Source::Sysctl => Source::Kernel,
                source => source,
            },
            asked.user_timeout,
        ),
        gives_up_ms: gives_up_ms(has, environment),
        user_timeout_conflict: conflict,
    }
}

/// A timer whose source is as far as its value tells, and what the application is
/// known to have asked for; 0 is nothing.
fn with_asked(value: u32, source: Source, asked: Option<u32>) -> Setting<u32> {
    let asked = asked.filter(|asked| *asked != 0);
    Setting {
        value,
        source: match asked {
            Some(asked) if asked == value => Source::App,
            // `exactly` is the policy's default as well as its bounds.
            Some(_) if source != Source::Policy => Source::PolicyBound,
            _ => source,
        },
        asked: asked.filter(|asked| *asked != value),
    }
}

/// The range of the user-timeout with what is derived: from the timers of now,
/// or from those that the application found before it set its own.
fn user_timeout_range(policy: &Policy, has: &Options, environment: &Environment) -> Range {
    let mut range = policy.user_timeout;
    let from_timers = derived_user_timeout(&environment.complete(has), environment.hz);
    if policy.derives_at_least() && has.user_timeout == from_timers.min(range.at_most) {
        range.at_least = has.user_timeout;
    }
    if policy.derives_user_timeout() {
        let unset = Options {
            user_timeout: 0,
            ..*has
        };
        let wants = plan(policy, &unset, environment).wants;
        let derived = [wants, given(policy, environment)].map(|wants| wants.user_timeout);
        range.default = if derived.contains(&has.user_timeout) {
            has.user_timeout
        } else {
            derived[0]
        };
    }
    range
}

/// With a user-timeout retransmission goes by that alone (`tcp_write_timeout` in
/// net/ipv4/tcp_timer.c).
fn gives_up_ms(has: &Options, environment: &Environment) -> u64 {
    if has.user_timeout != 0 {
        return has.user_timeout.into();
    }
    let rto_max = [has.rto_max, environment.rto_max]
        .into_iter()
        .find(|rto_max| *rto_max != 0);
    retransmission_ends(rto_max.unwrap_or(MAX_RTO_MAX), environment.retries)
}

/// Whose a timer is: `value` as the kernel has it, 0 for unset, and the range
/// of the policy that shapes it, if one does.
fn timer_source(range: Option<&Range>, value: u32) -> Source {
    let Some(range) = range.filter(|_| value != 0) else {
        return if value == 0 {
            Source::Sysctl
        } else {
            Source::App
        };
    };
    if value == range.effective(0) {
        Source::Policy
    } else if value == range.at_least || value == range.at_most {
        Source::PolicyBound
    } else {
        Source::App
    }
}

/// Against the wish of the policy it is the application: it has the last word. With
/// it, the policy's; but not where the policy has never come to fill in the timers.
fn keepalive_source(policy: Option<&Policy>, has: &Options, conflict: bool) -> Source {
    let on = has.keepalive;
    let is_untouched = policy.is_some_and(|policy| {
        let timers = [
            (&policy.idle, has.idle),
            (&policy.interval, has.interval),
            (&policy.probes, has.probes),
        ];
        timers
            .iter()
            .any(|(range, value)| *value == 0 && range.effective(0) != 0)
    });
    let wish = policy.map(Policy::keepalive);
    match (wish, on) {
        (Some(Keepalive::On | Keepalive::Always), false) if conflict => Source::UserTimeout,
        (Some(Keepalive::On | Keepalive::Always), true) if conflict || is_untouched => Source::App,
        (Some(Keepalive::On | Keepalive::Always), true)
        | (Some(Keepalive::Off | Keepalive::Never), false) => Source::Policy,
        (Some(Keepalive::On | Keepalive::Always), false) | (_, true) => Source::App,
        (_, false) => Source::Kernel,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Environment = Environment::UNCHANGED;

    #[test]
    fn timers_tell_whose_they_are() {
        let fill = Range::default_only(60);
        let bounded = Range {
            default: 60,
            at_least: 30,
            at_most: 300,
        };
        let beyond = Range {
            default: 60,
            at_least: 0,
            at_most: 30,
        };
        for (range, value, expected) in [
            (None, 0, Source::Sysctl),
            (None, 60, Source::App),
            (Some(fill), 0, Source::Sysctl),
            (Some(fill), 60, Source::Policy),
            (Some(fill), 61, Source::App),
            (Some(bounded), 60, Source::Policy),
            (Some(bounded), 30, Source::PolicyBound),
            (Some(bounded), 300, Source::PolicyBound),
            (Some(bounded), 45, Source::App),
            // Set after the policy was applied.
            (Some(bounded), 7200, Source::App),
            // The default is bounded too.
            (Some(beyond), 30, Source::Policy),
            (Some(Range::exactly(60)), 60, Source::Policy),
            (Some(Range::LEAVE), 60, Source::App),
        ] {
            assert_eq!(
                timer_source(range.as_ref(), value),
                expected,
                "{range:?} {value}"
            );
        }
    }

    #[test]
    fn keepalive_tells_whose_it_is() {
        let policy = |keepalive| Policy::BUILT_IN.with_keepalive(keepalive);
        for (wish, on, expected) in [
            (None, true, Source::App),
            (None, false, Source::Kernel),
            (Some(Keepalive::On), true, Source::Policy),
            (Some(Keepalive::On), false, Source::App),
            (Some(Keepalive::Off), true, Source::App),
            (Some(Keepalive::Off), false, Source::Policy),
            (Some(Keepalive::Always), true, Source::Policy),
            (Some(Keepalive::Always), false, Source::App),
            (Some(Keepalive::Never), true, Source::App),
            (Some(Keepalive::Never), false, Source::Policy),
            (Some(Keepalive::Leave), true, Source::App),
            (Some(Keepalive::Leave), false, Source::Kernel),
        ] {
            let policy = wish.map(policy);
            let has = Options {
                keepalive: on,
                idle: 60,
                interval: 10,
                probes: 6,
                ..Options::default()
            };
            assert_eq!(
                keepalive_source(policy.as_ref(), &has, false),
                expected,
                "{wish:?}"
            );
        }
        // Not swept yet.
        let has = Options {
            keepalive: true,
            ..Options::default()
        };
        let source = keepalive_source(Some(&Policy::BUILT_IN), &has, false);
        assert_eq!(source, Source::App);
    }

    #[test]
    fn what_is_unset_comes_from_the_sysctls() {
        let found = settings(&Options::default(), &Asked::default(), None, &HERE);
        let sysctl = |value| Setting {
            value,
            source: Source::Sysctl,
            asked: None,
        };
        assert_eq!(
            found,
            Settings {
                keepalive: Setting {
                    value: false,
                    source: Source::Kernel,
                    asked: None,
                },
                idle: sysctl(7200),
                interval: sysctl(75),
                probes: sysctl(9),
                user_timeout: Setting {
                    value: 0,
                    source: Source::Kernel,
                    asked: None,
                },
                gives_up_ms: 1_044_600,
                user_timeout_conflict: false,
            }
        );
    }

    #[test]
    fn what_was_taken_from_the_sysctls_is_theirs() {
        let here = Environment {
            idle: 20,
            interval: 10,
            ..HERE
        };
        let has = given(&Policy::BUILT_IN, &here);
        let found = settings(&has, &Asked::default(), Some(&Policy::BUILT_IN), &here);
        assert_eq!(found.idle.source, Source::Sysctl);
        // The same as the policy's own value.
        assert_eq!(found.interval.source, Source::Policy);
        assert_eq!(found.probes.source, Source::Policy);
    }

    #[test]
    fn a_user_timeout_that_keeps_keepalive_off_is_named() {
        let has = Options {
            user_timeout: 20_000,
            ..Options::default()
        };
        let found = settings(&has, &Asked::default(), Some(&Policy::BUILT_IN), &HERE);
        assert!(found.user_timeout_conflict);
        assert_eq!(found.keepalive.source, Source::UserTimeout);
        assert_eq!(found.user_timeout.source, Source::App);
        let own = Options {
            keepalive: true,
            ..has
        };
        let found = settings(&own, &Asked::default(), Some(&Policy::BUILT_IN), &HERE);
        assert!(found.user_timeout_conflict);
        assert_eq!(found.keepalive.source, Source::App);
        assert_eq!(found.idle.source, Source::Sysctl);
        let cure = Policy::BUILT_IN.with_derived_at_least(true);
        let found = settings(
            &plan(&cure, &has, &HERE).wants,
            &Asked::default(),
            Some(&cure),
            &HERE,
        );
        assert!(!found.user_timeout_conflict);
        assert_eq!(found.keepalive.source, Source::Policy);
        assert_eq!(found.user_timeout.source, Source::PolicyBound);
    }

    #[test]
    fn data_in_flight_is_given_up_by_what_is_set() {
        for (user_timeout, rto_max, expected) in
            [(0, 0, 1_044_600), (0, 2_000, 29_000), (7_000, 2_000, 7_000)]
        {
            let has = Options {
                user_timeout,
                rto_max,
                ..Options::default()
            };
            assert_eq!(
                settings(&has, &Asked::default(), None, &HERE).gives_up_ms,
                expected
            );
        }
        // A kernel that has no other than the longest.
        let here = Environment { rto_max: 0, ..HERE };
        let found = settings(&Options::default(), &Asked::default(), None, &here);
        assert_eq!(found.gives_up_ms, 1_044_600);
    }

    #[test]
    fn a_policy_that_ignores_set_nothing() {
        let policy = Policy::BUILT_IN.with_ignore(true);
        let has = given(&Policy::BUILT_IN, &HERE);
        let found = settings(&has, &Asked::default(), Some(&policy), &HERE);
        assert_eq!(found.keepalive.source, Source::App);
        assert_eq!(found.idle.source, Source::App);
    }

    #[test]
    fn what_the_plan_made_of_an_untouched_socket_is_the_policys() {
        for policy in [
            Policy::BUILT_IN,
            Policy::BUILT_IN.with_derived_user_timeout(true),
        ] {
            let wants = given(&policy, &HERE);
            let found = settings(&wants, &Asked::default(), Some(&policy), &HERE);
            let mut sources = vec![found.keepalive.source, found.idle.source];
            sources.extend([found.interval.source, found.probes.source]);
            if policy.derives_user_timeout() {
                sources.push(found.user_timeout.source);
            }
            assert!(sources.iter().all(|source| *source == Source::Policy));
        }
    }

    #[test]
    fn a_derived_user_timeout_stays_the_policys_when_the_application_sets_a_timer_later() {
        let policy = Policy::BUILT_IN.with_derived_user_timeout(true);
        let mut has = given(&policy, &HERE);
        has.idle = 70;
        for (user_timeout, expected) in [
            (120_000, Source::Policy),
            (130_000, Source::Policy),
            (125_000, Source::App),
        ] {
            has.user_timeout = user_timeout;
            let found = settings(&has, &Asked::default(), Some(&policy), &HERE);
            assert_eq!(found.idle.source, Source::App);
            assert_eq!(found.user_timeout.source, expected, "{user_timeout}");
        }
    }

    #[test]
    fn an_off_policy_did_not_set_the_timers() {
        let policy = Policy::BUILT_IN.with_keepalive(Keepalive::Off);
        let has = Options {
            idle: 60,
            ..Options::default()
        };
        let found = settings(&has, &Asked::default(), Some(&policy), &HERE);
        assert_eq!(found.keepalive.source, Source::Policy);
        assert_eq!(found.idle.source, Source::App);
    }

    #[test]
    fn what_is_known_of_the_application_goes_before_what_values_look_like() {
        let mut policy = Policy::BUILT_IN;
        policy.idle = Range {
            default: 60,
            at_least: 30,
            at_most: 90,
        };
        for (has, asked, source, shown) in [
            (60, None, Source::Policy, None),
            (60, Some(0), Source::Policy, None),
            (60, Some(60), Source::App, None),
            (90, Some(7200), Source::PolicyBound, Some(7200)),
            (90, Some(90), Source::App, None),
        ] {
            let has = Options {
                keepalive: true,
                idle: has,
                ..Options::default()
            };
            let asked = Asked {
                idle: asked,
                ..Asked::default()
            };
            let found = settings(&has, &asked, Some(&policy), &HERE).idle;
            assert_eq!((found.source, found.asked), (source, shown), "{asked:?}");
        }
    }
}
