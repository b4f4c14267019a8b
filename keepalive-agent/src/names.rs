//! Names that others chose: of cgroups, processes, namespaces, files.
//!
//! To Linux they are bytes. Whoever may make a cgroup or start a process may put
//! escape sequences for the terminal into its name, line breaks, or bytes that
//! are no text at all. So whatever is printed or logged goes through
//! [`printable`], and names in JSON through [`to_json`] and [`write_json`].

use std::{
    borrow::Cow,
    ffi::OsStr,
    fmt::{self, Write as _},
    io,
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use serde::Serialize;
use serde_json::ser::Formatter;

/// Begins a name in JSON that is not there as it is.
const ESCAPED: &str = "bytes:";

/// A name as it may be printed: see [`printable`].
#[derive(Clone, Copy)]
pub struct Printable<'a>(&'a [u8]);

/// Makes a name harmless on a terminal, in a table, and in a log.
///
/// What has no shape of its own is escaped: control characters (C0, C1, DEL),
/// line and paragraph separators, characters that change the direction of
/// writing or are invisible, spaces other than the usual one, and bytes that are
/// not UTF-8. A backslash stands for itself, so that the names of systemd's units
/// are printed as they are written; what must be told apart for certain is in the
/// JSON ([`to_json`]).
#[must_use]
pub fn printable<T: AsRef<[u8]> + ?Sized>(name: &T) -> Printable<'_> {
    Printable(name.as_ref())
}

/// The same for the path of a file.
#[must_use]
pub fn printable_path<T: AsRef<OsStr> + ?Sized>(path: &T) -> Printable<'_> {
    Printable(path.as_ref().as_bytes())
}

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                if is_printable(character) {
                    f.write_char(character)?;
                } else {
                    write!(f, "{}", character.escape_debug())?;
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Whether [`printable`] leaves a character as it is: quotes and backslashes, and
/// what the standard library takes for printable.
#[must_use]
pub fn is_printable(character: char) -> bool {
    // Almost all names are made of these.
    matches!(character, ' '..='~') || character.escape_debug().eq([character])
}

/// Text of several lines, each made [`printable`].
#[derive(Clone, Copy)]
pub struct PrintableLines<'a>(pub &'a str);

impl fmt::Display for PrintableLines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.0.split_inclusive('\n') {
            match line.strip_suffix('\n') {
                Some(line) => writeln!(f, "{}", printable(line))?,
                None => write!(f, "{}", printable(line))?,
            }
        }
        Ok(())
    }
}

/// A name as a string of JSON: itself where it is UTF-8; else `bytes:` and the
/// name with `%XX` for each byte that is not UTF-8 and for `%`. A name that
/// begins with `bytes:` is escaped too, so that no two names look the same.
#[must_use]
pub fn to_json(name: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(name) {
        Ok(text) if !text.starts_with(ESCAPED) => Cow::Borrowed(text),
        _ => {
            let mut text = ESCAPED.to_owned();
            for chunk in name.utf8_chunks() {
                text.push_str(&chunk.valid().replace('%', "%25"));
                for byte in chunk.invalid() {
                    // Writing to a string does not fail.
                    let _ = write!(text, "%{byte:02X}");
                }
            }
            Cow::Owned(text)
        }
    }
}

/// The same for the path of a file.
#[must_use]
pub fn path_to_json(path: &Path) -> Cow<'_, str> {
    to_json(path.as_os_str().as_bytes())
}

/// The name behind a string of JSON; none where [`to_json`] writes no such
/// string.
#[must_use]
pub fn from_json(text: &str) -> Option<Cow<'_, [u8]>> {
    let Some(escaped) = text.strip_prefix(ESCAPED) else {
        return Some(Cow::Borrowed(text.as_bytes()));
    };
    let mut name = Vec::with_capacity(escaped.len());
    let mut parts = escaped.split('%');
    name.extend_from_slice(parts.next()?.as_bytes());
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        if digits.bytes().any(|digit| !digit.is_ascii_hexdigit()) {
            return None;
        }
        name.push(u8::from_str_radix(digits, 16).ok()?);
        name.extend_from_slice(rest.as_bytes());
    }
    Some(Cow::Owned(name))
}

/// Writes a value as JSON on one line. What [`printable`] would escape, JSON has
/// an escape of its own for: a terminal is not harmed, and nothing is lost.
///
/// # Errors
///
/// When it cannot be written.
pub fn write_json(value: &impl Serialize, out: &mut impl io::Write) -> io::Result<()> {
    value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut *out,
        PrintableJson,
    ))?;
    out.write_all(b"\n")
}

struct PrintableJson;

impl Formatter for PrintableJson {
    fn write_string_fragment<W: io::Write + ?Sized>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut plain = fragment;
        while let Some((start, escaped)) = plain.char_indices().find(|(_, c)| !is_printable(*c)) {
            let (before, rest) = plain.split_at(start);
            out.write_all(before.as_bytes())?;
            for unit in escaped.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}")?;
            }
            plain = rest.get(escaped.len_utf8()..).unwrap_or_default();
        }
        out.write_all(plain.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn what_moves_the_cursor_or_the_reader_is_escaped() {
        for (name, shown) in [
            (&b"nginx"[..], "nginx"),
            (b"a b-c.service", "a b-c.service"),
            (br"dev-disk\x2dby.device", r"dev-disk\x2dby.device"),
            (b"quote\"'", "quote\"'"),
            ("é日本🦀".as_bytes(), "é日本🦀"),
            (b"\x1b[31m\x07", r"\u{1b}[31m\u{7}"),
            (b"two\nlines\r\t", r"two\nlines\r\t"),
            (b"nul\0del\x7f", r"nul\0del\u{7f}"),
            ("\u{9b}2J".as_bytes(), r"\u{9b}2J"),
            (
                "\u{202e}gnp.exe\u{2066}".as_bytes(),
                r"\u{202e}gnp.exe\u{2066}",
            ),
            (
                "\u{2028}\u{2029}\u{200f}".as_bytes(),
                r"\u{2028}\u{2029}\u{200f}",
            ),
            (
                "\u{200b}\u{feff}\u{a0}".as_bytes(),
                r"\u{200b}\u{feff}\u{a0}",
            ),
            (b"bad\xff\xfe", r"bad\xff\xfe"),
            (b"cut\xe2\x82", r"cut\xe2\x82"),
        ] {
            assert_eq!(printable(name).to_string(), shown, "{name:?}");
        }
    }

    #[test]
    fn lines_stay_lines() {
        for (text, shown) in [
            ("", ""),
            ("a\nb\x1b\n", "a\nb\\u{1b}\n"),
            ("\n\na\rb", "\n\na\\rb"),
        ] {
            assert_eq!(PrintableLines(text).to_string(), shown);
        }
    }

    #[test]
    fn json_has_names_as_they_are_where_it_can() {
        for (name, text) in [
            (&b"/a b/\xc3\xa9"[..], "/a b/é"),
            (b"100%", "100%"),
            (b"bad\xff%", "bytes:bad%FF%25"),
            (b"bytes:x", "bytes:bytes:x"),
        ] {
            assert_eq!(to_json(name), text);
            assert_eq!(from_json(text).as_deref(), Some(name));
        }
        for text in ["bytes:%", "bytes:%f", "bytes:%zz", "bytes:%+1", "bytes:%é"] {
            assert_eq!(from_json(text), None, "{text}");
        }
    }

    #[test]
    fn json_is_harmless_and_complete() {
        let mut line = Vec::new();
        let text = "a\u{202e}\u{9b}\u{7f}\u{e0001}\n\"\\é🦀";
        write_json(&text, &mut line).unwrap();
        let expected = "\"a\\u202e\\u009b\\u007f\\udb40\\udc01\\n\\\"\\\\é🦀\"\n";
        assert_eq!(str::from_utf8(&line).unwrap(), expected);
        assert_eq!(serde_json::from_slice::<String>(&line).unwrap(), text);
    }

    proptest! {
        #[test]
        fn every_name_survives_json(name in vec(any::<u8>(), 0..40)) {
            let text = to_json(&name);
            let again = from_json(&text);
            prop_assert_eq!(again.as_deref(), Some(&name[..]));
            let mut line = Vec::new();
            write_json(&text, &mut line).unwrap();
            prop_assert_eq!(&serde_json::from_slice::<String>(&line).unwrap(), &text);
            let line = str::from_utf8(&line).unwrap();
            prop_assert!(line.trim_end_matches('\n').chars().all(is_printable), "{line:?}");
        }

        #[test]
        fn nothing_printed_is_a_control_character(name in vec(any::<u8>(), 0..40)) {
            let shown = printable(&name).to_string();
            let harmful = |c: char| c.is_control()
                || matches!(c, '\u{200e}' | '\u{200f}' | '\u{61c}')
                || ('\u{2028}'..='\u{202e}').contains(&c)
                || ('\u{2066}'..='\u{2069}').contains(&c);
            prop_assert!(!shown.contains(harmful), "{shown:?}");
        }

        #[test]
        fn no_text_breaks_reading_json(text in "(bytes:)?[%0-9a-fé]{0,12}") {
            if let Some(name) = from_json(&text) {
                let text = to_json(&name);
                let again = from_json(&text);
                prop_assert_eq!(again.as_deref(), Some(&*name));
            }
        }
    }
}
