//! What cannot work is said once and clearly, with exit code 1, and nothing is
//! left attached.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use keepalive_tests::{
    Agent, Cgroup, Need, Options, Output, Place, Probe, Program, agent_binary, agent_command,
    hierarchy, output, require,
};

/// How long a refusal may take.
const LIMIT: Duration = Duration::from_secs(20);

fn run(command: &mut Command) -> Result<Output> {
    output(command, LIMIT)
}

fn untouched(cgroup: &Cgroup) -> Result<()> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    for socket in [connecting, accepting] {
        assert_eq!(probe.options(socket)?, Options::UNTOUCHED);
    }
    Ok(())
}

/// The agent refuses to run, and names one of `words` as the reason.
fn refuses(command: &mut Command, words: &[&str]) -> Result<()> {
    let cgroup = Cgroup::new()?;
    command.args(["--cgroup", cgroup.path()]);
    let refused = run(command)?;
    let said = refused.stderr.trim();
    assert_eq!(refused.code, Some(1), "{command:?}: {refused:?}");
    assert!(
        words.iter().any(|word| said.contains(word)),
        "{command:?}: none of {words:?} in `{said}`"
    );
    assert!(!said.contains("panicked"), "{said}");
    untouched(&cgroup)
}

/// A shell command in a mount namespace of its own that then becomes `agent run`.
fn run_after(preparation: &str, argument: &Path) -> Command {
    let mut command = Place::default().command("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg(format!("{preparation} && shift && exec \"$@\""));
    command.arg("sh").arg(argument);
    command.arg(agent_binary()).arg("run");
    command
}

#[test]
fn not_root() -> Result<()> {
    require!(Need::Program("setpriv"), Need::NoConfig);
    // A copy where anybody may go: the build directory need not be such a place.
    let directory = tempfile::tempdir()?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755))?;
    let copy = directory.path().join("keepalive-agent");
    fs::copy(agent_binary(), &copy)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    let mut command = Place::default().command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
    command.arg(&copy).arg("run").current_dir("/");
    refuses(&mut command, &["root", "CAP_"])
}

#[test]
fn root_without_the_capabilities() -> Result<()> {
    require!(Need::Program("setpriv"), Need::NoConfig);
    let mut command = Place::default().command("setpriv");
    command.args(["--bounding-set=-bpf,-sys_admin,-net_admin", "--"]);
    command.arg(agent_binary()).arg("run");
    refuses(&mut command, &["CAP_"])
}

#[test]
fn no_cgroup_v2() -> Result<()> {
    require!(Need::Program("unshare"), Need::NoConfig);
    let mut command = run_after(r#"umount --lazy "$1""#, &hierarchy()?);
    refuses(&mut command, &["cgroup v2", "cgroup2"])
}

#[test]
fn no_btf() -> Result<()> {
    require!(
        Need::Program("unshare"),
        Need::File("/sys/kernel/btf"),
        Need::NoConfig
    );
    let btf = Path::new("/sys/kernel/btf");
    let mut command = run_after(r#"mount -t tmpfs none "$1""#, btf);
    refuses(&mut command, &["BTF", "/sys/kernel/btf"])
}

#[test]
fn a_config_that_does_not_exist_or_is_none() -> Result<()> {
    require!();
    let directory = tempfile::tempdir()?;
    let missing = directory.path().join("missing.toml");
    let binary = directory.path().join("binary.toml");
    fs::write(&binary, [0xff, 0xfe, 0x00])?;
    for subcommand in ["run", "check"] {
        for config in [&missing, &binary, &directory.path().to_owned()] {
            let mut command = agent_command();
            command.arg(subcommand).arg("--config").arg(config);
            if subcommand == "run" {
                // Never the root of the hierarchy, should it run after all.
                command.args(["--cgroup", "/kat-nowhere"]);
            }
            let refused = run(&mut command)?;
            assert_eq!(refused.code, Some(1), "{command:?}: {refused:?}");
            let said = refused.stderr + &refused.stdout;
            let name = config.display().to_string();
            assert!(said.contains(&name), "{command:?}: {said}");
        }
    }
    Ok(())
}

/// Lines of a configuration, each with what its error has to name besides the file
/// and the line. An empty list is a line without an error.
const MISTAKES: &[(&str, &[&str])] = &[
    ("[default]", &[]),
    ("idle = \"0s\"", &["idle", "0s", "1", "32767"]),
    (
        "interval = \"40000s\"",
        &["interval", "40000s", "1", "32767"],
    ),
    ("probes = 128", &["probes", "128", "1", "127"]),
    ("user-timeout = \"soon\"", &["user-timeout", "soon"]),
    ("keepalive = \"maybe\"", &["keepalive", "maybe"]),
    ("idel = \"60s\"", &["idel"]),
    ("[[policy]]", &[]),
    ("name = \"web\"", &[]),
    (
        "cgroup = \"system.slice/web\"",
        &["cgroup", "system.slice/web"],
    ),
    ("[[policy]]", &[]),
    ("name = \"web\"", &["name", "web"]),
    ("cgroup = \"/system.slice/web\"", &[]),
    (
        "idle = { default = \"60s\", at-least = \"90s\", at-most = \"30s\" }",
        &["idle"],
    ),
    (
        "interval = { exactly = \"10s\", at-most = \"30s\" }",
        &["interval", "exactly"],
    ),
    ("probes = { default = 3, at-laest = 2 }", &["at-laest"]),
];

#[test]
fn every_error_of_a_config_with_its_line() -> Result<()> {
    require!();
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("bad.toml");
    let lines: Vec<&str> = MISTAKES.iter().map(|(line, _)| *line).collect();
    fs::write(&config, lines.join("\n") + "\n")?;
    let cgroup = Cgroup::new()?;

    let mut missing = String::new();
    for subcommand in ["check", "run"] {
        let mut command = agent_command();
        command.arg(subcommand).arg("--config").arg(&config);
        // Each error on a line of its own, however long.
        command.env_remove("COLUMNS");
        if subcommand == "run" {
            command.args(["--cgroup", cgroup.path()]);
        }
        let refused = run(&mut command)?;
        assert_eq!(refused.code, Some(1), "{command:?}: {refused:?}");
        // Where `check` puts its findings is its own business.
        let said = format!("{}\n{}", refused.stderr, refused.stdout);
        for (number, (line, words)) in MISTAKES.iter().enumerate() {
            let place = format!("{}:{}", config.display(), number + 1);
            // Not the beginning of a longer number.
            let mut about = said.lines().filter(|line| {
                line.split_once(&place)
                    .is_some_and(|(_, rest)| !rest.starts_with(|next: char| next.is_ascii_digit()))
            });
            let found = if words.is_empty() {
                about.next().is_none()
            } else {
                about.any(|said| words.iter().all(|word| said.contains(word)))
            };
            if !found {
                writeln!(
                    missing,
                    "{subcommand}: line {}, `{line}`: expected {words:?}",
                    number + 1
                )?;
            }
        }
        assert!(missing.is_empty(), "\n{missing}{subcommand} said:\n{said}");
    }
    untouched(&cgroup)
}

/// One mistake each that keeps the rest of the file from being looked at.
#[test]
fn configs_that_are_not_even_toml() -> Result<()> {
    require!();
    let directory = tempfile::tempdir()?;
    for (name, text, line) in [
        ("open", "[default]\nidle = \"60s\n", 2),
        ("twice", "[default]\nidle = \"60s\"\nidle = \"70s\"\n", 3),
        ("bracket", "\n\n[default\n", 3),
    ] {
        let config = directory.path().join(format!("{name}.toml"));
        fs::write(&config, text)?;
        let mut command = agent_command();
        command.arg("check").arg("--config").arg(&config);
        let refused = run(&mut command)?;
        assert_eq!(refused.code, Some(1), "{name}: {refused:?}");
        let said = refused.stderr + &refused.stdout;
        let place = format!("{}:{line}", config.display());
        assert!(said.contains(&place), "{place} is not in:\n{said}");
    }
    Ok(())
}

#[test]
fn each_kind_of_bad_value_by_itself() -> Result<()> {
    require!();
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("bad.toml");
    let mut accepted = String::new();
    for text in [
        "idle = 60",
        "idle = \"-5s\"",
        "idle = \"500ms\"",
        "idle = \"1500ms\"",
        "idle = \"32768s\"",
        "idle = true",
        "idle = []",
        "idle = {}",
        "idle = { exactly = 5 }",
        "interval = \"0s\"",
        "interval = \"32768s\"",
        "probes = 0",
        "probes = -1",
        "probes = \"6\"",
        "probes = 6.5",
        "probes = 99999999999",
        "user-timeout = \"-1s\"",
        "user-timeout = \"4294968s\"",
        "user-timeout = \"Derive\"",
        "keepalive = true",
        "keepalive = \"ON\"",
        "keepalive = \"\"",
        "name = \"default\"",
        "cgroup = \"/x\"",
    ] {
        fs::write(&config, format!("[default]\n{text}\n"))?;
        let mut command = agent_command();
        command.arg("check").arg("--config").arg(&config);
        let refused = run(&mut command)?;
        let said = refused.stderr + &refused.stdout;
        let place = format!("{}:2", config.display());
        if refused.code != Some(1) || !said.contains(&place) {
            writeln!(accepted, "`{text}`: {:?}, {said}", refused.code)?;
        }
    }
    for text in [
        "cgroup = \"/x\"",
        "name = \"x\"",
        "name = \"\"\ncgroup = \"/x\"",
        "name = \"x\"\ncgroup = []",
        "name = \"x\"\ncgroup = \"\"",
        "name = \"x\"\ncgroup = \"x\"",
        "name = \"x\"\ncgroup = \"./x\"",
        "name = \"x\"\ncgroup = \"/x/../y\"",
        "name = \"x\"\ncgroup = \"/x/[\"",
        "name = \"x\"\ncgroup = 5",
    ] {
        fs::write(&config, format!("[[policy]]\n{text}\n"))?;
        let mut command = agent_command();
        command.arg("check").arg("--config").arg(&config);
        let refused = run(&mut command)?;
        let said = refused.stderr + &refused.stdout;
        let place = format!("{}:", config.display());
        if refused.code != Some(1) || !said.contains(&place) {
            writeln!(accepted, "`{text}`: {:?}, {said}", refused.code)?;
        }
    }
    assert!(accepted.is_empty(), "\n{accepted}");
    Ok(())
}

#[test]
fn a_cgroup_or_glob_that_matches_nothing_is_a_warning() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let here = root.child("here")?;
    let path = root.path();
    let config = format!(
        "[[policy]]\nname = \"missing\"\ncgroup = \"{path}/missing\"\n\
         [[policy]]\nname = \"nothing\"\ncgroup = \"{path}/nothing-*\"\n\
         [[policy]]\nname = \"here\"\ncgroup = \"{path}/here\"\nidle = \"71s\"\n"
    );
    let agent = Agent::start(&root, &config)?;
    let mut probe = Probe::start(Program::Static, &here)?;
    let (connecting, _) = probe.connection()?;
    assert_eq!(probe.options(connecting)?, Options::on(71, 10, 6));
    let policies = agent.started()["policies"].clone();
    for (name, cgroups) in [("missing", 0), ("nothing", 0), ("here", 1)] {
        let all = policies.as_array().context("no policies")?;
        let policy = all.iter().find(|policy| policy["name"] == name);
        assert_eq!(policy.context(name)?["cgroups"], cgroups, "{policies}");
    }
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0));
    for path in [format!("{path}/missing"), format!("{path}/nothing-*")] {
        let warnings = finished.stderr.lines().filter(|line| line.contains(&path));
        assert_eq!(warnings.count(), 1, "{path}: {}", finished.stderr);
    }
    let here = format!("{path}/here");
    assert!(!finished.stderr.contains(&here), "{}", finished.stderr);
    Ok(())
}

#[test]
fn a_policy_outside_of_what_is_governed_is_a_warning() -> Result<()> {
    require!();
    let (inside, outside) = (Cgroup::new()?, Cgroup::new()?);
    let path = outside.path();
    let config = format!("[[policy]]\nname = \"outside\"\ncgroup = \"{path}\"\n");
    let agent = Agent::start(&inside, &config)?;
    untouched(&outside)?;
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0));
    let warned = finished.stderr.lines().any(|line| line.contains(path));
    assert!(warned, "{}", finished.stderr);
    Ok(())
}

#[test]
fn usage_errors_have_exit_code_2() -> Result<()> {
    require!();
    for arguments in [
        &[][..],
        &["walk"],
        &["run", "--nonsense"],
        &["run", "--config"],
        &["check", "surplus"],
    ] {
        let mut command = agent_command();
        let refused = run(command.args(arguments))?;
        assert_eq!(refused.code, Some(2), "{arguments:?}: {refused:?}");
        assert_ne!(refused.stderr.trim(), "", "{arguments:?}");
    }
    Ok(())
}

#[test]
fn check_finds_this_kernel_able_and_a_good_config_good() -> Result<()> {
    require!();
    let config = tempfile::NamedTempFile::with_suffix(".toml")?;
    fs::write(
        &config,
        "[default]\nidle = \"2m\"\nuser-timeout = \"derive\"\n",
    )?;
    let mut command = agent_command();
    command
        .args(["check", "--json", "--config"])
        .arg(config.path());
    let checked = run(&mut command)?;
    assert_eq!(checked.code, Some(0), "{checked:?}");
    for line in checked.stdout.lines() {
        serde_json::from_str::<serde_json::Value>(line).with_context(|| line.to_owned())?;
    }
    let mut command = agent_command();
    command.arg("check").arg("--config").arg(config.path());
    let checked = run(&mut command)?;
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert_ne!(checked.stdout.trim(), "");
    Ok(())
}

/// As in CI: an ordinary user, on a machine that is not asked what it can do.
#[test]
fn a_config_is_judged_by_itself() -> Result<()> {
    const NOBODY: &str = "65534";
    require!(Need::Program("setpriv"));
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("keepalive.toml");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    // Where it was built, others may have no way to.
    let agent = directory.path().join("keepalive-agent");
    fs::copy(agent_binary(), &agent)?;
    let judge = |text: &str, more: &[&str]| -> Result<Output> {
        fs::write(&config, text)?;
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]);
        command.args(["--bounding-set=-all", "--inh-caps=-all"]);
        command.arg(&agent);
        command.args(["check", "--config-only", "--config"]);
        run(command.arg(&config).args(more))
    };
    let right = judge("[default]\nidle = \"2m\"\n", &["--json"])?;
    assert_eq!(right.code, Some(0), "{right:?}");
    let right: serde_json::Value = serde_json::from_str(&right.stdout)?;
    assert!(right["able"].is_null(), "{right}");
    assert_eq!(right["config_errors"], serde_json::json!([]), "{right}");
    let wrong = judge("[default]\nidle = \"0s\"\n", &["--json"])?;
    assert_eq!(wrong.code, Some(1), "{wrong:?}");
    let wrong: serde_json::Value = serde_json::from_str(&wrong.stdout)?;
    assert_eq!(wrong["config_errors"][0]["line"], 2, "{wrong}");
    let wrong = judge("[default]\nidle = \"0s\"\n", &[])?;
    assert_eq!(wrong.code, Some(1), "{wrong:?}");
    assert!(!wrong.stdout.contains("capabilities"), "{wrong:?}");
    Ok(())
}

/// A user-timeout that makes the probe count meaningless is allowed, and said.
#[test]
fn a_user_timeout_that_cancels_the_probes_is_a_warning() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let config = "[default]\nidle = \"60s\"\nuser-timeout = \"30s\"\n";
    let finished = Agent::start(&cgroup, config)?.stop()?;
    assert_eq!(finished.code, Some(0));
    let warned = finished.stderr.contains("user-timeout");
    assert!(warned, "{}", finished.stderr);
    Ok(())
}
