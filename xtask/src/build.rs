//! `cargo xtask build`: the BPF object, then the agent that embeds it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{exec, setup, workspace};

/// Build the BPF object, then the agent that embeds it
#[derive(Args)]
#[command(
    after_help = "Example:\n  cargo xtask build\n\nLeaves the object in target/bpf/keepalive.bpf.o and the agent in target/release/keepalive-agent."
)]
pub(crate) struct Options {}

pub(crate) fn main(_: &Options) -> Result<()> {
    build()
}

/// Builds everything that runs on a user's machine.
pub(crate) fn build() -> Result<()> {
    object()?;
    exec::run(workspace::cargo().args(["build", "--release", "-p", "keepalive-agent"]))
}

/// Builds the BPF object that every agent embeds.
pub(crate) fn object() -> Result<()> {
    build_object(&setup::toolchain()?, "keepalive", &workspace::bpf_object())
}

/// Builds the BPF programs that the benchmark compares with.
pub(crate) fn bench_object() -> Result<()> {
    build_object(&setup::toolchain()?, "bench", &workspace::bench_object())
}

/// Builds one object of the BPF crate and leaves it at `to`.
fn build_object(toolchain: &setup::Toolchain, name: &str, to: &Path) -> Result<()> {
    let target = "bpfel-unknown-none";
    // Its own directory: another compiler with other flags would throw the
    // host's build away, and the other way round.
    let target_dir = workspace::target_dir().join("bpf-build");
    let linker_variable = format!(
        "CARGO_TARGET_{}_LINKER",
        target.replace('-', "_").to_uppercase()
    );
    let mut cargo = toolchain.compiler.cargo();
    cargo
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env(linker_variable, &toolchain.linker)
        .args(["build", "--release", "-p", "keepalive-ebpf"])
        .args(["--bin", name])
        .args(["--target", target, "-Z", "build-std=core"]);
    exec::run(&mut cargo)?;
    copy_if_changed(&target_dir.join(target).join("release").join(name), to)
}

/// An object that did not change keeps its time stamp, or cargo would build
/// the agent again.
fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    fs::write(to, new).with_context(|| format!("cannot write {}", to.display()))
}
