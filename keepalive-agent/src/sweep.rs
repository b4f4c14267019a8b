//! Sweep: brings the policy to the connections that were there first, in every
//! network namespace, without letting them all probe at once (see
//! [`keepalive_common::sweep`]).

mod by_hand;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result};
use tokio::sync::oneshot;

use tracing::debug;

use crate::{
    bpf::{Enforcer, SlowPass, Survey},
    hierarchy::Hierarchy,
    netns::{self, Namespace},
};
use by_hand::Hand;

/// When set in the environment, existing connections are changed from outside
/// the kernel even where an iterator could do it.
const BY_HAND: &str = "KEEPALIVE_SWEEP_BY_HAND";

/// Connections that probe together: nothing that a queue cannot hold.
const BATCH: u32 = 50;

/// Time for the last peers to answer their probes.
const ANSWER: Duration = Duration::from_secs(1);

/// Slow passes after one sweep. The second one finds what the first one missed,
/// and what has been silent for too long meanwhile.
const ROUNDS: u32 = 3;

/// What came of a pass over all namespaces.
#[derive(Debug, Default)]
pub struct Swept {
    /// Namespaces that were swept.
    pub namespaces: Vec<Namespace>,
    /// Connections that were looked at.
    pub seen: u64,
    /// Connections that a change is still waiting for.
    pub waiting: u64,
    /// Namespaces that could not be swept, and why.
    pub missed: Vec<(Namespace, Error)>,
}

/// Brings the policy to everything but the connections that would probe at once.
///
/// The first time all namespaces with connections are entered, so that these are
/// counted; afterwards only those in which there is something to do.
///
/// # Errors
///
/// When no namespace can be found at all, or the kernel offers no road to
/// existing connections. What goes wrong in one namespace is reported in the
/// result and does not keep the others from being swept.
pub fn apply(enforcer: &mut Enforcer) -> Result<Swept> {
    let is_first = !enforcer.has_counted();
    let Survey {
        namespaces,
        unknown,
    } = match enforcer.survey() {
        Ok(survey) => survey,
        Err(error) => {
            debug!("{error:#}; every namespace is entered");
            return pass(enforcer, netns::all()?, true);
        }
    };
    let is_unknown = |namespace: &Namespace| unknown.iter().any(|(other, _)| other == namespace);
    let mut looked_at = 0;
    let mut entered = Vec::new();
    for surveyed in namespaces {
        if is_unknown(&surveyed.namespace) {
            continue;
        }
        if is_first || !surveyed.is_settled() {
            entered.push(surveyed.namespace);
        } else {
            looked_at += surveyed.connections;
        }
    }
    let mut swept = pass(enforcer, entered, true)?;
    swept.seen += looked_at;
    swept.missed.extend(unknown);
    Ok(swept)
}

fn pass(enforcer: &mut Enforcer, namespaces: Vec<Namespace>, counts: bool) -> Result<Swept> {
    let mut road = Road::find(enforcer)?;
    let mut swept = Swept::default();
    for namespace in namespaces {
        let mut pass = |namespace: &Namespace| match &mut road {
            Road::Kernel => enforcer.pass(namespace, counts),
            Road::ByHand(hand) => hand.pass(namespace, counts, None),
        };
        match pass(&namespace) {
            Ok(Some(done)) => {
                swept.seen += done.seen;
                swept.waiting += done.waiting;
                swept.namespaces.push(namespace);
            }
            Ok(None) => {}
            Err(error) => swept.missed.push((namespace, error)),
        }
    }
    Ok(swept)
}

/// How existing connections are reached.
enum Road {
    /// An iterator sets the options.
    Kernel,
    /// The agent does, on copies of the sockets' descriptors.
    ByHand(Box<Hand>),
}

impl Road {
    fn find(enforcer: &mut Enforcer) -> Result<Self> {
        // For tests on kernels that have both.
        let by_hand = std::env::var_os(BY_HAND).is_some();
        if !by_hand {
            match enforcer.load_sweep() {
                Ok(()) => return Ok(Self::Kernel),
                Err(error) => debug!("{error:#}; existing connections are changed from outside"),
            }
        }
        let hierarchy = Hierarchy::find()?;
        let root = hierarchy.existing("/".as_ref())?;
        let cgroups = hierarchy.walk(&root).context("reading the hierarchy")?;
        let hand = Hand::new(enforcer.by_hand(cgroups)?);
        Ok(Self::ByHand(Box::new(hand)))
    }
}

/// Whether descriptors of other processes can be had, tried on one of our own.
#[must_use]
pub fn works_by_hand() -> bool {
    by_hand::works()
}

/// A slow pass, ready to run on a thread of its own.
enum Slow {
    Kernel(SlowPass),
    ByHand(Box<Hand>, Vec<Namespace>),
}

impl Slow {
    fn prepare(enforcer: &mut Enforcer, namespaces: &[Namespace]) -> Result<Self> {
        Ok(match Road::find(enforcer)? {
            Road::Kernel => Self::Kernel(enforcer.slow_pass(namespaces, BATCH)?),
            Road::ByHand(hand) => Self::ByHand(hand, namespaces.to_vec()),
        })
    }

    fn run(self, pause: &mut (dyn FnMut() -> bool + Send)) {
        match self {
            Self::Kernel(pass) => pass.run(pause),
            Self::ByHand(hand, namespaces) => {
                for namespace in namespaces {
                    if let Err(error) = hand.pass(&namespace, false, Some(pause)) {
                        debug!("namespace {}: {error:#}", namespace.name);
                    }
                }
            }
        }
    }
}

/// The rest of a sweep, on a thread of its own: lets the waiting connections
/// probe one batch after the other. Dropping it stops the thread.
pub struct Rest {
    round: u32,
    namespaces: Vec<Namespace>,
    idle: u32,
    probed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    finished: oneshot::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Rest {
    /// Begins with what a sweep left waiting; none where that is nothing.
    /// `shortest_idle` is that of the policies, in seconds.
    ///
    /// # Errors
    ///
    /// When the pass cannot be prepared.
    pub fn of(enforcer: &mut Enforcer, swept: &Swept, shortest_idle: u32) -> Result<Option<Self>> {
        Self::begin(enforcer, swept, shortest_idle, 1)
    }

    fn begin(
        enforcer: &mut Enforcer,
        swept: &Swept,
        idle: u32,
        round: u32,
    ) -> Result<Option<Self>> {
        if swept.waiting == 0 || round > ROUNDS {
            return Ok(None);
        }
        let pause = pause(swept.waiting, idle);
        let pass = Slow::prepare(enforcer, &swept.namespaces)?;
        let probed = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (finish, finished) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("sweep".to_owned())
            .spawn({
                let (probed, stop) = (probed.clone(), stop.clone());
                move || {
                    run(pass, pause, &probed, &stop);
                    // Nobody listens any more when the agent is stopping.
                    let _ = finish.send(());
                }
            })
            .context("starting a thread for the sweep")?;
        Ok(Some(Self {
            round,
            namespaces: swept.namespaces.clone(),
            idle,
            probed,
            stop,
            finished,
            thread: Some(thread),
        }))
    }

    /// Waits until the pass is over.
    pub async fn finished(&mut self) {
        // An error says that the thread is gone, so it is over too.
        let _ = (&mut self.finished).await;
    }

    /// Whether the pass is over.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Connections that were let probe so far.
    #[must_use]
    pub fn probed(&self) -> u64 {
        self.probed.load(Ordering::Relaxed)
    }

    /// Looks once more, and begins another round where something is waiting.
    ///
    /// # Errors
    ///
    /// When the next pass cannot be prepared.
    pub fn next(mut self, enforcer: &mut Enforcer) -> Result<Option<Self>> {
        self.join();
        let namespaces = std::mem::take(&mut self.namespaces);
        let swept = pass(enforcer, namespaces, false)?;
        Self::begin(enforcer, &swept, self.idle, self.round + 1)
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It has nothing to panic about; if it did, it is over.
            let _ = thread.join();
        }
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.join();
    }
}

fn run(pass: Slow, pause: Duration, probed: &AtomicU64, stop: &AtomicBool) {
    let goes_on = || !stop.load(Ordering::Relaxed);
    let mut next = Instant::now();
    pass.run(&mut || {
        probed.fetch_add(u64::from(BATCH), Ordering::Relaxed);
        // A busy machine that wakes this thread late does not make the whole
        // pass late; catching up is four times the pace at the most.
        next += pause;
        let left = next.saturating_duration_since(Instant::now());
        thread::sleep(left.max(pause / 4));
        goes_on()
    });
    if goes_on() {
        thread::sleep(ANSWER);
    }
}

/// Time between two batches: they take four fifths of the shortest idle period
/// together, and no batch waits longer than a fifth of a second.
fn pause(waiting: u64, shortest_idle: u32) -> Duration {
    const LONGEST: Duration = Duration::from_millis(200);
    let batches = u32::try_from(waiting.div_ceil(u64::from(BATCH)))
        .unwrap_or(u32::MAX)
        .max(1);
    (Duration::from_secs(shortest_idle.into()) * 4 / 5 / batches).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_spread_over_most_of_the_idle_period() {
        for (waiting, idle, milliseconds) in [
            (200_000, 60, 12),
            (50_000, 60, 48),
            (1_000, 60, 200),
            (1, 60, 200),
            (5_000, 5, 40),
        ] {
            let found = pause(waiting, idle);
            assert_eq!(found.as_millis(), milliseconds, "{waiting} {idle}");
            let batches = u32::try_from(waiting.div_ceil(u64::from(BATCH))).unwrap();
            assert!(found * batches <= Duration::from_secs(idle.into()));
        }
    }
}
