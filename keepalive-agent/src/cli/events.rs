//! `keepalive-agent events`: what happens, told by the running agent.

use std::{
    collections::HashMap,
    fmt::Write as _,
    io::BufRead as _,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;

use super::{RunningAgent, Whose, output, report};
use crate::{
    daemon::{
        control::{Answer, Request},
        journal::{DeadPeerRecord, Entry, Wanted, What},
    },
    duration,
    hierarchy::{CgroupPath, Hierarchy},
    identity::{Identities, Identity},
    kernel::preflight,
    names::printable,
    sockets::format::IdentityRecord,
};

#[derive(Args, Debug)]
#[command(
    after_help = "The agent keeps the last 1024 events in memory; `--since` shows those. Events \
                  that are not read fast enough are left out, and how many is said; the counters \
                  (`status`) have all of them.\n\n\
                  Exit codes: 0 done, 1 failed, such as no running agent, 2 wrong usage.\n\n\
                  Examples:\n  \
                  keepalive-agent events                        from now on\n  \
                  keepalive-agent events --since 1h             the last hour, and on\n  \
                  keepalive-agent events --since 1d --no-follow\n  \
                  keepalive-agent events --container 'db-*'     of these containers only\n  \
                  keepalive-agent events --json | jq 'select(.event == \"dead_peer\")'"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    agent: RunningAgent,

    #[command(flatten)]
    whose: Whose,

    /// Also what happened so long ago at most, such as 10m or 1d
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    since: Option<Duration>,

    /// End when what is past has been shown
    #[arg(long, requires = "since")]
    no_follow: bool,

    /// Print JSON lines instead of text for people
    #[arg(long)]
    json: bool,
}

pub(super) fn events(arguments: &Arguments) -> Result<ExitCode> {
    preflight::may_enforce()?;
    let hierarchy = Hierarchy::find()?;
    let cgroup = hierarchy.path(&arguments.agent.cgroup)?;
    let client = RunningAgent::connect(&cgroup)?;
    let wanted = Wanted {
        since_ms: arguments.since.map(|since| {
            let then = SystemTime::now().checked_sub(since).unwrap_or(UNIX_EPOCH);
            let then = then.duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(then.as_millis()).unwrap_or(u64::MAX)
        }),
        follow: !arguments.no_follow,
    };
    let whose = arguments.whose.wanted();
    let mut lines = client
        .ask_for_lines(Request::Events(wanted))
        .context("asking the agent")?;
    let mut line = String::new();
    lines.read_line(&mut line).context("reading the answer")?;
    let _: Answer = serde_json::from_str(&line)
        .context("the agent is of another version and does not know events")?;
    let mut paths = Paths {
        hierarchy,
        by_id: HashMap::new(),
        walked: None,
    };
    loop {
        line.clear();
        if lines.read_line(&mut line).context("reading events")? == 0 {
            break;
        }
        let entry: Entry = serde_json::from_str(&line)
            .with_context(|| format!("an event that is not understood: {}", printable(&line)))?;
        let of_peer = match &entry.what {
            What::DeadPeer(peer) => paths.of(peer.cgroup_id),
            _ => None,
        };
        let cgroup = match &entry.what {
            What::CgroupAssigned { cgroup, .. } | What::ContainerRenamed { cgroup, .. } => {
                Some(cgroup)
            }
            _ => of_peer.as_ref(),
        };
        // Read anew each time: a container may have been renamed.
        let identity = cgroup.map(|path| Identities::default().of(path.as_bytes()));
        let is_wanted = whose.is_any() || identity.as_ref().is_some_and(|own| whose.includes(own));
        if !is_wanted {
            continue;
        }
        if arguments.json {
            output::json(&Line {
                identity: identity.as_ref().map(|own| IdentityRecord::new(Some(own))),
                cgroup: of_peer.as_ref(),
                entry: &entry,
            })?;
        } else {
            output::text(text(&entry, of_peer.as_ref(), identity.as_ref()))?;
        }
    }
    if wanted.follow {
        bail!("the agent has ended the stream: it has stopped, or too many follow already");
    }
    Ok(ExitCode::SUCCESS)
}

/// An event as it is printed for machines.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    entry: &'a Entry,
    /// The path of the dead peer's cgroup, if that still exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<&'a CgroupPath>,
    /// What the cgroup is that an event is about.
    #[serde(flatten)]
    identity: Option<IdentityRecord<'a>>,
}

/// The paths of cgroups by their ids.
struct Paths {
    hierarchy: Hierarchy,
    by_id: HashMap<u64, CgroupPath>,
    walked: Option<SystemTime>,
}

impl Paths {
    /// The path, if the cgroup exists. The hierarchy is walked again at most once
    /// a second.
    fn of(&mut self, id: u64) -> Option<CgroupPath> {
        const PAUSE: Duration = Duration::from_secs(1);
        let fresh = self
            .walked
            .is_some_and(|at| at.elapsed().is_ok_and(|age| age < PAUSE));
        if !self.by_id.contains_key(&id) && !fresh {
            self.walked = Some(SystemTime::now());
            let root = self.hierarchy.lookup(&CgroupPath::root()).ok().flatten()?;
            let found = self.hierarchy.walk(&root).ok()?;
            self.by_id = found
                .into_iter()
                .map(|cgroup| (cgroup.id, cgroup.path))
                .collect();
        }
        self.by_id.get(&id).cloned()
    }
}

/// One line for people, with the time of day in UTC.
fn text(entry: &Entry, cgroup: Option<&CgroupPath>, identity: Option<&Identity>) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(entry.at_ms);
    format!(
        "{}  {}\n",
        humantime::format_rfc3339_millis(at),
        printable(&what(&entry.what, cgroup, identity))
    )
}

/// What a reload has changed.
fn changes(policies: &[String], removed: &[String], unchanged: usize) -> String {
    let lists = [("changed", policies), ("removed", removed)];
    let lists = lists.into_iter().filter(|(_, names)| !names.is_empty());
    let lists = lists.map(|(what, names)| format!("{what}: {}", report::some_of(names.iter())));
    let unchanged = (unchanged > 0).then(|| format!("{unchanged} unchanged"));
    lists.chain(unchanged).collect::<Vec<_>>().join("; ")
}

/// What happened, on one line; where a dead peer's connection was, as far as that is
/// known.
pub(super) fn what(
    what: &What,
    cgroup: Option<&CgroupPath>,
    identity: Option<&Identity>,
) -> String {
    match what {
        What::Started {
            cgroup,
            continued,
            policies,
        } => {
            let how = if *continued { ", without a gap" } else { "" };
            format!(
                "started on {cgroup}{how}; policies: {}",
                policies.join(", ")
            )
        }
        What::Waiting { cgroup } => format!("waiting for cgroup {cgroup}, which does not exist"),
        What::Reloaded {
            why,
            policies,
            removed,
            unchanged,
        } => format!(
            "the config was read again ({why}); {}",
            changes(policies, removed, *unchanged)
        ),
        What::NamesChanged {
            policy,
            why,
            added,
            removed,
            more,
        } => {
            let mut text = format!("policy {policy}, as {why}:");
            for (how, names) in [("now for", added), ("no more for", removed)] {
                if !names.is_empty() {
                    let _ = write!(text, " {how} {};", names.join(", "));
                }
            }
            if *more > 0 {
                let _ = write!(text, " {more} names more;");
            }
            text + " nothing that is called so has connections"
        }
        What::ContainerRenamed {
            cgroup,
            before,
            now,
        } => format!("{before} is called {now} now, cgroup {cgroup}"),
        What::ReloadFailed { error } => format!("a config was not taken: {error}"),
        What::Swept {
            new_cgroups,
            connections,
            namespaces,
            waiting,
            missed,
        } => {
            let mut text =
                format!("swept {connections} connections in {namespaces} network namespaces");
            // Memory can always be written to.
            if *new_cgroups > 0 {
                let _ = write!(text, " for {new_cgroups} new cgroups");
            }
            if *waiting > 0 {
                let _ = write!(text, ", {waiting} wait for their turn");
            }
            if *missed > 0 {
                let _ = write!(text, ", {missed} namespaces missed");
            }
            text
        }
        What::CgroupAssigned { cgroup, policies } => {
            let whose = identity.filter(|own| own.is_known());
            let whose = whose.map(|own| format!(" of {own}")).unwrap_or_default();
            let policies = match policies.as_slice() {
                [] => "the policies above it".to_owned(),
                policies => policies.join(", "),
            };
            format!("cgroup {cgroup}{whose}: {policies}")
        }
        What::PartFailed { part, error } => format!("failed: {part}: {error}"),
        What::PartWorks { part } => format!("works again: {part}"),
        What::DeadPeer(peer) => dead_peer(peer, cgroup, identity),
        What::DeadPeersLost { lost } => {
            format!("{lost} more dead peers were counted, so many at once that no more is known")
        }
        What::Skipped { skipped } => format!("{skipped} events left out: not read fast enough"),
        What::Stopped { by } => format!("stopped by {by}"),
    }
}

/// `dead peer 10.0.0.1:5000 → 10.0.0.2:80 in /a by probes: 3 unanswered, silent for 5s (policy default)`
fn dead_peer(
    peer: &DeadPeerRecord,
    cgroup: Option<&CgroupPath>,
    identity: Option<&Identity>,
) -> String {
    let DeadPeerRecord {
        policy,
        cause,
        errno,
        cgroup_id,
        local,
        remote,
        probes,
        silent_ms,
    } = peer;
    let known = identity.filter(|identity| identity.is_known());
    let place = match (known, cgroup, cgroup_id) {
        (Some(known), ..) => format!(" in {known}"),
        (None, Some(path), _) => format!(" in {path}"),
        (None, None, 0) => String::new(),
        (None, None, id) => format!(" in cgroup {id}, which is gone"),
    };
    let error = std::io::Error::from_raw_os_error(i32::try_from(*errno).unwrap_or(0));
    // Without the number that the library puts behind it.
    let error = error.to_string();
    let error = error.split(" (os error").next().unwrap_or_default();
    format!(
        "dead peer {local} → {remote}{place}, found by {cause} after {} of silence, {probes} \
         probes unanswered; policy {policy}; the application gets: {error}",
        duration::show(Duration::from_millis(*silent_ms)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_peer_reads_as_one_line() {
        let entry = Entry {
            at_ms: 1_700_000_000_123,
            what: What::DeadPeer(DeadPeerRecord {
                policy: "redis\n".to_owned(),
                cause: "probes".to_owned(),
                errno: 110,
                cgroup_id: 7,
                local: "10.0.0.1:6379".to_owned(),
                remote: "10.0.0.2:40000".to_owned(),
                probes: 6,
                silent_ms: 120_000,
            }),
        };
        let path = CgroupPath::from("/a");
        assert_eq!(
            text(&entry, Some(&path), None),
            "2023-11-14T22:13:20.123Z  dead peer 10.0.0.1:6379 → 10.0.0.2:40000 in /a, found by \
             probes after 2m of silence, 6 probes unanswered; policy redis\\n; the application \
             gets: Connection timed out\n"
        );
        assert!(text(&entry, None, None).contains(" in cgroup 7, which is gone,"));
        let unit = Identity::of_path(b"/system.slice/redis.service");
        let told = text(&entry, Some(&path), Some(&unit));
        assert!(told.contains(" in redis.service, found by"), "{told}");
    }
}
