//! What the shipped BPF object was built with and from.
//!
//! Included by the agent's build script, which refuses an object that is older
//! than its sources, and by xtask, which builds the object.

use std::{
    collections::BTreeSet,
    fmt, fs,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

/// The object, relative to the workspace.
pub(crate) const OBJECT: &str = "keepalive-ebpf/object/keepalive.bpf.o";

/// What describes it, relative to the workspace.
pub(crate) const METADATA: &str = "keepalive-ebpf/object/keepalive.bpf.toml";

/// What it is built from, beside the dependencies that the lock file names.
/// Relative to the workspace; a directory stands for all that is below it.
pub(crate) const SOURCES: [&str; 4] = [
    "keepalive-common/Cargo.toml",
    "keepalive-common/src",
    "keepalive-ebpf/Cargo.toml",
    "keepalive-ebpf/src",
];

/// The dependencies of keepalive-ebpf: keepalive-common has none that is
/// compiled for BPF.
const DEPENDENCIES: [&str; 2] = ["aya-ebpf", "aya-log-ebpf"];

/// The content of [`METADATA`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// The compiler and its LLVM.
    pub(crate) compiler: String,
    /// The linker and its LLVM.
    pub(crate) linker: String,
    /// [`digest_of_sources`] when the object was built.
    pub(crate) sources: String,
    /// SHA-256 of the object.
    pub(crate) object: String,
}

impl Metadata {
    /// Reads the file. An error names it.
    pub(crate) fn read(workspace: &Path) -> Result<Self, String> {
        let text = read(workspace, METADATA)?;
        Self::parse(&String::from_utf8_lossy(&text))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \""))
                .and_then(|rest| rest.strip_suffix('"'))
                .map(str::to_owned)
                .ok_or_else(|| format!("{METADATA}: no {key}"))
        };
        Ok(Self {
            compiler: value("compiler")?,
            linker: value("linker")?,
            sources: value("sources")?,
            object: value("object")?,
        })
    }
}

impl fmt::Display for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            compiler,
            linker,
            sources,
            object,
        } = self;
        write!(
            f,
            "# Written by `cargo xtask bpf`. After a merge conflict, run it again.\n\
             compiler = \"{compiler}\"\n\
             linker = \"{linker}\"\n\
             sources = \"{sources}\"\n\
             object = \"{object}\"\n"
        )
    }
}

/// The shipped object, if it was built from the sources as they are; else why
/// not, and what to do.
pub(crate) fn current_object(workspace: &Path) -> Result<Vec<u8>, String> {
    let remedy = "rebuild it with `cargo xtask bpf`";
    let metadata = Metadata::read(workspace).map_err(|error| format!("{error}; {remedy}"))?;
    let object = read(workspace, OBJECT).map_err(|error| format!("{error}; {remedy}"))?;
    if sha256(&object) != metadata.object {
        return Err(format!(
            "{OBJECT} is not what {METADATA} describes; {remedy}"
        ));
    }
    if digest_of_sources(workspace)? != metadata.sources {
        return Err(format!(
            "{OBJECT} is older than its sources ({}, or their dependencies in Cargo.lock); {remedy}",
            SOURCES.join(", ")
        ));
    }
    Ok(object)
}

/// SHA-256 of everything that the object is built from.
pub(crate) fn digest_of_sources(workspace: &Path) -> Result<String, String> {
    let mut files = BTreeSet::new();
    for source in SOURCES {
        collect_files(workspace, PathBuf::from(source), &mut files)?;
    }
    let mut all = Vec::new();
    for file in files {
        let content = read(workspace, &file)?;
        all.extend(format!("{} {}\n", file.display(), content.len()).into_bytes());
        all.extend(content);
    }
    let lock = read(workspace, "Cargo.lock")?;
    all.extend(locked_dependencies(&String::from_utf8_lossy(&lock)).into_bytes());
    Ok(sha256(&all))
}

/// SHA-256 in hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// The files below `path`, which is relative to the workspace.
fn collect_files(
    workspace: &Path,
    path: PathBuf,
    files: &mut BTreeSet<PathBuf>,
) -> Result<(), String> {
    let full = workspace.join(&path);
    if !full.is_dir() {
        files.insert(path);
        return Ok(());
    }
    let cannot_read = |error| format!("cannot read {}: {error}", path.display());
    for entry in fs::read_dir(&full).map_err(cannot_read)? {
        let name = entry.map_err(cannot_read)?.file_name();
        collect_files(workspace, path.join(name), files)?;
    }
    Ok(())
}

/// What a lock file says of [`DEPENDENCIES`] and of all they depend on.
fn locked_dependencies(lock: &str) -> String {
    let mut packages = lock
        .split("[[package]]\n")
        .skip(1)
        .map(|package| (package, false))
        .collect::<Vec<_>>();
    let mut wanted = DEPENDENCIES.map(str::to_owned).to_vec();
    while let Some(name) = wanted.pop() {
        let line = format!("name = \"{name}\"\n");
        for (package, taken) in &mut packages {
            if !*taken && package.starts_with(&line) {
                *taken = true;
                // ` "syn 2.0.1",` where there are several versions, else ` "syn",`
                wanted.extend(package.lines().filter_map(|line| {
                    let dependency = line.strip_prefix(" \"")?.strip_suffix("\",")?;
                    dependency.split(' ').next().map(str::to_owned)
                }));
            }
        }
    }
    packages
        .iter()
        .filter_map(|(package, taken)| taken.then_some(*package))
        .collect()
}

fn read(workspace: &Path, file: impl AsRef<Path>) -> Result<Vec<u8>, String> {
    let file = file.as_ref();
    fs::read(workspace.join(file))
        .map_err(|error| format!("cannot read {}: {error}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = "\
version = 4

[[package]]
name = \"aya\"
version = \"0.14.0\"
dependencies = [
 \"libc\",
]

[[package]]
name = \"aya-ebpf\"
version = \"0.2.1\"
dependencies = [
 \"syn 3.0.0\",
]

[[package]]
name = \"libc\"
version = \"0.2.0\"

[[package]]
name = \"syn\"
version = \"3.0.0\"
";

    #[test]
    fn only_dependencies_of_the_object_count() {
        let locked = locked_dependencies(LOCK);
        assert!(locked.contains("name = \"aya-ebpf\"") && locked.contains("name = \"syn\""));
        assert!(!locked.contains("name = \"aya\"") && !locked.contains("name = \"libc\""));
    }

    #[test]
    fn metadata_is_read_as_it_is_written() {
        let metadata = Metadata {
            compiler: "rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8".to_owned(),
            linker: "bpf-linker 0.13.0, LLVM 22.1.8".to_owned(),
            sources: sha256(b"sources"),
            object: sha256(b"object"),
        };
        assert_eq!(Metadata::parse(&metadata.to_string()), Ok(metadata));
    }

    /// A workspace with the least there can be.
    fn workspace() -> tempfile::TempDir {
        let workspace = tempfile::tempdir().expect("a directory");
        let write = |file: &str, content: &str| {
            let file = workspace.path().join(file);
            fs::create_dir_all(file.parent().expect("below the workspace")).expect("directory");
            fs::write(file, content).expect("written");
        };
        write("Cargo.lock", LOCK);
        write("keepalive-common/Cargo.toml", "");
        write("keepalive-common/src/lib.rs", "");
        write("keepalive-ebpf/Cargo.toml", "");
        write("keepalive-ebpf/src/main.rs", "");
        write(OBJECT, "object");
        let metadata = Metadata {
            compiler: String::new(),
            linker: String::new(),
            sources: digest_of_sources(workspace.path()).expect("sources"),
            object: sha256(b"object"),
        };
        write(METADATA, &metadata.to_string());
        workspace
    }

    #[test]
    fn an_object_older_than_its_sources_is_refused() {
        for (file, content) in [
            ("keepalive-common/src/plan.rs", ""),
            ("keepalive-ebpf/src/main.rs", "fn main() {}"),
            ("keepalive-ebpf/Cargo.toml", "[package]"),
            ("Cargo.lock", &LOCK.replace("0.2.1", "0.2.2")),
        ] {
            let workspace = workspace();
            assert_eq!(current_object(workspace.path()), Ok(b"object".to_vec()));
            fs::write(workspace.path().join(file), content).expect("written");
            let error = current_object(workspace.path()).expect_err(file);
            assert!(error.contains("older than its sources"), "{file}: {error}");
            assert!(error.contains("cargo xtask bpf"), "{file}: {error}");
        }
    }

    #[test]
    fn an_object_that_is_not_the_described_one_is_refused() {
        let workspace = workspace();
        fs::write(workspace.path().join(OBJECT), "other").expect("written");
        let error = current_object(workspace.path()).expect_err("another object");
        assert!(error.contains("is not what"), "{error}");
    }
}
