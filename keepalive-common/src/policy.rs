//! Policy: what should hold for a TCP socket.

/// Smallest TCP_KEEPIDLE and TCP_KEEPINTVL the kernel accepts, in seconds.
pub const MIN_SECONDS: u32 = 1;
/// Largest TCP_KEEPIDLE and TCP_KEEPINTVL the kernel accepts, in seconds
/// (`MAX_TCP_KEEPIDLE` and `MAX_TCP_KEEPINTVL` in include/net/tcp.h).
pub const MAX_SECONDS: u32 = 32_767;
/// Smallest TCP_KEEPCNT the kernel accepts.
pub const MIN_PROBES: u32 = 1;
/// Largest TCP_KEEPCNT the kernel accepts (`MAX_TCP_KEEPCNT` in include/net/tcp.h).
pub const MAX_PROBES: u32 = 127;
/// Smallest TCP_USER_TIMEOUT that is not "unset", in milliseconds.
pub const MIN_USER_TIMEOUT: u32 = 1;
/// Largest TCP_USER_TIMEOUT the kernel accepts, in milliseconds: it is a
/// signed integer there (`do_tcp_setsockopt` in net/ipv4/tcp.c).
pub const MAX_USER_TIMEOUT: u32 = i32::MAX as u32;

/// Smallest TCP_RTO_MAX_MS the kernel accepts, in milliseconds
/// (`do_tcp_setsockopt` in net/ipv4/tcp.c, Linux 6.15).
pub const MIN_RTO_MAX: u32 = 1000;
/// Largest TCP_RTO_MAX_MS the kernel accepts, and what holds where nobody sets
/// it, in milliseconds (`TCP_RTO_MAX_SEC` in include/net/tcp.h).
pub const MAX_RTO_MAX: u32 = 120_000;

/// What a policy wants of SO_KEEPALIVE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keepalive {
    /// As the application has it; the timers are shaped all the same.
    Leave,
    /// Turned on when the connection is established; an application that turns
    /// it off afterwards has the last word.
    On,
    /// On at every moment: the application cannot turn it off.
    Always,
    /// Turned off when the connection is established; idle, interval and probes
    /// mean nothing then and are left.
    Off,
    /// Off at every moment: the application cannot turn it on.
    Never,
}

impl Keepalive {
    /// Whether SO_KEEPALIVE is on once a policy of this word has been applied to
    /// a socket on which it `is` on or off.
    #[must_use]
    #[inline(always)]
    pub const fn applied_to(self, is: bool) -> bool {
        match self {
            Self::Leave => is,
            Self::On | Self::Always => true,
            Self::Off | Self::Never => false,
        }
    }

    /// Whether it is a bound: the application cannot change it.
    #[must_use]
    #[inline(always)]
    pub const fn holds(self) -> bool {
        matches!(self, Self::Always | Self::Never)
    }

    /// Whether it turns keepalive on.
    #[must_use]
    #[inline(always)]
    pub const fn turns_on(self) -> bool {
        matches!(self, Self::On | Self::Always)
    }

    /// Whether it turns keepalive off, and so leaves the timers of keepalive.
    #[must_use]
    #[inline(always)]
    pub const fn turns_off(self) -> bool {
        matches!(self, Self::Off | Self::Never)
    }
}

/// A timer of keepalive, for which a network namespace has a sysctl. The numbers
/// are bits of [`Policy`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SysctlTimer {
    /// `net.ipv4.tcp_keepalive_time`.
    Idle = 1 << 4,
    /// `net.ipv4.tcp_keepalive_intvl`.
    Interval = 1 << 5,
    /// `net.ipv4.tcp_keepalive_probes`.
    Probes = 1 << 6,
}

/// One timer of a policy: a value for sockets that have none, and bounds for
/// all. The unit is the timer's own (seconds, a number, milliseconds).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(serde::Deserialize, serde::Serialize))]
pub struct Range {
    /// What a socket gets whose application set nothing; 0 leaves it unset, or
    /// to the sysctl where [`Policy::heeds_sysctl`].
    pub default: u32,
    /// Lower bound of whatever is set; 0 is none.
    pub at_least: u32,
    /// Upper bound of whatever is set; [`u32::MAX`] is none.
    pub at_most: u32,
}

impl Range {
    /// Leaves the timer as it is, set or not.
    pub const LEAVE: Self = Self::default_only(0);

    /// Fills in what the application left unset, bounds nothing.
    #[must_use]
    pub const fn default_only(default: u32) -> Self {
        Self {
            default,
            at_least: 0,
            at_most: u32::MAX,
        }
    }

    /// One value, whatever the application set.
    #[must_use]
    pub const fn exactly(value: u32) -> Self {
        Self {
            default: value,
            at_least: value,
            at_most: value,
        }
    }

    /// Whether it bounds what is set.
    #[must_use]
    pub const fn has_bounds(&self) -> bool {
        self.at_least != 0 || self.at_most != u32::MAX
    }

    /// The formula of every timer: the application's value if it set one, the
    /// default if not, within the bounds. 0 stands for unset on both sides.
    #[must_use]
    #[inline]
    pub const fn effective(&self, set: u32) -> u32 {
        self.effective_beside(0, set)
    }

    /// The same where a sysctl counts beside the default: of the two the smaller
    /// holds. 0 is no sysctl.
    #[must_use]
    #[inline(always)]
    pub const fn effective_beside(&self, sysctl: u32, set: u32) -> u32 {
        effective(self.default, sysctl, self.at_least, self.at_most, set)
    }
}

/// What a timer becomes that is `set` to this, where the sysctl counts beside the
/// default; 0 is none.
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[cfg_attr(
    target_arch = "bpf",
    expect(unsafe_code, reason = "the name of a global function")
)]
#[inline(never)]
const extern "C" fn effective(
    default: u32,
    sysctl: u32,
    at_least: u32,
    at_most: u32,
    set: u32,
) -> u32 {
    let value = if set == 0 {
        stricter(default, sysctl)
    } else {
        set
    };
    if value == 0 {
        0
    } else if value < at_least {
        at_least
    } else if value > at_most {
        at_most
    } else {
        value
    }
}

/// The smaller of two values that are there; 0 is none.
#[inline(always)]
pub(crate) const fn stricter(one: u32, other: u32) -> u32 {
    if one == 0 || (other != 0 && other < one) {
        other
    } else {
        one
    }
}

/// What should hold for a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(serde::Deserialize, serde::Serialize))]
pub struct Policy {
    keepalive: u32,
    flags: u32,
    /// TCP_KEEPIDLE in seconds: silence before the first probe.
    pub idle: Range,
    /// TCP_KEEPINTVL in seconds: time between two probes.
    pub interval: Range,
    /// TCP_KEEPCNT: unanswered probes after which the peer counts as dead.
    pub probes: Range,
    /// TCP_USER_TIMEOUT in milliseconds: how long sent data, or a probe, may
    /// stay unacknowledged. Its default is ignored when it is derived.
    pub user_timeout: Range,
    /// After how long retransmission of unacknowledged data gives up, in
    /// milliseconds; 0 leaves that to the kernel.
    #[cfg_attr(feature = "user", serde(default))]
    pub give_up: u32,
}

/// The default of the user-timeout is derived from the other timers.
const DERIVE_USER_TIMEOUT: u32 = 1;
/// What the policy wants is counted and not set.
const DRY_RUN: u32 = 1 << 1;
/// The lower bound of the user-timeout is derived from the other timers.
const DERIVE_AT_LEAST: u32 = 1 << 2;
/// Connections are claimed and not touched.
const IGNORE: u32 = 1 << 3;
/// All of [`SysctlTimer`].
const SYSCTLS: u32 =
    SysctlTimer::Idle as u32 | SysctlTimer::Interval as u32 | SysctlTimer::Probes as u32;
/// What the policy wants holds for the life of a connection. Stands in the
/// kernel's copy only: it follows from the rest.
const HOLDS: u32 = 1 << 31;

impl Policy {
    /// What holds where nobody configured anything: keepalive on, first probe
    /// after 60 s, then every 10 s, dead after 6, or sooner where the sysctls of
    /// the namespace say so; the user-timeout is left.
    ///
    /// 60 s is safely below every middlebox's idle timeout that is documented
    /// (the shortest common one is Azure's 240 s), so that two probes may be
    /// lost on the way and the path is still kept open.
    pub const BUILT_IN: Self = Self {
        keepalive: 1,
        flags: SYSCTLS,
        idle: Range::default_only(60),
        interval: Range::default_only(10),
        probes: Range::default_only(6),
        user_timeout: Range::LEAVE,
        give_up: 0,
    };

    /// Touches nothing, and gives back what an earlier policy took.
    pub const LEAVE: Self = Self {
        keepalive: 0,
        flags: 0,
        idle: Range::LEAVE,
        interval: Range::LEAVE,
        probes: Range::LEAVE,
        user_timeout: Range::LEAVE,
        give_up: 0,
    };

    /// What the policy wants of SO_KEEPALIVE.
    #[must_use]
    #[inline]
    pub const fn keepalive(&self) -> Keepalive {
        match self.keepalive {
            1 => Keepalive::On,
            2 => Keepalive::Off,
            3 => Keepalive::Always,
            4 => Keepalive::Never,
            // 0, and what no agent writes: touching nothing is the safe reading.
            _ => Keepalive::Leave,
        }
    }

    /// The same policy with another wish for SO_KEEPALIVE.
    #[must_use]
    pub const fn with_keepalive(mut self, keepalive: Keepalive) -> Self {
        self.keepalive = match keepalive {
            Keepalive::Leave => 0,
            Keepalive::On => 1,
            Keepalive::Off => 2,
            Keepalive::Always => 3,
            Keepalive::Never => 4,
        };
        self
    }

    /// Whether what the policy wants is set, and not only counted.
    #[must_use]
    #[inline]
    pub const fn is_enforced(&self) -> bool {
        self.flags & DRY_RUN == 0
    }

    /// The same policy, enforced or only counted.
    #[must_use]
    pub const fn with_enforcement(self, enforced: bool) -> Self {
        self.with_flag(DRY_RUN, !enforced)
    }

    /// Whether connections are claimed and counted, and nothing at all is done
    /// to them.
    #[must_use]
    #[inline]
    pub const fn ignores(&self) -> bool {
        self.flags & IGNORE != 0
    }

    /// The same policy, ignoring its connections or not.
    #[must_use]
    pub const fn with_ignore(self, ignore: bool) -> Self {
        self.with_flag(IGNORE, ignore)
    }

    /// Whether anything is ever set under this policy.
    #[must_use]
    #[inline]
    pub const fn sets_anything(&self) -> bool {
        self.flags & (DRY_RUN | IGNORE) == 0
    }

    /// Whether the default of the user-timeout is derived: see
    /// [`crate::plan::derived_user_timeout`].
    #[must_use]
    #[inline]
    pub const fn derives_user_timeout(&self) -> bool {
        self.flags & DERIVE_USER_TIMEOUT != 0
    }

    /// The same policy with a user-timeout whose default is derived, or not.
    #[must_use]
    pub const fn with_derived_user_timeout(self, derive: bool) -> Self {
        self.with_flag(DERIVE_USER_TIMEOUT, derive)
    }

    /// Whether the lower bound of the user-timeout is derived, beside
    /// [`Range::at_least`]: of the two the larger holds, up to
    /// [`Range::at_most`].
    #[must_use]
    #[inline]
    pub const fn derives_at_least(&self) -> bool {
        self.flags & DERIVE_AT_LEAST != 0
    }

    /// The same policy with a user-timeout whose lower bound is derived, or not.
    #[must_use]
    pub const fn with_derived_at_least(self, derive: bool) -> Self {
        self.with_flag(DERIVE_AT_LEAST, derive)
    }

    /// Whether the sysctl of the namespace counts for a timer that nobody set:
    /// it holds where it is smaller than the default, and where there is no
    /// default.
    #[must_use]
    #[inline]
    pub const fn heeds_sysctl(&self, timer: SysctlTimer) -> bool {
        self.flags & timer as u32 != 0
    }

    /// The same policy, heeding that sysctl or not.
    #[must_use]
    pub const fn with_sysctl(self, timer: SysctlTimer, heed: bool) -> Self {
        self.with_flag(timer as u32, heed)
    }

    /// Whether what it wants of a socket on which nothing is set depends on the
    /// socket's network namespace.
    #[must_use]
    #[inline]
    pub const fn depends_on_namespace(&self) -> bool {
        const DERIVED: u32 = DERIVE_USER_TIMEOUT | DERIVE_AT_LEAST;
        self.flags & (SYSCTLS | DERIVED) != 0 || self.give_up != 0
    }

    const fn with_flag(mut self, flag: u32, set: bool) -> Self {
        if set {
            self.flags |= flag;
        } else {
            self.flags &= !flag;
        }
        self
    }
}

impl Policy {
    /// Whether it says anything about what an application may set later: a bound,
    /// or a user-timeout that follows other timers.
    #[must_use]
    pub const fn has_bounds(&self) -> bool {
        self.sets_anything()
            && (self.keepalive().holds()
                || self.idle.has_bounds()
                || self.interval.has_bounds()
                || self.probes.has_bounds()
                || self.user_timeout.has_bounds()
                || self.derives_user_timeout()
                || self.derives_at_least())
    }

    /// The same policy as it stands in the kernel, where programs need not find
    /// out whether it [`has bounds`](Self::has_bounds).
    #[must_use]
    pub const fn for_kernel(mut self) -> Self {
        if self.has_bounds() {
            self.flags |= HOLDS;
        } else {
            self.flags &= !HOLDS;
        }
        self
    }

    /// Whether connections are held to it for their life: see
    /// [`Self::for_kernel`].
    #[must_use]
    #[inline(always)]
    pub const fn holds(&self) -> bool {
        self.flags & HOLDS != 0
    }

    /// Whether it does no more than to give something to connections when they
    /// are established: it is neither only counted, nor ignored, nor held to.
    #[must_use]
    #[inline(always)]
    pub const fn only_gives(&self) -> bool {
        self.flags & (DRY_RUN | IGNORE | HOLDS) == 0
    }
}

/// After how long a peer is given up by the number of unanswered probes, in
/// milliseconds: idle + interval × probes, no more than the kernel takes as a
/// user-timeout. All of it in seconds in the arguments but `probes`, which is a
/// number.
#[must_use]
#[inline]
pub const fn time_to_notice(idle: u32, interval: u32, probes: u32) -> u32 {
    let seconds = idle as u64 + interval as u64 * probes as u64;
    if seconds > MAX_USER_TIMEOUT as u64 / 1000 {
        MAX_USER_TIMEOUT
    } else {
        #[expect(clippy::cast_possible_truncation, reason = "bounded just above")]
        let ms = (seconds * 1000) as u32;
        ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_follows_the_formula() {
        let fill = Range::default_only(60);
        let bounded = Range {
            default: 60,
            at_least: 30,
            at_most: 300,
        };
        let exactly = Range::exactly(60);
        for (range, set, expected) in [
            (fill, 0, 60),
            (fill, 1, 1),
            (fill, 7200, 7200),
            (bounded, 0, 60),
            (bounded, 10, 30),
            (bounded, 30, 30),
            (bounded, 45, 45),
            (bounded, 300, 300),
            (bounded, 7200, 300),
            (exactly, 0, 60),
            (exactly, 1, 60),
            (exactly, 7200, 60),
            (Range::LEAVE, 0, 0),
            (Range::LEAVE, 7200, 7200),
        ] {
            assert_eq!(range.effective(set), expected, "{range:?} with {set}");
        }
    }

    #[test]
    fn a_default_outside_the_bounds_is_bounded_too() {
        let range = Range {
            default: 60,
            at_least: 0,
            at_most: 30,
        };
        assert_eq!(range.effective(0), 30);
    }

    #[test]
    fn time_to_notice_is_in_milliseconds_and_cannot_overflow() {
        assert_eq!(time_to_notice(60, 10, 6), 120_000);
        assert_eq!(
            time_to_notice(u32::MAX, u32::MAX, u32::MAX),
            MAX_USER_TIMEOUT
        );
    }

    #[test]
    fn wishes_survive_the_record() {
        for keepalive in [
            Keepalive::Leave,
            Keepalive::On,
            Keepalive::Always,
            Keepalive::Off,
            Keepalive::Never,
        ] {
            let policy = Policy::BUILT_IN.with_keepalive(keepalive);
            assert_eq!(policy.keepalive(), keepalive);
            assert!(!policy.derives_user_timeout());
            let derived = policy.with_derived_user_timeout(true);
            assert!(derived.derives_user_timeout());
            assert_eq!(derived.with_derived_user_timeout(false), policy);
            let dry = derived.with_enforcement(false);
            assert!(derived.is_enforced() && !dry.is_enforced());
            assert!(dry.derives_user_timeout());
            assert_eq!(dry.keepalive(), keepalive);
            assert_eq!(dry.with_enforcement(true), derived);
        }
    }

    #[test]
    fn what_bounds_anything_is_held() {
        let free = Policy::BUILT_IN;
        assert!(!free.has_bounds() && !free.for_kernel().holds());
        assert!(free.for_kernel().only_gives());
        let mut at_most = free;
        at_most.probes.at_most = 9;
        let mut at_least = free;
        at_least.idle.at_least = 9;
        for policy in [at_most, at_least, free.with_derived_user_timeout(true)] {
            assert!(policy.has_bounds() && policy.for_kernel().holds());
            assert!(!policy.for_kernel().only_gives());
            let dry = policy.with_enforcement(false);
            assert!(!dry.has_bounds() && !dry.for_kernel().only_gives());
            assert_eq!(
                policy.for_kernel().with_enforcement(false).for_kernel(),
                dry
            );
        }
    }

    #[test]
    fn the_record_has_no_padding() {
        assert_eq!(size_of::<Policy>(), 2 * 4 + 4 * size_of::<Range>() + 4);
        assert_eq!(size_of::<Range>(), 3 * 4);
    }
}
