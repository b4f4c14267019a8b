//! Embeds the BPF object that keepalive-ebpf ships, and names the commit.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{self, Command},
};

#[path = "../keepalive-ebpf/object/metadata.rs"]
mod bpf_object;

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let workspace = manifest.parent().expect("the crate is in a workspace");
    embed_object(workspace);
    name_commit(workspace);
}

/// Stops the build when the object is older than its sources.
fn embed_object(workspace: &Path) {
    let read = [bpf_object::OBJECT, bpf_object::METADATA, "Cargo.lock"];
    for path in read.iter().chain(&bpf_object::SOURCES) {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    match bpf_object::current_object(workspace) {
        Ok(object) => {
            let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
            fs::write(out.join("keepalive.bpf.o"), object).expect("write the BPF object");
        }
        Err(reason) => {
            println!("cargo::error={reason}");
            process::exit(1);
        }
    }
}

/// The commit for `--version` and its date for man pages; "unknown" and empty
/// outside a git checkout.
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
    let date = git(&["log", "-1", "--format=%cs"]).unwrap_or_default();
    println!("cargo::rustc-env=KEEPALIVE_DATE={date}");
}
