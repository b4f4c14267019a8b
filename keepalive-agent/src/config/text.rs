//! The texts that a config is made of, and findings about places in them.

use std::{ops::Range as Span, path::Path, sync::Arc};

use super::{Diagnostic, Diagnostics, origin::Place};

/// A text and the file it stands in.
pub(super) struct Text {
    path: Arc<Path>,
    content: String,
    /// Offsets of the line ends.
    line_ends: Vec<usize>,
}

/// A place in one of several texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct At {
    /// Index of the text.
    pub(super) text: usize,
    pub(super) span: Span<usize>,
}

impl Text {
    pub(super) fn new(path: &Path, content: String) -> Self {
        let ends = content
            .bytes()
            .enumerate()
            .filter(|(_, byte)| *byte == b'\n');
        Self {
            path: path.into(),
            line_ends: ends.map(|(offset, _)| offset).collect(),
            content,
        }
    }

    pub(super) fn as_str(&self) -> &str {
        &self.content
    }

    /// The line that a span starts in, counted from 1.
    fn line(&self, span: &Span<usize>) -> usize {
        1 + self.line_ends.partition_point(|end| *end < span.start)
    }

    /// A value as it stands in the text, on one line; none for a table that
    /// has a header, where the key says it all.
    fn as_written(&self, span: &Span<usize>) -> Option<String> {
        let text = self.content.get(span.clone())?;
        let first = text.lines().next()?;
        let line = &self.content[..span.start + first.len()];
        if line.rsplit('\n').next()?.trim_start() == first && first.starts_with('[') {
            return None;
        }
        let rest = if first.len() < text.len() { " …" } else { "" };
        Some(format!("{first}{rest}"))
    }
}

/// What was found in several texts. Keys are read by topic, a person reads from
/// the top.
pub(super) struct Findings<'a> {
    texts: &'a [Text],
    errors: Vec<((usize, usize), Diagnostic)>,
    warnings: Vec<((usize, usize), Diagnostic)>,
}

impl<'a> Findings<'a> {
    pub(super) fn about(texts: &'a [Text]) -> Self {
        Self {
            texts,
            errors: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Errors and warnings, each in the order of the texts.
    pub(super) fn into_order(self) -> (Diagnostics, Diagnostics) {
        let [errors, warnings] = [self.errors, self.warnings].map(|mut found| {
            found.sort_by_key(|(offset, _)| *offset);
            Diagnostics(found.into_iter().map(|(_, found)| found).collect())
        });
        (errors, warnings)
    }

    pub(super) fn count_of_errors(&self) -> usize {
        self.errors.len()
    }

    pub(super) fn text(&self, index: usize) -> &'a str {
        self.texts[index].as_str()
    }

    pub(super) fn place(&self, at: &At) -> Place {
        let text = &self.texts[at.text];
        Place {
            file: Arc::clone(&text.path),
            line: text.line(&at.span),
        }
    }

    /// Something is wrong with a key as a whole.
    pub(super) fn error(&mut self, at: &At, key: &str, message: &str) {
        let found = self.diagnostic(at, key, None, message);
        self.errors.push(found);
    }

    /// The value that stands here is wrong.
    pub(super) fn wrong(&mut self, at: &At, key: &str, message: &str) {
        let found = self.diagnostic(at, key, self.as_written(at), message);
        self.errors.push(found);
    }

    /// The value that stands here is worth a warning.
    pub(super) fn warning(&mut self, at: &At, key: &str, message: &str) {
        let found = self.diagnostic(at, key, self.as_written(at), message);
        self.warnings.push(found);
    }

    fn as_written(&self, at: &At) -> Option<String> {
        self.texts[at.text].as_written(&at.span)
    }

    fn diagnostic(
        &self,
        at: &At,
        key: &str,
        value: Option<String>,
        message: &str,
    ) -> ((usize, usize), Diagnostic) {
        let text = &self.texts[at.text];
        let found = Diagnostic {
            file: text.path.to_path_buf(),
            line: Some(text.line(&at.span)),
            key: key.to_owned(),
            value,
            message: message.to_owned(),
        };
        ((at.text, at.span.start), found)
    }
}
