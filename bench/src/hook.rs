//! What the programs on the hook take, by the kernel's own clock.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use aya::sys::{Stats, enable_stats};
use keepalive_tests::{Cgroup, Netns};

use crate::{
    Bench, agent,
    load::WARM_UP,
    peer::{BEFORE, Churn, DEFAULT_POLICY, FLOOR, NOOP, OURS, Peer, Sides, with_ports},
    report::Table,
};

const MANY: &str = "ours, 10,000 policies";

/// `hook`: time in the kernel per call and per established socket.
pub(crate) fn hook(bench: &mut Bench) -> Result<()> {
    let agent = &bench.agent;
    let nothing = Peer::nothing()?;
    let mut peers = vec![
        Peer::program(NOOP, "noop")?,
        Peer::program(FLOOR, "floor")?,
        Peer::ours(OURS, agent)?,
    ];
    if let Some(before) = &bench.before {
        peers.push(Peer::ours(BEFORE, before)?);
    }
    // What is measured with one end governed alone.
    let few = peers.len();
    peers.extend([
        Peer::agent(MANY, agent, |root| policies(root, 10_000))?,
        Peer::deep("ours, 8 levels up", agent, 8)?,
        Peer::deep("ours, 16 levels up", agent, 16)?,
        Peer::agent("ours, one network", agent, |root| Ok(networks(root, 1)))?,
        Peer::agent("ours, 10,000 networks", agent, |root| {
            Ok(networks(root, 10_000))
        })?,
        Peer::forgetful("ours, a walk for each", agent)?,
        Peer::agent("ours, nothing claims", agent, |_| {
            Ok("[[policy]]\nname = \"other\"\ncgroup = \"/\"\n".to_owned())
        })?,
    ]);
    let netns = Netns::new()?;
    with_ports(&netns)?;
    // The kernel counts while this is open, and as long as others want it to.
    let _counting = enable_stats(Stats::RunTime)
        .context("the kernel counts no run times: Linux 5.8 or newer")?;
    let churn = |sides| Churn {
        sides,
        outside: Some(&nothing),
        ..Churn::over_loopback(&netns)
    };
    let (per_call, per_socket) = compare(bench, &peers, &churn(Sides::Both))?;
    let goals = [
        ("in the kernel per socket, of the floor", OURS, FLOOR, 1.25),
        ("10,000 policies, of one", MANY, OURS, 1.05),
    ];
    let goals = goals.map(|(what, name, of, limit)| per_socket.goal(what, name, of, None, limit));
    bench.report.take(per_call);
    bench.report.take(per_socket);
    bench.report.goals.extend(goals);

    for (id, title, side) in [
        ("hook-accept", "the accepting end", Sides::Accepting),
        ("hook-connect", "the connecting end", Sides::Connecting),
    ] {
        let (_, mut per_socket) = compare(bench, &peers[..few], &churn(side))?;
        per_socket.id = id;
        per_socket.title = format!("{title} alone, in the kernel above the no-op");
        bench.report.take(per_socket);
    }
    Ok(())
}

/// So many policies, each of a cgroup of its own, and one for all others: the load.
fn policies(root: &Cgroup, count: u32) -> Result<String> {
    agent::crowd(root, count)?;
    let path = root.path();
    let mut config = DEFAULT_POLICY.to_owned();
    for number in 0..count {
        write!(
            config,
            "[[policy]]\nname = \"p{number}\"\ncgroup = \"{path}/c{number}\"\nidle = \"90s\"\n"
        )?;
    }
    Ok(config)
}

/// A policy for so many networks, the load's among them.
fn networks(root: &Cgroup, count: u32) -> String {
    let others = (1..count).map(|number| format!("10.{}.{}.0/24", number / 256, number % 256));
    let networks: Vec<_> = ["127.0.0.0/8".to_owned()]
        .into_iter()
        .chain(others)
        .collect();
    let path = root.path();
    format!("[[policy]]\nname = \"remote\"\ncgroup = \"{path}\"\nremote = {networks:?}\n")
}

/// Nanoseconds per call, and per socket above what the no-op takes for the same
/// calls in the same round.
fn compare(bench: &Bench, peers: &[Peer], churn: &Churn<'_>) -> Result<(Table, Table)> {
    let mut per_call = Table::new(
        "hook-call",
        "in the kernel, per call (some nine per connection, two of them establish)",
        "ns",
        &[NOOP],
    );
    let mut per_socket = Table::new(
        "hook-socket",
        "in the kernel, per established socket, above the no-op",
        "ns",
        &[FLOOR, OURS],
    );
    let ends = if churn.sides == Sides::Both { 2 } else { 1 };
    // The load's warm-up is counted too.
    let sockets = f64::from(ends * (churn.count + WARM_UP));
    let mut floor_of_calls = Vec::new();
    let mut samples = Vec::new();
    for (round, peer) in bench.in_turns(peers).enumerate() {
        bench.go_on()?;
        let before = peer.used()?;
        peer.churn(churn)?;
        let after = peer.used()?;
        let time = after.nanoseconds - before.nanoseconds;
        let calls = after.calls - before.calls;
        per_call.add(&peer.name, None, time / calls);
        if peer.name == NOOP {
            floor_of_calls.push(time / calls);
        }
        samples.push((round / peers.len(), peer, time, calls));
    }
    for (round, peer, time, calls) in samples {
        if peer.name != NOOP {
            let net = (time - floor_of_calls[round] * calls) / sockets;
            per_socket.add(&peer.name, None, net);
        }
    }
    Ok((per_call, per_socket))
}
