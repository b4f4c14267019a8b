//! Walk: every connection of the node, once, with who holds it.
//!
//! One pass over the descriptors of all processes finds those that a process
//! holds, whatever namespace they are in. Left are those that none holds: they
//! wait to be accepted, belong to the kernel (NFS) or to an MPTCP socket, or are
//! on the way from one process to another. The kernel counts the sockets of each
//! namespace, so it is known where there are any, and only there all of its
//! sockets are gone through: each time the kernel goes through the table that all
//! namespaces share.

use std::{
    collections::{BTreeMap, HashSet},
    hash::{BuildHasher as _, RandomState},
};

use keepalive_common::{
    descriptor::{HeldRecord, Kind},
    socket::SocketRecord,
};
use tracing::debug;

use super::{
    Error, Result,
    holders::{Holder, Holders, Key},
};
use crate::{
    datapath::{self, Lister, chain},
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
pub type Taker<'a, E> =
    dyn FnMut(&Namespace, &SocketRecord, Option<Holder<'_>>) -> Result<(), E> + Send + 'a;

/// Hands on every connection; returns the namespaces that could not be seen, or
/// not wholly. Stops when `take` fails.
///
/// # Errors
///
/// When namespaces or processes cannot be found, or `take` fails.
pub fn each_connection<E: From<Error> + Send>(
    lister: &Lister,
    take: &mut Taker<'_, E>,
) -> Result<Vec<Unseen>, E> {
    match HeldSockets::find(lister) {
        Ok(held) => held.walk(lister, take),
        Err(error) => {
            debug!("{}; descriptors are looked for in /proc", chain(&error));
            let holders = Holders::read()?;
            let mut unseen = Vec::new();
            for netns in netns::all().map_err(Error::from)? {
                let outcome = list(lister, &netns, &holders, take)?;
                unseen.extend(outcome.err().map(|error| Unseen::of(&netns, error)));
            }
            Ok(unseen)
        }
    }
}

/// Has every connection added up once, without who holds it: nothing is kept of
/// each but a number. Returns the sum, and how many namespaces could not be seen,
/// or not wholly.
///
/// # Errors
///
/// When namespaces cannot be found, or `add` fails.
pub fn sum_up<T: Default + Send>(
    lister: &Lister,
    add: &mut (dyn FnMut(&mut T, &SocketRecord) -> Result<()> + Send),
) -> Result<(T, u64)> {
    let mut sum = T::default();
    let mut seen = Seen::default();
    let mut census = Census::default();
    let mut failed = None;
    let found = lister.descriptors(|HeldRecord { descriptor, socket }| {
        let kind = Kind::from_number(descriptor.kind);
        let is_new = match kind {
            Some(Kind::Namespace) | None => true,
            Some(Kind::Mptcp) => seen.add(Key::of_inode(descriptor.inode)),
            Some(_) => seen.add(Key::of(descriptor.inode, socket)),
        };
        census.add(descriptor, is_new);
        if is_new && kind == Some(Kind::Connection) && failed.is_none() {
            failed = add(&mut sum, socket).err();
        }
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let (namespaces, others) = match found {
        Ok(()) => {
            let namespaces = census.namespaces()?;
            let others = census.have_others(&namespaces)?;
            (namespaces, others)
        }
        Err(error) => {
            debug!("{}; each network namespace is entered", chain(&error));
            (sum, seen) = Default::default();
            let namespaces = netns::all()?;
            let others = namespaces.iter().map(|_| Ok(true)).collect();
            (namespaces, others)
        }
    };
    let mut unseen = 0;
    for (netns, has_others) in namespaces.iter().zip(others) {
        let outcome = match has_others {
            Ok(false) => continue,
            Ok(true) => list_with(lister, netns, |record| {
                if seen.add(Key::of(record.inode, record)) {
                    add(&mut sum, record)
                } else {
                    Ok(())
                }
            })?,
            Err(error) => Err(error.into()),
        };
        if let Err(error) = outcome {
            debug!("network namespace {}: {}", netns.name, chain(&error));
            unseen += 1;
        }
    }
    Ok((sum, unseen))
}

/// What each socket that was met comes to as a number: two of a million take the
/// same one once in tens of millions of times.
#[derive(Default)]
struct Seen {
    hasher: RandomState,
    numbers: HashSet<u64>,
}

impl Seen {
    /// Whether it is met for the first time.
    fn add(&mut self, key: Key) -> bool {
        self.numbers.insert(self.hasher.hash_one(key))
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
fn list<E: Send>(
    lister: &Lister,
    netns: &Namespace,
    holders: &Holders,
    take: &mut Taker<'_, E>,
) -> Result<Result<()>, E> {
    list_with(lister, netns, |record| {
        if holders.knows(record) {
            return Ok(());
        }
        take(netns, record, holders.of(record))
    })
}

/// Hands on the connections of a namespace; the inner error is about this
/// namespace only. One that is gone has none.
fn list_with<E: Send>(
    lister: &Lister,
    netns: &Namespace,
    mut take: impl FnMut(&SocketRecord) -> Result<(), E> + Send,
) -> Result<Result<()>, E> {
    match netns.enter(|| lister.list(&mut |record| take(record).map_err(Ended::Taker))) {
        Ok(None | Some(Ok(_))) => Ok(Ok(())),
        Ok(Some(Err(Ended::Listing(error)))) => Ok(Err(error.into())),
        Ok(Some(Err(Ended::Taker(error)))) => Err(error),
        Err(error) => Ok(Err(error.into())),
    }
}

/// Why a listing has ended before its end.
enum Ended<E> {
    Listing(datapath::Error),
    Taker(E),
}

impl<E> From<datapath::Error> for Ended<E> {
    fn from(error: datapath::Error) -> Self {
        Self::Listing(error)
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

    fn walk<E: From<Error> + Send>(
        self,
        lister: &Lister,
        take: &mut Taker<'_, E>,
    ) -> Result<Vec<Unseen>, E> {
        let mut by_netns: BTreeMap<u64, Vec<SocketRecord>> = BTreeMap::new();
        for connection in self.connections {
            let of_netns = by_netns.entry(connection.netns.into()).or_default();
            of_netns.push(connection);
        }
        let mut unseen = Vec::new();
        let holders = self.holders.named();
        let namespaces = self.census.namespaces().map_err(Error::from)?;
        let others = self.census.have_others(&namespaces).map_err(Error::from)?;
        for (netns, has_others) in namespaces.iter().zip(others) {
            for record in by_netns.remove(&netns.id).unwrap_or_default() {
                take(netns, &record, holders.of(&record))?;
            }
            let outcome = match has_others {
                Ok(true) => list(lister, netns, &holders, take)?,
                Ok(false) => Ok(()),
                Err(error) => Err(error.into()),
            };
            unseen.extend(outcome.err().map(|error| Unseen::of(netns, error)));
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
