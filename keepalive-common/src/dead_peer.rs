//! Dead peer: how a connection ended that its policy had set something on, where
//! the other end did not take part in ending it.

use core::net::SocketAddr;

use crate::socket::Addresses;

/// What found out that the peer, or the path to it, is gone. The numbers stand in
/// map records.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// As many keepalive probes as TCP_KEEPCNT says were not answered.
    Probes = 0,
    /// Probes or data were not acknowledged for as long as TCP_USER_TIMEOUT says.
    UserTimeout = 1,
    /// Data was sent again and again, and not acknowledged.
    Retransmission = 2,
    /// A reset came in answer to a keepalive probe, or after a silence that a
    /// middlebox may have forgotten the connection in ([`FORGETTING_MS`]).
    Reset = 3,
}

impl Cause {
    /// All of them, at the index of their number.
    pub const ALL: [Self; 4] = [
        Self::Probes,
        Self::UserTimeout,
        Self::Retransmission,
        Self::Reset,
    ];

    /// The cause with this number, if there is one.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// As it stands in events and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Probes => "probes",
            Self::UserTimeout => "user-timeout",
            Self::Retransmission => "retransmission",
            Self::Reset => "reset",
        }
    }
}

/// The shortest idle timeout of a middlebox that is documented, in milliseconds:
/// that of Azure's load balancer. A reset after a longer silence may come from
/// one that has forgotten the connection.
pub const FORGETTING_MS: u64 = 240_000;

/// A connection as the kernel ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Whether a process held it.
    pub has_owner: bool,
    /// Whether it is over. Before Linux 6.10 a timeout is reported just before that
    /// (`tcp_write_err()` in net/ipv4/tcp_timer.c).
    pub is_closed: bool,
    /// What the process is told (`sk_err`); 0 where it has been told already.
    pub errno: u32,
    /// Probes since the last acknowledgement (`icsk_probes_out`).
    pub probes_out: u32,
    /// Whether there was data, or a FIN, that was not acknowledged.
    pub has_data: bool,
    /// TCP_USER_TIMEOUT in milliseconds; 0 is unset.
    pub user_timeout: u32,
    /// How long nothing had come from the peer, in milliseconds.
    pub silent_ms: u64,
}

impl End {
    /// Why it ended, if it was found out that the peer is gone.
    ///
    /// A timeout leaves ETIMEDOUT, or what an ICMP message or the neighbour table
    /// had said before (`tcp_write_err()` in net/ipv4/tcp_timer.c takes
    /// `sk_err_soft` first). The keepalive timer ends only connections without
    /// data under way, and goes by the user-timeout alone where there is one
    /// (`tcp_keepalive_timer()`); so does retransmission (`tcp_write_timeout()`).
    /// Probes that are out do not tell the two apart: data may have been sent
    /// after the first probe.
    #[must_use]
    #[inline(always)]
    pub const fn cause(&self) -> Option<Cause> {
        /// Broken pipe: a reset where the peer had closed its side
        /// (`tcp_reset()` in net/ipv4/tcp_input.c).
        const EPIPE: u32 = 32;
        /// Somebody on this machine ended it, such as `ss --kill`.
        const ECONNABORTED: u32 = 103;
        const ECONNRESET: u32 = 104;
        if !self.has_owner {
            return None;
        }
        match self.errno {
            // Told already, between being woken and this: probes that are out say
            // enough. With data under way it may have been a reset.
            0 if self.has_data || !self.is_closed => None,
            ECONNABORTED => None,
            EPIPE | ECONNRESET => {
                let answers_probe = self.probes_out > 0 && !self.has_data;
                if answers_probe || self.silent_ms >= FORGETTING_MS {
                    Some(Cause::Reset)
                } else {
                    None
                }
            }
            _ if !self.has_data && self.probes_out == 0 => None,
            _ if self.user_timeout > 0 => Some(Cause::UserTimeout),
            _ if self.has_data => Some(Cause::Retransmission),
            _ => Some(Cause::Probes),
        }
    }
}

/// Number of [`DeadPeers::silence`] buckets of one cause.
pub const BUCKETS: usize = 16;

/// The bucket of a silence in milliseconds: the first one is up to a second, each
/// one up to twice as long as the one before it, the last one without an end.
#[must_use]
#[inline(always)]
pub const fn bucket(silent_ms: u64) -> usize {
    let seconds = silent_ms.saturating_sub(1) / 1000;
    let mut bucket = 0;
    // Not by counting zeros, for which the BPF machine has no instruction.
    while bucket < BUCKETS - 1 && seconds >> bucket != 0 {
        bucket += 1;
    }
    bucket
}

/// The longest silence that belongs into a bucket, in seconds; none for the last.
#[must_use]
pub const fn upper_bound(bucket: usize) -> Option<u32> {
    if bucket < BUCKETS - 1 {
        Some(1 << bucket)
    } else {
        None
    }
}

/// The dead peers of one policy. One record for all CPUs: they are rare.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(serde::Deserialize, serde::Serialize))]
pub struct DeadPeers {
    /// By cause and by how long nothing had come from the peer, see [`bucket`].
    pub silence: [[u64; BUCKETS]; Cause::ALL.len()],
    /// All silences of a cause together, in milliseconds.
    pub silent_ms: [u64; Cause::ALL.len()],
    /// Those whose event was lost, because nobody had read the earlier ones.
    pub events_lost: u64,
}

impl DeadPeers {
    /// Adds what another set counted.
    pub fn add(&mut self, other: &Self) {
        let buckets = self.silence.iter_mut().flatten();
        for (sum, more) in buckets.zip(other.silence.iter().flatten()) {
            *sum += more;
        }
        for (sum, more) in self.silent_ms.iter_mut().zip(other.silent_ms) {
            *sum += more;
        }
        self.events_lost += other.events_lost;
    }

    /// How many were found by a cause.
    #[must_use]
    pub fn count(&self, cause: Cause) -> u64 {
        let buckets = self.silence.get(cause as usize);
        buckets.map_or(0, |buckets| buckets.iter().sum())
    }

    /// How many were found.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.silence.iter().flatten().sum()
    }

    /// Whether there were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// One dead peer, in a record that the program writes and the agent reads.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct DeadPeer {
    /// When, in nanoseconds since boot, with the time that the machine slept.
    pub at: u64,
    /// Id of the connection's cgroup; 0 where the kernel does not tell.
    pub cgroup: u64,
    /// How long nothing had come from the peer, in milliseconds.
    pub silent_ms: u64,
    local_address: [u8; 16],
    remote_address: [u8; 16],
    family: u32,
    local_port: u16,
    remote_port: u16,
    /// The policy's slot in the set that the program belongs to.
    pub slot: u32,
    /// Number of the [`Cause`].
    pub cause: u32,
    /// What the application is told, positive.
    pub errno: u32,
    /// Probes that were not answered.
    pub probes_out: u32,
}

impl DeadPeer {
    /// A record with these addresses, everything else zero.
    #[must_use]
    #[inline(always)]
    pub const fn new(addresses: &Addresses) -> Self {
        Self {
            at: 0,
            cgroup: 0,
            silent_ms: 0,
            local_address: addresses.local_address,
            remote_address: addresses.remote_address,
            family: addresses.family,
            local_port: addresses.local_port,
            remote_port: addresses.remote_port,
            slot: 0,
            cause: 0,
            errno: 0,
            probes_out: 0,
        }
    }

    const fn addresses(&self) -> Addresses {
        Addresses {
            family: self.family,
            local_address: self.local_address,
            remote_address: self.remote_address,
            local_port: self.local_port,
            remote_port: self.remote_port,
        }
    }

    /// This end.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.addresses().local()
    }

    /// The other end.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        self.addresses().remote()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: u32 = 110;
    const NO_ROUTE: u32 = 113;

    /// Found dead by keepalive.
    const PROBED: End = End {
        has_owner: true,
        is_closed: true,
        errno: TIMEOUT,
        probes_out: 3,
        has_data: false,
        user_timeout: 0,
        silent_ms: 5000,
    };

    #[test]
    fn names_are_those_of_the_documentation() {
        let names = Cause::ALL.map(Cause::name);
        let documented = ["probes", "user-timeout", "retransmission", "reset"];
        assert_eq!(names, documented);
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn the_cause_follows_from_what_the_kernel_went_by() {
        let with_data = End {
            has_data: true,
            ..PROBED
        };
        let reset = End {
            errno: 104,
            ..PROBED
        };
        for (end, cause) in [
            (PROBED, Some(Cause::Probes)),
            // What the neighbour table said before the probes ran out.
            (
                End {
                    errno: NO_ROUTE,
                    ..PROBED
                },
                Some(Cause::Probes),
            ),
            (
                End {
                    user_timeout: 1,
                    ..PROBED
                },
                Some(Cause::UserTimeout),
            ),
            // Probes were out when data was sent.
            (with_data, Some(Cause::Retransmission)),
            (
                End {
                    user_timeout: 1,
                    probes_out: 0,
                    ..with_data
                },
                Some(Cause::UserTimeout),
            ),
            // As older kernels report it.
            (
                End {
                    is_closed: false,
                    ..PROBED
                },
                Some(Cause::Probes),
            ),
            // The peer had closed its side.
            (
                End {
                    errno: 32,
                    ..PROBED
                },
                Some(Cause::Reset),
            ),
            (reset, Some(Cause::Reset)),
            (
                End {
                    probes_out: 0,
                    ..reset
                },
                None,
            ),
            (
                End {
                    has_data: true,
                    ..reset
                },
                None,
            ),
            (
                End {
                    has_data: true,
                    silent_ms: FORGETTING_MS,
                    ..reset
                },
                Some(Cause::Reset),
            ),
            // An ICMP message about nothing that waits for an answer.
            (
                End {
                    errno: NO_ROUTE,
                    probes_out: 0,
                    ..PROBED
                },
                None,
            ),
            // The process was faster.
            (End { errno: 0, ..PROBED }, Some(Cause::Probes)),
            (
                End {
                    errno: 0,
                    ..with_data
                },
                None,
            ),
            // The time stamp of a segment, on a connection that goes on.
            (
                End {
                    errno: 0,
                    is_closed: false,
                    ..PROBED
                },
                None,
            ),
            (
                End {
                    errno: 103,
                    ..PROBED
                },
                None,
            ),
            (
                End {
                    has_owner: false,
                    ..PROBED
                },
                None,
            ),
        ] {
            assert_eq!(end.cause(), cause, "{end:?}");
        }
    }

    #[test]
    fn each_bucket_is_up_to_its_bound() {
        assert_eq!(bucket(0), 0);
        for number in 0..BUCKETS {
            let Some(bound) = upper_bound(number) else {
                assert_eq!(number, BUCKETS - 1);
                continue;
            };
            assert_eq!(bucket(u64::from(bound) * 1000), number);
            assert_eq!(bucket(u64::from(bound) * 1000 + 1), number + 1);
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn adding_adds_everything() {
        let mut one = DeadPeers::default();
        one.silence[Cause::Reset as usize][3] = 2;
        one.silence[Cause::Reset as usize][4] = 1;
        one.silent_ms[Cause::Reset as usize] = 12_000;
        one.events_lost = 1;
        let mut sum = one;
        sum.add(&one);
        assert_eq!(sum.count(Cause::Reset), 6);
        assert_eq!(sum.count(Cause::Probes), 0);
        assert_eq!((sum.total(), sum.events_lost), (6, 2));
        assert_eq!(sum.silent_ms[Cause::Reset as usize], 24_000);
        assert!(!sum.is_empty() && DeadPeers::default().is_empty());
    }

    #[test]
    fn causes_stand_at_their_number() {
        for (number, cause) in (0..).zip(Cause::ALL) {
            assert_eq!(Cause::from_number(number), Some(cause));
            assert_eq!(cause as u32, number);
        }
        assert_eq!(Cause::from_number(4), None);
    }

    #[test]
    fn the_records_have_no_padding() {
        assert_eq!(size_of::<DeadPeers>(), (4 * BUCKETS + 4 + 1) * 8);
        assert_eq!(size_of::<DeadPeer>(), 3 * 8 + 2 * 16 + 4 + 2 * 2 + 4 * 4);
    }
}
