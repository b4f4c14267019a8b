//! What the live tests stand on: guards that own a cgroup, a network namespace, an
//! agent or a program and take it away again, also when a test panics.
//!
//! The tests need root, a kernel that loads the agent's program, and the agent
//! itself (`KEEPALIVE_AGENT`, or what `cargo xtask build` leaves in the target
//! directory). A test that needs something that this machine does not have says
//! so and is skipped: see [`require!`].

#![forbid(unsafe_code)]

mod agent;
mod agent_thread;
mod capture;
mod cgroup;
mod connections;
mod container;
mod crowd;
mod docker;
mod home;
mod loaded;
mod nat;
mod netns;
mod options;
mod pins;
mod probe;
mod process;
mod programs;
mod random;
mod skip;
mod ss;

pub use agent::{Agent, Finished, agent_binary, agent_command};
pub use agent_thread::AgentThread;
pub use capture::{Capture, Segment, first_probes};
pub use cgroup::{Cgroup, hierarchy};
pub use connections::Connection;
pub use container::Container;
pub use crowd::{Churn, Churned, Crowd};
pub use docker::Docker;
pub use home::Home;
pub use loaded::{Loaded, Status, bpftool, detach, status};
pub use nat::ForgetfulNat;
pub use netns::Netns;
pub use options::{Options, Sockopt};
pub use pins::Pins;
pub use probe::{CallError, GoProbe, Kind, Neighbour, Probe, Side, Socket, errno};
pub use process::{Dialogue, Output, Place, Process, output, wait_until};
pub use programs::{Program, go_build, libkeepalive};
pub use random::Random;
pub use skip::{Need, missing, postgres, skip, soak_or};
pub use ss::{Timer, between, timer, timers, timers_in_state};
