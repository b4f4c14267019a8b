//! Compiled: the rules of all policies of one cgroup as the kernel looks them
//! up, which is by one longest prefix of the remote address and, where that says
//! so, by one of the remote port, and of the local one.
//!
//! For every network that any rule names it is worked out here what holds for
//! those of its addresses that are in no smaller network.

use std::collections::BTreeMap;

use keepalive_common::slot::UNCLAIMED;

use super::{Exactness, Mismatch, Ports, Reverse, Rules, narrowest};

/// What holds for addresses: the longest prefix decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Compiled {
    /// Address and length of a prefix in IPv6, where IPv4 stands in
    /// `::ffff:0:0/96`, and what holds for it.
    pub remotes: Vec<((u128, u8), Verdict)>,
}

/// What holds for an address, or for one and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The policy in this slot; [`UNCLAIMED`] where none is for it.
    Slot(u32),
    /// The remote port decides.
    ByPort(PortTable<Self>),
    /// The local port decides.
    ByLocalPort(PortTable<Self>),
}

impl Verdict {
    const NOTHING: Self = Self::Slot(UNCLAIMED);
}

/// Ports and lengths of their prefixes, and what holds for each; no policy is for
/// a port that none of them contains.
pub type PortTable<T> = Vec<((u16, u8), T)>;

/// Which policy is for an address so far: length of the network's prefix, none
/// where it names no networks, and whether it is excepted.
#[derive(Clone, Copy)]
struct Standing {
    network: Option<u8>,
    excepted: bool,
}

/// The standing of policies, by index.
type Standings = BTreeMap<usize, Standing>;

/// Compiles rules and the slots of their policies. Of equally exact ones the
/// first wins.
#[must_use]
pub fn compile(claimants: &[(u32, &Rules)]) -> Compiled {
    let mut compiled = Compiled::default();
    for is_ipv4 in [false, true] {
        family(claimants, is_ipv4, &mut compiled.remotes);
    }
    compiled
}

/// Adds the prefixes of one family.
fn family(claimants: &[(u32, &Rules)], is_ipv4: bool, compiled: &mut Vec<((u128, u8), Verdict)>) {
    // The whole family is there in any case: addresses of IPv4 must not fall
    // through to what holds for ::/0.
    let (base, base_length) = if is_ipv4 {
        (0xffff_u128 << 32, 96)
    } else {
        (0, 0)
    };
    let mut networks = BTreeMap::from([((base, base_length), Standings::new())]);
    let mut everywhere = Standings::new();
    for (index, (_, rules)) in claimants.iter().enumerate() {
        if !rules.has_networks() {
            let standing = Standing {
                network: None,
                excepted: false,
            };
            everywhere.insert(index, standing);
        }
        for entry in &rules.remotes {
            if entry.network.is_ipv4() != is_ipv4 {
                continue;
            }
            let standing = Standing {
                network: Some(entry.network.prefix()),
                excepted: entry.excepted,
            };
            let here = networks.entry(entry.network.in_ipv6()).or_default();
            here.entry(index)
                .and_modify(|twice| twice.excepted |= entry.excepted)
                .or_insert(standing);
        }
    }
    // In this order a network follows the ones that contain it.
    let mut around: Vec<((u128, u8), Standings, Verdict)> = Vec::new();
    for (prefix, here) in networks {
        while around
            .last()
            .is_some_and(|(outer, ..)| !contains(*outer, prefix))
        {
            around.pop();
        }
        let mut standings = around
            .last()
            .map_or_else(|| everywhere.clone(), |(_, outer, _)| outer.clone());
        standings.extend(here);
        let verdict = verdict(claimants, &standings);
        if around.last().is_none_or(|(.., outer)| *outer != verdict) {
            compiled.push((prefix, verdict.clone()));
        }
        around.push((prefix, standings, verdict));
    }
}

fn contains((outer, length): (u128, u8), (inner, inner_length): (u128, u8)) -> bool {
    let beyond = 128 - u32::from(length);
    length <= inner_length && (outer ^ inner).checked_shr(beyond).unwrap_or(0) == 0
}

/// Who wins where these policies stand.
fn verdict(claimants: &[(u32, &Rules)], standings: &Standings) -> Verdict {
    let candidates: Vec<_> = standings
        .iter()
        .filter(|(_, standing)| !standing.excepted)
        .map(|(index, standing)| (*index, standing.network, claimants[*index].1))
        .collect();
    let ranges = candidates.iter().flat_map(|(_, _, rules)| &rules.ports);
    by_ports(ranges, Verdict::ByPort, |port| {
        by_local_port(claimants, &candidates, port)
    })
}

/// Who wins for a remote port.
fn by_local_port(
    claimants: &[(u32, &Rules)],
    candidates: &[(usize, Option<u8>, &Rules)],
    port: u16,
) -> Verdict {
    let candidates: Vec<_> = candidates
        .iter()
        .filter_map(|(index, network, rules)| {
            let ports = narrowest(&rules.ports, Some(port), Mismatch::Port).ok()??;
            Some((*index, *network, ports, *rules))
        })
        .collect();
    let ranges = candidates
        .iter()
        .flat_map(|(_, _, _, rules)| &rules.local_ports);
    by_ports(ranges, Verdict::ByLocalPort, |local_port| {
        let exactness = |(index, network, ports, rules): &(usize, Option<u8>, u32, &Rules)| {
            let own = &rules.local_ports;
            let local_ports = narrowest(own, Some(local_port), Mismatch::LocalPort).ok()??;
            Some((
                Exactness {
                    network: *network,
                    ports: Reverse(*ports),
                    local_ports: Reverse(local_ports),
                },
                Reverse(*index),
            ))
        };
        let most_exact = candidates.iter().filter_map(exactness).max();
        Verdict::Slot(most_exact.map_or(UNCLAIMED, |(_, Reverse(index))| claimants[index].0))
    })
}

/// What holds where a port decides, of which these ranges are named: no table
/// where it makes no difference.
fn by_ports<'a>(
    ranges: impl Iterator<Item = &'a Ports>,
    table: fn(PortTable<Verdict>) -> Verdict,
    verdict: impl Fn(u16) -> Verdict,
) -> Verdict {
    // It changes only where a range begins or has ended.
    let mut borders: Vec<u16> = vec![0];
    for range in ranges {
        borders.push(range.first);
        borders.extend(range.last.checked_add(1));
    }
    borders.sort_unstable();
    borders.dedup();
    let mut segments: Vec<(Ports, Verdict)> = Vec::new();
    for (position, &first) in borders.iter().enumerate() {
        let last = borders.get(position + 1).map_or(u16::MAX, |next| next - 1);
        let found = verdict(first);
        match segments.last_mut() {
            Some((before, same)) if *same == found => before.last = last,
            _ => segments.push((Ports { first, last }, found)),
        }
    }
    if segments.len() == 1
        && let Some((_, only)) = segments.pop()
    {
        return only;
    }
    let prefixes = segments
        .into_iter()
        .filter(|(_, found)| *found != Verdict::NOTHING)
        .flat_map(|(range, found)| prefixes(range).map(move |prefix| (prefix, found.clone())));
    table(prefixes.collect())
}

/// The fewest prefixes that make up a range: port and length.
fn prefixes(range: Ports) -> impl Iterator<Item = (u16, u8)> {
    let mut next = u32::from(range.first);
    let end = u32::from(range.last) + 1;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let first = u16::try_from(next).ok()?;
        // As large as its beginning is aligned to, and as fits.
        let bits = next.trailing_zeros().min((end - next).ilog2()).min(16);
        next += 1 << bits;
        Some((first, 16 - u8::try_from(bits).ok()?))
    })
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;
    use crate::rules::{Ends, Remote, most_exact};

    /// The slot that the longest prefixes lead to.
    fn look_up(compiled: &Compiled, ends: &Ends) -> u32 {
        let remote = ends.remote.unwrap();
        let address = match remote.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let longest = compiled
            .remotes
            .iter()
            .filter(|(prefix, _)| contains(*prefix, (address, 128)))
            .max_by_key(|((_, length), _)| *length);
        let mut found = longest.map_or(&Verdict::NOTHING, |(_, verdict)| verdict);
        loop {
            let (table, port) = match found {
                Verdict::Slot(slot) => return *slot,
                Verdict::ByPort(table) => (table, remote.port()),
                Verdict::ByLocalPort(table) => (table, ends.local_port.unwrap()),
            };
            let within = |prefix: u16, length: u8| {
                let beyond = 16 - u32::from(length);
                (prefix ^ port).checked_shr(beyond).unwrap_or(0) == 0
            };
            let longest = table
                .iter()
                .filter(|((port, length), _)| within(*port, *length))
                .max_by_key(|((_, length), _)| *length);
            found = longest.map_or(&Verdict::NOTHING, |(_, verdict)| verdict);
        }
    }

    /// Few distinct addresses, so that networks contain one another.
    fn address() -> impl Strategy<Value = IpAddr> {
        let v4 = (
            select(vec![10_u8, 11]),
            0_u8..4,
            select(vec![0_u8, 128]),
            0_u8..3,
        )
            .prop_map(|(a, b, c, d)| IpAddr::V4(Ipv4Addr::new(a, b, c, d)));
        let v6 = (select(vec![0x2001_u16, 0xfd00]), 0_u16..3, 0_u16..3)
            .prop_map(|(a, b, c)| IpAddr::V6(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, c)));
        prop_oneof![v4, v6]
    }

    fn remote_rule() -> impl Strategy<Value = Remote> {
        (
            address(),
            select(vec![0_u8, 1, 7, 8, 15, 16, 17, 30, 31, 32, 64, 127, 128]),
            any::<bool>(),
        )
            .prop_map(|(address, prefix, excepted)| {
                let width = if address.is_ipv4() { 32 } else { 128 };
                let prefix = prefix.min(width);
                let bits = match address {
                    IpAddr::V4(v4) => u128::from(v4.to_bits()),
                    IpAddr::V6(v6) => v6.to_bits(),
                };
                let beyond = u32::from(width - prefix);
                let masked = bits
                    .checked_shr(beyond)
                    .unwrap_or(0)
                    .checked_shl(beyond)
                    .unwrap_or(0);
                let network: IpAddr = match address {
                    IpAddr::V4(_) => Ipv4Addr::from_bits(u32::try_from(masked).unwrap()).into(),
                    IpAddr::V6(_) => Ipv6Addr::from_bits(masked).into(),
                };
                Remote {
                    network: format!("{network}/{prefix}").parse().unwrap(),
                    excepted,
                }
            })
    }

    fn port() -> impl Strategy<Value = u16> {
        select(vec![
            1, 2, 79, 80, 81, 443, 8000, 8080, 8999, 9000, 65534, 65535,
        ])
    }

    fn rules() -> impl Strategy<Value = Rules> {
        let ranges = || {
            let range = (port(), port()).prop_map(|(one, other)| Ports {
                first: one.min(other),
                last: one.max(other),
            });
            vec(range, 0..3)
        };
        (vec(remote_rule(), 0..5), ranges(), ranges()).prop_map(|(remotes, ports, local_ports)| {
            Rules {
                remotes,
                ports,
                local_ports,
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn say_the_same_as_the_rules(
            row in vec(rules(), 1..6),
            connections in vec((address(), port(), port()), 1..30),
        ) {
            let claimants: Vec<_> = (1..).zip(&row).collect();
            let compiled = compile(&claimants);
            for (address, port, local_port) in connections {
                let ends = Ends {
                    remote: Some(SocketAddr::new(address, port)),
                    local_port: Some(local_port),
                };
                let expected = most_exact(&row, &ends)
                    .map_or(UNCLAIMED, |index| claimants[index].0);
                prop_assert_eq!(look_up(&compiled, &ends), expected, "{:?}", ends);
            }
        }

        #[test]
        fn ranges_are_made_of_few_prefixes(one in any::<u16>(), other in any::<u16>()) {
            let range = Ports { first: one.min(other), last: one.max(other) };
            let mut next = u32::from(range.first);
            let mut count = 0;
            for (port, length) in prefixes(range) {
                prop_assert_eq!(u32::from(port), next);
                next += 1 << (16 - length);
                count += 1;
            }
            prop_assert_eq!(next, u32::from(range.last) + 1);
            prop_assert!(count <= 30);
        }
    }

    #[test]
    fn ten_thousand_networks_of_one_policy_are_as_many_prefixes() {
        let remotes = (0..10_000_u32).map(|number| {
            let network = Ipv4Addr::from_bits(0x0a00_0000 + (number << 9));
            format!("{network}/24").parse().unwrap()
        });
        let rules = Rules {
            remotes: remotes.collect(),
            ..Rules::default()
        };
        // And one for each whole family, which nothing is for.
        assert_eq!(compile(&[(1, &rules)]).remotes.len(), 10_002);
    }
}
