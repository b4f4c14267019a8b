//! `sockets` tells what every connection really has: compared with what the
//! processes themselves and `ss` say, without a socket being changed.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use keepalive_tests::Sockopt::{Idle, Interval, Keepalive, Probes, UserTimeout};
use keepalive_tests::{
    Agent, Cgroup, Kind, Need, Netns, Options, Output, Place, Probe, Process, Program, Socket,
    Sockopt, agent_binary, agent_command, between, output, require, timer, wait_until,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

fn sockets(arguments: &[&str]) -> Result<Output> {
    let mut command = agent_command();
    output(command.arg("sockets").args(arguments), LIMIT)
}

/// The records of a listing that is complete.
fn list(arguments: &[&str]) -> Result<Vec<Value>> {
    let mut all = vec!["--json"];
    all.extend(arguments);
    let listed = sockets(&all)?;
    ensure!(listed.code == Some(0), "{arguments:?}: {}", listed.stderr);
    records(&listed)
}

fn records(listed: &Output) -> Result<Vec<Value>> {
    let lines = listed.stdout.lines().map(serde_json::from_str);
    lines.collect::<Result<_, _>>().context("not JSON")
}

/// What an application sets on one end before it connects, and on the other after
/// it has accepted.
type Wishes = &'static [(Sockopt, i32)];

const NOTHING: Wishes = &[];
const ONE: Wishes = &[(Idle, 1000)];
const EVERYTHING: Wishes = &[
    (Keepalive, 1),
    (Idle, 200),
    (Interval, 20),
    (Probes, 7),
    (UserTimeout, 90_000),
];

/// The same in several namespaces.
const PORTS: [u16; 3] = [41_000, 41_001, 41_002];

/// A process with a connection for each of the wishes.
struct Application {
    probe: Probe,
    ends: Vec<End>,
}

/// One end of a connection.
#[derive(Clone, Copy)]
struct End {
    wishes: Wishes,
    socket: Socket,
    here: SocketAddr,
    there: SocketAddr,
}

impl Application {
    /// One that listens at these ports.
    fn start<'a>(place: impl Into<Place<'a>>, ports: [u16; 3]) -> Result<Self> {
        let mut probe = Probe::start(Program::Static, place)?;
        let mut ends = Vec::new();
        for (port, wishes) in ports.into_iter().zip([NOTHING, ONE, EVERYTHING]) {
            let address: IpAddr = if wishes == ONE { "::1" } else { "127.0.0.1" }.parse()?;
            let address = SocketAddr::from((address, port));
            let listener = probe.socket(Kind::of(address))?;
            let address = probe.listen(listener, address)?;
            let connecting = probe.socket(Kind::of(address))?;
            probe.set_all(connecting, wishes)?;
            probe.connect(connecting, address)?;
            let accepting = probe.accept(listener)?;
            probe.set_all(accepting, wishes)?;
            let names = [probe.name(connecting)?, probe.name(accepting)?];
            for (socket, here, there) in [
                (connecting, names[0], names[1]),
                (accepting, names[1], names[0]),
            ] {
                ends.push(End {
                    wishes,
                    socket,
                    here,
                    there,
                });
            }
        }
        Ok(Self { probe, ends })
    }

    /// Compares every end's record with what the process and `ss` say.
    fn compare(
        &mut self,
        (records, listed): (&[Value], Instant),
        cgroup: &Cgroup,
        netns: Option<&Netns>,
    ) -> Result<()> {
        let own = fs::metadata("/proc/self/ns/net")?.ino();
        let netns_id = netns.map_or(Ok(own), Netns::id)?;
        for end in self.ends.clone() {
            let record = find(records, netns_id, end)?;
            let has = self.probe.options(end.socket)?;
            let user_timeout = (has.user_timeout != 0).then_some(has.user_timeout);
            let outside = ss(netns, end)?;
            let expected = json!({
                "netns_id": netns_id,
                "cgroup": cgroup.path(),
                "cgroup_id": fs::metadata(cgroup.directory())?.ino(),
                "container": null,
                "unit": null,
                "pid": self.probe.id(),
                "comm": "probe-static",
                "holders": 1,
                "uid": 0,
                "inode": outside.inode,
                "state": "established",
                "local_address": end.here.ip().to_string(),
                "local_port": end.here.port(),
                "remote_address": end.there.ip().to_string(),
                "remote_port": end.there.port(),
                "keepalive": has.keepalive,
                "idle_s": has.idle,
                "interval_s": has.interval,
                "probes": has.probes,
                "user_timeout_ms": user_timeout,
                "noticed_by": if has.keepalive { "keepalive" } else { "never" },
            });
            for (key, value) in expected.as_object().into_iter().flatten() {
                ensure!(record[key] == *value, "{key} is not {value}: {record}");
            }
            compare_times(record, has, outside.probe, listed.elapsed())?;
        }
        Ok(())
    }
}

/// The time to the next probe with the one that `ss` saw, and the rest with it.
fn compare_times(
    record: &Value,
    has: Options,
    seen: Option<Duration>,
    later: Duration,
) -> Result<()> {
    let next = record["next_probe_ms"].as_u64();
    ensure!(next.is_some() == has.keepalive, "{record}");
    ensure!(next.is_some() == seen.is_some(), "{seen:?}: {record}");
    let (Some(next), Some(seen)) = (next, seen) else {
        ensure!(record["noticed_ms"].is_null(), "{record}");
        return Ok(());
    };
    // ss came later, and cuts off what is beyond whole seconds, or minutes.
    let cut = later + Duration::from_secs(if seen.as_secs() >= 600 { 61 } else { 1 });
    let next = Duration::from_millis(next);
    ensure!(
        next + Duration::from_millis(50) >= seen && next <= seen + cut,
        "{seen:?} by ss: {record}"
    );
    let unanswered = if has.user_timeout == 0 {
        u64::try_from(has.interval * has.probes)? * 1000
    } else {
        let after = has.user_timeout - has.idle * 1000;
        let steps = (after.max(1) + has.interval * 1000 - 1) / (has.interval * 1000);
        u64::try_from(steps * has.interval)? * 1000
    };
    let noticed = record["noticed_ms"].as_u64().context("never noticed")?;
    let expected = u64::try_from(next.as_millis())? + unanswered;
    ensure!(noticed.abs_diff(expected) <= 1000, "{expected}: {record}");
    Ok(())
}

fn find(records: &[Value], netns: u64, end: End) -> Result<&Value> {
    let mut found = records.iter().filter(|record| {
        record["netns_id"] == netns
            && record["local_port"] == end.here.port()
            && record["remote_port"] == end.there.port()
            && record["local_address"] == end.here.ip().to_string()
    });
    let record = found
        .next()
        .with_context(|| format!("no {} to {} in namespace {netns}", end.here, end.there))?;
    ensure!(found.next().is_none(), "twice: {record}");
    Ok(record)
}

/// What `ss -tnoe` says of a socket.
struct Outside {
    inode: u64,
    probe: Option<Duration>,
}

fn ss(netns: Option<&Netns>, end: End) -> Result<Outside> {
    let filter = between(end.here, end.there);
    let place = Place {
        cgroup: None,
        netns,
    };
    let mut command = place.command("ss");
    command.args(["-tnoeH", "state", "established"]);
    command.args(filter.split_whitespace());
    let shown = output(&mut command, LIMIT)?;
    let mut lines = shown.stdout.lines();
    let line = lines.next().context("ss does not have it")?;
    ensure!(lines.next().is_none(), "several: {}", shown.stdout);
    let inode = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("ino:"))
        .with_context(|| format!("no inode in {line}"))?;
    let timer = timer(netns, &filter)?;
    Ok(Outside {
        inode: inode.parse()?,
        probe: timer.map(|timer| timer.left),
    })
}

#[test]
fn field_by_field() -> Result<()> {
    require!(Need::Program("ss"), Need::Program("ip"));
    let root = Cgroup::new()?;
    let (one, two) = (root.child("one")?, root.child("two")?);
    let (red, blue) = (Netns::new()?, Netns::named()?);
    blue.sysctl("net/ipv4/tcp_keepalive_time", "777")?;
    blue.sysctl("net/ipv4/tcp_keepalive_intvl", "33")?;
    blue.sysctl("net/ipv4/tcp_keepalive_probes", "4")?;
    let mut here = Application::start(&one, [0; 3])?;
    // The same addresses in both.
    let mut in_red = Application::start((&one, &red), PORTS)?;
    let mut in_blue = Application::start((&two, &blue), PORTS)?;
    for agent in [false, true] {
        let mut agent = agent
            .then(|| {
                Agent::start(
                    &root,
                    "[default]\nidle = \"70s\"\nprobes = { at-most = 5 }\n",
                )
            })
            .transpose()?;
        if let Some(agent) = &mut agent {
            agent.swept()?;
        }
        let listed = Instant::now();
        let records = list(&["--cgroup", root.path()])?;
        assert_eq!(records.len(), 18, "{records:#?}");
        here.compare((&records, listed), &one, None)?;
        in_red.compare((&records, listed), &one, Some(&red))?;
        in_blue.compare((&records, listed), &two, Some(&blue))?;
        let names = |netns: &Netns| -> Result<Vec<&Value>> {
            let id = netns.id()?;
            let found = records.iter().filter(|record| record["netns_id"] == id);
            Ok(found.map(|record| &record["netns"]).collect())
        };
        let blue_name = blue.path().file_name().context("no name")?;
        let blue_name = blue_name.to_str().context("no text")?;
        assert!(names(&blue)?.iter().all(|name| *name == blue_name));
        let red_name = json!(format!("pid {}", in_red.probe.id()));
        let red_holder = red.path().to_str().context("no text")?;
        let red_holder = red_holder.replace("/proc/", "pid ").replace("/ns/net", "");
        assert!(
            names(&red)?
                .iter()
                .all(|name| **name == red_name || **name == json!(red_holder)),
            "{records:#?}"
        );
        if let Some(agent) = agent {
            agent.stop()?;
        }
    }
    Ok(())
}

/// Sources of keepalive, idle, interval, probes, user-timeout.
fn sources(
    records: &[Value],
    application: &Application,
    wishes: Wishes,
) -> Result<Vec<[Value; 5]>> {
    let own = fs::metadata("/proc/self/ns/net")?.ino();
    let ends = application.ends.iter().filter(|end| end.wishes == wishes);
    let of_end = |end: &End| -> Result<[Value; 5]> {
        let record = find(records, own, *end)?;
        Ok([
            "keepalive_source",
            "idle_source",
            "interval_source",
            "probes_source",
            "user_timeout_source",
        ]
        .map(|key| record[key].clone()))
    };
    ends.map(of_end).collect()
}

#[test]
fn whose_a_value_is() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let application = Application::start(&cgroup, [0; 3])?;
    let (kernel, sysctl, app) = ("kernel", "sysctl", "app");
    let (policy, bound) = ("policy", "policy-bound");
    let expect = |when: &str, cases: [(Wishes, [&str; 5]); 3], name: Value| -> Result<()> {
        let records = list(&["--cgroup", cgroup.path()])?;
        for (wishes, expected) in cases {
            let got = sources(&records, &application, wishes)?;
            let expected = expected.map(|source| json!(source));
            ensure!(got.len() == 2, "two ends");
            for got in got {
                ensure!(got == expected, "{when}, {wishes:?}: {got:?}");
            }
        }
        ensure!(records.iter().all(|record| record["policy"] == name));
        Ok(())
    };
    expect(
        "without an agent",
        [
            (NOTHING, [kernel, sysctl, sysctl, sysctl, kernel]),
            (ONE, [kernel, app, sysctl, sysctl, kernel]),
            (EVERYTHING, [app; 5]),
        ],
        Value::Null,
    )?;
    let config = "[default]\nidle = { default = \"70s\", at-most = \"5m\" }\n";
    let mut agent = Agent::start(&cgroup, config)?;
    agent.swept()?;
    expect(
        "filled in and bounded",
        [
            (NOTHING, [policy, policy, policy, policy, kernel]),
            (ONE, [policy, bound, policy, policy, kernel]),
            (EVERYTHING, [policy, app, app, app, app]),
        ],
        json!("default"),
    )?;
    agent.reload("[default]\nidle = \"71s\"\nuser-timeout = \"40s\"\n")?;
    expect(
        "after a reload",
        [
            (NOTHING, [policy, policy, policy, policy, policy]),
            (ONE, [policy, app, policy, policy, policy]),
            (EVERYTHING, [policy, app, app, app, app]),
        ],
        json!("default"),
    )?;
    Ok(())
}

#[test]
fn changes_nothing() -> Result<()> {
    require!(Need::Program("ss"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut application = Application::start((&cgroup, &netns), PORTS)?;
    let look = |application: &mut Application| -> Result<Vec<(Options, Option<Duration>)>> {
        let mut seen = Vec::new();
        for end in application.ends.clone() {
            let outside = ss(Some(&netns), end)?;
            seen.push((application.probe.options(end.socket)?, outside.probe));
        }
        Ok(seen)
    };
    let before = look(&mut application)?;
    std::thread::sleep(Duration::from_millis(1100));
    for arguments in [
        &["--json"][..],
        &["--sort", "idle"],
        &["--summary"],
        &["--at-risk", "350s", "--cgroup", cgroup.path()],
    ] {
        let code = sockets(arguments)?.code;
        assert!(code == Some(0), "{arguments:?}: {code:?}");
    }
    for ((had, left), (has, leaves)) in before.into_iter().zip(look(&mut application)?) {
        assert_eq!(had, has);
        assert_eq!(left.is_some(), leaves.is_some());
        assert!(leaves <= left, "a timer began anew: {left:?} {leaves:?}");
        if left.is_some_and(|left| left < Duration::from_mins(10)) {
            assert!(leaves < left, "a timer began anew: {left:?} {leaves:?}");
        }
    }
    Ok(())
}

#[test]
fn filters() -> Result<()> {
    require!(Need::Program("ip"));
    let root = Cgroup::new()?;
    let (one, below) = (root.child("one")?, root.child("below")?);
    let below = (below.child("leaf")?, below);
    let (near, far) = Netns::pair()?;
    let mut server = Probe::start(Program::Static, (&below.0, &far))?;
    let mut client = Probe::start(Program::Static, (&one, &near))?;
    let mut ports = Vec::new();
    for (address, keepalive) in [("10.99.0.2:0", 0), ("[fd99::2]:0", 1)] {
        let (listener, address) = server.listener(address)?;
        let socket = client.connected(address)?;
        client.set(socket, Keepalive, keepalive)?;
        server.accept(listener)?;
        ports.push((address.port(), client.name(socket)?.port()));
    }
    let client_id = client.id().to_string();
    let port = ports[0].0.to_string();
    let own_port = ports[0].1.to_string();
    let all = ["--cgroup", root.path()];
    for (filters, count) in [
        (&[][..], 4),
        (&["--cgroup", one.path()], 2),
        (&["--cgroup", below.1.path()], 2),
        (&["--pid", &client_id], 2),
        (&["--remote", "10.99.0.2"], 1),
        (&["--remote", "10.99.0.0/24"], 2),
        (&["--remote", "10.99.1.0/24"], 0),
        (&["--remote", "fd99::/64"], 2),
        (&["--remote", "fd99::2", "--pid", &client_id], 1),
        (&["--remote", "0.0.0.0/0"], 2),
        (&["--port", &port], 2),
        (&["--port", &own_port, "--pid", &client_id], 1),
        (&["--unprotected"], 3),
        (&["--unprotected", "--pid", &client_id], 1),
    ] {
        let mut arguments = filters.to_vec();
        if !filters.contains(&"--cgroup") {
            arguments.extend(all);
        }
        let found = list(&arguments)?;
        assert_eq!(found.len(), count, "{filters:?}: {found:#?}");
    }
    let sorted = list(&["--cgroup", root.path(), "--sort", "remote"])?;
    let remotes: Vec<_> = sorted
        .iter()
        .map(|record| record["remote_address"].clone())
        .collect();
    assert_eq!(remotes, ["10.99.0.1", "10.99.0.2", "fd99::1", "fd99::2"]);

    let summary = list(&["--cgroup", root.path(), "--summary"])?;
    let counts: Vec<_> = summary
        .iter()
        .map(|line| {
            ["connections", "protected", "unprotected", "at_risk"].map(|key| line[key].clone())
        })
        .collect();
    assert_eq!(summary.len(), 2, "{summary:#?}");
    assert!(counts.contains(&[json!(2), json!(1), json!(1), json!(2)]));
    assert!(counts.contains(&[json!(2), json!(0), json!(2), json!(2)]));
    Ok(())
}

#[test]
fn what_a_path_forgets() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let mut server = Probe::start(Program::Static, &far)?;
    let (_, address) = server.listener("10.99.0.2:0")?;
    let mut client = Probe::start(Program::Static, (&cgroup, &near))?;
    let at_risk = |timeout: &str| -> Result<(Option<i32>, usize)> {
        let arguments = ["--json", "--at-risk", timeout, "--cgroup", cgroup.path()];
        let listed = sockets(&arguments)?;
        ensure!(listed.stderr.is_empty(), "{}", listed.stderr);
        Ok((listed.code, records(&listed)?.len()))
    };
    assert_eq!(at_risk("aws-nat")?, (Some(0), 0), "no connections");
    let safe = client.connected(address)?;
    assert_eq!(at_risk("aws-nat")?, (Some(3), 1), "keepalive is off");
    client.set_all(safe, &[(Interval, 10), (Idle, 329), (Keepalive, 1)])?;
    assert_eq!(at_risk("aws-nat")?, (Some(0), 0), "329 + 2 x 10 < 350");
    client.set(safe, Idle, 330)?;
    assert_eq!(at_risk("aws-nat")?, (Some(3), 1), "330 + 2 x 10 = 350");
    for (path, code) in [
        ("350s", 3),
        ("351s", 0),
        ("aws-nlb", 3),
        ("azure-lb", 3),
        ("gcp", 0),
        ("ipvs", 0),
        ("10m", 0),
    ] {
        assert_eq!(at_risk(path)?.0, Some(code), "{path}");
    }
    // What does not leave the machine passes no middlebox.
    let local = client.connection()?;
    assert_eq!(at_risk("gcp")?, (Some(0), 0));
    let arguments = ["--at-risk", "gcp", "--loopback", "--cgroup", cgroup.path()];
    assert_eq!(sockets(&arguments)?.code, Some(3));
    client.close(local.0)?;
    client.close(local.1)?;
    // The policy makes it safe.
    let mut agent = Agent::start(&cgroup, "[default]\nidle = { exactly = \"60s\" }\n")?;
    agent.swept()?;
    assert_eq!(at_risk("aws-nat")?, (Some(0), 0));
    agent.stop()?;
    Ok(())
}

#[test]
fn containers_and_units() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let id = "0123456789abcdef".repeat(4);
    // Units are those right below the slices of the hierarchy's root.
    let service = Cgroup::with_suffix(".service")?;
    let name = service.path().trim_start_matches('/');
    let container = root.child(format!("docker-{id}.scope"))?;
    for (cgroup, expected) in [
        (&service, (Value::Null, json!(name))),
        (&container, (json!(id), Value::Null)),
        (&root, (Value::Null, Value::Null)),
    ] {
        let mut probe = Probe::start(Program::Static, cgroup)?;
        probe.connection()?;
        let found = list(&["--pid", &probe.id().to_string()])?;
        assert_eq!(found.len(), 2);
        for record in found {
            let got = (record["container"].clone(), record["unit"].clone());
            assert_eq!(got, expected, "{record}");
        }
    }
    Ok(())
}

#[test]
fn wrong_words() -> Result<()> {
    require!();
    for (arguments, code, word) in [
        (&["--remote", "10.0.0.0/33"][..], 2, "10.0.0.0/33"),
        (&["--remote", "10.0.0.1/8"], 2, "10.0.0.1/8"),
        (&["--remote", "fd99::/129"], 2, "fd99::/129"),
        (&["--remote", "host"], 2, "host"),
        (&["--remote", ""], 2, "--remote"),
        (&["--port", "65536"], 2, "65536"),
        (&["--pid", "x"], 2, "x"),
        (&["--sort", "colour"], 2, "colour"),
        (&["--at-risk", "my-nat"], 2, "my-nat"),
        (&["--at-risk", "350"], 2, "350"),
        (&["--colour"], 2, "--colour"),
        (&["--watch", "--json"], 2, "--json"),
        (&["--pid", "4194305"], 1, "4194305"),
        (&["--cgroup", "/no-such-cgroup"], 1, "/no-such-cgroup"),
    ] {
        let said = sockets(arguments)?;
        assert_eq!(said.code, Some(code), "{arguments:?}: {}", said.stderr);
        assert!(said.stderr.contains(word), "{arguments:?}: {}", said.stderr);
        assert!(!said.stderr.contains("panicked"), "{}", said.stderr);
        assert_eq!(said.stdout, "", "{arguments:?}");
    }
    Ok(())
}

/// A namespace that is gone when its turn comes is no part that is missing.
#[test]
fn namespaces_vanish_meanwhile() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    probe.connection()?;
    let done = AtomicBool::new(false);
    scope(|scope| -> Result<()> {
        let maker = scope.spawn(|| -> Result<()> {
            for _ in 0..2000 {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                Netns::named()?;
            }
            Ok(())
        });
        let listed = (0..20).try_for_each(|_| -> Result<()> {
            let found = list(&["--cgroup", cgroup.path()])?;
            ensure!(found.len() == 2, "{found:#?}");
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        maker.join().expect("a panic")?;
        listed
    })
}

/// Some that no process holds yet, and some in a namespace that nothing but they
/// themselves hold.
#[test]
fn out_of_sight_in_proc() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let netns = Netns::new()?;
    let id = netns.id()?;
    probe.visit(&netns, |probe| {
        let (_, address) = probe.listener("127.0.0.1:0")?;
        for _ in 0..2 {
            probe.connected(address)?;
        }
        Ok(())
    })?;
    drop(netns);
    let found = list(&["--cgroup", cgroup.path()])?;
    assert_eq!(found.len(), 4, "{found:#?}");
    for record in &found {
        assert_eq!(record["netns_id"], id, "{record}");
        assert_eq!(record["idle_s"], 7200, "{record}");
    }
    let held = found.iter().filter(|record| record["pid"] == probe.id());
    assert_eq!(held.count(), 2, "{found:#?}");
    let waiting = found.iter().filter(|record| record["pid"].is_null());
    assert_eq!(waiting.count(), 2, "{found:#?}");
    Ok(())
}

/// Held by two processes and by two descriptors of one: one connection.
#[test]
fn shared_between_processes() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut command = Place::from(&cgroup).command("sh");
    // The shell waits for a child of its own, and both hold what the test gave.
    command.args(["-c", "exec 3<&0; cat <&3 >/dev/null & wait"]);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let connecting = TcpStream::connect(listener.local_addr()?)?;
    let (accepting, there) = listener.accept()?;
    let copies = [accepting.try_clone()?, accepting.try_clone()?];
    let [first, second] = copies.map(OwnedFd::from);
    command.stdin(Stdio::piped()).stdout(first).stderr(second);
    let mut shell = Process::start(&mut command)?;
    let port = there.port().to_string();
    wait_until(LIMIT, "two more holders", || {
        let found = list(&["--port", &port])?;
        let one = found
            .iter()
            .filter(|one| one["remote_port"] == there.port());
        let holders: Vec<_> = one.map(|one| one["holders"].clone()).collect();
        ensure!(holders.len() == 1, "{found:#?}");
        Ok(holders == [json!(3)])
    })?;
    drop(shell.child().stdin.take());
    drop(connecting);
    Ok(())
}

#[test]
fn a_namespace_that_may_not_be_entered() -> Result<()> {
    require!(Need::Program("setpriv"), Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::named()?;
    let nobodys = Netns::named()?;
    let mut here = Probe::start(Program::Static, &cgroup)?;
    let mut there = Probe::start(Program::Static, (&cgroup, &netns))?;
    here.connection()?;
    there.connection()?;
    let mut command = Place::default().command("setpriv");
    command.args(["--inh-caps=-sys_admin", "--bounding-set=-sys_admin", "--"]);
    command.arg(agent_binary()).args(["sockets", "--json"]);
    command.args(["--cgroup", cgroup.path()]);
    let listed = output(&mut command, LIMIT)?;
    assert_eq!(listed.code, Some(4), "{}", listed.stderr);
    let name = |netns: &Netns| -> Result<String> {
        let name = netns.path().file_name().context("no name")?;
        Ok(name.to_str().context("no text")?.to_owned())
    };
    // Where no process is, it is not known whether there are connections.
    let (name, nobodys) = (name(&netns)?, name(&nobodys)?);
    assert!(listed.stderr.contains(&nobodys), "{}", listed.stderr);
    assert!(!listed.stderr.contains(&name), "{}", listed.stderr);
    // The others are seen from outside.
    let found = records(&listed)?;
    assert_eq!(found.len(), 4, "{found:#?}");
    let inside = found.iter().filter(|record| record["netns"] == name);
    assert_eq!(inside.count(), 2, "{found:#?}");
    Ok(())
}
