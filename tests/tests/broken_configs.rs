//! Broken configurations, made from good ones by small changes: each is refused
//! with its file and line, and none changes what holds. The agent's unit tests do
//! the same to a thousand, without the program around it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Options, Output, Probe, Program, agent_command, output, require, wait_until,
};

const LIMIT: Duration = Duration::from_secs(20);

/// How many have to be refused.
const BROKEN: usize = 50;

/// Most changes keep a configuration from being right; this many are tried.
const TRIED: usize = 4 * BROKEN;

/// Good configurations. The last is for the lines of a drop-in.
const GOOD: [&str; 3] = [
    include_str!("../../keepalive-agent/keepalive.example.toml"),
    "default.user-timeout = 'derive'\ndefault.idle = {\n  at-most = '5m',\n}\n\
     policy = [\n  { name = 'a', cgroup = ['/a', '/b/*'] },\n  \
     { name = 'b', cgroup = '/', probes.exactly = 3, path = '350s' },\n]\n",
    "[[policy]]\nname = \"a\"\ncgroup = \"/a\"\nremote = [\"10.0.0.0/8\", \"!10.1.0.0/16\"]\n\
     port = [443, \"8000-8999\"]\nidle = { default = \"60s\", at-least = \"20s\", at-most = \"2m\" }\n\
     enforce = false\n\n[[policy]]\nname = \"b\"\nport = 5432\npath = \"aws-nat\"\nprobes = 5\n",
];

/// What changes the meaning of a configuration when it gets into a wrong place.
const PIECES: [&str; 40] = [
    "\"",
    "'",
    "\"\"\"",
    "[",
    "]",
    "[[",
    "{",
    "}",
    "=",
    ".",
    ",",
    "#",
    "\n",
    "\r",
    "\\",
    "\0",
    "\u{feff}",
    "é",
    "0",
    "-1",
    "128",
    "65536",
    "nan",
    "true",
    "1979-05-27",
    "60s",
    "\"0s\"",
    "\"derive\"",
    "[default]\n",
    "[[policy]]\n",
    "[policy]\n",
    "idle = ",
    "probes = ",
    "name = ",
    "cgroup = ",
    "remote = ",
    "port = ",
    "path = ",
    "/a/../b",
    "10.0.0.0/33",
];

/// The same numbers in every run (xorshift64*, Vigna 2016).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        usize::try_from(number).unwrap_or_default() % end.max(1)
    }
}

/// One of the good ones after a few changes.
fn changed(numbers: &mut Numbers) -> String {
    let good = GOOD[numbers.below(GOOD.len())];
    let is_said = |line: &&str| !line.starts_with('#') && !line.trim().is_empty();
    let mut text: Vec<char> = good
        .split_inclusive('\n')
        .filter(is_said)
        .flat_map(str::chars)
        .collect();
    for _ in 0..=numbers.below(3) {
        let at = numbers.below(text.len() + 1);
        match numbers.below(4) {
            0 | 1 => {
                let piece = PIECES[numbers.below(PIECES.len())];
                text.splice(at..at, piece.chars());
            }
            2 => {
                let end = text.len().min(at + 1 + numbers.below(12));
                text.drain(at..end);
            }
            _ => text.truncate(at),
        }
    }
    text.into_iter().collect()
}

/// What the program says about a configuration: nothing, or why it is refused.
fn judged(config: &Path, subcommand: &[&str]) -> Result<Output> {
    let mut command = agent_command();
    command.args(subcommand).arg("--config").arg(config);
    output(&mut command, LIMIT)
}

/// A refusal names the file and a line that it has.
fn names_a_line(said: &str, file: &Path, text: &str) -> bool {
    let place = format!("{}:", file.display());
    let lines = 1 + text.matches('\n').count();
    said.lines().any(|said| {
        let line = said.split_once(&place).map(|(_, rest)| rest);
        let line = line.and_then(|rest| rest.split_once(':')?.0.parse().ok());
        line.is_some_and(|line: usize| (1..=lines).contains(&line))
    })
}

fn broken() -> Result<Vec<String>> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("changed.toml");
    let mut numbers = Numbers(0x6b65_6570_616c_6976);
    let mut broken = Vec::new();
    for _ in 0..TRIED {
        let text = changed(&mut numbers);
        fs::write(&config, &text)?;
        let judged = judged(&config, &["policy", "show"])?;
        match judged.code {
            Some(0) => {}
            Some(1) => {
                let is_named = names_a_line(&judged.stderr, &config, &text);
                assert!(is_named, "{text}\n{judged:?}");
                broken.push(text);
            }
            _ => panic!("{text}\n{judged:?}"),
        }
        if broken.len() == BROKEN {
            return Ok(broken);
        }
    }
    panic!("of {TRIED} only {} were refused", broken.len());
}

#[test]
fn broken_configurations_change_nothing() -> Result<()> {
    require!();
    let broken = broken()?;

    let directory = tempfile::tempdir()?;
    let main = directory.path().join("main.toml");
    let drop_ins = directory.path().join("conf.d");
    for text in broken.iter().step_by(5) {
        fs::write(&main, text)?;
        let checked = judged(&main, &["check"])?;
        assert_eq!(checked.code, Some(1), "{text}\n{checked:?}");
        let said = checked.stderr + &checked.stdout;
        assert!(names_a_line(&said, &main, text), "{text}\n{said}");
    }

    fs::write(&main, "[default]\nidle = \"71s\"\n")?;
    fs::create_dir(&drop_ins)?;
    let arguments = [
        "--config".as_ref(),
        main.as_os_str(),
        "--drop-in-dir".as_ref(),
        drop_ins.as_os_str(),
    ];
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start_on(&cgroup, &arguments, &["env"])?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let mut before = None;
    for (number, text) in broken.iter().enumerate() {
        let path = drop_ins.join(format!("{number}.toml"));
        let hidden = drop_ins.join(".new");
        fs::write(&hidden, text)?;
        fs::rename(&hidden, &path)?;
        if let Some(before) = before.replace(path.clone()) {
            fs::remove_file(before)?;
        }
        wait_until(LIMIT, "the agent to refuse it", || {
            Ok(names_a_line(&agent.said(), &path, text))
        })
        .with_context(|| format!("{text}\n{}", agent.said()))?;
        let (connecting, _) = probe.connection()?;
        assert_eq!(probe.options(connecting)?, Options::on(71, 10, 6), "{text}");
    }
    agent.not_reloaded(Duration::ZERO)?;
    let said = agent.said();
    ensure!(!said.contains("panicked"), "{said}");

    fs::remove_file(before.context("none was tried")?)?;
    fs::write(drop_ins.join("good.toml"), "[default]\nidle = \"72s\"\n")?;
    agent.reloaded()?;
    let (connecting, _) = probe.connection()?;
    assert_eq!(probe.options(connecting)?, Options::on(72, 10, 6));
    assert_eq!(agent.stop()?.code, Some(0));
    Ok(())
}
