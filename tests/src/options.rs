use std::fmt;

const SOL_SOCKET: i32 = 1;
const IPPROTO_TCP: i32 = 6;

/// One of the socket options that a policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sockopt {
    /// `SO_KEEPALIVE`, 0 or 1.
    Keepalive,
    /// `TCP_KEEPIDLE`, in seconds.
    Idle,
    /// `TCP_KEEPINTVL`, in seconds.
    Interval,
    /// `TCP_KEEPCNT`.
    Probes,
    /// `TCP_USER_TIMEOUT`, in milliseconds.
    UserTimeout,
}

impl Sockopt {
    /// Level and number of the option, the same on every architecture that Rust
    /// and BPF share but MIPS and SPARC.
    #[must_use]
    pub fn numbers(self) -> (i32, i32) {
        match self {
            Self::Keepalive => (SOL_SOCKET, 9),
            Self::Idle => (IPPROTO_TCP, 4),
            Self::Interval => (IPPROTO_TCP, 5),
            Self::Probes => (IPPROTO_TCP, 6),
            Self::UserTimeout => (IPPROTO_TCP, 18),
        }
    }
}

/// What a socket has, as `getsockopt` tells it: for a timer that nobody set, that
/// is the value of the namespace's sysctl.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// `SO_KEEPALIVE`.
    pub keepalive: bool,
    /// `TCP_KEEPIDLE`, in seconds.
    pub idle: i32,
    /// `TCP_KEEPINTVL`, in seconds.
    pub interval: i32,
    /// `TCP_KEEPCNT`.
    pub probes: i32,
    /// `TCP_USER_TIMEOUT`, in milliseconds.
    pub user_timeout: i32,
}

impl Options {
    /// A socket for which nobody did anything, with the kernel's own sysctls.
    pub const UNTOUCHED: Self = Self {
        keepalive: false,
        idle: 7200,
        interval: 75,
        probes: 9,
        user_timeout: 0,
    };

    /// Keepalive on with these timers, no user timeout.
    #[must_use]
    pub const fn on(idle: i32, interval: i32, probes: i32) -> Self {
        Self {
            keepalive: true,
            idle,
            interval,
            probes,
            user_timeout: 0,
        }
    }

    /// The same with keepalive off.
    #[must_use]
    pub const fn off(mut self) -> Self {
        self.keepalive = false;
        self
    }

    /// The same with a user timeout, in milliseconds.
    #[must_use]
    pub const fn user_timeout(mut self, milliseconds: i32) -> Self {
        self.user_timeout = milliseconds;
        self
    }

    /// Asks for all five.
    ///
    /// # Errors
    ///
    /// Those of `get`.
    pub fn read<E>(mut get: impl FnMut(Sockopt) -> Result<i32, E>) -> Result<Self, E> {
        Ok(Self {
            keepalive: get(Sockopt::Keepalive)? != 0,
            idle: get(Sockopt::Idle)?,
            interval: get(Sockopt::Interval)?,
            probes: get(Sockopt::Probes)?,
            user_timeout: get(Sockopt::UserTimeout)?,
        })
    }
}

/// On one line, also in the report of a failed `assert_eq!`.
impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}s {}s {} {}ms",
            if self.keepalive { "on" } else { "off" },
            self.idle,
            self.interval,
            self.probes,
            self.user_timeout
        )
    }
}
