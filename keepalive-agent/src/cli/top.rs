//! `keepalive-agent top`: a live view of all connections, whether they survive
//! their path, and what a policy did for them.
//!
//! [`collect`] looks at the machine, on a thread of its own; [`model`] holds what
//! was found and what keys make of it; [`draw`] draws that and does nothing else.

mod collect;
mod draw;
mod model;

use std::{
    io::{self, IsTerminal as _, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event},
};

use super::{Whose, screen, table};
use crate::{
    datapath::Lister,
    hierarchy::Hierarchy,
    kernel::{layout::Kernel, preflight},
    names::PrintableLines,
    paths::{AWS_NAT, IdleTimeout},
    sockets::{
        filter::{Filter, Risk},
        forecast::Noticed,
    },
};
use collect::Collector;
use model::{Action, By, Model};

#[derive(Args, Debug)]
#[command(
    after_help = "Nothing is changed on any socket, and no agent needs to run. What the path \
                  forgets next stands on top. The ? key explains the columns and the other \
                  keys; arrows or those of vi, enter looks inside, q ends it. NO_COLOR is \
                  heeded.\n\n\
                  Exit codes: 0 done, 1 failed, such as no terminal, 2 wrong usage.\n\n\
                  Examples:\n  \
                  keepalive-agent top\n  \
                  keepalive-agent top --path azure-lb --by container\n  \
                  keepalive-agent top --cgroup /system.slice --every 10\n  \
                  keepalive-agent top --pod 'shop/*'"
)]
pub(super) struct Arguments {
    /// Count at risk what a path with this idle timeout forgets: a duration, or
    /// one of aws-nat, aws-nlb, azure-lb, gcp, ipvs
    #[arg(long, value_name = "TIMEOUT|PATH")]
    path: Option<IdleTimeout>,

    /// Count connections within this machine as if they passed that path too
    #[arg(long)]
    loopback: bool,

    /// Only connections of this cgroup and what is below it
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    #[command(flatten)]
    whose: Whose,

    /// Begin with a row for each of these
    #[arg(long, value_name = "GROUP", default_value = "cgroup")]
    by: By,

    /// Seconds between two looks
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "2",
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    every: u32,
}

/// Everything that was found in one look at the machine.
#[derive(Clone, Debug)]
struct Snapshot {
    /// Every connection.
    sockets: Vec<Socket>,
    /// What the kernel counts for each policy.
    policies: Vec<Counts>,
    /// Dead peers that agents have told of, by where the connection was.
    dead: Vec<(Arc<Place>, u64)>,
    /// Since the look before this one; none at the first.
    since_last: Option<Duration>,
    /// What is in force, in words: `agent 123 on /`.
    in_force: Vec<String>,
    /// What could not be seen, in words.
    unseen: Vec<String>,
    /// After how much silence the path forgets a connection.
    timeout: IdleTimeout,
    /// When that was, as a time of day in UTC.
    at: String,
}

/// What the kernel counts for a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Counts {
    /// Its name.
    policy: Arc<str>,
    /// Connections that were established since the look before this one.
    new: u64,
    /// Dead peers since the policy is in force.
    dead: u64,
}

/// Where a connection belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Place {
    /// Path of the cgroup.
    cgroup: Arc<str>,
    /// The unit of the service manager.
    unit: Option<Arc<str>>,
    /// The container, as people call it.
    container: Option<Arc<str>>,
}

/// Whether a connection survives the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exposure {
    /// It does.
    Survives,
    /// Silence for as long as the path's timeout ends it.
    AtRisk,
    /// It stays within this machine: there is no path.
    Within,
}

/// One connection. All texts may be printed as they are.
#[derive(Clone, Debug)]
struct Socket {
    /// This end.
    local: SocketAddr,
    /// The other end.
    remote: SocketAddr,
    /// Where it belongs to.
    place: Arc<Place>,
    /// The policy that claims it.
    policy: Option<Arc<str>>,
    /// The process that holds it: its id and name.
    process: Option<(u32, Arc<str>)>,
    /// Name of its network namespace.
    netns: Arc<str>,
    /// Idle time in seconds; none where keepalive is off.
    idle: Option<u32>,
    /// Whether a policy decided any of its options.
    is_changed: bool,
    /// Whether it survives the path.
    exposure: Exposure,
    /// How long nothing has come from the peer, in milliseconds.
    silent_ms: u64,
    /// When a peer that is dead from now on is noticed.
    noticed: Noticed,
    /// Whether it was not there at the look before.
    is_new: bool,
}

impl Socket {
    /// Milliseconds until the path forgets it, if nothing happens on it; none
    /// where it does not.
    #[must_use]
    fn forgotten_ms(&self, timeout: IdleTimeout) -> Option<u64> {
        let timeout = u64::try_from(timeout.duration().as_millis()).unwrap_or(u64::MAX);
        (self.exposure == Exposure::AtRisk).then(|| timeout.saturating_sub(self.silent_ms))
    }
}

/// Something to be shown, or a key.
enum News {
    Found(Box<Snapshot>),
    Failed(String),
    Explained(String),
    Terminal(io::Result<Event>),
    /// The thread that looks has ended, as it never does by itself.
    Ended,
}

pub(super) fn top(arguments: &Arguments) -> Result<ExitCode> {
    if table::terminal().is_none() || !io::stdin().is_terminal() {
        bail!(
            "it draws on a terminal, and there is none: `sockets --summary` prints the same once"
        );
    }
    preflight::may_enforce()?;
    let (hierarchy, cgroup) = Hierarchy::with(arguments.cgroup.as_deref())?;
    let filter = Filter {
        cgroup,
        whose: arguments.whose.wanted(),
        ..Filter::default()
    };
    let risk = Risk {
        timeout: arguments.path.unwrap_or_else(|| AWS_NAT.into()),
        loopback: arguments.loopback,
    };
    let lister = Lister::load(&Kernel::running()?, &filter.top())?;
    let collector = Collector::new(hierarchy, lister, filter, risk);
    let has_colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let model = Model::new(arguments.by, has_colours);

    let (tell, news) = channel();
    let (pause, pauses) = channel();
    screen::leave_on_signals(restore)?;
    let mut terminal = ratatui::try_init().context("taking the terminal")?;
    let shown = look(collector, arguments.every, tell.clone(), pauses)
        .and_then(|()| read_keys(tell.clone()))
        .and_then(|()| show(&mut terminal, model, &news, &tell, &pause));
    drop(terminal);
    restore();
    shown.map(|()| ExitCode::SUCCESS)
}

/// Gives the terminal back as it was.
fn restore() {
    const SHOW_CURSOR: &[u8] = b"\x1b[?25h";
    ratatui::restore();
    let mut out = io::stdout().lock();
    // Nobody sees it if the terminal is gone.
    let _ = out.write_all(SHOW_CURSOR).and_then(|()| out.flush());
}

/// Looks at the machine again and again, on a thread of its own, until nobody
/// listens.
fn look(
    mut collector: Collector,
    seconds: u32,
    tell: Sender<News>,
    pauses: Receiver<bool>,
) -> Result<()> {
    /// Says so however the thread ends.
    struct Ending(Sender<News>);
    impl Drop for Ending {
        fn drop(&mut self) {
            let _ = self.0.send(News::Ended);
        }
    }
    let pace = Duration::from_secs(seconds.into());
    spawn("looking", move || {
        let tell = Ending(tell);
        loop {
            let found = match collector.collect() {
                Ok(snapshot) => News::Found(Box::new(snapshot)),
                Err(error) => News::Failed(format!("{error:#}")),
            };
            if tell.0.send(found).is_err() {
                return;
            }
            let mut told = pauses.recv_timeout(pace);
            // Nothing wakes it up while it rests.
            while told == Ok(true) {
                told = pauses.recv().map_err(|_| RecvTimeoutError::Disconnected);
            }
            if told == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    })
}

/// Hands on keys and changes of the terminal's size, on a thread of its own.
fn read_keys(tell: Sender<News>) -> Result<()> {
    spawn("keys", move || {
        loop {
            let event = event::read();
            let failed = event.is_err();
            if tell.send(News::Terminal(event)).is_err() || failed {
                return;
            }
        }
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .context("starting a thread")?;
    Ok(())
}

/// Shows what there is, until a key ends it.
fn show(
    terminal: &mut DefaultTerminal,
    mut model: Model,
    news: &Receiver<News>,
    tell: &Sender<News>,
    pause: &Sender<bool>,
) -> Result<()> {
    loop {
        model.resize(draw::room(terminal.size()?.height));
        terminal
            .draw(|frame| draw::draw(&model, frame))
            .context("drawing on the terminal")?;
        // All that has come by now, and then it is drawn once.
        let mut next = news.recv().ok();
        while let Some(what) = next {
            match what {
                // What was on its way when the pause began.
                News::Found(_) if model.is_paused => {}
                News::Found(snapshot) => model.take(*snapshot),
                News::Failed(error) => model.error = Some(error),
                News::Explained(text) => model.take_explanation(text),
                News::Ended => bail!("looking at connections has failed"),
                News::Terminal(event) => {
                    let Event::Key(key) = event.context("reading keys")? else {
                        next = news.try_recv().ok();
                        continue;
                    };
                    match model.press(key) {
                        Action::None => {}
                        Action::Quit => return Ok(()),
                        Action::Pause(paused) => pause.send(paused).context("pausing")?,
                        Action::Explain(local, remote) => explain(local, remote, tell.clone())?,
                    }
                }
            }
            next = news.try_recv().ok();
        }
    }
}

/// Asks `explain` about a connection, in a process of its own: what it warns of
/// must not come to the terminal by itself.
fn explain(local: SocketAddr, remote: SocketAddr, tell: Sender<News>) -> Result<()> {
    spawn("explaining", move || {
        let output = Command::new("/proc/self/exe")
            .args(["explain", "--socket"])
            .args([local, remote].map(|end| end.to_string()))
            .stdin(Stdio::null())
            .output();
        let text = match output {
            Ok(output) => {
                let said = [output.stdout, output.stderr].concat();
                let said = String::from_utf8_lossy(&said);
                PrintableLines(&said).to_string()
            }
            Err(error) => format!("starting explain: {error}"),
        };
        // Nobody listens any more: it is over.
        let _ = tell.send(News::Explained(text));
    })
}

#[cfg(test)]
mod tests;
