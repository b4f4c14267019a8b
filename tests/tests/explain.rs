//! `explain` says of a connection what the kernel made of it, and why.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::Sockopt::{Idle, Keepalive};
use keepalive_tests::{
    Agent, Cgroup, Need, Netns, Options, Output, Probe, Program, Socket, agent_command, between,
    output, require, timer,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

fn explain<A: AsRef<std::ffi::OsStr>>(arguments: &[A]) -> Result<Output> {
    let mut command = agent_command();
    output(command.arg("explain").args(arguments), LIMIT)
}

/// An explanation that is given without a warning.
fn explained(arguments: &[&str]) -> Result<Value> {
    let said = explain(&[arguments, &["--json"]].concat())?;
    ensure!(said.code == Some(0), "{arguments:?}: {}", said.stderr);
    ensure!(said.stderr.is_empty(), "{arguments:?}: {}", said.stderr);
    serde_json::from_str(&said.stdout).with_context(|| format!("not JSON: {}", said.stdout))
}

/// What `sockets` says of one end of a connection.
fn listed(probe: &mut Probe, socket: Socket) -> Result<Value> {
    let mut command = agent_command();
    command.args(["sockets", "--json", "--pid", &probe.id().to_string()]);
    let said = output(&mut command, LIMIT)?;
    ensure!(said.code == Some(0), "{}", said.stderr);
    let port = probe.name(socket)?.port();
    let lines = said.stdout.lines().map(serde_json::from_str::<Value>);
    let lines = lines.collect::<Result<Vec<_>, _>>()?;
    let mut lines = lines.into_iter();
    lines
        .find(|line| line["local_port"] == port)
        .context("`sockets` does not have it")
}

/// What `holds` or `wants` says of the options.
fn options(meaning: &Value) -> Result<Options> {
    let number = |key: &str| -> Result<i32> {
        let value = meaning[key].as_i64();
        let value = value.with_context(|| format!("no {key} in {meaning}"))?;
        Ok(value.try_into()?)
    };
    let user_timeout = match &meaning["user_timeout_ms"] {
        Value::Null => 0,
        _ => number("user_timeout_ms")?,
    };
    Ok(Options {
        keepalive: meaning["keepalive"].as_bool().context("no keepalive")?,
        idle: number("idle_s")?,
        interval: number("interval_s")?,
        probes: number("probes")?,
        user_timeout,
    })
}

/// A client in a cgroup of its own and a server in another.
struct Connected {
    client: Probe,
    socket: Socket,
    local: SocketAddr,
    remote: SocketAddr,
    server: Probe,
    listener: Socket,
}

impl Connected {
    /// The client connects once this was done with the address of the server.
    fn after<T>(
        client: &Cgroup,
        server: &Cgroup,
        address: &str,
        done: impl FnOnce(SocketAddr) -> Result<T>,
    ) -> Result<(T, Self)> {
        let mut server = Probe::start(Program::Static, server)?;
        let mut client = Probe::start(Program::Static, client)?;
        let (listener, remote) = server.listener(address)?;
        let done = done(remote)?;
        let socket = client.connected(remote)?;
        server.accept(listener)?;
        let local = client.name(socket)?;
        let connected = Self {
            client,
            socket,
            local,
            remote,
            server,
            listener,
        };
        Ok((done, connected))
    }

    /// Another one, to another address of the same port.
    fn connect(&mut self, address: &str) -> Result<(Socket, SocketAddr)> {
        let (listener, remote) = self.server.listener(address)?;
        self.listener = listener;
        let socket = self.client.connected(remote)?;
        self.server.accept(listener)?;
        Ok((socket, remote))
    }
}

/// A cgroup with several policies for some remote ends, and an agent that
/// enforces them on a client below it.
struct Web {
    root: Cgroup,
    middle: Cgroup,
    leaf: Cgroup,
    _server: Cgroup,
    agent: Agent,
    connected: Connected,
}

impl Web {
    fn start() -> Result<Self> {
        let root = Cgroup::new()?;
        let web = root.child("web")?;
        let (leaf, server) = (web.child("leaf")?, root.child("server")?);
        let policy = |name: &str, rules: &str| {
            format!(
                "[[policy]]\nname = \"{name}\"\ncgroup = \"{}\"\n{rules}\n",
                web.path()
            )
        };
        let start = |remote: SocketAddr| {
            let near = format!(
                "remote = \"127.0.0.1\"\nport = {}\nidle = \"73s\"\ninterval = \"7s\"\n\
                 user-timeout = \"derive\"",
                remote.port()
            );
            let config = [
                "[default]\nidle = \"71s\"\nprobes = 4\n".to_owned(),
                policy("far", "remote = \"10.0.0.0/8\""),
                policy("wide", "remote = \"127.0.0.0/8\"\nidle = \"72s\""),
                policy("excepted", "remote = [\"0.0.0.0/0\", \"!127.0.0.0/24\"]"),
                policy("other-port", "port = 9"),
                policy("near", &near),
            ];
            Agent::start(&root, &config.concat())
        };
        let (agent, connected) = Connected::after(&leaf, &server, "127.0.0.1:0", start)?;
        Ok(Self {
            root,
            middle: web,
            leaf,
            _server: server,
            agent,
            connected,
        })
    }
}

#[test]
fn agrees_with_the_kernel_and_says_why() -> Result<()> {
    require!(Need::Program("ss"));
    let mut web = Web::start()?;
    let connected = &mut web.connected;
    let has = connected.client.options(connected.socket)?;
    let expected = Options::on(73, 7, 4).user_timeout(73_000 + 4 * 7000);
    assert_eq!(has, expected, "what the policy says");
    let left = timer(None, &between(connected.local, connected.remote))?;
    let left = left.context("no timer")?;
    assert!(left.is_fresh_keepalive(73), "{left:?}");
    let pid = connected.client.id().to_string();
    let (local, remote) = (connected.local.to_string(), connected.remote.to_string());
    let near = listed(&mut connected.client, connected.socket)?;
    let walk = json!([
        { "cgroup": web.leaf.path(), "policies": [] },
        { "cgroup": web.middle.path(), "policies": [
            { "name": "far", "claims_by": "its path", "verdict": "not-for",
              "reason": "the address is in none of its networks" },
            { "name": "wide", "claims_by": "its path", "verdict": "beaten", "reason": null },
            { "name": "excepted", "claims_by": "its path", "verdict": "not-for",
              "reason": "the address is in its exception 127.0.0.0/24" },
            { "name": "other-port", "claims_by": "its path", "verdict": "not-for",
              "reason": "the port is none of its ports" },
            { "name": "near", "claims_by": "its path", "verdict": "claims", "reason": null },
        ] },
    ]);
    for arguments in [
        &["--pid", &pid, "--remote", &remote][..],
        &["--cgroup", web.leaf.path(), "--remote", &remote],
        &["--socket", &local, &remote],
    ] {
        let explained = explained(arguments)?;
        assert_eq!(options(&explained["holds"])?, has, "{arguments:?}");
        assert_eq!(options(&explained["wants"])?, has, "{arguments:?}");
        assert_eq!(explained["policy"], near["policy"], "{arguments:?}");
        assert_eq!(explained["cgroup"], near["cgroup"], "{arguments:?}");
        assert_eq!(explained["agent"], web.agent.id(), "{arguments:?}");
        assert_eq!(explained["enforced"], true, "{arguments:?}");
        assert_eq!(explained["walk"], walk, "{arguments:?}");
        assert_eq!(explained["holds"]["first_probe_s"], 73, "{arguments:?}");
        let dead_after = expected.user_timeout;
        assert_eq!(explained["holds"]["dead_after_ms"], dead_after);
    }
    let said = explain(&["--socket", &local, &remote])?.stdout;
    for words in [
        "policy far is not for it: the address is in none of its networks",
        "policy near claims the connection",
        "idle          1m 13s, set by the policy",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    web.agent.stop()?;
    Ok(())
}

/// Policies that are for some remote ends are told of, and what is left claims.
#[test]
fn without_a_remote_end() -> Result<()> {
    require!();
    let mut web = Web::start()?;
    let pid = web.connected.client.id().to_string();
    let (other, other_remote) = web.connected.connect("[::1]:0")?;
    let has = web.connected.client.options(other)?;
    for arguments in [
        &["--pid", &pid][..],
        &["--pid", &pid, "--remote", &other_remote.to_string()],
    ] {
        let explained = explained(arguments)?;
        assert_eq!(explained["policy"], "default", "{arguments:?}");
        assert_eq!(options(&explained["holds"])?, has, "{arguments:?}");
        let walk = explained["walk"].as_array().context("no walk")?;
        let claims = json!({
            "name": "default",
            "claims_by": "everything that is governed",
            "verdict": "claims",
            "reason": null,
        });
        assert_eq!(
            walk.last().context("no walk")?,
            &json!({ "cgroup": web.root.path(), "policies": [claims] })
        );
        let expected = if arguments.len() == 2 {
            "depends"
        } else {
            "not-for"
        };
        let passed_by = walk[1]["policies"].as_array().context("no policies")?;
        assert!(
            passed_by.len() == 5 && passed_by.iter().all(|policy| policy["verdict"] == expected),
            "{arguments:?}: {walk:#?}"
        );
    }
    let said = explain(&["--pid", &pid])?.stdout;
    let words = "policy far claims it if its ends are 10.0.0.0/8";
    assert!(said.contains(words), "{said}");
    web.agent.stop()?;
    Ok(())
}

/// The config that is named decides, whatever agents there are.
#[test]
fn a_config_before_any_agent_has_it() -> Result<()> {
    require!(Need::Program("ip"));
    let root = Cgroup::new()?;
    let (near, far) = Netns::pair()?;
    let config = format!(
        "[[policy]]\nname = \"link\"\ncgroup = \"{0}\"\nremote = \"10.99.0.0/24\"\n\
         idle = \"41s\"\n\n\
         [[policy]]\nname = \"everywhere\"\nremote = \"10.99.77.2\"\nidle = \"42s\"\n",
        root.path()
    );
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    fs::write(&file, &config)?;
    let path = file.path().to_str().context("no text")?;
    let mut server = Probe::start(Program::Static, &far)?;
    let (_, remote) = server.listener("10.99.0.2:0")?;
    let remote = remote.to_string();
    let at_root = explained(&["--config", path, "--remote", "10.99.77.2:1"])?;
    let here = explained(&[
        "--config",
        path,
        "--cgroup",
        root.path(),
        "--remote",
        &remote,
    ])?;
    for (explained, cgroup, policy, line) in [
        (&at_root, "/", "everywhere", 7),
        (&here, root.path(), "link", 1),
    ] {
        assert_eq!(explained["cgroup"], cgroup);
        assert_eq!(explained["policy"], policy);
        assert_eq!(explained["agent"], Value::Null);
        assert_eq!(explained["written"], format!("{path}:{line}"));
    }
    assert_eq!(here["walk"].as_array().map(Vec::len), Some(1), "{here:#}");
    // And then an agent has it.
    let agent = Agent::start_everywhere(&config)?;
    let mut client = Probe::start(Program::Static, (&root, &near))?;
    let socket = client.connected(remote.parse()?)?;
    assert_eq!(client.options(socket)?, options(&here["holds"])?);
    agent.stop()?;
    let elsewhere = explained(&["--config", path, "--remote", "10.99.1.2:1"])?;
    assert_eq!(elsewhere["policy"], Value::Null);
    assert_eq!(options(&elsewhere["holds"])?, Options::UNTOUCHED);
    assert_eq!(elsewhere["holds"]["first_probe_s"], Value::Null);
    Ok(())
}

#[test]
fn what_a_dry_run_would_do() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let config = "[default]\nenforce = false\nidle = { at-most = \"90s\" }\nprobes = 5\n";
    let mut agent = Agent::start(&root, config)?;
    let mut probe = Probe::start(Program::Static, &root)?;
    let (socket, accepted) = probe.connection()?;
    probe.set_all(socket, &[(Idle, 100), (Keepalive, 1)])?;
    let has = probe.options(socket)?;
    let (local, remote) = (probe.name(socket)?, probe.name(accepted)?);
    let before = explained(&["--socket", &local.to_string(), &remote.to_string()])?;
    let new = explained(&["--cgroup", root.path()])?;
    for explained in [&before, &new] {
        assert_eq!(explained["policy"], "default");
        assert_eq!(explained["enforced"], false);
    }
    assert_eq!(options(&before["holds"])?, has);
    assert_eq!(options(&new["holds"])?, Options::UNTOUCHED);
    assert_eq!(probe.options(accepted)?, Options::UNTOUCHED);
    let would = listed(&mut probe, socket)?["would"].clone();
    let said = explain(&["--cgroup", root.path()])?.stdout;
    assert!(said.contains("in dry run: nothing is set"), "{said}");
    agent.reload(&config.replace("enforce = false", "enforce = true"))?;
    for (explained, socket) in [(&before, socket), (&new, accepted)] {
        assert_eq!(options(&explained["wants"])?, probe.options(socket)?);
    }
    for key in ["keepalive", "idle_s", "interval_s", "probes"] {
        assert_eq!(would[key], before["wants"][key], "{key}");
    }
    agent.stop()?;
    Ok(())
}

#[test]
fn changes_nothing() -> Result<()> {
    require!(Need::Program("ss"));
    let root = Cgroup::new()?;
    // It would give another idle time to what it is asked about.
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    fs::write(&file, "[default]\nidle = { exactly = \"30s\" }\n")?;
    let path = file.path().to_str().context("no text")?;
    let mut probe = Probe::start(Program::Static, &root)?;
    let (socket, accepted) = probe.connection()?;
    probe.set_all(socket, &[(Idle, 100), (Keepalive, 1)])?;
    let (local, remote) = (probe.name(socket)?, probe.name(accepted)?);
    let filter = between(local, remote);
    let look = |probe: &mut Probe| -> Result<_> {
        let options = (probe.options(socket)?, probe.options(accepted)?);
        let left = timer(None, &filter)?.context("no timer")?.left;
        Ok((options, left))
    };
    let before = look(&mut probe)?;
    std::thread::sleep(Duration::from_millis(1100));
    let pid = probe.id().to_string();
    for arguments in [
        &["--socket", &local.to_string(), &remote.to_string()][..],
        &["--pid", &pid],
        &["--cgroup", root.path(), "--remote", &remote.to_string()],
    ] {
        let explained = explained(&[arguments, &["--config", path]].concat())?;
        assert_eq!(explained["wants"]["idle_s"], 30, "{arguments:?}");
    }
    let after = look(&mut probe)?;
    assert_eq!(before.0, after.0);
    assert!(after.1 < before.1, "the timer began anew: {after:?}");
    Ok(())
}

#[test]
fn the_sysctls_of_the_process() -> Result<()> {
    require!(Need::Program("ip"));
    let (root, netns) = (Cgroup::new()?, Netns::named()?);
    netns.sysctl("net/ipv4/tcp_keepalive_time", "777")?;
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    fs::write(&file, "[default]\nkeepalive = \"off\"\n")?;
    let path = file.path().to_str().context("no text")?;
    let mut probe = Probe::start(Program::Static, (&root, &netns))?;
    let (socket, accepted) = probe.connection()?;
    let (local, remote) = (probe.name(socket)?, probe.name(accepted)?);
    let has = probe.options(socket)?;
    assert_eq!(has.idle, 777);
    for arguments in [
        &["--pid", &probe.id().to_string()][..],
        &["--socket", &local.to_string(), &remote.to_string()],
    ] {
        let explained = explained(&[arguments, &["--config", path]].concat())?;
        assert_eq!(options(&explained["holds"])?, has, "{arguments:?}");
        assert_eq!(explained["holds"]["idle_source"], "sysctl");
    }
    Ok(())
}

#[test]
fn wrong_words() -> Result<()> {
    require!();
    for (arguments, code, word) in [
        (&[][..], 2, "--pid"),
        (&["--json"], 2, "--cgroup"),
        (&["--pid", "x"], 2, "x"),
        (&["--pid", "1", "--cgroup", "/"], 2, "--cgroup"),
        (
            &["--pid", "1", "--socket", "10.0.0.1:1", "10.0.0.2:2"],
            2,
            "--socket",
        ),
        (&["--socket", "10.0.0.1:1"], 2, "--socket"),
        (&["--socket", "10.0.0.1:1", "10.0.0.2"], 2, "10.0.0.2"),
        (&["--remote", "10.0.0.2"], 2, "10.0.0.2"),
        (&["--remote", "host:80"], 2, "host:80"),
        (&["--remote", "10.0.0.2:65536"], 2, "65536"),
        (&["--colour"], 2, "--colour"),
        (&["--pid", "4194305"], 1, "is there a process 4194305?"),
        (&["--cgroup", "a/b"], 1, "starts with `/`"),
        (&["--cgroup", "/a/../b"], 1, "has no `..`"),
        (
            &["--socket", "192.0.2.1:1", "192.0.2.2:2"],
            1,
            "no connection goes from 192.0.2.1:1 to 192.0.2.2:2",
        ),
        (
            &["--cgroup", "/", "--config", "/no/such.toml"],
            1,
            "/no/such.toml",
        ),
    ] {
        let said = explain(arguments)?;
        assert_eq!(said.code, Some(code), "{arguments:?}: {}", said.stderr);
        assert!(said.stderr.contains(word), "{arguments:?}: {}", said.stderr);
        assert!(!said.stderr.contains("panicked"), "{}", said.stderr);
        assert_eq!(said.stdout, "", "{arguments:?}");
    }
    // It may be one that is to be made.
    let said = explain(&["--cgroup", "/no-such-cgroup"])?;
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    let warning = "cgroup /no-such-cgroup does not exist";
    assert!(said.stderr.contains(warning), "{}", said.stderr);
    Ok(())
}
