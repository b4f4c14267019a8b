//! From TOML to [`Config`], collecting everything that is wrong on the way.

use std::{collections::HashMap, ops::Range as Span, path::Path};

use keepalive_common::policy::{Keepalive, Policy, time_to_notice};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    CgroupPattern, Config, Diagnostic, Diagnostics, NamedPolicy,
    timer::{Default, Timer, Written},
};
use crate::{assignment::DEFAULT, duration};

/// Keys that every policy understands.
const POLICY_KEYS: [&str; 5] = ["keepalive", "idle", "interval", "probes", "user-timeout"];

pub(super) fn parse(path: &Path, text: &str) -> Result<(Config, Diagnostics), Diagnostics> {
    let mut reader = Reader {
        path,
        text,
        errors: Diagnostics::default(),
        warnings: Diagnostics::default(),
    };
    let (document, syntax_errors) = DeTable::parse_recoverable(text);
    if !syntax_errors.is_empty() {
        for error in syntax_errors {
            let span = error.span().unwrap_or(0..0);
            reader.error(&span, "", error.message());
        }
        return Err(reader.errors);
    }
    let config = reader.document(document.get_ref());
    if reader.errors.0.is_empty() {
        Ok((config, reader.warnings))
    } else {
        // Keys are read by topic; a person reads from the top.
        reader.errors.0.sort_by_key(|error| error.line);
        Err(reader.errors)
    }
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    errors: Diagnostics,
    warnings: Diagnostics,
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
        if name.is_empty() || name.len() > LONGEST || name.chars().any(char::is_control) {
            let message = format!("must have 1 to {LONGEST} characters and no control characters");
            self.wrong_value(section, "name", &message);
            return None;
        }
        if name == DEFAULT {
            let message = "is the name of the policy for unclaimed sockets: write it as [default]";
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
                _ => {}
            }
        }
        self.bound(section, key, timer).map(Default::Value)
    }

    /// With a user-timeout the kernel counts time, not probes
    /// (`tcp_keepalive_timer` in net/ipv4/tcp_timer.c).
    fn warn_of_user_timeout(&mut self, section: Section<'_, '_>, policy: &Policy) {
        let Some(value) = section.get(Timer::UserTimeout.key()) else {
            return;
        };
        let timeout = policy.user_timeout.effective(0);
        let (idle, interval, probes) = (
            policy.idle.effective(0),
            policy.interval.effective(0),
            policy.probes.effective(0),
        );
        let by_probes = time_to_notice(idle, interval, probes);
        if timeout == 0
            || policy.derives_user_timeout()
            || policy.keepalive() == Keepalive::Off
            || timeout == by_probes
        {
            return;
        }
        let shown = duration::show_milliseconds(timeout);
        let message = if u64::from(timeout) < u64::from(idle) * 1000 {
            format!(
                "is below idle {}: a dead peer is given up right after the first probe, \
                 and unacknowledged data after {shown}",
                duration::show_seconds(idle)
            )
        } else {
            format!(
                "cancels probes = {probes}: with a user-timeout the kernel gives up by time, \
                 here after {shown} instead of idle + interval × probes = {}; \
                 \"derive\" makes them agree",
                duration::show_milliseconds(by_probes)
            )
        };
        let warning = self.diagnostic(
            &value.span(),
            &section.path(Timer::UserTimeout.key()),
            Some(self.text[value.span()].to_owned()),
            &message,
        );
        self.warnings.0.push(warning);
    }

    fn unknown_keys(&mut self, section: Section<'_, '_>, known: &[&str]) {
        for key in section.table.keys() {
            if !known.contains(&key.get_ref().as_ref()) {
                let message = format!("unknown key; known here: {}", known.join(", "));
                self.error(&key.span(), &section.path(key.get_ref()), &message);
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
        let value = self.text.get(span.clone()).map(str::to_owned);
        let error = self.diagnostic(span, key, value, message);
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
    ) -> Diagnostic {
        Diagnostic {
            file: self.path.to_owned(),
            line: self.line(span),
            key: key.to_owned(),
            value,
            message: message.to_owned(),
        }
    }

    /// The line that a span starts in.
    fn line(&self, span: &Span<usize>) -> usize {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        1 + before.bytes().filter(|&byte| byte == b'\n').count()
    }
}
