//! Servers that people run, each with an idle client, as `ss -tno` sees the
//! server's sockets. Each server is running before the agent comes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{Agent, Home, Need, Place, Process, Timer, require, timer, wait_until};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(30);

/// The server's side of its only connection on that port.
fn server_side(home: &Home, port: u16) -> Result<Option<Timer>> {
    settled(home, &format!("sport = :{port}"))
}

/// The timer of a connection once what was sent is acknowledged: until then its
/// timer is that of the retransmission.
fn settled(home: &Home, filter: &str) -> Result<Option<Timer>> {
    let mut seen = None;
    wait_until(LIMIT, "a quiet connection", || {
        seen = timer(Some(&home.netns), filter)?;
        Ok(seen.as_ref().is_none_or(|timer| timer.kind != "on"))
    })?;
    Ok(seen)
}

fn expect_idle(home: &Home, port: u16, idle: u64) -> Result<()> {
    let timer = server_side(home, port)?.context("no timer")?;
    ensure!(timer.is_fresh_keepalive(idle), "{timer:?}, not {idle} s");
    // The client is not governed: it shows that the server's side is our work.
    let client = settled(home, &format!("dport = :{port}"))?;
    ensure!(client.is_none(), "the client has {client:?}");
    Ok(())
}

#[test]
fn nginx() -> Result<()> {
    require!(Need::Program("nginx"), Need::Program("ss"));
    let home = Home::new()?;
    let _server = home.nginx(&["127.0.0.1:80", "127.0.0.1:81 so_keepalive=20m:75s:9"])?;
    let request = "GET / HTTP/1.1\r\nHost: test\r\n\r\n";

    let mut client = home.client()?;
    let before = home.converse(&mut client, 80, request)?;
    ensure!(server_side(&home, 80)?.is_none(), "without the agent");
    client.close(before)?;
    let before = home.converse(&mut client, 81, request)?;
    let own = server_side(&home, 81)?.context("no timer")?;
    ensure!(own.is_fresh_keepalive(1200), "without the agent: {own:?}");
    client.close(before)?;

    let policy = "[default]\nidle = { default = \"60s\", at-most = \"5m\" }\n";
    let _agent = Agent::start(&home.cgroup, policy)?;
    home.converse(&mut client, 80, request)?;
    expect_idle(&home, 80, 60)?;
    // What nginx sets on the listener comes to us as the application's value.
    home.converse(&mut client, 81, request)?;
    expect_idle(&home, 81, 300)
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
    ensure!(server_side(&home, 6379)?.is_none(), "without the agent");
    client.close(before)?;
    let _agent = Agent::start(&home.cgroup, "[default]\nidle = \"60s\"\n")?;
    home.converse(&mut client, 6379, "PING\r\n")?;
    expect_idle(&home, 6379, 60)
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
    expect_idle(&home, 6379, 120)?;
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
    let home = Home::new()?;
    let _server = home.postgresql(&[])?;
    // Without keepalive at libpq's side, to tell the two sides apart.
    let session = || -> Result<Process> {
        let process = home.psql(Place::from(&home.netns), "keepalives=0")?;
        // Once a keepalive timer runs, the backend is past what it sets.
        wait_until(LIMIT, "the session", || {
            Ok(server_side(&home, 5432).is_ok_and(|timer| timer.is_some()))
        })
        .with_context(|| home.log())?;
        Ok(process)
    };
    let mut client = home.client()?;
    let first = home.connect(&mut client, 5432)?;
    client.close(first)?;
    wait_until(LIMIT, "the first connection to go", || {
        Ok(server_side(&home, 5432).is_err())
    })?;

    let before = session()?;
    let own = server_side(&home, 5432)?.context("no timer")?;
    ensure!(own.is_fresh_keepalive(7200), "without the agent: {own:?}");
    drop(before);
    wait_until(LIMIT, "the session to go", || {
        Ok(server_side(&home, 5432).is_err())
    })?;

    let _agent = Agent::start(&home.cgroup, "[default]\nidle = \"60s\"\n")?;
    let _session = session()?;
    expect_idle(&home, 5432, 60)
}
