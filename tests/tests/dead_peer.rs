//! A peer that is cut off without a word, as by a NAT gateway that forgot the
//! connection: found dead in idle + interval × probes, by programs that never
//! heard of keepalive.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Need, Netns, Place, Probe, Process, Program, Socket, errno, require,
};
use rustix::io::Errno;

const POLICY: &str = "[default]\nidle = \"2s\"\ninterval = \"1s\"\nprobes = 3\n";
const DETECTION: Duration = Duration::from_secs(5);
const TOLERANCE: Duration = Duration::from_secs(1);

/// Waits for the connection to die of a timeout, and checks that it took as long
/// as it should.
fn dies_in_time(probe: &mut Probe, socket: Socket, connected: Instant) -> Result<()> {
    ensure!(
        probe.wait(socket, 3 * DETECTION)?,
        "alive after {:?}",
        connected.elapsed()
    );
    let took = connected.elapsed();
    let error = probe.receive(socket).err().context("no error")?;
    ensure!(errno(&error) == Some(Errno::TIMEDOUT), "{error:#}");
    ensure!(took.abs_diff(DETECTION) <= TOLERANCE, "it took {took:?}");
    Ok(())
}

#[test]
fn a_dead_peer_is_found_in_time() -> Result<()> {
    require!(Need::Program("ip"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let derived = cgroup.child("derived")?;
    let config = format!(
        "{POLICY}[[policy]]\nname = \"derived\"\ncgroup = \"{}\"\nuser-timeout = \"derive\"\n",
        derived.path()
    );
    let _agent = Agent::start(&cgroup, &config)?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &near))?;
    let mut with_timeout = Probe::start(Program::Raw, (&derived, &near))?;
    let mut control = Probe::start(Program::Static, &near)?;
    let mut theirs = Probe::start(Program::Static, &far)?;

    let (_, v4) = theirs.listener("10.99.0.2:0")?;
    let (_, v6) = theirs.listener("[fd99::2]:0")?;
    let (listener, own) = ours.listener("10.99.0.1:0")?;
    let bystander = control.connected(v4)?;
    let derived = with_timeout.connected(v4)?;
    let v4 = ours.connected(v4)?;
    let v6 = ours.connected(v6)?;
    theirs.connected(own)?;
    let accepted = ours.accept(listener)?;
    let connected = Instant::now();
    far.run("ip", "link set eth0 down")?;

    dies_in_time(&mut ours, v4, connected).context("over IPv4")?;
    dies_in_time(&mut ours, v6, connected).context("over IPv6")?;
    dies_in_time(&mut ours, accepted, connected).context("accepted")?;
    dies_in_time(&mut with_timeout, derived, connected).context("with a user timeout")?;
    // The same program on the same cable outside the cgroup goes on waiting.
    ensure!(
        !control.wait(bystander, TOLERANCE)?,
        "it died without the agent's help"
    );
    Ok(())
}

/// The carrier stays up here, so that the probes leave the machine: the far end
/// merely ceases to be the one they are addressed to.
#[test]
fn the_probes_are_on_the_wire() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("tcpdump"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let _agent = Agent::start(&cgroup, POLICY)?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &near))?;
    let mut theirs = Probe::start(Program::Static, &far)?;
    let (_, address) = theirs.listener("10.99.0.2:0")?;
    let wire = Wire::tap(&near, "tcp and src host 10.99.0.1")?;

    let socket = ours.connected(address)?;
    let connected = Instant::now();
    far.run("ip", "link set eth0 address 02:00:00:00:00:99")?;
    dies_in_time(&mut ours, socket, connected)?;

    let packets = wire.packets()?;
    let flags: Vec<&str> = packets.iter().map(|(_, flags)| flags.as_str()).collect();
    // The handshake, three probes, and the reset with which the kernel gives up.
    assert_eq!(flags, ["S", ".", ".", ".", ".", "R."], "{packets:?}");
    for (at, seconds) in [(2, 2.0), (3, 1.0), (4, 1.0), (5, 1.0)] {
        let gap = packets[at].0 - packets[at - 1].0;
        assert!((gap - seconds).abs() < 0.5, "packet {at}: {packets:?}");
    }
    Ok(())
}

/// As long as the peer answers, probes go out and nothing dies.
#[test]
fn a_living_peer_is_left_in_peace() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("tcpdump"));
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let policy = "[default]\nidle = \"1s\"\ninterval = \"1s\"\nprobes = 1\n";
    let _agent = Agent::start(&cgroup, policy)?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &near))?;
    let mut theirs = Probe::start(Program::Static, &far)?;
    let (listener, address) = theirs.listener("10.99.0.2:0")?;
    let wire = Wire::tap(&near, "tcp and src host 10.99.0.1")?;
    let socket = ours.connected(address)?;
    let accepted = theirs.accept(listener)?;
    assert!(!ours.wait(socket, Duration::from_millis(4500))?, "it ended");
    theirs.send(accepted, "x")?;
    assert_eq!(ours.receive(socket)?, 1);
    // Handshake, four probes a second apart, and the acknowledgement of the data.
    let packets = wire.packets()?;
    assert!((6..=8).contains(&packets.len()), "{packets:?}");
    assert!(!packets.iter().any(|(_, flags)| flags.contains('R')));
    Ok(())
}

/// A tcpdump on `eth0`.
struct Wire {
    process: Process,
    file: tempfile::NamedTempFile,
}

impl Wire {
    /// Returns once it listens.
    fn tap(netns: &Netns, filter: &str) -> Result<Self> {
        let file = tempfile::NamedTempFile::new()?;
        let mut command = Place::from(netns).command("tcpdump");
        command.args(["-i", "eth0", "-nn", "-tt", "-l", "--immediate-mode"]);
        // Without root's privileges it could not read the namespace's interfaces.
        command.args(["-Z", "root"]).args(filter.split(' '));
        command.stdout(file.reopen()?).stderr(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let stderr = process.child().stderr.take().context("no stderr")?;
        let listening = BufReader::new(stderr)
            .lines()
            .map_while(Result::ok)
            .any(|line| line.contains("listening on"));
        ensure!(listening, "tcpdump does not listen");
        Ok(Self { process, file })
    }

    /// The time in seconds and the flags of each packet so far.
    fn packets(mut self) -> Result<Vec<(f64, String)>> {
        // A packet that was just sent is on its way through tcpdump.
        std::thread::sleep(Duration::from_millis(300));
        self.process.signal(rustix::process::Signal::INT)?;
        self.process.wait(Duration::from_secs(5))?;
        std::fs::read_to_string(&self.file)?
            .lines()
            .filter(|line| !line.is_empty())
            .map(|line| {
                let (time, _) = line
                    .split_once(' ')
                    .with_context(|| format!("no time in `{line}`"))?;
                let (_, flags) = line.split_once("Flags [").context("no flags")?;
                let (flags, _) = flags.split_once(']').context("no flags")?;
                Ok((time.parse()?, flags.to_owned()))
            })
            .collect()
    }
}
