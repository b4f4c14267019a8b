//! The kernels that are claimed to work, each as Debian ships it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::apt::Apt;

/// A line of kernels that is claimed to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Series {
    /// How it is named on the command line and in the report; also how its
    /// versions begin.
    pub(crate) name: &'static str,
    /// Debian's suite that ships it.
    pub(super) suite: &'static str,
    /// The name of its step.
    pub(crate) step: &'static str,
}

/// Oldest first. The last one is whatever is the newest of its major version.
pub(crate) const ALL: [Series; 3] = [
    series("6.1", "bookworm-security", "vm 6.1"),
    series("6.12", "trixie-security", "vm 6.12"),
    series("7", "trixie-backports", "vm 7"),
];

const fn series(name: &'static str, suite: &'static str, step: &'static str) -> Series {
    Series { name, suite, step }
}

impl Series {
    /// The series of that name, for the command line.
    pub(crate) fn named(name: &str) -> Result<Self, String> {
        ALL.into_iter()
            .find(|series| series.name == name)
            .ok_or_else(|| {
                let known = ALL.map(|series| series.name).join(", ");
                format!("the kernels are {known}; a filter goes before --vm")
            })
    }
}

/// A kernel, ready to be booted.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) series: Series,
    /// Version of the package.
    pub(super) version: String,
    pub(super) image: PathBuf,
    modules: PathBuf,
}

/// The package that depends on the kernel of the day; the cloud kernel has the
/// same code and fewer drivers.
const NEWEST: &str = "linux-image-cloud-amd64";

impl Kernel {
    /// Fetches the newest of the series.
    pub(super) fn fetch(series: Series, apt: &Apt, cache: &Path) -> Result<Self> {
        let packages = apt.show(NEWEST)?;
        let (version, image) = newest(&packages, series.name)
            .with_context(|| format!("{} has no kernel {}", series.suite, series.name))?;
        // The image itself is elsewhere since 7: whatever is of the same version.
        let mut parts = Vec::new();
        let mut open = vec![image];
        while let Some(part) = open.pop() {
            if parts.contains(&part) {
                continue;
            }
            let shown = apt.show(&part)?;
            let described = stanzas(&shown).next().unwrap_or_default();
            open.extend(companions(field(described, "Depends"), &version));
            parts.push(part);
        }
        let root = cache.join(&version);
        apt.unpack(&parts, &root)?;
        Self::in_directory(series, version, &root)
    }

    fn in_directory(series: Series, version: String, root: &Path) -> Result<Self> {
        let modules = ["lib/modules", "usr/lib/modules"]
            .iter()
            .filter_map(|directory| fs::read_dir(root.join(directory)).ok())
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .next()
            .with_context(|| format!("{} has no modules", root.display()))?;
        let image = fs::read_dir(root.join("boot"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .find(|path| {
                let name = path.file_name().unwrap_or_default();
                name.to_string_lossy().starts_with("vmlinuz-")
            })
            .unwrap_or_else(|| modules.join("vmlinuz"));
        if !image.is_file() {
            bail!("{} has no kernel image", root.display());
        }
        Ok(Self {
            series,
            version,
            image,
            modules,
        })
    }

    /// A module's file, compressed or not.
    pub(super) fn module(&self, name: &str) -> Result<PathBuf> {
        ["ko", "ko.xz"]
            .into_iter()
            .map(|extension| {
                self.modules
                    .join("kernel")
                    .join(name)
                    .with_extension(extension)
            })
            .find(|path| path.is_file())
            .with_context(|| format!("kernel {} has no module {name}", self.version))
    }
}

fn stanzas(text: &str) -> impl Iterator<Item = &str> {
    text.split("\n\n")
        .filter(|stanza| !stanza.trim().is_empty())
}

fn field<'a>(stanza: &'a str, name: &str) -> &'a str {
    stanza
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
        .unwrap_or_default()
}

/// The newest version of a series, and the package `name=version` it depends on.
fn newest(packages: &str, series: &str) -> Option<(String, String)> {
    let of_series = |version: &str| {
        version
            .strip_prefix(series)
            .is_some_and(|rest| rest.starts_with(['.', '-']))
    };
    let stanza = stanzas(packages)
        .filter(|stanza| of_series(field(stanza, "Version")))
        .max_by_key(|stanza| numbers(field(stanza, "Version")))?;
    let version = field(stanza, "Version").to_owned();
    let image = companions(field(stanza, "Depends"), &version)
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))?;
    Some((version, image))
}

/// The numbers of a version, which order it among those of one package.
fn numbers(version: &str) -> Vec<u64> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// Packages that must be of exactly this version, as `name=version`.
fn companions(depends: &str, version: &str) -> Vec<String> {
    depends
        .split(", ")
        .filter_map(|dependency| {
            let (name, wanted) = dependency.split_once(" (= ")?;
            (wanted.strip_suffix(')') == Some(version)).then(|| format!("{name}={version}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGES: &str = "\
Package: linux-image-cloud-amd64
Version: 7.3.4-1~bpo13+1
Depends: linux-base-cloud-amd64 (= 7.3.4-1~bpo13+1), linux-image-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1)

Package: linux-image-cloud-amd64
Version: 6.1.99-1
Depends: linux-image-6.1.0-40-cloud-amd64 (= 6.1.99-1)

Package: linux-image-cloud-amd64
Version: 6.1.192-2
Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)

Package: linux-image-cloud-amd64
Version: 6.12.117-1
Depends: linux-image-6.12.117+deb13-cloud-amd64 (= 6.12.117-1)
";

    #[test]
    fn the_newest_of_a_series_is_taken() {
        for (series, expected) in [
            ("6.1", "linux-image-6.1.0-56-cloud-amd64=6.1.192-2"),
            ("6.12", "linux-image-6.12.117+deb13-cloud-amd64=6.12.117-1"),
            ("7", "linux-image-7.3.4+deb13-cloud-amd64=7.3.4-1~bpo13+1"),
        ] {
            let (version, image) = newest(PACKAGES, series).unwrap();
            assert_eq!(image, expected);
            assert!(image.ends_with(&version));
        }
        let exact = newest(PACKAGES, "6.1.99").map(|(version, _)| version);
        assert_eq!(exact.as_deref(), Some("6.1.99-1"));
        assert_eq!(newest(PACKAGES, "6.1.9"), None);
        assert_eq!(newest(PACKAGES, "5.10"), None);
    }

    #[test]
    fn only_what_is_of_the_same_version_belongs_to_a_kernel() {
        assert_eq!(
            companions(
                "kmod, linux-base (>= 4.3~), a | b, linux-modules-7 (= 7-1)",
                "7-1"
            ),
            ["linux-modules-7=7-1"]
        );
    }

    #[test]
    fn a_kernel_that_is_not_claimed_is_named_none() {
        assert_eq!(Series::named("6.12"), Ok(ALL[1]));
        assert!(Series::named("nginx").unwrap_err().contains("6.1, 6.12,"));
    }
}
