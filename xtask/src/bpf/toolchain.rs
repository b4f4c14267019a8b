//! What turns Rust into a BPF object: a compiler that can build `core` for BPF, which
//! no release ships built, and bpf-linker with an LLVM that reads what the compiler's
//! LLVM writes.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{apt, exec, workspace};

const LINKER_VERSION: &str = "0.13.0";

/// Both, installed.
pub(super) struct Toolchain {
    compiler: Compiler,
    /// As it is recorded beside the object: `bpf-linker 0.13.0, LLVM 22.1.8`.
    pub(super) linker: String,
    /// Its program.
    pub(super) linker_path: PathBuf,
}

impl Toolchain {
    /// The compiler that the object was built with, if it is here, else the first
    /// that fits; installs what is missing.
    pub(super) fn find_or_install(recorded: Option<&str>) -> Result<Self> {
        let compiler = Compiler::find_or_install(recorded)?;
        let (linker, linker_path) = install_linker(compiler.llvm_major()?)?;
        Ok(Self {
            compiler,
            linker,
            linker_path,
        })
    }

    /// What its compiler is recorded as.
    pub(super) fn compiler(&self) -> &str {
        &self.compiler.name
    }

    /// A cargo that compiles with it.
    pub(super) fn cargo(&self) -> Command {
        let mut cargo = workspace::cargo();
        cargo
            .env("RUSTC", self.compiler.rustc)
            // What is needed of nightly.
            .env("RUSTC_BOOTSTRAP", "1");
        cargo
    }
}

/// One that has the source of `core`.
struct Compiler {
    rustc: &'static str,
    /// As it is recorded beside the object: `rustc 1.96.0 (ac68faa20 2026-05-25), LLVM
    /// 22.1.8`.
    name: String,
}

impl Compiler {
    fn find_or_install(recorded: Option<&str>) -> Result<Self> {
        const PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];
        if let Some(compiler) = Self::find(recorded) {
            return Ok(compiler);
        }
        let why = format!(
            "no compiler here is Rust {} or later and has the source of core, as the BPF programs need it; install it: rustup component add rust-src",
            env!("CARGO_PKG_RUST_VERSION")
        );
        ensure!(apt::available(), why);
        exec::say("installing a compiler with the source of core");
        apt::install(&PACKAGES).with_context(|| why.clone())?;
        Self::find(recorded).context(why)
    }

    /// Cargo's own one or Debian's.
    fn find(recorded: Option<&str>) -> Option<Self> {
        let mut fitting: Vec<_> = ["rustc", "/usr/bin/rustc"]
            .into_iter()
            .filter_map(Self::look_at)
            .collect();
        // The sort is stable: of equals, the first.
        fitting.sort_by_key(|compiler| recorded != Some(&compiler.name));
        fitting.into_iter().next()
    }

    /// The compiler of this name, if it fits.
    fn look_at(rustc: &'static str) -> Option<Self> {
        let sysroot = exec::output(Command::new(rustc).args(["--print", "sysroot"])).ok()?;
        let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
        let version = exec::output(Command::new(rustc).arg("-vV")).ok()?;
        let name = fit(&version).filter(|_| core.is_dir())?;
        Some(Self { rustc, name })
    }

    fn llvm_major(&self) -> Result<&str> {
        let (_, llvm) = self.name.rsplit_once(' ').unwrap_or_default();
        let major = llvm.split('.').next();
        major.with_context(|| format!("{}: no version of LLVM", self.name))
    }
}

/// What a compiler is recorded as, by its `rustc -vV`, unless it is too old.
fn fit(version: &str) -> Option<String> {
    let field = |name: &str| {
        let lines = version.lines();
        lines.into_iter().find_map(|line| line.strip_prefix(name))
    };
    let release = field("release: ")?;
    if minor_version(release)? < minor_version(env!("CARGO_PKG_RUST_VERSION"))? {
        return None;
    }
    let name = version.lines().next()?;
    Some(format!("{name}, LLVM {}", field("LLVM version: ")?))
}

/// `1.96.0-nightly` → (1, 96)
fn minor_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Installs bpf-linker for this LLVM, unless it is; what it is recorded as, and its
/// program.
fn install_linker(llvm: &str) -> Result<(String, PathBuf)> {
    let prefix = env::var_os("LLVM_PREFIX")
        .map_or_else(|| format!("/usr/lib/llvm-{llvm}").into(), PathBuf::from);
    let config = prefix.join("bin/llvm-config");
    let package = format!("llvm-{llvm}-dev");
    let why = || {
        format!(
            "bpf-linker, which the BPF programs are linked with, needs LLVM {llvm}: install {package}, or say in LLVM_PREFIX where it is"
        )
    };
    if !config.exists() {
        ensure!(apt::available(), why());
        exec::say(&format!("installing {package}, for bpf-linker"));
        apt::install(&[&package]).with_context(why)?;
    }
    let home = workspace::cargo_home().context("neither CARGO_HOME nor HOME is set")?;
    // Cargo does nothing where it installed just this one before.
    exec::run(
        workspace::cargo()
            .args(["install", "--quiet", "--locked", "bpf-linker"])
            .args(["--version", LINKER_VERSION, "--no-default-features"])
            .args(["--features", &format!("llvm-{llvm}"), "--root"])
            .arg(&home)
            .env("LLVM_PREFIX", &prefix)
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS"),
    )?;
    // It is linked with LLVM's library, which may be a later one than then.
    let llvm = exec::output(Command::new(config).arg("--version"))?;
    let name = format!("bpf-linker {LINKER_VERSION}, LLVM {}", llvm.trim());
    Ok((name, home.join("bin/bpf-linker")))
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
    fn only_a_compiler_that_is_new_enough_and_tells_fits() {
        let name = fit(DEBIAN).unwrap();
        assert!(name.ends_with("tarball), LLVM 22.1.8"), "{name}");
        let rustc = "rustc";
        assert_eq!(Compiler { rustc, name }.llvm_major().unwrap(), "22");
        for (from, to) in [
            ("release: 1.96.0", "release: 1.63.0"),
            ("release: 1.96.0", "release: new"),
            ("LLVM version: 22.1.8", ""),
        ] {
            assert_eq!(fit(&DEBIAN.replace(from, to)), None);
        }
    }
}
