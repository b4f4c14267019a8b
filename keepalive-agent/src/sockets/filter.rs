//! Which connections are wanted, and in which order.

use std::{cmp::Reverse, collections::HashSet, net::SocketAddr};

use keepalive_common::socket::SocketRecord;

use super::{Connection, cgroups::Known, forecast::Noticed};
use crate::{
    hierarchy::{Cgroup, CgroupPath},
    identity::Wanted,
    network::Network,
    paths::IdleTimeout,
};

/// What a connection must meet to be wanted; everything that is given.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// In this cgroup or below it.
    pub cgroup: Option<Cgroup>,
    /// Of one of these units, containers or pods.
    pub whose: Wanted,
    /// One of these inode numbers.
    pub inodes: Option<HashSet<u64>>,
    /// The other end is in this network.
    pub remote: Option<Network>,
    /// Either end has this port.
    pub port: Option<u16>,
    /// Keepalive is off.
    pub unprotected: bool,
    /// Forgotten by such a path.
    pub at_risk: Option<Risk>,
}

/// A path that forgets silent connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Risk {
    /// After this much silence.
    pub timeout: IdleTimeout,
    /// Whether connections within the machine count too, which no middlebox sees.
    pub loopback: bool,
}

impl Filter {
    /// The cgroup that has all that are wanted.
    #[must_use]
    pub fn top(&self) -> CgroupPath {
        let cgroup = self.cgroup.as_ref();
        cgroup.map_or_else(CgroupPath::root, |cgroup| cgroup.path.clone())
    }

    /// What the record alone can tell.
    #[must_use]
    pub fn wants_record(&self, record: &SocketRecord) -> bool {
        if let Some(inodes) = &self.inodes
            && !inodes.contains(&record.inode)
        {
            return false;
        }
        if let Some(remote) = &self.remote
            && !remote.contains(record.remote().ip())
        {
            return false;
        }
        if let Some(port) = self.port
            && record.local().port() != port
            && record.remote().port() != port
        {
            return false;
        }
        !(self.unprotected && record.options().keepalive)
    }

    /// The rest. A connection whose cgroup is gone is below none.
    #[must_use]
    pub fn wants(&self, connection: &Connection<'_>) -> bool {
        let within = match (&self.cgroup, connection.cgroup) {
            (None, _) => true,
            (Some(wanted), Some(own)) => wanted.contains(&own.path),
            (Some(_), None) => false,
        };
        let identity = connection.cgroup.and_then(Known::identity);
        within
            && (self.whose.is_any() || identity.is_some_and(|own| self.whose.includes(own)))
            && self
                .at_risk
                .is_none_or(|risk| risk.threatens(connection.record))
    }
}

impl Risk {
    /// Whether the path would forget the connection in its silence.
    #[must_use]
    pub fn threatens(&self, record: &SocketRecord) -> bool {
        let holds = record.environment.complete(&record.options());
        let kept_open = holds.keepalive && self.timeout.is_kept_open_by(holds.idle, holds.interval);
        !kept_open && self.is_on_path(record)
    }

    /// Whether the connection counts as one that passes the path.
    #[must_use]
    pub fn is_on_path(&self, record: &SocketRecord) -> bool {
        self.loopback || !is_within_machine(record)
    }
}

/// Both ends are seen to be on this machine: the other one has a loopback
/// address, or the very address of this end.
fn is_within_machine(record: &SocketRecord) -> bool {
    let local = record.local().ip().to_canonical();
    let remote = record.remote().ip().to_canonical();
    remote.is_loopback() || local == remote
}

/// What connections can be sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Key {
    /// Path of the cgroup
    Cgroup,
    /// Unprotected first, then the longest idle time
    Idle,
    /// Local address
    Local,
    /// Name of the network namespace
    Netns,
    /// Soonest probe first, none last
    NextProbe,
    /// A dead peer is never noticed first, then the latest
    Noticed,
    /// Process id, none last
    Pid,
    /// Remote address
    Remote,
    /// Longest silence first
    Silent,
}

/// Where a connection stands in an order; only ranks of one key compare well.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Upward.
    Up(u64),
    /// Downward.
    Down(Reverse<u64>),
    /// By address, then port.
    Address(SocketAddr),
    /// By bytes.
    Name(Vec<u8>),
}

impl Key {
    /// The rank of a connection.
    #[must_use]
    pub fn rank(self, connection: &Connection<'_>) -> Rank {
        let down = |number| Rank::Down(Reverse(number));
        let settings = &connection.settings;
        match self {
            Self::Cgroup => Rank::Name(
                connection
                    .cgroup
                    .map_or_else(Vec::new, |own| own.path.as_bytes().to_vec()),
            ),
            Self::Idle if settings.keepalive.value => down(settings.idle.value.into()),
            Self::Idle => down(u64::MAX),
            Self::Local => Rank::Address(connection.record.local()),
            Self::Netns => Rank::Name(connection.netns.name.clone().into_bytes()),
            Self::NextProbe => Rank::Up(connection.forecast.next_probe.unwrap_or(u64::MAX)),
            Self::Noticed => down(match connection.forecast.noticed {
                Noticed::Never => u64::MAX,
                Noticed::After(milliseconds) => milliseconds,
                Noticed::Retransmitting(_) => 0,
            }),
            Self::Pid => Rank::Up(
                connection
                    .holder
                    .map_or(u64::MAX, |holder| holder.pid.into()),
            ),
            Self::Remote => Rank::Address(connection.record.remote()),
            Self::Silent => down(u64::try_from(connection.record.silent_ms).unwrap_or(0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use keepalive_common::plan::Options;

    use super::*;
    use crate::{
        netns::{self, Namespace},
        paths::AWS_NAT,
        sockets::{
            cgroups::Known,
            trial::{protected, record},
        },
    };

    fn own_netns() -> Namespace {
        netns::all().unwrap().remove(0)
    }

    #[test]
    fn every_part_of_a_filter_must_be_met() {
        let found = protected(60);
        let mapped = record(
            "[::ffff:10.0.0.1]:22",
            "[::ffff:10.0.0.2]:900",
            &Options::default(),
        );
        let none = Filter::default;
        for (filter, wants_found, wants_mapped) in [
            (none(), true, true),
            (
                Filter {
                    remote: Some("198.51.100.0/24".parse().unwrap()),
                    ..none()
                },
                true,
                false,
            ),
            (
                Filter {
                    remote: Some("10.0.0.0/8".parse().unwrap()),
                    ..none()
                },
                false,
                true,
            ),
            (
                Filter {
                    port: Some(5432),
                    ..none()
                },
                true,
                false,
            ),
            (
                Filter {
                    port: Some(22),
                    ..none()
                },
                false,
                true,
            ),
            (
                Filter {
                    unprotected: true,
                    ..none()
                },
                false,
                true,
            ),
            (
                Filter {
                    inodes: Some(HashSet::from([4711])),
                    unprotected: true,
                    ..none()
                },
                false,
                true,
            ),
            (
                Filter {
                    inodes: Some(HashSet::new()),
                    ..none()
                },
                false,
                false,
            ),
        ] {
            assert_eq!(filter.wants_record(&found), wants_found, "{filter:?}");
            assert_eq!(filter.wants_record(&mapped), wants_mapped, "{filter:?}");
        }
    }

    #[test]
    fn a_cgroup_takes_in_what_is_below() {
        let netns = own_netns();
        let found = protected(60);
        let filter = Filter {
            cgroup: Some(Cgroup {
                path: "/a".into(),
                id: 1,
            }),
            ..Filter::default()
        };
        for (path, expected) in [("/a", true), ("/a/b", true), ("/ab", false), ("/", false)] {
            let cgroup = Known::unclaimed(path);
            let connection = Connection::new(&netns, &found, Some(&cgroup), None);
            assert_eq!(filter.wants(&connection), expected, "{path}");
        }
        let gone = Connection::new(&netns, &found, None, None);
        assert!(!filter.wants(&gone));
    }

    #[test]
    fn a_path_threatens_what_is_silent_too_long() {
        let off = Options::default();
        let on = Options {
            keepalive: true,
            ..off
        };
        for (record, threatened, with_loopback) in [
            (protected(60), false, false),
            (protected(329), false, false),
            (protected(330), true, true),
            (protected(7200), true, true),
            (record("192.0.2.1:1", "198.51.100.7:2", &off), true, true),
            // The sysctl's two hours.
            (record("192.0.2.1:1", "198.51.100.7:2", &on), true, true),
            (record("127.0.0.1:1", "127.0.0.1:2", &off), false, true),
            (record("127.0.0.1:1", "127.0.0.53:2", &off), false, true),
            (record("[::1]:1", "[::1]:2", &off), false, true),
            (
                record("[::ffff:127.0.0.1]:1", "[::ffff:127.0.0.1]:2", &off),
                false,
                true,
            ),
            (record("192.0.2.1:1", "192.0.2.1:2", &off), false, true),
        ] {
            for (loopback, expected) in [(false, threatened), (true, with_loopback)] {
                let risk = Risk {
                    timeout: AWS_NAT.into(),
                    loopback,
                };
                assert_eq!(risk.threatens(&record), expected, "{record:?}");
            }
        }
    }

    #[test]
    fn ranks_put_what_matters_first() {
        let netns = own_netns();
        let mut records = [60, 7200, 300].map(protected).to_vec();
        records.push(record("192.0.2.1:1", "192.0.2.9:2", &Options::default()));
        records[0].silent_ms = 5;
        let sorted = |key: Key| {
            let mut ranked: Vec<_> = (0..)
                .zip(&records)
                .map(|(index, record)| {
                    let connection = Connection::new(&netns, record, None, None);
                    (key.rank(&connection), index)
                })
                .collect();
            ranked.sort();
            ranked
                .into_iter()
                .map(|(_, index)| index)
                .collect::<Vec<_>>()
        };
        assert_eq!(sorted(Key::Idle), [3, 1, 2, 0]);
        assert_eq!(sorted(Key::Noticed), [3, 1, 2, 0]);
        assert_eq!(sorted(Key::NextProbe), [0, 2, 1, 3]);
        assert_eq!(sorted(Key::Silent), [0, 1, 2, 3]);
        assert_eq!(sorted(Key::Remote), [3, 0, 1, 2]);
        assert_eq!(sorted(Key::Local), [3, 0, 1, 2]);
        for key in [Key::Cgroup, Key::Netns, Key::Pid] {
            assert_eq!(sorted(key), [0, 1, 2, 3], "{key:?}");
        }
    }
}
