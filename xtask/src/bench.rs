//! `cargo xtask bench`: what keepalive costs, by the crate keepalive-bench.

use std::{env, ffi::OsString, fs};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{bpf, build, exec, workspace};

/// Measure what keepalive costs, beside everything else one could do
#[derive(Args)]
#[command(
    after_help = "Examples:\n  sudo -E cargo xtask bench hook churn --json bench.json\n  sudo -E cargo xtask bench -- --help"
)]
pub(crate) struct Options {
    /// What to measure and how: `-- --help` tells
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

pub(crate) fn main(options: &Options) -> Result<()> {
    let object = bpf::build_bench_object()?;
    build::build()?;
    // Where nobody else writes: the agent is woken by what changes beside its config.
    let files = workspace::target_dir().join("bench");
    fs::create_dir_all(&files).with_context(|| format!("cannot create {}", files.display()))?;
    exec::run(
        workspace::cargo()
            .args(["run", "--release", "-p", "keepalive-bench", "--"])
            .args(&options.args)
            // Files are named from there.
            .current_dir(env::current_dir()?)
            .env("KEEPALIVE_AGENT", workspace::agent())
            .env("KEEPALIVE_BENCH_OBJECT", object)
            .env("TMPDIR", files),
    )
}
