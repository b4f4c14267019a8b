//! Enforces: load, fill, attach, in that order; then change policy and sweep.
//!
//! Dropping [`Enforcer`] detaches the program and frees the maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    maps::{
        Array, HashMap, MapData, MapError, PerCpuArray, PerCpuHashMap, SkStorage,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{CgroupAttachMode, SockOps, iter::IterLink},
};
use aya_log::EbpfLogger;
use keepalive_common::{
    counters::{Counters, Failure as Refusals, FailureKey, SocketOption},
    history::Originals,
    policy::Policy,
    slot::{Claim, Ends, FIRST, Found, PortKey, RemoteKey, Step, UNCLAIMED, resolve},
    socket::SocketRecord,
    sweep::Pass,
};

use tracing::debug;

use super::{
    Lister, Writable, begin_generation, create, iterator, load_iterator, map, map_mut,
    prepare_iterator, program, refused, run_descriptors, run_iterator,
    slots::{Held, Index, Records, Room, Settle, Slots, Switch},
};
use crate::{
    assignment::{self, Assignment},
    hierarchy::Cgroup,
    kernel::layout::{Hook, Kernel},
    netns::{Descriptor, Namespace},
};

/// How many cgroups can claim a policy.
const CGROUPS: u32 = 131_072;

/// How many sets of rules and what they lead on to can be in force.
const STEPS: u32 = 16_384;

/// Accepted by the kernel's verifier; claims nothing yet.
pub struct Loaded {
    kernel: Kernel,
    ebpf: Ebpf,
    slots: Slots,
    can_sweep: Option<bool>,
}

/// Knows every policy; attached to nothing yet.
pub struct Filled(Enforcer);

/// Attached: applies policy to every connection below its cgroup.
pub struct Enforcer {
    kernel: Kernel,
    ebpf: Ebpf,
    slots: Slots,
    /// What policies did that are not in force any more.
    retired: BTreeMap<Counted, Done>,
    retired_failures: Vec<Failure>,
    /// What was done to existing connections from outside the kernel, by slot.
    by_hand: Arc<Mutex<BTreeMap<u32, Counters>>>,
    originals: Option<Arc<Mutex<SocketOriginals>>>,
    lister: Option<Arc<Mutex<Lister>>>,
    /// Whether the kernel takes the sweeping program, once that was tried.
    can_sweep: Option<bool>,
    /// Whether the program that finds namespaces is loaded.
    can_find: bool,
}

/// Whose deeds are counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Counted {
    /// Name of the policy.
    pub name: String,
    /// Whether it did them, or would have, were it not in dry run.
    pub enforced: bool,
}

impl Counted {
    fn of(held: &Held) -> Self {
        Self {
            name: held.name.clone(),
            enforced: held.policy.is_enforced(),
        }
    }
}

/// What a policy did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// To connections when they were established.
    pub established: Counters,
    /// To connections that were there already.
    pub existing: Counters,
}

/// An option that the kernel refused, and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Name of the policy.
    pub policy: String,
    /// The option as the kernel's headers name it.
    pub option: &'static str,
    /// The kernel's error number, positive.
    pub errno: u32,
    /// Number of refused calls.
    pub count: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errno = i32::try_from(self.errno).unwrap_or(0);
        write!(
            f,
            "policy {}: the kernel refused {} {} times: {}",
            self.policy,
            self.option,
            self.count,
            io::Error::from_raw_os_error(errno)
        )
    }
}

/// Socket → the application's values that policies replaced.
type SocketOriginals = SkStorage<MapData, Originals>;

/// What a sweep needs that does not run in the kernel.
pub struct ByHand {
    /// Cgroup id → where its sockets find their policy.
    claims: std::collections::HashMap<u64, Claim>,
    rules: Index,
    policies: BTreeMap<u32, Policy>,
    lister: Arc<Mutex<Lister>>,
    /// The application's values that policies replaced.
    originals: Arc<Mutex<SocketOriginals>>,
    counters: Arc<Mutex<BTreeMap<u32, Counters>>>,
}

/// The slots of the policies that a connection goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// That of now.
    pub now: u32,
    /// That before the last change.
    pub before: u32,
}

impl ByHand {
    /// Hands on every connection of the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// When the listing breaks off, or `each` fails.
    pub fn list(&self, each: &mut dyn FnMut(&SocketRecord) -> Result<()>) -> Result<u64> {
        locked(&self.lister).list(each)
    }

    /// Where the policies of a connection are; none if its cgroup is not known.
    #[must_use]
    pub fn claimed(&self, record: &SocketRecord) -> Option<Claimed> {
        let claim = self.claims.get(&record.cgroup)?;
        let ends = Ends::new(record.remote(), record.local().port());
        Some(Claimed {
            now: resolve(&self.rules, claim.now, &ends),
            before: resolve(&self.rules, claim.before, &ends),
        })
    }

    /// The policy in a slot.
    #[must_use]
    pub fn policy(&self, slot: u32) -> Option<&Policy> {
        self.policies.get(&slot)
    }

    /// What policies replaced on a socket so far.
    #[must_use]
    pub fn originals(&self, socket: &OwnedFd) -> Originals {
        locked(&self.originals).get(socket, 0).unwrap_or_default()
    }

    /// Keeps what was replaced.
    ///
    /// # Errors
    ///
    /// When there is no memory for it: the policy's value will later be taken
    /// for the application's.
    pub fn remember(&self, socket: &OwnedFd, originals: &Originals) -> Result<()> {
        Ok(locked(&self.originals).insert(socket, originals, 0)?)
    }

    /// Counts what was done under the policy in a slot.
    pub fn count(&self, slot: u32, done: &Counters) {
        locked(&self.counters).entry(slot).or_default().add(done);
    }
}

/// Counters are whole at any time, so a thread that failed leaves no harm.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pass over several namespaces, ready to run.
pub struct SlowPass(Vec<(Namespace, IterLink)>);

impl SlowPass {
    /// Runs it; `pause` is called after each batch and tells whether to go on.
    /// A namespace that is gone by now has no connections left.
    pub fn run(self, pause: &mut (dyn FnMut() -> bool + Send)) {
        let mut goes_on = true;
        for (namespace, link) in self.0 {
            if !goes_on {
                return;
            }
            let swept = namespace.enter(|| {
                // A buffer of one byte ends each read where a batch ends.
                run_iterator(link, &mut [0], |_| {
                    goes_on = pause();
                    ensure!(goes_on, "stopped");
                    Ok(())
                })
            });
            if let Err(error) = swept.and_then(Option::transpose) {
                debug!("namespace {}: {error:#}", namespace.name);
            }
        }
    }
}

impl Loaded {
    /// Loads the program, with room for this many policies.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program or a map, with its reason.
    pub fn load(kernel: &Kernel, policies: usize) -> Result<Self> {
        let mut loaded = Self::without_hook(kernel, policies)?;
        established(&mut loaded.ebpf)?
            .load()
            .map_err(|error| refused(program::ESTABLISHED, error))?;
        Ok(loaded)
    }

    /// Loads nothing but the maps yet: for a sweep, which needs no hook.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a map.
    pub fn without_hook(kernel: &Kernel, policies: usize) -> Result<Self> {
        let room = room(policies)?;
        Ok(Self {
            kernel: *kernel,
            ebpf: create(&kernel.layout, room, CGROUPS)?,
            slots: Slots::new(room),
            can_sweep: None,
        })
    }

    /// How many instructions the verifier went through to accept the program,
    /// of the million that it allows; none where the kernel does not tell
    /// (before Linux 5.16).
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked.
    pub fn verified_instructions(&mut self) -> Result<Option<u32>> {
        let info = established(&mut self.ebpf)?.info()?;
        Ok(info.verified_instruction_count())
    }

    /// Loads the sweeping program too.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with its reason.
    pub fn load_sweep(&mut self) -> Result<Option<u32>> {
        load_iterator(&mut self.ebpf, program::SWEEP, &self.kernel, Hook::Tcp)?;
        let info = iterator(&mut self.ebpf, program::SWEEP)?.info()?;
        self.can_sweep = Some(true);
        Ok(info.verified_instruction_count())
    }

    /// Writes policies and the cgroups that point to them; `before` is what an
    /// earlier agent enforced, so that its values are recognised.
    ///
    /// # Errors
    ///
    /// When a map takes no more.
    pub fn fill(self, before: Option<&Assignment>, now: &Assignment) -> Result<Filled> {
        let mut enforcer = Enforcer {
            kernel: self.kernel,
            ebpf: self.ebpf,
            slots: self.slots,
            retired: BTreeMap::new(),
            retired_failures: Vec::new(),
            by_hand: Arc::default(),
            originals: None,
            lister: None,
            can_sweep: self.can_sweep,
            can_find: false,
        };
        if let Some(before) = before {
            enforcer.switch(before)?;
            enforcer.settle()?;
        }
        enforcer.switch(now)?;
        Ok(Filled(enforcer))
    }
}

impl Filled {
    /// Attaches to a cgroup: every connection of it and of all cgroups below.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    ///
    /// # Minimum kernel version
    ///
    /// 5.7, for links of cgroup programs: they go away with the agent, also
    /// when it is killed.
    pub fn attach(mut self, cgroup: impl AsFd) -> Result<Enforcer> {
        self.0.slots.go_live();
        // Links always allow other programs beside them; the kernel refuses
        // the flag that says so.
        established(&mut self.0.ebpf)?
            .attach(cgroup, CgroupAttachMode::default())
            .with_context(|| {
                format!(
                    "attaching program {}: nothing is enforced; \
                     if another program wants the cgroup for itself alone, \
                     `bpftool cgroup show PATH` names it",
                    program::ESTABLISHED
                )
            })?;
        Ok(self.0)
    }

    /// Does without being attached: for a single sweep.
    #[must_use]
    pub fn detached(self) -> Enforcer {
        self.0
    }
}

impl Enforcer {
    /// Lets the kernel go over to another assignment. New connections follow it
    /// when this returns; each finds its old policy or its new one meanwhile.
    ///
    /// # Errors
    ///
    /// When a map takes no more. Too many policies are refused before anything
    /// has changed.
    pub fn switch(&mut self, next: &Assignment) -> Result<()> {
        let switch = self.slots.switch(next)?;
        self.write(switch)
    }

    /// Tells the kernel of a cgroup that was made after the last
    /// [`Self::switch`] and that these policies claim, by index; whether it did
    /// not know of it yet.
    ///
    /// # Errors
    ///
    /// When a map takes no more: the cgroup goes by the policy above it then.
    pub fn appear(&mut self, made: &Cgroup, policies: &[usize]) -> Result<bool> {
        let switch = self.slots.appear(made, policies)?;
        let is_new = !switch.claims.is_empty();
        self.write(switch)?;
        Ok(is_new)
    }

    /// Forgets a cgroup that is gone.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn vanish(&mut self, gone: &Cgroup) -> Result<()> {
        if self.slots.vanish(gone) {
            self.forget(gone)?;
        }
        Ok(())
    }

    fn write(&mut self, Switch { records, claims }: Switch) -> Result<()> {
        let begun = Instant::now();
        let (policies, cgroups) = (records.policies.len(), claims.len());
        self.write_records(records)?;
        if claims.is_empty() {
            return Ok(());
        }
        let mut map: HashMap<Writable<'_>, u64, Claim> =
            map_mut(&mut self.ebpf, super::map::CGROUPS)?;
        for (cgroup, claim) in claims {
            map.insert(cgroup.id, claim, 0).with_context(|| {
                format!("telling the kernel the policy of cgroup {}", cgroup.path)
            })?;
        }
        begin_generation(&mut self.ebpf)?;
        debug!(policies, cgroups, elapsed = ?begun.elapsed(), "wrote the maps");
        Ok(())
    }

    /// Writes what claims are going to lead to.
    fn write_records(&mut self, records: Records) -> Result<()> {
        const WRITING: &str = "telling the kernel which remote ends policies are for";
        let mut map: Array<Writable<'_>, Policy> = map_mut(&mut self.ebpf, super::map::POLICIES)?;
        for (slot, held) in records.policies {
            map.set(slot, held.policy, 0)
                .with_context(|| format!("writing policy {} to the kernel", held.name))?;
        }
        let mut map: LpmTrie<Writable<'_>, PortKey, Found> =
            map_mut(&mut self.ebpf, super::map::PORTS)?;
        for (number, table) in records.ports {
            for ((port, length), slot) in table.iter() {
                map.insert(&port_key(number, *port, *length), slot, 0)
                    .context(WRITING)?;
            }
        }
        let mut map: LpmTrie<Writable<'_>, RemoteKey, Found> =
            map_mut(&mut self.ebpf, super::map::REMOTES)?;
        for (number, rules) in records.rules {
            for ((address, length), found) in rules.iter() {
                map.insert(&remote_key(number, *address, *length), found, 0)
                    .context(WRITING)?;
            }
        }
        let mut map: Array<Writable<'_>, Step> = map_mut(&mut self.ebpf, super::map::STEPS)?;
        for (number, step) in records.steps {
            map.set(number, *step, 0).context(WRITING)?;
        }
        Ok(())
    }

    /// Forgets the assignment before this one, once existing connections have
    /// been swept.
    ///
    /// # Errors
    ///
    /// When a map cannot be written.
    pub fn settle(&mut self) -> Result<()> {
        let Settle {
            claims,
            removed,
            freed,
        } = self.slots.settle();
        let mut map: HashMap<Writable<'_>, u64, Claim> =
            map_mut(&mut self.ebpf, super::map::CGROUPS)?;
        for (cgroup, claim) in claims {
            map.insert(cgroup.id, claim, 0)
                .with_context(|| format!("settling the policy of cgroup {}", cgroup.path))?;
        }
        for cgroup in removed {
            self.forget(&cgroup)?;
        }
        // Before the place of what is freed is taken.
        begin_generation(&mut self.ebpf)?;
        self.free(freed)
    }

    /// Removes the claim of a cgroup.
    fn forget(&mut self, cgroup: &Cgroup) -> Result<()> {
        let mut map: HashMap<Writable<'_>, u64, Claim> =
            map_mut(&mut self.ebpf, super::map::CGROUPS)?;
        match map.remove(&cgroup.id) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(error)
                .with_context(|| format!("forgetting the policy of cgroup {}", cgroup.path)),
        }
    }

    /// Removes what no claim leads to any more. Steps are left as they are until
    /// their place is taken.
    fn free(&mut self, freed: Records) -> Result<()> {
        let mut map: LpmTrie<Writable<'_>, RemoteKey, Found> =
            map_mut(&mut self.ebpf, super::map::REMOTES)?;
        for (number, rules) in freed.rules {
            for ((address, length), _) in rules.iter() {
                map.remove(&remote_key(number, *address, *length))?;
            }
        }
        let mut map: LpmTrie<Writable<'_>, PortKey, Found> =
            map_mut(&mut self.ebpf, super::map::PORTS)?;
        for (number, table) in freed.ports {
            for ((port, length), _) in table.iter() {
                map.remove(&port_key(number, *port, *length))?;
            }
        }
        for (slot, held) in freed.policies {
            self.retire(slot, Counted::of(&held))?;
        }
        Ok(())
    }

    /// Keeps what a slot counted and clears it for another policy.
    fn retire(&mut self, slot: u32, whose: Counted) -> Result<()> {
        let done = self.done_in(slot)?;
        // An earlier agent's policies have done nothing here.
        if done.established.seen + done.existing.seen > 0 {
            let total = self.retired.entry(whose).or_default();
            total.established.add(&done.established);
            total.existing.add(&done.existing);
        }
        locked(&self.by_hand).remove(&slot);
        for name in [super::map::COUNTERS, super::map::SWEPT] {
            let mut counters: PerCpuArray<Writable<'_>, Counters> = map_mut(&mut self.ebpf, name)?;
            let zero = vec![Counters::default(); aya::util::nr_cpus().map_err(|(_, error)| error)?];
            counters.set(slot, zero.try_into()?, 0)?;
        }
        for (key, count) in self.refusals()? {
            if key.slot == slot {
                let failure = self.failure(key, count);
                add(&mut self.retired_failures, failure);
                let mut failures: PerCpuHashMap<Writable<'_>, FailureKey, Refusals> =
                    map_mut(&mut self.ebpf, super::map::FAILURES)?;
                failures.remove(&key)?;
            }
        }
        Ok(())
    }

    /// What each policy did so far; the ones in force first.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn done(&self) -> Result<Vec<(Counted, Done)>> {
        let mut totals = self.retired.clone();
        let mut in_force = Vec::new();
        let mut known = BTreeSet::new();
        for (slot, held) in self.slots.held() {
            let whose = Counted::of(held);
            let current = self.done_in(slot)?;
            let total = totals.entry(whose.clone()).or_default();
            total.established.add(&current.established);
            total.existing.add(&current.existing);
            // While one version of a policy replaces another, both have slots.
            if known.insert(whose.clone()) {
                in_force.push(whose);
            }
        }
        let mut done = Vec::new();
        for whose in in_force {
            if let Some(total) = totals.remove_entry(&whose) {
                done.push(total);
            }
        }
        done.extend(totals);
        let unclaimed = self.done_in(UNCLAIMED)?;
        if unclaimed.established.seen > 0 {
            let whose = Counted {
                name: assignment::UNCLAIMED.to_owned(),
                enforced: true,
            };
            done.push((whose, unclaimed));
        }
        Ok(done)
    }

    fn done_in(&self, slot: u32) -> Result<Done> {
        let mut existing = self.sum(super::map::SWEPT, slot)?;
        if let Some(by_hand) = locked(&self.by_hand).get(&slot) {
            existing.add(by_hand);
        }
        Ok(Done {
            established: self.sum(super::map::COUNTERS, slot)?,
            existing,
        })
    }

    /// A slot's counters, all CPUs together.
    fn sum(&self, name: &str, slot: u32) -> Result<Counters> {
        let counters: PerCpuArray<_, Counters> = map(&self.ebpf, name)?;
        let mut sum = Counters::default();
        for of_cpu in counters.get(&slot, 0)?.iter() {
            sum.add(of_cpu);
        }
        Ok(sum)
    }

    /// Refused options by policy and cause.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn failures(&self) -> Result<Vec<Failure>> {
        let mut failures = self.retired_failures.clone();
        for (key, count) in self.refusals()? {
            add(&mut failures, self.failure(key, count));
        }
        Ok(failures)
    }

    fn refusals(&self) -> Result<Vec<(FailureKey, u64)>> {
        let failures: PerCpuHashMap<_, FailureKey, Refusals> =
            map(&self.ebpf, super::map::FAILURES)?;
        failures
            .iter()
            .map(|entry| {
                let (key, of_cpus) = entry?;
                Ok((key, of_cpus.iter().map(|failure| failure.count).sum()))
            })
            .collect()
    }

    fn failure(&self, key: FailureKey, count: u64) -> Failure {
        Failure {
            policy: self
                .slots
                .policy(key.slot)
                .map_or(assignment::UNCLAIMED, |held| &held.name)
                .to_owned(),
            option: SocketOption::from_number(key.option).map_or("unknown", SocketOption::name),
            errno: key.errno,
            count,
        }
    }

    /// Loads the sweeping program, if that has not been tried.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with its reason the first time.
    ///
    /// # Minimum kernel version
    ///
    /// 5.15, for bpf_setsockopt in iterators.
    pub fn load_sweep(&mut self) -> Result<()> {
        match self.can_sweep {
            Some(true) => Ok(()),
            Some(false) => bail!("the kernel refused program {}", program::SWEEP),
            None => {
                let loaded = load_iterator(&mut self.ebpf, program::SWEEP, &self.kernel, Hook::Tcp);
                self.can_sweep = Some(loaded.is_ok());
                loaded
            }
        }
    }

    /// What a sweep needs that does not run in the kernel: who claims the
    /// sockets of each cgroup, where originals are kept, and where to count.
    ///
    /// # Errors
    ///
    /// When the object lacks a map, or the kernel refuses the listing program.
    pub fn by_hand(&mut self, cgroups: Vec<Cgroup>) -> Result<ByHand> {
        let policies = self.slots.held().map(|(slot, held)| (slot, held.policy));
        let policies = policies.collect();
        let claims = cgroups
            .into_iter()
            .map(|cgroup| (cgroup.id, self.slots.claim(&cgroup.path)))
            .collect();
        let originals = if let Some(originals) = &self.originals {
            originals.clone()
        } else {
            let name = super::map::ORIGINALS;
            let map = self
                .ebpf
                .take_map(name)
                .with_context(|| format!("the BPF object has no map {name}"))?;
            let originals = Arc::new(Mutex::new(map.try_into()?));
            self.originals.insert(originals).clone()
        };
        let lister = if let Some(lister) = &self.lister {
            lister.clone()
        } else {
            let lister = Lister::load(&self.kernel)?;
            self.lister.insert(Arc::new(Mutex::new(lister))).clone()
        };
        Ok(ByHand {
            claims,
            rules: Index::of(&self.slots),
            policies,
            lister,
            originals,
            counters: self.by_hand.clone(),
        })
    }

    /// Which descriptors of which processes hold namespaces, of whatever kind.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program that looks for them, or knows this
    /// process by another id than /proc.
    ///
    /// # Minimum kernel version
    ///
    /// 5.8, for iterators over files.
    pub fn held_namespaces(&mut self) -> Result<Vec<Descriptor>> {
        if !self.can_find {
            load_iterator(
                &mut self.ebpf,
                program::NAMESPACES,
                &self.kernel,
                Hook::Files,
            )?;
            self.can_find = true;
        }
        let link = prepare_iterator(&mut self.ebpf, program::NAMESPACES)?;
        let mut held = Vec::new();
        run_descriptors(link, |record| {
            held.push(Descriptor {
                process: record.process,
                number: record.descriptor,
            });
        })?;
        Ok(held)
    }

    /// Makes a pass over the connections of a namespace that leaves those
    /// waiting which would probe at once; tells how many there were. None when the
    /// namespace is gone.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or [`Self::load_sweep`] fails.
    pub fn pass(&mut self, namespace: &Namespace, counts: bool) -> Result<Option<Pass>> {
        let link = self.prepare_pass(Pass {
            counts: u32::from(counts),
            ..Pass::default()
        })?;
        // The program writes nothing in such a pass.
        let swept = namespace
            .enter(|| run_iterator(link, &mut [0], |_| Ok(())))
            .and_then(Option::transpose)
            .with_context(|| format!("sweeping network namespace {}", namespace.name))?;
        if swept.is_none() {
            return Ok(None);
        }
        let pass: Array<_, Pass> = map(&self.ebpf, super::map::PASS)?;
        Ok(Some(pass.get(&0, 0)?))
    }

    /// Prepares a pass that lets waiting connections probe, a batch at a time.
    /// It can run on another thread, beside anything but other passes.
    ///
    /// # Errors
    ///
    /// As [`Self::pass`].
    pub fn slow_pass(&mut self, namespaces: &[Namespace], batch: u32) -> Result<SlowPass> {
        let mut links = Vec::new();
        for namespace in namespaces {
            let link = self.prepare_pass(Pass {
                batch,
                ..Pass::default()
            })?;
            links.push((namespace.clone(), link));
        }
        Ok(SlowPass(links))
    }

    fn prepare_pass(&mut self, pass: Pass) -> Result<IterLink> {
        self.load_sweep()?;
        let mut state: Array<Writable<'_>, Pass> = map_mut(&mut self.ebpf, super::map::PASS)?;
        state.set(0, pass, 0).context("starting a pass")?;
        prepare_iterator(&mut self.ebpf, program::SWEEP)
    }

    /// What the program logs, to be flushed whenever it becomes readable.
    ///
    /// # Errors
    ///
    /// When the object has no log.
    pub fn logger(&mut self) -> Result<EbpfLogger<&'static dyn log::Log>> {
        Ok(EbpfLogger::init(&mut self.ebpf)?)
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

/// Adds to the failures of the same policy and cause.
fn add(failures: &mut Vec<Failure>, failure: Failure) {
    let cause = |failure: &Failure| (failure.policy.clone(), failure.option, failure.errno);
    let same = failures
        .iter_mut()
        .find(|earlier| cause(earlier) == cause(&failure));
    match same {
        Some(earlier) => earlier.count += failure.count,
        None => failures.push(failure),
    }
}

/// Slots for this many policies and as many again, for the time while one set
/// of them replaces another.
fn room(policies: usize) -> Result<Room> {
    /// Room for policies that a later config may bring.
    const ROOM: usize = 64;
    let count = u32::try_from(policies.max(ROOM) * 2).context("too many policies")?;
    Ok(Room {
        slots: FIRST + count,
        steps: STEPS,
    })
}

fn established(ebpf: &mut Ebpf) -> Result<&mut SockOps> {
    let name = program::ESTABLISHED;
    Ok(ebpf
        .program_mut(name)
        .with_context(|| format!("the BPF object has no program {name}"))?
        .try_into()?)
}
