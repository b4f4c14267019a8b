//! A config that has other values for the same policies takes no other program and no
//! other maps: they count in the set in force, all of them in one step.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::Sockopt::Idle;
use keepalive_tests::{
    Agent, Cgroup, Churn, Crowd, Kind, Loaded, Need, Netns, Pins, Probe, Program, Socket,
    agent_command, detach, output, require,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

/// The idle times of a default, of a policy for a cgroup, and of one for the remote ends
/// of that cgroup with an even last bit, with bounds where the last is given.
fn config(cgroup: &Cgroup, [default, own, remote]: [i32; 3], at_most: Option<i32>) -> String {
    let path = cgroup.path();
    let bounds =
        at_most.map(|at_most| format!("probes = {{ default = 5, at-most = {at_most} }}\n"));
    let bounds = bounds.unwrap_or_default();
    format!(
        "[default]\nidle = '{default}s'\n\
         [[policy]]\nname = 'own'\ncgroup = '{path}'\nidle = '{own}s'\n{bounds}\
         [[policy]]\nname = 'remote'\ncgroup = '{path}'\nremote = '127.0.0.0/31'\n\
         idle = '{remote}s'\n"
    )
}

/// Connections of a cgroup: one for the policy of the cgroup, one for that of the remote
/// end, and one whose application has set the idle time itself.
struct Connections {
    probe: Probe,
    sockets: Vec<[Socket; 3]>,
}

impl Connections {
    fn of(cgroup: &Cgroup) -> Result<Self> {
        Ok(Self {
            probe: Probe::start(Program::Static, cgroup)?,
            sockets: Vec::new(),
        })
    }

    fn connect(&mut self) -> Result<()> {
        let mut sockets = Vec::new();
        for (address, idle) in [
            ("127.0.0.2:0", None),
            ("127.0.0.1:0", None),
            ("127.0.0.2:0", Some(900)),
        ] {
            let (_, address) = self.probe.listener(address)?;
            let socket = self.probe.socket(Kind::of(address))?;
            if let Some(idle) = idle {
                self.probe.set(socket, Idle, idle)?;
            }
            self.probe.connect(socket, address)?;
            sockets.push(socket);
        }
        self.sockets.extend(<[Socket; 3]>::try_from(sockets).ok());
        Ok(())
    }

    /// Old ones and a new one.
    fn have(&mut self, own: i32, remote: i32) -> Result<()> {
        self.connect()?;
        for sockets in self.sockets.clone() {
            let mut idle = Vec::new();
            for socket in sockets {
                idle.push(self.probe.options(socket)?.idle);
            }
            ensure!(idle == [own, remote, 900], "{idle:?}");
        }
        Ok(())
    }
}

fn program(cgroup: &Cgroup) -> Result<u64> {
    let loaded = Loaded::on(cgroup)?.context("nothing is attached")?;
    Ok(loaded.program)
}

/// What `sockets` says of the connections of a cgroup: whose their idle time is.
fn sources(cgroup: &Cgroup) -> Result<Vec<Value>> {
    let mut command = agent_command();
    command.args(["sockets", "--json", "--cgroup", cgroup.path()]);
    let shown = output(&mut command, LIMIT)?;
    let lines = shown.stdout.lines().map(serde_json::from_str::<Value>);
    let sockets: Vec<Value> = lines.collect::<Result<_, _>>()?;
    Ok(sockets
        .iter()
        .map(|socket| socket["idle_source"].clone())
        .collect())
}

#[test]
fn they_count_in_the_set_in_force() -> Result<()> {
    require!(Need::Program("bpftool"));
    let root = Cgroup::new()?;
    let one = root.child("one")?;
    let mut connections = Connections::of(&one)?;
    let mut others = Connections::of(&root)?;
    connections.connect()?;
    let mut agent = Agent::start(&root, &config(&one, [70, 71, 72], None))?;
    agent.swept()?;
    let set = program(&root)?;
    connections.have(71, 72)?;
    others.have(70, 70)?;
    for round in 1..4 {
        let [default, own, remote] = [70, 71, 72].map(|idle| idle + 10 * round);
        agent.reload(&config(&one, [default, own, remote], None))?;
        connections.have(own, remote)?;
        others.have(default, default)?;
        assert_eq!(program(&root)?, set, "another program was loaded");
    }
    // What is set is known to be the policy's, by others than the agent too.
    let sources = sources(&one)?;
    let applications = sources.iter().filter(|source| **source == "app").count();
    assert_eq!(applications, connections.sockets.len(), "{sources:?}");
    // A new cgroup goes by what holds now, and so does the next set.
    let below = one.child("below")?;
    let mut new = Connections::of(&below)?;
    new.have(101, 102)?;
    agent.reload(&config(&one, [100, 101, 102], Some(6)))?;
    assert_ne!(program(&root)?, set, "bounds take another set");
    connections.have(101, 102)?;
    agent.reload(&config(&one, [60, 61, 62], None))?;
    connections.have(61, 62)?;
    new.have(61, 62)?;
    let finished = agent.stop()?;
    assert_eq!(finished.record["failures"], json!([]));
    Ok(())
}

/// The reports name what is different, and no more.
#[test]
fn what_is_different_is_told() -> Result<()> {
    require!();
    let root = Cgroup::new()?;
    let one = root.child("one")?;
    let mut agent = Agent::start(&root, &config(&one, [70, 71, 72], None))?;
    agent.swept()?;
    agent.hang_up(&config(&one, [70, 81, 72], None))?;
    let told = agent.tells_difference()?;
    assert_eq!(told["unchanged"], 2, "{told}");
    assert_eq!(told["removed"], json!([]), "{told}");
    let policies = told["policies"].as_array().context("no policies")?;
    assert_eq!(policies.len(), 1, "{told}");
    assert_eq!(policies[0]["name"], "own", "{told}");
    assert_eq!(policies[0]["cgroups"], 1, "{told}");
    agent.swept()?;
    agent.hang_up("[default]\nidle = '70s'\n")?;
    let told = agent.tells_difference()?;
    assert_eq!(told["policies"], json!([]), "{told}");
    assert_eq!(told["removed"], json!(["own", "remote"]), "{told}");
    assert_eq!(told["unchanged"], 1, "{told}");
    Ok(())
}

/// Who connects in one cgroup by the new values finds them in every other one: they
/// change in one step.
#[test]
fn all_policies_change_at_once() -> Result<()> {
    const TIMES: i32 = 30;
    require!();
    let root = Cgroup::new()?;
    let cgroups = [root.child("one")?, root.child("two")?];
    let config = |of: i32| {
        let policies = [(&cgroups[0], 71 + of), (&cgroups[1], 81 + of)];
        let policies = policies.map(|(cgroup, idle)| {
            let path = cgroup.path();
            format!("[[policy]]\nname = '{path}'\ncgroup = '{path}'\nidle = '{idle}s'\n")
        });
        format!("[default]\n{}", policies.concat())
    };
    let mut agent = Agent::start(&root, &config(0))?;
    agent.swept()?;
    let done = AtomicBool::new(false);
    let mut probes = Vec::new();
    for cgroup in &cgroups {
        probes.push(Probe::start(Program::Static, cgroup)?);
    }
    let seen = scope(|scope| -> Result<_> {
        let looking = scope.spawn(|| -> Result<_> {
            let mut changes = 0;
            let mut last = 0;
            while !done.load(Ordering::Relaxed) {
                for (probe, base) in probes.iter_mut().zip([71, 81]) {
                    let (connecting, accepting) = probe.connection()?;
                    let of = probe.options(connecting)?.idle - base;
                    ensure!(of == last || of == last + 1, "{of} after {last}");
                    changes += of - last;
                    last = of;
                    probe.close(connecting)?;
                    probe.close(accepting)?;
                }
            }
            Ok(changes)
        });
        let reloaded = (1..=TIMES).try_for_each(|of| agent.reload(&config(of)).map(drop));
        done.store(true, Ordering::Relaxed);
        reloaded?;
        looking.join().expect("a panic")
    })?;
    ensure!(seen >= TIMES - 1, "only {seen} changes were seen");
    Ok(())
}

/// Two changes that follow one another at once, and an agent that is killed then: the
/// next one knows what connections were given.
#[test]
fn the_next_agent_knows_of_them() -> Result<()> {
    require!(Need::Program("bpftool"));
    let root = Cgroup::new()?;
    let pins = Pins::new();
    let mut connections = Connections::of(&root)?;
    connections.connect()?;
    let mut agent = Agent::start_pinned(&root, &config(&root, [70, 71, 72], None), &pins, &[])?;
    agent.swept()?;
    for round in 1..6 {
        let idle = [70, 71, 72].map(|idle| idle + 10 * round);
        agent.hang_up(&config(&root, idle, None))?;
        agent.reload(&config(&root, idle.map(|idle| idle + 5), None))?;
        connections.connect()?;
        agent.kill()?;
        let idle = idle.map(|idle| idle + 3);
        agent = Agent::start_pinned(&root, &config(&root, idle, None), &pins, &[])?;
        agent.swept()?;
        connections.have(idle[1], idle[2])?;
    }
    agent.stop()?;
    detach(&root)
}

/// Every connection has the values of one config or of the other from its first moment,
/// while policies have other values, come and go by turns.
#[test]
fn under_churn_by_turns_with_other_sets() -> Result<()> {
    require!(Need::Program("ip"));
    let root = Cgroup::new()?;
    let netns = Netns::new()?;
    let mut coming = Crowd::start((&root, &netns), "127.0.1.1:0")?;
    let config = |n: u32| {
        let (idle, set) = (70 + n % 2, n / 2 % 2);
        format!("[default]\nidle = '{idle}s'\n[[policy]]\nname = 'set-{set}'\nport = 1\n")
    };
    let mut agent = Agent::start(&root, &config(0))?;
    agent.swept()?;
    let churn = Churn {
        time: Duration::from_secs(1),
        rate: 3000,
        idle: [70, 71],
    };
    let done = AtomicBool::new(false);
    let churned = scope(|scope| -> Result<_> {
        let churned = scope.spawn(|| coming.churn_until(&done, &churn));
        let reloaded = (1..30).try_for_each(|n| agent.reload(&config(n)).map(drop));
        done.store(true, Ordering::Relaxed);
        reloaded?;
        churned.join().expect("a panic")
    })?;
    eprintln!("{churned:?}");
    assert_eq!((churned.without, churned.broken), (0, 0), "{churned:?}");
    assert!(churned.with.iter().all(|with| *with > 0), "{churned:?}");
    Ok(())
}
