//! Servers that people run, each with an idle client, as `ss -tno` sees the
//! server's sockets. Each server is running before the agent comes.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Need, Netns, Place, Probe, Process, Program, Socket, Timer, output, postgres,
    require, timer, wait_until,
};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(30);

/// Cgroup, namespace and directory of a server.
struct Home {
    cgroup: Cgroup,
    netns: Netns,
    directory: tempfile::TempDir,
}

impl Home {
    fn new() -> Result<Self> {
        Ok(Self {
            cgroup: Cgroup::new()?,
            netns: Netns::new()?,
            directory: tempfile::tempdir()?,
        })
    }

    fn start(&self, program: &str, arguments: &[&str], farewell: Signal) -> Result<Process> {
        let mut command = Place::from((&self.cgroup, &self.netns)).command(program);
        let log = fs::File::create(self.directory.path().join("log"))?;
        command.args(arguments).current_dir(&self.directory);
        command.stdout(log.try_clone()?).stderr(log);
        Ok(Process::start(&mut command)?.ended_by(farewell))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// A client outside the cgroup.
    fn client(&self) -> Result<Probe> {
        Probe::start(Program::Static, &self.netns)
    }

    /// Connects as soon as the server listens.
    fn connect(&self, client: &mut Probe, port: u16) -> Result<Socket> {
        let address = format!("127.0.0.1:{port}").parse()?;
        let mut socket = None;
        wait_until(LIMIT, "the server", || {
            socket = client.connected(address).ok();
            Ok(socket.is_some())
        })
        .with_context(|| self.log())?;
        socket.context("no socket")
    }

    /// Sends a request and waits for the answer: from then on the connection is
    /// idle, and the server has set whatever it sets.
    fn converse(&self, client: &mut Probe, port: u16, request: &str) -> Result<Socket> {
        let socket = self.connect(client, port)?;
        client.send(socket, request)?;
        ensure!(client.wait(socket, LIMIT)?, "no answer: {}", self.log());
        ensure!(client.receive(socket)? > 0, "hung up: {}", self.log());
        Ok(socket)
    }

    /// The server's side of its only connection on that port.
    fn server_side(&self, port: u16) -> Result<Option<Timer>> {
        self.settled(&format!("sport = :{port}"))
    }

    /// The timer of a connection once what was sent is acknowledged: until then
    /// its timer is that of the retransmission.
    fn settled(&self, filter: &str) -> Result<Option<Timer>> {
        let mut seen = None;
        wait_until(LIMIT, "a quiet connection", || {
            seen = timer(Some(&self.netns), filter)?;
            Ok(seen.as_ref().is_none_or(|timer| timer.kind != "on"))
        })?;
        Ok(seen)
    }

    fn expect_idle(&self, port: u16, idle: u64) -> Result<()> {
        let timer = self.server_side(port)?.context("no timer")?;
        ensure!(timer.is_fresh_keepalive(idle), "{timer:?}, not {idle} s");
        // The client is not governed: it shows that the server's side is our work.
        let client = self.settled(&format!("dport = :{port}"))?;
        ensure!(client.is_none(), "the client has {client:?}");
        Ok(())
    }
}

#[test]
fn nginx() -> Result<()> {
    require!(Need::Program("nginx"), Need::Program("ss"));
    let home = Home::new()?;
    let directory = home.directory.path().display();
    let config = format!(
        "daemon off; user root; worker_processes 1; pid {directory}/pid;
         error_log {directory}/errors;
         events {{ }}
         http {{
             access_log off; keepalive_timeout 600s;
             client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
             fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
             scgi_temp_path {directory}/scgi;
             server {{
                 listen 127.0.0.1:80;
                 listen 127.0.0.1:81 so_keepalive=20m:75s:9;
                 location / {{ return 200 \"hello\"; }}
             }}
         }}"
    );
    let file = home.directory.path().join("nginx.conf");
    fs::write(&file, config)?;
    let file = file.to_str().context("a path in UTF-8")?;
    let errors = format!("{directory}/errors");
    let _server = home.start("nginx", &["-e", &errors, "-c", file], Signal::TERM)?;
    let request = "GET / HTTP/1.1\r\nHost: test\r\n\r\n";

    let mut client = home.client()?;
    let before = home.converse(&mut client, 80, request)?;
    ensure!(home.server_side(80)?.is_none(), "without the agent");
    client.close(before)?;
    let before = home.converse(&mut client, 81, request)?;
    let own = home.server_side(81)?.context("no timer")?;
    ensure!(own.is_fresh_keepalive(1200), "without the agent: {own:?}");
    client.close(before)?;

    let policy = "[default]\nidle = { default = \"60s\", at-most = \"5m\" }\n";
    let _agent = Agent::start(&home.cgroup, policy)?;
    home.converse(&mut client, 80, request)?;
    home.expect_idle(80, 60)?;
    // What nginx sets on the listener comes to us as the application's value.
    home.converse(&mut client, 81, request)?;
    home.expect_idle(81, 300)
}

fn redis(own: &str) -> Result<(Home, Process)> {
    let home = Home::new()?;
    let arguments = [
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--tcp-keepalive",
        own,
    ];
    let server = home.start("redis-server", &arguments, Signal::TERM)?;
    Ok((home, server))
}

#[test]
fn redis_without_keepalive_of_its_own() -> Result<()> {
    require!(Need::Program("redis-server"), Need::Program("ss"));
    let (home, _server) = redis("0")?;
    let mut client = home.client()?;
    let before = home.converse(&mut client, 6379, "PING\r\n")?;
    ensure!(home.server_side(6379)?.is_none(), "without the agent");
    client.close(before)?;
    let _agent = Agent::start(&home.cgroup, "[default]\nidle = \"60s\"\n")?;
    home.converse(&mut client, 6379, "PING\r\n")?;
    home.expect_idle(6379, 60)
}

/// Redis sets its 300 s after `accept()`, and is held to the bound all the same.
#[test]
fn redis_with_keepalive_of_its_own() -> Result<()> {
    require!(Need::Program("redis-server"), Need::Program("ss"));
    let (home, _server) = redis("300")?;
    let policy = "[default]\nidle = { default = \"60s\", at-most = \"2m\" }\n";
    let mut client = home.client()?;
    let before = home.connect(&mut client, 6379)?;
    client.close(before)?;
    let agent = Agent::start(&home.cgroup, policy)?;
    home.converse(&mut client, 6379, "PING\r\n")?;
    // It asks for 300 s after accept().
    home.expect_idle(6379, 120)?;
    let finished = agent.stop()?;
    assert_eq!(finished.count("default", "turned_on"), 1);
    Ok(())
}

/// `PostgreSQL` turns keepalive on by itself, after `accept()`, and leaves the
/// timers to the system: two hours without us.
#[test]
fn postgresql() -> Result<()> {
    require!(
        Need::Postgres,
        Need::Program("setpriv"),
        Need::Program("ss")
    );
    let programs = postgres().context("no PostgreSQL")?;
    let program = |name: &str| programs.join(name).display().to_string();
    let home = Home::new()?;
    let as_postgres = [
        "--reuid=postgres",
        "--regid=postgres",
        "--init-groups",
        "--",
    ];
    // The server runs as postgres and wants a directory that is its own.
    let data = home.directory.path().join("data");
    let data = data.to_str().context("a path in UTF-8")?;
    let mut command = Place::default().command("install");
    command.args(["-d", "-m", "700", "-o", "postgres", "-g", "postgres", data]);
    ensure!(output(&mut command, LIMIT)?.code == Some(0), "install");
    let mut command = Place::default().command("chmod");
    command.arg("711").arg(home.directory.path());
    ensure!(output(&mut command, LIMIT)?.code == Some(0), "chmod");
    let mut command = Place::default().command("setpriv");
    command.args(as_postgres).arg(program("initdb"));
    command.args(["-D", data, "-A", "trust", "--no-sync", "--no-locale"]);
    command.current_dir("/");
    let initdb = output(&mut command, Duration::from_mins(2))?;
    ensure!(initdb.code == Some(0), "initdb: {}", initdb.stderr);

    let server = program("postgres");
    let mut arguments = as_postgres.to_vec();
    arguments.extend([server.as_str(), "-D", data, "-p", "5432", "-F"]);
    arguments.extend(["-h", "127.0.0.1", "-k", ""]);
    let _server = home.start("setpriv", &arguments, Signal::INT)?;

    // A real session, idle: psql waits for the end of its input.
    let session = || -> Result<Process> {
        let mut command = Place::from(&home.netns).command(program("psql"));
        // Without keepalive at libpq's side, to tell the two sides apart.
        command.arg("host=127.0.0.1 user=postgres dbname=postgres keepalives=0");
        command.args(["-X", "-q"]).stdin(Stdio::piped());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let process = Process::start(&mut command)?;
        // Once a keepalive timer runs, the backend is past what it sets.
        wait_until(LIMIT, "the session", || {
            Ok(home.server_side(5432).is_ok_and(|timer| timer.is_some()))
        })
        .with_context(|| home.log())?;
        Ok(process)
    };
    let mut client = home.client()?;
    let first = home.connect(&mut client, 5432)?;
    client.close(first)?;
    wait_until(LIMIT, "the first connection to go", || {
        Ok(home.server_side(5432).is_err())
    })?;

    let before = session()?;
    let own = home.server_side(5432)?.context("no timer")?;
    ensure!(own.is_fresh_keepalive(7200), "without the agent: {own:?}");
    drop(before);
    wait_until(LIMIT, "the session to go", || {
        Ok(home.server_side(5432).is_err())
    })?;

    let _agent = Agent::start(&home.cgroup, "[default]\nidle = \"60s\"\n")?;
    let _session = session()?;
    home.expect_idle(5432, 60)
}
