//! Observed: how long connections had been silent when they died, by the network
//! of the remote end. A small table in memory, from which `recommend` reads after
//! how much silence a path forgets.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tokio::{io::AsyncWriteExt as _, net::UnixStream, time::timeout};
use tracing::debug;

use crate::{datapath::DeadPeer, network::Network};

/// More networks, policies and causes together are not told apart.
const MOST: usize = 1024;

/// Leading bits that addresses of one network share: as networks are usually
/// given out.
const PREFIX: u8 = 24;
const PREFIX_IPV6: u8 = 64;

/// For a client that does not read.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was observed since the agent runs. The names are documented and stay.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Observed {
    /// When the agent began, in milliseconds since 1970.
    pub since_ms: u64,
    /// Dead peers that are in none of the observations: of too many networks.
    pub left_out: u64,
    /// All of them, in no order.
    pub observations: Vec<Observation>,
}

/// Connections to one network that died under one policy by one cause.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Observation {
    /// The network of the remote ends: a /24, or a /64 of IPv6.
    pub network: String,
    /// Name of the policy.
    pub policy: String,
    /// Name of the cause.
    pub cause: String,
    /// How many.
    pub deaths: u64,
    /// The shortest silence of one of them, in milliseconds.
    pub shortest_ms: u64,
    /// Probes that this one had sent.
    pub probes: u32,
    /// The longest silence, in milliseconds.
    pub longest_ms: u64,
    /// The remote address of the last one.
    pub last_remote: IpAddr,
    /// When that one died, in milliseconds since 1970.
    pub last_ms: u64,
}

/// What the daemon keeps.
#[derive(Debug)]
pub(super) struct Observations {
    since: SystemTime,
    left_out: u64,
    /// By network, policy and number of the cause.
    by_key: HashMap<(Network, String, u32), Observation>,
}

impl Default for Observations {
    fn default() -> Self {
        Self {
            since: SystemTime::now(),
            left_out: 0,
            by_key: HashMap::new(),
        }
    }
}

impl Observations {
    pub(super) fn add(&mut self, peer: &DeadPeer) {
        let remote = peer.remote.ip().to_canonical();
        let prefix = if remote.is_ipv4() {
            PREFIX
        } else {
            PREFIX_IPV6
        };
        let network = Network::around(remote, prefix);
        let key = (network, peer.policy.clone(), peer.cause as u32);
        let silent_ms = u64::try_from(peer.silence.as_millis()).unwrap_or(u64::MAX);
        let at_ms = milliseconds(peer.at);
        let is_full = self.by_key.len() >= MOST;
        let Some(known) = self.by_key.get_mut(&key) else {
            if is_full {
                self.left_out += 1;
                return;
            }
            let observation = Observation {
                network: network.to_string(),
                policy: peer.policy.clone(),
                cause: peer.cause.name().to_owned(),
                deaths: 1,
                shortest_ms: silent_ms,
                probes: peer.probes,
                longest_ms: silent_ms,
                last_remote: remote,
                last_ms: at_ms,
            };
            self.by_key.insert(key, observation);
            return;
        };
        known.deaths += 1;
        known.longest_ms = known.longest_ms.max(silent_ms);
        if silent_ms < known.shortest_ms {
            known.shortest_ms = silent_ms;
            known.probes = peer.probes;
        }
        known.last_remote = remote;
        known.last_ms = at_ms;
    }

    fn observed(&self) -> Observed {
        Observed {
            since_ms: milliseconds(self.since),
            left_out: self.left_out,
            observations: self.by_key.values().cloned().collect(),
        }
    }

    /// Tells all of it in one line, in a task of its own.
    pub(super) fn serve(&self, mut stream: UnixStream) {
        // Strings and numbers cannot fail to be written.
        let line = serde_json::to_string(&self.observed()).unwrap_or_default() + "\n";
        tokio::spawn(async move {
            if timeout(PATIENCE, stream.write_all(line.as_bytes()))
                .await
                .is_err()
            {
                debug!("a client did not read what was observed");
            }
        });
    }
}

fn milliseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use keepalive_common::dead_peer::Cause;

    use super::*;

    fn peer(remote: &str, cause: Cause, seconds: u64, probes: u32) -> DeadPeer {
        DeadPeer {
            at: UNIX_EPOCH + Duration::from_secs(seconds),
            cgroup: 1,
            local: SocketAddr::from(([192, 0, 2, 1], 1)),
            remote: remote.parse().unwrap(),
            policy: "default".to_owned(),
            cause,
            errno: 110,
            probes,
            silence: Duration::from_secs(seconds),
        }
    }

    #[test]
    fn the_shortest_silence_of_a_network_is_kept() {
        let mut observations = Observations::default();
        for dead in [
            peer("198.51.100.7:80", Cause::Probes, 400, 3),
            peer("[::ffff:198.51.100.8]:81", Cause::Probes, 360, 2),
            peer("198.51.100.9:82", Cause::Probes, 380, 4),
            peer("198.51.100.9:82", Cause::Reset, 1, 0),
            peer("198.51.101.9:82", Cause::Probes, 1, 0),
            peer("[2001:db8::1]:82", Cause::Probes, 1, 0),
            peer("[2001:db8::2:1]:82", Cause::Probes, 2, 0),
        ] {
            observations.add(&dead);
        }
        let observed = observations.observed();
        assert_eq!(observed.observations.len(), 4);
        let is_first =
            |found: &&Observation| found.network == "198.51.100.0/24" && found.cause == "probes";
        let found = observed.observations.iter().find(is_first).unwrap();
        assert_eq!(
            (
                found.deaths,
                found.shortest_ms,
                found.probes,
                found.longest_ms
            ),
            (3, 360_000, 2, 400_000)
        );
        assert_eq!(found.last_remote.to_string(), "198.51.100.9");
        assert_eq!(found.last_ms, 380_000);
    }

    #[test]
    fn there_are_never_too_many() {
        let mut observations = Observations::default();
        for number in 0..u32::try_from(MOST).unwrap() + 10 {
            let [_, a, b, c] = number.rotate_left(8).to_be_bytes();
            observations.add(&peer(&format!("10.{a}.{b}.{c}:1"), Cause::Probes, 1, 1));
        }
        let observed = observations.observed();
        assert_eq!((observed.observations.len(), observed.left_out), (MOST, 10));
    }
}
