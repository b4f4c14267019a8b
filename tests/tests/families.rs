//! Every way to an established TCP connection, both sides, under the built-in
//! policy: seen with `getsockopt` from inside and with `ss` from outside.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Kind, Need, Netns, Options, Probe, Program, between, require, timer, timers,
    wait_until,
};

const BUILT_IN: Options = Options::on(60, 10, 6);

#[test]
fn ipv4_ipv6_and_v4_mapped_both_sides_blocking_or_not() -> Result<()> {
    require!(Need::Program("ss"), Need::NoConfig);
    let cgroup = Cgroup::new()?;
    let agent = Agent::start_built_in(&cgroup)?;
    for (listen, connect) in [
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]", "[::1]"),
        // A connection over IPv4 with AF_INET6 at the accepting side, at the
        // connecting side, at both.
        ("[::]", "127.0.0.1"),
        ("127.0.0.1", "[::ffff:127.0.0.1]"),
        ("[::]", "[::ffff:127.0.0.1]"),
    ] {
        for nonblocking in [false, true] {
            let case = format!("{listen} from {connect}, non-blocking: {nonblocking}");
            both_sides(&cgroup, listen, connect, nonblocking).context(case)?;
        }
    }
    let finished = agent.stop()?;
    assert_eq!(finished.count("default", "seen"), 20);
    assert_eq!(finished.count("default", "turned_on"), 20);
    assert_eq!(finished.count("default", "failed"), 0);
    Ok(())
}

fn both_sides(cgroup: &Cgroup, listen: &str, connect: &str, nonblocking: bool) -> Result<()> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (listener, address) = probe.listener(&format!("{listen}:0"))?;
    let target: SocketAddr = format!("{connect}:{}", address.port()).parse()?;
    let kind = Kind {
        nonblocking,
        ..Kind::of(target)
    };
    let connecting = probe.socket(kind)?;
    probe.connect(connecting, target)?;
    let accepting = probe.accept(listener)?;

    ensure!(probe.options(connecting)? == BUILT_IN, "connecting side");
    ensure!(probe.options(accepting)? == BUILT_IN, "accepting side");
    ensure!(
        probe.options(listener)? == Options::UNTOUCHED,
        "the listener was touched"
    );
    let own = probe.name(connecting)?;
    for (local, peer) in [(own, target), (target, own)] {
        let timer = timer(None, &between(local, peer))?.context("no timer from outside")?;
        ensure!(timer.is_fresh_keepalive(60), "from outside: {timer:?}");
    }
    Ok(())
}

#[test]
fn tcp_fast_open() -> Result<()> {
    require!(
        Need::File("/proc/sys/net/ipv4/tcp_fastopen"),
        Need::NoConfig
    );
    let netns = Netns::new()?;
    let cgroup = Cgroup::new()?;
    // Client and server, without a cookie, for every listener: the very first SYN
    // carries data.
    netns.sysctl("net/ipv4/tcp_fastopen", "1543")?;
    let _agent = Agent::start_built_in(&cgroup)?;

    let mut probe = Probe::start(Program::Static, (&cgroup, &netns))?;
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    let connecting = probe.socket(Kind::of(address))?;
    probe.connect_with_data(connecting, address)?;
    let accepting = probe.accept(listener)?;
    assert_eq!(probe.receive(accepting)?, 2);

    assert_eq!(netns.counter("TcpExt", "TCPFastOpenActive")?, 1);
    assert_eq!(netns.counter("TcpExt", "TCPFastOpenPassive")?, 1);
    assert_eq!(probe.options(connecting)?, BUILT_IN);
    assert_eq!(probe.options(accepting)?, BUILT_IN);
    Ok(())
}

#[test]
fn mptcp_subflows() -> Result<()> {
    require!(
        Need::File("/proc/sys/net/mptcp/enabled"),
        Need::Program("ss"),
        Need::NoConfig,
    );
    let (near, far) = Netns::pair()?;
    let cgroup = Cgroup::new()?;
    let _agent = Agent::start_built_in(&cgroup)?;
    // A second address at the near end, from which it opens a second subflow.
    near.run("ip", "addr add 10.99.0.3/24 dev eth0")?;
    near.run("ip", "mptcp limits set subflow 2 add_addr_accepted 2")?;
    near.run("ip", "mptcp endpoint add 10.99.0.3 dev eth0 subflow")?;
    far.run("ip", "mptcp limits set subflow 2 add_addr_accepted 2")?;

    let mut server = Probe::start(Program::Static, (&cgroup, &far))?;
    let mut client = Probe::start(Program::Static, (&cgroup, &near))?;
    let kind = Kind {
        mptcp: true,
        ..Kind::default()
    };
    let listener = server.socket(kind)?;
    let address = server.listen(listener, "10.99.0.2:0".parse()?)?;
    let connecting = client.socket(kind)?;
    client.connect(connecting, address)?;
    let accepting = server.accept(listener)?;
    // The first byte of data each way makes the connection ready for a second one.
    client.send(connecting, "x")?;
    server.receive(accepting)?;
    server.send(accepting, "x")?;
    client.receive(connecting)?;

    for (netns, filter) in [
        (&near, format!("dport = :{}", address.port())),
        (&far, format!("sport = :{}", address.port())),
    ] {
        let mut seen = Vec::new();
        // The second subflow comes in its own time, and a socket shows its
        // keepalive timer once the retransmission timer has gone.
        wait_until(
            Duration::from_secs(5),
            "two subflows with keepalive",
            || {
                seen = timers(Some(netns), &filter)?;
                let fresh = |timer: &&Option<_>| {
                    timer
                        .as_ref()
                        .is_some_and(|timer: &keepalive_tests::Timer| timer.is_fresh_keepalive(60))
                };
                Ok(seen.len() == 2 && seen.iter().filter(fresh).count() == 2)
            },
        )
        .with_context(|| format!("{filter}: {seen:?}"))?;
        let details = netns.run("ss", &format!("-tniH state established {filter}"))?;
        assert_eq!(
            details.stdout.matches("tcp-ulp-mptcp").count(),
            2,
            "not MPTCP but plain TCP: {}",
            details.stdout
        );
    }
    Ok(())
}
