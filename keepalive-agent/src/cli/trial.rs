//! A trial connection: whether the kernel really does what the agent is for.
//!
//! A child process in a cgroup of its own connects to itself over loopback,
//! under a policy that no other socket is subject to, and tells what options
//! both ends have.

use std::{
    fmt, fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use keepalive_common::{
    environment::Environment,
    plan::{Options, plan_unset},
    policy::{Policy, Range},
};
use rustix::net::sockopt;
use serde::{Deserialize, Serialize};

use crate::{
    assignment::{Assigned, Assignment, Claim},
    config::Config,
    datapath::{Attachment, Blueprint, Change, Events, LoadedSet, Origin},
    hierarchy::{Cgroup, Hierarchy},
    kernel::layout::Kernel,
    names::printable_path,
    rules::Rules,
};

/// The hidden subcommand that is the child.
pub(super) const COMMAND: &str = "trial-connection";

/// Values that no default and hardly any application has.
const POLICY: Policy = {
    let mut policy = Policy::BUILT_IN;
    policy.idle = Range::exactly(4321);
    policy.interval = Range::exactly(321);
    policy.probes = Range::exactly(21);
    policy.user_timeout = Range::exactly(54_321);
    policy
};

/// Why a trial brought no proof.
#[derive(Debug)]
pub(super) enum Failure {
    /// The kernel took the program and yet the options are not as they should be.
    NoEffect(String),
    /// The trial itself could not be made.
    NotTried(anyhow::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoEffect(what) => f.write_str(what),
            Self::NotTried(error) => write!(f, "{error:#}"),
        }
    }
}

/// Makes the connection below `root` and looks at both ends.
pub(super) fn parent(kernel: &Kernel, hierarchy: &Hierarchy, root: &Cgroup) -> Result<(), Failure> {
    let ends = connect_under_policy(kernel, hierarchy, root).map_err(Failure::NotTried)?;
    let wanted = plan_unset(&POLICY, &Environment::UNKNOWN);
    for (end, has) in [
        ("connecting", ends.connecting),
        ("accepting", ends.accepting),
    ] {
        if Options::from(has) != wanted {
            return Err(Failure::NoEffect(format!(
                "the {end} end has {has:?} instead of {wanted:?}"
            )));
        }
    }
    Ok(())
}

/// A policy set for the trial, in which the policy claims this cgroup.
pub(super) fn build(kernel: &Kernel, root: &Cgroup) -> Result<LoadedSet> {
    let assignment = Assignment {
        policies: vec![Assigned {
            name: "trial".to_owned(),
            policy: POLICY,
            rules: Rules::default(),
        }],
        claims: vec![Claim {
            cgroup: root.clone(),
            policies: vec![0],
        }],
        grants: Vec::new(),
    };
    Ok(LoadedSet::build(Blueprint {
        kernel,
        root,
        config: &Arc::new(Config {
            default: Some(POLICY),
            policies: Vec::new(),
            self_service: None,
        }),
        origin: &Origin::default(),
        assignment: &assignment,
        before: None,
        bounded: Some(Vec::new()),
        previous: None,
    })?)
}

fn connect_under_policy(kernel: &Kernel, hierarchy: &Hierarchy, root: &Cgroup) -> Result<Ends> {
    let scratch = Scratch::new(hierarchy, root)?;
    let set = build(kernel, &scratch.cgroup)?;
    let directory = hierarchy.open(&scratch.cgroup)?;
    let _attachment = Attachment::attach(&set, &directory, scratch.cgroup.id, None)?;
    let mut trial = Trial::start()?;
    scratch.take_in(trial.0.id())?;
    trial.ends()
}

/// Makes and removes a cgroup below `root`, and looks whether the kernel tells
/// of both.
pub(super) fn new_cgroup(
    kernel: &Kernel,
    hierarchy: &Hierarchy,
    root: &Cgroup,
) -> Result<(), Failure> {
    let (cgroup, changes) = changes(kernel, hierarchy, root).map_err(Failure::NotTried)?;
    for change in [Change::Made(cgroup.clone()), Change::Removed(cgroup)] {
        if !changes.contains(&change) {
            return Err(Failure::NoEffect(format!(
                "the kernel did not tell of {change:?}"
            )));
        }
    }
    Ok(())
}

fn changes(kernel: &Kernel, hierarchy: &Hierarchy, root: &Cgroup) -> Result<(Cgroup, Vec<Change>)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("starting the runtime")?;
    let _inside = runtime.enter();
    let mut events = Events::load(kernel, hierarchy)?;
    let cgroup = Scratch::new(hierarchy, root)?.cgroup.clone();
    Ok((cgroup, events.now()))
}

/// A cgroup for the trial, removed in the end.
struct Scratch {
    cgroup: Cgroup,
    directory: PathBuf,
}

impl Scratch {
    fn new(hierarchy: &Hierarchy, root: &Cgroup) -> Result<Self> {
        let name = format!("keepalive-check-{}", std::process::id());
        let path = root.path.join(name.as_bytes());
        let directory = hierarchy.directory(&path);
        fs::create_dir(&directory)
            .with_context(|| format!("making a scratch cgroup {}", printable_path(&directory)))?;
        let cgroup = hierarchy.existing(path.as_path());
        // From here on the directory is removed, whatever happens.
        let scratch = |cgroup| Self { cgroup, directory };
        match cgroup {
            Ok(cgroup) => Ok(scratch(cgroup)),
            Err(error) => {
                drop(scratch(root.clone()));
                Err(error.into())
            }
        }
    }

    fn take_in(&self, process: u32) -> Result<()> {
        let file = self.directory.join("cgroup.procs");
        fs::write(&file, process.to_string())
            .with_context(|| format!("moving the trial process into {}", printable_path(&file)))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.directory) {
            tracing::warn!(
                "removing the scratch cgroup {}: {error}",
                printable_path(&self.directory)
            );
        }
    }
}

/// The child process; ended and waited for before its cgroup is removed.
struct Trial(Child);

impl Trial {
    fn start() -> Result<Self> {
        let child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the trial process")?;
        Ok(Self(child))
    }

    /// Lets the child connect, and reads what it saw.
    fn ends(&mut self) -> Result<Ends> {
        let mut go = self
            .0
            .stdin
            .take()
            .context("the trial process has no stdin")?;
        go.write_all(b"go\n")
            .context("starting the trial connection")?;
        drop(go);
        let out = self
            .0
            .stdout
            .take()
            .context("the trial process has no stdout")?;
        let mut line = String::new();
        BufReader::new(out.take(4096))
            .read_line(&mut line)
            .context("reading the trial's result")?;
        if line.is_empty() {
            bail!("the trial process could not connect over loopback");
        }
        serde_json::from_str(&line).context("understanding the trial's result")
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // It has ended already unless something went wrong; both calls then
        // only say so.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The options of both ends.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Ends {
    connecting: End,
    accepting: End,
}

/// The options of one end, as getsockopt tells them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct End {
    keepalive: bool,
    idle: u64,
    interval: u64,
    probes: u32,
    user_timeout: u32,
}

impl End {
    fn of(stream: &TcpStream) -> io::Result<Self> {
        Ok(Self {
            keepalive: sockopt::socket_keepalive(stream)?,
            idle: sockopt::tcp_keepidle(stream)?.as_secs(),
            interval: sockopt::tcp_keepintvl(stream)?.as_secs(),
            probes: sockopt::tcp_keepcnt(stream)?,
            user_timeout: sockopt::tcp_user_timeout(stream)?,
        })
    }
}

impl From<End> for Options {
    fn from(end: End) -> Self {
        let seconds = |value| u32::try_from(value).unwrap_or(u32::MAX);
        Self {
            keepalive: end.keepalive,
            idle: seconds(end.idle),
            interval: seconds(end.interval),
            probes: end.probes,
            user_timeout: end.user_timeout,
            rto_max: 0,
        }
    }
}

/// The child: waits until it has been moved, connects, tells.
pub(super) fn child() -> Result<()> {
    let mut go = String::new();
    io::stdin().read_line(&mut go)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on loopback")?;
    let connecting = TcpStream::connect(listener.local_addr()?).context("connecting")?;
    let (accepting, _) = listener.accept().context("accepting")?;
    super::output::json(&Ends {
        connecting: End::of(&connecting)?,
        accepting: End::of(&accepting)?,
    })
}
