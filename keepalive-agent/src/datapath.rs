//! The BPF object in the kernel.
//!
//! The names of its maps, programs and globals stand here and nowhere else.

mod attachment;
mod bounds;
mod dead_peers;
mod death_watch;
mod description;
mod error;
mod events;
pub mod fault;
mod iterators;
mod lister;
mod loaded_set;
mod object;
mod pin;
mod set_record;
mod survey;
mod sweeper;
mod syscalls;
mod table;
mod usage;

pub use attachment::{Attachment, Evidence, Foreign, InForce, in_force, programs_on_the_way};
pub use bounds::Bounds;
pub use dead_peers::{DeadPeer, DeadPeers};
pub use description::now;
pub use description::{
    Counted, Description, Done, Origin, Owner, Part, PartStatus, Refusals, Reload, State, Sweep,
    Totals,
};
pub use error::{Error, chain};
pub use events::{Change, Events};
pub use lister::Lister;
pub use loaded_set::{Blueprint, LoadedSet};
pub use pin::PinDirectory;
pub use set_record::SetRecord;
pub use survey::{DueSockets, Survey, Surveyed};
pub use sweeper::{Step, Sweeper};
pub use usage::Usage;

/// The programs.
mod program {
    pub(super) const ESTABLISHED: &str = "established";
    pub(super) const BOUNDED: &str = "bounded";
    pub(super) const SWEEP: &str = "sweep";
    pub(super) const LIST: &str = "list";
    pub(super) const FILES: &str = "files";
    pub(super) const SURVEY: &str = "survey";
    pub(super) const PEER_DIED: &str = "peer_died";
    pub(super) const CGROUP_MADE: &str = "cgroup_made";
    pub(super) const CGROUP_REMOVED: &str = "cgroup_removed";
}

/// The maps.
mod map {
    pub(super) const CGROUPS: &str = "CGROUPS";
    pub(super) const POLICIES: &str = "POLICIES";
    pub(super) const STEPS: &str = "STEPS";
    pub(super) const REMOTES: &str = "REMOTES";
    pub(super) const PORTS: &str = "PORTS";
    pub(super) const COUNTERS: &str = "COUNTERS";
    pub(super) const SWEPT: &str = "SWEPT";
    pub(super) const FAILURES: &str = "FAILURES";
    pub(super) const DEAD_PEERS: &str = "DEAD_PEERS";
    pub(super) const COUNTED: &str = "COUNTED";
    pub(super) const DEATHS: &str = "DEATHS";
    pub(super) const FOLLOWED: &str = "FOLLOWED";
    pub(super) const GENERATION: &str = ".data.written";
    pub(super) const PASS: &str = "PASS";
    pub(super) const ORIGINALS: &str = "ORIGINALS";
    pub(super) const EVENTS: &str = "EVENTS";
    pub(super) const LOST: &str = "LOST";
}

/// The global that tells the programs where the kernel keeps its fields.
const LAYOUT: &str = "LAYOUT";

/// What the build script embedded; empty when the BPF object was not built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/keepalive.bpf.o"));

/// The BPF object.
const fn object() -> Result<&'static [u8], Error> {
    if OBJECT.is_empty() {
        return Err(Error::NoObject);
    }
    Ok(OBJECT)
}

/// A program that the kernel did not load.
fn refused(program: &'static str, source: impl Into<error::RefusedProgram>) -> Error {
    Error::LoadProgram {
        program,
        source: source.into(),
    }
}
