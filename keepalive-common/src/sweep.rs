//! Sweep: how a pass over the existing connections of a namespace is steered.
//!
//! A connection that has been silent for longer than its idle time probes at
//! once when keepalive is turned on or its idle time changes. Thousands of them
//! in one instant fill queues: probes get lost, and so do their repetitions,
//! all in step, until the kernel takes living peers for dead. So the first pass
//! does everything but that, and a second, slow one does that, batch by batch.

use crate::{plan::Options, slot::Claim};

/// Idle times are told apart by their power of two, so that a policy with short
/// ones does not set the pace for all.
pub const CLASSES: u32 = 16;

/// The class of an idle time in seconds: from 2 to the power of this number on,
/// and below the next power.
#[must_use]
#[inline(always)]
pub const fn class(idle: u32) -> u32 {
    // Never more than 14 for an idle time that the kernel accepts.
    (idle | 1).ilog2() & (CLASSES - 1)
}

/// What a pass is to do, and what it has done so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// After so many connections that probe at once the iterator pauses; 0 in
    /// the first pass, which leaves them waiting.
    pub batch: u32,
    /// How many of the batch are done.
    pub in_batch: u32,
    /// The [`class`] whose connections may probe in a pass with batches.
    pub class: u32,
    /// 1 to count connections per policy, 0 where they have been counted.
    pub counts: u32,
    /// 1 to count what would be done and do nothing.
    pub dry_run: u32,
    /// Connections that were looked at.
    pub seen: u64,
    /// Connections that a change is still waiting for, by the class of the idle
    /// time that they are to get.
    pub waiting: [u64; CLASSES as usize],
    /// Id of the cgroup of the last connection; 0 where there is none.
    pub cgroup: u64,
    /// What claims its sockets.
    pub claim: Claim,
}

/// How long a connection has been silent, for what it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// Longer than the idle time: it probes as soon as its timer is armed.
    pub is_due: bool,
    /// Longer than until a probe would have been answered.
    pub is_stale: bool,
}

impl Silence {
    /// Of so many units, of which a second has `per_second`.
    #[must_use]
    #[inline(always)]
    pub fn new(silent: i64, per_second: i64, wants: &Options) -> Self {
        let idle = i64::from(wants.idle) * per_second;
        let interval = i64::from(wants.interval) * per_second;
        Self {
            is_due: silent >= idle,
            is_stale: silent >= idle + interval,
        }
    }
}

/// What is to be set on a connection now, of what it `wants` in the end.
///
/// The user-timeout of a stale one waits until the peer has answered: counted
/// from the last sign of life it could be over already, and a single lost probe
/// would end the connection.
#[must_use]
#[inline(always)]
pub fn now(has: &Options, wants: &Options, silence: Silence, may_probe: bool) -> Options {
    let mut now = *wants;
    if !wants.keepalive {
        return now;
    }
    if silence.is_stale && wants.user_timeout != 0 {
        now.user_timeout = has.user_timeout;
    }
    if silence.is_due && !may_probe {
        now.keepalive = has.keepalive;
        if has.keepalive {
            // Setting it would arm the timer anew.
            now.idle = has.idle;
        }
    }
    now
}

/// Whether going from one to the other makes the kernel arm the keepalive timer.
#[must_use]
#[inline(always)]
pub const fn arms(has: &Options, wants: &Options) -> bool {
    wants.keepalive && (!has.keepalive || has.idle != wants.idle)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRESH: Options = Options {
        keepalive: false,
        idle: 0,
        interval: 0,
        probes: 0,
        user_timeout: 0,
        rto_max: 0,
    };
    const WANTS: Options = Options {
        keepalive: true,
        idle: 60,
        interval: 10,
        probes: 6,
        user_timeout: 120_000,
        rto_max: 0,
    };

    const ACTIVE: Silence = Silence {
        is_due: false,
        is_stale: false,
    };
    const STALE: Silence = Silence {
        is_due: true,
        is_stale: true,
    };

    #[test]
    fn classes_are_powers_of_two() {
        for (idle, expected) in [
            (0, 0),
            (1, 0),
            (2, 1),
            (3, 1),
            (59, 5),
            (60, 5),
            (64, 6),
            (7200, 12),
            (32_767, 14),
            (u32::MAX, 15),
        ] {
            assert_eq!(class(idle), expected, "{idle}");
        }
    }

    #[test]
    fn silence_is_told_by_the_wanted_timers() {
        for (seconds, is_due, is_stale) in [
            (59, false, false),
            (60, true, false),
            (69, true, false),
            (70, true, true),
        ] {
            let found = Silence::new(seconds * 250, 250, &WANTS);
            assert_eq!(found, Silence { is_due, is_stale }, "{seconds}");
        }
    }

    #[test]
    fn a_connection_that_was_active_lately_gets_everything() {
        for may_probe in [false, true] {
            assert_eq!(now(&FRESH, &WANTS, ACTIVE, may_probe), WANTS);
        }
    }

    #[test]
    fn a_silent_one_waits_for_its_turn_to_probe() {
        let first = now(&FRESH, &WANTS, STALE, false);
        assert!(!arms(&FRESH, &first));
        assert_eq!(
            (first.keepalive, first.idle, first.user_timeout),
            (false, 60, 0)
        );
        let second = now(&first, &WANTS, STALE, true);
        assert!(arms(&first, &second));
        assert_eq!((second.keepalive, second.user_timeout), (true, 0));
        let answered = now(&second, &WANTS, ACTIVE, false);
        assert_eq!(answered, WANTS);
        assert!(!arms(&second, &answered));
    }

    #[test]
    fn one_that_is_due_and_answers_need_not_wait_for_its_user_timeout() {
        let due = Silence {
            is_due: true,
            is_stale: false,
        };
        let has = Options {
            user_timeout: 0,
            ..WANTS
        };
        assert_eq!(now(&has, &WANTS, due, false), WANTS);
    }

    #[test]
    fn a_new_idle_time_waits_too_where_keepalive_is_on() {
        let has = Options { idle: 90, ..WANTS };
        let first = now(&has, &WANTS, STALE, false);
        assert_eq!(first.idle, 90);
        assert_eq!(now(&has, &WANTS, STALE, true).idle, 60);
    }

    #[test]
    fn turning_off_and_taking_a_user_timeout_back_need_not_wait() {
        let off = Options {
            keepalive: false,
            ..WANTS
        };
        assert_eq!(now(&WANTS, &off, STALE, false), off);
        let without = Options {
            user_timeout: 0,
            ..WANTS
        };
        assert_eq!(now(&WANTS, &without, STALE, false), without);
    }

    #[test]
    fn the_record_has_no_padding() {
        assert_eq!(
            size_of::<Pass>(),
            6 * 4 + (2 + CLASSES as usize) * 8 + size_of::<Claim>()
        );
    }
}
