//! Connections that are made and closed, under everything one could do.

use anyhow::Result;

use super::{
    Bench,
    peer::{BEFORE, Churn, Cost, FLOOR, NOTHING, OURS, PRELOAD, Peer, Sides},
    place::Netns,
    report::Table,
};

/// Connections per sample and thread: well below a tenth of a second.
const COUNT: u32 = 1_500;

/// The peers that are compared under load.
pub(super) fn peers(bench: &mut Bench) -> Result<Vec<Peer>> {
    let place = &bench.place;
    let mut peers = vec![
        Peer::nothing(place)?,
        Peer::noop(place)?,
        Peer::floor(place)?,
        Peer::ours(place, &bench.agent)?,
    ];
    if let Some(before) = &bench.before {
        peers.push(Peer::agent(
            place,
            BEFORE,
            before,
            super::peer::DEFAULT_POLICY,
        )?);
    }
    match Peer::preload(place)? {
        Some(preload) => peers.push(preload),
        None => bench
            .report
            .missing
            .push("libkeepalive: apt-get install libkeepalive0".to_owned()),
    }
    peers.push(Peer::own(place)?);
    Ok(peers)
}

/// `churn`: over loopback.
pub(crate) fn loopback(bench: &mut Bench) -> Result<()> {
    let peers = peers(bench)?;
    let netns = Netns::make(&bench.place)?;
    let cpus = u32::try_from(std::thread::available_parallelism()?.get())?;
    let mut load = Churn {
        sides: Sides::Both,
        outside: peers.first(),
        threads: 1,
        count: COUNT,
        address: "127.0.0.1",
        listeners: Some(&netns),
        clients: Some(&netns),
    };
    let title = "connect, accept, close over loopback, one thread";
    let tables = compare(bench, &peers, &load, ["churn", "churn-wall"], title)?;
    let [cpu, _] = &tables;
    let goals = [
        cpu.goal(
            "churn with enforcement, of nothing attached",
            OURS,
            NOTHING,
            None,
            1.03,
        ),
        cpu.goal(
            "churn with enforcement, of libkeepalive",
            OURS,
            PRELOAD,
            None,
            1.0,
        ),
    ];
    bench.report.goals.extend(goals);
    for table in tables {
        bench.report.take(table);
    }

    for (sides, ids, title) in [
        (
            Sides::Accepting,
            ["churn-accept", "churn-accept-wall"],
            "the same, only the accepting end is governed",
        ),
        (
            Sides::Connecting,
            ["churn-connect", "churn-connect-wall"],
            "the same, only the connecting end is governed",
        ),
    ] {
        load.sides = sides;
        for table in compare(bench, &peers, &load, ids, title)? {
            bench.report.take(table);
        }
    }

    load.sides = Sides::Both;
    if cpus > 1 {
        load.threads = cpus;
        let title = format!("connect, accept, close over loopback, {cpus} threads");
        let ids = ["churn-threads", "churn-threads-wall"];
        for table in compare(bench, &peers, &load, ids, &title)? {
            bench.report.take(table);
        }
    }
    Ok(())
}

/// `veth`: between two network namespaces.
pub(crate) fn veth(bench: &mut Bench) -> Result<()> {
    let peers = peers(bench)?;
    let (near, far) = Netns::pair(&bench.place)?;
    let load = Churn {
        sides: Sides::Both,
        outside: None,
        threads: 1,
        count: COUNT,
        address: "10.99.0.2",
        listeners: Some(&far),
        clients: Some(&near),
    };
    let title = "connect, accept, close across a veth pair, one thread";
    let tables = compare(bench, &peers, &load, ["veth", "veth-wall"], title)?;
    let goal = tables[0].goal(
        "churn across veth, of nothing attached",
        OURS,
        NOTHING,
        None,
        1.03,
    );
    bench.report.goals.push(goal);
    for table in tables {
        bench.report.take(table);
    }
    Ok(())
}

/// CPU time and wall clock of a connection, one sample of each peer in a round.
fn compare(
    bench: &Bench,
    peers: &[Peer],
    load: &Churn<'_>,
    [cpu, wall]: [&'static str; 2],
    title: &str,
) -> Result<[Table; 2]> {
    let references = [NOTHING, FLOOR];
    let mut tables = [
        Table::new(
            cpu,
            format!("{title}: CPU time of a connection"),
            "µs",
            &references,
        ),
        Table::new(
            wall,
            format!("{title}: time of a connection"),
            "µs",
            &references[..1],
        ),
    ];
    for peer in bench.in_turns(peers) {
        let Cost { wall, cpu } = peer.churn(&bench.place, load)?;
        tables[0].add(&peer.name, None, cpu / 1e3);
        tables[1].add(&peer.name, None, wall / 1e3);
    }
    Ok(tables)
}
