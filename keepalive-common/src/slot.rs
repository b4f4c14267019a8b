//! Slots: how a cgroup points to its policy.
//!
//! A cgroup maps to a slot number; policies and counters are arrays indexed by
//! it. Thousands of cgroups can share a policy, and giving a cgroup another one
//! is a single 8-byte write that no socket can see half of. A slot can also be of
//! another policy than it was: see [`Edition`](crate::policy_record::Edition).
//!
//! Where the remote end has a say, the cgroup leads to a [`Step`] instead: rules
//! to look the remote end up in, and where to go on when they do not name it. A
//! chain of steps is never changed once a cgroup leads to it; another policy is
//! another chain.

use core::net::{IpAddr, SocketAddr};

/// What a cgroup claims for its sockets, and for those below it that have no
/// nearer claim. The first claim on the way up decides.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// Where the policy is found.
    pub now: Target,
    /// Where it was found before the policy last changed, for the sweep that
    /// follows.
    pub before: Target,
}

impl Claim {
    /// No policy now, none before.
    pub const NONE: Self = Self {
        now: Target::UNCLAIMED,
        before: Target::UNCLAIMED,
    };
}

/// Where a policy is found: in a slot, or by taking a step.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target(u32);

/// What a [`Target`] leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lead {
    /// The policy in this slot, or none if it is [`UNCLAIMED`].
    Slot(u32),
    /// The step with this number.
    Step(u32),
}

/// Set in a target that leads to a step.
const STEP: u32 = 1 << 31;

impl Target {
    /// No policy.
    pub const UNCLAIMED: Self = Self::slot(UNCLAIMED);

    /// Leads to the policy in a slot.
    #[must_use]
    pub const fn slot(slot: u32) -> Self {
        Self(slot & !STEP)
    }

    /// Leads to a step.
    #[must_use]
    pub const fn step(number: u32) -> Self {
        Self(number | STEP)
    }

    /// As one number, to be kept.
    #[must_use]
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// From the number that [`Self::bits`] told.
    #[must_use]
    #[inline(always)]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// What it leads to.
    #[must_use]
    #[inline(always)]
    pub const fn lead(self) -> Lead {
        if self.0 & STEP == 0 {
            Lead::Slot(self.0)
        } else {
            Lead::Step(self.0 & !STEP)
        }
    }
}

/// Rules to look a remote end up in, and where to go on if they do not name it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Step {
    /// The set of rules, as it stands in a [`RemoteKey`]; 0 is no step at all.
    pub rules: u32,
    /// The [`Target`] where they do not name the remote end.
    pub otherwise: u32,
}

impl Step {
    /// Where to go on if the rules do not name the remote end.
    #[must_use]
    #[inline(always)]
    pub const fn otherwise(&self) -> Target {
        Target(self.otherwise)
    }

    /// A step that looks in these rules first.
    #[must_use]
    pub const fn new(rules: u32, otherwise: Target) -> Self {
        Self {
            rules,
            otherwise: otherwise.0,
        }
    }
}

/// What rules look at: the remote end of a connection, IPv4 as
/// `::ffff:0:0/96`, and its local port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The remote address, in network byte order.
    pub address: [u8; 16],
    /// The remote port.
    pub port: u16,
    /// The local port.
    pub local_port: u16,
}

impl Ends {
    /// Of a connection to this remote end.
    #[must_use]
    pub fn new(remote: SocketAddr, local_port: u16) -> Self {
        let address = match remote.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        Self {
            address: address.octets(),
            port: remote.port(),
            local_port,
        }
    }
}

/// What the longest prefix is looked up by: which rules, and an address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemoteKey {
    /// Number of the rules; in network byte order, as prefixes are compared.
    rules: [u8; 4],
    /// The address, in network byte order.
    address: [u8; 16],
}

impl RemoteKey {
    /// Bits of the rules' number, which always count.
    const RULES_BITS: u32 = 32;
    /// Length of a whole key in bits.
    pub const BITS: u32 = Self::RULES_BITS + 128;

    /// An address in some rules.
    #[must_use]
    #[inline(always)]
    pub const fn new(rules: u32, address: [u8; 16]) -> Self {
        Self {
            rules: rules.to_be_bytes(),
            address,
        }
    }

    /// The number of the rules and the address.
    #[must_use]
    pub const fn parts(&self) -> (u32, u128) {
        (
            u32::from_be_bytes(self.rules),
            u128::from_be_bytes(self.address),
        )
    }

    /// Length of the key in bits whose address has a prefix of this length.
    #[must_use]
    pub const fn bits(prefix: u8) -> u32 {
        Self::RULES_BITS + prefix as u32
    }
}

/// What the longest prefix is looked up by: which table of ports, and a port.
/// A range of ports is a few prefixes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    /// Number of the table, in network byte order.
    table: [u8; 4],
    /// The port, in network byte order.
    port: [u8; 2],
    /// Explicit padding, always 0.
    reserved: [u8; 2],
}

impl PortKey {
    /// Bits of the table's number, which always count.
    const TABLE_BITS: u32 = 32;
    /// Length of a whole key in bits.
    pub const BITS: u32 = Self::TABLE_BITS + 16;

    /// A port in some table.
    #[must_use]
    #[inline(always)]
    pub const fn new(table: u32, port: u16) -> Self {
        Self {
            table: table.to_be_bytes(),
            port: port.to_be_bytes(),
            reserved: [0; 2],
        }
    }

    /// The number of the table and the port.
    #[must_use]
    pub const fn parts(&self) -> (u32, u16) {
        (
            u32::from_be_bytes(self.table),
            u16::from_be_bytes(self.port),
        )
    }

    /// Length of the key in bits whose port has a prefix of this length.
    #[must_use]
    pub const fn bits(prefix: u8) -> u32 {
        Self::TABLE_BITS + prefix as u32
    }
}

/// What rules say about an address, or about one and a port.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Found(u32);

/// Set where the remote port decides.
const BY_PORT: u32 = 1 << 31;
/// Set where the local port decides.
const BY_LOCAL_PORT: u32 = 1 << 30;
/// The number of a slot or of a table.
const NUMBER: u32 = BY_LOCAL_PORT - 1;

impl Found {
    /// They are not for this address.
    pub const NOTHING: Self = Self(UNCLAIMED);

    /// Whatever the ports, the policy in this slot.
    #[must_use]
    pub const fn slot(slot: u32) -> Self {
        Self(slot & NUMBER)
    }

    /// The remote port decides, in this table.
    #[must_use]
    pub const fn by_port(table: u32) -> Self {
        Self(table & NUMBER | BY_PORT)
    }

    /// The local port decides, in this table.
    #[must_use]
    pub const fn by_local_port(table: u32) -> Self {
        Self(table & NUMBER | BY_LOCAL_PORT)
    }

    /// The table to look the remote port up in, where that decides.
    #[must_use]
    #[inline(always)]
    pub const fn port_table(self) -> Option<u32> {
        self.table(BY_PORT)
    }

    /// The table to look the local port up in, where that decides.
    #[must_use]
    #[inline(always)]
    pub const fn local_port_table(self) -> Option<u32> {
        self.table(BY_LOCAL_PORT)
    }

    #[inline(always)]
    const fn table(self, by: u32) -> Option<u32> {
        if self.0 & by == 0 {
            None
        } else {
            Some(self.0 & NUMBER)
        }
    }

    /// The slot, where no port decides.
    #[must_use]
    #[inline(always)]
    pub const fn any_port(self) -> u32 {
        self.0 & NUMBER
    }
}

/// Where steps and rules are kept.
pub trait Tables {
    /// A step by its number.
    fn step(&self, number: u32) -> Option<Step>;
    /// What the rules say about the longest prefix of an address that they name.
    fn remote(&self, key: &RemoteKey) -> Option<Found>;
    /// What a table says about the longest prefix of a port that it names.
    fn port(&self, key: &PortKey) -> Option<Found>;
}

/// Where a target leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The slot of the policy.
    pub slot: u32,
    /// Whether the ports of the connection had a say, or its remote address alone.
    pub by_port: bool,
}

/// The slot of the policy that a target leads to, for a connection with these
/// ends.
#[must_use]
#[inline(always)]
pub fn resolve(tables: &impl Tables, target: Target, ends: &Ends) -> Resolved {
    /// The last look finds where the last step leads to. Not `0..=MAX_STEPS`,
    /// which is one more variable for the verifier to follow.
    const LOOKS: u32 = MAX_STEPS + 1;
    let mut target = target;
    let mut by_port = false;
    for _ in 0..LOOKS {
        let number = match target.lead() {
            Lead::Slot(slot) => return Resolved { slot, by_port },
            Lead::Step(number) => number,
        };
        let Some(step) = tables.step(number) else {
            break;
        };
        let found = in_rules(tables, step.rules, ends);
        by_port |= found.by_port;
        if found.slot != UNCLAIMED {
            let slot = found.slot;
            return Resolved { slot, by_port };
        }
        target = step.otherwise();
    }
    Resolved {
        slot: UNCLAIMED,
        by_port,
    }
}

/// The slot that rules give a connection, [`UNCLAIMED`] where they do not name
/// it: first the remote address decides, then the remote port, then the local
/// one, each only where it makes a difference.
#[inline(always)]
fn in_rules(tables: &impl Tables, rules: u32, ends: &Ends) -> Resolved {
    let key = RemoteKey::new(rules, ends.address);
    let mut found = tables.remote(&key).unwrap_or(Found::NOTHING);
    let by_port = found.port_table().is_some() || found.local_port_table().is_some();
    if let Some(table) = found.port_table() {
        let key = PortKey::new(table, ends.port);
        found = tables.port(&key).unwrap_or(Found::NOTHING);
    }
    if let Some(table) = found.local_port_table() {
        let key = PortKey::new(table, ends.local_port);
        found = tables.port(&key).unwrap_or(Found::NOTHING);
    }
    Resolved {
        slot: found.any_port(),
        by_port,
    }
}

/// Counts the sockets that no policy claims; holds no policy.
pub const UNCLAIMED: u32 = 0;

/// The first slot that holds a policy.
pub const FIRST: u32 = 1;

/// How many cgroups the walk from a socket's cgroup to the root looks at, its
/// own included. Deeper ones are never seen to have a policy higher up; real
/// hierarchies (nested container runtimes included) stay below 20.
pub const MAX_DEPTH: u32 = 32;

/// How many steps one after another are taken at most, one for each cgroup on
/// the way up that has rules. The agent makes no longer ones.
pub const MAX_STEPS: u32 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_records_have_no_padding() {
        assert_eq!(size_of::<Claim>(), 8);
        assert_eq!(size_of::<Step>(), 8);
        assert_eq!(size_of::<RemoteKey>() * 8, RemoteKey::BITS as usize);
        assert_eq!(size_of::<PortKey>(), 8);
    }

    #[test]
    fn targets_lead_where_they_were_made_for() {
        assert_eq!(Target::UNCLAIMED.lead(), Lead::Slot(UNCLAIMED));
        assert_eq!(Target::slot(7).lead(), Lead::Slot(7));
        assert_eq!(Target::step(0).lead(), Lead::Step(0));
        assert_eq!(Target::step(7).lead(), Lead::Step(7));
    }

    /// Steps 0 to 40, each leading to the next and the last to slot 3; rules 1 name
    /// nothing.
    struct Long;

    impl Tables for Long {
        fn step(&self, number: u32) -> Option<Step> {
            match number {
                0..40 => Some(Step::new(1, Target::step(number + 1))),
                40 => Some(Step::new(1, Target::slot(3))),
                _ => None,
            }
        }

        fn remote(&self, _: &RemoteKey) -> Option<Found> {
            Some(Found::NOTHING)
        }

        fn port(&self, _: &PortKey) -> Option<Found> {
            None
        }
    }

    #[test]
    fn steps_end() {
        let ends = Ends::new("192.0.2.1:80".parse().unwrap(), 0);
        for (target, slot) in [
            (Target::step(0), UNCLAIMED),
            (Target::step(99), UNCLAIMED),
            (Target::slot(3), 3),
            // As many as there can be, and one more.
            (Target::step(41 - MAX_STEPS), 3),
            (Target::step(40 - MAX_STEPS), UNCLAIMED),
        ] {
            let expected = Resolved {
                slot,
                by_port: false,
            };
            assert_eq!(resolve(&Long, target, &ends), expected);
        }
    }

    /// Step 0 asks by the remote port, step 1 by the local one, step 2 by none and
    /// step 3 by none as well; each leads to the next where its rules do not name the
    /// connection. Port 443 is in slot 5, local port 8080 in slot 6; the rules of step 2
    /// name nothing, those of step 3 slot 7.
    struct ByPorts;

    impl Tables for ByPorts {
        fn step(&self, number: u32) -> Option<Step> {
            (number <= 3).then(|| Step::new(number, Target::step(number + 1)))
        }

        fn remote(&self, key: &RemoteKey) -> Option<Found> {
            Some(match key.parts().0 {
                0 => Found::by_port(0),
                1 => Found::by_local_port(1),
                2 => Found::NOTHING,
                _ => Found::slot(7),
            })
        }

        fn port(&self, key: &PortKey) -> Option<Found> {
            if *key == PortKey::new(0, 443) {
                Some(Found::slot(5))
            } else if *key == PortKey::new(1, 8080) {
                Some(Found::slot(6))
            } else {
                None
            }
        }
    }

    /// What was found without any port can be kept for all ports of an address: so it
    /// has to be told, also of a step whose rules named nothing in the end.
    #[test]
    fn whether_a_port_had_a_say_is_told() {
        for (first, port, local_port, slot, by_port) in [
            (0, 443, 1, 5, true),
            (0, 80, 8080, 6, true),
            (1, 443, 8080, 6, true),
            // A port was asked for on the way, and the address decides.
            (0, 80, 1, 7, true),
            (1, 80, 1, 7, true),
            (2, 443, 8080, 7, false),
            (3, 443, 8080, 7, false),
        ] {
            let remote = std::net::SocketAddr::from(([192, 0, 2, 1], port));
            let found = resolve(
                &ByPorts,
                Target::step(first),
                &Ends::new(remote, local_port),
            );
            assert_eq!(
                found,
                Resolved { slot, by_port },
                "{first} {port} {local_port}"
            );
        }
    }
}
