//! Counters: what was done to sockets, per policy.

/// Which end of a connection a socket is. The numbers stand in map records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It called `connect()`.
    Connecting = 0,
    /// It came out of `accept()`.
    Accepting = 1,
}

impl Direction {
    /// All of them, at the index of their number.
    pub const ALL: [Self; 2] = [Self::Connecting, Self::Accepting];

    /// As it stands in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Accepting => "accepting",
        }
    }
}

/// A count for each [`Direction`]. Of connections that were there already the
/// kernel does not tell it; they stand at the first place.
pub type ByDirection = [u64; Direction::ALL.len()];

/// What a policy did. One record per policy and CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(serde::Deserialize, serde::Serialize))]
pub struct Counters {
    /// Connections that the policy claimed.
    pub seen: ByDirection,
    /// Connections on which keepalive was off and was turned on.
    pub turned_on: u64,
    /// Timers that the application had left unset and that were set.
    pub filled: u64,
    /// Options that the kernel refused; the connection goes on without them.
    pub failed: u64,
    /// Connections on which keepalive was on and was turned off.
    pub turned_off: u64,
    /// Timers that the application had set and that were moved into the bounds.
    pub clamped: u64,
    /// Timers that got back what the application had set, which an earlier policy
    /// had moved.
    pub restored: u64,
    /// Connections on which everything was already as the policy wants it.
    pub left_alone: ByDirection,
    /// Connections on which keepalive and its timers were left as the application
    /// has them, because its user-timeout would have ended them early: see
    /// [`crate::plan::Plan::user_timeout_conflict`].
    pub user_timeout_conflict: u64,
    /// Connections whose retransmission was not bounded, because the kernel knows
    /// no TCP_RTO_MAX_MS (before Linux 6.15).
    pub give_up_unsupported: u64,
}

impl Counters {
    /// Connections that the policy claimed, in whichever direction.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.seen.iter().sum()
    }

    /// Those of them that were left alone.
    #[must_use]
    pub fn left_alone(&self) -> u64 {
        self.left_alone.iter().sum()
    }

    /// Adds what another CPU counted.
    pub fn add(&mut self, other: &Self) {
        let own = self.seen.iter_mut().chain(&mut self.left_alone);
        for (sum, more) in own.zip(other.seen.iter().chain(&other.left_alone)) {
            *sum += more;
        }
        self.turned_on += other.turned_on;
        self.turned_off += other.turned_off;
        self.filled += other.filled;
        self.clamped += other.clamped;
        self.restored += other.restored;
        self.failed += other.failed;
        self.user_timeout_conflict += other.user_timeout_conflict;
        self.give_up_unsupported += other.give_up_unsupported;
    }
}

/// Which option could not be set, under which policy, and why.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureKey {
    /// The policy's slot, see [`crate::slot`].
    pub slot: u32,
    /// Number of the [`SocketOption`].
    pub option: u32,
    /// The kernel's error number, positive.
    pub errno: u32,
}

/// How often that happened on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// Number of refused calls.
    pub count: u64,
}

/// The last refused option of a CPU, to be logged when it is time.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which one, and why.
    pub key: FailureKey,
    /// Explicit padding, always 0.
    pub reserved: u32,
    /// When one was last logged, in nanoseconds since boot; 0 is never.
    pub logged_at: u64,
}

/// An option that keepalive sets. The numbers stand in map records.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketOption {
    /// SO_KEEPALIVE.
    Keepalive = 0,
    /// TCP_KEEPIDLE.
    Idle = 1,
    /// TCP_KEEPINTVL.
    Interval = 2,
    /// TCP_KEEPCNT.
    Probes = 3,
    /// TCP_USER_TIMEOUT.
    UserTimeout = 4,
    /// TCP_RTO_MAX_MS.
    RtoMax = 5,
}

impl SocketOption {
    /// All of them, at the index of their number.
    pub const ALL: [Self; 6] = [
        Self::Keepalive,
        Self::Idle,
        Self::Interval,
        Self::Probes,
        Self::UserTimeout,
        Self::RtoMax,
    ];

    /// The option with this number, if there is one.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// The option that a setsockopt of this level and number is about, if it is one
    /// that applications are held to.
    #[must_use]
    #[inline(always)]
    pub const fn from_level_and_number(level: i32, number: i32) -> Option<Self> {
        match (level, number) {
            (1, 9) => Some(Self::Keepalive),
            (6, 4) => Some(Self::Idle),
            (6, 5) => Some(Self::Interval),
            (6, 6) => Some(Self::Probes),
            (6, 18) => Some(Self::UserTimeout),
            _ => None,
        }
    }

    /// As the kernel's headers name it.
    #[must_use]
    #[inline(always)]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keepalive => "SO_KEEPALIVE",
            Self::Idle => "TCP_KEEPIDLE",
            Self::Interval => "TCP_KEEPINTVL",
            Self::Probes => "TCP_KEEPCNT",
            Self::UserTimeout => "TCP_USER_TIMEOUT",
            Self::RtoMax => "TCP_RTO_MAX_MS",
        }
    }

    /// Level and number for setsockopt, the same on every architecture that
    /// BPF programs run on but MIPS, PA-RISC and SPARC, which have another
    /// SOL_SOCKET and are not supported.
    #[must_use]
    #[inline(always)]
    pub const fn level_and_number(self) -> (i32, i32) {
        const SOL_SOCKET: i32 = 1;
        const SOL_TCP: i32 = 6;
        match self {
            Self::Keepalive => (SOL_SOCKET, 9),
            Self::Idle => (SOL_TCP, 4),
            Self::Interval => (SOL_TCP, 5),
            Self::Probes => (SOL_TCP, 6),
            Self::UserTimeout => (SOL_TCP, 18),
            Self::RtoMax => (SOL_TCP, 44),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_stand_at_their_number() {
        for (number, option) in (0..).zip(SocketOption::ALL) {
            assert_eq!(SocketOption::from_number(number), Some(option));
            assert_eq!(option as u32, number);
            let (level, name) = option.level_and_number();
            let is_held = option != SocketOption::RtoMax;
            assert_eq!(
                SocketOption::from_level_and_number(level, name),
                is_held.then_some(option)
            );
            assert_ne!(
                SocketOption::from_level_and_number(level + 1, name),
                Some(option)
            );
        }
    }

    #[test]
    fn the_records_have_no_padding() {
        assert_eq!(size_of::<Counters>(), 12 * 8);
        assert_eq!(size_of::<FailureKey>(), 3 * 4);
        assert_eq!(size_of::<Failure>(), 8);
        assert_eq!(size_of::<Refusal>(), 4 * 4 + 8);
    }

    #[test]
    fn adding_adds_every_counter() {
        let mut sum = Counters::default();
        let one = Counters {
            seen: [1, 11],
            turned_on: 2,
            turned_off: 3,
            filled: 4,
            clamped: 5,
            restored: 10,
            left_alone: [6, 12],
            failed: 7,
            user_timeout_conflict: 8,
            give_up_unsupported: 9,
        };
        sum.add(&one);
        assert_eq!(sum, one);
        sum.add(&one);
        assert_eq!((sum.seen(), sum.left_alone()), (24, 36));
        assert_eq!((sum.turned_on, sum.give_up_unsupported), (4, 18));
    }

    #[test]
    fn names_are_those_of_the_documentation_and_the_kernel() {
        let names = Direction::ALL.map(Direction::name);
        assert_eq!(names, ["connecting", "accepting"]);
        let names = SocketOption::ALL.map(SocketOption::name);
        let kernels = [
            "SO_KEEPALIVE",
            "TCP_KEEPIDLE",
            "TCP_KEEPINTVL",
            "TCP_KEEPCNT",
            "TCP_USER_TIMEOUT",
            "TCP_RTO_MAX_MS",
        ];
        assert_eq!(names, kernels);
    }

    #[test]
    fn directions_stand_at_their_number() {
        for (number, direction) in Direction::ALL.into_iter().enumerate() {
            assert_eq!(direction as usize, number);
        }
    }
}
