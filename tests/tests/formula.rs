//! effective = clamp(the application's value if it set one, else the default;
//! at-least, at-most): every mode, each timer by itself, both sides.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use keepalive_tests::Sockopt::{Idle, Interval, Keepalive, Probes, UserTimeout};
use keepalive_tests::{Agent, Cgroup, Options, Probe, Program, Sockopt, require};

const BUILT_IN: Options = Options::on(60, 10, 6);

/// What the two ends of a connection have when the application set options on the
/// one before `connect()`, and on the other through its listener.
fn both_sides(cgroup: &Cgroup, application: &[(Sockopt, i32)]) -> Result<[Options; 2]> {
    let mut probe = Probe::start(Program::Static, cgroup)?;
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    let before = {
        probe.set_all(listener, application)?;
        probe.options(listener)?
    };
    let connecting = probe.socket(keepalive_tests::Kind::of(address))?;
    probe.set_all(connecting, application)?;
    probe.connect(connecting, address)?;
    let accepting = probe.accept(listener)?;
    let after = probe.options(listener)?;
    ensure!(after == before, "the listener changed to {after:?}");
    Ok([probe.options(connecting)?, probe.options(accepting)?])
}

/// Keys of a policy, what the application sets, and what comes of the two.
type Case<'a> = (&'a str, Vec<(Sockopt, i32)>, Options);

/// All cases under one agent: each has a cgroup and a policy of its own. Reports
/// every case that goes wrong, not only the first.
fn hold(cases: &[Case<'_>]) -> Result<()> {
    let root = Cgroup::new()?;
    let mut config = String::new();
    let mut cgroups = Vec::new();
    for (n, (keys, _, _)) in cases.iter().enumerate() {
        let cgroup = root.child(format!("case-{n}"))?;
        let path = cgroup.path();
        writeln!(
            config,
            "[[policy]]\nname = \"case-{n}\"\ncgroup = \"{path}\"\n{keys}"
        )?;
        cgroups.push(cgroup);
    }
    let agent = Agent::start(&root, &config)?;
    let mut wrong = String::new();
    for ((keys, application, expected), cgroup) in cases.iter().zip(&cgroups) {
        let got = both_sides(cgroup, application)
            .with_context(|| format!("`{keys}`, application: {application:?}"))?;
        if got != [*expected; 2] {
            writeln!(
                wrong,
                "`{keys}`, application: {application:?}\n  expected {expected:?}\n  got      {got:?}"
            )?;
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    let finished = agent.stop()?;
    for n in 0..cases.len() {
        assert_eq!(finished.count(&format!("case-{n}"), "seen"), 2);
        assert_eq!(finished.count(&format!("case-{n}"), "failed"), 0);
    }
    Ok(())
}

/// Modes of one timer, and what each makes of an application that sets nothing,
/// 10, 45 and 120.
const MODES: [(&str, [i32; 4]); 6] = [
    ("{60}", [60, 10, 45, 120]),
    ("{ default = {60} }", [60, 10, 45, 120]),
    ("{ default = {60}, at-least = {30} }", [60, 30, 45, 120]),
    ("{ default = {60}, at-most = {90} }", [60, 10, 45, 90]),
    (
        "{ default = {60}, at-least = {30}, at-most = {90} }",
        [60, 30, 45, 90],
    ),
    ("{ exactly = {60} }", [60, 60, 60, 60]),
];

fn every_mode_of(key: &str, option: Sockopt) -> Result<()> {
    let mut policies = Vec::new();
    for (mode, results) in MODES {
        let mut value = mode.to_owned();
        for number in ["60", "30", "90"] {
            let written = if option == Probes {
                number.to_owned()
            } else {
                format!("\"{number}s\"")
            };
            value = value.replace(&format!("{{{number}}}"), &written);
        }
        policies.push((format!("{key} = {value}"), results));
    }
    let factor = if option == UserTimeout { 1000 } else { 1 };
    let mut cases = Vec::new();
    for (policy, results) in &policies {
        for (set, result) in [None, Some(10), Some(45), Some(120)].iter().zip(results) {
            let application = set.map(|value| (option, value * factor));
            let mut expected = BUILT_IN;
            match option {
                Idle => expected.idle = *result,
                Interval => expected.interval = *result,
                Probes => expected.probes = *result,
                // Below the 110 s after which the sixth probe goes out, and not the
                // policy's own: keepalive would make it worse.
                UserTimeout if set.is_some() && *result < 120 && *result != 60 => {
                    expected = Options::UNTOUCHED.user_timeout(*result * factor);
                }
                UserTimeout => expected.user_timeout = *result * factor,
                Keepalive => unreachable!("not a timer"),
            }
            cases.push((policy.as_str(), application.into_iter().collect(), expected));
        }
    }
    hold(&cases)
}

#[test]
fn idle_in_every_mode() -> Result<()> {
    require!();
    every_mode_of("idle", Idle)
}

#[test]
fn interval_in_every_mode() -> Result<()> {
    require!();
    every_mode_of("interval", Interval)
}

#[test]
fn probes_in_every_mode() -> Result<()> {
    require!();
    every_mode_of("probes", Probes)
}

#[test]
fn user_timeout_in_every_mode() -> Result<()> {
    require!();
    every_mode_of("user-timeout", UserTimeout)
}

#[test]
fn keepalive_on_off_and_leave() -> Result<()> {
    require!();
    hold(&[
        ("keepalive = \"on\"", vec![], BUILT_IN),
        ("keepalive = \"on\"", vec![(Keepalive, 1)], BUILT_IN),
        ("keepalive = \"on\"", vec![(Keepalive, 0)], BUILT_IN),
        // Off leaves the timers, whether the application set some or none.
        ("keepalive = \"off\"", vec![], Options::UNTOUCHED),
        (
            "keepalive = \"off\"",
            vec![(Keepalive, 1)],
            Options::UNTOUCHED,
        ),
        (
            "keepalive = \"off\"\nidle = { exactly = \"30s\" }",
            vec![(Keepalive, 1), (Idle, 1000), (Interval, 100), (Probes, 3)],
            Options::on(1000, 100, 3).off(),
        ),
        // Leave keeps the switch as it is and still sees to the timers.
        ("keepalive = \"leave\"", vec![], BUILT_IN.off()),
        ("keepalive = \"leave\"", vec![(Keepalive, 1)], BUILT_IN),
        (
            "keepalive = \"leave\"\nidle = { default = \"30s\", at-most = \"50s\" }",
            vec![(Keepalive, 1), (Idle, 1000)],
            Options::on(50, 10, 6),
        ),
    ])
}

#[test]
fn applications_that_set_some_or_all_options_before() -> Result<()> {
    require!();
    let all = vec![
        (Keepalive, 1),
        (Idle, 1000),
        (Interval, 100),
        (Probes, 3),
        (UserTimeout, 5000),
    ];
    let theirs = Options::on(1000, 100, 3).user_timeout(5000);
    let clamp = "idle = { default = \"60s\", at-most = \"5m\" }\n\
                 interval = { default = \"10s\", at-most = \"30s\" }\n\
                 probes = { default = 6, at-least = 5 }\n\
                 user-timeout = { default = \"400s\", at-least = \"7s\" }";
    let exactly = "idle = { exactly = \"61s\" }\ninterval = { exactly = \"11s\" }\n\
                   probes = { exactly = 7 }\nuser-timeout = { exactly = \"200s\" }";
    hold(&[
        ("", all.clone(), theirs),
        ("", vec![(Interval, 100)], Options::on(60, 100, 6)),
        (
            "",
            vec![(Keepalive, 1), (Probes, 3)],
            Options::on(60, 10, 3),
        ),
        (
            clamp,
            all.clone(),
            // With its user-timeout shorter timers would make it worse.
            theirs.user_timeout(7000),
        ),
        (
            clamp,
            vec![(Idle, 1000)],
            Options::on(300, 10, 6).user_timeout(400_000),
        ),
        (exactly, all, Options::on(61, 11, 7).user_timeout(200_000)),
        (
            exactly,
            vec![],
            Options::on(61, 11, 7).user_timeout(200_000),
        ),
    ])
}

#[test]
fn user_timeout_derived_and_left() -> Result<()> {
    require!();
    let derive = "user-timeout = \"derive\"";
    hold(&[
        (derive, vec![], BUILT_IN.user_timeout(120_000)),
        (
            "idle = \"30s\"\ninterval = \"5s\"\nprobes = 3\nuser-timeout = \"derive\"",
            vec![],
            Options::on(30, 5, 3).user_timeout(45_000),
        ),
        // From what the socket ends up with, not from what the policy says.
        (
            derive,
            vec![(Idle, 100)],
            Options::on(100, 10, 6).user_timeout(160_000),
        ),
        (
            "user-timeout = \"leave\"",
            vec![(UserTimeout, 5000)],
            Options::UNTOUCHED.user_timeout(5000),
        ),
        (
            "user-timeout = { at-least = \"derive\" }",
            vec![(UserTimeout, 5000)],
            BUILT_IN.user_timeout(120_000),
        ),
        ("user-timeout = \"leave\"", vec![], BUILT_IN),
    ])
}

/// The program runs before `connect()` or `accept()` returns, so what the
/// application sets afterwards stands, unless the policy has bounds.
#[test]
fn the_application_has_the_last_word_after_connect() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let _agent = Agent::start(&cgroup, "[default]\nidle = \"60s\"\nprobes = 6\n")?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (connecting, accepting) = probe.connection()?;
    for socket in [connecting, accepting] {
        assert_eq!(probe.options(socket)?, BUILT_IN);
        probe.set(socket, Idle, 500)?;
        assert_eq!(probe.options(socket)?, Options::on(500, 10, 6));
        probe.set_all(socket, &[(Interval, 50), (Probes, 2), (UserTimeout, 9000)])?;
        probe.set(socket, Keepalive, 0)?;
        // Data in both directions: no later callback undoes it either.
        probe.send(socket, "x")?;
        let expected = Options::on(500, 50, 2).user_timeout(9000).off();
        assert_eq!(probe.options(socket)?, expected);
    }
    probe.receive(connecting)?;
    probe.receive(accepting)?;
    let expected = Options::on(500, 50, 2).user_timeout(9000).off();
    assert_eq!(probe.options(connecting)?, expected);
    assert_eq!(probe.options(accepting)?, expected);
    Ok(())
}

/// What a namespace's sysctls say is not what the application set.
#[test]
fn sysctls_do_not_count_as_set_by_the_application() -> Result<()> {
    require!();
    let netns = keepalive_tests::Netns::new()?;
    netns.sysctl("net/ipv4/tcp_keepalive_time", "500")?;
    netns.sysctl("net/ipv4/tcp_keepalive_intvl", "50")?;
    netns.sysctl("net/ipv4/tcp_keepalive_probes", "2")?;
    let cgroup = Cgroup::new()?;
    {
        let mut probe = Probe::start(Program::Static, (&cgroup, &netns))?;
        let (connecting, _) = probe.connection()?;
        assert_eq!(probe.options(connecting)?, Options::on(500, 50, 2).off());
    }
    let config = "[default]\nidle = \"60s\"\ninterval = \"10s\"\nprobes = 6\n";
    let _agent = Agent::start(&cgroup, config)?;
    let mut probe = Probe::start(Program::Static, (&cgroup, &netns))?;
    let (connecting, accepting) = probe.connection()?;
    assert_eq!(probe.options(connecting)?, BUILT_IN);
    assert_eq!(probe.options(accepting)?, BUILT_IN);
    Ok(())
}

/// What the counters say about applications of each kind.
#[test]
fn counters_tell_what_was_done() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let config = "[default]\nidle = { default = \"60s\", at-most = \"5m\" }\n";
    let agent = Agent::start(&cgroup, config)?;
    // Nothing set: turned on and all three timers filled.
    both_sides(&cgroup, &[])?;
    // All of it set and within bounds: left alone.
    let all = [(Keepalive, 1), (Idle, 100), (Interval, 9), (Probes, 5)];
    both_sides(&cgroup, &all)?;
    // On, and one value out of bounds: clamped.
    let beyond = [(Keepalive, 1), (Idle, 1000), (Interval, 9), (Probes, 5)];
    both_sides(&cgroup, &beyond)?;
    let finished = agent.stop()?;
    for (counter, count) in [
        ("seen", 6),
        ("turned_on", 2),
        ("turned_off", 0),
        ("filled", 6),
        ("clamped", 2),
        ("left_alone", 2),
        ("failed", 0),
    ] {
        assert_eq!(finished.count("default", counter), count, "{counter}");
    }
    Ok(())
}
