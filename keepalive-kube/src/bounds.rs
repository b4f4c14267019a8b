//! Bounds: a policy of a namespace stays within those of the cluster.

use keepalive_common::policy::{Keepalive, Policy as Values, Range};

use crate::policy::{Policy, Refusal};

/// A timer: its key, its range, and what its bounds are counted in.
struct Timer {
    key: &'static str,
    range: fn(&Values) -> &Range,
    /// Follows a number in TOML; empty for what is counted.
    unit: &'static str,
}

const TIMERS: [Timer; 4] = [
    Timer {
        key: "idle",
        range: |values| &values.idle,
        unit: "s",
    },
    Timer {
        key: "interval",
        range: |values| &values.interval,
        unit: "s",
    },
    Timer {
        key: "probes",
        range: |values| &values.probes,
        unit: "",
    },
    Timer {
        key: "user-timeout",
        range: |values| &values.user_timeout,
        unit: "ms",
    },
];

/// The keys of a policy with the bounds of these policies of the cluster added.
///
/// # Errors
///
/// [`Refusal::OutOfBounds`] when the policy writes a value that one of them does
/// not allow, or gets out of their reach.
pub fn within(policy: &Policy, cluster: &[&Policy]) -> Result<toml::Table, Refusal> {
    let mut keys = policy.keys.clone();
    let mut narrowed = TIMERS.map(|timer| Narrowed::new((timer.range)(&policy.values)));
    // One that is only tried, or touches nothing, bounds nothing.
    let binding = |above: &&&Policy| above.values.is_enforced() && !above.values.ignores();
    for above in cluster.iter().filter(binding) {
        let values = &above.values;
        let refuse = |key: &str, why: &str| {
            let by = format!("ClusterKeepalivePolicy {}", above.id);
            Err(Refusal::OutOfBounds(format!("spec.{key}: {by} {why}")))
        };
        if let Some((word, wish)) = holds(values) {
            if policy.keys.contains_key("keepalive") && policy.values.keepalive() != wish {
                return refuse("keepalive", &format!("says {word:?} for everyone"));
            }
            keys.insert("keepalive".to_owned(), word.into());
        }
        let mut bounds_any = holds(values).is_some();
        for (timer, narrowed) in TIMERS.iter().zip(&mut narrowed) {
            let bounds = (timer.range)(values);
            let derives = timer.key == "user-timeout" && values.derives_at_least();
            if !is_bounded(bounds) && !derives {
                continue;
            }
            bounds_any = true;
            if let Some(why) = timer.not_allowed(policy, bounds) {
                return refuse(timer.key, &why);
            }
            narrowed.add(bounds, derives);
        }
        if bounds_any && policy.values.ignores() {
            return refuse("ignore", "has bounds, which nobody may ignore");
        }
        if bounds_any && !policy.values.is_enforced() {
            return refuse("enforce", "has bounds, which a trial would lift");
        }
    }
    for (timer, narrowed) in TIMERS.iter().zip(narrowed) {
        if narrowed.is_narrower {
            let table = timer.table(keys.get(timer.key), &narrowed);
            keys.insert(timer.key.to_owned(), table);
        }
    }
    Ok(keys)
}

/// The bounds of a policy and of those of the cluster together.
struct Narrowed {
    at_least: u32,
    at_most: u32,
    /// Whether the lower bound follows from the other timers.
    derives: bool,
    /// Whether the cluster says anything.
    is_narrower: bool,
}

impl Narrowed {
    const fn new(own: &Range) -> Self {
        Self {
            at_least: own.at_least,
            at_most: own.at_most,
            derives: false,
            is_narrower: false,
        }
    }

    fn add(&mut self, bounds: &Range, derives: bool) {
        self.at_least = self.at_least.max(bounds.at_least);
        self.at_most = self.at_most.min(bounds.at_most);
        self.derives |= derives;
        self.is_narrower = true;
    }
}

impl Timer {
    /// Why a value that a policy writes is not allowed. Its own bounds may be
    /// wider: the narrower ones hold.
    fn not_allowed(&self, policy: &Policy, bounds: &Range) -> Option<String> {
        let range = (self.range)(&policy.values);
        let written = policy.keys.get(self.key)?;
        let table = written.as_table();
        let has = |key: &str| table.is_some_and(|table| table.contains_key(key));
        let fills = match table {
            Some(table) => table.get("default").or(table.get("exactly")),
            None => Some(written),
        };
        let is_left = fills.and_then(toml::Value::as_str) == Some("leave");
        if is_left && bounds.default != 0 {
            return Some("bounds it, and what is left to the kernel has no bounds".to_owned());
        }
        let is_within = |value: &u32| (bounds.at_least..=bounds.at_most).contains(value);
        // Words that follow from something else, 0 here, are moved into bounds.
        let wrong = [
            fills
                .map(|_| range.default)
                .filter(|value| *value != 0 && !is_within(value)),
            has("at-least")
                .then_some(range.at_least)
                .filter(|least| *least > bounds.at_most),
            has("at-most")
                .then_some(range.at_most)
                .filter(|most| *most < bounds.at_least),
        ];
        let value = wrong.into_iter().flatten().next()?;
        let bound = |word: &str, bound: u32| format!(" {word} {bound}{}", self.unit);
        let at_least = (bounds.at_least > 0).then(|| bound("at least", bounds.at_least));
        let at_most = (bounds.at_most < u32::MAX).then(|| bound("at most", bounds.at_most));
        let bounds: String = at_least.into_iter().chain(at_most).collect();
        Some(format!("does not allow {value}{}:{bounds}", self.unit))
    }

    /// What is written, with other bounds.
    fn table(&self, written: Option<&toml::Value>, bounds: &Narrowed) -> toml::Value {
        let mut table = match written.cloned() {
            Some(toml::Value::Table(table)) => table,
            Some(value) => toml::Table::from_iter([("default".to_owned(), value)]),
            None => toml::Table::new(),
        };
        if let Some(exactly) = table.remove("exactly") {
            table.insert("default".to_owned(), exactly);
        }
        let value = |number: u32| match self.unit {
            "" => toml::Value::Integer(number.into()),
            unit => toml::Value::String(format!("{number}{unit}")),
        };
        if bounds.derives {
            table.insert("at-least".to_owned(), "derive".into());
        } else if bounds.at_least > 0 {
            table.insert("at-least".to_owned(), value(bounds.at_least));
        }
        if bounds.at_most < u32::MAX {
            table.insert("at-most".to_owned(), value(bounds.at_most));
        }
        toml::Value::Table(table)
    }
}

fn is_bounded(range: &Range) -> bool {
    range.at_least > 0 || range.at_most < u32::MAX
}

/// What holds for SO_KEEPALIVE at every moment.
fn holds(values: &Values) -> Option<(&'static str, Keepalive)> {
    match values.keepalive() {
        Keepalive::Always => Some(("always", Keepalive::Always)),
        Keepalive::Never => Some(("never", Keepalive::Never)),
        Keepalive::On | Keepalive::Off | Keepalive::Leave => None,
    }
}
