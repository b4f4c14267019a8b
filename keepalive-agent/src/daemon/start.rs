//! Start: the policy is put in force on the cgroup, where nothing of ours is, where
//! an earlier agent has left its own, and where another one steps aside.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tracing::{debug, info, warn};

use super::{
    Daemon, Enforcement, Event, Options, PATIENCE, Reporter,
    building::{Built, allowed},
    control::{Client, Request},
    log_of,
    ownership::{self, Ownership},
    target,
};
use crate::{
    assignment::Assignment,
    datapath::{Attachment, Bounds, InForce, LoadedSet, Part, PartStatus, State, chain},
    hierarchy::CgroupPath,
    names::printable_path,
    sweep,
    watch::Watch,
};

impl Daemon {
    /// Puts the policy in force on the cgroup, if there is one, and goes on from
    /// there.
    pub(super) fn enforce_now(&mut self, reporter: &mut dyn Reporter) -> Result<()> {
        let started = self.put_in_force()?;
        self.begin(started.as_ref(), reporter);
        Ok(())
    }

    /// Puts the policy in force on the cgroup; what it claims, and whether another
    /// set was in force before. None where there is no such cgroup.
    pub(super) fn put_in_force(&mut self) -> Result<Option<(Assignment, bool)>> {
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
        if continued {
            // Before the agent that was there lets go of its own.
            self.watch_deaths(&mut attachment, &mut built.set);
        }
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
    pub(super) fn begin(
        &mut self,
        started: Option<&(Assignment, bool)>,
        reporter: &mut dyn Reporter,
    ) {
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
        if !continued && let Some(mut enforcement) = self.enforcement.take() {
            // New connections did not wait for this program.
            self.watch_deaths(&mut enforcement.attachment, &mut enforcement.set);
            self.enforcement = Some(enforcement);
        }
        self.follow_renames(reporter);
        self.sweep();
    }

    pub(super) fn wait_for_cgroup(&mut self, reporter: &mut dyn Reporter) {
        reporter.report(&Event::Waiting {
            cgroup: &self.root.path,
        });
        if self.events.is_none() {
            // Nobody will say when it comes to exist.
            self.retry_later();
        }
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
    pub(super) fn own_again(&mut self, patience: Duration) {
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
    pub(super) fn hold_bounds(&mut self, bounds: &mut Bounds, set: &LoadedSet) {
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
    pub(super) fn watch_deaths(&mut self, attachment: &mut Attachment, set: &mut LoadedSet) {
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
        let (attachment, built) = match record.description().before.clone() {
            // Connections may have values of the set before the one in force: the
            // sweep that the other agent had begun is done first.
            Some(before) if !state.settled => {
                let mut job = self.job(record.description().config.clone(), self.origin.clone());
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
                        warn!(
                            "{}; connections may keep values of earlier policies",
                            chain(&error)
                        );
                    }
                }
                (attachment, built)
            }
            _ => {
                let mut job = self.job(self.config.clone(), self.origin.clone());
                job.before = Some(record.description().config.clone());
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
}

/// Reads the files, and again while one of them is being written: half of a config would
/// be put in force, in the place of a whole one perhaps, until it is read the next time.
pub(super) fn read_when_whole(
    mut watch: Option<&mut Watch>,
    options: &Options,
) -> Result<target::Read> {
    /// Whoever takes longer is followed when they have finished.
    const PATIENCE: Duration = Duration::from_secs(1);
    const PAUSE: Duration = Duration::from_millis(10);
    let begun = Instant::now();
    loop {
        let read = target::read(&options.sources, options.dry_run);
        let has_news = watch
            .as_mut()
            .is_some_and(|watch| watch.has_news().unwrap_or(false));
        let is_whole = !has_news && !options.sources.was_just_emptied();
        if is_whole || begun.elapsed() > PATIENCE {
            return read;
        }
        debug!("the files are being written");
        thread::sleep(PAUSE);
        if let Some(watch) = &mut watch {
            watch.renew()?;
        }
    }
}

/// Takes a cgroup, from a running agent if that is wanted. An error where it
/// cannot be told whether another one is there.
pub(super) fn own(
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
