//! From one TOML text to what is written in it, collecting everything that is
//! wrong with single values.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    ops::Range as Span,
    str::FromStr,
};

use keepalive_common::policy::{Keepalive, MIN_RTO_MAX};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    CgroupPattern,
    keys::{self, WISHES},
    preset::Preset,
    self_service::{self, Limits},
    text::{At, Findings},
    timer::{AtLeast, Default, TABLE_KEYS, Timer, Written},
};
use crate::{
    assignment::{DEFAULT, GRANTED, UNCLAIMED},
    identity::{Attribute, NamePattern},
    names::is_printable,
    rules::{Ports, Remote},
};

/// What a text says.
#[derive(Debug, std::default::Default)]
pub(super) struct Document {
    pub(super) default: Option<Table>,
    pub(super) policies: Vec<Table>,
    pub(super) self_service: Option<self_service::Table>,
}

/// A key of a policy, if it is written. Most are not: in a box, so that a policy of
/// thousands takes no more than what it says.
pub(super) type Optional<T> = Option<Box<Entry<T>>>;

/// A key that is written.
#[derive(Debug)]
pub(super) struct Entry<T> {
    /// None when the value is wrong, which has been reported.
    pub(super) value: Option<T>,
    pub(super) at: At,
}

/// A policy as written.
#[derive(Debug)]
pub(super) struct Table {
    /// What its keys go by in messages: `default` or `policy`.
    pub(super) section: &'static str,
    pub(super) at: At,
    pub(super) name: Optional<String>,
    pub(super) cgroup: Optional<Vec<CgroupPattern>>,
    pub(super) attributes: [Optional<Vec<NamePattern>>; 5],
    pub(super) label: Optional<BTreeMap<String, NamePattern>>,
    pub(super) remote: Optional<Vec<Remote>>,
    pub(super) port: Optional<Vec<Ports>>,
    pub(super) local_port: Optional<Vec<Ports>>,
    pub(super) keepalive: Optional<Keepalive>,
    pub(super) timers: [Optional<Written>; 4],
    /// In milliseconds; 0 where it is left to the kernel.
    pub(super) give_up: Optional<u32>,
    pub(super) enforce: Optional<bool>,
    pub(super) ignore: Optional<bool>,
    pub(super) path: Optional<Preset>,
}

/// Reads one of the texts; none when it is not TOML, and nothing is known about
/// its keys.
pub(super) fn read(findings: &mut Findings<'_>, text: usize) -> Option<Document> {
    let (document, syntax_errors) = DeTable::parse_recoverable(findings.text(text));
    if syntax_errors.is_empty() {
        let mut reader = Reader { findings, text };
        return Some(reader.document(document.get_ref()));
    }
    for error in syntax_errors {
        let span = error.span().unwrap_or(0..0);
        findings.error(&At { text, span }, "", error.message());
    }
    None
}

struct Reader<'f, 't> {
    findings: &'f mut Findings<'t>,
    /// Index of the text.
    text: usize,
}

/// A table of the document and the name that its keys go by in messages.
#[derive(Clone, Copy)]
struct Section<'a, 'i> {
    name: &'a str,
    table: &'a DeTable<'i>,
}

impl<'a, 'i> Section<'a, 'i> {
    fn get(self, key: &str) -> Option<&'a Spanned<DeValue<'i>>> {
        self.table.get(key)
    }

    fn path(self, key: &str) -> String {
        if self.name.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.name)
        }
    }
}

impl Reader<'_, '_> {
    fn document(&mut self, table: &DeTable<'_>) -> Document {
        let top = Section { name: "", table };
        self.unknown_keys(top, &["default", "policy", "self-service"]);
        let mut document = Document {
            self_service: self.self_service(top),
            ..Document::default()
        };
        if let Some(value) = top.get("default") {
            if let DeValue::Table(table) = value.get_ref() {
                let section = Section {
                    name: "default",
                    table,
                };
                self.unknown_keys(section, &keys::POLICY.map(|key| key.name));
                document.default = Some(self.table("default", &value.span(), table));
            } else {
                self.error(&value.span(), "default", "must be a table: write [default]");
            }
        }
        let known = keys::CLAIM.iter().chain(&keys::POLICY);
        let known: Vec<_> = known.map(|key| key.name).collect();
        let mut lines_by_name = HashMap::new();
        for (span, table) in self.policy_tables(top) {
            let section = Section {
                name: "policy",
                table,
            };
            self.unknown_keys(section, &known);
            let mut policy = self.table("policy", &span, table);
            policy.name = self.name(section, &span, &mut lines_by_name);
            policy.cgroup = self.entry(section, "cgroup", Self::cgroups);
            policy.attributes =
                Attribute::ALL.map(|attribute| self.entry(section, attribute.key(), Self::names));
            policy.label = self.entry(section, "label", Self::labels);
            policy.remote = self.entry(section, "remote", Self::remotes);
            policy.port = self.entry(section, "port", Self::ports);
            policy.local_port = self.entry(section, "local-port", Self::ports);
            document.policies.push(policy);
        }
        document
    }

    fn self_service(&mut self, top: Section<'_, '_>) -> Option<self_service::Table> {
        const NAME: &str = "self-service";
        let value = top.get(NAME)?;
        let DeValue::Table(table) = value.get_ref() else {
            self.error(&value.span(), NAME, "must be a table: write [self-service]");
            return None;
        };
        let section = Section { name: NAME, table };
        let timers = Timer::ALL.map(Timer::key);
        let numbers = [self_service::COMMANDS, self_service::COMMANDS_PER_USER];
        self.unknown_keys(section, &[&timers[..], &numbers].concat());
        Some(self_service::Table {
            at: self.at(&value.span()),
            commands: self.entry(section, self_service::COMMANDS, Self::commands),
            commands_per_user: self.entry(section, self_service::COMMANDS_PER_USER, Self::commands),
            limits: Timer::ALL.map(|timer| {
                self.entry(section, timer.key(), |reader, section, key| {
                    reader.limits(section, key, timer)
                })
            }),
        })
    }

    fn commands(&mut self, section: Section<'_, '_>, key: &str) -> Option<u32> {
        const MOST: u32 = self_service::MOST_COMMANDS;
        let number = match section.get(key)?.get_ref() {
            DeValue::Integer(number) => u32::from_str_radix(number.as_str(), number.radix()).ok(),
            _ => None,
        };
        let number = number.filter(|number| (1..=MOST).contains(number));
        if number.is_none() {
            self.wrong_value(section, key, &format!("must be a number, 1 to {MOST}"));
        }
        number
    }

    fn limits(&mut self, section: Section<'_, '_>, key: &str, timer: Timer) -> Option<Limits> {
        const KEYS: [&str; 2] = ["at-least", "at-most"];
        let value = section.get(key)?;
        let table = match value.get_ref() {
            DeValue::Table(table) if !table.is_empty() => table,
            _ => {
                let message =
                    "must be a table of at-least, at-most or both: what users may ask for";
                self.wrong_value(section, key, message);
                return None;
            }
        };
        let name = section.path(key);
        let bounds = Section { name: &name, table };
        let before = self.findings.count_of_errors();
        self.unknown_keys(bounds, &KEYS);
        let [at_least, at_most] = KEYS.map(|key| self.bound(bounds, key, timer));
        if self.findings.count_of_errors() > before {
            return None;
        }
        let limits = Limits {
            at_least: at_least.unwrap_or(0),
            at_most: at_most.unwrap_or(u32::MAX),
        };
        if limits.at_least > limits.at_most {
            let message = format!(
                "at-least {} is above at-most {}",
                timer.show(limits.at_least),
                timer.show(limits.at_most)
            );
            self.wrong_at(&value.span(), &name, &message);
            return None;
        }
        Some(limits)
    }

    fn policy_tables<'a, 'i>(
        &mut self,
        top: Section<'a, 'i>,
    ) -> Vec<(Span<usize>, &'a DeTable<'i>)> {
        let Some(value) = top.get("policy") else {
            return Vec::new();
        };
        let wrong = "must be a list of tables: write [[policy]]";
        let DeValue::Array(items) = value.get_ref() else {
            self.error(&value.span(), "policy", wrong);
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in items {
            if let DeValue::Table(table) = item.get_ref() {
                tables.push((item.span(), table));
            } else {
                self.error(&item.span(), "policy", wrong);
            }
        }
        tables
    }

    /// What every policy can say.
    fn table(&mut self, name: &'static str, span: &Span<usize>, table: &DeTable<'_>) -> Table {
        let section = Section { name, table };
        Table {
            section: name,
            at: self.at(span),
            name: None,
            cgroup: None,
            attributes: [const { None }; 5],
            label: None,
            remote: None,
            port: None,
            local_port: None,
            keepalive: self.entry(section, "keepalive", Self::keepalive),
            timers: Timer::ALL.map(|timer| {
                self.entry(section, timer.key(), |reader, section, key| {
                    reader.timer(section, key, timer)
                })
            }),
            give_up: self.entry(section, "give-up", Self::give_up),
            enforce: self.entry(section, "enforce", |reader, section, key| {
                let meaning = "false: decided and counted, nothing is set";
                reader.truth(section, key, meaning)
            }),
            ignore: self.entry(section, "ignore", |reader, section, key| {
                let meaning = "true: connections are claimed and not touched at all";
                reader.truth(section, key, meaning)
            }),
            path: self.entry(section, "path", Self::preset),
        }
    }

    fn entry<'a, 'i, T>(
        &mut self,
        section: Section<'a, 'i>,
        key: &str,
        read: impl FnOnce(&mut Self, Section<'a, 'i>, &str) -> Option<T>,
    ) -> Optional<T> {
        let at = self.at(&section.get(key)?.span());
        let value = read(self, section, key);
        Some(Box::new(Entry { value, at }))
    }

    fn name<'a>(
        &mut self,
        section: Section<'a, '_>,
        span: &Span<usize>,
        lines_by_name: &mut HashMap<&'a str, usize>,
    ) -> Optional<String> {
        if section.get("name").is_none() {
            self.error(span, "policy", "has no name: add name = \"…\"");
        }
        self.entry(section, "name", |reader, section, key| {
            let value = section.get(key)?;
            let name = match value.get_ref() {
                DeValue::String(name) => check_name(name).map(|()| &**name),
                _ => Err("must be a string".to_owned()),
            };
            let name = name
                .map_err(|message| reader.wrong_value(section, key, &message))
                .ok()?;
            let line = reader.findings.place(&reader.at(&value.span())).line;
            if let Some(first) = lines_by_name.insert(name, line) {
                let message = format!("line {first} has a policy of this name already");
                reader.wrong_value(section, key, &message);
                return None;
            }
            Some(name.to_owned())
        })
    }

    fn cgroups(&mut self, section: Section<'_, '_>, key: &str) -> Option<Vec<CgroupPattern>> {
        self.one_or_more(section, key, |value| match value {
            DeValue::String(text) => CgroupPattern::new(text),
            _ => Err("must be a path or a list of paths".to_owned()),
        })
    }

    fn names(&mut self, section: Section<'_, '_>, key: &str) -> Option<Vec<NamePattern>> {
        self.one_or_more(section, key, name_pattern)
    }

    fn labels(
        &mut self,
        section: Section<'_, '_>,
        key: &str,
    ) -> Option<BTreeMap<String, NamePattern>> {
        let table = match section.get(key)?.get_ref() {
            DeValue::Table(table) if !table.is_empty() => table,
            _ => {
                let message = "must be a table of labels such as { app = \"web-*\" }";
                self.wrong_value(section, key, message);
                return None;
            }
        };
        let mut labels = BTreeMap::new();
        for (label, value) in table {
            match name_pattern(value.get_ref()) {
                Ok(pattern) => {
                    labels.insert(label.get_ref().clone().into_owned(), pattern);
                }
                Err(message) => self.wrong_at(&value.span(), &section.path(key), &message),
            }
        }
        (labels.len() == table.len()).then_some(labels)
    }

    fn remotes(&mut self, section: Section<'_, '_>, key: &str) -> Option<Vec<Remote>> {
        let remotes = self.one_or_more(section, key, |value| match value {
            DeValue::String(text) => Remote::from_str(text),
            _ => Err("must be a network such as \"10.0.0.0/8\", or a list of networks".to_owned()),
        })?;
        self.once_each(
            section,
            key,
            &remotes,
            |remote| remote.network,
            |earlier, this| {
                if earlier.excepted == this.excepted {
                    format!("{this} is in the list twice")
                } else {
                    format!(
                        "{} is in the list and excepted from it; remove one of the two",
                        this.network
                    )
                }
            },
        )
        .then_some(remotes)
    }

    fn ports(&mut self, section: Section<'_, '_>, key: &str) -> Option<Vec<Ports>> {
        let ports = self.one_or_more(section, key, |value| match value {
            DeValue::Integer(number) => u16::from_str_radix(number.as_str(), number.radix())
                .ok()
                .filter(|port| *port > 0)
                .map(Ports::from)
                .ok_or_else(|| "out of range: 1 to 65535".to_owned()),
            DeValue::String(text) => Ports::from_str(text),
            _ => {
                Err("must be a number, a range such as \"8000-8999\", or a list of both".to_owned())
            }
        })?;
        let message = |_: &Ports, this: &Ports| format!("{this} is in the list twice");
        self.once_each(section, key, &ports, |ports| *ports, message)
            .then_some(ports)
    }

    /// A value or a list of values that is not empty.
    fn one_or_more<T>(
        &mut self,
        section: Section<'_, '_>,
        key: &str,
        read: impl Fn(&DeValue<'_>) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let items = items(section.get(key)?);
        let mut values = Vec::with_capacity(items.len());
        for item in &items {
            match read(item.get_ref()) {
                Ok(value) => values.push(value),
                Err(message) => self.wrong_at(&item.span(), &section.path(key), &message),
            }
        }
        (values.len() == items.len()).then_some(values)
    }

    /// Reports each of the values that means the same as an earlier one.
    fn once_each<T, K: Eq + Hash>(
        &mut self,
        section: Section<'_, '_>,
        key: &str,
        values: &[T],
        meaning: impl Fn(&T) -> K,
        message: impl Fn(&T, &T) -> String,
    ) -> bool {
        let mut seen = HashMap::with_capacity(values.len());
        let mut right = true;
        let items = section.get(key).map(items).unwrap_or_default();
        for (value, item) in values.iter().zip(items) {
            if let Some(earlier) = seen.insert(meaning(value), value) {
                self.wrong_at(&item.span(), &section.path(key), &message(earlier, value));
                right = false;
            }
        }
        right
    }

    fn keepalive(&mut self, section: Section<'_, '_>, key: &str) -> Option<Keepalive> {
        let word = section.get(key)?.get_ref().as_str();
        let found = WISHES.iter().find(|(known, _)| Some(*known) == word);
        if found.is_none() {
            let message = "must be \"on\", \"always\", \"off\", \"never\" or \"leave\"";
            self.wrong_value(section, key, message);
        }
        found.map(|(_, wish)| *wish)
    }

    fn truth(&mut self, section: Section<'_, '_>, key: &str, meaning: &str) -> Option<bool> {
        let truth = section.get(key)?.get_ref().as_bool();
        if truth.is_none() {
            let message = format!("must be true or false; {meaning}");
            self.wrong_value(section, key, &message);
        }
        truth
    }

    fn give_up(&mut self, section: Section<'_, '_>, key: &str) -> Option<u32> {
        /// The kernel takes no shorter time between two retransmissions.
        const SHORTEST: u32 = MIN_RTO_MAX;
        let value = section.get(key)?.get_ref();
        if value.as_str() == Some("leave") {
            return Some(0);
        }
        let give_up = Timer::UserTimeout.value(value).and_then(|give_up| {
            if give_up < SHORTEST {
                Err("must be at least 1s".to_owned())
            } else {
                Ok(give_up)
            }
        });
        give_up
            .map_err(|message| self.wrong_value(section, key, &message))
            .ok()
    }

    fn preset(&mut self, section: Section<'_, '_>, key: &str) -> Option<Preset> {
        let preset = match section.get(key)?.get_ref() {
            DeValue::String(text) => Preset::new(text),
            _ => Err(
                "must be the name of a path such as \"aws-nat\", or a duration such as \"350s\""
                    .to_owned(),
            ),
        };
        preset
            .map_err(|message| self.wrong_value(section, key, &message))
            .ok()
    }

    /// A timer as written, if it is right.
    fn timer(&mut self, section: Section<'_, '_>, key: &str, timer: Timer) -> Option<Written> {
        let value = section.get(key)?;
        let written = if let DeValue::Table(table) = value.get_ref() {
            let name = section.path(key);
            let bounds = Section { name: &name, table };
            self.bounds(bounds, timer, &value.span())?
        } else {
            Written::fills(self.default_of(section, key, timer)?)
        };
        if let Some(message) = written.contradiction(timer) {
            self.wrong_at(&value.span(), &section.path(key), &message);
            return None;
        }
        Some(written)
    }

    fn bounds(
        &mut self,
        section: Section<'_, '_>,
        timer: Timer,
        span: &Span<usize>,
    ) -> Option<Written> {
        let before = self.findings.count_of_errors();
        self.unknown_keys(section, &TABLE_KEYS);
        if section.table.is_empty() {
            let message = "is empty: it needs one of default, at-least, at-most, exactly";
            self.error(span, section.name, message);
        }
        let exactly = self.bound(section, "exactly", timer);
        let written = Written {
            default: section
                .get("default")
                .and_then(|_| self.default_of(section, "default", timer)),
            at_least: self.at_least(section, timer),
            at_most: self.bound(section, "at-most", timer),
        };
        if section.get("exactly").is_some() && section.table.len() > 1 {
            let message = "leaves nothing to the other keys of the table: remove them";
            self.wrong_value(section, "exactly", message);
        }
        if self.findings.count_of_errors() > before {
            return None;
        }
        Some(exactly.map_or(written, Written::exactly))
    }

    fn at_least(&mut self, section: Section<'_, '_>, timer: Timer) -> Option<AtLeast> {
        const KEY: &str = "at-least";
        let word = section.get(KEY)?.get_ref().as_str();
        if timer == Timer::UserTimeout && word == Some("derive") {
            return Some(AtLeast::Derive);
        }
        self.bound(section, KEY, timer).map(AtLeast::Value)
    }

    fn bound(&mut self, section: Section<'_, '_>, key: &str, timer: Timer) -> Option<u32> {
        let value = section.get(key)?;
        timer
            .value(value.get_ref())
            .map_err(|message| self.wrong_value(section, key, &message))
            .ok()
    }

    /// What an application gets that set nothing: a value or a word.
    fn default_of(&mut self, section: Section<'_, '_>, key: &str, timer: Timer) -> Option<Default> {
        if let Some(word) = section.get(key)?.get_ref().as_str() {
            if let Some(default) = timer.word(word) {
                return Some(default);
            }
            if !word.contains(|c: char| c.is_ascii_digit()) {
                let message = format!("must be {}", timer.words());
                self.wrong_value(section, key, &message);
                return None;
            }
        }
        self.bound(section, key, timer).map(Default::Value)
    }

    fn unknown_keys(&mut self, section: Section<'_, '_>, known: &[&str]) {
        for key in section.table.keys() {
            if !known.contains(&key.get_ref().as_ref()) {
                let message = format!("unknown key; known here: {}", known.join(", "));
                // As it is written: a quoted key may hold anything.
                let name = self.findings.text(self.text).get(key.span());
                self.error(
                    &key.span(),
                    &section.path(name.unwrap_or_default()),
                    &message,
                );
            }
        }
    }

    /// The value of a key is wrong.
    fn wrong_value(&mut self, section: Section<'_, '_>, key: &str, message: &str) {
        let span = section.get(key).map_or(0..0, Spanned::span);
        self.wrong_at(&span, &section.path(key), message);
    }

    /// The value that stands here is wrong.
    fn wrong_at(&mut self, span: &Span<usize>, key: &str, message: &str) {
        let at = self.at(span);
        self.findings.wrong(&at, key, message);
    }

    fn error(&mut self, span: &Span<usize>, key: &str, message: &str) {
        let at = self.at(span);
        self.findings.error(&at, key, message);
    }

    fn at(&self, span: &Span<usize>) -> At {
        At {
            text: self.text,
            span: span.clone(),
        }
    }
}

/// A name or glob.
fn name_pattern(value: &DeValue<'_>) -> Result<NamePattern, String> {
    match value {
        DeValue::String(text) => NamePattern::new(text),
        _ => Err("must be a name, a glob or a list of them".to_owned()),
    }
}

/// The items of a list, or the value itself; an empty list is a wrong value.
fn items<'a, 'i>(value: &'a Spanned<DeValue<'i>>) -> Vec<&'a Spanned<DeValue<'i>>> {
    match value.get_ref() {
        DeValue::Array(items) if !items.is_empty() => items.iter().collect(),
        _ => vec![value],
    }
}

/// Whether a policy may have this name.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    const LONGEST: usize = 64;
    if name.is_empty() || name.chars().count() > LONGEST || !name.chars().all(is_printable) {
        return Err(format!(
            "must have 1 to {LONGEST} characters, none of them invisible"
        ));
    }
    if name == DEFAULT {
        return Err(
            "is the name of the policy for unclaimed sockets: write it as [default]".to_owned(),
        );
    }
    if name == GRANTED {
        return Err("is what reports call the policies that users asked for".to_owned());
    }
    if name == UNCLAIMED {
        return Err("is what reports call the connections that no policy claims".to_owned());
    }
    Ok(())
}
