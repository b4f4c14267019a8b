//! A running agent: what it is woken by, and what it does then.

use std::{future::pending, time::Duration};

use anyhow::{Context as _, Result};
use aya_log::EbpfLogger;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep_until},
};
use tracing::{debug, error, warn};

use super::{
    super::{
        ConfigSource, Target,
        report::{self, Patience},
    },
    Signals,
};
use crate::{
    assignment::{Assignment, Claimants},
    bpf::{Change, Counted, Done, Enforcer, Events, Failure, Loaded},
    config::Config,
    hierarchy::{Cgroup, Hierarchy},
    kernel::{layout::Kernel, preflight},
    names::printable_path,
    state,
    sweep::{self, Rest, Swept},
    view,
    watch::Watch,
};

/// After a cgroup was made with processes in it, existing connections are swept
/// this much later, together with those of the cgroups that follow.
const LATER: Duration = Duration::from_millis(50);

/// Sweeps for new cgroups take at most one part of this many of the time.
const SHARE: u32 = 10;

/// What becomes of cgroups that the agent is not told of.
const AFTER_SIGHUP: &str = "new cgroups go by the policy above them until SIGHUP";

/// What the agent is woken by.
pub(super) enum Event {
    /// A signal to stop, by its name.
    Stop(&'static str),
    /// SIGHUP.
    Hangup,
    /// A file of the config may have changed.
    Edited(Result<()>),
    /// Cgroups were made or removed.
    Cgroups(Result<Vec<Change>>),
    /// Connections that new cgroups had before their policy are to be swept.
    Late,
    /// A pass of the sweep is over.
    Swept,
    /// The kernel refused an option.
    Refused,
}

/// A running agent.
pub(super) struct Agent {
    kernel: Kernel,
    hierarchy: Hierarchy,
    root: Cgroup,
    dry_run: bool,
    config: Config,
    claimants: Claimants,
    enforcer: Enforcer,
    log: AsyncFd<EbpfLogger<&'static dyn log::Log>>,
    state: Option<state::Own>,
    /// None where the files cannot be watched.
    watch: Option<Watch>,
    /// None where nothing hangs on new cgroups, or the kernel does not tell of
    /// them.
    events: Option<Events>,
    /// What was last said to be wrong with the files, which several changes in a
    /// row need not repeat.
    told: Option<String>,
    /// What the kernel refused, as last told.
    refused: Vec<Failure>,
    /// The sweep under way.
    rest: Option<Rest>,
    /// When existing connections are to be swept for the sake of new cgroups.
    late: Option<Instant>,
    /// Not before this.
    not_before: Instant,
}

/// A running agent, and what there is to tell of its start.
pub(super) struct Beginning {
    pub(super) agent: Agent,
    pub(super) assignment: Assignment,
    pub(super) swept: Swept,
    pub(super) source: ConfigSource,
}

impl Agent {
    /// Enforces from here on, and sweeps what was there first.
    pub(super) fn start(target: &Target, dry_run: bool) -> Result<Beginning> {
        preflight::may_enforce()?;
        // Before the files are read, so that no change falls in between.
        let watch = watch(target);
        let (config, source, warnings) = target.config()?;
        for warning in &warnings.0 {
            warn!("{warning}");
        }
        let config = config.in_dry_run(dry_run);
        let (hierarchy, root) = target.root()?;
        for missing in view::missing(Some(&hierarchy)) {
            warn!("{missing}");
        }
        let kernel = Kernel::running()?;
        debug!(?kernel, "found the kernel's fields");
        let claimants = claimants(&config, &root)?;
        // As with the files.
        let events = events(&kernel, &hierarchy);
        let assignment = assign(&claimants, &hierarchy)?;
        let before = take_over(&hierarchy, &root).unwrap_or_else(|error| {
            warn!("{error:#}; values that an earlier agent set count as the applications' own");
            None
        });
        let directory = hierarchy.open(&root)?;
        let mut enforcer = Loaded::load(&kernel, assignment.policies.len())?
            .fill(before.as_ref(), &assignment)?
            .attach(&directory)
            .with_context(|| format!("cgroup {}", root.path))?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the logger keeps its descriptor open"
        )]
        let log = AsyncFd::with_interest(enforcer.logger()?, Interest::READABLE)
            .context("watching the log of the BPF program")?;
        let state = state::Own::write(&root, &config)
            .inspect_err(|error| {
                warn!("{error:#}; `sockets` cannot tell the policy behind a value");
            })
            .ok();
        let mut agent = Self {
            kernel,
            hierarchy,
            root,
            dry_run,
            config,
            claimants,
            enforcer,
            log,
            state,
            watch,
            events,
            told: None,
            refused: Vec::new(),
            rest: None,
            late: None,
            not_before: Instant::now(),
        };
        let swept = agent.sweep()?;
        Ok(Beginning {
            agent,
            assignment,
            swept,
            source,
        })
    }

    /// Where it is attached.
    pub(super) fn place(&self) -> String {
        let directory = self.hierarchy.directory(&self.root.path);
        printable_path(&directory).to_string()
    }

    /// What each policy did so far.
    pub(super) fn done(&self) -> Result<Vec<(Counted, Done)>> {
        self.enforcer.done().context("reading the counters")
    }

    /// What the kernel refused.
    pub(super) fn failures(&self) -> Result<Vec<Failure>> {
        self.enforcer.failures().context("reading the failures")
    }

    /// Logs what the kernel refused since the last time. The BPF program, which
    /// logs nothing else, bounds how often there is something.
    pub(super) fn tell_refusals(&mut self) -> Result<()> {
        let failures = self.failures()?;
        for failure in &failures {
            if !self.refused.contains(failure) {
                warn!("{failure}; the connections go on without it");
            }
        }
        self.refused = failures;
        Ok(())
    }

    /// Waits for something to do.
    pub(super) async fn next(&mut self, signals: &mut Signals) -> Result<Event> {
        let (rest, events, watch) = (&mut self.rest, &mut self.events, &mut self.watch);
        let late = self.late;
        let swept = async {
            match rest {
                Some(rest) => rest.finished().await,
                None => pending().await,
            }
        };
        let cgroups = async {
            match events {
                Some(events) => events.next().await,
                None => pending().await,
            }
        };
        let edited = async {
            match watch {
                Some(watch) => watch.changed().await,
                None => pending().await,
            }
        };
        let late = async {
            match late {
                Some(at) => sleep_until(at).await,
                None => pending().await,
            }
        };
        let log = &mut self.log;
        let refused = async {
            let mut guard = log
                .readable_mut()
                .await
                .context("reading the log of the BPF program")?;
            guard.get_inner_mut().flush();
            guard.clear_ready();
            Ok(Event::Refused)
        };
        // In this order: what a person asks for is not done twice, once because the
        // files changed as well.
        tokio::select! {
            biased;
            _ = signals.interrupt.recv() => Ok(Event::Stop("SIGINT")),
            _ = signals.terminate.recv() => Ok(Event::Stop("SIGTERM")),
            _ = signals.hangup.recv() => Ok(Event::Hangup),
            changed = edited => Ok(Event::Edited(changed)),
            refused = refused => refused,
            () = late => Ok(Event::Late),
            () = swept => Ok(Event::Swept),
            // Last: there may be more of them all the time.
            changes = cgroups => Ok(Event::Cgroups(changes)),
        }
    }

    /// Reads the config again and goes over to it, if it says anything new or
    /// that is `demanded`. What is wrong with it is logged and changes nothing.
    pub(super) fn reload(&mut self, target: &Target, demanded: bool) -> Result<()> {
        match self.follow_config(target, demanded) {
            Ok(None) => Ok(()),
            Ok(Some((assignment, swept))) => {
                report::reloaded(target, &assignment)?;
                report::swept(target, &swept)
            }
            Err(error) => {
                let error = format!("{error:#}");
                if demanded || self.told.as_ref() != Some(&error) {
                    error!("the policy in force goes on: {error}");
                }
                self.told = Some(error);
                Ok(())
            }
        }
    }

    fn follow_config(
        &mut self,
        target: &Target,
        demanded: bool,
    ) -> Result<Option<(Assignment, Swept)>> {
        // What it has noticed up to here is read now. A file that is being written
        // stays noticed, which a new watch would not know of.
        let watching = match &mut self.watch {
            Some(watch) if demanded => watch.renew().is_ok(),
            watch => watch.is_some() || !demanded,
        };
        if !watching {
            self.watch = watch(target);
        }
        let read = target.config();
        if !demanded
            && let Some(watch) = &mut self.watch
            && watch.has_news()?
        {
            debug!("the files are being changed still");
            return Ok(None);
        }
        let (config, _, warnings) = read?;
        let config = config.in_dry_run(self.dry_run);
        self.told = None;
        if config == self.config && !demanded {
            return Ok(None);
        }
        let claimants = claimants(&config, &self.root)?;
        if self.events.is_none() {
            self.events = events(&self.kernel, &self.hierarchy);
        }
        let assignment = assign(&claimants, &self.hierarchy)?;
        for warning in &warnings.0 {
            warn!("{warning}");
        }
        self.go_over(&assignment)?;
        self.config = config;
        self.claimants = claimants;
        if let Some(state) = &self.state
            && let Err(error) = state.rewrite(&self.root, &self.config)
        {
            warn!("{error:#}; `sockets` goes by the policy before this one");
        }
        Ok(Some((assignment, self.sweep()?)))
    }

    fn go_over(&mut self, assignment: &Assignment) -> Result<()> {
        // What is left of the last sweep is for the next one to do.
        self.rest = None;
        self.enforcer.settle()?;
        self.enforcer.switch(assignment)
    }

    /// Follows a change of the files, or stops watching them.
    pub(super) fn follow_files(&mut self, target: &Target, changed: Result<()>) -> Result<()> {
        match changed {
            Ok(()) => self.reload(target, false),
            Err(error) => {
                warn!("{error:#}; send SIGHUP after a change of the config");
                self.watch = None;
                Ok(())
            }
        }
    }

    /// Gives new cgroups their policy, and forgets those that are gone. What
    /// goes wrong is logged: the rest of the policy goes on.
    pub(super) fn follow_cgroups(&mut self, changes: Result<Vec<Change>>) {
        let changes = match changes {
            Ok(changes) => changes,
            Err(error) => {
                warn!("{error:#}; {AFTER_SIGHUP}");
                self.events = None;
                return;
            }
        };
        if changes.contains(&Change::Lost) {
            debug!("cgroups came and went faster than they could be told of");
            if let Err(error) = self.look_again() {
                warn!("{error:#}; {AFTER_SIGHUP}");
            }
            return;
        }
        for change in &changes {
            let followed = match change {
                Change::Made(cgroup) => self.welcome(cgroup),
                Change::Removed(cgroup) => self.enforcer.vanish(cgroup),
                Change::Lost => Ok(()),
            };
            if let Err(error) = followed {
                warn!("{error:#}; {AFTER_SIGHUP}");
            }
        }
    }

    /// Gives a new cgroup its policy.
    fn welcome(&mut self, cgroup: &Cgroup) -> Result<()> {
        let policies = self.claimants.claim_of(&cgroup.path);
        if policies.is_empty() || !self.enforcer.appear(cgroup, &policies)? {
            return Ok(());
        }
        debug!(cgroup = %cgroup.path, "a new cgroup has its policy");
        // One without processes cannot have had connections.
        if self.hierarchy.has_processes(cgroup) {
            self.sweep_later();
        }
        Ok(())
    }

    /// Assigns the cgroups that exist now.
    fn look_again(&mut self) -> Result<()> {
        let assigned = self.claimants.assign(&self.hierarchy);
        let (assignment, _) = assigned.context("reading the hierarchy")?;
        self.go_over(&assignment)?;
        self.sweep_later();
        Ok(())
    }

    /// Has existing connections swept soon, but not all the time.
    fn sweep_later(&mut self) {
        let at = (Instant::now() + LATER).max(self.not_before);
        self.late.get_or_insert(at);
    }

    /// Sweeps for the sake of new cgroups.
    pub(super) fn catch_up(&mut self) -> Result<()> {
        let begun = Instant::now();
        // What it was about to do is found again.
        self.rest = None;
        let swept = self.sweep()?;
        debug!(connections = swept.seen, "swept for new cgroups");
        self.not_before = Instant::now() + begun.elapsed() * SHARE;
        Ok(())
    }

    /// Brings existing connections along after a change of policy.
    fn sweep(&mut self) -> Result<Swept> {
        self.late = None;
        let patience = Patience::with(report::SWEEPING);
        // New connections are governed, whatever becomes of the others.
        let swept = sweep::apply(&mut self.enforcer).unwrap_or_else(|error| {
            warn!("existing connections are not governed: {error:#}");
            Swept::default()
        });
        drop(patience);
        for (_, error) in &swept.missed {
            warn!("{error:#}; its existing connections are not governed, new ones are");
        }
        let idle = self.claimants.shortest_idle();
        self.rest = Rest::of(&mut self.enforcer, &swept, idle)?;
        if self.rest.is_none() {
            self.enforcer.settle()?;
        }
        Ok(swept)
    }

    /// A pass of the sweep is over: another one, or the sweep is.
    pub(super) fn go_on_sweeping(&mut self) -> Result<()> {
        if let Some(rest) = self.rest.take() {
            self.rest = rest.next(&mut self.enforcer)?;
        }
        if self.rest.is_none() {
            self.enforcer.settle()?;
            debug!("the sweep is over");
        }
        Ok(())
    }
}

/// Has cgroups told of that come and go from here on.
fn events(kernel: &Kernel, hierarchy: &Hierarchy) -> Option<Events> {
    Events::load(kernel, hierarchy)
        .inspect_err(|error| warn!("{error:#}; {AFTER_SIGHUP}"))
        .ok()
}

/// Watches the files of the config from here on.
fn watch(target: &Target) -> Option<Watch> {
    Watch::on(&target.files.sources())
        .inspect_err(|error| warn!("{error:#}; send SIGHUP after a change of the config"))
        .ok()
}

/// Who claims what below `root`.
pub(in crate::cli) fn claimants(config: &Config, root: &Cgroup) -> Result<Claimants> {
    if config.default.is_none() && config.policies.is_empty() {
        warn!("the config has neither [default] nor [[policy]]: every connection is left alone");
    }
    Claimants::new(config, root).context("the globs of the config are too large together")
}

/// Assigns, and warns of what has no effect.
pub(in crate::cli) fn assign(claimants: &Claimants, hierarchy: &Hierarchy) -> Result<Assignment> {
    let (assignment, warnings) = claimants.assign(hierarchy).with_context(|| {
        format!(
            "reading the hierarchy {}",
            printable_path(hierarchy.mount())
        )
    })?;
    for warning in &warnings {
        warn!("{warning}");
    }
    Ok(assignment)
}

/// What the last agent on this cgroup enforced, in terms of the cgroups of now.
fn take_over(hierarchy: &Hierarchy, root: &Cgroup) -> Result<Option<Assignment>> {
    let Some(before) = state::take_over(hierarchy, root)? else {
        return Ok(None);
    };
    let (assignment, _) = Claimants::new(&before, root)?.assign(hierarchy)?;
    Ok(Some(assignment))
}
