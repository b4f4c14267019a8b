//! Subcommands of cargo that are built on first use, below the target directory.

use std::{env, process::Command};

use anyhow::Result;

use crate::{exec, workspace};

/// A cargo with this subcommand, in the version that this was tried with.
pub(crate) fn cargo_with(name: &str, version: &str) -> Result<Command> {
    let target = workspace::target_dir();
    let root = target.join("tools");
    // Cargo does nothing where it installed just this one before.
    exec::run(
        workspace::cargo()
            .args(["install", "--quiet", "--locked", name, "--version", version])
            .arg("--root")
            .arg(&root)
            .env("CARGO_TARGET_DIR", target.join("tools-build"))
            .env_remove("RUSTFLAGS"),
    )?;
    let mut cargo = workspace::cargo();
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(
        [root.join("bin")]
            .into_iter()
            .chain(env::split_paths(&path)),
    )?;
    cargo.env("PATH", path);
    Ok(cargo)
}
