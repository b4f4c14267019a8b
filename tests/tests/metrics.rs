//! Metrics and health of a running agent, as Prometheus and promtool see them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Need, Netns, Place, Probe, Process, Program, Sockopt, Timer, bpftool, output,
    require, timers, wait_until,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

const AGENT: &str = "127.0.0.1:9464";
const PROMETHEUS: &str = "127.0.0.1:9090";

/// What is served in a namespace: text and status code.
fn get(netns: &Netns, address: &str, path: &str) -> Result<(String, String)> {
    let mut command = Place::from(netns).command("curl");
    command.args(["--silent", "--write-out", "\n%{http_code}"]);
    command.arg(format!("http://{address}{path}"));
    let output = output(&mut command, LIMIT)?;
    ensure!(
        output.code == Some(0),
        "curl: {} {}",
        output.stdout,
        output.stderr
    );
    let (text, code) = output.stdout.rsplit_once('\n').context("no code")?;
    Ok((text.to_owned(), code.to_owned()))
}

/// A Prometheus that scrapes the agent every second and has its rules.
struct Prometheus<'a> {
    netns: &'a Netns,
    _process: Process,
}

impl<'a> Prometheus<'a> {
    fn start(netns: &'a Netns, directory: &Path) -> Result<Self> {
        let config = directory.join("prometheus.yml");
        let rules = rules();
        std::fs::write(
            &config,
            format!(
                "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\n\
                 rule_files: [{}]\n\
                 scrape_configs:\n  - job_name: keepalive\n    static_configs:\n      \
                 - targets: [\"{AGENT}\"]\n",
                rules.display()
            ),
        )?;
        let mut command = Place::from(netns).command("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.join("data").display()
            ))
            .arg(format!("--web.listen-address={PROMETHEUS}"))
            .stderr(Stdio::null());
        let prometheus = Self {
            netns,
            _process: Process::start(&mut command)?,
        };
        wait_until(LIMIT, "Prometheus", || {
            Ok(prometheus.get("/-/ready").is_ok())
        })?;
        Ok(prometheus)
    }

    fn get(&self, path: &str) -> Result<String> {
        let (text, code) = get(self.netns, PROMETHEUS, path)?;
        ensure!(code == "200", "{path}: {code} {text}");
        Ok(text)
    }

    /// The value of an expression with one result; nothing where it has none.
    fn ask(&self, query: &str) -> Result<String> {
        let answer = self.answer(query)?;
        let value = answer["data"]["result"][0]["value"][1].as_str();
        Ok(value.unwrap_or_default().to_owned())
    }

    fn answer(&self, query: &str) -> Result<Value> {
        let mut command = Place::from(self.netns).command("curl");
        command.args(["--silent", "--get", "--data-urlencode"]);
        command.arg(format!("query={query}"));
        command.arg(format!("http://{PROMETHEUS}/api/v1/query"));
        let text = output(&mut command, LIMIT)?.stdout;
        let answer: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        ensure!(answer["status"] == "success", "{query}: {answer}");
        Ok(answer)
    }
}

/// What is shipped for monitoring.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../packaging/monitoring")
        .join(name)
}

fn rules() -> PathBuf {
    shipped("keepalive.rules.yml")
}

/// The queries of the dashboard, for whichever instance.
fn queries() -> Result<Vec<String>> {
    let dashboard = std::fs::read_to_string(shipped("keepalive.dashboard.json"))?;
    let dashboard: Value = serde_json::from_str(&dashboard)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let targets = panels
        .iter()
        .filter_map(|panel| panel["targets"].as_array())
        .flatten();
    let queries = targets.map(|target| {
        let query = target["expr"].as_str().context("no query")?;
        Ok(query
            .replace("$instance", ".*")
            .replace("$__rate_interval", "1m"))
    });
    queries.collect()
}

#[test]
fn promtool_accepts_the_rules() -> Result<()> {
    require!(Need::Program("promtool"));
    for (what, file) in [
        ("check", rules()),
        // When they fire.
        ("test", shipped("keepalive.rules.test.yml")),
    ] {
        let mut command = Command::new("promtool");
        let output = output(command.args([what, "rules"]).arg(file), LIMIT)?;
        ensure!(output.code == Some(0), "{}{}", output.stdout, output.stderr);
    }
    Ok(())
}

#[test]
fn a_prometheus_scrapes_it_and_health_is_by_evidence() -> Result<()> {
    require!(
        Need::Program("bpftool"),
        Need::Program("curl"),
        Need::Program("ip"),
        Need::Program("prometheus"),
    );
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    netns.run("ip", "link set lo up")?;
    let directory = tempfile::tempdir()?;
    let inside = netns.enter_argument();
    let config = "[default]\nidle = \"30s\"\n";
    let mut agent = Agent::start_by(
        &cgroup,
        config,
        &["nsenter", &inside, "--"],
        &["--metrics", AGENT],
    )?;
    agent.swept()?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &netns))?;
    ours.connection()?;

    let prometheus = Prometheus::start(&netns, directory.path())?;
    let established = |direction: &str| {
        format!(
            "keepalive_connections_established_total{{policy=\"default\",mode=\"enforced\",\
             direction=\"{direction}\",outcome=\"changed\"}}"
        )
    };
    for (query, value) in [
        ("up", "1"),
        ("keepalive_in_force", "1"),
        (&established("connecting"), "1"),
        (&established("accepting"), "1"),
        ("keepalive_connections{state=\"protected\"}", "2"),
        ("keepalive_connections{state=\"unprotected\"}", "0"),
        ("keepalive_at_risk_connections{path=\"azure-lb\"}", "0"),
        ("keepalive_sweeps_total{outcome=\"succeeded\"}", "1"),
        ("keepalive_reloads_total{outcome=\"failed\"}", "0"),
        ("count(keepalive_build_info)", "1"),
        (
            "keepalive_silence_before_death_seconds_count{cause=\"probes\"}",
            "0",
        ),
        ("keepalive_map_entries{map=\"CGROUPS\"}", "1"),
        ("keepalive_map_capacity{map=\"CGROUPS\"}", "32768"),
        // None of the alerts fires.
        ("count(ALERTS) or vector(0)", "0"),
    ] {
        wait_until(LIMIT, query, || Ok(prometheus.ask(query)? == value))
            .with_context(|| format!("it is {:?}", prometheus.ask(query)))?;
    }
    ensure!(
        prometheus
            .get("/api/v1/rules")?
            .contains("\"health\":\"ok\"")
    );
    for query in queries()? {
        prometheus.answer(&query)?;
    }

    wait_until(LIMIT, "it to be ready", || {
        Ok(get(&netns, AGENT, "/readyz")?.1 == "200")
    })?;
    assert_eq!(
        get(&netns, AGENT, "/healthz")?,
        ("ok\n".to_owned(), "200".to_owned())
    );
    // Somebody takes the program off: the agent lives, and is not healthy.
    let links = bpftool(&["link", "show"])?;
    let id = cgroup.id()?;
    let mut links = links.as_array().context("no links")?.iter();
    let link = links
        .find(|link| link["cgroup_id"] == id)
        .context("no link")?;
    bpftool(&["link", "detach", "id", &link["id"].to_string()])?;
    wait_until(LIMIT, "it to be ill", || {
        Ok(get(&netns, AGENT, "/healthz")?.1 == "503")
    })?;
    Ok(())
}

/// What is served for these samples on a socket of the agent's own.
fn samples(socket: &str, names: &[&str]) -> Result<Vec<Option<u64>>> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--unix-socket", socket, "http://agent/metrics"]);
    let served = output(&mut curl, LIMIT)?.stdout;
    let value = |name: &&str| {
        let mut lines = served.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map(str::parse).transpose().map_err(Into::into)
    };
    names.iter().map(value).collect()
}

#[test]
fn connections_are_those_that_ss_sees() -> Result<()> {
    require!(
        Need::Program("curl"),
        Need::Program("ip"),
        Need::Program("ss")
    );
    let cgroup = Cgroup::new()?;
    let left = cgroup.child("left")?;
    let (near, far) = Netns::pair()?;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("metrics.sock");
    let socket = socket.to_str().context("a path in UTF-8")?;
    let config = format!(
        "[default]\nidle = \"30s\"\n[[policy]]\nname = \"left\"\ncgroup = \"{}\"\nignore = true\n",
        left.path()
    );
    let mut agent = Agent::start_by(&cgroup, &config, &["env"], &["--metrics", socket])?;
    agent.swept()?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &near))?;
    let mut alone = Probe::start(Program::Static, (&left, &near))?;
    let mut outside = Probe::start(Program::Static, &near)?;
    let mut theirs = Probe::start(Program::Static, &far)?;
    let (_, address) = theirs.listener("10.99.0.2:0")?;
    let (listener, own) = ours.listener("10.99.0.1:0")?;
    let long = ours.connected(address)?;
    // Longer than what half of the paths remember.
    ours.set(long, Sockopt::Idle, 340)?;
    ours.connected(address)?;
    theirs.connected(own)?;
    ours.accept(listener)?;
    // It waits to be accepted: no process holds it yet.
    theirs.connected(own)?;
    // Within the machine nothing forgets them.
    ours.connection()?;
    for _ in 0..3 {
        alone.connected(address)?;
    }
    // Not below the agent's cgroup.
    let bystander = outside.connected(address)?;
    let bystander = outside.name(bystander)?;

    let filter = format!("src 10.99.0.1 and not src {bystander}");
    let seen = timers(Some(&near), &filter)?;
    let is_protected = |timer: &&Option<Timer>| {
        timer
            .as_ref()
            .is_some_and(|timer| timer.kind == "keepalive")
    };
    let protected = seen.iter().filter(is_protected).count() as u64;
    let unprotected = seen.len() as u64 - protected;
    assert_eq!((protected, unprotected), (4, 3));
    let within = timers(Some(&near), "src 127.0.0.1")?.len() as u64;
    let at_risk = |path: &str| format!("keepalive_at_risk_connections{{path=\"{path}\"}}");
    let [nat, nlb, azure, gcp, ipvs] =
        ["aws-nat", "aws-nlb", "azure-lb", "gcp", "ipvs"].map(at_risk);
    let names = [
        "keepalive_connections{policy=\"default\",state=\"protected\"}",
        "keepalive_connections{policy=\"default\",state=\"unprotected\"}",
        "keepalive_connections{policy=\"left\",state=\"protected\"}",
        "keepalive_connections{policy=\"left\",state=\"unprotected\"}",
        &nat,
        &nlb,
        &azure,
        &gcp,
        &ipvs,
        "keepalive_connections_missed_namespaces",
    ];
    let forgotten = unprotected + 1;
    let expected = [
        protected + within,
        0,
        0,
        unprotected,
        forgotten,
        forgotten,
        forgotten,
        unprotected,
        unprotected,
        0,
    ];
    assert_eq!(samples(socket, &names)?, expected.map(Some));

    // What was counted holds for a while, and not for ever; a config that is not
    // taken changes nothing of it.
    agent.reload_refused("[default]\nidle = \"never\"\n")?;
    alone.finish()?;
    wait_until(LIMIT, "it to be counted again", || {
        Ok(samples(socket, &names)?[3] == Some(0))
    })?;
    let reloads = ["succeeded", "failed"]
        .map(|outcome| format!("keepalive_reloads_total{{outcome=\"{outcome}\"}}"));
    let reloads = reloads.each_ref().map(String::as_str);
    // The agent may have seen the change by itself before it was asked to look.
    let reloads = samples(socket, &reloads)?;
    assert!(
        reloads[0] == Some(0) && matches!(reloads[1], Some(1 | 2)),
        "{reloads:?}"
    );
    Ok(())
}

/// As systemd does it: a socket as descriptor 3, and the environment that says so.
const HAND_OVER: &str = "\
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
";

#[test]
fn on_a_socket_that_is_handed_over() -> Result<()> {
    require!(Need::Program("curl"), Need::Program("python3"));
    let cgroup = Cgroup::new()?;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("metrics.sock");
    let name = socket.to_str().context("a path in UTF-8")?;
    let by = ["python3", "-c", HAND_OVER, name];
    let _agent = Agent::start_by(&cgroup, "[default]\n", &by, &["--metrics", "systemd"])?;
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--unix-socket", name, "http://agent/metrics"]);
    let served = output(&mut curl, LIMIT)?.stdout;
    ensure!(served.contains("\nkeepalive_in_force 1\n"), "{served}");
    Ok(())
}

#[test]
fn without_a_socket_that_is_handed_over_it_says_so() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut command = keepalive_tests::agent_command();
    command.args(["run", "--metrics", "systemd", "--cgroup", cgroup.path()]);
    let ended = output(&mut command, LIMIT)?;
    assert_eq!(ended.code, Some(1));
    ensure!(
        ended.stderr.contains("systemd has handed over no socket"),
        "{}",
        ended.stderr
    );
    Ok(())
}
