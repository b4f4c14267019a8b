//! What was measured: on the terminal and as JSON.

use std::io::{self, Write as _};

use serde::Serialize;
use tabwriter::TabWriter;

use crate::stats::{Summary, ratios};

/// Everything that one run found.
#[derive(Default, Serialize)]
pub(crate) struct Report {
    tables: Vec<Table>,
    pub(crate) goals: Vec<Goal>,
}

/// Cases that were measured in turns.
#[derive(Serialize)]
pub(crate) struct Table {
    /// Names it in JSON.
    pub(crate) id: &'static str,
    pub(crate) title: String,
    unit: &'static str,
    /// The cases whose multiples the others are shown as.
    references: Vec<&'static str>,
    rows: Vec<Row>,
}

/// A case, sampled once in each round.
#[derive(Serialize)]
struct Row {
    name: String,
    /// What the case grows with.
    size: Option<u32>,
    samples: Vec<f64>,
}

/// Something to be reached: the smaller what is found, the better.
#[derive(Serialize)]
pub(crate) struct Goal {
    what: String,
    limit: f64,
    unit: &'static str,
    found: Option<Summary>,
    verdict: Verdict,
}

impl Table {
    pub(crate) fn new(
        id: &'static str,
        title: impl Into<String>,
        unit: &'static str,
        references: &[&'static str],
    ) -> Self {
        Self {
            id,
            title: title.into(),
            unit,
            references: references.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a sample to the row of this name, which is new the first time.
    pub(crate) fn add(&mut self, name: &str, size: Option<u32>, sample: f64) {
        match self
            .rows
            .iter_mut()
            .find(|row| row.name == name && row.size == size)
        {
            Some(row) => row.samples.push(sample),
            None => self.rows.push(Row {
                name: name.to_owned(),
                size,
                samples: vec![sample],
            }),
        }
    }

    /// The samples of a case of this size.
    pub(crate) fn samples(&self, name: &str, size: u32) -> &[f64] {
        self.row(name, Some(size)).map_or(&[], |row| &row.samples)
    }

    fn row(&self, name: &str, size: Option<u32>) -> Option<&Row> {
        self.rows
            .iter()
            .find(|row| row.name == name && row.size == size)
    }

    /// A case as a multiple of another one of the same size.
    fn ratio(&self, name: &str, of: &str, size: Option<u32>) -> Option<Summary> {
        let row = self.row(name, size)?;
        let reference = self.row(of, size)?;
        Summary::of(&ratios(&row.samples, &reference.samples))
    }

    /// A goal for such a multiple.
    pub(crate) fn goal(
        &self,
        what: impl Into<String>,
        name: &str,
        of: &str,
        size: Option<u32>,
        limit: f64,
    ) -> Goal {
        Goal::new(what, limit, "×", self.ratio(name, of, size))
    }

    fn print(&self) {
        println!("\n{} [{}]", self.title, self.unit);
        let sized = self.rows.iter().any(|row| row.size.is_some());
        let mut header = vec!["case".to_owned()];
        if sized {
            header.push("n".to_owned());
        }
        header.extend(["median", "quartiles"].map(str::to_owned));
        header.extend(self.references.iter().map(|of| format!("× {of}")));
        let mut lines = vec![header];
        for row in &self.rows {
            let Some(summary) = Summary::of(&row.samples) else {
                continue;
            };
            let mut line = vec![row.name.clone()];
            if sized {
                line.push(row.size.map(|size| size.to_string()).unwrap_or_default());
            }
            line.push(number(summary.median));
            line.push(format!("{}–{}", number(summary.low), number(summary.high)));
            for of in &self.references {
                let ratio = self.ratio(&row.name, of, row.size);
                line.push(ratio.map_or_else(String::new, |ratio| multiple(&ratio)));
            }
            lines.push(line);
        }
        print_aligned(&lines);
    }
}

/// Whether a goal was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Reached,
    /// The limit lies within what the median may be off.
    Unclear,
    Missed,
    /// Nothing was measured.
    Unknown,
}

impl Verdict {
    fn of(found: Option<&Summary>, limit: f64) -> Self {
        let Some(found) = found else {
            return Self::Unknown;
        };
        // A single sample has no spread to judge by: it is taken as it is.
        let doubt = if found.doubt.is_finite() {
            found.doubt
        } else {
            0.0
        };
        if found.median + doubt <= limit {
            Self::Reached
        } else if found.median - doubt > limit {
            Self::Missed
        } else {
            Self::Unclear
        }
    }
}

impl Goal {
    pub(crate) fn new(
        what: impl Into<String>,
        limit: f64,
        unit: &'static str,
        found: Option<Summary>,
    ) -> Self {
        Self {
            what: what.into(),
            limit,
            unit,
            verdict: Verdict::of(found.as_ref(), limit),
            found,
        }
    }

    fn line(&self) -> Vec<String> {
        let Self { limit, unit, .. } = self;
        let verdict = match self.verdict {
            Verdict::Reached => "reached",
            Verdict::Unclear => "unclear",
            Verdict::Missed => "not reached",
            Verdict::Unknown => "not measured",
        };
        let found = self.found.as_ref();
        vec![
            verdict.to_owned(),
            self.what.clone(),
            found.map_or_else(String::new, |found| format!("{} {unit}", multiple(found))),
            format!("≤ {limit} {unit}"),
        ]
    }
}

impl Report {
    /// Takes a table, which is printed as soon as it is there.
    pub(crate) fn take(&mut self, table: Table) {
        table.print();
        self.tables.push(table);
    }

    pub(crate) fn print_goals(&self) {
        if !self.goals.is_empty() {
            println!("\nGoals");
            print_aligned(&self.goals.iter().map(Goal::line).collect::<Vec<_>>());
        }
    }
}

/// Three digits that count, at the least.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        small if small < 1.0 => format!("{value:.3}"),
        small if small < 10.0 => format!("{value:.2}"),
        small if small < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// `1.023 ±0.004`
fn multiple(ratio: &Summary) -> String {
    if ratio.doubt.is_finite() {
        format!("{:.3} ±{:.3}", ratio.median, ratio.doubt)
    } else {
        format!("{:.3}", ratio.median)
    }
}

fn print_aligned(lines: &[Vec<String>]) {
    let mut table = TabWriter::new(io::stdout()).padding(2);
    let text = lines.iter().fold(String::new(), |text, line| {
        text + "  " + &line.join("\t") + "\n"
    });
    // Standard output that is gone is no reason to stop measuring.
    drop(
        table
            .write_all(text.as_bytes())
            .and_then(|()| table.flush()),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal(samples: &[f64], limit: f64) -> Verdict {
        Verdict::of(Summary::of(samples).as_ref(), limit)
    }

    #[test]
    fn a_goal_within_the_noise_is_neither_reached_nor_missed() {
        assert_eq!(goal(&[1.0, 1.0, 1.01, 1.0], 1.03), Verdict::Reached);
        assert_eq!(goal(&[1.0, 1.02, 1.04, 1.06], 1.03), Verdict::Unclear);
        assert_eq!(goal(&[1.1, 1.1, 1.11, 1.1], 1.03), Verdict::Missed);
        assert_eq!(goal(&[], 1.03), Verdict::Unknown);
        assert_eq!(goal(&[0.5], 0.6), Verdict::Reached);
    }

    #[test]
    fn ratios_are_between_cases_of_one_size() {
        let mut table = Table::new("t", "T", "ns", &["a"]);
        for (size, factor) in [(1, 1.0), (2, 10.0)] {
            table.add("a", Some(size), factor);
            table.add("b", Some(size), factor * 3.0);
        }
        let ratio = table.ratio("b", "a", Some(2)).unwrap();
        assert!((ratio.median - 3.0).abs() < 1e-12);
        assert!(table.ratio("b", "a", Some(3)).is_none());
    }

    #[test]
    fn numbers_keep_the_digits_that_count() {
        for (value, shown) in [
            (0.0, "0"),
            (0.1234, "0.123"),
            (1.2345, "1.23"),
            (12.345, "12.3"),
            (1234.5, "1234"),
        ] {
            assert_eq!(number(value), shown);
        }
    }
}
