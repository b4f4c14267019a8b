//! `keepalive-agent recommend`: which idle time would have kept the connections
//! that died, with the evidence, as a config.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::BufRead as _,
    net::IpAddr,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::Args;
use keepalive_common::dead_peer::Cause;
use serde::Serialize;

use super::{RunningAgent, output};
use crate::{
    assignment::{DEFAULT, UNCLAIMED},
    config::Config,
    daemon::{
        control::{Answer, Request},
        observed::{Observation, Observed},
    },
    datapath::{self, Lister},
    duration,
    enforcing::enforcing,
    hierarchy::{CgroupPath, Hierarchy},
    kernel::{layout::Kernel, preflight},
    names::printable,
    network::Network,
    sockets::{Connection, Receiver, cgroups::Cgroups, filter::Filter, list, source::Source},
};

/// The shortest path that a config can name, in seconds.
const SHORTEST: u64 = 10;

#[derive(Args, Debug)]
#[command(
    after_help = "Asks the running agent for the silences that connections had died of, by \
                  network of the remote end; it keeps them in memory for as long as it runs. What \
                  is printed is a drop-in: read it, and put what is right for you into a file in \
                  /etc/keepalive/conf.d. Nothing is changed by this command.\n\n\
                  Exit codes: 0 done, 1 failed, such as no running agent, 2 wrong usage.\n\n\
                  Examples:\n  \
                  keepalive-agent recommend\n  \
                  keepalive-agent recommend > /etc/keepalive/conf.d/recommended.toml\n  \
                  keepalive-agent recommend --json | jq '.networks[] | select(.forgets)'"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    agent: RunningAgent,

    /// Print one JSON object instead of a config
    #[arg(long)]
    json: bool,
}

/// What is known and recommended. The names are documented and stay.
#[derive(Debug, Serialize)]
struct Recommendation {
    /// When the agent began, in milliseconds since 1970.
    since_ms: u64,
    /// Dead peers that were counted and of which no more is known.
    unknown: u64,
    networks: Vec<Evidence>,
}

/// What is known of the connections to one network under one policy.
#[derive(Debug, Serialize)]
struct Evidence {
    network: String,
    policy: String,
    died: Vec<Observation>,
    /// Whether the path forgets, as far as can be known.
    forgets: bool,
    /// A remote address that had gone silent and has answered since.
    answered_since: Option<IpAddr>,
    /// The path forgets after this much silence at the latest, in milliseconds.
    within_ms: u64,
    /// Idle time that would have kept them, in seconds; none where none can be
    /// recommended.
    idle_s: Option<u64>,
    interval_s: Option<u64>,
    connections: u64,
    without_keepalive: u64,
    /// What holds on the others.
    idle: Vec<Idle>,
}

/// An idle time that connections have.
#[expect(
    clippy::struct_field_names,
    reason = "the names in JSON, with their unit"
)]
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Idle {
    idle_s: u32,
    source: &'static str,
    connections: u64,
}

pub(super) fn recommend(arguments: &Arguments) -> Result<ExitCode> {
    preflight::may_enforce()?;
    let hierarchy = Hierarchy::find()?;
    let cgroup = hierarchy.path(&arguments.agent.cgroup)?;
    let observed = ask(&cgroup)?;
    let running = enforcing()?;
    let config = running
        .iter()
        .find(|running| running.root.path == cgroup)
        .map(|running| running.config.clone());
    let seen = observed.observations.iter().map(|found| found.deaths);
    let unknown = counted(&cgroup)?.saturating_sub(seen.sum());
    let mut networks = evidence(&observed, config.as_deref())?;
    let lister = Lister::load(&Kernel::running()?, &cgroup)?;
    let mut cgroups = Cgroups::new(Some(hierarchy), running)?;
    let mut looking = Looking {
        networks: &mut networks,
        now_ms: now_ms(),
        idle: BTreeMap::new(),
    };
    list(
        &Filter::default(),
        false,
        &lister,
        &mut cgroups,
        &mut looking,
    )?;
    let idle = looking.idle;
    for ((place, idle_s, source), connections) in idle {
        if let Some((_, evidence)) = networks.get_mut(place) {
            evidence.idle.push(Idle {
                idle_s,
                source,
                connections,
            });
        }
    }
    let mut networks: Vec<_> = networks.into_iter().map(|(_, evidence)| evidence).collect();
    for evidence in &mut networks {
        evidence.conclude();
    }
    let recommendation = Recommendation {
        since_ms: observed.since_ms,
        unknown,
        networks,
    };
    if arguments.json {
        output::json(&recommendation)?;
    } else {
        output::text(text(&recommendation))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

fn ask(cgroup: &CgroupPath) -> Result<Observed> {
    let mut lines = RunningAgent::connect(cgroup)?
        .ask_for_lines(Request::Observed)
        .context("asking the agent")?;
    let mut line = String::new();
    lines.read_line(&mut line).context("reading the answer")?;
    let _: Answer = serde_json::from_str(&line)
        .context("the agent is of another version and has not observed anything")?;
    line.clear();
    lines.read_line(&mut line).context("reading the answer")?;
    serde_json::from_str(&line).context("an answer that is not understood")
}

/// All dead peers that the kernel has counted.
fn counted(cgroup: &CgroupPath) -> Result<u64> {
    let mut sum = 0;
    for set in datapath::in_force()? {
        if let Ok(record) = &set.record
            && record.root.path == *cgroup
        {
            sum += record
                .done()?
                .iter()
                .map(|(_, done)| done.dead_peers.total())
                .sum::<u64>();
        }
    }
    Ok(sum)
}

/// Puts together what belongs together.
fn evidence(observed: &Observed, config: Option<&Config>) -> Result<Vec<(Network, Evidence)>> {
    let mut by_network: BTreeMap<(String, String), Evidence> = BTreeMap::new();
    for found in &observed.observations {
        let interval_ms = interval_s(config, &found.policy) * 1000;
        let key = (found.policy.clone(), found.network.clone());
        let evidence = by_network.entry(key).or_insert_with(|| Evidence {
            network: found.network.clone(),
            policy: found.policy.clone(),
            died: Vec::new(),
            forgets: false,
            answered_since: None,
            within_ms: u64::MAX,
            idle_s: None,
            interval_s: None,
            connections: 0,
            without_keepalive: 0,
            idle: Vec::new(),
        });
        evidence.within_ms = evidence.within_ms.min(forgotten_within(found, interval_ms));
        // It said so itself.
        evidence.forgets |= found.cause == Cause::Reset.name();
        evidence.died.push(found.clone());
    }
    by_network
        .into_values()
        .map(|mut evidence| {
            evidence
                .died
                .sort_by(|one, other| one.cause.cmp(&other.cause));
            let network = evidence.network.parse().map_err(anyhow::Error::msg)?;
            Ok((network, evidence))
        })
        .collect()
}

/// What a policy fills in between two probes, in seconds; 0 where it does not. An
/// application with a longer interval of its own makes what is worked out from it
/// larger than it is, one with a shorter interval smaller: then less idle time is
/// recommended than would do.
fn interval_s(config: Option<&Config>, policy: &str) -> u64 {
    let Some(config) = config else { return 0 };
    let policy = if policy == DEFAULT {
        config.default.as_ref()
    } else {
        let named = config.policies.iter().find(|named| named.name == policy);
        named.map(|named| &named.policy)
    };
    policy.map_or(0, |policy| policy.interval.effective(0).into())
}

/// By when the path had forgotten a connection, in milliseconds of silence: when
/// the first segment went out that was not answered as it should be, as far as
/// that is known.
fn forgotten_within(found: &Observation, interval_ms: u64) -> u64 {
    let unanswered = match found.cause.as_str() {
        // The last probe was answered, by the reset.
        cause if cause == Cause::Reset.name() => found.probes.saturating_sub(1),
        // How long data had been sent again is not known.
        cause if cause == Cause::Retransmission.name() => 0,
        _ => found.probes,
    };
    let probing = u64::from(unanswered).saturating_mul(interval_ms);
    found.shortest_ms.saturating_sub(probing).max(1000)
}

/// Looks at the connections that there are to the networks.
struct Looking<'a> {
    networks: &'a mut Vec<(Network, Evidence)>,
    now_ms: u64,
    /// By place in the networks, idle time and author: connections.
    idle: BTreeMap<(usize, u32, &'static str), u64>,
}

impl Receiver<anyhow::Error> for Looking<'_> {
    fn take(&mut self, connection: &Connection<'_>) -> Result<()> {
        let record = connection.record;
        let remote = record.remote().ip().to_canonical();
        let policy = connection
            .policy
            .map_or(UNCLAIMED, |assigned| &assigned.name);
        let silent_ms = u64::try_from(record.silent_ms).unwrap_or(0);
        let heard_ms = self.now_ms.saturating_sub(silent_ms);
        for (place, (network, evidence)) in self.networks.iter_mut().enumerate() {
            if !network.contains(remote) {
                continue;
            }
            let has_answered =
                |died: &Observation| died.last_remote == remote && heard_ms > died.last_ms;
            if evidence.died.iter().any(has_answered) {
                evidence.answered_since = Some(remote);
            }
            if evidence.policy != policy {
                continue;
            }
            let settings = &connection.settings;
            evidence.connections += 1;
            if settings.keepalive.value {
                let idle = settings.idle;
                let source: Source = idle.source;
                let key = (place, idle.value, source.author());
                *self.idle.entry(key).or_default() += 1;
            } else {
                evidence.without_keepalive += 1;
            }
        }
        Ok(())
    }

    fn progress(&mut self, _: u64) {}
}

impl Evidence {
    /// What follows from it: half of the time for idle, a tenth for the interval,
    /// as `path` in a config.
    fn conclude(&mut self) {
        self.forgets |= self.answered_since.is_some();
        let within_s = self.within_ms / 1000;
        if self.forgets && within_s >= SHORTEST {
            self.idle_s = Some((within_s / 2).min(60));
            self.interval_s = Some((within_s / 10).min(10));
        }
    }

    /// Whether the policy has its cgroups and remote ends from a table of its own.
    fn is_of_named_policy(&self) -> bool {
        self.policy != DEFAULT && self.policy != UNCLAIMED
    }
}

/// The config for people, with the evidence in comments.
fn text(recommendation: &Recommendation) -> String {
    let Recommendation {
        since_ms,
        unknown,
        networks,
    } = recommendation;
    let since = UNIX_EPOCH + Duration::from_millis(*since_ms);
    let mut text = format!(
        "# Connections that died since {}, as the agent remembers them.\n",
        humantime::format_rfc3339_seconds(since)
    );
    if *unknown > 0 {
        // Memory can always be written to, here and below.
        let _ = writeln!(
            text,
            "# {unknown} more were counted, of which no more is known."
        );
    }
    if networks.is_empty() {
        text += "# No peer was found dead on a connection that a policy had changed: there is \
                 nothing\n# to recommend. Whether a path forgets connections that are silent for \
                 longer than\n# their keepalive allows cannot be known from that.\n";
    }
    let mut of_policies: BTreeMap<&str, Vec<&Evidence>> = BTreeMap::new();
    for evidence in networks {
        of_policies
            .entry(&evidence.policy)
            .or_default()
            .push(evidence);
    }
    for (policy, networks) in of_policies {
        for evidence in &networks {
            text += &told(evidence);
            if let Some(idle) = evidence.idle_s
                && !evidence.is_of_named_policy()
            {
                let network = &evidence.network;
                let within = duration::show(Duration::from_secs(evidence.within_ms / 1000));
                let interval = evidence.interval_s.unwrap_or(1);
                let _ = writeln!(
                    text,
                    "[[policy]]\nname = \"recommended-{network}\"\nremote = \"{network}\"\n\
                     path = \"{within}\"    # idle {idle}s, interval {interval}s"
                );
            }
        }
        let shortest = networks
            .iter()
            .filter(|evidence| evidence.is_of_named_policy())
            .filter_map(|evidence| {
                Some((evidence.within_ms, evidence.idle_s?, evidence.interval_s?))
            })
            .min();
        if let Some((within_ms, idle, interval)) = shortest {
            let most = within_ms / 1000;
            let _ = writeln!(
                text,
                "\n# for all connections of this policy\n\
                 [[policy]]\nname = {}\n\
                 idle = {{ default = \"{idle}s\", at-most = \"{}s\" }}\n\
                 interval = {{ default = \"{interval}s\", at-most = \"{}s\" }}\n\
                 probes = {{ default = 6, at-least = 3 }}",
                toml::Value::from(policy),
                most / 2,
                most / 10,
            );
        }
    }
    text
}

/// The evidence, in comments.
fn told(evidence: &Evidence) -> String {
    let show = |milliseconds: u64| duration::show(Duration::from_secs(milliseconds / 1000));
    let mut lines = vec![format!(
        "{}, policy {}",
        evidence.network,
        printable(&evidence.policy)
    )];
    for died in &evidence.died {
        let (shortest, longest) = (show(died.shortest_ms), show(died.longest_ms));
        let silence = if shortest == longest {
            shortest
        } else {
            format!("{shortest} to {longest}")
        };
        lines.push(format!(
            "  {} died by {}, after {silence} of silence",
            died.deaths, died.cause
        ));
    }
    let has = |cause: Cause| evidence.died.iter().any(|died| died.cause == cause.name());
    if has(Cause::Reset) {
        lines.push("  a reset is what an end or a middlebox says that has forgotten".to_owned());
    }
    if let Some(remote) = evidence.answered_since {
        lines.push(format!(
            "  {remote} has answered on another connection since: the path forgot"
        ));
        lines.push("  (a peer that was restarted meanwhile looks the same)".to_owned());
    }
    if has(Cause::Retransmission) {
        lines.push(
            "  for how long data had been sent again is not known: the silence before was \
             shorter"
                .to_owned(),
        );
    }
    if evidence.connections > 0 {
        let mut now = format!(
            "  now {} connections, {} without keepalive",
            evidence.connections, evidence.without_keepalive
        );
        for idle in &evidence.idle {
            // Memory can always be written to.
            let _ = write!(
                now,
                "; idle {} by {} on {}",
                duration::show_seconds(idle.idle_s),
                idle.source,
                idle.connections
            );
        }
        lines.push(now);
    }
    lines.push(match (evidence.forgets, evidence.idle_s) {
        (false, _) => {
            "  whether the path forgets or the peers are gone cannot be known: none of\n#   \
                       them has been heard of since"
                .to_owned()
        }
        (true, None) => format!(
            "  the path forgets after {} of silence or sooner: too soon for timers of whole \
             seconds",
            show(evidence.within_ms)
        ),
        (true, Some(_)) => format!(
            "  so the path forgets after {} of silence or sooner; how much sooner\n#   cannot be \
             known: if this goes on with the timers below, look again",
            show(evidence.within_ms)
        ),
    });
    format!("\n# {}\n", lines.join("\n# "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn died(cause: Cause, silent_s: u64, probes: u32) -> Observation {
        Observation {
            network: "198.51.100.0/24".to_owned(),
            policy: DEFAULT.to_owned(),
            cause: cause.name().to_owned(),
            deaths: 2,
            shortest_ms: silent_s * 1000 + 7,
            probes,
            longest_ms: silent_s * 1000 + 900,
            last_remote: "198.51.100.7".parse().unwrap(),
            last_ms: 1_700_000_000_000,
        }
    }

    fn recommended(died: Vec<Observation>, answered: bool) -> Recommendation {
        let observed = Observed {
            since_ms: 1_700_000_000_000,
            left_out: 0,
            observations: died,
        };
        let (config, _) =
            Config::parse("test.toml".as_ref(), "[default]\ninterval = \"1s\"\n").unwrap();
        let mut networks: Vec<_> = evidence(&observed, Some(&config))
            .unwrap()
            .into_iter()
            .map(|(_, evidence)| evidence)
            .collect();
        for evidence in &mut networks {
            let remote = evidence.died[0].last_remote;
            evidence.answered_since = answered.then_some(remote);
            evidence.conclude();
        }
        Recommendation {
            since_ms: observed.since_ms,
            unknown: 0,
            networks,
        }
    }

    /// The silence before the first probe is what the path was known to forget in.
    #[test]
    fn the_bound_is_when_the_first_segment_was_lost() {
        for (found, within) in [
            (died(Cause::Probes, 16, 3), 13),
            (died(Cause::UserTimeout, 16, 3), 13),
            (died(Cause::Reset, 16, 1), 16),
            (died(Cause::Reset, 360, 0), 360),
            (died(Cause::Retransmission, 930, 2), 930),
            (died(Cause::Probes, 3, 9), 1),
        ] {
            assert_eq!(forgotten_within(&found, 1000) / 1000, within, "{found:?}");
        }
    }

    #[test]
    fn what_is_printed_is_a_config_that_keeps_the_path_open() {
        let recommendation = recommended(vec![died(Cause::Probes, 16, 3)], true);
        let text = text(&recommendation);
        let (config, _) = Config::parse("recommended.toml".as_ref(), &text).unwrap();
        let policy = &config.policies[0].policy;
        assert_eq!(
            (policy.idle.default, policy.interval.default),
            (6, 1),
            "{text}"
        );
        assert_eq!(recommendation.networks[0].idle_s, Some(6));
        assert!(
            text.contains("2 died by probes, after 16s of silence"),
            "{text}"
        );
        assert!(
            text.contains("forgets after 13s of silence or sooner"),
            "{text}"
        );
        for line in text.lines() {
            assert!(line.len() <= 80, "{line}");
        }
    }

    #[test]
    fn a_policy_of_its_own_is_changed_by_its_name() {
        let mut one = died(Cause::Reset, 360, 0);
        one.policy = "a \"b\"".to_owned();
        let mut other = died(Cause::Reset, 300, 0);
        (other.policy, other.network) = (one.policy.clone(), "2001:db8::/64".to_owned());
        let text = text(&recommended(vec![one, other], false));
        assert_eq!(text.matches("[[policy]]").count(), 1, "{text}");
        assert!(text.contains("at-most = \"150s\""), "{text}");
        let mut parsed: toml::Table = text.parse().unwrap();
        let policy = parsed.remove("policy").unwrap();
        assert_eq!(policy[0]["name"].as_str(), Some("a \"b\""));
    }

    #[test]
    fn what_cannot_be_known_is_said() {
        let text_of = |died, answered| text(&recommended(died, answered));
        let text = text_of(vec![died(Cause::Probes, 16, 3)], false);
        assert!(
            text.contains("cannot be known") && !text.contains("[[policy]]"),
            "{text}"
        );
        let text = text_of(vec![died(Cause::Reset, 5, 1)], false);
        assert!(
            text.contains("too soon") && !text.contains("[[policy]]"),
            "{text}"
        );
        assert!(text_of(Vec::new(), false).contains("nothing\n# to recommend"));
    }
}
