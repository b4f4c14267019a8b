//! From what several texts say to one [`Config`]: later ones override earlier
//! ones key by key, and each policy is completed.

use std::collections::HashMap;

use keepalive_common::{
    environment::Environment,
    plan::{Options, plan_unset},
    policy::{MAX_SECONDS, Policy, Range, time_to_notice},
};

use super::{
    Config, NamedPolicy,
    document::{Document, Entry, Optional, Table},
    preset::{PROBES, Preset},
    self_service,
    text::{At, Findings},
    timer::{Timer, Written},
};
use crate::{
    duration,
    identity::{Attribute, Selector},
    paths,
    rules::Rules,
};

/// What holds before the first text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Base {
    /// The built-in policy for everyone.
    BuiltIn,
    /// Nothing: what no text claims is left alone.
    Nothing,
}

/// Finds out where the values of a config come from: [`super::locate`], or nothing for whoever
/// does not ask. Of thousands of policies that is more than the config.
pub(super) type Locate<O> = fn(&Findings<'_>, &Layers, Base) -> O;

/// Merges the documents in this order. What is wrong goes to the findings, and the
/// result is worth nothing then.
pub(super) fn merge<O>(
    findings: &mut Findings<'_>,
    base: Base,
    documents: impl IntoIterator<Item = Document>,
    origins: Locate<O>,
) -> (Config, O) {
    let mut layers = Layers::default();
    for document in documents {
        layers.add(document);
    }
    let default_policy = match &layers.default {
        Some(table) => Some(complete(findings, table, Policy::BUILT_IN)),
        None => (base == Base::BuiltIn).then_some(Policy::BUILT_IN),
    };
    let origins = origins(findings, &layers, base);
    let inherited = default_policy.unwrap_or(Policy::BUILT_IN);
    let policies = layers.policies.into_iter();
    let policies = policies.map(|table| named(findings, table, inherited));
    let config = Config {
        default: default_policy,
        policies: policies.collect(),
        self_service: layers
            .self_service
            .as_ref()
            .map(self_service::Table::complete),
    };
    (config, origins)
}

/// What a table says of a timer, what overrides the rest last: by which preset, if so.
pub(super) fn layers_of(
    table: &Table,
    timer: Timer,
) -> impl Iterator<Item = (Written, &At, Option<&Preset>)> {
    let preset = table
        .path()
        .and_then(|(preset, at)| Some((preset.timer(timer)?, at, Some(preset))));
    let own =
        value(table.timers[timer as usize].as_deref()).map(|(written, at)| (*written, at, None));
    preset.into_iter().chain(own)
}

/// What the texts so far say.
#[derive(Default)]
pub(super) struct Layers {
    pub(super) default: Option<Table>,
    pub(super) policies: Vec<Table>,
    by_name: HashMap<String, usize>,
    pub(super) self_service: Option<self_service::Table>,
}

impl Layers {
    fn add(&mut self, document: Document) {
        if let Some(later) = document.self_service {
            match &mut self.self_service {
                Some(table) => table.override_with(later),
                None => self.self_service = Some(later),
            }
        }
        if let Some(later) = document.default {
            match &mut self.default {
                Some(table) => table.override_with(later),
                None => self.default = Some(later),
            }
        }
        for later in document.policies {
            // One without a right name is completed by itself, to find out
            // whether it is right otherwise.
            let name = later.name.as_ref().and_then(|name| name.value.clone());
            let known = name.as_ref().and_then(|name| self.by_name.get(name));
            if let Some(index) = known {
                self.policies[*index].override_with(later);
                continue;
            }
            self.by_name
                .extend(name.map(|name| (name, self.policies.len())));
            self.policies.push(later);
        }
    }
}

impl Table {
    /// Each key that the later table mentions is taken from there. The table
    /// keeps its own place.
    fn override_with(&mut self, later: Self) {
        fn key<T>(of: &mut Option<T>, later: Option<T>) {
            if later.is_some() {
                *of = later;
            }
        }
        let Self {
            section: _,
            at: _,
            name: _,
            cgroup,
            attributes,
            label,
            remote,
            port,
            local_port,
            keepalive,
            timers,
            give_up,
            enforce,
            ignore,
            path,
        } = later;
        key(&mut self.cgroup, cgroup);
        for (attribute, later) in self.attributes.iter_mut().zip(attributes) {
            key(attribute, later);
        }
        key(&mut self.label, label);
        key(&mut self.remote, remote);
        key(&mut self.port, port);
        key(&mut self.local_port, local_port);
        key(&mut self.keepalive, keepalive);
        for (timer, later) in self.timers.iter_mut().zip(timers) {
            key(timer, later);
        }
        key(&mut self.give_up, give_up);
        key(&mut self.enforce, enforce);
        key(&mut self.ignore, ignore);
        key(&mut self.path, path);
    }

    /// The first key that says what a cgroup has to be, and where its value stands.
    fn selector_at(&self) -> Option<(&'static str, &At)> {
        let attributes = Attribute::ALL.iter().zip(&self.attributes);
        attributes
            .filter_map(|(attribute, entry)| Some((attribute.key(), &entry.as_ref()?.at)))
            .chain(self.label.iter().map(|entry| ("label", &entry.at)))
            .next()
    }

    pub(super) fn path(&self) -> Option<(&Preset, &At)> {
        let entry = self.path.as_ref()?;
        Some((entry.value.as_ref()?, &entry.at))
    }

    /// The first of the keys that is written, and where its value stands.
    fn first_of(&self, keys: &[Key]) -> Option<(Key, &At)> {
        keys.iter().find_map(|key| {
            let at = match key {
                Key::Keepalive => self.keepalive.as_ref().map(|entry| &entry.at),
                Key::Path => self.path.as_ref().map(|entry| &entry.at),
                Key::GiveUp => self.give_up.as_ref().map(|entry| &entry.at),
                Key::Timer(timer) => {
                    let entry = self.timers[*timer as usize].as_ref();
                    entry.map(|entry| &entry.at)
                }
            };
            Some((*key, at?))
        })
    }
}

/// A key that a warning can be about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    Keepalive,
    Path,
    GiveUp,
    Timer(Timer),
}

impl Key {
    fn of(self, table: &Table) -> String {
        let key = match self {
            Self::Keepalive => "keepalive",
            Self::Path => "path",
            Self::GiveUp => "give-up",
            Self::Timer(timer) => timer.key(),
        };
        format!("{}.{key}", table.section)
    }
}

/// A policy for some cgroups or remote ends, completed from another one.
fn named(findings: &mut Findings<'_>, mut table: Table, inherited: Policy) -> NamedPolicy {
    let selector = table.selector_at();
    let claims = table.cgroup.is_some()
        || selector.is_some()
        || table.remote.is_some()
        || table.port.is_some()
        || table.local_port.is_some();
    if !claims {
        let message = "has no cgroup, unit, container, remote, port or local-port: add cgroup = \"/…\", \
                       or use [default] for everything";
        findings.error(&table.at, table.section, message);
    }
    if let (Some(cgroup), Some((key, _))) = (&table.cgroup, &selector) {
        let message = format!(
            "stands beside {key}: a policy is for cgroups by their paths or by what they are; \
             remove one of the two, or make it two policies"
        );
        let key = format!("{}.cgroup", table.section);
        findings.error(&cgroup.at, &key, &message);
    }
    let policy = complete(findings, &table, inherited);
    NamedPolicy {
        name: take(&mut table.name),
        cgroups: take(&mut table.cgroup),
        selector: Selector {
            attributes: Attribute::ALL
                .into_iter()
                .zip(table.attributes.iter_mut().map(take))
                .filter(|(_, patterns)| !patterns.is_empty())
                .collect(),
            labels: take(&mut table.label),
        },
        rules: Rules {
            remotes: take(&mut table.remote),
            ports: take(&mut table.port),
            local_ports: take(&mut table.local_port),
        },
        policy,
    }
}

/// A policy, completed from another one, with the findings of that.
fn complete(findings: &mut Findings<'_>, table: &Table, inherited: Policy) -> Policy {
    let mut policy = inherited;
    if let Some((keepalive, _)) = value(table.keepalive.as_deref()) {
        policy = policy.with_keepalive(*keepalive);
    }
    if let Some((enforce, _)) = value(table.enforce.as_deref()) {
        policy = policy.with_enforcement(*enforce);
    }
    if let Some((ignore, _)) = value(table.ignore.as_deref()) {
        policy = policy.with_ignore(*ignore);
    }
    if let Some((give_up, _)) = value(table.give_up.as_deref()) {
        policy.give_up = *give_up;
    }
    for timer in Timer::ALL {
        for (written, ..) in layers_of(table, timer) {
            written.complete(timer, &mut policy);
        }
    }
    if !policy.ignores() {
        warn_of_user_timeout(findings, table, &policy);
        warn_of_give_up(findings, table, &policy);
        warn_of_path(findings, table, &policy);
    }
    policy
}

/// With a user-timeout the kernel counts time, not probes
/// (`tcp_keepalive_timer` in net/ipv4/tcp_timer.c). The table that brings
/// the two together is warned of, even when it inherits one of them.
fn warn_of_user_timeout(findings: &mut Findings<'_>, table: &Table, policy: &Policy) {
    let own = Key::Timer(Timer::UserTimeout);
    let keys = [
        own,
        Key::Timer(Timer::Idle),
        Key::Timer(Timer::Interval),
        Key::Timer(Timer::Probes),
        Key::Path,
        Key::Keepalive,
    ];
    let Some((key, at)) = table.first_of(&keys) else {
        return;
    };
    let wants = given(policy);
    let by_probes = time_to_notice(wants.idle, wants.interval, wants.probes);
    if wants.user_timeout == 0 {
        return;
    }
    if policy.derives_user_timeout() && policy.user_timeout.at_most > wants.user_timeout {
        // Whoever writes a time has thought of one.
        if key == own {
            let message = format!(
                "also ends connections whose peer answers but reads nothing for that long \
                 (here {}); give-up spares them",
                duration::show_milliseconds(wants.user_timeout)
            );
            findings.warning(at, &key.of(table), &message);
        }
        return;
    }
    if policy.keepalive().turns_off() || wants.user_timeout == by_probes {
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
    findings.warning(at, &key.of(table), &message);
}

/// Data in flight is given up sooner than a silent connection: the outages
/// that keepalive allows for end connections that happen to send.
fn warn_of_give_up(findings: &mut Findings<'_>, table: &Table, policy: &Policy) {
    let keys = [
        Key::GiveUp,
        Key::Timer(Timer::Interval),
        Key::Timer(Timer::Probes),
        Key::Path,
    ];
    let Some((key, at)) = table.first_of(&keys) else {
        return;
    };
    let wants = given(policy);
    let outage = time_to_notice(0, wants.interval, wants.probes.saturating_sub(1));
    if policy.give_up == 0 || policy.give_up >= outage || policy.keepalive().turns_off() {
        return;
    }
    let give_up = duration::show_milliseconds(policy.give_up);
    let subject = if key == Key::GiveUp {
        String::new()
    } else {
        format!("give-up {give_up} ")
    };
    let message = format!(
        "{subject}is below interval × (probes − 1) = {}: an outage that silent connections \
         survive ends those that send during it",
        duration::show_milliseconds(outage)
    );
    findings.warning(at, &key.of(table), &message);
}

/// A path that the other keys of its table do not keep open.
fn warn_of_path(findings: &mut Findings<'_>, table: &Table, policy: &Policy) {
    let Some((preset, path_at)) = table.path() else {
        return;
    };
    let Some(message) = not_kept_open(preset, policy) else {
        return;
    };
    // With what a preset chooses alone, keepalive is all that can be amiss.
    let keys = if policy.keepalive().turns_off() {
        [Key::Keepalive, Key::Path, Key::Path]
    } else {
        [Timer::Idle, Timer::Interval, Timer::Probes].map(Key::Timer)
    };
    let (key, at) = table.first_of(&keys).unwrap_or((Key::Path, path_at));
    findings.warning(at, &key.of(table), &message);
}

/// Why a policy does not keep a path open, with two probes lost.
fn not_kept_open(preset: &Preset, policy: &Policy) -> Option<String> {
    let Preset { path, timeout } = preset;
    let path = if paths::ALL.iter().any(|known| known.name == path) {
        format!("path {path} ({timeout})")
    } else {
        format!("path {path}")
    };
    if policy.keepalive().turns_off() {
        return Some(format!(
            "{path} is not kept open: keepalive is off, no probe goes out"
        ));
    }
    let wants = given(policy);
    let show = duration::show_seconds;
    if !timeout.is_kept_open_by(wants.idle, wants.interval) {
        return Some(format!(
            "{path} is not kept open with two probes lost: idle {} + 2 × interval {} is not below \
             it",
            show(wants.idle),
            show(wants.interval)
        ));
    }
    if wants.probes < PROBES {
        return Some(format!(
            "{path} is not kept open with two probes lost: after probes = {} the connection ends",
            wants.probes
        ));
    }
    let most = |range: &Range| range.at_most.min(MAX_SECONDS);
    let (idle, interval) = (most(&policy.idle), most(&policy.interval));
    if !timeout.is_kept_open_by(idle, interval) {
        return Some(format!(
            "{path} is not kept open where an application sets more: idle up to {} and interval up \
             to {} are let through; lower at-most",
            show(idle),
            show(interval)
        ));
    }
    (policy.probes.at_least < PROBES).then(|| {
        format!(
            "{path} is not kept open with two probes lost where an application sets fewer probes; \
             add at-least = {PROBES}"
        )
    })
}

/// What a policy gives to a connection on which nothing is set, where no sysctl
/// was changed.
fn given(policy: &Policy) -> Options {
    plan_unset(policy, &Environment::UNCHANGED)
}

/// A value that is written and right, and where.
fn value<T>(entry: Option<&Entry<T>>) -> Option<(&T, &At)> {
    let entry = entry?;
    Some((entry.value.as_ref()?, &entry.at))
}

fn take<T: Default>(entry: &mut Optional<T>) -> T {
    let value = entry.as_mut().and_then(|entry| entry.value.take());
    value.unwrap_or_default()
}
