//! `cargo xtask build`: the agent, with the BPF object that keepalive-ebpf ships.

use anyhow::Result;
use clap::Args;

use crate::{exec, workspace};

/// Build the agent; takes stable Rust and nothing else
#[derive(Args)]
#[command(
    after_help = "Example:\n  cargo xtask build\n\nLeaves the agent in target/release/keepalive-agent."
)]
pub(crate) struct Options {}

pub(crate) fn main(_: &Options) -> Result<()> {
    build()
}

/// Builds everything that runs on a user's machine.
pub(crate) fn build() -> Result<()> {
    exec::run(workspace::cargo().args(["build", "--release", "-p", "keepalive-agent"]))
}
