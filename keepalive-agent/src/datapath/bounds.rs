//! Bounds: the links of the program that holds applications to bounds when they
//! set options of connections that exist.
//!
//! What a connection is held to stands beside its socket, so this program is the
//! same for every policy set, and which set is in force is decided by the one link
//! of [`super::attachment`] alone. These links only have to be there while any
//! connection is held to something: they are made before a set is put in force
//! that has bounds, and taken away after a sweep has released the last connection
//! of one that had them. A link belongs to the set whose originals its program
//! uses.

use std::{fs::File, os::fd::OwnedFd};

use aya_obj::generated::bpf_attach_type::BPF_CGROUP_SETSOCKOPT;

use super::{
    Error, PinDirectory, SetRecord,
    object::{LoadedObject, Purpose},
    program, syscalls,
};

/// The program of a set that has bounds, and where it is to run.
#[derive(Debug)]
pub(super) struct BoundsProgram {
    program: OwnedFd,
    /// Ids of the cgroups, and their directories.
    cgroups: Vec<(u64, File)>,
}

impl BoundsProgram {
    pub(super) fn load(object: &LoadedObject, cgroups: Vec<(u64, File)>) -> Result<Self, Error> {
        let program = object.load(program::BOUNDED, Purpose::Setsockopt)?;
        Ok(Self { program, cgroups })
    }

    pub(super) fn add_cgroup(&mut self, cgroup: u64, directory: File) {
        if self.cgroups.iter().all(|(known, _)| *known != cgroup) {
            self.cgroups.push((cgroup, directory));
        }
    }
}

impl BoundsProgram {
    pub(super) fn remove_cgroup(&mut self, cgroup: u64) {
        self.cgroups.retain(|(known, _)| *known != cgroup);
    }
}

/// The links by which connections are held to bounds.
#[derive(Debug)]
pub struct Bounds {
    /// The cgroup that the policy set is attached to, by which pins are named.
    root: u64,
    pins: Option<PinDirectory>,
    links: Vec<Link>,
}

#[derive(Debug)]
struct Link {
    link: OwnedFd,
    cgroup: u64,
}

/// A link of the program, wherever it is attached: its cgroup, 0 where that is
/// gone.
fn links_of(set: &SetRecord) -> Result<Vec<Link>, Error> {
    const LOOKING: &str = "looking at what is attached, which takes CAP_SYS_ADMIN";
    let mut found = Vec::new();
    for id in syscalls::links().map_err(Error::call(LOOKING))? {
        // Links come and go, and so do their programs.
        let Ok(link) = syscalls::link_by_id(id) else {
            continue;
        };
        let Ok(Some(info)) = syscalls::cgroup_link(&link) else {
            continue;
        };
        if info.attach_type != BPF_CGROUP_SETSOCKOPT as u32 {
            continue;
        }
        let program = syscalls::program_by_id(info.program);
        let Ok(program) = program.and_then(syscalls::program_info) else {
            continue;
        };
        if program.name == program::BOUNDED
            && program.maps.contains(&set.beside_sockets.originals.id)
        {
            found.push(Link {
                link,
                cgroup: info.cgroup,
            });
        }
    }
    Ok(found)
}

impl SetRecord {
    /// The ids of the cgroups in which connections are held to bounds when their
    /// applications set options.
    ///
    /// # Errors
    ///
    /// When links cannot be looked at, which takes CAP_SYS_ADMIN.
    pub fn bounded_cgroups(&self) -> Result<Vec<u64>, Error> {
        let links = links_of(self)?;
        let cgroups = links.iter().map(|link| link.cgroup);
        Ok(cgroups.filter(|cgroup| *cgroup != 0).collect())
    }
}

impl Bounds {
    /// None yet, for a set on this cgroup.
    #[must_use]
    pub const fn none(root: u64, pins: Option<PinDirectory>) -> Self {
        Self {
            root,
            pins,
            links: Vec::new(),
        }
    }

    /// Those of a set that is in force on this cgroup.
    ///
    /// # Errors
    ///
    /// When links cannot be looked at, which takes CAP_SYS_ADMIN.
    pub fn of(set: &SetRecord, root: u64, pins: Option<PinDirectory>) -> Result<Self, Error> {
        Ok(Self {
            root,
            pins,
            links: links_of(set)?,
        })
    }

    /// Attaches the program of a set wherever it is to run, and puts it in the
    /// place of earlier ones. For a set without bounds nothing changes: see
    /// [`Self::release`].
    ///
    /// # Errors
    ///
    /// When the kernel refuses it somewhere; it runs everywhere else.
    pub fn hold(&mut self, set: &super::LoadedSet) -> Result<(), Error> {
        let Some(bounded) = set.bounds() else {
            return Ok(());
        };
        let mut result = Ok(());
        for (cgroup, directory) in &bounded.cgroups {
            let held = match self.links.iter().find(|link| link.cgroup == *cgroup) {
                Some(link) => replace(&link.link, &bounded.program).and_then(|()| self.pin(link)),
                None => self.attach(*cgroup, directory, &bounded.program),
            };
            result = result.and(held);
        }
        result
    }

    fn attach(&mut self, cgroup: u64, directory: &File, program: &OwnedFd) -> Result<(), Error> {
        let link = syscalls::link_create(program, directory, BPF_CGROUP_SETSOCKOPT).map_err(
            Error::call(format!("attaching program {}", program::BOUNDED)),
        )?;
        let link = Link { link, cgroup };
        self.pin(&link)?;
        self.links.push(link);
        Ok(())
    }

    fn pin(&self, link: &Link) -> Result<(), Error> {
        match &self.pins {
            Some(pins) => pins.pin_bounds(&link.link, self.root, link.cgroup),
            None => Ok(()),
        }
    }

    /// Forgets a cgroup that is gone, from which the kernel has taken the program.
    ///
    /// # Errors
    ///
    /// When its pin cannot be removed.
    pub fn forget(&mut self, cgroup: u64) -> Result<(), Error> {
        let before = self.links.len();
        self.links.retain(|link| link.cgroup != cgroup);
        match &self.pins {
            Some(pins) if self.links.len() < before => pins.unpin_bounds(self.root, cgroup),
            _ => Ok(()),
        }
    }

    /// Takes the program away where a set does not need it. Only for a set whose
    /// sweep has met every connection.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub fn release(&mut self, set: &super::LoadedSet) -> Result<(), Error> {
        let needed = |cgroup: u64| {
            set.bounds()
                .is_some_and(|bounds| bounds.cgroups.iter().any(|(id, _)| *id == cgroup))
        };
        let (kept, released) = std::mem::take(&mut self.links)
            .into_iter()
            .partition(|link| needed(link.cgroup));
        self.links = kept;
        self.take_off(released)
    }

    /// Takes the program off everywhere.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub fn detach(mut self) -> Result<(), Error> {
        let links = std::mem::take(&mut self.links);
        self.take_off(links)
    }

    /// The first error, after all has been tried.
    fn take_off(&self, links: Vec<Link>) -> Result<(), Error> {
        let mut all = Ok(());
        for Link { link, cgroup } in links {
            let pins = self.pins.as_ref();
            let unpinned = pins.map_or(Ok(()), |pins| pins.unpin_bounds(self.root, cgroup));
            all = all.and(super::attachment::take_off(&link)).and(unpinned);
        }
        all
    }
}

/// Puts the program of another build or set in the place of the one under a link.
fn replace(link: &OwnedFd, program: &OwnedFd) -> Result<(), Error> {
    const REPLACING: &str = "replacing the program for bounds";
    let Some(found) = syscalls::cgroup_link(link).map_err(Error::call(REPLACING))? else {
        return Ok(());
    };
    let old = syscalls::program_by_id(found.program).map_err(Error::call(REPLACING))?;
    syscalls::link_update(link, program, old).map_err(Error::call(REPLACING))
}
