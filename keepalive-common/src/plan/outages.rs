//! A connection that lives through an outage without the agent lives through it
//! with the agent: the kernel's keepalive timer, modelled, and silent connections
//! on a path that is cut for a while.

use proptest::{collection::vec, prelude::*};

use super::{
    properties::{policies, set},
    *,
};
use crate::{
    history::{Originals, application, replan},
    policy::{Keepalive, MAX_PROBES},
};

/// A path that loses everything for a while; in ticks since the last activity of
/// the connection.
#[derive(Clone, Copy, Debug)]
struct Outage {
    begins: u64,
    ends: u64,
}

impl Outage {
    fn loses(self, at: u64) -> bool {
        self.begins <= at && at < self.ends
    }
}

/// Whether a connection that is silent from now on is there after the outage, as
/// `tcp_keepalive_timer` (net/ipv4/tcp_timer.c) decides it. Answers come at once.
/// The n-th firing of the timer is late by this part, in 1/255, of what it can be.
fn survives(options: &Options, hz: u32, outage: Outage, late: &[u8]) -> bool {
    if !options.keepalive {
        return true;
    }
    let hz = u64::from(hz);
    let [idle, interval] = [options.idle, options.interval].map(|time| u64::from(time) * hz);
    let user_timeout = (u64::from(options.user_timeout) * hz).div_ceil(1000);
    let mut lateness = late.iter().cycle().map(|part| u64::from(*part));
    let mut fires = |now: u64, after: u64| {
        let level = (1..9).take_while(|level| after >= 63 << (3 * (level - 1)));
        let latest = (1_u64 << (3 * level.count())) + 1;
        now + after + latest * lateness.next().unwrap_or(0) / 255
    };
    let (mut heard, mut out) = (0, 0);
    let mut now = fires(0, idle);
    // Once the path works again, every probe is answered.
    while now < outage.ends || out > 0 {
        let silence = now - heard;
        if silence < idle {
            now = fires(now, idle - silence);
            continue;
        }
        let ends = if user_timeout == 0 {
            out >= options.probes
        } else {
            silence >= user_timeout && out > 0
        };
        if ends {
            return false;
        }
        if outage.loses(now) {
            out += 1;
        } else {
            (heard, out) = (now, 0);
        }
        now = fires(now, interval);
    }
    true
}

/// An outage around the time at which these timers probe, no longer than they
/// are to survive: shorter than interval × (probes − 1).
fn outage(timers: &Options, hz: u32, begins: u64, length: u64) -> Outage {
    let hz = u64::from(hz);
    let interval = u64::from(timers.interval) * hz;
    let longest = interval * u64::from(timers.probes.saturating_sub(1));
    let idle = u64::from(timers.idle) * hz;
    // From before the first probe to after the last.
    let begins = (idle + begins % (longest + interval + 2)).saturating_sub(interval);
    Outage {
        begins,
        ends: begins + length % longest.max(1),
    }
}

/// Sockets with timers as real ones have them.
fn sockets() -> impl Strategy<Value = Options> {
    (
        any::<bool>(),
        set(300),
        set(60),
        set(MAX_PROBES.min(12)),
        set(400_000),
    )
        .prop_map(
            |(keepalive, idle, interval, probes, user_timeout)| Options {
                keepalive,
                idle,
                interval,
                probes,
                user_timeout,
                rto_max: 0,
            },
        )
}

fn environments() -> impl Strategy<Value = Environment> {
    let timers = (1..10_000_u32, 1..100_u32, 1..12_u32);
    let hz = prop_oneof![Just(100), Just(250), Just(1000)];
    (timers, hz).prop_map(|((idle, interval, probes), hz)| Environment {
        idle,
        interval,
        probes,
        hz,
        ..Environment::UNCHANGED
    })
}

/// Policies with small timers that write no user-timeout of their own: whoever
/// writes one says when connections end.
fn gentle() -> impl Strategy<Value = Policy> {
    (
        policies(),
        1..300_u32,
        1..60_u32,
        1..12_u32,
        any::<[bool; 3]>(),
    )
        .prop_map(|(mut policy, idle, interval, probes, bounded)| {
            let range = |range: Range, value, exactly| {
                if range.default == 0 {
                    Range::LEAVE
                } else if exactly {
                    Range::exactly(value)
                } else {
                    Range::default_only(value)
                }
            };
            policy.idle = range(policy.idle, idle, bounded[0]);
            policy.interval = range(policy.interval, interval, bounded[1]);
            policy.probes = range(policy.probes, probes, bounded[2]);
            policy.user_timeout = Range::LEAVE;
            policy
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    #[test]
    fn are_survived_with_a_policy_as_without(
        policy in gentle(),
        has in sockets(),
        here in environments(),
        begins: u32,
        length: u32,
        late in vec(any::<u8>(), 1..8),
    ) {
        let with = here.complete(&plan(&policy, &has, &here).wants);
        let outage = outage(&with, here.hz, begins.into(), length.into());
        let without = here.complete(&has);
        prop_assert!(
            !survives(&without, here.hz, outage, &late) || survives(&with, here.hz, outage, &late),
            "{outage:?} without {without:?} with {with:?}"
        );
    }

    /// An application may set its options after the policy was applied; the next
    /// sweep finds them.
    #[test]
    fn are_survived_after_a_sweep_whatever_was_set_meanwhile(
        policy in gentle(),
        sets in sockets(),
        here in environments(),
        begins: u32,
        length: u32,
        late in vec(any::<u8>(), 1..8),
    ) {
        // Whoever sets timers of keepalive asks for keepalive.
        let asks = sets.keepalive || sets.idle | sets.interval | sets.probes != 0;
        let alone = Options { keepalive: asks, ..sets };
        let given = plan(&policy, &Options::default(), &here).wants;
        // A policy that turns keepalive on and leaves all timers is not known
        // from the application, and neither is a value that both would set.
        prop_assume!(!given.keepalive || given.has_timers());
        prop_assume!(sets.idle == 0 || sets.idle != given.idle);
        prop_assume!(sets.interval == 0 || sets.interval != given.interval);
        prop_assume!(sets.probes == 0 || sets.probes != given.probes);
        let or = |set, given| if set == 0 { given } else { set };
        let has = Options {
            keepalive: given.keepalive || asks,
            idle: or(sets.idle, given.idle),
            interval: or(sets.interval, given.interval),
            probes: or(sets.probes, given.probes),
            user_timeout: or(sets.user_timeout, given.user_timeout),
            rto_max: given.rto_max,
        };
        let found = application(&has, &Originals::default(), Some(&policy), &here);
        let originals = Originals::default();
        let swept = replan(&policy, &has, &found, &originals, &here).wants;
        let (with, without) = (here.complete(&swept), here.complete(&alone));
        let outage = outage(&with, here.hz, begins.into(), length.into());
        prop_assert!(
            !survives(&without, here.hz, outage, &late) || survives(&with, here.hz, outage, &late),
            "{outage:?} without {without:?} with {with:?}"
        );
    }
}

#[test]
fn the_model_ends_connections_as_the_kernel_was_seen_to() {
    // docs/config.md: idle 2 s, interval 1 s, probes 5, cut off at once.
    for (user_timeout, lives_until) in [(0, 7), (1_000, 3), (4_500, 5), (7_000, 7), (9_000, 9)] {
        let timers = Options {
            keepalive: true,
            idle: 2,
            interval: 1,
            probes: 5,
            user_timeout,
            rto_max: 0,
        };
        for seconds in 1..12 {
            let outage = Outage {
                begins: 0,
                ends: seconds * 250,
            };
            // Probes at 2, 3, … s: one that is answered before it ends spares it.
            let expected = seconds < lives_until;
            assert_eq!(
                survives(&timers, 250, outage, &[0]),
                expected,
                "{user_timeout} {seconds}"
            );
        }
    }
}

#[test]
fn a_user_timeout_of_twenty_seconds_survives_twelve_seconds() {
    // As gRPC servers set it.
    let has = Options {
        user_timeout: 20_000,
        ..Options::default()
    };
    let here = Environment::UNCHANGED;
    let outage = Outage {
        begins: 55 * 250,
        ends: 67 * 250,
    };
    let filled = Options {
        user_timeout: 20_000,
        ..plan(&Policy::BUILT_IN, &Options::default(), &here).wants
    };
    assert!(!survives(&filled, 250, outage, &[0]));
    let with = plan(&Policy::BUILT_IN, &has, &here).wants;
    assert!(survives(&here.complete(&with), 250, outage, &[0]));
    let cure = Policy::BUILT_IN.with_derived_at_least(true);
    let cured = plan(&cure, &has, &here).wants;
    assert!(cured.keepalive && survives(&cured, 250, outage, &[0]));
    assert_eq!(cure.with_keepalive(Keepalive::On), cure);
}
