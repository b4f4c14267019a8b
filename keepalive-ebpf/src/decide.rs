//! The decision about an existing connection, as global functions: the verifier
//! looks at each of them once, by itself, and not again with everything it knows
//! where it is called. In memory of a map: there is not enough on the stack.

use core::ptr;

use aya_ebpf::{btf_maps::Array, macros::btf_map};
use keepalive_common::{
    environment::Environment,
    history::{Originals, application, known_by, replan},
    plan::Options,
    policy::Policy,
};

/// The connection that is being decided about. Passes follow one another, so
/// there is one at a time.
#[btf_map]
static SUBJECT: Array<Subject, 1> = Array::new();

/// A connection that is decided about, and what came of it.
#[repr(C)]
pub(crate) struct Subject {
    /// What is set on it.
    pub(crate) has: Options,
    /// What policies replaced on it so far.
    pub(crate) originals: Originals,
    /// Where it is.
    pub(crate) environment: Environment,
    /// What the application set.
    pub(crate) application: Options,
    /// What is to be set.
    pub(crate) wants: Options,
    /// What the policy is known by later.
    pub(crate) known: Options,
    /// See [`keepalive_common::plan::Plan`].
    pub(crate) user_timeout_conflict: bool,
}

/// Where a connection is decided about.
#[inline(always)]
pub(crate) fn subject() -> Option<&'static mut Subject> {
    let subject = SUBJECT.get_ptr_mut(0)?;
    // SAFETY: an element of an array lives as long as the map, and passes do not
    // run at the same time.
    Some(unsafe { &mut *subject })
}

/// Decides what becomes of a connection under a policy, which an earlier one may
/// have written to.
#[inline(always)]
pub(crate) fn decide_about(subject: &mut Subject, policy: &Policy, before: Option<&Policy>) {
    let before = before.map_or(ptr::null(), ptr::from_ref);
    recognise(before, subject);
    decide(policy, subject);
}

/// What the application set. In two steps, with a frame each: there is little
/// stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn recognise(before: *const Policy, subject: *mut Subject) -> u32 {
    // SAFETY: null, or memory of that type, as the verifier makes sure of at each
    // call.
    let (before, subject) = unsafe { (before.as_ref(), subject.as_mut()) };
    let Some(subject) = subject else {
        return 0;
    };
    let Subject {
        has,
        originals,
        environment,
        ..
    } = subject;
    subject.application = application(has, originals, before, environment);
    1
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn decide(policy: *const Policy, subject: *mut Subject) -> u32 {
    // SAFETY: as above.
    let (policy, subject) = unsafe { (policy.as_ref(), subject.as_mut()) };
    let (Some(policy), Some(subject)) = (policy, subject) else {
        return 0;
    };
    let Subject {
        has,
        originals,
        environment,
        application,
        ..
    } = subject;
    let plan = replan(policy, has, application, originals, environment);
    subject.wants = plan.wants;
    subject.user_timeout_conflict = plan.user_timeout_conflict;
    subject.known = known_by(policy, &plan, environment);
    1
}
