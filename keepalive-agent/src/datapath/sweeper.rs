//! Sweeper: runs the program that brings a set's policies to the connections
//! that exist, one network namespace at a time, on whichever thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, MapData};
use keepalive_common::sweep::Pass;

use super::{
    Error, Survey,
    iterators::{self, Iterator},
    object::LoadedObject,
    program, syscalls,
};
use crate::{kernel::layout::Hook, netns::Namespace};

/// Runs the sweeping program of one policy set. Clones share the program: passes
/// follow one another.
#[derive(Clone)]
pub struct Sweeper {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    object: LoadedObject,
    pass: Array<MapData, Pass>,
    sweep: Option<Arc<Iterator>>,
    survey: Option<Arc<Iterator>>,
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
    pub(super) fn new(object: LoadedObject, pass: Array<MapData, Pass>, counts: bool) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                object,
                pass,
                sweep: None,
                survey: None,
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
        self.inner().sweep().map(drop)
    }

    /// How many instructions the verifier went through to accept the program; none
    /// where the kernel does not tell (before Linux 5.16) or it is not loaded.
    #[must_use]
    pub fn verified_instructions(&self) -> Option<u32> {
        let sweep = self.inner().sweep.clone()?;
        let info = syscalls::program_info(&sweep.program).ok()?;
        info.verified_instructions
    }

    /// Finds out which namespaces have connections, and which of them there is
    /// anything to do for.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program, or knows this process by another id
    /// than /proc: then every namespace has to be entered.
    pub fn survey(&self, pass: Pass) -> Result<Survey> {
        let survey = {
            let mut inner = self.inner();
            let survey = inner.survey()?;
            inner
                .pass
                .set(0, pass, 0)
                .map_err(Error::map("starting a survey"))?;
            survey
        };
        Survey::read(survey.open()?)
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
        let sweep = {
            let mut inner = self.inner();
            let sweep = inner.sweep()?;
            inner
                .pass
                .set(0, pass, 0)
                .map_err(Error::map("starting a pass"))?;
            sweep
        };
        let mut goes_on = true;
        let swept = namespace.enter(|| {
            // A buffer of one byte ends each read where a batch ends.
            iterators::read(sweep.open()?, &mut [0], |_| {
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
    /// The sweeping program, loaded at its first use.
    fn sweep(&mut self) -> Result<Arc<Iterator>, Error> {
        load_once(&self.object, &mut self.sweep, program::SWEEP, Hook::Tcp)
    }

    /// The surveying program, loaded at its first use.
    fn survey(&mut self) -> Result<Arc<Iterator>, Error> {
        load_once(&self.object, &mut self.survey, program::SURVEY, Hook::Files)
    }
}

fn load_once(
    object: &LoadedObject,
    loaded: &mut Option<Arc<Iterator>>,
    name: &'static str,
    over: Hook,
) -> Result<Arc<Iterator>, Error> {
    if let Some(loaded) = loaded {
        return Ok(Arc::clone(loaded));
    }
    let iterator = Arc::new(Iterator::load(object, name, over)?);
    *loaded = Some(Arc::clone(&iterator));
    Ok(iterator)
}
