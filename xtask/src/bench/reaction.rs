//! Cgroups that are made while the agent runs: how long they wait for their policy.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData, MapError, MapInfo};

use super::{
    Bench,
    peer::{Agent, nanoseconds},
    place::{Cgroup, Place},
    report::{Goal, Table},
    stats::{Summary, quantile},
};

/// Cgroups in each round.
const CGROUPS: u32 = 1_000;

/// The agent is idle again after that.
const PAUSE: Duration = Duration::from_millis(2);

/// Longer than this is no reaction.
const LIMIT: Duration = Duration::from_secs(5);

const HALF: &str = "half of them";
const MOST: &str = "99 of 100";

/// Cgroup → what it claims, in eight bytes; as the kernel has it.
type Claims = HashMap<MapData, u64, u64>;

/// `reaction`: from the return of mkdir(2) until the kernel knows the policy of
/// the new cgroup, by the number of cgroups that have one already.
pub(crate) fn reaction(bench: &mut Bench) -> Result<()> {
    let title = format!("from mkdir until the policy holds, {CGROUPS} cgroups a round");
    let mut table = Table::new("reaction", title, "ms", &[]);
    let sizes: &[u32] = &[1, 1_000, 10_000];
    for &size in sizes {
        let place = &bench.place;
        let root = place.cgroup()?;
        root.crowd(place, size)?;
        let path = root.path();
        let config = format!(
            "[[policy]]\nname = \"all\"\ncgroup = [\"{path}/c*\", \"{path}/new-*\"]\nidle = \"60s\"\n"
        );
        let agent = Agent::start(place, &bench.agent, &root, &config)?;
        let claims = claims(&agent)?;
        for _ in 0..bench.rounds.clamp(3, 7) {
            let mut samples = round(place, &root, &claims)?;
            samples.sort_by(f64::total_cmp);
            for (name, part) in [(HALF, 0.5), (MOST, 0.99)] {
                let sample = quantile(&samples, part).context("nothing was measured")?;
                table.add(name, Some(size), sample);
            }
        }
    }
    for &size in sizes {
        let row = table.row(MOST, Some(size));
        bench.report.goals.push(Goal {
            what: format!("99 of 100 new cgroups have their policy, beside {size}"),
            limit: 5.0,
            found: row.and_then(|row| Summary::of(&row.samples)),
            unit: "ms",
        });
    }
    bench.report.take(table);
    Ok(())
}

/// Makes cgroups one after the other; milliseconds of each.
fn round(place: &Place, root: &Cgroup, claims: &Claims) -> Result<Vec<f64>> {
    let mut samples = Vec::new();
    for number in 0..CGROUPS {
        if number % 100 == 0 {
            place.go_on()?;
        }
        let directory = root.directory().join(format!("new-{number}"));
        fs::create_dir(&directory)
            .with_context(|| format!("cannot make the cgroup {}", directory.display()))?;
        let made = Instant::now();
        let id = fs::metadata(&directory)?.ino();
        while !is_claimed(claims, id)? {
            ensure!(
                made.elapsed() < LIMIT,
                "the agent does not follow new cgroups"
            );
            // It may be waiting for this processor.
            thread::yield_now();
        }
        samples.push(nanoseconds(made) / 1e6);
        fs::remove_dir(&directory)?;
        thread::sleep(PAUSE);
    }
    Ok(samples)
}

fn is_claimed(claims: &Claims, cgroup: u64) -> Result<bool> {
    match claims.get(&cgroup, 0) {
        Ok(_) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The agent's map of cgroups, found among its open files.
fn claims(agent: &Agent) -> Result<Claims> {
    for entry in fs::read_dir(format!("/proc/{}/fdinfo", agent.process.id()))? {
        // A descriptor that was closed meanwhile is none of a map.
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        let id = info.lines().find_map(|line| line.strip_prefix("map_id:"));
        let Some(id) = id.and_then(|id| id.trim().parse().ok()) else {
            continue;
        };
        if MapInfo::from_id(id)?.name_as_str() == Some("CGROUPS") {
            return Ok(Map::HashMap(MapData::from_id(id)?).try_into()?);
        }
    }
    anyhow::bail!("the agent has no map CGROUPS")
}
