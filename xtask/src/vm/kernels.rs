//! The kernels that are claimed to work, each as Debian ships it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

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

    /// Where `machine.sh` has unpacked it.
    pub(super) fn directory(self, machine: &Path) -> PathBuf {
        machine.join("kernels").join(self.name)
    }

    /// Its version, as the package names it.
    pub(super) fn version(self, machine: &Path) -> Result<String> {
        let link = self.directory(machine);
        let package =
            fs::read_link(&link).with_context(|| format!("cannot read {}", link.display()))?;
        let package = package.to_string_lossy();
        let version = package.strip_prefix("linux-image-");
        Ok(version.unwrap_or(&package).to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_not_claimed_is_named_none() {
        assert_eq!(Series::named("6.12"), Ok(ALL[1]));
        assert!(Series::named("nginx").unwrap_err().contains("6.1, 6.12,"));
    }
}
