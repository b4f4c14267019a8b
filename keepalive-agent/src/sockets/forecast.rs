//! What keepalive is going to do on a connection, and when.
//!
//! This is the arithmetic of `tcp_keepalive_timer` (net/ipv4/tcp_timer.c). The
//! kernel rounds long timers up by as much as an eighth, so what is foretold
//! comes a little later, never earlier.

/// The timers that hold for a socket with keepalive on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timers {
    /// Silence before the first probe, in seconds.
    pub idle: u32,
    /// Time between two probes, in seconds.
    pub interval: u32,
    /// Unanswered probes after which the peer counts as dead.
    pub probes: u32,
    /// TCP_USER_TIMEOUT in milliseconds; 0 is none.
    pub user_timeout: u32,
}

/// Where a socket stands now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// When the keepalive timer fires, in milliseconds from now.
    pub timer_ms: i64,
    /// How long nothing has come from the peer, in milliseconds.
    pub silent_ms: i64,
    /// Whether sent segments are still unacknowledged.
    pub in_flight: bool,
}

/// What is going to happen if nothing comes from the peer any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// Milliseconds until the next probe; none while there is none to come.
    pub next_probe: Option<u64>,
    /// When it is noticed that the peer is dead.
    pub noticed: Noticed,
}

/// When a peer that is dead from now on is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noticed {
    /// By keepalive, after this many milliseconds.
    After(u64),
    /// Data is in flight: retransmission decides, and keepalive rests.
    Retransmitting,
    /// Never, unless the application sends something.
    Never,
}

impl Forecast {
    /// Foretells; `timers` are none where keepalive is off.
    #[must_use]
    pub fn new(timers: Option<&Timers>, moment: &Moment) -> Self {
        if moment.in_flight {
            return Self {
                next_probe: None,
                noticed: Noticed::Retransmitting,
            };
        }
        let Some(timers) = timers else {
            return Self {
                next_probe: None,
                noticed: Noticed::Never,
            };
        };
        let idle = u64::from(timers.idle) * 1000;
        let interval = u64::from(timers.interval) * 1000;
        let silent = u64::try_from(moment.silent_ms).unwrap_or(0);
        let fires = u64::try_from(moment.timer_ms).unwrap_or(0);
        // A timer that fires before the silence is long enough is set anew.
        let next_probe = fires.max(idle.saturating_sub(silent));
        let sent = probes_sent(timers, silent, next_probe);
        let after = if timers.user_timeout == 0 {
            // Each firing sends a probe until enough are out; the next one ends it.
            u64::from(timers.probes).saturating_sub(sent)
        } else {
            // The number of probes does not count: the first firing after at
            // least one probe at which the silence is long enough ends it.
            let missing =
                u64::from(timers.user_timeout).saturating_sub(silent.saturating_add(next_probe));
            missing.div_ceil(interval.max(1)).max(u64::from(sent == 0))
        };
        Self {
            // The firing that ends it sends none.
            next_probe: (after > 0).then_some(next_probe),
            noticed: Noticed::After(next_probe.saturating_add(after.saturating_mul(interval))),
        }
    }
}

/// How many probes are unanswered already, as far as it shows: after more
/// silence than `idle`, either probes are going out, one per interval, or
/// keepalive was turned on late and its timer still waits for the first.
fn probes_sent(timers: &Timers, silent: u64, next_probe: u64) -> u64 {
    let idle = u64::from(timers.idle) * 1000;
    let interval = u64::from(timers.interval) * 1000;
    if silent < idle || next_probe > interval || interval == 0 {
        return 0;
    }
    let sent = (silent + next_probe - idle) / interval;
    // With all of them out the connection would not be there any more.
    if sent > u64::from(timers.probes) {
        0
    } else {
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// idle 60 s, interval 10 s, 6 probes.
    const BUILT_IN: Timers = Timers {
        idle: 60,
        interval: 10,
        probes: 6,
        user_timeout: 0,
    };

    fn forecast(timers: Timers, timer_ms: i64, silent_ms: i64) -> (Option<u64>, u64) {
        let moment = Moment {
            timer_ms,
            silent_ms,
            in_flight: false,
        };
        let forecast = Forecast::new(Some(&timers), &moment);
        let Noticed::After(noticed) = forecast.noticed else {
            panic!("keepalive is on: {forecast:?}");
        };
        (forecast.next_probe, noticed)
    }

    #[test]
    fn counts_probes_without_a_user_timeout() {
        for (timer, silent, next_probe, noticed) in [
            // Just established.
            (60_000, 0, Some(60_000), 120_000),
            (45_000, 15_000, Some(45_000), 105_000),
            // Something came since the timer was set: it will be set anew.
            (10_000, 5_000, Some(55_000), 115_000),
            (0, 0, Some(60_000), 120_000),
            // Late, but not yet run.
            (-3, 60_003, Some(0), 60_000),
            // One probe is out, and five.
            (10_000, 60_000, Some(10_000), 60_000),
            (4_000, 106_000, Some(4_000), 14_000),
            // All are out: the next firing ends it.
            (5_000, 115_000, None, 5_000),
            // Turned on after two hours of silence: nothing is out yet, whether
            // it waits for a whole idle period or fires at once.
            (60_000, 7_200_000, Some(60_000), 120_000),
            (0, 7_200_000, Some(0), 60_000),
        ] {
            assert_eq!(
                forecast(BUILT_IN, timer, silent),
                (next_probe, noticed),
                "{timer} {silent}"
            );
        }
    }

    #[test]
    fn a_user_timeout_replaces_the_number_of_probes() {
        for (user_timeout, timer, silent, next_probe, noticed) in [
            // Shorter than idle: the first firing after the first probe.
            (30_000, 60_000, 0, Some(60_000), 70_000),
            (60_000, 60_000, 0, Some(60_000), 70_000),
            (75_000, 60_000, 0, Some(60_000), 80_000),
            // As derived.
            (120_000, 60_000, 0, Some(60_000), 120_000),
            // Far beyond the number of probes.
            (600_000, 60_000, 0, Some(60_000), 600_000),
            // In the middle of it.
            (120_000, 5_000, 85_000, Some(5_000), 35_000),
            (30_000, 5_000, 65_000, None, 5_000),
            // Late: beyond it already, but one probe must go out first.
            (30_000, 0, 7_200_000, Some(0), 10_000),
            (30_000, 60_000, 7_200_000, Some(60_000), 70_000),
        ] {
            let timers = Timers {
                user_timeout,
                ..BUILT_IN
            };
            assert_eq!(
                forecast(timers, timer, silent),
                (next_probe, noticed),
                "{user_timeout} {timer} {silent}"
            );
        }
    }

    #[test]
    fn keepalive_that_is_off_or_rests_foretells_nothing() {
        let mut moment = Moment {
            timer_ms: 0,
            silent_ms: 0,
            in_flight: false,
        };
        assert_eq!(Forecast::new(None, &moment).noticed, Noticed::Never);
        moment.in_flight = true;
        for timers in [None, Some(&BUILT_IN)] {
            let forecast = Forecast::new(timers, &moment);
            assert_eq!(forecast.next_probe, None);
            assert_eq!(forecast.noticed, Noticed::Retransmitting);
        }
    }

    #[test]
    fn no_number_overflows() {
        let most = Timers {
            idle: u32::MAX,
            interval: u32::MAX,
            probes: u32::MAX,
            user_timeout: u32::MAX,
        };
        let none = Timers {
            idle: 0,
            interval: 0,
            probes: 0,
            user_timeout: 0,
        };
        for timers in [most, none] {
            for timer in [i64::MIN, -1, 0, i64::MAX] {
                for silent in [i64::MIN, -1, 0, i64::MAX] {
                    let _ = forecast(timers, timer, silent);
                    let without = Timers {
                        user_timeout: 0,
                        ..timers
                    };
                    let _ = forecast(without, timer, silent);
                }
            }
        }
    }
}
