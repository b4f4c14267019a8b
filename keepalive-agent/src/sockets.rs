//! Every connection of the node: what keepalive it really has, whose setting
//! that is, and what is going to happen on it. Nothing is changed.

pub mod cgroups;
pub mod columns;
pub mod filter;
pub mod forecast;
pub mod format;
pub mod holders;
pub mod source;
pub mod summary;
mod walk;

use std::io;

use keepalive_common::{
    plan::{Options, plan},
    socket::SocketRecord,
};

use thiserror::Error;

use crate::{
    assignment::Assigned,
    datapath::{self, Lister},
    hierarchy::CgroupPath,
    netns::{self, Namespace},
};
use cgroups::{Cgroups, Known};
use filter::Filter;
use forecast::{Forecast, Moment, Timers};
use holders::Holder;
use source::{Settings, settings};
pub use walk::{Taker, Unseen, each_connection, sum_up};

/// Why connections cannot be listed.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel refuses a program, or breaks off.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// No namespaces can be found, or one cannot be entered.
    #[error(transparent)]
    Namespaces(#[from] netns::Error),
    /// It cannot be told which cgroups there are.
    #[error("reading the cgroup hierarchy")]
    Hierarchy(#[source] io::Error),
    /// A config in force cannot be understood.
    #[error("the globs of the config in force on {root} are too large together")]
    Globs {
        /// The cgroup.
        root: CgroupPath,
        /// What is wrong with them.
        #[source]
        source: globset::Error,
    },
    /// There is no process of this id.
    #[error("there is no process {0}")]
    NoProcess(u32),
    /// It cannot be told what processes hold.
    #[error("reading {path}")]
    Processes {
        /// Where the kernel tells.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

type Result<T, E = Error> = std::result::Result<T, E>;

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
    /// Who holds it; none where no process was seen to.
    pub holder: Option<Holder<'a>>,
    /// Whether all processes were looked at, and none holds it.
    pub is_held_by_nobody: bool,
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
        let asked = record.originals.asked(&has);
        let settings = settings(&has, &asked, enforced, &record.environment);
        let would = counted.map(|policy| plan(policy, &has, &record.environment).wants);
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
            gives_up_ms: settings.gives_up_ms,
        };
        Self {
            netns,
            record,
            cgroup,
            policy,
            holder: None,
            is_held_by_nobody: false,
            settings,
            would: would.filter(|wants| *wants != has),
            forecast: Forecast::new(timers.as_ref(), &moment),
        }
    }
}

/// What receives the connections. It runs on the threads that are inside the
/// namespaces, one after the other.
pub trait Receiver<E>: Send {
    /// Takes one of the wanted connections.
    ///
    /// # Errors
    ///
    /// When it can go on no longer; that ends the walk.
    fn take(&mut self, connection: &Connection<'_>) -> Result<(), E>;

    /// Told now and then how many sockets have been looked at.
    fn progress(&mut self, looked_at: u64);
}

/// Sockets between two calls of [`Receiver::progress`].
const STEP: u64 = 1024;

/// Hands on the connections that are wanted, and returns the namespaces that
/// could not be seen, or not wholly. `sees_all` says that this process sees all
/// others.
///
/// # Errors
///
/// When namespaces or processes cannot be found, or the receiver fails.
pub fn list<E: From<Error> + Send>(
    filter: &Filter,
    sees_all: bool,
    lister: &Lister,
    cgroups: &mut Cgroups,
    receiver: &mut dyn Receiver<E>,
) -> Result<Vec<Unseen>, E> {
    let mut looked_at = 0;
    walk::each_connection(lister, &mut |netns, record, holder| {
        looked_at += 1;
        if looked_at % STEP == 0 {
            receiver.progress(looked_at);
        }
        if !filter.wants_record(record) {
            return Ok(());
        }
        let (cgroup, policy) = cgroups.get(record).map_err(Error::Hierarchy)?;
        let mut connection = Connection::new(netns, record, cgroup, policy);
        connection.holder = holder;
        connection.is_held_by_nobody = sees_all && holder.is_none();
        if filter.wants(&connection) {
            receiver.take(&connection)?;
        }
        Ok(())
    })
}

/// Connections for the tests of what is done with them.
#[cfg(test)]
pub(crate) mod trial {
    use std::net::SocketAddr;

    use keepalive_common::{environment::Environment, socket::Addresses};

    use super::*;

    /// A connection between two addresses with these options.
    pub(crate) fn record(local: &str, remote: &str, options: &Options) -> SocketRecord {
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
        record.environment = Environment::UNCHANGED;
        record
    }

    /// Keepalive on with nothing else set, on a connection to another machine.
    pub(crate) fn protected(idle: u32) -> SocketRecord {
        let options = Options {
            keepalive: true,
            idle,
            interval: 10,
            probes: 6,
            ..Options::default()
        };
        record("192.0.2.1:40000", "198.51.100.7:5432", &options)
    }
}
