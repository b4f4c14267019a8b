//! Metrics and health of a running agent, as Prometheus and promtool see them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Need, Netns, Place, Probe, Process, Program, bpftool, output, require,
    wait_until,
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
        let mut command = Place::from(self.netns).command("curl");
        command.args(["--silent", "--get", "--data-urlencode"]);
        command.arg(format!("query={query}"));
        command.arg(format!("http://{PROMETHEUS}/api/v1/query"));
        let text = output(&mut command, LIMIT)?.stdout;
        let answer: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        let value = answer["data"]["result"][0]["value"][1].as_str();
        Ok(value.unwrap_or_default().to_owned())
    }
}

/// The rules that are shipped.
fn rules() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/monitoring/keepalive.rules.yml")
}

#[test]
fn promtool_accepts_the_rules() -> Result<()> {
    require!(Need::Program("promtool"));
    let mut command = Command::new("promtool");
    let output = output(command.args(["check", "rules"]).arg(rules()), LIMIT)?;
    ensure!(output.code == Some(0), "{}{}", output.stdout, output.stderr);
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
    let established = "keepalive_connections_established_total{policy=\"default\",\
                       mode=\"enforced\",outcome=\"changed\"}";
    for (query, value) in [
        ("up", "1"),
        ("keepalive_in_force", "1"),
        (established, "2"),
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
