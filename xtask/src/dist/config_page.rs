//! keepalive.toml(5), from docs/config.md: its keys are described once.

use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use roff::{Inline, Roff, bold, roman};

/// The man page that this document comes to.
pub(super) fn render(markdown: &str, date: &str, version: &str) -> String {
    let mut page = Page::default();
    let source = format!("keepalive {version}");
    page.roff.control(
        "TH",
        ["KEEPALIVE.TOML", "5", date, &source, "keepalive manual"],
    );
    page.roff.control("SH", ["NAME"]);
    page.text(roman(
        "keepalive.toml - which TCP connections get keepalive, and with which timers",
    ));
    page.end_of_text();
    page.roff.control("SH", ["DESCRIPTION"]);
    for event in Parser::new_ext(markdown, Options::ENABLE_TABLES) {
        page.event(event);
    }
    page.roff.control("SH", ["SEE ALSO"]);
    page.text(roman("keepalive-agent(1), tcp(7)"));
    page.end_of_text();
    page.roff.render()
}

#[derive(Default)]
struct Page {
    roff: Roff,
    /// The paragraph, heading or cell that is being read.
    line: Vec<Inline>,
    /// The head of the table that is being read, and the cells of its row.
    columns: Vec<String>,
    cells: Vec<Vec<Inline>>,
    in_code: bool,
}

impl Page {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Start(Tag::Paragraph) => self.roff.control("PP", []),
            Event::Start(Tag::Item) => self.roff.control("IP", ["\\(bu", "2"]),
            Event::Start(Tag::CodeBlock(_)) => {
                self.in_code = true;
                self.roff.control("PP", []);
                self.roff.control("RS", ["4"]);
                self.roff.control("nf", [])
            }
            Event::End(TagEnd::CodeBlock) => {
                self.in_code = false;
                self.roff.control("fi", []);
                self.roff.control("RE", [])
            }
            Event::End(TagEnd::Paragraph | TagEnd::Item) => return self.end_of_text(),
            Event::End(TagEnd::Heading(level)) => return self.heading(level),
            Event::End(TagEnd::TableCell) => {
                return self.cells.push(std::mem::take(&mut self.line));
            }
            Event::End(TagEnd::TableHead) => {
                let cells = std::mem::take(&mut self.cells);
                self.columns = cells.iter().map(|cell| plain(cell)).collect();
                return;
            }
            Event::End(TagEnd::TableRow) => return self.row(),
            Event::Text(text) if self.in_code => {
                for line in text.lines() {
                    self.roff.text([roman(line)]);
                }
                return;
            }
            Event::Text(text) => return self.text(roman(&*text)),
            Event::Code(code) => return self.text(bold(&*code)),
            Event::SoftBreak | Event::HardBreak => return self.text(roman(" ")),
            _ => return,
        };
    }

    fn text(&mut self, text: Inline) {
        self.line.push(text);
    }

    fn end_of_text(&mut self) {
        let line = std::mem::take(&mut self.line);
        if !line.is_empty() {
            self.roff.text(line);
        }
    }

    fn heading(&mut self, level: HeadingLevel) {
        let title = plain(&std::mem::take(&mut self.line));
        match level {
            // What the document is called; the page has a name already.
            HeadingLevel::H1 => {}
            HeadingLevel::H2 => {
                self.roff.control("SH", [title.to_uppercase().as_str()]);
            }
            _ => {
                self.roff.control("SS", [title.as_str()]);
            }
        }
    }

    /// A row as an entry of a list: tables are too wide for a terminal.
    fn row(&mut self) {
        let cells = std::mem::take(&mut self.cells);
        let last = cells.len().saturating_sub(1);
        let mut text = Vec::new();
        self.roff.control("TP", []);
        for (index, cell) in cells.into_iter().enumerate() {
            let column = self.columns.get(index).map_or("", String::as_str);
            match index {
                0 => {
                    self.roff.text([bold(plain(&cell))]);
                }
                _ if cell.is_empty() => {}
                _ if index == last => text.extend(cell),
                _ => {
                    text.push(roman(format!("{column}: ")));
                    text.extend(cell);
                    text.push(roman("; "));
                }
            }
        }
        self.roff.text(text);
    }
}

/// The words without their form.
fn plain(line: &[Inline]) -> String {
    line.iter()
        .map(|inline| match inline {
            Inline::Roman(text) | Inline::Italic(text) | Inline::Bold(text) => text.as_str(),
            Inline::LineBreak => " ",
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_entries_and_code_stays_as_it_is() {
        let page = render(
            "# The config\n\nTOML.\n\n## Keys\n\n\
             | key | type | meaning |\n|---|---|---|\n| `idle` | duration | [silence](#x) |\n\n\
             ```toml\n[default]\nidle = \"60s\"\n```\n",
            "2026-01-01",
            "0.1.0",
        );
        assert!(page.contains(".TH KEEPALIVE.TOML 5 2026-01-01"), "{page}");
        assert!(
            page.contains(".SH KEYS\n.TP\n\\fBidle\\fR\ntype: duration; silence"),
            "{page}"
        );
        assert!(
            page.contains(".nf\n[default]\nidle = \"60s\"\n.fi"),
            "{page}"
        );
    }
}
