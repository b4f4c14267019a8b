//! What the agent cannot see it says: capabilities and namespaces taken away one by
//! one, and mounts of the hierarchy that are hidden, covered, partial or read-only.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use keepalive_tests::{
    Cgroup, Need, Netns, Output, Probe, Program, agent_binary, hierarchy, output, require,
};

const LIMIT: Duration = Duration::from_mins(2);

const AT_RISK: Option<i32> = Some(3);

/// Starts the agent and ends it once it enforces; its output follows. A function of
/// the scripts.
const ENFORCE: &str = r#"
    enforce() {
        "$0" run --json --cgroup "$2" >/tmp/out-$$ 2>&1 & pid=$!
        for i in $(seq 400); do
            grep -q '"started"' /tmp/out-$$ && break
            kill -0 $pid 2>/dev/null || break
            sleep 0.1
        done
        kill -INT $pid 2>/dev/null; code=0; wait $pid || code=$?
        cat /tmp/out-$$; rm /tmp/out-$$
        return $code
    }
"#;

/// Runs a script in a mount namespace of its own; `$0` is the agent, `$1` where the
/// hierarchy is, `$2` a cgroup.
fn script(unshare: &[&str], script: &str, cgroup: &Cgroup) -> Result<Output> {
    let mut command = Command::new("unshare");
    command.arg("-m").args(unshare).args(["sh", "-ec"]);
    command.arg(format!("mount --make-rprivate /\n{ENFORCE}\n{script}"));
    command
        .arg(agent_binary())
        .arg(hierarchy()?)
        .arg(cgroup.path());
    output(&mut command, LIMIT)
}

/// A connection at risk in another network namespace: whoever does not look there
/// must not say that there is none.
struct AtRisk {
    cgroup: Cgroup,
    _netns: Netns,
    _probe: Probe,
}

impl AtRisk {
    fn new() -> Result<Self> {
        let (cgroup, netns) = (Cgroup::new()?, Netns::new()?);
        let mut probe = Probe::start(Program::Static, (&cgroup, &netns))?;
        probe.connection()?;
        Ok(Self {
            cgroup,
            _netns: netns,
            _probe: probe,
        })
    }

    /// Asks for connections at risk by way of a command that becomes what is named
    /// behind it.
    fn ask(&self, by: &[&str]) -> Result<Output> {
        let (first, rest) = by.split_first().context("a command")?;
        let mut command = Command::new(first);
        command.args(rest).arg(agent_binary());
        command.args(["sockets", "--loopback", "--at-risk", "350s", "--cgroup"]);
        output(command.arg(self.cgroup.path()), LIMIT)
    }
}

#[test]
fn what_is_not_seen_is_never_taken_for_clean() -> Result<()> {
    require!(Need::Program("setpriv"), Need::Program("unshare"));
    let at_risk = AtRisk::new()?;
    let whole = at_risk.ask(&["env"])?;
    assert_eq!(whole.code, AT_RISK, "{}", whole.stderr);
    assert_eq!(whole.stderr, "");

    for (missing, by) in [
        (
            "CAP_SYS_PTRACE",
            &["setpriv", "--bounding-set", "-sys_ptrace"][..],
        ),
        ("pid namespace", &["unshare", "-mpf", "--mount-proc"]),
    ] {
        let asked = at_risk.ask(by)?;
        assert!(asked.stderr.contains(missing), "{missing}: {asked:?}");
        assert!(asked.stderr.contains("not seen"), "{missing}: {asked:?}");
        // A part that was looked at may have been where it is.
        assert_ne!(asked.code, Some(0), "{missing}: {asked:?}");
    }
    Ok(())
}

#[test]
fn a_cgroup_namespace_of_its_own_is_partial() -> Result<()> {
    require!(Need::Program("unshare"));
    let cgroup = Cgroup::new()?;
    let mut command = Command::new("sh");
    command.args([
        "-ec",
        r#"echo $$ >"$2/cgroup.procs"
           exec unshare -mC sh -ec '
               mount --make-rprivate /
               umount -l "$1"
               mount -t cgroup2 none /mnt
               exec "$0" check' "$0" "$1""#,
    ]);
    command
        .arg(agent_binary())
        .arg(hierarchy()?)
        .arg(cgroup.directory());
    let checked = output(&mut command, LIMIT)?;
    let shown = checked.stdout.replace(['\n', ' '], "");
    assert!(shown.contains("cgroupnamespaceofitsown"), "{checked:?}");
    Ok(())
}

#[test]
fn few_capabilities_are_partial() -> Result<()> {
    require!(Need::Program("setpriv"));
    let at_risk = AtRisk::new()?;
    let few = "-all,+bpf,+perfmon,+net_admin";
    let asked = at_risk.ask(&[
        "setpriv",
        "--reuid",
        "4711",
        "--regid",
        "4711",
        "--clear-groups",
        "--inh-caps",
        few,
        "--ambient-caps",
        few,
        "--bounding-set",
        few,
    ])?;
    // What it sees is at risk, and it says what it does not see: never clean.
    assert_eq!(asked.code, Some(3), "{asked:?}");
    for missing in ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN"] {
        assert!(asked.stderr.contains(missing), "{}", asked.stderr);
    }
    Ok(())
}

#[test]
fn a_user_namespace_is_named() -> Result<()> {
    require!(Need::Program("unshare"));
    let cgroup = Cgroup::new()?;
    let ran = script(&["-U", "-r"], r#""$0" run --cgroup "$2""#, &cgroup)?;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("user namespace"), "{}", ran.stderr);
    Ok(())
}

/// The first mount is hidden, or something else stands there; another is usable.
#[test]
fn a_mount_that_is_hidden_is_passed_over() -> Result<()> {
    require!(Need::Program("unshare"));
    let cgroup = Cgroup::new()?;
    for hide in [
        r#"mount -t tmpfs none "$(dirname "$1")""#,
        r#"mount -t tmpfs none "$(dirname "$1")"; mkdir -p "$1$2""#,
        r#"mount -t tmpfs none "$1""#,
    ] {
        let ran = script(
            &[],
            &format!(
                "mount -t tmpfs none /mnt; mkdir /mnt/cg; {hide}\n\
                 \"$0\" run --cgroup \"$2\" 2>&1 && exit 9\n\
                 mount -t cgroup2 none /mnt/cg\n\
                 enforce \"$@\""
            ),
            &cgroup,
        )?;
        assert_eq!(ran.code, Some(0), "{hide}: {ran:?}");
        assert!(
            ran.stdout.contains("something else is mounted over it"),
            "{hide}: {ran:?}"
        );
        // The advice of that error hides no controllers of version 1.
        assert!(
            !ran.stdout.contains("none /sys/fs/cgroup"),
            "{hide}: {ran:?}"
        );
        assert!(ran.stdout.contains("/mnt/cg"), "{hide}: {ran:?}");
    }
    Ok(())
}

/// As containers have it: everything works but what needs a cgroup to be made.
#[test]
fn a_read_only_mount_is_enough_to_enforce() -> Result<()> {
    require!(Need::Program("unshare"));
    let cgroup = Cgroup::new()?;
    let checked = script(
        &[],
        r#"mount -o remount,ro,bind "$1"; exec "$0" check --cgroup "$2""#,
        &cgroup,
    )?;
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert!(checked.stdout.contains("read-only"), "{checked:?}");
    let ran = script(
        &[],
        r#"mount -o remount,ro,bind "$1"; enforce "$@""#,
        &cgroup,
    )?;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    Ok(())
}

#[test]
fn run_and_check_say_that_the_view_is_partial() -> Result<()> {
    require!(Need::Program("unshare"));
    let cgroup = Cgroup::new()?;
    let checked = script(
        &["-pf", "--mount-proc"],
        r#"exec "$0" check --cgroup "$2""#,
        &cgroup,
    )?;
    assert!(
        checked.stdout.contains("pid namespace of its own"),
        "{checked:?}"
    );
    let ran = script(&["-pf", "--mount-proc"], r#"enforce "$@""#, &cgroup)?;
    assert!(ran.stdout.contains("pid namespace"), "{ran:?}");
    assert!(ran.stdout.contains("--pid=host"), "{ran:?}");
    Ok(())
}
