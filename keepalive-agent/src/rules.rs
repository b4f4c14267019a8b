//! Rules: which connections a policy is for, as `remote`, `port` and
//! `local-port` say.
//!
//! Within one policy the longest network that contains an address decides, so
//! an exception can have exceptions. Among the policies of one cgroup the one
//! that names a connection most exactly claims it.

pub mod compiled;

use std::{cmp::Reverse, fmt, net::SocketAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::network::Network;

/// Which connections a policy is for; every one where nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
pub struct Rules {
    /// Networks that it is for, and exceptions. Only exceptions mean everything
    /// but those.
    pub remotes: Vec<Remote>,
    /// Ports of the remote end; none is every port.
    pub ports: Vec<Ports>,
    /// Ports of this end; none is every port.
    #[serde(default)]
    pub local_ports: Vec<Ports>,
}

/// A network of remote ends, written `10.0.0.0/8`, or `!10.1.0.0/16` for an
/// exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Remote {
    /// The network.
    pub network: Network,
    /// Whether the policy is not for it.
    pub excepted: bool,
}

/// A range of ports, both ends included, written `443` or `8000-8999`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ports {
    first: u16,
    last: u16,
}

/// The ends of a connection, as far as they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// The remote end.
    pub remote: Option<SocketAddr>,
    /// The port of this end.
    pub local_port: Option<u16>,
}

/// How exactly rules name a connection; the greater, the more exactly. The
/// network comes first, then the ports, then the local ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Exactness {
    /// Length of the network's prefix; none where no network is named.
    network: Option<u8>,
    /// How many ports the range has, all where none is named.
    ports: Reverse<u32>,
    /// The same of this end.
    local_ports: Reverse<u32>,
}

/// Why rules are not for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// No network contains the address.
    Elsewhere,
    /// This exception contains it.
    Excepted(Network),
    /// No range contains the remote port.
    Port,
    /// No range contains the local port.
    LocalPort,
}

impl Rules {
    /// Whether they are for every connection.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.remotes.is_empty() && self.ports.is_empty() && self.local_ports.is_empty()
    }

    /// Whether they are for a connection; none where that depends on what is not
    /// known of it.
    ///
    /// # Errors
    ///
    /// Why they are not.
    pub fn judge(&self, ends: &Ends) -> Result<Option<Exactness>, Mismatch> {
        let network = match ends.remote {
            Some(remote) => Some(self.network(remote)?),
            None if self.remotes.is_empty() => Some(None),
            None => None,
        };
        let port = ends.remote.map(|remote| remote.port());
        let ports = narrowest(&self.ports, port, Mismatch::Port)?;
        let local_ports = narrowest(&self.local_ports, ends.local_port, Mismatch::LocalPort)?;
        let (Some(network), Some(ports), Some(local_ports)) = (network, ports, local_ports) else {
            return Ok(None);
        };
        Ok(Some(Exactness {
            network,
            ports: Reverse(ports),
            local_ports: Reverse(local_ports),
        }))
    }

    /// Length of the longest network that contains the remote address, none where
    /// none is named.
    fn network(&self, remote: SocketAddr) -> Result<Option<u8>, Mismatch> {
        let longest = self
            .remotes
            .iter()
            .filter(|entry| entry.network.contains(remote.ip()))
            .max_by_key(|entry| (entry.network.prefix(), entry.excepted));
        match longest {
            Some(entry) if entry.excepted => Err(Mismatch::Excepted(entry.network)),
            Some(entry) => Ok(Some(entry.network.prefix())),
            None if self.has_networks() => Err(Mismatch::Elsewhere),
            None => Ok(None),
        }
    }

    /// Whether they name networks, and not only exceptions.
    fn has_networks(&self) -> bool {
        self.remotes.iter().any(|entry| !entry.excepted)
    }
}

/// Size of the smallest range that contains the port, all of them if there are
/// no ranges; none if it is not known which port that is.
fn narrowest(
    ranges: &[Ports],
    port: Option<u16>,
    mismatch: Mismatch,
) -> Result<Option<u32>, Mismatch> {
    match (ranges, port) {
        ([], _) => Ok(Some(Ports::ALL.size())),
        (_, None) => Ok(None),
        (ranges, Some(port)) => {
            let containing = ranges.iter().filter(|range| range.contains(port));
            let smallest = containing.map(|range| range.size()).min();
            smallest.map(Some).ok_or(mismatch)
        }
    }
}

/// Which of several rules names a connection most exactly, by index; of equals
/// the first.
#[must_use]
pub fn most_exact<'a>(rules: impl IntoIterator<Item = &'a Rules>, ends: &Ends) -> Option<usize> {
    let matching = rules.into_iter().enumerate().filter_map(|(index, rules)| {
        let exactness = rules.judge(ends).ok()??;
        Some((exactness, Reverse(index)))
    });
    matching.max().map(|(_, Reverse(index))| index)
}

impl Ports {
    /// Every port.
    const ALL: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    /// Whether a port is in the range.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    fn size(self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1
    }
}

impl From<u16> for Ports {
    fn from(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |digits: &str| {
            Some(digits)
                // `parse` would take a sign.
                .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok())
                .filter(|port| *port > 0)
                .ok_or_else(|| format!("`{digits}` is not a port from 1 to 65535"))
        };
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        if first > last {
            return Err(format!(
                "the range {first}-{last} is empty; did you mean {last}-{first}?"
            ));
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            self.first.fmt(f)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl FromStr for Remote {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (network, excepted) = match text.strip_prefix('!') {
            Some(network) => (network, true),
            None => (text, false),
        };
        Ok(Self {
            network: network.parse()?,
            excepted,
        })
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = if self.excepted { "!" } else { "" };
        write!(f, "{not}{}", self.network)
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elsewhere => f.write_str("the address is in none of its networks"),
            Self::Excepted(network) => write!(f, "the address is in its exception {network}"),
            Self::Port => f.write_str("the port is none of its ports"),
            Self::LocalPort => f.write_str("the local port is none of its local ports"),
        }
    }
}

macro_rules! as_text {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}

as_text!(Remote);
as_text!(Ports);

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(remotes: &[&str], ports: &[&str]) -> Rules {
        Rules {
            remotes: remotes.iter().map(|text| text.parse().unwrap()).collect(),
            ports: ports.iter().map(|text| text.parse().unwrap()).collect(),
            local_ports: Vec::new(),
        }
    }

    fn local(ports: &[&str]) -> Rules {
        Rules {
            local_ports: ports.iter().map(|text| text.parse().unwrap()).collect(),
            ..Rules::default()
        }
    }

    fn ends(remote: &str) -> Ends {
        Ends {
            remote: Some(remote.parse().unwrap()),
            local_port: Some(22),
        }
    }

    #[test]
    fn are_for_some_remote_ends() {
        let exception: Network = "10.1.0.0/16".parse().unwrap();
        for (remotes, ports, remote, expected) in [
            (&[][..], &[][..], "192.0.2.1:80", Ok(())),
            (&["10.0.0.0/8"], &[], "10.1.2.3:80", Ok(())),
            (&["10.0.0.0/8"], &[], "[::ffff:10.1.2.3]:80", Ok(())),
            (
                &["10.0.0.0/8"],
                &[],
                "11.1.2.3:80",
                Err(Mismatch::Elsewhere),
            ),
            (&["::/0"], &[], "11.1.2.3:80", Err(Mismatch::Elsewhere)),
            (
                &["0.0.0.0/0"],
                &[],
                "[2001:db8::1]:80",
                Err(Mismatch::Elsewhere),
            ),
            (
                &["10.0.0.0/8", "!10.1.0.0/16"],
                &[],
                "10.1.2.3:80",
                Err(Mismatch::Excepted(exception)),
            ),
            (
                &["10.0.0.0/8", "!10.1.0.0/16", "10.1.2.0/24"],
                &[],
                "10.1.2.3:80",
                Ok(()),
            ),
            (&["!10.1.0.0/16"], &[], "10.2.2.3:80", Ok(())),
            (&["!10.1.0.0/16"], &[], "[2001:db8::1]:80", Ok(())),
            (
                &["!10.1.0.0/16"],
                &[],
                "10.1.2.3:80",
                Err(Mismatch::Excepted(exception)),
            ),
            (&[], &["443", "8000-8999"], "192.0.2.1:443", Ok(())),
            (&[], &["443", "8000-8999"], "192.0.2.1:8000", Ok(())),
            (&[], &["443", "8000-8999"], "192.0.2.1:8999", Ok(())),
            (
                &[],
                &["443", "8000-8999"],
                "192.0.2.1:9000",
                Err(Mismatch::Port),
            ),
            (
                &["10.0.0.0/8"],
                &["443"],
                "10.0.0.1:80",
                Err(Mismatch::Port),
            ),
        ] {
            let judged = rules(remotes, ports).judge(&ends(remote));
            assert_eq!(
                judged.map(|_| ()),
                expected,
                "{remotes:?} {ports:?} {remote}"
            );
        }
    }

    #[test]
    fn the_most_exact_comes_first_by_network_then_by_port() {
        let row = [
            rules(&[], &[]),
            rules(&[], &["8000-8999"]),
            rules(&[], &["8080"]),
            rules(&["0.0.0.0/0"], &[]),
            rules(&["10.0.0.0/8"], &[]),
            rules(&["10.0.0.0/8"], &["1-65535"]),
            rules(&["10.0.0.0/8"], &["8080"]),
            rules(&["10.1.0.0/16"], &[]),
            rules(&["10.1.2.3"], &["1-65535"]),
        ];
        let remote = &ends("10.1.2.3:8080");
        for count in 1..=row.len() {
            assert_eq!(most_exact(&row[..count], remote), Some(count - 1));
            let mut twice = row[..count].to_vec();
            twice.push(row[count - 1].clone());
            assert_eq!(
                most_exact(&twice, remote),
                Some(count - 1),
                "the first of equals"
            );
        }
        assert_eq!(most_exact(&row[4..], &ends("192.0.2.1:8080")), None);
    }

    #[test]
    fn the_local_port_comes_last() {
        let row = [
            rules(&[], &[]),
            local(&["1-1024"]),
            local(&["22", "80"]),
            rules(&[], &["1-65535"]),
        ];
        let remote = &ends("192.0.2.1:8080");
        for count in 1..=row.len() {
            assert_eq!(most_exact(&row[..count], remote), Some(count - 1));
        }
        let elsewhere = Ends {
            local_port: Some(443),
            ..*remote
        };
        assert_eq!(row[2].judge(&elsewhere), Err(Mismatch::LocalPort));
        assert_eq!(most_exact(&row[..3], &elsewhere), Some(1));
    }

    #[test]
    fn what_is_not_known_decides_nothing() {
        let unknown = Ends::default();
        for (rules, depends) in [
            (rules(&[], &[]), false),
            (rules(&["10.0.0.0/8"], &[]), true),
            (rules(&[], &["443"]), true),
            (local(&["22"]), true),
        ] {
            assert_eq!(
                rules.judge(&unknown).unwrap().is_none(),
                depends,
                "{rules:?}"
            );
        }
        // What is known is enough to be not for it.
        let mut both = rules(&["10.0.0.0/8"], &[]);
        both.local_ports = local(&["22"]).local_ports;
        let remote = Ends {
            local_port: None,
            ..ends("192.0.2.1:80")
        };
        assert_eq!(both.judge(&remote), Err(Mismatch::Elsewhere));
    }

    #[test]
    fn ports_are_numbers_and_ranges() {
        for text in ["1", "443", "8000-8999", "65535"] {
            assert_eq!(text.parse::<Ports>().unwrap().to_string(), text);
        }
        for (text, part) in [
            ("", "`` is not a port from 1 to 65535"),
            ("0", "`0` is not a port"),
            ("65536", "`65536` is not a port"),
            ("+1", "`+1` is not a port"),
            ("http", "`http` is not a port"),
            ("1-", "`` is not a port"),
            ("2-1", "did you mean 1-2?"),
        ] {
            let error = text.parse::<Ports>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn remotes_are_networks_and_exceptions() {
        for text in ["10.0.0.0/8", "!10.1.0.0/16", "!::1"] {
            assert_eq!(text.parse::<Remote>().unwrap().to_string(), text);
        }
        assert!("!!10.0.0.0/8".parse::<Remote>().is_err());
    }
}
