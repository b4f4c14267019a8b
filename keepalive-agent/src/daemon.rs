//! Daemon: enforces the policy until it is stopped, while files, cgroups and the
//! agent itself come and go.
//!
//! Everything that wakes it comes in through `Daemon::next`; nothing that it
//! does then waits for anybody. Sets are built and connections swept on threads of
//! their own. Only at the start can an error end it.

pub(crate) mod building;
pub mod control;
mod dead_peers;
mod early;
pub mod journal;
pub mod observed;
pub mod ownership;
mod renames;
pub mod self_service;
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
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, error, info, warn};

use crate::{
    assignment::{Assignment, Claimants, Warning},
    config::{Config, SelfService, Sources},
    datapath::{
        self, Attachment, Bounds, Change, Events, InForce, LoadedSet, Origin, Part, PartStatus,
        PinDirectory, Refusals, Reload, SetRecord, State, chain,
    },
    grant::Grant,
    hierarchy::{Cgroup, CgroupPath, Hierarchy},
    kernel::{layout::Kernel, preflight},
    memory,
    metrics::{self, Exposed},
    names::printable_path,
    sweep::{self, Progress, SweepJob, Swept},
    unblocked::{self, Stream},
    view,
    watch::Watch,
};
use building::{Built, Job, allowed};
use control::{Asked, Client, Control, Request};
use dead_peers::DeadPeerWatch;
use journal::{Journal, Noting, What};
use ownership::Ownership;
use renames::Renames;
use self_service::{Answer, SelfServiceSocket};

/// After a cgroup was made with processes in it, existing connections are swept
/// this much later, together with those of the cgroups that follow.
const SWEEP_DELAY: Duration = Duration::from_millis(50);

/// Sweeps for new cgroups, and sets built for them, take at most one part of this
/// many of the time.
const SHARE: u32 = 10;

/// What failed for a reason outside the config is tried again after this time, at
/// first, and after twice as much each time.
const RETRY: Duration = Duration::from_secs(5);
const LONGEST_RETRY: Duration = Duration::from_mins(5);

/// Changes of cgroups that are remembered while a set is built; more than these
/// are found by reading the hierarchy.
const REMEMBERED: usize = 65_536;

/// Sets that are built because users asked for more than the one in force has room
/// for follow each other in this time.
const FOR_USERS: Duration = Duration::from_secs(10);

/// How long another agent waits for what this one has under way.
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
        /// The policies and what they claim.
        assignment: &'a Assignment,
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

/// Why the config is read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    FilesChanged,
    Signal,
    /// Another agent was about to take over, and did not.
    GoesOn,
    Retry,
    /// More cgroups were made and removed than could be told of.
    Cgroups,
    Renamed,
}

impl Why {
    /// Whether a set is built also where the config says nothing new.
    fn demands(self) -> bool {
        self != Self::FilesChanged
    }

    const fn words(self) -> &'static str {
        match self {
            Self::FilesChanged => "its files have changed",
            Self::Signal => "SIGHUP",
            Self::GoesOn => "another agent did not take over",
            Self::Retry => "what had failed is tried again",
            Self::Cgroups => "more cgroups were made than could be told of",
            Self::Renamed => "a container was renamed",
        }
    }
}

/// What came of going over to a config without building a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Adopted {
    Yes,
    No,
    /// It can be as soon as the sweep under way is over.
    AfterSweep,
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
    daemon.stop(by, begun.elapsed(), leaves, reporter);
    Ok(())
}

/// What the daemon is woken by.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
enum Wake {
    Stop(&'static str),
    Hangup,
    Asked(std::io::Result<Asked>),
    UserAsked(self_service::Asked),
    FilesChanged(Result<()>),
    Refusals(Result<()>),
    DeadPeers(Result<()>),
    Built(Result<Built>),
    Sweep(Option<Progress>),
    EarlierSweepOver,
    Successor(Option<Request>),
    Cgroups(Result<Vec<Change>, datapath::Error>),
    Renamed(std::io::Result<BTreeSet<CgroupPath>>),
    SweepDue,
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
    config: Config,
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
    sweep: Option<SweepJob>,
    /// That of an earlier set, until it has stopped: two at a time would undo what
    /// the other one does.
    earlier_sweep: Option<SweepJob>,
    /// Whether another sweep follows the one that goes on.
    sweep_again: bool,
    sweep_due: Option<Instant>,
    sweep_not_before: Instant,
    sweep_begun: Instant,
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
        let watch = Watch::on(&options.sources);
        let target::Read {
            config,
            origin,
            warnings,
        } = target::read(&options.sources, options.dry_run)?;
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
            sweep: None,
            earlier_sweep: None,
            sweep_again: false,
            sweep_due: None,
            sweep_not_before: now,
            sweep_begun: now,
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

    fn files_unwatched(&mut self, error: &anyhow::Error) {
        let error = format!("{error:#}; send SIGHUP after a change of the config");
        warn!("{error}");
        self.watch = None;
        self.part_failed("config files", error);
    }

    fn listen(&mut self) {
        self.listen_to_users();
        match Control::listen(&self.root.path) {
            Ok(control) => {
                self.control = Some(control);
                self.part("control socket", Ok(()));
            }
            Err(error) => {
                let error = format!("making the control socket: {error}");
                warn!("{error}; no other agent can take over, and `detach` cannot reach this one");
                self.part_failed("control socket", error);
            }
        }
    }

    /// Listens to users where the config lets them ask, and does not where not.
    fn listen_to_users(&mut self) {
        const PART: &str = "self-service";
        if self.config.self_service.is_none() || self.options.dry_run {
            self.users = None;
            self.state.parts.remove(PART);
            return;
        }
        // Of two agents that know each other the other one listens still.
        if self.users.is_some() || self.ownership.is_none() {
            return;
        }
        match SelfServiceSocket::listen(&self.root.path) {
            Ok(users) => {
                self.users = Some(users);
                self.part(PART, Ok(()));
            }
            Err(error) => {
                let error = format!("making the socket for users: {error}");
                warn!("{error}; users cannot ask for policies");
                self.part_failed(PART, error);
                self.retry_later();
            }
        }
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

    fn job(&self, config: Config, origin: Origin) -> Job {
        let previous = self
            .enforcement
            .as_ref()
            .map(|enforcement| enforcement.set.record().clone())
            .or_else(|| self.last_record.clone());
        Job {
            kernel: self.kernel,
            hierarchy: self.hierarchy.clone(),
            root: self.root.clone(),
            config,
            origin,
            before: match &self.enforcement {
                // What the set was built from may have had other names.
                Some(_) => Some(self.config.clone()),
                None => previous.as_ref().map(|set| set.description.config.clone()),
            },
            previous,
            grants: self.grants.clone(),
        }
    }

    /// Puts the policy in force on the cgroup, if there is one, and goes on from
    /// there.
    fn enforce_now(&mut self, reporter: &mut dyn Reporter) -> Result<()> {
        let started = self.put_in_force()?;
        self.begin(started.as_ref(), reporter);
        Ok(())
    }

    /// Puts the policy in force on the cgroup; what it claims, and whether another
    /// set was in force before. None where there is no such cgroup.
    fn put_in_force(&mut self) -> Result<Option<(Assignment, bool)>> {
        if let Some(root) = self.hierarchy.lookup(&self.root.path)? {
            self.root = root;
        } else {
            self.succeed();
            return Ok(None);
        }
        self.remove_stale_pins();
        let found = match InForce::on(self.root.id) {
            Ok(found) => found,
            Err(error) => {
                warn!(
                    "{}; whether something is in force already cannot be told",
                    chain(&error)
                );
                None
            }
        };
        let continued = found.is_some();
        let (mut attachment, bounds, mut built) = match found {
            None => self.attach()?,
            Some(found) => self.take_up(found)?,
        };
        self.watch_deaths(&mut attachment, &mut built.set);
        self.grants = allowed(&self.config, &self.grants);
        self.succeed();
        self.warn_of_new(&built.warnings);
        target::warn_of_give_up(&built.assignment);
        let Built {
            mut set,
            claimants,
            assignment,
            ..
        } = built;
        self.claimants = claimants;
        self.dead_peers.follow_set(&mut set);
        self.enforcement = Some(Enforcement {
            log: log_of(&set),
            attachment,
            bounds,
            set,
        });
        self.part("new connections", Ok(()));
        if let Some(ownership) = &mut self.ownership {
            ownership.begin(&self.config);
        }
        self.publish();
        Ok(Some((assignment, continued)))
    }

    /// Says what is in force, and begins to bring existing connections along.
    fn begin(&mut self, started: Option<&(Assignment, bool)>, reporter: &mut dyn Reporter) {
        let Some((assignment, continued)) = started else {
            self.wait_for_cgroup(reporter);
            return;
        };
        let directory = self.hierarchy.directory(&self.root.path);
        reporter.report(&Event::Started {
            cgroup: &printable_path(&directory).to_string(),
            origin: &self.origin,
            assignment,
            pinned: self.pins.as_ref(),
            continued: *continued,
        });
        self.follow_renames(reporter);
        self.sweep();
    }

    fn wait_for_cgroup(&mut self, reporter: &mut dyn Reporter) {
        reporter.report(&Event::Waiting {
            cgroup: &self.root.path,
        });
        if self.events.is_none() {
            // Nobody will say when it comes to exist.
            self.retry_later();
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

    /// Has the agent that was there before end: it holds nothing any more that is
    /// needed.
    fn succeed(&mut self) {
        if let Some(mut predecessor) = self.predecessor.take() {
            if let Err(error) = predecessor.ask(Request::TakenOver) {
                warn!("the agent that was there before does not answer: {error}");
            }
            self.own_again(PATIENCE);
        }
    }

    /// Takes the lock that the agent before has let go of by now.
    fn own_again(&mut self, patience: Duration) {
        match Ownership::acquire(&self.root.path, patience) {
            Ok(mut ownership) => {
                ownership.begin(&self.config);
                self.ownership = Some(ownership);
                self.part("lock", Ok(()));
                self.listen();
            }
            Err(error) => {
                let error = chain(&error);
                warn!("{error}");
                self.part_failed("lock", error);
                self.retry_later();
            }
        }
    }

    /// Attaches to a cgroup that has nothing of ours.
    fn attach(&mut self) -> Result<(Attachment, Bounds, Built)> {
        let mut job = self.job(self.config.clone(), self.origin.clone());
        job.before = self.ownership.as_ref().and_then(Ownership::given).cloned();
        let built = job.build()?;
        let directory = self.hierarchy.open(&self.root)?;
        let mut bounds = Bounds::none(self.root.id, self.pins.clone());
        self.hold_bounds(&mut bounds, &built.set);
        match Attachment::attach(&built.set, directory, self.root.id, self.pins.as_ref()) {
            Ok(attachment) => Ok((attachment, bounds, built)),
            Err(error) => {
                bounds.detach()?;
                Err(error).with_context(|| format!("cgroup {}", self.root.path))
            }
        }
    }

    /// Has connections held to the bounds of a set, before it is put in force.
    fn hold_bounds(&mut self, bounds: &mut Bounds, set: &LoadedSet) {
        const PART: &str = "bounds";
        match bounds.hold(set) {
            Ok(()) if set.has_bounds() => self.part(PART, Ok(())),
            Ok(()) => {
                let disabled = Part {
                    status: PartStatus::Disabled,
                    reason: Some("no policy has bounds".to_owned()),
                };
                self.state.parts.insert(PART.to_owned(), disabled);
            }
            Err(error) => {
                let error = format!(
                    "{}; bounds hold when a connection is established and after each sweep only",
                    chain(&error)
                );
                warn!("{error}");
                self.part_failed(PART, error);
            }
        }
    }

    /// Has dead peers counted by a set that is in force.
    fn watch_deaths(&mut self, attachment: &mut Attachment, set: &mut LoadedSet) {
        const PART: &str = "dead peers";
        match attachment.watch_deaths(set) {
            Ok(()) => self.part(PART, Ok(())),
            Err(error) => {
                let error = format!("{}; dead peers are not counted", chain(&error));
                warn!("{error}");
                self.part_failed(PART, error);
            }
        }
    }

    /// Goes on with what an earlier agent has left in force.
    fn take_up(&mut self, found: InForce) -> Result<(Attachment, Bounds, Built)> {
        let owner = found.owner().filter(ownership::runs);
        if self.predecessor.is_none()
            && let Some(owner) = owner.filter(|owner| *owner != ownership::own())
        {
            // Its lock cannot be seen from here.
            return Err(ownership::Error::Taken {
                pid: owner.pid,
                cgroup: self.root.path.clone(),
            }
            .into());
        }
        if let Some(pinned) = found.pins(self.pins.as_ref())
            && self.pins.as_ref() != Some(&pinned)
        {
            bail!(
                "enforcement on {} is pinned in {directory} and would not end with this agent: go \
                 on with it by --pin {directory}, or take it off first by `keepalive-agent detach`",
                self.root.path,
                directory = pinned.path().display()
            );
        }
        let record = match &found.record {
            Ok(record) => {
                self.dead_peers.left_by(record);
                record.clone()
            }
            Err(error) => {
                warn!(
                    "{error}; values that it set count as the applications' own, and what it \
                     counted is not known any more"
                );
                let built = self.job(self.config.clone(), self.origin.clone()).build()?;
                let mut bounds = Bounds::none(self.root.id, self.pins.clone());
                self.hold_bounds(&mut bounds, &built.set);
                let attachment = found.replace(&built.set, self.pins.as_ref())?;
                return Ok((attachment, bounds, built));
            }
        };
        self.grants = record.grants();
        self.forget_ended_grants();
        let mut bounds = Bounds::of(&record, self.root.id, self.pins.clone())?;
        let state = record.state().unwrap_or_default();
        self.state.reload = state.reload;
        let (attachment, built) = match record.description.before.clone() {
            // Connections may have values of the set before the one in force: the
            // sweep that the other agent had begun is done first.
            Some(before) if !state.settled => {
                let mut job = self.job(record.description.config.clone(), self.origin.clone());
                job.before = Some(before);
                job.previous = Some(record);
                let built = job.build()?;
                self.hold_bounds(&mut bounds, &built.set);
                let attachment = found.replace(&built.set, self.pins.as_ref())?;
                info!("finishing the sweep that an earlier agent had begun");
                match sweep::first_pass(built.set.sweeper(), false) {
                    Ok(_) => {
                        let settled = State {
                            settled: true,
                            ..self.state.clone()
                        };
                        built.set.record().set_state(&settled)?;
                    }
                    Err(error) => {
                        warn!("{error:#}; connections may keep values of earlier policies");
                    }
                }
                (attachment, built)
            }
            _ => {
                let mut job = self.job(self.config.clone(), self.origin.clone());
                job.before = Some(record.description.config.clone());
                job.previous = Some(record);
                let built = job.build()?;
                self.hold_bounds(&mut bounds, &built.set);
                let attachment = found.replace(&built.set, self.pins.as_ref())?;
                (attachment, built)
            }
        };
        if built.config == self.config {
            return Ok((attachment, bounds, built));
        }
        let mut job = self.job(self.config.clone(), self.origin.clone());
        job.before = Some(built.config);
        job.previous = Some(built.set.record().clone());
        let built = job.build()?;
        let mut attachment = attachment;
        self.hold_bounds(&mut bounds, &built.set);
        attachment.replace(&built.set)?;
        Ok((attachment, bounds, built))
    }

    /// Removes the pins of cgroups that are gone, and what half a start left.
    fn remove_stale_pins(&self) {
        if let Some(pins) = &self.pins
            && let Err(error) = pins.remove_stale()
        {
            warn!("{}", chain(&error));
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
            () = at(self.sweep_due) => Wake::SweepDue,
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
            Wake::SweepDue => {
                self.sweep_due = None;
                self.sweep();
            }
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

    async fn on_request(
        &mut self,
        asked: std::io::Result<Asked>,
        reporter: &mut dyn Reporter,
    ) -> Option<(&'static str, Leaves)> {
        let mut asked = match asked {
            Ok(asked) => asked,
            Err(error) => {
                self.part_failed("control socket", error.to_string());
                self.control = None;
                self.retry_later();
                return None;
            }
        };
        if asked.request == Request::StepAside {
            info!("another agent takes over");
            self.building = None;
            self.sweep_due = None;
            self.end_sweep();
            if let Some(mut sweep) = self.earlier_sweep.take() {
                // What the other one does, it would undo.
                let over = async { while sweep.progress().await.is_some() {} };
                if timeout(PATIENCE, over).await.is_err() {
                    warn!("the sweep under way does not stop; the other agent does not wait");
                }
            }
        }
        if let Err(error) = asked.answer().await {
            debug!("answering on the control socket: {error}");
            self.reload(Why::GoesOn, reporter);
            return None;
        }
        match asked.request {
            Request::Events(wanted) => {
                self.read_dead_peers();
                self.journal.serve(wanted, asked.into_stream());
                self.dead_peers.follow();
            }
            Request::Observed => {
                self.read_dead_peers();
                self.dead_peers.serve_observed(asked.into_stream());
            }
            Request::Detach => return Some(("a request to detach", Leaves::Nothing)),
            Request::StepAside => self.successor = Some(asked),
            Request::TakenOver => {}
        }
        None
    }

    /// Gives a user a policy for a command, if it may have it.
    fn grant(&mut self, uid: u32, request: &self_service::Request) -> Answer {
        let refused = |why: &str| Answer::Refused(why.to_owned());
        let Some(service) = self.config.self_service.clone() else {
            return refused("the operator does not let users ask any more");
        };
        if let Err(why) = service.allow(&request.wish) {
            return Answer::Refused(why);
        }
        let root = &self.root.path;
        let found = self_service::own_cgroup(&self.hierarchy, root, &request.cgroup, uid);
        let cgroup = match found {
            Ok(cgroup) => cgroup,
            Err(why) => return Answer::Refused(why),
        };
        if self.grants.iter().any(|grant| grant.cgroup == cgroup) {
            return refused("this command has its policy already");
        }
        if let Err(why) = self.has_room(&service, uid) {
            return Answer::Refused(why);
        }
        let Some(enforcement) = &mut self.enforcement else {
            return Answer::Busy("nothing is in force".to_owned());
        };
        let wish = request.wish.clone();
        let grant = Grant { cgroup, uid, wish };
        let cgroup = &grant.cgroup;
        let policies = self.claimants.claim_of(&cgroup.path);
        match enforcement.set.add_grant(&grant, &policies) {
            Ok(()) => {}
            Err(error) if error.is_full() => {
                if Instant::now() >= self.build_for_users {
                    info!("{error}: building one with more room");
                    self.build_for_users = Instant::now() + FOR_USERS;
                    self.build_again();
                }
                return Answer::Busy(error.to_string());
            }
            Err(error) => return Answer::Refused(chain(&error)),
        }
        self.grants.push(grant.clone());
        if let Err(error) = enforcement.set.record().set_grants(&self.grants) {
            self.grants.pop();
            if let Err(error) = enforcement.set.remove_cgroup(cgroup) {
                debug!("{}", chain(&error));
            }
            return Answer::Refused(chain(&error));
        }
        debug!(cgroup = %cgroup.path, uid, "a user has a policy for a command");
        self.journal.note(What::CgroupAssigned {
            cgroup: cgroup.path.clone(),
            policies: vec![grant.over(None).name],
        });
        Answer::Granted
    }

    /// Whether a user may have one more command with a policy of its own.
    fn has_room(&mut self, service: &SelfService, uid: u32) -> Result<(), String> {
        let counts = |grants: &[Grant]| {
            let own = grants.iter().filter(|grant| grant.uid == uid).count();
            (own, grants.len())
        };
        let fits = |(own, all): (usize, usize)| {
            own < service.commands_per_user as usize && all < service.commands as usize
        };
        if fits(counts(&self.grants)) {
            return Ok(());
        }
        // The kernel may not have told of all that are gone.
        self.forget_ended_grants();
        let counted = counts(&self.grants);
        if fits(counted) {
            Ok(())
        } else if counted.0 >= service.commands_per_user as usize {
            Err(format!(
                "{} commands of this user have policies of their own already, as many as                  [self-service] allows",
                counted.0
            ))
        } else {
            Err(format!(
                "{} commands have policies of their own already, as many as [self-service] allows",
                counted.1
            ))
        }
    }

    /// Forgets what was given to commands whose cgroups are gone.
    fn forget_ended_grants(&mut self) {
        let hierarchy = &self.hierarchy;
        let exists = |grant: &Grant| {
            let found = hierarchy.lookup(&grant.cgroup.path);
            found.is_ok_and(|found| found.as_ref() == Some(&grant.cgroup))
        };
        self.grants.retain(exists);
    }

    /// The agent that this one steps aside for has taken over, or is gone.
    async fn on_successor(
        &mut self,
        request: Option<Request>,
        reporter: &mut dyn Reporter,
    ) -> Option<(&'static str, Leaves)> {
        let successor = self.successor.take();
        if request == Some(Request::TakenOver) {
            if let Some(mut successor) = successor {
                // The answer says that this one is about to end.
                let _ = successor.answer().await;
            }
            return Some((ANOTHER_AGENT, Leaves::AnotherAgent));
        }
        warn!("the agent that was about to take over is gone; this one goes on");
        self.reload(Why::GoesOn, reporter);
        None
    }

    /// Has the sweep under way stop, and remembers it until it has.
    fn end_sweep(&mut self) {
        if let Some(sweep) = self.sweep.take() {
            sweep.stop();
            self.state.sweep.under_way = false;
            self.earlier_sweep.get_or_insert(sweep);
        }
    }

    /// Reads the config again, and builds what it says if that is anything new or
    /// asked for. What is wrong with it is logged and changes nothing.
    fn reload(&mut self, why: Why, reporter: &mut dyn Reporter) {
        // The sweep needs what was before the set in force. Other names do not
        // concern it, and what they are for may be there in a moment.
        if self.building.is_some() || (self.is_first_pass() && why.demands()) {
            self.reload_later(why);
            return;
        }
        self.reload_waiting = None;
        self.reload_awaits_sweep = false;
        match self.read_again(why.demands()) {
            Ok(None) => {}
            Ok(Some(target::Read {
                config,
                origin,
                warnings,
            })) => {
                let adopted = if why == Why::FilesChanged {
                    self.adopt(&config, &origin, reporter)
                } else {
                    Adopted::No
                };
                self.reload_awaits_sweep = adopted == Adopted::AfterSweep;
                if self.reload_awaits_sweep || adopted == Adopted::No && self.is_first_pass() {
                    self.reload_later(why);
                    return;
                }
                self.follow_cgroups();
                for warning in &warnings {
                    warn!("{warning}");
                }
                if adopted == Adopted::No {
                    self.build(config, origin, Some(why));
                }
            }
            Err(error) => self.reload_failed(&error, why.demands()),
        }
    }

    /// Remembers that the config is to be read when what is under way is over.
    fn reload_later(&mut self, why: Why) {
        if why.demands() || self.reload_waiting.is_none() {
            self.reload_waiting = Some(why);
        }
    }

    /// Goes over to a config that needs no other set, as it differs in names of units,
    /// containers and pods only. So it is when a pod is bound to a node, or gone, or
    /// gets other labels.
    fn adopt(&mut self, config: &Config, origin: &Origin, reporter: &mut dyn Reporter) -> Adopted {
        if !config.differs_in_names_only(&self.config) {
            return Adopted::No;
        }
        let Some(enforcement) = &self.enforcement else {
            return Adopted::No;
        };
        let Ok(claimants) = Claimants::new(config, &self.root) else {
            return Adopted::No;
        };
        let claims_same = self.claimants.claim_same(&claimants, &self.hierarchy);
        if !claims_same.unwrap_or(false) {
            return self.claim_anew(config, origin, claimants, Why::FilesChanged, reporter);
        }
        let said = enforcement.set.record().say_config(config, origin, None);
        if let Err(error) = said {
            debug!("{}", chain(&error));
            return Adopted::No;
        }
        for (before, now) in self.config.policies.iter().zip(&config.policies) {
            if before.selector.words() != now.selector.words() {
                self.journal.note(What::names_changed(
                    &now.name,
                    Why::FilesChanged.words(),
                    &before.selector,
                    &now.selector,
                ));
            }
        }
        self.went_over_to(config, origin, claimants);
        // What is being swept is finished by the sweep.
        if self.state.settled
            && let Some(ownership) = &mut self.ownership
        {
            ownership.finish(&self.config);
        }
        Adopted::Yes
    }

    /// The same where a name is that of something that is there: by other claims in the
    /// set in force, and a sweep.
    fn claim_anew(
        &mut self,
        config: &Config,
        origin: &Origin,
        claimants: Claimants,
        why: Why,
        reporter: &mut dyn Reporter,
    ) -> Adopted {
        // Of what was claimed before, a set knows one state at a time, and a sweep under
        // way would not know of that.
        if !self.state.settled {
            return Adopted::No;
        }
        if self.sweep.is_some() || self.earlier_sweep.is_some() {
            return if self.sweep_ends_soon() {
                Adopted::AfterSweep
            } else {
                Adopted::No
            };
        }
        let Ok((mut assignment, warnings)) = target::assign(&claimants, &self.hierarchy) else {
            return Adopted::No;
        };
        assignment.grants = allowed(config, &self.grants);
        let Some(enforcement) = &mut self.enforcement else {
            return Adopted::No;
        };
        // In this order: whoever goes on from here, should this agent be killed, makes
        // the sweep again that is to follow.
        self.state.settled = false;
        let record = enforcement.set.record().clone();
        let claimed = record
            .set_state(&self.state)
            .and_then(|()| record.say_config(config, origin, Some(&self.config)))
            .and_then(|()| enforcement.set.claim_anew(&assignment));
        if let Err(error) = claimed {
            debug!("{}: another set is built", chain(&error));
            // By a set that knows what was claimed before.
            self.state.settled = true;
            return Adopted::No;
        }
        self.went_over_to(config, origin, claimants);
        self.warn_of_new(&warnings);
        reporter.report(&Event::Reloaded {
            why: why.words(),
            assignment: &assignment,
        });
        self.sweep();
        Adopted::Yes
    }

    /// Has containers watched for other names, if a policy goes by those.
    fn follow_renames(&mut self, reporter: &mut dyn Reporter) {
        if !self.claimants.needs_names() {
            self.renames = None;
            return;
        }
        if self.renames.is_some() {
            return;
        }
        let (renames, found) = (Renames::new(), self.hierarchy.walk(&self.root));
        match renames.and_then(|renames| Ok((renames, found?))) {
            Ok((mut renames, found)) => {
                for cgroup in found {
                    renames.watch(&cgroup.path);
                }
                let watched = renames.watched();
                self.renames = Some(renames);
                // Their names were read before.
                self.on_renamed(Ok(watched), reporter);
            }
            Err(error) => {
                warn!(
                    "watching for containers that are renamed: {error}; new names count from the \
                     next start of a container on"
                );
            }
        }
    }

    /// Containers may be called something else: if so, they have the policies of their
    /// new names from now on.
    fn on_renamed(
        &mut self,
        cgroups: std::io::Result<BTreeSet<CgroupPath>>,
        reporter: &mut dyn Reporter,
    ) {
        let cgroups = match cgroups {
            Ok(cgroups) => cgroups,
            Err(error) => {
                warn!("watching for containers that are renamed: {error}");
                self.renames = None;
                return;
            }
        };
        let mut are_others = false;
        for cgroup in cgroups {
            let policies = self.claimants.of(&cgroup);
            let before = self.claimants.identity(&cgroup);
            self.claimants.forget(&cgroup);
            let now = self.claimants.identity(&cgroup);
            if before == now || now.names.name.is_none() {
                continue;
            }
            self.journal.note(What::ContainerRenamed {
                cgroup: cgroup.clone(),
                before: before.to_string(),
                now: now.to_string(),
            });
            are_others |= policies != self.claimants.of(&cgroup);
        }
        if !are_others {
            return;
        }
        let (config, origin) = (self.config.clone(), self.origin.clone());
        let claimed = Claimants::new(&config, &self.root).map_or(Adopted::No, |claimants| {
            self.claim_anew(&config, &origin, claimants, Why::Renamed, reporter)
        });
        if claimed != Adopted::Yes {
            self.build_again();
        }
    }

    /// Whether a sweep is under way that has nothing to wait for.
    fn sweep_ends_soon(&self) -> bool {
        (self.sweep.is_some() || self.earlier_sweep.is_some()) && self.state.sweep.waiting == 0
    }

    fn went_over_to(&mut self, config: &Config, origin: &Origin, claimants: Claimants) {
        self.config = config.clone();
        self.origin = origin.clone();
        self.claimants = claimants;
        self.state.reload = Some(Reload {
            at: seconds_since_1970(),
            error: None,
        });
        self.state.totals.reloads += 1;
    }

    fn read_again(&mut self, demanded: bool) -> Result<Option<target::Read>> {
        // What it has noticed up to here is read now. A file that is being written
        // stays noticed, which a new watch would not know of.
        let watching = match &mut self.watch {
            Some(watch) if demanded => watch.renew().is_ok(),
            watch => watch.is_some() || !demanded,
        };
        if !watching {
            match Watch::on(&self.options.sources) {
                Ok(watch) => {
                    self.watch = Some(watch);
                    self.part("config files", Ok(()));
                }
                Err(error) => self.files_unwatched(&error),
            }
        }
        let read = target::read(&self.options.sources, self.options.dry_run);
        if !demanded
            && let Some(watch) = &mut self.watch
            && watch.has_news()?
        {
            debug!("the files are being changed still");
            return Ok(None);
        }
        let read = read?;
        self.last_reported_error = None;
        if read.config == self.config && !demanded {
            return Ok(None);
        }
        Ok(Some(read))
    }

    fn reload_failed(&mut self, error: &anyhow::Error, demanded: bool) {
        let error = format!("{error:#}");
        self.journal.note(What::ReloadFailed {
            error: error.clone(),
        });
        if demanded || self.last_reported_error.as_ref() != Some(&error) {
            error!("the policy in force goes on: {error}");
        }
        self.state.totals.reloads_failed += 1;
        self.state.reload = Some(Reload {
            at: seconds_since_1970(),
            error: Some(error.chars().take(1000).collect()),
        });
        self.last_reported_error = Some(error);
        notify(&[NotifyState::Ready]);
    }

    /// Builds a set, on a thread of its own where one can be started.
    fn build(&mut self, config: Config, origin: Origin, reloads: Option<Why>) {
        if reloads.is_some() {
            notify(&[
                NotifyState::Reloading,
                NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Reloading),
            ]);
        }
        if self.enforcement.is_none() {
            // There is nothing to build for before the cgroup exists.
            self.config = config;
            self.origin = origin;
            if let Ok(claimants) = target::claimants(&self.config, &self.root) {
                self.claimants = claimants;
            }
            self.listen_to_users();
            notify(&[NotifyState::Ready]);
            return;
        }
        self.changes.clear();
        self.reloads = reloads;
        match self.job(config, origin).start() {
            Ok(building) => self.building = Some(building),
            Err(error) => {
                let error =
                    anyhow::Error::new(error).context("starting a thread to build a policy set");
                self.building_failed(&error);
            }
        }
    }

    fn building_failed(&mut self, error: &anyhow::Error) {
        self.reload_failed(error, false);
        // Whatever it was, it was not the config.
        self.part_failed("policy set", format!("{error:#}"));
        self.retry_later();
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

    fn on_built(
        &mut self,
        built: Result<Built>,
        reporter: &mut dyn Reporter,
    ) -> Option<(&'static str, Leaves)> {
        self.building = None;
        let replaced = built.and_then(|mut built| {
            let Some(mut enforcement) = self.enforcement.take() else {
                bail!("the cgroup went away meanwhile");
            };
            self.hold_bounds(&mut enforcement.bounds, &built.set);
            let replaced = enforcement.attachment.replace(&built.set);
            if replaced.is_ok() {
                self.watch_deaths(&mut enforcement.attachment, &mut built.set);
            }
            self.enforcement = Some(enforcement);
            replaced?;
            Ok(built)
        });
        let built = match replaced {
            Ok(built) => built,
            Err(error) => {
                if let Some(datapath::Error::Replaced) = error.downcast_ref() {
                    return self.on_replaced(reporter);
                }
                if self.enforcement.is_some() {
                    self.building_failed(&error);
                }
                self.look_at_cgroup(reporter);
                return None;
            }
        };
        self.warn_of_new(&built.warnings);
        if self.reloads.is_some() {
            target::warn_of_give_up(&built.assignment);
        }
        if let Some(enforcement) = &mut self.enforcement {
            enforcement.log = log_of(&built.set);
            enforcement.set = built.set;
            self.dead_peers.follow_set(&mut enforcement.set);
        }
        self.config = built.config;
        self.origin = built.origin;
        self.claimants = built.claimants;
        self.hand_on_grants();
        self.listen_to_users();
        self.end_sweep();
        self.state.settled = false;
        self.retry_after = RETRY;
        self.part("policy set", Ok(()));
        if let Some(why) = self.reloads {
            self.state.totals.reloads += 1;
            self.state.reload = Some(Reload {
                at: seconds_since_1970(),
                error: None,
            });
            reporter.report(&Event::Reloaded {
                why: why.words(),
                assignment: &built.assignment,
            });
            notify(&[NotifyState::Ready]);
        }
        let changes = std::mem::take(&mut self.changes);
        self.follow_changes(&changes, reporter);
        self.follow_renames(reporter);
        self.sweep();
        if self.reload_waiting == Some(Why::FilesChanged) {
            self.reload(Why::FilesChanged, reporter);
        }
        None
    }

    /// Makes sure that a new set has what users were given while it was built.
    fn hand_on_grants(&mut self) {
        self.grants = allowed(&self.config, &self.grants);
        let Some(enforcement) = &mut self.enforcement else {
            return;
        };
        for grant in &self.grants {
            let policies = self.claimants.claim_of(&grant.cgroup.path);
            if let Err(error) = enforcement.set.add_grant(grant, &policies) {
                warn!("{}: {}", grant.cgroup.path, chain(&error));
            }
        }
        if let Err(error) = enforcement.set.record().set_grants(&self.grants) {
            warn!("{}", chain(&error));
        }
    }

    /// Another agent has put its set in the place of this one's. If it lives, this
    /// one is not needed any more; if not, this one goes on from there.
    fn on_replaced(&mut self, reporter: &mut dyn Reporter) -> Option<(&'static str, Leaves)> {
        let owner = match InForce::on(self.root.id) {
            Ok(found) => found.and_then(|found| found.owner()),
            Err(error) => {
                warn!("{}", chain(&error));
                None
            }
        };
        if owner.is_some_and(|owner| owner != ownership::own() && ownership::runs(&owner)) {
            return Some((ANOTHER_AGENT, Leaves::AnotherAgent));
        }
        warn!("another agent has put its policy in force and is gone; this one goes on from there");
        // Its link is held until the next one is: there is no gap.
        let before = self.enforcement.take();
        self.end_sweep();
        if let Err(error) = self.enforce_now(reporter) {
            error!("{error:#}; it is tried again");
            self.enforcement = before;
            self.part_failed("policy set", format!("{error:#}"));
            self.retry_later();
        }
        None
    }

    /// Begins to bring existing connections along.
    fn sweep(&mut self) {
        const PART: &str = "existing connections";
        self.sweep_due = None;
        let Some(enforcement) = &self.enforcement else {
            return;
        };
        // Sweeps follow one another.
        self.sweep_again = self.sweep.is_some() || self.earlier_sweep.is_some();
        if self.sweep_again {
            if let Some(sweep) = self.sweep.as_ref().filter(|_| self.state.settled) {
                sweep.stop();
            }
            return;
        }
        self.sweep_begun = Instant::now();
        match SweepJob::start(enforcement.set.sweeper()) {
            Ok(sweep) => {
                self.sweep = Some(sweep);
                self.state.sweep.under_way = true;
            }
            Err(error) => {
                let error = format!("starting a thread to sweep: {error}");
                warn!("existing connections are as they were: {error}; it is tried again");
                self.state.totals.sweeps_failed += 1;
                self.part_failed(PART, error);
                self.retry_later();
            }
        }
    }

    /// After a sweep, unless there are connections for another one.
    fn settle(&mut self) {
        if self.sweep_again || self.sweep_due.is_some() {
            return;
        }
        if let Some(enforcement) = &mut self.enforcement
            && let Err(error) = enforcement.set.settle()
        {
            debug!("{}", chain(&error));
        }
    }

    fn on_sweep_progress(&mut self, progress: Option<Progress>, reporter: &mut dyn Reporter) {
        const PART: &str = "existing connections";
        match progress {
            Some(Progress::FirstPass(Ok(swept))) => {
                self.state.settled = true;
                self.settle();
                self.state.totals.sweeps += 1;
                self.state.sweep.connections = swept.seen;
                self.state.sweep.namespaces = swept.namespaces as u64;
                self.state.sweep.waiting = swept.waiting();
                self.state.sweep.missed = swept.missed.len() as u64;
                self.sweep_not_before = Instant::now() + self.sweep_begun.elapsed() * SHARE;
                for (_, error) in &swept.missed {
                    warn!("{error:#}; its existing connections are not governed, new ones are");
                }
                let missed = match swept.missed.first() {
                    None => Ok(()),
                    Some((_, error)) => Err(format!("{error:#}")),
                };
                let is_complete = missed.is_ok();
                self.part(PART, missed);
                self.retry_after = RETRY;
                if is_complete && let Some(enforcement) = &mut self.enforcement {
                    // No connection is held to a set before this one any more.
                    if let Err(error) = enforcement.bounds.release(&enforcement.set) {
                        warn!("{}", chain(&error));
                    }
                }
                reporter.report(&Event::Swept(&swept));
                // What building the set and this pass needed.
                memory::give_back();
                if self.sweep_again {
                    self.sweep();
                }
            }
            Some(Progress::FirstPass(Err(error))) => {
                warn!("existing connections are not governed: {error:#}");
                self.state.totals.sweeps_failed += 1;
                self.part_failed(PART, format!("{error:#}"));
                self.retry_later();
            }
            Some(Progress::Over(swept)) => {
                self.state.sweep.waiting = swept.waiting();
                if swept.waiting() == 0 {
                    if let Some(ownership) = &mut self.ownership {
                        ownership.finish(&self.config);
                    }
                } else {
                    warn!(
                        "{} connections have been silent for so long that they still wait to be \
                         governed; they are with the next sweep",
                        swept.waiting()
                    );
                }
            }
            None => {
                debug!("the sweep is over");
                self.sweep = None;
                self.state.sweep.under_way = false;
                if self.sweep_again {
                    self.sweep();
                }
            }
        }
    }

    /// Whether connections may still have values of the set before, which the sweep
    /// under way is about to see to.
    const fn is_first_pass(&self) -> bool {
        !self.state.settled && (self.sweep.is_some() || self.earlier_sweep.is_some())
    }

    /// Reads the config again where that has waited for something that is over.
    fn resume_reload(&mut self, reporter: &mut dyn Reporter) {
        if self.building.is_none()
            && !self.is_first_pass()
            && !(self.reload_awaits_sweep && self.sweep_ends_soon())
            && let Some(why) = self.reload_waiting.take()
        {
            self.reload(why, reporter);
        }
    }

    fn on_cgroups_changed(
        &mut self,
        changes: Result<Vec<Change>, datapath::Error>,
        reporter: &mut dyn Reporter,
    ) {
        let changes = match changes {
            Ok(changes) => changes,
            Err(error) => {
                let error = format!("{}; {UNTIL_RELOAD}", chain(&error));
                warn!("{error}");
                self.events = None;
                self.part_failed("new cgroups", error);
                return;
            }
        };
        if self.building.is_some() {
            if self.changes.len() + changes.len() > REMEMBERED {
                self.changes = vec![Change::Lost];
            } else {
                self.changes.extend(changes.iter().cloned());
            }
        }
        self.follow_changes(&changes, reporter);
    }

    /// Gives new cgroups their policy, and forgets those that are gone. What goes
    /// wrong is logged: the rest of the policy goes on.
    fn follow_changes(&mut self, changes: &[Change], reporter: &mut dyn Reporter) {
        for change in changes {
            match change {
                Change::Made(cgroup) => self.on_cgroup_made(cgroup, reporter),
                Change::Removed(cgroup) => self.on_cgroup_removed(cgroup, reporter),
                Change::Lost => {
                    // What came meanwhile is watched with the next set.
                    self.renames = None;
                    debug!("cgroups came and went faster than they could be told of");
                    self.look_at_cgroup(reporter);
                    self.build_again();
                }
            }
        }
    }

    /// Builds the set in force anew, for the cgroups that exist now.
    fn build_again(&mut self) {
        if self.building.is_some() || self.is_first_pass() {
            self.reload_waiting = Some(Why::Cgroups);
            return;
        }
        self.build(self.config.clone(), self.origin.clone(), None);
    }

    fn on_cgroup_made(&mut self, cgroup: &Cgroup, reporter: &mut dyn Reporter) {
        if cgroup.path == self.root.path {
            self.look_for_cgroup(reporter);
            return;
        }
        if let Some(renames) = &mut self.renames {
            renames.watch(&cgroup.path);
        }
        let policies = self.claimants.claim_of(&cgroup.path);
        let Some(enforcement) = self.enforcement.as_mut().filter(|_| !policies.is_empty()) else {
            return;
        };
        if enforcement.set.has_bounds()
            && self.claimants.bounded().contains(&cgroup.path)
            && let Ok(directory) = self.hierarchy.open(cgroup)
        {
            enforcement.set.add_bounded(cgroup.id, directory);
            if let Err(error) = enforcement.bounds.hold(&enforcement.set) {
                warn!("cgroup {}: {}", cgroup.path, chain(&error));
            }
        }
        match enforcement.set.add_cgroup(cgroup, &policies) {
            Ok(false) => {}
            Ok(true) => {
                debug!(cgroup = %cgroup.path, "a new cgroup has its policy");
                self.journal.note(What::CgroupAssigned {
                    cgroup: cgroup.path.clone(),
                    policies: self.claimants.names(&policies),
                });
                if early::may_be_in(cgroup, &self.hierarchy) {
                    let due = (Instant::now() + SWEEP_DELAY).max(self.sweep_not_before);
                    self.sweep_due.get_or_insert(due);
                }
            }
            Err(error) if error.is_full() => {
                info!("{error}: building one with more room");
                self.build_again();
            }
            Err(error) => {
                let error = chain(&error);
                if self.last_reported_error.as_ref() != Some(&error) {
                    warn!("{error}; it goes by the policy above it, and is tried again");
                }
                self.part_failed("policy set", error.clone());
                self.last_reported_error = Some(error);
                self.retry_later();
            }
        }
    }

    /// Notes the dead peers that the kernel has told of.
    fn read_dead_peers(&mut self) {
        let enforcement = self.enforcement.as_ref();
        let record = enforcement.map(|enforcement| enforcement.set.record().as_ref());
        self.dead_peers.read(record);
    }

    fn on_cgroup_removed(&mut self, cgroup: &Cgroup, reporter: &mut dyn Reporter) {
        if *cgroup == self.root {
            self.look_at_cgroup(reporter);
            return;
        }
        self.claimants.forget(&cgroup.path);
        if let Some(renames) = &mut self.renames {
            renames.forget(&cgroup.path);
        }
        let Some(enforcement) = &mut self.enforcement else {
            return;
        };
        if self.grants.iter().any(|grant| grant.cgroup == *cgroup) {
            self.grants.retain(|grant| grant.cgroup != *cgroup);
            if let Err(error) = enforcement.set.record().set_grants(&self.grants) {
                debug!("{}", chain(&error));
            }
        }
        let forgotten = enforcement.set.remove_cgroup(cgroup);
        if let Err(error) = forgotten.and(enforcement.bounds.forget(cgroup.id)) {
            // An id is not used again, so what stays costs its memory only.
            debug!("{}", chain(&error));
        }
    }

    /// Finds out whether the cgroup that the program is attached to is gone, or
    /// the program was taken off it.
    fn look_at_cgroup(&mut self, reporter: &mut dyn Reporter) {
        let found = self.hierarchy.lookup(&self.root.path);
        // The link lets go of a removed cgroup some time later.
        let exists = found.is_ok_and(|found| found.as_ref() == Some(&self.root));
        let gone = self
            .enforcement
            .take_if(|enforcement| !exists || !enforcement.attachment.holds());
        let Some(gone) = gone else {
            return;
        };
        self.building = None;
        self.end_sweep();
        self.sweep_again = false;
        self.sweep_due = None;
        self.state.sweep = datapath::Sweep::default();
        self.state.settled = false;
        self.last_record = Some(gone.set.record().clone());
        if let Err(error) = gone.attachment.discard() {
            warn!("{}", chain(&error));
        }
        if exists {
            warn!(
                "somebody has taken the program off cgroup {}; it is attached again",
                self.root.path
            );
            self.look_for_cgroup(reporter);
            return;
        }
        self.wait_for_cgroup(reporter);
        self.look_for_cgroup(reporter);
    }

    /// Attaches to the cgroup if it has come to exist.
    fn look_for_cgroup(&mut self, reporter: &mut dyn Reporter) {
        if self.enforcement.is_some() {
            self.look_at_cgroup(reporter);
            return;
        }
        match self.hierarchy.lookup(&self.root.path) {
            Ok(Some(_)) => {
                if let Err(error) = self.enforce_now(reporter) {
                    error!("{error:#}; it is tried again");
                    self.retry_later();
                }
            }
            Ok(None) => {
                if self.events.is_none() {
                    self.retry_later();
                }
            }
            Err(error) => {
                warn!("looking for cgroup {}: {error}", self.root.path);
                self.retry_later();
            }
        }
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

    fn stop(mut self, by: &str, after: Duration, leaves: Leaves, reporter: &mut dyn Reporter) {
        self.building = None;
        self.sweep = None;
        let Some(enforcement) = self.enforcement.take() else {
            reporter.report(&Event::Stopped {
                by,
                after,
                leaves: Leaves::Nothing,
                record: self.last_record.as_deref(),
            });
            return;
        };
        let record = enforcement.set.record().clone();
        if leaves == Leaves::Enforcement {
            self.state.owner = None;
            self.state.sweep.under_way = false;
            self.state.parts.clear();
            if let Err(error) = record.set_state(&self.state) {
                debug!("{}", chain(&error));
            }
        }
        if leaves == Leaves::Nothing {
            let detached = enforcement.attachment.detach();
            if let Err(error) = detached.and(enforcement.bounds.detach()) {
                error!("{}", chain(&error));
            }
        }
        reporter.report(&Event::Stopped {
            by,
            after,
            leaves,
            record: Some(&record),
        });
    }
}

/// Takes a cgroup, from a running agent if that is wanted. An error where it
/// cannot be told whether another one is there.
fn own(
    cgroup: &CgroupPath,
    take_over: bool,
) -> Result<(Result<Ownership, ownership::Error>, Option<Client>)> {
    /// Somebody who looks whether an agent is there holds the lock for a moment.
    const PATIENCE: Duration = Duration::from_millis(200);
    match Ownership::acquire(cgroup, PATIENCE) {
        Ok(ownership) => Ok((Ok(ownership), None)),
        Err(taken @ ownership::Error::Taken { .. }) if take_over => {
            let mut predecessor =
                Client::connect(cgroup).context("asking the running agent to step aside")?;
            let answer = predecessor
                .ask(Request::StepAside)
                .context("asking the running agent to step aside")?;
            info!("taking over from agent {}", answer.pid);
            Ok((Err(taken), Some(predecessor)))
        }
        Err(taken @ ownership::Error::Taken { .. }) => Err(taken.into()),
        Err(error) => {
            let error = anyhow::Error::new(error);
            warn!("{error:#}; a second agent on {cgroup} would not notice this one");
            match error.downcast() {
                Ok(error) => Ok((Err(error), None)),
                Err(error) => Err(error),
            }
        }
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
