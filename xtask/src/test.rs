//! `cargo xtask test`: every check there is, and a summary.

mod programs;
pub(crate) mod report;

use std::{
    fs, io,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{apt, bpf, build, dist, exec, tool, vm, workspace};
use report::{Outcome, Report, Step};

/// Check formatting, lints, documentation, dependencies and the BPF object, and
/// run the tests, the live ones among them
///
/// Installs with apt what the tests need and says so. A test whose program is
/// missing all the same is skipped and named at the end; where CI is set, that
/// is a failure.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  cargo xtask test\n  cargo xtask test --no-live\n  cargo xtask test nginx\n  cargo xtask test --vm\n  cargo xtask test mptcp --vm 6.1 7\n  cargo xtask test --packages bookworm sid\n\nThe live tests use this machine's kernel and need root."
)]
pub(crate) struct Options {
    /// Install nothing; what is missing is skipped
    #[arg(long)]
    no_install: bool,

    /// Leave out what needs root or a BPF toolchain; installs nothing either
    #[arg(long)]
    no_live: bool,

    /// Run only the tests whose name contains this, and none of the checks
    filter: Option<String>,

    /// Run the live tests on these kernels instead, in virtual machines: 6.1,
    /// 6.12, 7, or all of them
    #[arg(
        long,
        value_name = "KERNEL",
        num_args = 0..,
        conflicts_with = "no_live",
        value_parser = vm::kernels::Series::named,
    )]
    vm: Option<Vec<vm::kernels::Series>>,

    /// Install, upgrade and purge the .deb instead, on Debians of their own:
    /// bookworm, or the suites named
    #[arg(long, value_name = "SUITE", num_args = 0.., conflicts_with_all = ["no_live", "vm"])]
    packages: Option<Vec<String>>,

    /// Write the kernels' types that the agent's unit tests resolve
    #[arg(long, requires = "vm")]
    write_types: bool,
}

/// Does every step even when an earlier one fails: one run shows all there is
/// to mend.
pub(crate) fn main(options: &Options) -> ExitCode {
    let filter = options.filter.as_deref();
    let mut report = Report::default();
    if let Some(kernels) = &options.vm {
        if let Err(error) = vm::test(kernels, filter, options.write_types, &mut report) {
            exec::say_error(&error);
            report.add(Step::new("vm", Outcome::Failed, ""));
        }
        return report.finish();
    }
    if let Some(suites) = &options.packages {
        packages(suites, options.no_install, &mut report);
        return report.finish();
    }
    if !options.no_install && !options.no_live {
        programs::install_missing();
    }
    if filter.is_none() {
        report.add(formatting());
        if !options.no_live {
            report.add(bpf_object(options.no_install));
        }
    }
    let built = options.no_live || report.add(Step::run("build", |_| build::build()));
    if filter.is_none() {
        report.add(lints());
        report.add(documentation());
        let mutants = mutants(options.no_install);
        for step in [dependencies(), mutants].into_iter().flatten() {
            report.add(step);
        }
    }
    report.add(Step::run("tests", |passed| {
        run_tests(workspace::cargo().arg("test"), filter, passed)
    }));
    if !options.no_live {
        let step = if built {
            live_tests(filter, &mut report.skips)
        } else {
            Step::new("live tests", Outcome::Skipped, "the build failed")
        };
        report.add(step);
    }
    if let Some(filter) = filter.filter(|_| report.ran_no_test()) {
        let note = format!("no test's name contains {filter}");
        report.add(Step::new("filter", Outcome::Failed, &note));
    }
    report.finish()
}

/// Whether the packages are whole, and what becomes of a machine on which they are
/// installed, upgraded, purged.
fn packages(suites: &[String], no_install: bool, report: &mut Report) {
    let is_there = |program: &str| exec::output(Command::new(program).arg("--version")).is_ok();
    if !no_install
        && (!is_there("debootstrap") || !is_there("systemd-nspawn"))
        && let Err(error) = apt::install(&["debootstrap", "systemd-container"])
    {
        exec::warn(&format!("{error:#}"));
    }
    let mut packages = None;
    report.add(Step::run("packages", |_| {
        packages = Some(dist::pairs()?);
        Ok(())
    }));
    let Some((deb, rpm)) = packages else {
        return;
    };
    report.add(Step::run("package files", |_| dist::verify()));
    let cache = workspace::target_dir().join("debian");
    let mut run = |name, script: &str, suite: &str, files: &[PathBuf]| {
        let script = workspace::root().join("packaging/test").join(script);
        let mut command = workspace::as_root(script);
        command.arg(suite).args(files).arg(&cache);
        report.add(Step::run(name, |_| exec::run(&mut command)));
    };
    let default = ["bookworm".to_owned()];
    let suites = if suites.is_empty() { &default } else { suites };
    for suite in suites {
        run("installation", "install.sh", suite, &deb);
    }
    run("rpm", "install.sh", &suites[0], &rpm);
    run(
        "container",
        "container.sh",
        &suites[0],
        &[dist::directory()],
    );
}

/// Whether the shipped object is what its sources come to.
fn bpf_object(no_install: bool) -> Step {
    if no_install {
        let why = "not rebuilt: that may install a toolchain";
        return Step::new("BPF object", Outcome::Skipped, why);
    }
    Step::run("BPF object", |_| bpf::check()).remedy("run: cargo xtask bpf")
}

fn formatting() -> Step {
    Step::run("formatting", |_| {
        let mut cargo = workspace::cargo();
        cargo.args(["fmt", "--all", "--check"]);
        // Left to itself, rustfmt colours what goes to a file as well.
        if !exec::wants_colour(&io::stdout()) {
            cargo.args(["--", "--color=never"]);
        }
        exec::run(&mut cargo)
    })
    .remedy("run: cargo fmt --all")
}

fn lints() -> Step {
    Step::run("lints", |_| {
        exec::run(
            workspace::cargo()
                .args(["clippy", "--workspace", "--all-targets"])
                .args(["--", "-D", "warnings"]),
        )
    })
    .remedy("mend what clippy names above")
}

fn documentation() -> Step {
    Step::run("documentation", |_| {
        exec::run(
            workspace::cargo()
                .args([
                    "doc",
                    "--workspace",
                    "--no-deps",
                    "--document-private-items",
                ])
                .env("RUSTDOCFLAGS", "-D warnings"),
        )
    })
    .remedy("mend what rustdoc names above")
}

/// Licences, duplicates and sources, where cargo-deny is installed: building it
/// takes longer than all other checks. Not the advisories: their database cannot
/// be fetched everywhere, and a new one must not fail an old commit.
fn dependencies() -> Option<Step> {
    if !is_installed("deny") {
        return None;
    }
    let step = Step::run("dependencies", |_| {
        exec::run(workspace::cargo().args(["deny", "check", "licenses", "bans", "sources"]))
    });
    Some(step.remedy("mend what cargo-deny names above, or deny.toml"))
}

/// Whether cargo has a command that is not installed for a test; says so if not.
fn is_installed(command: &str) -> bool {
    let found = exec::output(workspace::cargo().args([command, "--version"])).is_ok();
    if !found {
        exec::say(&format!("cargo-{command} is not installed: left out"));
    }
    found
}

/// Whether a test fails for every fault that can be put into what this branch, or on
/// main the last commit, changes of keepalive-common. Nothing is built where that is
/// nothing.
fn mutants(no_install: bool) -> Option<Step> {
    const VERSION: &str = "27.1.0";
    let diff = match changes("keepalive-common") {
        Ok(diff) if diff.trim().is_empty() => return None,
        Ok(diff) => diff,
        Err(error) => {
            // A clone without history.
            exec::say(&format!("mutants are left out: {error:#}"));
            return None;
        }
    };
    if no_install && !is_installed("mutants") {
        return None;
    }
    let step = Step::run("mutants", |_| {
        let file = workspace::target_dir().join("mutants.diff");
        fs::write(&file, diff).with_context(|| format!("cannot write {}", file.display()))?;
        let mut mutants = if no_install {
            workspace::cargo()
        } else {
            tool::installed("cargo-mutants", VERSION)?
        };
        exec::run(
            mutants
                // It builds copies of the workspace, each for itself.
                .env_remove("CARGO_TARGET_DIR")
                .args(["mutants", "--package", "keepalive-common", "--in-diff"])
                .arg(&file)
                .arg("--output")
                .arg(workspace::target_dir())
                .args(["--cargo-test-arg=--lib", "--timeout=60"])
                // As many are enough to notice, and a mutant takes seconds.
                .env("PROPTEST_CASES", "300"),
        )
    });
    Some(step.remedy("write a test that fails for it; see docs/development.md"))
}

/// What this branch, or on main the last commit, changes below a directory.
fn changes(directory: &str) -> Result<String> {
    let git = |words: &[&str]| {
        let mut git = Command::new("git");
        exec::output(git.current_dir(workspace::root()).args(words))
    };
    let mut base = git(&["merge-base", "HEAD", "origin/main"]).unwrap_or_default();
    if base.trim().is_empty() || base == git(&["rev-parse", "HEAD"])? {
        "HEAD~1".clone_into(&mut base);
    }
    git(&["diff", base.trim(), "--", directory])
}

/// The tests on the real kernel. Cargo builds them as the user who runs this;
/// only the test programs themselves run as root.
fn live_tests(filter: Option<&str>, skips: &mut Vec<String>) -> Step {
    let file = workspace::target_dir().join("live-test-skips");
    let live = Step::run("live tests", |passed| {
        fs::write(&file, "").with_context(|| format!("cannot write {}", file.display()))?;
        let mut cargo = workspace::cargo();
        cargo
            .args(["test", "--release"])
            .args(["-p", "keepalive-tests", "-p", "keepalive-bench"])
            .env("KEEPALIVE_AGENT", workspace::agent())
            .env("KEEPALIVE_SKIPS", &file);
        if !workspace::is_root() {
            cargo.args(["--config", "target.'cfg(unix)'.runner = ['sudo', '-E']"]);
        }
        run_tests(&mut cargo, filter, passed)
    });
    skips.extend(report::skipped_tests(
        &fs::read_to_string(&file).unwrap_or_default(),
    ));
    live
}

fn run_tests(cargo: &mut Command, filter: Option<&str>, passed: &mut usize) -> Result<()> {
    cargo
        // All test programs run, not only those up to the first that fails.
        .arg("--no-fail-fast")
        .args(filter)
        // Nothing is left out by an attribute.
        .args(["--", "--include-ignored"]);
    exec::run_and_read(cargo, |line| *passed += report::passed(line))
}
