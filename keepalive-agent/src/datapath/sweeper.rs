//! Sweeper: runs the program that brings a set's policies to the connections
//! that exist, one network namespace at a time, on whichever thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    maps::{Array, MapData},
};
use keepalive_common::sweep::Pass;

use super::{Error, Survey, iterator, load_iterator, prepare_iterator, program, run_iterator};
use crate::{
    kernel::layout::{Hook, Kernel},
    netns::Namespace,
};

/// Runs the sweeping program of one policy set. Clones share the program: passes
/// follow one another.
#[derive(Clone)]
pub struct Sweeper {
    kernel: Kernel,
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    ebpf: Ebpf,
    pass: Array<MapData, Pass>,
    loaded: Vec<&'static str>,
    /// Whether existing connections are still to be counted.
    counts: bool,
}

/// What one pass over a namespace came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It went through.
    Done(Pass),
    /// What the namespace was found by is gone.
    Gone,
    /// It was told to stop.
    Stopped,
}

impl Sweeper {
    pub(super) fn new(
        ebpf: Ebpf,
        pass: Array<MapData, Pass>,
        kernel: &Kernel,
        counts: bool,
    ) -> Self {
        Self {
            kernel: *kernel,
            inner: Arc::new(Mutex::new(Inner {
                ebpf,
                pass,
                loaded: Vec::new(),
                counts,
            })),
        }
    }

    /// Whether the next pass is to count existing connections: once, in the first
    /// set of a row, so that the numbers are those of connections and not of
    /// connections times sweeps.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.inner().counts
    }

    /// Says whether it is to count them.
    pub fn set_counts(&self, counts: bool) {
        self.inner().counts = counts;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // What it holds is whole at any time.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn with_ebpf<T>(&self, with: impl FnOnce(&mut Ebpf) -> T) -> T {
        with(&mut self.inner().ebpf)
    }

    /// Loads the sweeping program, if that has not been done.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with its reason.
    ///
    /// # Minimum kernel version
    ///
    /// 5.15, for bpf_setsockopt in iterators.
    pub fn load(&self) -> Result<(), Error> {
        self.inner().load(program::SWEEP, &self.kernel, Hook::Tcp)
    }

    /// How many instructions the verifier went through to accept the program; none
    /// where the kernel does not tell (before Linux 5.16) or it is not loaded.
    #[must_use]
    pub fn verified_instructions(&self) -> Option<u32> {
        let mut inner = self.inner();
        let info = iterator(&mut inner.ebpf, program::SWEEP).ok()?.info();
        info.ok()?.verified_instruction_count()
    }

    /// Finds out which namespaces have connections, and which of them there is
    /// anything to do for.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program, or knows this process by another id
    /// than /proc: then every namespace has to be entered.
    pub fn survey(&self, pass: Pass) -> Result<Survey> {
        let link = {
            let mut inner = self.inner();
            inner.load(program::SURVEY, &self.kernel, Hook::Files)?;
            inner
                .pass
                .set(0, pass, 0)
                .map_err(Error::map("starting a survey"))?;
            prepare_iterator(&mut inner.ebpf, program::SURVEY)?
        };
        Survey::read(link.into_file().context("opening the iterator")?)
    }

    /// Makes a pass over the connections of a namespace. `pause` is called after
    /// each batch, if the pass has batches, and tells whether to go on.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or the kernel refuses the program.
    pub fn run(
        &self,
        namespace: &Namespace,
        pass: Pass,
        pause: &mut (dyn FnMut() -> bool + Send),
    ) -> Result<Step> {
        let link = {
            let mut inner = self.inner();
            inner.load(program::SWEEP, &self.kernel, Hook::Tcp)?;
            inner
                .pass
                .set(0, pass, 0)
                .map_err(Error::map("starting a pass"))?;
            prepare_iterator(&mut inner.ebpf, program::SWEEP)?
        };
        let mut goes_on = true;
        let swept = namespace.enter(|| {
            // A buffer of one byte ends each read where a batch ends.
            run_iterator(link, &mut [0], |_| {
                goes_on = pause();
                ensure!(goes_on, "stopped");
                Ok(())
            })
        });
        if !goes_on {
            return Ok(Step::Stopped);
        }
        let swept = swept
            .and_then(Option::transpose)
            .with_context(|| format!("sweeping network namespace {}", namespace.name))?;
        if swept.is_none() {
            return Ok(Step::Gone);
        }
        let done = self.inner().pass.get(&0, 0);
        Ok(Step::Done(done.map_err(Error::map("ending a pass"))?))
    }
}

impl Inner {
    fn load(&mut self, name: &'static str, kernel: &Kernel, over: Hook) -> Result<(), Error> {
        if !self.loaded.contains(&name) {
            load_iterator(&mut self.ebpf, name, kernel, over)?;
            self.loaded.push(name);
        }
        Ok(())
    }
}
