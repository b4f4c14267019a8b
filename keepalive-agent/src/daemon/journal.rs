//! Journal: what happened lately, kept in memory for those who ask a running
//! agent, and handed at once to those who follow.

use std::{
    collections::{BTreeSet, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use keepalive_common::dead_peer::Cause;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::broadcast::{self, error::RecvError},
    time::timeout,
};

use super::{Event, Reporter};
use crate::{
    assignment::Assignment, datapath::DeadPeer, hierarchy::CgroupPath, identity::Selector,
};

/// As many entries are kept, and a follower may be so many behind.
pub const KEPT: usize = 1024;

/// More than this follow at no time.
pub const MOST_FOLLOWERS: usize = 16;

/// An event has no more names than that of either kind: a policy may be for very
/// many, and as many events are kept.
pub const MOST_NAMES: usize = 20;

/// A follower that takes no line for so long is cut off.
const PATIENCE: Duration = Duration::from_secs(5);

/// Something that happened. The names are documented and stay.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Entry {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// What happened. Each has its entry in docs/events.md.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum What {
    /// Enforcement has begun.
    Started {
        /// The directory of the cgroup.
        cgroup: String,
        /// Whether a set that was in force before has been replaced.
        continued: bool,
        /// Names of the policies.
        policies: Vec<String>,
    },
    /// The cgroup does not exist: there is nothing to enforce on until it does.
    Waiting {
        /// Its path.
        cgroup: CgroupPath,
    },
    /// Another config is in force.
    Reloaded {
        /// Why it was read again.
        #[serde(default)]
        why: String,
        /// Names of the policies that are new or different.
        policies: Vec<String>,
        /// Names of those that are gone.
        #[serde(default)]
        removed: Vec<String>,
        /// How many are as they were.
        #[serde(default)]
        unchanged: usize,
    },
    /// A policy is for other names than before, and nothing that is called so has
    /// connections: that takes no other policy set and no sweep.
    NamesChanged {
        /// Name of the policy.
        policy: String,
        /// Why its names were read again.
        why: String,
        /// Names that it is for now, as in `pod = shop/web-0`; the first
        /// [`MOST_NAMES`] of them.
        added: Vec<String>,
        /// Names that it is for no more, likewise.
        removed: Vec<String>,
        /// How many more of both there are.
        more: usize,
    },
    /// A config was read and not taken.
    ReloadFailed {
        /// What is wrong.
        error: String,
    },
    /// Existing connections have been brought along.
    Swept {
        /// For how many new cgroups; none for all of the node.
        new_cgroups: u64,
        /// How many were looked at.
        connections: u64,
        /// Network namespaces that they are in.
        namespaces: u64,
        /// Connections that a change is still waiting for.
        waiting: u64,
        /// Namespaces that could not be swept.
        missed: u64,
    },
    /// A cgroup that was made got its policies.
    CgroupAssigned {
        /// Its path.
        cgroup: CgroupPath,
        /// Names of the policies that claim it.
        policies: Vec<String>,
    },
    /// A container is called something else than before.
    ContainerRenamed {
        /// The path of its cgroup.
        cgroup: CgroupPath,
        /// What it was called, as in `docker:web`.
        before: String,
        /// What it is called now.
        now: String,
    },
    /// A part of the agent does not work.
    PartFailed {
        /// Which.
        part: String,
        /// Why.
        error: String,
    },
    /// It does again.
    PartWorks {
        /// Which.
        part: String,
    },
    /// A peer was found dead.
    DeadPeer(DeadPeerRecord),
    /// Dead peers were found of which no more is known: so many at once.
    DeadPeersLost {
        /// How many. The counters of their policies have them.
        lost: u64,
    },
    /// Whoever follows has not read fast enough.
    Skipped {
        /// How many events were left out.
        skipped: u64,
    },
    /// The agent ends.
    Stopped {
        /// The signal, or what else.
        by: String,
    },
}

impl What {
    /// That a policy is for other names.
    pub(super) fn names_changed(
        policy: &str,
        why: &str,
        before: &Selector,
        now: &Selector,
    ) -> Option<Self> {
        let (before, now) = (before.words(), now.words());
        let mut more = 0;
        let mut those = |names: &BTreeSet<String>, without: &BTreeSet<String>| {
            let mut names: Vec<_> = names.difference(without).cloned().collect();
            more += names.len().saturating_sub(MOST_NAMES);
            names.truncate(MOST_NAMES);
            names
        };
        let (added, removed) = (those(&now, &before), those(&before, &now));
        let is_change = !added.is_empty() || !removed.is_empty();
        is_change.then(|| Self::NamesChanged {
            policy: policy.to_owned(),
            why: why.to_owned(),
            added,
            removed,
            more,
        })
    }
}

/// A connection whose peer was found dead.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct DeadPeerRecord {
    /// Name of the policy that claimed it.
    pub policy: String,
    /// How that was found out: `probes`, `user-timeout`, `retransmission`,
    /// `reset`.
    pub cause: String,
    /// The error that the application gets, positive.
    pub errno: u32,
    /// Id of its cgroup; 0 where the kernel does not tell.
    pub cgroup_id: u64,
    /// This end.
    pub local: String,
    /// The other end.
    pub remote: String,
    /// Probes that were not answered.
    pub probes: u32,
    /// How long nothing had come from the peer, in milliseconds.
    pub silent_ms: u64,
}

impl From<DeadPeer> for Entry {
    fn from(found: DeadPeer) -> Self {
        Self {
            at_ms: milliseconds(found.at),
            what: What::DeadPeer(DeadPeerRecord {
                policy: found.policy,
                cause: Cause::name(found.cause).to_owned(),
                errno: found.errno,
                cgroup_id: found.cgroup,
                local: found.local.to_string(),
                remote: found.remote.to_string(),
                probes: found.probes,
                silent_ms: u64::try_from(found.silence.as_millis()).unwrap_or(u64::MAX),
            }),
        }
    }
}

/// Since 1970.
pub(crate) fn milliseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Wanted {
    /// What happened since then, as far as it is kept, in milliseconds since
    /// 1970; nothing of the past where there is no time.
    pub since_ms: Option<u64>,
    /// Whether what happens from now on, too.
    pub follow: bool,
}

/// The lines of what happened.
#[derive(Debug)]
pub struct Journal {
    kept: Mutex<VecDeque<Line>>,
    followers: broadcast::Sender<Line>,
}

/// An entry as it is sent.
#[derive(Clone, Debug)]
struct Line {
    at_ms: u64,
    json: Arc<str>,
}

impl Line {
    fn new(entry: &Entry) -> Self {
        // Strings and numbers cannot fail to be written.
        let json = serde_json::to_string(entry).unwrap_or_default() + "\n";
        Self {
            at_ms: entry.at_ms,
            json: json.into(),
        }
    }
}

impl Default for Journal {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            followers: broadcast::Sender::new(KEPT),
        }
    }
}

impl Journal {
    /// Notes something that happens now.
    pub fn note(&self, what: What) {
        self.add(&Entry {
            at_ms: milliseconds(SystemTime::now()),
            what,
        });
    }

    /// Notes something that happened.
    pub fn add(&self, entry: &Entry) {
        let line = Line::new(entry);
        let mut kept = self.kept();
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back(line.clone());
        // Nobody follows: that is no error.
        let _ = self.followers.send(line);
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Line>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody wants to know of what happens as it does.
    #[must_use]
    pub fn is_followed(&self) -> bool {
        self.followers.receiver_count() > 0
    }

    /// Answers on a stream, in a task of its own. Whoever does not read is cut
    /// off; so are all beyond [`MOST_FOLLOWERS`].
    pub fn serve(&self, wanted: Wanted, stream: UnixStream) {
        if self.followers.receiver_count() >= MOST_FOLLOWERS {
            return;
        }
        let (past, receiver) = self.begin(wanted);
        tokio::spawn(async move {
            // That is the end of it, whatever it was.
            let _ = send(past, receiver, stream).await;
        });
    }

    /// What there is, and what receives the rest; nothing falls in between.
    fn begin(&self, wanted: Wanted) -> (Vec<Line>, Option<broadcast::Receiver<Line>>) {
        let kept = self.kept();
        let receiver = wanted.follow.then(|| self.followers.subscribe());
        let past = kept
            .iter()
            .filter(|line| wanted.since_ms.is_some_and(|since| line.at_ms >= since));
        (past.cloned().collect(), receiver)
    }
}

async fn send(
    past: Vec<Line>,
    receiver: Option<broadcast::Receiver<Line>>,
    stream: UnixStream,
) -> io::Result<()> {
    let (mut reader, mut writer) = stream.into_split();
    for line in past {
        timeout(PATIENCE, writer.write_all(line.json.as_bytes())).await??;
    }
    let Some(mut receiver) = receiver else {
        return Ok(());
    };
    let mut nothing = [0];
    loop {
        let line = tokio::select! {
            next = receiver.recv() => match next {
                Ok(line) => line.json,
                Err(RecvError::Lagged(skipped)) => {
                    let what = What::Skipped { skipped };
                    let at_ms = milliseconds(SystemTime::now());
                    Line::new(&Entry { at_ms, what }).json
                }
                Err(RecvError::Closed) => return Ok(()),
            },
            // A client that says anything more, or is gone.
            _ = reader.read(&mut nothing) => return Ok(()),
        };
        timeout(PATIENCE, writer.write_all(line.as_bytes())).await??;
    }
}

/// Notes what is reported, and hands it on.
pub(super) struct Noting<'a> {
    pub(super) journal: Arc<Journal>,
    pub(super) reporter: &'a mut dyn Reporter,
}

impl Reporter for Noting<'_> {
    fn report(&mut self, event: &Event<'_>) {
        self.journal.note(What::from(event));
        self.reporter.report(event);
    }
}

impl From<&Event<'_>> for What {
    fn from(event: &Event<'_>) -> Self {
        match event {
            Event::Started {
                cgroup,
                assignment,
                continued,
                ..
            } => Self::Started {
                cgroup: (*cgroup).to_owned(),
                continued: *continued,
                policies: names(assignment),
            },
            Event::Waiting { cgroup } => Self::Waiting {
                cgroup: (*cgroup).clone(),
            },
            Event::Reloaded { why, difference } => Self::Reloaded {
                why: (*why).to_owned(),
                policies: names(&difference.assignment),
                removed: difference.removed.clone(),
                unchanged: difference.unchanged,
            },
            Event::Swept(swept) => Self::Swept {
                new_cgroups: swept.new_cgroups as u64,
                connections: swept.seen,
                namespaces: swept.namespaces as u64,
                waiting: swept.waiting(),
                missed: swept.missed.len() as u64,
            },
            Event::Stopped { by, .. } => Self::Stopped {
                by: (*by).to_owned(),
            },
        }
    }
}

fn names(assignment: &Assignment) -> Vec<String> {
    let policies = assignment.policies.iter();
    policies.map(|assigned| assigned.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Attribute, NamePattern};

    fn entry(at_ms: u64) -> Entry {
        Entry {
            at_ms,
            what: What::DeadPeersLost { lost: at_ms },
        }
    }

    fn times(lines: &[Line]) -> Vec<u64> {
        lines.iter().map(|line| line.at_ms).collect()
    }

    #[test]
    fn only_the_latest_are_kept() {
        let journal = Journal::default();
        for at in 0..KEPT as u64 + 10 {
            journal.add(&entry(at));
        }
        let wanted = |since_ms| Wanted {
            since_ms,
            follow: false,
        };
        let (past, _) = journal.begin(wanted(Some(0)));
        assert_eq!((past.len(), past[0].at_ms), (KEPT, 10));
        let (past, _) = journal.begin(wanted(Some(KEPT as u64 + 8)));
        assert_eq!(times(&past), [KEPT as u64 + 8, KEPT as u64 + 9]);
        assert!(journal.begin(wanted(None)).0.is_empty());
        assert!(!journal.is_followed());
    }

    #[test]
    fn an_entry_survives_its_line() {
        for what in [
            What::DeadPeer(DeadPeerRecord {
                policy: "a \"b\"".to_owned(),
                cause: "probes".to_owned(),
                errno: 110,
                cgroup_id: u64::MAX,
                local: "[::1]:1".to_owned(),
                remote: "[::2]:2".to_owned(),
                probes: 3,
                silent_ms: 5000,
            }),
            What::PartFailed {
                part: "lock".to_owned(),
                error: "two\nlines".to_owned(),
            },
            What::Skipped { skipped: 3 },
        ] {
            let entry = Entry { at_ms: 1, what };
            let line = Line::new(&entry);
            let (json, end) = line.json.split_at(line.json.len() - 1);
            assert!(end == "\n" && !json.contains('\n'), "{json}");
            assert_eq!(serde_json::from_str::<Entry>(json).unwrap(), entry);
        }
    }

    fn pods(names: impl IntoIterator<Item = usize>) -> Selector {
        let names = names.into_iter().map(|n| format!("shop/web-{n:03}"));
        let patterns = names.map(|name| NamePattern::new(&name).unwrap());
        Selector {
            attributes: [(Attribute::Pod, patterns.collect())].into(),
            labels: [("app".to_owned(), NamePattern::new("web").unwrap())].into(),
        }
    }

    #[test]
    fn other_names_are_told_and_not_more_than_can_be_read() {
        let changed = |before, now| match What::names_changed("p", "w", &before, &now) {
            Some(What::NamesChanged {
                added,
                removed,
                more,
                ..
            }) => (added, removed, more),
            other => panic!("{other:?}"),
        };
        let name = |n| format!("pod = shop/web-{n:03}");
        assert_eq!(
            changed(pods([1, 2]), pods([2, 3])),
            (vec![name(3)], vec![name(1)], 0)
        );
        assert_eq!(What::names_changed("p", "w", &pods([1]), &pods([1])), None);
        let (added, removed, more) = changed(pods([0]), pods(1..=MOST_NAMES + 5));
        assert_eq!((added.len(), removed.len(), more), (MOST_NAMES, 1, 5));
    }

    async fn follower(journal: &Journal) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        let wanted = Wanted {
            since_ms: Some(0),
            follow: true,
        };
        journal.serve(wanted, far);
        tokio::task::yield_now().await;
        near
    }

    #[tokio::test]
    async fn a_follower_gets_what_was_and_what_comes() {
        let journal = Journal::default();
        journal.add(&entry(1));
        let mut near = follower(&journal).await;
        journal.add(&entry(2));
        let mut bytes = vec![0; 4096];
        let mut text = String::new();
        while text.lines().count() < 2 {
            let read = near.read(&mut bytes).await.unwrap();
            text.push_str(str::from_utf8(&bytes[..read]).unwrap());
        }
        assert!(
            text.contains(r#""at_ms":1,"#) && text.contains(r#""at_ms":2,"#),
            "{text}"
        );
        drop(near);
        while journal.is_followed() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn whoever_does_not_read_is_cut_off() {
        let journal = Journal::default();
        let _near = follower(&journal).await;
        for at in 0.. {
            if !journal.is_followed() {
                break;
            }
            assert!(at < 1_000_000, "it is still there");
            journal.add(&entry(at));
            if at % KEPT as u64 == 0 {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }

    #[tokio::test]
    async fn there_are_never_too_many() {
        let journal = Journal::default();
        let mut all = Vec::new();
        for _ in 0..MOST_FOLLOWERS + 3 {
            all.push(follower(&journal).await);
        }
        assert_eq!(journal.followers.receiver_count(), MOST_FOLLOWERS);
        // The next one's stream ends at once.
        let mut near = follower(&journal).await;
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
    }
}
