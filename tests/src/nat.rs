use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;

use crate::Netns;

const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 98, 0, 2));

/// A server, a NAT on the way to it that forgets connections without a word, and a
/// client, each in a network namespace of its own.
#[derive(Debug)]
pub struct ForgetfulNat {
    /// Where clients are.
    pub client: Netns,
    /// Where the server is.
    pub server: Netns,
    _nat: Netns,
}

impl ForgetfulNat {
    /// After so many seconds of silence it forgets a connection.
    pub const AFTER: u64 = 10;

    /// Makes all three. Needs `ip` and `nft`.
    ///
    /// # Errors
    ///
    /// The network cannot be made.
    pub fn new() -> Result<Self> {
        let (client, nat) = Netns::pair()?;
        let server = Netns::new()?;
        let peer = format!(
            "link add eth1 type veth peer name eth0 netns {}",
            server.path().display()
        );
        nat.run("ip", &peer)?;
        let nats = IpAddr::from([10, 98, 0, 1]);
        for (netns, address, device) in [(&nat, nats, "eth1"), (&server, SERVER, "eth0")] {
            netns.run("ip", &format!("addr add {address}/24 dev {device}"))?;
            netns.run("ip", &format!("link set {device} up"))?;
        }
        client.run("ip", "route add 10.98.0.0/24 via 10.99.0.2")?;
        nat.sysctl("net/ipv4/ip_forward", "1")?;
        for rules in [
            "add table ip n",
            "add chain ip n p { type nat hook postrouting priority 100; }",
            "add rule ip n p oifname eth1 masquerade",
            "add chain ip n f { type filter hook forward priority 0; }",
            "add rule ip n f ct state invalid drop",
            "add rule ip n f ct state new tcp flags & (syn|ack) != syn drop",
        ] {
            nat.run("nft", rules)?;
        }
        nat.sysctl(
            "net/netfilter/nf_conntrack_tcp_timeout_established",
            &Self::AFTER.to_string(),
        )?;
        nat.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")?;
        Ok(Self {
            client,
            server,
            _nat: nat,
        })
    }

    /// Where the server is reached.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        SERVER
    }

    /// An address for the server to listen on, with any port.
    #[must_use]
    pub fn listen(&self) -> String {
        format!("{SERVER}:0")
    }
}
