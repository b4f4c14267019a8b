//! Connections: those that there are now, counted when somebody asks.
//!
//! To go through all of them takes the more the more there are. So it happens on a
//! thread of its own, once for all who ask at the same time, and not again before
//! that has paid off: however many ask, it takes a tenth of a processor at most.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use keepalive_common::socket::SocketRecord;
use tokio::{
    sync::{Mutex as AsyncMutex, oneshot},
    time::timeout_at,
};
use tracing::debug;

use super::Source;
use crate::{
    assignment::{GRANTED, UNCLAIMED},
    datapath::{self, Lister, chain},
    hierarchy::Hierarchy,
    kernel::layout::Kernel,
    memory, paths,
    sockets::{
        self,
        cgroups::{self, Cgroups},
        filter::Risk,
    },
};

/// What was counted holds for so long at least.
const FRESH: Duration = Duration::from_secs(5);

/// As much longer than the counting took.
const SHARE: u32 = 10;

/// Who asks waits for so long at most; then what was counted before is shown.
/// Prometheus itself waits for 10 seconds, and a connection to it lasts 5.
const PATIENCE: Duration = Duration::from_secs(3);

/// The connections of one policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OfPolicy {
    /// Keepalive is on.
    pub(super) protected: u64,
    /// Keepalive is off.
    pub(super) unprotected: u64,
}

/// The connections of the cgroup that the agent governs, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// By name of the policy.
    pub(super) by_policy: BTreeMap<String, OfPolicy>,
    /// Those that a middlebox would forget, in the order of [`paths::ALL`].
    pub(super) at_risk: [u64; paths::ALL.len()],
    /// Network namespaces whose connections could not be seen, or not all of them.
    pub(super) missed_namespaces: u64,
    /// When, in seconds since 1970.
    pub(super) counted_at: u64,
}

/// Counts the connections that a set governs.
type Count<S> = dyn Fn(&S) -> Result<Tally, sockets::Error> + Send + Sync;

/// Counts connections when somebody asks, of the set that is in force then.
pub(super) struct Connections<S = Source> {
    count: Arc<Count<S>>,
    counted: AsyncMutex<Counted<S>>,
}

struct Counted<S> {
    last: Option<Last<S>>,
    under_way: Option<UnderWay<S>>,
}

struct Last<S> {
    /// None where they could not be counted.
    tally: Option<Arc<Tally>>,
    source: Arc<S>,
    fresh_until: Instant,
}

struct UnderWay<S> {
    answer: oneshot::Receiver<(Result<Tally, sockets::Error>, Duration)>,
    source: Arc<S>,
    awaited_until: Instant,
}

impl Connections {
    /// For a running kernel; nothing is loaded before somebody asks.
    pub(super) fn new(kernel: &Kernel) -> Self {
        let kernel = *kernel;
        let lister: Mutex<Option<Lister>> = Mutex::default();
        Self::counted_by(move |source| {
            let mut lister = lister.lock().unwrap_or_else(PoisonError::into_inner);
            let lister = match &mut *lister {
                Some(lister) => lister,
                none => none.insert(Lister::load(&kernel, &source.record.root.path)?),
            };
            count(lister, source)
        })
    }
}

impl<S: Send + Sync + 'static> Connections<S> {
    pub(super) fn counted_by(
        count: impl Fn(&S) -> Result<Tally, sockets::Error> + Send + Sync + 'static,
    ) -> Self {
        Self {
            count: Arc::new(count),
            counted: AsyncMutex::new(Counted {
                last: None,
                under_way: None,
            }),
        }
    }

    /// What there is under this set; none where it cannot be counted, or has not
    /// been yet when patience is at its end.
    pub(super) async fn get(&self, source: &Arc<S>) -> Option<Arc<Tally>> {
        // Others who ask meanwhile wait here, and find it done.
        let counted = &mut *self.counted.lock().await;
        if let Some(last) = &counted.last
            && Arc::ptr_eq(&last.source, source)
            && Instant::now() < last.fresh_until
        {
            return last.tally.clone();
        }
        let under_way = match &mut counted.under_way {
            Some(under_way) => under_way,
            none => none.insert(self.start(source)),
        };
        let until = under_way.awaited_until.into();
        if let Ok(answer) = timeout_at(until, &mut under_way.answer).await {
            // There is none where no thread could be started, or it has ended.
            let (tally, took) = answer.map_or((None, Duration::ZERO), |(tally, took)| {
                let log = |error: &sockets::Error| debug!("counting connections: {}", chain(error));
                (tally.inspect_err(log).ok(), took)
            });
            counted.last = Some(Last {
                tally: tally.map(Arc::new),
                source: under_way.source.clone(),
                fresh_until: Instant::now() + FRESH.max(took * SHARE),
            });
            counted.under_way = None;
        }
        counted.last.as_ref().and_then(|last| last.tally.clone())
    }

    fn start(&self, source: &Arc<S>) -> UnderWay<S> {
        let (tell, answer) = oneshot::channel();
        let (count, counted) = (self.count.clone(), source.clone());
        let started = thread::Builder::new()
            .name("connections".to_owned())
            .spawn(move || {
                let begun = Instant::now();
                let tally = count(&counted);
                memory::give_back();
                // Nobody is left to tell when the agent ends.
                let _ = tell.send((tally, begun.elapsed()));
            });
        if let Err(error) = started {
            // There is no answer then.
            debug!("starting a thread to count connections: {error}");
        }
        UnderWay {
            answer,
            source: source.clone(),
            awaited_until: Instant::now() + PATIENCE,
        }
    }
}

/// Goes through all connections of the machine.
fn count(lister: &Lister, source: &Source) -> Result<Tally, sockets::Error> {
    let description = source.record.description();
    let root = &description.root.path;
    let claimants = cgroups::claimants(&description.config, &description.root)?;
    let names = claimants
        .policies()
        .iter()
        .map(|policy| policy.name.clone());
    let names: HashSet<_> = names.collect();
    let mut cgroups = Cgroups::claimed_by(
        Hierarchy::find().ok(),
        vec![(claimants, source.record.grants())],
    );
    let (mut tally, missed_namespaces): (Tally, u64) =
        sockets::sum_up(lister, &mut |tally: &mut Tally, record| {
            let claimed = cgroups.claim(record);
            let (cgroup, policy) = claimed.map_err(sockets::Error::Hierarchy)?;
            // Of a cgroup that is gone the root's policies hold.
            let is_governed = match cgroup {
                Some(path) => root.contains(path),
                None => root.depth() == 0 || policy.is_some(),
            };
            if is_governed {
                // Users are no label: there may be many.
                let name = policy.map_or(UNCLAIMED, |policy| match names.get(&policy.name) {
                    Some(name) => name,
                    None => GRANTED,
                });
                tally.add(record, name);
            }
            Ok(())
        })?;
    tally.missed_namespaces = missed_namespaces;
    tally.counted_at = datapath::now();
    Ok(tally)
}

impl Tally {
    fn add(&mut self, record: &SocketRecord, policy: &str) {
        // An entry would take a name for each connection.
        if !self.by_policy.contains_key(policy) {
            self.by_policy
                .insert(policy.to_owned(), OfPolicy::default());
        }
        if let Some(counts) = self.by_policy.get_mut(policy) {
            if record.options().keepalive {
                counts.protected += 1;
            } else {
                counts.unprotected += 1;
            }
        }
        for (count, middlebox) in self.at_risk.iter_mut().zip(paths::ALL) {
            let risk = Risk {
                timeout: middlebox.into(),
                loopback: false,
            };
            *count += u64::from(risk.threatens(record));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    };

    use keepalive_common::plan::Options;

    use super::*;
    use crate::sockets::trial::{protected, record};

    fn asked(connections: &Connections<u32>, source: &Arc<u32>) -> Option<u64> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let tally = runtime.block_on(connections.get(source));
        tally.map(|tally| tally.counted_at)
    }

    /// Each counting gives its number.
    fn numbered(before: impl Fn() + Send + Sync + 'static) -> Connections<u32> {
        let number = AtomicU64::new(0);
        Connections::counted_by(move |_| {
            before();
            Ok(Tally {
                counted_at: number.fetch_add(1, Ordering::Relaxed),
                ..Tally::default()
            })
        })
    }

    #[test]
    fn many_who_ask_are_told_what_was_counted_once() {
        let connections = numbered(|| ());
        let source = Arc::new(1);
        for _ in 0..100 {
            assert_eq!(asked(&connections, &source), Some(0));
        }
        // Under another set policies have other names.
        let source = Arc::new(2);
        assert_eq!(asked(&connections, &source), Some(1));
        assert_eq!(asked(&connections, &source), Some(1));
    }

    #[test]
    fn what_takes_long_is_not_waited_for() {
        let (end, ends) = mpsc::channel();
        let ends = Mutex::new(ends);
        let connections = numbered(move || ends.lock().unwrap().recv().unwrap());
        let source = Arc::new(1);
        assert_eq!(asked(&connections, &source), None);
        // It goes on, and nobody begins another one.
        assert_eq!(asked(&connections, &source), None);
        end.send(()).unwrap();
        while asked(&connections, &source).is_none() {
            thread::yield_now();
        }
        assert_eq!(asked(&connections, &source), Some(0));
    }

    #[test]
    fn what_cannot_be_counted_is_not_tried_all_the_time() {
        let tries = Arc::new(AtomicU64::new(0));
        let counted = tries.clone();
        let connections = Connections::counted_by(move |_: &u32| {
            counted.fetch_add(1, Ordering::Relaxed);
            Err(sockets::Error::NoProcess(1))
        });
        let source = Arc::new(1);
        for _ in 0..10 {
            assert_eq!(asked(&connections, &source), None);
        }
        assert_eq!(tries.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn connections_are_counted_by_policy_and_by_what_would_forget_them() {
        let mut tally = Tally::default();
        tally.add(&protected(60), "a");
        // Kept open on all paths but Azure's load balancer.
        tally.add(&protected(300), "a");
        tally.add(
            &record("192.0.2.1:1", "198.51.100.7:2", &Options::default()),
            "b",
        );
        // There is no path within the machine.
        tally.add(
            &record("127.0.0.1:1", "127.0.0.1:2", &Options::default()),
            "b",
        );
        let of = |protected, unprotected| OfPolicy {
            protected,
            unprotected,
        };
        let expected = [("a".to_owned(), of(2, 0)), ("b".to_owned(), of(0, 2))];
        assert_eq!(tally.by_policy, BTreeMap::from(expected));
        let names = paths::ALL.map(|middlebox| middlebox.name);
        assert_eq!(names, ["aws-nat", "aws-nlb", "azure-lb", "gcp", "ipvs"]);
        assert_eq!(tally.at_risk, [1, 1, 2, 1, 1]);
    }
}
