//! Cgroups that are made while the agent runs: how long they wait for their policy.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData, MapError, MapInfo};
use keepalive_tests::Cgroup;

use crate::{
    Bench,
    agent::{Agent, crowd},
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
    for size in [1, 1_000, 10_000] {
        let root = Cgroup::new()?;
        crowd(&root, size)?;
        let path = root.path();
        let config = format!(
            "[[policy]]\nname = \"all\"\ncgroup = [\"{path}/c*\", \"{path}/new-*\"]\nidle = \"60s\"\n"
        );
        let agent = Agent::start(&bench.agent, &root, &config)?;
        let claims = claims(&agent)?;
        for _ in 0..bench.rounds.min(7) {
            bench.go_on()?;
            let mut samples = (0..CGROUPS)
                .map(|number| wait(&root, number, &claims))
                .collect::<Result<Vec<_>>>()?;
            samples.sort_by(f64::total_cmp);
            for (name, part) in [(HALF, 0.5), (MOST, 0.99)] {
                let sample = quantile(&samples, part).context("nothing was measured")?;
                table.add(name, Some(size), sample);
            }
        }
        bench.report.goals.push(Goal::new(
            format!("99 of 100 new cgroups have their policy, beside {size}"),
            5.0,
            "ms",
            Summary::of(table.samples(MOST, size)),
        ));
    }
    bench.report.take(table);
    Ok(())
}

/// Makes a cgroup; milliseconds until it has its policy.
fn wait(root: &Cgroup, number: u32, claims: &Claims) -> Result<f64> {
    let cgroup = root.child(format!("new-{number}"))?;
    let made = Instant::now();
    let id = cgroup.id()?;
    while let Err(error) = claims.get(&id, 0) {
        ensure!(matches!(error, MapError::KeyNotFound), error);
        ensure!(
            made.elapsed() < LIMIT,
            "the agent does not follow new cgroups"
        );
        // It may be waiting for this processor.
        thread::yield_now();
    }
    let waited = made.elapsed();
    drop(cgroup);
    thread::sleep(PAUSE);
    Ok(waited.as_secs_f64() * 1e3)
}

/// The agent's map of cgroups, found among its open files.
fn claims(agent: &Agent) -> Result<Claims> {
    for entry in fs::read_dir(format!("/proc/{}/fdinfo", agent.id()))? {
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
    bail!("the agent has no map CGROUPS")
}
