//! Connections that exist already: the sweep and the listing against `ss`.

use std::process::Command;

use anyhow::{Result, ensure};

use super::{
    Bench,
    place::{self, Cgroup, Netns, Place, Process},
    report::{Goal, Table},
    stats::{Summary, ratios},
};

/// Sockets of one process, below the usual limit of open files.
const PER_PROCESS: u32 = 19_000;

/// Where the goals are judged.
const LARGE: u32 = 200_000;

const SS: &str = "ss -tnH";
const SS_ALL: &str = "ss -tnoeH";
const FIRST: &str = "sweep, first";
const AGAIN: &str = "sweep, nothing to change";
const ONE: &str = "sweep, one timer to change";
const LISTING: &str = "sockets --json";

/// Long timers, so that no probe of these connections falls into a measurement.
const POLICIES: [&str; 2] = [
    "[default]\nidle = \"2h\"\n",
    "[default]\nidle = { exactly = \"3h\" }\n",
];

/// `sweep`: CPU time, time and memory of whole commands, by the number of
/// sockets. A first sweep needs new sockets, so each round has its own.
pub(crate) fn sweep(bench: &mut Bench) -> Result<()> {
    let [mut cpu, mut wall] = [
        ("sweep", "existing connections, whole commands: CPU time"),
        ("sweep-wall", "existing connections, whole commands: time"),
    ]
    .map(|(id, title)| Table::new(id, title, "ms", &[SS, SS_ALL]));
    let mut memory = Table::new(
        "sweep-memory",
        "existing connections, whole commands: memory at the peak",
        "MiB",
        &[],
    );
    let sizes: &[u32] = if bench.full {
        &[1_000, 10_000, 50_000, LARGE, 500_000]
    } else {
        &[1_000, 10_000, 50_000, LARGE]
    };
    let configs = [place::file(POLICIES[0])?, place::file(POLICIES[1])?];
    for &size in sizes {
        for _ in 0..bench.rounds.clamp(1, 5) {
            let place = &bench.place;
            let netns = Netns::make(place)?;
            let cgroup = place.cgroup()?;
            let _crowd = Crowd::make(place, &netns, &cgroup, size)?;
            let agent = |arguments: &[&str]| {
                let mut command = place.load("time");
                command.arg("-").arg(&bench.agent).args(arguments);
                command
            };
            let sweep = |config: usize| {
                let mut command = agent(&["sweep", "--cgroup", cgroup.path(), "--config"]);
                command.arg(configs[config].path());
                command
            };
            let ss = |flags: &str| {
                let mut command = place.load("time");
                command.arg("-").args(netns.enter()).args(["ss", flags]);
                command
            };
            for (name, mut command) in [
                (SS, ss("-tnH")),
                (FIRST, sweep(0)),
                (AGAIN, sweep(0)),
                (ONE, sweep(1)),
                (SS_ALL, ss("-tnoeH")),
                (LISTING, agent(&["sockets", "--json"])),
            ] {
                let cost = time(place, &mut command)?;
                cpu.add(name, Some(size), cost.cpu);
                wall.add(name, Some(size), cost.wall);
                memory.add(name, Some(size), cost.mebibytes);
            }
        }
    }
    let goal = |what: &str, name, of, limit| cpu.goal(what, name, of, Some(LARGE), limit);
    let goals = [
        goal("first sweep of 200,000, of ss -tnH", FIRST, SS, 0.6),
        goal(
            "sweep of 200,000 with nothing to change, of ss -tnH",
            AGAIN,
            SS,
            0.6,
        ),
        goal(
            "sockets --json of 200,000, of ss -tnoeH",
            LISTING,
            SS_ALL,
            1.5,
        ),
        growth(&memory),
    ];
    bench.report.goals.extend(goals);
    for table in [cpu, wall, memory] {
        bench.report.take(table);
    }
    Ok(())
}

/// The sweep's memory must not grow with the number of sockets.
fn growth(memory: &Table) -> Goal {
    let samples = |size| {
        let row = memory
            .rows
            .iter()
            .find(|row| row.name == AGAIN && row.size == Some(size));
        row.map_or(&[][..], |row| &row.samples)
    };
    Goal {
        what: "memory of a sweep of 200,000, of one of 1,000".to_owned(),
        limit: 1.05,
        found: Summary::of(&ratios(samples(LARGE), samples(1_000))),
        unit: "×",
    }
}

pub(super) struct Cost {
    pub(super) cpu: f64,
    wall: f64,
    mebibytes: f64,
}

pub(super) fn time(place: &Place, command: &mut Command) -> Result<Cost> {
    let [wall, cpu, kilobytes, exit] = place.measure(command)?;
    ensure!(
        exit == 0.0,
        "{:?} failed: exit code {exit}",
        command.get_args().skip(2).collect::<Vec<_>>()
    );
    Ok(Cost {
        cpu: cpu / 1e6,
        wall: wall / 1e6,
        mebibytes: kilobytes / 1024.0,
    })
}

/// Processes with so many established sockets together.
pub(super) struct Crowd {
    _processes: Vec<Process>,
}

impl Crowd {
    pub(super) fn make(
        place: &Place,
        netns: &Netns,
        cgroup: &Cgroup,
        sockets: u32,
    ) -> Result<Self> {
        let mut processes = Vec::new();
        let mut missing = sockets;
        while missing > 0 {
            let count = missing.min(PER_PROCESS);
            let mut hold = place.load("guard");
            hold.arg("-").args(netns.enter());
            let load = place.load("hold");
            hold.arg(load.get_program())
                .args(load.get_args())
                .arg(count.to_string())
                .arg(cgroup.door());
            processes.push(place.start(&mut hold)?);
            missing -= count;
        }
        for process in &mut processes {
            process.line()?;
        }
        Ok(Self {
            _processes: processes,
        })
    }
}
