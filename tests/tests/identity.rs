//! Policies for units and containers by name, with a real dockerd: the first
//! connection of a container has its policy.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Docker, Loaded, Need, Options, Probe, Program, Sockopt, agent_binary,
    agent_command, output, require, soak_or, wait_until,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_mins(1);

const CONFIG: &str = "[default]\nidle = '60s'\n\
    [[policy]]\nname = 'db'\ncontainer = 'db-*'\nidle = '61s'\n\
    [[policy]]\nname = 'shop'\nlabel = { app = 'shop/*' }\nidle = '62s'\n\
    [[policy]]\nname = 'image'\nimage = 'first:2'\nidle = '63s'\n";

/// What both ends print that have this idle time.
fn both(idle: u32) -> [String; 2] {
    let line = format!("1 {idle} 10 6");
    [line.clone(), line]
}

/// The agent, where the files of this dockerd are.
fn agent(cgroup: &Cgroup, docker: &Docker, config: &str) -> Result<Agent> {
    let beside = docker.beside();
    let by: Vec<_> = beside.iter().map(String::as_str).collect();
    Agent::start_with(cgroup, config, &by)
}

/// What a command of the agent's prints, where the files of this dockerd are.
fn ask(docker: &Docker, words: &[&str]) -> Result<String> {
    let [nsenter, mount, dashes] = docker.beside();
    let mut command = std::process::Command::new(nsenter);
    command
        .arg(mount)
        .arg(dashes)
        .arg(agent_binary())
        .args(words);
    let done = output(&mut command, LIMIT)?;
    ensure!(done.code == Some(0), "{words:?}: {}", done.stderr);
    Ok(done.stdout)
}

#[test]
fn containers_by_name_label_and_image() -> Result<()> {
    require!(Need::Program("dockerd"), Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let docker = Docker::start(&cgroup)?;
    docker.run(&["tag", "first:1", "first:2"])?;
    let agent = agent(&cgroup, &docker, CONFIG)?;
    for (options, idle) in [
        (&["--name", "db-1"][..], 61),
        (&["--name", "web"], 60),
        (&["--label", "app=shop/front"], 62),
        (&["--label", "app=other"], 60),
        // The first policy in the config counts.
        (&["--name", "db-2", "--label", "app=shop/front"], 61),
    ] {
        assert_eq!(docker.first(options)?, both(idle), "{options:?}");
    }
    let by_image = docker.run(&["run", "--rm", "--network=host", "first:2", "/first"])?;
    assert_eq!(by_image.lines().collect::<Vec<_>>(), both(63));

    let hostile = format!("app=shop/\u{1b}[2J\n{}", "x".repeat(2000));
    let id = docker.stay(&["--name", "evil", "--label", &hostile])?;
    let logs = || docker.run(&["logs", "evil"]);
    wait_until(LIMIT, "the container's connection", || {
        Ok(logs()?.lines().count() == 2)
    })?;
    assert_eq!(logs()?.lines().collect::<Vec<_>>(), both(62));
    let listed = ask(&docker, &["sockets", "--json", "--container", "ev*"])?;
    assert_eq!(listed.lines().count(), 2, "{listed}");
    for line in listed.lines() {
        let line: Value = serde_json::from_str(line)?;
        assert_eq!(line["container_name"], "evil");
        assert_eq!(line["container"], id);
        assert_eq!(line["runtime"], "docker");
        assert_eq!(line["image"], "first:1");
        assert_eq!(line["policy"], "shop");
    }
    let table = ask(&docker, &["sockets", "--wide", "--container", &id[..12]])?;
    assert!(
        table.contains("docker:evil") && table.contains(&id),
        "{table}"
    );
    let explained = ask(&docker, &["explain", "--container", "evil"])?;
    let why = "policy shop (label app = shop/*) claims the connection";
    assert!(explained.contains(why), "{explained}");
    docker.run(&["rm", "--force", "evil"])?;
    agent.stop()?;
    Ok(())
}

/// What is inside of a container's cgroup is the container's, as long as nothing
/// names it by its path. A new name counts at once, also for connections that exist.
#[test]
fn nested_and_renamed() -> Result<()> {
    require!(
        Need::Program("dockerd"),
        Need::Program("ip"),
        Need::Program("bpftool")
    );
    let cgroup = Cgroup::new()?;
    let docker = Docker::start(&cgroup)?;
    let glob = format!(
        "[[policy]]\nname = 'glob'\ncgroup = '{}/**'\nidle = '64s'\n",
        cgroup.path()
    );
    let mut agent = agent(&cgroup, &docker, &format!("{CONFIG}{glob}"))?;
    agent.swept()?;
    let program = || -> Result<u64> { Ok(Loaded::on(&cgroup)?.context("nothing")?.program) };
    let before = program()?;
    let id = docker.stay(&["--name", "db-1"])?;
    let nested = cgroup.descendant(&format!("docker/{id}/container"))?;
    let mut probe = Probe::start(Program::Static, &nested)?;
    let (socket, _) = probe.connection()?;
    assert_eq!(probe.options(socket)?, Options::on(61, 10, 6));

    docker.run(&["rename", "db-1", "web"])?;
    agent.reloaded()?;
    // What is not claimed by the container's name is by the glob for its path.
    assert_eq!(probe.options(socket)?, Options::on(64, 10, 6));
    let words = [
        "events",
        "--json",
        "--since",
        "1h",
        "--no-follow",
        "--cgroup",
    ];
    let told = ask(&docker, &[&words[..], &[cgroup.path()]].concat())?;
    let told = told.lines().map(serde_json::from_str::<Value>);
    let told: Vec<_> = told.collect::<Result<_, _>>()?;
    let renamed = told
        .iter()
        .find(|told| told["event"] == "container_renamed");
    let renamed = renamed.context("nothing is told")?;
    let reloaded = told.iter().find(|told| told["event"] == "reloaded");
    assert_eq!(
        reloaded.context("no reload")?["why"],
        "a container was renamed"
    );
    assert_eq!(renamed["before"], "docker:db-1");
    assert_eq!(renamed["now"], "docker:web");
    let own = format!("{}/docker/{id}", cgroup.path());
    assert_eq!(renamed["cgroup"], own);
    let of_container = |name: &str| {
        let whose = [cgroup.path(), "--container", name];
        ask(&docker, &[&words[..], &whose].concat())
    };
    assert_eq!(of_container("db-1")?, "", "it is called web");
    let told = of_container("web")?;
    for line in told.lines() {
        let line: Value = serde_json::from_str(line)?;
        assert_eq!(line["container_name"], "web", "{told}");
        assert!(
            line["cgroup"]
                .as_str()
                .is_some_and(|path| path.starts_with(&own))
        );
    }
    assert!(told.contains("container_renamed"), "{told}");
    docker.run(&["rename", "web", "db-2"])?;
    agent.reloaded()?;
    assert_eq!(probe.options(socket)?, Options::on(61, 10, 6));
    assert_eq!(program()?, before);
    docker.run(&["rename", "db-2", "web"])?;
    agent.reloaded()?;
    probe.finish()?;
    drop(nested);

    docker.run(&["restart", "--time", "0", "web"])?;
    let logs = || docker.run(&["logs", "web"]);
    wait_until(LIMIT, "the second run", || Ok(logs()?.lines().count() == 4))?;
    let expected = [both(61), both(64)].concat();
    assert_eq!(logs()?.lines().collect::<Vec<_>>(), expected);
    docker.run(&["rm", "--force", "web"])?;
    agent.stop()?;
    Ok(())
}

/// A hundred containers, five hundred with `KEEPALIVE_SOAK`, each of which connects in
/// its first millisecond.
#[test]
fn many_come_and_go() -> Result<()> {
    let count: u64 = soak_or(500, 100);
    require!(Need::Program("dockerd"), Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let docker = Docker::start(&cgroup)?;
    let agent = agent(&cgroup, &docker, CONFIG)?;
    let memory = || -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", agent.id()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let line = line.context("no RssAnon")?.trim().trim_end_matches(" kB");
        Ok(line.parse()?)
    };
    let mut at_first = None;
    for number in 0..count {
        let name = format!("db-{number}");
        assert_eq!(docker.first(&["--name", &name])?, both(61), "{name}");
        at_first.get_or_insert(memory()?);
    }
    let grown = memory()?.saturating_sub(at_first.unwrap_or_default());
    // A container costs some hundred bytes while it is there.
    assert!(grown < 1024, "{grown} KiB for {count} containers");
    let finished = agent.stop()?;
    assert_eq!(finished.count("db", "seen"), 2 * count);
    assert_eq!(finished.count("default", "seen"), 0);
    Ok(())
}

/// Without any runtime: a unit is in its path.
#[test]
fn units_by_name() -> Result<()> {
    require!(Need::Built(Program::Static));
    let unit = Cgroup::with_suffix(".service")?;
    let name = unit.path().trim_start_matches('/');
    let config = format!("[[policy]]\nname = 'unit'\nunit = '{name}'\nidle = '65s'\n");
    let agent = Agent::start(&unit, &config)?;
    let inside = unit.child("worker")?;
    for cgroup in [&unit, &inside] {
        let mut probe = Probe::start(Program::Static, cgroup)?;
        let (socket, _) = probe.connection()?;
        assert_eq!(probe.options(socket)?, Options::on(65, 10, 6));
    }
    let mut explain = agent_command();
    explain.args(["explain", "--unit", name]);
    let explained = output(&mut explain, LIMIT)?;
    let why = format!("policy unit (unit = {name}) claims the connection");
    assert!(explained.stdout.contains(&why), "{}", explained.stdout);
    agent.stop()?;
    Ok(())
}

/// A policy for a unit has the same bounds as one for a path: whatever its application
/// sets later.
#[test]
fn bounds_hold_for_what_is_selected() -> Result<()> {
    require!(Need::Built(Program::Static));
    let slice = Cgroup::with_suffix(".slice")?;
    let unit = slice.child("one.service")?;
    let config = "[[policy]]\nname = 'unit'\nidle = { at-most = '30s' }\nunit = 'one.service'\n";
    let agent = Agent::start(&slice, config)?;
    let mut probe = Probe::start(Program::Static, &unit)?;
    let (socket, _) = probe.connection()?;
    probe.set(socket, Sockopt::Idle, 99)?;
    assert_eq!(probe.options(socket)?.idle, 30);
    agent.stop()?;
    Ok(())
}

/// Names of what is not there come into the config and leave it without another
/// policy set; what comes then has its policy.
#[test]
fn names_alone_need_no_other_set() -> Result<()> {
    require!(Need::Built(Program::Static));
    let slice = Cgroup::with_suffix(".slice")?;
    let here = slice.child("here.service")?;
    let config = |units: &str| {
        format!("[default]\n[[policy]]\nname = 'named'\nidle = '63s'\nunit = [{units}]\n")
    };
    let mut agent = Agent::start(&slice, &config("'other.service'"))?;
    agent.swept()?;
    let status = || -> Result<Value> {
        let mut command = agent_command();
        command.args(["status", "--json", "--cgroup", slice.path()]);
        let done = output(&mut command, LIMIT)?;
        let status: Value = serde_json::from_str(&done.stdout)?;
        Ok(status["in_force"][0].clone())
    };
    let idle = |cgroup: &Cgroup| -> Result<i32> {
        let mut probe = Probe::start(Program::Static, cgroup)?;
        let (socket, _) = probe.connection()?;
        Ok(probe.options(socket)?.idle)
    };
    agent.rewrite(&config("'other.service', 'later.service'"))?;
    wait_until(LIMIT, "the config to be read", || {
        Ok(!status()?["reload"].is_null())
    })?;
    agent.not_reloaded(Duration::from_millis(200))?;
    let mut events = agent_command();
    events.args(["events", "--json", "--since", "1h", "--no-follow"]);
    events.args(["--cgroup", slice.path()]);
    let told = output(&mut events, LIMIT)?.stdout;
    let told = told.lines().map(serde_json::from_str::<Value>);
    let told: Vec<_> = told.collect::<Result<_, _>>()?;
    let mut changes = told.iter().filter(|told| told["event"] == "names_changed");
    let change = changes.next().context("nothing is told")?;
    assert_eq!(change["policy"], "named");
    assert_eq!(change["why"], "its files have changed");
    assert_eq!(change["added"], json!(["unit = later.service"]));
    assert_eq!(change["removed"], json!([]));
    assert_eq!(changes.next(), None);
    let later = slice.child("later.service")?;
    assert_eq!(idle(&later)?, 63);
    assert_eq!(idle(&here)?, 60);
    let mut explain = agent_command();
    explain.args(["explain", "--cgroup", later.path()]);
    let explained = output(&mut explain, LIMIT)?.stdout;
    assert!(
        explained.contains("other.service or later.service"),
        "{explained}"
    );
    agent.stop()?;
    Ok(())
}

/// Names of what is there, as of a pod that gets other labels: connections that exist
/// follow, as they do with another set, and the programs stay the same.
#[test]
fn names_of_what_is_there_need_no_other_programs() -> Result<()> {
    require!(Need::Built(Program::Static), Need::Program("bpftool"));
    let slice = Cgroup::with_suffix(".slice")?;
    let units = ["one.service", "two.service"].map(|name| slice.child(name));
    let [one, two] = units;
    let (one, two) = (one?, two?);
    let config = |units: &str| {
        format!("[default]\n[[policy]]\nname = 'named'\nidle = '63s'\nunit = [{units}]\n")
    };
    let mut agent = Agent::start(&slice, &config("'one.service'"))?;
    agent.swept()?;
    let program = || -> Result<u64> { Ok(Loaded::on(&slice)?.context("nothing")?.program) };
    let before = program()?;
    let mut probes = Vec::new();
    for cgroup in [&one, &two] {
        let mut probe = Probe::start(Program::Static, cgroup)?;
        let (untouched, own) = probe.connection()?;
        // What an application set is its own.
        probe.set(own, Sockopt::Idle, 99)?;
        probes.push((probe, untouched, own));
    }
    let idles = |probes: &mut Vec<(Probe, _, _)>| -> Result<Vec<[i32; 2]>> {
        let of = |(probe, untouched, own): &mut (Probe, _, _)| {
            Ok([probe.options(*untouched)?.idle, probe.options(*own)?.idle])
        };
        probes.iter_mut().map(of).collect()
    };
    assert_eq!(idles(&mut probes)?, [[63, 99], [60, 99]]);
    for (units, expected) in [
        ("'two.service'", [[60, 99], [63, 99]]),
        ("'one.service', 'two.service'", [[63, 99], [63, 99]]),
        ("'none.service'", [[60, 99], [60, 99]]),
        ("'one.service'", [[63, 99], [60, 99]]),
    ] {
        agent.rewrite(&config(units))?;
        agent.reloaded()?;
        assert_eq!(idles(&mut probes)?, expected, "{units}");
        for (index, cgroup) in [&one, &two].into_iter().enumerate() {
            let mut probe = Probe::start(Program::Static, cgroup)?;
            let (socket, _) = probe.connection()?;
            let idle = probe.options(socket)?.idle;
            assert_eq!(idle, expected[index][0], "{units}");
        }
        assert_eq!(program()?, before, "{units}");
    }
    // Other policies do take another set, and so does what comes then.
    agent.rewrite("[default]\nidle = '64s'\n")?;
    agent.reloaded()?;
    assert_eq!(idles(&mut probes)?, [[64, 99], [64, 99]]);
    assert_ne!(program()?, before);
    agent.stop()?;
    Ok(())
}
