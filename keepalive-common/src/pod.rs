//! The records as values of aya's maps and globals.

use crate::{
    counters::{Counters, Failure, FailureKey},
    dead_peer::DeadPeers,
    history::SocketHistory,
    layout::Layout,
    policy_record::PolicyRecord,
    slot::{Claim, Found, PortKey, RemoteKey, Step},
    sweep::Pass,
};

// SAFETY: each record is `repr(C)`, made of integers only and free of padding
// (the tests of their modules hold the sizes against the fields), so any bit
// pattern is a value and every byte of it is initialised.
unsafe impl aya::Pod for PolicyRecord {}
// SAFETY: as above.
unsafe impl aya::Pod for Counters {}
// SAFETY: as above.
unsafe impl aya::Pod for DeadPeers {}
// SAFETY: as above.
unsafe impl aya::Pod for FailureKey {}
// SAFETY: as above.
unsafe impl aya::Pod for Failure {}
// SAFETY: as above.
unsafe impl aya::Pod for Layout {}
// SAFETY: as above.
unsafe impl aya::Pod for SocketHistory {}
// SAFETY: as above.
unsafe impl aya::Pod for Claim {}
// SAFETY: as above.
unsafe impl aya::Pod for Pass {}
// SAFETY: as above.
unsafe impl aya::Pod for Step {}
// SAFETY: as above.
unsafe impl aya::Pod for RemoteKey {}
// SAFETY: as above.
unsafe impl aya::Pod for PortKey {}
// SAFETY: as above.
unsafe impl aya::Pod for Found {}
