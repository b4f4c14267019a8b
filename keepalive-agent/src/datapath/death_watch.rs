//! Death watch: the link by which the program of a set is told of dead peers.
//!
//! Not of a cgroup but of the whole machine, so it can be neither swapped in one step
//! nor taken off by others. Each set has its own, which takes the place of the one
//! before once the set is in force; while there are two, connections remember that
//! they have been counted. Where there is none, dead peers are not counted, and that
//! is all.

use std::os::fd::OwnedFd;

use super::{Error, LoadedSet, PinDirectory, program, syscalls};

/// The program of one set, attached.
#[derive(Debug)]
pub(super) struct DeathWatch {
    _link: OwnedFd,
}

impl DeathWatch {
    /// Attaches that of a set that is in force on this cgroup, and removes the pins
    /// of earlier ones.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, or it cannot be pinned: nothing is left then, and
    /// pins of earlier ones stay.
    pub(super) fn begin(
        set: &mut LoadedSet,
        cgroup: u64,
        pins: Option<&PinDirectory>,
    ) -> Result<Self, Error> {
        const LOOKING: &str = "looking at the program for dead peers";
        let program = set.take_peer_died()?;
        let id = syscalls::program_info(&program)
            .map_err(Error::call(LOOKING))?
            .id;
        let link = syscalls::attach_to_tracepoint(&program).map_err(Error::call(format!(
            "attaching program {}",
            program::PEER_DIED
        )))?;
        if let Some(pins) = pins {
            pins.pin_death_watch(&link, cgroup, id)?;
            pins.unpin_death_watches(cgroup, id)?;
        }
        Ok(Self { _link: link })
    }
}
