//! Subcommands of cargo that are built on first use, below the target directory.

use std::process::Command;

use anyhow::Result;

use crate::{exec, workspace};

/// A subcommand's program, in the version that this was tried with. It is given its
/// name as the first argument, as by cargo.
pub(crate) fn installed(name: &str, version: &str) -> Result<Command> {
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
    let mut tool = Command::new(root.join("bin").join(name));
    workspace::at_root(&mut tool).env("CARGO_TARGET_DIR", target);
    Ok(tool)
}
