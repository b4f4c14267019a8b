//! Slots: how a cgroup points to its policy.
//!
//! A cgroup maps to a slot number; policies and counters are arrays indexed by
//! it. Thousands of cgroups can share a policy, and giving a cgroup another one
//! is a single 8-byte write that no socket can see half of.

/// What a cgroup claims for its sockets, and for those below it that have no
/// nearer claim. The first claim on the way up decides.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The slot of the policy; [`UNCLAIMED`] where there is none.
    pub slot: u32,
    /// The slot that was claimed before the policy last changed, for the sweep
    /// that follows.
    pub before: u32,
}

impl Claim {
    /// No policy now, none before.
    pub const NONE: Self = Self {
        slot: UNCLAIMED,
        before: UNCLAIMED,
    };
}

/// Counts the sockets that no policy claims; holds no policy.
pub const UNCLAIMED: u32 = 0;

/// The first slot that holds a policy.
pub const FIRST: u32 = 1;

/// How many cgroups the walk from a socket's cgroup to the root looks at, its
/// own included. Deeper ones are never seen to have a policy higher up; real
/// hierarchies (nested container runtimes included) stay below 20.
pub const MAX_DEPTH: u32 = 32;
