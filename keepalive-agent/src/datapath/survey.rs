//! Survey: which namespaces a sweep has to enter, found without entering them.
//!
//! Options can be set only by an iterator over the sockets of one network
//! namespace, for which the kernel goes through the table that all namespaces
//! share. So a sweep of every namespace costs namespaces × connections. This pass
//! over the descriptors of all processes costs connections only, and tells where
//! there is anything to do.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
};

use keepalive_common::descriptor::{DescriptorRecord, Kind};

use super::{Error, iterators::read_records, lister::read_descriptors};
use crate::netns::{self, Census, Descriptor, Namespace};

/// What a pass over the descriptors of all processes has found.
#[derive(Debug, Default)]
pub struct Survey {
    /// The namespaces that have connections, or may have some; the agent's own
    /// first.
    pub namespaces: Vec<Surveyed>,
    /// Namespaces of which it is not known, and why. They may have connections
    /// that no process was found to hold; those that a process holds are in
    /// [`Self::namespaces`] too.
    pub unknown: Vec<(Namespace, netns::Error)>,
}

/// A namespace, and what there is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surveyed {
    /// Where the connections are.
    pub namespace: Namespace,
    /// Connections that processes hold.
    pub connections: u64,
    /// Those of them that the policy that claims them wants to change.
    pub due: u64,
    /// Whether there are TCP sockets that no process was found to hold (see
    /// [`Census::have_others`]): some may be connections, and due.
    pub has_others: bool,
}

impl Surveyed {
    /// Whether a pass would find nothing to change.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        self.due == 0 && !self.has_others
    }
}

/// Sockets for which a pass over their namespace may have something to do: connections
/// that are due, and what may have such that no process holds, by namespace.
pub type DueSockets = BTreeMap<u64, Descriptor>;

/// Adds what one process holds, from what the program `survey` writes of it.
///
/// # Errors
///
/// When the kernel breaks off, or tells of other processes too.
pub(super) fn add_due_sockets(
    process: u32,
    iterator: File,
    due: &mut DueSockets,
) -> Result<(), Error> {
    read_records(iterator, |record: &DescriptorRecord| {
        if record.process != process {
            return Err(Error::OtherProcesses);
        }
        let number = record.descriptor;
        match Kind::from_number(record.kind) {
            Some(Kind::Due | Kind::OtherTcp | Kind::Mptcp) => {
                let descriptor = Descriptor { process, number };
                due.entry(record.netns.into()).or_insert(descriptor);
            }
            Some(Kind::Connection | Kind::Namespace) | None => {}
        }
        Ok(())
    })
    .map(drop)
}

impl Survey {
    /// Reads what the program `survey` writes.
    ///
    /// # Errors
    ///
    /// When the kernel breaks off, or knows this process by another id than
    /// /proc: then not all processes can be seen, and every namespace has to be
    /// entered. Or when not even the own namespace can be found.
    pub(super) fn read(iterator: File) -> Result<Self, Error> {
        let mut seen = HashSet::new();
        let mut census = Census::default();
        let mut counts: HashMap<u64, (u64, u64)> = HashMap::new();
        read_descriptors(iterator, |record: &DescriptorRecord| {
            // An inode number can come twice, very rarely: the namespace is
            // taken for one with other sockets then, and entered.
            let is_new = seen.insert((record.netns, record.inode));
            census.add(record, is_new);
            let kind = Kind::from_number(record.kind);
            if is_new && matches!(kind, Some(Kind::Connection | Kind::Due)) {
                let (connections, due) = counts.entry(record.netns.into()).or_default();
                *connections += 1;
                *due += u64::from(kind == Some(Kind::Due));
            }
        })?;
        let mut survey = Self::default();
        let namespaces = census.namespaces()?;
        let others = census.have_others(&namespaces)?;
        for (namespace, has_others) in namespaces.into_iter().zip(others) {
            let (connections, due) = counts.get(&namespace.id).copied().unwrap_or_default();
            let has_others = match has_others {
                Ok(has_others) => has_others,
                Err(error) => {
                    survey.unknown.push((namespace.clone(), error));
                    false
                }
            };
            if connections > 0 || has_others {
                survey.namespaces.push(Surveyed {
                    namespace,
                    connections,
                    due,
                    has_others,
                });
            }
        }
        Ok(survey)
    }
}
