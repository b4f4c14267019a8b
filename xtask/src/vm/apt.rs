//! Debian's archive, asked with the machine's own apt, its mirrors and keys, but
//! with lists of its own: what this machine has installed stays as it is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};

use crate::exec;

/// Lists older than this are fetched again.
const FRESH: Duration = Duration::from_hours(24);

/// Signs all of Debian's suites, older and newer ones than the machine's own too.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where the machine gets its packages.
pub(super) struct Mirrors {
    /// The machine's release, such as `bookworm`.
    pub(super) codename: String,
    main: String,
    security: String,
}

impl Mirrors {
    /// Those of the machine's apt configuration.
    pub(super) fn of_this_machine() -> Result<Self> {
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let codename = release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .unwrap_or_default();
        let targets = exec::output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Identifier: Packages",
        ]))
        .context("the kernels to boot are Debian's, and come by apt")?;
        Self::among(&targets, codename)
    }

    fn among(targets: &str, codename: &str) -> Result<Self> {
        let of = |suite: &str| {
            let uri = targets.lines().find_map(|line| {
                let (uri, suite_and_component) = line.split_once(' ')?;
                (suite_and_component == format!("{suite} main")).then(|| uri.to_owned())
            });
            uri.with_context(|| {
                format!(
                    "this machine's apt has no source for {suite} main: \
                     without it there is no kernel to boot"
                )
            })
        };
        if codename.is_empty() {
            bail!("/etc/os-release names no release: this needs Debian's archive");
        }
        Ok(Self {
            main: of(codename)?,
            security: of(&format!("{codename}-security"))?,
            codename: codename.to_owned(),
        })
    }

    /// A line of sources.list for a suite.
    fn source(&self, suite: &str) -> String {
        let uri = if suite.ends_with("-security") {
            &self.security
        } else {
            &self.main
        };
        let signed = if Path::new(KEYRING).exists() {
            format!(" [signed-by={KEYRING}]")
        } else {
            String::new()
        };
        format!("deb{signed} {uri} {suite} main\n")
    }
}

/// apt with lists of its own.
pub(super) struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// With these suites; fetches their lists if they are not fresh.
    pub(super) fn with(directory: PathBuf, mirrors: &Mirrors, suites: &[&str]) -> Result<Self> {
        for below in ["lists/partial", "archives/partial", "parts"] {
            let below = directory.join(below);
            fs::create_dir_all(&below)
                .with_context(|| format!("cannot create {}", below.display()))?;
        }
        let sources: String = suites.iter().map(|suite| mirrors.source(suite)).collect();
        let list = directory.join("sources.list");
        let stamp = directory.join("updated");
        let same = fs::read_to_string(&list).is_ok_and(|old| old == sources);
        fs::write(&list, sources).with_context(|| format!("cannot write {}", list.display()))?;
        let apt = Self { directory };
        if !same || !is_fresh(&stamp) {
            let updated =
                exec::run(
                    apt.command("apt-get")
                        .args(["--quiet", "--error-on=any", "update"]),
                );
            match updated {
                Ok(()) => fs::write(&stamp, "")?,
                // A day without the network is no reason not to test with what
                // is there.
                Err(error) if same && stamp.exists() => exec::warn(&format!(
                    "{error:#}: going on with the lists that are there"
                )),
                Err(error) => return Err(error),
            }
        }
        Ok(apt)
    }

    /// One of apt's programs.
    fn command(&self, program: &str) -> Command {
        let directory = self.directory.display();
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        for (option, value) in [
            ("Dir::State", format!("{directory}")),
            ("Dir::State::Lists", format!("{directory}/lists")),
            ("Dir::State::status", "/var/lib/dpkg/status".to_owned()),
            ("Dir::Cache", format!("{directory}")),
            ("Dir::Etc::SourceList", format!("{directory}/sources.list")),
            ("Dir::Etc::SourceParts", format!("{directory}/parts")),
            ("Dir::Etc::PreferencesParts", format!("{directory}/parts")),
            ("APT::Update::Post-Invoke", String::new()),
            ("APT::Update::Post-Invoke-Success", String::new()),
            ("Acquire::Languages", "none".to_owned()),
            (
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
                "false".to_owned(),
            ),
        ] {
            command.arg("-o").arg(format!("{option}={value}"));
        }
        command
    }

    /// What the lists say about a package, all its versions.
    pub(super) fn show(&self, package: &str) -> Result<String> {
        exec::output(self.command("apt-cache").args(["show", package]))
    }

    /// What would have to be installed for this package to run here, as
    /// `name=version`.
    pub(super) fn needed_for(&self, package: &str, suite: &str) -> Result<Vec<String>> {
        let plan = exec::output(
            self.command("apt-get")
                .args(["--simulate", "--no-install-recommends", "--no-remove"])
                .args(["--target-release", suite])
                .args(["install", package]),
        )?;
        Ok(plan.lines().filter_map(to_install).collect())
    }

    /// Downloads packages and unpacks them into `root`, which is there when all
    /// of it is.
    pub(super) fn unpack(&self, packages: &[String], root: &Path) -> Result<()> {
        if root.exists() {
            return Ok(());
        }
        let downloads = self.directory.join("downloads");
        let half = root.with_extension("half");
        for directory in [&downloads, &half] {
            drop(fs::remove_dir_all(directory));
            fs::create_dir_all(directory)
                .with_context(|| format!("cannot create {}", directory.display()))?;
        }
        let mut download = self.command("apt-get");
        download
            .current_dir(&downloads)
            .args(["--quiet", "--quiet", "download"])
            .args(packages);
        exec::say(&format!("downloading {}", packages.join(" ")));
        exec::output(&mut download)?;
        for package in fs::read_dir(&downloads)? {
            exec::output(
                Command::new("dpkg-deb")
                    .arg("--extract")
                    .arg(package?.path())
                    .arg(&half),
            )?;
        }
        fs::remove_dir_all(&downloads)?;
        fs::rename(&half, root).with_context(|| format!("cannot make {}", root.display()))
    }
}

fn is_fresh(stamp: &Path) -> bool {
    let age = fs::metadata(stamp)
        .and_then(|stamp| stamp.modified())
        .map(|written| SystemTime::now().duration_since(written));
    matches!(age, Ok(Ok(age)) if age < FRESH)
}

/// Reads `Inst name [old version] (version suite [arch])`.
fn to_install(line: &str) -> Option<String> {
    let rest = line.strip_prefix("Inst ")?;
    let (name, rest) = rest.split_once(' ')?;
    // The emulators of programs are of the same source as those of machines, and
    // would be brought up to date too.
    if name.starts_with("qemu-user") {
        return None;
    }
    let version = rest.split_once('(')?.1.split_whitespace().next()?;
    Some(format!("{name}={version}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_those_of_the_release_and_its_security_updates() {
        let targets = "http://mirror/debian/ bookworm contrib\n\
                       http://mirror/debian/ bookworm main\n\
                       http://other/security/ bookworm-security main\n";
        let mirrors = Mirrors::among(targets, "bookworm").unwrap();
        assert!(
            mirrors
                .source("trixie-backports")
                .ends_with(" http://mirror/debian/ trixie-backports main\n")
        );
        assert!(
            mirrors
                .source("bullseye-security")
                .contains(" http://other/security/ bullseye-security ")
        );
        for (targets, codename, missing) in [
            (targets, "trixie", "trixie main"),
            (
                "http://mirror/debian/ bookworm main",
                "bookworm",
                "bookworm-security main",
            ),
            (targets, "", "/etc/os-release"),
        ] {
            let error = Mirrors::among(targets, codename).err().unwrap();
            assert!(error.to_string().contains(missing), "{error}");
        }
    }

    #[test]
    fn what_apt_would_install_is_taken_but_for_the_other_emulators() {
        for (line, expected) in [
            (
                "Inst libslirp0 (4.7.0-1 Debian:12.15/oldstable [amd64])",
                Some("libslirp0=4.7.0-1"),
            ),
            (
                "Inst libfdt1 [1.0] (1.6.1-4+b1 Debian:12.15/oldstable [amd64]) []",
                Some("libfdt1=1.6.1-4+b1"),
            ),
            ("Inst qemu-user [1:7.2] (1:10.0.2 Debian [amd64])", None),
            ("Conf libslirp0 (4.7.0-1 Debian)", None),
        ] {
            assert_eq!(to_install(line).as_deref(), expected, "{line}");
        }
    }
}
