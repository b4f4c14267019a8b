//! What the agent logs: lines for people, JSON with timestamps where its command
//! prints JSON, and records with fields where a journal reads.
//!
//! Levels: error, the agent cannot do what it is for; warn, something in its
//! surroundings keeps a part of the policy from holding; info, what has changed
//! and why, in the journal only, for elsewhere reports go to standard output;
//! debug, each step that is taken, never one line per socket.

use std::{
    env, fmt,
    io::{self, IsTerminal as _, Write as _},
    os::{fd::AsFd, unix::net::UnixDatagram},
    sync::OnceLock,
};

use rustix::fs::fstat;
use serde_json::Value;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer,
    field::MakeExt as _,
    filter::Targets,
    fmt::format::{Writer, debug_fn},
    layer::{Context, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

use crate::{names::PrintableLines, unblocked::Stream};

/// Where a journal takes records.
const SOCKET: &str = "/run/systemd/journal/socket";

/// The journal, where standard error leads to it.
static JOURNAL: OnceLock<Option<UnixDatagram>> = OnceLock::new();

/// Where log lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Text,
    Json,
    Journal,
}

/// The journal that standard error leads to, if it does.
pub(super) fn journal() -> Option<&'static UnixDatagram> {
    JOURNAL
        .get_or_init(|| {
            let stream = env::var("JOURNAL_STREAM").ok()?;
            leads_to(&stream, io::stderr()).then(connect)?.ok()
        })
        .as_ref()
}

/// Whether this is the stream that the service manager names: a program that was
/// started by a service inherits the name also where its output goes elsewhere.
fn leads_to(stream: &str, fd: impl AsFd) -> bool {
    fstat(fd).is_ok_and(|found| stream == format!("{}:{}", found.st_dev, found.st_ino))
}

/// Never waits: what the journal does not take at once goes to standard error.
fn connect() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(SOCKET)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Begins to log to standard error, or to the journal behind it.
pub(super) fn init(verbose: bool, json: bool) {
    let form = match journal() {
        _ if json => Form::Json,
        Some(_) => Form::Journal,
        None => Form::Text,
    };
    let own = match form {
        _ if verbose => Level::DEBUG,
        Form::Journal => Level::INFO,
        Form::Text | Form::Json => Level::WARN,
    };
    // What libraries do step by step helps nobody who runs the agent.
    let levels = Targets::new()
        .with_default(Level::WARN)
        .with_target(env!("CARGO_CRATE_NAME"), own)
        // Warns of the limit for locked memory when an error is about to tell of it.
        .with_target("aya::sys::bpf", Level::ERROR);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(Stream::Error)
        .with_target(false);
    let layer = match form {
        Form::Text => lines
            .fmt_fields(debug_fn(printable_field).delimited(" "))
            .with_ansi(
                io::stderr().is_terminal()
                    && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            )
            // Terminals have clocks of their own.
            .without_time()
            .boxed(),
        Form::Json => lines.json().flatten_event(true).boxed(),
        Form::Journal => ToJournal.boxed(),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(levels))
        .init();
}

/// Tells of the error that ends the program, as its log lines are.
pub(super) fn last_error(error: &anyhow::Error, json: bool) {
    if json || journal().is_some() {
        tracing::error!("{error:#}");
        return;
    }
    // Nobody is left to tell when this fails too.
    let error = format!("{error:#}");
    let _ = writeln!(io::stderr(), "error: {}", PrintableLines(&error));
}

/// Writes a field of a log line; the message is one without a name. Its values
/// may have names in them that others chose.
fn printable_field(out: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let value = format!("{value:?}");
    let value = PrintableLines(&value);
    match field.name() {
        "message" => write!(out, "{value}"),
        // Where a record of the crate log comes from.
        name if name.starts_with("log.") => Ok(()),
        name => write!(out, "{name}={value}"),
    }
}

/// A record of the journal, as `man systemd.journal-fields` has it.
pub(super) struct Record(Vec<u8>);

impl Record {
    pub(super) fn new(level: Level, message: &str) -> Self {
        let priority = match level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            _ => "7",
        };
        let mut record = Self(Vec::new());
        record.put("MESSAGE", message);
        record.put("PRIORITY", priority);
        record.put("SYSLOG_IDENTIFIER", "keepalive-agent");
        record
    }

    /// Adds a field of ours: `policy` is `KEEPALIVE_POLICY`.
    pub(super) fn field(&mut self, name: &str, value: &Value) {
        let text = match value {
            Value::Null => return,
            Value::String(text) => text.clone(),
            Value::Array(parts) if parts.iter().all(Value::is_string) => {
                let parts: Vec<_> = parts.iter().filter_map(Value::as_str).collect();
                parts.join(", ")
            }
            other => other.to_string(),
        };
        self.put(&format!("KEEPALIVE_{}", name.to_uppercase()), &text);
    }

    /// With its length, so that a value may have anything in it.
    fn put(&mut self, name: &str, value: &str) {
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(b'\n');
        self.0
            .extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(b'\n');
    }

    /// Hands it to the journal; the message alone to standard error where the
    /// journal is too busy or the record too large.
    pub(super) fn send(&self, message: &str) {
        let sent = journal().is_some_and(|journal| journal.send(&self.0).is_ok());
        if !sent {
            Stream::Error.send(format!("{}\n", PrintableLines(message)).as_bytes());
        }
    }
}

/// What is logged, as records of the journal. Not by the crate tracing-journald,
/// which waits for a journal that is busy.
struct ToJournal;

impl<S: Subscriber> Layer<S> for ToJournal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut record = Record::new(*event.metadata().level(), &fields.message);
        for (name, value) in fields.others {
            record.field(name, &Value::String(value));
        }
        record.send(&fields.message);
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        match field.name() {
            "message" => self.message = value,
            name if name.starts_with("log.") => {}
            name => self.others.push((name, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_stream_of_the_service_manager_is_the_journal() {
        let file = tempfile::tempfile().unwrap();
        let found = fstat(&file).unwrap();
        let name = format!("{}:{}", found.st_dev, found.st_ino);
        assert!(leads_to(&name, &file));
        assert!(!leads_to(&format!("{name}0"), &file));
        assert!(!leads_to("", &file));
    }

    #[test]
    fn a_record_says_how_long_its_values_are() {
        let mut record = Record::new(Level::WARN, "two\nlines");
        record.field("policies", &serde_json::json!(["a", "b"]));
        record.field("cgroup", &Value::Null);
        let text = String::from_utf8(record.0).unwrap();
        assert!(text.starts_with("MESSAGE\n\u{9}\0\0\0\0\0\0\0two\nlines\nPRIORITY\n"));
        assert!(text.ends_with("KEEPALIVE_POLICIES\n\u{4}\0\0\0\0\0\0\0a, b\n"));
        assert!(!text.contains("KEEPALIVE_CGROUP"));
    }
}
