//! `keepalive-agent sockets`: every connection of the node and its keepalive.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufWriter, IsTerminal as _, Write},
    os::fd::AsFd as _,
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Args;
use tracing::warn;

use super::{PARTIAL, Whose, screen::Screen, table};
use crate::{
    datapath::{Lister, chain},
    enforcing::enforcing,
    hierarchy::Hierarchy,
    kernel::{layout::Kernel, preflight},
    network::Network,
    paths::{AWS_NAT, IdleTimeout},
    sockets::{
        Connection, Receiver, Unseen,
        cgroups::{Cgroups, Known},
        columns::{self, Column},
        filter::{Filter, Key, Rank, Risk},
        format::{self, Legend},
        holders, list,
        summary::Summary,
    },
    view::{self, PartialView},
};

/// Some connection would be forgotten on its path.
const AT_RISK: u8 = 3;

/// After this long a progress line appears.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two progress lines.
const REDRAW: Duration = Duration::from_millis(200);

/// Bytes that are written at once.
const BUFFER: usize = 64 * 1024;

#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
#[command(
    after_help = "Nothing is changed on any socket, and no agent needs to run.\n\n\
                  --at-risk leaves the connections that a middlebox with this idle timeout \
                  forgets: keepalive is off, or idle + 2 x interval is not below the timeout, so \
                  that two lost probes would be too many. Connections within this machine, which \
                  pass no middlebox, are left out without --loopback.\n\
                  Paths known by name: aws-nat 350s, aws-nlb 350s, azure-lb 240s, gcp 600s, \
                  ipvs 900s.\n\n\
                  Exit codes: 0 done (with --at-risk: none is), 1 failed, 2 wrong usage, \
                  3 connections are at risk, 4 partial: not all of the node could be seen.\n\n\
                  Examples:\n  \
                  keepalive-agent sockets\n  \
                  keepalive-agent sockets --cgroup /system.slice/redis.service --watch\n  \
                  keepalive-agent sockets --container 'db-*' --unprotected\n  \
                  keepalive-agent sockets --at-risk aws-nat\n  \
                  keepalive-agent sockets --unprotected --remote 10.0.0.0/8 --sort silent\n  \
                  keepalive-agent sockets --summary\n  \
                  keepalive-agent sockets --json | jq 'select(.noticed_by == \"never\")'"
)]
pub(super) struct Arguments {
    /// Print one JSON object per line instead of a table
    #[arg(long)]
    json: bool,

    /// Count the connections of each cgroup instead of listing them
    #[arg(long, conflicts_with = "sort")]
    summary: bool,

    /// List again every so many seconds until ctrl-c
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "2",
        value_parser = clap::value_parser!(u32).range(1..),
        conflicts_with = "json"
    )]
    watch: Option<u32>,

    /// Only connections of this cgroup and what is below it
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    #[command(flatten)]
    whose: Whose,

    /// Only connections that this process holds
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,

    /// Only connections to this network or address; IPv4 matches v4-mapped too
    #[arg(long, value_name = "CIDR")]
    remote: Option<Network>,

    /// Only connections with this port on either side
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// Only connections without keepalive
    #[arg(long)]
    unprotected: bool,

    /// Only connections that a path with this idle timeout forgets; with
    /// --summary those are counted, and 350s is assumed without it
    #[arg(long, value_name = "TIMEOUT|PATH")]
    at_risk: Option<IdleTimeout>,

    /// Let --at-risk and --summary take connections within this machine for at
    /// risk too
    #[arg(long)]
    loopback: bool,

    /// Show these columns, as wide as they are, instead of those that fit
    #[arg(
        long,
        value_name = "COLUMNS",
        value_delimiter = ',',
        conflicts_with_all = ["json", "summary", "wide"]
    )]
    columns: Vec<Column>,

    /// Show everything in full, also what does not fit
    #[arg(long, conflicts_with = "json")]
    wide: bool,

    /// Sort; --json then prints nothing before the last connection was seen
    #[arg(long, value_name = "KEY")]
    sort: Option<Key>,
}

pub(super) fn sockets(arguments: &Arguments) -> Result<ExitCode> {
    let (hierarchy, cgroup) = Hierarchy::with(arguments.cgroup.as_deref())?;
    let risk = Risk {
        timeout: arguments.at_risk.unwrap_or_else(|| AWS_NAT.into()),
        loopback: arguments.loopback,
    };
    let mut filter = Filter {
        cgroup,
        whose: arguments.whose.wanted(),
        inodes: None,
        remote: arguments.remote,
        port: arguments.port,
        unprotected: arguments.unprotected,
        at_risk: arguments
            .at_risk
            .filter(|_| !arguments.summary)
            .map(|_| risk),
    };
    preflight::may_enforce()?;
    let lister = Lister::load(&Kernel::running()?, &filter.top())?;
    let screen = match arguments.watch {
        Some(_) => Screen::take()?,
        None => None,
    };
    loop {
        filter.inodes = arguments.pid.map(holders::sockets_of).transpose()?;
        let mut unseen = view::missing(hierarchy.as_ref());
        let sees_all = unseen.is_empty();
        let in_force = enforcing().unwrap_or_else(|error| {
            unseen.push(PartialView {
                what: "the policies in force, and which values are theirs".to_owned(),
                why: format!("{:#}", anyhow::Error::new(error)),
                cure: "run it as root with all capabilities".to_owned(),
            });
            Vec::new()
        });
        let mut cgroups = Cgroups::new(hierarchy.clone(), in_force)?;
        let mut pass = Pass {
            arguments,
            filter: &filter,
            risk,
            lister: &lister,
            cgroups: &mut cgroups,
            screen: screen.as_ref(),
            unseen,
            sees_all,
        };
        let code = match pass.print() {
            // Whoever reads has seen enough.
            Err(error) if is_broken_pipe(&error) => return Ok(ExitCode::SUCCESS),
            printed => printed?,
        };
        let Some(seconds) = arguments.watch else {
            return Ok(code);
        };
        thread::sleep(Duration::from_secs(seconds.into()));
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// One listing, printed.
struct Pass<'a> {
    arguments: &'a Arguments,
    filter: &'a Filter,
    risk: Risk,
    lister: &'a Lister,
    cgroups: &'a mut Cgroups,
    /// Where it is drawn, if it is drawn again and again.
    screen: Option<&'a Screen>,
    /// What it does not see.
    unseen: Vec<PartialView>,
    /// Whether it sees all processes.
    sees_all: bool,
}

impl Pass<'_> {
    fn print(&mut self) -> Result<ExitCode> {
        let at_risk = if self.arguments.summary {
            self.print_summary()?
        } else {
            self.print_connections()?
        };
        if self.screen.is_none() {
            for part in &self.unseen {
                warn!("{part}");
            }
        }
        Ok(if self.arguments.at_risk.is_some() && at_risk > 0 {
            AT_RISK.into()
        } else if self.unseen.is_empty() {
            ExitCode::SUCCESS
        } else {
            PARTIAL.into()
        })
    }

    fn walk(&mut self, receiver: &mut dyn Receiver<anyhow::Error>) -> Result<()> {
        let unseen = list(
            self.filter,
            self.sees_all,
            self.lister,
            self.cgroups,
            receiver,
        )?;
        for Unseen { netns, error } in unseen {
            self.unseen.push(PartialView {
                what: format!("connections of network namespace {netns}"),
                why: chain(&error),
                cure: "run it as root of the host".to_owned(),
            });
        }
        Ok(())
    }

    /// Returns how many connections are at risk.
    fn print_connections(&mut self) -> Result<u64> {
        let mut printer = Printer {
            json: self.arguments.json,
            sort: self.arguments.sort,
            out: stdout()?,
            kept: Vec::new(),
            widths: Widths::default(),
            line: Vec::new(),
            total: Summary::default(),
            risk: self.risk,
            progress: Progress::new(self.arguments),
        };
        self.walk(&mut printer)?;
        printer.progress.clear();
        let total = printer.total;
        if self.arguments.sort.is_some() {
            printer.kept.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        let mut out = printer.out;
        if self.arguments.json {
            for (_, line) in &printer.kept {
                out.write_all(line).context(PRINTING)?;
            }
        } else {
            self.frame(
                &mut out,
                &printer.kept,
                &printer.widths,
                &self.totals(&total),
            )?;
        }
        out.flush().context(PRINTING)?;
        Ok(total.at_risk)
    }

    /// What stands below the connections.
    fn totals(&self, total: &Summary) -> String {
        let enforced = if self.cgroups.is_enforced() {
            ""
        } else {
            "; no policy is in force"
        };
        let at_risk = self.filter.at_risk.map_or_else(String::new, |risk| {
            let left_out = if risk.loopback {
                ""
            } else {
                " (those within this machine left out, see --loopback)"
            };
            format!(
                " at risk on a path that forgets them after {} of silence{left_out}",
                risk.timeout
            )
        });
        let s = if total.connections == 1 { "" } else { "s" };
        format!(
            "{} connection{s}{at_risk}, {} protected, {} unprotected{enforced}",
            total.connections, total.protected, total.unprotected,
        )
    }

    /// Prints rows of connections and what stands below them.
    fn frame(
        &self,
        out: &mut impl Write,
        rows: &[(Option<Rank>, Box<[u8]>)],
        widths: &Widths,
        totals: &str,
    ) -> Result<()> {
        let available = table::width();
        let Chosen {
            columns,
            widths,
            left_out,
        } = widths.choose(self.arguments, available);
        let mut legend = Legend::default();
        let mut lines = Vec::new();
        let mut line = String::new();
        let titles = columns.iter().map(|column| column.title());
        table::push_row(&mut line, titles, &widths);
        let room = self
            .screen
            .and_then(|_| table::terminal())
            .map(|(_, height)| height);
        for (_, row) in rows {
            let cells: Vec<&str> = str::from_utf8(row)?.split('\t').collect();
            let shown = columns
                .iter()
                .map(|column| cells.get(column.index()).copied().unwrap_or_default());
            for (column, cell) in columns.iter().zip(shown.clone()) {
                legend.add(*column, cell);
            }
            // Nobody scrolls a screen that is drawn again and again.
            if room.is_none_or(|room| lines.len() < room) {
                lines.push(std::mem::take(&mut line));
                table::push_row(&mut line, shown, &widths);
            }
        }
        lines.push(line);
        let mut below = vec![String::new()];
        below.extend(table::wrap(totals, available));
        for sentence in legend.lines() {
            below.extend(table::wrap(&sentence, available));
        }
        if !left_out.is_empty() {
            let titles: Vec<_> = left_out.iter().map(|column| column.title()).collect();
            let sentence = format!("not shown: {} (see --columns, --wide)", titles.join(", "));
            below.extend(table::wrap(&sentence, available));
        }
        if let (Some(screen), Some(height)) = (self.screen, room) {
            for part in &self.unseen {
                below.extend(table::wrap(&part.to_string(), available));
            }
            return draw(screen, height, lines, rows.len(), below);
        }
        for line in &lines {
            out.write_all(line.as_bytes()).context(PRINTING)?;
        }
        writeln!(out, "{}", below.join("\n")).context(PRINTING)
    }

    fn print_summary(&mut self) -> Result<u64> {
        let mut tally = Counter {
            by_cgroup: HashMap::new(),
            risk: self.risk,
            progress: Progress::new(self.arguments),
        };
        self.walk(&mut tally)?;
        tally.progress.clear();
        let mut total = Summary::default();
        let mut cgroups: Vec<_> = tally.by_cgroup.into_iter().collect();
        let path = |known: &Option<Known>| known.as_ref().map(|known| known.path.clone());
        cgroups.sort_by_cached_key(|(_, (known, _))| path(known));
        for (_, (_, summary)) in &cgroups {
            total.merge(summary);
        }
        let mut out = stdout()?;
        if self.arguments.json {
            for (id, (known, summary)) in &cgroups {
                format::summary_json_line(
                    *id,
                    known.as_ref(),
                    summary,
                    self.risk.timeout,
                    &mut out,
                )
                .context(PRINTING)?;
            }
            out.flush().context(PRINTING)?;
            return Ok(total.at_risk);
        }
        let rows = cgroups.iter().map(|(id, (known, summary))| {
            let name = path(known).map_or_else(|| format!("(gone) {id}"), |path| path.to_string());
            format::summary_row(&name, summary)
        });
        let rows: Vec<_> = rows.chain([format::summary_row("total", &total)]).collect();
        let below = format!(
            "at risk: on a path that forgets connections after {} of silence",
            self.risk.timeout
        );
        self.print_summary_rows(&mut out, &rows, &below)?;
        out.flush().context(PRINTING)?;
        Ok(total.at_risk)
    }

    fn print_summary_rows(
        &self,
        out: &mut impl Write,
        rows: &[[String; format::SUMMARY_HEADER.len()]],
        below: &str,
    ) -> Result<()> {
        let available = table::width();
        let mut widths = format::SUMMARY_HEADER.map(table::width_of);
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(table::width_of(cell));
            }
        }
        let too_wide = table::width_of_row(widths.iter().copied()).saturating_sub(available);
        if !self.arguments.wide {
            let [names, ..] = &mut widths;
            *names = names.saturating_sub(too_wide).max(1);
        }
        let mut lines = Vec::new();
        let header = format::SUMMARY_HEADER.map(str::to_owned);
        for row in std::iter::once(&header).chain(rows) {
            let mut line = String::new();
            table::push_row(&mut line, row.iter().map(String::as_str), &widths);
            lines.push(line);
        }
        let mut below = table::wrap(below, available);
        below.insert(0, String::new());
        if let (Some(screen), Some((_, height))) = (self.screen, table::terminal()) {
            return draw(screen, height, lines, rows.len(), below);
        }
        for line in &lines {
            out.write_all(line.as_bytes()).context(PRINTING)?;
        }
        writeln!(out, "{}", below.join("\n")).context(PRINTING)
    }
}

/// Draws what fits: the top, and what stands below.
fn draw(
    screen: &Screen,
    height: usize,
    mut lines: Vec<String>,
    rows: usize,
    mut below: Vec<String>,
) -> Result<()> {
    const LEAST: usize = 4;
    below.truncate(height.saturating_sub(LEAST));
    let room = height.saturating_sub(below.len());
    if lines.len() > room {
        lines.truncate(room.saturating_sub(1));
        let shown = lines.len().saturating_sub(1);
        lines.push(format!("… and {} more", rows.saturating_sub(shown)));
    }
    let drawn = lines
        .iter()
        .map(|line| line.trim_end_matches('\n').to_owned());
    let drawn: Vec<_> = drawn.chain(below).collect();
    screen.draw(&drawn).context(PRINTING)
}

/// The widest cell of each column, and whether the column says anything.
#[derive(Default)]
struct Widths {
    widest: [usize; columns::COUNT],
    speaks: [bool; columns::COUNT],
}

/// Columns to be shown.
struct Chosen {
    columns: Vec<Column>,
    widths: Vec<usize>,
    /// Those that say something and that there is no room for.
    left_out: Vec<Column>,
}

impl Widths {
    fn add(&mut self, cells: &[String; columns::COUNT]) {
        for (column, cell) in Column::ALL.into_iter().zip(cells) {
            let index = column.index();
            self.widest[index] = self.widest[index].max(table::width_of(cell));
            // Of a connection in the namespace of this process that says nothing.
            let says_nothing = cell == "-" || (column == Column::Netns && cell == "host");
            self.speaks[index] |= !says_nothing;
        }
    }

    fn choose(&self, arguments: &Arguments, available: usize) -> Chosen {
        let full =
            |column: &Column| self.widest[column.index()].max(table::width_of(column.title()));
        let all = Column::ALL;
        let in_full = |columns: &[Column]| Chosen {
            columns: columns.to_vec(),
            widths: columns.iter().map(full).collect(),
            left_out: Vec::new(),
        };
        if !arguments.columns.is_empty() {
            return in_full(&arguments.columns);
        }
        if arguments.wide || available == table::UNBOUNDED {
            return in_full(&all);
        }
        let has_rows = self.widest.iter().any(|width| *width > 0);
        let widths = all.map(|column| {
            let speaks = self.speaks[column.index()] || column == Column::Noticed || !has_rows;
            // WHERE says it in short.
            let speaks = speaks && column != Column::Cgroup;
            if speaks { full(&column) } else { 0 }
        });
        let of = |widths: &[usize]| table::width_of_row(widths.iter().copied());
        let columns = columns::fitting(&widths, available, of);
        let left_out = all
            .into_iter()
            .filter(|column| widths[column.index()] > 0 && !columns.contains(column));
        Chosen {
            widths: columns
                .iter()
                .map(|column| full(column).min(column.widest()))
                .collect(),
            left_out: left_out.collect(),
            columns,
        }
    }
}

const PRINTING: &str = "printing to standard output";

/// Standard output without the line buffering of [`io::Stdout`].
fn stdout() -> Result<BufWriter<File>> {
    let descriptor = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .context(PRINTING)?;
    Ok(BufWriter::with_capacity(BUFFER, File::from(descriptor)))
}

/// Prints connections as they come, or keeps them as lines where an order or
/// the width of columns is needed first.
struct Printer {
    json: bool,
    sort: Option<Key>,
    out: BufWriter<File>,
    /// Lines, of JSON or with a tab between two cells.
    kept: Vec<(Option<Rank>, Box<[u8]>)>,
    widths: Widths,
    line: Vec<u8>,
    total: Summary,
    risk: Risk,
    progress: Progress,
}

impl Receiver<anyhow::Error> for Printer {
    fn take(&mut self, connection: &Connection<'_>) -> Result<()> {
        self.total
            .add(connection, self.risk.threatens(connection.record));
        if self.json && self.sort.is_none() {
            return format::json_line(connection, &mut self.out).context(PRINTING);
        }
        let rank = self.sort.map(|key| key.rank(connection));
        self.line.clear();
        if self.json {
            format::json_line(connection, &mut self.line)?;
        } else {
            let cells = format::row(connection);
            self.widths.add(&cells);
            self.line.extend_from_slice(cells.join("\t").as_bytes());
        }
        // As many bytes as it has, not as many as it was given to grow.
        self.kept.push((rank, self.line.as_slice().into()));
        Ok(())
    }

    fn progress(&mut self, looked_at: u64) {
        self.progress.show(looked_at);
    }
}

/// Counts connections by cgroup id.
struct Counter {
    by_cgroup: HashMap<u64, (Option<Known>, Summary)>,
    risk: Risk,
    progress: Progress,
}

impl Receiver<anyhow::Error> for Counter {
    fn take(&mut self, connection: &Connection<'_>) -> Result<()> {
        let (_, summary) = self
            .by_cgroup
            .entry(connection.record.cgroup)
            .or_insert_with(|| (connection.cgroup.cloned(), Summary::default()));
        summary.add(connection, self.risk.threatens(connection.record));
        Ok(())
    }

    fn progress(&mut self, looked_at: u64) {
        self.progress.show(looked_at);
    }
}

/// A line on a terminal that says how far a long listing is.
struct Progress {
    /// When the next line is due; never, where nobody would see it or where it
    /// would stand between other lines.
    due: Option<Instant>,
    drawn: bool,
}

impl Progress {
    fn new(arguments: &Arguments) -> Self {
        let streams = arguments.json && arguments.sort.is_none() && io::stdout().is_terminal();
        let wanted = io::stderr().is_terminal() && !streams && arguments.watch.is_none();
        Self {
            due: wanted.then(|| Instant::now() + PATIENCE),
            drawn: false,
        }
    }

    fn show(&mut self, looked_at: u64) {
        let now = Instant::now();
        if self.due.is_some_and(|due| now >= due) {
            // Not worth failing for.
            let _ = write!(io::stderr(), "\r{looked_at} connections looked at\x1b[K");
            self.due = Some(now + REDRAW);
            self.drawn = true;
        }
    }

    fn clear(&mut self) {
        if self.drawn {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
