//! Sweep: how a pass over the existing connections of a namespace is steered.
//!
//! Turning keepalive on for many idle connections must not make them all probe
//! in one instant. The kernel arms a full idle period when SO_KEEPALIVE is turned
//! on, so a plain sweep would have every connection probe at its end, at once.
//! Setting TCP_KEEPIDLE again arms from the last activity instead: a connection
//! that has been silent for longer is probed immediately. So the first pass sets
//! everything, and each pass brings only a budget of probes forward; the agent
//! makes passes until none is waiting, spread over the idle period.

/// What a pass is to do, and what it has done so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// 1 to apply policy first, 0 to bring probes forward only.
    pub apply: u32,
    /// Explicit padding, always 0.
    pub reserved: u32,
    /// How many probes may still be brought forward.
    pub budget: u64,
    /// Connections that were looked at.
    pub seen: u64,
    /// Connections whose probe was brought forward.
    pub forwarded: u64,
    /// Connections whose probe would have been, but for the budget.
    pub waiting: u64,
}

/// Whether a keepalive timer runs later than the last activity asks for: all
/// arguments in jiffies, `armed` and `silent` counted from now.
///
/// A timer may run earlier (it is not moved by activity, only checked when it
/// fires) but gets later only by SO_KEEPALIVE being turned on after a silence.
/// Less than a second does not count.
#[must_use]
#[inline(always)]
pub const fn is_late(armed: i64, silent: i64, idle: i64, hz: i64) -> bool {
    let due = if silent < idle { idle - silent } else { 0 };
    armed > due + hz
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_is_late_when_it_ignores_the_silence() {
        let late = |armed: i64, silent: i64| is_late(armed * 250, silent * 250, 60 * 250, 250);
        assert!(late(60, 100), "silent for long, armed for a whole period");
        assert!(late(60, 30));
        assert!(!late(60, 0), "armed by its last activity");
        assert!(!late(30, 30));
        assert!(!late(60, 1), "a second does not count");
        assert!(!late(0, 100), "about to fire");
        assert!(!late(-5, 0), "has fired, not handled yet");
    }

    #[test]
    fn the_record_has_no_padding() {
        assert_eq!(size_of::<Pass>(), 2 * 4 + 4 * 8);
    }
}
