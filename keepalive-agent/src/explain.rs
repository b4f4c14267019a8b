//! Explain: which policy claims a connection, why, and what comes of it.
//!
//! The same decisions that the kernel takes, with their reasons.

use keepalive_common::{
    environment::Environment, history::Asked, plan::Options, policy::Policy, slot::MAX_DEPTH,
};
use serde::Serialize;

use crate::{
    assignment::Claimants,
    hierarchy::CgroupPath,
    paths::{self, IdleTimeout},
    rules::{Ends, Mismatch, most_exact},
    sockets::source::{Settings, settings},
};

/// The way from a cgroup upward to the policy that claims a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// The cgroups that were looked at, in that order.
    pub cgroups: Vec<Visited>,
    /// The policy that claims the connection, by index; none where none does.
    pub claimed: Option<usize>,
}

/// A cgroup on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visited {
    /// Its path.
    pub path: CgroupPath,
    /// The policies that claim it, by index, and what was decided about them.
    pub policies: Vec<(usize, Verdict)>,
}

/// What was decided about a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It claims the connection.
    Claims,
    /// It is for the connection, but another one names that more exactly, or
    /// comes first.
    Beaten,
    /// It is not for the connection.
    NotFor(Mismatch),
    /// It claims the connection if its ends are such that it is for them.
    Depends,
}

/// Walks upward as the kernel does. Policies that are for some ends only are
/// passed by where those are not known.
#[must_use]
pub fn walk(claimants: &Claimants, path: &CgroupPath, ends: &Ends) -> Walk {
    let mut cgroups = Vec::new();
    let mut nearest = None;
    let in_reach = claimants.is_in_reach(path);
    for (distance, path) in (0..).zip(path.upward()) {
        let path = CgroupPath::from(path);
        let claiming = claimants.of(&path);
        if nearest.is_none() && !claiming.is_empty() {
            nearest = Some(distance);
        }
        let rules = claiming
            .iter()
            .map(|index| &claimants.policies()[*index].rules);
        let winner = most_exact(rules, ends);
        let verdict = |position: usize, index: usize| {
            if winner == Some(position) {
                return Verdict::Claims;
            }
            match claimants.policies()[index].rules.judge(ends) {
                Ok(Some(_)) => Verdict::Beaten,
                Ok(None) => Verdict::Depends,
                Err(mismatch) => Verdict::NotFor(mismatch),
            }
        };
        let policies = claiming.iter().enumerate();
        cgroups.push(Visited {
            path,
            policies: policies
                .map(|(position, index)| (*index, verdict(position, *index)))
                .collect(),
        });
        if let Some(winner) = winner {
            return Walk {
                cgroups,
                claimed: Some(claiming[winner]),
            };
        }
        // The kernel gives up where the nearest claim is too far away.
        if nearest.is_none() && distance + 1 >= MAX_DEPTH && !in_reach {
            break;
        }
    }
    Walk {
        cgroups,
        claimed: None,
    }
}

/// What options mean for a connection.
#[derive(Clone, Debug)]
pub struct Meaning {
    /// What holds, and whose setting it is.
    pub settings: Settings,
    /// Silence before the first probe, in seconds; none where keepalive is off.
    pub first_probe_s: Option<u32>,
    /// When a peer is given up that is dead from the last activity on, in
    /// milliseconds; none where that is never.
    pub dead_after_ms: Option<u64>,
    /// The paths that are known by name, and whether they stay open.
    pub paths: Vec<Path>,
}

/// A path that forgets silent connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Path {
    /// Its name.
    pub name: &'static str,
    /// It forgets a connection after this much silence, in seconds.
    pub timeout_s: u32,
    /// Whether keepalive keeps it open, even if two probes in a row are lost.
    pub survives: bool,
}

impl Meaning {
    /// Of options that a policy shaped, in a namespace with these sysctls.
    #[must_use]
    pub fn of(
        options: &Options,
        asked: &Asked,
        policy: Option<&Policy>,
        environment: &Environment,
    ) -> Self {
        let settings = settings(options, asked, policy, environment);
        let (idle, interval) = (settings.idle.value, settings.interval.value);
        let on = settings.keepalive.value;
        let by_probes =
            (u64::from(idle) + u64::from(interval) * u64::from(settings.probes.value)) * 1000;
        let dead_after_ms = match settings.user_timeout.value {
            0 => by_probes,
            // At the first firing of the timer after that, and not before one
            // probe went unanswered (`tcp_keepalive_timer` in
            // net/ipv4/tcp_timer.c).
            timeout => {
                let first = u64::from(idle) * 1000;
                let every = u64::from(interval.max(1)) * 1000;
                let beyond = u64::from(timeout).saturating_sub(first);
                first + beyond.div_ceil(every).max(1) * every
            }
        };
        let paths = paths::ALL.map(|middlebox| Path {
            name: middlebox.name,
            timeout_s: middlebox.timeout,
            survives: on && IdleTimeout::from(middlebox).is_kept_open_by(idle, interval),
        });
        Self {
            settings,
            first_probe_s: on.then_some(idle),
            dead_after_ms: on.then_some(dead_after_ms),
            paths: paths.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use keepalive_common::{history::given, policy::Range};

    use super::*;
    use crate::{config::Config, hierarchy::Cgroup};

    const HERE: Environment = Environment::UNCHANGED;

    fn claimants(text: &str) -> Claimants {
        let (config, _) = Config::parse("test.toml".as_ref(), text).unwrap();
        let root = Cgroup {
            path: CgroupPath::root(),
            id: 1,
        };
        Claimants::new(&config, &root).unwrap()
    }

    fn ends(remote: &str) -> Ends {
        Ends {
            remote: Some(remote.parse().unwrap()),
            local_port: None,
        }
    }

    #[test]
    fn the_walk_ends_at_the_policy_that_claims() {
        let claimants = claimants(
            "[default]\n\
             [[policy]]\nname = 'a'\ncgroup = '/a'\nremote = '10.0.0.0/8'\n\
             [[policy]]\nname = 'b'\ncgroup = '/a'\nremote = '10.1.0.0/16'\n\
             [[policy]]\nname = 'c'\ncgroup = '/a'\nport = 443\n",
        );
        let visited = |path: &str, policies: &[(usize, Verdict)]| Visited {
            path: path.into(),
            policies: policies.to_vec(),
        };
        let walked = walk(&claimants, &"/a/x".into(), &ends("10.1.2.3:80"));
        assert_eq!(
            walked,
            Walk {
                cgroups: vec![
                    visited("/a/x", &[]),
                    visited(
                        "/a",
                        &[
                            (1, Verdict::Beaten),
                            (2, Verdict::Claims),
                            (3, Verdict::NotFor(Mismatch::Port)),
                        ]
                    ),
                ],
                claimed: Some(2),
            }
        );
        let walked = walk(&claimants, &"/a".into(), &Ends::default());
        assert_eq!(
            walked,
            Walk {
                cgroups: vec![
                    visited(
                        "/a",
                        &[
                            (1, Verdict::Depends),
                            (2, Verdict::Depends),
                            (3, Verdict::Depends),
                        ]
                    ),
                    visited("/", &[(0, Verdict::Claims)]),
                ],
                claimed: Some(0),
            }
        );
    }

    #[test]
    fn a_policy_too_far_up_is_not_found() {
        let claimants = claimants("[default]\n");
        for (depth, claimed) in [(31, Some(0)), (127, Some(0)), (128, None)] {
            assert_eq!(
                walk(
                    &claimants,
                    &"/x".repeat(depth).as_str().into(),
                    &Ends::default()
                )
                .claimed,
                claimed,
                "{depth}"
            );
        }
    }

    #[test]
    fn what_the_built_in_policy_means() {
        let policy = Policy::BUILT_IN;
        let meaning = Meaning::of(
            &given(&policy, &HERE),
            &Asked::default(),
            Some(&policy),
            &HERE,
        );
        assert_eq!(meaning.first_probe_s, Some(60));
        assert_eq!(meaning.dead_after_ms, Some(120_000));
        assert!(meaning.paths.iter().all(|path| path.survives));
        let nothing = Meaning::of(&Options::default(), &Asked::default(), None, &HERE);
        assert_eq!((nothing.first_probe_s, nothing.dead_after_ms), (None, None));
        assert!(!nothing.paths.iter().any(|path| path.survives));
    }

    #[test]
    fn a_user_timeout_ends_it_when_the_timer_fires() {
        for (timeout, expected) in [(1, 70_000), (65_000, 70_000), (70_001, 80_000)] {
            let mut policy = Policy::BUILT_IN;
            policy.user_timeout = Range::default_only(timeout);
            let wants = given(&policy, &HERE);
            let meaning = Meaning::of(&wants, &Asked::default(), Some(&policy), &HERE);
            assert_eq!(meaning.dead_after_ms, Some(expected), "{timeout}");
        }
    }
}
