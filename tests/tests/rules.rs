//! Rules: which policy a connection gets by its remote end.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Churn, Crowd, Kind, Need, Netns, Options, Probe, Program, Socket, agent_command,
    errno, output, require,
};
use rustix::io::Errno;
use serde_json::{Value, json};

/// A namespace in which every address of some networks is its own.
fn netns() -> Result<Netns> {
    let netns = Netns::new()?;
    netns.run("ip", "route add local 10.0.0.0/8 dev lo")?;
    netns.run("ip", "-6 route add local 2001:db8::/32 dev lo")?;
    // For IPv6 a route is not enough to bind to an address.
    netns.sysctl("net/ipv6/ip_nonlocal_bind", "1")?;
    Ok(netns)
}

/// A connection from an address, or from any: what both ends have.
fn connect(
    (client, from): (&mut Probe, Option<SocketAddr>),
    (server, listener): (&mut Probe, Socket),
    to: SocketAddr,
) -> Result<(Socket, Socket)> {
    let connecting = client.socket(Kind::of(to))?;
    if let Some(from) = from
        && let Err(error) = client.bind(connecting, from)
    {
        client.close(connecting)?;
        return Err(error);
    }
    client.connect(connecting, to)?;
    Ok((connecting, server.accept(listener)?))
}

/// A program that listens and one that connects.
struct Pair {
    client: Probe,
    server: Probe,
    listener: Socket,
    port: u16,
}

impl Pair {
    /// The server listens at this port, of IPv4 and IPv6.
    fn start(client: &Cgroup, server: &Cgroup, netns: &Netns, port: u16) -> Result<Self> {
        let client = Probe::start(Program::Static, (client, netns))?;
        let mut server = Probe::start(Program::Static, (server, netns))?;
        let (listener, address) = server.listener(&format!("[::]:{port}"))?;
        Ok(Self {
            client,
            server,
            listener,
            port: address.port(),
        })
    }

    /// A new connection to this address, from one if that is given.
    fn connect(&mut self, from: Option<&str>, to: &str) -> Result<(Socket, Socket)> {
        let from = from.map(str::parse).transpose()?;
        let to = SocketAddr::new(to.parse()?, self.port);
        connect(
            (&mut self.client, from),
            (&mut self.server, self.listener),
            to,
        )
        .with_context(|| format!("{from:?} to {to}"))
    }

    /// Idle of the connecting end of a new connection, and of the accepting one.
    fn idle(&mut self, from: Option<&str>, to: &str) -> Result<[i32; 2]> {
        let (connecting, accepting) = self.connect(from, to)?;
        let ends = [
            self.client.options(connecting)?,
            self.server.options(accepting)?,
        ];
        for end in ends {
            ensure!(
                end == Options::UNTOUCHED || end == Options::on(end.idle, 10, 6),
                "{from:?} to {to}: {end:?}"
            );
        }
        Ok(ends.map(|end| end.idle))
    }
}

const UNTOUCHED: i32 = Options::UNTOUCHED.idle;

#[test]
fn a_port_is_the_one_of_the_remote_end() -> Result<()> {
    require!(Need::Program("ip"));
    let (cgroup, netns) = (Cgroup::new()?, netns()?);
    let mut web = Pair::start(&cgroup, &cgroup, &netns, 443)?;
    let mut other = Pair::start(&cgroup, &cgroup, &netns, 8000)?;
    let _agent = Agent::start(
        &cgroup,
        "[default]\nidle = \"70s\"\n\
         [[policy]]\nname = \"web\"\nport = 443\nidle = \"71s\"\n\
         [[policy]]\nname = \"range\"\nport = [\"8000-8999\", 9443]\nidle = \"72s\"\n",
    )?;
    assert_eq!(web.idle(None, "10.0.0.1")?, [71, 70]);
    assert_eq!(web.idle(None, "2001:db8::1")?, [71, 70]);
    assert_eq!(other.idle(None, "10.0.0.1")?, [72, 70]);
    // The accepting end sees the port that the client comes from.
    assert_eq!(other.idle(Some("10.0.0.2:8999"), "10.0.0.1")?, [72, 72]);
    assert_eq!(other.idle(Some("10.0.0.2:9000"), "10.0.0.1")?, [72, 70]);
    assert_eq!(web.idle(Some("10.0.0.2:9443"), "10.0.0.1")?, [71, 72]);
    Ok(())
}

#[test]
fn an_exception_inside_a_network() -> Result<()> {
    require!(Need::Program("ip"));
    let (cgroup, netns) = (Cgroup::new()?, netns()?);
    let mut pair = Pair::start(&cgroup, &cgroup, &netns, 0)?;
    let _agent = Agent::start(
        &cgroup,
        "[[policy]]\nname = \"some\"\nidle = \"71s\"\n\
         remote = [\"10.0.0.0/8\", \"!10.1.0.0/16\", \"10.1.2.0/24\", \"2001:db8::/32\", \
         \"!2001:db8:1::/48\"]\n",
    )?;
    for (to, idle) in [
        ("10.0.0.1", 71),
        ("10.1.1.1", UNTOUCHED),
        ("10.1.2.1", 71),
        ("10.2.0.1", 71),
        ("2001:db8::1", 71),
        ("2001:db8:1::1", UNTOUCHED),
        ("2001:db8:2::1", 71),
        ("127.0.0.1", UNTOUCHED),
        ("::1", UNTOUCHED),
    ] {
        let loopback = if to.contains(':') { "::1" } else { "127.0.0.1" };
        let from = SocketAddr::new(loopback.parse()?, 0).to_string();
        assert_eq!(pair.idle(Some(&from), to)?, [idle, UNTOUCHED], "{to}");
        // The other way round it is the accepting end to which that is remote.
        let from = SocketAddr::new(to.parse()?, 0).to_string();
        assert_eq!(pair.idle(Some(&from), loopback)?, [UNTOUCHED, idle], "{to}");
    }
    Ok(())
}

#[test]
fn only_exceptions_mean_everything_else() -> Result<()> {
    require!(Need::Program("ip"));
    let (cgroup, netns) = (Cgroup::new()?, netns()?);
    let mut pair = Pair::start(&cgroup, &cgroup, &netns, 0)?;
    let _agent = Agent::start(
        &cgroup,
        "[default]\nidle = \"70s\"\n\
         [[policy]]\nname = \"outside\"\nidle = \"71s\"\n\
         remote = [\"!127.0.0.0/8\", \"!::1\", \"!10.0.0.0/8\"]\n",
    )?;
    let mut idle = |to| pair.idle(None, to).map(|[connecting, _]| connecting);
    assert_eq!(idle("127.0.0.1")?, 70);
    assert_eq!(idle("::1")?, 70);
    assert_eq!(idle("10.0.0.1")?, 70);
    assert_eq!(idle("::ffff:10.0.0.1")?, 70);
    assert_eq!(idle("2001:db8::1")?, 71);
    Ok(())
}

#[test]
fn the_nearest_cgroup_goes_before_a_more_exact_remote_above() -> Result<()> {
    require!(Need::Program("ip"));
    let (root, netns) = (Cgroup::new()?, netns()?);
    let child = root.child("child")?;
    let mut inside = Pair::start(&child, &root, &netns, 0)?;
    let mut above = Pair::start(&root, &root, &netns, 0)?;
    let config = format!(
        "[default]\nidle = \"70s\"\n\
         [[policy]]\nname = \"one\"\nremote = \"10.1.1.1\"\nidle = \"71s\"\n\
         [[policy]]\nname = \"wide\"\ncgroup = \"{}\"\nremote = \"10.0.0.0/8\"\nidle = \"72s\"\n\
         [[policy]]\nname = \"v6\"\nremote = \"2001:db8::/32\"\nidle = \"73s\"\n",
        child.path()
    );
    let _agent = Agent::start(&root, &config)?;
    for (to, near, far) in [
        ("10.1.1.1", 72, 71),
        ("10.2.2.2", 72, 70),
        // What the child's rules do not name is left to those above, and then to
        // the default.
        ("2001:db8::1", 73, 73),
        ("127.0.0.1", 70, 70),
        ("::1", 70, 70),
    ] {
        assert_eq!(inside.idle(None, to)?[0], near, "{to} from the child");
        assert_eq!(above.idle(None, to)?[0], far, "{to} from above");
    }
    Ok(())
}

#[test]
fn a_policy_for_all_ends_the_search() -> Result<()> {
    require!(Need::Program("ip"));
    let (root, netns) = (Cgroup::new()?, netns()?);
    let child = root.child("child")?;
    let below = child.child("below")?;
    let mut pair = Pair::start(&below, &root, &netns, 0)?;
    let config = format!(
        "[[policy]]\nname = \"one\"\nremote = \"10.1.1.1\"\nidle = \"71s\"\n\
         [[policy]]\nname = \"child\"\ncgroup = \"{}\"\nidle = \"72s\"\n\
         [[policy]]\nname = \"below\"\ncgroup = \"{}\"\nremote = \"10.2.0.0/16\"\nidle = \"73s\"\n",
        child.path(),
        below.path(),
    );
    let _agent = Agent::start(&root, &config)?;
    assert_eq!(pair.idle(None, "10.2.2.2")?[0], 73);
    let from = Some("127.0.0.1:0");
    assert_eq!(pair.idle(from, "10.1.1.1")?, [72, UNTOUCHED]);
    Ok(())
}

#[test]
fn within_a_cgroup_the_most_exact_remote_wins() -> Result<()> {
    require!(Need::Program("ip"));
    let (cgroup, netns) = (Cgroup::new()?, netns()?);
    let mut web = Pair::start(&cgroup, &cgroup, &netns, 443)?;
    let mut other = Pair::start(&cgroup, &cgroup, &netns, 8000)?;
    let _agent = Agent::start(
        &cgroup,
        "[[policy]]\nname = \"port\"\nport = 443\nidle = \"71s\"\n\
         [[policy]]\nname = \"net\"\nremote = \"10.0.0.0/8\"\nidle = \"72s\"\n\
         [[policy]]\nname = \"both\"\nremote = \"10.0.0.0/8\"\nport = 443\nidle = \"73s\"\n\
         [[policy]]\nname = \"longer\"\nremote = \"10.1.0.0/16\"\nidle = \"74s\"\n\
         [[policy]]\nname = \"later\"\nremote = \"10.0.0.0/8\"\nidle = \"75s\"\n\
         [[policy]]\nname = \"wide\"\nport = \"1-1023\"\nidle = \"76s\"\n",
    )?;
    assert_eq!(web.idle(None, "127.0.0.1")?[0], 71);
    assert_eq!(web.idle(None, "10.0.0.1")?[0], 73);
    assert_eq!(web.idle(None, "10.1.0.1")?[0], 74);
    assert_eq!(other.idle(None, "10.0.0.1")?[0], 72);
    assert_eq!(other.idle(None, "10.1.0.1")?[0], 74);
    assert_eq!(other.idle(None, "127.0.0.1")?[0], UNTOUCHED);
    assert_eq!(
        other.idle(Some("127.0.0.1:1023"), "127.0.0.1")?,
        [UNTOUCHED, 76]
    );
    Ok(())
}

#[test]
fn networks_of_ipv4_hold_for_v4_mapped_addresses_and_those_of_ipv6_do_not() -> Result<()> {
    require!(Need::Program("ip"));
    let (cgroup, netns) = (Cgroup::new()?, netns()?);
    let mut pair = Pair::start(&cgroup, &cgroup, &netns, 0)?;
    let _agent = Agent::start(
        &cgroup,
        "[[policy]]\nname = \"v6\"\nremote = [\"::/0\", \"::fffe:0:0/95\"]\nidle = \"71s\"\n\
         [[policy]]\nname = \"v4\"\nremote = \"10.0.0.0/8\"\nidle = \"72s\"\n\
         [[policy]]\nname = \"mapped\"\nremote = \"::ffff:10.1.0.0/112\"\nidle = \"73s\"\n",
    )?;
    for (to, idle) in [
        ("::ffff:10.0.0.1", 72),
        ("10.0.0.1", 72),
        ("::ffff:10.1.0.1", 73),
        ("10.1.0.1", 73),
        ("127.0.0.1", UNTOUCHED),
        ("::ffff:127.0.0.1", UNTOUCHED),
        ("2001:db8::1", 71),
        ("::1", 71),
    ] {
        // Of a listener for both, so that IPv4 is v4-mapped on the accepting end.
        let from = SocketAddr::new(to.parse()?, 0).to_string();
        assert_eq!(pair.idle(Some(&from), to)?, [idle, idle], "{to}");
    }
    Ok(())
}

/// A small generator of numbers without a pattern (SplitMix64, Steele and others
/// 2014): the same ones in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() >> 32).expect("32 bits") % end
    }

    fn percent(&mut self, of: usize) -> bool {
        self.below(100) < of
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// The cgroups of the property test: the one that is governed, two below it, and
/// one below the first of those.
const ABOVE: [Option<usize>; 4] = [None, Some(0), Some(0), Some(1)];
const NAMES: [&str; 4] = ["", "/one", "/two", "/one/below"];

/// Globs below the governed cgroup, and which of the four they match.
const GLOBS: [(&str, &[usize]); 6] = [
    ("*", &[0]),
    ("/*", &[1, 2]),
    ("/**", &[1, 2, 3]),
    ("/*/*", &[3]),
    ("/{two,three}", &[2]),
    ("/on?", &[1]),
];

/// Ports at which the programs in the four cgroups listen: the first of each for
/// both families, the second for IPv4 alone.
const LISTENED: [[u16; 2]; 4] = [[80, 443], [8000, 8443], [8999, 9000], [1, 65_535]];

/// Ports that connections may come from.
const SOURCES: [u16; 9] = [2, 79, 81, 444, 7999, 8001, 8500, 9001, 65_534];

/// A network as the reference understands it.
#[derive(Clone, Debug)]
struct Network {
    text: String,
    excepted: bool,
    is_ipv4: bool,
    /// The prefix in digits, one for each bit.
    prefix: String,
}

/// The bits of an address in digits, and whether it is one of IPv4, v4-mapped
/// or not.
fn bits(address: IpAddr) -> (bool, String) {
    match address.to_canonical() {
        IpAddr::V4(v4) => (true, format!("{:032b}", u32::from(v4))),
        IpAddr::V6(v6) => (false, format!("{:0128b}", u128::from(v6))),
    }
}

impl Network {
    fn random(random: &mut Random) -> Self {
        let excepted = random.percent(30);
        let sign = if excepted { "!" } else { "" };
        if random.percent(5) {
            // Half of it is where IPv4 stands in IPv6.
            return Self {
                text: format!("{sign}::fffe:0:0/95"),
                excepted,
                is_ipv4: false,
                prefix: format!("{:0128b}", 0xfffe_u128 << 32)[..95].to_owned(),
            };
        }
        let (is_ipv4, mut digits) = bits(address(random));
        let length = if is_ipv4 {
            random.pick(&[0, 1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 30, 31, 32])
        } else {
            random.pick(&[0, 1, 16, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 127, 128])
        };
        digits.truncate(length);
        let width = if is_ipv4 { 32 } else { 128 };
        let padded = format!("{digits:0<width$}");
        let number = u128::from_str_radix(&padded, 2).expect("digits");
        let text = if is_ipv4 {
            let v4 = Ipv4Addr::from(u32::try_from(number).expect("32 bits"));
            if random.percent(15) {
                format!("{}/{}", v4.to_ipv6_mapped(), 96 + length)
            } else if length == 32 && random.percent(50) {
                v4.to_string()
            } else {
                format!("{v4}/{length}")
            }
        } else {
            format!("{}/{length}", Ipv6Addr::from(number))
        };
        Self {
            text: format!("{sign}{text}"),
            excepted,
            is_ipv4,
            prefix: digits,
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        let (is_ipv4, digits) = bits(address);
        is_ipv4 == self.is_ipv4 && digits.starts_with(&self.prefix)
    }
}

/// An address of the namespace. They are close to one another, so that networks
/// contain some of them and one another.
fn address(random: &mut Random) -> IpAddr {
    let host = random.pick(&[1, 2, 3, 130]);
    match random.below(20) {
        0 => Ipv4Addr::LOCALHOST.into(),
        1 => Ipv6Addr::LOCALHOST.into(),
        2..=11 => {
            let (a, b) = (random.pick(&[0, 1, 2, 128]), random.pick(&[0, 1, 128]));
            Ipv4Addr::new(10, a, b, host).into()
        }
        _ => {
            let (a, b) = (
                random.pick(&[0, 1, 0x8000]),
                random.pick(&[0, 1, 2, 0x8000]),
            );
            Ipv6Addr::new(0x2001, 0xdb8, a, b, 0, 0, 0, host.into()).into()
        }
    }
}

/// A range of ports; most begin or end at one that is in use.
fn ports(random: &mut Random) -> (u16, u16) {
    let mut all = LISTENED.concat();
    all.extend(SOURCES);
    match random.below(10) {
        0 => (1, u16::MAX),
        // Where the kernel takes ports from for sockets that are not bound.
        1 => (32_768, 60_999),
        2..=5 => {
            let port = random.pick(&all);
            (port, port)
        }
        _ => {
            let (one, other) = (random.pick(&all), random.pick(&all));
            (one.min(other), one.max(other))
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Policy {
    name: String,
    idle: i32,
    /// Cgroups that a path of it names, and those that a glob of it matches; none
    /// where it is for all that are governed.
    places: Option<[Vec<usize>; 2]>,
    remotes: Vec<Network>,
    ports: Vec<(u16, u16)>,
}

/// How exactly a policy names a remote end: the length of the prefix, none being
/// the least; then the number of ports, the fewer the better; then whether it
/// says anything at all.
type Exactness = (Option<usize>, Reverse<u32>, bool);

impl Policy {
    /// A policy and how it is written.
    fn random(random: &mut Random, root: &Cgroup, name: String, idle: i32) -> (Self, String) {
        let mut policy = Self {
            name,
            idle,
            ..Self::default()
        };
        let mut text = format!(
            "[[policy]]\nname = \"{}\"\nidle = \"{idle}s\"\n",
            policy.name
        );
        if random.percent(75) {
            let mut places = [Vec::new(), Vec::new()];
            let mut patterns = Vec::new();
            for _ in 0..=random.below(2) {
                if random.percent(60) {
                    let cgroup = random.below(4);
                    places[0].push(cgroup);
                    patterns.push(format!("{}{}", root.path(), NAMES[cgroup]));
                } else {
                    let (glob, matched) = random.pick(&GLOBS);
                    places[1].extend(matched);
                    patterns.push(format!("{}{glob}", root.path()));
                }
            }
            writeln!(text, "cgroup = {patterns:?}").expect("a string");
            policy.places = Some(places);
        }
        for _ in 0..random.pick(&[0, 0, 1, 1, 2, 3, 5]) {
            let new = Network::random(random);
            let meaning = |network: &Network| (network.is_ipv4, network.prefix.clone());
            if policy
                .remotes
                .iter()
                .all(|old| meaning(old) != meaning(&new))
            {
                policy.remotes.push(new);
            }
        }
        for _ in 0..random.pick(&[0, 0, 0, 1, 2, 3]) {
            let new = ports(random);
            if !policy.ports.contains(&new) {
                policy.ports.push(new);
            }
        }
        if policy.places.is_none() && policy.remotes.is_empty() && policy.ports.is_empty() {
            policy.ports.push((443, 443));
        }
        if !policy.remotes.is_empty() {
            let remotes = policy.remotes.iter().map(|network| &network.text);
            writeln!(text, "remote = {:?}", remotes.collect::<Vec<_>>()).expect("a string");
        }
        if !policy.ports.is_empty() {
            let ports = policy.ports.iter().map(|(first, last)| {
                if first == last {
                    first.to_string()
                } else {
                    format!("\"{first}-{last}\"")
                }
            });
            let ports = ports.collect::<Vec<_>>().join(", ");
            writeln!(text, "port = [{ports}]").expect("a string");
        }
        (policy, text)
    }

    /// Whether it stands at a cgroup: by a path, by a glob, or as one for all, in
    /// this order.
    fn rank(&self, cgroup: usize) -> Option<usize> {
        match &self.places {
            Some(places) => places.iter().position(|of| of.contains(&cgroup)),
            None => (cgroup == 0).then_some(2),
        }
    }

    fn exactness(&self, remote: SocketAddr) -> Option<Exactness> {
        let mut network = None;
        let mut allowed = self.remotes.iter().all(|network| network.excepted);
        // Longer ones later, so that the longest has the last word.
        for length in 0..=128 {
            for named in &self.remotes {
                if named.prefix.len() == length && named.contains(remote.ip()) {
                    allowed = !named.excepted;
                    network = Some(length);
                }
            }
        }
        if !allowed {
            return None;
        }
        let size = |(first, last): &(u16, u16)| u32::from(*last) - u32::from(*first) + 1;
        let among = |(first, last): &&(u16, u16)| (*first..=*last).contains(&remote.port());
        let ports = if self.ports.is_empty() {
            1 << 16
        } else {
            self.ports.iter().filter(among).map(size).min()?
        };
        let says_something = !self.remotes.is_empty() || !self.ports.is_empty();
        Some((network, Reverse(ports), says_something))
    }
}

/// All policies of a config, the default as the last one where there is one.
#[derive(Debug)]
struct Policies {
    text: String,
    all: Vec<Policy>,
}

impl Policies {
    fn random(random: &mut Random, root: &Cgroup, round: i32) -> Self {
        let first = 1000 + 40 * round;
        let mut text = String::new();
        let mut all = Vec::new();
        for n in 0..random.pick(&[1, 3, 6, 10, 16]) {
            let idle = first + n;
            let (policy, written) = Policy::random(random, root, format!("p{idle}"), idle);
            text += &written;
            all.push(policy);
        }
        if random.percent(70) {
            let idle = first + 39;
            writeln!(text, "[default]\nidle = \"{idle}s\"").expect("a string");
            all.push(Policy {
                name: "default".to_owned(),
                idle,
                ..Policy::default()
            });
        }
        Self { text, all }
    }

    /// Whose a connection is, from the words of the documentation.
    fn decide(&self, cgroup: usize, remote: SocketAddr) -> Option<&Policy> {
        let mut next = Some(cgroup);
        while let Some(cgroup) = next {
            let mut best: Option<(&Policy, _)> = None;
            for policy in &self.all {
                if let Some(rank) = policy.rank(cgroup)
                    && let Some(exactness) = policy.exactness(remote)
                {
                    let key = (exactness, Reverse(rank));
                    if best.as_ref().is_none_or(|(_, best)| key > *best) {
                        best = Some((policy, key));
                    }
                }
            }
            if let Some((policy, _)) = best {
                return Some(policy);
            }
            next = ABOVE[cgroup];
        }
        None
    }
}

/// One end of a connection.
struct End {
    /// Of its process.
    cgroup: usize,
    socket: Socket,
    here: SocketAddr,
    there: SocketAddr,
}

impl End {
    /// What it should have under these policies. Once nobody claims it any more, it
    /// gets back what it had.
    fn expected(&self, policies: &Policies) -> Options {
        let policy = policies.decide(self.cgroup, self.there);
        policy.map_or(Options::UNTOUCHED, |policy| Options::on(policy.idle, 10, 6))
    }

    fn decided<'a>(&self, policies: &'a Policies) -> Option<&'a str> {
        let policy = policies.decide(self.cgroup, self.there)?;
        Some(&policy.name)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { here, there, .. } = self;
        write!(f, "in `{}`, {here} to {there}", NAMES[self.cgroup])
    }
}

/// Programs in all four cgroups, connected with one another.
struct World {
    root: Cgroup,
    probes: Vec<Probe>,
    listeners: Vec<[Socket; 2]>,
    connections: Vec<[End; 2]>,
    _cgroups: Vec<Cgroup>,
}

impl World {
    fn new(netns: &Netns) -> Result<Self> {
        let root = Cgroup::new()?;
        let mut cgroups = Vec::new();
        for name in &NAMES[1..] {
            cgroups.push(root.descendant(&name[1..])?);
        }
        let mut probes = Vec::new();
        let mut listeners = Vec::new();
        for (cgroup, [both, v4]) in [&root].into_iter().chain(&cgroups).zip(LISTENED) {
            let mut probe = Probe::start(Program::Static, (cgroup, netns))?;
            let (both, _) = probe.listener(&format!("[::]:{both}"))?;
            let (v4, _) = probe.listener(&format!("0.0.0.0:{v4}"))?;
            probes.push(probe);
            listeners.push([both, v4]);
        }
        Ok(Self {
            root,
            probes,
            listeners,
            connections: Vec::new(),
            _cgroups: cgroups,
        })
    }

    /// One more connection, from somewhere to somewhere.
    fn connect(&mut self, random: &mut Random) -> Result<()> {
        let (client, server) = (random.below(4), random.below(4));
        let mut to = address(random);
        let which = if to.is_ipv4() { random.below(2) } else { 0 };
        let listener = self.listeners[server][which];
        let mut from = random.percent(50).then(|| {
            loop {
                let from = address(random);
                if from.is_ipv4() == to.is_ipv4() {
                    break from;
                }
            }
        });
        if random.percent(30) {
            to = mapped(to);
            from = from.map(mapped);
        }
        let from = from.map(|from| SocketAddr::new(from, random.pick(&SOURCES)));
        let to = SocketAddr::new(to, LISTENED[server][which]);
        let connecting = self.probes[client].socket(Kind::of(to))?;
        let made = from
            .map_or(Ok(()), |from| self.probes[client].bind(connecting, from))
            .and_then(|()| self.probes[client].connect(connecting, to));
        match made {
            // That port of that address is in use: there are few.
            Err(error) if matches!(errno(&error), Some(Errno::ADDRINUSE | Errno::ADDRNOTAVAIL)) => {
                return self.probes[client].close(connecting);
            }
            made => made.with_context(|| format!("{from:?} to {to}"))?,
        }
        let accepting = self.probes[server].accept(listener)?;
        let here = plain(self.probes[client].name(connecting)?);
        let there = plain(self.probes[server].name(accepting)?);
        let end = |cgroup, socket, here, there| End {
            cgroup,
            socket,
            here,
            there,
        };
        self.connections.push([
            end(client, connecting, here, there),
            end(server, accepting, there, here),
        ]);
        Ok(())
    }

    fn close(&mut self, connection: usize) -> Result<()> {
        for end in self.connections.swap_remove(connection) {
            self.probes[end.cgroup].close(end.socket)?;
        }
        Ok(())
    }

    /// Compares what every end has with what the policies say; how many there are.
    fn follow(&mut self, policies: &Policies, when: &str) -> Result<usize> {
        let mut wrong = String::new();
        for end in self.connections.iter().flatten() {
            let expected = end.expected(policies);
            let got = self.probes[end.cgroup].options(end.socket)?;
            if got != expected {
                let decided = end.decided(policies);
                writeln!(
                    wrong,
                    "{end}: {decided:?}\n  expected {expected:?}\n  got      {got:?}"
                )?;
            }
        }
        ensure!(wrong.is_empty(), "{when}:\n{}\n{wrong}", policies.text);
        Ok(2 * self.connections.len())
    }

    /// Compares the policies that `sockets` names with those that the reference
    /// decides for.
    fn compare_listing(&self, policies: &Policies, when: &str) -> Result<()> {
        let listed = policies_of(&self.root)?;
        let mut wrong = String::new();
        for end in self.connections.iter().flatten() {
            let decided = end.decided(policies);
            let named = listed.get(&(end.here, end.there));
            let named = named.with_context(|| format!("{end} is not listed"))?;
            if named.as_deref() != decided {
                writeln!(wrong, "{end}: {decided:?}, sockets says {named:?}")?;
            }
        }
        ensure!(wrong.is_empty(), "{when}:\n{}\n{wrong}", policies.text);
        Ok(())
    }
}

fn mapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(_) => address,
    }
}

/// Without the way in which a socket of IPv6 writes IPv4.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The policy that `sockets` names for each end below a cgroup.
fn policies_of(root: &Cgroup) -> Result<HashMap<(SocketAddr, SocketAddr), Option<String>>> {
    let mut command = agent_command();
    command.args(["sockets", "--json", "--cgroup", root.path()]);
    let listed = output(&mut command, Duration::from_secs(30))?;
    ensure!(listed.code == Some(0), "{}", listed.stderr);
    let record = |line: &str| -> Result<_> {
        let record: Value = serde_json::from_str(line)?;
        let address = |side: &str| -> Result<SocketAddr> {
            let ip = record[format!("{side}_address")].as_str();
            let port = record[format!("{side}_port")].as_u64();
            let ip: IpAddr = ip.context("no address")?.parse()?;
            let port = u16::try_from(port.context("no port")?)?;
            Ok(plain(SocketAddr::new(ip, port)))
        };
        let policy = record["policy"].as_str().map(str::to_owned);
        Ok(((address("local")?, address("remote")?), policy))
    };
    let records = listed.stdout.lines();
    records
        .map(|line| record(line).with_context(|| line.to_owned()))
        .collect()
}

/// Where the random policies and connections begin: any number will do.
const SEED: u64 = 20_240_519;

/// Random policies, one config after another by reload, and random connections
/// between programs in four cgroups: what each end has, what the documentation
/// says and what `sockets` says is one and the same.
#[test]
fn kernel_listing_and_documentation_agree_on_every_connection() -> Result<()> {
    require!(Need::Program("ip"));
    let netns = netns()?;
    let mut world = World::new(&netns)?;
    let mut random = Random(SEED);
    for _ in 0..60 {
        world.connect(&mut random)?;
    }
    let mut policies = Policies::random(&mut random, &world.root, 0);
    let mut agent = Agent::start(&world.root, &policies.text)?;
    let mut swept = agent.swept()?;
    let mut ends = 0;
    for round in 1..=32 {
        let when = format!("seed {SEED}, round {round}");
        ensure!(
            swept["waiting"] == 0 && swept["missed"] == json!([]),
            "{when}: {swept}"
        );
        // Those that were there first, and then others as well.
        ends += world.follow(&policies, &format!("{when}, existing"))?;
        while world.connections.len() > 60 {
            let one = random.below(world.connections.len());
            world.close(one)?;
        }
        for _ in 0..60 {
            world.connect(&mut random)?;
        }
        ends += world.follow(&policies, &format!("{when}, new"))?;
        world.compare_listing(&policies, &when)?;
        policies = Policies::random(&mut random, &world.root, round);
        swept = agent.reload(&policies.text)?;
    }
    assert!(ends > 10_000, "no more than {ends} ends");
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(finished.record["failures"], json!([]));
    Ok(())
}

/// Rules change under connections that come and go: each has the old policy or
/// the new one from its first moment, and never the one that is for the rest.
#[test]
fn under_churn_every_connection_has_one_of_two_policies() -> Result<()> {
    require!(Need::Program("ip"));
    let root = Cgroup::new()?;
    let child = root.child("child")?;
    let netns = Netns::new()?;
    let mut coming = Crowd::start((&child, &netns), "127.0.1.1:0")?;
    let mut steady = Crowd::start((&child, &netns), "127.0.2.1:0")?;
    let rest = "[default]\nidle = \"70s\"\n";
    let path = child.path();
    // By cgroup and network, by network and port, by cgroup alone, by parts.
    let configs = [
        format!(
            "{rest}[[policy]]\nname = \"a\"\ncgroup = \"{path}\"\n\
             remote = [\"127.0.0.0/8\", \"!127.3.0.0/16\"]\nidle = \"71s\"\n"
        ),
        format!(
            "{rest}[[policy]]\nname = \"b\"\nremote = \"127.0.0.0/14\"\nport = \"1-65535\"\n\
             idle = \"72s\"\n"
        ),
        format!("{rest}[[policy]]\nname = \"c\"\ncgroup = \"{path}\"\nidle = \"71s\"\n"),
        format!(
            "{rest}[[policy]]\nname = \"low\"\ncgroup = \"{path}\"\nport = \"1-40000\"\n\
             idle = \"72s\"\n\
             [[policy]]\nname = \"high\"\nport = \"40001-65535\"\nidle = \"72s\"\n"
        ),
    ];
    let mut agent = Agent::start(&root, &configs[0])?;
    steady.connect(500)?;
    let churn = Churn {
        time: Duration::from_secs(2),
        rate: 6000,
        idle: [71, 72],
    };
    let done = AtomicBool::new(false);
    let churned = scope(|scope| -> Result<_> {
        let churned = scope.spawn(|| coming.churn_until(&done, &churn));
        let reloaded = (1..=20).try_for_each(|n| -> Result<()> {
            agent.reload(&configs[n % 4])?;
            steady.all_have(Options::on(if n % 2 == 0 { 71 } else { 72 }, 10, 6))
        });
        done.store(true, Ordering::Relaxed);
        reloaded?;
        churned.join().expect("a panic")
    })?;
    eprintln!("{churned:?}");
    assert_eq!(churned.without, 0, "{churned:?}");
    let [first, second] = churned.with;
    assert!(first > 0 && second > 0, "{churned:?}");
    assert!(churned.made > 2000, "no churn to speak of: {churned:?}");
    let finished = agent.stop()?;
    assert_eq!(finished.record["failures"], json!([]));
    assert_eq!(finished.count("default", "seen"), 0);
    Ok(())
}
