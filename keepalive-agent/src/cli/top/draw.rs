//! Drawing: a picture of the model, as large as the terminal. Nothing is read or
//! written here, so a picture is the same wherever it is drawn.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row, Table, Wrap},
};

use super::{
    Exposure, Snapshot, Socket,
    model::{By, Group, GroupKey, Model, SocketKey, View},
};
use crate::{cli::table, duration, sockets::forecast::Noticed};

/// Lines above the rows: the title, what is counted, what is unseen, and the
/// titles of the columns.
const ABOVE: u16 = 4;
/// Lines below the rows.
const BELOW: u16 = 1;

/// How wide the bar of the coverage is.
const BAR: u64 = 20;

/// From so many columns on the list of connections has more of them.
const WIDE: u16 = 120;

/// What the ? key shows, for 80 columns.
pub(super) const HELP: [&str; 17] = [
    "j k, arrows      one row down, up      s S    sort by the next, earlier column",
    "ctrl-d ctrl-u    half a page           r      turn the order round",
    "g G, home end    first, last row       /      only rows with some text in them",
    "enter, l         look inside           tab    by cgroup, policy, container, unit",
    "esc, h           back                  p      pause, and go on",
    "?                this help             q      quit",
    "",
    "SURVIVE    connections that a path with this idle timeout keeps, also when two",
    "           probes in a row are lost; AT RISK: it forgets them. See --path",
    "CHANGED    a policy decided one of their options",
    "DEAD       peers found dead: by policy all that the kernel has counted, else",
    "           those that running agents remember",
    "NEW/S      new connections a second: by policy as the kernel counts them, else",
    "           those that were still there at the next look",
    "FORGOTTEN  when the path forgets the first of them if it stays silent; past:",
    "           it has been silent for longer, so it is lost or there is no such",
    "           path",
];

/// Rows that a terminal of this height has room for.
#[must_use]
pub(super) fn room(height: u16) -> usize {
    height.saturating_sub(ABOVE + BELOW).into()
}

/// Draws everything.
pub(super) fn draw(model: &Model, frame: &mut Frame<'_>) {
    let [title, coverage, notes, body, below] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(BELOW),
    ])
    .areas(frame.area());
    draw_title(model, frame, title);
    frame.render_widget(coverage_line(model), coverage);
    frame.render_widget(notes_line(model), notes);
    match (&model.view, &model.snapshot) {
        _ if model.shows_help => frame.render_widget(Paragraph::new(help(model)), body),
        (_, None) => {
            let text = model
                .error
                .as_deref()
                .unwrap_or("looking at all connections …");
            frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), body);
        }
        (View::Groups, Some(_)) => draw_groups(model, frame, body),
        (View::Sockets(_), Some(snapshot)) => draw_sockets(model, snapshot, frame, body),
        (View::Explained { text, .. }, _) => {
            let text = text.as_deref().unwrap_or("asking …");
            let lines = text.lines().skip(model.top).map(Line::from);
            let text = Paragraph::new(lines.collect::<Vec<_>>());
            frame.render_widget(text.wrap(Wrap { trim: false }), body);
        }
    }
    frame.render_widget(footer(model), below);
}

fn style(model: &Model, colour: Color) -> Style {
    if model.has_colours {
        Style::new().fg(colour)
    } else {
        Style::new()
    }
}

fn draw_title(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    let at = model.snapshot.as_ref().map_or("", |snapshot| &snapshot.at);
    let state = if model.is_paused { "paused " } else { "" };
    let right = format!("{state}{at} UTC");
    let width = u16::try_from(right.len()).unwrap_or(0) + 1;
    let [left, right_area] =
        Layout::horizontal([Constraint::Fill(1), Constraint::Length(width)]).areas(area);
    let what = match &model.view {
        View::Groups => format!("all connections by {}", model.by.name()),
        View::Sockets(group) => format!("connections of {} {group}", model.by.name()),
        View::Explained { ends, .. } => format!("{} → {}", ends.0, ends.1),
    };
    let title = Line::from(vec![
        Span::from("keepalive").bold(),
        Span::from(format!("  {what}")),
    ]);
    frame.render_widget(title, left);
    frame.render_widget(
        Paragraph::new(Span::styled(right, style(model, Color::Yellow)))
            .alignment(Alignment::Right),
        right_area,
    );
}

/// `[########....] 66.6% of 3 survive 5m 50s, 1 at risk; …`
fn coverage_line(model: &Model) -> Line<'static> {
    let Some(snapshot) = &model.snapshot else {
        return Line::default();
    };
    let totals = &model.totals;
    let timeout = snapshot.timeout;
    let mut spans = Vec::new();
    if let Some(coverage) = totals.coverage() {
        let full = coverage * BAR / 1000;
        let bar: String = (0..BAR)
            .map(|place| if place < full { '#' } else { '.' })
            .collect();
        let colour = if totals.at_risk == 0 {
            Color::Green
        } else {
            Color::Yellow
        };
        spans.push(Span::styled(
            format!("[{bar}] {}.{}%", coverage / 10, coverage % 10),
            style(model, colour),
        ));
        let on_path = totals.survive + totals.at_risk;
        spans.push(Span::from(format!(" of {on_path} survive {timeout}")));
        if totals.at_risk > 0 {
            spans.push(Span::from(", "));
            spans.push(Span::styled(
                format!("{} at risk", totals.at_risk),
                style(model, Color::Red).add_modifier(Modifier::BOLD),
            ));
        }
    } else {
        spans.push(Span::from("no connection leaves this machine"));
    }
    if totals.within > 0 {
        spans.push(Span::from(format!("; {} stay here", totals.within)));
    }
    Line::from(spans)
}

fn notes_line(model: &Model) -> Line<'static> {
    let Some(snapshot) = &model.snapshot else {
        return Line::default();
    };
    if let Some(error) = &model.error {
        return Line::styled(error.clone(), style(model, Color::Red));
    }
    let totals = &model.totals;
    let in_force = if snapshot.in_force.is_empty() {
        "no policy is in force".to_owned()
    } else {
        snapshot.in_force.join(", ")
    };
    let mut text = format!(
        "{in_force}; {} changed, {} dead peers, {}",
        totals.changed,
        totals.dead,
        rate(totals.new, snapshot)
    ) + " new/s";
    if let Some(first) = snapshot.unseen.first() {
        text = format!(
            "{} parts not seen (? tells more): {first}",
            snapshot.unseen.len()
        );
        return Line::styled(text, style(model, Color::Yellow));
    }
    Line::from(text)
}

fn footer(model: &Model) -> Line<'static> {
    if model.is_typing {
        return Line::from(format!(
            "only with: {}_   enter keeps it, esc drops it",
            model.filter
        ));
    }
    let filtered = if model.filter.is_empty() {
        String::new()
    } else {
        format!("only with {:?}, ", model.filter)
    };
    let place = match model.view {
        View::Explained { .. } => String::new(),
        _ if model.rows() == 0 => format!("{filtered}nothing; "),
        _ => format!("{filtered}{} of {}; ", model.selected + 1, model.rows()),
    };
    let keys = match model.view {
        View::Groups => "enter look inside, tab group, s sort, / filter, p pause, ? help, q quit",
        View::Sockets(_) => "enter explain, esc back, s sort, / filter, p pause, ? help, q quit",
        View::Explained { .. } => "esc back, j k scroll, ? help, q quit",
    };
    Line::from(format!("{place}{keys}")).dim()
}

fn help(model: &Model) -> Vec<Line<'static>> {
    let mut lines: Vec<Line<'static>> = HELP.map(Line::from).to_vec();
    for part in model.snapshot.iter().flat_map(|snapshot| &snapshot.unseen) {
        lines.push(Line::styled(part.clone(), style(model, Color::Yellow)));
    }
    lines
}

/// A title of a column, and whether it is sorted by; texts begin at the left,
/// numbers end at the right.
enum Title {
    Text(&'static str, bool),
    Number(&'static str, bool),
}

fn titles<const COLUMNS: usize>(titles: [Title; COLUMNS], is_reversed: bool) -> Row<'static> {
    let mark = if is_reversed { "^" } else { "v" };
    let line = |title: &str, is_key: bool| {
        let mark = if is_key { mark } else { "" };
        Line::from(format!("{mark}{title}"))
    };
    let cells = titles.into_iter().map(|title| match title {
        Title::Text(title, is_key) => Cell::from(line(title, is_key)),
        Title::Number(title, is_key) => Cell::from(line(title, is_key).right_aligned()),
    });
    Row::new(cells).underlined()
}

fn number(number: u64) -> Cell<'static> {
    Cell::from(Line::from(number.to_string()).right_aligned())
}

fn right(text: String) -> Cell<'static> {
    Cell::from(Line::from(text).right_aligned())
}

fn draw_groups(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    const COLUMNS: [u16; 7] = [7, 7, 7, 7, 6, 6, 10];
    let Some(snapshot) = &model.snapshot else {
        return;
    };
    let name = area
        .width
        .saturating_sub(COLUMNS.iter().map(|width| width + 1).sum());
    let sorted = |key: GroupKey| model.group_key == key;
    let first = match model.by {
        By::Cgroup => "CGROUP",
        By::Policy => "POLICY",
        By::Container => "CONTAINER",
        By::Unit => "UNIT",
    };
    let header = titles(
        [
            Title::Text(first, sorted(GroupKey::Name)),
            Title::Number("CONNS", sorted(GroupKey::Connections)),
            Title::Number("SURVIVE", sorted(GroupKey::Survive)),
            Title::Number("AT RISK", sorted(GroupKey::AtRisk)),
            Title::Number("CHANGED", sorted(GroupKey::Changed)),
            Title::Number("DEAD", sorted(GroupKey::Dead)),
            Title::Number("NEW/S", sorted(GroupKey::New)),
            Title::Number("FORGOTTEN", sorted(GroupKey::Forgotten)),
        ],
        model.reversed,
    );
    let room = area.height.saturating_sub(1).into();
    let rows = model.groups.iter().enumerate().skip(model.top).take(room);
    let rows = rows.map(|(index, group)| {
        let Group {
            name: group_name,
            connections,
            survive,
            at_risk,
            changed,
            dead,
            new,
            forgotten_ms,
        } = group;
        let risk = Line::from(at_risk.to_string()).right_aligned();
        let risk = if *at_risk > 0 {
            risk.style(style(model, Color::Red))
        } else {
            risk
        };
        let row = Row::new([
            Cell::from(end_of(group_name, name)),
            number(*connections),
            number(*survive),
            Cell::from(risk),
            number(*changed),
            number(*dead),
            right(rate(*new, snapshot)),
            right(forgotten(*forgotten_ms)),
        ]);
        mark(row, index == model.selected)
    });
    let mut widths = vec![Constraint::Length(name)];
    widths.extend(COLUMNS.map(Constraint::Length));
    frame.render_widget(
        Table::new(rows, widths).header(header).column_spacing(1),
        area,
    );
}

fn draw_sockets(model: &Model, snapshot: &Snapshot, frame: &mut Frame<'_>, area: Rect) {
    /// Idle, silent, forgotten.
    const COLUMNS: [u16; 3] = [7, 9, 10];
    /// Noticed, policy, network namespace.
    const MORE: [u16; 3] = [10, 14, 16];
    let is_wide = area.width >= WIDE;
    let name = if is_wide { 24 } else { 13 };
    let mut fixed = vec![name];
    fixed.extend(COLUMNS);
    if is_wide {
        fixed.extend(MORE);
    }
    let ends = area
        .width
        .saturating_sub(fixed.iter().map(|width| width + 1).sum::<u16>() + 1);
    let (local, remote) = (ends / 2, ends - ends / 2);
    let sorted = |key: SocketKey| model.socket_key == key;
    let header = [
        Title::Text("LOCAL", sorted(SocketKey::Local)),
        Title::Text("REMOTE", sorted(SocketKey::Remote)),
        Title::Text("PROCESS", sorted(SocketKey::Process)),
        Title::Number("IDLE", sorted(SocketKey::Idle)),
        Title::Number("SILENT", sorted(SocketKey::Silent)),
        Title::Number("FORGOTTEN", sorted(SocketKey::Forgotten)),
        Title::Number("NOTICED", false),
        Title::Text("POLICY", false),
        Title::Text("NETNS", false),
    ];
    let room = area.height.saturating_sub(1).into();
    let rows = model.listed.iter().enumerate().skip(model.top).take(room);
    let rows = rows.filter_map(|(index, number)| {
        let socket = snapshot.sockets.get(*number)?;
        let process = socket.process.as_ref();
        let process = process.map_or_else(|| "-".to_owned(), |(pid, name)| format!("{name}/{pid}"));
        let idle = Line::from(idle(socket)).right_aligned();
        let is_at_risk = socket.exposure == Exposure::AtRisk;
        let idle = if is_at_risk {
            idle.style(style(model, Color::Red))
        } else {
            idle
        };
        let mut cells = vec![
            Cell::from(end_of(&socket.local.to_string(), local)),
            Cell::from(end_of(&socket.remote.to_string(), remote)),
            Cell::from(end_of(&process, name)),
            Cell::from(idle),
            right(short(socket.silent_ms)),
            right(forgotten(socket.forgotten_ms(snapshot.timeout))),
        ];
        if is_wide {
            let policy = socket.policy.as_deref().unwrap_or("-");
            cells.extend([
                right(noticed(socket.noticed)),
                Cell::from(end_of(policy, MORE[1])),
                Cell::from(end_of(&socket.netns, MORE[2])),
            ]);
        }
        Some(mark(Row::new(cells), index == model.selected))
    });
    let mut widths = vec![Constraint::Length(local), Constraint::Length(remote)];
    widths.extend(fixed.into_iter().map(Constraint::Length));
    let table = Table::new(rows, widths)
        .header(titles(header, model.reversed))
        .column_spacing(1);
    frame.render_widget(table, area);
}

fn mark(row: Row<'_>, is_selected: bool) -> Row<'_> {
    if is_selected { row.reversed() } else { row }
}

fn idle(socket: &Socket) -> String {
    socket
        .idle
        .map_or_else(|| "off".to_owned(), |idle| short(u64::from(idle) * 1000))
}

fn noticed(noticed: Noticed) -> String {
    match noticed {
        Noticed::After(milliseconds) => short(milliseconds),
        Noticed::Retransmitting(_) => "data sent".to_owned(),
        Noticed::Never => "never".to_owned(),
    }
}

fn forgotten(milliseconds: Option<u64>) -> String {
    match milliseconds {
        None => "-".to_owned(),
        Some(0) => "past".to_owned(),
        Some(milliseconds) => format!("in {}", short(milliseconds)),
    }
}

/// A duration in its two largest units: never wider than `23h 59m`.
fn short(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if days > 99 => format!("{days}d"),
        () if days > 0 => format!("{days}d {}h", hours % 24),
        () if hours > 0 => format!("{hours}h {}m", minutes % 60),
        () => duration::show_seconds(u32::try_from(seconds).unwrap_or(u32::MAX)),
    }
}

/// New ones a second, `-` where there was no look before.
fn rate(new: u64, snapshot: &Snapshot) -> String {
    let milliseconds = snapshot.since_last.map(|since| since.as_millis().max(1));
    let Some(milliseconds) = milliseconds else {
        return "-".to_owned();
    };
    let tenths = u128::from(new) * 10_000 / milliseconds;
    if tenths >= 100 || tenths == 0 {
        (tenths / 10).to_string()
    } else {
        format!("{}.{}", tenths / 10, tenths % 10)
    }
}

/// The end of a text that is too wide: what tells most of a path.
fn end_of(text: &str, width: u16) -> String {
    table::end_of(text, width.into())
}
