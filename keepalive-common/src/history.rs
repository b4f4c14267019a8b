//! History: telling what the application set from what a policy set before.
//!
//! The kernel keeps one value per timer, not who wrote it. A policy that changes
//! must find its own earlier values again, and give back what it took:
//!
//! * where a policy moved a value of the application, the original is kept
//!   beside the socket ([`Originals`]; rare, so the memory is paid rarely);
//! * so it is where a value of an earlier policy has to stay for a while, because
//!   the change waits for its turn, or because the policy of now is only counted:
//!   another policy may come before that;
//! * where a connection is held to bounds, everything that the application asked
//!   for is kept ([`SocketHistory`]), and what it asks for later with it;
//! * everything else that a policy wrote is what it gives to an unset timer, so
//!   the earlier policy is all that is needed to recognise it.

use crate::{
    counters::SocketOption,
    plan::{Options, plan},
    policy::{
        Keepalive, MAX_PROBES, MAX_SECONDS, MAX_USER_TIMEOUT, MIN_PROBES, MIN_SECONDS, Policy,
    },
};

/// A value of the application that a policy replaced; all zero where there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    const fn new(application: u32, now: u32, wants: u32) -> Self {
        let original = if application == now {
            0
        } else if application != 0 {
            application
        } else if now != wants {
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
pub struct Originals {
    /// Of TCP_KEEPIDLE.
    pub idle: Replaced,
    /// Of TCP_KEEPINTVL.
    pub interval: Replaced,
    /// Of TCP_KEEPCNT.
    pub probes: Replaced,
    /// Of TCP_USER_TIMEOUT.
    pub user_timeout: Replaced,
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
            keepalive: keepalive_flags(application.keepalive, asked_later, now.keepalive),
        }
    }

    /// What the application wants of SO_KEEPALIVE, where that is known for a
    /// socket on which it `is` on or off.
    #[must_use]
    #[inline(always)]
    pub const fn asks_keepalive(&self, is: bool) -> Option<bool> {
        if self.keepalive & IS_KNOWN == 0 || (self.keepalive & IS_ON != 0) != is {
            None
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
        }
    }

    /// What is to be kept once a socket has what is set `now`, for an
    /// `application` that wanted something else, where the policy `wants`
    /// something else still. A policy that is only counted wants nothing.
    #[must_use]
    #[inline(always)]
    pub const fn of(application: &Options, now: &Options, wants: &Options) -> Self {
        Self {
            idle: Replaced::new(application.idle, now.idle, wants.idle),
            interval: Replaced::new(application.interval, now.interval, wants.interval),
            probes: Replaced::new(application.probes, now.probes, wants.probes),
            user_timeout: Replaced::new(
                application.user_timeout,
                now.user_timeout,
                wants.user_timeout,
            ),
            // Where keepalive is on and the application set no timer of it, it
            // looks as if the policy of now had turned it on.
            keepalive: if application.keepalive
                && (!has_keepalive_timers(application) || !now.keepalive)
                || !application.keepalive && now.keepalive && !wants.keepalive
            {
                keepalive_flags(application.keepalive, false, now.keepalive)
            } else {
                0
            },
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
/// policy `before` may have written, unless it was only counted.
///
/// A value that the application set itself and that is just what that policy
/// would have given it cannot be told apart and counts as the policy's.
/// So it is with SO_KEEPALIVE: where it is on, and every timer of keepalive that
/// is set is that policy's, the policy turned it on, unless something else is
/// known.
#[must_use]
#[inline(always)]
pub fn application(has: &Options, originals: &Originals, before: Option<&Policy>) -> Options {
    let timers = application_timers(has, originals, before);
    Options {
        keepalive: application_keepalive(has, originals, before, &timers),
        ..timers
    }
}

/// The timers of [`application`]. The two halves are apart for BPF programs, whose
/// verifier would follow each way through the one into each way through the other.
#[must_use]
#[inline(always)]
pub fn application_timers(
    has: &Options,
    originals: &Originals,
    before: Option<&Policy>,
) -> Options {
    let before = before.filter(|before| before.is_enforced());
    let given = before.map_or(Options::default(), given);
    let mut application = with_given(has, originals, &given);
    if let Some(before) = before
        && before.derives_user_timeout()
    {
        // What it derived followed from the timers of this socket.
        let derived = plan(
            before,
            &Options {
                user_timeout: 0,
                ..application
            },
        );
        application.user_timeout = timer(
            has.user_timeout,
            originals.user_timeout,
            derived.user_timeout,
        );
    }
    application
}

/// SO_KEEPALIVE of [`application`], given its timers.
#[must_use]
#[inline(always)]
pub fn application_keepalive(
    has: &Options,
    originals: &Originals,
    before: Option<&Policy>,
    timers: &Options,
) -> bool {
    if let Some(asked) = originals.asks_keepalive(has.keepalive) {
        return asked;
    }
    let turned_on = before
        .is_some_and(|before| before.is_enforced() && before.keepalive() == Keepalive::On)
        && has_keepalive_timers(has)
        && !has_keepalive_timers(timers);
    has.keepalive && !turned_on
}

#[inline(always)]
const fn has_keepalive_timers(options: &Options) -> bool {
    options.idle | options.interval | options.probes != 0
}

#[inline(always)]
fn with_given(has: &Options, originals: &Originals, given: &Options) -> Options {
    Options {
        keepalive: has.keepalive,
        idle: timer(has.idle, originals.idle, given.idle),
        interval: timer(has.interval, originals.interval, given.interval),
        probes: timer(has.probes, originals.probes, given.probes),
        user_timeout: timer(has.user_timeout, originals.user_timeout, given.user_timeout),
    }
}

/// What a policy gives to a socket whose application set nothing.
#[must_use]
#[inline(always)]
pub fn given(policy: &Policy) -> Options {
    plan(policy, &Options::default())
}

#[inline(always)]
const fn timer(has: u32, replaced: Replaced, given: u32) -> u32 {
    if let Some(original) = replaced.application(has) {
        original
    } else if has == given {
        0
    } else {
        has
    }
}

/// The plan for a socket that an earlier policy may have written to: what the
/// application wants, under the policy of now.
///
/// Of the timers only the user-timeout can become unset again; the others keep
/// the value they have where the policy would leave them unset.
#[must_use]
#[inline(always)]
pub fn replan(
    policy: &Policy,
    has: &Options,
    application: &Options,
    originals: &Originals,
) -> Options {
    let mut wants = plan(policy, application);
    if originals.asked_later() {
        wants.keepalive = application.keepalive;
    }
    if policy.keepalive() == Keepalive::Off {
        // It leaves the timers, so there is nothing to give back.
        wants.idle = has.idle;
        wants.interval = has.interval;
        wants.probes = has.probes;
    }
    wants.idle = keep_set(has.idle, wants.idle);
    wants.interval = keep_set(has.interval, wants.interval);
    wants.probes = keep_set(has.probes, wants.probes);
    wants
}

#[inline(always)]
const fn keep_set(has: u32, wants: u32) -> u32 {
    if wants == 0 { has } else { wants }
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
        let mut application = application(&had, &self.originals, None);
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
        let wants = replan(&self.held_to, &had, &application, &self.originals);
        self.originals = Originals::all(&application, &wants, asked_later);
        Some(Answer { wants, had })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Range;

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
            }
        }

        fn sweep(&mut self, policy: Policy) -> u32 {
            let application = application(&self.has, &self.originals, self.before.as_ref());
            let wants = if policy.is_enforced() {
                self.has = replan(&policy, &self.has, &application, &self.originals);
                self.has
            } else {
                Options::default()
            };
            self.originals = Originals::of(&application, &self.has, &wants);
            self.before = Some(policy);
            self.has.idle
        }
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
        assert!(socket.originals.is_empty());
    }

    #[test]
    fn a_value_that_waits_to_be_changed_is_still_known() {
        for (application_idle, expected) in [(0, 20), (7200, 7200)] {
            let mut socket = Socket::new(application_idle);
            let policies = [60, 30, 20].map(|idle| policy(Range::default_only(idle)));
            socket.sweep(policies[0]);
            // The second one is for later, and the third comes before that.
            let application = application(&socket.has, &socket.originals, Some(&policies[0]));
            let wants = replan(&policies[1], &socket.has, &application, &socket.originals);
            socket.originals = Originals::of(&application, &socket.has, &wants);
            socket.before = Some(policies[1]);
            assert_eq!(socket.sweep(policies[2]), expected);
            assert!(socket.originals.is_empty());
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
            assert!(socket.originals.is_empty());
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
    fn the_record_has_no_padding() {
        assert_eq!(size_of::<Originals>(), 4 * 8 + 4);
        assert_eq!(
            size_of::<SocketHistory>(),
            size_of::<Originals>() + size_of::<Policy>()
        );
    }
}
