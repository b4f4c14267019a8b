//! Names of units, containers and pods that come into the config while the agent is
//! doing something else: the first connection of what is called so has its policy.
//!
//! The agent runs on a thread of the test, built with its feature `fault-injection`, so
//! that what it does can be held where it is.

use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_agent::daemon::control::Request;
use keepalive_agent::datapath::{InForce, State, fault};
use keepalive_tests::{
    AgentThread, Cgroup, Need, Pins, Probe, Program, Socket, require, wait_until,
};

const LIMIT: Duration = Duration::from_mins(1);

/// What is held is held in the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// An agent on its thread, a slice for it, and the file that it reads.
struct Node {
    slice: Cgroup,
    _pins: Pins,
    file: tempfile::NamedTempFile,
    agent: AgentThread,
}

impl Node {
    fn start(config: &str) -> Result<Self> {
        let (slice, pins) = (Cgroup::with_suffix(".slice")?, Pins::new());
        let file = tempfile::NamedTempFile::with_suffix(".toml")?;
        fs::write(&file, config)?;
        let agent = AgentThread::start(slice.path(), pins.name(), file.path());
        let node = Self {
            slice,
            _pins: pins,
            file,
            agent,
        };
        node.agent.hears("started")?;
        node.is_settled()?;
        Ok(node)
    }

    fn write(&self, config: &str) -> Result<()> {
        Ok(fs::write(&self.file, config)?)
    }

    /// What the kernel says that is in force, and of its agent.
    fn in_force(&self) -> Result<(String, State)> {
        let found = InForce::on(self.slice.id()?)?.context("nothing is in force")?;
        let record = found.record?;
        let description = record.description();
        let selectors = description.config.policies.iter();
        let selectors: Vec<_> = selectors.map(|named| named.selector.to_string()).collect();
        Ok((selectors.join("; "), record.state()?))
    }

    fn is_settled(&self) -> Result<()> {
        wait_until(LIMIT, "the sweep", || {
            let (_, state) = self.in_force()?;
            Ok(state.settled && !state.sweep.under_way)
        })
    }

    fn knows(&self, name: &str) -> Result<()> {
        wait_until(LIMIT, name, || Ok(self.in_force()?.0.contains(name)))
    }

    fn end(self) -> Result<()> {
        self.agent.end(self.slice.path(), Request::Detach)
    }
}

/// A connection of a process in a cgroup.
struct Connected(Probe, Socket);

impl Connected {
    fn first_in(cgroup: &Cgroup) -> Result<Self> {
        let mut probe = Probe::start(Program::Static, cgroup)?;
        let (socket, _) = probe.connection()?;
        Ok(Self(probe, socket))
    }

    fn idle(&mut self) -> Result<i32> {
        Ok(self.0.options(self.1)?.idle)
    }
}

/// Each time is in a set of its own.
fn config(named: u32, units: &[&str]) -> String {
    let values = values(named, units);
    format!("{values}[[policy]]\nname = 'set-{named}'\nport = 1\n")
}

/// The same without.
fn values(named: u32, units: &[&str]) -> String {
    format!(
        "[default]\nidle = '60s'\n[[policy]]\nname = 'named'\nidle = '{named}s'\nunit = {units:?}\n"
    )
}

#[test]
fn while_a_set_is_built() -> Result<()> {
    require!(Need::Built(Program::Static));
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let node = Node::start(&config(63, &["made.service"]))?;
    let [early, busy] = ["early.service", "busy.service"].map(|name| node.slice.child(name));
    let (early, busy) = (early?, busy?);
    let mut of_busy = Connected::first_in(&busy)?;

    let hold = fault::Hold::on("build");
    node.write(&config(64, &["made.service"]))?;
    wait_until(LIMIT, "a set to be built", || Ok(hold.is_met()))?;
    node.write(&config(
        64,
        &["made.service", "early.service", "busy.service"],
    ))?;
    node.knows("early.service")?;
    let made = node.slice.child("made.service")?;
    let mut of_early = Connected::first_in(&early)?;
    assert_eq!(of_early.idle()?, 63, "what is in force has this policy so");
    wait_until(LIMIT, "the new cgroup's policy", || {
        Ok(Connected::first_in(&made)?.idle()? == 63)
    })?;
    let mut of_made = Connected::first_in(&made)?;
    // What has connections waits for a sweep.
    ensure!(!node.in_force()?.0.contains("busy.service"));
    assert_eq!(Connected::first_in(&busy)?.idle()?, 60);
    drop(hold);

    node.agent.hears("reloaded")?;
    for cgroup in [&early, &made] {
        assert_eq!(Connected::first_in(cgroup)?.idle()?, 64);
    }
    node.is_settled()?;
    node.knows("busy.service")?;
    assert_eq!(Connected::first_in(&busy)?.idle()?, 64);
    // What was made meanwhile is known to have its values from a policy.
    for named in [64, 65] {
        node.write(&config(
            named,
            &["made.service", "early.service", "busy.service"],
        ))?;
        for connected in [&mut of_early, &mut of_made, &mut of_busy] {
            wait_until(LIMIT, "the connections to follow", || {
                Ok(connected.idle()? == i32::try_from(named)?)
            })?;
        }
    }
    node.end()
}

#[test]
fn during_the_first_pass_of_a_sweep() -> Result<()> {
    during_the_first_pass(config)
}

#[test]
fn during_the_first_pass_for_other_values() -> Result<()> {
    during_the_first_pass(values)
}

fn during_the_first_pass(config: fn(u32, &[&str]) -> String) -> Result<()> {
    require!(Need::Built(Program::Static));
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let node = Node::start(&config(63, &["none.service"]))?;
    let [early, busy] = ["early.service", "busy.service"].map(|name| node.slice.child(name));
    let (early, busy) = (early?, busy?);
    let mut of_busy = Connected::first_in(&busy)?;

    let hold = fault::Hold::on("sweep");
    node.write(&config(64, &["none.service"]))?;
    wait_until(LIMIT, "a sweep", || Ok(hold.is_met()))?;
    node.write(&config(64, &["early.service", "busy.service"]))?;
    node.knows("early.service")?;
    let mut of_early = Connected::first_in(&early)?;
    assert_eq!(of_early.idle()?, 64);
    let (selectors, state) = node.in_force()?;
    ensure!(
        !state.settled && !selectors.contains("busy.service"),
        "{selectors}"
    );
    drop(hold);

    node.knows("busy.service")?;
    node.is_settled()?;
    ensure!(!node.in_force()?.0.contains("none.service"));
    for named in [64, 65] {
        node.write(&config(named, &["early.service", "busy.service"]))?;
        for connected in [&mut of_early, &mut of_busy] {
            wait_until(LIMIT, "the connections to follow", || {
                Ok(connected.idle()? == i32::try_from(named)?)
            })?;
        }
    }
    node.end()
}
