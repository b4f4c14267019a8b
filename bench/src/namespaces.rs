//! The same number of connections in one network namespace and in many: what is
//! done with them must cost by the connection, not by the namespace.

use std::ffi::OsStr;

use anyhow::Result;
use keepalive_tests::{Cgroup, Netns, Place};

use crate::{
    Bench,
    report::{Goal, Table},
    stats::{Summary, ratios},
    sweep::{config, crowds},
    timed::time,
};

/// Both ends of 15,000 connections.
const SOCKETS: u32 = 30_000;

const MANY: u32 = 300;

const LISTING: &str = "sockets --json";
const FIRST: &str = "sweep, first";

/// `namespaces`: CPU time of whole commands, by the number of namespaces.
pub(crate) fn namespaces(bench: &mut Bench) -> Result<()> {
    let title = "30,000 sockets in so many network namespaces, whole commands: CPU time";
    let mut cpu = Table::new("namespaces", title, "ms", &[]);
    let config = config("[default]\nidle = \"2h\"\n")?;
    for _ in 0..bench.rounds.min(5) {
        for count in [1, MANY] {
            let cgroup = Cgroup::new()?;
            let mut made = Vec::new();
            for _ in 0..count {
                bench.go_on()?;
                let netns = Netns::new()?;
                made.push((crowds(&cgroup, &netns, SOCKETS / count)?, netns));
            }
            let run = |arguments: &[&OsStr]| {
                let command = [&[bench.agent.as_os_str()], arguments].concat();
                time(Place::default(), &command)
            };
            for _ in 0..3 {
                let cost = run(&["sockets", "--json"].map(OsStr::new))?;
                cpu.add(LISTING, Some(count), cost.cpu);
            }
            let sweep = ["sweep", "--cgroup", cgroup.path(), "--config"].map(OsStr::new);
            let cost = run(&[&sweep[..], &[config.path().as_os_str()]].concat())?;
            cpu.add(FIRST, Some(count), cost.cpu);
        }
    }
    let ratio = ratios(cpu.samples(LISTING, MANY), cpu.samples(LISTING, 1));
    let what = "sockets --json of 30,000 in 300 namespaces, of one";
    let goal = Goal::new(what, 1.5, "×", Summary::of(&ratio));
    bench.report.goals.push(goal);
    bench.report.take(cpu);
    Ok(())
}
