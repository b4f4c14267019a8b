//! Environment: what the kernel and the network namespace of a socket decide
//! where nobody has set anything on it.

use crate::{
    plan::Options,
    policy::{MAX_PROBES, MAX_RTO_MAX, MAX_SECONDS},
};

/// The sysctls of a network namespace, and the kernel's clock.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Environment {
    /// `net.ipv4.tcp_keepalive_time` in seconds; 0 where it is not known.
    pub idle: u32,
    /// `net.ipv4.tcp_keepalive_intvl` in seconds; 0 where it is not known.
    pub interval: u32,
    /// `net.ipv4.tcp_keepalive_probes`; 0 where it is not known.
    pub probes: u32,
    /// `net.ipv4.tcp_retries2`: retransmissions before a connection is given up.
    pub retries: u32,
    /// The longest time between two retransmissions where nobody set another
    /// one, in milliseconds (`net.ipv4.tcp_rto_max_ms`); 0 where the kernel
    /// knows no TCP_RTO_MAX_MS (before Linux 6.15).
    pub rto_max: u32,
    /// Ticks of the kernel's timers per second.
    pub hz: u32,
}

impl Environment {
    /// Nothing is known; ticks are as long as they can be.
    pub const UNKNOWN: Self = Self {
        idle: 0,
        interval: 0,
        probes: 0,
        retries: 0,
        rto_max: 0,
        hz: 100,
    };

    /// A namespace in which no sysctl was changed, on a kernel of 250 Hz that
    /// knows everything.
    pub const UNCHANGED: Self = Self {
        idle: 7200,
        interval: 75,
        probes: 9,
        retries: 15,
        rto_max: MAX_RTO_MAX,
        hz: 250,
    };

    /// What holds for a socket with these options: the sysctls stand in for
    /// timers of keepalive that are unset.
    #[must_use]
    #[inline(always)]
    pub const fn complete(&self, options: &Options) -> Options {
        Options {
            idle: or(options.idle, self.idle),
            interval: or(options.interval, self.interval),
            probes: or(options.probes, self.probes),
            ..*options
        }
    }

    /// The sysctls as timers that a socket can have: no larger than the kernel
    /// takes for one socket.
    #[must_use]
    #[inline(always)]
    pub(crate) const fn as_timers(&self) -> (u32, u32, u32) {
        (
            at_most(self.idle, MAX_SECONDS),
            at_most(self.interval, MAX_SECONDS),
            at_most(self.probes, MAX_PROBES),
        )
    }
}

/// What is set, or what holds otherwise.
#[inline(always)]
pub(crate) const fn or(set: u32, otherwise: u32) -> u32 {
    if set == 0 { otherwise } else { set }
}

#[inline(always)]
const fn at_most(value: u32, most: u32) -> u32 {
    if value > most { most } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_stand_in_for_what_is_unset() {
        let environment = Environment::UNCHANGED;
        let unset = Options {
            keepalive: true,
            user_timeout: 7,
            rto_max: 8,
            ..Options::default()
        };
        let complete = environment.complete(&unset);
        let expected = Options {
            idle: 7200,
            interval: 75,
            probes: 9,
            ..unset
        };
        assert_eq!(complete, expected);
        let set = Options {
            idle: 1,
            interval: 2,
            probes: 3,
            ..unset
        };
        assert_eq!(environment.complete(&set), set);
    }

    #[test]
    fn no_timer_is_larger_than_a_socket_takes() {
        assert_eq!(Environment::UNCHANGED.as_timers(), (7200, 75, 9));
        let large = Environment {
            idle: MAX_SECONDS + 1,
            interval: u32::MAX,
            probes: 255,
            ..Environment::UNCHANGED
        };
        let most = (MAX_SECONDS, MAX_SECONDS, MAX_PROBES);
        assert_eq!(large.as_timers(), most);
    }
}
