//! What both sides of keepalive agree on.
//!
//! The decision about a socket is pure code here, run by the BPF program for
//! every new connection and by the agent wherever it explains or checks one:
//!
//! * [`policy`]: what should hold for a socket,
//! * [`policy_record`]: the same as it stands in the kernel,
//! * [`plan`]: what has to be set on a socket so that it does,
//! * [`history`]: what the application set, where a policy has written before,
//! * [`cgroup_event`]: that a cgroup was made or removed,
//! * [`counters`]: what was done, counted,
//! * [`dead_peer`]: that a peer was found dead, and how,
//! * [`environment`]: what holds for a socket on which nothing is set,
//! * [`timers`]: when the kernel's timers fire,
//! * [`layout`]: where the running kernel keeps the fields that the plan reads,
//! * [`slot`]: how a cgroup points to its policy,
//! * [`socket`]: one connection, as it is listed,
//! * [`sweep`]: how a pass over the existing connections is steered.
//!
//! Functions with `extern "C"` and `no_mangle` are global functions of the BPF
//! programs: numbers in, a number out. The verifier looks at each of them once,
//! by itself, and not again with everything it knows where it is called: it would
//! follow each combination of set, unset and bounded timers to the end.
//!
//! Every record that crosses into a BPF map is `repr(C)`, made of integers
//! only, and without padding.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

pub mod cgroup_event;
pub mod counters;
pub mod dead_peer;
pub mod descriptor;
pub mod environment;
pub mod history;
pub mod layout;
pub mod plan;
pub mod policy;
pub mod policy_record;
pub mod slot;
pub mod socket;
pub mod sweep;
pub mod timers;

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]
mod pod;
