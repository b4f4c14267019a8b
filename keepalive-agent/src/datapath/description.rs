//! Description and state: what a policy set says of itself, and what its agent
//! says of itself. Both are documents in maps that the set's program keeps alive,
//! so they are there for as long as the set is in force, whatever became of the
//! agent.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use aya::maps::{Array, Map, MapData};
use aya_obj::generated::bpf_map_type;
use keepalive_common::{counters::Counters, dead_peer::DeadPeers};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    Error,
    fault::{self, Operation},
    table,
};
use crate::{
    config::{Config, Values},
    hierarchy::Cgroup,
};

/// Changes with whatever an agent of another build would misunderstand: the
/// records of the maps that sets hand on, and these documents.
pub(super) const SCHEMA: u32 = 7;

/// Name of the map of the description. The kernel keeps 15 bytes of a name.
pub(super) const DESCRIPTION: &str = "keepalive_set";

/// Name of the map of the changes.
pub(super) const CHANGES: &str = "keepalive_new";

/// Name of the map of the state.
pub(super) const STATE: &str = "keepalive_state";

/// Name of the map of what users were given.
pub(super) const GRANTS: &str = "keepalive_exec";

/// Documents are cut into pieces of a page.
const PIECE: usize = 4096;
pub(super) type Piece = [u8; PIECE];

/// Pieces that are written by one call. Between two of them an agent may be killed.
const AT_ONCE: usize = 16;

/// The first piece begins with the length of the document and a checksum.
const HEADER: usize = 8;

/// What every schema has, to be read before the rest is understood.
#[derive(Debug, Deserialize)]
pub(super) struct Preamble {
    pub(super) schema: u32,
    pub(super) version: String,
}

/// Whose counters are in which slot of a set.
pub(super) type Slots = Arc<[(u32, Counted)]>;

/// What a policy set is. Written before the set is put in force; what changes after that
/// is written anew, or beside it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Description {
    /// How to understand it and the maps.
    pub schema: u32,
    /// Version of the agent that built it.
    pub version: String,
    /// Where it is attached.
    pub root: Cgroup,
    /// What it enforces.
    pub config: Arc<Config>,
    /// The files that say so.
    pub origin: Origin,
    /// What connections may still have values of, until every one has been brought
    /// along. Not always what the set before enforced: that may have been cut off
    /// before it came so far.
    pub before: Option<Arc<Config>>,
    /// How often this has been written.
    pub(super) written: u64,
    /// When it was built, in seconds since 1970.
    pub built_at: u64,
    /// Since when sets of this row have been in force without a gap, in seconds
    /// since 1970.
    pub enforced_since: u64,
    /// Whose counters are in which slot.
    pub(super) slots: Slots,
    /// Maps of the set that others need.
    pub(super) maps: MapIds,
    /// The set before, whose counters are not final when this one is built.
    pub(super) previous: Option<Previous>,
    /// What was counted by the sets before that one.
    pub(super) done: Arc<[(Counted, Done)]>,
    /// What the kernel refused to those.
    pub(super) refusals: Vec<Refusals>,
}

/// What is different from what a description says, where that is values of policies
/// only: they change more often than anything else, and a description can be of many
/// megabytes.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct Changes {
    /// The description: [`Description::written`]. Those of an earlier one are part of it.
    pub(super) of: u64,
    /// Instead of its origin.
    pub(super) origin: Origin,
    /// Policies that are others than in its config.
    pub(super) now: Values,
    /// The same of what connections may still have values of.
    pub(super) before: Values,
}

/// Ids of maps that outlive the agent.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(super) struct MapIds {
    pub(super) counters: u32,
    pub(super) swept: u32,
    pub(super) failures: u32,
    pub(super) dead_peers: u32,
    pub(super) deaths: u32,
    pub(super) followed: u32,
    pub(super) originals: u32,
    pub(super) counted: u32,
    pub(super) state: u32,
    pub(super) changes: u32,
    /// None where users are given nothing.
    #[serde(default)]
    pub(super) grants: Option<u32>,
}

/// What is left of the set before.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Previous {
    pub(super) maps: MapIds,
    pub(super) slots: Slots,
}

/// The files that a config comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Origin {
    /// None where the built-in policy stands in for it.
    pub main: Option<PathBuf>,
    /// The drop-ins, in the order in which they override.
    pub drop_ins: Vec<PathBuf>,
}

/// Whose deeds are counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub struct Counted {
    /// Name of the policy.
    pub name: String,
    /// Whether it did them, or would have, were it not in dry run.
    pub enforced: bool,
}

/// What a policy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Done {
    /// To connections when they were established.
    pub established: Counters,
    /// To connections that were there already.
    pub existing: Counters,
    /// Peers of both that were found dead.
    #[serde(default, skip_serializing_if = "DeadPeers::is_empty")]
    pub dead_peers: DeadPeers,
}

impl Done {
    /// Adds what another set counted.
    pub fn add(&mut self, other: &Self) {
        self.established.add(&other.established);
        self.existing.add(&other.existing);
        self.dead_peers.add(&other.dead_peers);
    }
}

/// An option that the kernel refused, and how often.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Refusals {
    /// Name of the policy.
    pub policy: String,
    /// The option as the kernel's headers name it.
    pub option: String,
    /// The kernel's error number, positive.
    pub errno: u32,
    /// Number of refused calls.
    pub count: u64,
}

impl std::fmt::Display for Refusals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let errno = i32::try_from(self.errno).unwrap_or(0);
        write!(
            f,
            "policy {}: the kernel refused {} {} times: {}",
            self.policy,
            self.option,
            self.count,
            std::io::Error::from_raw_os_error(errno)
        )
    }
}

/// Adds to the refusals of the same policy and cause.
pub(super) fn add_refusals(all: &mut Vec<Refusals>, more: Refusals) {
    let same = all.iter_mut().find(|known| {
        (&known.policy, &known.option, known.errno) == (&more.policy, &more.option, more.errno)
    });
    match same {
        Some(known) => known.count += more.count,
        None => all.push(more),
    }
}

/// What the agent says of itself. Written whenever it changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct State {
    /// The agent; none after it has left.
    pub owner: Option<Owner>,
    /// Where enforcement is pinned; none where it ends with the agent.
    pub pins: Option<PathBuf>,
    /// Whether every existing connection has been brought along since the set
    /// came into force: what is left of the set before is not needed any more.
    pub settled: bool,
    /// How far bringing existing connections along has come.
    pub sweep: Sweep,
    /// The last time that the config was read, after the start.
    pub reload: Option<Reload>,
    /// How often since the agent runs.
    #[serde(default)]
    pub totals: Totals,
    /// What the agent consists of, and how each part fares.
    pub parts: BTreeMap<String, Part>,
}

/// A running agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Owner {
    /// Its process id, in its own pid namespace.
    pub pid: u32,
    /// When it started, in clock ticks since boot (/proc/PID/stat): ids are used
    /// again.
    pub started: u64,
}

impl State {
    /// The same with texts of so many characters at the most.
    pub(super) fn shortened(&self, characters: usize) -> Self {
        let mut state = self.clone();
        let reasons = state.parts.values_mut().map(|part| &mut part.reason);
        let reload = state.reload.iter_mut().map(|reload| &mut reload.error);
        for text in reasons.chain(reload).flatten() {
            if let Some((end, _)) = text.char_indices().nth(characters) {
                text.truncate(end);
            }
        }
        state
    }
}

/// How far a sweep has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Sweep {
    /// Whether one is under way.
    pub under_way: bool,
    /// Connections that were looked at by the last one.
    pub connections: u64,
    /// Network namespaces that they are in.
    pub namespaces: u64,
    /// Connections that a change is still waiting for.
    pub waiting: u64,
    /// Namespaces that could not be swept.
    pub missed: u64,
}

/// What an agent has done so far, and how often in vain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Totals {
    /// Sweeps whose first pass has met every connection that it could.
    pub sweeps: u64,
    /// Sweeps that could not begin, or broke off.
    pub sweeps_failed: u64,
    /// Configs that were read after the start and put in force.
    pub reloads: u64,
    /// Configs that were read after the start and not taken.
    pub reloads_failed: u64,
}

/// A reading of the config.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Reload {
    /// When, in seconds since 1970.
    pub at: u64,
    /// What was wrong with it, so that the policy before it went on.
    pub error: Option<String>,
}

/// A part of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Part {
    /// How it fares.
    pub status: PartStatus,
    /// Why, where it is not active.
    pub reason: Option<String>,
}

/// How a part of the agent fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PartStatus {
    /// It does what it is for.
    Active,
    /// Nothing needs it.
    Disabled,
    /// It does not work.
    Failed,
}

/// Seconds since 1970.
#[must_use]
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A map that somebody else keeps alive or is handed on.
#[derive(Debug)]
pub(super) struct MapHandle {
    pub(super) fd: OwnedFd,
    pub(super) id: u32,
}

impl MapHandle {
    pub(super) fn of(map: &MapData) -> Result<Self, Error> {
        const LOOKING: &str = "looking at a map";
        let id = map.info().map_err(Error::map(LOOKING))?.id();
        let fd = map.fd().as_fd().try_clone_to_owned();
        Ok(Self {
            fd: fd.map_err(Error::call(LOOKING))?,
            id,
        })
    }
}

/// A document in a map. One that may be written again has two copies there, of
/// which one is whole at every moment, whenever its agent is killed.
pub(super) struct Document {
    pieces: Array<MapData, Piece>,
    pub(super) handle: MapHandle,
}

/// How many pieces a document of so many bytes takes.
fn pieces_of(bytes: usize) -> u32 {
    u32::try_from((bytes + HEADER).div_ceil(PIECE)).unwrap_or(u32::MAX)
}

impl Document {
    /// Makes the map for one of this many bytes.
    pub(super) fn create(name: &'static str, bytes: usize) -> Result<Self, Error> {
        Self::create_of(name, pieces_of(bytes))
    }

    /// Makes the map for two copies of one of this many bytes.
    pub(super) fn create_twice(name: &'static str, bytes: usize) -> Result<Self, Error> {
        Self::create_of(name, pieces_of(bytes).saturating_mul(2))
    }

    fn create_of(name: &'static str, pieces: u32) -> Result<Self, Error> {
        fault::point(Operation::CreateMaps).map_err(Error::call("creating a map"))?;
        let shape = aya_obj::Map::new_from_params(
            bpf_map_type::BPF_MAP_TYPE_ARRAY as u32,
            4,
            4096,
            pieces,
            0,
        );
        let data = MapData::create(shape, name, None)
            .map_err(Error::map(format!("creating map {name}")))?;
        Self::open(data)
    }

    /// The document in a map that exists.
    pub(super) fn open(map: MapData) -> Result<Self, Error> {
        let handle = MapHandle::of(&map)?;
        let pieces = Map::Array(map)
            .try_into()
            .map_err(Error::map("using the map of a document"))?;
        Ok(Self { pieces, handle })
    }

    /// Writes the document. One that is longer than the map is an error.
    pub(super) fn write(&mut self, document: &impl Serialize) -> Result<(), Error> {
        self.write_text(&text(document)?)
    }

    /// The same for its text.
    pub(super) fn write_text(&mut self, text: &[u8]) -> Result<(), Error> {
        self.write_at(0, self.pieces.len(), text)
    }

    /// Writes the document anew where another process may read it, or this one may
    /// be killed: of a map that [`Self::create_twice`] made.
    pub(super) fn write_again(&mut self, document: &impl Serialize) -> Result<(), Error> {
        self.write_text_again(&text(document)?)
    }

    /// The same for its text.
    pub(super) fn write_text_again(&mut self, text: &[u8]) -> Result<(), Error> {
        let half = self.pieces.len() / 2;
        self.write_at(half, half, text)?;
        self.write_at(0, half, text)
    }

    fn write_at(&mut self, first: u32, pieces: u32, text: &[u8]) -> Result<(), Error> {
        const WRITING: &str = "writing what the policy set says of itself";
        let room = (pieces as usize * PIECE).saturating_sub(HEADER);
        if text.len() > room {
            return Err(Error::TooMany {
                what: "bytes of state",
                count: text.len(),
                limit: u32::try_from(room).unwrap_or(u32::MAX),
            });
        }
        let bytes = [&header(text), text].concat();
        let pieces = bytes.chunks(PIECE).map(|part| {
            let mut piece = [0; PIECE];
            for (to, from) in piece.iter_mut().zip(part) {
                *to = *from;
            }
            piece
        });
        let pieces: Vec<(u32, Piece)> = (first..).zip(pieces).collect();
        for pieces in pieces.chunks(AT_ONCE) {
            fault::point(Operation::WriteMap).map_err(Error::call(WRITING))?;
            table::write(self.handle.fd.as_fd(), pieces.iter().copied())
                .map_err(Error::call(WRITING))?;
        }
        Ok(())
    }

    /// Reads the document.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, Error> {
        /// A writer may be half-way through a document that changes.
        const TRIES: usize = 10;
        let mut wrong = String::new();
        let half = self.pieces.len() / 2;
        for first in [0, half].into_iter().cycle().take(TRIES) {
            let bytes = self.bytes(first)?;
            let (found, text) = bytes.split_at(HEADER.min(bytes.len()));
            if found != header(text) {
                "it is being written".clone_into(&mut wrong);
                continue;
            }
            match serde_json::from_slice(text) {
                Ok(document) => return Ok(document),
                Err(error) => wrong = error.to_string(),
            }
        }
        Err(Error::Description(wrong))
    }

    /// Header and text, from a piece on.
    fn bytes(&self, first: u32) -> Result<Vec<u8>, Error> {
        const READING: &str = "reading what the policy set says of itself";
        let mut bytes = Vec::new();
        for index in first..self.pieces.len() {
            let piece = self.pieces.get(&index, 0).map_err(Error::map(READING))?;
            bytes.extend(piece);
            let length = bytes.first_chunk().copied().map_or(0, u32::from_le_bytes);
            let end = HEADER.saturating_add(length as usize);
            if bytes.len() >= end {
                bytes.truncate(end);
                break;
            }
        }
        Ok(bytes)
    }
}

/// A document as it is written.
pub(super) fn text(document: &impl Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(document).map_err(|error| Error::Description(error.to_string()))
}

/// The length of a text and a checksum (FNV-1a): a document is longer than what
/// the kernel copies at once.
fn header(text: &[u8]) -> [u8; HEADER] {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    let sum = text.iter().fold(0x811c_9dc5_u32, |sum, byte| {
        (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    let mut header = [0; HEADER];
    let bytes = length.to_le_bytes().into_iter().chain(sum.to_le_bytes());
    for (to, from) in header.iter_mut().zip(bytes) {
        *to = from;
    }
    header
}
