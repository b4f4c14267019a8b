//! Every connection of the node: what keepalive it really has, whose setting
//! that is, and what is going to happen on it. Nothing is changed.

pub mod cgroups;
pub mod filter;
pub mod forecast;
pub mod format;
pub mod holders;
pub mod source;
pub mod summary;

use anyhow::{Error, Result};
use keepalive_common::{
    plan::{Options, plan},
    socket::SocketRecord,
};
use tracing::debug;

use crate::{
    assignment::Assigned,
    datapath::Lister,
    netns::{self, Namespace},
};
use cgroups::{Cgroups, Known};
use filter::Filter;
use forecast::{Forecast, Moment, Timers};
use holders::{Holder, Holders};
use source::{Settings, Sysctls, settings};

/// A connection with everything that is known about it.
#[derive(Clone, Debug)]
pub struct Connection<'a> {
    /// Where it is.
    pub netns: &'a Namespace,
    /// As the kernel has it.
    pub record: &'a SocketRecord,
    /// Its cgroup, if that still exists.
    pub cgroup: Option<&'a Known>,
    /// The policy that claims it.
    pub policy: Option<&'a Assigned>,
    /// Who holds it; none where nobody has asked, or no process was seen to.
    pub holder: Option<Holder<'a>>,
    /// What holds for it.
    pub settings: Settings,
    /// What its policy would make of it, if that is only counted; none where it
    /// would stay as it is.
    pub would: Option<Options>,
    /// What is going to happen on it.
    pub forecast: Forecast,
}

impl<'a> Connection<'a> {
    /// Works out what a record means.
    #[must_use]
    pub fn new(
        netns: &'a Namespace,
        sysctls: &Sysctls,
        record: &'a SocketRecord,
        cgroup: Option<&'a Known>,
        policy: Option<&'a Assigned>,
    ) -> Self {
        let claimed = policy.map(|assigned| &assigned.policy);
        let has = record.options();
        let (enforced, counted) = match claimed {
            Some(policy) if policy.is_enforced() => (claimed, None),
            _ => (None, claimed),
        };
        let settings = settings(&has, enforced, sysctls);
        let would = counted.map(|policy| plan(policy, &has));
        let timers = settings.keepalive.value.then_some(Timers {
            idle: settings.idle.value,
            interval: settings.interval.value,
            probes: settings.probes.value,
            user_timeout: settings.user_timeout.value,
        });
        let moment = Moment {
            timer_ms: record.timer_ms,
            silent_ms: record.silent_ms,
            in_flight: record.packets_out > 0,
        };
        Self {
            netns,
            record,
            cgroup,
            policy,
            holder: None,
            settings,
            would: would.filter(|wants| *wants != has),
            forecast: Forecast::new(timers.as_ref(), &moment),
        }
    }
}

/// A namespace whose connections could not be listed, or not all of them.
#[derive(Debug)]
pub struct Unseen {
    /// What it is called.
    pub netns: String,
    /// What stood in the way.
    pub error: Error,
}

/// One walk over all connections.
#[derive(Debug)]
pub struct Listing<'a> {
    /// Which connections are wanted.
    pub filter: &'a Filter,
    /// Whether it is wanted who holds them.
    pub with_holders: bool,
}

/// What receives the connections. It runs on the threads that are inside the
/// namespaces, one after the other.
pub trait Receiver: Send {
    /// Takes one of the wanted connections.
    ///
    /// # Errors
    ///
    /// When it can go on no longer; that ends the walk.
    fn take(&mut self, connection: &Connection<'_>) -> Result<()>;

    /// Told now and then how many sockets have been looked at.
    fn progress(&mut self, looked_at: u64);
}

/// Sockets between two calls of [`Receiver::progress`].
const STEP: u64 = 1024;

impl Listing<'_> {
    /// Walks through every namespace, and returns those that it could not see.
    ///
    /// # Errors
    ///
    /// When the namespaces cannot be found, or the receiver fails.
    pub fn walk(
        &self,
        lister: &mut Lister,
        cgroups: &mut Cgroups,
        receiver: &mut dyn Receiver,
    ) -> Result<Vec<Unseen>> {
        // Where the kernel cannot be asked they are looked for in /proc.
        let (holders, descriptors) = Holders::list(lister)
            .inspect_err(|error| debug!("looking for descriptors in /proc: {error:#}"))
            .ok()
            .unzip();
        let find = || {
            descriptors
                .as_deref()
                .map_or_else(netns::all, netns::all_with)
        };
        let mut pass = Pass {
            listing: self,
            lister,
            cgroups,
            receiver,
            holders,
            looked_at: 0,
        };
        let mut unseen = Vec::new();
        for netns in find()? {
            match pass.visit(&netns) {
                Ok(()) => {}
                Err(Failure::Receiver(error)) => return Err(error),
                Err(Failure::Netns(error)) => unseen.push(Unseen {
                    netns: netns.name,
                    error,
                }),
                Err(Failure::Gone) => {
                    // A process that ended, say. Without another way in it is
                    // gone itself.
                    let again = find()?.into_iter().find(|now| now.id == netns.id);
                    match again.map(|netns| pass.visit(&netns)) {
                        None | Some(Ok(()) | Err(Failure::Gone)) => {}
                        Some(Err(Failure::Receiver(error))) => return Err(error),
                        Some(Err(Failure::Netns(error))) => unseen.push(Unseen {
                            netns: netns.name,
                            error,
                        }),
                    }
                }
            }
        }
        Ok(unseen)
    }
}

/// Why a namespace was not listed to its end.
enum Failure {
    /// What it was found by is gone.
    Gone,
    /// It may not be entered, or listing broke off.
    Netns(Error),
    /// Nobody wants more.
    Receiver(Error),
}

struct Pass<'a> {
    listing: &'a Listing<'a>,
    lister: &'a mut Lister,
    cgroups: &'a mut Cgroups,
    receiver: &'a mut dyn Receiver,
    /// Read when the first connection is wanted.
    holders: Option<Holders>,
    looked_at: u64,
}

impl Pass<'_> {
    fn visit(&mut self, netns: &Namespace) -> Result<(), Failure> {
        match netns.enter(|| self.list(netns)) {
            Ok(Some(listed)) => listed,
            Ok(None) => Err(Failure::Gone),
            Err(error) => Err(Failure::Netns(error)),
        }
    }

    /// Lists the namespace that the calling thread is in.
    fn list(&mut self, netns: &Namespace) -> Result<(), Failure> {
        let sysctls = Sysctls::here().map_err(Failure::Netns)?;
        let Self {
            listing,
            lister,
            cgroups,
            receiver,
            holders,
            looked_at,
        } = self;
        let mut failed = false;
        let listed = lister.list(&mut |record| {
            *looked_at += 1;
            if *looked_at % STEP == 0 {
                receiver.progress(*looked_at);
            }
            if !listing.filter.wants_record(record) {
                return Ok(());
            }
            let (cgroup, policy) = cgroups.get(record)?;
            let mut connection = Connection::new(netns, &sysctls, record, cgroup, policy);
            if !listing.filter.wants(&connection) {
                return Ok(());
            }
            if listing.with_holders {
                if holders.is_none() {
                    *holders = Some(Holders::read()?);
                }
                connection.holder = holders.as_ref().and_then(|found| found.of(record.inode));
            }
            receiver.take(&connection).inspect_err(|_| failed = true)
        });
        match listed {
            Ok(_) => Ok(()),
            Err(error) if failed => Err(Failure::Receiver(error)),
            Err(error) => Err(Failure::Netns(error)),
        }
    }
}

/// Connections for the tests of what is done with them.
#[cfg(test)]
mod trial {
    use std::net::SocketAddr;

    use keepalive_common::socket::Addresses;

    use super::*;

    pub(super) const SYSCTLS: Sysctls = Sysctls {
        idle: 7200,
        interval: 75,
        probes: 9,
    };

    /// A connection between two addresses with these options.
    pub(super) fn record(local: &str, remote: &str, options: &Options) -> SocketRecord {
        let parts = |text: &str| {
            let address: SocketAddr = text.parse().unwrap();
            let mut bytes = [0; 16];
            match address {
                SocketAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.ip().octets()),
                SocketAddr::V6(v6) => bytes = v6.ip().octets(),
            }
            (
                bytes,
                address.port(),
                if address.is_ipv4() { 2 } else { 10 },
            )
        };
        let (local_address, local_port, family) = parts(local);
        let (remote_address, remote_port, _) = parts(remote);
        let addresses = Addresses {
            family,
            local_address,
            remote_address,
            local_port,
            remote_port,
        };
        let mut record = SocketRecord::new(&addresses, options);
        record.state = 1;
        record.inode = 4711;
        record.cgroup = 42;
        record
    }

    /// Keepalive on with nothing else set, on a connection to another machine.
    pub(super) fn protected(idle: u32) -> SocketRecord {
        let options = Options {
            keepalive: true,
            idle,
            interval: 10,
            probes: 6,
            user_timeout: 0,
        };
        record("192.0.2.1:40000", "198.51.100.7:5432", &options)
    }
}
