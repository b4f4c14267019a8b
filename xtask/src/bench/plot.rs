//! Plots for the documentation: few enough lines to need no library.

use std::fmt::Write as _;

use super::{
    report::{Row, Table, number},
    stats::Summary,
};

const WIDTH: f64 = 720.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 90.0;
const TOP: f64 = 36.0;
const COLOURS: [&str; 6] = [
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b",
];

/// A table as SVG: what grows as lines over logarithmic axes, the rest as bars
/// from zero, each with its quartiles. None of what has no unit in common.
pub(crate) fn draw(table: &Table) -> Option<String> {
    if table.rows.is_empty() || table.unit.contains(',') {
        return None;
    }
    let (height, body) = if table.rows.iter().all(|row| row.size.is_some()) {
        lines(table)?
    } else {
        bars(table)?
    };
    let title = text(
        WIDTH / 2.0,
        20.0,
        "middle",
        &format!("{} [{}]", table.title, table.unit),
    );
    Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{title}{body}</svg>\n"
    ))
}

fn bars(table: &Table) -> Option<(f64, String)> {
    const STEP: f64 = 26.0;
    let summaries = table
        .rows
        .iter()
        .map(|row| Some((row, Summary::of(&row.samples)?)))
        .collect::<Option<Vec<_>>>()?;
    let most = summaries
        .iter()
        .map(|(_, summary)| summary.high)
        .fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| LEFT + value.max(0.0) / most * (WIDTH - LEFT - RIGHT);
    let mut body = String::new();
    let mut y = TOP;
    for (row, summary) in &summaries {
        let middle = y + STEP / 2.0;
        body += &text(LEFT - 8.0, middle + 4.0, "end", &row.name);
        let _ = writeln!(
            body,
            "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
            y + 4.0,
            x(summary.median) - LEFT,
            STEP - 8.0,
            COLOURS[0]
        );
        let _ = writeln!(
            body,
            "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"black\"/>",
            x(summary.low),
            x(summary.high)
        );
        body += &text(
            x(summary.high) + 6.0,
            middle + 4.0,
            "start",
            &number(summary.median),
        );
        y += STEP;
    }
    Some((y + 10.0, body))
}

fn lines(table: &Table) -> Option<(f64, String)> {
    const HEIGHT: f64 = 380.0;
    const BOTTOM: f64 = 40.0;
    let mut names = Vec::<&str>::new();
    for row in &table.rows {
        if !names.contains(&row.name.as_str()) {
            names.push(&row.name);
        }
    }
    let points = table.rows.iter().filter_map(point).collect::<Vec<_>>();
    let range = |of: fn(&(f64, f64)) -> f64| {
        let values = points.iter().map(of);
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        (low.floor(), high.ceil().max(low.floor() + 1.0))
    };
    if points.is_empty() {
        return None;
    }
    let (sizes, values) = (range(|point| point.0), range(|point| point.1));
    let left = 70.0;
    let x = |size: f64| left + (size - sizes.0) / (sizes.1 - sizes.0) * (WIDTH - left - LEFT);
    let y = |value: f64| {
        let room = HEIGHT - TOP - BOTTOM;
        HEIGHT - BOTTOM - (value - values.0) / (values.1 - values.0) * room
    };
    let mut body = String::new();
    for (low, high, vertical) in [(sizes.0, sizes.1, true), (values.0, values.1, false)] {
        let mut power = low;
        while power <= high {
            let label = number(10_f64.powf(power));
            let (x1, x2, y1, y2) = if vertical {
                body += &text(x(power), HEIGHT - BOTTOM + 18.0, "middle", &label);
                (x(power), x(power), y(values.0), y(values.1))
            } else {
                body += &text(left - 8.0, y(power) + 4.0, "end", &label);
                (x(sizes.0), x(sizes.1), y(power), y(power))
            };
            let _ = writeln!(
                body,
                "<line x1=\"{x1:.1}\" x2=\"{x2:.1}\" y1=\"{y1:.1}\" y2=\"{y2:.1}\" stroke=\"#ddd\"/>"
            );
            power += 1.0;
        }
    }
    for (index, name) in names.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let mut path = String::new();
        for (size, value) in table
            .rows
            .iter()
            .filter(|row| row.name == *name)
            .filter_map(point)
        {
            let (x, y) = (x(size), y(value));
            let _ = write!(path, "{x:.1},{y:.1} ");
            let _ = writeln!(
                body,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"
            );
        }
        let _ = writeln!(
            body,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>",
            path.trim_end()
        );
        // Lines end close together: their names stand apart, in their colours.
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        let row = TOP + 20.0 + index as f64 * 18.0;
        let _ = writeln!(
            body,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>",
            WIDTH - LEFT + 14.0,
            row - 9.0
        );
        body += &text(WIDTH - LEFT + 30.0, row, "start", name);
    }
    Some((HEIGHT, body))
}

/// The logarithms of a row's size and median, where both have one.
fn point(row: &Row) -> Option<(f64, f64)> {
    let size = f64::from(row.size?);
    let median = Summary::of(&row.samples)?.median;
    (size > 0.0 && median > 0.0).then(|| (size.log10(), median.log10()))
}

fn text(x: f64, y: f64, anchor: &str, words: &str) -> String {
    let words = words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grows_is_drawn_as_lines_and_the_rest_as_bars() {
        let mut table = Table::new("t", "a < b", "ms", &[]);
        table.add("a", None, 1.0);
        let svg = draw(&table).unwrap();
        assert!(svg.contains("a &lt; b [ms]"));
        assert!(!svg.contains("<polyline"));
        let mut table = Table::new("t", "T", "ms", &[]);
        for (size, sample) in [(10, 1.0), (1000, 100.0)] {
            table.add("a", Some(size), sample);
        }
        let svg = draw(&table).unwrap();
        assert!(
            svg.contains("<polyline points=\"70.0,340.0 530.0,36.0\""),
            "{svg}"
        );
        assert!(draw(&Table::new("t", "T", "ms", &[])).is_none());
    }
}
