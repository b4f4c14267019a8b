//! What is wrong in a config, and where.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::{Serialize, Serializer};

use crate::names::{path_to_json, printable, printable_path};

/// One thing that is wrong, or worth a warning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// The file.
    #[serde(serialize_with = "as_name")]
    pub file: PathBuf,
    /// The line, counted from 1; none where the file cannot be read at all.
    pub line: Option<usize>,
    /// The key with the tables it stands in, such as `policy.idle`; empty when
    /// the text is not TOML.
    pub key: String,
    /// The value as written, when that helps.
    pub value: Option<String>,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", printable_path(&self.file))?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        f.write_str(" ")?;
        if !self.key.is_empty() {
            printable(&self.key).fmt(f)?;
            if let Some(value) = &self.value {
                write!(f, " = {}", printable(value))?;
            }
            f.write_str(": ")?;
        }
        printable(&self.message).fmt(f)
    }
}

fn as_name<S: Serializer>(file: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path_to_json(file))
}

/// Everything that was found, file by file in the order in which they are
/// merged, and within a file from the top.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl std::error::Error for Diagnostics {}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        let errors = if count == 1 { "error" } else { "errors" };
        write!(f, "{count} {errors} in the config, so none of it is used")?;
        for diagnostic in &self.0 {
            write!(f, "\n  {diagnostic}")?;
        }
        Ok(())
    }
}
