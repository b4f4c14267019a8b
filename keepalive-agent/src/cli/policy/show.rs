//! `policy show`: every value and where it is written.

use anyhow::{Result, bail};
use keepalive_common::policy::Policy;
use serde::Serialize;
use tracing::warn;

use super::{Key, Origin, Show, output};
use crate::{
    assignment::DEFAULT,
    config::{Config, ConfigOrigins, NamedPolicy, Origins},
    enforcing::enforcing,
    identity::Selector,
};

/// A policy for machines.
#[derive(Serialize)]
struct Record<'a> {
    /// Who enforces it, with `--agent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<&'a str>,
    policy: &'a str,
    /// Where it is named first.
    from: Option<&'a Origin>,
    values: Vec<Row>,
}

/// A value of a policy.
#[derive(Serialize)]
struct Row {
    key: &'static str,
    value: String,
    /// None where the files say something else by now.
    from: Option<Origin>,
    /// Where the default of a timer is from, when its bounds are written
    /// without one.
    default_from: Option<Origin>,
}

pub(super) fn show(arguments: &Show) -> Result<()> {
    if arguments.agent {
        return show_agents(arguments.json);
    }
    let merged = arguments.files.sources().read()?;
    for warning in &merged.warnings.0 {
        warn!("{warning}");
    }
    print(None, &merged.config, Some(&merged.origins), arguments.json)
}

/// What is in force, whoever put it there.
fn show_agents(json: bool) -> Result<()> {
    let in_force = enforcing()?;
    if in_force.is_empty() {
        bail!("nothing is in force: without --agent the files are shown");
    }
    for agent in in_force {
        let name = agent.name();
        let files = agent.files();
        if !json {
            output::text(format_args!("{name}\n"))?;
        }
        let origins = files.as_ref().map(|files| &files.origins);
        print(Some(&name), &agent.config, origins, json)?;
        if files.is_none() {
            warn!("the files of {name} say something else by now, or cannot be read");
        }
        if let Some(error) = agent.error {
            warn!("{name} goes on with this, because of what it read last: {error}");
        }
    }
    Ok(())
}

/// The values of a config, and where they are from.
fn print(
    by: Option<&str>,
    config: &Config,
    origins: Option<&ConfigOrigins>,
    json: bool,
) -> Result<()> {
    let default = config.default.as_ref().map(|policy| {
        let origins = origins.and_then(|origins| origins.default.as_ref());
        (DEFAULT, values(policy, origins), origins)
    });
    let named = config.policies.iter().enumerate().map(|(index, named)| {
        let origins = origins.and_then(|origins| origins.policies.get(index));
        let mut all = claims(named, origins);
        all.extend(values(&named.policy, origins));
        (named.name.as_str(), all, origins)
    });
    let policies = default.into_iter().chain(named);
    if json {
        for (policy, values, origins) in policies {
            output::json(&Record {
                by,
                policy,
                from: origins.map(|origins| &origins.table),
                values,
            })?;
        }
        return Ok(());
    }
    let rows = policies.flat_map(|(name, values, _)| {
        values.into_iter().map(move |value| {
            let default = value.default_from.map(|from| format!(", default {from}"));
            let from = value
                .from
                .map_or_else(|| "?".to_owned(), |from| from.to_string());
            [
                name.to_owned(),
                value.key.to_owned(),
                value.value,
                from + &default.unwrap_or_default(),
            ]
        })
    });
    output::table(["POLICY", "KEY", "VALUE", "FROM"], rows)?;
    if config.default.is_none() {
        output::text("\nno [default]: connections that no policy claims are left alone\n")?;
    }
    Ok(())
}

/// What a policy is for.
fn claims(named: &NamedPolicy, origins: Option<&Origins>) -> Vec<Row> {
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
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| Row {
            key: key.name(),
            value,
            from: origins
                .and_then(|origins| key.origin(origins))
                .map(|place| Origin::Written(place.clone())),
            default_from: None,
        })
        .collect()
}

/// What it wants.
fn values(policy: &Policy, origins: Option<&Origins>) -> Vec<Row> {
    let [keepalive, wishes @ .., give_up] = output::wishes(policy);
    let value = |key: Key, value: String, from: fn(&Origins) -> &Origin| Row {
        key: key.name(),
        value,
        from: origins.map(from).cloned(),
        default_from: None,
    };
    let mut values = vec![value(Key::Keepalive, keepalive, |from| &from.keepalive)];
    for (index, (key, wish)) in Key::TIMERS.into_iter().zip(wishes).enumerate() {
        let timer = origins.map(|origins| &origins.timers[index]);
        values.push(Row {
            key: key.name(),
            value: wish,
            from: timer.map(|timer| timer.from.clone()),
            default_from: timer.and_then(|timer| timer.default_from.clone()),
        });
    }
    values.push(value(Key::GiveUp, give_up, |from| &from.give_up));
    values.push(value(Key::Ignore, policy.ignores().to_string(), |from| {
        &from.ignore
    }));
    values.push(value(
        Key::Enforce,
        policy.is_enforced().to_string(),
        |from| &from.enforce,
    ));
    if let Some((path, place)) = origins.and_then(|origins| origins.path.as_ref()) {
        values.push(Row {
            key: Key::Path.name(),
            value: path.clone(),
            from: Some(Origin::Written(place.clone())),
            default_from: None,
        });
    }
    values
}
