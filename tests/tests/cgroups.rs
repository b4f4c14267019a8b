//! Which policy a socket gets: by the cgroup it was made in, the nearest first.

use std::fs;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use keepalive_tests::{Agent, Cgroup, Options, Probe, Program, require};

/// Policy by idle time alone; the rest is built in.
fn policy(name: &str, cgroup: &str, idle: u32) -> String {
    format!("[[policy]]\nname = \"{name}\"\ncgroup = {cgroup}\nidle = \"{idle}s\"\n")
}

fn quoted(path: &str) -> String {
    format!("\"{path}\"")
}

/// Idle of the connecting and the accepting side of a program in this cgroup.
fn idle_in(cgroup: &Cgroup) -> Result<[i32; 2]> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    let sides = [probe.options(connecting)?, probe.options(accepting)?];
    for side in sides {
        assert!(
            side == Options::UNTOUCHED || side == Options::on(side.idle, 10, 6),
            "{}: {side:?}",
            cgroup.path()
        );
    }
    Ok(sides.map(|side| side.idle))
}

#[test]
fn two_services_with_different_policies() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (one, two, three) = (root.child("one")?, root.child("two")?, root.child("three")?);
    let config = format!(
        "[default]\nidle = \"70s\"\n{}{}",
        policy("one", &quoted(one.path()), 71),
        policy("two", &quoted(two.path()), 72)
    );
    let agent = Agent::start(&root, &config)?;
    assert_eq!(idle_in(&one)?, [71, 71]);
    assert_eq!(idle_in(&two)?, [72, 72]);
    assert_eq!(idle_in(&three)?, [70, 70]);
    let finished = agent.stop()?;
    for name in ["one", "two", "default"] {
        assert_eq!(finished.count(name, "seen"), 2, "{name}");
        assert_eq!(finished.count(name, "turned_on"), 2, "{name}");
    }
    Ok(())
}

/// One end in each of two services: each end has the policy of its own side.
#[test]
fn a_connection_between_two_services() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (one, two) = (root.child("one")?, root.child("two")?);
    let config = policy("one", &quoted(one.path()), 71) + &policy("two", &quoted(two.path()), 72);
    let _agent = Agent::start(&root, &config)?;
    let mut server = Probe::start(Program::Static, &one)?;
    let mut client = Probe::start(Program::Static, &two)?;
    let (listener, address) = server.listener("127.0.0.1:0")?;
    let connecting = client.connected(address)?;
    let accepting = server.accept(listener)?;
    assert_eq!(server.options(accepting)?, Options::on(71, 10, 6));
    assert_eq!(client.options(connecting)?, Options::on(72, 10, 6));
    Ok(())
}

#[test]
fn without_a_default_what_nobody_claims_is_left_alone() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (claimed, other) = (root.child("claimed")?, root.child("other")?);
    let config = policy("claimed", &quoted(claimed.path()), 71);
    let _agent = Agent::start(&root, &config)?;
    assert_eq!(idle_in(&claimed)?, [71, 71]);
    assert_eq!(idle_in(&other)?, [7200, 7200]);
    Ok(())
}

#[test]
fn a_cgroup_outside_is_not_governed() -> Result<()> {
    require!();
    let (inside, outside) = (Cgroup::new()?, Cgroup::new()?);
    let _agent = Agent::start(&inside, "[default]\nidle = \"70s\"\n")?;
    assert_eq!(idle_in(&inside)?, [70, 70]);
    assert_eq!(idle_in(&outside)?, [7200, 7200]);
    Ok(())
}

#[test]
fn a_cgroup_made_after_the_start_inherits() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let service = root.child("service")?;
    let config = policy("service", &quoted(service.path()), 71);
    let _agent = Agent::start(&root, &config)?;
    let child = service.child("child")?;
    let grandchild = child.child("grandchild")?;
    assert_eq!(idle_in(&child)?, [71, 71]);
    assert_eq!(idle_in(&grandchild)?, [71, 71]);
    Ok(())
}

#[test]
fn the_nearest_cgroup_decides() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let service = root.child("service")?;
    let child = service.child("child")?;
    let grandchild = child.child("grandchild")?;
    // The order in the file does not matter.
    let config = policy("grandchild", &quoted(grandchild.path()), 73)
        + &policy("service", &quoted(service.path()), 71);
    let _agent = Agent::start(&root, &config)?;
    assert_eq!(idle_in(&service)?, [71, 71]);
    assert_eq!(idle_in(&child)?, [71, 71]);
    assert_eq!(idle_in(&grandchild)?, [73, 73]);
    assert_eq!(idle_in(&grandchild.child("below")?)?, [73, 73]);
    assert_eq!(idle_in(&child.child("beside")?)?, [71, 71]);
    Ok(())
}

#[test]
fn far_below() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let config = policy("root", &quoted(root.path()), 71);
    let _agent = Agent::start(&root, &config)?;
    let mut chain = vec![root.child("0")?];
    for depth in 1..8 {
        let next = chain[depth - 1].child(depth.to_string())?;
        chain.push(next);
    }
    assert_eq!(idle_in(&chain[7])?, [71, 71]);
    Ok(())
}

#[test]
fn a_list_of_cgroups_and_globs() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (a, b) = (root.child("a")?, root.child("b")?);
    let (web1, web2) = (root.child("web-1")?, root.child("web-2")?);
    let (deep, plain) = (root.child("deep")?, root.child("plain")?);
    let down = deep.child("down")?;
    let leaf = down.child("leaf")?;
    let path = root.path();
    let config = policy("list", &format!("[\"{path}/a\", \"{path}/b\"]"), 71)
        + &policy("web", &format!("\"{path}/web-*\""), 72)
        + &policy("leaf", &format!("\"{path}/**/leaf\""), 73);
    let agent = Agent::start(&root, &config)?;
    for (cgroup, idle) in [
        (&a, 71),
        (&b, 71),
        (&web1, 72),
        (&web2, 72),
        (&leaf, 73),
        (&plain, 7200),
        (&deep, 7200),
    ] {
        assert_eq!(idle_in(cgroup)?, [idle; 2], "{}", cgroup.path());
    }
    let policies = agent.started()["policies"].clone();
    let assigned = |name: &str| {
        let all = policies.as_array().expect("policies");
        all.iter()
            .find(|policy| policy["name"] == name)
            .expect(name)["cgroups"]
            .clone()
    };
    assert_eq!(assigned("list"), 2, "{policies}");
    assert_eq!(assigned("web"), 2, "{policies}");
    assert_eq!(assigned("leaf"), 1, "{policies}");
    Ok(())
}

/// Two policies for one cgroup: the path beats the glob, else the first in the
/// file wins, and the loser is told.
#[test]
fn two_policies_for_one_cgroup() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (a, b) = (root.child("a")?, root.child("b")?);
    let path = root.path();
    let config = policy("glob", &format!("\"{path}/*\""), 71)
        + &policy("path", &quoted(a.path()), 72)
        + &policy("late", &quoted(a.path()), 73);
    let agent = Agent::start(&root, &config)?;
    assert_eq!(idle_in(&a)?, [72, 72]);
    assert_eq!(idle_in(&b)?, [71, 71]);
    let finished = agent.stop()?;
    let told = |name: &str| finished.stderr.lines().any(|line| line.contains(name));
    assert!(told("policy late"), "{}", finished.stderr);
    assert!(!told("policy path:"), "{}", finished.stderr);
    Ok(())
}

/// There is one agent at a time on the root of the hierarchy.
static ROOT: Mutex<()> = Mutex::new(());

/// Attached at the root of the hierarchy, as on a real host, and told to claim
/// nothing but this.
#[test]
fn from_the_root_of_the_hierarchy() -> Result<()> {
    require!();
    let _alone = ROOT.lock().unwrap_or_else(PoisonError::into_inner);
    let root = Cgroup::new()?;
    let (claimed, other) = (root.child("claimed")?, root.child("other")?);
    let config = policy("claimed", &quoted(claimed.path()), 71);
    let agent = Agent::start_everywhere(&config)?;
    let mount = keepalive_tests::hierarchy()?.display().to_string();
    let attached = agent.started()["cgroup"].as_str().unwrap_or_default();
    assert_eq!(attached.trim_end_matches('/'), mount);
    assert_eq!(idle_in(&claimed)?, [71, 71]);
    assert_eq!(idle_in(&claimed.child("below")?)?, [71, 71]);
    assert_eq!(idle_in(&other)?, [7200, 7200]);
    assert_eq!(agent.stop()?.count("claimed", "seen"), 4);
    Ok(())
}

/// The root has no number of its own among the kernel's cgroups.
#[test]
fn in_the_root_of_the_hierarchy() -> Result<()> {
    const ADDRESS: &str = "127.77.0.1";
    require!();
    let _alone = ROOT.lock().unwrap_or_else(PoisonError::into_inner);
    let config = format!(
        "[[policy]]\nname = \"root\"\ncgroup = \"/\"\nremote = \"{ADDRESS}\"\nidle = \"72s\"\n"
    );
    let _agent = Agent::start_everywhere(&config)?;
    let home = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &home)?;
    let root = keepalive_tests::hierarchy()?.join("cgroup.procs");
    fs::write(&root, probe.id().to_string())?;
    let (_, address) = probe.listener(&format!("{ADDRESS}:0"))?;
    for _ in 0..2 {
        let socket = probe.connected(address)?;
        assert_eq!(probe.options(socket)?.idle, 72);
    }
    Ok(())
}

/// The kernel remembers in each socket the cgroup it was made in.
#[test]
fn a_socket_keeps_the_cgroup_it_was_made_in() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (one, two) = (root.child("one")?, root.child("two")?);
    let config = policy("one", &quoted(one.path()), 71) + &policy("two", &quoted(two.path()), 72);
    let _agent = Agent::start(&root, &config)?;
    let mut probe = Probe::start(Program::Static, &one)?;
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    let early = probe.socket(keepalive_tests::Kind::of(address))?;
    probe.move_to(&two)?;
    let late = probe.connected(address)?;
    probe.connect(early, address)?;
    let accepted = [probe.accept(listener)?, probe.accept(listener)?];

    assert_eq!(probe.options(early)?.idle, 71, "made before the move");
    assert_eq!(probe.options(late)?.idle, 72, "made after the move");
    for socket in accepted {
        let idle = probe.options(socket)?.idle;
        assert_eq!(idle, 71, "accepted in two from a listener made in one");
    }
    Ok(())
}
