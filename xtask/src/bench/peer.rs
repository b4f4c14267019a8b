//! What is compared: nothing, other programs, ours, and what applications do.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, SockOps},
};
use tempfile::NamedTempFile;

use super::place::{self, Cgroup, Netns, Place, Process};
use crate::workspace;

/// What holds for everything, as floor and libkeepalive have it too.
pub(crate) const DEFAULT_POLICY: &str = "[default]\n";

/// The library of Debian's libkeepalive0.
const LIBKEEPALIVE: &str = "/usr/lib/libkeepalive.so";

pub(crate) const NOTHING: &str = "nothing";
pub(crate) const NOOP: &str = "no-op";
pub(crate) const FLOOR: &str = "floor";
pub(crate) const OURS: &str = "ours";
pub(crate) const BEFORE: &str = "ours before";
pub(crate) const PRELOAD: &str = "libkeepalive";
pub(crate) const OWN: &str = "application";

/// One of those that are compared.
pub(crate) struct Peer {
    pub(crate) name: String,
    attached: Attached,
    own_options: bool,
    preload: Option<&'static str>,
    load: Cgroup,
    /// Where the connecting ends are, if not beside the accepting ones.
    connecting: Option<Cgroup>,
    // Goes last: what is attached to it and what is below it go first.
    root: Cgroup,
}

enum Attached {
    Nothing,
    Program(Ebpf, &'static str),
    Agent(Agent),
}

impl Peer {
    /// In cgroups of its own, the load one level below what is attached.
    fn make(
        place: &Place,
        name: &str,
        attach: impl FnOnce(&Cgroup) -> Result<Attached>,
    ) -> Result<Self> {
        let root = place.cgroup()?;
        let load = root.child("load")?;
        Ok(Self {
            name: name.to_owned(),
            attached: attach(&root)?,
            own_options: false,
            preload: None,
            load,
            connecting: None,
            root,
        })
    }

    pub(crate) fn nothing(place: &Place) -> Result<Self> {
        Self::make(place, NOTHING, |_| Ok(Attached::Nothing))
    }

    /// One of the programs of the benchmark's object.
    fn program(place: &Place, name: &str, program: &'static str) -> Result<Self> {
        Self::make(place, name, |root| {
            let object = workspace::bpf_binary("bench");
            let mut ebpf = Ebpf::load_file(&object)
                .with_context(|| format!("cannot load {}", object.display()))?;
            let loaded = sock_ops(&mut ebpf, program)?;
            loaded.load()?;
            loaded.attach(root.open()?, CgroupAttachMode::default())?;
            Ok(Attached::Program(ebpf, program))
        })
    }

    pub(crate) fn noop(place: &Place) -> Result<Self> {
        Self::program(place, NOOP, "noop")
    }

    pub(crate) fn floor(place: &Place) -> Result<Self> {
        Self::program(place, FLOOR, "floor")
    }

    pub(crate) fn ours(place: &Place, agent: &Path) -> Result<Self> {
        Self::agent(place, OURS, agent, DEFAULT_POLICY)
    }

    pub(crate) fn agent(place: &Place, name: &str, agent: &Path, config: &str) -> Result<Self> {
        Self::make(place, name, |root| {
            Ok(Attached::Agent(Agent::start(place, agent, root, config)?))
        })
    }

    /// An agent with so many policies, each of a cgroup of its own; the load is
    /// in none of them.
    pub(crate) fn many(place: &Place, name: &str, agent: &Path, policies: u32) -> Result<Self> {
        Self::make(place, name, |root| {
            root.crowd(place, policies)?;
            let mut config = DEFAULT_POLICY.to_owned();
            for number in 0..policies {
                let path = root.path();
                // Writing to a string does not fail.
                let _ = write!(
                    config,
                    "[[policy]]\nname = \"p{number}\"\ncgroup = \"{path}/c{number}\"\nidle = \"90s\"\n"
                );
            }
            Ok(Attached::Agent(Agent::start(place, agent, root, &config)?))
        })
    }

    /// An agent whose policy is for so many networks, the load's among them.
    pub(crate) fn networks(place: &Place, name: &str, agent: &Path, count: u32) -> Result<Self> {
        Self::make(place, name, |root| {
            let path = root.path();
            let mut config = format!(
                "[[policy]]\nname = \"remote\"\ncgroup = \"{path}\"\nremote = [\"127.0.0.0/8\""
            );
            for number in 1..count {
                let (high, low) = (number / 256, number % 256);
                // Writing to a string does not fail.
                let _ = write!(config, ", \"10.{high}.{low}.0/24\"");
            }
            config.push_str("]\n");
            Ok(Attached::Agent(Agent::start(place, agent, root, &config)?))
        })
    }

    /// The load, so many levels below the attached cgroup.
    pub(crate) fn deep(place: &Place, name: &str, agent: &Path, levels: u32) -> Result<Self> {
        let mut peer = Self::agent(place, name, agent, DEFAULT_POLICY)?;
        for _ in 1..levels {
            // Goes with its parent, which removes all that is below it.
            let next = peer.load.child("load")?;
            let above = std::mem::replace(&mut peer.load, next);
            std::mem::forget(above);
        }
        Ok(peer)
    }

    /// The two ends in cgroups that put one another out of what the program
    /// remembers of cgroups (`PLACES` in keepalive-ebpf/src/recent.rs): a walk
    /// for every socket.
    pub(crate) fn forgetful(place: &Place, name: &str, agent: &Path) -> Result<Self> {
        const PLACES: u32 = 256;
        let mut peer = Self::agent(place, name, agent, DEFAULT_POLICY)?;
        // The kernel numbers cgroups as they are made, one after the other or, where
        // controllers are counted too, at equal steps.
        for number in 0..PLACES {
            peer.connecting = Some(peer.root.child(&format!("other{number}"))?);
        }
        Ok(peer)
    }

    /// An application that sets the options itself, on both ends.
    pub(crate) fn own(place: &Place) -> Result<Self> {
        let mut peer = Self::make(place, OWN, |_| Ok(Attached::Nothing))?;
        peer.own_options = true;
        Ok(peer)
    }

    /// None where it is not installed.
    pub(crate) fn preload(place: &Place) -> Result<Option<Self>> {
        if !Path::new(LIBKEEPALIVE).exists() {
            return Ok(None);
        }
        let mut peer = Self::make(place, PRELOAD, |_| Ok(Attached::Nothing))?;
        peer.preload = Some(LIBKEEPALIVE);
        Ok(Some(peer))
    }

    /// Where a process writes itself to be governed.
    pub(crate) fn door(&self) -> PathBuf {
        self.load.door()
    }

    /// The agent, where there is one.
    pub(crate) fn process(&self) -> Option<&Process> {
        match &self.attached {
            Attached::Agent(agent) => Some(&agent.process),
            _ => None,
        }
    }

    /// The churn of connections under this peer.
    pub(crate) fn churn(&self, place: &Place, churn: &Churn<'_>) -> Result<Cost> {
        let stay = || PathBuf::from("-");
        let netns = |netns: Option<&Netns>| netns.map_or_else(stay, Netns::path);
        let outside = |governed: bool, cgroup: &Cgroup| {
            if governed {
                cgroup.door()
            } else {
                churn.outside.map_or_else(stay, Peer::door)
            }
        };
        let mut command = place.load("churn");
        command
            .arg(if self.own_options { "own" } else { "-" })
            .arg(churn.threads.to_string())
            .arg(churn.count.to_string())
            .arg(churn.address)
            .arg(outside(churn.sides != Sides::Connecting, &self.load))
            .arg(netns(churn.listeners))
            .arg(outside(
                churn.sides != Sides::Accepting,
                self.connecting.as_ref().unwrap_or(&self.load),
            ))
            .arg(netns(churn.clients));
        self.prepare(&mut command);
        let [connections, wall, cpu] = place.measure(&mut command)?;
        Ok(Cost {
            wall: wall / connections,
            cpu,
        })
    }

    /// What reaches the load by its environment.
    pub(crate) fn prepare(&self, command: &mut Command) {
        if let Some(library) = self.preload {
            command
                .env("LD_PRELOAD", library)
                .env("KEEPALIVE", "on")
                .env("KEEPIDLE", "60")
                .env("KEEPINTVL", "10")
                .env("KEEPCNT", "6");
        }
    }

    /// What the attached program has used so far, while the kernel counts it.
    pub(crate) fn used(&self) -> Result<Used> {
        match &self.attached {
            Attached::Nothing => Ok(Used::default()),
            Attached::Program(ebpf, name) => {
                let program: &SockOps = ebpf
                    .program(name)
                    .with_context(|| format!("no program {name}"))?
                    .try_into()?;
                let fd = program.fd()?.as_fd().as_raw_fd();
                let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
                Used::read(&info)
                    .map(|(_, used)| used)
                    .context("no figures")
            }
            Attached::Agent(agent) => Used::by_sock_ops_of(agent.process.id()),
        }
    }
}

fn sock_ops<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SockOps> {
    Ok(ebpf
        .program_mut(name)
        .with_context(|| format!("the object has no program {name}"))?
        .try_into()?)
}

/// Whose end of the connections is governed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sides {
    Both,
    Connecting,
    Accepting,
}

/// A load of connections that are made and closed.
pub(crate) struct Churn<'a> {
    pub(crate) sides: Sides,
    /// Whose cgroup the other side is in, unless both are governed.
    pub(crate) outside: Option<&'a Peer>,
    pub(crate) threads: u32,
    /// In each thread.
    pub(crate) count: u32,
    pub(crate) address: &'static str,
    pub(crate) listeners: Option<&'a Netns>,
    pub(crate) clients: Option<&'a Netns>,
}

/// Of a connection, in nanoseconds.
pub(crate) struct Cost {
    pub(crate) wall: f64,
    pub(crate) cpu: f64,
}

/// What BPF programs used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) nanoseconds: u64,
    pub(crate) calls: u64,
}

impl Used {
    /// By all programs on the hook that a process holds.
    fn by_sock_ops_of(process: u32) -> Result<Self> {
        let mut programs = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{process}/fdinfo"))? {
            // A descriptor that was closed meanwhile is none of a program.
            let info = fs::read_to_string(entry?.path()).unwrap_or_default();
            programs.extend(Self::read(&info));
        }
        ensure!(!programs.is_empty(), "process {process} has no program");
        Ok(programs.values().fold(Self::default(), |sum, used| Self {
            nanoseconds: sum.nanoseconds + used.nanoseconds,
            calls: sum.calls + used.calls,
        }))
    }

    /// The id of a sock_ops program and what it used, from its /proc fdinfo.
    fn read(info: &str) -> Option<(u64, Self)> {
        /// BPF_PROG_TYPE_SOCK_OPS
        const SOCK_OPS: u64 = 13;
        let field = |name: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .and_then(|value| value.trim().parse().ok())
        };
        let used = Self {
            nanoseconds: field("run_time_ns")?,
            calls: field("run_cnt")?,
        };
        (field("prog_type")? == SOCK_OPS).then_some((field("prog_id")?, used))
    }

    /// What was used since.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            nanoseconds: self.nanoseconds - before.nanoseconds,
            calls: self.calls - before.calls,
        }
    }
}

/// A running agent that governs one cgroup.
pub(crate) struct Agent {
    pub(crate) process: Process,
    pub(crate) config: NamedTempFile,
    /// From its start until it enforced, in nanoseconds.
    pub(crate) started_in: f64,
}

impl Agent {
    pub(crate) fn start(
        place: &Place,
        program: &Path,
        cgroup: &Cgroup,
        config: &str,
    ) -> Result<Self> {
        let config = place::file(config)?;
        let start = Instant::now();
        let mut process = place.start(
            place
                .load("guard")
                .arg("-")
                .arg(program)
                .args(["run", "--json", "--cgroup", cgroup.path(), "--config"])
                .arg(config.path()),
        )?;
        wait_for(&mut process, "started")?;
        let started_in = nanoseconds(start);
        wait_for(&mut process, "swept")?;
        Ok(Self {
            process,
            config,
            started_in,
        })
    }
}

/// Reads what an agent tells until it tells this.
pub(crate) fn wait_for(agent: &mut Process, event: &str) -> Result<()> {
    let wanted = format!("{{\"event\":\"{event}\"");
    loop {
        let line = agent
            .line()
            .with_context(|| format!("waiting for the agent to have {event}"))?;
        if line.starts_with(&wanted) {
            return Ok(());
        }
    }
}

/// Nanoseconds since then.
pub(crate) fn nanoseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "\
pos:	0
flags:	02000002
prog_type:	13
prog_jited:	1
prog_tag:	a5cdba2bb1b0d8a8
memlock:	12288
prog_id:	77
run_time_ns:	123456
run_cnt:	900
recursion_misses:	0
";

    #[test]
    fn fdinfo_tells_what_a_program_used() {
        let used = Used {
            nanoseconds: 123_456,
            calls: 900,
        };
        assert_eq!(Used::read(INFO), Some((77, used)));
        let iterator = INFO.replace("prog_type:\t13", "prog_type:\t26");
        assert_eq!(Used::read(&iterator), None);
        assert_eq!(Used::read("pos:\t0\n"), None);
    }
}
