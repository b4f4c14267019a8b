//! The policy changes under the connections: what a policy set follows the next
//! one, what the application set is the application's.

use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::Sockopt::{Idle, Interval, Keepalive, Probes, UserTimeout};
use keepalive_tests::{
    Agent, Cgroup, Churn, Crowd, Kind, Need, Netns, Options, Probe, Program, Socket, Sockopt,
    between, require, timer,
};
use serde_json::json;

/// One timer of a policy, written out in the configuration by its bounds. Bounds
/// of 0 and MAX are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timer {
    default: i32,
    at_least: i32,
    at_most: i32,
}

const MAX: i32 = i32::MAX;

const fn free(default: i32) -> Timer {
    Timer {
        default,
        at_least: 0,
        at_most: MAX,
    }
}

const fn exactly(value: i32) -> Timer {
    Timer {
        default: value,
        at_least: value,
        at_most: value,
    }
}

const fn at_most(default: i32, at_most: i32) -> Timer {
    Timer {
        default,
        at_least: 0,
        at_most,
    }
}

const fn at_least(default: i32, at_least: i32) -> Timer {
    Timer {
        default,
        at_least,
        at_most: MAX,
    }
}

impl Timer {
    /// The formula, from its words in the documentation.
    fn effective(self, application: Option<i32>) -> i32 {
        let value = application.unwrap_or(self.default);
        value.max(self.at_least).min(self.at_most)
    }

    fn write(self, key: &str, unit: &str) -> String {
        let value = |number: i32| {
            if unit.is_empty() {
                number.to_string()
            } else {
                format!("\"{number}{unit}\"")
            }
        };
        let mut text = format!("{key} = {{ default = {}", value(self.default));
        if self.at_least > 0 {
            write!(text, ", at-least = {}", value(self.at_least)).expect("a string");
        }
        if self.at_most < MAX {
            write!(text, ", at-most = {}", value(self.at_most)).expect("a string");
        }
        text + " }\n"
    }
}

/// A policy that turns keepalive on.
#[derive(Clone, Copy, Debug)]
struct Policy {
    idle: Timer,
    interval: Timer,
    probes: Timer,
    /// In milliseconds; none is `leave`.
    user_timeout: Option<Timer>,
}

impl Policy {
    fn config(&self) -> String {
        let mut config = "[default]\n".to_owned();
        config += &self.idle.write("idle", "s");
        config += &self.interval.write("interval", "s");
        config += &self.probes.write("probes", "");
        if let Some(timer) = self.user_timeout {
            config += &timer.write("user-timeout", "ms");
        }
        config
    }

    /// What a socket gets whose application set these.
    fn effective(&self, application: &[(Sockopt, i32)]) -> Options {
        let set = |wanted: Sockopt| {
            let mut found = application.iter().filter(|(option, _)| *option == wanted);
            found.next_back().map(|(_, value)| *value)
        };
        Options {
            keepalive: true,
            idle: self.idle.effective(set(Idle)),
            interval: self.interval.effective(set(Interval)),
            probes: self.probes.effective(set(Probes)),
            user_timeout: match self.user_timeout {
                Some(timer) => timer.effective(set(UserTimeout)),
                None => set(UserTimeout).unwrap_or(0),
            },
        }
    }
}

/// Fills in, and no more. The idle times here are longer than a test takes on a
/// slow machine: a socket that is due is changed later, when it may probe.
const A: Policy = Policy {
    idle: free(600),
    interval: free(10),
    probes: free(6),
    user_timeout: None,
};

/// Fills in other values.
const B: Policy = Policy {
    idle: free(310),
    interval: free(7),
    probes: free(4),
    user_timeout: Some(free(40_000)),
};

/// Bounds what the application set from above, and from below.
const BOUNDED: Policy = Policy {
    idle: at_most(610, 900),
    interval: at_least(11, 9),
    probes: at_most(5, 8),
    user_timeout: Some(at_least(7_000_000, 5_000_000)),
};

/// Leaves nothing to the application.
const EXACT: Policy = Policy {
    idle: exactly(450),
    interval: exactly(12),
    probes: exactly(3),
    user_timeout: Some(exactly(81_000)),
};

/// What an application may have set: nothing, one timer of each kind, everything.
/// None of it is what a policy here would have set, and no user-timeout is so short
/// that keepalive would give way to it.
const APPLICATIONS: [&[(Sockopt, i32)]; 7] = [
    &[],
    &[(Idle, 1000)],
    &[(Interval, 3)],
    &[(Probes, 20)],
    &[(UserTimeout, 2_000_000)],
    &[(Keepalive, 1)],
    &[
        (Keepalive, 1),
        (Idle, 2000),
        (Interval, 4),
        (Probes, 30),
        (UserTimeout, 3_000_000),
    ],
];

/// Connections of every such application.
struct Applications {
    probe: Probe,
    sockets: Vec<(&'static [(Sockopt, i32)], Socket)>,
}

impl Applications {
    fn start(cgroup: &Cgroup) -> Result<Self> {
        Ok(Self {
            probe: Probe::start(Program::Static, cgroup)?,
            sockets: Vec::new(),
        })
    }

    /// A connection each whose both ends the application sets up before it stands.
    fn connect(&mut self) -> Result<()> {
        for application in APPLICATIONS {
            let (listener, address) = self.probe.listener("127.0.0.1:0")?;
            self.probe.set_all(listener, application)?;
            let connecting = self.probe.socket(Kind::of(address))?;
            self.probe.set_all(connecting, application)?;
            self.probe.connect(connecting, address)?;
            let accepting = self.probe.accept(listener)?;
            self.probe.close(listener)?;
            for socket in [connecting, accepting] {
                self.sockets.push((application, socket));
            }
        }
        Ok(())
    }

    /// All that is wrong, not only the first.
    fn follow(&mut self, policy: &Policy, when: &str) -> Result<()> {
        let mut wrong = String::new();
        for (application, socket) in self.sockets.clone() {
            let got = self.probe.options(socket)?;
            let expected = policy.effective(application);
            if got != expected {
                writeln!(
                    wrong,
                    "{when}, {socket:?}, application {application:?}:\n  \
                     expected {expected:?}\n  got      {got:?}"
                )?;
            }
        }
        ensure!(wrong.is_empty(), "\n{wrong}");
        Ok(())
    }
}

/// One policy after the other, by reload. Connections from before the agent, and
/// from under each policy.
fn reload_through(policies: &[(&str, Policy)]) -> Result<()> {
    let cgroup = Cgroup::new()?;
    let mut applications = Applications::start(&cgroup)?;
    applications.connect()?;
    let (_, first) = policies[0];
    let mut agent = Agent::start(&cgroup, &first.config())?;
    agent.swept()?;
    applications.follow(&first, "swept at the start")?;
    applications.connect()?;
    let mut trail = String::new();
    for (n, (name, policy)) in policies.iter().enumerate() {
        trail += name;
        if n > 0 {
            let swept = agent.reload(&policy.config())?;
            ensure!(swept["missed"] == json!([]), "{swept}");
        }
        applications.follow(policy, &trail)?;
        applications.connect()?;
        applications.follow(policy, &format!("{trail}, also new ones"))?;
        trail += " → ";
    }
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(finished.record["failures"], json!([]));
    Ok(())
}

#[test]
fn from_one_policy_to_another_and_back() -> Result<()> {
    require!();
    reload_through(&[("A", A), ("B", B), ("A", A)])
}

#[test]
fn bounds_come_and_go() -> Result<()> {
    require!();
    reload_through(&[("A", A), ("bounded", BOUNDED), ("A", A), ("B", B)])
}

#[test]
fn from_bounds_to_bounds() -> Result<()> {
    require!();
    reload_through(&[
        ("bounded", BOUNDED),
        ("exact", EXACT),
        ("bounded", BOUNDED),
        ("A", A),
        ("exact", EXACT),
        ("B", B),
    ])
}

/// The agent of the new policy knows what its predecessor on the cgroup did.
#[test]
fn by_restart_of_the_agent() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut applications = Applications::start(&cgroup)?;
    applications.connect()?;
    for (n, policy) in [A, B, A].iter().enumerate() {
        let mut agent = Agent::start(&cgroup, &policy.config())?;
        agent.swept()?;
        applications.follow(policy, &format!("agent {n}"))?;
        applications.connect()?;
        applications.follow(policy, &format!("agent {n}, also new ones"))?;
        if n == 1 {
            agent.kill()?;
        } else {
            agent.stop()?;
        }
    }
    Ok(())
}

#[test]
fn the_same_policy_again_changes_nothing() -> Result<()> {
    require!(Need::Program("ss"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut probe = Probe::start(Program::Static, (&cgroup, &netns))?;
    let (connecting, accepting) = probe.connection()?;
    let filter = between(probe.name(connecting)?, probe.name(accepting)?);
    let left = || -> Result<Duration> {
        let timer = timer(Some(&netns), &filter)?.context("no timer")?;
        ensure!(timer.kind == "keepalive", "{timer:?}");
        Ok(timer.left)
    };
    let config = "[default]\nidle = \"70s\"\n";
    let mut agent = Agent::start(&cgroup, config)?;
    agent.swept()?;
    let mut before = left()?;
    for _ in 0..3 {
        sleep(Duration::from_millis(1100));
        agent.reload(config)?;
        let after = left()?;
        assert!(after < before, "the timer began anew: {before:?} {after:?}");
        before = after;
    }
    let finished = agent.stop()?;
    assert_eq!(finished.count_existing("default", "turned_on"), 2);
    // Nothing was to be done there any more, so nobody looked again.
    assert_eq!(finished.count_existing("default", "seen"), 2);
    Ok(())
}

/// What the application sets while a policy is in force counts under the next.
#[test]
fn the_application_sets_something_meanwhile() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let mut agent = Agent::start(&cgroup, &A.config())?;
    let mut sockets = Vec::new();
    for before in [&[][..], &[(Idle, 1000)]] {
        let (listener, address) = probe.listener("127.0.0.1:0")?;
        let socket = probe.socket(Kind::of(address))?;
        probe.set_all(socket, before)?;
        probe.connect(socket, address)?;
        probe.accept(listener)?;
        sockets.push(socket);
    }
    for &socket in &sockets {
        probe.set(socket, Idle, 90)?;
    }
    agent.reload(&B.config())?;
    for &socket in &sockets {
        assert_eq!(probe.options(socket)?, B.effective(&[(Idle, 90)]));
    }
    agent.reload(&EXACT.config())?;
    for &socket in &sockets {
        assert_eq!(probe.options(socket)?, EXACT.effective(&[]));
        // Over what the policy took away: it is held, and the newer wish is the one
        // that counts later.
        probe.set_all(socket, &[(Idle, 1400), (Probes, 2)])?;
        assert_eq!(probe.options(socket)?, EXACT.effective(&[]));
    }
    let application = [(Idle, 1400), (Probes, 2)];
    agent.reload(&BOUNDED.config())?;
    for &socket in &sockets {
        assert_eq!(probe.options(socket)?, BOUNDED.effective(&application));
    }
    agent.reload(&A.config())?;
    for &socket in &sockets {
        assert_eq!(probe.options(socket)?, A.effective(&application));
    }
    Ok(())
}

/// The one timer that the kernel lets go back to unset.
#[test]
fn a_user_timeout_is_given_back() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (plain, own) = probe.connection()?;
    probe.set(own, UserTimeout, 400_000)?;
    let ours = Options::on(60, 10, 6);
    let mut agent = Agent::start(&cgroup, "[default]\nuser-timeout = \"30s\"\n")?;
    agent.swept()?;
    for (keys, of_plain, of_own) in [
        ("user-timeout = \"30s\"", 30_000, 400_000),
        ("user-timeout = \"leave\"", 0, 400_000),
        ("user-timeout = \"derive\"", 120_000, 400_000),
        (
            "user-timeout = \"derive\"\nidle = \"50s\"",
            110_000,
            400_000,
        ),
        ("user-timeout = { exactly = \"20s\" }", 20_000, 20_000),
        ("user-timeout = \"leave\"", 0, 400_000),
        ("", 0, 400_000),
    ] {
        agent.reload(&format!("[default]\n{keys}\n"))?;
        let idle = if keys.contains("50s") { 50 } else { 60 };
        let expected = Options { idle, ..ours };
        let got = (probe.options(plain)?, probe.options(own)?);
        assert_eq!(got.0, expected.user_timeout(of_plain), "{keys}");
        assert_eq!(got.1, expected.user_timeout(of_own), "{keys}");
    }
    Ok(())
}

#[test]
fn off_and_on_again() -> Result<()> {
    require!(Need::Program("ss"));
    let cgroup = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut probe = Probe::start(Program::Static, (&cgroup, &netns))?;
    let (connecting, accepting) = probe.connection()?;
    let filter = between(probe.name(connecting)?, probe.name(accepting)?);
    let on = "[default]\nidle = \"500s\"\n";
    let mut agent = Agent::start(&cgroup, on)?;
    agent.swept()?;
    for _ in 0..2 {
        agent.reload("[default]\nkeepalive = \"off\"\n")?;
        let off = Options::on(500, 10, 6).off();
        assert_eq!(probe.options(connecting)?, off);
        assert_eq!(probe.options(accepting)?, off);
        assert_eq!(timer(Some(&netns), &filter)?, None);
        agent.reload(on)?;
        assert_eq!(probe.options(connecting)?, Options::on(500, 10, 6));
        assert_eq!(probe.options(accepting)?, Options::on(500, 10, 6));
        let timer = timer(Some(&netns), &filter)?.context("no timer")?;
        // It counts from the last activity, which is a while ago.
        assert_eq!(timer.kind, "keepalive");
        assert!(timer.left <= Duration::from_secs(500), "{timer:?}");
        assert!(timer.left > Duration::from_secs(400), "{timer:?}");
    }
    // The policy turned it on, so one that leaves it gives it back.
    agent.reload("[default]\nkeepalive = \"leave\"\nidle = \"500s\"\n")?;
    assert!(!probe.options(connecting)?.keepalive);
    let finished = agent.stop()?;
    assert_eq!(finished.count_existing("default", "turned_off"), 6);
    assert_eq!(finished.count_existing("default", "turned_on"), 6);
    Ok(())
}

/// An application that takes the connection off its socket and connects it again gets
/// what the policy of then gives, not what an earlier one gave, and what it has set
/// itself it has still.
#[test]
fn a_socket_that_is_connected_again() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let config = |idle, most| {
        format!(
            "[default]\nidle = {{ default = \"{idle}s\", at-most = \"{most}s\" }}\n\
             interval = \"{idle}s\"\n"
        )
    };
    let free = |idle| format!("[default]\nidle = \"{idle}s\"\ninterval = \"{idle}s\"\n");
    for policies in [
        [free(600), free(601), free(602)],
        [config(600, 900), config(601, 900), config(602, 900)],
        [free(600), config(601, 900), free(602)],
    ] {
        let mut agent = Agent::start(&cgroup, &policies[0])?;
        agent.swept()?;
        let mut probe = Probe::start(Program::Static, &cgroup)?;
        let (listener, address) = probe.listener("127.0.0.1:0")?;
        let untouched = probe.connected(address)?;
        let own = probe.socket(Kind::of(address))?;
        probe.set(own, Idle, 700)?;
        probe.connect(own, address)?;
        let expects = |probe: &mut Probe, given: i32| -> Result<()> {
            assert_eq!(probe.options(untouched)?, Options::on(given, given, 6));
            assert_eq!(probe.options(own)?, Options::on(700, given, 6));
            Ok(())
        };
        expects(&mut probe, 600)?;
        for socket in [untouched, own] {
            probe.disconnect(socket)?;
        }
        for config in &policies[1..] {
            agent.reload(config)?;
        }
        for socket in [untouched, own] {
            probe.connect(socket, address)?;
        }
        expects(&mut probe, 602)?;
        // And what it has then is known for what it is.
        agent.reload(&policies[0])?;
        expects(&mut probe, 600)?;
        probe.close(listener)?;
        agent.stop()?;
    }
    Ok(())
}

#[test]
fn a_bad_configuration_changes_nothing() -> Result<()> {
    require!();
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (early, _) = probe.connection()?;
    let mut agent = Agent::start(&cgroup, "[default]\nidle = \"70s\"\n")?;
    agent.swept()?;
    for (config, words) in [
        (
            "[default]\nidle = \"0s\"\n",
            &["toml:2", "idle", "32767"][..],
        ),
        ("[default]\nidle = \"71s\"\nidel = 1\n", &["toml:3", "idel"]),
        ("[default\n", &["toml:1"]),
        ("\u{0}", &["toml"]),
    ] {
        let said = agent.reload_refused(config)?;
        for word in words {
            assert!(said.contains(word), "no `{word}` in `{said}`");
        }
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(probe.options(early)?, Options::on(70, 10, 6), "{config}");
        let (connecting, accepting) = probe.connection()?;
        for socket in [connecting, accepting] {
            assert_eq!(probe.options(socket)?, Options::on(70, 10, 6), "{config}");
        }
    }
    // And the next good one is taken.
    agent.reload("[default]\nidle = \"72s\"\n")?;
    assert_eq!(probe.options(early)?.idle, 72);
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    Ok(())
}

fn claim(cgroup: &Cgroup, idle: u32) -> String {
    let path = cgroup.path();
    format!("[[policy]]\nname = \"p{idle}\"\ncgroup = \"{path}\"\nidle = \"{idle}s\"\n")
}

/// A policy comes for a cgroup, moves to another, and goes.
#[test]
fn a_claim_is_added_and_removed() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (one, two) = (root.child("one")?, root.child("two")?);
    let below = one.child("below")?;
    let mut probes = Vec::new();
    for cgroup in [&one, &two, &below] {
        let mut probe = Probe::start(Program::Static, cgroup)?;
        let socket = probe.connection()?.0;
        probes.push((probe, socket));
    }
    let default = "[default]\nidle = \"70s\"\n";
    let mut agent = Agent::start(&root, default)?;
    agent.swept()?;
    for (claims, expected) in [
        (String::new(), [70, 70, 70]),
        (claim(&one, 71), [71, 70, 71]),
        (claim(&one, 71) + &claim(&below, 73), [71, 70, 73]),
        (claim(&two, 72) + &claim(&below, 73), [70, 72, 73]),
        (claim(&one, 75), [75, 70, 75]),
        (String::new(), [70, 70, 70]),
    ] {
        agent.reload(&format!("{default}{claims}"))?;
        for ((probe, socket), idle) in probes.iter_mut().zip(expected) {
            let old = probe.options(*socket)?.idle;
            let new = probe.connection()?.0;
            let new = probe.options(new)?.idle;
            assert_eq!((old, new), (idle, idle), "{claims}");
        }
    }
    let finished = agent.stop()?;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    Ok(())
}

/// With no policy left for a cgroup, its connections get back what they had; a timer
/// that was set cannot become unset, and has the sysctl's value.
#[test]
fn a_cgroup_is_let_go() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let (one, two) = (root.child("one")?, root.child("two")?);
    let mut probe = Probe::start(Program::Static, &one)?;
    let old = probe.connection()?.0;
    let mut agent = Agent::start(&root, &claim(&one, 71))?;
    agent.swept()?;
    agent.reload(&claim(&two, 72))?;
    assert_eq!(probe.options(old)?, Options::on(7200, 75, 9).off());
    let new = probe.connection()?.0;
    assert_eq!(probe.options(new)?, Options::UNTOUCHED);
    Ok(())
}

/// Every connection has the old policy or the new one from its first moment, also
/// when its claim and the default change places.
#[test]
fn under_churn_every_connection_has_one_of_two_policies() -> Result<()> {
    require!(Need::Program("ip"));
    let root = Cgroup::new()?;
    let child = root.child("child")?;
    let netns = Netns::new()?;
    let mut coming = Crowd::start((&child, &netns), "127.0.1.1:0")?;
    let mut steady = Crowd::start((&child, &netns), "127.0.2.1:0")?;
    let claimed = format!("[default]\nidle = \"70s\"\n{}", claim(&child, 71));
    let unclaimed = "[default]\nidle = \"72s\"\n";
    let mut agent = Agent::start(&root, &claimed)?;
    steady.connect(500)?;
    let churn = Churn {
        time: Duration::from_secs(2),
        rate: 6000,
        idle: [71, 72],
    };
    let done = AtomicBool::new(false);
    let churned = scope(|scope| -> Result<_> {
        let churned = scope.spawn(|| coming.churn_until(&done, &churn));
        let reloaded = (0..10).try_for_each(|_| -> Result<()> {
            agent.reload(unclaimed)?;
            steady.all_have(Options::on(72, 10, 6))?;
            agent.reload(&claimed)?;
            steady.all_have(Options::on(71, 10, 6))
        });
        done.store(true, Ordering::Relaxed);
        reloaded?;
        churned.join().expect("a panic")
    })?;
    eprintln!("{churned:?}");
    assert_eq!(churned.without, 0, "{churned:?}");
    let [first, second] = churned.with;
    assert!(first > 0 && second > 0, "{churned:?}");
    assert!(churned.made > 2000, "no churn to speak of: {churned:?}");
    let finished = agent.stop()?;
    assert_eq!(finished.record["failures"], json!([]));
    Ok(())
}
