//! Subcommands of cargo that are built on first use, below the target directory.

use std::{env, process::Command};

use anyhow::Result;

use crate::{exec, workspace};

/// A cargo with this subcommand, in the version that this was tried with.
pub(crate) fn cargo_with(name: &str, version: &str) -> Result<Command> {
    let root = workspace::target_dir().join("tools");
    let bin = root.join("bin");
    // As cargo starts it: not each answers without its name.
    let subcommand = name.trim_start_matches("cargo-");
    let installed = exec::output(Command::new(bin.join(name)).args([subcommand, "--version"]));
    if !installed.is_ok_and(|text| text.contains(version)) {
        exec::say(&format!(
            "building {name} {version} below {}",
            root.display()
        ));
        exec::run(
            workspace::cargo()
                .args(["install", "--quiet", "--locked", name, "--version", version])
                .arg("--root")
                .arg(&root)
                .env(
                    "CARGO_TARGET_DIR",
                    workspace::target_dir().join("tools-build"),
                )
                .env_remove("RUSTFLAGS"),
        )?;
    }
    let mut cargo = workspace::cargo();
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([bin].into_iter().chain(env::split_paths(&path)))?;
    cargo.env("PATH", path);
    Ok(cargo)
}
