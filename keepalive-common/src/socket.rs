//! One connection as the kernel has it, in a record that the listing program
//! writes and the agent reads.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{environment::Environment, history::Originals, plan::Options};

/// Address family of IPv4 sockets.
pub const AF_INET: u32 = 2;

/// A connection that some process holds. All times are relative to the moment
/// at which the record was written.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct SocketRecord {
    /// Id of its cgroup; 0 where the kernel does not tell.
    pub cgroup: u64,
    /// Inode number, as /proc/PID/fd shows it.
    pub inode: u64,
    /// When the keepalive timer fires, in milliseconds from now; negative when
    /// that has passed. Means something only while keepalive is on.
    pub timer_ms: i64,
    /// How long nothing has come from the peer, in milliseconds.
    pub silent_ms: i64,
    local_address: [u8; 16],
    remote_address: [u8; 16],
    family: u32,
    local_port: u16,
    remote_port: u16,
    /// State of the connection, by the kernel's number: 1 is ESTABLISHED.
    pub state: u32,
    /// User id of the owner.
    pub uid: u32,
    keepalive: u32,
    idle: u32,
    interval: u32,
    probes: u32,
    user_timeout: u32,
    rto_max: u32,
    /// Segments that are not acknowledged yet: keepalive rests while there are any.
    pub packets_out: u32,
    /// Inode number of the network namespace, as /proc/PID/ns/net shows it.
    pub netns: u32,
    /// What it decides where nothing is set on the connection.
    pub environment: Environment,
    /// What the application asked for, as far as it is kept.
    pub originals: Originals,
    /// Not 0 where bounds hold whenever the application sets an option.
    pub is_held: u32,
}

/// Where a connection goes from and to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Family: 2 is IPv4, 10 is IPv6.
    pub family: u32,
    /// Address in network order; the first four bytes for IPv4.
    pub local_address: [u8; 16],
    /// As the local one.
    pub remote_address: [u8; 16],
    /// Port in host order.
    pub local_port: u16,
    /// Port in host order.
    pub remote_port: u16,
}

impl SocketRecord {
    /// What is said of something else.
    pub const NOTHING: Self = Self::new(
        &Addresses {
            family: 0,
            local_address: [0; 16],
            remote_address: [0; 16],
            local_port: 0,
            remote_port: 0,
        },
        &Options {
            keepalive: false,
            idle: 0,
            interval: 0,
            probes: 0,
            user_timeout: 0,
            rto_max: 0,
        },
    );

    /// A record with these addresses and options, everything else zero.
    #[must_use]
    #[inline(always)]
    pub const fn new(addresses: &Addresses, options: &Options) -> Self {
        Self {
            cgroup: 0,
            inode: 0,
            timer_ms: 0,
            silent_ms: 0,
            local_address: addresses.local_address,
            remote_address: addresses.remote_address,
            family: addresses.family,
            local_port: addresses.local_port,
            remote_port: addresses.remote_port,
            state: 0,
            uid: 0,
            keepalive: options.keepalive as u32,
            idle: options.idle,
            interval: options.interval,
            probes: options.probes,
            user_timeout: options.user_timeout,
            rto_max: options.rto_max,
            packets_out: 0,
            netns: 0,
            environment: Environment::UNKNOWN,
            originals: Originals::NONE,
            is_held: 0,
        }
    }

    /// The options that the socket has; a timer of 0 is unset.
    #[must_use]
    pub const fn options(&self) -> Options {
        Options {
            keepalive: self.keepalive != 0,
            idle: self.idle,
            interval: self.interval,
            probes: self.probes,
            user_timeout: self.user_timeout,
            rto_max: self.rto_max,
        }
    }

    /// This end. A v4-mapped IPv6 address is shown as it stands.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.addresses().local()
    }

    /// The other end.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        self.addresses().remote()
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
}

impl Addresses {
    /// This end.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        address(self.family, self.local_address, self.local_port)
    }

    /// The other end.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        address(self.family, self.remote_address, self.remote_port)
    }
}

fn address(family: u32, bytes: [u8; 16], port: u16) -> SocketAddr {
    let ip = if family == AF_INET {
        let [a, b, c, d, ..] = bytes;
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    } else {
        IpAddr::V6(Ipv6Addr::from(bytes))
    };
    SocketAddr::new(ip, port)
}

/// State of a socket that was never connected or is no longer, by the kernel's
/// number (include/net/tcp_states.h).
pub const CLOSE: u32 = 7;

/// States in which a process can hold a connection open for as long as it
/// likes: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
///
/// Not SYN_SENT and SYN_RECV, which the ESTABLISHED callback is still to come
/// for, nor the ones that time out by themselves (CLOSING, LAST_ACK, TIME_WAIT),
/// nor CLOSE and LISTEN.
#[must_use]
#[inline(always)]
pub const fn is_held_open(state: u32) -> bool {
    const STATES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8;
    state < 32 && STATES >> state & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_has_no_padding() {
        assert_eq!(
            size_of::<SocketRecord>(),
            4 * 8 + 2 * 16 + 4 + 2 * 2 + 10 * 4 + 6 * 4 + (5 * 8 + 4) + 4
        );
    }

    #[test]
    fn addresses_survive_the_record() {
        let mut v4 = [0; 16];
        v4[..4].copy_from_slice(&[192, 0, 2, 1]);
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
        let mut addresses = Addresses {
            family: AF_INET,
            local_address: v4,
            remote_address: v4,
            local_port: 22,
            remote_port: 50_000,
        };
        let record = SocketRecord::new(&addresses, &Options::default());
        assert_eq!(record.local().to_string(), "192.0.2.1:22");
        assert_eq!(record.remote().to_string(), "192.0.2.1:50000");
        addresses.family = 10;
        addresses.remote_address = v6.octets();
        let record = SocketRecord::new(&addresses, &Options::default());
        assert_eq!(record.remote().to_string(), "[2001:db8::1]:50000");
    }

    #[test]
    fn only_states_that_last_are_held_open() {
        let held: Vec<_> = (0..40).filter(|state| is_held_open(*state)).collect();
        assert_eq!(held, [1, 4, 5, 8]);
    }
}
