//! Sources: the files that a config is made of.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    Config, ConfigOrigins, Diagnostic, Diagnostics, document,
    locate::locate,
    merge::{self, Base, Locate},
    text::{Findings, Text},
    trusted_file::{self, Refusal, read},
};

/// The main file, where no other one is named.
pub const DEFAULT_FILE: &str = "/etc/keepalive/keepalive.toml";

/// Drop-ins that stay.
pub const PERMANENT_DIRECTORY: &str = "/etc/keepalive/conf.d";

/// Drop-ins that are gone with the boot.
pub const RUNTIME_DIRECTORY: &str = "/run/keepalive/conf.d";

/// Where a config is read from: a main file, then drop-ins.
///
/// The drop-ins of all directories are read in the order of their names. One
/// replaces those of the same name in earlier directories, so an empty file, or
/// a symbolic link to /dev/null, takes them out.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Sources {
    main: PathBuf,
    /// Whether the built-in policy stands in for a main file that does not exist.
    has_base: bool,
    directories: Vec<PathBuf>,
}

/// A config with what is known about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged<O = ConfigOrigins> {
    /// The config.
    pub config: Config,
    /// What is worth a warning.
    pub warnings: Diagnostics,
    /// Which file and line each value came from, for who asks.
    pub origins: O,
    /// The main file, unless the built-in policy stands in for it.
    pub main: Option<PathBuf>,
    /// The drop-ins that were read, in the order in which they were merged.
    pub drop_ins: Vec<PathBuf>,
}

/// A file as it could be.
#[derive(Clone, Copy, Debug)]
struct Supposed<'a> {
    path: &'a Path,
    /// None when it does not exist.
    text: Option<&'a str>,
}

impl Sources {
    /// The main file and drop-in directories that are named, or those of every
    /// machine: [`DEFAULT_FILE`] with [`PERMANENT_DIRECTORY`] and
    /// [`RUNTIME_DIRECTORY`]. Directories that are named come after those.
    #[must_use]
    pub fn new(main: Option<&Path>, directories: &[PathBuf]) -> Self {
        let of_every_machine = match main {
            Some(_) => &[][..],
            None => &[PERMANENT_DIRECTORY, RUNTIME_DIRECTORY],
        };
        Self {
            main: main.unwrap_or(DEFAULT_FILE.as_ref()).to_owned(),
            has_base: main.is_none(),
            directories: of_every_machine
                .iter()
                .map(PathBuf::from)
                .chain(directories.iter().cloned())
                .collect(),
        }
    }

    /// Those of every machine, as if its root were there; `etc` and `run` are the
    /// directories.
    #[cfg(test)]
    pub(crate) fn below(root: &Path) -> Self {
        Self {
            main: root.join("main.toml"),
            has_base: true,
            directories: vec![root.join("etc"), root.join("run")],
        }
    }

    /// The main file, whether it exists or not.
    #[must_use]
    pub fn main(&self) -> &Path {
        &self.main
    }

    /// The directories of drop-ins, whether they exist or not; later ones win.
    #[must_use]
    pub fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    /// Reads and merges all of it.
    ///
    /// # Errors
    ///
    /// Everything that is wrong in any of the files; none of them is used then.
    pub fn read(&self) -> Result<Merged, Diagnostics> {
        self.read_supposing(None, locate)
    }

    /// The same without where the values come from.
    ///
    /// # Errors
    ///
    /// As [`Sources::read`].
    pub fn read_config(&self) -> Result<Merged<()>, Diagnostics> {
        self.read_supposing(None, |_, _, _| ())
    }

    /// The same as if a file had this text, or none and did not exist.
    ///
    /// # Errors
    ///
    /// As [`Sources::read`].
    pub fn read_as_if(&self, path: &Path, text: Option<&str>) -> Result<Merged, Diagnostics> {
        self.read_supposing(Some(Supposed { path, text }), locate)
    }

    /// Whether one of the files has had nothing in it since a moment ago: who writes a
    /// file in place empties it first.
    #[must_use]
    pub fn was_just_emptied(&self) -> bool {
        const MOMENT: Duration = Duration::from_secs(1);
        let mut files = self.drop_ins(None, &mut Vec::new());
        files.push(self.main.clone());
        files.iter().any(|file| {
            let emptied = fs::metadata(file)
                .ok()
                .filter(|found| found.is_file() && found.len() == 0)
                .and_then(|found| found.modified().ok());
            emptied.is_some_and(|at| at.elapsed().is_ok_and(|since| since < MOMENT))
        })
    }

    fn read_supposing<O>(
        &self,
        supposed: Option<Supposed<'_>>,
        origins: Locate<O>,
    ) -> Result<Merged<O>, Diagnostics> {
        let mut unreadable = Vec::new();
        let mut texts = Vec::new();
        let mut has_main = true;
        let main = match supposed {
            Some(Supposed { path, text }) if path == self.main => {
                text.map(str::to_owned).ok_or(Refusal::Absent)
            }
            _ => read(&self.main),
        };
        match main {
            Ok(text) => texts.push(Text::new(&self.main, text)),
            Err(Refusal::Absent) if self.has_base => has_main = false,
            Err(refusal) => unreadable.push(about(&self.main, &refusal)),
        }
        let mut drop_ins = Vec::new();
        for path in self.drop_ins(supposed, &mut unreadable) {
            let text = match supposed {
                Some(Supposed { path: same, text }) if path == same => {
                    Ok(text.unwrap_or_default().to_owned())
                }
                _ => read(&path),
            };
            match text {
                // Empty, it is there only to take another one out.
                Ok(text) if text.is_empty() => {}
                Ok(text) => {
                    texts.push(Text::new(&path, text));
                    drop_ins.push(path);
                }
                // Removed after the directory was read.
                Err(Refusal::Absent) => {}
                Err(refusal) => unreadable.push(about(&path, &refusal)),
            }
        }
        let main = has_main.then_some(&*self.main);
        parse_all(&texts, unreadable, main, drop_ins, origins)
    }

    /// The drop-ins in the order of their names.
    fn drop_ins(
        &self,
        supposed: Option<Supposed<'_>>,
        unreadable: &mut Vec<Diagnostic>,
    ) -> Vec<PathBuf> {
        let mut by_name = BTreeMap::<OsString, PathBuf>::new();
        for directory in &self.directories {
            let mut names = drop_ins_in(directory).unwrap_or_else(|refusal| {
                unreadable.push(about(directory, &refusal));
                Vec::new()
            });
            if let Some(Supposed { path, text }) = supposed
                && path.parent() == Some(directory)
                && let Some(name) = path.file_name()
            {
                names.retain(|other| other != name);
                names.extend(text.map(|_| name.to_owned()));
            }
            for name in names {
                let path = directory.join(&name);
                by_name.insert(name, path);
            }
        }
        by_name.into_values().collect()
    }
}

/// Reads and merges these files and no others; without a main one the built-in
/// policy stands in for it.
///
/// # Errors
///
/// As [`Sources::read`].
pub fn read_files(main: Option<&Path>, drop_ins: &[PathBuf]) -> Result<Merged, Diagnostics> {
    let mut unreadable = Vec::new();
    let mut texts = Vec::new();
    for path in main
        .into_iter()
        .chain(drop_ins.iter().map(PathBuf::as_path))
    {
        match read(path) {
            Ok(text) => texts.push(Text::new(path, text)),
            Err(refusal) => unreadable.push(about(path, &refusal)),
        }
    }
    parse_all(&texts, unreadable, main, drop_ins.to_vec(), locate)
}

/// Whether a file of this name in a directory of drop-ins is one. Hidden files
/// are those of editors and of Kubernetes.
#[must_use]
pub fn is_drop_in_name(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.ends_with(b".toml") && !name.starts_with(b".")
}

/// Reads one text as all there is.
pub(super) fn parse(path: &Path, text: &str) -> Result<Merged, Diagnostics> {
    let texts = [Text::new(path, text.to_owned())];
    parse_all(&texts, Vec::new(), Some(path), Vec::new(), locate)
}

/// Merges the texts of these files; `unreadable` is what is wrong already. Without a
/// main file the built-in policy stands in for it.
fn parse_all<O>(
    texts: &[Text],
    unreadable: Vec<Diagnostic>,
    main: Option<&Path>,
    drop_ins: Vec<PathBuf>,
    origins: Locate<O>,
) -> Result<Merged<O>, Diagnostics> {
    let base = if main.is_some() {
        Base::Nothing
    } else {
        Base::BuiltIn
    };
    let mut findings = Findings::about(texts);
    let documents: Vec<_> = (0..texts.len())
        .map(|text| document::read(&mut findings, text))
        .collect();
    // What is missing may be in a file that cannot be read.
    let all_there = unreadable.is_empty() && documents.iter().all(Option::is_some);
    let merged = all_there.then(|| {
        merge::merge(
            &mut findings,
            base,
            documents.into_iter().flatten(),
            origins,
        )
    });
    let (errors, warnings) = findings.into_order();
    match merged {
        Some((config, origins)) if errors.0.is_empty() => Ok(Merged {
            config,
            warnings,
            origins,
            main: main.map(Path::to_owned),
            drop_ins,
        }),
        _ => Err(Diagnostics([unreadable, errors.0].concat())),
    }
}

/// Names of the drop-ins in a directory; none where it does not exist.
fn drop_ins_in(directory: &Path) -> Result<Vec<OsString>, Refusal> {
    match trusted_file::names_in(directory) {
        Ok(mut names) => {
            names.retain(|name| is_drop_in_name(name));
            Ok(names)
        }
        Err(Refusal::Absent) => Ok(Vec::new()),
        Err(refusal) => Err(refusal),
    }
}

/// What is wrong with a file as a whole.
fn about(path: &Path, refusal: &Refusal) -> Diagnostic {
    Diagnostic {
        file: path.to_owned(),
        line: match refusal {
            Refusal::NotText { line } => Some(*line),
            _ => None,
        },
        key: String::new(),
        value: None,
        message: refusal.to_string(),
    }
}
