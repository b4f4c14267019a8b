//! Attachment: the link by which a policy set is in force on a cgroup.
//!
//! The contract with the kernel (`cgroup_bpf_replace()` in kernel/bpf/cgroup.c):
//! the program under a link is swapped under `cgroup_mutex`, and each connection
//! is decided by the old or the new one. EPERM: another program is there than
//! the one we know of. ENOLINK: the cgroup is gone, and the link leads nowhere.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use aya_obj::generated::bpf_attach_type::BPF_CGROUP_SOCK_OPS;

use crate::hierarchy::{CgroupPath, Hierarchy};

use super::{
    Bounds, Error, LoadedSet, Owner, PinDirectory, SetRecord, death_watch::DeathWatch, program,
    syscalls,
};

/// A policy set in force on a cgroup.
#[derive(Debug)]
pub struct Attachment {
    link: OwnedFd,
    /// The program that was put there last.
    program: OwnedFd,
    cgroup: u64,
    pins: Option<PinDirectory>,
    deaths: Option<DeathWatch>,
}

/// A policy set that is in force, found in the kernel.
pub struct InForce {
    /// Id of the cgroup; 0 when it is gone.
    pub cgroup: u64,
    /// The set; an error where it is of a build that is not understood.
    pub record: Result<Arc<SetRecord>, Error>,
    link: OwnedFd,
    program: OwnedFd,
}

/// By which to know that a set is in force.
#[derive(Debug)]
pub struct Evidence {
    link: OwnedFd,
    pub(super) program: u32,
    cgroup: u64,
}

impl Evidence {
    /// Whether the program is the one under the link, and the link leads to the
    /// cgroup.
    #[must_use]
    pub fn holds(&self) -> bool {
        let found = syscalls::cgroup_link(&self.link).ok().flatten();
        found.is_some_and(|found| (found.program, found.cgroup) == (self.program, self.cgroup))
    }
}

/// A program of somebody else on the same hook.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Foreign {
    /// Its id.
    pub id: u32,
    /// Its name, as whoever loaded it chose it.
    pub name: String,
}

/// Every policy set of this agent's kind that is in force, on whichever cgroup.
///
/// # Errors
///
/// When links cannot be looked at, which takes CAP_SYS_ADMIN.
pub fn in_force() -> Result<Vec<InForce>, Error> {
    const LOOKING: &str = "looking at what is attached, which takes CAP_SYS_ADMIN";
    let mut found = Vec::new();
    for id in syscalls::links().map_err(Error::call(LOOKING))? {
        // Links come and go.
        let Ok(link) = syscalls::link_by_id(id) else {
            continue;
        };
        found.extend(InForce::behind(link)?);
    }
    Ok(found)
}

/// Programs of others that run for connections of a cgroup, those attached to its
/// ancestors included.
///
/// # Errors
///
/// When the kernel cannot be asked, which takes CAP_NET_ADMIN and CAP_SYS_ADMIN.
pub fn programs_on_the_way(cgroup: impl AsFd) -> Result<Vec<Foreign>, Error> {
    const LOOKING: &str = "looking at the programs on the cgroup";
    let ids = syscalls::programs_on(cgroup, BPF_CGROUP_SOCK_OPS).map_err(Error::call(LOOKING))?;
    let mut foreign = Vec::new();
    for id in ids {
        let Ok(program) = syscalls::program_by_id(id) else {
            continue;
        };
        if matches!(SetRecord::of_program(program.as_fd()), Ok(None)) {
            let info = syscalls::program_info(&program).map_err(Error::call(LOOKING))?;
            foreign.push(Foreign {
                id,
                name: info.name,
            });
        }
    }
    Ok(foreign)
}

impl InForce {
    /// What is behind a link; none where it is not one of ours.
    fn behind(link: OwnedFd) -> Result<Option<Self>, Error> {
        const LOOKING: &str = "looking at a link";
        let found = syscalls::cgroup_link(&link).map_err(Error::call(LOOKING))?;
        let Some(found) = found.filter(|found| found.attach_type == BPF_CGROUP_SOCK_OPS as u32)
        else {
            return Ok(None);
        };
        let Ok(program) = syscalls::program_by_id(found.program) else {
            // It has been replaced or removed meanwhile, or may not be looked at.
            return Ok(None);
        };
        let info = syscalls::program_info(&program).map_err(Error::call(LOOKING))?;
        if info.name != program::ESTABLISHED {
            return Ok(None);
        }
        let record = match SetRecord::of_program(program.as_fd()) {
            Ok(None) => return Ok(None),
            Ok(Some(record)) => Ok(Arc::new(record)),
            Err(error) => Err(error),
        };
        Ok(Some(Self {
            cgroup: found.cgroup,
            record,
            link,
            program,
        }))
    }

    /// The set on this cgroup, if there is one.
    ///
    /// # Errors
    ///
    /// As [`in_force`].
    pub fn on(cgroup: u64) -> Result<Option<Self>, Error> {
        let mut found = in_force()?.into_iter();
        Ok(found.find(|found| found.cgroup == cgroup))
    }

    /// Whether it is the set of this cgroup, which need not exist any more.
    #[must_use]
    pub fn is_of(&self, path: &CgroupPath, hierarchy: &Hierarchy) -> bool {
        if let Ok(record) = &self.record {
            return record.root.path == *path;
        }
        let found = hierarchy.lookup(path).ok().flatten();
        found.is_some_and(|found| found.id == self.cgroup)
    }

    /// The agent that says that it is its own; none where it has left.
    #[must_use]
    pub fn owner(&self) -> Option<Owner> {
        self.record.as_ref().ok()?.state().ok()?.owner
    }

    /// The directory in which the link is pinned: looked for where its agent says,
    /// in the one given, and in the usual one.
    #[must_use]
    pub fn pins(&self, given: Option<&PinDirectory>) -> Option<PinDirectory> {
        let state = self.record.as_ref().ok().and_then(|set| set.state().ok());
        let named = state.and_then(|state| state.pins);
        let usual = Some(PinDirectory::DEFAULT.into());
        let open = |path: PathBuf| PinDirectory::open(&path).ok().flatten();
        let mut places = [named.and_then(open), given.cloned(), usual.and_then(open)]
            .into_iter()
            .flatten();
        places.find(|pins| self.is_pinned_in(pins))
    }

    /// The cgroup by which pins are named, which the kernel forgets of a link that was
    /// taken off.
    fn root(&self) -> u64 {
        let record = self.record.as_ref();
        record.map_or(self.cgroup, |record| record.root.id)
    }

    /// Whether the link is pinned in this directory.
    #[must_use]
    pub fn is_pinned_in(&self, pins: &PinDirectory) -> bool {
        let id = |link: &OwnedFd| {
            syscalls::cgroup_link(link)
                .ok()
                .flatten()
                .map(|link| link.id)
        };
        let pinned = pins.link(self.root()).ok().flatten();
        pinned.is_some_and(|pinned| id(&pinned).is_some() && id(&pinned) == id(&self.link))
    }

    /// Puts a set of our own in its place, without a gap, and pins it where it is
    /// to outlive us.
    ///
    /// # Errors
    ///
    /// [`Error::Replaced`] when somebody else was faster, [`Error::CgroupGone`];
    /// what was in force still is.
    pub fn replace(
        self,
        set: &LoadedSet,
        pins: Option<&PinDirectory>,
    ) -> Result<Attachment, Error> {
        let pinned = match pins {
            Some(pins) if !self.is_pinned_in(pins) => {
                // One of a cgroup that had this id cannot be: ids are not used again.
                pins.pin(&self.link, self.cgroup)?;
                Some((pins, self.cgroup))
            }
            _ => None,
        };
        let mut attachment = Attachment {
            link: self.link,
            program: self.program,
            cgroup: self.cgroup,
            pins: pins.cloned(),
            deaths: None,
        };
        let replaced = attachment.replace(set);
        if let (Err(_), Some((pins, cgroup))) = (&replaced, pinned) {
            pins.unpin(cgroup)?;
        }
        replaced.map(|()| attachment)
    }

    /// Takes it off the cgroup, whoever holds it; connections keep what they have.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub fn detach(self, pins: Option<&PinDirectory>) -> Result<(), Error> {
        let pins = pins.filter(|pins| self.is_pinned_in(pins));
        let root = self.root();
        let bounds = match self.record {
            Ok(record) => Bounds::of(&record, root, pins.cloned())?,
            Err(_) => Bounds::none(root, pins.cloned()),
        };
        // What stays pinned does nothing any more once it is taken off.
        let unpinned = pins.map_or(Ok(()), |pins| pins.unpin(root));
        take_off(&self.link).and(bounds.detach()).and(unpinned)
    }
}

pub(super) fn take_off(link: &OwnedFd) -> Result<(), Error> {
    match syscalls::link_detach(link) {
        // It was off already.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
        other => other.map_err(Error::call("taking the program off the cgroup")),
    }
}

impl Attachment {
    /// Puts a set in force on a cgroup that has none of ours.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, or it cannot be pinned; nothing is left then.
    pub fn attach(
        set: &LoadedSet,
        directory: impl AsFd,
        cgroup: u64,
        pins: Option<&PinDirectory>,
    ) -> Result<Self, Error> {
        // First of all, so that nothing can fail once it is pinned.
        let program = copy(set.program())?;
        let link = syscalls::link_create(&program, directory, BPF_CGROUP_SOCK_OPS).map_err(
            Error::call(format!(
                "attaching program {}: nothing is enforced; if another program wants the cgroup \
                 for itself alone, `bpftool cgroup show PATH` names it",
                program::ESTABLISHED
            )),
        )?;
        if let Some(pins) = pins {
            pins.pin(&link, cgroup)?;
        }
        Ok(Self {
            link,
            program,
            cgroup,
            pins: pins.cloned(),
            deaths: None,
        })
    }

    /// Puts another set in force, in one step.
    ///
    /// # Errors
    ///
    /// [`Error::Replaced`] when somebody else has put a program there,
    /// [`Error::CgroupGone`]; the set in force is the one before.
    pub fn replace(&mut self, set: &LoadedSet) -> Result<(), Error> {
        let program = copy(set.program())?;
        match syscalls::link_update(&self.link, set.program(), &self.program) {
            Ok(()) => {
                self.program = program;
                Ok(())
            }
            Err(error) => Err(match error.raw_os_error() {
                Some(libc::EPERM) => Error::Replaced,
                Some(libc::ENOLINK) => Error::CgroupGone,
                _ => Error::call("putting the policy set in force")(error),
            }),
        }
    }

    /// Has the set that is in force told of dead peers, instead of the one before.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, or it cannot be pinned: the one before is still
    /// told, if there was one.
    pub fn watch_deaths(&mut self, set: &mut LoadedSet) -> Result<(), Error> {
        let pins = self.pins.as_ref();
        self.deaths = Some(DeathWatch::begin(set, self.cgroup, pins)?);
        Ok(())
    }

    /// Whether the program that was put there last still runs for the cgroup.
    #[must_use]
    pub fn holds(&self) -> bool {
        let found = syscalls::cgroup_link(&self.link).ok().flatten();
        found.is_some_and(|found| found.cgroup == self.cgroup)
    }

    /// By which anybody can know whether it still holds.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked.
    pub fn evidence(&self) -> Result<Evidence, Error> {
        const LOOKING: &str = "looking at the attached program";
        let program = syscalls::program_info(&self.program).map_err(Error::call(LOOKING))?;
        Ok(Evidence {
            link: copy(&self.link)?,
            program: program.id,
            cgroup: self.cgroup,
        })
    }

    /// Whether enforcement goes on when this is dropped.
    #[must_use]
    pub const fn is_pinned(&self) -> bool {
        self.pins.is_some()
    }

    /// Removes the pin of a cgroup that is gone.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn discard(self) -> Result<(), Error> {
        match &self.pins {
            Some(pins) => pins.unpin(self.cgroup),
            None => Ok(()),
        }
    }

    /// Takes the program off the cgroup; connections keep what they have.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub fn detach(self) -> Result<(), Error> {
        let pins = self.pins.as_ref();
        // What stays pinned does nothing any more once it is taken off.
        let unpinned = pins.map_or(Ok(()), |pins| pins.unpin(self.cgroup));
        take_off(&self.link).and(unpinned)
    }
}

fn copy(program: &OwnedFd) -> Result<OwnedFd, Error> {
    program
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::call("keeping the program"))
}
