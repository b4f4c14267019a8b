//! Sweeper: runs the program that brings a set's policies to the connections
//! that exist, one network namespace at a time, on whichever thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::{Array, MapData};
use keepalive_common::sweep::Pass;

use super::{
    Error, Survey,
    iterators::{self, Iterator},
    object::LoadedObject,
    program,
    survey::{DueSockets, add_due_sockets},
    syscalls,
};
use crate::{kernel::layout::Hook, netns::Namespace};

/// Runs the sweeping program of one policy set. Clones share the program: passes
/// follow one another.
#[derive(Clone)]
pub struct Sweeper {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    object: Arc<LoadedObject>,
    pass: Array<MapData, Pass>,
    sweep: Option<Arc<Iterator>>,
    survey: Option<Arc<Iterator>>,
    /// Whether existing connections are still to be counted.
    counts: bool,
    /// Whether programs may be running that go by policies of before.
    may_be_late: bool,
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

/// Why a pass did not go through.
enum Ended {
    Stopped,
    Failed(Error),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Sweeper {
    pub(super) fn new(object: Arc<LoadedObject>, pass: Array<MapData, Pass>, counts: bool) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                object,
                pass,
                sweep: None,
                survey: None,
                counts,
                may_be_late: false,
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

    /// Says that policies have changed just now: [`Self::load`] waits for the programs
    /// that were running then.
    pub(super) fn policies_changed(&self) {
        self.inner().may_be_late = true;
    }

    /// Makes ready for a pass: loads the sweeping program, if that has not been done, and
    /// waits until no program goes by policies of before.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with its reason.
    ///
    /// # Minimum kernel version
    ///
    /// 5.15, for bpf_setsockopt in iterators.
    pub fn load(&self) -> Result<(), Error> {
        if self.inner().may_be_late {
            syscalls::wait_for_programs().map_err(Error::call("waiting for running programs"))?;
            self.inner().may_be_late = false;
        }
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
    pub fn survey(&self) -> Result<Survey, Error> {
        let survey = self.inner().begin_survey()?;
        Survey::read(survey.open()?)
    }

    /// Finds out in which namespaces a pass may have something to do for what these
    /// processes hold.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program, or does not tell of one process alone:
    /// then [`Self::survey`] finds it. Processes that have ended hold nothing.
    ///
    /// # Minimum kernel version
    ///
    /// 6.1.
    pub fn survey_processes(&self, processes: &[u32], due: &mut DueSockets) -> Result<(), Error> {
        let survey = self.inner().begin_survey()?;
        for process in processes {
            add_due_sockets(*process, survey.open_of_process(*process)?, due)?;
        }
        Ok(())
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
    ) -> Result<Step, Error> {
        let sweep = {
            let mut inner = self.inner();
            let sweep = inner.sweep()?;
            inner
                .pass
                .set(0, pass, 0)
                .map_err(Error::map("starting a pass"))?;
            sweep
        };
        let swept = namespace.enter(|| {
            // A buffer of one byte ends each read where a batch ends.
            iterators::read(sweep.open()?, &mut [0], |_| {
                if pause() { Ok(()) } else { Err(Ended::Stopped) }
            })
        });
        let failed = match swept {
            Ok(None) => return Ok(Step::Gone),
            Ok(Some(Err(Ended::Stopped))) => return Ok(Step::Stopped),
            Ok(Some(Ok(()))) => None,
            Ok(Some(Err(Ended::Failed(error)))) => Some(error),
            Err(error) => Some(error.into()),
        };
        if let Some(source) = failed {
            return Err(Error::Sweeping {
                name: namespace.name.clone(),
                source: Box::new(source),
            });
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

    /// The surveying program, loaded at its first use, for a pass over everything that
    /// is due.
    fn begin_survey(&mut self) -> Result<Arc<Iterator>, Error> {
        let survey = load_once(&self.object, &mut self.survey, program::SURVEY, Hook::Files)?;
        self.pass
            .set(0, Pass::default(), 0)
            .map_err(Error::map("starting a survey"))?;
        Ok(survey)
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
