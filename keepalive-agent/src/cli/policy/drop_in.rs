//! Drop-ins that `policy set` writes: one file per policy.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Error, Result, anyhow, bail};

use super::{Diagnostics, Origins};
use crate::{
    assignment::DEFAULT,
    config::{Place, RUNTIME_DIRECTORY, Refusal, read_trusted},
    identity::Attribute,
    names::printable_path,
};

/// What the names of drop-ins start with that stay.
pub(super) const PERMANENT: &str = "80-";

/// And of those that are gone with the boot: another name, so that they add to
/// the ones that stay, and a later one.
pub(super) const RUNTIME: &str = "90-";

const HEAD: &str = "# Written by `keepalive-agent policy set`, which writes it anew each time.\n";

/// The longest name of a file, with room for what a temporary one is called
/// (`NAME_MAX` in include/uapi/linux/limits.h is 255).
const LONGEST: usize = 240;

/// The keys of a `[[policy]]`, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::cli) enum Key {
    Name,
    Cgroup,
    Of(Attribute),
    Label,
    Remote,
    Port,
    LocalPort,
    Keepalive,
    Idle,
    Interval,
    Probes,
    UserTimeout,
    GiveUp,
    Ignore,
    Enforce,
    Path,
}

pub(super) type Keys = BTreeMap<Key, toml::Value>;

impl Key {
    pub(super) const ALL: [Self; 20] = [
        Self::Name,
        Self::Cgroup,
        Self::Of(Attribute::Unit),
        Self::Of(Attribute::Container),
        Self::Of(Attribute::Image),
        Self::Of(Attribute::Namespace),
        Self::Of(Attribute::Pod),
        Self::Label,
        Self::Remote,
        Self::Port,
        Self::LocalPort,
        Self::Keepalive,
        Self::Idle,
        Self::Interval,
        Self::Probes,
        Self::UserTimeout,
        Self::GiveUp,
        Self::Ignore,
        Self::Enforce,
        Self::Path,
    ];

    /// In the order of [`Origins::timers`].
    pub(super) const TIMERS: [Self; 4] =
        [Self::Idle, Self::Interval, Self::Probes, Self::UserTimeout];

    pub(in crate::cli) const fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Cgroup => "cgroup",
            Self::Of(attribute) => attribute.key(),
            Self::Label => "label",
            Self::Remote => "remote",
            Self::Port => "port",
            Self::LocalPort => "local-port",
            Self::Keepalive => "keepalive",
            Self::Idle => "idle",
            Self::Interval => "interval",
            Self::Probes => "probes",
            Self::UserTimeout => "user-timeout",
            Self::GiveUp => "give-up",
            Self::Ignore => "ignore",
            Self::Enforce => "enforce",
            Self::Path => "path",
        }
    }

    /// Where the policy has the value of this key from, if anybody wrote it. The
    /// name has no say of its own.
    pub(super) fn origin(self, origins: &Origins) -> Option<&Place> {
        let [idle, interval, probes, user_timeout] = &origins.timers;
        match self {
            Self::Name => None,
            Self::Cgroup => origins.cgroup.as_ref(),
            Self::Of(attribute) => origins.attributes.get(&attribute),
            Self::Label => origins.label.as_ref(),
            Self::Remote => origins.remote.as_ref(),
            Self::Port => origins.port.as_ref(),
            Self::LocalPort => origins.local_port.as_ref(),
            Self::Keepalive => origins.keepalive.place(),
            Self::Idle => idle.from.place(),
            Self::Interval => interval.from.place(),
            Self::Probes => probes.from.place(),
            Self::UserTimeout => user_timeout.from.place(),
            Self::GiveUp => origins.give_up.place(),
            Self::Ignore => origins.ignore.place(),
            Self::Enforce => origins.enforce.place(),
            Self::Path => origins.path.as_ref().map(|(_, place)| place),
        }
    }
}

/// A timer as it stands on the command line: a value, or a table as in the file.
pub(in crate::cli) fn timer(key: Key, text: &str) -> Result<toml::Value> {
    if !text.starts_with('{') {
        return Ok(match key {
            Key::Probes => number_or_text(text),
            _ => toml::Value::String(text.to_owned()),
        });
    }
    text.parse().map_err(|error: toml::de::Error| {
        anyhow!(
            "--{} {text}: not a table as in the config file: {}",
            key.name(),
            error.message()
        )
    })
}

/// Digits are a number, as a person means them.
pub(super) fn number_or_text(text: &str) -> toml::Value {
    let digits = Some(text).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    match digits.and_then(|digits| digits.parse().ok()) {
        Some(number) => toml::Value::Integer(number),
        None => toml::Value::String(text.to_owned()),
    }
}

/// The bound that goes with no other.
pub(super) const EXACTLY: &str = "exactly";

/// A timer with bounds, by their keys, beside what it is otherwise: a default, or a
/// table of it and other bounds.
pub(super) fn bounded(
    key: Key,
    otherwise: Option<toml::Value>,
    bounds: &[(&'static str, &str)],
) -> toml::Value {
    let mut table = match otherwise {
        Some(toml::Value::Table(table)) => table,
        Some(default) => toml::Table::from_iter([("default".to_owned(), default)]),
        None => toml::Table::new(),
    };
    if bounds.iter().any(|(bound, _)| *bound == EXACTLY) {
        table.clear();
    } else {
        table.remove(EXACTLY);
    }
    for (bound, text) in bounds {
        let value = match key {
            Key::Probes => number_or_text(text),
            _ => toml::Value::String((*text).to_owned()),
        };
        table.insert((*bound).to_owned(), value);
    }
    toml::Value::Table(table)
}

/// The text of a drop-in with these keys; without a name they are the default's.
pub(super) fn render(keys: &Keys) -> String {
    let table = if keys.contains_key(&Key::Name) {
        "[[policy]]"
    } else {
        "[default]"
    };
    let mut text = format!("{HEAD}{table}\n");
    for (key, value) in keys {
        let value = match value {
            toml::Value::Array(items) if items.len() == 1 => &items[0],
            value => value,
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{} = {value}", key.name());
    }
    text
}

/// The file of one policy.
#[derive(Debug)]
pub(super) struct DropIn {
    path: PathBuf,
    policy: String,
}

impl DropIn {
    pub(super) fn new(directory: &Path, prefix: &str, policy: &str) -> Result<Self> {
        let file = format!("{prefix}{}.toml", file_name(policy));
        if file.len() > LONGEST {
            bail!("the policy's name is too long for a file: choose a shorter one with --name");
        }
        Ok(Self {
            path: directory.join(file),
            policy: policy.to_owned(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What is written in it; none where it does not exist.
    pub(super) fn keys(&self) -> Result<Option<Keys>> {
        let text = match read_trusted(&self.path) {
            Ok(text) => text,
            Err(Refusal::Absent) => return Ok(None),
            Err(refusal) => {
                return Err(refusal).with_context(|| printable_path(&self.path).to_string());
            }
        };
        if text.is_empty() {
            return Ok(None);
        }
        self.parse(&text).map(Some).with_context(|| {
            format!(
                "{} is not as `policy set` writes it; edit it by hand, or remove it",
                printable_path(&self.path)
            )
        })
    }

    fn parse(&self, text: &str) -> Result<Keys> {
        let mut document: toml::Table = text.parse()?;
        if self.policy == DEFAULT {
            let default = document.remove(DEFAULT);
            let default = default.as_ref().and_then(toml::Value::as_table);
            let default = default.filter(|_| document.is_empty());
            return parse_keys(default.context("[default] is expected, and nothing else")?);
        }
        let policies = document.remove("policy");
        let policy = match policies.as_ref().and_then(toml::Value::as_array) {
            Some(policies) if policies.len() == 1 && document.is_empty() => policies[0].as_table(),
            _ => None,
        };
        let policy = policy.context("one [[policy]] is expected, and nothing else")?;
        let name = policy.get("name").and_then(toml::Value::as_str);
        if name != Some(&self.policy) {
            bail!("its policy is not called {}", self.policy);
        }
        parse_keys(policy)
    }

    /// Errors about what would be written, by the arguments that they are about.
    pub(super) fn as_arguments(&self, errors: Diagnostics) -> Error {
        if errors.0.iter().any(|error| error.file != self.path) {
            return errors.into();
        }
        let lines = errors.0.iter().map(|error| {
            let key = error.key.split_once('.');
            let key = key
                .map(|(_, key)| format!("--{} ", key.replace('.', "-")))
                .unwrap_or_default();
            let value = error.value.as_ref().map(|value| format!("{value}: "));
            format!("{key}{}{}", value.unwrap_or_default(), error.message)
        });
        Error::msg(lines.collect::<Vec<_>>().join("\n  "))
    }

    /// Writes it; readers see the old text or the new one.
    pub(super) fn write(&self, text: &str) -> Result<()> {
        replace(&self.path, text)
    }

    pub(super) fn remove(&self) -> Result<()> {
        remove(&self.path)
    }
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).with_context(|| format!("removing {}", printable_path(path)))
}

/// Files that an agent has refused are as they were before: each with its text, or
/// not there.
pub(super) fn put_back<'a>(
    earlier: impl IntoIterator<Item = (&'a Path, Option<&'a str>)>,
    refused: Error,
) -> Result<()> {
    for (path, text) in earlier {
        match text {
            Some(text) => replace(path, text)?,
            None => remove(path)?,
        }
    }
    Err(refused.context("the policy is as it was before, and the file too"))
}

/// Writes a file; readers see the old text or the new one.
pub(super) fn replace(path: &Path, text: &str) -> Result<()> {
    let writing = || format!("writing {}", printable_path(path));
    let (directory, name) = path.parent().zip(path.file_name()).with_context(writing)?;
    make(directory).with_context(|| format!("making {}", printable_path(directory)))?;
    // Hidden, so no drop-in.
    let temporary = directory.join(format!(
        ".{}.{}",
        name.to_string_lossy(),
        std::process::id()
    ));
    let write = || {
        let mut file = File::options()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o644)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write()
        .inspect_err(|_| {
            // What it was made for has failed, and that is what is told.
            let _ = fs::remove_file(&temporary);
        })
        .with_context(writing)
}

fn parse_keys(table: &toml::Table) -> Result<Keys> {
    let key = |(name, value): (&String, &toml::Value)| {
        let key = Key::ALL.into_iter().find(|key| key.name() == name);
        let key = key.with_context(|| format!("`{name}` is unknown"))?;
        Ok((key, value.clone()))
    };
    table.iter().map(key).collect()
}

/// Makes a directory of drop-ins. What is above the runtime one is the agent's
/// own and not for others to look into.
fn make(directory: &Path) -> io::Result<()> {
    if directory == Path::new(RUNTIME_DIRECTORY)
        && let Some(above) = directory.parent()
    {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(above)?;
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
}

/// A policy's name in a file's: no two names become the same.
fn file_name(policy: &str) -> String {
    let mut name = String::new();
    for c in policy.chars() {
        if c.is_alphanumeric() || matches!(c, '.' | '_' | '-') {
            name.push(c);
        } else {
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                // Writing to a string cannot fail.
                let _ = write!(name, "%{byte:02x}");
            }
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn drop_in(directory: &Path, policy: &str) -> DropIn {
        DropIn::new(directory, RUNTIME, policy).unwrap()
    }

    fn keys(name: &str) -> Keys {
        Keys::from([
            (Key::Name, toml::Value::String(name.to_owned())),
            (Key::Cgroup, toml::Value::String("/a".to_owned())),
        ])
    }

    #[test]
    fn names_of_files_are_safe_and_differ() {
        for (policy, expected) in [
            ("redis", "90-redis.toml"),
            (
                "system.slice/redis.service",
                "90-system.slice%2fredis.service.toml",
            ),
            ("../../etc/passwd", "90-..%2f..%2fetc%2fpasswd.toml"),
            ("a b", "90-a%20b.toml"),
            ("a%20b", "90-a%2520b.toml"),
            ("bücher", "90-bücher.toml"),
        ] {
            let drop_in = drop_in("/d".as_ref(), policy);
            assert_eq!(drop_in.path(), Path::new("/d").join(expected));
        }
        let longest = "😀".repeat(64);
        assert!(DropIn::new("/d".as_ref(), RUNTIME, &longest).is_err());
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("conf.d");
        let drop_in = drop_in(&below, "it's \"a\"");
        assert_eq!(drop_in.keys().unwrap(), None);
        let mut keys = keys("it's \"a\"");
        let bounds = "{ default = \"60s\", at-most = \"5m\" }";
        keys.insert(Key::Idle, timer(Key::Idle, bounds).unwrap());
        keys.insert(Key::Probes, timer(Key::Probes, "5").unwrap());
        keys.insert(Key::Port, toml::Value::Array(vec![number_or_text("443")]));
        keys.insert(Key::Enforce, toml::Value::Boolean(false));
        let text = render(&keys);
        assert_eq!(
            text,
            format!(
                "{HEAD}[[policy]]\nname = 'it''s \"a\"'\ncgroup = \"/a\"\nport = 443\n\
                 idle = {{ at-most = \"5m\", default = \"60s\" }}\nprobes = 5\nenforce = false\n"
            )
            .replace("'it''s \"a\"'", "\"\"\"it's \"a\"\"\"\"")
        );
        drop_in.write(&text).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(drop_in.path()), 0o644);
        assert_eq!(mode(&below), 0o755);
        keys.insert(Key::Port, toml::Value::Integer(443));
        assert_eq!(drop_in.keys().unwrap(), Some(keys));
        let left: Vec<_> = fs::read_dir(&below).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        drop_in.remove().unwrap();
        assert_eq!(drop_in.keys().unwrap(), None);
    }

    #[test]
    fn bounds_are_added_to_what_a_timer_has() {
        let text = |otherwise: Option<&str>, bounds: &[(&'static str, &str)]| {
            let otherwise = otherwise.map(|text| timer(Key::Idle, text).unwrap());
            bounded(Key::Idle, otherwise, bounds).to_string()
        };
        for (otherwise, bounds, expected) in [
            (None, &[("at-most", "2m")][..], "{ at-most = \"2m\" }"),
            (
                Some("60s"),
                &[("at-least", "30s"), ("at-most", "2m")],
                "{ at-least = \"30s\", at-most = \"2m\", default = \"60s\" }",
            ),
            (
                Some("{ default = \"60s\", at-most = \"5m\" }"),
                &[("at-most", "2m")],
                "{ at-most = \"2m\", default = \"60s\" }",
            ),
            (Some("60s"), &[(EXACTLY, "2m")], "{ exactly = \"2m\" }"),
            (
                Some("{ exactly = \"60s\" }"),
                &[("at-most", "2m")],
                "{ at-most = \"2m\" }",
            ),
        ] {
            assert_eq!(text(otherwise, bounds), expected);
        }
        let probes = bounded(Key::Probes, None, &[("at-most", "5")]);
        assert_eq!(probes.to_string(), "{ at-most = 5 }");
    }

    #[test]
    fn the_default_has_a_drop_in_too() {
        let directory = tempfile::tempdir().unwrap();
        let drop_in = drop_in(directory.path(), DEFAULT);
        let keys = Keys::from([(Key::Idle, timer(Key::Idle, "60s").unwrap())]);
        let text = render(&keys);
        assert_eq!(text, format!("{HEAD}[default]\nidle = \"60s\"\n"));
        drop_in.write(&text).unwrap();
        assert_eq!(drop_in.keys().unwrap(), Some(keys));
        fs::write(drop_in.path(), "[[policy]]\nname = 'default'\n").unwrap();
        assert!(drop_in.keys().is_err());
    }

    #[test]
    fn what_somebody_else_wrote_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let drop_in = drop_in(directory.path(), "a");
        for text in [
            "= no TOML",
            "[default]\n",
            "[[policy]]\nname = 'b'\ncgroup = '/a'\n",
            "[[policy]]\nname = 'a'\n[[policy]]\nname = 'c'\n",
            "[[policy]]\nname = 'a'\n[default]\n",
            "[[policy]]\nname = 'a'\nidel = '60s'\n",
        ] {
            fs::write(drop_in.path(), text).unwrap();
            assert!(drop_in.keys().is_err(), "{text}");
        }
        // It only takes another one out.
        fs::write(drop_in.path(), "").unwrap();
        assert_eq!(drop_in.keys().unwrap(), None);
    }

    #[test]
    fn errors_name_arguments() {
        let directory = tempfile::tempdir().unwrap();
        let drop_in = drop_in(directory.path(), "a");
        let sources = crate::config::Sources::new(
            Some(Path::new("/dev/null")),
            &[directory.path().to_owned()],
        );
        let mut keys = keys("a");
        keys.insert(Key::Idle, timer(Key::Idle, "60").unwrap());
        keys.insert(
            Key::Probes,
            timer(Key::Probes, "{ at-most = 200 }").unwrap(),
        );
        let errors = sources.read_as_if(drop_in.path(), Some(&render(&keys)));
        assert_eq!(
            drop_in.as_arguments(errors.unwrap_err()).to_string(),
            "--idle \"60\": not a duration; write it like \"60s\", \"2m\" or \"1h 30m\"\n  \
             --probes-at-most 200: out of range: 1 to 127"
        );
        assert!(timer(Key::Idle, "{ at-most").is_err());
    }
}
