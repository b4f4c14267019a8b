//! `keepalive-agent explain`: which policy, why, and what comes of it.

use std::{
    borrow::Cow, collections::BTreeSet, fmt::Write as _, fs, net::SocketAddr, path::PathBuf,
    process::ExitCode, sync::Arc, time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::{ArgGroup, Args};
use keepalive_common::{
    environment::Environment,
    history::{Asked, application, replan},
    plan::{Options, plan},
    socket::SocketRecord,
};
use serde::Serialize;
use tracing::warn;

use super::{ConfigFiles, Whose, output};
use crate::{
    assignment::{Assigned, Claimants, DEFAULT, Reason},
    config::{Config, Merged},
    datapath::{Lister, chain},
    duration,
    enforcing::enforcing,
    explain::{Meaning, Path, Verdict, Walk, walk},
    grant::Grant,
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    identity::{Identities, Identity},
    kernel::{layout::Kernel, preflight},
    netns::{self, Namespace},
    rules::Ends,
    sockets::{
        Unseen, each_connection,
        format::IdentityRecord,
        source::{Setting, SettingsRecord, Source},
    },
    view,
};

#[derive(Args, Debug)]
#[command(
    group(ArgGroup::new("what").args(["pid", "cgroup", "unit", "container", "pod", "socket", "remote", "local_port"]).required(true).multiple(true)),
    after_help = "Explains what the running agent does, or what the config would do where none runs \
                  or one is named. A socket belongs to the cgroup in which it was made, and an \
                  accepted one to that of its listener.\n\n\
                  Examples:\n  \
                  keepalive-agent explain --pid 1234\n  \
                  keepalive-agent explain --cgroup /system.slice/redis.service --remote 10.1.2.3:6379\n  \
                  keepalive-agent explain --container web\n  \
                  keepalive-agent explain --socket 10.0.0.5:43210 10.1.2.3:6379\n  \
                  keepalive-agent explain --cgroup /kubepods.slice --config new.toml"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    files: ConfigFiles,

    /// A connection that this process makes
    #[arg(long, value_name = "PID", conflicts_with_all = ["cgroup", "socket", "unit", "container", "pod"])]
    pid: Option<u32>,

    /// A connection made in this cgroup; the root, where only the remote end is
    /// named
    #[arg(long, value_name = "PATH", conflicts_with_all = ["socket", "unit", "container", "pod"])]
    cgroup: Option<PathBuf>,

    #[command(flatten)]
    whose: Whose,

    /// An existing connection, by its addresses as `sockets` shows them
    #[arg(long, num_args = 2, value_names = ["LOCAL", "REMOTE"],
          conflicts_with_all = ["unit", "container", "pod"])]
    socket: Option<Vec<SocketAddr>>,

    /// The remote end that the connection goes to
    #[arg(long, value_name = "ADDR:PORT", conflicts_with = "socket")]
    remote: Option<SocketAddr>,

    /// The port of this end, for a connection that is accepted
    #[arg(long, value_name = "PORT", conflicts_with = "socket")]
    local_port: Option<u16>,

    /// Print one JSON object instead of text for people
    #[arg(long)]
    json: bool,
}

pub(super) fn explain(arguments: &Arguments) -> Result<ExitCode> {
    let hierarchy = Hierarchy::find()?;
    let subject = Subject::of(arguments, &hierarchy)?;
    let enforced = Enforced::find(arguments, &hierarchy, &subject)?;
    let mut explanations = Vec::new();
    for enforced in &enforced {
        let claimants = Claimants::new(&enforced.config, &enforced.root)
            .context("the globs of the config are too large together")?;
        // A cgroup that is gone has no path: the policies of the root count.
        let from = subject.cgroup.as_ref().unwrap_or(&enforced.root.path);
        let walk = walk(&claimants, from, &subject.ends);
        if enforced.may_decide(&subject, &claimants, &walk) {
            explanations.push((enforced, claimants, walk));
        }
    }
    let nobody = Enforced::nobody(&enforced);
    if explanations.is_empty() {
        let claimants = Claimants::new(&nobody.config, &nobody.root)?;
        let from = subject.cgroup.as_ref().unwrap_or(&nobody.root.path);
        let walk = walk(&claimants, from, &subject.ends);
        explanations.push((&nobody, claimants, walk));
    }
    // Programs of a child cgroup run before those of its parents: of two agents
    // the one further up has the last word.
    let decides = explanations
        .iter()
        .find(|(_, _, walk)| walk.claimed.is_some())
        .or(explanations.first());
    let Some((enforced, claimants, walk)) = decides else {
        bail!("no policy can be found");
    };
    let explained = Explained::new(&subject, enforced, claimants, walk);
    if arguments.json {
        output::json(&explained.record())?;
    } else {
        explained.print()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is to be explained.
struct Subject {
    /// None where it was removed, or is out of sight.
    cgroup: Option<CgroupPath>,
    /// What the cgroup is.
    identity: Identity,
    ends: Ends,
    /// The process in whose name a connection is made.
    pid: Option<u32>,
    /// The connection, if it exists.
    found: Option<(Namespace, SocketRecord)>,
    environment: Environment,
}

impl Subject {
    fn of(arguments: &Arguments, hierarchy: &Hierarchy) -> Result<Self> {
        if let Some([local, remote]) = arguments.socket.as_deref() {
            return Self::of_socket(*local, *remote, hierarchy);
        }
        let (cgroup, environment) = match (arguments.pid, &arguments.cgroup) {
            (Some(pid), _) => (cgroup_of(pid, hierarchy)?, environment_of(pid)?),
            (None, Some(path)) => {
                let path = hierarchy.path(path)?;
                // It may be one that is to be made, or a slip of the pen.
                if hierarchy.lookup(&path)?.is_none() {
                    warn!("cgroup {path} does not exist");
                }
                (Some(path), netns::environment()?)
            }
            (None, None) if !arguments.whose.wanted().is_any() => {
                let cgroup = cgroup_of_wanted(&arguments.whose, hierarchy)?;
                (Some(cgroup), netns::environment()?)
            }
            (None, None) => (Some(CgroupPath::root()), netns::environment()?),
        };
        Ok(Self {
            identity: identity_of(cgroup.as_ref()),
            cgroup,
            ends: Ends {
                remote: arguments.remote,
                local_port: arguments.local_port,
            },
            pid: arguments.pid,
            found: None,
            environment,
        })
    }

    fn of_socket(local: SocketAddr, remote: SocketAddr, hierarchy: &Hierarchy) -> Result<Self> {
        preflight::may_enforce()?;
        let kernel = Kernel::running()?;
        let lister = Lister::load(&kernel, &CgroupPath::root())?;
        let (mut netns, mut record) = find_connection(&lister, local, remote)?;
        let root = hierarchy.existing("/".as_ref())?;
        let cgroups = hierarchy.walk(&root).context("reading the hierarchy")?;
        let cgroup = cgroups
            .into_iter()
            .find(|cgroup| cgroup.id == record.cgroup);
        if let Some(cgroup) = &cgroup
            && lister.is_of_several()
        {
            // What its application asked for is in the set nearest above it.
            let lister = Lister::load(&kernel, &cgroup.path)?;
            (netns, record) = find_connection(&lister, local, remote)?;
        }
        Ok(Self {
            identity: identity_of(cgroup.as_ref().map(|cgroup| &cgroup.path)),
            cgroup: cgroup.map(|cgroup| cgroup.path),
            ends: Ends {
                remote: Some(record.remote()),
                local_port: Some(record.local().port()),
            },
            pid: None,
            environment: record.environment,
            found: Some((netns, record)),
        })
    }

    /// Where it is, in words.
    fn cgroup_name(&self) -> String {
        match (&self.cgroup, &self.found) {
            (Some(path), _) => path.to_string(),
            (None, Some((_, record))) => format!(
                "(gone) {}, removed or out of sight: the policies of the root count",
                record.cgroup
            ),
            (None, None) => "(gone), removed: the policies of the root count".to_owned(),
        }
    }

    /// What is explained, in words.
    fn name(&self) -> String {
        match (&self.found, self.pid, self.ends.remote) {
            (Some((netns, record)), ..) => format!(
                "connection {} → {} in network namespace {}",
                record.local(),
                record.remote(),
                netns.name
            ),
            (None, Some(pid), Some(remote)) => {
                format!("a connection of process {pid} to {remote}")
            }
            (None, Some(pid), None) => format!("a connection of process {pid}"),
            (None, None, Some(remote)) => format!("a connection to {remote}"),
            (None, None, None) => "a connection".to_owned(),
        }
    }
}

/// What a cgroup is, if there is one.
fn identity_of(cgroup: Option<&CgroupPath>) -> Identity {
    cgroup.map_or_else(Identity::default, |path| {
        Identities::default().of(path.as_bytes())
    })
}

/// The outermost cgroup of the unit, container or pod that is asked for.
fn cgroup_of_wanted(whose: &Whose, hierarchy: &Hierarchy) -> Result<CgroupPath> {
    let wanted = whose.wanted();
    let identities = Identities::default();
    let root = hierarchy.existing("/".as_ref())?;
    let cgroups = hierarchy.walk(&root).context("reading the hierarchy")?;
    let mut found = cgroups.into_iter().filter_map(|cgroup| {
        let identity = identities.of(cgroup.path.as_bytes());
        wanted.includes(&identity).then_some((cgroup, identity))
    });
    let Some((first, identity)) = found.next() else {
        bail!(
            "no cgroup belongs to it; `keepalive-agent sockets` shows whose connections there are"
        );
    };
    let others: BTreeSet<_> = found
        .filter(|(other, _)| !first.contains(&other.path))
        .map(|(_, other)| other.to_string())
        .filter(|other| *other != identity.to_string())
        .collect();
    if !others.is_empty() {
        warn!(
            "this is about {identity}; there are others: {}",
            others.into_iter().collect::<Vec<_>>().join(", ")
        );
    }
    Ok(first.path)
}

/// The cgroup of a process in the v2 hierarchy; none where it was removed.
pub(super) fn cgroup_of(pid: u32, hierarchy: &Hierarchy) -> Result<Option<CgroupPath>> {
    let file = format!("/proc/{pid}/cgroup");
    let text =
        fs::read(&file).with_context(|| format!("reading {file}: is there a process {pid}?"))?;
    // Names may have any bytes but line breaks.
    let mut lines = text.split(|byte| *byte == b'\n');
    let path = lines.find_map(|line| line.strip_prefix(b"0::"));
    let path = path.with_context(|| format!("{file} names no cgroup of the v2 hierarchy"))?;
    if path.starts_with(b"/..") || (hierarchy.is_whole() && !view::has_initial_cgroup_namespace()) {
        bail!(
            "{file} shows a path within a cgroup namespace, not in the whole hierarchy: name the \
             cgroup by --cgroup, or run this in the host's cgroup namespace"
        );
    }
    let path = CgroupPath::from(path);
    // Of a removed one the kernel says so behind the path; it may be a name as well.
    let exists = hierarchy.lookup(&path)?.is_some();
    let is_removed = !exists && path.as_bytes().ends_with(b" (deleted)");
    Ok((!is_removed).then_some(path))
}

/// The sysctls of the network namespace of a process.
fn environment_of(pid: u32) -> Result<Environment> {
    let found = netns::of_processes(&[pid])?;
    let netns = found
        .first()
        .with_context(|| format!("looking for the network namespace of process {pid}"))?;
    let entered = netns.enter(netns::environment)?;
    Ok(entered.with_context(|| format!("process {pid} has ended"))??)
}

/// What decides: a running agent, or a config.
struct Enforced {
    /// In words.
    by: String,
    agent: Option<u32>,
    /// Whether it holds now, not only if an agent were started.
    is_in_force: bool,
    root: Cgroup,
    config: Arc<Config>,
    /// What users were given for commands of their own.
    grants: Vec<Grant>,
    /// Where it is written; none where the files say something else.
    files: Option<Merged>,
}

impl Enforced {
    /// All agents, the one further up first; or the config.
    fn find(arguments: &Arguments, hierarchy: &Hierarchy, subject: &Subject) -> Result<Vec<Self>> {
        let files = &arguments.files;
        let named = files.config.is_some() || !files.drop_in_dir.is_empty();
        let mut running = if named { Vec::new() } else { enforcing()? };
        running.sort_by_key(|agent| agent.root.path.depth());
        if running.is_empty() {
            let merged = files.sources().read()?;
            return Ok(vec![Self {
                by: if named {
                    "the config that is named, if an agent enforced it for the whole machine"
                        .to_owned()
                } else if subject.found.is_some() {
                    "nobody: no agent is running; below is what it would do".to_owned()
                } else {
                    "no agent is running; this is what it would do".to_owned()
                },
                agent: None,
                is_in_force: false,
                root: hierarchy.existing("/".as_ref())?,
                config: merged.config.clone().into(),
                grants: Vec::new(),
                files: Some(merged),
            }]);
        }
        Ok(running
            .into_iter()
            .map(|agent| Self {
                by: agent.name(),
                agent: agent.agent,
                is_in_force: true,
                files: agent.files(),
                root: agent.root,
                config: agent.config,
                grants: agent.grants,
            })
            .collect())
    }

    /// Where none of those that are in force has a say.
    fn nobody(in_force: &[Self]) -> Self {
        let names: Vec<_> = in_force.iter().map(|other| other.by.as_str()).collect();
        Self {
            by: format!(
                "nobody: it is not below what is governed ({})",
                names.join(", ")
            ),
            agent: None,
            is_in_force: true,
            root: Cgroup {
                path: CgroupPath::root(),
                id: 0,
            },
            config: Arc::new(Config {
                default: None,
                policies: Vec::new(),
                self_service: None,
            }),
            grants: Vec::new(),
            files: None,
        }
    }

    /// Whether it has a say about a connection. About one whose cgroup is gone, that
    /// governs all cgroups; or it wants nothing to be changed on the connection.
    fn may_decide(&self, subject: &Subject, claimants: &Claimants, walk: &Walk) -> bool {
        if let Some(cgroup) = &subject.cgroup {
            return self.root.contains(cgroup);
        }
        let has = subject.found.as_ref().map(|(_, record)| record.options());
        let fits = has.zip(walk.claimed).is_some_and(|(has, index)| {
            let assigned = claimants.policies().get(index);
            has != Options::default()
                && assigned.is_some_and(|assigned| {
                    plan(&assigned.policy, &has, &subject.environment).wants == has
                })
        });
        self.root.path.depth() == 0 || fits
    }

    /// What users asked for, where it shapes the policy that the walk came to: one
    /// that is not nearer.
    fn grants_for(&self, subject: &Subject, walk: &Walk) -> Vec<&Grant> {
        let Some(cgroup) = &subject.cgroup else {
            return Vec::new();
        };
        let mut grants = Grant::above(&self.grants, cgroup);
        if let Some(claimed_at) = walk.claimed.and(walk.cgroups.last()) {
            grants.retain(|grant| claimed_at.path.contains(&grant.cgroup.path));
        }
        grants
    }

    /// Where a policy is written; none where the files say something else.
    fn written(&self, assigned: &Assigned) -> Option<String> {
        let Merged {
            config, origins, ..
        } = self.files.as_ref()?;
        let origin = if assigned.name == DEFAULT {
            origins.default.as_ref()
        } else {
            let mut policies = config.policies.iter().zip(&origins.policies);
            policies
                .find(|(named, _)| named.name == assigned.name)
                .map(|(_, origins)| origins)
        };
        Some(origin?.table.to_string())
    }
}

fn find_connection(
    lister: &Lister,
    local: SocketAddr,
    remote: SocketAddr,
) -> Result<(Namespace, SocketRecord)> {
    let canonical = |address: SocketAddr| (address.ip().to_canonical(), address.port());
    let mut found: Option<(Namespace, SocketRecord)> = None;
    let unseen = each_connection::<anyhow::Error>(lister, &mut |netns, record, _| {
        if canonical(record.local()) != canonical(local)
            || canonical(record.remote()) != canonical(remote)
        {
            return Ok(());
        }
        match &found {
            Some((first, _)) => warn!(
                "there is another one in network namespace {}; this is about the one in {}",
                netns.name, first.name
            ),
            None => found = Some((netns.clone(), *record)),
        }
        Ok(())
    })?;
    for Unseen { netns, error } in unseen {
        warn!("namespace {netns}: {}", chain(&error));
    }
    found.with_context(|| {
        format!(
            "no connection goes from {local} to {remote}: `keepalive-agent sockets` shows the \
             ones there are"
        )
    })
}

/// An explanation, ready to be told.
struct Explained<'a> {
    subject: &'a Subject,
    enforced: &'a Enforced,
    claimants: &'a Claimants,
    walk: &'a Walk,
    /// What users asked for, where that shapes the policy.
    grants: Vec<&'a Grant>,
    policy: Option<Cow<'a, Assigned>>,
    /// What is set: on the connection, or by an application that sets nothing.
    has: Options,
    /// What the policy makes of that.
    wants: Options,
}

impl<'a> Explained<'a> {
    fn new(
        subject: &'a Subject,
        enforced: &'a Enforced,
        claimants: &'a Claimants,
        walk: &'a Walk,
    ) -> Self {
        let policy = walk.claimed.map(|index| &claimants.policies()[index]);
        let grants = enforced.grants_for(subject, walk);
        let policy = grants
            .iter()
            .fold(policy.map(Cow::Borrowed), |policy, grant| {
                Some(Cow::Owned(grant.over(policy.as_deref())))
            });
        let has = subject
            .found
            .as_ref()
            .map_or_else(Options::default, |(_, record)| record.options());
        let environment = &subject.environment;
        let wants = match (
            policy.as_ref().map(|assigned| &assigned.policy),
            &subject.found,
        ) {
            (None, _) => has,
            (Some(policy), None) => plan(policy, &has, environment).wants,
            // As the next sweep does it: from what the application wanted.
            (Some(policy), Some((_, record))) => {
                let originals = &record.originals;
                let before = enforced.is_in_force.then_some(policy);
                let application = application(&has, originals, before, environment);
                replan(policy, &has, &application, originals, environment).wants
            }
        };
        Self {
            subject,
            enforced,
            claimants,
            walk,
            grants,
            policy,
            has,
            wants,
        }
    }

    /// What the options of now mean.
    fn now(&self) -> Meaning {
        let policy = self.policy.as_ref().map(|assigned| &assigned.policy);
        // What an existing connection has is not from a policy that is not in force.
        let had_its_way = self.enforced.is_in_force || self.subject.found.is_none();
        let enforced = policy.filter(|policy| policy.is_enforced() && had_its_way);
        let asked = match &self.subject.found {
            Some((_, record)) => record.originals.asked(&self.has),
            None => Asked::default(),
        };
        Meaning::of(&self.holds(), &asked, enforced, &self.subject.environment)
    }

    /// What the policy's wishes mean.
    fn then(&self) -> Meaning {
        let policy = self.policy.as_ref().map(|assigned| &assigned.policy);
        let asked = Asked::default();
        Meaning::of(&self.wants, &asked, policy, &self.subject.environment)
    }

    /// Whether its application is held to bounds whenever it sets an option.
    fn is_held(&self) -> Option<bool> {
        let found = self.subject.found.as_ref();
        found.map(|(_, record)| record.is_held != 0)
    }

    fn has_bounds(&self) -> bool {
        self.enforced.is_in_force
            && self
                .policy
                .as_ref()
                .is_some_and(|assigned| assigned.policy.for_kernel().holds())
    }

    /// What holds.
    fn holds(&self) -> Options {
        let enforced = self
            .policy
            .as_ref()
            .is_none_or(|assigned| assigned.policy.sets_anything());
        if self.subject.found.is_some() || !enforced {
            self.has
        } else {
            self.wants
        }
    }

    fn print(&self) -> Result<()> {
        let mut text = format!(
            "{}\nin cgroup   {}\n",
            self.subject.name(),
            self.subject.cgroup_name(),
        );
        if self.subject.identity.is_known() {
            writeln!(text, "of          {}", self.subject.identity)?;
        }
        writeln!(text, "decided by  {}\n", self.enforced.by)?;
        for visited in &self.walk.cgroups {
            writeln!(text, "{}", visited.path)?;
            if visited.policies.is_empty() {
                text.push_str("    no policy\n");
            }
            for (index, verdict) in &visited.policies {
                let assigned = &self.claimants.policies()[*index];
                let verdict = match verdict {
                    Verdict::Claims => "claims the connection".to_owned(),
                    Verdict::Beaten => {
                        "is for it too, but another one is more exact or comes first".to_owned()
                    }
                    Verdict::NotFor(mismatch) => format!("is not for it: {mismatch}"),
                    Verdict::Depends => format!("claims it if its ends are {}", ends(assigned)),
                };
                let by = match self.claimants.reason(*index, &visited.path) {
                    Reason::Path | Reason::Everywhere => String::new(),
                    reason @ (Reason::Selector(_) | Reason::Glob(_)) => format!(" ({reason})"),
                };
                writeln!(text, "    policy {}{by} {verdict}", assigned.name)?;
            }
        }
        for grant in &self.grants {
            writeln!(
                text,
                "\nuid {} asked for a policy for the command in cgroup {}",
                grant.uid, grant.cgroup.path
            )?;
        }
        match &self.policy {
            None => text.push_str("\nno policy claims it: it is left alone\n"),
            Some(assigned) => {
                let [keepalive, idle, interval, probes, user_timeout, give_up] =
                    output::wishes(&assigned.policy);
                let written = self
                    .enforced
                    .written(assigned)
                    .map_or_else(String::new, |written| format!(" ({written})"));
                write!(
                    text,
                    "\npolicy {}{written}\n    \
                     keepalive {keepalive}, idle {idle}, interval {interval}, probes {probes}, \
                     user-timeout {user_timeout}, give-up {give_up}\n",
                    assigned.name
                )?;
                if assigned.policy.ignores() {
                    text.push_str("    ignores its connections: nothing is done to them\n");
                } else if !assigned.policy.is_enforced() {
                    text.push_str("    in dry run: nothing is set\n");
                }
            }
        }
        let heading = if self.subject.found.is_some() {
            "what holds"
        } else {
            "what comes of it, if the application sets nothing"
        };
        writeln!(text, "\n{heading}")?;
        text.push_str(&meaning(&self.now()));
        if let (Some(held), true) = (self.is_held(), self.has_bounds()) {
            let when = if held {
                "whenever the application sets an option"
            } else {
                "from establishment on, and after each sweep; what the application sets in \
                 between does not pass through the program for bounds"
            };
            writeln!(text, "    bounds        hold {when}")?;
        }
        let gives_up = self.policy.as_ref().is_some_and(|assigned| {
            assigned.policy.give_up != 0 && assigned.policy.sets_anything()
        });
        if gives_up && self.subject.environment.rto_max == 0 {
            text.push_str(
                "    give-up has no effect on this kernel, which knows no TCP_RTO_MAX_MS (before \
                 Linux 6.15)\n",
            );
        }
        if self.holds() != self.wants {
            text.push_str("\nwhat the policy wants\n");
            text.push_str(&meaning(&self.then()));
        }
        output::text(text)
    }

    fn record(&self) -> Record<'_> {
        let name = |index: usize| self.claimants.policies()[index].name.as_str();
        let walk = self.walk.cgroups.iter().map(|visited| VisitedRecord {
            cgroup: &visited.path,
            policies: visited
                .policies
                .iter()
                .map(|(index, verdict)| VerdictRecord {
                    name: name(*index),
                    claims_by: self.claimants.reason(*index, &visited.path).to_string(),
                    verdict: match verdict {
                        Verdict::Claims => "claims",
                        Verdict::Beaten => "beaten",
                        Verdict::NotFor(_) => "not-for",
                        Verdict::Depends => "depends",
                    },
                    reason: match verdict {
                        Verdict::NotFor(mismatch) => Some(mismatch.to_string()),
                        _ => None,
                    },
                })
                .collect(),
        });
        Record {
            cgroup: self.subject.cgroup.as_ref(),
            identity: IdentityRecord::new(Some(&self.subject.identity)),
            pid: self.subject.pid,
            local: self
                .subject
                .found
                .as_ref()
                .map(|(_, record)| record.local()),
            remote: self.subject.ends.remote,
            netns: self
                .subject
                .found
                .as_ref()
                .map(|(netns, _)| netns.name.as_str()),
            agent: self.enforced.agent,
            walk: walk.collect(),
            policy: self.policy.as_ref().map(|assigned| assigned.name.as_str()),
            granted_to_uid: self.grants.last().map(|grant| grant.uid),
            written: self
                .policy
                .as_ref()
                .and_then(|assigned| self.enforced.written(assigned)),
            enforced: self
                .policy
                .as_ref()
                .map(|assigned| assigned.policy.is_enforced()),
            bounds_held: self.is_held(),
            holds: MeaningRecord::new(&self.now()),
            wants: MeaningRecord::new(&self.then()),
        }
    }
}

/// The ends that a policy is for, in words.
fn ends(assigned: &Assigned) -> String {
    let mut words: Vec<_> = assigned
        .rules
        .remotes
        .iter()
        .map(ToString::to_string)
        .collect();
    words.extend(
        assigned
            .rules
            .ports
            .iter()
            .map(|ports| format!("port {ports}")),
    );
    words.extend(
        assigned
            .rules
            .local_ports
            .iter()
            .map(|ports| format!("local port {ports}")),
    );
    words.join(", ")
}

/// A meaning for people.
fn meaning(meaning: &Meaning) -> String {
    let settings = &meaning.settings;
    let on_or_off = |on: bool| if on { "on" } else { "off" }.to_owned();
    let mut lines = vec![setting("keepalive", settings.keepalive, on_or_off)];
    if (settings.keepalive.value, settings.keepalive.source) == (false, Source::App) {
        lines.push(
            "              or by MPTCP: subflows that join take over what is set on the whole"
                .to_owned(),
        );
    }
    if settings.keepalive.value {
        lines.push(setting("idle", settings.idle, duration::show_seconds));
        lines.push(setting(
            "interval",
            settings.interval,
            duration::show_seconds,
        ));
        lines.push(setting("probes", settings.probes, |probes| {
            probes.to_string()
        }));
    }
    if settings.user_timeout.value != 0 {
        lines.push(setting(
            "user-timeout",
            settings.user_timeout,
            duration::show_milliseconds,
        ));
    }
    let after = |milliseconds: u64| {
        let time = Duration::from_millis(milliseconds);
        format!("after {}", duration::show(time))
    };
    let first = meaning
        .first_probe_s
        .map(|seconds| u64::from(seconds) * 1000);
    let first = first.map_or_else(|| "never".to_owned(), |first| after(first) + " of silence");
    let dead = meaning
        .dead_after_ms
        .map_or_else(|| "never".to_owned(), after);
    lines.push(format!("first probe   {first}"));
    lines.push(format!("dead peer     noticed {dead}"));
    lines.push(format!(
        "data          that is not acknowledged ends it {}",
        after(settings.gives_up_ms)
    ));
    if settings.user_timeout_conflict {
        lines.push(
            "keepalive and its timers are left as the application has them: with its user-timeout\n    \
             the kernel would end the connection before as many probes are lost as the policy says.\n    \
             user-timeout = { at-least = \"derive\" } allows for them"
                .to_owned(),
        );
    }
    let (open, lost): (Vec<&Path>, Vec<&Path>) =
        meaning.paths.iter().partition(|path| path.survives);
    for (word, paths) in [("survives", open), ("is lost on", lost)] {
        if !paths.is_empty() {
            let names = paths
                .iter()
                .map(|path| format!("{} ({})", path.name, duration::show_seconds(path.timeout_s)));
            lines.push(format!(
                "{word:<13} {}",
                names.collect::<Vec<_>>().join(", ")
            ));
        }
    }
    format!("    {}\n", lines.join("\n    "))
}

fn setting<T: Copy>(name: &str, setting: Setting<T>, show: impl Fn(T) -> String) -> String {
    let source = setting.source.author();
    let asked = setting.asked.map_or_else(String::new, |asked| {
        format!("; the application asked for {}", show(asked))
    });
    format!("{name:<13} {}, set by {source}{asked}", show(setting.value))
}

/// An explanation as JSON. The names are documented in docs/explain.md and stay.
#[derive(Serialize)]
struct Record<'a> {
    cgroup: Option<&'a CgroupPath>,
    #[serde(flatten)]
    identity: IdentityRecord<'a>,
    pid: Option<u32>,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    netns: Option<&'a str>,
    agent: Option<u32>,
    walk: Vec<VisitedRecord<'a>>,
    policy: Option<&'a str>,
    /// Who asked for it, where a user did.
    granted_to_uid: Option<u32>,
    written: Option<String>,
    enforced: Option<bool>,
    /// Whether bounds hold whenever the application sets an option; null without a
    /// connection.
    bounds_held: Option<bool>,
    holds: MeaningRecord,
    wants: MeaningRecord,
}

#[derive(Serialize)]
struct VisitedRecord<'a> {
    cgroup: &'a CgroupPath,
    policies: Vec<VerdictRecord<'a>>,
}

#[derive(Serialize)]
struct VerdictRecord<'a> {
    name: &'a str,
    claims_by: String,
    verdict: &'static str,
    reason: Option<String>,
}

#[derive(Serialize)]
struct MeaningRecord {
    #[serde(flatten)]
    settings: SettingsRecord,
    first_probe_s: Option<u32>,
    dead_after_ms: Option<u64>,
    paths: Vec<Path>,
}

impl MeaningRecord {
    fn new(meaning: &Meaning) -> Self {
        Self {
            settings: SettingsRecord::from(&meaning.settings),
            first_probe_s: meaning.first_probe_s,
            dead_after_ms: meaning.dead_after_ms,
            paths: meaning.paths.clone(),
        }
    }
}
