use std::io::Write;
use std::path::{Path, PathBuf};

/// Something that not every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A program in `PATH` or one of the directories for administrators.
    Program(&'static str),
    /// A helper program: built already, or a compiler for it.
    Built(crate::Program),
    /// A file or directory.
    File(&'static str),
    /// Debian's libkeepalive0.
    Libkeepalive,
    /// The server programs, of `PostgreSQL`, which Debian keeps out of `PATH`.
    Postgres,
    /// No configuration where the agent looks for one when it is given none.
    NoConfig,
}

/// Returns from the test, saying why, unless this machine has root and all the
/// [`Need`]s given.
#[macro_export]
macro_rules! require {
    ($($need:expr),* $(,)?) => {
        if let Some(reason) = $crate::missing(&[$($need),*]) {
            $crate::skip(module_path!(), &reason);
            return Ok(());
        }
    };
}

/// How often, or how much: in CI and by default enough to find a fault within
/// seconds, with `KEEPALIVE_SOAK` set as much as takes minutes.
#[must_use]
pub fn soak_or<T>(soak: T, short: T) -> T {
    match std::env::var_os("KEEPALIVE_SOAK") {
        Some(_) => soak,
        None => short,
    }
}

/// What of the needs this machine lacks, root first.
#[must_use]
pub fn missing(needs: &[Need]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    needs.iter().find_map(|need| match need {
        Need::Program(name) => find_program(name)
            .is_none()
            .then(|| format!("{name} is not installed")),
        Need::Built(program) => {
            // Where programs are built already, those are there for which there
            // was a compiler.
            let is_there = match std::env::var_os("KEEPALIVE_TEST_PROGRAMS") {
                Some(directory) => Path::new(&directory).join(program.name()).is_file(),
                None => find_program(program.compiler()).is_some(),
            };
            (!is_there).then(|| format!("{} is not installed", program.compiler()))
        }
        Need::File(path) => (!Path::new(path).exists()).then(|| format!("{path} does not exist")),
        Need::Libkeepalive => crate::libkeepalive()
            .is_none()
            .then(|| "libkeepalive0 is not installed".to_owned()),
        Need::Postgres => postgres()
            .is_none()
            .then(|| "postgresql is not installed".to_owned()),
        Need::NoConfig => Path::new("/etc/keepalive/keepalive.toml")
            .exists()
            .then(|| "this host has a configuration in /etc/keepalive".to_owned()),
    })
}

/// Says that the running test is skipped: on standard error, past the harness, and
/// in the file that `KEEPALIVE_SKIPS` names.
///
/// # Panics
///
/// That file cannot be written: a skipped test must not pass unseen.
pub fn skip(module: &str, reason: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("?");
    let line = format!("skipped: {module}::{test}: {reason}\n");
    // Not eprint!, which the harness swallows when a test passes.
    drop(std::io::stderr().write_all(line.as_bytes()));
    if let Some(path) = std::env::var_os("KEEPALIVE_SKIPS") {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path);
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        assert!(
            written.is_ok(),
            "{}: {written:?}",
            Path::new(&path).display()
        );
    }
}

/// The directory with `initdb` and `postgres`, newest version first.
#[must_use]
pub fn postgres() -> Option<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let version = entry.file_name().to_str()?.parse().ok()?;
            let programs = entry.path().join("bin");
            programs
                .join("initdb")
                .exists()
                .then_some((version, programs))
        })
        .collect();
    found.sort();
    found.pop().map(|(_, programs)| programs)
}

pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|program| program.is_file())
}
