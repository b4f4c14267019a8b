//! `cargo xtask test --vm`: the live tests on every kernel that is claimed to
//! work, each booted in QEMU.

mod btf;
mod emulator;
mod judge;
pub(crate) mod kernels;
mod transcript;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{build, exec, workspace};
use emulator::Emulator;
use judge::{Outcome, Program, Verdict};
use kernels::Series;
use transcript::Transcript;

/// How long a test program may take in a guest.
const PROGRAM_LIMIT: Duration = Duration::from_mins(4);

/// How long a guest may take in all.
const GUEST_LIMIT: Duration = Duration::from_mins(15);

/// Tests that run at the same time in one program. They mostly wait, and an
/// emulated processor is slow.
const TEST_THREADS: &str = "3";

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
    ensure!(
        cfg!(target_arch = "x86_64"),
        "guests are of the host's architecture, and only x86_64 is prepared"
    );
    ensure!(
        workspace::is_root(),
        "the guests' system is made and used by root: sudo -E cargo xtask test --vm"
    );
    let cache = workspace::target_dir().join("vm");
    let _alone = alone_in(&cache)?;
    let machine = cache.join("machine");
    let suites = all
        .iter()
        .map(|series| format!("{}={}", series.name, series.suite));
    exec::run(script("machine.sh").arg(&machine).args(suites))?;
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
    let tree = cache.join("tree");
    built.fill(&tree)?;
    let guests: Vec<_> = kernels
        .iter()
        .map(|series| (*series, Guest::prepare(*series, &machine, &tree)))
        .collect();
    let outcomes = run_all(guests, |series, guest| {
        let guest = guest?;
        guest
            .run(&built, writes_types)
            .with_context(|| format!("booting {} {}", series.name, guest.version))
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
    guests: Vec<(Series, Result<Guest>)>,
    run: impl Fn(Series, Result<Guest>) -> Result<Outcome> + Sync,
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
    /// Builds the agent, the tests and the tests' helper programs, as for the
    /// live tests of this machine.
    fn build(filter: Option<&str>) -> Result<Self> {
        let cargo = |arguments: &[&str]| {
            let mut cargo = workspace::cargo();
            cargo.args(arguments).arg("--release");
            cargo
        };
        build::build()?;
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
            agent: workspace::agent(),
            tests: programs,
            helpers,
            filter: filter.map(str::to_owned),
        })
    }

    fn programs(&self) -> impl Iterator<Item = Program> + use<'_> {
        self.tests.iter().map(|(program, _)| program.clone())
    }

    /// Puts all of it where the guests' files are made.
    fn fill(&self, tree: &Path) -> Result<()> {
        drop(fs::remove_dir_all(tree));
        for directory in ["tests", "programs"] {
            fs::create_dir_all(tree.join(directory))
                .with_context(|| format!("cannot create {}", tree.display()))?;
        }
        let copy = |from: &Path, to: &str| {
            fs::copy(from, tree.join(to)).with_context(|| format!("cannot copy {}", from.display()))
        };
        copy(&workspace::root().join("xtask/vm/init.sh"), "init")?;
        copy(&self.agent, "tests/keepalive-agent")?;
        for (program, path) in &self.tests {
            copy(path, &format!("tests/{}", program.name))?;
        }
        for helper in fs::read_dir(&self.helpers)? {
            let helper = helper?;
            // Go keeps its cache there.
            if helper.file_type()?.is_file() {
                let name = helper.file_name();
                copy(
                    &helper.path(),
                    &format!("programs/{}", name.to_string_lossy()),
                )?;
            }
        }
        fs::write(tree.join("plan"), self.plan())?;
        Ok(())
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

/// A script beside the sources.
fn script(name: &str) -> Command {
    Command::new(workspace::root().join("xtask/vm").join(name))
}

/// A kernel, ready to be booted.
struct Guest {
    series: Series,
    version: String,
    /// Where it writes.
    directory: PathBuf,
    emulator: Emulator,
    image: PathBuf,
    initramfs: PathBuf,
}

impl Guest {
    fn prepare(series: Series, machine: &Path, tree: &Path) -> Result<Self> {
        let directory = machine.join("runs").join(series.name);
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let initramfs = directory.join("initramfs");
        exec::output(
            script("image.sh")
                .args([machine, tree])
                .args([&series.directory(machine).canonicalize()?, &initramfs]),
        )?;
        Ok(Self {
            series,
            version: series.version(machine)?,
            directory,
            emulator: Emulator::of(machine),
            image: series.image(machine)?,
            initramfs,
        })
    }

    /// Boots it and reads what it says.
    fn run(&self, built: &Built, writes_types: bool) -> Result<Outcome> {
        let Self {
            series,
            version,
            directory,
            ..
        } = self;
        exec::say(&format!("booting Linux {version}"));
        let arguments = if writes_types { "keepalive.types" } else { "" };
        let boot = self.emulator.boot(
            &self.image,
            &self.initramfs,
            arguments,
            directory,
            GUEST_LIMIT,
        )?;
        // Some 150 MB that can be made again.
        fs::remove_file(&self.initramfs)?;
        let transcript = Transcript::parse(&boot.transcript);
        let programs: Vec<_> = built.programs().collect();
        let verdicts = judge::judge(&programs, &transcript);
        let faults = judge::faults(programs.len(), &transcript, &boot.console, boot.timed_out);
        if writes_types {
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
