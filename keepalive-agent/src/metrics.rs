//! Metrics: what the agent counts and knows, for monitoring.
//!
//! Each statistic is described once, in [`STATISTICS`]: its name, kind, help and
//! labels, and how it is read. What is served and the table in docs/metrics.md
//! come from there. Labels are bounded: names of policies, causes, options and
//! parts, never addresses.

mod connections;
pub mod server;

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    sync::{Arc, Mutex, PoisonError},
};

use keepalive_common::{
    counters::{Counters, Direction},
    dead_peer::{BUCKETS, Cause, upper_bound},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, text},
    metrics::{MetricType, exemplar::Exemplar},
    registry::Registry,
};

use crate::{
    VERSION,
    datapath::{Counted, Done, Error, Evidence, PartStatus, Refusals, SetRecord, State, Usage},
    paths,
};
use connections::{OfPolicy, Tally};

/// What kind of number a statistic is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, as long as policies are in force.
    Counter,
    /// May be any number at any time.
    Gauge,
    /// Counts by size.
    Histogram,
    /// Always 1; what there is to know stands in the labels.
    Info,
}

/// A statistic.
pub struct Statistic {
    /// Its name, without the ending that its kind has in a sample.
    name: &'static str,
    kind: Kind,
    help: &'static str,
    labels: &'static [&'static str],
    read: fn(&Snapshot) -> Vec<Sample>,
}

/// One value of a statistic.
struct Sample {
    labels: Vec<String>,
    value: Value,
}

#[derive(Clone, Copy)]
enum Value {
    Number(u64),
    Histogram {
        seconds: f64,
        buckets: [u64; BUCKETS],
    },
}

/// Everything at one moment.
#[derive(Debug)]
struct Snapshot {
    in_force: bool,
    done: Vec<(Counted, Done)>,
    refusals: Vec<Refusals>,
    usage: Vec<Usage>,
    state: State,
    built_at: u64,
    /// None where they could not be counted.
    connections: Option<Arc<Tally>>,
}

/// All there are, in the order in which they are shown.
pub const STATISTICS: [Statistic; 27] = [
    Statistic {
        name: "keepalive_build",
        kind: Kind::Info,
        help: "The version of the agent",
        labels: &["version"],
        read: |_| vec![sample([VERSION], 1)],
    },
    Statistic {
        name: "keepalive_in_force",
        kind: Kind::Gauge,
        help: "1 if the agent's program is the one that runs for the cgroup",
        labels: &[],
        read: |now| vec![sample([], u64::from(now.in_force))],
    },
    Statistic {
        name: "keepalive_policy_set_built_timestamp_seconds",
        kind: Kind::Gauge,
        help: "When the policies in force were put together, in seconds since 1970",
        labels: &[],
        read: |now| vec![sample([], now.built_at)],
    },
    Statistic {
        name: "keepalive_connections",
        kind: Kind::Gauge,
        help: "Connections that there are now, with keepalive on (protected) or off, whoever set \
               it; each end by itself",
        labels: &["policy", "state"],
        read: connections_now,
    },
    Statistic {
        name: "keepalive_at_risk_connections",
        kind: Kind::Gauge,
        help: "Connections that such a path would forget in a silence, were they on it: keepalive is \
               off, or its third probe comes too late; those within the machine do not count",
        labels: &["path"],
        read: |now| {
            let tally = now.connections.iter();
            tally
                .flat_map(|tally| paths::ALL.into_iter().zip(tally.at_risk))
                .map(|(middlebox, count)| sample([middlebox.name], count))
                .collect()
        },
    },
    Statistic {
        name: "keepalive_connections_counted_timestamp_seconds",
        kind: Kind::Gauge,
        help: "When the connections were counted that there are now, in seconds since 1970",
        labels: &[],
        read: |now| {
            let tally = now.connections.iter();
            tally.map(|tally| sample([], tally.counted_at)).collect()
        },
    },
    Statistic {
        name: "keepalive_connections_missed_namespaces",
        kind: Kind::Gauge,
        help: "Network namespaces of which connections could not be counted, or not all",
        labels: &[],
        read: |now| {
            let tally = now.connections.iter();
            tally
                .map(|tally| sample([], tally.missed_namespaces))
                .collect()
        },
    },
    Statistic {
        name: "keepalive_connections_established",
        kind: Kind::Counter,
        help: "Connections that were established under a policy, each end by itself; unclaimed is \
               what no policy claims",
        labels: &["policy", "mode", "direction", "outcome"],
        read: |now| {
            let mut samples = Vec::new();
            for direction in Direction::ALL {
                let index = direction as usize;
                for_outcomes(
                    now,
                    |done| {
                        let Counters {
                            seen, left_alone, ..
                        } = &done.established;
                        let of = |counts: &[u64]| counts.get(index).copied().unwrap_or_default();
                        (of(seen), of(left_alone))
                    },
                    |policy, mode, outcome, count| {
                        samples.push(sample([policy, mode, direction.name(), outcome], count));
                    },
                );
            }
            samples
        },
    },
    Statistic {
        name: "keepalive_connections_swept",
        kind: Kind::Counter,
        help: "Connections that were there already when a policy came into force",
        labels: &["policy", "mode", "outcome"],
        read: |now| {
            let mut samples = Vec::new();
            for_outcomes(
                now,
                |done| (done.existing.seen(), done.existing.left_alone()),
                |policy, mode, outcome, count| {
                    samples.push(sample([policy, mode, outcome], count));
                },
            );
            samples
        },
    },
    Statistic {
        name: "keepalive_options_set",
        kind: Kind::Counter,
        help: "Options that were set, or would have been in dry run: keepalive turned on or off, \
               timers filled in, moved into bounds, or given back to the application",
        labels: &["policy", "mode", "change"],
        read: changes,
    },
    Statistic {
        name: "keepalive_user_timeout_conflicts",
        kind: Kind::Counter,
        help: "Connections whose keepalive was left as it is, because the application's \
               user-timeout would have ended them early; a user-timeout at least derived is the cure",
        labels: &["policy", "mode"],
        read: |now| both(now, |counters| counters.user_timeout_conflict),
    },
    Statistic {
        name: "keepalive_give_ups_unsupported",
        kind: Kind::Counter,
        help: "Connections without the give-up of their policy, because the kernel has no \
               TCP_RTO_MAX_MS (before Linux 6.15)",
        labels: &["policy", "mode"],
        read: |now| both(now, |counters| counters.give_up_unsupported),
    },
    Statistic {
        name: "keepalive_refusals",
        kind: Kind::Counter,
        help: "Options that the kernel refused to set; the connections go on without them",
        labels: &["policy", "option", "errno"],
        read: |now| {
            let refused = now.refusals.iter().map(|refused| {
                let errno = refused.errno.to_string();
                sample([&refused.policy, &refused.option, &errno], refused.count)
            });
            refused.collect()
        },
    },
    Statistic {
        name: "keepalive_dead_peers",
        kind: Kind::Counter,
        help: "Connections with a policy's settings whose peer was found dead",
        labels: &["policy", "cause"],
        read: |now| {
            by_cause(now, |done, cause| {
                Value::Number(done.dead_peers.count(cause))
            })
        },
    },
    Statistic {
        name: "keepalive_silence_before_death_seconds",
        kind: Kind::Histogram,
        help: "How long nothing had come from a peer when it was found dead",
        labels: &["policy", "cause"],
        read: |now| by_cause(now, silence),
    },
    Statistic {
        name: "keepalive_dead_peer_events_lost",
        kind: Kind::Counter,
        help: "Dead peers that were counted and that no event tells of: too many at once",
        labels: &["policy"],
        read: |now| {
            let lost = enforced(now);
            lost.map(|(name, done)| sample([name], done.dead_peers.events_lost))
                .collect()
        },
    },
    Statistic {
        name: "keepalive_map_entries",
        kind: Kind::Gauge,
        help: "Elements in a map in which the program looks things up",
        labels: &["map"],
        read: |now| {
            let maps = now.usage.iter();
            maps.map(|usage| sample([&usage.map], usage.entries))
                .collect()
        },
    },
    Statistic {
        name: "keepalive_map_capacity",
        kind: Kind::Gauge,
        help: "Elements that such a map has room for; another policy set has maps of another size",
        labels: &["map"],
        read: |now| {
            let maps = now.usage.iter();
            maps.map(|usage| sample([&usage.map], usage.capacity.into()))
                .collect()
        },
    },
    Statistic {
        name: "keepalive_sweeps",
        kind: Kind::Counter,
        help: "Times that existing connections were brought along, since the agent runs",
        labels: &["outcome"],
        read: |now| {
            let totals = &now.state.totals;
            by_success(totals.sweeps, totals.sweeps_failed)
        },
    },
    Statistic {
        name: "keepalive_sweep_under_way",
        kind: Kind::Gauge,
        help: "1 while existing connections are brought along",
        labels: &[],
        read: |now| vec![sample([], u64::from(now.state.sweep.under_way))],
    },
    Statistic {
        name: "keepalive_sweep_connections",
        kind: Kind::Gauge,
        help: "Connections that the last sweep looked at",
        labels: &[],
        read: |now| vec![sample([], now.state.sweep.connections)],
    },
    Statistic {
        name: "keepalive_sweep_waiting_connections",
        kind: Kind::Gauge,
        help: "Connections that have been silent for so long that they wait for their turn",
        labels: &[],
        read: |now| vec![sample([], now.state.sweep.waiting)],
    },
    Statistic {
        name: "keepalive_sweep_missed_namespaces",
        kind: Kind::Gauge,
        help: "Network namespaces whose existing connections could not be brought along",
        labels: &[],
        read: |now| vec![sample([], now.state.sweep.missed)],
    },
    Statistic {
        name: "keepalive_reloads",
        kind: Kind::Counter,
        help: "Configs that were read after the start, since the agent runs",
        labels: &["outcome"],
        read: |now| {
            let totals = &now.state.totals;
            by_success(totals.reloads, totals.reloads_failed)
        },
    },
    Statistic {
        name: "keepalive_last_reload_successful",
        kind: Kind::Gauge,
        help: "1 if the config that was read last is the one in force",
        labels: &[],
        read: |now| {
            let failed = |reload: &crate::datapath::Reload| reload.error.is_some();
            let failed = now.state.reload.as_ref().is_some_and(failed);
            vec![sample([], u64::from(!failed))]
        },
    },
    Statistic {
        name: "keepalive_last_reload_timestamp_seconds",
        kind: Kind::Gauge,
        help: "When a config was last read after the start, in seconds since 1970",
        labels: &[],
        read: |now| {
            let reload = now.state.reload.iter();
            reload.map(|reload| sample([], reload.at)).collect()
        },
    },
    Statistic {
        name: "keepalive_part_works",
        kind: Kind::Gauge,
        help: "1 if a part of the agent works, or nothing needs it",
        labels: &["part"],
        read: |now| {
            let parts =
                now.state.parts.iter().map(|(name, part)| {
                    sample([name], u64::from(part.status != PartStatus::Failed))
                });
            parts.collect()
        },
    },
];

fn sample<const LABELS: usize>(labels: [&str; LABELS], number: u64) -> Sample {
    Sample {
        labels: labels.map(str::to_owned).to_vec(),
        value: Value::Number(number),
    }
}

const fn mode(counted: &Counted) -> &'static str {
    if counted.enforced {
        "enforced"
    } else {
        "dry-run"
    }
}

fn by_success(succeeded: u64, failed: u64) -> Vec<Sample> {
    vec![sample(["succeeded"], succeeded), sample(["failed"], failed)]
}

/// The policies in force, and what else there are connections of.
fn connections_now(now: &Snapshot) -> Vec<Sample> {
    let Some(tally) = &now.connections else {
        return Vec::new();
    };
    let none = |(counted, _): &(Counted, Done)| (counted.name.clone(), OfPolicy::default());
    let mut by_policy: BTreeMap<_, _> = now.done.iter().map(none).collect();
    by_policy.extend(tally.by_policy.clone());
    let mut samples = Vec::new();
    for (policy, counts) in by_policy {
        samples.push(sample([&policy, "protected"], counts.protected));
        samples.push(sample([&policy, "unprotected"], counts.unprotected));
    }
    samples
}

/// Hands on, for each policy and mode, how many connections were changed and how
/// many left alone, of what is read as seen and left alone.
fn for_outcomes(
    now: &Snapshot,
    read: impl Fn(&Done) -> (u64, u64),
    mut take: impl FnMut(&str, &str, &str, u64),
) {
    for (counted, done) in &now.done {
        let (seen, left_alone) = read(done);
        // They are read one after the other while they grow.
        let changed = seen.saturating_sub(left_alone);
        for (outcome, count) in [("changed", changed), ("left-alone", left_alone)] {
            take(&counted.name, mode(counted), outcome, count);
        }
    }
}

/// A count of new and existing connections together.
fn both(now: &Snapshot, read: fn(&Counters) -> u64) -> Vec<Sample> {
    let of = |(counted, done): &(Counted, Done)| {
        let count = read(&done.established) + read(&done.existing);
        sample([&counted.name, mode(counted)], count)
    };
    now.done.iter().map(of).collect()
}

fn changes(now: &Snapshot) -> Vec<Sample> {
    let mut samples = Vec::new();
    for (counted, done) in &now.done {
        let (new, old) = (&done.established, &done.existing);
        for (change, number) in [
            ("turned-on", new.turned_on + old.turned_on),
            ("turned-off", new.turned_off + old.turned_off),
            ("filled", new.filled + old.filled),
            ("clamped", new.clamped + old.clamped),
            ("restored", new.restored + old.restored),
        ] {
            samples.push(sample([&counted.name, mode(counted), change], number));
        }
    }
    samples
}

/// What policies did that are, or were, enforced.
fn enforced(now: &Snapshot) -> impl Iterator<Item = (&str, &Done)> {
    let done = now.done.iter().filter(|(counted, _)| counted.enforced);
    done.map(|(counted, done)| (counted.name.as_str(), done))
}

fn by_cause(now: &Snapshot, read: fn(&Done, Cause) -> Value) -> Vec<Sample> {
    let mut samples = Vec::new();
    for (name, done) in enforced(now) {
        for cause in Cause::ALL {
            samples.push(Sample {
                labels: vec![name.to_owned(), cause.name().to_owned()],
                value: read(done, cause),
            });
        }
    }
    samples
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 milliseconds")]
fn silence(done: &Done, cause: Cause) -> Value {
    let index = cause as usize;
    let milliseconds = done.dead_peers.silent_ms.get(index).copied();
    Value::Histogram {
        seconds: milliseconds.unwrap_or_default() as f64 / 1000.0,
        buckets: done
            .dead_peers
            .silence
            .get(index)
            .copied()
            .unwrap_or_default(),
    }
}

impl Statistic {
    /// The name that its samples have, without what a histogram adds.
    fn sample_name(&self) -> String {
        match self.kind {
            Kind::Counter => format!("{}_total", self.name),
            Kind::Info => format!("{}_info", self.name),
            Kind::Gauge | Kind::Histogram => self.name.to_owned(),
        }
    }

    fn encode(&self, now: &Snapshot, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
            Kind::Info => MetricType::Info,
        };
        let mut encoder = encoder.encode_descriptor(self.name, self.help, None, kind)?;
        for sample in (self.read)(now) {
            let values = sample.labels.iter().map(String::as_str);
            let labels: Vec<_> = self.labels.iter().copied().zip(values).collect();
            if self.kind == Kind::Info {
                encoder.encode_info(&labels)?;
            } else if labels.is_empty() {
                self.encode_value(sample.value, &mut encoder)?;
            } else {
                self.encode_value(sample.value, &mut encoder.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn encode_value(&self, value: Value, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        type None<'a> = Option<&'a Exemplar<Vec<(&'static str, &'static str)>, u64>>;
        match value {
            Value::Number(number) if self.kind == Kind::Counter => {
                encoder.encode_counter(&number, None as None<'_>)
            }
            Value::Number(number) => encoder.encode_gauge(&number),
            Value::Histogram { seconds, buckets } => {
                let bounds =
                    (0..BUCKETS).map(|index| upper_bound(index).map_or(f64::INFINITY, f64::from));
                let buckets: Vec<_> = bounds.zip(buckets).collect();
                let count = buckets.iter().map(|(_, count)| count).sum();
                encoder.encode_histogram::<Vec<(&str, &str)>>(seconds, count, &buckets, None)
            }
        }
    }
}

/// The table of all statistics in docs/metrics.md.
#[must_use]
pub fn table() -> String {
    let mut text = "| name | kind | labels | what it says |\n|---|---|---|---|\n".to_owned();
    for statistic in &STATISTICS {
        let kind = match statistic.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
            Kind::Info => "info",
        };
        let labels: Vec<_> = statistic
            .labels
            .iter()
            .map(|label| format!("`{label}`"))
            .collect();
        // Memory can always be written to.
        let _ = writeln!(
            text,
            "| `{}` | {kind} | {} | {} |",
            statistic.sample_name(),
            labels.join(" "),
            statistic.help
        );
    }
    text
}

/// What is in force, as the daemon has it, to be read when somebody asks.
#[derive(Debug, Default)]
pub struct Exposed(Mutex<Option<Arc<Source>>>);

/// A policy set that was put in force.
#[derive(Debug)]
pub struct Source {
    /// What it says of itself, and counts.
    pub record: Arc<SetRecord>,
    /// By which to know whether it still is.
    pub evidence: Evidence,
}

impl Exposed {
    /// Shows this set from now on; none where nothing is in force.
    pub fn set(&self, source: Option<Source>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = source.map(Arc::new);
    }

    /// Whether this set is the one that is shown.
    #[must_use]
    pub fn shows(&self, record: Option<&Arc<SetRecord>>) -> bool {
        match (self.source(), record) {
            (None, None) => true,
            (Some(source), Some(record)) => Arc::ptr_eq(&source.record, record),
            _ => false,
        }
    }

    fn source(&self) -> Option<Arc<Source>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Snapshot {
    fn of(source: Option<&Source>, connections: Option<Arc<Tally>>) -> Result<Self, Error> {
        let Some(source) = source else {
            return Ok(Self {
                in_force: false,
                done: Vec::new(),
                refusals: Vec::new(),
                usage: Vec::new(),
                state: State::default(),
                built_at: 0,
                connections,
            });
        };
        Ok(Self {
            in_force: source.evidence.holds(),
            done: source.record.done()?,
            refusals: source.record.refusals()?,
            // Another one's program may be there by now: that is told by in_force.
            usage: source.evidence.usage().unwrap_or_default(),
            state: source.record.state()?,
            built_at: source.record.description().built_at,
            connections,
        })
    }
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for statistic in &STATISTICS {
            statistic.encode(self, &mut encoder)?;
        }
        Ok(())
    }
}

/// The text that a scrape gets.
fn openmetrics(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(snapshot));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use keepalive_common::dead_peer::bucket;

    use super::*;

    fn snapshot() -> Snapshot {
        let mut done = Done {
            established: Counters {
                seen: [5, 7],
                left_alone: [2, 3],
                filled: 9,
                ..Counters::default()
            },
            ..Done::default()
        };
        let probes = Cause::Probes as usize;
        done.dead_peers.silence[probes][bucket(5000)] = 2;
        done.dead_peers.silence[probes][bucket(u64::MAX)] = 1;
        done.dead_peers.silent_ms[probes] = 100_000_500;
        let counted = |name: &str, enforced| Counted {
            name: name.to_owned(),
            enforced,
        };
        Snapshot {
            in_force: true,
            done: vec![
                (counted("a \"b\"\n", true), done),
                (counted("dry", false), done),
            ],
            refusals: Vec::new(),
            usage: vec![Usage {
                map: "CGROUPS".to_owned(),
                entries: 3,
                capacity: 32_768,
            }],
            state: State::default(),
            built_at: 7,
            connections: Some(Arc::new(Tally {
                by_policy: BTreeMap::from([(
                    "dry".to_owned(),
                    OfPolicy {
                        protected: 3,
                        unprotected: 4,
                    },
                )]),
                at_risk: [1, 2, 3, 4, 5],
                missed_namespaces: 0,
                counted_at: 8,
            })),
        }
    }

    #[test]
    fn a_scrape_is_openmetrics() {
        let text = openmetrics(snapshot()).unwrap();
        for line in [
            "# TYPE keepalive_dead_peers counter",
            "keepalive_in_force 1",
            "keepalive_map_entries{map=\"CGROUPS\"} 3",
            "keepalive_map_capacity{map=\"CGROUPS\"} 32768",
            "keepalive_dead_peers_total{policy=\"a \\\"b\\\"\\n\",cause=\"probes\"} 3",
            "keepalive_dead_peers_total{policy=\"a \\\"b\\\"\\n\",cause=\"reset\"} 0",
            "keepalive_silence_before_death_seconds_bucket{le=\"4.0\",policy=\"a \\\"b\\\"\\n\",\
             cause=\"probes\"} 0",
            "keepalive_silence_before_death_seconds_bucket{le=\"8.0\",policy=\"a \\\"b\\\"\\n\",\
             cause=\"probes\"} 2",
            "keepalive_silence_before_death_seconds_bucket{le=\"+Inf\",policy=\"a \\\"b\\\"\\n\",\
             cause=\"probes\"} 3",
            "keepalive_silence_before_death_seconds_sum{policy=\"a \\\"b\\\"\\n\",\
             cause=\"probes\"} 100000.5",
            "keepalive_connections_established_total{policy=\"dry\",mode=\"dry-run\",\
             direction=\"connecting\",outcome=\"left-alone\"} 2",
            "keepalive_connections_established_total{policy=\"a \\\"b\\\"\\n\",mode=\"enforced\",\
             direction=\"connecting\",outcome=\"changed\"} 3",
            "keepalive_connections_established_total{policy=\"a \\\"b\\\"\\n\",mode=\"enforced\",\
             direction=\"accepting\",outcome=\"changed\"} 4",
            "keepalive_connections{policy=\"dry\",state=\"protected\"} 3",
            "keepalive_connections{policy=\"dry\",state=\"unprotected\"} 4",
            "keepalive_connections{policy=\"a \\\"b\\\"\\n\",state=\"protected\"} 0",
            "keepalive_at_risk_connections{path=\"azure-lb\"} 3",
            "keepalive_connections_counted_timestamp_seconds 8",
            "keepalive_reloads_total{outcome=\"failed\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        assert!(!text.contains("dead_peers_total{policy=\"dry\""));
    }

    #[test]
    fn nothing_in_force_is_said() {
        let text = openmetrics(Snapshot::of(None, None).unwrap()).unwrap();
        assert!(text.contains("\nkeepalive_in_force 0\n"), "{text}");
    }

    #[test]
    fn each_sample_has_a_value_for_each_label() {
        for statistic in &STATISTICS {
            for sample in (statistic.read)(&snapshot()) {
                assert_eq!(
                    sample.labels.len(),
                    statistic.labels.len(),
                    "{}",
                    statistic.name
                );
            }
        }
    }

    #[test]
    fn rules_and_dashboard_ask_for_what_there_is() {
        let known: Vec<_> = STATISTICS.iter().map(Statistic::sample_name).collect();
        for text in [
            include_str!("../../packaging/monitoring/keepalive.rules.yml"),
            include_str!("../../packaging/monitoring/keepalive.rules.test.yml"),
            include_str!("../../packaging/monitoring/keepalive.dashboard.json"),
        ] {
            let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let mut asked = 0;
            for word in words.filter(|word| word.starts_with("keepalive_")) {
                let name = word.strip_suffix("_bucket").unwrap_or(word);
                assert!(known.iter().any(|known| known == name), "{word}");
                asked += 1;
            }
            assert!(asked > 3);
        }
    }

    #[test]
    fn the_documentation_has_this_table() {
        let documentation = include_str!("../../docs/metrics.md");
        assert!(
            documentation.contains(&table()),
            "put this into docs/metrics.md:\n{}",
            table()
        );
    }
}
