//! Embeds the BPF object and names the commit.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let workspace = manifest.parent().expect("the crate is in a workspace");
    embed_object(&workspace.join("target/bpf/keepalive.bpf.o"));
    name_commit(workspace);
}

/// Copies what `cargo xtask build` made. Without it the crate still builds, so
/// that plain `cargo test` works anywhere; such an agent says so when it is
/// asked to load a program.
fn embed_object(object: &Path) {
    println!("cargo::rerun-if-changed={}", object.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("keepalive.bpf.o");
    if object.exists() {
        fs::copy(object, &out).expect("copy the BPF object");
    } else {
        fs::write(&out, []).expect("write an empty BPF object");
    }
}

/// The commit for `--version`, "unknown" outside a git checkout.
fn name_commit(workspace: &Path) {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .arg("-C")
            .arg(workspace)
            .args(arguments)
            .output()
            .ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    if let Some(path) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=KEEPALIVE_COMMIT={commit}");
}
