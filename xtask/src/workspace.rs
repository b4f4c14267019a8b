//! Where things are, and the cargo that started this process.

use std::{
    env, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

/// The directory of the workspace's `Cargo.toml`.
pub(crate) fn root() -> PathBuf {
    let manifest_dir = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest_dir
        .parent()
        .map_or_else(|| manifest_dir.clone(), Path::to_path_buf)
}

/// Where cargo puts what it builds for the host: `target`, unless the user
/// moved it with `CARGO_TARGET_DIR`.
pub(crate) fn target_dir() -> PathBuf {
    let Some(dir) = env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty()) else {
        return root().join("target");
    };
    std::path::absolute(&dir).unwrap_or_else(|_| PathBuf::from(dir))
}

/// Cargo's own directory: its registry, and the programs it installed.
pub(crate) fn cargo_home() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(env::home_dir()?.join(".cargo")))
}

/// A binary of the BPF crate, as its build leaves it.
pub(crate) fn bpf_binary(name: &str) -> PathBuf {
    target_dir()
        .join("bpf-build/bpfel-unknown-none/release")
        .join(name)
}

/// The agent, as `cargo xtask build` leaves it.
pub(crate) fn agent() -> PathBuf {
    target_dir().join("release/keepalive-agent")
}

/// The cargo that runs this process, at the root of the workspace, for the host.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    at_root(&mut cargo).env("CARGO_TARGET_DIR", target_dir());
    cargo
}

/// Starts `command` at the root of the workspace, without what would move a
/// build's result to another place.
pub(crate) fn at_root(command: &mut Command) -> &mut Command {
    command
        .current_dir(root())
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("CARGO_BUILD_TARGET_DIR")
}

/// Whether this process may do everything; read from /proc because the standard
/// library does not tell.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// `program args`, with root's rights.
pub(crate) fn as_root(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut sudo = Command::new("sudo");
    sudo.arg(program);
    sudo
}
