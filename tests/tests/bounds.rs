//! Bounds hold whenever an application sets options, and only where a policy has
//! them.

use std::io::Write as _;
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::Sockopt::{Idle, Interval, Keepalive, Probes, UserTimeout};
use keepalive_tests::{
    Agent, Cgroup, ForgetfulNat, Need, Options, Place, Probe, Program, Socket, Sockopt,
    agent_command, errno, output, require, wait_until,
};
use rustix::io::Errno;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);

/// Each timer has a default and bounds. No user-timeout within these ends a
/// connection before the probes do, so nothing is left to the application for that.
const BOUNDED: &str = "[default]\n\
    idle = { default = \"60s\", at-least = \"30s\", at-most = \"90s\" }\n\
    interval = { default = \"10s\", at-least = \"5s\", at-most = \"20s\" }\n\
    probes = { default = 6, at-least = 3, at-most = 9 }\n\
    user-timeout = { default = \"400s\", at-least = \"300s\", at-most = \"600s\" }\n";

/// Both ends of a connection, and the listener, which stays.
fn connection(probe: &mut Probe) -> Result<([Socket; 2], Socket, SocketAddr)> {
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    let connecting = probe.connected(address)?;
    let accepting = probe.accept(listener)?;
    Ok(([connecting, accepting], listener, address))
}

#[test]
fn what_an_application_sets_later_stays_within_bounds() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let _agent = Agent::start(&cgroup, BOUNDED)?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (ends, listener, _) = connection(&mut probe)?;
    let given = Options::on(60, 10, 6).user_timeout(400_000);
    for end in ends {
        assert_eq!(probe.options(end)?, given);
        for (option, below, least, within, most, above) in [
            (Idle, 1, 30, 45, 90, 32_767),
            (Interval, 1, 5, 7, 20, 32_767),
            (Probes, 1, 3, 4, 9, 127),
            (UserTimeout, 1, 300_000, 350_000, 600_000, i32::MAX),
        ] {
            for (asked, expected) in [
                (below, least),
                (least, least),
                (within, within),
                (most, most),
                (above, most),
            ] {
                probe.set(end, option, asked)?;
                let found = value(&mut probe, end, option)?;
                assert_eq!(found, expected, "{option:?} {asked}");
            }
        }
        // keepalive = "on" gives, and leaves the application the last word.
        probe.set(end, Keepalive, 0)?;
        let at_most = Options::on(90, 20, 9).user_timeout(600_000);
        assert_eq!(probe.options(end)?, at_most.off());
        probe.set(end, Keepalive, 7)?;
        assert_eq!(probe.options(end)?, at_most);
    }
    // What a listener has is the application's own.
    probe.set(listener, Idle, 7000)?;
    assert_eq!(value(&mut probe, listener, Idle)?, 7000);
    Ok(())
}

fn value(probe: &mut Probe, socket: Socket, option: Sockopt) -> Result<i32> {
    let options = probe.options(socket)?;
    Ok(match option {
        Keepalive => options.keepalive.into(),
        Idle => options.idle,
        Interval => options.interval,
        Probes => options.probes,
        UserTimeout => options.user_timeout,
    })
}

/// A client asks for five minutes after connect(), behind a NAT that forgets after
/// ten seconds, beside one that is not governed.
#[test]
fn a_path_stays_open_whatever_the_application_sets_later() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("nft"));
    let cgroup = Cgroup::new()?;
    let nat = ForgetfulNat::new()?;
    let after = ForgetfulNat::AFTER;
    let _agent = Agent::start(&cgroup, &format!("[default]\npath = \"{after}s\"\n"))?;
    let mut server = Probe::start(Program::Static, &nat.server)?;
    let (listener, address) = server.listener(&nat.listen())?;
    let mut governed = Probe::start(Program::Static, (&cgroup, &nat.client))?;
    let mut other = Probe::start(Program::Static, &nat.client)?;
    let mut ends = Vec::new();
    for client in [&mut governed, &mut other] {
        let socket = client.connected(address)?;
        let accepted = server.accept(listener)?;
        client.set_all(socket, &[(Keepalive, 1), (Idle, 300), (Interval, 75)])?;
        ends.push((socket, accepted));
    }
    sleep(Duration::from_secs(after + 4));
    let mut arrives = |client: &mut Probe, (socket, accepted): (Socket, Socket)| {
        client.send(socket, "are you there?")?;
        server.wait(accepted, Duration::from_secs(4))
    };
    ensure!(arrives(&mut governed, ends[0])?, "it was forgotten");
    ensure!(!arrives(&mut other, ends[1])?, "the NAT forgets nothing");
    Ok(())
}

#[test]
fn what_an_application_sets_before_is_known_afterwards() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, BOUNDED)?;
    agent.swept()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    probe.set(listener, Idle, 7000)?;
    let connecting = probe.socket(keepalive_tests::Kind::of(address))?;
    probe.set(connecting, Idle, 5000)?;
    probe.connect(connecting, address)?;
    let accepting = probe.accept(listener)?;
    for end in [connecting, accepting] {
        assert_eq!(probe.options(end)?.idle, 90);
        // Reading a value and writing it back is no other wish.
        probe.set(end, Idle, 90)?;
    }
    probe.set(connecting, Probes, 100)?;
    agent.reload("[default]\nidle = \"60s\"")?;
    assert_eq!(probe.options(connecting)?, Options::on(5000, 10, 100));
    assert_eq!(probe.options(accepting)?, Options::on(7000, 10, 6));
    // Nobody is held to anything any more.
    probe.set(connecting, Idle, 6000)?;
    assert_eq!(probe.options(connecting)?.idle, 6000);
    Ok(())
}

#[test]
fn another_policy_reaches_what_is_held() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, "[default]\nidle = \"60s\"")?;
    agent.swept()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (ends, _, _) = connection(&mut probe)?;
    for end in ends {
        probe.set(end, Idle, 1000)?;
        assert_eq!(probe.options(end)?.idle, 1000);
    }
    for (most, asked) in [(300, 2000), (200, 3000), (250, 4000)] {
        agent.reload(&format!("[default]\nidle = {{ at-most = \"{most}s\" }}"))?;
        for end in ends {
            assert_eq!(probe.options(end)?.idle, most);
            probe.set(end, Idle, asked)?;
            assert_eq!(probe.options(end)?.idle, most);
        }
    }
    agent.reload("[default]\nidle = \"60s\"")?;
    for end in ends {
        assert_eq!(probe.options(end)?.idle, 4000);
    }
    Ok(())
}

#[test]
fn the_kernel_keeps_its_own_errors() -> Result<()> {
    const SOL_IP: i32 = 0;
    const SOL_TCP: i32 = 6;
    const TCP_NODELAY: i32 = 1;
    const TCP_KEEPIDLE: i32 = 4;
    /// `IPT_SO_SET_REPLACE`: a table of iptables has many pages.
    const IPT_SO_SET_REPLACE: i32 = 64;
    require!();
    let cgroup = Cgroup::new()?;
    let outside = Cgroup::new()?;
    let _agent = Agent::start(&cgroup, BOUNDED)?;
    let mut answers = Vec::new();
    for cgroup in [&cgroup, &outside] {
        let mut probe = Probe::start(Program::Static, cgroup)?;
        let (ends, ..) = connection(&mut probe)?;
        let mut found = Vec::new();
        for end in ends {
            for option in [Keepalive, Idle, Interval, Probes, UserTimeout] {
                let (level, number) = option.numbers();
                for length in [0, 1, 3, 4, 5, 100, 5000] {
                    for value in [0, 1, 40, 127, 128, 32_767, 32_768, 1 << 31, u32::MAX] {
                        let set = probe.set_long(end, level, number, value, length);
                        let errno = set.err().and_then(|error| errno(&error));
                        found.push((option.numbers(), length, value, errno));
                    }
                }
            }
            for (level, number, length) in [
                (SOL_IP, TCP_KEEPIDLE, 4),
                (SOL_TCP, TCP_NODELAY, 8000),
                (SOL_IP, IPT_SO_SET_REPLACE, 8000),
                (SOL_TCP, 999, 8000),
            ] {
                let set = probe.set_long(end, level, number, 1, length);
                let errno = set.err().and_then(|error| errno(&error));
                found.push(((level, number), length, 1, errno));
            }
        }
        answers.push(found);
    }
    let refused = answers[0].iter().filter(|(.., errno)| errno.is_some());
    assert!(refused.count() > 100, "too few were refused");
    assert!(answers[0].contains(&((6, 4), 4, 0, Some(Errno::INVAL))));
    for (with, without) in answers[0].iter().zip(&answers[1]) {
        assert_eq!(with, without, "(level, option), length, value, error");
    }
    Ok(())
}

#[test]
fn a_long_value_is_bounded_too() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let _agent = Agent::start(&cgroup, BOUNDED)?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (ends, ..) = connection(&mut probe)?;
    let (level, number) = Idle.numbers();
    for (length, asked, expected) in [(4, 7000, 90), (5, 1, 30), (100, 7001, 90), (5000, 2, 30)] {
        probe.set_long(ends[0], level, number, asked, length)?;
        assert_eq!(probe.options(ends[0])?.idle, expected, "{length} bytes");
    }
    Ok(())
}

#[test]
fn what_was_asked_for_is_shown() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut agent = Agent::start(&cgroup, BOUNDED)?;
    agent.swept()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let ([connecting, accepting], ..) = connection(&mut probe)?;
    let ends = [probe.name(connecting)?, probe.name(accepting)?];
    probe.set_all(connecting, &[(Idle, 7200), (Interval, 7), (Keepalive, 1)])?;
    let listed = lines(&["sockets", "--json", "--cgroup", cgroup.path()])?;
    let of = |local: SocketAddr| {
        let mut listed = listed.iter();
        listed.find(|line| line["local_port"] == local.port())
    };
    let line = of(ends[0]).context("it is not listed")?;
    for (name, expected) in [
        ("idle_s", 90.into()),
        ("idle_asked_s", 7200.into()),
        ("idle_source", "policy-bound".into()),
        ("interval_s", 7.into()),
        ("interval_asked_s", Value::Null),
        ("interval_source", "app".into()),
        ("probes_source", "policy".into()),
        ("probes_asked", Value::Null),
    ] {
        assert_eq!(line[name], expected, "{name}: {line}");
    }
    let line = of(ends[1]).context("it is not listed")?;
    assert_eq!(
        (&line["idle_s"], &line["idle_asked_s"]),
        (&60.into(), &Value::Null)
    );
    // It has what it never asked for, and never asked for anything else.
    assert_eq!(
        (&line["keepalive"], &line["keepalive_asked"]),
        (&true.into(), &Value::Null)
    );

    let socket = [ends[0].to_string(), ends[1].to_string()];
    let explain = ["explain", "--socket", &socket[0], &socket[1]];
    let explained = lines(&[&explain[..], &["--json"]].concat())?;
    assert_eq!(explained[0]["bounds_held"], true, "{explained:?}");
    assert_eq!(explained[0]["holds"]["idle_asked_s"], 7200);
    // Another policy would go by what was asked for, not by what that became.
    let mut looser = tempfile::NamedTempFile::new()?;
    write!(looser, "[default]\nidle = {{ at-most = \"200s\" }}\n")?;
    let looser = looser.path().to_str().context("a path in UTF-8")?;
    let explained = lines(&[&explain[..], &["--json", "--config", looser]].concat())?;
    assert_eq!(explained[0]["wants"]["idle_s"], 200, "{explained:?}");
    let said = output(agent_command().args(explain), SOON)?.stdout;
    ensure!(said.contains("the application asked for 2h"), "{said}");
    ensure!(
        said.contains("hold whenever the application sets"),
        "{said}"
    );
    Ok(())
}

/// What a command of the agent prints, as JSON, line by line.
fn lines(arguments: &[&str]) -> Result<Vec<Value>> {
    let done = output(agent_command().args(arguments), SOON)?;
    ensure!(done.code == Some(0), "{arguments:?}: {done:?}");
    let lines = done.stdout.lines().map(serde_json::from_str);
    Ok(lines.collect::<Result<_, _>>()?)
}

#[test]
fn a_derived_user_timeout_follows_what_the_application_sets() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let _agent = Agent::start(&cgroup, "[default]\nuser-timeout = \"derive\"")?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (ends, ..) = connection(&mut probe)?;
    for end in ends {
        let before = probe.options(end)?;
        ensure!(before.user_timeout >= 120_000, "{before:?}");
        probe.set(end, Idle, 1000)?;
        let after = probe.options(end)?;
        assert_eq!(after.idle, 1000);
        // The kernel's timers may be late: then it is more than idle + interval × probes.
        ensure!(after.user_timeout >= 1_060_000, "{after:?}");
        probe.set(end, UserTimeout, 5_000_000)?;
        probe.set(end, Idle, 500)?;
        assert_eq!(probe.options(end)?.user_timeout, 5_000_000);
    }
    Ok(())
}

#[test]
fn only_cgroups_with_bounds_have_the_program() -> Result<()> {
    require!(Need::Program("bpftool"));
    let root = Cgroup::new()?;
    let (bounded, free) = (root.child("bounded")?, root.child("free")?);
    let later = format!("{}/later", root.path());
    let bounds = "idle = { at-most = \"90s\" }";
    let config = |keys: &str| {
        format!(
            "[default]\n[[policy]]\nname = \"a\"\ncgroup = [\"{}\", \"{later}\"]\n{keys}\n",
            bounded.path()
        )
    };
    let mut agent = Agent::start(&root, &config(bounds))?;
    agent.swept()?;
    assert_eq!(programs(&root)?, 0);
    assert_eq!(programs(&free)?, 0);
    assert_eq!(programs(&bounded)?, 1);
    let later = root.child("later")?;
    wait_until(SOON, "the program in a new cgroup", || {
        Ok(programs(&later)? == 1)
    })?;
    agent.reload(&config("idle = \"90s\""))?;
    wait_until(SOON, "the programs to go", || {
        Ok(programs(&bounded)? + programs(&later)? == 0)
    })?;
    agent.reload(&config(bounds))?;
    assert_eq!(programs(&bounded)?, 1);
    agent.stop()?;
    assert_eq!(programs(&bounded)? + programs(&later)?, 0);
    Ok(())
}

/// How many programs are attached to the cgroup itself that look at setsockopt.
fn programs(cgroup: &Cgroup) -> Result<usize> {
    let mut command = Place::default().command("bpftool");
    command
        .args(["-j", "cgroup", "show"])
        .arg(cgroup.directory());
    let text = output(&mut command, SOON)?.stdout;
    if text.trim().is_empty() {
        return Ok(0);
    }
    let attached: Value = serde_json::from_str(&text)?;
    let attached = attached.as_array().context("no list")?;
    let on_hook = |entry: &&Value| entry["attach_type"] == "cgroup_setsockopt";
    Ok(attached.iter().filter(on_hook).count())
}
