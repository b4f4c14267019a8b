//! The arithmetic of the kernel's timers: when the keepalive timer fires, and
//! after how long retransmission gives up.
#![cfg_attr(
    target_arch = "bpf",
    expect(unsafe_code, reason = "names of global functions")
)]

use crate::policy::{MAX_RTO_MAX, MAX_USER_TIMEOUT, MIN_RTO_MAX, time_to_notice};

/// After how many ticks of silence a probe has gone out at the latest, by its
/// number from 1 on; `idle` and `interval` in seconds.
///
/// The first comes after the idle time, or after the interval where that is
/// longer: an answered probe arms the timer for an interval, and what is silent
/// for longer than idle by then is probed at once (`tcp_keepalive_timer` in
/// net/ipv4/tcp_timer.c).
///
/// The kernel's timers fire late: each by the granularity of its wheel
/// (`granularity`), and by a tick for what else the processor does.
#[must_use]
#[inline(always)]
pub const fn latest_probe(idle: u32, interval: u32, number: u32, hz: u32) -> u64 {
    let hz = hz as u64;
    let before = number.saturating_sub(1) as u64;
    let first = if idle < interval { interval } else { idle };
    late(first as u64 * hz) + before * late(interval as u64 * hz)
}

/// See [`crate::plan::derived_user_timeout`].
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[inline(never)]
pub(crate) const extern "C" fn user_timeout(idle: u32, interval: u32, probes: u32, hz: u32) -> u32 {
    if idle == 0 || interval == 0 || probes == 0 || hz == 0 {
        return 0;
    }
    let enough = (latest_probe(idle, interval, probes, hz) / hz as u64 + 1) * 1000;
    let by_probes = time_to_notice(idle, interval, probes);
    if enough > MAX_USER_TIMEOUT as u64 {
        MAX_USER_TIMEOUT
    } else if enough < by_probes as u64 {
        by_probes
    } else {
        #[expect(clippy::cast_possible_truncation, reason = "bounded just above")]
        let enough = enough as u32;
        enough
    }
}

/// See [`crate::plan::ends_early`]; 1 is yes.
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[inline(never)]
pub(crate) const extern "C" fn user_timeout_ends_early(
    idle: u32,
    interval: u32,
    probes: u32,
    user_timeout: u32,
    hz: u32,
) -> u32 {
    let last = latest_probe(idle, interval, probes, hz);
    let ends = user_timeout != 0 && probes > 1 && user_timeout as u64 * hz as u64 <= last * 1000;
    ends as u32
}

/// When a timer of so many ticks has fired at the latest.
#[inline(always)]
const fn late(ticks: u64) -> u64 {
    ticks + granularity(ticks) + 1
}

/// Timers of so many ticks fire at the next multiple of this many ticks
/// (`LVL_START`, `LVL_GRAN` and `calc_index` in kernel/time/timer.c): 1 below 63
/// ticks, 8 from there on, 64 from 8 times as many on, and so forth.
///
/// Without branches: the verifier would follow each of the nine levels.
#[inline(always)]
const fn granularity(ticks: u64) -> u64 {
    /// The lowest bit of each octal digit.
    const LOWEST: u64 = 0o111_111_111_111_111_111_111;
    let mut digits = ticks / 63;
    // Every digit below the first one that is not 0 becomes something else too.
    digits |= digits >> 3;
    digits |= digits >> 6;
    digits |= digits >> 12;
    digits |= digits >> 24;
    digits |= digits >> 48;
    // A 1 for each digit, which is 7 times less than 8 to the power of their
    // number, less 1.
    let ones = (digits | digits >> 1 | digits >> 2) & LOWEST;
    7 * ones + 1
}

/// The shortest time between two transmissions, in milliseconds (`TCP_RTO_MIN`
/// in include/net/tcp.h): the kernel counts with it whatever it really was.
const RTO_MIN: u64 = 200;

/// Retransmission timeouts are set in steps of this many milliseconds: whole
/// ticks, whatever the kernel's clock, so that they are read back unchanged.
const RTO_STEP: u64 = 100;

/// After how long retransmission has given up at the latest, in milliseconds,
/// counted from the first transmission (`tcp_model_timeout` and
/// `retransmits_timed_out` in net/ipv4/tcp_timer.c). `retries` is
/// `net.ipv4.tcp_retries2`.
///
/// The kernel looks when the next retransmission is due, so up to `rto_max`
/// later than its model says.
#[must_use]
pub const fn retransmission_ends(rto_max: u32, retries: u32) -> u64 {
    let rto_max = if rto_max < MIN_RTO_MAX {
        MIN_RTO_MAX as u64
    } else {
        rto_max as u64
    };
    let doublings = (rto_max / RTO_MIN).ilog2();
    ends(rto_max, retries, doublings)
}

/// The same where it is known how often the timeout doubles before it is
/// `rto_max`.
#[inline(always)]
const fn ends(rto_max: u64, retries: u32, doublings: u32) -> u64 {
    if retries <= doublings {
        doubled(retries) + rto_max
    } else {
        doubled(doublings) + (retries - doublings) as u64 * rto_max + rto_max
    }
}

/// The sum of the first timeouts, of which each is twice the one before.
#[inline(always)]
const fn doubled(times: u32) -> u64 {
    ((2 << times) - 1) * RTO_MIN
}

/// The longest TCP_RTO_MAX_MS with which retransmission has given up after
/// `give_up` milliseconds; [`MIN_RTO_MAX`] where none is short enough.
#[must_use]
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[inline(never)]
pub const extern "C" fn rto_max_for(give_up: u32, retries: u32) -> u32 {
    const FEWEST: u32 = 2;
    const MOST: u32 = 9;
    let give_up = give_up as u64;
    let mut doublings = MOST;
    while doublings > FEWEST && ends(RTO_MIN << doublings, retries, doublings) > give_up {
        doublings -= 1;
    }
    let rto_max = if retries <= doublings {
        give_up.saturating_sub(doubled(retries))
    } else {
        give_up.saturating_sub(doubled(doublings)) / (retries - doublings + 1) as u64
    };
    // Above that it would double once more.
    let next = (RTO_MIN << (doublings + 1)) - RTO_STEP;
    let rto_max = if doublings < MOST && rto_max > next {
        next
    } else {
        rto_max
    };
    let rto_max = rto_max / RTO_STEP * RTO_STEP;
    if rto_max < MIN_RTO_MAX as u64 {
        MIN_RTO_MAX
    } else if rto_max > MAX_RTO_MAX as u64 {
        MAX_RTO_MAX
    } else {
        #[expect(clippy::cast_possible_truncation, reason = "bounded just above")]
        let rto_max = rto_max as u32;
        rto_max
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `LVL_GRAN` of the level that `calc_wheel_index` chooses.
    fn wheel(ticks: u64) -> u64 {
        let level = (1..9).take_while(|level| ticks >= 63 << (3 * (level - 1)));
        1 << (3 * level.count())
    }

    #[test]
    fn granularity_is_that_of_the_wheel() {
        for (ticks, expected) in [
            (0, 1),
            (62, 1),
            (63, 8),
            (503, 8),
            (504, 64),
            (15_000, 512),
            (1_800_000, 32_768),
        ] {
            assert_eq!(granularity(ticks), expected, "{ticks}");
            assert_eq!(wheel(ticks), expected, "{ticks}");
        }
    }

    #[test]
    fn a_probe_is_late_by_what_all_timers_before_it_are() {
        // 60 s are 15,000 ticks, 10 s are 2,500.
        assert_eq!(latest_probe(60, 10, 0, 250), 15_513);
        assert_eq!(latest_probe(60, 10, 1, 250), 15_513);
        assert_eq!(latest_probe(60, 10, 6, 250), 15_513 + 5 * 2_565);
        // Shorter than the interval.
        assert_eq!(latest_probe(1, 60, 2, 250), 2 * 15_513);
    }

    #[test]
    fn retransmission_ends_as_it_was_seen_to() {
        // On Linux 6.18: 15.0 s with TCP_RTO_MAX_MS at 1000.
        assert_eq!(retransmission_ends(1000, 15), 15_400);
        // The kernel's documentation of tcp_retries2: 924.6 s.
        assert_eq!(retransmission_ends(120_000, 15), 924_600 + 120_000);
        // The shortest one that the kernel takes.
        assert_eq!(retransmission_ends(0, 15), 15_400);
        assert_eq!(retransmission_ends(120_000, 3), 3_000 + 120_000);
    }

    #[test]
    fn a_time_to_give_up_becomes_a_timeout() {
        for (give_up, retries, expected) in [
            (1_000, 15, 1000),
            (15_400, 15, 1000),
            (17_000, 15, 1_100),
            (30_000, 15, 2_000),
            (60_000, 15, 4_400),
            (120_000, 15, 9_700),
            (1_044_600, 15, 120_000),
            (u32::MAX, 15, 120_000),
            (30_000, 8, 4_700),
            (30_000, 3, 27_000),
            (30_000, 0, 29_800),
            (30_000, 255, 1000),
        ] {
            assert_eq!(
                rto_max_for(give_up, retries),
                expected,
                "{give_up} {retries}"
            );
        }
    }

    proptest! {
        #[test]
        fn granularity_is_that_of_the_wheel_everywhere(ticks in 0_u64..63 << 24) {
            prop_assert_eq!(granularity(ticks), wheel(ticks));
        }

        #[test]
        fn the_timeout_is_the_longest_that_is_short_enough(
            give_up in 1_000_u32..2_000_000,
            retries in 0_u32..=255,
        ) {
            let rto_max = rto_max_for(give_up, retries);
            prop_assert!((MIN_RTO_MAX..=MAX_RTO_MAX).contains(&rto_max));
            prop_assert_eq!(u64::from(rto_max) % RTO_STEP, 0);
            if rto_max > MIN_RTO_MAX {
                prop_assert!(retransmission_ends(rto_max, retries) <= give_up.into());
            }
            if rto_max < MAX_RTO_MAX {
                let longer = retransmission_ends(rto_max + 100, retries);
                prop_assert!(longer > give_up.into());
            }
        }
    }
}
