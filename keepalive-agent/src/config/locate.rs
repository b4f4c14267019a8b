//! Locate: which file and line each value of a merged config comes from.

use std::mem;

use super::{
    document::{Entry, Table},
    merge::{Base, Layers, layers_of},
    origin::{ConfigOrigins, Origin, Origins, SelfServiceOrigins, TimerOrigin},
    text::{At, Findings},
    timer::Timer,
};
use crate::identity::Attribute;

/// Where everything comes from.
pub(super) fn locate(findings: &Findings<'_>, layers: &Layers, base: Base) -> ConfigOrigins {
    let built_in = Origins::BUILT_IN;
    let default = match &layers.default {
        Some(table) => Some(policy(findings, table, &built_in)),
        None => (base == Base::BuiltIn).then_some(Origins::BUILT_IN),
    };
    let inherited = default.as_ref().unwrap_or(&built_in);
    let policies = layers.policies.iter();
    let policies = policies.map(|table| policy(findings, table, inherited));
    let self_service = layers.self_service.as_ref();
    ConfigOrigins {
        policies: policies.collect(),
        self_service: self_service.map(|table| {
            let keys = table.written();
            SelfServiceOrigins {
                table: findings.place(&table.at),
                keys: keys.map(|(key, at)| (key, findings.place(at))).collect(),
            }
        }),
        default,
    }
}

/// Where the values of a policy come from.
fn policy(findings: &Findings<'_>, table: &Table, inherited: &Origins) -> Origins {
    fn at<T>(entry: Option<&Entry<T>>) -> Option<&At> {
        Some(&entry?.at)
    }
    let place = |at: &At| findings.place(at);
    let written = |at: &At| Origin::Written(place(at));
    let mut origins = inherited.clone();
    origins.table = written(&table.at);
    let attributes = Attribute::ALL.iter().zip(&table.attributes);
    origins.attributes = attributes
        .filter_map(|(attribute, key)| Some((*attribute, place(at(key.as_deref())?))))
        .collect();
    for (origin, key) in [
        (&mut origins.cgroup, at(table.cgroup.as_deref())),
        (&mut origins.label, at(table.label.as_deref())),
        (&mut origins.remote, at(table.remote.as_deref())),
        (&mut origins.port, at(table.port.as_deref())),
        (&mut origins.local_port, at(table.local_port.as_deref())),
    ] {
        *origin = key.map(place);
    }
    origins.path = table
        .path()
        .map(|(preset, at)| (preset.path.clone(), place(at)));
    for (origin, key) in [
        (&mut origins.keepalive, at(table.keepalive.as_deref())),
        (&mut origins.enforce, at(table.enforce.as_deref())),
        (&mut origins.ignore, at(table.ignore.as_deref())),
        (&mut origins.give_up, at(table.give_up.as_deref())),
    ] {
        if let Some(at) = key {
            *origin = written(at);
        }
    }
    for timer in Timer::ALL {
        let origin = &mut origins.timers[timer as usize];
        for (value, at, preset) in layers_of(table, timer) {
            let from = match preset {
                Some(preset) => Origin::Preset {
                    path: preset.path.clone(),
                    place: place(at),
                },
                None => written(at),
            };
            let before = mem::replace(origin, TimerOrigin::new(from));
            if value.default.is_none() {
                origin.default_from = Some(before.default_from.unwrap_or(before.from));
            }
        }
    }
    origins
}
