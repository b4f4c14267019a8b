//! Loaded set: a policy set in the kernel, built whole before anything goes by it.
//!
//! Its programs and maps are its own; only what must outlive it is shared with
//! the set before: the originals, and the counters for as long as they still
//! count. Dropping a set that was not put in force leaves nothing behind.

use std::{
    fs::File,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use aya::{
    Pod,
    maps::{Array, MapData, lpm_trie::Key},
};
use aya_log::EbpfLogger;
use keepalive_common::{
    policy::Policy,
    policy_record::{Edition, PolicyRecord},
    slot::{Claim, Found, PortKey, RemoteKey, Step, UNCLAIMED},
    sweep::Pass,
};

use super::{
    DeadPeers, Error,
    bounds::BoundsProgram,
    death_watch::DeathWatch,
    description::{
        self, CHANGES, Counted, Description, Document, GRANTS, MapHandle, MapIds, Origin, Previous,
        SCHEMA, STATE, State, now,
    },
    fault::{self, Operation},
    map,
    object::{LoadedObject, Maps, Purpose},
    program,
    set_record::{BesideSockets, CounterMaps, Described, SetRecord, data},
    sweeper::Sweeper,
    syscalls,
    table::Table,
};
use crate::{
    VERSION,
    assignment::{Assignment, GRANTED},
    config::{Config, SelfService},
    grant::Grant,
    hierarchy::Cgroup,
    kernel::layout::{Hook, Kernel},
    policy_set::{CountedPolicy, Mark, PolicySet, Rewritten, Sizes},
};

/// Everything that a set is built from.
pub struct Blueprint<'a> {
    /// The running kernel.
    pub kernel: &'a Kernel,
    /// The cgroup to attach to.
    pub root: &'a Cgroup,
    /// What is to be enforced.
    pub config: &'a Arc<Config>,
    /// The files that say so.
    pub origin: &'a Origin,
    /// The same, for the cgroups that exist.
    pub assignment: &'a Assignment,
    /// What connections may still have values of.
    pub before: Option<(&'a Arc<Config>, &'a Assignment)>,
    /// Where connections are to be held to bounds when their applications set
    /// options: cgroups and their directories. None where no policy has bounds.
    pub bounded: Option<Vec<(u64, File)>>,
    /// The set in force, whose counters and originals are handed on.
    pub previous: Option<&'a SetRecord>,
}

/// A policy set in the kernel.
pub struct LoadedSet {
    records: PolicySet,
    program: OwnedFd,
    bounds: Option<BoundsProgram>,
    cgroups: Table<u64, Claim>,
    policies: Table<u32, PolicyRecord>,
    steps: Table<u32, Step>,
    remotes: Table<Key<RemoteKey>, Found>,
    ports: Table<Key<PortKey>, Found>,
    /// A global of the programs: what stands there.
    generation: u64,
    generations: Table<u32, u64>,
    /// The slots of which the other edition is something else.
    changed: Vec<u32>,
    /// Other policies, written where they are not in force yet.
    prepared: Vec<(u32, CountedPolicy)>,
    record: Arc<SetRecord>,
    sweeper: Sweeper,
    deaths: Option<DeadPeers>,
    object: Arc<LoadedObject>,
    peer_died: Option<Result<OwnedFd, Error>>,
    /// Id of the program.
    id: u32,
    verified_instructions: Option<u32>,
}

/// How many records the maps of a set have room for: what there is, and some for
/// cgroups that are made later.
#[derive(Clone, Copy, Debug)]
struct Capacity {
    slots: u32,
    steps: u32,
    remotes: u32,
    ports: u32,
    cgroups: u32,
}

/// More than this the kernel's memory should not go into: 64 MiB for the buckets
/// of cgroups, as much again for prefixes.
const MOST: u32 = 1 << 22;

impl Capacity {
    fn of(sizes: &Sizes, self_service: Option<&SelfService>) -> Result<Self, Error> {
        /// Slots for what users ask for: commands may follow each other, and a slot
        /// is not used again.
        const SLOTS_PER_COMMAND: u32 = 4;
        /// Room for cgroups that come later costs 16 bytes each until they do.
        const CGROUPS: u32 = 1 << 15;
        const STEPS: u32 = 1 << 10;
        /// Prefixes are allocated as they come.
        const PREFIXES: u32 = 1 << 20;
        let fit = |what, count: usize, least: u32| {
            let count = u32::try_from(count)
                .ok()
                .filter(|count| *count <= MOST / 2)
                .ok_or(Error::TooMany {
                    what,
                    count,
                    limit: MOST / 2,
                })?;
            Ok::<_, Error>((count * 2).max(least))
        };
        Ok(Self {
            slots: sizes.slots
                + self_service.map_or(0, |service| service.commands * SLOTS_PER_COMMAND),
            steps: fit("cgroups with different rules", sizes.steps as usize, STEPS)?,
            remotes: fit("networks in rules", sizes.remotes, PREFIXES)?,
            ports: fit("ranges of ports in rules", sizes.ports, PREFIXES)?,
            cgroups: fit("cgroups with a policy", sizes.cgroups, CGROUPS)?,
        })
    }
}

/// A prefix of addresses in some rules.
const fn remote_key(rules: u32, address: u128, length: u8) -> Key<RemoteKey> {
    let key = RemoteKey::new(rules, address.to_be_bytes());
    Key::new(RemoteKey::bits(length), key)
}

/// A prefix of ports in some table.
const fn port_key(table: u32, port: u16, length: u8) -> Key<PortKey> {
    Key::new(PortKey::bits(length), PortKey::new(table, port))
}

/// Writes to a map, where tests let it.
fn write<K: Pod, V: Pod>(
    doing: &str,
    what: &'static str,
    table: &Table<K, V>,
    elements: impl IntoIterator<Item = (K, V)>,
) -> Result<(), Error> {
    fault::point(Operation::WriteMap).map_err(Error::call(doing))?;
    table.write(elements).map_err(|error| {
        if matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) {
            let limit = table.capacity();
            Error::Full { what, limit }
        } else {
            Error::call(doing)(error)
        }
    })
}

impl LoadedSet {
    /// Builds a set: its maps filled, its program loaded, its description
    /// written. Nothing goes by it yet.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program or a map, or it does not all fit;
    /// nothing is left then.
    ///
    /// # Minimum kernel version
    ///
    /// 5.15.
    pub fn build(mut blueprint: Blueprint<'_>) -> Result<Self, Error> {
        let records = PolicySet::new(
            blueprint.before.map(|(_, before)| before),
            blueprint.assignment,
        )?;
        let self_service = blueprint.config.self_service.as_ref();
        let capacity = Capacity::of(&records.sizes(), self_service)?;
        let sizes = [
            (map::CGROUPS, capacity.cgroups),
            (map::POLICIES, capacity.slots.saturating_mul(Edition::COUNT)),
            (map::COUNTERS, capacity.slots),
            (map::SWEPT, capacity.slots),
            (map::DEAD_PEERS, capacity.slots),
            (map::STEPS, capacity.steps),
            (map::REMOTES, capacity.remotes),
            (map::PORTS, capacity.ports),
            // The least there can be: nobody reads it here.
            (map::EVENTS, 1),
        ];
        let previous = blueprint.previous;
        // What programs keep beside sockets they keep where those of the set before do.
        let shared = previous.map(|set| set.beside_sockets.shared());
        let maps = Maps {
            sizes: &sizes,
            shared: shared.as_ref().map_or(&[], |shared| shared),
            ..Maps::default()
        };
        let object = Arc::new(LoadedObject::new(blueprint.kernel, maps)?);
        let handle = |name| MapHandle::of(data(&object.map(name)?)?);
        let beside_sockets = BesideSockets {
            originals: handle(map::ORIGINALS)?,
            counted: handle(map::COUNTED)?,
        };
        let program = object.load(program::ESTABLISHED, Purpose::SockOps)?;
        let bounds = match blueprint.bounded.take() {
            Some(cgroups) => Some(BoundsProgram::load(&object, cgroups)?),
            None => None,
        };
        let info = syscalls::program_info(&program)
            .map_err(Error::call("looking at the program for new connections"))?;
        let pass: Array<MapData, Pass> = object.map_as(map::PASS)?;
        let slots = records
            .policies(Mark::START)
            .map(|(slot, counted)| {
                let whose = Counted {
                    name: counted.name.clone(),
                    enforced: counted.policy.is_enforced(),
                };
                (slot, whose)
            })
            // What users ask for later.
            .chain((records.sizes().slots..capacity.slots).map(|slot| {
                let whose = Counted {
                    name: GRANTED.to_owned(),
                    enforced: true,
                };
                (slot, whose)
            }))
            .collect();
        let counters = CounterMaps::new(
            &object.map(map::COUNTERS)?,
            object.map(map::SWEPT)?,
            object.map(map::FAILURES)?,
            &object.map(map::DEAD_PEERS)?,
            slots,
        )?;
        let deaths = DeadPeers::new(
            object.map(map::DEATHS)?,
            object.map(map::FOLLOWED)?,
            counters.slots.clone(),
        )?;
        let mut set = Self {
            records,
            cgroups: Table::new(&object.map(map::CGROUPS)?)?,
            policies: Table::new(&object.map(map::POLICIES)?)?,
            steps: Table::new(&object.map(map::STEPS)?)?,
            remotes: Table::new(&object.map(map::REMOTES)?)?,
            ports: Table::new(&object.map(map::PORTS)?)?,
            generation: 0,
            generations: Table::new(&object.map(map::GENERATION)?)?,
            changed: Vec::new(),
            prepared: Vec::new(),
            record: Arc::new(record(&blueprint, counters, beside_sockets, &deaths)?),
            peer_died: None,
            sweeper: Sweeper::new(object.clone(), pass, previous.is_none()),
            object,
            deaths: Some(deaths),
            program,
            bounds,
            id: info.id,
            verified_instructions: info.verified_instructions,
        };
        set.fill()?;
        set.keep_alive()?;
        Ok(set)
    }

    /// Writes all records.
    fn fill(&mut self) -> Result<(), Error> {
        self.write_policies(
            "writing that no policy claims a connection",
            Edition::BOTH,
            [(UNCLAIMED, Policy::LEAVE)],
        )?;
        self.write_records(Mark::START)?;
        write_claims(&self.cgroups, self.records.claims())
    }

    /// Writes the records since a mark, to which no claim leads yet.
    fn write_records(&self, since: Mark) -> Result<(), Error> {
        const REMOTE: &str = "telling the kernel which remote ends policies are for";
        let policies = self.records.policies(since);
        self.write_policies(
            WRITING_POLICIES,
            Edition::BOTH,
            policies.map(|(slot, counted)| (slot, counted.policy)),
        )?;
        let ports = self.records.ports(since);
        let ports =
            ports.map(|(table, port, length, found)| (port_key(table, port, length), found));
        write(REMOTE, "ranges of ports", &self.ports, ports)?;
        let remotes = self.records.remotes(since);
        let remotes = remotes
            .map(|(rules, address, length, found)| (remote_key(rules, address, length), found));
        write(REMOTE, "networks", &self.remotes, remotes)?;
        let steps = self
            .records
            .steps(since)
            .map(|(number, step)| (number, *step));
        write(REMOTE, "cgroups with different rules", &self.steps, steps)
    }

    fn write_policies<const N: usize>(
        &self,
        doing: &str,
        editions: [Edition; N],
        policies: impl IntoIterator<Item = (u32, Policy)>,
    ) -> Result<(), Error> {
        let records = policies.into_iter().flat_map(|(slot, policy)| {
            let record = PolicyRecord::of(&policy);
            editions.map(|edition| (edition.place(slot), record))
        });
        write(doing, "policies", &self.policies, records)
    }

    /// Lets the program keep alive what the agent and others need beside it.
    fn keep_alive(&self) -> Result<(), Error> {
        const BINDING: &str = "binding maps to the program";
        let program = self.program.as_fd();
        for map in self.record.handles() {
            syscalls::bind_map(program, map).map_err(Error::call(BINDING))?;
        }
        for map in self.deaths.iter().flat_map(DeadPeers::handles) {
            syscalls::bind_map(program, map).map_err(Error::call(BINDING))?;
        }
        self.record
            .bind_documents(program)
            .map_err(Error::call(BINDING))
    }

    /// Gives a cgroup that was made after the set was built what these policies of
    /// the assignment, by index, claim it for; whether it was not known yet.
    ///
    /// # Errors
    ///
    /// When a map takes no more: the cgroup goes by the policy above it, and the
    /// set is as it was. [`Error::is_full`] says that a new set would do.
    pub fn add_cgroup(&mut self, made: &Cgroup, policies: &[usize]) -> Result<bool, Error> {
        let mark = self.records.mark();
        let Some(new) = self.records.claim_for(made, policies)? else {
            return Ok(false);
        };
        let written = self
            .write_records(mark)
            .and_then(|()| write_claims(&self.cgroups, [(made.clone(), new.claim)]));
        if let Err(error) = written {
            self.records.abandon(mark);
            return Err(error);
        }
        self.records.add(&new);
        self.begin_generation()?;
        Ok(true)
    }

    /// Gives a cgroup other policies than it had, or those of the cgroups above it where
    /// there are none; whether anything is different by that.
    ///
    /// # Errors
    ///
    /// As [`Self::add_cgroup`].
    pub fn assign(&mut self, cgroup: &Cgroup, policies: &[usize]) -> Result<bool, Error> {
        if !policies.is_empty() {
            return self.add_cgroup(cgroup, policies);
        }
        if !self.records.has_claim_of(cgroup) {
            return Ok(false);
        }
        self.records.withdraw(cgroup);
        self.write_claim_of(cgroup)?;
        self.begin_generation()?;
        Ok(true)
    }

    /// The same for a set by which nothing goes yet, of a cgroup that came or was renamed
    /// while it was built, and was claimed by other policies of the assignment before.
    ///
    /// # Errors
    ///
    /// When a map takes no more.
    pub fn assign_late(
        &mut self,
        cgroup: &Cgroup,
        before: &[usize],
        now: &[usize],
    ) -> Result<(), Error> {
        let mark = self.records.mark();
        self.records.claimed_before(cgroup, before)?;
        if now.is_empty() {
            self.records.withdraw(cgroup);
        } else if let Some(new) = self.records.claim_for(cgroup, now)? {
            self.records.add(&new);
        }
        self.write_records(mark)?;
        self.write_claim_of(cgroup)
    }

    /// Writes what is known of a cgroup.
    fn write_claim_of(&mut self, cgroup: &Cgroup) -> Result<(), Error> {
        if !self.records.has_claim_of(cgroup) {
            return self.forget(cgroup.id, "forgetting policies of cgroups");
        }
        let claim = self.records.claim(&cgroup.path);
        write_claims(&self.cgroups, [(cgroup.clone(), claim)])
    }

    /// Says that every connection has been brought along: from here on what a claim
    /// or a policy was before is what it is. Not before every program has ended that
    /// was running when the policies changed: after a pass of the sweep.
    ///
    /// # Errors
    ///
    /// When the map cannot be written. What it says of connections that have been
    /// brought along is wrong then only where an application sets just what an
    /// earlier policy gave.
    pub fn settle(&mut self) -> Result<(), Error> {
        let settled = self.records.settle();
        self.rewrite(settled)?;
        let changed = self.changed.iter();
        let changed = changed.filter_map(|slot| Some((*slot, self.records.policy(*slot)?.policy)));
        self.write_policies(WRITING_POLICIES, [self.other_edition()], changed)?;
        self.changed.clear();
        Ok(())
    }

    /// The cgroups that claim anything.
    pub fn claiming(&self) -> impl Iterator<Item = Cgroup> {
        self.records.claiming()
    }

    /// Whether the policies can be others without another set: every connection has been
    /// brought along. Then [`Self::prepare_policies`].
    #[must_use]
    pub fn can_change_policies(&self) -> bool {
        self.records.is_settled() && self.changed.is_empty() && syscalls::can_wait_for_programs()
    }

    /// Writes what policies of the assignment, by index, are to be from
    /// [`Self::change_policies`] on. Until then no new connection goes by it.
    ///
    /// # Errors
    ///
    /// When the map cannot be written. Another set has to be built then.
    pub fn prepare_policies(&mut self, policies: &[(usize, Policy)]) -> Result<(), Error> {
        let prepared: Vec<_> = self.records.replacing(policies).collect();
        // Whatever comes of this, connections are not settled as far as it goes.
        self.changed = prepared.iter().map(|(slot, _)| *slot).collect();
        let policies = prepared.iter();
        self.write_policies(
            WRITING_POLICIES,
            [self.other_edition()],
            policies.map(|(slot, counted)| (*slot, counted.policy)),
        )?;
        self.prepared = prepared;
        Ok(())
    }

    /// Has what was prepared be in force, all of it in one step. Existing connections
    /// follow by a sweep, which knows what the policies were.
    ///
    /// # Errors
    ///
    /// When the map cannot be written: nothing has changed then, and another set has to
    /// be built.
    pub fn change_policies(&mut self) -> Result<(), Error> {
        self.write_generation(Edition::toggled(self.generation))?;
        self.sweeper.policies_changed();
        for (slot, policy) in std::mem::take(&mut self.prepared) {
            self.records.replace(slot, policy);
        }
        Ok(())
    }

    fn rewrite(&mut self, rewritten: Rewritten) -> Result<(), Error> {
        write_claims(&self.cgroups, rewritten.claims)?;
        for id in rewritten.forgotten {
            self.forget(id, "forgetting policies of cgroups")?;
        }
        Ok(())
    }

    /// Goes over to another assignment of the same policies, without other programs.
    /// Existing connections follow by a sweep, as those of a set that was just built.
    ///
    /// # Errors
    ///
    /// When a map takes no more, or cannot be written: some cgroups have gone over
    /// then, and another set has to be built.
    pub fn claim_anew(&mut self, assignment: &Assignment) -> Result<(), Error> {
        let mark = self.records.mark();
        let rewritten = self.records.claim_anew(assignment)?;
        self.write_records(mark)?;
        self.rewrite(rewritten)?;
        self.begin_generation()
    }

    /// Gives a user a policy for a command, over those of the assignment, by index,
    /// that claim its cgroup.
    ///
    /// # Errors
    ///
    /// As [`Self::add_cgroup`]; or the policies above have too many rules.
    pub fn add_grant(&mut self, grant: &Grant, policies: &[usize]) -> Result<(), Error> {
        let path = &grant.cgroup.path;
        self.records.set_grant(path, Some(grant.clone()));
        let added = self.add_cgroup(&grant.cgroup, policies);
        if added.is_err() {
            self.records.set_grant(path, None);
        }
        added.map(drop)
    }

    /// Forgets a cgroup that is gone.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn remove_cgroup(&mut self, gone: &Cgroup) -> Result<(), Error> {
        if let Some(bounds) = &mut self.bounds {
            bounds.remove_cgroup(gone.id);
        }
        if !self.records.has_claim_of(gone) {
            return Ok(());
        }
        let doing = format!("forgetting the policy of cgroup {}", gone.path);
        self.forget(gone.id, &doing)?;
        self.records.remove(gone);
        Ok(())
    }

    fn forget(&mut self, cgroup: u64, doing: &str) -> Result<(), Error> {
        fault::point(Operation::WriteMap).map_err(Error::call(doing))?;
        self.cgroups.remove(&cgroup).map_err(Error::call(doing))
    }

    /// Makes new connections look for their claim again: until here they may go by
    /// what was found for their cgroup before the last writes.
    fn begin_generation(&mut self) -> Result<(), Error> {
        /// Twice an odd number, so that no number comes twice and the edition stays, and
        /// without a pattern, so that two numbers do not differ like two claims.
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15 << 1;
        self.write_generation(self.generation.wrapping_add(STEP))
    }

    fn write_generation(&mut self, generation: u64) -> Result<(), Error> {
        // Whoever sees the new number sees what was written before it.
        fence(Ordering::SeqCst);
        write(
            "telling the programs what is in force",
            "generations",
            &self.generations,
            [(0, generation)],
        )?;
        self.generation = generation;
        Ok(())
    }

    /// The edition of policies that is not in force.
    const fn other_edition(&self) -> Edition {
        Edition::of(self.generation).other()
    }

    /// The program to attach.
    #[must_use]
    pub const fn program(&self) -> &OwnedFd {
        &self.program
    }

    /// The program that holds connections to bounds, if the set has any.
    pub(super) const fn bounds(&self) -> Option<&BoundsProgram> {
        self.bounds.as_ref()
    }

    /// Whether connections are to be held to bounds.
    #[must_use]
    pub const fn has_bounds(&self) -> bool {
        self.bounds.is_some()
    }

    /// Has connections held to bounds in one more cgroup, once
    /// [`super::Bounds::hold`] is called again.
    pub fn add_bounded(&mut self, cgroup: u64, directory: File) {
        if let Some(bounds) = &mut self.bounds {
            bounds.add_cgroup(cgroup, directory);
        }
    }

    /// What the set says of itself, and counts.
    #[must_use]
    pub const fn record(&self) -> &Arc<SetRecord> {
        &self.record
    }

    /// What brings its policies to existing connections.
    #[must_use]
    pub const fn sweeper(&self) -> &Sweeper {
        &self.sweeper
    }

    /// What tells of each dead peer; there is one reader.
    pub const fn take_dead_peers(&mut self) -> Option<DeadPeers> {
        self.deaths.take()
    }

    /// Loads the program that is told of dead peers, which takes the verifier some time:
    /// for who cannot wait when it is to be attached.
    pub fn load_death_watch(&mut self) {
        if self.peer_died.is_none() {
            self.peer_died = Some(self.load_peer_died());
        }
    }

    fn load_peer_died(&self) -> Result<OwnedFd, Error> {
        self.object
            .load(program::PEER_DIED, Purpose::Tracepoint(Hook::SocketError))
    }

    /// The program that is told of dead peers, for one who attaches it.
    pub(super) fn take_peer_died(&mut self) -> Result<OwnedFd, Error> {
        match self.peer_died.take() {
            Some(loaded) => loaded,
            None => self.load_peer_died(),
        }
    }

    /// Tries whether the kernel tells of dead peers.
    ///
    /// # Errors
    ///
    /// When it does not load or attach the program for it.
    pub fn try_death_watch(&mut self) -> Result<(), Error> {
        DeathWatch::begin(self, 0, None).map(drop)
    }

    /// How many instructions the verifier went through to accept the program, of
    /// the million that it allows; none where the kernel does not tell.
    ///
    /// # Minimum kernel version
    ///
    /// 5.16, to tell.
    #[must_use]
    pub const fn verified_instructions(&self) -> Option<u32> {
        self.verified_instructions
    }

    /// What the program logs, to be flushed whenever it becomes readable.
    ///
    /// # Errors
    ///
    /// When the object has no log.
    pub fn logger(&self) -> Result<EbpfLogger<&'static dyn log::Log>, Error> {
        EbpfLogger::init_from_id(self.id).map_err(|error| Error::Kernel(error.to_string()))
    }
}

const WRITING_POLICIES: &str = "writing the policies to the kernel";

fn write_claims(
    cgroups: &Table<u64, Claim>,
    claims: impl IntoIterator<Item = (Cgroup, Claim)>,
) -> Result<(), Error> {
    let claims: Vec<_> = claims.into_iter().collect();
    let doing = match &claims[..] {
        [] => return Ok(()),
        [(only, _)] => format!("telling the kernel the policy of cgroup {}", only.path),
        [(first, _), ..] => format!(
            "telling the kernel the policies of {} cgroups, {} the first",
            claims.len(),
            first.path
        ),
    };
    let claims = claims.into_iter().map(|(cgroup, claim)| (cgroup.id, claim));
    write(&doing, "cgroups", cgroups, claims)
}

/// Writes what the set says of itself.
fn record(
    blueprint: &Blueprint<'_>,
    own: CounterMaps,
    beside_sockets: BesideSockets,
    deaths: &DeadPeers,
) -> Result<SetRecord, Error> {
    /// One piece, which is written in one step: an agent may be killed at any time.
    const STATE_SIZE: usize = 4000;
    /// Of what is known of one grant: the longest path is 512 bytes.
    const GRANT_SIZE: usize = 768;
    /// Of what has changed: some hundred policies.
    const CHANGES_SIZE: usize = 60_000;
    let mut state = Document::create(STATE, STATE_SIZE)?;
    state.write(&State::default())?;
    let changes = Document::create_twice(CHANGES, CHANGES_SIZE)?;
    let grants = match &blueprint.config.self_service {
        Some(service) => {
            let size = service.commands as usize * GRANT_SIZE;
            let mut grants = Document::create(GRANTS, size)?;
            grants.write(&blueprint.assignment.grants)?;
            Some(grants)
        }
        None => None,
    };
    let [counters, swept, failures, dead_peers] = &own.handles;
    let maps = MapIds {
        counters: counters.id,
        swept: swept.id,
        failures: failures.id,
        dead_peers: dead_peers.id,
        deaths: deaths.ring_handle.id,
        followed: deaths.followed_handle.id,
        originals: beside_sockets.originals.id,
        counted: beside_sockets.counted.id,
        state: state.handle.id,
        changes: changes.handle.id,
        grants: grants.as_ref().map(|grants| grants.handle.id),
    };
    let previous = blueprint.previous.map(|set| Previous {
        maps: MapIds {
            state: set.state_id(),
            grants: None,
            ..set.description().maps
        },
        slots: set.own.slots.clone(),
    });
    let (done, refusals) = match blueprint.previous {
        Some(set) => set.final_done()?,
        None => Default::default(),
    };
    let built_at = now();
    let description = Description {
        schema: SCHEMA,
        version: VERSION.to_owned(),
        root: blueprint.root.clone(),
        config: blueprint.config.clone(),
        origin: blueprint.origin.clone(),
        before: blueprint.before.map(|(config, _)| config.clone()),
        written: 1,
        built_at,
        enforced_since: blueprint
            .previous
            .filter(|set| set.root == *blueprint.root)
            .map_or(built_at, |set| set.description().enforced_since),
        slots: own.slots.clone(),
        maps,
        previous,
        done: done.into(),
        refusals,
    };
    let name = super::description::DESCRIPTION;
    let text = description::text(&description)?;
    let document = if blueprint.config.goes_by_names() {
        // Names come and go, and no other set is needed for that.
        let size = text.len() + text.len() / 2 + 4096;
        let mut document = Document::create_twice(name, size)?;
        document.write_text_again(&text)?;
        document
    } else {
        let mut document = Document::create(name, text.len())?;
        document.write_text(&text)?;
        document
    };
    Ok(SetRecord::new(
        Described::new(description, document, changes)?,
        state,
        grants,
        own,
        blueprint.previous.map(|set| set.own.clone()),
        beside_sockets,
    ))
}

impl std::fmt::Debug for LoadedSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadedSet")
            .field("program", &self.program.as_raw_fd())
            .field("sizes", &self.records.sizes())
            .finish_non_exhaustive()
    }
}
