//! Every network namespace is swept, whatever holds it, and once.

use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Container, Crowd, Kind, Need, Netns, Options, Place, Probe, Process, Program,
    Socket, agent_command, between, output, require, timer,
};
use serde_json::json;

const POLICY: &str = "[default]\nidle = \"70s\"\n";
const OURS: Options = Options::on(70, 10, 6);
const LIMIT: Duration = Duration::from_secs(30);

/// A connection between two addresses of the loopback, the same in every
/// namespace.
fn connection(probe: &mut Probe) -> Result<[Socket; 2]> {
    let (here, there) = ("127.0.0.2:41001".parse()?, "127.0.0.3:41002".parse()?);
    let listener = probe.socket(Kind::default())?;
    probe.listen(listener, there)?;
    let connecting = probe.socket(Kind::default())?;
    probe.bind(connecting, here)?;
    probe.connect(connecting, there)?;
    let accepting = probe.accept(listener)?;
    probe.close(listener)?;
    Ok([connecting, accepting])
}

/// What the process sees, and what `ss` sees in the namespace.
fn expect(probe: &mut Probe, sockets: [Socket; 2], netns: &Netns, keepalive: bool) -> Result<()> {
    let names = [probe.name(sockets[0])?, probe.name(sockets[1])?];
    for n in 0..2 {
        let expected = if keepalive { OURS } else { Options::UNTOUCHED };
        let got = probe.options(sockets[n])?;
        ensure!(got == expected, "{got:?} in {}", netns.path().display());
        let seen = timer(Some(netns), &between(names[n], names[1 - n]))?;
        ensure!(
            seen.is_some() == keepalive,
            "{seen:?} in {}",
            netns.path().display()
        );
        if let Some(timer) = seen {
            ensure!(timer.kind == "keepalive", "{timer:?}");
            ensure!(timer.left <= Duration::from_secs(70), "{timer:?}");
        }
    }
    Ok(())
}

/// A namespace with two processes that have connections of the same addresses in
/// all such namespaces: one that is governed, one that is not.
struct Home {
    netns: Netns,
    probe: Probe,
    sockets: [Socket; 2],
}

impl Home {
    fn new(cgroup: &Cgroup, netns: Netns) -> Result<Self> {
        let mut probe = Probe::start(Program::Static, (cgroup, &netns))?;
        let sockets = connection(&mut probe)?;
        Ok(Self {
            netns,
            probe,
            sockets,
        })
    }

    fn expect(&mut self, keepalive: bool) -> Result<()> {
        expect(&mut self.probe, self.sockets, &self.netns, keepalive)
    }
}

#[test]
fn with_the_same_addresses() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("ss"));
    let (cgroup, other) = (Cgroup::new()?, Cgroup::new()?);
    let mut governed = Vec::new();
    for netns in [Netns::new()?, Netns::new()?, Netns::named()?] {
        governed.push(Home::new(&cgroup, netns)?);
    }
    let mut left_alone = Home::new(&other, Netns::new()?)?;
    // And one in the namespace of the agent itself.
    let mut here = Probe::start(Program::Dynamic, &cgroup)?;
    let (connecting, accepting) = here.connection()?;
    for home in &mut governed {
        home.expect(false)?;
    }

    let mut agent = Agent::start(&cgroup, POLICY)?;
    let swept = agent.swept()?;
    for home in &mut governed {
        home.expect(true)?;
    }
    left_alone.expect(false)?;
    for socket in [connecting, accepting] {
        assert_eq!(here.options(socket)?, OURS);
    }
    assert!(swept["namespaces"].as_u64() >= Some(5), "{swept}");
    let finished = agent.stop()?;
    // Also the one that a name and a process lead to.
    assert_eq!(finished.count_existing("default", "seen"), 8, "each once");
    assert_eq!(finished.count_existing("default", "turned_on"), 8);
    Ok(())
}

/// Sockets in a namespace in which nobody lives: the process that has them went
/// there to make them, and came back.
fn without_a_process(netns: &Netns) -> Result<()> {
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let sockets = probe.visit(netns, connection)?;
    let home = std::fs::metadata(format!("/proc/{}/ns/net", probe.id()))?;
    ensure!(std::os::unix::fs::MetadataExt::ino(&home) != netns.id()?);
    expect(&mut probe, sockets, netns, false)?;
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    expect(&mut probe, sockets, netns, true)?;
    let finished = agent.stop()?;
    assert_eq!(finished.count_existing("default", "seen"), 2);
    Ok(())
}

#[test]
fn held_by_a_name() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("ss"));
    without_a_process(&Netns::named()?)
}

#[test]
fn held_by_an_open_file() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("ss"));
    without_a_process(&Netns::held_open()?)
}

/// After the process that made the namespace has ended, and with it everything
/// that leads there but the sockets.
#[test]
fn held_by_nothing_but_sockets() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let netns = Netns::new()?;
    let sockets = probe.visit(&netns, connection)?;
    drop(netns);
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    for socket in sockets {
        assert_eq!(probe.options(socket)?, OURS);
    }
    let finished = agent.stop()?;
    assert_eq!(finished.count_existing("default", "turned_on"), 2);
    Ok(())
}

/// Connections that no process holds: they wait to be accepted, in a namespace
/// that is not the agent's.
#[test]
fn with_connections_that_wait_to_be_accepted() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut probe = Probe::start(Program::Static, (&cgroup, &netns))?;
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    let mut connecting = Vec::new();
    for _ in 0..3 {
        connecting.push(probe.connected(address)?);
    }
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    for socket in connecting {
        assert_eq!(probe.options(socket)?, OURS);
        let accepting = probe.accept(listener)?;
        assert_eq!(probe.options(accepting)?, OURS);
    }
    // After a change of policy, when only what is to be changed is looked for.
    let late = probe.connected(address)?;
    agent.reload("[default]\nidle = \"80s\"\n")?;
    let accepting = probe.accept(listener)?;
    for socket in [late, accepting] {
        assert_eq!(probe.options(socket)?, Options::on(80, 10, 6));
    }
    Ok(())
}

/// A user without privileges swaps namespaces and a FIFO under the same
/// descriptors: the agent must not be blocked by opening the wrong one.
#[test]
fn swapped_for_a_fifo() -> Result<()> {
    require!(Need::Program("setpriv"), Need::Program("mkfifo"));
    let cgroup = Cgroup::new()?;
    let directory = tempfile::tempdir()?;
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
    let fifo = directory.path().join("fifo");
    let mut command = Place::default().command("mkfifo");
    let made = output(command.args(["-m", "666"]).arg(&fifo), LIMIT)?;
    ensure!(made.code == Some(0), "mkfifo: {}", made.stderr);
    let program = directory.path().join("swapper");
    fs::copy(Program::Swapper.path()?, &program)?;
    let mut command = Place::from(&cgroup).command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(&program).arg(&fifo);
    let mut swapper = Process::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
    let said = swapper.child().stdout.take().context("no output")?;
    let mut line = String::new();
    BufReader::new(said).read_line(&mut line)?;
    ensure!(
        line == "ok 8\n",
        "{line:?}: may users make namespaces here?"
    );

    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    // A listing takes a few milliseconds, and swapping microseconds.
    for n in 1..=20 {
        agent.reload(&format!("[default]\nidle = \"{}s\"\n", 70 + n))?;
        let mut command = agent_command();
        let listed = output(command.args(["sockets", "--summary"]), LIMIT)?;
        ensure!(listed.code == Some(0), "{}", listed.stderr);
    }
    assert_eq!(agent.stop()?.code, Some(0));
    Ok(())
}

#[test]
fn of_a_container() -> Result<()> {
    require!(
        Need::Program("runc"),
        Need::Program("unshare"),
        Need::Program("ss")
    );
    let root = Cgroup::new()?;
    let mut container = Container::start(&format!("{}/container", root.path()))?;
    let probe = container.probe();
    let (connecting, accepting) = probe.connection()?;
    let sockets = [connecting, accepting];
    let netns = Netns::of_process(container.process()?);
    expect(container.probe(), sockets, &netns, false)?;
    let mut agent = Agent::start(&root, POLICY)?;
    agent.swept()?;
    expect(container.probe(), sockets, &netns, true)?;
    assert_eq!(agent.stop()?.count_existing("default", "turned_on"), 2);
    container.finish()
}

/// A process in namespaces of its own for mounts and network, as any container
/// runtime makes them.
#[test]
fn of_a_process_apart() -> Result<()> {
    require!(
        Need::Program("unshare"),
        Need::Program("ip"),
        Need::Program("ss")
    );
    let cgroup = Cgroup::new()?;
    let mut command = Place::from(&cgroup).command("unshare");
    command.args(["--net", "--mount", "sh", "-c"]);
    command.arg("ip link set lo up && exec \"$0\"");
    command.arg(Program::Static.path()?);
    let mut probe = Probe::start_by(&mut command)?;
    let sockets = connection(&mut probe)?;
    let netns = Netns::of_process(probe.id());
    expect(&mut probe, sockets, &netns, false)?;
    let mut agent = Agent::start(&cgroup, POLICY)?;
    agent.swept()?;
    expect(&mut probe, sockets, &netns, true)
}

/// Namespaces come and go during the passes: no reason to fail, and the others are
/// swept.
#[test]
fn that_vanish_meanwhile() -> Result<()> {
    require!(
        Need::Program("unshare"),
        Need::Program("ip"),
        Need::Program("ss")
    );
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut steady = Crowd::start((&cgroup, &netns), "127.0.1.1:0")?;
    steady.connect(50)?;
    let done = AtomicBool::new(false);
    let made = scope(|scope| -> Result<usize> {
        let done = &done;
        let makers = [false, true].map(|named| scope.spawn(move || come_and_go(named, done)));
        let swept = (|| -> Result<()> {
            let mut agent = Agent::start(&cgroup, POLICY)?;
            agent.swept()?;
            for n in 1..25 {
                let idle = 70 + n % 2;
                let config = format!("[default]\nidle = \"{idle}s\"\n");
                let swept = agent.reload(&config)?;
                ensure!(swept["missed"] == json!([]), "{swept}");
                steady.all_have(Options::on(idle, 10, 6))?;
            }
            let finished = agent.stop()?;
            ensure!(finished.code == Some(0), "{}", finished.stderr);
            Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        let made: Vec<_> = makers
            .into_iter()
            .map(|maker| maker.join().expect("a panic"))
            .collect();
        swept?;
        made.into_iter().sum()
    })?;
    assert!(made > 20, "only {made} namespaces came and went");
    Ok(())
}

/// Makes namespaces and lets them go at once, for a minute at the most.
fn come_and_go(named: bool, done: &AtomicBool) -> Result<usize> {
    let start = std::time::Instant::now();
    let mut made = 0;
    while !done.load(Ordering::Relaxed) && start.elapsed() < Duration::from_mins(1) {
        if named {
            Netns::named()?;
        } else {
            let mut command = Place::default().command("unshare");
            output(command.args(["--net", "true"]), Duration::from_secs(10))?;
        }
        made += 1;
    }
    Ok(made)
}

/// An agent that may govern but not enter other namespaces says which ones it
/// could not sweep, and does the rest.
#[test]
fn that_may_not_be_entered() -> Result<()> {
    require!(Need::Program("setpriv"), Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::named()?;
    let mut here = Probe::start(Program::Static, &cgroup)?;
    let (reached, _) = here.connection()?;
    let mut there = Probe::start(Program::Static, (&cgroup, &netns))?;
    let (missed, _) = there.connection()?;
    let mut agent = Agent::start_with(&cgroup, POLICY, &without_sys_admin())?;
    let swept = agent.swept()?;
    assert_eq!(here.options(reached)?, OURS);
    assert_eq!(there.options(missed)?, Options::UNTOUCHED);
    let name = netns.path().file_name().context("no name")?;
    let name = name.to_str().context("no text")?;
    let named = swept["missed"].to_string();
    assert!(named.contains(name), "no {name} in {named}");
    assert!(named.contains("not permitted"), "{named}");
    // New connections are governed there too.
    let (connecting, _) = there.connection()?;
    assert_eq!(there.options(connecting)?, OURS);
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(finished.stderr.contains(name), "{}", finished.stderr);
    Ok(())
}

/// The words before a command that keep it from what CAP_SYS_ADMIN allows.
fn without_sys_admin() -> [&'static str; 4] {
    [
        "setpriv",
        "--inh-caps=-sys_admin",
        "--bounding-set=-sys_admin",
        "--",
    ]
}
