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
use tabwriter::TabWriter;
use tracing::warn;

use super::{PARTIAL, Whose};
use crate::{
    datapath::Lister,
    enforcing::enforcing,
    hierarchy::Hierarchy,
    kernel::{layout::Kernel, preflight},
    network::Network,
    paths::{AWS_NAT, IdleTimeout},
    sockets::{
        Connection, Listing, Receiver, Unseen,
        cgroups::{Cgroups, Known},
        filter::{Filter, Key, Rank, Risk},
        format, holders,
        summary::Summary,
    },
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
                  3 connections are at risk, 4 partial: not every namespace could be seen.\n\n\
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

    /// Show the path of each connection's cgroup too
    #[arg(long, conflicts_with_all = ["json", "summary"])]
    wide: bool,

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

    /// Sort; --json then prints nothing before the last connection was seen
    #[arg(long, value_name = "KEY")]
    sort: Option<Key>,
}

pub(super) fn sockets(arguments: &Arguments) -> Result<ExitCode> {
    let hierarchy = Hierarchy::find();
    let cgroup = match (&arguments.cgroup, &hierarchy) {
        (None, _) => None,
        (Some(path), Ok(hierarchy)) => Some(hierarchy.existing(path)?),
        (Some(_), Err(_)) => return Err(hierarchy.expect_err("matched just above")),
    };
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
    let hierarchy = hierarchy.ok();
    preflight::may_enforce()?;
    let mut lister = Lister::load(&Kernel::running()?)?;
    loop {
        filter.inodes = arguments.pid.map(holders::sockets_of).transpose()?;
        let mut cgroups = Cgroups::new(hierarchy.clone(), enforcing()?)?;
        let mut pass = Pass {
            arguments,
            filter: &filter,
            risk,
            lister: &mut lister,
            cgroups: &mut cgroups,
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
    lister: &'a mut Lister,
    cgroups: &'a mut Cgroups,
}

impl Pass<'_> {
    fn print(&mut self) -> Result<ExitCode> {
        let (unseen, at_risk) = if self.arguments.summary {
            self.print_summary()?
        } else {
            self.print_connections()?
        };
        for Unseen { netns, error } in &unseen {
            warn!("namespace {netns}: its connections are missing: {error:#}");
        }
        Ok(if self.arguments.at_risk.is_some() && at_risk > 0 {
            AT_RISK.into()
        } else if unseen.is_empty() {
            ExitCode::SUCCESS
        } else {
            PARTIAL.into()
        })
    }

    fn walk(&mut self, receiver: &mut dyn Receiver, with_holders: bool) -> Result<Vec<Unseen>> {
        let listing = Listing {
            filter: self.filter,
            with_holders,
        };
        listing.walk(self.lister, self.cgroups, receiver)
    }

    /// Returns what was not seen and how many connections are at risk.
    fn print_connections(&mut self) -> Result<(Vec<Unseen>, u64)> {
        let mut printer = Printer {
            json: self.arguments.json,
            wide: self.arguments.wide,
            sort: self.arguments.sort,
            out: stdout()?,
            kept: Vec::new(),
            line: Vec::new(),
            total: Summary::default(),
            risk: self.risk,
            progress: Progress::new(self.arguments),
        };
        let unseen = self.walk(&mut printer, true)?;
        printer.progress.clear();
        let total = printer.total;
        let mut out = printer.out;
        if self.arguments.sort.is_some() {
            printer.kept.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        if self.arguments.json {
            for (_, line) in &printer.kept {
                out.write_all(line).context(PRINTING)?;
            }
        } else {
            let rows = printer.kept.into_iter().map(|(_, line)| line);
            let enforced = if self.cgroups.is_enforced() {
                ""
            } else {
                "; no agent is running"
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
            let legend = format!(
                "{} connections{at_risk}, {} protected, {} unprotected{enforced}\n{}",
                total.connections,
                total.protected,
                total.unprotected,
                format::LEGEND
            );
            let mut header = format::HEADER.to_vec();
            if self.arguments.wide {
                header.push("CGROUP");
            }
            self.frame(&mut out, &header, rows, &legend)?;
        }
        out.flush().context(PRINTING)?;
        Ok((unseen, total.at_risk))
    }

    fn print_summary(&mut self) -> Result<(Vec<Unseen>, u64)> {
        let mut tally = Counter {
            by_cgroup: HashMap::new(),
            risk: self.risk,
            progress: Progress::new(self.arguments),
        };
        let unseen = self.walk(&mut tally, false)?;
        tally.progress.clear();
        let mut total = Summary::default();
        let mut cgroups: Vec<_> = tally.by_cgroup.into_iter().collect();
        let path = |known: &Option<Known>| known.as_ref().map(|known| known.path.clone());
        cgroups.sort_by_cached_key(|(_, (known, _))| path(known));
        let mut out = stdout()?;
        for (_, (_, summary)) in &cgroups {
            total.merge(summary);
        }
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
        } else {
            let mut rows = Vec::new();
            for (id, (known, summary)) in &cgroups {
                let name =
                    path(known).map_or_else(|| format!("(gone) {id}"), |path| path.to_string());
                tabbed(&format::summary_row(&name, summary), &mut rows);
            }
            tabbed(&format::summary_row("total", &total), &mut rows);
            let legend = format!(
                "at risk: on a path that forgets connections after {} of silence",
                self.risk.timeout
            );
            self.frame(&mut out, &format::SUMMARY_HEADER, [rows], &legend)?;
        }
        out.flush().context(PRINTING)?;
        Ok((unseen, total.at_risk))
    }

    /// Prints an aligned table and what stands below it; when watching on a
    /// terminal, in the place of the one before.
    fn frame(
        &self,
        out: &mut impl Write,
        header: &[&str],
        rows: impl IntoIterator<Item = impl AsRef<[u8]>>,
        legend: &str,
    ) -> Result<()> {
        const CLEAR: &str = "\x1b[H\x1b[2J";
        let mut table = TabWriter::new(Vec::new()).padding(2);
        writeln!(table, "{}", header.join("\t"))?;
        for row in rows {
            table.write_all(row.as_ref())?;
        }
        let table = table
            .into_inner()
            .map_err(|_| io::Error::other("aligning the table"))?;
        if self.arguments.watch.is_some() && io::stdout().is_terminal() {
            out.write_all(CLEAR.as_bytes()).context(PRINTING)?;
        }
        out.write_all(&table).context(PRINTING)?;
        writeln!(out, "\n{legend}").context(PRINTING)
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

/// Appends the cells of a row, separated for [`TabWriter`].
fn tabbed(cells: &[String], line: &mut Vec<u8>) {
    line.extend_from_slice(cells.join("\t").as_bytes());
    line.push(b'\n');
}

/// Prints connections as they come, or keeps them as lines where an order or
/// the width of columns is needed first.
struct Printer {
    json: bool,
    wide: bool,
    sort: Option<Key>,
    out: BufWriter<File>,
    kept: Vec<(Option<Rank>, Box<[u8]>)>,
    line: Vec<u8>,
    total: Summary,
    risk: Risk,
    progress: Progress,
}

impl Receiver for Printer {
    fn take(&mut self, connection: &Connection<'_>) -> Result<()> {
        self.total.add(connection, self.risk.threatens(connection));
        if self.json && self.sort.is_none() {
            return format::json_line(connection, &mut self.out).context(PRINTING);
        }
        let rank = self.sort.map(|key| key.rank(connection));
        self.line.clear();
        if self.json {
            format::json_line(connection, &mut self.line)?;
        } else {
            let mut row = format::row(connection).to_vec();
            if self.wide {
                row.push(format::path(connection));
            }
            tabbed(&row, &mut self.line);
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

impl Receiver for Counter {
    fn take(&mut self, connection: &Connection<'_>) -> Result<()> {
        let (_, summary) = self
            .by_cgroup
            .entry(connection.record.cgroup)
            .or_insert_with(|| (connection.cgroup.cloned(), Summary::default()));
        summary.add(connection, self.risk.threatens(connection));
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
