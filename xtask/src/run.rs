//! `cargo xtask run`: the agent, freshly built, in the foreground.

use std::{convert::Infallible, ffi::OsString, os::unix::process::CommandExt as _};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{build, exec, workspace};

/// Build, then run the agent in the foreground, through sudo when not root
///
/// Without arguments it is `keepalive-agent run`.
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask run -- check")]
pub(crate) struct Options {
    /// What to hand to keepalive-agent, instead of `run`
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<OsString>,
}

/// Never returns but with an error: the agent takes the place of this process,
/// so that it gets the terminal's signals itself.
pub(crate) fn main(options: &Options) -> Result<Infallible> {
    build::build()?;
    let agent = workspace::agent();
    let mut command = workspace::as_root(&agent);
    if options.args.is_empty() {
        command.arg("run");
    } else {
        command.args(&options.args);
    }
    exec::announce(&command);
    Err(command.exec()).with_context(|| format!("cannot start {}", agent.display()))
}
