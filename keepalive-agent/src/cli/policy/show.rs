//! `policy show`: every value and where it is written.

use anyhow::Result;
use keepalive_common::policy::Policy;
use serde::Serialize;
use tracing::warn;

use super::{Key, Origin, Show, output};
use crate::{
    assignment::DEFAULT,
    config::{NamedPolicy, Origins},
    identity::Selector,
};

/// A policy for machines.
#[derive(Serialize)]
struct Record<'a> {
    policy: &'a str,
    /// Where it is named first.
    from: &'a Origin,
    values: Vec<Row>,
}

/// A value of a policy.
#[derive(Serialize)]
struct Row {
    key: &'static str,
    value: String,
    from: Origin,
    /// Where the default of a timer is from, when its bounds are written
    /// without one.
    default_from: Option<Origin>,
}

pub(super) fn show(arguments: &Show) -> Result<()> {
    let merged = arguments.files.sources().read()?;
    for warning in &merged.warnings.0 {
        warn!("{warning}");
    }
    let default = merged
        .config
        .default
        .as_ref()
        .zip(merged.origins.default.as_ref());
    let default = default.map(|(policy, origins)| (DEFAULT, values(policy, origins), origins));
    let named = merged.config.policies.iter().zip(&merged.origins.policies);
    let named = named.map(|(named, origins)| {
        let mut all = claims(named, origins);
        all.extend(values(&named.policy, origins));
        (named.name.as_str(), all, origins)
    });
    let policies = default.into_iter().chain(named);
    if arguments.json {
        for (policy, values, origins) in policies {
            output::json(&Record {
                policy,
                from: &origins.table,
                values,
            })?;
        }
        return Ok(());
    }
    let rows = policies.flat_map(|(name, values, _)| {
        values.into_iter().map(move |value| {
            let default = value.default_from.map(|from| format!(", default {from}"));
            [
                name.to_owned(),
                value.key.to_owned(),
                value.value,
                format!("{}{}", value.from, default.unwrap_or_default()),
            ]
        })
    });
    output::table(["POLICY", "KEY", "VALUE", "FROM"], rows)?;
    if merged.config.default.is_none() {
        output::text("\nno [default]: connections that no policy claims are left alone\n")?;
    }
    Ok(())
}

/// What a policy is for.
fn claims(named: &NamedPolicy, origins: &Origins) -> Vec<Row> {
    fn list<T: ToString>(items: &[T]) -> String {
        let items: Vec<_> = items.iter().map(ToString::to_string).collect();
        items.join(", ")
    }
    let Selector { attributes, labels } = &named.selector;
    let labels: Vec<_> = labels
        .iter()
        .map(|(key, pattern)| format!("{key} = {pattern}"))
        .collect();
    let attributes = attributes
        .iter()
        .map(|(attribute, patterns)| (Key::Of(*attribute), list(patterns)));
    [(Key::Cgroup, list(&named.cgroups))]
        .into_iter()
        .chain(attributes)
        .chain([
            (Key::Label, list(&labels)),
            (Key::Remote, list(&named.rules.remotes)),
            (Key::Port, list(&named.rules.ports)),
            (Key::LocalPort, list(&named.rules.local_ports)),
        ])
        .filter_map(|(key, value)| {
            Some(Row {
                key: key.name(),
                value,
                from: Origin::Written(key.origin(origins)?.clone()),
                default_from: None,
            })
        })
        .collect()
}

/// What it wants.
fn values(policy: &Policy, origins: &Origins) -> Vec<Row> {
    let [keepalive, wishes @ .., give_up] = output::wishes(policy);
    let value = |key: Key, value: String, from: &Origin| Row {
        key: key.name(),
        value,
        from: from.clone(),
        default_from: None,
    };
    let mut values = vec![value(Key::Keepalive, keepalive, &origins.keepalive)];
    for ((key, wish), origin) in Key::TIMERS.into_iter().zip(wishes).zip(&origins.timers) {
        values.push(Row {
            default_from: origin.default_from.clone(),
            ..value(key, wish, &origin.from)
        });
    }
    values.push(value(Key::GiveUp, give_up, &origins.give_up));
    let ignore = policy.ignores().to_string();
    values.push(value(Key::Ignore, ignore, &origins.ignore));
    let enforce = policy.is_enforced().to_string();
    values.push(value(Key::Enforce, enforce, &origins.enforce));
    if let Some((path, place)) = &origins.path {
        let from = Origin::Written(place.clone());
        values.push(value(Key::Path, path.clone(), &from));
    }
    values
}
