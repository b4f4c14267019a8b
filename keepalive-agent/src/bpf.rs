//! The BPF object in the kernel.
//!
//! The names of its maps, programs and globals stand here and nowhere else.

mod enforcer;
mod events;
mod iterators;
mod lister;
mod slots;
mod survey;

use std::{
    fs::File,
    io::{self, Read as _},
    sync::atomic::{Ordering, fence},
};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use aya::{
    Btf, Ebpf, EbpfLoader, Endianness,
    maps::{Array, Map, MapData},
    programs::{Iter, ProgramError, iter::IterLink},
};
use keepalive_common::layout::Layout;

use crate::kernel::layout::{Hook, Kernel};

pub use enforcer::{ByHand, Claimed, Counted, Done, Enforcer, Failure, Filled, Loaded, SlowPass};
pub use events::{Change, Events};
pub use lister::Lister;
use lister::read_descriptors;
use slots::Room;
pub use survey::{Survey, Surveyed};

/// The programs.
mod program {
    pub(super) const ESTABLISHED: &str = "established";
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

/// Creates the maps, with room for this many records and cgroups. Programs are
/// loaded one by one afterwards.
fn create(layout: &Layout, room: Room, cgroups: u32) -> Result<Ebpf> {
    let sizes = [
        (map::CGROUPS, cgroups),
        (map::POLICIES, room.slots),
        (map::COUNTERS, room.slots),
        (map::SWEPT, room.slots),
        (map::STEPS, room.steps),
        // The least there can be: nobody reads it here.
        (map::EVENTS, 1),
    ];
    load(layout, &sizes)
}

/// The BPF object.
fn object() -> Result<&'static [u8]> {
    ensure!(
        !OBJECT.is_empty(),
        "this agent was built without its BPF object and can neither enforce nor list anything: \
         build it with `cargo xtask build`"
    );
    Ok(OBJECT)
}

/// The same, with sizes for some of the maps.
fn load(layout: &Layout, sizes: &[(&'static str, u32)]) -> Result<Ebpf> {
    let object = object()?;
    let mut loader = EbpfLoader::new();
    loader.override_global(LAYOUT, layout, true);
    for (map, entries) in sizes {
        loader.map_max_entries(map, *entries);
    }
    loader
        .load(object)
        .context("creating the BPF maps: without them nothing works")
}

/// A map of the object, as its type.
fn map<'a, T>(ebpf: &'a Ebpf, name: &str) -> Result<T>
where
    T: TryFrom<&'a Map, Error = aya::maps::MapError>,
{
    let found = ebpf
        .map(name)
        .with_context(|| format!("the BPF object has no map {name}"))?;
    Ok(T::try_from(found)?)
}

/// The same, to be written to.
fn map_mut<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> Result<T>
where
    T: TryFrom<&'a mut Map, Error = aya::maps::MapError>,
{
    let found = ebpf
        .map_mut(name)
        .with_context(|| format!("the BPF object has no map {name}"))?;
    Ok(T::try_from(found)?)
}

/// Makes new connections look for their claim again: until here they may go by
/// what was found for their cgroup before the last writes. To be called after
/// whatever changes where a cgroup's sockets belong.
fn begin_generation(ebpf: &mut Ebpf) -> Result<()> {
    /// Odd, so that no number comes twice, and without a pattern, so that two
    /// numbers do not differ like two claims.
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut map: Array<Writable<'_>, u64> = map_mut(ebpf, map::GENERATION)?;
    let generation = map.get(&0, 0)?.wrapping_add(STEP);
    // Whoever sees the new number sees what was written before it.
    fence(Ordering::SeqCst);
    map.set(0, generation, 0)
        .context("telling the programs that claims have changed")
}

/// Names the type of maps that are borrowed for writing.
type Writable<'a> = &'a mut MapData;

/// Loads one of the iterating programs.
fn load_iterator(ebpf: &mut Ebpf, name: &str, kernel: &Kernel, over: Hook) -> Result<()> {
    let types = types_of(kernel, over)?;
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
fn prepare_iterator(ebpf: &mut Ebpf, name: &str) -> Result<IterLink> {
    let program = iterator(ebpf, name)?;
    let link = program
        .attach()
        .with_context(|| format!("preparing program {name}"))?;
    Ok(program.take_link(link)?)
}

fn iterator<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Iter> {
    Ok(ebpf
        .program_mut(name)
        .with_context(|| format!("the BPF object has no program {name}"))?
        .try_into()?)
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
            Err(error) => return Err(Error::new(error).context("reading the iterator")),
        }
    }
}

/// A program that the kernel did not load.
fn refused(name: &str, error: ProgramError) -> Error {
    let what = format!("the kernel refused program {name}");
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return Error::new(error).context(what);
    };
    match last_words(&verifier_log.to_string()) {
        // It was not about what the program does.
        None => Error::new(io_error).context(what),
        Some(words) => anyhow!("{io_error}; the verifier's last words:\n  {words}").context(what),
    }
}

/// The end of the verifier's log, which can be thousands of lines: what matters
/// stands there. None where it said nothing.
fn last_words(log: &str) -> Option<String> {
    const LINES: usize = 20;
    let lines: Vec<_> = log.lines().filter(|line| !line.is_empty()).collect();
    let first = lines.len().saturating_sub(LINES);
    let words = lines.get(first..)?.join("\n  ");
    (!words.is_empty()).then_some(words)
}
