//! History: telling what the application set from what a policy set before.
//!
//! The kernel keeps one value per timer, not who wrote it. A policy that changes
//! must find its own earlier values again, and give back what it took:
//!
//! * where a policy moved a value of the application, the original is kept
//!   beside the socket ([`Originals`]; rare, so the memory is paid rarely);
//! * so it is where what stands there now is not what the policy gives to an
//!   unset timer: a user-timeout that was derived from other timers than its own,
//!   a value of an earlier policy that has to stay for a while;
//! * where a connection is held to bounds, everything that the application asked
//!   for is kept ([`SocketHistory`]), and what it asks for later with it;
//! * everything else that a policy wrote is what it gives to an unset timer, so
//!   the earlier policy is all that is needed to recognise it. Where that follows
//!   a sysctl, one that was changed meanwhile is not recognised: the value stays
//!   as if the application had set it.

use crate::{
    counters::SocketOption,
    environment::Environment,
    plan::{Options, Plan, plan},
    policy::{MAX_PROBES, MAX_SECONDS, MAX_USER_TIMEOUT, MIN_PROBES, MIN_SECONDS, Policy},
};

/// A value of the application that a policy replaced; all zero where there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Replaced {
    /// What the application had set; [`UNSET`] if it had set nothing.
    pub original: u32,
    /// What was written over it.
    pub written: u32,
}

/// The original of a value that an earlier policy gave and that waits to be
/// changed. No timer can be set to this.
pub const UNSET: u32 = u32::MAX;

impl Replaced {
    /// What the application wants now: its original, unless it has set
    /// something else since.
    #[inline(always)]
    const fn application(self, has: u32) -> Option<u32> {
        if self.original == 0 || self.written != has {
            None
        } else if self.original == UNSET {
            Some(0)
        } else {
            Some(self.original)
        }
    }

    #[inline(always)]
    const fn new(application: u32, now: u32, given: u32) -> Self {
        let original = if application == now {
            0
        } else if application != 0 {
            application
        } else if now != given {
            UNSET
        } else {
            // The policy of now gives it, so that is all to know it by.
            0
        };
        Self {
            original,
            written: if original == 0 { 0 } else { now },
        }
    }

    #[inline(always)]
    const fn all(application: u32, now: u32) -> Self {
        Self {
            original: if application == 0 { UNSET } else { application },
            written: now,
        }
    }
}

/// What policies replaced on one socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Originals {
    /// Of TCP_KEEPIDLE.
    pub idle: Replaced,
    /// Of TCP_KEEPINTVL.
    pub interval: Replaced,
    /// Of TCP_KEEPCNT.
    pub probes: Replaced,
    /// Of TCP_USER_TIMEOUT.
    pub user_timeout: Replaced,
    /// Of TCP_RTO_MAX_MS.
    pub rto_max: Replaced,
    /// Of SO_KEEPALIVE: flags, see [`Self::asks_keepalive`].
    pub keepalive: u32,
}

/// What is known of SO_KEEPALIVE, as flags of [`Originals`]; all zero where
/// nothing is. The application wants it on.
const ASKED_ON: u32 = 1;
/// It asked for that after the connection was established.
const ASKED_LATER: u32 = 1 << 1;
/// It is on.
const IS_ON: u32 = 1 << 2;
/// Something is known.
const IS_KNOWN: u32 = 1 << 3;

const fn keepalive_flags(asked: bool, asked_later: bool, is_on: bool) -> u32 {
    IS_KNOWN
        | if asked { ASKED_ON } else { 0 }
        | if asked_later { ASKED_LATER } else { 0 }
        | if is_on { IS_ON } else { 0 }
}

/// What an application asked for: none where that is not known, a timer of 0
/// where it set none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// SO_KEEPALIVE.
    pub keepalive: Option<bool>,
    /// TCP_KEEPIDLE, in seconds.
    pub idle: Option<u32>,
    /// TCP_KEEPINTVL, in seconds.
    pub interval: Option<u32>,
    /// TCP_KEEPCNT.
    pub probes: Option<u32>,
    /// TCP_USER_TIMEOUT, in milliseconds.
    pub user_timeout: Option<u32>,
}

impl Originals {
    /// Nothing.
    pub const NONE: Self = {
        const NONE: Replaced = Replaced {
            original: 0,
            written: 0,
        };
        Self {
            idle: NONE,
            interval: NONE,
            probes: NONE,
            user_timeout: NONE,
            rto_max: NONE,
            keepalive: 0,
        }
    };

    /// Everything that an `application` wants of a socket that has what is set
    /// `now`.
    #[must_use]
    #[inline(always)]
    pub const fn all(application: &Options, now: &Options, asked_later: bool) -> Self {
        Self {
            idle: Replaced::all(application.idle, now.idle),
            interval: Replaced::all(application.interval, now.interval),
            probes: Replaced::all(application.probes, now.probes),
            user_timeout: Replaced::all(application.user_timeout, now.user_timeout),
            rto_max: Replaced::all(application.rto_max, now.rto_max),
            keepalive: keepalive_flags(application.keepalive, asked_later, now.keepalive),
        }
    }

    /// What the application wants of SO_KEEPALIVE, where that is known, for a socket
    /// on which it `is` on or off.
    #[must_use]
    #[inline(always)]
    pub const fn asks_keepalive(&self, is: bool) -> Option<bool> {
        if self.keepalive & IS_KNOWN == 0 {
            None
        } else if (self.keepalive & IS_ON != 0) != is {
            // It has set something else since.
            Some(is)
        } else {
            Some(self.keepalive & ASKED_ON != 0)
        }
    }

    /// Whether the application turned SO_KEEPALIVE on or off after the connection
    /// was established: then it has the last word, unless that is bounded.
    #[must_use]
    #[inline(always)]
    pub const fn asked_later(&self) -> bool {
        self.keepalive & ASKED_LATER != 0
    }

    /// What the application asked for on a socket that `has` these options, as far
    /// as it is kept.
    #[must_use]
    pub const fn asked(&self, has: &Options) -> Asked {
        Asked {
            keepalive: match self.asks_keepalive(has.keepalive) {
                // It never spoke of it.
                Some(false) if !self.asked_later() => None,
                asked => asked,
            },
            idle: self.idle.application(has.idle),
            interval: self.interval.application(has.interval),
            probes: self.probes.application(has.probes),
            user_timeout: self.user_timeout.application(has.user_timeout),
        }
    }

    /// What was written last.
    #[must_use]
    #[inline(always)]
    pub const fn written(&self) -> Options {
        Options {
            keepalive: self.keepalive & IS_ON != 0,
            idle: self.idle.written,
            interval: self.interval.written,
            probes: self.probes.written,
            user_timeout: self.user_timeout.written,
            rto_max: self.rto_max.written,
        }
    }

    /// What is to be kept once a socket has what is set `now`, for an
    /// `application` that wanted something else, where the policy of now is known
    /// by what it has `given`.
    #[must_use]
    #[inline(always)]
    pub const fn of(application: &Options, now: &Options, given: &Options) -> Self {
        Self {
            idle: Replaced::new(application.idle, now.idle, given.idle),
            interval: Replaced::new(application.interval, now.interval, given.interval),
            probes: Replaced::new(application.probes, now.probes, given.probes),
            user_timeout: Replaced::new(
                application.user_timeout,
                now.user_timeout,
                given.user_timeout,
            ),
            rto_max: Replaced::new(application.rto_max, now.rto_max, given.rto_max),
            keepalive: if Self::keeps_keepalive(application, now, given) {
                keepalive_flags(application.keepalive, false, now.keepalive)
            } else {
                0
            },
        }
    }

    /// Whether what the application wants of SO_KEEPALIVE has to be kept: not where
    /// [`application`] finds it out by the policy, which is known by what it has
    /// `given`, and the timers.
    #[inline(always)]
    const fn keeps_keepalive(application: &Options, now: &Options, given: &Options) -> bool {
        if application.keepalive {
            !has_keepalive_timers(application) || !now.keepalive
        } else if now.keepalive {
            !given.keepalive || has_keepalive_timers(application)
        } else {
            // An application that turns it on later would be taken for a policy.
            has_keepalive_timers(now) && !has_keepalive_timers(given)
        }
    }

    /// Whether nothing was replaced.
    #[must_use]
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What the application set on a socket that `has` these options, which the
/// policy `before` may have written, unless that sets nothing.
///
/// A value that the application set itself and that is just what that policy
/// would have given it cannot be told apart and counts as the policy's.
/// So it is with SO_KEEPALIVE: where it is on, and every timer of keepalive that
/// is set is that policy's, the policy turned it on, unless something else is
/// known.
#[must_use]
#[inline(always)]
pub fn application(
    has: &Options,
    originals: &Originals,
    before: Option<&Policy>,
    environment: &Environment,
) -> Options {
    let before = before.filter(|before| before.sets_anything());
    let given = before.map_or(Options::default(), |before| given(before, environment));
    // As given in a namespace whose sysctls were larger.
    let (idle, interval, probes) = before.map_or((0, 0, 0), |before| {
        (
            before.idle.effective(0),
            before.interval.effective(0),
            before.probes.effective(0),
        )
    });
    let mut application = Options {
        keepalive: false,
        idle: timer(has.idle, originals.idle, [given.idle, idle]),
        interval: timer(has.interval, originals.interval, [given.interval, interval]),
        probes: timer(has.probes, originals.probes, [given.probes, probes]),
        user_timeout: 0,
        rto_max: timer(has.rto_max, originals.rto_max, [given.rto_max; 2]),
    };
    // What is derived follows from the timers of this socket.
    let derived = match before {
        Some(before) if before.derives_user_timeout() => {
            plan(before, &application, environment).wants.user_timeout
        }
        _ => given.user_timeout,
    };
    application.user_timeout = timer(
        has.user_timeout,
        originals.user_timeout,
        [given.user_timeout, derived],
    );
    let turned_on = before.is_some_and(|before| before.keepalive().turns_on())
        && has_keepalive_timers(has)
        && !has_keepalive_timers(&application);
    application.keepalive = match originals.asks_keepalive(has.keepalive) {
        Some(asked) => asked,
        None => has.keepalive && !turned_on,
    };
    application
}

/// What a policy gives to a socket whose application set nothing, by which its
/// values are known later.
#[must_use]
#[inline(always)]
pub fn given(policy: &Policy, environment: &Environment) -> Options {
    plan(policy, &Options::default(), environment).wants
}

/// What a policy is known by on a socket for which this is its plan: nothing
/// where it leaves the socket as the application has it.
#[must_use]
#[inline(always)]
pub fn known_by(policy: &Policy, plan: &Plan, environment: &Environment) -> Options {
    if !policy.sets_anything() || plan.user_timeout_conflict {
        return Options::default();
    }
    given(policy, environment)
}

#[inline(always)]
const fn timer(has: u32, replaced: Replaced, given: [u32; 2]) -> u32 {
    if let Some(original) = replaced.application(has) {
        original
    } else if has == given[0] || has == given[1] {
        0
    } else {
        has
    }
}

/// The plan for a socket that an earlier policy may have written to: what the
/// application wants, under the policy of now.
///
/// Idle, interval and probes cannot become unset again: where the policy would
/// leave them so, the namespace's sysctls take their place.
///
/// An application that turned SO_KEEPALIVE on or off itself, as far as that is
/// known, has the last word on it, unless the policy has a bound for it.
#[must_use]
#[inline(always)]
pub fn replan(
    policy: &Policy,
    has: &Options,
    application: &Options,
    originals: &Originals,
    environment: &Environment,
) -> Plan {
    let mut plan = plan(policy, application, environment);
    let wants = &mut plan.wants;
    if policy.ignores() {
        *wants = *has;
        return plan;
    }
    if originals.asked_later() && !policy.keepalive().holds() {
        wants.keepalive = application.keepalive;
    }
    if policy.keepalive().turns_off() {
        // It leaves the timers, so there is nothing to give back.
        wants.idle = has.idle;
        wants.interval = has.interval;
        wants.probes = has.probes;
        return plan;
    }
    let (idle, interval, probes) = environment.as_timers();
    wants.idle = give_back(has.idle, wants.idle, idle);
    wants.interval = give_back(has.interval, wants.interval, interval);
    wants.probes = give_back(has.probes, wants.probes, probes);
    plan
}

/// A timer that is to be unset gets the sysctl where it is set, if that is known.
#[inline(always)]
const fn give_back(has: u32, wants: u32, sysctl: u32) -> u32 {
    if wants != 0 || has == 0 {
        wants
    } else if sysctl != 0 {
        sysctl
    } else {
        has
    }
}

#[inline(always)]
const fn has_keepalive_timers(options: &Options) -> bool {
    options.idle | options.interval | options.probes != 0
}

/// What is kept beside a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketHistory {
    /// What the application wants.
    pub originals: Originals,
    /// What the connection is held to, whatever the application sets: nothing,
    /// where [`Policy::holds`] says no.
    pub held_to: Policy,
    /// Where the socket is.
    pub environment: Environment,
}

/// What becomes of an option that an application sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The options as they should be then; the one that is being set among them.
    pub wants: Options,
    /// What the others were before.
    pub had: Options,
}

impl SocketHistory {
    /// The application sets an option of a connection that is held to a policy.
    /// None where the kernel is to answer alone: the value is one that it
    /// refuses.
    ///
    /// Setting again what is in effect, on an option whose wish was bounded,
    /// changes nothing: so an application can read a value and write it back.
    #[must_use]
    #[inline(always)]
    pub fn set(&mut self, option: SocketOption, value: u32) -> Option<Answer> {
        let had = self.originals.written();
        let mut application = application(&had, &self.originals, None, &self.environment);
        let mut asked_later = self.originals.asked_later();
        let (timer, had_timer, least, most) = match option {
            SocketOption::Keepalive => {
                application.keepalive = value != 0;
                asked_later = true;
                (None, 0, 0, u32::MAX)
            }
            SocketOption::Idle => (
                Some(&mut application.idle),
                had.idle,
                MIN_SECONDS,
                MAX_SECONDS,
            ),
            SocketOption::Interval => (
                Some(&mut application.interval),
                had.interval,
                MIN_SECONDS,
                MAX_SECONDS,
            ),
            SocketOption::Probes => (
                Some(&mut application.probes),
                had.probes,
                MIN_PROBES,
                MAX_PROBES,
            ),
            SocketOption::UserTimeout => (
                Some(&mut application.user_timeout),
                had.user_timeout,
                0,
                MAX_USER_TIMEOUT,
            ),
            // No bound is for it.
            SocketOption::RtoMax => return None,
        };
        if value < least || value > most {
            return None;
        }
        if let Some(timer) = timer
            && (*timer == 0 || value != had_timer)
        {
            *timer = value;
        }
        self.originals = Originals::all(&application, &had, asked_later);
        let plan = replan(
            &self.held_to,
            &had,
            &application,
            &self.originals,
            &self.environment,
        );
        let wants = plan.wants;
        self.originals = Originals::all(&application, &wants, asked_later);
        Some(Answer { wants, had })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Keepalive, Range, SysctlTimer};

    fn policy(idle: Range) -> Policy {
        let mut policy = Policy::BUILT_IN;
        policy.idle = idle;
        policy
    }

    /// One socket through a row of policies, as the sweep does it.
    struct Socket {
        has: Options,
        originals: Originals,
        before: Option<Policy>,
        environment: Environment,
    }

    impl Socket {
        fn new(idle: u32) -> Self {
            Self {
                has: Options {
                    idle,
                    ..Options::default()
                },
                originals: Originals::default(),
                before: None,
                environment: Environment::UNCHANGED,
            }
        }

        fn sweep(&mut self, policy: Policy) -> u32 {
            let environment = self.environment;
            let before = self.before.as_ref();
            let application = application(&self.has, &self.originals, before, &environment);
            let plan = replan(
                &policy,
                &self.has,
                &application,
                &self.originals,
                &environment,
            );
            if policy.is_enforced() {
                self.has = plan.wants;
            }
            let known = known_by(&policy, &plan, &environment);
            self.originals = Originals::of(&application, &self.has, &known);
            self.before = Some(policy);
            self.has.idle
        }
    }

    #[test]
    fn equal_timers_are_timers() {
        for (idle, interval, probes) in [(5, 5, 0), (0, 5, 5), (5, 0, 5), (5, 0, 0)] {
            let options = Options {
                idle,
                interval,
                probes,
                ..Options::default()
            };
            assert!(has_keepalive_timers(&options), "{options:?}");
        }
        assert!(!has_keepalive_timers(&Options::default()));
    }

    #[test]
    fn what_a_policy_filled_in_follows_the_policy() {
        let (a, b) = (
            policy(Range::default_only(60)),
            policy(Range::default_only(30)),
        );
        let mut socket = Socket::new(0);
        assert_eq!([a, b, a].map(|policy| socket.sweep(policy)), [60, 30, 60]);
    }

    #[test]
    fn what_the_application_set_comes_back() {
        let free = policy(Range::default_only(60));
        let bounded = policy(Range {
            default: 60,
            at_least: 0,
            at_most: 300,
        });
        let exact = policy(Range::exactly(45));
        let mut socket = Socket::new(7200);
        assert_eq!(
            [free, bounded, exact, free, exact, bounded, free].map(|policy| socket.sweep(policy)),
            [7200, 300, 45, 7200, 45, 300, 7200]
        );
        assert_eq!(socket.originals.idle, Replaced::default());
    }

    #[test]
    fn a_value_that_waits_to_be_changed_is_still_known() {
        for (application_idle, expected) in [(0, 20), (7200, 7200)] {
            let mut socket = Socket::new(application_idle);
            let policies = [60, 30, 20].map(|idle| policy(Range::default_only(idle)));
            socket.sweep(policies[0]);
            // The second one is for later, and the third comes before that.
            let environment = socket.environment;
            let before = Some(&policies[0]);
            let application = application(&socket.has, &socket.originals, before, &environment);
            let given = given(&policies[1], &environment);
            socket.originals = Originals::of(&application, &socket.has, &given);
            socket.before = Some(policies[1]);
            assert_eq!(socket.sweep(policies[2]), expected);
            assert_eq!(socket.originals.idle, Replaced::default());
        }
    }

    #[test]
    fn what_a_policy_set_is_known_after_one_that_is_only_counted() {
        let (a, b) = (
            policy(Range::default_only(60)),
            policy(Range::default_only(30)),
        );
        let [dry_a, dry_b] = [a, b].map(|policy| policy.with_enforcement(false));
        let bounded = policy(Range::exactly(45));
        for (application, expected) in [
            (0, [60, 60, 60, 30, 30, 45, 45, 60]),
            (7200, [7200, 7200, 7200, 7200, 7200, 45, 45, 7200]),
        ] {
            let mut socket = Socket::new(application);
            let policies = [a, dry_a, dry_b, b, dry_a, bounded, dry_b, a];
            assert_eq!(policies.map(|policy| socket.sweep(policy)), expected);
            assert_eq!(socket.originals.idle, Replaced::default());
        }
    }

    #[test]
    fn who_turned_keepalive_on_is_known_beside_timers_of_the_application() {
        let policy = policy(Range::default_only(60));
        let mut socket = Socket::new(7200);
        for _ in 0..2 {
            socket.sweep(policy);
            let Socket { has, originals, .. } = &socket;
            let application = application(has, originals, Some(&policy), &socket.environment);
            assert!(has.keepalive && !application.keepalive, "{originals:?}");
        }
    }

    #[test]
    fn what_the_application_sets_meanwhile_counts() {
        let exact = policy(Range::exactly(45));
        let free = policy(Range::default_only(60));
        let mut socket = Socket::new(7200);
        assert_eq!(socket.sweep(exact), 45);
        socket.has.idle = 90;
        assert_eq!(socket.sweep(free), 90);
    }

    #[test]
    fn a_user_timeout_can_become_unset_again() {
        let mut with = Policy::BUILT_IN;
        with.user_timeout = Range::default_only(30_000);
        let mut socket = Socket::new(0);
        socket.sweep(with);
        assert_eq!(socket.has.user_timeout, 30_000);
        socket.sweep(Policy::BUILT_IN);
        assert_eq!(socket.has.user_timeout, 0);
        assert_eq!(socket.has.idle, 60);
    }

    #[test]
    fn a_user_timeout_derived_from_the_applications_idle_is_the_policys() {
        let mut derived = Policy::BUILT_IN.with_derived_user_timeout(true);
        derived.idle.at_most = 300;
        for idle in [0, 100, 7200] {
            let mut socket = Socket::new(idle);
            socket.sweep(derived);
            assert_ne!(socket.has.user_timeout, 0);
            socket.sweep(Policy::BUILT_IN);
            assert_eq!(socket.has.user_timeout, 0, "idle {idle}");
        }
    }

    #[test]
    fn off_and_back_keeps_the_timers() {
        let mut socket = Socket::new(0);
        socket.sweep(Policy::BUILT_IN);
        socket.sweep(Policy::BUILT_IN.with_keepalive(Keepalive::Off));
        assert_eq!((socket.has.keepalive, socket.has.idle), (false, 60));
        socket.sweep(Policy::BUILT_IN);
        assert_eq!((socket.has.keepalive, socket.has.idle), (true, 60));
    }

    #[test]
    fn a_derived_user_timeout_follows_the_timers_it_was_derived_from() {
        let derived = Policy::BUILT_IN.with_derived_user_timeout(true);
        let mut socket = Socket::new(0);
        socket.sweep(derived);
        assert_eq!(socket.has.user_timeout, 120_000);
        // The application changes its mind again and again.
        // After 300 s a timer may be 16 s late: more than an interval.
        for (idle, expected) in [(300, 368_000), (100, 160_000), (15, 75_000), (300, 368_000)] {
            socket.has.idle = idle;
            socket.sweep(derived);
            assert_eq!((socket.has.idle, socket.has.user_timeout), (idle, expected));
        }
        socket.sweep(Policy::BUILT_IN);
        assert_eq!((socket.has.idle, socket.has.user_timeout), (300, 0));
    }

    #[test]
    fn a_user_timeout_of_the_application_is_not_taken_for_a_derived_one() {
        let derived = Policy::BUILT_IN.with_derived_user_timeout(true);
        let mut socket = Socket::new(0);
        socket.sweep(derived);
        socket.has.idle = 300;
        socket.sweep(derived);
        socket.has.user_timeout = 900_000;
        for policy in [derived, Policy::BUILT_IN] {
            socket.sweep(policy);
            assert_eq!(socket.has.user_timeout, 900_000);
        }
    }

    #[test]
    fn a_derived_lower_bound_follows_too() {
        let policy = Policy::BUILT_IN.with_derived_at_least(true);
        let mut socket = Socket::new(0);
        socket.has.user_timeout = 20_000;
        for (idle, expected) in [(0, 120_000), (300, 368_000), (100, 160_000)] {
            if idle != 0 {
                socket.has.idle = idle;
            }
            socket.sweep(policy);
            assert_eq!(socket.has.user_timeout, expected);
        }
        socket.sweep(Policy::BUILT_IN.with_ignore(true));
        assert_eq!(socket.has.user_timeout, 160_000);
        let mut free = Policy::BUILT_IN;
        free.probes = Range::exactly(1);
        socket.sweep(free);
        assert_eq!(socket.has.user_timeout, 20_000);
    }

    #[test]
    fn what_a_sysctl_gave_is_the_policys() {
        let mut socket = Socket::new(0);
        socket.environment.idle = 20;
        assert_eq!(socket.sweep(Policy::BUILT_IN), 20);
        assert!(socket.originals.is_empty());
        // It has been loosened, and tightened.
        for (sysctl, expected) in [(20, 20), (7200, 20)] {
            socket.environment.idle = sysctl;
            assert_eq!(socket.sweep(Policy::BUILT_IN), expected);
        }
        let mut socket = Socket::new(0);
        assert_eq!(socket.sweep(Policy::BUILT_IN), 60);
        socket.environment.idle = 20;
        assert_eq!(socket.sweep(Policy::BUILT_IN), 20);
    }

    #[test]
    fn what_is_left_again_gets_the_sysctl() {
        let mut left = Policy::BUILT_IN;
        for range in [&mut left.idle, &mut left.interval, &mut left.probes] {
            *range = Range::LEAVE;
        }
        let left = left
            .with_sysctl(SysctlTimer::Idle, false)
            .with_sysctl(SysctlTimer::Interval, false)
            .with_sysctl(SysctlTimer::Probes, false);
        let mut socket = Socket::new(0);
        socket.sweep(Policy::BUILT_IN);
        for _ in 0..2 {
            socket.sweep(left);
            let Options {
                idle,
                interval,
                probes,
                ..
            } = socket.has;
            assert_eq!((idle, interval, probes), (7200, 75, 9));
        }
        // And is still known not to be the application's.
        assert_eq!(socket.sweep(Policy::BUILT_IN), 60);
        assert_eq!((socket.has.interval, socket.has.probes), (10, 6));
        assert!(socket.originals.is_empty());
        // What nobody ever set stays so.
        let mut untouched = Socket::new(0);
        assert_eq!(untouched.sweep(left), 0);
        assert_eq!((untouched.has.interval, untouched.has.probes), (0, 0));
        // Without knowledge of the sysctls they keep what they have.
        socket.environment = Environment::UNKNOWN;
        socket.environment.hz = 250;
        assert_eq!(socket.sweep(left), 60);
    }

    #[test]
    fn keepalive_gives_way_to_a_user_timeout_that_is_set_later() {
        for environment in [
            Environment::UNCHANGED,
            // The policy gives what would be given back.
            Environment {
                idle: 20,
                interval: 5,
                probes: 4,
                ..Environment::UNCHANGED
            },
        ] {
            let mut socket = Socket::new(0);
            socket.environment = environment;
            socket.sweep(Policy::BUILT_IN);
            assert!(socket.has.keepalive);
            socket.has.user_timeout = 20_000;
            socket.sweep(Policy::BUILT_IN);
            assert!(!socket.has.keepalive);
            assert_eq!(socket.has.idle, environment.idle);
            // What the application turns on afterwards is its own.
            socket.has.keepalive = true;
            socket.sweep(Policy::BUILT_IN);
            assert!(socket.has.keepalive);
            assert_eq!(socket.has.idle, environment.idle);
            // The cure brings everything back.
            socket.sweep(Policy::BUILT_IN.with_derived_at_least(true));
            let plan = given(&Policy::BUILT_IN, &environment);
            assert_eq!(socket.has.idle, plan.idle);
            assert!(socket.has.user_timeout > 20_000);
        }
    }

    #[test]
    fn keepalive_of_an_application_that_sets_a_timer_stays_on() {
        let mut socket = Socket::new(0);
        socket.sweep(Policy::BUILT_IN);
        socket.has.interval = 30;
        socket.has.user_timeout = 20_000;
        socket.sweep(Policy::BUILT_IN);
        let Options {
            keepalive,
            idle,
            interval,
            probes,
            ..
        } = socket.has;
        assert_eq!((keepalive, idle, interval, probes), (true, 7200, 30, 9));
    }

    #[test]
    fn keepalive_without_a_timer_of_a_policy_is_the_applications() {
        let mut socket = Socket::new(0);
        socket.has.keepalive = true;
        socket.has.user_timeout = 20_000;
        socket.sweep(Policy::BUILT_IN);
        assert!(socket.has.keepalive);
        assert_eq!(socket.has.idle, 0);
    }

    #[test]
    fn keepalive_is_the_applications_whichever_timers_it_set() {
        let timers = |idle, interval, probes| Options {
            keepalive: true,
            idle,
            interval,
            probes,
            ..Options::default()
        };
        for has in [
            timers(0, 0, 0),
            timers(5, 0, 0),
            timers(0, 5, 0),
            timers(0, 0, 5),
            timers(5, 5, 0),
            timers(5, 0, 5),
            timers(0, 5, 5),
        ] {
            let mut socket = Socket::new(0);
            socket.has = has;
            // Turned off by a policy, and then left to it again.
            for policy in [Keepalive::On, Keepalive::Off, Keepalive::Leave] {
                socket.sweep(Policy::BUILT_IN.with_keepalive(policy));
            }
            assert!(socket.has.keepalive, "{has:?}");
            // Where the record is lost, its timers say so still.
            let before = Policy::BUILT_IN;
            let found = application(&has, &Originals::NONE, Some(&before), &socket.environment);
            assert_eq!(found, has);
        }
    }

    #[test]
    fn keepalive_is_the_policys_where_all_timers_are() {
        let ten = Range::default_only(10);
        for (interval, probes) in [(ten, Range::LEAVE), (Range::LEAVE, ten), (ten, ten)] {
            let mut before = policy(ten);
            (before.interval, before.probes) = (interval, probes);
            let here = Environment::UNCHANGED;
            let has = given(&before, &here);
            let found = application(&has, &Originals::NONE, Some(&before), &here);
            assert_eq!(found, Options::default(), "{has:?}");
        }
    }

    #[test]
    fn nothing_is_kept_where_nothing_has_to_be() {
        let nothing = Options::default();
        assert!(Originals::of(&nothing, &nothing, &nothing).is_empty());
        let on = Options {
            keepalive: true,
            ..nothing
        };
        let with_timer = Options { idle: 5, ..nothing };
        assert!(Originals::of(&nothing, &on, &on).is_empty());
        assert!(!Originals::of(&on, &on, &on).is_empty());
        assert!(Originals::of(&with_timer, &with_timer, &on).keepalive != 0);
        let same = Originals::of(&with_timer, &with_timer, &with_timer);
        assert!(same.is_empty(), "{same:?}");
    }

    #[test]
    fn a_derived_user_timeout_is_known_without_a_record() {
        let derived = Policy::BUILT_IN.with_derived_user_timeout(true);
        let here = Environment::UNCHANGED;
        let asked = Options {
            idle: 100,
            ..Options::default()
        };
        let has = plan(&derived, &asked, &here).wants;
        assert_eq!(has.user_timeout, 160_000);
        let found = application(&has, &Originals::NONE, Some(&derived), &here);
        assert_eq!((found.idle, found.user_timeout), (100, 0));
    }

    /// A connection on which nothing was set, held to a policy.
    fn held_to(policy: Policy) -> SocketHistory {
        let environment = Environment::UNCHANGED;
        let wants = plan(&policy, &Options::default(), &environment).wants;
        SocketHistory {
            originals: Originals::all(&Options::default(), &wants, false),
            held_to: policy,
            environment,
        }
    }

    #[test]
    fn a_wish_is_bounded_and_kept() {
        let mut bounded = Policy::BUILT_IN;
        bounded.idle = Range {
            default: 60,
            at_least: 30,
            at_most: 300,
        };
        let mut socket = held_to(bounded);
        let mut had = 60;
        assert_eq!(
            socket.originals.asked(&socket.originals.written()).idle,
            Some(0)
        );
        // The last one is read from the socket and written back.
        for (value, wants, asked) in [
            (60, 60, 60),
            (10, 30, 10),
            (100, 100, 100),
            (7200, 300, 7200),
            (300, 300, 7200),
        ] {
            let answer = socket.set(SocketOption::Idle, value).unwrap();
            assert_eq!((answer.had.idle, answer.wants.idle), (had, wants));
            assert_eq!(socket.originals.asked(&answer.wants).idle, Some(asked));
            assert_eq!(socket.originals.written(), answer.wants);
            had = wants;
        }
        // What was set past the record is not known to it.
        let elsewhere = Options {
            idle: 77,
            ..socket.originals.written()
        };
        assert_eq!(socket.originals.asked(&elsewhere).idle, None);
    }

    #[test]
    fn every_timer_is_the_one_that_is_set() {
        let mut socket = held_to(Policy::BUILT_IN);
        let mut expected = socket.originals.written();
        for (option, value) in [
            (SocketOption::Idle, 11),
            (SocketOption::Interval, 12),
            (SocketOption::Probes, 13),
            (SocketOption::UserTimeout, 500_000),
        ] {
            match option {
                SocketOption::Idle => expected.idle = value,
                SocketOption::Interval => expected.interval = value,
                SocketOption::Probes => expected.probes = value,
                _ => expected.user_timeout = value,
            }
            assert_eq!(socket.set(option, value).unwrap().wants, expected);
        }
    }

    #[test]
    fn what_the_kernel_refuses_changes_nothing() {
        let most = |option| match option {
            SocketOption::Keepalive => (0, u32::MAX),
            SocketOption::Idle | SocketOption::Interval => (1, MAX_SECONDS),
            SocketOption::Probes => (1, MAX_PROBES),
            _ => (0, MAX_USER_TIMEOUT),
        };
        for option in SocketOption::ALL {
            if option == SocketOption::RtoMax {
                continue;
            }
            let (least, most) = most(option);
            for value in [least, most] {
                assert!(held_to(Policy::BUILT_IN).set(option, value).is_some());
            }
            let outside = [least.checked_sub(1), most.checked_add(1)];
            for value in outside.into_iter().flatten() {
                let mut socket = held_to(Policy::BUILT_IN);
                assert_eq!(socket.set(option, value), None, "{option:?} {value}");
                assert_eq!(socket, held_to(Policy::BUILT_IN));
            }
        }
        let mut socket = held_to(Policy::BUILT_IN);
        assert_eq!(socket.set(SocketOption::RtoMax, 5_000), None);
    }

    #[test]
    fn the_last_word_on_keepalive_is_the_applications_unless_it_is_bounded() {
        let asked = |socket: &SocketHistory| {
            let has = socket.originals.written();
            socket.originals.asked(&has).keepalive
        };
        let mut socket = held_to(Policy::BUILT_IN);
        assert_eq!(
            (asked(&socket), socket.originals.asked_later()),
            (None, false)
        );
        for (value, is_on) in [(0, false), (1, true), (0, false), (7, true)] {
            let answer = socket.set(SocketOption::Keepalive, value).unwrap();
            assert_eq!(
                (answer.had.keepalive, answer.wants.keepalive),
                (!is_on, is_on)
            );
            assert_eq!(asked(&socket), Some(is_on));
            assert!(socket.originals.asked_later());
        }
        let mut bounded = held_to(Policy::BUILT_IN.with_keepalive(Keepalive::Always));
        let answer = bounded.set(SocketOption::Keepalive, 0).unwrap();
        assert!(answer.wants.keepalive);
        // It is known what it would have.
        assert_eq!(asked(&bounded), Some(false));
        let on = Options {
            keepalive: true,
            ..Options::default()
        };
        let before = Originals::all(&on, &on, false);
        assert_eq!(before.asked(&on).keepalive, Some(true));
        assert_eq!(
            Originals::NONE.asked(&on),
            Asked {
                keepalive: None,
                idle: None,
                interval: None,
                probes: None,
                user_timeout: None,
            }
        );
    }

    #[test]
    fn a_bound_on_retransmission_goes_again() {
        let mut bounded = Policy::BUILT_IN;
        bounded.give_up = 30_000;
        let mut stricter = bounded;
        stricter.give_up = 16_000;
        for (application, expected) in [
            (0, [2_000, 1_000, 2_000, 0]),
            (5_000, [2_000, 1_000, 2_000, 5_000]),
            (1_500, [1_500, 1_000, 1_500, 1_500]),
        ] {
            let mut socket = Socket::new(0);
            socket.has.rto_max = application;
            let found = [bounded, stricter, bounded, Policy::BUILT_IN].map(|policy| {
                socket.sweep(policy);
                socket.has.rto_max
            });
            assert_eq!(found, expected, "{application}");
        }
    }

    #[test]
    fn a_policy_that_ignores_leaves_what_an_earlier_one_set() {
        let ignores = Policy::BUILT_IN.with_ignore(true);
        let other = policy(Range::default_only(30));
        let mut socket = Socket::new(0);
        assert_eq!(
            [Policy::BUILT_IN, ignores, other].map(|policy| socket.sweep(policy)),
            [60, 60, 30]
        );
        let mut socket = Socket::new(7200);
        assert_eq!(socket.sweep(policy(Range::exactly(45))), 45);
        assert_eq!(socket.sweep(ignores), 45);
        assert_eq!(socket.sweep(other), 7200);
    }

    #[test]
    fn never_takes_keepalive_away_and_leaves_the_timers() {
        let mut socket = Socket::new(5);
        socket.has.keepalive = true;
        socket.sweep(Policy::BUILT_IN.with_keepalive(Keepalive::Never));
        assert_eq!((socket.has.keepalive, socket.has.idle), (false, 5));
        socket.sweep(Policy::BUILT_IN.with_keepalive(Keepalive::Always));
        assert!(socket.has.keepalive);
    }

    #[test]
    fn the_record_has_no_padding() {
        assert_eq!(size_of::<Originals>(), 5 * 8 + 4);
        assert_eq!(
            size_of::<SocketHistory>(),
            size_of::<Originals>() + size_of::<Policy>() + size_of::<Environment>()
        );
    }
}
