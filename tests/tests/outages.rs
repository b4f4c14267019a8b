//! What people run, unmodified, through the same trouble on the way, with the agent
//! and without: where it lives without, it lives with it.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Connection, Dialogue, ForgetfulNat, Kind, Need, Netns, Options, Place, Probe,
    Process, Program, Socket, Sockopt, go_build, output, require, wait_until,
};

const LIMIT: Duration = Duration::from_secs(30);
const GRPC: &str = "/usr/lib/python3/dist-packages/grpc/__init__.py";

/// Seconds of idle time that node and Go ask for, after `connect()`.
const ASKED: u64 = 3;

fn source(name: &str) -> String {
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/applications");
    programs.join(name).display().to_string()
}

/// A gRPC server that gives up a peer after 1.5 s, where others do after 20, and its
/// client.
struct Grpc {
    _server: Dialogue,
    client: Dialogue,
}

impl Grpc {
    fn start(server: Place<'_>, client: &Netns) -> Result<Self> {
        let mut command = server.command("/usr/bin/python3");
        command.args([&source("grpc_server.py"), "10.99.0.1:0", "1500"]);
        let server = Dialogue::start(&mut command)?;
        let port = server.hear(LIMIT)?;
        let mut command = Place::from(client).command("/usr/bin/python3");
        command.args([&source("grpc_client.py"), &format!("10.99.0.1:{port}")]);
        let client = Dialogue::start(&mut command)?;
        Ok(Self {
            _server: server,
            client,
        })
    }

    /// Makes a call; says over which connection.
    fn call(&mut self) -> Result<String> {
        self.client.say("")?;
        self.client.hear(LIMIT)
    }
}

/// A client that asks for keepalive after `connect()`, and the other end.
struct Late {
    client: Dialogue,
    accepted: Socket,
}

impl Late {
    fn start(
        command: &mut Command,
        server: &mut Probe,
        (listener, address): (Socket, SocketAddr),
    ) -> Result<Self> {
        command.args([
            address.ip().to_string(),
            address.port().to_string(),
            ASKED.to_string(),
        ]);
        let client = Dialogue::start(command)?;
        let accepted = server.accept(listener)?;
        Ok(Self { client, accepted })
    }

    /// A question and an answer.
    fn converse(&mut self, server: &mut Probe) -> Result<()> {
        self.client.say("question")?;
        ensure!(server.wait(self.accepted, LIMIT)?, "the question is lost");
        server.receive(self.accepted)?;
        server.send(self.accepted, "answer\n")?;
        ensure!(self.client.hear(LIMIT)? == "answer");
        Ok(())
    }
}

/// A gRPC server's user-timeout would end its connections with the first probe that
/// is lost; so would one that was derived for shorter timers than those that node and
/// Go ask for later.
#[test]
fn grpc_node_and_go_live_through_what_they_live_through_alone() -> Result<()> {
    require!(
        Need::File(GRPC),
        Need::Program("node"),
        Need::Program("go"),
        Need::Program("ip"),
    );
    let cgroup = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let policy =
        "[default]\nidle = \"1s\"\ninterval = \"1s\"\nprobes = 3\nuser-timeout = \"derive\"\n";
    let _agent = Agent::start(&cgroup, policy)?;
    let directory = tempfile::tempdir()?;
    let go = directory.path().join("ask");
    let built = output(
        go_build().arg("-o").arg(&go).arg(source("ask.go")),
        Duration::from_mins(3),
    )?;
    ensure!(built.code == Some(0), "{}", built.stderr);

    let mut server = Probe::start(Program::Static, &far)?;
    let listening = server.listener("10.99.0.2:0")?;
    let mut grpc = Vec::new();
    let mut late = Vec::new();
    for place in [Place::from((&cgroup, &near)), Place::from(&near)] {
        grpc.push(Grpc::start(place, &far)?);
        let mut node = place.command("node");
        late.push(Late::start(
            node.arg(source("ask.js")),
            &mut server,
            listening,
        )?);
        late.push(Late::start(
            &mut place.command(&go),
            &mut server,
            listening,
        )?);
    }
    // That the outage is one: this connection ends by itself.
    let mut control = Probe::start(Program::Static, &near)?;
    let lost = control.socket(Kind::of(listening.1))?;
    let own = [
        (Sockopt::UserTimeout, 1500),
        (Sockopt::Keepalive, 1),
        (Sockopt::Idle, 2),
        (Sockopt::Interval, 1),
    ];
    control.set_all(lost, &own)?;
    control.connect(lost, listening.1)?;

    let mut converse = |late: &mut Late| late.converse(&mut server);
    let before = grpc
        .iter_mut()
        .map(Grpc::call)
        .collect::<Result<Vec<_>>>()?;
    late.iter_mut().try_for_each(&mut converse)?;
    // Node asks for an interval of 1 s and 10 probes beside, Go for an interval.
    let mut expected = [
        Options::UNTOUCHED.user_timeout(1500),
        Options::on(3, 1, 10).user_timeout(13_000),
        Options::on(3, 3, 3).user_timeout(12_000),
    ]
    .map(|options| format!("{options:?}"));
    expected.sort();
    let mut found = Vec::new();
    let is_so = wait_until(LIMIT, "their options", || {
        let connections = Connection::of(&cgroup)?;
        found = connections
            .iter()
            .map(|connection| format!("{:?}", connection.options))
            .collect();
        found.sort();
        Ok(found == expected)
    });
    is_so.with_context(|| format!("{found:#?}"))?;

    // A while after a call gRPC measures the way; nothing is to be in flight.
    sleep(Duration::from_secs(1));
    // A probe of each falls into it, whenever the last one was.
    far.run("ip", "route add blackhole 10.99.0.1/32")?;
    sleep(Duration::from_secs(ASKED + 1));
    far.run("ip", "route del blackhole 10.99.0.1/32")?;
    // Until those that would end have ended.
    sleep(Duration::from_secs(ASKED));
    ensure!(control.wait(lost, LIMIT)?, "nothing was cut");
    let after = grpc
        .iter_mut()
        .map(Grpc::call)
        .collect::<Result<Vec<_>>>()?;
    assert_eq!(before, after, "gRPC made new connections");
    for (name, late) in ["node", "Go", "node alone", "Go alone"]
        .iter()
        .zip(&mut late)
    {
        converse(late).context(*name)?;
    }
    Ok(())
}

/// A vsftpd that takes longer for a file than the NAT remembers.
fn vsftpd(place: Place<'_>, directory: &Path, port: u16) -> Result<Process> {
    let path = directory.display();
    let config = directory.join(format!("{port}.conf"));
    let text = format!(
        "listen=YES\nlisten_port={port}\nbackground=NO\nanonymous_enable=YES\n\
         no_anon_password=YES\nanon_root={path}/files\nsecure_chroot_dir={path}/empty\n\
         anon_max_rate=100000\n"
    );
    fs::write(&config, text)?;
    Process::start(place.command("vsftpd").arg(config))
}

/// The control connection is silent while a file comes over another one: a NAT that
/// forgets it loses the word that the file is whole. vsftpd asks for keepalive, with
/// the two hours of the kernel.
#[test]
fn vsftpd_tells_the_end_of_a_long_transfer_through_a_nat_that_forgets() -> Result<()> {
    const SIZE: usize = 1_300_000;
    const TIMED_OUT: i32 = 28;
    require!(
        Need::Program("vsftpd"),
        Need::Program("curl"),
        Need::Program("nft"),
        Need::Program("ip"),
    );
    ensure!(SIZE > 100_000 * usize::try_from(ForgetfulNat::AFTER + 2)?);
    let (cgroup, other) = (Cgroup::new()?, Cgroup::new()?);
    let nat = ForgetfulNat::new()?;
    let _agent = Agent::start(
        &cgroup,
        "[default]\nidle = \"3s\"\ninterval = \"1s\"\nprobes = 3\n",
    )?;
    let directory = tempfile::tempdir()?;
    for name in ["files", "empty"] {
        fs::create_dir(directory.path().join(name))?;
    }
    fs::write(directory.path().join("files/file"), vec![b'x'; SIZE])?;
    // Anonymous users are to read it.
    let mut open = Place::default().command("chmod");
    output(open.arg("755").arg(directory.path()), LIMIT)?;
    let places = [
        (Place::from((&cgroup, &nat.server)), 2121),
        (Place::from((&other, &nat.server)), 2122),
    ];
    let _servers = places
        .map(|(place, port)| vsftpd(place, directory.path(), port))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let mut near = Probe::start(Program::Static, &nat.server)?;
    for (_, port) in places {
        let address = SocketAddr::new(nat.address(), port);
        wait_until(LIMIT, "vsftpd", || match near.connected(address) {
            Ok(socket) => near.close(socket).map(|()| true),
            Err(_) => Ok(false),
        })?;
    }
    let fetch = |port: u16| {
        let url = format!("ftp://{}:{port}/file", nat.address());
        let mut curl = Place::from(&nat.client).command("curl");
        curl.args(["-sS", "--max-time", "17", "-w", "%{size_download}"]);
        output(curl.args(["-o", "/dev/null", &url]), 2 * LIMIT)
    };
    let (with, without) = scope(|scope| {
        let with = scope.spawn(|| fetch(2121));
        let without = fetch(2122);
        (with.join(), without)
    });
    let with = with.map_err(|_| anyhow::anyhow!("a panic"))??;
    let without = without?;
    for cgroup in [&cgroup, &other] {
        wait_until(LIMIT, "the sessions to end", || {
            let processes = fs::read_to_string(cgroup.directory().join("cgroup.procs"))?;
            Ok(processes.lines().count() == 1)
        })?;
    }
    let size = SIZE.to_string();
    assert_eq!(
        (with.code, &with.stdout),
        (Some(0), &size),
        "{}",
        with.stderr
    );
    assert_eq!(
        (without.code, &without.stdout),
        (Some(TIMED_OUT), &size),
        "{}",
        without.stderr
    );
    Ok(())
}
