//! Whose setting a value is.
//!
//! The kernel keeps values, not who wrote them: this reads the author off the
//! value and the policy that claims the socket. An application that chose the
//! policy's value by itself therefore looks like the policy.

use anyhow::Result;
use keepalive_common::{
    history::given,
    plan::{Options, plan},
    policy::{Keepalive, Policy, Range},
    socket::SocketRecord,
};
use serde::Serialize;

use crate::netns;

/// The sysctls that rule unset timers in a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sysctls {
    /// `tcp_keepalive_time` in seconds.
    pub idle: u32,
    /// `tcp_keepalive_intvl` in seconds.
    pub interval: u32,
    /// `tcp_keepalive_probes`.
    pub probes: u32,
}

impl Sysctls {
    /// Those of the namespace that a connection is in.
    #[must_use]
    pub const fn of(record: &SocketRecord) -> Self {
        Self {
            idle: record.sysctl_idle,
            interval: record.sysctl_interval,
            probes: record.sysctl_probes,
        }
    }

    /// Those of the namespace that the calling thread is in.
    ///
    /// # Errors
    ///
    /// When /proc does not show them.
    pub fn here() -> Result<Self> {
        Ok(Self {
            idle: netns::sysctl("ipv4/tcp_keepalive_time")?,
            interval: netns::sysctl("ipv4/tcp_keepalive_intvl")?,
            probes: netns::sysctl("ipv4/tcp_keepalive_probes")?,
        })
    }
}

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
    /// The sysctl of the socket's network namespace: nobody set it.
    Sysctl,
    /// The kernel: nobody set it and no sysctl exists for it.
    Kernel,
}

/// A value, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting<T> {
    /// What holds for the socket.
    pub value: T,
    /// Who decided it.
    pub source: Source,
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
        }
    }
}

/// What holds for a socket that has these options, in a namespace with these
/// sysctls, claimed by this policy or by none.
#[must_use]
pub fn settings(has: &Options, policy: Option<&Policy>, sysctls: &Sysctls) -> Settings {
    // A policy of `off` leaves the timers of keepalive.
    let shaping = policy.filter(|policy| policy.keepalive() != Keepalive::Off);
    let timer = |value: u32, range: Option<&Range>, sysctl: u32| Setting {
        value: if value == 0 { sysctl } else { value },
        source: timer_source(range, value),
    };
    let user_timeout = policy.map(|policy| {
        // The derived default depends on the other timers: on those of now, or
        // on those that the application found before it set its own.
        let unset = Options {
            user_timeout: 0,
            ..*has
        };
        let derived = [plan(policy, &unset), given(policy)].map(|wants| wants.user_timeout);
        Range {
            default: if derived.contains(&has.user_timeout) {
                has.user_timeout
            } else {
                derived[0]
            },
            ..policy.user_timeout
        }
    });
    Settings {
        keepalive: Setting {
            value: has.keepalive,
            source: keepalive_source(policy, has),
        },
        idle: timer(has.idle, shaping.map(|policy| &policy.idle), sysctls.idle),
        interval: timer(
            has.interval,
            shaping.map(|policy| &policy.interval),
            sysctls.interval,
        ),
        probes: timer(
            has.probes,
            shaping.map(|policy| &policy.probes),
            sysctls.probes,
        ),
        user_timeout: Setting {
            value: has.user_timeout,
            source: match timer_source(user_timeout.as_ref(), has.user_timeout) {
                // The one timer that no sysctl stands in for.
                Source::Sysctl => Source::Kernel,
                source => source,
            },
        },
    }
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
fn keepalive_source(policy: Option<&Policy>, has: &Options) -> Source {
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
    match (policy.map(Policy::keepalive), on) {
        (Some(Keepalive::On), true) if is_untouched => Source::App,
        (Some(Keepalive::On), true) | (Some(Keepalive::Off), false) => Source::Policy,
        (Some(Keepalive::On), false) | (_, true) => Source::App,
        (_, false) => Source::Kernel,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYSCTLS: Sysctls = Sysctls {
        idle: 7200,
        interval: 75,
        probes: 9,
    };

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
                keepalive_source(policy.as_ref(), &has),
                expected,
                "{wish:?}"
            );
        }
        // Not swept yet.
        let has = Options {
            keepalive: true,
            ..Options::default()
        };
        let source = keepalive_source(Some(&Policy::BUILT_IN), &has);
        assert_eq!(source, Source::App);
    }

    #[test]
    fn what_is_unset_comes_from_the_sysctls() {
        let found = settings(&Options::default(), None, &SYSCTLS);
        let sysctl = |value| Setting {
            value,
            source: Source::Sysctl,
        };
        assert_eq!(
            found,
            Settings {
                keepalive: Setting {
                    value: false,
                    source: Source::Kernel
                },
                idle: sysctl(7200),
                interval: sysctl(75),
                probes: sysctl(9),
                user_timeout: Setting {
                    value: 0,
                    source: Source::Kernel
                },
            }
        );
    }

    #[test]
    fn what_the_plan_made_of_an_untouched_socket_is_the_policys() {
        for policy in [
            Policy::BUILT_IN,
            Policy::BUILT_IN.with_derived_user_timeout(true),
        ] {
            let wants = plan(&policy, &Options::default());
            let found = settings(&wants, Some(&policy), &SYSCTLS);
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
        let mut has = plan(&policy, &Options::default());
        has.idle = 70;
        for (user_timeout, expected) in [
            (120_000, Source::Policy),
            (130_000, Source::Policy),
            (125_000, Source::App),
        ] {
            has.user_timeout = user_timeout;
            let found = settings(&has, Some(&policy), &SYSCTLS);
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
        let found = settings(&has, Some(&policy), &SYSCTLS);
        assert_eq!(found.keepalive.source, Source::Policy);
        assert_eq!(found.idle.source, Source::App);
    }
}
