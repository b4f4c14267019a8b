//! Daemon: enforces the policy until it is stopped, while files, cgroups and the
//! agent itself come and go.
//!
//! Everything that wakes it comes in through `Daemon::next`; nothing that it
//! does then waits for anybody. Sets are built and connections swept on threads of
//! their own. Only at the start can an error end it.

mod adoption;
pub(crate) mod building;
mod changes;
pub mod control;
mod dead_peers;
mod early;
pub mod journal;
pub mod observed;
pub mod ownership;
mod reload;
mod renames;
mod requests;
pub mod self_service;
mod start;
mod sweeping;
pub mod target;

use std::{
    collections::BTreeSet,
    future::pending,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use aya_log::EbpfLogger;
use sd_notify::NotifyState;
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    time::{Instant, sleep_until},
};
use tracing::{debug, info, warn};

use crate::{
    assignment::{Assignment, Claimants, Warning},
    config::{Config, Sources},
    datapath::{
        self, Attachment, Bounds, Change, Events, InForce, LoadedSet, Origin, Part, PartStatus,
        PinDirectory, Refusals, SetRecord, State, chain,
    },
    grant::Grant,
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    kernel::{layout::Kernel, preflight},
    metrics::{self, Exposed},
    sweep::{Progress, SweepJob, Swept},
    unblocked::{self, Stream},
    view,
    watch::{self, Watch},
};
use building::Built;
use control::{Asked, Client, Control, Request};
use dead_peers::DeadPeerWatch;
use journal::{Journal, Noting, What};
use ownership::Ownership;
use reload::Why;
use renames::Renames;
use self_service::SelfServiceSocket;
use start::own;

/// What failed for a reason outside the config is tried again after this time, at
/// first, and after twice as much each time.
const RETRY: Duration = Duration::from_secs(5);
const LONGEST_RETRY: Duration = Duration::from_mins(5);

/// How long one of two agents that know each other waits for what the other one has
/// under way.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why an agent ends that another one has replaced.
const ANOTHER_AGENT: &str = "another agent";

/// What becomes of cgroups that the agent is not told of.
const UNTIL_RELOAD: &str = "new cgroups go by the policy above them until the next reload";

/// What to enforce, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The files of the config.
    pub sources: Sources,
    /// The cgroup to govern.
    pub cgroup: PathBuf,
    /// Whether everything is only counted.
    pub dry_run: bool,
    /// Where to pin enforcement, so that it outlives the agent.
    pub pin: Option<PathBuf>,
    /// Whether to replace a running agent.
    pub take_over: bool,
    /// Where to serve metrics.
    pub metrics: Option<metrics::server::Address>,
}

/// What there is to tell people and machines.
pub enum Event<'a> {
    /// Enforcement has begun.
    Started {
        /// The directory of the cgroup.
        cgroup: &'a str,
        /// The files of the config.
        origin: &'a Origin,
        /// The policies and what they claim.
        assignment: &'a Assignment,
        /// Whether it goes on when the agent ends.
        pinned: Option<&'a PinDirectory>,
        /// Whether a set that was in force before has been replaced.
        continued: bool,
    },
    /// The cgroup does not exist: there is nothing to enforce on until it does.
    Waiting {
        /// Its path.
        cgroup: &'a CgroupPath,
    },
    /// Another config is in force.
    Reloaded {
        /// Why it was read again.
        why: &'static str,
        /// What is different by that.
        difference: &'a Difference,
    },
    /// Existing connections have been brought along.
    Swept(&'a Swept),
    /// The agent ends.
    Stopped {
        /// The signal, or what else.
        by: &'a str,
        /// For how long it ran.
        after: Duration,
        /// What becomes of enforcement.
        leaves: Leaves,
        /// What was done.
        record: Option<&'a SetRecord>,
    },
}

/// What is different in one config from another one, as it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The policies that are new or different, and what they claim.
    pub assignment: Assignment,
    /// Names of those that are gone.
    pub removed: Vec<String>,
    /// How many are as they were.
    pub unchanged: usize,
}

impl Difference {
    /// Of a config and the one before it; `assign` tells which cgroups claim the
    /// policies in these places.
    fn between(before: &Config, now: &Config, assign: impl FnOnce(&[usize]) -> Assignment) -> Self {
        let changed = now.changed_since(before);
        let policies = usize::from(now.default.is_some()) + now.policies.len();
        Self {
            unchanged: policies - changed.len(),
            assignment: assign(&changed),
            removed: before.removed_by(now),
        }
    }
}

/// What an agent leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// Nothing: new connections get nothing any more.
    Nothing,
    /// Enforcement, by its pins.
    Enforcement,
    /// Enforcement, to another agent.
    AnotherAgent,
}

/// Whoever tells.
pub trait Reporter {
    /// Tells. Must not wait for anybody.
    fn report(&mut self, event: &Event<'_>);
}

/// Enforces until stopped.
///
/// # Errors
///
/// What makes enforcement impossible at the start.
pub fn run(options: &Options, reporter: &mut dyn Reporter) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("starting the runtime")?
        .block_on(async {
            tokio::select! {
                ended = enforce(options, reporter) => ended,
                never = unblocked::drain() => match never {},
            }
        })
}

async fn enforce(options: &Options, reporter: &mut dyn Reporter) -> Result<()> {
    preflight::may_enforce()?;
    let hangup = watch(SignalKind::hangup(), "SIGHUP")?;
    let journal = Arc::new(Journal::default());
    let reporter = &mut Noting {
        journal: journal.clone(),
        reporter,
    };
    let mut daemon = Daemon::prepare(options, journal)?;
    if let Some(address) = &options.metrics {
        let exposed = daemon.exposed.clone();
        metrics::server::start(address, options.take_over, exposed, &daemon.kernel)?;
    }
    let started = daemon.put_in_force()?;
    // From here on these end it in an orderly way. Before they end it at once: what
    // takes long at the start must not make it deaf, and nothing is half there.
    let mut signals = Signals {
        interrupt: watch(SignalKind::interrupt(), "SIGINT")?,
        terminate: watch(SignalKind::terminate(), "SIGTERM")?,
        hangup,
    };
    daemon.begin(started.as_ref(), reporter);
    notify(&[NotifyState::Ready]);
    let begun = Instant::now();
    let (by, leaves) = loop {
        let wake = daemon.next(&mut signals).await;
        if let Some(end) = daemon.handle(wake, reporter).await {
            break end;
        }
        daemon.resume_reload(reporter);
        daemon.publish();
    };
    notify(&[NotifyState::Stopping]);
    daemon.stop(by, begun.elapsed(), leaves, reporter)
}

/// What the daemon is woken by.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
enum Wake {
    Stop(&'static str),
    Hangup,
    Asked(std::io::Result<Asked>),
    UserAsked(self_service::Asked),
    FilesChanged(Result<(), watch::Error>),
    Refusals(Result<()>),
    DeadPeers(Result<()>),
    Built(Result<Built>),
    Sweep(Option<Progress>),
    EarlierSweepOver,
    Successor(Option<Request>),
    Cgroups(Result<Vec<Change>, datapath::Error>),
    Renamed(std::io::Result<BTreeSet<CgroupPath>>),
    EarlyDue,
    RetryDue,
    WatchdogDue,
}

/// What is in force on the cgroup.
struct Enforcement {
    attachment: Attachment,
    bounds: Bounds,
    set: LoadedSet,
    log: Option<AsyncFd<EbpfLogger<&'static dyn log::Log>>>,
}

struct Daemon {
    options: Options,
    kernel: Kernel,
    hierarchy: Hierarchy,
    root: Cgroup,
    config: Arc<Config>,
    origin: Origin,
    claimants: Claimants,
    pins: Option<PinDirectory>,
    /// Goes before the lock: whoever gets that makes a socket of the same name.
    control: Option<Control>,
    users: Option<SelfServiceSocket>,
    ownership: Option<Ownership>,
    /// The agent that steps aside for this one.
    predecessor: Option<Client>,
    /// Another agent that this one steps aside for.
    successor: Option<Asked>,
    /// What users were given for commands of their own.
    grants: Vec<Grant>,
    /// When a set with more room for them may be built again.
    build_for_users: Instant,
    /// None while the cgroup does not exist.
    enforcement: Option<Enforcement>,
    dead_peers: DeadPeerWatch,
    journal: Arc<Journal>,
    exposed: Arc<Exposed>,
    watch: Option<Watch>,
    events: Option<Events>,
    /// None where no policy goes by the names of containers.
    renames: Option<Renames>,
    building: Option<oneshot::Receiver<Result<Built>>>,
    /// Cgroups that came and went since the set that is being built was begun.
    changes: Vec<Change>,
    /// Whether the set that is being built follows from a change of the config.
    reloads: Option<Why>,
    /// A reload that waits for the first pass of a sweep, or for a set that is
    /// being built; whether somebody asked for it.
    reload_waiting: Option<Why>,
    /// Whether it waits for the end of a sweep, too.
    reload_awaits_sweep: bool,
    /// What the files said that were read while a set is being built.
    latest: Option<Arc<Config>>,
    sweep: Option<SweepJob>,
    /// That of an earlier set, until it has stopped: two at a time would undo what
    /// the other one does.
    earlier_sweep: Option<SweepJob>,
    /// Whether another sweep follows the one that goes on.
    sweep_again: bool,
    /// New cgroups in which connections may have been made before these had their
    /// policy, and when to sweep them.
    early: Vec<Cgroup>,
    early_due: Option<Instant>,
    early_not_before: Instant,
    /// When the sweep for such cgroups that is under way was begun.
    early_begun: Option<Instant>,
    retry_due: Option<Instant>,
    retry_after: Duration,
    state: State,
    /// What was written down last, and where.
    published: (State, Weak<SetRecord>),
    /// What was last said to be wrong, which several failures in a row need not
    /// repeat.
    last_reported_error: Option<String>,
    /// What has no effect now, as last reported.
    warned: BTreeSet<String>,
    /// What the kernel refused, as last reported.
    reported_refusals: Vec<Refusals>,
    watchdog: Option<(Instant, Duration)>,
    /// What was counted on a cgroup that is gone.
    last_record: Option<Arc<SetRecord>>,
}

impl Daemon {
    /// Reads what there is to read and takes the cgroup for itself; attaches
    /// nothing yet.
    fn prepare(options: &Options, journal: Arc<Journal>) -> Result<Self> {
        // Before the files are read, so that no change falls in between.
        let mut watch = Watch::on(&options.sources);
        let target::Read {
            config,
            origin,
            warnings,
        } = start::read_when_whole(watch.as_mut().ok(), options)?;
        for warning in &warnings {
            warn!("{warning}");
        }
        let hierarchy = Hierarchy::find()?;
        let unseen = view::missing(Some(&hierarchy));
        let path = hierarchy.path(&options.cgroup)?;
        let (owned, predecessor) = own(&path, options.take_over)?;
        let root = hierarchy.lookup(&path)?.unwrap_or(Cgroup { path, id: 0 });
        let kernel = Kernel::running()?;
        debug!(?kernel, "found the kernel's fields");
        let pins = options
            .pin
            .as_deref()
            .map(PinDirectory::create)
            .transpose()?;
        let claimants = target::claimants(&config, &root)?;
        let now = Instant::now();
        let mut daemon = Self {
            options: options.clone(),
            kernel,
            hierarchy,
            root,
            config,
            origin,
            claimants,
            pins,
            control: None,
            users: None,
            grants: Vec::new(),
            build_for_users: now,
            predecessor,
            successor: None,
            enforcement: None,
            dead_peers: DeadPeerWatch::new(journal.clone()),
            journal,
            exposed: Arc::default(),
            watch: None,
            events: None,
            renames: None,
            building: None,
            changes: Vec::new(),
            reloads: None,
            reload_waiting: None,
            reload_awaits_sweep: false,
            latest: None,
            sweep: None,
            earlier_sweep: None,
            sweep_again: false,
            early: Vec::new(),
            early_due: None,
            early_not_before: now,
            early_begun: None,
            retry_due: None,
            retry_after: RETRY,
            state: State {
                owner: Some(ownership::own()),
                ..State::default()
            },
            published: Default::default(),
            last_reported_error: None,
            warned: BTreeSet::new(),
            reported_refusals: Vec::new(),
            last_record: None,
            watchdog: sd_notify::watchdog_enabled().map(|within| {
                let every = within / 3;
                (now + every, every)
            }),
            ownership: owned.ok(),
        };
        let pins = daemon.pins.as_ref();
        daemon.state.pins = pins.map(|pins| pins.path().to_owned());
        match watch {
            Ok(watch) => {
                daemon.watch = Some(watch);
                daemon.part("config files", Ok(()));
            }
            Err(error) => daemon.files_unwatched(&error),
        }
        if daemon.predecessor.is_none() && daemon.ownership.is_none() {
            daemon.part_failed("lock", "see the log".to_owned());
        }
        for part in &unseen {
            warn!("{part}");
        }
        if !unseen.is_empty() {
            let unseen: Vec<_> = unseen.iter().map(ToString::to_string).collect();
            daemon.part_failed("view", unseen.join("; "));
        }
        if daemon.predecessor.is_none() {
            daemon.listen();
        }
        daemon.follow_cgroups();
        Ok(daemon)
    }

    fn part(&mut self, name: &str, status: Result<(), String>) {
        let part = match status {
            Ok(()) => Part {
                status: PartStatus::Active,
                reason: None,
            },
            Err(reason) => Part {
                status: PartStatus::Failed,
                reason: Some(reason),
            },
        };
        let before = self.state.parts.get(name);
        if before != Some(&part) {
            match &part.reason {
                Some(error) => self.journal.note(What::PartFailed {
                    part: name.to_owned(),
                    error: error.clone(),
                }),
                None if before.is_some_and(|before| before.status == PartStatus::Failed) => {
                    info!("works again: {name}");
                    self.journal.note(What::PartWorks {
                        part: name.to_owned(),
                    });
                }
                None => {}
            }
        }
        self.state.parts.insert(name.to_owned(), part);
    }

    fn part_failed(&mut self, name: &str, reason: String) {
        self.part(name, Err(reason));
    }

    fn files_unwatched(&mut self, error: &watch::Error) {
        let error = format!("{}; send SIGHUP after a change of the config", chain(error));
        warn!("{error}");
        self.watch = None;
        self.part_failed("config files", error);
    }

    /// Has cgroups told of that come and go.
    fn follow_cgroups(&mut self) {
        const PART: &str = "new cgroups";
        if self.events.is_some() {
            return;
        }
        match Events::load(&self.kernel, &self.hierarchy) {
            Ok(events) => {
                self.events = Some(events);
                self.part(PART, Ok(()));
            }
            Err(error) => {
                let error = format!("{}; {UNTIL_RELOAD}", chain(&error));
                warn!("{error}");
                self.part_failed(PART, error);
            }
        }
    }

    /// Warns of what has no effect, where that is new: with one file for each
    /// service, every change would repeat what is known of all the others.
    fn warn_of_new(&mut self, warnings: &[Warning]) {
        let warnings: BTreeSet<_> = warnings.iter().map(ToString::to_string).collect();
        for warning in warnings.difference(&self.warned) {
            warn!("{warning}");
        }
        self.warned = warnings;
    }

    /// The same for warnings about some of the policies.
    fn warn_of_more(&mut self, warnings: &[Warning]) {
        for warning in warnings {
            let warning = warning.to_string();
            if !self.warned.contains(&warning) {
                warn!("{warning}");
                self.warned.insert(warning);
            }
        }
    }

    /// Waits for something to do.
    async fn next(&mut self, signals: &mut Signals) -> Wake {
        let sweep = async {
            match &mut self.sweep {
                Some(sweep) => sweep.progress().await,
                None => pending().await,
            }
        };
        let cgroups = async {
            match &mut self.events {
                Some(events) => events.next().await,
                None => pending().await,
            }
        };
        let files = async {
            match &mut self.watch {
                Some(watch) => watch.changed().await,
                None => pending().await,
            }
        };
        let asked = async {
            match &mut self.control {
                Some(control) => control.asked().await,
                None => pending().await,
            }
        };
        let users = async {
            match &mut self.users {
                Some(users) => users.asked().await,
                None => None,
            }
        };
        let users = async {
            match users.await {
                Some(asked) => asked,
                None => pending().await,
            }
        };
        let renamed = async {
            match &mut self.renames {
                Some(renames) => renames.next().await,
                None => pending().await,
            }
        };
        let earlier_sweep = async {
            match &mut self.earlier_sweep {
                Some(sweep) => while sweep.progress().await.is_some() {},
                None => pending().await,
            }
        };
        let built = async {
            match &mut self.building {
                Some(building) => building.await,
                None => pending().await,
            }
        };
        let refusals = async {
            match self
                .enforcement
                .as_mut()
                .and_then(|found| found.log.as_mut())
            {
                Some(log) => flush(log).await,
                None => pending().await,
            }
        };
        let dead_peers = self.dead_peers.readable();
        let watchdog = at(self.watchdog.map(|(due, _)| due));
        if let Some(successor) = &mut self.successor {
            // Nothing is changed any more.
            return tokio::select! {
                biased;
                _ = signals.interrupt.recv() => Wake::Stop("SIGINT"),
                _ = signals.terminate.recv() => Wake::Stop("SIGTERM"),
                () = watchdog => Wake::WatchdogDue,
                request = successor.next() => Wake::Successor(request),
            };
        }
        // In this order: what a person asks for is not done twice, once because the
        // files changed as well.
        tokio::select! {
            biased;
            _ = signals.interrupt.recv() => Wake::Stop("SIGINT"),
            _ = signals.terminate.recv() => Wake::Stop("SIGTERM"),
            _ = signals.hangup.recv() => Wake::Hangup,
            asked = asked => Wake::Asked(asked),
            () = watchdog => Wake::WatchdogDue,
            built = built => Wake::Built(built.unwrap_or_else(|_| {
                bail!("the thread that builds policy sets failed")
            })),
            changed = files => Wake::FilesChanged(changed),
            progress = sweep => Wake::Sweep(progress),
            () = earlier_sweep => Wake::EarlierSweepOver,
            refusals = refusals => Wake::Refusals(refusals),
            found = dead_peers => Wake::DeadPeers(found),
            () = at(self.early_due) => Wake::EarlyDue,
            () = at(self.retry_due) => Wake::RetryDue,
            asked = users => Wake::UserAsked(asked),
            renamed = renamed => Wake::Renamed(renamed),
            // Last: there may be more of them all the time.
            changes = cgroups => Wake::Cgroups(changes),
        }
    }

    /// Does what it was woken for; why to end, if it is to end.
    async fn handle(
        &mut self,
        wake: Wake,
        reporter: &mut dyn Reporter,
    ) -> Option<(&'static str, Leaves)> {
        match wake {
            Wake::Stop(signal) => {
                let leaves = match &self.enforcement {
                    Some(enforcement) if enforcement.attachment.is_pinned() => Leaves::Enforcement,
                    _ => Leaves::Nothing,
                };
                return Some((signal, leaves));
            }
            Wake::Asked(asked) => return self.on_request(asked, reporter).await,
            Wake::UserAsked(asked) => {
                let answer = self.grant(asked.uid, &asked.request);
                asked.answer(&answer);
            }
            Wake::Hangup => self.reload(Why::Signal, reporter),
            Wake::FilesChanged(Ok(())) => self.reload(Why::FilesChanged, reporter),
            Wake::FilesChanged(Err(error)) => self.files_unwatched(&error),
            Wake::Refusals(Ok(())) => self.report_refusals(),
            Wake::Refusals(Err(error)) => {
                warn!("{error:#}; refused options are counted and no longer reported");
                if let Some(enforcement) = &mut self.enforcement {
                    enforcement.log = None;
                }
            }
            Wake::DeadPeers(Ok(())) => self.read_dead_peers(),
            Wake::DeadPeers(Err(error)) => {
                warn!("{error:#}; they are counted and no longer told of");
                self.dead_peers.stop();
            }
            Wake::Built(built) => return self.on_built(built, reporter),
            Wake::Sweep(progress) => self.on_sweep_progress(progress, reporter),
            Wake::EarlierSweepOver => {
                self.earlier_sweep = None;
                if self.sweep_again {
                    self.sweep();
                }
            }
            Wake::Successor(request) => return self.on_successor(request, reporter).await,
            Wake::EarlyDue => self.sweep_early(),
            Wake::RetryDue => {
                self.retry_due = None;
                self.retry(reporter);
            }
            Wake::WatchdogDue => {
                notify(&[NotifyState::Watchdog]);
                self.look_at_cgroup(reporter);
                if let Some((due, every)) = &mut self.watchdog {
                    *due = Instant::now() + *every;
                }
            }
            Wake::Renamed(renamed) => self.on_renamed(renamed, reporter),
            Wake::Cgroups(changes) => self.on_cgroups_changed(changes, reporter),
        }
        None
    }

    fn retry_later(&mut self) {
        if self.retry_due.is_none() {
            self.retry_due = Some(Instant::now() + self.retry_after);
            self.retry_after = (self.retry_after * 2).min(LONGEST_RETRY);
        }
    }

    /// Tries again what failed for a reason outside the config.
    fn retry(&mut self, reporter: &mut dyn Reporter) {
        if self.enforcement.is_none() {
            self.look_for_cgroup(reporter);
            return;
        }
        if self.has_failed("lock") {
            self.own_again(Duration::ZERO);
        } else if self.has_failed("control socket") {
            self.listen();
        } else if self.has_failed("self-service") {
            self.listen_to_users();
        }
        if self.has_failed("policy set") {
            self.reload(Why::Retry, reporter);
        } else if self.has_failed("existing connections") {
            self.sweep();
        }
    }

    fn has_failed(&self, part: &str) -> bool {
        let part = self.state.parts.get(part);
        part.is_some_and(|part| part.status == PartStatus::Failed)
    }

    /// Notes the dead peers that the kernel has told of.
    fn read_dead_peers(&mut self) {
        let enforcement = self.enforcement.as_ref();
        let record = enforcement.map(|enforcement| enforcement.set.record().as_ref());
        self.dead_peers.read(record);
    }

    /// Logs what the kernel refused since the last time. The BPF program, which
    /// logs nothing else, bounds how often there is something.
    fn report_refusals(&mut self) {
        let Some(enforcement) = &self.enforcement else {
            return;
        };
        match enforcement.set.record().refusals() {
            Ok(refusals) => {
                for refused in &refusals {
                    if !self.reported_refusals.contains(refused) {
                        warn!("{refused}; the connections go on without it");
                    }
                }
                self.reported_refusals = refusals;
            }
            Err(error) => debug!("{}", chain(&error)),
        }
    }

    /// Writes down what has changed, for those who ask the kernel.
    fn publish(&mut self) {
        let (dropped, why) = Stream::Output.dropped();
        if let Some(why) = why.filter(|_| dropped > 0) {
            self.part_failed("output", why);
        }
        self.expose();
        let Some(enforcement) = &self.enforcement else {
            return;
        };
        let record = enforcement.set.record();
        let (state, published_in) = &self.published;
        if self.state == *state && std::ptr::eq(published_in.as_ptr(), Arc::as_ptr(record)) {
            return;
        }
        match record.set_state(&self.state) {
            Ok(()) => self.published = (self.state.clone(), Arc::downgrade(record)),
            Err(error) => {
                debug!("{}", chain(&error));
                self.retry_later();
            }
        }
    }

    /// Has the metrics show the set that is in force.
    fn expose(&self) {
        let enforcement = self.enforcement.as_ref();
        let record = enforcement.map(|enforcement| enforcement.set.record());
        if self.exposed.shows(record) {
            return;
        }
        let source = enforcement.and_then(|enforcement| {
            let evidence = enforcement.attachment.evidence();
            Some(metrics::Source {
                record: enforcement.set.record().clone(),
                evidence: evidence
                    .inspect_err(|error| warn!("{}", chain(error)))
                    .ok()?,
            })
        });
        self.exposed.set(source);
    }

    /// Ends. An error where enforcement should end with it and does not.
    fn stop(
        mut self,
        by: &str,
        after: Duration,
        mut leaves: Leaves,
        reporter: &mut dyn Reporter,
    ) -> Result<()> {
        self.building = None;
        self.sweep = None;
        let Some(enforcement) = self.enforcement.take() else {
            reporter.report(&Event::Stopped {
                by,
                after,
                leaves: Leaves::Nothing,
                record: self.last_record.as_deref(),
            });
            return Ok(());
        };
        let record = enforcement.set.record().clone();
        let mut ended = Ok(());
        if leaves == Leaves::Nothing {
            let detached = enforcement.attachment.detach();
            ended = detached.and(enforcement.bounds.detach());
            // It may have come off all the same.
            if ended.is_err() && !matches!(InForce::on(self.root.id), Ok(None)) {
                leaves = Leaves::Enforcement;
            }
        }
        // Who finds what is left is told that nobody holds it.
        if leaves == Leaves::Enforcement || ended.is_err() {
            self.state.owner = None;
            self.state.sweep.under_way = false;
            self.state.parts.clear();
            if let Err(error) = record.set_state(&self.state) {
                debug!("{}", chain(&error));
            }
        }
        reporter.report(&Event::Stopped {
            by,
            after,
            leaves,
            record: Some(&record),
        });
        ended.with_context(|| format!("ending enforcement on {}", self.root.path))
    }
}

fn log_of(set: &LoadedSet) -> Option<AsyncFd<EbpfLogger<&'static dyn log::Log>>> {
    let logger = set
        .logger()
        .inspect_err(|error| warn!("{error}; refused options are counted and not reported"))
        .ok()?;
    let log = unblocked::awaited(logger, Interest::READABLE);
    log.inspect_err(|error| warn!("watching the log of the BPF program: {error}"))
        .ok()
}

async fn flush(log: &mut AsyncFd<EbpfLogger<&'static dyn log::Log>>) -> Result<()> {
    let mut guard = log
        .readable_mut()
        .await
        .context("reading the log of the BPF program")?;
    guard.get_inner_mut().flush();
    guard.clear_ready();
    Ok(())
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => pending().await,
    }
}

/// Tells the service manager, if there is one.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("telling the service manager: {error}");
    }
}

fn seconds_since_1970() -> u64 {
    datapath::now()
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

fn watch(kind: SignalKind, name: &str) -> Result<Signal> {
    signal(kind).with_context(|| format!("watching for {name}"))
}
