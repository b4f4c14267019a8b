use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::output;
use crate::skip::find_program;

const PROBE: (&str, &str) = ("probe.c", include_str!("../programs/probe.c"));
const RAW: (&str, &str) = ("raw.c", include_str!("../programs/raw.c"));
const GO: (&str, &str) = ("probe.go", include_str!("../programs/probe.go"));
const CROWD: (&str, &str) = ("crowd.c", include_str!("../programs/crowd.c"));
const FIRST: (&str, &str) = ("first.c", include_str!("../programs/first.c"));
const NEIGHBOUR: (&str, &str) = ("neighbour.c", include_str!("../programs/neighbour.c"));
const SWAPPER: (&str, &str) = ("swapper.c", include_str!("../programs/swapper.c"));

/// One build at a time in this process; that others build too is no harm.
static BUILDING: Mutex<()> = Mutex::new(());

/// `go build` of a static program, whatever this machine is set up for.
#[must_use]
pub fn go_build() -> Command {
    let mut command = Command::new("go");
    command.env("CGO_ENABLED", "0").env("GO111MODULE", "off");
    command.env("GOFLAGS", "").arg("build");
    command
}

/// A helper program, built at its first use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    /// `probe.c` with the C library linked dynamically: what `LD_PRELOAD` reaches.
    Dynamic,
    /// `probe.c` with the C library linked statically.
    Static,
    /// `probe.c` without any library, on system calls alone.
    Raw,
    /// `probe.go`, built without cgo.
    Go,
    /// `first.c`, which connects at once and tells what it got.
    First,
    /// `crowd.c`, a program with many connections.
    Crowd,
    /// `neighbour.c`, somebody else's BPF program.
    Neighbour,
    /// `swapper.c`, whose descriptors lead elsewhere from one moment to the next.
    Swapper,
}

impl Program {
    /// The file name, also in the directory that `KEEPALIVE_TEST_PROGRAMS` names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dynamic => "probe-dynamic",
            Self::Static => "probe-static",
            Self::Raw => "probe-raw",
            Self::Go => "probe-go",
            Self::First => "first",
            Self::Crowd => "crowd",
            Self::Neighbour => "neighbour",
            Self::Swapper => "swapper",
        }
    }

    /// The program, ready to be started.
    ///
    /// # Errors
    ///
    /// It does not build, or the directory of built ones does not have it.
    pub fn path(self) -> Result<PathBuf> {
        if let Some(directory) = std::env::var_os("KEEPALIVE_TEST_PROGRAMS") {
            let program = Path::new(&directory).join(self.name());
            ensure!(program.is_file(), "no {}", program.display());
            return Ok(program);
        }
        let lock = BUILDING.lock();
        let directory = directory()?.join(format!("{}-{:016x}", self.name(), self.hash()));
        let program = directory.join(self.name());
        if !program.exists() {
            self.build(&directory, &program)?;
        }
        drop(lock);
        Ok(program)
    }

    /// Builds all programs for which this machine has a compiler into a directory.
    ///
    /// # Errors
    ///
    /// One does not build.
    pub fn build_all(directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        for program in [
            Self::Dynamic,
            Self::Static,
            Self::Raw,
            Self::Go,
            Self::First,
            Self::Crowd,
            Self::Neighbour,
            Self::Swapper,
        ] {
            if find_program(program.compiler()).is_some() {
                program.build(directory, &directory.join(program.name()))?;
            } else {
                let (name, compiler) = (program.name(), program.compiler());
                eprintln!("no {name}: {compiler} is not installed");
            }
        }
        Ok(())
    }

    /// The program that builds it.
    pub(crate) fn compiler(self) -> &'static str {
        match self {
            Self::Go => "go",
            _ => "cc",
        }
    }

    fn sources(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Dynamic | Self::Static => &[PROBE],
            Self::Raw => &[PROBE, RAW],
            Self::Go => &[GO],
            Self::First => &[FIRST],
            Self::Crowd => &[CROWD],
            Self::Neighbour => &[NEIGHBOUR],
            Self::Swapper => &[SWAPPER],
        }
    }

    fn command(self) -> Command {
        let flags: &[&str] = match self {
            Self::Dynamic => &[],
            Self::Static | Self::First | Self::Crowd | Self::Neighbour | Self::Swapper => {
                &["-static"]
            }
            Self::Raw => &[
                "-static",
                "-nostdlib",
                "-ffreestanding",
                "-fno-stack-protector",
                "-fno-pie",
                "-no-pie",
            ],
            Self::Go => return go_build(),
        };
        let mut command = Command::new("cc");
        command
            .args(["-O1", "-Wall", "-Wextra", "-Werror"])
            .args(flags);
        command
    }

    fn hash(self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.sources().hash(&mut hasher);
        format!("{:?}", self.command()).hash(&mut hasher);
        hasher.finish()
    }

    /// Builds beside the target and renames, so that no other process ever sees
    /// half a program.
    fn build(self, directory: &Path, program: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        let workshop = tempfile::tempdir_in(directory)?;
        let mut command = self.command();
        command.current_dir(&workshop).args(["-o", self.name()]);
        if self == Self::Go {
            command.env("GOCACHE", directory.join("cache"));
        }
        for (name, text) in self.sources() {
            fs::write(workshop.path().join(name), text)?;
            command.arg(name);
        }
        let built = output(&mut command, Duration::from_mins(3))?;
        if built.code != Some(0) {
            bail!("{} does not build:\n{}", self.name(), built.stderr);
        }
        fs::rename(workshop.path().join(self.name()), program)?;
        Ok(())
    }
}

/// Beside the tests' own executables: `target/debug/test-programs`.
fn directory() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let profile = own.ancestors().nth(2).context("no target directory")?;
    Ok(profile.join("test-programs"))
}

/// The library of Debian's libkeepalive0.
#[must_use]
pub fn libkeepalive() -> Option<PathBuf> {
    let multiarch = fs::read_dir("/usr/lib")
        .ok()?
        .flatten()
        .map(|entry| entry.path());
    std::iter::once(PathBuf::from("/usr/lib"))
        .chain(multiarch)
        .map(|directory| directory.join("libkeepalive.so.0"))
        .find(|library| library.is_file())
}
