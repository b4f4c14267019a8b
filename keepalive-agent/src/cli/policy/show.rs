//! `policy show`: every value and where it is written.

use anyhow::{Result, bail};
use keepalive_common::policy::Policy;
use serde::Serialize;
use tracing::warn;

use super::{Key, Origin, Show, output};
use crate::{
    assignment::DEFAULT,
    config::{Config, ConfigOrigins, NamedPolicy, Origins, SelfService, SelfServiceOrigins},
    enforcing::enforcing,
    identity::Selector,
};

/// A table of the config for machines.
#[derive(Serialize)]
struct Record<'a> {
    /// Who enforces it, with `--agent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<&'a str>,
    #[serde(flatten)]
    table: Table<'a>,
    /// Where it is named first.
    from: Option<Origin>,
    values: Vec<Row>,
}

/// What values are of.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
enum Table<'a> {
    /// The policy of this name.
    Policy(&'a str),
    /// What users may ask for.
    SelfService(bool),
}

/// A value of a table.
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
    let tables = tables(by, config, origins);
    if json {
        for record in tables {
            output::json(&record)?;
        }
        return Ok(());
    }
    let rows = tables.flat_map(|record| {
        let name = match record.table {
            Table::Policy(name) => name,
            Table::SelfService(_) => "[self-service]",
        };
        record.values.into_iter().map(move |value| {
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

/// The tables of a config, in the order in which they are shown.
fn tables<'a>(
    by: Option<&'a str>,
    config: &'a Config,
    origins: Option<&'a ConfigOrigins>,
) -> impl Iterator<Item = Record<'a>> {
    let policy = move |name, values, origins: Option<&Origins>| Record {
        by,
        table: Table::Policy(name),
        from: origins.map(|origins| origins.table.clone()),
        values,
    };
    let default = config.default.as_ref().map(|wishes| {
        let origins = origins.and_then(|origins| origins.default.as_ref());
        policy(DEFAULT, values(wishes, origins), origins)
    });
    let named = config
        .policies
        .iter()
        .enumerate()
        .map(move |(index, named)| {
            let origins = origins.and_then(|origins| origins.policies.get(index));
            let mut all = claims(named, origins);
            all.extend(values(&named.policy, origins));
            policy(&named.name, all, origins)
        });
    let self_service = config.self_service.as_ref().map(|service| {
        let origins = origins.and_then(|origins| origins.self_service.as_ref());
        Record {
            by,
            table: Table::SelfService(true),
            from: origins.map(|origins| Origin::Written(origins.table.clone())),
            values: allowed(service, origins),
        }
    });
    default.into_iter().chain(named).chain(self_service)
}

/// What users may ask for.
fn allowed(service: &SelfService, origins: Option<&SelfServiceOrigins>) -> Vec<Row> {
    let row = |(key, value)| Row {
        key,
        value,
        from: origins.map(|origins| match origins.keys.get(key) {
            Some(place) => Origin::Written(place.clone()),
            None => Origin::BuiltIn,
        }),
        default_from: None,
    };
    service.values().map(row).into()
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::config::read_files;

    fn shown(text: &str) -> (String, Vec<Value>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let merged = read_files(Some(file.path()), &[]).unwrap();
        let records = tables(None, &merged.config, Some(&merged.origins));
        let values = records.map(|record| serde_json::to_value(record).unwrap());
        (path_of(file.path()), values.collect())
    }

    fn path_of(path: &Path) -> String {
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn what_users_may_ask_for_is_shown_with_its_lines() {
        let (file, records) = shown(
            "[default]\n\n[self-service]\nidle = { at-least = '10s' }\n\
             commands-per-user = 4\n",
        );
        let [default, service] = &records[..] else {
            panic!("{records:?}")
        };
        assert_eq!(default["policy"], "default");
        assert!(default.get("self_service").is_none());
        assert!(service.get("policy").is_none());
        assert_eq!(service["self_service"], true);
        let place = |line: Option<u32>| {
            let file = line.map(|_| &file);
            json!({ "file": file, "line": line, "preset": null })
        };
        assert_eq!(service["from"], place(Some(3)));
        let values = service["values"].as_array().unwrap();
        let found: Vec<_> = values
            .iter()
            .map(|row| (row["key"].as_str().unwrap(), &row["value"], &row["from"]))
            .collect();
        let row = |key, value: &'static str, line| (key, json!(value), place(line));
        let expected = [
            row("idle", "at least 10s", Some(4)),
            row("interval", "any", None),
            row("probes", "any", None),
            row("user-timeout", "any", None),
            row("commands", "64", None),
            row("commands-per-user", "4", Some(5)),
        ];
        let expected: Vec<_> = expected
            .iter()
            .map(|(key, value, from)| (*key, value, from))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn without_the_table_nothing_is_said_of_users() {
        let (_, records) = shown("[default]\n");
        assert_eq!(records.len(), 1);
    }
}
