//! Collecting: one look at the machine after the other.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    io::BufRead as _,
    sync::Arc,
    time::{Instant, SystemTime},
};

use anyhow::Result;
use keepalive_common::socket::SocketRecord;
use tracing::debug;

use super::{Counts, Exposure, Place, Snapshot, Socket};
use crate::{
    daemon::{
        control::{Client, Request},
        journal::{Entry, Wanted, What},
    },
    datapath::{self, Lister, chain},
    enforcing::{Enforcing, enforcing},
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    identity::Identity,
    names::printable,
    sockets::{
        Connection, Receiver, Unseen,
        cgroups::{Cgroups, Known},
        filter::{Filter, Risk},
        list,
        source::{Settings, Source},
    },
    view,
};

/// Looks at the machine again and again, and remembers what it needs for the
/// differences.
pub(super) struct Collector {
    hierarchy: Option<Hierarchy>,
    lister: Lister,
    filter: Filter,
    risk: Risk,
    /// What each connection of the last look comes to as a number.
    seen: HashSet<u64>,
    hasher: RandomState,
    established: HashMap<Arc<str>, u64>,
    /// By id of the cgroup, as agents have told.
    dead: HashMap<u64, u64>,
    /// By root of the agent: up to when it has been asked, in milliseconds since
    /// 1970.
    asked: HashMap<CgroupPath, u64>,
    last: Option<Instant>,
}

impl Collector {
    /// For connections that a filter wants. Connections that the risk says
    /// nothing of stay within the machine.
    #[must_use]
    pub(super) fn new(
        hierarchy: Option<Hierarchy>,
        lister: Lister,
        filter: Filter,
        risk: Risk,
    ) -> Self {
        Self {
            hierarchy,
            lister,
            filter,
            risk,
            seen: HashSet::new(),
            hasher: RandomState::new(),
            established: HashMap::new(),
            dead: HashMap::new(),
            asked: HashMap::new(),
            last: None,
        }
    }

    /// Looks at everything once.
    ///
    /// # Errors
    ///
    /// When connections cannot be listed.
    pub(super) fn collect(&mut self) -> Result<Snapshot> {
        let started = Instant::now();
        let mut unseen: Vec<String> = view::missing(self.hierarchy.as_ref())
            .iter()
            .map(ToString::to_string)
            .collect();
        let sees_all = unseen.is_empty();
        let running = enforcing().unwrap_or_else(|error| {
            unseen.push(format!("policies: {}", datapath::chain(&error)));
            Vec::new()
        });
        let in_force = running.iter().map(Enforcing::name).collect();
        let policies = self.counts().unwrap_or_else(|error| {
            unseen.push(format!("counters: {}", datapath::chain(&error)));
            Vec::new()
        });
        for agent in running.iter().filter(|running| running.agent.is_some()) {
            if let Err(error) = self.ask(&agent.root.path) {
                unseen.push(format!("dead peers of {}: {error:#}", agent.name()));
            }
        }
        let mut cgroups = Cgroups::new(self.hierarchy.clone(), running)?;
        let mut taking = Taking {
            risk: self.risk,
            before: &self.seen,
            is_first: self.last.is_none(),
            seen: HashSet::with_capacity(self.seen.len()),
            hasher: &self.hasher,
            names: Names::default(),
            sockets: Vec::with_capacity(self.seen.len()),
        };
        let not_listed = list(
            &self.filter,
            sees_all,
            &self.lister,
            &mut cgroups,
            &mut taking,
        )?;
        let Taking {
            seen,
            sockets,
            mut names,
            ..
        } = taking;
        for Unseen { netns, error } in not_listed {
            let netns = printable(&netns);
            unseen.push(format!(
                "connections of network namespace {netns}: {}",
                chain(&error)
            ));
        }
        let mut dead = Vec::new();
        for (id, count) in &self.dead {
            let mut record = SocketRecord::NOTHING;
            record.cgroup = *id;
            let (known, _) = cgroups.get(&record)?;
            let Filter { cgroup, whose, .. } = &self.filter;
            let is_in = |wanted: &Cgroup| known.is_some_and(|known| wanted.contains(&known.path));
            let identity = known.and_then(Known::identity);
            let is_wanted = cgroup.as_ref().is_none_or(is_in)
                && (whose.is_any() || identity.is_some_and(|own| whose.includes(own)));
            if is_wanted {
                dead.push((names.place(*id, known), *count));
            }
        }
        self.seen = seen;
        let since_last = self.last.map(|last| started.duration_since(last));
        self.last = Some(started);
        let at = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        Ok(Snapshot {
            sockets,
            policies,
            dead,
            since_last,
            in_force,
            unseen,
            timeout: self.risk.timeout,
            at: at.get(11..19).unwrap_or_default().to_owned(),
        })
    }

    /// What the kernel counts, of all sets in force together.
    fn counts(&mut self) -> Result<Vec<Counts>, datapath::Error> {
        let mut sums: HashMap<String, (u64, u64)> = HashMap::new();
        for set in datapath::in_force()? {
            let Ok(record) = &set.record else { continue };
            let root = &record.root;
            let concerns =
                |wanted: &Cgroup| wanted.contains(&root.path) || root.contains(&wanted.path);
            if !self.filter.cgroup.as_ref().is_none_or(concerns) {
                continue;
            }
            for (counted, done) in record.done()? {
                let sum = sums.entry(counted.name).or_default();
                sum.0 += done.established.seen();
                sum.1 += done.dead_peers.total();
            }
        }
        let is_first = self.last.is_none();
        let mut counts = Vec::with_capacity(sums.len());
        for (name, (established, dead)) in sums {
            let policy: Arc<str> = printable(&name).to_string().into();
            let before = self.established.insert(policy.clone(), established);
            // A policy that is in force since then has none from before.
            let before = if is_first {
                established
            } else {
                before.unwrap_or(0)
            };
            counts.push(Counts {
                policy,
                new: established.saturating_sub(before),
                dead,
            });
        }
        counts.sort_by(|one, other| one.policy.cmp(&other.policy));
        Ok(counts)
    }

    /// Asks an agent for the dead peers since the last time; at first for all that
    /// it remembers.
    fn ask(&mut self, root: &CgroupPath) -> Result<()> {
        let since = self.asked.get(root).map_or(0, |asked| asked + 1);
        let wanted = Wanted {
            since_ms: Some(since),
            follow: false,
        };
        let lines = Client::connect(root)?.ask_for_lines(Request::Events(wanted))?;
        // The first one is the answer.
        for line in lines.lines().skip(1) {
            let Ok(entry) = serde_json::from_str::<Entry>(&line?) else {
                debug!("an event that is not understood");
                continue;
            };
            let asked = self.asked.entry(root.clone()).or_default();
            *asked = (*asked).max(entry.at_ms);
            if let What::DeadPeer(peer) = entry.what {
                *self.dead.entry(peer.cgroup_id).or_default() += 1;
            }
        }
        Ok(())
    }
}

/// Texts that many connections share.
#[derive(Default)]
struct Names {
    places: HashMap<u64, Arc<Place>>,
    texts: HashSet<Arc<str>>,
}

impl Names {
    fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        let text: Arc<str> = text.into();
        self.texts.insert(text.clone());
        text
    }

    fn place(&mut self, id: u64, known: Option<&Known>) -> Arc<Place> {
        let place = self.places.entry(id).or_insert_with(|| {
            let Some(known) = known else {
                return Arc::new(Place {
                    cgroup: format!("(gone) {id}").into(),
                    ..Place::default()
                });
            };
            let identity = known.identity();
            let unit = identity.and_then(|identity| identity.unit.as_deref());
            let contained =
                |identity: &&Identity| identity.container.is_some() || identity.pod_uid.is_some();
            Arc::new(Place {
                cgroup: known.path.to_string().into(),
                unit: unit.map(|unit| printable(unit).to_string().into()),
                container: identity
                    .filter(contained)
                    .map(|identity| identity.to_string().into()),
            })
        });
        place.clone()
    }
}

/// Takes connections as they are listed.
struct Taking<'a> {
    risk: Risk,
    before: &'a HashSet<u64>,
    is_first: bool,
    seen: HashSet<u64>,
    hasher: &'a RandomState,
    names: Names,
    sockets: Vec<Socket>,
}

impl Receiver<anyhow::Error> for Taking<'_> {
    fn take(&mut self, connection: &Connection<'_>) -> Result<()> {
        let record = connection.record;
        let (local, remote) = (record.local(), record.remote());
        let number = self
            .hasher
            .hash_one((record.inode, record.netns, local, remote));
        self.seen.insert(number);
        let settings = &connection.settings;
        let names = &mut self.names;
        self.sockets.push(Socket {
            local,
            remote,
            place: names.place(record.cgroup, connection.cgroup),
            policy: connection.policy.map(|assigned| names.text(&assigned.name)),
            process: connection.holder.map(|holder| {
                let comm = printable(holder.comm).to_string();
                (holder.pid, names.text(&comm))
            }),
            netns: names.text(&connection.netns.name),
            idle: settings.keepalive.value.then_some(settings.idle.value),
            is_changed: is_changed(settings),
            exposure: self.risk.exposure(connection),
            silent_ms: u64::try_from(record.silent_ms).unwrap_or(0),
            noticed: connection.forecast.noticed,
            is_new: !self.is_first && !self.before.contains(&number),
        });
        Ok(())
    }

    fn progress(&mut self, _: u64) {}
}

impl Risk {
    fn exposure(&self, connection: &Connection<'_>) -> Exposure {
        if self.threatens(connection.record) {
            Exposure::AtRisk
        } else if self.is_on_path(connection.record) {
            Exposure::Survives
        } else {
            Exposure::Within
        }
    }
}

/// Whether a policy decided any of the options.
fn is_changed(settings: &Settings) -> bool {
    [
        settings.keepalive.source,
        settings.idle.source,
        settings.interval.source,
        settings.probes.source,
        settings.user_timeout.source,
    ]
    .into_iter()
    .any(|source| matches!(source, Source::Policy | Source::PolicyBound))
}
