//! Set record: a policy set in the kernel as anybody can read it, whether its
//! agent runs or not.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    maps::{Map, MapData, PerCpuArray, PerCpuHashMap},
    util::nr_cpus,
};
use keepalive_common::{
    counters::{Counters, Failure, FailureKey, SocketOption},
    dead_peer::DeadPeers,
    policy::Policy,
    slot::UNCLAIMED,
};
use tracing::debug;

use super::{
    Error,
    description::{
        Changes, Counted, DESCRIPTION, Description, Document, Done, MapHandle, MapIds, Origin,
        Preamble, Refusals, SCHEMA, Slots, State, add_refusals,
    },
    map, syscalls,
    table::each_in_array,
};
use crate::{
    assignment,
    config::{Config, Values},
    grant::Grant,
    hierarchy::Cgroup,
};

/// A policy set in the kernel: what it says of itself, and what it counts.
pub struct SetRecord {
    /// Where it is attached.
    pub root: Cgroup,
    described: Mutex<Described>,
    state: Mutex<Document>,
    grants: Option<Mutex<Document>>,
    pub(super) own: Arc<CounterMaps>,
    pub(super) previous: Option<Arc<CounterMaps>>,
    pub(super) beside_sockets: BesideSockets,
}

/// What a set says of itself, and where it says so.
pub(super) struct Described {
    description: Arc<Description>,
    document: Document,
    /// What is different from what stands there.
    changes: Document,
    /// The config that stands there.
    written: Arc<Config>,
    /// What stands in the changes for now.
    values: Values,
}

impl Described {
    /// By a description that has just been written, and the documents of that and of its
    /// changes.
    pub(super) fn new(
        description: Description,
        document: Document,
        mut changes: Document,
    ) -> Result<Self, Error> {
        changes.write_again(&Changes::default())?;
        Ok(Self {
            written: description.config.clone(),
            values: Values::new(),
            description: Arc::new(description),
            document,
            changes,
        })
    }

    fn read(document: Document) -> Result<Self, Error> {
        /// The agent may be writing both.
        const TRIES: usize = 10;
        for _ in 0..TRIES {
            let preamble: Preamble = document.read()?;
            if preamble.schema != SCHEMA {
                return Err(Error::UnknownSchema {
                    schema: preamble.schema,
                    version: preamble.version,
                });
            }
            let mut description: Description = document.read()?;
            let changes = Document::open(by_id(description.maps.changes)?)?;
            let found: Changes = changes.read()?;
            if found.of > description.written {
                continue;
            }
            let written = description.config.clone();
            let mut values = Values::new();
            if found.of == description.written {
                description.config = written.with_values(&found.now).into();
                description.before = Some(written.with_values(&found.before).into());
                description.origin = found.origin;
                values = found.now;
            }
            return Ok(Self {
                description: Arc::new(description),
                document,
                changes,
                written,
                values,
            });
        }
        Err(Error::Description("it is being written".to_owned()))
    }
}

/// The maps of what programs keep beside sockets, which sets hand on.
pub(super) struct BesideSockets {
    /// What applications had set.
    pub(super) originals: MapHandle,
    /// Which connections have been counted as dead.
    pub(super) counted: MapHandle,
}

impl BesideSockets {
    /// To be used by the programs of another set.
    pub(super) fn shared(&self) -> [(&'static str, BorrowedFd<'_>); 2] {
        [
            (map::ORIGINALS, self.originals.fd.as_fd()),
            (map::COUNTED, self.counted.fd.as_fd()),
        ]
    }
}

/// What policies did, and what the kernel refused.
type Totals = (Vec<(Counted, Done)>, Vec<Refusals>);

/// What one set counts.
pub(super) struct CounterMaps {
    pub(super) swept: PerCpuArray<MapData, Counters>,
    pub(super) failures: PerCpuHashMap<MapData, FailureKey, Failure>,
    /// Descriptors, to keep the maps alive by the program of another set.
    pub(super) handles: [MapHandle; 4],
    pub(super) slots: Slots,
}

impl CounterMaps {
    pub(super) fn new(
        counters: &Map,
        swept: Map,
        failures: Map,
        dead_peers: &Map,
        slots: Slots,
    ) -> Result<Self, Error> {
        let handles = [
            MapHandle::of(data(counters)?)?,
            MapHandle::of(data(&swept)?)?,
            MapHandle::of(data(&failures)?)?,
            MapHandle::of(data(dead_peers)?)?,
        ];
        let using = || Error::map("using a map of counters");
        Ok(Self {
            swept: swept.try_into().map_err(using())?,
            failures: failures.try_into().map_err(using())?,
            handles,
            slots,
        })
    }

    fn open(ids: &MapIds, slots: Slots) -> Result<Self, Error> {
        Self::new(
            &Map::PerCpuArray(by_id(ids.counters)?),
            Map::PerCpuArray(by_id(ids.swept)?),
            Map::PerCpuHashMap(by_id(ids.failures)?),
            &Map::Array(by_id(ids.dead_peers)?),
            slots,
        )
    }

    /// What each policy did under this set.
    fn done(&self) -> Result<Vec<(Counted, Done)>, Error> {
        const READING: &str = "reading the counters";
        let [counters, swept, _, dead_peers] = &self.handles;
        let cpus = nr_cpus().map_err(|(_, error)| Error::call(READING)(error))?;
        let own = self.slots.iter();
        let mut done: Vec<_> = own
            .map(|(_, whose)| (whose.clone(), Done::default()))
            .collect();
        let mut unclaimed = Done::default();
        let slots = self.slots.iter().map(|(slot, _)| *slot);
        let mut by_slot: HashMap<u32, &mut Done> = slots
            .zip(done.iter_mut().map(|(_, done)| done))
            .chain([(UNCLAIMED, &mut unclaimed)])
            .collect();
        let mut add = |map: &MapHandle, of: fn(&mut Done) -> &mut Counters| {
            each_in_array(map.fd.as_fd(), cpus, |slot, of_cpus: &[Counters]| {
                if let Some(done) = by_slot.get_mut(&slot) {
                    for of_cpu in of_cpus {
                        of(done).add(of_cpu);
                    }
                }
            })
        };
        add(counters, |done| &mut done.established).map_err(Error::call(READING))?;
        add(swept, |done| &mut done.existing).map_err(Error::call(READING))?;
        each_in_array(dead_peers.fd.as_fd(), 1, |slot, found: &[DeadPeers]| {
            if let (Some(done), [found]) = (by_slot.get_mut(&slot), found) {
                done.dead_peers = *found;
            }
        })
        .map_err(Error::call(READING))?;
        if unclaimed.established.seen() > 0 || !unclaimed.dead_peers.is_empty() {
            let whose = Counted {
                name: assignment::UNCLAIMED.to_owned(),
                enforced: true,
            };
            done.push((whose, unclaimed));
        }
        Ok(done)
    }

    fn refusals(&self) -> Result<Vec<Refusals>, Error> {
        const READING: &str = "reading what the kernel refused";
        let mut refusals = Vec::new();
        for entry in &self.failures {
            let (key, of_cpus) = entry.map_err(Error::map(READING))?;
            let whose = self.slots.iter().find(|(slot, _)| *slot == key.slot);
            let name = whose.map_or(assignment::UNCLAIMED, |(_, counted)| &counted.name);
            let more = Refusals {
                policy: name.to_owned(),
                option: SocketOption::from_number(key.option)
                    .map_or("unknown", SocketOption::name)
                    .to_owned(),
                errno: key.errno,
                count: of_cpus.iter().map(|failure| failure.count).sum(),
            };
            add_refusals(&mut refusals, more);
        }
        Ok(refusals)
    }
}

/// A slot's counters, all CPUs together.
fn sum(counters: &PerCpuArray<MapData, Counters>, slot: u32) -> Result<Counters, Error> {
    let mut sum = Counters::default();
    let of_cpus = counters
        .get(&slot, 0)
        .map_err(Error::map("reading the counters"))?;
    for of_cpu in of_cpus.iter() {
        sum.add(of_cpu);
    }
    Ok(sum)
}

pub(super) fn by_id(id: u32) -> Result<MapData, Error> {
    MapData::from_id(id).map_err(Error::map(format!("opening map {id}")))
}

/// What a map is, whatever its type.
pub(super) fn data(map: &Map) -> Result<&MapData, Error> {
    match map {
        Map::Array(data)
        | Map::PerCpuArray(data)
        | Map::HashMap(data)
        | Map::PerCpuHashMap(data)
        | Map::LpmTrie(data)
        | Map::RingBuf(data)
        | Map::SkStorage(data) => Ok(data),
        _ => Err(Error::Description("a map is of an unknown type".to_owned())),
    }
}

impl std::fmt::Debug for SetRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SetRecord")
            .field("description", &self.description())
            .finish_non_exhaustive()
    }
}

impl SetRecord {
    /// For a set that has just been built.
    pub(super) fn new(
        described: Described,
        state: Document,
        grants: Option<Document>,
        own: CounterMaps,
        previous: Option<Arc<CounterMaps>>,
        beside_sockets: BesideSockets,
    ) -> Self {
        Self {
            root: described.description.root.clone(),
            described: Mutex::new(described),
            state: Mutex::new(state),
            grants: grants.map(Mutex::new),
            own: Arc::new(own),
            previous,
            beside_sockets,
        }
    }

    /// The set that a program belongs to; none where it is not one of ours.
    ///
    /// # Errors
    ///
    /// When it is ours but of a schema that this build does not know, or the
    /// process may not open maps by their ids (CAP_SYS_ADMIN).
    pub(super) fn of_program(program: BorrowedFd<'_>) -> Result<Option<Self>, Error> {
        let Some(document) = document_of(program)? else {
            return Ok(None);
        };
        let described = Described::read(document)?;
        let description = described.description.clone();
        let own = CounterMaps::open(&description.maps, description.slots.clone())?;
        let previous = match &description.previous {
            Some(previous) => Some(CounterMaps::open(&previous.maps, previous.slots.clone())?),
            None => None,
        };
        let grants = match description.maps.grants {
            Some(id) => Some(Mutex::new(Document::open(by_id(id)?)?)),
            None => None,
        };
        Ok(Some(Self {
            grants,
            state: Mutex::new(Document::open(by_id(description.maps.state)?)?),
            beside_sockets: BesideSockets {
                originals: MapHandle::of(&by_id(description.maps.originals)?)?,
                counted: MapHandle::of(&by_id(description.maps.counted)?)?,
            },
            root: description.root.clone(),
            described: Mutex::new(described),
            own: Arc::new(own),
            previous: previous.map(Arc::new),
        }))
    }

    fn described(&self) -> MutexGuard<'_, Described> {
        // What it holds is whole at any time.
        self.described
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What the set is.
    #[must_use]
    pub fn description(&self) -> Arc<Description> {
        self.described().description.clone()
    }

    /// What was done to existing connections that no policy of the set claims:
    /// they got back what their applications had set.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn restored(&self) -> Result<Counters, Error> {
        sum(&self.own.swept, UNCLAIMED)
    }

    /// What each policy did so far: the ones in force first, then earlier ones.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn done(&self) -> Result<Vec<(Counted, Done)>, Error> {
        let mut order: Vec<Counted> = Vec::new();
        let mut totals: BTreeMap<Counted, Done> = BTreeMap::new();
        let description = self.description();
        let mut current = self.own.done()?;
        let counted: BTreeSet<_> = current.iter().map(|(whose, _)| whose).collect();
        let in_force: Vec<_> = description
            .config_names()
            .filter(|whose| counted.contains(whose))
            .collect();
        let mut listed: BTreeSet<_> = in_force.iter().cloned().collect();
        order.extend(in_force.iter().cloned());
        current.extend(match &self.previous {
            Some(previous) => previous.done()?,
            None => Vec::new(),
        });
        current.extend(description.done.iter().cloned());
        for (whose, done) in current {
            let is_empty = (done.established.seen(), done.existing.seen()) == (0, 0);
            if !is_empty && listed.insert(whose.clone()) {
                order.push(whose.clone());
            }
            totals.entry(whose).or_default().add(&done);
        }
        Ok(order
            .into_iter()
            .filter_map(|whose| totals.remove_entry(&whose))
            .collect())
    }

    /// What the sets before the one that is going to follow have counted, once
    /// their counters are final.
    pub(super) fn final_done(&self) -> Result<Totals, Error> {
        let description = self.description();
        let mut totals: BTreeMap<Counted, Done> = description.done.iter().cloned().collect();
        let mut refusals = description.refusals.clone();
        if let Some(previous) = &self.previous {
            for (whose, done) in previous.done()? {
                if done != Done::default() {
                    totals.entry(whose).or_default().add(&done);
                }
            }
            for more in previous.refusals()? {
                add_refusals(&mut refusals, more);
            }
        }
        Ok((totals.into_iter().collect(), refusals))
    }

    /// Refused options by policy and cause.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn refusals(&self) -> Result<Vec<Refusals>, Error> {
        let mut refusals = self.description().refusals.clone();
        let maps = [Some(&self.own), self.previous.as_ref()];
        for maps in maps.into_iter().flatten() {
            for more in maps.refusals()? {
                add_refusals(&mut refusals, more);
            }
        }
        Ok(refusals)
    }

    /// Dead peers that the set has counted and of which nobody will be told more.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn dead_peers_lost(&self) -> Result<u64, Error> {
        let done = self.own.done()?;
        Ok(done
            .iter()
            .map(|(_, done)| done.dead_peers.events_lost)
            .sum())
    }

    /// What the agent says of itself.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn state(&self) -> Result<State, Error> {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read()
    }

    /// Says something else. Long texts are cut off where there is no room for them.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn set_state(&self, state: &State) -> Result<(), Error> {
        let mut document = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut written = Ok(());
        for characters in [1000, 300, 100, 30, 0] {
            written = document.write(&state.shortened(characters));
            if !matches!(written, Err(Error::TooMany { .. })) {
                break;
            }
        }
        written
    }

    /// What users were given for commands of their own. None where that cannot be
    /// read: an agent may have been killed while it wrote.
    #[must_use]
    pub fn grants(&self) -> Vec<Grant> {
        let Some(document) = &self.grants else {
            return Vec::new();
        };
        let document = document.lock().unwrap_or_else(PoisonError::into_inner);
        document.read().unwrap_or_else(|error| {
            debug!("what users were given: {error}");
            Vec::new()
        })
    }

    /// Says what users are given.
    ///
    /// # Errors
    ///
    /// When there is no room for it, or it cannot be written.
    pub fn set_grants(&self, grants: &[Grant]) -> Result<(), Error> {
        let Some(document) = &self.grants else {
            return Ok(());
        };
        let mut document = document.lock().unwrap_or_else(PoisonError::into_inner);
        document.write(&grants)
    }

    /// The descriptors of the maps that a program has to keep alive for those who
    /// read this record.
    pub(super) fn handles(&self) -> Vec<&OwnedFd> {
        let own = self.own.handles.iter();
        let previous = self.previous.iter().flat_map(|maps| maps.handles.iter());
        let all = own.chain(previous).chain([&self.beside_sockets.counted]);
        all.map(|handle| &handle.fd).collect()
    }

    /// Says that another config is in force, which differs in nothing that stands in
    /// the kernel but here; where `before` is given also that connections may still
    /// have values of that.
    ///
    /// # Errors
    ///
    /// When there is no room for it, or it cannot be written.
    pub fn say_config(
        &self,
        config: &Arc<Config>,
        origin: &Origin,
        before: Option<&Arc<Config>>,
    ) -> Result<(), Error> {
        let described = &mut *self.described();
        let known = &described.description;
        let description = Description {
            config: config.clone(),
            origin: origin.clone(),
            before: before.or(known.before.as_ref()).cloned(),
            written: known.written + 1,
            ..Description::clone(known)
        };
        described.document.write_again(&description)?;
        described.written = config.clone();
        described.values = Values::new();
        described.description = Arc::new(description);
        Ok(())
    }

    /// The same for a config that has these other values for some of the policies, in a
    /// few bytes, and has them be in force. Where that fails it is taken back.
    ///
    /// # Errors
    ///
    /// When too many policies have changed since the description was written, it cannot
    /// be written, or the change fails.
    pub fn say_values(
        &self,
        config: &Arc<Config>,
        origin: &Origin,
        values: &[(usize, Policy)],
        change: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let described = &mut *self.described();
        let known = &described.description;
        let before = &described.values;
        let now: BTreeMap<_, _> = before.iter().chain(values).copied().collect();
        let changes = |origin: &Origin, now| Changes {
            of: known.written,
            origin: origin.clone(),
            now,
            before: before.clone(),
        };
        let now: Values = now.into_iter().collect();
        described
            .changes
            .write_again(&changes(origin, now.clone()))?;
        if let Err(error) = change() {
            let again = changes(&known.origin, before.clone());
            if let Err(error) = described.changes.write_again(&again) {
                debug!("{error}");
            }
            return Err(error);
        }
        let description = Description {
            config: config.clone(),
            origin: origin.clone(),
            before: Some(known.config.clone()),
            ..Description::clone(known)
        };
        described.values = now;
        described.description = Arc::new(description);
        Ok(())
    }

    /// The same for documents.
    pub(super) fn bind_documents(&self, program: BorrowedFd<'_>) -> std::io::Result<()> {
        let described = self.described();
        for document in [&described.document, &described.changes] {
            syscalls::bind_map(program, document.handle.fd.as_fd())?;
        }
        drop(described);
        for document in [Some(&self.state), self.grants.as_ref()]
            .into_iter()
            .flatten()
        {
            let document = document.lock().unwrap_or_else(PoisonError::into_inner);
            syscalls::bind_map(program, document.handle.fd.as_fd())?;
        }
        Ok(())
    }

    pub(super) fn state_id(&self) -> u32 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.handle.id
    }
}

/// The description that a program keeps alive.
fn document_of(program: BorrowedFd<'_>) -> Result<Option<Document>, Error> {
    let info = syscalls::program_info(program).map_err(Error::call("looking at a program"))?;
    for id in info.maps {
        let map = by_id(id)?;
        let info = map.info().map_err(Error::map("looking at a map"))?;
        if info.name_as_str() == Some(DESCRIPTION) {
            return Document::open(map).map(Some);
        }
    }
    Ok(None)
}

impl Description {
    /// The policies of the config, as they are counted.
    fn config_names(&self) -> impl Iterator<Item = Counted> {
        let default = self.config.default.iter().map(|policy| Counted {
            name: assignment::DEFAULT.to_owned(),
            enforced: policy.is_enforced(),
        });
        let named = self.config.policies.iter().map(|named| Counted {
            name: named.name.clone(),
            enforced: named.policy.is_enforced(),
        });
        default.chain(named)
    }
}
