//! Every call to the kernel that changes something fails once, at every place: what
//! is in force, what the agent thinks is, and what it reports agree all the time,
//! and when nothing fails any more, all is as if nothing had.
//!
//! The agent runs on a thread of the test, built with its feature
//! `fault-injection`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, exit};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use keepalive_agent::config::{Config, Sources};
use keepalive_agent::daemon::control::Request;
use keepalive_agent::daemon::target;
use keepalive_agent::datapath::{InForce, PartStatus, State, fault};
use keepalive_tests::{
    AgentThread, Cgroup, Loaded, Need, Options, Pins, Probe, Program, bpftool, detach, hierarchy,
    output, require, wait_until,
};
use rustix::process::{Signal, getpid, kill_process};

const LIMIT: Duration = Duration::from_mins(1);

/// More places than anything here has.
const PLACES: u32 = 200;

/// Faults and signals are the whole process's.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the files say: the idle times of the cgroup itself and of its services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Policy {
    own: u32,
    services: u32,
    /// Part of a name: where it is another one, another set is needed.
    set: u32,
}

/// The reference: what was written and made.
struct Node {
    cgroup: Cgroup,
    services: Vec<Cgroup>,
    pins: Pins,
    file: tempfile::NamedTempFile,
    wanted: Policy,
    /// Whether a policy has bounds, which takes a link of its own.
    bounds: bool,
    agent: Option<AgentThread>,
    /// One process in each cgroup, the first in the one itself.
    probe: Probe,
}

impl Node {
    fn new() -> Result<Self> {
        let cgroup = Cgroup::new()?;
        let mut node = Self {
            probe: Probe::start(Program::Static, &cgroup)?,
            cgroup,
            services: Vec::new(),
            pins: Pins::new(),
            file: tempfile::NamedTempFile::with_suffix(".toml")?,
            wanted: Policy {
                own: 70,
                services: 71,
                set: 0,
            },
            bounds: false,
            agent: None,
        };
        node.write(node.wanted)?;
        Ok(node)
    }

    fn write(&mut self, policy: Policy) -> Result<()> {
        self.wanted = policy;
        let bounds = if self.bounds {
            "interval = { default = \"10s\", at-most = \"20s\" }\n"
        } else {
            ""
        };
        let text = format!(
            "[default]\nidle = \"{}s\"\n\
             [[policy]]\nname = \"services\"\ncgroup = \"{}/s*\"\nidle = \"{}s\"\n{bounds}\
             [[policy]]\nname = \"some-{}\"\ncgroup = \"{}/s*\"\nremote = \"192.0.2.0/24\"\n\
             port = 443\nidle = \"{}s\"\n",
            policy.own,
            self.cgroup.path(),
            policy.services,
            policy.set,
            self.cgroup.path(),
            policy.services + 100,
        );
        fs::write(&self.file, text)?;
        Ok(())
    }

    fn sources(&self) -> Sources {
        Sources::new(Some(self.file.path()), &[])
    }

    fn config(&self) -> Result<Arc<Config>> {
        Ok(target::read(&self.sources(), false)?.config)
    }

    /// Starts an agent; its error where it ends instead.
    fn start(&mut self) -> Result<()> {
        let agent = AgentThread::start(self.cgroup.path(), self.pins.name(), self.file.path());
        match agent.events.recv_timeout(LIMIT) {
            Ok("started") => {
                self.agent = Some(agent);
                Ok(())
            }
            Ok(other) => bail!("{other} instead of started"),
            Err(_) => {
                agent.ended()?;
                bail!("it ended without a word")
            }
        }
    }

    /// Asks it to end, and waits until it has.
    fn end(&mut self, request: Request) -> Result<()> {
        let agent = self.agent.take().context("no agent")?;
        agent.end(self.cgroup.path(), request)
    }

    fn lives(&self) -> Result<()> {
        let agent = self.agent.as_ref().context("no agent")?;
        ensure!(!agent.thread.is_finished(), "the agent has ended");
        Ok(())
    }

    /// What is in force, as the kernel has it, and what the agent says of itself.
    fn in_force(&self) -> Result<Option<(Arc<Config>, State)>> {
        let Some(found) = InForce::on(self.cgroup.id()?)? else {
            return Ok(None);
        };
        let record = found.record?;
        Ok(Some((record.description().config.clone(), record.state()?)))
    }

    /// Waits until the agent has nothing more to do for now.
    fn settle(&self) -> Result<State> {
        let mut last = None;
        wait_until(LIMIT, "the agent to have done what it can", || {
            let (config, state) = self.in_force()?.context("nothing is in force")?;
            let is_done = config == self.config()? || has_failed(&state);
            let quiet = !state.sweep.under_way && is_done;
            last = Some(state);
            Ok(quiet)
        })
        .with_context(|| format!("{last:?}"))?;
        last.context("no state")
    }

    /// Connects to itself in a cgroup.
    fn connection(&mut self, cgroup: Option<usize>) -> Result<Options> {
        let cgroup = cgroup.map_or(&self.cgroup, |index| &self.services[index]);
        self.probe.move_to(cgroup)?;
        let (connecting, accepting) = self.probe.connection()?;
        let options = self.probe.options(connecting)?;
        ensure!(options == self.probe.options(accepting)?, "two ends differ");
        self.probe.close(connecting)?;
        self.probe.close(accepting)?;
        self.probe.move_to(&self.cgroup)?;
        Ok(options)
    }

    /// The cgroups that claim a policy, as bpftool shows them.
    fn claiming(&self) -> Result<BTreeSet<u64>> {
        let loaded = Loaded::on(&self.cgroup)?.context("nothing is attached")?;
        let map = loaded.map("CGROUPS")?.to_string();
        let entries = bpftool(&["map", "dump", "id", &map])?;
        let entries = entries.as_array().context("no entries")?;
        let id = |entry: &serde_json::Value| -> Result<u64> {
            let key = entry["key"].as_array().context("no key")?;
            let bytes = key.iter().map(|byte| {
                let byte = byte.as_str().and_then(|byte| byte.strip_prefix("0x"));
                Ok(u8::from_str_radix(byte.context("no byte")?, 16)?)
            });
            let bytes: Vec<u8> = bytes.collect::<Result<_>>()?;
            Ok(u64::from_ne_bytes(bytes.as_slice().try_into()?))
        };
        entries.iter().map(id).collect()
    }

    /// What is in force is one whole policy, the one that the agent says, and
    /// connections go by it.
    fn agrees(&mut self, before: Policy) -> Result<()> {
        let (config, state) = self.in_force()?.context("nothing is in force")?;
        let policy = if config == self.config()? {
            self.wanted
        } else {
            before
        };
        let own = self.connection(None)?;
        ensure!(
            own.idle == i32::try_from(policy.own)?,
            "{own:?} under {policy:?}"
        );
        let claiming = self.claiming()?;
        for index in 0..self.services.len() {
            let found = self.connection(Some(index))?;
            let is_claimed = claiming.contains(&self.services[index].id()?);
            let expected = if is_claimed {
                policy.services
            } else {
                policy.own
            };
            ensure!(
                found.idle == i32::try_from(expected)?,
                "service {index}: {found:?} under {policy:?}, claimed {is_claimed}"
            );
            ensure!(
                is_claimed || has_failed(&state),
                "service {index} has no policy, and nothing is said to be wrong: {state:?}"
            );
        }
        Ok(())
    }

    /// Nothing fails any more: all is as the files and the hierarchy say.
    fn recovers(&mut self) -> Result<()> {
        self.lives()?;
        let agent = self.agent.as_ref().context("no agent")?;
        while agent.events.try_recv().is_ok() {}
        kill_process(getpid(), Signal::HUP)?;
        while agent.events.recv_timeout(LIMIT)? != "reloaded" {}
        let mut last = Ok(());
        wait_until(LIMIT, "all to be well", || {
            last = self.is_well();
            Ok(last.is_ok())
        })
        .or(last)
    }

    fn is_well(&mut self) -> Result<()> {
        let (config, state) = self.in_force()?.context("nothing is in force")?;
        let well = config == self.config()?
            && !has_failed(&state)
            && state.settled
            && !state.sweep.under_way
            && state.owner.is_some();
        ensure!(well, "{state:?}");
        self.agrees(self.wanted)?;
        let mut expected: BTreeSet<_> = self
            .services
            .iter()
            .map(Cgroup::id)
            .collect::<Result<_>>()?;
        expected.insert(self.cgroup.id()?);
        let claiming = self.claiming()?;
        ensure!(claiming == expected, "{claiming:?} instead of {expected:?}");
        Ok(())
    }

    /// The same for what a failure has left, which may be on its way for a moment.
    fn comes_to_agree(&mut self, before: Policy) -> Result<()> {
        let mut last = Ok(());
        wait_until(Duration::from_secs(10), "model and kernel to agree", || {
            last = self.agrees(before);
            Ok(last.is_ok())
        })
        .or(last)
    }

    /// Nothing of the agent is left in the kernel.
    fn has_nothing(&mut self) -> Result<()> {
        ensure!(Loaded::on(&self.cgroup)?.is_none(), "something is attached");
        let pins = self.pins.all()?;
        ensure!(pins.is_empty(), "{pins:?}");
        ensure!(self.connection(None)? == Options::UNTOUCHED);
        Ok(())
    }
}

fn has_failed(state: &State) -> bool {
    state
        .parts
        .values()
        .any(|part| part.status == PartStatus::Failed)
        || state
            .reload
            .as_ref()
            .is_some_and(|reload| reload.error.is_some())
}

/// Does something again and again, each time with another call that fails, until
/// none is left to fail. What it does with the failure is in its own hands.
fn at_every_place(
    what: &str,
    mut one: impl FnMut(u32) -> Result<()>,
) -> Result<Vec<fault::Operation>> {
    let mut failed = Vec::new();
    for place in 0..PLACES {
        fault::arm(Some(place));
        let done = one(place);
        let Some(operation) = fault::arm(None) else {
            done.with_context(|| format!("{what}: without any failure"))?;
            eprintln!("{what}: {} places: {failed:?}", failed.len());
            return Ok(failed);
        };
        done.with_context(|| format!("{what}: place {place}, {operation:?}"))?;
        failed.push(operation);
    }
    bail!("{what}: more than {PLACES} places")
}

#[test]
fn a_start_that_fails_leaves_nothing() -> Result<()> {
    require!(Need::Program("bpftool"));
    let _alone = alone();
    let mut node = Node::new()?;
    node.services.push(node.cgroup.child("s0")?);
    let failed = at_every_place("start", |_| {
        let started = node.start();
        fault::stop();
        if started.is_err() {
            return node.has_nothing();
        }
        node.recovers()?;
        node.end(Request::Detach)?;
        node.has_nothing()
    })?;
    for operation in [
        fault::Operation::CreateMaps,
        fault::Operation::LoadProgram,
        fault::Operation::WriteMap,
        fault::Operation::BindMap,
        fault::Operation::LinkCreate,
        fault::Operation::Pin,
    ] {
        assert!(failed.contains(&operation), "{operation:?} never failed");
    }
    Ok(())
}

#[test]
fn a_start_on_what_is_in_force() -> Result<()> {
    require!(Need::Program("bpftool"));
    let _alone = alone();
    let mut node = Node::new()?;
    node.start()?;
    node.recovers()?;
    let process = |node: &mut Node| -> Result<()> {
        // As if it had been killed: it ends and leaves what is pinned.
        kill_process(getpid(), Signal::TERM)?;
        let agent = node.agent.take().context("no agent")?;
        agent.ended()
    };
    process(&mut node)?;
    let mut before = node.wanted;
    let failed = at_every_place("next start", |place| {
        node.write(Policy {
            own: 70 + place % 2,
            services: 80 + place,
            set: place,
        })?;
        let started = node.start();
        fault::stop();
        // Whether it started or not, one whole policy is in force.
        node.comes_to_agree(before)?;
        if started.is_err() {
            node.start()?;
        }
        node.recovers()?;
        before = node.wanted;
        process(&mut node)?;
        node.agrees(before)
    })?;
    assert!(failed.contains(&fault::Operation::LinkUpdate), "{failed:?}");
    node.start()?;
    node.end(Request::Detach)?;
    node.has_nothing()
}

#[test]
fn changes_that_fail() -> Result<()> {
    require!(Need::Program("bpftool"));
    let _alone = alone();
    let mut node = Node::new()?;
    node.start()?;
    node.recovers()?;
    for (what, is_set) in [("another set", 1), ("other values", 0)] {
        let failed = at_every_place(what, |place| {
            let before = node.wanted;
            node.write(Policy {
                own: 70 + place % 2,
                services: 80 + place,
                set: before.set + is_set,
            })?;
            node.settle()?;
            fault::stop();
            node.comes_to_agree(before)?;
            node.recovers()
        })?;
        let replaced = failed.contains(&fault::Operation::LinkUpdate);
        assert_eq!(replaced, is_set == 1, "{what}: {failed:?}");
    }
    let mut made = 0;
    at_every_place("new cgroup", |_| {
        let service = node.cgroup.child(format!("s{made}"))?;
        made += 1;
        node.services.push(service);
        // Its claim is there, or said not to be.
        let index = node.services.len() - 1;
        wait_until(LIMIT, "the new cgroup to be seen", || {
            let claimed = node.claiming()?.contains(&node.services[index].id()?);
            let (_, state) = node.in_force()?.context("nothing is in force")?;
            Ok(claimed || has_failed(&state))
        })?;
        fault::stop();
        node.comes_to_agree(node.wanted)?;
        node.recovers()
    })?;
    at_every_place("cgroup removed", |_| {
        let Some(service) = node.services.pop() else {
            return Ok(());
        };
        let id = service.id()?;
        drop(service);
        // What failed to be removed costs its memory only, until the next set.
        let gone = wait_until(Duration::from_secs(1), "its claim to go", || {
            Ok(!node.claiming()?.contains(&id))
        });
        drop(gone);
        fault::stop();
        node.comes_to_agree(node.wanted)?;
        node.recovers()
    })?;
    node.end(Request::Detach)?;
    node.has_nothing()
}

/// What the process below is told: the place, the cgroup, the pins and the file.
const KILLED_AT: &str = "KEEPALIVE_KILLED_AT";

/// A config whose names differ, of which none is there, and which is not written by
/// one call.
fn of_names(own: u32) -> String {
    let units: Vec<_> = (0..5_000).map(|n| format!("'{own}-{n}.service'")).collect();
    format!(
        "[default]\n[[policy]]\nname = 'named'\nidle = '63s'\nunit = [{}]\n",
        units.join(", ")
    )
}

fn of_values(own: u32) -> String {
    let idle = 63 + own;
    format!("[default]\n[[policy]]\nname = 'valued'\nport = '1-65535'\nidle = '{idle}s'\n")
}

/// Goes over to the other one of two configs in the set in force, and is killed at that
/// place if there is one.
fn victim(told: &str, configs: fn(u32) -> String) -> Result<()> {
    let told: Vec<_> = told.split(':').collect();
    let [place, cgroup, pins, file] = told[..] else {
        bail!("{told:?}");
    };
    let id = hierarchy()?.join(cgroup.trim_start_matches('/'));
    let id = fs::metadata(id)?.ino();
    let sources = Sources::new(Some(Path::new(file)), &[]);
    let config = || Ok::<_, anyhow::Error>(target::read(&sources, false)?.config);
    let agent = AgentThread::start(cgroup, pins, Path::new(file));
    let says = |expected: &Arc<Config>| -> Result<bool> {
        let found = InForce::on(id)?.context("nothing is in force")?;
        let record = found.record?;
        Ok(record.state()?.settled && record.description().config == *expected)
    };
    ensure!(agent.events.recv_timeout(LIMIT)? == "started");
    let before = config()?;
    wait_until(LIMIT, "the agent to be settled", || says(&before))?;
    while agent.events.try_recv().is_ok() {}
    let program = Loaded::on_id(id)?.context("nothing is attached")?.program;
    fault::arm_to_kill(place.parse()?);
    fs::write(file, configs(u32::from(before == config_of(&configs(0))?)))?;
    let after = config()?;
    wait_until(LIMIT, "the other config to be said", || says(&after))?;
    fault::stop();
    let loaded = Loaded::on_id(id)?.context("nothing is attached")?;
    ensure!(loaded.program == program, "it built another set");
    exit(0)
}

/// Killed at any place while it says that it goes by other names: what is in force
/// says of itself one thing or the other, and the next agent goes on from there.
#[test]
fn killed_while_it_says_that_it_goes_by_other_names() -> Result<()> {
    killed_at_every_place(
        "killed_while_it_says_that_it_goes_by_other_names",
        of_names,
        [60, 60],
    )
}

/// The same while it gives policies other values.
#[test]
fn killed_while_it_goes_over_to_other_values() -> Result<()> {
    killed_at_every_place(
        "killed_while_it_goes_over_to_other_values",
        of_values,
        [63, 64],
    )
}

/// `idle` is what connections have by one config and by the other.
fn killed_at_every_place(test: &str, configs: fn(u32) -> String, idle: [i32; 2]) -> Result<()> {
    if let Ok(told) = std::env::var(KILLED_AT) {
        return victim(&told, configs);
    }
    require!(Need::Program("bpftool"));
    let _alone = alone();
    let cgroup = Cgroup::new()?;
    let pins = Pins::new();
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    fs::write(&file, configs(0))?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let old = probe.connection()?.0;
    let configs = [config_of(&configs(0))?, config_of(&configs(1))?];
    let mut since = None;
    for place in 0..PLACES {
        let mut command = Command::new(std::env::current_exe()?);
        let (cgroup_path, pins, path) = (cgroup.path(), pins.name(), file.path().display());
        command.args(["--exact", test, "--nocapture"]);
        command.env(KILLED_AT, format!("{place}:{cgroup_path}:{pins}:{path}"));
        let ended = output(&mut command, LIMIT)?;
        let found = InForce::on(cgroup.id()?)?.context("nothing is in force")?;
        let description = found.record?.description();
        let said = configs
            .iter()
            .position(|config| *config == description.config);
        let said = said.with_context(|| format!("place {place}: {:?}", description.config))?;
        let new = probe.connection()?.0;
        let has = probe.options(new)?.idle;
        ensure!(idle.contains(&has), "place {place}: {has}");
        let since = *since.get_or_insert(description.enforced_since);
        ensure!(
            description.enforced_since == since,
            "place {place}: the next agent did not go on from there"
        );
        if ended.code == Some(0) {
            // Two copies, each by two calls or more, or three calls and two copies.
            ensure!(place >= 4, "only {place} places");
            for socket in [old, new] {
                let has = probe.options(socket)?.idle;
                ensure!(has == idle[said], "{has} s by config {said}");
            }
            detach(&cgroup)?;
            return Ok(());
        }
        // By a signal, not by an error of its own.
        ensure!(ended.code.is_none(), "place {place}: {ended:?}");
    }
    bail!("more than {PLACES} places")
}

fn config_of(text: &str) -> Result<Arc<Config>> {
    let file = tempfile::NamedTempFile::with_suffix(".toml")?;
    fs::write(&file, text)?;
    Ok(target::read(&Sources::new(Some(file.path()), &[]), false)?.config)
}

/// Whatever cannot be taken off, or be removed, is whole until it is, and is taken off
/// by the next one who is asked to.
#[test]
fn an_end_that_fails() -> Result<()> {
    require!(Need::Program("bpftool"));
    let _alone = alone();
    let mut node = Node::new()?;
    node.services.push(node.cgroup.child("s0")?);
    // So that there is a second link.
    node.bounds = true;
    node.write(node.wanted)?;
    let failed = at_every_place("detach", |place| {
        fault::stop();
        node.start()?;
        node.recovers()?;
        fault::arm(Some(place));
        let ended = node.end(Request::Detach);
        fault::stop();
        if node.in_force()?.is_some() {
            ensure!(ended.is_err(), "it does not say that it is in force still");
            node.agrees(node.wanted)?;
        } else {
            ensure!(node.connection(None)? == Options::UNTOUCHED);
        }
        detach(&node.cgroup)?;
        node.has_nothing()
    })?;
    for operation in [fault::Operation::LinkDetach, fault::Operation::Unpin] {
        assert!(failed.contains(&operation), "{operation:?} never failed");
    }
    at_every_place("stop", |place| {
        fault::stop();
        node.start()?;
        node.recovers()?;
        fault::arm(Some(place));
        let agent = node.agent.take().context("no agent")?;
        kill_process(getpid(), Signal::TERM)?;
        agent.ended()?;
        fault::stop();
        node.agrees(node.wanted)
    })?;
    detach(&node.cgroup)?;
    node.has_nothing()
}

/// Changes in any order, with failures anywhere.
#[test]
fn anything_at_any_time() -> Result<()> {
    const STEPS: u32 = 40;
    require!(Need::Program("bpftool"));
    let _alone = alone();
    let mut node = Node::new()?;
    node.start()?;
    node.recovers()?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let mut seed = u64::from(now.subsec_nanos()) | 1;
    eprintln!("seed {seed}");
    let mut below = |end: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % end
    };
    let mut made = 0;
    for step in 0..STEPS {
        let before = node.wanted;
        fault::arm(Some(u32::try_from(below(60))?));
        let mut did = Vec::new();
        for _ in 0..=below(3) {
            match below(4) {
                0 | 1 => {
                    let policy = Policy {
                        own: 70 + u32::try_from(below(50))?,
                        services: 150 + u32::try_from(below(50))?,
                        set: u32::try_from(below(2))?,
                    };
                    did.push(format!("{policy:?}"));
                    node.write(policy)?;
                    // One at a time, so that there are only two that can be in force.
                    break;
                }
                2 => {
                    did.push("a cgroup made".to_owned());
                    node.services.push(node.cgroup.child(format!("s{made}"))?);
                    made += 1;
                }
                _ => {
                    did.push("a cgroup removed".to_owned());
                    node.services.pop();
                }
            }
        }
        let what = || format!("step {step}: {did:?}");
        node.settle().with_context(what)?;
        let failed = fault::arm(None);
        let what = || format!("step {step}: {did:?}, failed: {failed:?}");
        node.comes_to_agree(before).with_context(what)?;
        node.recovers().with_context(what)?;
    }
    node.end(Request::Detach)?;
    node.has_nothing()
}
