//! Sweep: brings the policy to the connections that were there first, in every
//! network namespace, without letting them all probe at once (see
//! [`keepalive_common::sweep`]).

use std::time::Duration;

use anyhow::{Error, Result};
use keepalive_common::sweep::Pass;

use crate::{
    bpf::Enforcer,
    netns::{self, Namespace},
};

/// Time between two passes while probes are being brought forward.
pub const PACE: Duration = Duration::from_secs(1);

/// Probes that one pass may always bring forward: nothing that a network notices.
const LEAST_BUDGET: u64 = 100;

/// What came of a pass over all namespaces.
#[derive(Debug, Default)]
pub struct Swept {
    /// Namespaces that were swept.
    pub namespaces: usize,
    /// Connections that were looked at.
    pub seen: u64,
    /// Connections whose probe was brought forward.
    pub forwarded: u64,
    /// Connections whose probe is still to be brought forward.
    pub waiting: u64,
    /// Namespaces that could not be swept, and why.
    pub missed: Vec<(Namespace, Error)>,
}

/// Spreads probes over the idle period: how many go with each pass, and how
/// many passes there can be at the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    budget: u64,
    passes: u64,
}

/// Applies policy to every connection; the first probes go with it.
///
/// # Errors
///
/// When no namespace can be found at all. What goes wrong in one namespace is
/// reported in the result and does not keep the others from being swept.
pub fn apply(enforcer: &mut Enforcer) -> Result<Swept> {
    pass(enforcer, true, LEAST_BUDGET)
}

/// Brings the next probes forward; none is left after the last pass.
///
/// # Errors
///
/// As [`apply`].
pub fn forward(enforcer: &mut Enforcer, spread: &mut Spread) -> Result<Swept> {
    spread.passes = spread.passes.saturating_sub(1);
    pass(enforcer, false, spread.budget)
}

fn pass(enforcer: &mut Enforcer, apply: bool, budget: u64) -> Result<Swept> {
    let mut swept = Swept::default();
    for namespace in netns::all()? {
        let pass = Pass {
            apply: u32::from(apply),
            budget: budget.saturating_sub(swept.forwarded),
            ..Pass::default()
        };
        match enforcer.pass(&namespace, pass) {
            Ok(done) => {
                swept.namespaces += 1;
                swept.seen += done.seen;
                swept.forwarded += done.forwarded;
                swept.waiting += done.waiting;
            }
            Err(error) => swept.missed.push((namespace, error)),
        }
    }
    Ok(swept)
}

impl Spread {
    /// For so many waiting connections and the shortest idle time among the
    /// policies, in seconds. None where nothing is waiting.
    ///
    /// The last pass comes well before the kernel would fire the timers itself,
    /// all of them a whole idle period after the first pass.
    #[must_use]
    pub fn new(waiting: u64, shortest_idle: u32) -> Option<Self> {
        if waiting == 0 {
            return None;
        }
        let passes = (u64::from(shortest_idle) * 4 / 5 / PACE.as_secs()).max(1);
        Some(Self {
            budget: waiting.div_ceil(passes).max(LEAST_BUDGET),
            passes,
        })
    }

    /// Whether another pass is due after one that left so many waiting.
    #[must_use]
    pub const fn goes_on(&self, waiting: u64) -> bool {
        waiting > 0 && self.passes > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_are_spread_over_most_of_the_idle_period() {
        assert_eq!(Spread::new(0, 60), None);
        for (waiting, idle, budget, passes) in [
            (1, 60, 100, 48),
            (4_800, 60, 100, 48),
            (48_000, 60, 1_000, 48),
            (200_000, 60, 4_167, 48),
            (1_000, 1, 1_000, 1),
        ] {
            let spread = Spread::new(waiting, idle).unwrap();
            assert_eq!(spread, Spread { budget, passes }, "{waiting} {idle}");
            assert!(budget * passes >= waiting);
        }
    }

    #[test]
    fn passes_are_bounded() {
        let mut spread = Spread::new(10, 1).unwrap();
        assert!(spread.goes_on(10));
        assert!(!spread.goes_on(0));
        spread.passes -= 1;
        assert!(!spread.goes_on(10));
    }
}
