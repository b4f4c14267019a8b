//! What was measured: on the terminal and as JSON.

use std::io::{self, Write as _};

use serde_json::{Value, json};
use tabwriter::TabWriter;

use super::stats::{Summary, ratios};
use crate::exec;

/// Everything that one run found.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) tables: Vec<Table>,
    pub(crate) goals: Vec<Goal>,
    /// What could not be measured, and why.
    pub(crate) missing: Vec<String>,
}

/// Cases that were measured in turns.
#[derive(Clone)]
pub(crate) struct Table {
    /// Names it in JSON.
    pub(crate) id: &'static str,
    pub(crate) title: String,
    pub(crate) unit: &'static str,
    /// The cases whose multiples the others are shown as.
    pub(crate) references: Vec<&'static str>,
    pub(crate) rows: Vec<Row>,
}

/// A case, sampled once in each round.
#[derive(Clone)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// What the case grows with.
    pub(crate) size: Option<u32>,
    pub(crate) samples: Vec<f64>,
}

/// Something to be reached.
pub(crate) struct Goal {
    pub(crate) what: String,
    pub(crate) limit: f64,
    /// Of values, the smaller the better.
    pub(crate) found: Option<Summary>,
    pub(crate) unit: &'static str,
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

    pub(crate) fn row(&self, name: &str, size: Option<u32>) -> Option<&Row> {
        self.rows
            .iter()
            .find(|row| row.name == name && row.size == size)
    }

    /// A case as a multiple of another one of the same size.
    pub(crate) fn ratio(&self, name: &str, of: &str, size: Option<u32>) -> Option<Summary> {
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
        Goal {
            what: what.into(),
            limit,
            found: self.ratio(name, of, size),
            unit: "×",
        }
    }

    fn print(&self) {
        println!("\n{} [{}]", exec::paint_out("1", &self.title), self.unit);
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

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let ratios = self.references.iter().filter_map(|of| {
                let ratio = self.ratio(&row.name, of, row.size)?;
                Some(((*of).to_owned(), summary_json(&ratio)))
            });
            json!({
                "case": row.name,
                "n": row.size,
                "summary": Summary::of(&row.samples).as_ref().map(summary_json),
                "ratios": ratios.collect::<serde_json::Map<_, _>>(),
                "samples": row.samples,
            })
        });
        json!({
            "id": self.id,
            "title": self.title,
            "unit": self.unit,
            "rows": rows.collect::<Vec<_>>(),
        })
    }
}

/// Whether a goal was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Reached,
    /// The limit lies within what the median may be off.
    Unclear,
    Missed,
    /// Nothing was measured.
    Unknown,
}

impl Goal {
    pub(crate) fn verdict(&self) -> Verdict {
        let Some(found) = &self.found else {
            return Verdict::Unknown;
        };
        // A single sample has no spread to judge by: it is taken as it is.
        let doubt = if found.doubt.is_finite() {
            found.doubt
        } else {
            0.0
        };
        if found.median + doubt <= self.limit {
            Verdict::Reached
        } else if found.median - doubt > self.limit {
            Verdict::Missed
        } else {
            Verdict::Unclear
        }
    }

    fn line(&self) -> Vec<String> {
        let verdict = match self.verdict() {
            Verdict::Reached => "reached",
            Verdict::Unclear => "unclear",
            Verdict::Missed => "not reached",
            Verdict::Unknown => "not measured",
        };
        vec![
            verdict.to_owned(),
            self.what.clone(),
            self.found.as_ref().map_or_else(String::new, |found| {
                format!("{} {}", multiple(found), self.unit)
            }),
            format!("≤ {} {}", self.limit, self.unit),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "goal": self.what,
            "limit": self.limit,
            "unit": self.unit,
            "found": self.found.as_ref().map(summary_json),
            "verdict": format!("{:?}", self.verdict()).to_lowercase(),
        })
    }
}

impl Report {
    /// Takes a table, which is printed as soon as it is there.
    pub(crate) fn take(&mut self, table: Table) {
        table.print();
        self.tables.push(table);
    }

    pub(crate) fn print_goals(&self) {
        for what in &self.missing {
            exec::warn(&format!("not measured: {what}"));
        }
        if !self.goals.is_empty() {
            println!("\n{}", exec::paint_out("1", "Goals"));
            print_aligned(&self.goals.iter().map(Goal::line).collect::<Vec<_>>());
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "tables": self.tables.iter().map(Table::json).collect::<Vec<_>>(),
            "goals": self.goals.iter().map(Goal::json).collect::<Vec<_>>(),
            "missing": self.missing,
        })
    }
}

fn summary_json(summary: &Summary) -> Value {
    json!({
        "median": summary.median,
        "low": summary.low,
        "high": summary.high,
        "doubt": summary.doubt.is_finite().then_some(summary.doubt),
        "samples": summary.samples,
    })
}

/// Three digits that count, at the least.
pub(crate) fn number(value: f64) -> String {
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
        Goal {
            what: String::new(),
            limit,
            found: Summary::of(samples),
            unit: "×",
        }
        .verdict()
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
