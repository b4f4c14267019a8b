//! What the programs on the hook take, by the kernel's own clock.

use anyhow::{Context as _, Result};
use aya::sys::{Stats, enable_stats};

use super::{
    Bench,
    peer::{BEFORE, Churn, DEFAULT_POLICY, FLOOR, NOOP, OURS, Peer, Sides, Used},
    place::Netns,
    report::Table,
};

/// Connections per sample.
const COUNT: u32 = 1_500;

const MANY: &str = "ours, 10,000 policies";

/// `hook`: time in the kernel per call and per established socket.
pub(crate) fn hook(bench: &mut Bench) -> Result<()> {
    let place = &bench.place;
    let agent = &bench.agent;
    let nothing = Peer::nothing(place)?;
    let mut peers = vec![
        Peer::noop(place)?,
        Peer::floor(place)?,
        Peer::ours(place, agent)?,
        Peer::many(place, MANY, agent, 10_000)?,
        Peer::deep(place, "ours, 8 levels up", agent, 8)?,
        Peer::deep(place, "ours, 16 levels up", agent, 16)?,
        Peer::networks(place, "ours, one network", agent, 1)?,
        Peer::networks(place, "ours, 10,000 networks", agent, 10_000)?,
        Peer::forgetful(place, "ours, a walk for each", agent)?,
        Peer::agent(
            place,
            "ours, nothing claims",
            agent,
            "[[policy]]\nname = \"other\"\ncgroup = \"/\"\n",
        )?,
    ];
    if let Some(before) = &bench.before {
        peers.insert(3, Peer::agent(place, BEFORE, before, DEFAULT_POLICY)?);
    }
    let netns = Netns::make(place)?;
    // The kernel counts while this is open, and as long as others want it to.
    let _counting = enable_stats(Stats::RunTime)
        .context("the kernel counts no run times: Linux 5.8 or newer")?;
    let churn = |sides| Churn {
        sides,
        outside: Some(&nothing),
        threads: 1,
        count: COUNT,
        address: "127.0.0.1",
        listeners: Some(&netns),
        clients: Some(&netns),
    };
    let (per_call, per_socket) = compare(bench, &peers, &churn(Sides::Both))?;
    let goals = [
        per_socket.goal(
            "in the kernel per socket, of the floor",
            OURS,
            FLOOR,
            None,
            1.25,
        ),
        per_socket.goal("10,000 policies, of one", MANY, OURS, None, 1.05),
    ];
    bench.report.take(per_call);
    bench.report.take(per_socket);
    bench.report.goals.extend(goals);

    let sides = &peers[..if bench.before.is_some() { 4 } else { 3 }];
    for (id, title, side) in [
        ("hook-accept", "the accepting end", Sides::Accepting),
        ("hook-connect", "the connecting end", Sides::Connecting),
    ] {
        let (_, mut per_socket) = compare(bench, sides, &churn(side))?;
        per_socket.id = id;
        per_socket.title = format!("{title} alone, in the kernel above the no-op");
        bench.report.take(per_socket);
    }
    Ok(())
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
    let sockets = f64::from(ends * (churn.count + super::WARM_UP));
    let mut floor_of_calls = Vec::new();
    let mut samples = Vec::new();
    for (round, peer) in bench.in_turns(peers).enumerate() {
        let before = peer.used()?;
        peer.churn(&bench.place, churn)?;
        let Used { nanoseconds, calls } = peer.used()?.since(before);
        let (time, calls) = (count(nanoseconds), count(calls));
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

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn count(number: u64) -> f64 {
    number as f64
}
