//! Sweep: brings the policy to the connections that were there first, in every
//! network namespace, without letting them all probe at once (see
//! [`keepalive_common::sweep`]).

use std::{
    collections::HashSet,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use keepalive_common::sweep::{CLASSES, Pass};
use thiserror::Error;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tracing::debug;

use crate::{
    datapath::{self, DueSockets, Step, Survey, Sweeper, chain},
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    netns::{self, Namespace},
};

/// Connections that probe together: nothing that a queue cannot hold.
const BATCH: u32 = 50;

/// All connections of the node together probe no faster than this, whatever their
/// policies: a batch in 10 ms is 5,000 probes a second.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

/// Time for the last peers to answer their probes.
const ANSWER: Duration = Duration::from_secs(1);

/// Slow rounds after one sweep. The second one finds what the first one missed,
/// and what has been silent for too long meanwhile.
const ROUNDS: u32 = 3;

/// Numbers of connections by the [class](keepalive_common::sweep::class) of their
/// idle time.
type ByClass = [u64; CLASSES as usize];

/// Processes of new cgroups that are looked at one by one: more than these together
/// take longer than a survey of the node.
const PROCESSES: usize = 256;

/// Why connections cannot be brought along.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel refuses a program, or breaks off.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// No namespaces can be found, or one cannot be entered.
    #[error(transparent)]
    Namespaces(#[from] netns::Error),
    /// It cannot be told which processes are in a cgroup.
    #[error("finding the processes of cgroup {cgroup}")]
    Processes {
        /// The cgroup.
        cgroup: CgroupPath,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There are too many to look at each.
    #[error("more than {PROCESSES} processes are in new cgroups")]
    TooManyProcesses,
}

type Result<T> = std::result::Result<T, Error>;

/// Whose connections a sweep is for.
#[derive(Clone, Debug)]
pub enum Reach {
    /// Those of the node, whichever need a change.
    Node,
    /// Those that were made in new cgroups before these got their policy.
    NewCgroups(Hierarchy, Vec<Cgroup>),
}

/// What came of a pass over all namespaces.
#[derive(Debug, Default)]
pub struct Swept {
    /// Whose connections it was for: how many new cgroups; none for all of the node.
    pub new_cgroups: usize,
    /// How many namespaces were swept.
    pub namespaces: usize,
    /// Connections that were looked at.
    pub seen: u64,
    /// Connections that a change is still waiting for, by the class of their idle
    /// time.
    pub waiting_by_class: ByClass,
    /// Namespaces that could not be swept, by name, and why.
    pub missed: Vec<(String, Error)>,
}

impl Swept {
    /// Connections that a change is still waiting for.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.waiting_by_class.iter().sum()
    }
}

/// What a sweep tells on its way.
#[derive(Debug)]
pub enum Progress {
    /// The first pass is over: everything has been brought along but the
    /// connections that would probe at once. An error where there was none. For new
    /// cgroups that is all.
    FirstPass(Result<Swept>),
    /// The last round is over; what is still waiting stays as it was.
    Over(Swept),
}

/// A sweep on a thread of its own. Dropping it makes it stop soon.
#[derive(Debug)]
pub struct SweepJob {
    is_of_node: bool,
    stop: Arc<AtomicBool>,
    probed: Arc<AtomicU64>,
    progress: UnboundedReceiver<Progress>,
}

impl SweepJob {
    /// Begins.
    ///
    /// # Errors
    ///
    /// When no thread can be started.
    pub fn start(sweeper: &Sweeper, reach: Reach) -> io::Result<Self> {
        let is_of_node = matches!(reach, Reach::Node);
        let (sender, progress) = unbounded_channel();
        let stop = Arc::new(AtomicBool::new(false));
        let probed = Arc::new(AtomicU64::new(0));
        let passes = Passes {
            sweeper: sweeper.clone(),
            reach,
            dry_run: false,
            stop: stop.clone(),
            probed: probed.clone(),
        };
        thread::Builder::new()
            .name("sweep".to_owned())
            .spawn(move || passes.run(&sender))?;
        Ok(Self {
            is_of_node,
            stop,
            probed,
            progress,
        })
    }

    /// Whether it is for all connections of the node.
    #[must_use]
    pub const fn is_of_node(&self) -> bool {
        self.is_of_node
    }

    /// Waits for news; none when it is over. May be dropped while it waits:
    /// nothing is lost by that.
    pub async fn progress(&mut self) -> Option<Progress> {
        self.progress.recv().await
    }

    /// The same for one who has nothing else to do.
    pub fn blocking_progress(&mut self) -> Option<Progress> {
        self.progress.blocking_recv()
    }

    /// News, if there is any.
    #[must_use]
    pub fn try_progress(&mut self) -> Option<Progress> {
        self.progress.try_recv().ok()
    }

    /// Connections that were let probe so far.
    #[must_use]
    pub fn probed(&self) -> u64 {
        self.probed.load(Ordering::Relaxed)
    }

    /// Has it stop at the next chance; [`Self::progress`] tells when.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Drop for SweepJob {
    fn drop(&mut self) {
        // The thread is not waited for: it may be inside the kernel.
        self.stop();
    }
}

/// Makes the first pass of a sweep here and now. One in dry run counts what it
/// would do and does nothing.
///
/// # Errors
///
/// When no namespace can be found at all, or the kernel refuses the program.
pub fn first_pass(sweeper: &Sweeper, dry_run: bool) -> Result<Swept> {
    let passes = Passes {
        sweeper: sweeper.clone(),
        reach: Reach::Node,
        dry_run,
        stop: Arc::default(),
        probed: Arc::default(),
    };
    passes.pass(sweeper.counts())
}

struct Passes {
    sweeper: Sweeper,
    reach: Reach,
    dry_run: bool,
    stop: Arc<AtomicBool>,
    probed: Arc<AtomicU64>,
}

impl Passes {
    fn run(self, sender: &UnboundedSender<Progress>) {
        // Nobody listens any more when the agent is stopping.
        let tell = |progress| drop(sender.send(progress));
        let mut swept = match self.pass(self.sweeper.counts()) {
            Ok(swept) => swept,
            Err(error) => return tell(Progress::FirstPass(Err(error))),
        };
        self.sweeper.set_counts(false);
        let mut waiting = swept.waiting_by_class;
        tell(Progress::FirstPass(Ok(swept)));
        if let Reach::NewCgroups(..) = self.reach {
            return;
        }
        for _ in 0..ROUNDS {
            if waiting.iter().sum::<u64>() == 0 || self.is_stopped() {
                break;
            }
            self.probe(&waiting);
            if self.is_stopped() {
                return;
            }
            thread::sleep(ANSWER);
            match self.pass(false) {
                Ok(again) => {
                    waiting = again.waiting_by_class;
                    swept = again;
                    if swept.waiting() == 0 {
                        return tell(Progress::Over(swept));
                    }
                }
                Err(error) => {
                    debug!("looking for connections that still wait: {}", chain(&error));
                }
            }
        }
        tell(Progress::Over(Swept {
            waiting_by_class: waiting,
            ..Swept::default()
        }));
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Everything but the connections that would probe at once.
    fn pass(&self, counts: bool) -> Result<Swept> {
        self.sweeper.load()?;
        let (namespaces, mut swept) = match &self.reach {
            Reach::Node => self.namespaces(counts)?,
            Reach::NewCgroups(hierarchy, cgroups) => self.namespaces_of(hierarchy, cgroups)?,
        };
        for namespace in namespaces {
            if self.is_stopped() {
                return Ok(swept);
            }
            let pass = Pass {
                counts: u32::from(counts),
                dry_run: u32::from(self.dry_run),
                ..Pass::default()
            };
            match self.in_namespace(&namespace, pass, &mut || true) {
                Ok(Some(done)) => {
                    swept.namespaces += 1;
                    swept.seen += done.seen;
                    for (sum, more) in swept.waiting_by_class.iter_mut().zip(done.waiting) {
                        *sum += more;
                    }
                }
                Ok(None) => {}
                Err(error) => swept.missed.push((namespace.name, error)),
            }
        }
        Ok(swept)
    }

    /// Lets the waiting connections probe, those with short idle times first, each
    /// class at a pace of its own.
    fn probe(&self, waiting: &ByClass) {
        for (class, waiting) in (0..).zip(waiting) {
            if *waiting == 0 {
                continue;
            }
            let pause = pause(*waiting, 1 << class);
            let pass = Pass {
                batch: BATCH,
                class,
                ..Pass::default()
            };
            let (namespaces, _) = self.namespaces(false).unwrap_or_else(|error| {
                debug!("{}", chain(&error));
                Default::default()
            });
            let mut next = Instant::now();
            let mut wait = || {
                self.probed.fetch_add(u64::from(BATCH), Ordering::Relaxed);
                // A busy machine that wakes this thread late does not make the
                // whole pass late; catching up is twice the pace at the most.
                next += pause;
                let left = next.saturating_duration_since(Instant::now());
                thread::sleep(left.max(pause / 2));
                !self.is_stopped()
            };
            for namespace in namespaces {
                if let Err(error) = self.in_namespace(&namespace, pass, &mut wait) {
                    debug!("namespace {}: {}", namespace.name, chain(&error));
                }
                if self.is_stopped() {
                    return;
                }
            }
        }
    }

    /// One pass over a namespace; none where the namespace is gone.
    fn in_namespace(
        &self,
        namespace: &Namespace,
        pass: Pass,
        pause: &mut (dyn FnMut() -> bool + Send),
    ) -> Result<Option<Pass>> {
        Ok(match self.sweeper.run(namespace, pass, pause)? {
            Step::Done(pass) => Some(pass),
            Step::Gone | Step::Stopped => None,
        })
    }

    /// The namespaces in which there may be something to do for what was made in these
    /// cgroups.
    ///
    /// A process can hand on what it holds to one that has been looked at; so it is
    /// looked again until there is none that has not been.
    fn namespaces_of(
        &self,
        hierarchy: &Hierarchy,
        cgroups: &[Cgroup],
    ) -> Result<(Vec<Namespace>, Swept)> {
        let mut seen = HashSet::new();
        let mut due = DueSockets::new();
        loop {
            let mut new = Vec::new();
            for cgroup in cgroups {
                let processes = hierarchy.processes(cgroup);
                let processes = processes.map_err(|source| Error::Processes {
                    cgroup: cgroup.path.clone(),
                    source,
                })?;
                new.extend(processes.into_iter().filter(|found| seen.insert(*found)));
            }
            if new.is_empty() {
                break;
            }
            if seen.len() > PROCESSES {
                return Err(Error::TooManyProcesses);
            }
            self.sweeper.survey_processes(&new, &mut due)?;
        }
        let swept = Swept {
            new_cgroups: cgroups.len(),
            ..Swept::default()
        };
        Ok((netns::of_sockets(&due)?, swept))
    }

    /// The namespaces to enter: those with connections that need a change, or all
    /// with connections, to count them. What is known of the others counts as
    /// looked at.
    fn namespaces(&self, all: bool) -> Result<(Vec<Namespace>, Swept)> {
        let mut swept = Swept::default();
        let survey = match self.sweeper.survey() {
            Ok(survey) => survey,
            Err(error) => {
                debug!("{}; every namespace is entered", chain(&error));
                return Ok((netns::all()?, swept));
            }
        };
        let Survey {
            namespaces,
            unknown,
        } = survey;
        let mut entered = Vec::new();
        for surveyed in namespaces {
            if unknown
                .iter()
                .any(|(other, _)| *other == surveyed.namespace)
            {
                continue;
            }
            if all || !surveyed.is_settled() {
                entered.push(surveyed.namespace);
            } else {
                swept.namespaces += 1;
                swept.seen += surveyed.connections;
            }
        }
        let unknown = unknown.into_iter();
        swept.missed = unknown
            .map(|(namespace, error)| (namespace.name, error.into()))
            .collect();
        Ok((entered, swept))
    }
}

/// Time between two batches of connections that wait and of which the shortest
/// idle time, in seconds, is this: they take four fifths of it together, and no
/// batch waits longer than a fifth of a second.
fn pause(waiting: u64, shortest_idle: u32) -> Duration {
    const LONGEST: Duration = Duration::from_millis(200);
    let batches = u32::try_from(waiting.div_ceil(u64::from(BATCH)))
        .unwrap_or(u32::MAX)
        .max(1);
    let even = Duration::from_secs(shortest_idle.into()) * 4 / 5 / batches;
    even.clamp(SHORTEST_PAUSE, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_spread_over_most_of_the_idle_period() {
        for (waiting, idle, milliseconds) in [
            (200_000, 64, 12),
            (50_000, 64, 51),
            (1_000, 64, 200),
            (1, 64, 200),
            (5_000, 4, 32),
            // The node has the last word.
            (1_000_000, 64, 10),
            (5_000, 1, 10),
        ] {
            let found = pause(waiting, idle);
            assert_eq!(found.as_millis(), milliseconds, "{waiting} {idle}");
        }
    }
}
