//! Connections counted per cgroup.

use serde::Serialize;

use super::Connection;

/// The connections of one cgroup, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// All of them.
    pub connections: u64,
    /// Those with keepalive on.
    pub protected: u64,
    /// Those with keepalive off.
    pub unprotected: u64,
    /// Shortest idle time of a protected one, in seconds.
    pub shortest_idle_s: Option<u32>,
    /// Longest idle time of a protected one, in seconds.
    pub longest_idle_s: Option<u32>,
    /// Those that a path with the given timeout would forget.
    pub at_risk: u64,
}

impl Summary {
    /// Counts one more; `at_risk` as the caller has found.
    pub fn add(&mut self, connection: &Connection<'_>, at_risk: bool) {
        let idle = connection.settings.idle.value;
        let protected = connection.settings.keepalive.value;
        self.merge(&Self {
            connections: 1,
            protected: protected.into(),
            unprotected: (!protected).into(),
            shortest_idle_s: protected.then_some(idle),
            longest_idle_s: protected.then_some(idle),
            at_risk: at_risk.into(),
        });
    }

    /// Counts what another summary counted.
    pub fn merge(&mut self, other: &Self) {
        self.connections += other.connections;
        self.protected += other.protected;
        self.unprotected += other.unprotected;
        self.at_risk += other.at_risk;
        self.shortest_idle_s = match (self.shortest_idle_s, other.shortest_idle_s) {
            (Some(own), Some(other)) => Some(own.min(other)),
            (own, other) => own.or(other),
        };
        self.longest_idle_s = self.longest_idle_s.max(other.longest_idle_s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        netns,
        sockets::trial::{protected, record},
    };

    #[test]
    fn counts_and_keeps_the_extremes_of_the_protected() {
        let netns = netns::all().unwrap().remove(0);
        let off = record(
            "192.0.2.1:1",
            "192.0.2.9:2",
            &keepalive_common::plan::Options::default(),
        );
        let mut summary = Summary::default();
        for (record, at_risk) in [(off, true), (protected(300), true), (protected(60), false)] {
            let connection = Connection::new(&netns, &record, None, None);
            summary.add(&connection, at_risk);
        }
        let expected = Summary {
            connections: 3,
            protected: 2,
            unprotected: 1,
            shortest_idle_s: Some(60),
            longest_idle_s: Some(300),
            at_risk: 2,
        };
        assert_eq!(summary, expected);
        summary.merge(&Summary::default());
        assert_eq!(summary, expected);
    }
}
