//! Cgroups come and go while the agent runs: each gets the policy that the config
//! has for it, and nothing is left of those that are gone.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use keepalive_tests::{
    Agent, Cgroup, Need, Netns, Options, Probe, Program, Socket, Sockopt, bpftool, require, skip,
    wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const LIMIT: Duration = Duration::from_mins(1);

/// What nobody claims is left alone.
const GLOB: Options = Options::on(71, 10, 6);
const PATH: Options = Options::on(72, 10, 6);

/// A policy for scopes two levels below a cgroup, another for a service by its path.
fn config(root: &Cgroup) -> String {
    let root = root.path();
    format!(
        "[[policy]]\nname = \"glob\"\ncgroup = \"{root}/*/x-*.scope\"\nidle = \"71s\"\n\
         [[policy]]\nname = \"path\"\ncgroup = \"{root}/late/service\"\nidle = \"72s\"\n"
    )
}

/// Connections of a program that runs in a cgroup, both ends of each.
struct Connections {
    probe: Probe,
    sockets: Vec<Socket>,
}

impl Connections {
    fn of(cgroup: &Cgroup) -> Result<Self> {
        let mut connections = Self {
            probe: Probe::start(Program::Static, cgroup)?,
            sockets: Vec::new(),
        };
        connections.add()?;
        Ok(connections)
    }

    fn add(&mut self) -> Result<()> {
        let (connecting, accepting) = self.probe.connection()?;
        self.sockets.extend([connecting, accepting]);
        Ok(())
    }

    /// Waits until all have these options; what was made too early is mended.
    fn get(&mut self, expected: Options) -> Result<()> {
        let Self { probe, sockets } = self;
        for socket in sockets.iter() {
            let mut has = Options::UNTOUCHED;
            wait_until(LIMIT, "a policy", || {
                has = probe.options(*socket)?;
                Ok(has == expected)
            })
            .with_context(|| format!("{has:?} instead of {expected:?}"))?;
        }
        Ok(())
    }
}

/// Whatever the cgroup's connections have by then, they get these options, and
/// new ones come to have them from the start.
fn gets(cgroup: &Cgroup, expected: Options) -> Result<()> {
    let context = || format!("in {}", cgroup.path());
    let mut early = Connections::of(cgroup).with_context(context)?;
    early.get(expected).with_context(context)?;
    // A sweep from outside the kernel can be ahead of the kernel.
    let mut at_once = [Options::UNTOUCHED; 2];
    wait_until(LIMIT, "new connections to have a policy", || {
        let (connecting, accepting) = early.probe.connection()?;
        for (has, socket) in at_once.iter_mut().zip([connecting, accepting]) {
            *has = early.probe.options(socket)?;
            early.probe.close(socket)?;
        }
        Ok(at_once == [expected; 2])
    })
    .with_context(|| format!("in {}: {at_once:?} at once", cgroup.path()))
}

/// The ids of the cgroups that claim a policy, as the kernel has them, by way of
/// bpftool.
fn claiming(agent: &Agent) -> Result<BTreeSet<u64>> {
    for map in maps(agent)? {
        let map = map.to_string();
        // That of a set that is replaced meanwhile is gone.
        let Ok(shown) = bpftool(&["map", "show", "id", &map]) else {
            continue;
        };
        if shown["name"] != "CGROUPS" {
            continue;
        }
        let Ok(entries) = bpftool(&["map", "dump", "id", &map]) else {
            continue;
        };
        let entries = entries.as_array().context("no entries")?;
        return entries.iter().map(|entry| id(&entry["key"])).collect();
    }
    // Between two sets.
    Ok(BTreeSet::new())
}

/// The numbers of the maps that a process has open.
fn maps(agent: &Agent) -> Result<Vec<u32>> {
    let mut maps = Vec::new();
    for descriptor in fs::read_dir(format!("/proc/{}/fdinfo", agent.id()))? {
        let Ok(info) = fs::read_to_string(descriptor?.path()) else {
            continue;
        };
        let map = info.lines().find_map(|line| line.strip_prefix("map_id:"));
        maps.extend(map.map(|id| id.trim().parse::<u32>()).transpose()?);
    }
    Ok(maps)
}

/// A key of eight bytes, as bpftool shows it: `["0x1b", …]`.
fn id(key: &Value) -> Result<u64> {
    let bytes = key.as_array().context("no key")?.iter().map(|byte| {
        let byte = byte.as_str().and_then(|byte| byte.strip_prefix("0x"));
        Ok(u8::from_str_radix(byte.context("no byte")?, 16)?)
    });
    let bytes: Vec<u8> = bytes.collect::<Result<_>>()?;
    Ok(u64::from_ne_bytes(bytes.as_slice().try_into()?))
}

/// Waits until exactly these cgroups claim a policy.
fn only_these_claim(agent: &Agent, cgroups: &[&Cgroup]) -> Result<()> {
    let expected: BTreeSet<_> = cgroups
        .iter()
        .map(|cgroup| cgroup.id())
        .collect::<Result<_>>()?;
    let mut found = BTreeSet::new();
    wait_until(LIMIT, "the claims to be right", || {
        found = claiming(agent)?;
        Ok(found == expected)
    })
    .with_context(|| format!("{found:?} instead of {expected:?}"))
}

#[test]
fn made_after_the_start() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let slice = root.child("slice")?;
    let before = slice.child("x-0.scope")?;
    let _agent = Agent::start(&root, &config(&root))?;
    gets(&before, GLOB)?;
    let scope = slice.child("x-1.scope")?;
    gets(&scope, GLOB)?;
    // With what is between, in one call.
    let nested = root.descendant("other/x-1.scope")?;
    gets(&nested, GLOB)?;
    gets(&nested.descendant("far/below")?, GLOB)?;
    let service = root.descendant("late/service")?;
    gets(&service, PATH)?;
    gets(&slice.child("y-1.scope")?, Options::UNTOUCHED)?;
    gets(&nested.child("x-2.scope")?, GLOB)?;
    Ok(())
}

#[test]
fn made_again_under_the_same_name() -> Result<()> {
    require!(Need::Program("bpftool"));
    let root = Cgroup::new()?;
    let slice = root.child("slice")?;
    let agent = Agent::start(&root, &config(&root))?;
    let mut last = None;
    for _ in 0..3 {
        drop(last.take());
        let scope = slice.child("x-1.scope")?;
        let service = root.descendant("late/service")?;
        gets(&scope, GLOB)?;
        gets(&service, PATH)?;
        only_these_claim(&agent, &[&scope, &service])?;
        last = Some((scope, service));
    }
    drop(last);
    only_these_claim(&agent, &[])?;
    // Gone before anybody could look at it.
    for _ in 0..100 {
        slice.child("x-1.scope")?;
    }
    let scope = slice.child("x-1.scope")?;
    gets(&scope, GLOB)?;
    only_these_claim(&agent, &[&scope])
}

/// A reload looks at all there is; what came and went by itself is part of it.
#[test]
fn a_reload_between() -> Result<()> {
    require!(Need::Program("bpftool"));
    let root = Cgroup::new()?;
    let slice = root.child("slice")?;
    let mut agent = Agent::start(&root, &config(&root))?;
    agent.swept()?;
    let [gone, stays] = [slice.child("x-1.scope")?, slice.child("x-2.scope")?];
    only_these_claim(&agent, &[&gone, &stays])?;
    let mut early = Connections::of(&stays)?;
    early.get(GLOB)?;
    agent.reload(&config(&root).replace("71s", "73s"))?;
    early.get(Options::on(73, 10, 6))?;
    only_these_claim(&agent, &[&gone, &stays])?;
    drop(gone);
    let new = slice.child("x-3.scope")?;
    gets(&new, Options::on(73, 10, 6))?;
    only_these_claim(&agent, &[&stays, &new])
}

/// A program that connects as soon as its cgroup is there may be faster than the
/// agent. What it made until then is mended.
#[test]
fn connections_made_at_once() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let slice = root.child("slice")?;
    let _agent = Agent::start(&root, &config(&root))?;
    let mut all = Vec::new();
    for n in 0..20 {
        // Its first answer says that it has arrived where it starts.
        let mut connections = Connections::of(&slice)?;
        connections.get(Options::UNTOUCHED)?;
        connections.sockets.clear();
        let scope = slice.child(format!("x-{n}.scope"))?;
        connections.probe.move_to(&scope)?;
        for _ in 0..20 {
            connections.add()?;
        }
        all.push((scope, connections));
    }
    for (scope, connections) in &mut all {
        let context = || scope.path().to_owned();
        connections.get(GLOB).with_context(context)?;
    }
    Ok(())
}

/// Only where the processes of a new cgroup hold something are connections gone
/// through: in the namespace that they are in, and where else they have made some.
#[test]
fn a_new_cgroup_is_swept_by_itself() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let slice = root.child("slice")?;
    let [own, visited, other] = [Netns::new()?, Netns::new()?, Netns::new()?];
    let scope = slice.child("x-there.scope")?;
    let mut bystander = Probe::start(Program::Static, (&scope, &other))?;
    bystander.connection()?;
    let mut client = Probe::start(Program::Static, (&slice, &own))?;
    let mut agent = Agent::start(&root, &config(&root))?;
    assert_eq!(agent.swept()?["new_cgroups"], 0);

    agent.signal(Signal::STOP)?;
    let scope = slice.child("x-late.scope")?;
    let mut server = Probe::start(Program::Static, (&scope, &own))?;
    let (listener, address) = server.listener("127.0.0.1:0")?;
    client.connected(address)?;
    let (made_elsewhere, _) = server.visit(&visited, Probe::connection)?;
    assert_eq!(server.options(made_elsewhere)?, Options::UNTOUCHED);
    agent.signal(Signal::CONT)?;

    let swept = agent.swept()?;
    assert_eq!(swept["new_cgroups"], 1, "{swept}");
    assert_eq!(swept["namespaces"], 2, "{swept}");
    assert_eq!(server.options(made_elsewhere)?, GLOB);
    // It waited to be accepted: no process held it.
    let accepted = server.accept(listener)?;
    assert_eq!(server.options(accepted)?, GLOB);
    Ok(())
}

/// They got what the policy above gives, which is not what the application set. From
/// then on it is the application's, when that sets it.
#[test]
fn connections_made_under_the_policy_above() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let slice = root.child("slice")?;
    let config = |interval| {
        format!(
            "[default]\nidle = \"70s\"\ninterval = \"{interval}s\"\n{}",
            config(&root)
        )
    };
    let mut agent = Agent::start(&root, &config(10))?;
    agent.swept()?;
    agent.signal(Signal::STOP)?;
    let scope = slice.child("x-late.scope")?;
    let mut connections = Connections::of(&scope)?;
    connections.get(Options::on(70, 10, 6))?;
    agent.signal(Signal::CONT)?;
    connections.get(GLOB)?;
    agent.swept()?;

    let [own, other] = connections.sockets[..] else {
        panic!("one connection");
    };
    connections.probe.set(own, Sockopt::Idle, 70)?;
    agent.reload(&config(11))?;
    connections.sockets = vec![other];
    connections.get(Options::on(71, 11, 6))?;
    connections.sockets = vec![own];
    connections.get(Options::on(70, 11, 6))
}

/// Figures of a process: open descriptors, and kilobytes of its own memory.
fn holds(agent: &Agent) -> Result<(usize, u64)> {
    let process = format!("/proc/{}", agent.id());
    let descriptors = fs::read_dir(format!("{process}/fd"))?.count();
    let status = fs::read_to_string(format!("{process}/status"))?;
    let own = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:")?.strip_suffix(" kB"));
    Ok((descriptors, own.context("no RssAnon")?.trim().parse()?))
}

fn come_and_go(slice: &Cgroup, count: u32) -> Result<()> {
    for n in 0..count {
        let directory = slice.directory().join(format!("x-{count}-{n}.scope"));
        fs::create_dir(&directory)?;
        fs::remove_dir(&directory)?;
    }
    Ok(())
}

#[test]
fn ten_thousand_come_and_go() -> Result<()> {
    /// Kilobytes that the agent may have more than before: less than one name
    /// for each would take.
    const GROWTH: u64 = 512;
    require!(Need::Program("bpftool"));
    let root = Cgroup::new()?;
    let slice = root.child("slice")?;
    let stays = slice.child("x-stays.scope")?;
    let agent = Agent::start(&root, &config(&root))?;
    come_and_go(&slice, 2_000)?;
    only_these_claim(&agent, &[&stays])?;
    let before = holds(&agent)?;
    come_and_go(&slice, 10_000)?;
    let new = slice.child("x-new.scope")?;
    only_these_claim(&agent, &[&stays, &new])?;
    let after = holds(&agent)?;
    assert_eq!(after.0, before.0, "descriptors");
    assert!(
        after.1 <= before.1 + GROWTH,
        "{} kB, then {}",
        before.1,
        after.1
    );
    gets(&stays, GLOB)?;
    gets(&new, GLOB)
}

/// Nobody reads for a while, and the buffer of events overflows.
#[test]
fn more_than_the_agent_is_told_of() -> Result<()> {
    require!(Need::Program("bpftool"));
    let root = Cgroup::new()?;
    let slice = root.child("slice")?;
    let mut agent = Agent::start(&root, &config(&root))?;
    agent.swept()?;
    let gone = slice.child("x-gone.scope")?;
    let stays = slice.child("x-stays.scope")?;
    only_these_claim(&agent, &[&gone, &stays])?;
    let process = Pid::from_raw(i32::try_from(agent.id())?).context("no process")?;
    kill_process(process, Signal::STOP)?;
    come_and_go(&slice, 2_000)?;
    drop(gone);
    let new = slice.child("x-new.scope")?;
    kill_process(process, Signal::CONT)?;
    only_these_claim(&agent, &[&stays, &new])?;
    gets(&new, GLOB)
}

/// Cgroup v1 hierarchies have cgroups with the same paths; they are not meant.
#[test]
fn of_another_hierarchy() -> Result<()> {
    require!(Need::Program("bpftool"));
    let Some(v1) = cgroup_v1()? else {
        skip(module_path!(), "no cgroup v1 is mounted");
        return Ok(());
    };
    let root = Cgroup::new()?;
    let slice = root.child("slice")?;
    let agent = Agent::start(&root, &config(&root))?;
    let stays = slice.child("x-stays.scope")?;
    only_these_claim(&agent, &[&stays])?;

    let there = v1.join(&root.path()[1..]);
    let scope = there.join("slice/x-v1.scope");
    let made = fs::create_dir_all(&scope);
    // The agent has been told of all before this one.
    let new = slice.child("x-new.scope")?;
    let claim = only_these_claim(&agent, &[&stays, &new]);
    // From the bottom up, as far as they were made.
    let removed = [&scope, &there.join("slice"), &there].map(fs::remove_dir);
    made.with_context(|| format!("cannot make the cgroup {}", scope.display()))?;
    removed.into_iter().collect::<std::io::Result<()>>()?;
    claim
}

/// Where a hierarchy of cgroup v1 is mounted.
fn cgroup_v1() -> Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        kind.starts_with("cgroup ").then(|| PathBuf::from(point))
    }))
}
