//! Tables and paragraphs that fit the terminal; elsewhere nothing is cut off.

use std::{
    env,
    io::{self, IsTerminal as _},
};

use rustix::termios::{Winsize, tcgetwinsize};
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

/// Of a terminal that does not know its size: what every one has.
const DEFAULT_WIDTH: usize = 80;

/// Between two columns.
const GAP: &str = "  ";

/// No column is made narrower than its longest word, or this, to make room for
/// others.
const NARROW: usize = 12;

/// Where that is not enough, down to this.
const NARROWEST: usize = 6;

/// Columns and lines of the terminal that standard output is; none where it is
/// none.
pub(super) fn terminal() -> Option<(usize, usize)> {
    let Winsize { ws_col, ws_row, .. } = tcgetwinsize(io::stdout()).ok()?;
    (ws_col > 0 && ws_row > 0).then_some((ws_col.into(), ws_row.into()))
}

/// The width of what is written for somebody who does not look at a terminal: it
/// can be searched, and nothing is lost.
pub(super) const UNBOUNDED: usize = usize::MAX;

/// How wide lines may be: as the terminal, or [`UNBOUNDED`] where there is none,
/// unless `COLUMNS` says otherwise.
pub(super) fn width() -> usize {
    width_from(
        terminal().map(|(columns, _)| columns),
        env::var("COLUMNS").ok().as_deref(),
        io::stdout().is_terminal(),
    )
}

fn width_from(terminal: Option<usize>, columns: Option<&str>, is_terminal: bool) -> usize {
    let otherwise = if is_terminal {
        DEFAULT_WIDTH
    } else {
        UNBOUNDED
    };
    let columns = || columns?.parse().ok().filter(|columns| *columns > 0);
    terminal.or_else(columns).unwrap_or(otherwise)
}

/// How many places of a terminal a text takes.
pub(super) fn width_of(text: &str) -> usize {
    text.width()
}

/// How wide a row of these columns is.
pub(super) fn width_of_row(columns: impl Iterator<Item = usize>) -> usize {
    columns
        .map(|column| column + GAP.len())
        .sum::<usize>()
        .saturating_sub(GAP.len())
}

/// Appends a line of cells, aligned; each as wide as its column at the most.
pub(super) fn push_row<'a>(
    out: &mut String,
    cells: impl Iterator<Item = &'a str>,
    widths: &[usize],
) {
    let start = out.len();
    for (cell, width) in cells.zip(widths) {
        let cell = end_of(cell, *width);
        out.push_str(&cell);
        let padding = width.saturating_sub(width_of(&cell)) + GAP.len();
        out.extend(std::iter::repeat_n(' ', padding));
    }
    out.truncate(start + out.get(start..).map_or(0, |line| line.trim_end().len()));
    out.push('\n');
}

/// A text, or where it is too wide, its end: what tells most of a path.
pub(super) fn end_of(text: &str, width: usize) -> String {
    if width_of(text) <= width {
        return text.to_owned();
    }
    let mut left = width.saturating_sub(1);
    let kept = text.char_indices().rev().take_while(|(_, character)| {
        let width = character.width().unwrap_or(0);
        let fits = width <= left;
        left = left.saturating_sub(width);
        fits
    });
    let start = kept.last().map_or(text.len(), |(start, _)| start);
    format!("…{}", text.get(start..).unwrap_or_default())
}

/// Breaks a text into lines: between words, after their hyphens and slashes, or
/// anywhere.
pub(super) fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = Vec::new();
    for paragraph in text.split('\n') {
        let mut line = String::new();
        for word in paragraph.split(' ') {
            if !line.is_empty() && width_of(&line) + 1 + width_of(word) > width {
                lines.push(std::mem::take(&mut line));
            } else if !line.is_empty() {
                line.push(' ');
            }
            let mut start = line.len();
            for character in word.chars() {
                if width_of(&line) + character.width().unwrap_or(0) > width {
                    let part = line.get(start..).unwrap_or_default();
                    let at = part
                        .rfind(['-', '/'])
                        .map_or(line.len(), |at| start + at + 1);
                    let rest = line.split_off(at);
                    lines.push(std::mem::replace(&mut line, rest));
                    start = 0;
                }
                line.push(character);
            }
        }
        lines.push(line);
    }
    lines
}

/// A table whose cells are broken into lines where it would be too wide.
pub(super) fn lay_out(header: &[&str], rows: &[Vec<String>], available: usize) -> String {
    let longest_word = |text: &str| text.split(' ').map(width_of).max().unwrap_or(0);
    let mut widths: Vec<_> = header.iter().map(|title| width_of(title)).collect();
    let mut words: Vec<_> = header.iter().map(|title| longest_word(title)).collect();
    for row in rows {
        for ((width, word), cell) in widths.iter_mut().zip(&mut words).zip(row) {
            *width = (*width).max(width_of(cell));
            *word = (*word).max(longest_word(cell));
        }
    }
    for narrowest in [NARROW, NARROWEST] {
        while width_of_row(widths.iter().copied()) > available
            && let Some((widest, _)) = widths
                .iter_mut()
                .zip(&words)
                .filter(|(width, word)| **width > narrowest.min(**word))
                .max()
        {
            *widest -= 1;
        }
    }
    let mut out = String::new();
    let header = header.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let cells: Vec<_> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| wrap(cell, *width))
            .collect();
        let height = cells.iter().map(Vec::len).max().unwrap_or(0);
        for line in 0..height {
            let cells = cells
                .iter()
                .map(|lines| lines.get(line).map_or("", String::as_str));
            push_row(&mut out, cells, &widths);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn rows(rows: &[&[&str]]) -> Vec<Vec<String>> {
        let row = |row: &&[&str]| row.iter().map(|cell| (*cell).to_owned()).collect();
        rows.iter().map(row).collect()
    }

    #[test]
    fn only_a_terminal_bounds_lines_or_somebody_who_says_so() {
        for (terminal, columns, is_terminal, expected) in [
            (Some(100), Some("60"), true, 100),
            (None, Some("60"), true, 60),
            (None, None, true, DEFAULT_WIDTH),
            (None, Some("0"), true, DEFAULT_WIDTH),
            (None, Some("60"), false, 60),
            (None, Some("many"), false, UNBOUNDED),
            (None, None, false, UNBOUNDED),
        ] {
            assert_eq!(width_from(terminal, columns, is_terminal), expected);
        }
    }

    #[test]
    fn without_a_bound_nothing_is_broken() {
        let long = "one two/three-four ".repeat(40);
        let long = long.trim_end();
        let table = lay_out(&["A"; 9], &[vec![long.to_owned(); 9]], UNBOUNDED);
        assert_eq!(table.lines().count(), 2);
        assert_eq!(table.matches(long).count(), 9);
        assert_eq!(wrap(long, UNBOUNDED), [long]);
    }

    #[test]
    fn columns_are_aligned() {
        let table = lay_out(
            &["A", "LONG", "B"],
            &rows(&[&["x", "é日", "-"], &["", "", "z"]]),
            80,
        );
        assert_eq!(table, "A  LONG  B\nx  é日   -\n         z\n");
    }

    #[test]
    fn the_widest_cells_are_broken() {
        let table = lay_out(
            &["NAME", "DETAIL"],
            &rows(&[&["a name", "one two three four five"]]),
            24,
        );
        assert_eq!(
            table,
            "NAME    DETAIL\na name  one two three\n        four five\n"
        );
    }

    #[test]
    fn words_break_after_hyphens_where_there_is_no_room() {
        assert_eq!(wrap("USER-TIMEOUT", 9), ["USER-", "TIMEOUT"]);
        assert_eq!(wrap("a /app/one", 6), ["a", "/app/", "one"]);
        assert_eq!(wrap("-abcdef", 4), ["-", "abcd", "ef"]);
    }

    #[test]
    fn nine_columns_fit_a_terminal() {
        let header = ["USER-TIMEOUT"; 9];
        let row = vec!["database-connections and more".to_owned(); 9];
        let table = lay_out(&header, &[row], DEFAULT_WIDTH);
        assert!(table.lines().all(|line| width_of(line) <= DEFAULT_WIDTH));
    }

    #[test]
    fn of_a_path_the_end_is_kept() {
        assert_eq!(end_of("/a/b/c", 6), "/a/b/c");
        assert_eq!(end_of("/a/b/c", 4), "…b/c");
        assert_eq!(end_of("/a/日本", 4), "…本");
        assert_eq!(end_of("abc", 1), "…");
    }

    proptest! {
        #[test]
        fn nothing_is_wider_than_allowed_and_no_word_is_lost(
            words in vec("[a-zé日]{0,30}", 0..12),
            width in 2_usize..40,
        ) {
            let text = words.join(" ");
            let lines = wrap(&text, width);
            for line in &lines {
                prop_assert!(width_of(line) <= width, "{line:?}");
            }
            let letters = |text: &str| text.replace([' ', '\n'], "");
            prop_assert_eq!(letters(&lines.join("\n")), letters(&text));
            prop_assert!(width_of(&end_of(&text, width)) <= width);
        }

        #[test]
        fn a_table_fits_where_it_can(
            cells in vec(vec("[a-z ]{0,60}", 4), 0..5),
            available in 60_usize..120,
        ) {
            let table = lay_out(&["A", "B", "C", "D"], &cells, available);
            for line in table.lines() {
                prop_assert!(width_of(line) <= available, "{line:?}");
            }
        }
    }
}
