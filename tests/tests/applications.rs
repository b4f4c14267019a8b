//! The rows of the formula by what people run, unmodified: applications that ask
//! for nothing, for less than the bounds and for more, before `connect()` or
//! `accept()` and after, each in its own way. What comes of it is read from a copy
//! of the application's own descriptor, and from the timer that `ss` sees.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Connection, Home, Need, Options, Place, Probe, Process, between, go_build, output,
    require, timer, wait_until,
};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_mins(1);
const BOUNDS: &str =
    "[default]\nidle = { default = \"60s\", at-least = \"30s\", at-most = \"5m\" }\n";

/// Seconds that an application asks for, and what they become under [`BOUNDS`].
const ASKED: [(&str, i32); 2] = [("10", 30), ("7200", 300)];

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("programs/applications")
        .join(name)
}

fn compile(command: &mut Command) -> Result<()> {
    let built = output(command, Duration::from_mins(3))?;
    ensure!(built.code == Some(0), "{command:?}: {}", built.stderr);
    Ok(())
}

/// Waits until the only connection of the application for which `is_meant` holds
/// has these options, and its timer runs accordingly.
fn expect(home: &Home, is_meant: impl Fn(&Connection) -> bool, expected: Options) -> Result<()> {
    let mut found = Vec::new();
    let is_so = wait_until(LIMIT, "the options", || {
        found = Connection::of(&home.cgroup)?;
        found.retain(&is_meant);
        // A server's workers may hold the same one, each.
        found.dedup();
        Ok(matches!(&found[..], [only] if only.options == expected))
    });
    is_so.with_context(|| format!("expected {expected:?}, found {found:?}: {}", home.log()))?;
    let connection = found.first().context("no connection")?;
    let filter = between(connection.local, connection.peer);
    let mut seen = None;
    wait_until(LIMIT, "a quiet connection", || {
        seen = timer(Some(&home.netns), &filter)?;
        Ok(seen.as_ref().is_none_or(|timer| timer.kind != "on"))
    })?;
    if expected.keepalive {
        let idle = u64::try_from(expected.idle)?;
        let timer = seen.context("no timer")?;
        ensure!(timer.is_fresh_keepalive(idle), "{timer:?}, not {idle} s");
    } else {
        ensure!(seen.is_none(), "{seen:?}");
    }
    Ok(())
}

/// A client in the place of the server, to a server that sets nothing.
struct Clients {
    home: Home,
    listener: Probe,
    port: u16,
    agent: Agent,
}

impl Clients {
    fn new() -> Result<Self> {
        let home = Home::new()?;
        let mut listener = home.client()?;
        let port = listener.listener("127.0.0.1:0")?.1.port();
        let agent = Agent::start(&home.cgroup, BOUNDS)?;
        Ok(Self {
            home,
            listener,
            port,
            agent,
        })
    }

    /// Runs the client: with its port, and what it is to ask for.
    fn run(&mut self, command: &[&str], asks: &[&str], expected: Options) -> Result<()> {
        let port = self.port.to_string();
        let mut client = Place::from((&self.home.cgroup, &self.home.netns)).command(command[0]);
        client.args(&command[1..]).arg(&port).args(asks);
        client.stdin(Stdio::piped()).stdout(Stdio::null());
        let _client = Process::start(&mut client)?;
        expect(&self.home, |end| end.peer.port() == self.port, expected)
            .with_context(|| format!("{command:?} {asks:?}"))
    }

    /// The same when it asks before and after, for less and for more.
    fn asks(
        &mut self,
        command: &[&str],
        moments: &[&str],
        expected: fn(idle: i32) -> Options,
    ) -> Result<()> {
        for moment in moments {
            for (asked, idle) in ASKED {
                self.run(command, &[moment, asked], expected(idle))?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        self.listener.finish()?;
        self.agent.stop()?;
        Ok(())
    }
}

/// What an application has that sets SO_KEEPALIVE and idle, and leaves the rest.
fn filled(idle: i32) -> Options {
    Options::on(idle, 10, 6)
}

#[test]
fn go() -> Result<()> {
    require!(Need::Program("go"), Need::Program("ss"));
    let mut clients = Clients::new()?;
    let client = clients.home.directory.path().join("client");
    compile(go_build().arg("-o").arg(&client).arg(source("client.go")))?;
    let client = client.to_str().context("a path in UTF-8")?;
    // What nobody asked for is 15 s of Go's own, for idle and interval, set after
    // connect(): no less than an application's value.
    clients.run(&[client], &[], Options::on(30, 15, 6))?;
    clients.asks(&[client], &["before"], filled)?;
    // Go asks for an interval as long as the idle time, and no policy bounds it.
    clients.run(&[client], &["after", "10"], Options::on(30, 10, 6))?;
    clients.run(&[client], &["after", "7200"], Options::on(300, 7200, 6))?;
    clients.finish()
}

#[test]
fn node() -> Result<()> {
    require!(Need::Program("node"), Need::Program("ss"));
    let mut clients = Clients::new()?;
    let client = source("client.js");
    let client = ["node", client.to_str().context("a path in UTF-8")?];
    clients.run(&client, &[], filled(60))?;
    // Node asks for an interval of 1 s and 10 probes beside.
    clients.asks(&client, &["after"], |idle| Options::on(idle, 1, 10))?;
    clients.finish()
}

#[test]
fn java() -> Result<()> {
    require!(Need::Program("javac"), Need::Program("ss"));
    let mut clients = Clients::new()?;
    let classes = clients.home.directory.path().to_owned();
    compile(
        Command::new("javac")
            .arg("-d")
            .arg(&classes)
            .arg(source("Client.java")),
    )?;
    let classes = classes.to_str().context("a path in UTF-8")?;
    let client = ["java", "-XX:TieredStopAtLevel=1", "-cp", classes, "Client"];
    clients.run(&client, &[], filled(60))?;
    clients.asks(&client, &["before", "after"], filled)?;
    clients.finish()
}

#[test]
fn python_asyncio() -> Result<()> {
    require!(Need::Program("python3"), Need::Program("ss"));
    let mut clients = Clients::new()?;
    let client = source("client.py");
    let client = ["python3", client.to_str().context("a path in UTF-8")?];
    clients.run(&client, &[], filled(60))?;
    clients.asks(&client, &["before", "after"], filled)?;
    clients.finish()
}

/// curl asks before connect(), for 60 s where nobody says anything, and for an
/// interval as long.
#[test]
fn curl() -> Result<()> {
    require!(Need::Program("curl"), Need::Program("ss"));
    let clients = Clients::new()?;
    let url = format!("http://127.0.0.1:{}/", clients.port);
    let time = |time: &'static str| ["curl", "-sN", "--keepalive-time", time, "--url"];
    let run = |command: &[&str], expected| {
        let mut curl = Place::from((&clients.home.cgroup, &clients.home.netns)).command(command[0]);
        curl.args(&command[1..]).arg(&url).stdout(Stdio::null());
        let _curl = Process::start(&mut curl)?;
        expect(
            &clients.home,
            |end| end.peer.port() == clients.port,
            expected,
        )
        .with_context(|| format!("{command:?}"))
    };
    run(&["curl", "-sN", "--no-keepalive", "--url"], filled(60))?;
    run(&["curl", "-sN", "--url"], Options::on(60, 60, 6))?;
    run(&time("10"), Options::on(30, 10, 6))?;
    run(&time("7200"), Options::on(300, 7200, 6))?;
    clients.finish()
}

#[test]
fn nginx() -> Result<()> {
    require!(Need::Program("nginx"), Need::Program("ss"));
    let home = Home::new()?;
    let _agent = Agent::start(&home.cgroup, BOUNDS)?;
    let _server = home.nginx(&[
        "127.0.0.1:1000",
        "127.0.0.1:1010 so_keepalive=10s",
        "127.0.0.1:1072 so_keepalive=2h",
    ])?;
    let mut client = home.client()?;
    for (port, idle) in [(1000, 60), (1010, 30), (1072, 300)] {
        home.converse(&mut client, port, "GET / HTTP/1.1\r\nHost: test\r\n\r\n")?;
        expect(&home, |end| end.local.port() == port, filled(idle))?;
    }
    Ok(())
}

/// Redis asks after accept(), and for an interval of a third, and 3 probes.
#[test]
fn redis() -> Result<()> {
    require!(Need::Program("redis-server"), Need::Program("ss"));
    let home = Home::new()?;
    let _agent = Agent::start(&home.cgroup, BOUNDS)?;
    for (asked, expected) in [
        ("0", filled(60)),
        ("10", Options::on(30, 3, 3)),
        ("7200", Options::on(300, 2400, 3)),
    ] {
        let arguments = ["--save", "", "--port", "6379", "--tcp-keepalive", asked];
        let server = home.start("redis-server", &arguments, Signal::TERM)?;
        let mut client = home.client()?;
        home.converse(&mut client, 6379, "PING\r\n")?;
        expect(&home, |end| end.local.port() == 6379, expected)?;
        client.finish()?;
        drop(server);
    }
    Ok(())
}

/// The server asks after accept(), libpq after connect().
#[test]
fn postgresql_and_psql() -> Result<()> {
    require!(
        Need::Postgres,
        Need::Program("setpriv"),
        Need::Program("ss")
    );
    let home = Home::new()?;
    let _agent = Agent::start(&home.cgroup, BOUNDS)?;
    let _server = home.postgresql(&["-c", "tcp_keepalives_idle=7200"])?;
    let mut client = home.client()?;
    let first = home.connect(&mut client, 5432)?;
    client.close(first)?;
    for (options, expected) in [
        ("keepalives=0", filled(60)),
        ("keepalives_idle=10", filled(30)),
        ("keepalives_idle=7200", filled(300)),
    ] {
        let psql = home.psql(Place::from((&home.cgroup, &home.netns)), options)?;
        expect(&home, |end| end.peer.port() == 5432, expected)?;
        expect(&home, |end| end.local.port() == 5432, filled(300))?;
        drop(psql);
        wait_until(LIMIT, "the session to go", || {
            let connections = Connection::of(&home.cgroup)?;
            Ok(connections.iter().all(|end| end.local.port() != 5432))
        })?;
    }
    Ok(())
}

/// HAProxy asks after accept() on the one side and before connect() on the other.
#[test]
fn haproxy() -> Result<()> {
    require!(Need::Program("haproxy"), Need::Program("ss"));
    let home = Home::new()?;
    let mut server = home.client()?;
    let behind = server.listener("127.0.0.1:0")?.1.port();
    let _agent = Agent::start(&home.cgroup, BOUNDS)?;
    let mut config = "global\n  maxconn 100\ndefaults\n  mode tcp\n  timeout connect 10s\n  \
                      timeout client 10m\n  timeout server 10m\n"
        .to_owned();
    for (port, asks) in [
        (1000, ""),
        (
            1010,
            "  option tcpka\n  clitcpka-idle 10s\n  srvtcpka-idle 10s\n",
        ),
        (
            1072,
            "  option tcpka\n  clitcpka-idle 2h\n  srvtcpka-idle 2h\n",
        ),
    ] {
        writeln!(
            config,
            "listen l{port}\n  bind 127.0.0.1:{port}\n{asks}  \
             server s 127.0.0.1:{behind} source 127.0.1.{}",
            port - 999
        )?;
    }
    let file = home.directory.path().join("haproxy.cfg");
    fs::write(&file, config)?;
    let file = file.to_str().context("a path in UTF-8")?;
    let _server = home.start("haproxy", &["-db", "-f", file], Signal::TERM)?;
    let mut client = home.client()?;
    for (port, idle) in [(1000, 60), (1010, 30), (1072, 300)] {
        home.connect(&mut client, port)?;
        expect(&home, |end| end.local.port() == port, filled(idle))?;
        let from = format!("127.0.1.{}", port - 999);
        expect(
            &home,
            |end| end.local.ip().to_string() == from,
            filled(idle),
        )?;
    }
    Ok(())
}

/// A gRPC server sets a user-timeout of 20 s, which would end connections after one
/// lost probe: keepalive stays off, or the user-timeout is raised.
#[test]
fn grpc() -> Result<()> {
    const GRPC: &str = "/usr/lib/python3/dist-packages/grpc/__init__.py";
    require!(Need::File(GRPC), Need::Program("ss"));
    let home = Home::new()?;
    let mut agent = Agent::start(&home.cgroup, BOUNDS)?;
    let script = source("grpc_server.py");
    let script = script.to_str().context("a path in UTF-8")?;
    let mut command = Place::from((&home.cgroup, &home.netns)).command("/usr/bin/python3");
    command
        .args([script, "127.0.0.1:0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut server = Process::start(&mut command)?;
    let port: u16 = first_line(&mut server)?.parse()?;
    let mut client = home.client()?;
    // The preface of HTTP/2 and an empty SETTINGS frame.
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    home.converse(&mut client, port, preface)?;
    let own = Options::UNTOUCHED.user_timeout(20_000);
    expect(&home, |end| end.local.port() == port, own)?;
    agent.reload(&format!(
        "{BOUNDS}user-timeout = {{ at-least = \"derive\" }}\n"
    ))?;
    expect(
        &home,
        |end| end.local.port() == port,
        filled(60).user_timeout(120_000),
    )?;
    client.finish()
}

fn first_line(process: &mut Process) -> Result<String> {
    use std::io::BufRead as _;
    let stdout = process.child().stdout.take().context("no output")?;
    let mut line = String::new();
    std::io::BufReader::new(stdout).read_line(&mut line)?;
    Ok(line.trim().to_owned())
}
