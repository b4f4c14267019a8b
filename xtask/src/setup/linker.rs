//! bpf-linker: links bitcode, and so must contain an LLVM that can read what
//! the compiler's LLVM wrote.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{Compiler, apt};
use crate::{exec, workspace};

const NAME: &str = "bpf-linker";

/// The first bpf-linker that fits the compiler; builds one when there is none.
pub(super) fn find_or_install(compiler: &Compiler) -> Result<PathBuf> {
    let why = match find(compiler)? {
        Ok(linker) => return Ok(linker),
        Err(why) => why,
    };
    install(compiler.llvm_major, &why)?;
    match find(compiler)? {
        Ok(linker) => Ok(linker),
        Err(why) => bail!("bpf-linker was installed, but still: {why}"),
    }
}

/// The outer error is one of this tool, the inner one tells why no linker fits.
fn find(compiler: &Compiler) -> Result<Result<PathBuf, String>> {
    let linkers = installed();
    if linkers.is_empty() {
        return Ok(Err("none is installed".to_owned()));
    }
    let trial = Trial::prepare(compiler)?;
    let mut reasons = Vec::new();
    for linker in linkers {
        match trial.link(&linker) {
            Ok(()) => return Ok(Ok(linker)),
            Err(reason) => reasons.push(format!("{} {reason}", linker.display())),
        }
    }
    Ok(Err(reasons.join(", ")))
}

fn installed() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(env::home_dir()?.join(".cargo")));
    let mut found = Vec::new();
    for dir in env::split_paths(&path).chain(cargo_home.map(|home| home.join("bin"))) {
        let linker = dir.join(NAME);
        if linker.is_file() && !found.contains(&linker) {
            found.push(linker);
        }
    }
    found
}

/// A link of next to nothing. `bpf-linker --version` does not name its LLVM, but
/// the bitcode it writes does.
struct Trial {
    dir: PathBuf,
    llvm_major: u32,
}

impl Trial {
    fn prepare(compiler: &Compiler) -> Result<Self> {
        let dir = workspace::target_dir().join("bpf-linker-trial");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let source = dir.join("empty.rs");
        fs::write(&source, "#![feature(no_core)]\n#![no_core]\n")
            .with_context(|| format!("cannot write {}", source.display()))?;
        exec::output(
            compiler
                .rustc()
                .args(["--crate-type=lib", "--emit=llvm-bc", "-Ainternal_features"])
                .args(["--target=bpfel-unknown-none", "-o"])
                .arg(dir.join("empty.bc"))
                .arg(&source),
        )?;
        Ok(Self {
            dir,
            llvm_major: compiler.llvm_major,
        })
    }

    /// Why `linker` does not fit, unless it does.
    fn link(&self, linker: &Path) -> Result<(), String> {
        let bitcode = self.dir.join("linked.bc");
        exec::output(
            Command::new(linker)
                .args(["--emit=llvm-bc", "-o"])
                .arg(&bitcode)
                .arg(self.dir.join("empty.bc")),
        )
        .map_err(|error| {
            let error = format!("{error:#}");
            format!(
                "does not link: {}",
                error.lines().last().unwrap_or_default()
            )
        })?;
        let bitcode = fs::read(&bitcode).map_err(|error| format!("linked nothing: {error}"))?;
        match llvm_major_of_writer(&bitcode) {
            Some(major) if major >= self.llvm_major => Ok(()),
            Some(major) => Err(format!(
                "has LLVM {major}, which cannot read what the compiler's LLVM {} writes",
                self.llvm_major
            )),
            None => Err("does not tell which LLVM it has".to_owned()),
        }
    }
}

/// The LLVM that wrote `bitcode`. A file of bitcode begins with the name of its
/// writer, `LLVM22.1.8`, in letters of six bits that start at any bit.
fn llvm_major_of_writer(bitcode: &[u8]) -> Option<u32> {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._";
    let head = bitcode.strip_prefix(b"BC\xc0\xde")?;
    let bits = head
        .iter()
        .take(64)
        .flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1))
        .collect::<Vec<u8>>();
    (0..bits.len()).find_map(|start| {
        let text = bits[start..]
            .chunks_exact(6)
            .map(|letter| letter.iter().rev().fold(0, |value, bit| value << 1 | bit))
            .map(|letter| char::from(LETTERS[usize::from(letter)]))
            .collect::<String>();
        let (major, _) = text.strip_prefix("LLVM")?.split_once('.')?;
        major.parse().ok()
    })
}

fn install(llvm_major: u32, why: &str) -> Result<()> {
    let package = format!("llvm-{llvm_major}-dev");
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm_major}"));
    let blocked = || {
        format!(
            "no bpf-linker for LLVM {llvm_major} ({why}), which the BPF programs are linked with; install a binary release of it, or: cargo binstall bpf-linker"
        )
    };
    if !prefix.join("bin/llvm-config").exists() {
        if !apt::available() {
            bail!(blocked());
        }
        exec::say(&format!(
            "installing {package}, which bpf-linker is built with"
        ));
        apt::install(&[&package]).with_context(blocked)?;
    }
    exec::say(&format!(
        "building and installing bpf-linker with LLVM {llvm_major}, about a minute: {why}"
    ));
    let mut path = prefix.join("bin").into_os_string();
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    exec::run(
        workspace::cargo()
            .args(["install", NAME, "--force", "--no-default-features"])
            .args(["--features", &format!("llvm-{llvm_major}")])
            .env("LLVM_PREFIX", prefix)
            .env("PATH", path)
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS"),
    )
    .with_context(blocked)
}

#[cfg(test)]
mod tests {
    use super::*;

    // As bpf-linker 0.13 built with LLVM 22 begins.
    const LLVM_22: &[u8] = &[
        0x42, 0x43, 0xc0, 0xde, 0x35, 0x14, 0x00, 0x00, 0x05, 0x00, 0x00, 0x00, 0x62, 0x0c, 0x30,
        0x24, 0x4a, 0x59, 0xbe, 0xa6, 0x6d, 0xfb, 0xb5, 0xcf, 0x0b, 0x51, 0x80, 0x4c, 0x01, 0x00,
        0x00, 0x00,
    ];

    #[test]
    fn bitcode_names_the_llvm_that_wrote_it() {
        assert_eq!(llvm_major_of_writer(LLVM_22), Some(22));
    }

    #[test]
    fn what_is_not_bitcode_has_no_writer() {
        assert_eq!(llvm_major_of_writer(b"\x7fELF"), None);
        assert_eq!(llvm_major_of_writer(&LLVM_22[..12]), None);
        assert_eq!(llvm_major_of_writer(&[]), None);
    }
}
