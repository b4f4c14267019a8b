//! The agent itself: how long it takes to push policies, and what it uses.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::process::Signal;

use super::{
    Bench,
    peer::{Agent, Churn, NOTHING, Peer, Sides, nanoseconds, wait_for},
    place::{Netns, Process},
    report::{Goal, Table},
    stats::Summary,
};

/// `push`: from the start of the agent until it enforces, and from SIGHUP until
/// another policy holds, by the number of cgroups that it names.
pub(crate) fn push(bench: &mut Bench) -> Result<()> {
    let mut table = Table::new("push", "policy for so many cgroups", "ms", &[]);
    let sizes: &[u32] = if bench.full {
        &[1, 10, 100, 1_000, 10_000, 100_000]
    } else {
        &[1, 10, 100, 1_000, 10_000]
    };
    for &size in sizes {
        let place = &bench.place;
        let root = place.cgroup()?;
        root.crowd(place, size)?;
        let config = |idle: u32| {
            format!(
                "[[policy]]\nname = \"all\"\ncgroup = \"{}/*\"\nidle = \"{idle}s\"\n",
                root.path()
            )
        };
        for _ in 0..bench.rounds.clamp(3, 7) {
            let mut agent = Agent::start(place, &bench.agent, &root, &config(60))?;
            table.add("start", Some(size), agent.started_in / 1e6);
            for idle in [90, 120] {
                fs::write(agent.config.path(), config(idle))?;
                let start = Instant::now();
                agent.process.signal(Signal::HUP)?;
                wait_for(&mut agent.process, "reloaded")?;
                table.add("reload", Some(size), nanoseconds(start) / 1e6);
                // The sweep of existing connections, which follows.
                wait_for(&mut agent.process, "swept")?;
            }
        }
    }
    bench.report.take(table);
    Ok(())
}

/// `idle`: memory, CPU time and wake-ups of a running agent.
pub(crate) fn idle(bench: &mut Bench) -> Result<()> {
    const WATCHED: Duration = Duration::from_secs(10);
    let place = &bench.place;
    let nothing = Peer::nothing(place)?;
    let ours = Peer::ours(place, &bench.agent)?;
    let agent = ours.process().context("an agent without process")?;
    let netns = Netns::make(place)?;
    let mut table = Table::new(
        "idle",
        format!("the agent, in {} s", WATCHED.as_secs()),
        "kB, wake-ups, ms",
        &[],
    );
    let mut memory = Vec::new();
    let mut wake_ups = Vec::new();
    // The sweep at the start is over, and so is its thread.
    thread::sleep(Duration::from_secs(1));
    for state in ["idle", "under churn"] {
        let before = (agent.status("voluntary_ctxt_switches")?, cpu(agent)?);
        let start = Instant::now();
        while start.elapsed() < WATCHED {
            place.go_on()?;
            if state == "idle" {
                thread::sleep(Duration::from_millis(100));
                continue;
            }
            let churn = Churn {
                sides: Sides::Both,
                outside: Some(&nothing),
                threads: 1,
                count: 2_000,
                address: "127.0.0.1",
                listeners: Some(&netns),
                clients: Some(&netns),
            };
            ours.churn(place, &churn)?;
        }
        let after = (agent.status("voluntary_ctxt_switches")?, cpu(agent)?);
        let resident = count(agent.status("VmRSS")?);
        let woken = count(after.0 - before.0);
        table.add(&format!("{state}: wake-ups"), None, woken);
        table.add(&format!("{state}: CPU time, ms"), None, after.1 - before.1);
        table.add(&format!("{state}: resident, kB"), None, resident);
        if state == "idle" {
            wake_ups.push(woken);
            memory.push(resident / 1024.0);
        }
    }
    for (name, field) in [
        ("resident and its own, kB", "RssAnon"),
        ("peak, at its start, kB", "VmHWM"),
    ] {
        table.add(name, None, count(agent.status(field)?));
    }
    let goals = [
        ("idle agent: wake-ups", 0.0, wake_ups, ""),
        ("idle agent: memory", 10.0, memory, "MiB"),
    ];
    bench.report.take(table);
    bench
        .report
        .goals
        .extend(goals.map(|(what, limit, samples, unit)| Goal {
            what: what.to_owned(),
            limit,
            found: Summary::of(&samples),
            unit,
        }));
    Ok(())
}

/// CPU time of a process in milliseconds, exact where /proc/PID/schedstat is.
fn cpu(process: &Process) -> Result<f64> {
    let id = process.id();
    let stat = fs::read_to_string(format!("/proc/{id}/schedstat"))?;
    let nanoseconds: f64 = stat
        .split_whitespace()
        .next()
        .context("an empty schedstat")?
        .parse()?;
    Ok(nanoseconds / 1e6)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn count(number: u64) -> f64 {
    number as f64
}

/// `throughput`: long-lived connections, which no program is called for.
pub(crate) fn throughput(bench: &mut Bench) -> Result<()> {
    const MEGABYTES: &str = "300";
    const TRIPS: &str = "10000";
    let place = &bench.place;
    let peers = [
        Peer::nothing(place)?,
        Peer::noop(place)?,
        Peer::ours(place, &bench.agent)?,
    ];
    let mut data = Table::new(
        "throughput",
        "a long-lived connection over loopback: CPU time of a MiB",
        "µs",
        &[NOTHING],
    );
    let mut trips = Table::new(
        "round-trips",
        "a long-lived connection over loopback: CPU time of a round trip of one byte",
        "µs",
        &[NOTHING],
    );
    for peer in bench.in_turns(&peers) {
        let mut command = place.load("stream");
        command.args([MEGABYTES, TRIPS]).arg(peer.door());
        let [_, stream, _, ping] = place.measure(&mut command)?;
        data.add(&peer.name, None, stream / 300.0 / 1e3);
        trips.add(&peer.name, None, ping / 10_000.0 / 1e3);
    }
    for (table, what) in [(&data, "data"), (&trips, "round trips")] {
        let what = format!("{what} of long-lived connections, of nothing attached");
        let goal = table.goal(what, super::peer::OURS, NOTHING, None, 1.005);
        bench.report.goals.push(goal);
    }
    bench.report.take(data);
    bench.report.take(trips);
    Ok(())
}
