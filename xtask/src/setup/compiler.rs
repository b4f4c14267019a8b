//! A Rust compiler that can build `core` for BPF: no release ships it built, so
//! its source must be there.

use std::{fmt, path::Path, process::Command};

use anyhow::{Context as _, Result, anyhow, bail};

use super::apt;
use crate::{exec, workspace};

const SYSTEM_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];
const BY_HAND: &str = "rustup toolchain install nightly --component rust-src";

/// A compiler with the source of `core`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Compiler {
    kind: Kind,
    release: String,
    /// The LLVM whose bitcode it writes; the linker must be able to read it.
    pub(crate) llvm_major: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nightly,
    System,
}

impl Compiler {
    /// Its rustc.
    pub(crate) fn rustc(&self) -> Command {
        let mut rustc = self.kind.rustc();
        if self.kind == Kind::System {
            rustc.env("RUSTC_BOOTSTRAP", "1");
        }
        rustc
    }

    /// A cargo that compiles with it, at the root of the workspace.
    pub(crate) fn cargo(&self) -> Command {
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
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            release,
            llvm_major,
        } = self;
        write!(f, "{kind}, {release}, LLVM {llvm_major}")
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

/// The first compiler that fits; installs Debian's when there is none.
pub(super) fn find_or_install() -> Result<Compiler> {
    let why = match find() {
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
    find().map_err(|why| anyhow!(blocked(&why)))
}

/// The first compiler that fits, or why each does not.
fn find() -> Result<Compiler, String> {
    let mut reasons = Vec::new();
    for kind in [Kind::Nightly, Kind::System] {
        match look_at(kind) {
            Ok(compiler) => return Ok(compiler),
            Err(reason) => reasons.push(format!("{kind} {reason}")),
        }
    }
    Err(reasons.join(", "))
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
    let llvm = field("LLVM version")?;
    let unclear = |what: &str| format!("has a version that cannot be read: {what}");
    let needed = env!("CARGO_PKG_RUST_VERSION");
    if minor_version(release).ok_or_else(|| unclear(release))?
        < minor_version(needed).unwrap_or((0, 0))
    {
        return Err(format!("is {release}, older than {needed}"));
    }
    Ok(Compiler {
        kind,
        release: release.to_owned(),
        llvm_major: llvm
            .split('.')
            .next()
            .and_then(|major| major.parse().ok())
            .ok_or_else(|| unclear(llvm))?,
    })
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
commit-hash: ac68faa20c58cbccd01ee7208bf3b6e93a7d7f96
commit-date: 2026-05-25
host: x86_64-unknown-linux-gnu
release: 1.96.0
LLVM version: 22.1.8
";

    #[test]
    fn release_and_llvm_are_read() {
        assert_eq!(
            fit(Kind::System, DEBIAN),
            Ok(Compiler {
                kind: Kind::System,
                release: "1.96.0".to_owned(),
                llvm_major: 22,
            })
        );
        let nightly = DEBIAN.replace("1.96.0\nLLVM", "1.97.0-nightly\nLLVM");
        assert!(fit(Kind::Nightly, &nightly).is_ok_and(|found| found.release == "1.97.0-nightly"));
    }

    #[test]
    fn an_old_compiler_is_refused() {
        let bookworm = DEBIAN.replace("release: 1.96.0", "release: 1.63.0");
        assert_eq!(
            fit(Kind::System, &bookworm),
            Err(format!(
                "is 1.63.0, older than {}",
                env!("CARGO_PKG_RUST_VERSION")
            ))
        );
    }

    #[test]
    fn a_compiler_that_does_not_tell_is_refused() {
        for (from, to, reason) in [
            ("LLVM version: 22.1.8", "", "does not tell its LLVM version"),
            ("release: 1.96.0", "", "does not tell its release"),
            (
                "22.1.8",
                "unknown",
                "has a version that cannot be read: unknown",
            ),
            (
                "release: 1.96.0",
                "release: new",
                "has a version that cannot be read: new",
            ),
        ] {
            assert_eq!(
                fit(Kind::System, &DEBIAN.replace(from, to)),
                Err(reason.to_owned())
            );
        }
    }
}
