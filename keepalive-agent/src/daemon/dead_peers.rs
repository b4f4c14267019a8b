//! Dead peers as the daemon reads them: those of the set in force, and what is
//! left of the set before.

use std::{future::pending, sync::Arc};

use anyhow::{Context as _, Result};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
};
use tracing::{debug, warn};

use super::{
    journal::{Entry, Journal, What},
    observed::Observations,
};
use crate::{
    datapath::{self, DeadPeers, LoadedSet, SetRecord},
    unblocked::awaited,
};

/// From here on some may have been lost.
const MANY: usize = 1000;

/// The readers of what the programs tell.
#[derive(Default)]
pub(super) struct DeadPeerWatch {
    current: Option<AsyncFd<DeadPeers>>,
    /// A program that is replaced may be running still.
    before: Option<DeadPeers>,
    journal: Arc<Journal>,
    observations: Observations,
    lost: u64,
    /// Whether there is more to be read than was, and nobody will say so.
    has_more: bool,
}

impl DeadPeerWatch {
    pub(super) fn new(journal: Arc<Journal>) -> Self {
        Self {
            journal,
            ..Self::default()
        }
    }

    /// Reads what an earlier agent has left unread.
    pub(super) fn left_by(&mut self, record: &SetRecord) {
        match DeadPeers::left_by(record) {
            Ok(left) => self.before = Some(left),
            Err(error) => debug!("{}", datapath::chain(&error)),
        }
    }

    /// Goes over to another set.
    pub(super) fn follow_set(&mut self, set: &mut LoadedSet) {
        self.read(None);
        let readers = set.take_dead_peers();
        let readers = readers.map(|readers| awaited(readers, Interest::READABLE));
        let current = match readers {
            Some(Ok(readers)) => Some(readers),
            None => None,
            Some(Err(error)) => {
                warn!("watching for dead peers: {error}; they are counted and not told of");
                None
            }
        };
        let before = std::mem::replace(&mut self.current, current);
        if let Some(before) = before {
            self.before = Some(before.into_inner());
        }
        self.lost = 0;
        self.follow();
    }

    /// Is told of each one at once where somebody wants to know.
    pub(super) fn follow(&mut self) {
        let followed = self.journal.is_followed();
        if let Some(current) = &mut self.current
            && let Err(error) = current.get_mut().follow(followed)
        {
            debug!("{}", datapath::chain(&error));
        }
    }

    /// Waits until there is something to be read. May be dropped while it waits.
    pub(super) async fn readable(&mut self) -> Result<()> {
        if self.has_more {
            return Ok(());
        }
        let Some(current) = &mut self.current else {
            return pending().await;
        };
        let guard = current.readable_mut().await;
        guard.context("waiting for dead peers")?.clear_ready();
        Ok(())
    }

    /// Notes what there is to be read; where that is very much, a part of it.
    pub(super) fn read(&mut self, record: Option<&SetRecord>) {
        let mut many = false;
        self.has_more = false;
        let current = self.current.as_mut().map(AsyncFd::get_mut);
        for readers in [self.before.as_mut(), current].into_iter().flatten() {
            let found = readers.read();
            many |= found.len() >= MANY;
            self.has_more |= found.len() >= DeadPeers::BATCH;
            for peer in found {
                self.observations.add(&peer);
                self.journal.add(&Entry::from(peer));
            }
        }
        if many && let Some(record) = record {
            self.note_lost(record);
        }
        if !self.journal.is_followed() {
            self.follow();
        }
    }

    /// Tells a client what was observed of silences.
    pub(super) fn serve_observed(&self, stream: UnixStream) {
        self.observations.serve(stream);
    }

    fn note_lost(&mut self, record: &SetRecord) {
        match record.dead_peers_lost() {
            Ok(lost) if lost > self.lost => {
                self.journal.note(What::DeadPeersLost {
                    lost: lost - self.lost,
                });
                self.lost = lost;
            }
            Ok(_) => {}
            Err(error) => debug!("{}", datapath::chain(&error)),
        }
    }

    /// Stops: what the program says is not wanted any more.
    pub(super) fn stop(&mut self) {
        self.current = None;
    }
}
