//! Walk: every connection of the node, once, with who holds it.
//!
//! One pass over the descriptors of all processes finds those that a process
//! holds, whatever namespace they are in. Left are those that none holds: they
//! wait to be accepted, belong to the kernel (NFS) or to an MPTCP socket, or are
//! on the way from one process to another. The kernel counts the sockets of each
//! namespace, so it is known where there are any, and only there all of its
//! sockets are gone through: each time the kernel goes through the table that all
//! namespaces share.

use std::collections::BTreeMap;

use anyhow::{Error, Result, anyhow};
use keepalive_common::{
    descriptor::{HeldRecord, Kind},
    socket::SocketRecord,
};
use tracing::debug;

use super::holders::{Holder, Holders, Key};
use crate::{
    datapath::Lister,
    netns::{self, Census, Namespace},
};

/// A namespace whose connections could not be listed, or not all of them.
#[derive(Debug)]
pub struct Unseen {
    /// What it is called.
    pub netns: String,
    /// What stood in the way.
    pub error: Error,
}

/// What takes the connections. It may run on threads that are inside the
/// namespaces, one after the other.
pub type Taker<'a> =
    dyn FnMut(&Namespace, &SocketRecord, Option<Holder<'_>>) -> Result<()> + Send + 'a;

/// Hands on every connection; returns the namespaces that could not be seen, or
/// not wholly. Stops when `take` fails.
///
/// # Errors
///
/// When namespaces or processes cannot be found, or `take` fails.
pub fn each_connection(lister: &Lister, take: &mut Taker<'_>) -> Result<Vec<Unseen>> {
    match HeldSockets::find(lister) {
        Ok(held) => held.walk(lister, take),
        Err(error) => {
            debug!("{error:#}; descriptors are looked for in /proc");
            let holders = Holders::read()?;
            let mut unseen = Vec::new();
            for netns in netns::all()? {
                let listed = list(lister, &netns, &holders, take)?;
                unseen.extend(listed.err().map(|error| Unseen::of(&netns, error)));
            }
            Ok(unseen)
        }
    }
}

impl Unseen {
    fn of(netns: &Namespace, error: Error) -> Self {
        Self {
            netns: netns.name.clone(),
            error,
        }
    }
}

/// Hands on the connections of a namespace that have not been found in a
/// process; the inner error is about this namespace only. One that is gone has
/// none.
fn list(
    lister: &Lister,
    netns: &Namespace,
    holders: &Holders,
    take: &mut Taker<'_>,
) -> Result<Result<()>> {
    let mut failed = None;
    let listed = netns.enter(|| {
        lister.list(&mut |record| {
            if holders.knows(record) {
                return Ok(());
            }
            take(netns, record, holders.of(record)).map_err(|error| {
                failed = Some(error);
                anyhow!("stopped")
            })
        })
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(listed.and_then(Option::transpose).map(drop)),
    }
}

/// What processes hold.
#[derive(Default)]
struct HeldSockets {
    connections: Vec<SocketRecord>,
    holders: Holders,
    census: Census,
}

impl HeldSockets {
    fn find(lister: &Lister) -> Result<Self> {
        let mut held = Self::default();
        lister.descriptors(|record| held.add(record))?;
        Ok(held)
    }

    fn add(&mut self, HeldRecord { descriptor, socket }: &HeldRecord) {
        let kind = Kind::from_number(descriptor.kind);
        let is_new = match kind {
            Some(Kind::Namespace) | None => true,
            // Its subflows have the same inode number, and ports of their own.
            Some(Kind::Mptcp) => {
                let key = Key::of_inode(descriptor.inode);
                self.holders.add(descriptor.process, key)
            }
            Some(_) => {
                let key = Key::of(descriptor.inode, socket);
                self.holders.add(descriptor.process, key)
            }
        };
        self.census.add(descriptor, is_new);
        if is_new && kind == Some(Kind::Connection) {
            self.connections.push(*socket);
        }
    }

    fn walk(self, lister: &Lister, take: &mut Taker<'_>) -> Result<Vec<Unseen>> {
        let mut by_netns: BTreeMap<u64, Vec<SocketRecord>> = BTreeMap::new();
        for connection in self.connections {
            let of_netns = by_netns.entry(connection.netns.into()).or_default();
            of_netns.push(connection);
        }
        let mut unseen = Vec::new();
        let holders = self.holders.named();
        let namespaces = self.census.namespaces()?;
        let others = self.census.have_others(&namespaces)?;
        for (netns, has_others) in namespaces.iter().zip(others) {
            for record in by_netns.remove(&netns.id).unwrap_or_default() {
                take(netns, &record, holders.of(&record))?;
            }
            let listed = match has_others {
                Ok(true) => list(lister, netns, &holders, take)?,
                Ok(false) => Ok(()),
                Err(error) => Err(error),
            };
            unseen.extend(listed.err().map(|error| Unseen::of(netns, error)));
        }
        // Of namespaces that nothing leads to any more.
        for (id, records) in by_netns {
            let netns = Namespace::without_a_way(id);
            for record in records {
                take(&netns, &record, holders.of(&record))?;
            }
        }
        Ok(unseen)
    }
}
