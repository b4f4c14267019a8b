//! What is compared: nothing, other programs, ours, and what applications do.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, SockOps},
};
use keepalive_tests::{Cgroup, Netns, bpftool, output};

use crate::{
    agent::Agent,
    load::{Load, Spot},
    timed::LIMIT,
};

/// What holds for everything, as floor and libkeepalive have it too.
pub(crate) const DEFAULT_POLICY: &str = "[default]\n";

pub(crate) const NOTHING: &str = "nothing";
pub(crate) const NOOP: &str = "no-op";
pub(crate) const FLOOR: &str = "floor";
pub(crate) const OURS: &str = "ours";
pub(crate) const BEFORE: &str = "ours before";
pub(crate) const PRELOAD: &str = "libkeepalive";
const APPLICATION: &str = "application";

/// One of those that are compared.
pub(crate) struct Peer {
    pub(crate) name: String,
    attached: Attached,
    sets_options: bool,
    preload: Option<PathBuf>,
    load: Cgroup,
    /// Where the connecting ends are, if not beside the accepting ones.
    connecting: Option<Cgroup>,
    // Goes last: what is attached to it and what is below it go first.
    root: Cgroup,
}

enum Attached {
    Nothing,
    Program { _guard: Ebpf },
    Agent(Agent),
}

impl Peer {
    /// In cgroups of its own, the load one level below what is attached.
    fn make(name: &str, attach: impl FnOnce(&Cgroup) -> Result<Attached>) -> Result<Self> {
        let root = Cgroup::new()?;
        Ok(Self {
            name: name.to_owned(),
            attached: attach(&root)?,
            sets_options: false,
            preload: None,
            load: root.child("load")?,
            connecting: None,
            root,
        })
    }

    pub(crate) fn nothing() -> Result<Self> {
        Self::make(NOTHING, |_| Ok(Attached::Nothing))
    }

    /// One of the programs of the benchmark's object, `noop` or `floor`.
    pub(crate) fn program(name: &str, program: &'static str) -> Result<Self> {
        Self::make(name, |root| {
            let object = std::env::var_os("KEEPALIVE_BENCH_OBJECT")
                .context("KEEPALIVE_BENCH_OBJECT is not set: start with cargo xtask bench")?;
            let mut ebpf = Ebpf::load_file(&object)
                .with_context(|| format!("cannot load {}", object.display()))?;
            let loaded: &mut SockOps = ebpf
                .program_mut(program)
                .with_context(|| format!("the object has no program {program}"))?
                .try_into()?;
            loaded.load()?;
            let cgroup = fs::File::open(root.directory())?;
            loaded.attach(cgroup, CgroupAttachMode::default())?;
            Ok(Attached::Program { _guard: ebpf })
        })
    }

    /// An agent with the config that this gives for its cgroup.
    pub(crate) fn agent(
        name: &str,
        agent: &Path,
        config: impl FnOnce(&Cgroup) -> Result<String>,
    ) -> Result<Self> {
        Self::make(name, |root| {
            let config = config(root)?;
            Ok(Attached::Agent(Agent::start(agent, root, &config)?))
        })
    }

    /// The same, whose policy holds for everything.
    pub(crate) fn ours(name: &str, agent: &Path) -> Result<Self> {
        Self::agent(name, agent, |_| Ok(DEFAULT_POLICY.to_owned()))
    }

    /// The same, with the load so many levels below the attached cgroup.
    pub(crate) fn deep(name: &str, agent: &Path, levels: usize) -> Result<Self> {
        let mut peer = Self::ours(name, agent)?;
        peer.load = peer.root.descendant(&vec!["level"; levels].join("/"))?;
        Ok(peer)
    }

    /// The two ends in cgroups that put one another out of what the program
    /// remembers of cgroups (`PLACES` in keepalive-ebpf/src/recent.rs): a walk
    /// for every socket.
    pub(crate) fn forgetful(name: &str, agent: &Path) -> Result<Self> {
        const PLACES: u32 = 256;
        let mut peer = Self::ours(name, agent)?;
        // The kernel numbers cgroups as they are made, one after the other or, where
        // controllers are counted too, at equal steps.
        for number in 0..PLACES {
            peer.connecting = Some(peer.root.child(format!("other{number}"))?);
        }
        Ok(peer)
    }

    /// An application that sets the options itself, on both ends.
    pub(crate) fn application() -> Result<Self> {
        let mut peer = Self::make(APPLICATION, |_| Ok(Attached::Nothing))?;
        peer.sets_options = true;
        Ok(peer)
    }

    /// Debian's libkeepalive0; none where it is not installed.
    pub(crate) fn preload() -> Result<Option<Self>> {
        let Some(library) = keepalive_tests::libkeepalive() else {
            return Ok(None);
        };
        let mut peer = Self::make(PRELOAD, |_| Ok(Attached::Nothing))?;
        peer.preload = Some(library);
        Ok(Some(peer))
    }

    /// The agent, where there is one.
    pub(crate) fn running(&self) -> Option<&Agent> {
        match &self.attached {
            Attached::Agent(agent) => Some(agent),
            _ => None,
        }
    }

    /// Nanoseconds of CPU of a connection under this peer.
    pub(crate) fn churn(&self, churn: &Churn<'_>) -> Result<f64> {
        let outside = |is_governed: bool, cgroup| match churn.outside {
            Some(outside) if !is_governed => &outside.load,
            _ => cgroup,
        };
        let connecting = self.connecting.as_ref().unwrap_or(&self.load);
        let spot = |cgroup: &Cgroup, netns: &Netns| Spot {
            cgroup: cgroup.directory().to_owned(),
            netns: netns.path().to_owned(),
        };
        let load = Load {
            threads: churn.threads,
            count: churn.count,
            address: churn.address,
            sets_options: self.sets_options,
            listeners: spot(
                outside(churn.sides != Sides::Connecting, &self.load),
                churn.listeners,
            ),
            clients: spot(
                outside(churn.sides != Sides::Accepting, connecting),
                churn.clients,
            ),
        };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--load", &serde_json::to_string(&load)?]);
        if let Some(library) = &self.preload {
            command
                .env("LD_PRELOAD", library)
                .env("KEEPALIVE", "on")
                .env("KEEPIDLE", "60")
                .env("KEEPINTVL", "10")
                .env("KEEPCNT", "6");
        }
        let done = output(&mut command, LIMIT)?;
        let cpu = done.stdout.trim().parse();
        cpu.with_context(|| format!("the load failed: {}", done.stderr.trim()))
    }

    /// What the attached program has used so far, while the kernel counts it.
    pub(crate) fn used(&self) -> Result<Used> {
        let root = self.root.directory().to_string_lossy();
        let shown = bpftool(&["cgroup", "show", &root])?;
        let mut programs = shown.as_array().into_iter().flatten();
        let program = programs.find(|program| {
            // With the prefix `cgroup_` in newer ones.
            let hook = program["attach_type"].as_str();
            hook.is_some_and(|hook| hook.ends_with("sock_ops"))
        });
        let program = program.context("nothing is attached")?;
        let shown = bpftool(&["prog", "show", "id", &program["id"].to_string()])?;
        // Left out as long as it is zero.
        let number = |name: &str| shown[name].as_f64().unwrap_or_default();
        Ok(Used {
            nanoseconds: number("run_time_ns"),
            calls: number("run_cnt"),
        })
    }
}

/// Whose end of the connections is governed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sides {
    Both,
    Connecting,
    Accepting,
}

/// Connections that are made and closed.
pub(crate) struct Churn<'a> {
    pub(crate) sides: Sides,
    /// Whose cgroup the other side is in, unless both are governed.
    pub(crate) outside: Option<&'a Peer>,
    pub(crate) threads: u32,
    /// In each thread.
    pub(crate) count: u32,
    pub(crate) address: Ipv4Addr,
    pub(crate) listeners: &'a Netns,
    pub(crate) clients: &'a Netns,
}

impl<'a> Churn<'a> {
    /// Over the loopback of a namespace, by one thread.
    pub(crate) fn over_loopback(netns: &'a Netns) -> Self {
        Self {
            sides: Sides::Both,
            outside: None,
            threads: 1,
            count: 1_500,
            address: Ipv4Addr::LOCALHOST,
            listeners: netns,
            clients: netns,
        }
    }
}

/// Lets a namespace use all ports, and without TIME_WAIT, which would use them up.
pub(crate) fn with_ports(netns: &Netns) -> Result<()> {
    netns.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    netns.sysctl("net/ipv4/tcp_max_tw_buckets", "0")
}

/// What a BPF program used.
#[derive(Clone, Copy, Default)]
pub(crate) struct Used {
    pub(crate) nanoseconds: f64,
    pub(crate) calls: f64,
}
