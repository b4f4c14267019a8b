//! Census: how many TCP sockets of each namespace have been found in processes,
//! against how many the kernel counts there.

use std::collections::HashMap;

use keepalive_common::descriptor::{DescriptorRecord, Kind};
use tracing::debug;

use super::{Descriptor, Held, Namespace, Result, all_held, tcp_sockets};

/// What a pass over the descriptors of all processes has found.
#[derive(Clone, Debug, Default)]
pub struct Census {
    held: Held,
    /// Namespace → TCP sockets that processes hold.
    found: HashMap<u64, u64>,
}

impl Census {
    /// Adds a descriptor; `is_new` says that it leads to what no other one before
    /// has led to.
    pub fn add(&mut self, record: &DescriptorRecord, is_new: bool) {
        let descriptor = Descriptor {
            process: record.process,
            number: record.descriptor,
        };
        let netns = u64::from(record.netns);
        match Kind::from_number(record.kind) {
            Some(Kind::Namespace) => self.held.namespaces.push(descriptor),
            Some(kind) => {
                self.held.sockets.entry(netns).or_insert(descriptor);
                // The kernel does not count MPTCP sockets, but their subflows.
                if is_new && kind != Kind::Mptcp {
                    *self.found.entry(netns).or_default() += 1;
                }
            }
            None => {}
        }
    }

    /// All namespaces that can be found, the agent's own first.
    ///
    /// # Errors
    ///
    /// When not even the own one can be read.
    pub fn namespaces(&self) -> Result<Vec<Namespace>> {
        all_held(&self.held)
    }

    /// Of each of these namespaces whether it has TCP sockets that no process was
    /// found to hold: connections that wait to be accepted, those of the kernel
    /// (NFS), the subflows of MPTCP, descriptors on their way from one process to
    /// another or registered with io_uring, and connections that the kernel is
    /// ending. One that is gone has none.
    ///
    /// # Errors
    ///
    /// When no thread can be started. That of one namespace: it cannot be entered,
    /// or the kernel does not tell its number.
    pub fn have_others(&self, namespaces: &[Namespace]) -> Result<Vec<Result<bool>>> {
        let counted = tcp_sockets(namespaces)?;
        let others = namespaces.iter().zip(counted).map(|(netns, counted)| {
            let found = self.found.get(&netns.id).copied().unwrap_or(0);
            let all = counted?.unwrap_or(0);
            if all > found {
                debug!(
                    netns = netns.name,
                    sockets = all,
                    found,
                    "has sockets that no process holds"
                );
            }
            Ok(all > found)
        });
        Ok(others.collect())
    }
}
