//! Connections that are made and closed, under everything one could do.

use std::net::Ipv4Addr;

use anyhow::Result;
use keepalive_tests::Netns;

use crate::{
    Bench,
    peer::{BEFORE, Churn, FLOOR, NOOP, NOTHING, OURS, PRELOAD, Peer, with_ports},
    report::Table,
};

/// `churn`: over loopback, by one thread and by one on each processor, and between
/// two network namespaces.
pub(crate) fn churn(bench: &mut Bench) -> Result<()> {
    let mut peers = vec![
        Peer::nothing()?,
        Peer::program(NOOP, "noop")?,
        Peer::program(FLOOR, "floor")?,
        Peer::ours(OURS, &bench.agent)?,
        Peer::application()?,
    ];
    if let Some(before) = &bench.before {
        peers.push(Peer::ours(BEFORE, before)?);
    }
    match Peer::preload()? {
        Some(preload) => peers.push(preload),
        None => eprintln!("not measured: libkeepalive (apt-get install libkeepalive0)"),
    }
    let (near, far) = Netns::pair()?;
    with_ports(&near)?;
    with_ports(&far)?;
    let one = Churn::over_loopback(&near);
    let threads = std::thread::available_parallelism()?.get();
    let many = Churn {
        threads: u32::try_from(threads)?,
        ..Churn::over_loopback(&near)
    };
    let across = Churn {
        address: Ipv4Addr::new(10, 99, 0, 2),
        listeners: &far,
        ..Churn::over_loopback(&near)
    };
    for (id, how, churn) in [
        ("churn", "over loopback", one),
        ("churn-threads", "over loopback, all processors", many),
        ("churn-veth", "across a veth pair", across),
    ] {
        let title = format!("connect, accept, close {how}: CPU time of a connection");
        let mut table = Table::new(id, title, "µs", &[NOTHING, FLOOR]);
        for peer in bench.in_turns(&peers) {
            bench.go_on()?;
            table.add(&peer.name, None, peer.churn(&churn)? / 1e3);
        }
        for (of, limit) in [(NOTHING, 1.03), (PRELOAD, 1.0)] {
            let goal = table.goal(format!("{id}, ours, of {of}"), OURS, of, None, limit);
            bench.report.goals.push(goal);
        }
        bench.report.take(table);
    }
    Ok(())
}
