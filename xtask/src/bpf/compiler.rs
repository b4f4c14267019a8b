//! A Rust compiler that can build `core` for BPF: no release ships it built, so
//! its source must be there.

use std::{fmt, path::Path, process::Command};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::{apt, exec, workspace};

const SYSTEM_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];
const BY_HAND: &str = "rustup toolchain install nightly --component rust-src";

/// A compiler with the source of `core`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Compiler {
    kind: Kind,
    /// As it calls itself: `rustc 1.96.0 (ac68faa20 2026-05-25)`.
    name: String,
    /// The version of the LLVM whose bitcode it writes, which the linker must
    /// be able to read.
    llvm: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nightly,
    System,
}

impl Compiler {
    /// Its rustc.
    pub(super) fn rustc(&self) -> Command {
        let mut rustc = self.kind.rustc();
        if self.kind == Kind::System {
            rustc.env("RUSTC_BOOTSTRAP", "1");
        }
        rustc
    }

    /// A cargo that compiles with it, at the root of the workspace.
    pub(super) fn cargo(&self) -> Command {
        match self.kind {
            Kind::Nightly => {
                let mut rustup = rustup_run("cargo");
                workspace::at_root(&mut rustup).env_remove("CARGO");
                rustup
            }
            Kind::System => {
                let mut cargo = workspace::cargo();
                cargo.env("RUSTC", SYSTEM_RUSTC).env("RUSTC_BOOTSTRAP", "1");
                cargo
            }
        }
    }

    /// The major version of its LLVM.
    pub(super) fn llvm_major(&self) -> Option<u32> {
        self.llvm.split('.').next()?.parse().ok()
    }
}

/// As it is recorded beside the object.
impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, LLVM {}", self.name, self.llvm)
    }
}

impl Kind {
    fn rustc(self) -> Command {
        match self {
            Self::Nightly => rustup_run("rustc"),
            Self::System => Command::new(SYSTEM_RUSTC),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nightly => "rustup's nightly",
            Self::System => SYSTEM_RUSTC,
        })
    }
}

/// The compiler that the object was built with, if it is here, else the first
/// that fits; installs Debian's when there is none.
pub(super) fn find_or_install(recorded: Option<&str>) -> Result<Compiler> {
    let why = match find(recorded) {
        Ok(compiler) => return Ok(compiler),
        Err(why) => why,
    };
    let blocked = |why: &str| {
        format!("no compiler here can build the BPF programs ({why}); install one: {BY_HAND}")
    };
    if !apt::available() {
        bail!(blocked(&why));
    }
    exec::say(&format!(
        "installing {}, a compiler with the source of core: {why}",
        DEBIAN_PACKAGES.join(" and ")
    ));
    apt::install(&DEBIAN_PACKAGES).with_context(|| blocked(&why))?;
    find(recorded).map_err(|why| anyhow!(blocked(&why)))
}

/// The best compiler that fits, or why each does not.
pub(super) fn find(recorded: Option<&str>) -> Result<Compiler, String> {
    let mut fitting = Vec::new();
    let mut reasons = Vec::new();
    for kind in [Kind::Nightly, Kind::System] {
        match look_at(kind) {
            Ok(compiler) => fitting.push(compiler),
            Err(reason) => reasons.push(format!("{kind} {reason}")),
        }
    }
    // The sort is stable: of equals, the first.
    fitting.sort_by_key(|compiler| recorded != Some(&compiler.to_string()));
    let best = fitting.into_iter().next();
    best.ok_or_else(|| reasons.join(", "))
}

fn look_at(kind: Kind) -> Result<Compiler, String> {
    let sysroot = exec::output(kind.rustc().args(["--print", "sysroot"]))
        .map_err(|_| "is not installed or does not run".to_owned())?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
    if !core.is_dir() {
        return Err("has no rust-src".to_owned());
    }
    let version = exec::output(kind.rustc().arg("-vV")).map_err(|error| error.to_string())?;
    fit(kind, &version)
}

/// Whether a compiler that has the source of `core` is new enough, by its
/// `rustc -vV`.
fn fit(kind: Kind, version: &str) -> Result<Compiler, String> {
    let field = |name: &str| {
        version
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            .map(str::trim)
            .ok_or_else(|| format!("does not tell its {name}"))
    };
    let release = field("release")?;
    let llvm = field("LLVM version")?.to_owned();
    let needed = env!("CARGO_PKG_RUST_VERSION");
    if minor_version(release) < minor_version(needed) {
        return Err(format!("is {release}, older than {needed}"));
    }
    let name = version.lines().next().unwrap_or_default().to_owned();
    Ok(Compiler { kind, name, llvm })
}

/// `1.96.0-nightly` → (1, 96)
fn minor_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// `program` of rustup's nightly, without what cargo told this process about
/// its own toolchain.
fn rustup_run(program: &str) -> Command {
    let mut rustup = Command::new("rustup");
    rustup
        .args(["run", "nightly", program])
        // A question must not download a toolchain.
        .env("RUSTUP_AUTO_INSTALL", "0")
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("RUSTC");
    rustup
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "\
rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)
binary: rustc
release: 1.96.0
LLVM version: 22.1.8
";

    #[test]
    fn name_and_llvm_are_read() {
        let compiler = fit(Kind::System, DEBIAN).expect("it fits");
        assert_eq!(
            compiler.to_string(),
            "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball), LLVM 22.1.8"
        );
        assert_eq!(compiler.llvm_major(), Some(22));
    }

    #[test]
    fn a_compiler_that_is_old_or_does_not_tell_is_refused() {
        for (from, to, reason) in [
            ("release: 1.96.0", "release: 1.63.0", "is 1.63.0, older"),
            ("release: 1.96.0", "release: new", "is new, older"),
            ("LLVM version: 22.1.8", "", "does not tell its LLVM version"),
        ] {
            let error = fit(Kind::System, &DEBIAN.replace(from, to)).expect_err(to);
            assert!(error.starts_with(reason), "{error}");
        }
    }
}
