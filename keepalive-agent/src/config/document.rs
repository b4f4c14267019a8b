//! From TOML to [`Config`], collecting everything that is wrong on the way.

use std::{collections::HashMap, ops::Range as Span, path::Path};

use keepalive_common::{
    plan::{Options, plan},
    policy::{Keepalive, Policy, time_to_notice},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    CgroupPattern, Config, Diagnostic, Diagnostics, NamedPolicy,
    timer::{Default, Timer, Written},
};
use crate::{
    assignment::{DEFAULT, UNCLAIMED},
    duration,
    rules::Rules,
};

/// Keys that every policy understands.
const POLICY_KEYS: [&str; 5] = ["keepalive", "idle", "interval", "probes", "user-timeout"];

pub(super) fn parse(path: &Path, text: &str) -> Result<(Config, Diagnostics), Diagnostics> {
    let mut reader = Reader {
        path,
        text,
        errors: Found::default(),
        warnings: Found::default(),
    };
    let (document, syntax_errors) = DeTable::parse_recoverable(text);
    if !syntax_errors.is_empty() {
        for error in syntax_errors {
            let span = error.span().unwrap_or(0..0);
            reader.error(&span, "", error.message());
        }
        return Err(reader.errors.into_order());
    }
    let config = reader.document(document.get_ref());
    if reader.errors.0.is_empty() {
        Ok((config, reader.warnings.into_order()))
    } else {
        Err(reader.errors.into_order())
    }
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    errors: Found,
    warnings: Found,
}

/// What was found, with its offset in the text. Keys are read by topic, a
/// person reads from the top.
#[derive(Default)]
struct Found(Vec<(usize, Diagnostic)>);

impl Found {
    fn into_order(mut self) -> Diagnostics {
        self.0.sort_by_key(|(offset, _)| *offset);
        Diagnostics(self.0.into_iter().map(|(_, found)| found).collect())
    }
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

impl Reader<'_> {
    fn document(&mut self, table: &DeTable<'_>) -> Config {
        let top = Section { name: "", table };
        self.unknown_keys(top, &["default", "policy"]);
        let mut default = None;
        if let Some(value) = top.get("default") {
            if let DeValue::Table(table) = value.get_ref() {
                let section = Section {
                    name: "default",
                    table,
                };
                self.unknown_keys(section, &POLICY_KEYS);
                default = Some(self.policy(section, &Policy::BUILT_IN));
            } else {
                self.error(&value.span(), "default", "must be a table: write [default]");
            }
        }
        let inherited = default.unwrap_or(Policy::BUILT_IN);
        let mut policies = Vec::new();
        let mut lines_by_name = HashMap::new();
        for table in self.policy_tables(top) {
            policies.extend(self.named_policy(table, &inherited, &mut lines_by_name));
        }
        Config { default, policies }
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

    fn named_policy(
        &mut self,
        (span, table): (Span<usize>, &DeTable<'_>),
        inherited: &Policy,
        lines_by_name: &mut HashMap<String, usize>,
    ) -> Option<NamedPolicy> {
        let section = Section {
            name: "policy",
            table,
        };
        let mut known = vec!["name", "cgroup"];
        known.extend(POLICY_KEYS);
        self.unknown_keys(section, &known);
        let name = self.name(section, &span, lines_by_name);
        let cgroups = self.cgroups(section, &span);
        let policy = self.policy(section, inherited);
        Some(NamedPolicy {
            name: name?,
            cgroups: cgroups?,
            rules: Rules::default(),
            policy,
        })
    }

    fn name(
        &mut self,
        section: Section<'_, '_>,
        span: &Span<usize>,
        lines_by_name: &mut HashMap<String, usize>,
    ) -> Option<String> {
        const LONGEST: usize = 64;
        let Some(value) = section.get("name") else {
            self.error(span, "policy", "has no name: add name = \"…\"");
            return None;
        };
        let DeValue::String(name) = value.get_ref() else {
            self.wrong_value(section, "name", "must be a string");
            return None;
        };
        if name.is_empty() || name.chars().count() > LONGEST || name.chars().any(char::is_control) {
            let message = format!("must have 1 to {LONGEST} characters and no control characters");
            self.wrong_value(section, "name", &message);
            return None;
        }
        if name == DEFAULT {
            let message = "is the name of the policy for unclaimed sockets: write it as [default]";
            self.wrong_value(section, "name", message);
            return None;
        }
        if name == UNCLAIMED {
            let message = "is what reports call the connections that no policy claims";
            self.wrong_value(section, "name", message);
            return None;
        }
        let line = self.line(&value.span());
        if let Some(first) = lines_by_name.insert(name.clone().into_owned(), line) {
            let message = format!("line {first} has a policy of this name already");
            self.wrong_value(section, "name", &message);
            return None;
        }
        Some(name.clone().into_owned())
    }

    fn cgroups(
        &mut self,
        section: Section<'_, '_>,
        span: &Span<usize>,
    ) -> Option<Vec<CgroupPattern>> {
        let Some(value) = section.get("cgroup") else {
            let message = "has no cgroup: add cgroup = \"/…\", or use [default] for everything";
            self.error(span, "policy", message);
            return None;
        };
        let items = match value.get_ref() {
            DeValue::Array(items) if !items.is_empty() => items.iter().collect(),
            _ => vec![value],
        };
        let mut patterns = Vec::new();
        for item in &items {
            let pattern = match item.get_ref() {
                DeValue::String(text) => CgroupPattern::new(text),
                _ => Err("must be a path or a list of paths".to_owned()),
            };
            match pattern {
                Ok(pattern) => patterns.push(pattern),
                Err(message) => self.wrong_at(&item.span(), "policy.cgroup", &message),
            }
        }
        (patterns.len() == items.len()).then_some(patterns)
    }

    /// A policy, completed from another one.
    fn policy(&mut self, section: Section<'_, '_>, inherited: &Policy) -> Policy {
        let keepalive = self.keepalive(section).unwrap_or(inherited.keepalive());
        let mut policy = inherited.with_keepalive(keepalive);
        let derives = inherited.derives_user_timeout();
        for timer in Timer::ALL {
            let Some(written) = self.timer(section, timer) else {
                continue;
            };
            let range = match timer {
                Timer::Idle => &mut policy.idle,
                Timer::Interval => &mut policy.interval,
                Timer::Probes => &mut policy.probes,
                Timer::UserTimeout => &mut policy.user_timeout,
            };
            let (completed, derive) = written.complete((*range, derives));
            *range = completed;
            if timer == Timer::UserTimeout {
                policy = policy.with_derived_user_timeout(derive);
            }
        }
        self.warn_of_user_timeout(section, &policy);
        policy
    }

    fn keepalive(&mut self, section: Section<'_, '_>) -> Option<Keepalive> {
        let value = section.get("keepalive")?;
        match value.get_ref().as_str() {
            Some("on") => Some(Keepalive::On),
            Some("off") => Some(Keepalive::Off),
            Some("leave") => Some(Keepalive::Leave),
            _ => {
                let message = "must be \"on\", \"off\" or \"leave\"";
                self.wrong_value(section, "keepalive", message);
                None
            }
        }
    }

    /// A timer as written, if it is mentioned and right.
    fn timer(&mut self, section: Section<'_, '_>, timer: Timer) -> Option<Written> {
        let key = timer.key();
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
        const KEYS: [&str; 4] = ["default", "at-least", "at-most", "exactly"];
        let before = self.errors.0.len();
        self.unknown_keys(section, &KEYS);
        if section.table.is_empty() {
            let message = "is empty: it needs one of default, at-least, at-most, exactly";
            self.error(span, section.name, message);
        }
        let exactly = self.bound(section, "exactly", timer);
        let written = Written {
            default: section
                .get("default")
                .and_then(|_| self.default_of(section, "default", timer)),
            at_least: self.bound(section, "at-least", timer),
            at_most: self.bound(section, "at-most", timer),
        };
        if section.get("exactly").is_some() && section.table.len() > 1 {
            let message = "leaves nothing to the other keys of the table: remove them";
            self.wrong_value(section, "exactly", message);
        }
        if self.errors.0.len() > before {
            return None;
        }
        Some(exactly.map_or(written, Written::exactly))
    }

    fn bound(&mut self, section: Section<'_, '_>, key: &str, timer: Timer) -> Option<u32> {
        let value = section.get(key)?;
        timer
            .value(value.get_ref())
            .map_err(|message| self.wrong_value(section, key, &message))
            .ok()
    }

    /// What an application gets that set nothing: a value, or for the
    /// user-timeout a word.
    fn default_of(&mut self, section: Section<'_, '_>, key: &str, timer: Timer) -> Option<Default> {
        if timer == Timer::UserTimeout {
            match section.get(key)?.get_ref().as_str() {
                Some("derive") => return Some(Default::Derive),
                Some("leave") => return Some(Default::Leave),
                Some(word) if !word.contains(|c: char| c.is_ascii_digit()) => {
                    let message = "must be a duration such as \"30s\", or \"derive\" or \"leave\"";
                    self.wrong_value(section, key, message);
                    return None;
                }
                _ => {}
            }
        }
        self.bound(section, key, timer).map(Default::Value)
    }

    /// With a user-timeout the kernel counts time, not probes
    /// (`tcp_keepalive_timer` in net/ipv4/tcp_timer.c). The table that brings
    /// the two together is warned of, even when it inherits one of them.
    fn warn_of_user_timeout(&mut self, section: Section<'_, '_>, policy: &Policy) {
        let own = Timer::UserTimeout.key();
        let mentioned = [own, "idle", "interval", "probes", "keepalive"]
            .into_iter()
            .find_map(|key| Some((key, section.get(key)?.span())));
        let Some((key, span)) = mentioned else {
            return;
        };
        let wants = plan(policy, &Options::default());
        let by_probes = time_to_notice(wants.idle, wants.interval, wants.probes);
        if policy.keepalive() == Keepalive::Off
            || wants.user_timeout == 0
            || wants.user_timeout == by_probes
        {
            return;
        }
        let timeout = duration::show_milliseconds(wants.user_timeout);
        let subject = if key == own {
            String::new()
        } else {
            format!("user-timeout {timeout} of [default] ")
        };
        let message = if u64::from(wants.user_timeout) < u64::from(wants.idle) * 1000 {
            format!(
                "{subject}is below idle {}: a dead peer is given up after one unanswered probe, \
                 and unacknowledged data after {timeout}",
                duration::show_seconds(wants.idle)
            )
        } else {
            format!(
                "{subject}cancels probes = {}: with a user-timeout the kernel gives up by time, \
                 here after {timeout} instead of idle + interval × probes = {}; \
                 \"derive\" makes them agree",
                wants.probes,
                duration::show_milliseconds(by_probes)
            )
        };
        let warning = self.diagnostic(&span, &section.path(key), self.as_written(&span), &message);
        self.warnings.0.push(warning);
    }

    fn unknown_keys(&mut self, section: Section<'_, '_>, known: &[&str]) {
        for key in section.table.keys() {
            if !known.contains(&key.get_ref().as_ref()) {
                let message = format!("unknown key; known here: {}", known.join(", "));
                // As it is written: a quoted key may hold anything.
                let name = self.text.get(key.span()).unwrap_or_default();
                self.error(&key.span(), &section.path(name), &message);
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
        let error = self.diagnostic(span, key, self.as_written(span), message);
        self.errors.0.push(error);
    }

    fn error(&mut self, span: &Span<usize>, key: &str, message: &str) {
        let error = self.diagnostic(span, key, None, message);
        self.errors.0.push(error);
    }

    fn diagnostic(
        &self,
        span: &Span<usize>,
        key: &str,
        value: Option<String>,
        message: &str,
    ) -> (usize, Diagnostic) {
        let found = Diagnostic {
            file: self.path.to_owned(),
            line: self.line(span),
            key: key.to_owned(),
            value,
            message: message.to_owned(),
        };
        (span.start, found)
    }

    /// A value as it stands in the text, on one line; none for a table that
    /// has a header, where the key says it all.
    fn as_written(&self, span: &Span<usize>) -> Option<String> {
        let text = self.text.get(span.clone())?;
        let first = text.lines().next()?;
        let line = &self.text[..span.start + first.len()];
        if line.rsplit('\n').next()?.trim_start() == first && first.starts_with('[') {
            return None;
        }
        let rest = if first.len() < text.len() { " …" } else { "" };
        Some(format!("{first}{rest}"))
    }

    /// The line that a span starts in.
    fn line(&self, span: &Span<usize>) -> usize {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        1 + before.bytes().filter(|&byte| byte == b'\n').count()
    }
}
