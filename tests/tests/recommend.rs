//! Behind a NAT that forgets, connections die; what is recommended from that keeps
//! the next ones.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{Agent, Cgroup, Need, Netns, Probe, Program, agent_command, output, require};
use serde_json::Value;

const LIMIT: Duration = Duration::from_mins(1);

/// After so many seconds of silence the NAT forgets a connection, without a word.
const FORGETS: u64 = 10;

/// A server, a NAT on the way to it, and a client.
struct Behind {
    client: Netns,
    _nat: Netns,
    server: Netns,
}

/// Where the server listens.
const SERVER: &str = "10.98.0.2";

impl Behind {
    fn nat() -> Result<Self> {
        let (client, nat) = Netns::pair()?;
        let server = Netns::new()?;
        let peer = format!(
            "link add eth1 type veth peer name eth0 netns {}",
            server.path().display()
        );
        nat.run("ip", &peer)?;
        for (netns, address, device) in [(&nat, "10.98.0.1", "eth1"), (&server, SERVER, "eth0")] {
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
        let timeout = FORGETS.to_string();
        nat.sysctl(
            "net/netfilter/nf_conntrack_tcp_timeout_established",
            &timeout,
        )?;
        nat.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")?;
        Ok(Self {
            client,
            _nat: nat,
            server,
        })
    }
}

fn recommend(cgroup: &Cgroup, more: &[&str]) -> Result<String> {
    let mut command = agent_command();
    command
        .args(["recommend", "--cgroup", cgroup.path()])
        .args(more);
    let output = output(&mut command, LIMIT)?;
    ensure!(output.code == Some(0), "{}", output.stderr);
    Ok(output.stdout)
}

#[test]
fn what_is_recommended_keeps_the_next_connection() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("nft"));
    let cgroup = Cgroup::new()?;
    let behind = Behind::nat()?;
    // The first probe goes out 3 s too late.
    let config = "[default]\nidle = \"13s\"\ninterval = \"1s\"\nprobes = 3\n";
    let mut agent = Agent::start(&cgroup, config)?;
    let mut server = Probe::start(Program::Static, &behind.server)?;
    let (listener, address) = server.listener(&format!("{SERVER}:0"))?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &behind.client))?;

    let nothing = recommend(&cgroup, &[])?;
    ensure!(nothing.contains("nothing\n# to recommend"), "{nothing}");

    let socket = ours.connected(address)?;
    server.accept(listener)?;
    ensure!(ours.wait(socket, LIMIT)?, "the NAT has not forgotten it");
    ours.receive(socket).err().context("no error")?;
    let unsure = recommend(&cgroup, &[])?;
    ensure!(
        unsure.contains("cannot be known") && !unsure.contains("[[policy]]"),
        "{unsure}"
    );

    // The server answers another one.
    let again = ours.connected(address)?;
    server.accept(listener)?;
    sleep(Duration::from_millis(100));
    let found: Value = serde_json::from_str(&recommend(&cgroup, &["--json"])?)?;
    let network = &found["networks"][0];
    assert_eq!(network["network"], "10.98.0.0/24", "{found}");
    assert_eq!(
        (&network["policy"], &network["died"][0]["cause"]),
        (&"default".into(), &"probes".into())
    );
    assert_eq!(network["forgets"], true, "{found}");
    let within = network["within_ms"].as_u64().context("no bound")?;
    ensure!((FORGETS * 1000..14_500).contains(&within), "{found}");
    let idle = network["idle_s"].as_u64().context("no idle time")?;
    let interval = network["interval_s"].as_u64().context("no interval")?;
    ensure!(idle + 2 * interval < FORGETS, "{found}");
    assert_eq!(
        (&network["connections"], &network["idle"][0]["idle_s"]),
        (&1.into(), &13.into())
    );
    // Taken as it is printed, it keeps a connection.
    let recommended = recommend(&cgroup, &[])?;
    ours.close(again)?;
    agent.reload(&format!("{config}{recommended}"))?;
    let kept = ours.connected(address)?;
    let accepted = server.accept(listener)?;
    let has = ours.options(kept)?;
    assert_eq!(u64::try_from(has.idle)?, idle, "{recommended}");
    sleep(Duration::from_secs(FORGETS + 5));
    ours.send(kept, "are you there?")?;
    ensure!(
        server.wait(accepted, Duration::from_secs(5))?,
        "it was forgotten"
    );
    ensure!(server.receive(accepted)? > 0);
    Ok(())
}
