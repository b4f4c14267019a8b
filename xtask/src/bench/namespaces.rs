//! The same number of connections in one network namespace and in many: what is
//! done with them must cost by the connection, not by the namespace.

use anyhow::Result;

use super::{
    Bench,
    place::{self, Netns},
    report::{Goal, Table},
    stats::{Summary, ratios},
    sweep::{Crowd, time},
};

/// Sockets, both ends of 15,000 connections.
const SOCKETS: u32 = 30_000;

const MANY: u32 = 300;

const LISTING: &str = "sockets --json";
const FIRST: &str = "sweep, first";

/// `namespaces`: CPU time of whole commands, by the number of namespaces.
pub(crate) fn namespaces(bench: &mut Bench) -> Result<()> {
    let mut cpu = Table::new(
        "namespaces",
        "30,000 sockets in so many network namespaces, whole commands: CPU time",
        "ms",
        &[],
    );
    let config = place::file("[default]\nidle = \"2h\"\n")?;
    for _ in 0..bench.rounds.clamp(1, 5) {
        for count in [1, MANY] {
            let place = &bench.place;
            let cgroup = place.cgroup()?;
            let mut crowds = Vec::new();
            for _ in 0..count {
                let netns = Netns::make(place)?;
                let crowd = Crowd::make(place, &netns, &cgroup, SOCKETS / count)?;
                crowds.push((crowd, netns));
            }
            let run = |arguments: &[&str]| {
                let mut command = place.load("time");
                command.arg("-").arg(&bench.agent).args(arguments);
                time(place, &mut command)
            };
            for _ in 0..3 {
                cpu.add(LISTING, Some(count), run(&["sockets", "--json"])?.cpu);
            }
            let sweep = ["sweep", "--cgroup", cgroup.path(), "--config"];
            let config = config.path().to_string_lossy();
            let cost = run(&[&sweep[..], &[config.as_ref()]].concat())?;
            cpu.add(FIRST, Some(count), cost.cpu);
        }
    }
    let samples = |name, count| {
        cpu.row(name, Some(count))
            .map_or(&[][..], |row| &row.samples)
    };
    let goal = Goal {
        what: "sockets --json of 30,000 in 300 namespaces, of one".to_owned(),
        limit: 1.5,
        found: Summary::of(&ratios(samples(LISTING, MANY), samples(LISTING, 1))),
        unit: "×",
    };
    bench.report.goals.push(goal);
    bench.report.take(cpu);
    Ok(())
}
