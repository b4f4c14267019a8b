//! The BPF object in the kernel.
//!
//! The names of its maps, programs and globals stand here and nowhere else.

mod attachment;
mod bounds;
mod dead_peers;
mod description;
mod error;
mod events;
pub mod fault;
mod iterators;
mod lister;
mod loaded_set;
mod pin;
mod set_record;
mod survey;
mod sweeper;
mod syscalls;
mod usage;

use std::{
    fs::File,
    io::{self, Read as _},
};

use anyhow::{Context as _, Result};
use aya::{
    Btf, Ebpf, EbpfLoader, Endianness,
    maps::{Map, MapError},
    programs::{Iter, iter::IterLink},
};
use fault::Operation;
use keepalive_common::layout::Layout;

use crate::kernel::layout::{Hook, Kernel};

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
pub use survey::{Survey, Surveyed};
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
    pub(super) const DEATHS: &str = "DEATHS";
    pub(super) const FOLLOWED: &str = "FOLLOWED";
    pub(super) const GENERATION: &str = "GENERATION";
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

/// Creates the maps, with sizes for some of them. Programs are loaded one by one
/// afterwards.
fn create(layout: &Layout, sizes: &[(&'static str, u32)]) -> Result<Ebpf, Error> {
    let object = object()?;
    fault::point(Operation::CreateMaps).map_err(Error::call("creating the BPF maps"))?;
    let mut loader = EbpfLoader::new();
    loader.override_global(LAYOUT, layout, true);
    for (map, entries) in sizes {
        loader.map_max_entries(map, *entries);
    }
    loader
        .load(object)
        .map_err(|error| Error::CreateMaps(Box::new(error)))
}

/// Takes a map out of the object, as its type.
fn take_map<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, Error>
where
    T: TryFrom<Map, Error = MapError>,
{
    let found = ebpf
        .take_map(name)
        .ok_or(Error::Missing { kind: "map", name })?;
    T::try_from(found).map_err(Error::map(format!("using map {name}")))
}

/// Loads one of the iterating programs.
fn load_iterator(
    ebpf: &mut Ebpf,
    name: &'static str,
    kernel: &Kernel,
    over: Hook,
) -> Result<(), Error> {
    fault::point(Operation::LoadProgram).map_err(|error| refused(name, error))?;
    let types = types_of(kernel, over).map_err(|error| Error::Kernel(format!("{error:#}")))?;
    iterator(ebpf, name)?
        .load(over.name(), &types)
        .map_err(|error| refused(name, error))
}

/// Types with one that has the number it has in the kernel, and nothing else of
/// interest: all that loading a program looks up is this number, and to parse
/// the hundred thousand types of the kernel takes longer than anything else at
/// the start (layout: include/uapi/linux/btf.h).
fn types_of(kernel: &Kernel, hook: Hook) -> Result<Btf> {
    const MAGIC: u16 = 0xeb9f;
    const VERSION: u8 = 1;
    const HEADER: u32 = 24;
    const TYPE: u32 = 12;
    const FORWARD: u32 = 7 << 24;
    const TYPEDEF: u32 = 8 << 24;
    const FUNCTION: u32 = 12 << 24;
    let number = kernel.number(hook)?;
    let kind = if hook.is_function() {
        FUNCTION
    } else {
        TYPEDEF
    };
    let names = [b"\0", hook.type_name().as_bytes(), b"\0"].concat();
    let types = number * TYPE;
    let mut bytes = Vec::with_capacity((HEADER + types) as usize + names.len());
    bytes.extend(MAGIC.to_ne_bytes());
    bytes.extend([VERSION, 0]);
    let lengths = [HEADER, 0, types, types, u32::try_from(names.len())?];
    bytes.extend(lengths.iter().flat_map(|length| length.to_ne_bytes()));
    // Number 0 is no type at all, and the wanted one comes last. Each has a name,
    // a kind, and what it is of.
    let mut add = |words: [u32; 3]| bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    for _ in 1..number {
        add([0, FORWARD, 0]);
    }
    add([1, kind, 0]);
    bytes.extend(names);
    Btf::parse(&bytes, Endianness::default()).context("describing a hook")
}

/// Makes a loaded iterator ready to be run once, on whichever thread.
fn prepare_iterator(ebpf: &mut Ebpf, name: &'static str) -> Result<IterLink, Error> {
    let program = iterator(ebpf, name)?;
    let link = program.attach().map_err(|error| refused(name, error))?;
    program
        .take_link(link)
        .map_err(|error| refused(name, error))
}

fn iterator<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Iter, Error> {
    let missing = Error::Missing {
        kind: "iterating program",
        name,
    };
    let program = ebpf
        .program_mut(name)
        .and_then(|program| program.try_into().ok());
    program.ok_or(missing)
}

/// Runs a prepared iterator over the sockets of the calling thread's network
/// namespace, handing on what it writes. It goes no further than what fits
/// into the buffer.
fn run_iterator(
    link: IterLink,
    buffer: &mut [u8],
    mut written: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut file: File = link.into_file().context("opening the iterator")?;
    loop {
        match file.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => written(&buffer[..length])?,
            // After a million sockets without output the kernel pauses.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(error) => return Err(Error::call("reading the iterator")(error).into()),
        }
    }
}

/// A program that the kernel did not load.
fn refused(program: &'static str, source: impl Into<error::RefusedProgram>) -> Error {
    Error::LoadProgram {
        program,
        source: source.into(),
    }
}
