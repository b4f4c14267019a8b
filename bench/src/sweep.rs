//! Connections that exist already: the sweep and the listing against `ss`.

use std::ffi::OsStr;

use anyhow::Result;
use keepalive_tests::{Cgroup, Crowd, Netns, Place};
use tempfile::NamedTempFile;

use crate::{
    Bench,
    peer::with_ports,
    report::{Goal, Table},
    stats::{Summary, ratios},
    timed::time,
};

/// Connections of one process, of two sockets each.
const PER_PROCESS: u32 = 9_500;

/// Where the goals are judged.
const LARGE: u32 = 200_000;

const SS: &str = "ss -tnH";
const SS_ALL: &str = "ss -tnoeH";
const FIRST: &str = "sweep, first";
const AGAIN: &str = "sweep, nothing to change";
const ONE: &str = "sweep, one timer to change";
const LISTING: &str = "sockets --json";

/// Long timers, so that no probe of these connections falls into a measurement.
const POLICY: &str = "[default]\nidle = \"2h\"\n";
const ANOTHER: &str = "[default]\nidle = { exactly = \"3h\" }\n";

/// `sweep`: CPU time and memory of whole commands, by the number of sockets. A
/// first sweep needs new sockets, so each round has its own.
pub(crate) fn sweep(bench: &mut Bench) -> Result<()> {
    let title = "existing connections, whole commands";
    let mut cpu = Table::new("sweep", format!("{title}: CPU time"), "ms", &[SS, SS_ALL]);
    let mut memory = Table::new(
        "sweep-memory",
        format!("{title}: memory at the peak"),
        "MiB",
        &[],
    );
    let sizes = [1_000, 10_000, 50_000, LARGE, 500_000];
    let configs = [config(POLICY)?, config(ANOTHER)?];
    for &size in &sizes[..if bench.full { 5 } else { 4 }] {
        for _ in 0..bench.rounds.min(5) {
            bench.go_on()?;
            let (cgroup, netns) = (Cgroup::new()?, Netns::new()?);
            let _crowds = crowds(&cgroup, &netns, size)?;
            let agent = bench.agent.as_os_str();
            let sweep = |config: &NamedTempFile| {
                let command = ["sweep", "--cgroup", cgroup.path(), "--config"].map(OsStr::new);
                let command = [&[agent], &command[..], &[config.path().as_os_str()]].concat();
                time(Place::default(), &command)
            };
            let ss = |flags| time(Place::from(&netns), &["ss", flags].map(OsStr::new));
            let listing = [agent, "sockets".as_ref(), "--json".as_ref()];
            for (name, cost) in [
                (SS, ss("-tnH")?),
                (FIRST, sweep(&configs[0])?),
                (AGAIN, sweep(&configs[0])?),
                (ONE, sweep(&configs[1])?),
                (SS_ALL, ss("-tnoeH")?),
                (LISTING, time(Place::default(), &listing)?),
            ] {
                cpu.add(name, Some(size), cost.cpu);
                memory.add(name, Some(size), cost.mebibytes);
            }
        }
    }
    let goals = [
        ("first sweep of 200,000, of ss -tnH", FIRST, SS, 0.6),
        (
            "sweep of 200,000 with nothing to change, of ss -tnH",
            AGAIN,
            SS,
            0.6,
        ),
        (
            "sockets --json of 200,000, of ss -tnoeH",
            LISTING,
            SS_ALL,
            1.5,
        ),
    ];
    let goals = goals.map(|(what, name, of, limit)| cpu.goal(what, name, of, Some(LARGE), limit));
    bench.report.goals.extend(goals);
    let growth = Summary::of(&ratios(
        memory.samples(AGAIN, LARGE),
        memory.samples(AGAIN, sizes[0]),
    ));
    let what = "memory of a sweep of 200,000, of one of 1,000";
    bench.report.goals.push(Goal::new(what, 1.05, "×", growth));
    bench.report.take(cpu);
    bench.report.take(memory);
    Ok(())
}

/// A file with this config.
pub(crate) fn config(text: &str) -> Result<NamedTempFile> {
    let file = NamedTempFile::with_suffix(".toml")?;
    std::fs::write(&file, text)?;
    Ok(file)
}

/// Processes with so many established sockets together.
pub(crate) fn crowds(cgroup: &Cgroup, netns: &Netns, sockets: u32) -> Result<Vec<Crowd>> {
    with_ports(netns)?;
    let connections = sockets / 2;
    let mut crowds = Vec::new();
    // Not at the address that clients have, whose ports may be any.
    for (first, host) in (0..connections).step_by(PER_PROCESS as usize).zip(2..) {
        let mut crowd = Crowd::start((cgroup, netns), &format!("127.0.0.{host}:5000"))?;
        crowd.connect(PER_PROCESS.min(connections - first))?;
        crowds.push(crowd);
    }
    Ok(crowds)
}
