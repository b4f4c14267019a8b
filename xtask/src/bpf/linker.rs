//! bpf-linker: links bitcode, and so must contain an LLVM that can read what
//! the compiler's LLVM wrote.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::Compiler;
use crate::{apt, exec, workspace};

const NAME: &str = "bpf-linker";

/// A bpf-linker that fits the compiler.
pub(super) struct Linker {
    pub(super) path: PathBuf,
    /// As it calls itself: `bpf-linker 0.13.0`.
    name: String,
    /// The version of its LLVM.
    llvm: String,
}

/// As it is recorded beside the object.
impl fmt::Display for Linker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, LLVM {}", self.name, self.llvm)
    }
}

/// The first bpf-linker that fits the compiler; builds one when there is none.
pub(super) fn find_or_install(compiler: &Compiler) -> Result<Linker> {
    let why = match find(compiler)? {
        Ok(linker) => return Ok(linker),
        Err(why) => why,
    };
    let llvm_major = compiler
        .llvm_major()
        .with_context(|| format!("{compiler}: no version of LLVM"))?;
    install(llvm_major, &why)?;
    match find(compiler)? {
        Ok(linker) => Ok(linker),
        Err(why) => bail!("bpf-linker was installed, but still: {why}"),
    }
}

/// The outer error is one of this tool, the inner one tells why no linker fits.
pub(super) fn find(compiler: &Compiler) -> Result<Result<Linker, String>> {
    let linkers = installed();
    if linkers.is_empty() {
        return Ok(Err("none is installed".to_owned()));
    }
    let trial = Trial::prepare(compiler)?;
    let mut reasons = Vec::new();
    for linker in linkers {
        match trial.link(&linker) {
            Ok(linker) => return Ok(Ok(linker)),
            Err(reason) => reasons.push(format!("{} {reason}", linker.display())),
        }
    }
    Ok(Err(reasons.join(", ")))
}

fn installed() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_bin = workspace::cargo_home().map(|home| home.join("bin"));
    let mut found = Vec::new();
    for dir in env::split_paths(&path).chain(cargo_bin) {
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
    llvm_major: Option<u32>,
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
            llvm_major: compiler.llvm_major(),
        })
    }

    /// The linker at `path`, or why it does not fit.
    fn link(&self, path: &Path) -> Result<Linker, String> {
        let bitcode = self.dir.join("linked.bc");
        exec::output(
            Command::new(path)
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
        let llvm = llvm_of_writer(&bitcode).ok_or("does not tell which LLVM it has")?;
        let major = llvm.split('.').next().and_then(|major| major.parse().ok());
        if major < self.llvm_major {
            return Err(format!(
                "has LLVM {llvm}, which cannot read what the compiler writes"
            ));
        }
        let name = exec::output(Command::new(path).arg("--version"))
            .map_err(|error| format!("does not tell its version: {error}"))?;
        Ok(Linker {
            path: path.to_owned(),
            name: name.trim().to_owned(),
            llvm,
        })
    }
}

/// The version of the LLVM that wrote `bitcode`. A file of bitcode begins with
/// the name of its writer, `LLVM22.1.8`, in letters of six bits that start at
/// any bit.
fn llvm_of_writer(bitcode: &[u8]) -> Option<String> {
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
        let version = text.strip_prefix("LLVM")?;
        let end = version.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
        let version = &version[..end.unwrap_or(version.len())];
        version.contains('.').then(|| version.to_owned())
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
        assert_eq!(llvm_of_writer(LLVM_22).as_deref(), Some("22.1.8"));
    }

    #[test]
    fn what_is_not_bitcode_has_no_writer() {
        assert_eq!(llvm_of_writer(b"\x7fELF"), None);
        assert_eq!(llvm_of_writer(&LLVM_22[..12]), None);
        assert_eq!(llvm_of_writer(&[]), None);
    }
}
