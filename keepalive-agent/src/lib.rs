//! The agent: tells the kernel the policy and shows what became of it.
//!
//! [`config`] reads what a person wrote, [`assignment`] finds out which cgroups
//! it concerns, [`policy_set`] makes records of both, [`datapath`] builds them in
//! the kernel and puts them in force. [`daemon`] keeps all that up to date while
//! the node changes; [`cli`] has one file per subcommand.
#![deny(unsafe_code)]

#[cfg(not(all(target_endian = "little", target_pointer_width = "64")))]
compile_error!(
    "keepalive-agent is for 64-bit little-endian machines: its BPF object is little-endian, and \
     it takes the kernel's pointers for 8 bytes"
);

#[cfg(any(target_arch = "mips64", target_arch = "mips64r6"))]
compile_error!(
    "keepalive-agent is not for MIPS: the numbers of SO_KEEPALIVE and its like in \
     keepalive-common are those of all other machines"
);

/// Version and commit, for `--version` and reports.
pub(crate) const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (",
    env!("KEEPALIVE_COMMIT"),
    ")"
);

pub mod assignment;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod duration;
pub mod enforcing;
pub mod explain;
pub mod grant;
pub mod hierarchy;
pub mod identity;
pub mod kernel;
pub mod memory;
pub mod metrics;
pub mod mountinfo;
pub mod names;
pub mod netns;
pub mod network;
pub mod paths;
pub mod policy_set;
pub mod rules;
pub mod sockets;
pub mod sweep;
pub mod unblocked;
pub mod view;
pub mod watch;
