//! The BPF object in the kernel: load, fill, attach, in that order.
//!
//! The names of its maps, programs and globals stand here and nowhere else.
//! Dropping [`Enforcer`] detaches the program and frees the maps.

use std::os::fd::AsFd;

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, PerCpuArray, PerCpuHashMap},
    programs::{CgroupAttachMode, ProgramError, SockOps},
};
use aya_log::EbpfLogger;
use keepalive_common::{
    counters::{Counters, Failure, FailureKey},
    layout::Layout,
    policy::Policy,
    slot,
};

use crate::assignment::Assignment;

const PROGRAM: &str = "established";
const CGROUPS: &str = "CGROUPS";
const POLICIES: &str = "POLICIES";
const COUNTERS: &str = "COUNTERS";
const FAILURES: &str = "FAILURES";
const LAYOUT: &str = "LAYOUT";

/// What the build script embedded; empty when the BPF object was not built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/keepalive.bpf.o"));

/// Accepted by the kernel's verifier; claims nothing yet.
pub struct Loaded(Ebpf);

/// Knows every policy; attached to nothing yet.
pub struct Filled(Ebpf);

/// Attached: applies policy to every connection below its cgroup.
pub struct Enforcer(Ebpf);

impl Loaded {
    /// Loads the program with room for this many policies.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program or a map, with its reason.
    pub fn load(layout: &Layout, policies: usize) -> Result<Self> {
        ensure!(
            !OBJECT.is_empty(),
            "this agent was built without its BPF object and cannot enforce anything: \
             build it with `cargo xtask build`"
        );
        let slots = slot::FIRST + u32::try_from(policies).context("too many policies")?;
        let mut loader = EbpfLoader::new();
        loader
            .override_global(LAYOUT, layout, true)
            .map_max_entries(POLICIES, slots)
            .map_max_entries(COUNTERS, slots);
        let mut ebpf = loader
            .load(OBJECT)
            .context("creating the BPF maps: without them nothing can be enforced")?;
        program(&mut ebpf)?.load().map_err(refused)?;
        Ok(Self(ebpf))
    }

    /// Writes policies and then the cgroups that point to them.
    ///
    /// # Errors
    ///
    /// When a map takes no more, or the object lacks one.
    pub fn fill(mut self, assignment: &Assignment) -> Result<Filled> {
        let mut policies: Array<_, Policy> = self.map_mut(POLICIES)?.try_into()?;
        for (slot, policy) in (slot::FIRST..).zip(&assignment.policies) {
            policies
                .set(slot, policy.policy, 0)
                .with_context(|| format!("writing policy {} to the kernel", policy.name))?;
        }
        let mut cgroups: HashMap<_, u64, u32> = self.map_mut(CGROUPS)?.try_into()?;
        for claim in &assignment.claims {
            cgroups
                .insert(claim.cgroup.id, slot::of_index(claim.policy), 0)
                .with_context(|| {
                    format!(
                        "telling the kernel the policy of cgroup {}",
                        claim.cgroup.path
                    )
                })?;
        }
        Ok(Filled(self.0))
    }

    fn map_mut(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.0
            .map_mut(name)
            .with_context(|| format!("the BPF object has no map {name}"))
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
        // Links always allow other programs beside them; the kernel refuses
        // the flag that says so.
        program(&mut self.0)?
            .attach(cgroup, CgroupAttachMode::default())
            .with_context(|| {
                format!(
                    "attaching program {PROGRAM}: nothing is enforced; \
                     if another program wants the cgroup for itself alone, \
                     `bpftool cgroup show PATH` names it"
                )
            })?;
        Ok(Enforcer(self.0))
    }
}

impl Enforcer {
    /// What each slot's policy did so far, all CPUs together.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn counters(&self) -> Result<Vec<Counters>> {
        let counters: PerCpuArray<_, Counters> = self.map(COUNTERS)?.try_into()?;
        (0..counters.len())
            .map(|slot| {
                let mut sum = Counters::default();
                for of_cpu in counters.get(&slot, 0)?.iter() {
                    sum.add(of_cpu);
                }
                Ok(sum)
            })
            .collect()
    }

    /// Refused options by cause, all CPUs together.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn failures(&self) -> Result<Vec<(FailureKey, u64)>> {
        let failures: PerCpuHashMap<_, FailureKey, Failure> = self.map(FAILURES)?.try_into()?;
        failures
            .iter()
            .map(|entry| {
                let (key, of_cpus) = entry?;
                Ok((key, of_cpus.iter().map(|failure| failure.count).sum()))
            })
            .collect()
    }

    /// What the program logs, to be flushed whenever it becomes readable.
    ///
    /// # Errors
    ///
    /// When the object has no log.
    pub fn logger(&mut self) -> Result<EbpfLogger<&'static dyn log::Log>> {
        Ok(EbpfLogger::init(&mut self.0)?)
    }

    fn map(&self, name: &str) -> Result<&aya::maps::Map> {
        self.0
            .map(name)
            .with_context(|| format!("the BPF object has no map {name}"))
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SockOps> {
    Ok(ebpf
        .program_mut(PROGRAM)
        .with_context(|| format!("the BPF object has no program {PROGRAM}"))?
        .try_into()?)
}

/// A program that the kernel did not load. The verifier's log can be thousands
/// of lines; what matters stands near its end.
fn refused(error: ProgramError) -> Error {
    const LINES: usize = 20;
    let what = format!("the kernel refused program {PROGRAM}: nothing is enforced");
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return Error::new(error).context(what);
    };
    let log = verifier_log.to_string();
    let lines: Vec<_> = log.lines().filter(|line| !line.is_empty()).collect();
    let end = lines[lines.len().saturating_sub(LINES)..].join("\n  ");
    anyhow!("{io_error}; the verifier's last words:\n  {end}").context(what)
}
