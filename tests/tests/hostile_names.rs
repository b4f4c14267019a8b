//! Cgroups and processes may be called anything: such a cgroup is governed,
//! listed and explained like any other, and nothing that is printed harms the
//! terminal or whoever reads it.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Output, Place, Probe, Program, agent_command, output, require, wait_until,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

/// Names of cgroups and of the processes in them.
const NAMES: [(&[u8], &[u8]); 9] = [
    (b"title\x1b]0;x\x07\x1b[31m\x1b[2K", b"\x1b[31mred\x07"),
    (b"bad\xff\xfe", b"\xff\xfebin"),
    ("bidi\u{202e}gnp.exe".as_bytes(), "\u{202e}rev".as_bytes()),
    ("c1\u{9b}31m".as_bytes(), "\u{9b}csi".as_bytes()),
    ("line\u{2028}sep".as_bytes(), b"two\nlines"),
    (b"tab\tcell", b"tab\tx"),
    (b"quote\"back\\slash", b"q\"\\"),
    (b"return\rOVER", b"cr\rx"),
    ("bytes:é%41".as_bytes(), b"bytes:%41"),
];

/// A process in a cgroup of such a name, with a connection to itself.
struct Tenant {
    cgroup: Cgroup,
    probe: Probe,
    ends: [SocketAddr; 2],
    idle: i32,
}

impl Tenant {
    fn start(above: &Cgroup, name: &[u8], comm: &[u8]) -> Result<Self> {
        let cgroup = above.child(OsStr::from_bytes(name))?;
        // A process is called like the file that was executed, also if that is
        // a link.
        let directory = tempfile::tempdir()?;
        let program = directory.path().join(OsStr::from_bytes(comm));
        symlink(Program::Static.path()?, &program)?;
        let mut probe = Probe::start_by(&mut Place::from(&cgroup).command(&program))?;
        let (connecting, accepting) = probe.connection()?;
        let (here, there) = (probe.options(connecting)?, probe.options(accepting)?);
        assert_eq!(here, there);
        let ends = [probe.name(connecting)?, probe.name(accepting)?];
        Ok(Self {
            cgroup,
            probe,
            ends,
            idle: here.idle,
        })
    }
}

/// What a terminal acts upon, or what misleads a reader.
fn is_harmful(character: char) -> bool {
    let code = u32::from(character);
    (character.is_control() && character != '\n')
        // What stands for bytes that are not UTF-8.
        || matches!(code, 0x61c | 0x200e | 0x200f | 0xfffd)
        || (0x2028..=0x202e).contains(&code)
        || (0x2066..=0x2069).contains(&code)
}

fn ensure_harmless(what: &str, text: &str) -> Result<()> {
    ensure!(!text.contains(is_harmful), "{what} prints {text:?}");
    Ok(())
}

/// Runs a command that succeeds.
fn run(arguments: &[&str]) -> Result<Output> {
    let done = output(agent_command().args(arguments), LIMIT)?;
    let what = arguments.join(" ");
    ensure!(done.code == Some(0), "{what}: {}", done.stderr);
    ensure_harmless(&what, &done.stdout)?;
    ensure_harmless(&what, &done.stderr)?;
    Ok(done)
}

/// The name in a string of JSON, as docs/sockets.md says.
fn name(json: &Value) -> Result<Vec<u8>> {
    let text = json.as_str().context("no string")?;
    let Some(escaped) = text.strip_prefix("bytes:") else {
        return Ok(text.as_bytes().to_vec());
    };
    let mut parts = escaped.split('%');
    let mut name = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        name.push(u8::from_str_radix(&part[..2], 16)?);
        name.extend(part[2..].bytes());
    }
    Ok(name)
}

#[test]
fn any_name_is_governed_listed_and_explained_without_harm() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let before = NAMES[..4]
        .iter()
        .map(|(cgroup, _)| root.child(OsStr::from_bytes(cgroup)));
    let before = before.collect::<Result<Vec<_>>>()?;
    let config = tempfile::NamedTempFile::with_suffix(".toml")?;
    let policy = format!(
        "[[policy]]\nname = 'tenants'\ncgroup = '{}/**'\nidle = '71s'\n",
        root.path()
    );
    std::fs::write(&config, policy)?;
    let path = config.path().to_str().context("a path")?;
    let agent = Agent::start_on(&root, &["--verbose", "--config", path], &["env"])?;
    assert_eq!(agent.started()["policies"][0]["cgroups"], 4);
    // Those that were there, made again, and those that come while it runs.
    drop(before);
    let mut tenants = Vec::new();
    for (cgroup, comm) in NAMES {
        tenants.push(Tenant::start(&root, cgroup, comm).with_context(|| format!("{cgroup:?}"))?);
    }
    for tenant in &tenants {
        let name = tenant.cgroup.directory().file_name();
        assert_eq!(tenant.idle, 71, "{name:?}");
    }

    let table = run(&["sockets", "--cgroup", root.path()])?;
    let rows = table
        .stdout
        .lines()
        .filter(|line| line.contains("127.0.0.1:"));
    assert_eq!(rows.count(), 2 * NAMES.len(), "{}", table.stdout);
    run(&["sockets", "--cgroup", root.path(), "--summary"])?;
    let listed = run(&["sockets", "--cgroup", root.path(), "--json"])?;
    let records: Vec<Value> = listed
        .stdout
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    for (tenant, (cgroup, comm)) in tenants.iter().zip(NAMES) {
        let own = records
            .iter()
            .filter(|record| record["pid"] == tenant.probe.id());
        assert_eq!(own.clone().count(), 2, "{cgroup:?}: {}", listed.stdout);
        for record in own {
            let path = [root.path().as_bytes(), b"/", cgroup].concat();
            assert_eq!(name(&record["cgroup"])?, path);
            assert_eq!(name(&record["comm"])?, comm);
            assert_eq!(record["policy"], "tenants");
        }
        let pid = tenant.probe.id().to_string();
        let [here, there] = tenant.ends.map(|end| end.to_string());
        for what in [&["--pid", &pid][..], &["--socket", &here, &there]] {
            let explained = run(&[&["explain"], what].concat())?;
            assert!(explained.stdout.contains("policy tenants"), "{explained:?}");
            let explained = run(&[&["explain", "--json"], what].concat())?;
            let record: Value = serde_json::from_str(&explained.stdout)?;
            assert_eq!(record["policy"], "tenants", "{cgroup:?}");
        }
    }
    drop(tenants);
    let finished = agent.stop()?;
    assert_eq!(
        finished.count("tenants", "seen"),
        2 * u64::try_from(NAMES.len())?
    );
    ensure_harmless("run", &finished.stderr)
}

/// Whatever a file is called and whatever is in it.
#[test]
fn files_and_what_is_in_them() -> Result<()> {
    require!();
    let directory = tempfile::tempdir()?;
    let file = directory
        .path()
        .join(OsStr::from_bytes(b"a\x1b[31m\nb\xff.toml"));
    for text in [
        &b"[default]\nidle = \"\xe2\x80\xae1m\"\n"[..],
        b"[default]\n\"i\\u001bd\\nle\" = 1\n",
        b"[default]\nidle = '1m\xc2\x9b'\n",
        b"\x1b[2J",
        b"[[policy]]\nname = 'a\xe2\x80\xaeb'\ncgroup = '/a\xe2\x80\xa8b'\n",
    ] {
        std::fs::write(&file, text)?;
        for json in [false, true] {
            let mut command = agent_command();
            command.arg("check").arg("--config").arg(&file);
            command.args(json.then_some("--json"));
            let done = output(&mut command, LIMIT)?;
            assert_eq!(done.code, Some(1), "{text:?}: {}", done.stdout);
            ensure_harmless("check", &done.stdout)?;
            ensure_harmless("check", &done.stderr)?;
        }
    }
    Ok(())
}

/// A name that is refused nowhere else must not end the agent either.
#[test]
fn a_cgroup_of_any_name_may_be_the_root() -> Result<()> {
    require!();
    let above = Cgroup::new()?;
    let root = above.child(OsStr::from_bytes(b"r\x1b[31m\xff"))?;
    let config = tempfile::NamedTempFile::with_suffix(".toml")?;
    std::fs::write(&config, "[default]\nidle = '72s'\n")?;
    let mut command = agent_command();
    command.args(["run", "--config"]).arg(config.path());
    command.arg("--cgroup").arg(root.directory());
    let mut agent = keepalive_tests::Process::start(
        command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped()),
    )?;
    wait_until(LIMIT, "the agent to enforce", || {
        Ok(Tenant::start(&root, b"x\xff", b"x")?.idle == 72)
    })?;
    agent.signal(rustix::process::Signal::TERM)?;
    let status = agent.wait(LIMIT)?;
    assert_eq!(status.code(), Some(0));
    Ok(())
}
