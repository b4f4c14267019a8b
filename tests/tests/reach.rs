//! What `LD_PRELOAD` misses and a BPF program does not: Debian's libkeepalive0
//! beside the agent, on the same programs.

use anyhow::{Context, Result};
use keepalive_tests::{
    Agent, Cgroup, GoProbe, Need, Options, Place, Probe, Program, Side, libkeepalive, require,
};

const BUILT_IN: Options = Options::on(60, 10, 6);

/// What the environment below makes of a program that libkeepalive reaches.
const PRELOADED: Options = Options::on(321, 21, 4);

/// The connecting and the accepting side of a program's connection to itself.
fn both_sides(
    program: Program,
    place: Place<'_>,
    variables: &[(&str, &str)],
) -> Result<[Options; 2]> {
    if program == Program::Go {
        let mut go = GoProbe::start(false, place, variables)?;
        return Ok([go.options(Side::Connecting)?, go.options(Side::Accepting)?]);
    }
    let mut probe = Probe::start_with(program, place, variables)?;
    let (connecting, accepting) = probe.connection()?;
    Ok([probe.options(connecting)?, probe.options(accepting)?])
}

fn is_missed_by_preload_and_reached_by_us(program: Program) -> Result<()> {
    let library = libkeepalive().context("no libkeepalive")?;
    let library = library.to_str().context("a path in UTF-8")?;
    let preload = [
        ("LD_PRELOAD", library),
        ("KEEPALIVE", "on"),
        ("KEEPIDLE", "321"),
        ("KEEPINTVL", "21"),
        ("KEEPCNT", "4"),
    ];
    let cgroup = Cgroup::new()?;
    let place = Place::from(&cgroup);
    assert_eq!(
        both_sides(Program::Dynamic, place, &preload)?,
        [PRELOADED; 2],
        "libkeepalive does nothing here, which makes the comparison worthless"
    );
    assert_eq!(
        both_sides(program, place, &preload)?,
        [Options::UNTOUCHED; 2],
        "libkeepalive reaches it"
    );
    let _agent = Agent::start_built_in(&cgroup)?;
    assert_eq!(both_sides(program, place, &[])?, [BUILT_IN; 2]);
    assert_eq!(both_sides(program, place, &preload)?, [BUILT_IN; 2]);
    Ok(())
}

#[test]
fn a_static_binary() -> Result<()> {
    require!(Need::Libkeepalive, Need::NoConfig);
    is_missed_by_preload_and_reached_by_us(Program::Static)
}

#[test]
fn a_program_on_raw_system_calls() -> Result<()> {
    require!(Need::Libkeepalive, Need::NoConfig);
    is_missed_by_preload_and_reached_by_us(Program::Raw)
}

#[test]
fn a_go_binary() -> Result<()> {
    require!(Need::Libkeepalive, Need::Built(Program::Go), Need::NoConfig);
    is_missed_by_preload_and_reached_by_us(Program::Go)
}

#[test]
fn a_dynamic_binary() -> Result<()> {
    require!(Need::NoConfig);
    let cgroup = Cgroup::new()?;
    let place = Place::from(&cgroup);
    assert_eq!(
        both_sides(Program::Dynamic, place, &[])?,
        [Options::UNTOUCHED; 2]
    );
    let _agent = Agent::start_built_in(&cgroup)?;
    assert_eq!(both_sides(Program::Dynamic, place, &[])?, [BUILT_IN; 2]);
    Ok(())
}

/// Package net sets 15 s once the connection stands: the application's last word.
#[test]
fn what_go_sets_by_itself_stands() -> Result<()> {
    require!(Need::Built(Program::Go));
    let cgroup = Cgroup::new()?;
    let _agent = Agent::start(&cgroup, "[default]\nuser-timeout = \"200s\"\n")?;
    let mut go = GoProbe::start(true, &cgroup, &[])?;
    for side in [Side::Connecting, Side::Accepting] {
        let options = go.options(side)?;
        assert!(options.keepalive, "{side:?}: {options:?}");
        assert_eq!(options.idle, 15, "{side:?}: {options:?}");
        // That the agent was there before shows in what Go does not set.
        assert_eq!(options.user_timeout, 200_000, "{side:?}: {options:?}");
    }
    Ok(())
}

/// A program that was running before the agent: what it connects from now on.
#[test]
fn a_program_that_is_already_running() -> Result<()> {
    require!(Need::NoConfig);
    let cgroup = Cgroup::new()?;
    let mut probe = Probe::start(Program::Static, &cgroup)?;
    let (listener, address) = probe.listener("127.0.0.1:0")?;
    let early = probe.socket(keepalive_tests::Kind::of(address))?;
    let _agent = Agent::start_built_in(&cgroup)?;
    probe.connect(early, address)?;
    let accepting = probe.accept(listener)?;
    assert_eq!(probe.options(early)?, BUILT_IN);
    assert_eq!(probe.options(accepting)?, BUILT_IN);
    Ok(())
}
