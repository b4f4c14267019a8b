//! Dead peers: a record of each connection whose peer was found dead, from the
//! program of one set. What is not read in time is lost; the counters of the set
//! lose none, and say how many records were.

use std::{
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    time::{Duration, SystemTime},
};

use aya::maps::{Array, Map, MapData, RingBuf};
use keepalive_common::dead_peer::{self, Cause};
use rustix::time::{ClockId, clock_gettime};

use super::{
    Error, SetRecord,
    description::{Counted, MapHandle, Slots},
    set_record::{by_id, data},
};
use crate::assignment;

/// A connection whose peer was found dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadPeer {
    /// When.
    pub at: SystemTime,
    /// Id of its cgroup; 0 where the kernel does not tell.
    pub cgroup: u64,
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Name of the policy that claimed it.
    pub policy: String,
    /// How that was found out.
    pub cause: Cause,
    /// The error that the application gets, positive.
    pub errno: u32,
    /// Probes that were not answered.
    pub probes: u32,
    /// How long nothing had come from the peer.
    pub silence: Duration,
}

/// The records of one set, in their order.
pub struct DeadPeers {
    ring: RingBuf<MapData>,
    followed: Array<MapData, u32>,
    slots: Slots,
    pub(super) ring_handle: MapHandle,
    pub(super) followed_handle: MapHandle,
}

impl DeadPeers {
    /// As many records as are handed over at a time.
    pub const BATCH: usize = 4096;

    pub(super) fn new(ring: Map, followed: Map, slots: Slots) -> Result<Self, Error> {
        const USING: &str = "using the records of dead peers";
        let [ring_handle, followed_handle] = [
            MapHandle::of(data(&ring)?)?,
            MapHandle::of(data(&followed)?)?,
        ];
        Ok(Self {
            ring: ring.try_into().map_err(Error::map(USING))?,
            followed: followed.try_into().map_err(Error::map(USING))?,
            slots,
            ring_handle,
            followed_handle,
        })
    }

    /// Those that nobody has read of a set that another agent has left.
    ///
    /// # Errors
    ///
    /// When its maps cannot be opened by their ids, which takes CAP_SYS_ADMIN.
    pub fn left_by(record: &SetRecord) -> Result<Self, Error> {
        let description = record.description();
        let maps = &description.maps;
        Self::new(
            Map::RingBuf(by_id(maps.deaths)?),
            Map::Array(by_id(maps.followed)?),
            description.slots.clone(),
        )
    }

    /// The descriptors of the maps that a program has to keep alive for those who
    /// read the records.
    pub(super) fn handles(&self) -> [&OwnedFd; 2] {
        [&self.ring_handle.fd, &self.followed_handle.fd]
    }

    /// What there is, without waiting; never more than [`Self::BATCH`] at a time.
    pub fn read(&mut self) -> Vec<DeadPeer> {
        let mut found = Vec::new();
        while found.len() < Self::BATCH
            && let Some(record) = self.ring.next()
        {
            found.extend(understand(&record, &self.slots));
        }
        found
    }

    /// Whether the descriptor is to become readable with each record. Otherwise
    /// it does when there are so many that some would be lost soon.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn follow(&mut self, follow: bool) -> Result<(), Error> {
        self.followed
            .set(0, u32::from(follow), 0)
            .map_err(Error::map("asking for dead peers as they are found"))
    }
}

impl AsRawFd for DeadPeers {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

fn understand(record: &[u8], slots: &[(u32, Counted)]) -> Option<DeadPeer> {
    let record: dead_peer::DeadPeer = bytemuck::try_pod_read_unaligned(record).ok()?;
    let whose = slots.iter().find(|(slot, _)| *slot == record.slot);
    Some(DeadPeer {
        at: time_of(record.at),
        cgroup: record.cgroup,
        local: record.local(),
        remote: record.remote(),
        policy: whose
            .map_or(assignment::UNCLAIMED, |(_, counted)| &counted.name)
            .to_owned(),
        cause: Cause::from_number(record.cause)?,
        errno: record.errno,
        probes: record.probes_out,
        silence: Duration::from_millis(record.silent_ms),
    })
}

/// The time of day at which the machine had been up for so many nanoseconds.
fn time_of(since_boot: u64) -> SystemTime {
    let now = clock_gettime(ClockId::Boottime);
    let now = Duration::new(
        u64::try_from(now.tv_sec).unwrap_or_default(),
        u32::try_from(now.tv_nsec).unwrap_or_default(),
    );
    SystemTime::now() - now.saturating_sub(Duration::from_nanos(since_boot))
}

#[cfg(test)]
mod tests {
    use keepalive_common::socket::{AF_INET, Addresses};

    use super::*;

    #[test]
    fn a_record_is_a_dead_peer() {
        let mut address = [0; 16];
        address[..4].copy_from_slice(&[192, 0, 2, 1]);
        let mut record = dead_peer::DeadPeer::new(&Addresses {
            family: AF_INET,
            local_address: address,
            remote_address: address,
            local_port: 22,
            remote_port: 50_000,
        });
        record.at = clock_gettime(ClockId::Boottime).tv_sec.cast_unsigned() * 1_000_000_000;
        record.slot = 3;
        record.cause = Cause::Probes as u32;
        record.silent_ms = 1500;
        let slots = [(
            3,
            Counted {
                name: "redis".to_owned(),
                enforced: true,
            },
        )];
        let bytes = bytemuck::bytes_of(&record);
        let found = understand(bytes, &slots).unwrap();
        assert_eq!(found.policy, "redis");
        assert_eq!(found.local.to_string(), "192.0.2.1:22");
        assert_eq!(found.silence, Duration::from_millis(1500));
        let age = SystemTime::now().duration_since(found.at).unwrap();
        assert!(age < Duration::from_mins(1), "{age:?}");
        assert_eq!(
            understand(bytes, &[]).unwrap().policy,
            assignment::UNCLAIMED
        );
        assert_eq!(understand(&bytes[1..], &slots), None);
        record.cause = 9;
        assert_eq!(understand(bytemuck::bytes_of(&record), &slots), None);
    }
}
