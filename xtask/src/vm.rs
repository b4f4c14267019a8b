//! `cargo xtask test --vm`: the live tests on every kernel that is claimed to
//! work, each booted in QEMU.

mod apt;
mod btf;
mod emulator;
mod image;
mod judge;
pub(crate) mod kernels;
mod transcript;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{exec, workspace};
use apt::{Apt, Mirrors};
use emulator::Emulator;
use image::Archive;
use judge::{Outcome, Program, Verdict};
use kernels::{Kernel, Series};
use transcript::Transcript;

/// What the guest does first, and from then on.
const INIT: &str = include_str!("vm/init.sh");

/// How long a test program may take in a guest.
const PROGRAM_LIMIT: Duration = Duration::from_mins(4);

/// How long a guest may take in all.
const GUEST_LIMIT: Duration = Duration::from_mins(15);

/// Tests that run at the same time in one program. They mostly wait, and an
/// emulated processor is slow.
const TEST_THREADS: &str = "3";

/// What the tests' guards and the agent start; from this machine.
const TOOLS: [&str; 8] = [
    "sh", "ip", "ss", "nsenter", "unshare", "setpriv", "mount", "umount",
];

/// The same, but a machine may lack them; tests skip without them.
const OPTIONAL_TOOLS: [&str; 2] = ["bpftool", "tcpdump"];

const LIBKEEPALIVE: &str = "/usr/lib/libkeepalive.so.0";

/// Files that the tools look into.
const FILES: [&str; 2] = ["/etc/passwd", "/etc/group"];

/// Drivers that Debian's kernels have as modules, in an order in which they load.
const MODULES: [&str; 3] = [
    "net/ipv4/inet_diag",
    "net/ipv4/tcp_diag",
    "drivers/net/veth",
];

/// What the tests of one kernel came to.
pub(crate) struct Summary {
    /// Name of the step.
    pub(crate) step: &'static str,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// Not run in guests.
    pub(crate) left_out: usize,
    pub(crate) took: Duration,
    /// The version that was booted.
    pub(crate) version: String,
}

/// Builds, boots the kernels, prints what failed. Writes the kernels' types into
/// the sources, for the unit tests of the agent, if it is asked to.
pub(crate) fn test(
    kernels: &[Series],
    filter: Option<&str>,
    writes_types: bool,
) -> Result<Vec<Summary>> {
    let all: Vec<_> = kernels::ALL.into_iter().collect();
    let kernels = if kernels.is_empty() { &all } else { kernels };
    let cache = workspace::target_dir().join("vm");
    let _alone = alone_in(&cache)?;
    let mirrors = Mirrors::of_this_machine()?;
    let emulator = Emulator::find_or_fetch(&mirrors, &cache)?;
    exec::say(&format!("QEMU {}", emulator.version));
    let built = Built::build(filter)?;
    if filter.is_none() {
        let programs: Vec<_> = built.programs().collect();
        let unknown = judge::unknown(&programs);
        ensure!(
            unknown.is_empty(),
            "vm/left_out.txt names tests that do not exist: {}",
            unknown.join(", ")
        );
    }
    let base = base_image(&built, &mirrors, &cache)?;
    let suites: Vec<_> = all.iter().map(|series| series.suite).collect();
    let apt = Apt::with(cache.join("kernel-apt"), &mirrors, &suites)?;
    let guests = kernels.iter().map(|series| {
        let kernel = Kernel::fetch(*series, &apt, &cache.join("kernels"));
        (*series, kernel)
    });
    let outcomes = run_all(guests.collect(), |series, kernel| {
        let kernel = kernel?;
        Guest {
            kernel: &kernel,
            emulator: &emulator,
            base: &base,
            built: &built,
            writes_types,
        }
        .run(&cache)
        .with_context(|| format!("booting {} {}", series.name, kernel.version))
    });
    for failure in outcomes.iter().flat_map(Outcome::failures) {
        println!("{failure}");
    }
    Ok(kernels.iter().zip(&outcomes).map(summary).collect())
}

/// Waits until no other run writes to the same directory; the next one waits for
/// what is returned to go.
fn alone_in(cache: &Path) -> Result<fs::File> {
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let path = cache.join("lock");
    let lock =
        fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    if lock.try_lock().is_err() {
        exec::say("waiting for another run in the same target directory");
        lock.lock()
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(lock)
}

/// As many guests at a time as this machine has processors for: a guest has two,
/// and waits half of its time.
fn run_all(
    guests: Vec<(Series, Result<Kernel>)>,
    run: impl Fn(Series, Result<Kernel>) -> Result<Outcome> + Sync,
) -> Vec<Outcome> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let count = guests.len();
    let queue = Mutex::new(guests.into_iter().enumerate());
    let outcomes = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..processors.min(count) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().ok().and_then(|mut queue| queue.next());
                    let Some((index, (series, kernel))) = next else {
                        return;
                    };
                    let outcome = run(series, kernel)
                        .unwrap_or_else(|error| Outcome::none(series.name, &error));
                    if let Ok(mut outcomes) = outcomes.lock() {
                        outcomes.insert(index, outcome);
                    }
                }
            });
        }
    });
    outcomes
        .into_inner()
        .unwrap_or_default()
        .into_values()
        .collect()
}

fn summary((series, outcome): (&Series, &Outcome)) -> Summary {
    let failed = outcome.count(|verdict| matches!(verdict, Verdict::Failed(_)));
    let passed = outcome.count(|verdict| *verdict == Verdict::Passed);
    Summary {
        step: series.step,
        passed,
        failed: failed + outcome.faults.len(),
        left_out: outcome.verdicts.len() - passed - failed,
        took: outcome.took,
        version: outcome.version.clone(),
    }
}

/// What runs in the guests.
struct Built {
    agent: PathBuf,
    /// Test programs, by name.
    tests: Vec<(Program, PathBuf)>,
    /// Directory of the helper programs.
    helpers: PathBuf,
    filter: Option<String>,
}

impl Built {
    /// Builds the agent and the tests as static programs, for a guest has no C
    /// library of its own, and the tests' helper programs.
    fn build(filter: Option<&str>) -> Result<Self> {
        let target = host_target()?;
        let cargo = |arguments: &[&str]| {
            let mut cargo = workspace::cargo();
            cargo
                .args(arguments)
                .args(["--release", "--target", &target])
                .env(
                    "RUSTFLAGS",
                    "-C target-feature=+crt-static -C strip=symbols",
                )
                .env_remove("CARGO_ENCODED_RUSTFLAGS");
            cargo
        };
        exec::run(&mut cargo(&["build", "-p", "keepalive-agent"]))?;
        let helpers = workspace::target_dir().join("vm/helpers");
        exec::run(
            cargo(&["run", "-p", "keepalive-tests", "--bin", "build-helpers"])
                .arg("--")
                .arg(&helpers),
        )?;
        let mut tests = cargo(&["test", "-p", "keepalive-tests", "--lib", "--tests"]);
        tests.args(["--no-run", "--message-format=json-render-diagnostics"]);
        exec::announce(&tests);
        let mut programs = Vec::new();
        // Cargo names them in the order in which they were ready.
        let executables: BTreeMap<_, _> = executables(&exec::output(&mut tests)?)
            .into_iter()
            .collect();
        for (name, path) in executables {
            let listed = exec::output(
                Command::new(&path)
                    .args(["--list", "--format", "terse"])
                    .args(filter),
            )?;
            let tests = tests_in(&listed);
            if !tests.is_empty() {
                programs.push((Program { name, tests }, path));
            }
        }
        ensure!(
            !programs.is_empty(),
            "no test's name contains {}",
            filter.unwrap_or_default()
        );
        Ok(Self {
            agent: workspace::target_dir()
                .join(&target)
                .join("release/keepalive-agent"),
            tests: programs,
            helpers,
            filter: filter.map(str::to_owned),
        })
    }

    fn programs(&self) -> impl Iterator<Item = Program> + use<'_> {
        self.tests.iter().map(|(program, _)| program.clone())
    }

    /// What init goes through: program, limit in seconds, arguments.
    fn plan(&self) -> String {
        let line = |program: &Program| {
            let limit = PROGRAM_LIMIT.as_secs().to_string();
            let mut words = vec![&*program.name, &limit, "--test-threads", TEST_THREADS];
            for test in &program.tests {
                let title = judge::title(&program.name, test);
                if judge::left_out().any(|left_out| left_out == title) {
                    words.extend(["--skip", test]);
                }
            }
            words.extend(self.filter.as_deref());
            words.join(" ") + "\n"
        };
        self.tests
            .iter()
            .map(|(program, _)| line(program))
            .collect()
    }
}

/// The compiler's own target, which must be one that links statically.
fn host_target() -> Result<String> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = exec::output(Command::new(rustc).arg("-vV"))?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc names no host")?;
    if !host.starts_with("x86_64-unknown-linux-") {
        bail!("guests are of the host's architecture, and only x86_64 is prepared, not {host}");
    }
    Ok(host.to_owned())
}

/// Name and path of each program that cargo says it built for testing.
fn executables(messages: &str) -> Vec<(String, PathBuf)> {
    messages
        .lines()
        .filter_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            let path = message["executable"].as_str()?;
            let is_test = message["profile"]["test"].as_bool()?;
            let name = message["target"]["name"].as_str()?;
            is_test.then(|| (name.to_owned(), PathBuf::from(path)))
        })
        .collect()
}

/// The tests that a program lists, `name: test` each.
fn tests_in(listed: &str) -> Vec<String> {
    listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect()
}

/// What all guests have, and the busybox that also unpacks modules.
struct Base {
    archive: Vec<u8>,
    busybox: PathBuf,
}

fn base_image(built: &Built, mirrors: &Mirrors, cache: &Path) -> Result<Base> {
    let busybox = find_busybox(mirrors, cache)?;
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "run", "sys", "tmp", "applets", "modules"] {
        archive.directory(directory)?;
    }
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file("plan", 0o644, built.plan().as_bytes())?;
    archive.copy("bin/busybox", &busybox)?;
    // Not busybox's shell, which runs its own applets in the place of programs.
    archive.link("bin/sh", "../usr/bin/sh")?;
    for tool in TOOLS {
        let path = find(tool).with_context(|| {
            format!("{tool} is not installed, and the tests in the guests need it")
        })?;
        archive.program(&format!("usr/bin/{tool}"), &path)?;
    }
    for tool in OPTIONAL_TOOLS {
        if let Some(path) = find(tool) {
            archive.program(&format!("usr/bin/{tool}"), &path)?;
        }
    }
    for file in FILES {
        archive.copy(file, Path::new(file))?;
    }
    // A library that is preloaded needs what it is linked with, as a program does.
    if Path::new(LIBKEEPALIVE).exists() {
        archive.program(LIBKEEPALIVE, Path::new(LIBKEEPALIVE))?;
    }
    archive.program("tests/keepalive-agent", &built.agent)?;
    for (program, path) in &built.tests {
        archive.program(&format!("tests/{}", program.name), path)?;
    }
    for helper in fs::read_dir(&built.helpers)? {
        let helper = helper?;
        // Go keeps its cache there.
        if helper.file_type()?.is_dir() {
            continue;
        }
        let name = helper.file_name();
        archive.program(
            &format!("programs/{}", name.to_string_lossy()),
            &helper.path(),
        )?;
    }
    Ok(Base {
        archive: archive.finish()?,
        busybox,
    })
}

/// A program in `PATH` or where administrators' programs are.
fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|program| program.is_file())
}

fn find_busybox(mirrors: &Mirrors, cache: &Path) -> Result<PathBuf> {
    let root = cache.join("busybox");
    let codename = mirrors.codename.as_str();
    if !root.exists() {
        let apt = Apt::with(cache.join("busybox-apt"), mirrors, &[codename])?;
        apt.unpack(&["busybox-static".to_owned()], &root)?;
    }
    ["bin/busybox", "usr/bin/busybox"]
        .into_iter()
        .map(|path| root.join(path))
        .find(|path| path.is_file())
        .context("Debian's busybox-static has no busybox")
}

/// One kernel and what is needed to run the tests on it.
struct Guest<'a> {
    kernel: &'a Kernel,
    emulator: &'a Emulator,
    base: &'a Base,
    built: &'a Built,
    writes_types: bool,
}

impl Guest<'_> {
    /// Boots it and reads what it says.
    fn run(&self, cache: &Path) -> Result<Outcome> {
        let Kernel {
            series, version, ..
        } = self.kernel;
        let directory = cache.join("runs").join(series.name);
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let initramfs = directory.join("initramfs");
        fs::write(&initramfs, self.image()?)
            .with_context(|| format!("cannot write {}", initramfs.display()))?;
        exec::say(&format!("booting Linux {version}"));
        let arguments = if self.writes_types {
            "keepalive.types"
        } else {
            ""
        };
        let boot = self.emulator.boot(
            &self.kernel.image,
            &initramfs,
            arguments,
            &directory,
            GUEST_LIMIT,
        )?;
        // Some 70 MB that can be made again.
        fs::remove_file(&initramfs)?;
        let transcript = Transcript::parse(&boot.transcript);
        let programs: Vec<_> = self.built.programs().collect();
        let verdicts = judge::judge(&programs, &transcript);
        let faults = judge::faults(programs.len(), &transcript, &boot.console, boot.timed_out);
        if self.writes_types {
            write_types(series.name, &boot.types)?;
        }
        exec::say(&format!(
            "Linux {version}: done after {:.0} s; what it wrote is in {}",
            boot.took.as_secs_f64(),
            directory.display()
        ));
        Ok(Outcome {
            series: series.name,
            version: version.clone(),
            verdicts,
            faults,
            took: boot.took,
        })
    }

    /// The files of all guests, and this kernel's modules.
    fn image(&self) -> Result<Vec<u8>> {
        let mut modules = Archive::default();
        for (index, name) in MODULES.into_iter().enumerate() {
            let content = image::unpacked(&self.base.busybox, &self.kernel.module(name)?)?;
            let name = name.rsplit('/').next().unwrap_or(name);
            modules.file(&format!("modules/{index}-{name}.ko"), 0o644, &content)?;
        }
        let mut image = self.base.archive.clone();
        image.extend(modules.finish()?);
        Ok(image)
    }
}

/// Writes what the agent's resolver looks for in the kernel's types, for its unit
/// tests.
fn write_types(series: &str, types: &[u8]) -> Result<()> {
    let kernel = workspace::root().join("keepalive-agent/src/kernel");
    let resolver = kernel.join("layout.rs");
    let source = fs::read_to_string(&resolver)
        .with_context(|| format!("cannot read {}", resolver.display()))?;
    let fixture = kernel.join("fixtures").join(format!("{series}.btf"));
    if let Some(directory) = fixture.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    fs::write(&fixture, btf::cut(types, &source)?)
        .with_context(|| format!("cannot write {}", fixture.display()))?;
    exec::say(&format!("wrote {}", fixture.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_what_cargo_built_for_testing() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"name":"families"},"profile":{"test":true},"executable":"/t/families-1"}
{"reason":"compiler-artifact","target":{"name":"build-helpers"},"profile":{"test":false},"executable":"/t/build-helpers"}
{"reason":"compiler-artifact","target":{"name":"anyhow"},"profile":{"test":false},"executable":null}
{"reason":"build-finished","success":true}
"#;
        assert_eq!(
            executables(messages),
            [("families".to_owned(), PathBuf::from("/t/families-1"))]
        );
        assert_eq!(
            tests_in("ipv6: test\nmodule::mptcp: test\nslow: benchmark\n"),
            ["ipv6", "module::mptcp"]
        );
    }
}
