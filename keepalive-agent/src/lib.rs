//! The agent: tells the kernel the policy and shows what became of it.
//!
//! [`config`] reads what a person wrote, [`assignment`] finds out which cgroups
//! it concerns, [`bpf`] brings both into the kernel. [`cli`] has one file per
//! subcommand.
#![forbid(unsafe_code)]

pub mod assignment;
pub mod bpf;
pub mod cli;
pub mod config;
pub mod duration;
pub mod hierarchy;
pub mod kernel;
pub mod netns;
pub mod network;
pub mod paths;
pub mod rules;
pub mod sockets;
pub mod state;
pub mod sweep;
pub mod watch;
