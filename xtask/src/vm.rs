//! `cargo xtask test --vm`: the live tests on every kernel that is claimed to
//! work, each booted in QEMU.

mod btf;
mod judge;
pub(crate) mod kernels;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    build, exec,
    test::report::{Outcome, Report, Step},
    workspace,
};
use judge::Program;
use kernels::Series;

/// How long a test program may take in a guest, in seconds.
const PROGRAM_LIMIT: &str = "240";

/// How long a guest may take in all, in seconds.
const GUEST_LIMIT: &str = "900";

/// Tests that run at the same time in one program. They mostly wait, and an
/// emulated processor is slow.
const TEST_THREADS: &str = "3";

/// Builds, boots the kernels, prints what failed, a step for each kernel. Writes
/// the kernels' types into the sources, for the unit tests of the agent, if it is
/// asked to.
pub(crate) fn test(
    kernels: &[Series],
    filter: Option<&str>,
    writes_types: bool,
    report: &mut Report,
) -> Result<()> {
    let kernels = if kernels.is_empty() {
        &kernels::ALL
    } else {
        kernels
    };
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
    let suites = kernels::ALL
        .iter()
        .map(|series| format!("{}={}", series.name, series.suite));
    exec::run(script("machine.sh").arg(&machine).args(suites))?;
    let built = Built::build(filter)?;
    if filter.is_none() {
        let unknown = judge::unknown(&built.programs);
        ensure!(
            unknown.is_empty(),
            "vm/left_out.txt names tests that do not exist: {}",
            unknown.join(", ")
        );
    }
    let tree = cache.join("tree");
    built.fill(&tree)?;
    let guests = kernels
        .iter()
        .map(|series| Guest::prepare(*series, &machine, &tree))
        .collect::<Result<Vec<_>>>()?;
    // As many at a time as this machine has processors for: a guest has two, and
    // waits half of its time.
    let processors = thread::available_parallelism().map_or(1, usize::from);
    for guests in guests.chunks(processors) {
        let programs = &built.programs;
        thread::scope(|scope| {
            let start = |guest| scope.spawn(move || step(guest, programs, writes_types));
            let running: Vec<_> = guests.iter().map(start).collect();
            for guest in running {
                let panicked = |_| Step::new("vm", Outcome::Failed, "panicked");
                report.add(guest.join().unwrap_or_else(panicked));
            }
        });
    }
    Ok(())
}

/// Boots a kernel, judges what it did, and says what failed.
fn step(guest: &Guest, programs: &[Program], writes_types: bool) -> Step {
    let Guest {
        series, version, ..
    } = guest;
    exec::say(&format!("booting Linux {version}"));
    let start = Instant::now();
    let verdict = guest.run(programs, writes_types).unwrap_or_else(|error| {
        let failures = vec![format!("{error:#}")];
        judge::Verdict {
            failures,
            ..judge::Verdict::default()
        }
    });
    for failure in &verdict.failures {
        let failure = failure.replace('\n', "\n    ");
        println!("FAILED on {}: {failure}", series.name);
    }
    exec::say(&format!(
        "Linux {version}: what it wrote is in {}",
        guest.directory.display()
    ));
    let outcome = if verdict.failures.is_empty() {
        Outcome::Ok
    } else {
        Outcome::Failed
    };
    let note = format!("{} left out, Linux {version}", verdict.left_out);
    let mut step = Step::new(series.step, outcome, &note);
    step.passed = verdict.passed;
    step.took = start.elapsed();
    step
}

/// Waits until no other run writes to the same directory; the next one waits for
/// what is returned to go.
fn alone_in(cache: &Path) -> Result<fs::File> {
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let path = cache.join("lock");
    let lock =
        fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    lock.lock()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(lock)
}

/// What runs in the guests.
struct Built {
    programs: Vec<Program>,
    /// The test programs' files, in the same order.
    files: Vec<PathBuf>,
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
        let (mut programs, mut files) = (Vec::new(), Vec::new());
        for (name, path) in executables(&exec::output(&mut tests)?) {
            let listed = exec::output(
                Command::new(&path)
                    .args(["--list", "--format", "terse"])
                    .args(filter),
            )?;
            let tests: Vec<_> = listed
                .lines()
                .filter_map(|line| line.strip_suffix(": test").map(str::to_owned))
                .collect();
            if !tests.is_empty() {
                programs.push(Program { name, tests });
                files.push(path);
            }
        }
        ensure!(
            !programs.is_empty(),
            "no test's name contains {}",
            filter.unwrap_or_default()
        );
        Ok(Self {
            programs,
            files,
            helpers,
            filter: filter.map(str::to_owned),
        })
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
        copy(&workspace::agent(), "tests/keepalive-agent")?;
        for (program, path) in self.programs.iter().zip(&self.files) {
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
            let mut words = vec![&program.name, PROGRAM_LIMIT, "--test-threads", TEST_THREADS];
            words.extend(program.left_out().flat_map(|test| ["--skip", test]));
            words.extend(self.filter.as_deref());
            words.join(" ") + "\n"
        };
        self.programs.iter().map(line).collect()
    }
}

/// Name and path of each program that cargo says it built for testing. Cargo names
/// them in the order in which they were ready.
fn executables(messages: &str) -> BTreeMap<String, PathBuf> {
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

/// A script beside the sources.
fn script(name: &str) -> Command {
    Command::new(workspace::root().join("xtask/vm").join(name))
}

/// A kernel, ready to be booted.
struct Guest {
    series: Series,
    version: String,
    /// The system that QEMU is in.
    machine: PathBuf,
    /// Where it writes.
    directory: PathBuf,
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
            machine: machine.to_owned(),
            directory,
        })
    }

    /// Boots it and judges what it says on its serial lines: what the kernel
    /// writes, what init writes, and the kernel's types.
    fn run(&self, programs: &[Program], writes_types: bool) -> Result<judge::Verdict> {
        let initramfs = self.directory.join("initramfs");
        let lines = ["console", "transcript", "types"].map(|name| self.directory.join(name));
        let inside = |file: &Path| -> Result<PathBuf> {
            Ok(Path::new("/").join(file.strip_prefix(&self.machine)?))
        };
        // Ends by itself, also when nobody waits for it any more.
        let mut qemu = Command::new("timeout");
        qemu.args(["--foreground", "--kill-after=5", GUEST_LIMIT, "chroot"])
            .arg(&self.machine)
            .arg("qemu-system-x86_64")
            // Emulated, not virtualised: build machines are virtual themselves. What
            // newer processors can do only takes time to emulate. Memory holds the
            // programs and all they write too.
            .args(["-accel", "tcg", "-cpu", "Nehalem", "-smp", "2", "-m", "2G"])
            .args(["-M", "q35", "-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-kernel"])
            .arg(inside(&self.series.directory(&self.machine).join("image"))?)
            .arg("-initrd")
            .arg(inside(&initramfs)?);
        for line in &lines {
            fs::write(line, "").with_context(|| format!("cannot write {}", line.display()))?;
            qemu.arg("-serial")
                .arg(format!("file:{}", inside(line)?.display()));
        }
        // On a busy machine the kernel would take its timer for broken, and panic.
        let options = "console=ttyS0 panic=-1 loglevel=5 mitigations=off no_timer_check";
        let types = if writes_types { "keepalive.types" } else { "" };
        qemu.arg("-append").arg(format!("{options} {types}"));
        let errors = self.directory.join("emulator.log");
        qemu.stdin(Stdio::null()).stdout(Stdio::null());
        let status = qemu.stderr(fs::File::create(&errors)?).status();
        let status = status.context("cannot start QEMU")?;
        // The two that `timeout` ends with, by its first and its second signal.
        let timed_out = matches!(status.code(), Some(124 | 137));
        ensure!(
            timed_out || status.success(),
            "QEMU failed, {status}: {}",
            fs::read_to_string(&errors).unwrap_or_default().trim()
        );
        // Some 150 MB that can be made again.
        fs::remove_file(&initramfs)?;
        let [console, transcript, types] = lines.map(|line| fs::read(line).unwrap_or_default());
        if writes_types {
            write_types(self.series.name, &types)?;
        }
        let text = |line: Vec<u8>| String::from_utf8_lossy(&line).replace('\r', "");
        Ok(judge::judge(
            programs,
            &text(transcript),
            &text(console),
            timed_out,
        ))
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
            executables(messages).into_iter().collect::<Vec<_>>(),
            [("families".to_owned(), PathBuf::from("/t/families-1"))]
        );
    }
}
