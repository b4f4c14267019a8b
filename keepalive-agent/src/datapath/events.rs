//! Tells of cgroups that are made and removed, as it happens.

use std::os::fd::OwnedFd;

use aya::{
    maps::{Array, MapData, RingBuf},
    programs::loaded_links,
};
use keepalive_common::cgroup_event::{Header, Kind, PATH_SIZE};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, warn};

use super::{
    Error,
    object::{LoadedObject, Maps, Purpose},
    program, syscalls,
};
use crate::{
    hierarchy::{Cgroup, Hierarchy},
    kernel::layout::{Hook, Kernel},
    unblocked::awaited,
};

/// As many changes as are handed over at a time; more than fit into the buffer
/// at once.
const BATCH: usize = 4096;

/// What happened to the hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A cgroup was made. Its directory may not be there yet, or not any more.
    Made(Cgroup),
    /// A cgroup was removed.
    Removed(Cgroup),
    /// There were changes that nobody will be told of: what exists must be looked
    /// up anew, and whatever was made up to now can be. Comes alone.
    Lost,
}

/// Attached to the kernel's tracepoints; dropping it detaches.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    lost: Array<MapData, u64>,
    /// How many lost records are known of.
    known: u64,
    /// Whether it was said that cgroups with too long paths are passed over.
    said_too_long: bool,
    _links: [OwnedFd; 2],
}

impl Events {
    /// Loads and attaches. What a look at the hierarchy finds afterwards, and the
    /// changes, are all there is; some may be told twice.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a program, with its reason, or this process sees
    /// a part of the hierarchy only.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime that does IO.
    ///
    /// # Minimum kernel version
    ///
    /// 5.8, for ring buffers.
    pub fn load(kernel: &Kernel, hierarchy: &Hierarchy) -> Result<Self, Error> {
        if !hierarchy.is_whole() {
            return Err(Error::PartOfHierarchy);
        }
        // What the object has beside these programs goes away with it.
        let object = LoadedObject::new(
            kernel,
            Maps {
                sizes: &[(super::map::CGROUPS, 1), (super::map::DEATHS, 1)],
                ..Maps::default()
            },
        )?;
        let attach = |name, to| attach(&object, name, to);
        let links = [
            attach(program::CGROUP_MADE, Hook::CgroupMade)?,
            attach(program::CGROUP_REMOVED, Hook::CgroupRemoved)?,
        ];
        let ring: RingBuf<MapData> = object.map_as(super::map::EVENTS)?;
        let lost = object.map_as(super::map::LOST)?;
        let ring = awaited(ring, Interest::READABLE).map_err(Error::call(
            "watching for cgroups that are made and removed",
        ))?;
        catch_up();
        Ok(Self {
            ring,
            lost,
            known: 0,
            said_too_long: false,
            _links: links,
        })
    }

    /// Waits for changes; hands over all there are, in their order, never none.
    /// May be dropped while it waits: nothing is lost by that.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked any more.
    pub async fn next(&mut self) -> Result<Vec<Change>, Error> {
        loop {
            let mut guard = self
                .ring
                .readable_mut()
                .await
                .map_err(Error::call("waiting for cgroups that are made and removed"))?;
            let Drained {
                mut changes,
                records,
                too_long,
            } = drain(guard.get_inner_mut());
            if records < BATCH {
                guard.clear_ready();
            }
            // Asked for after the records were read: where there was no room
            // for one, there were others to be read.
            let lost = self
                .lost
                .get(&0, 0)
                .map_err(Error::map("counting what was lost"))?;
            if lost != self.known {
                debug!(
                    records = lost - self.known,
                    "the buffer of changes was full"
                );
                self.known = lost;
                changes.push(Change::Lost);
            }
            if changes.contains(&Change::Lost) {
                catch_up();
                changes = vec![Change::Lost];
            }
            if too_long && !self.said_too_long {
                self.said_too_long = true;
                warn!(
                    "somebody makes cgroups with paths of more than {} bytes: those go by the \
                     policy of the nearest cgroup above with a shorter path",
                    PATH_SIZE - 2
                );
            }
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }

    /// What there is now, without waiting. A change has been written by the
    /// time that the call returns which made it.
    pub fn now(&mut self) -> Vec<Change> {
        drain(self.ring.get_mut()).changes
    }
}

fn attach(object: &LoadedObject, name: &'static str, to: Hook) -> Result<OwnedFd, Error> {
    let program = object.load(name, Purpose::Tracepoint(to))?;
    syscalls::attach_to_tracepoint(program).map_err(Error::call(format!(
        "attaching program {name} to tracepoint {}",
        to.name()
    )))
}

/// What was read of the buffer at a time.
#[derive(Default)]
struct Drained {
    changes: Vec<Change>,
    records: usize,
    /// Whether some were about cgroups that no policy can claim.
    too_long: bool,
}

fn drain(ring: &mut RingBuf<MapData>) -> Drained {
    let mut drained = Drained::default();
    while drained.records < BATCH
        && let Some(record) = ring.next()
    {
        drained.records += 1;
        drained.too_long |= is_cut_off(&record);
        drained.changes.extend(understand(&record));
    }
    drained
}

/// Whether the path in a record may have been longer: the kernel cuts off what
/// does not fit.
fn is_cut_off(record: &[u8]) -> bool {
    record.len() == size_of::<Header>() + PATH_SIZE
}

/// What a record says; nothing where it is none, or is about a cgroup that no
/// policy can claim ([`Claimants::of`](crate::assignment::Claimants::of)).
fn understand(record: &[u8]) -> Option<Change> {
    if is_cut_off(record) {
        return None;
    }
    let (header, path) = record.split_at_checked(size_of::<Header>())?;
    let header: Header = bytemuck::pod_read_unaligned(header);
    let kind = Kind::from_number(header.kind)?;
    let path = path.strip_suffix(b"\0")?;
    if !path.starts_with(b"/") || path.contains(&b'\0') {
        return None;
    }
    let cgroup = Cgroup {
        path: path.into(),
        id: header.id,
    };
    Some(match kind {
        Kind::Made => Change::Made(cgroup),
        Kind::Removed => Change::Removed(cgroup),
    })
}

/// Waits until what the kernel has told of, or would have, can be looked up: the
/// record of a new cgroup is written just before its directory can be seen, both
/// under a mutex. Looking at a cgroup's link takes that mutex
/// (`bpf_cgroup_link_fill_link_info()` in kernel/bpf/cgroup.c), and an agent that
/// enforces has such a link.
fn catch_up() {
    for link in loaded_links() {
        if let Err(error) = link {
            debug!("looking at a link: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hierarchy::CgroupPath;

    /// A record as the program writes it.
    fn record(kind: u32, id: u64, path: &[u8]) -> Vec<u8> {
        let length = u32::try_from(path.len()).unwrap();
        let header = Header { id, kind, length };
        [bytemuck::bytes_of(&header), path].concat()
    }

    #[test]
    fn a_record_is_a_change() {
        let cgroup = Cgroup {
            path: CgroupPath::from(&b"/a/b c/\xc3\xa9\xff"[..]),
            id: u64::MAX - 1,
        };
        let path = b"/a/b c/\xc3\xa9\xff\0";
        for (kind, change) in [
            (1, Some(Change::Made(cgroup.clone()))),
            (2, Some(Change::Removed(cgroup.clone()))),
            (0, None),
            (3, None),
        ] {
            assert_eq!(understand(&record(kind, cgroup.id, path)), change);
        }
    }

    #[test]
    fn a_path_that_may_have_been_cut_off_is_passed_over() {
        let mut path = [&b"/"[..], &[b'a'; PATH_SIZE - 2]].concat();
        path.push(0);
        assert_eq!(understand(&record(1, 7, &path)), None);
        assert!(is_cut_off(&record(1, 7, &path)));
        path.remove(1);
        assert!(matches!(
            understand(&record(1, 7, &path)),
            Some(Change::Made(cgroup)) if cgroup.path.as_bytes().len() == PATH_SIZE - 2
        ));
    }

    proptest::proptest! {
        #[test]
        fn any_record_is_understood_or_passed_over(
            record in proptest::collection::vec(proptest::num::u8::ANY, 0..1100),
        ) {
            if let Some(Change::Made(cgroup) | Change::Removed(cgroup)) = understand(&record) {
                proptest::prop_assert!(cgroup.path.as_bytes().len() <= PATH_SIZE - 2);
                proptest::prop_assert!(cgroup.path.as_bytes().starts_with(b"/"));
            }
        }
    }

    #[test]
    fn what_is_no_record_is_no_change() {
        let whole = record(1, 7, b"/a\0");
        for length in 0..whole.len() {
            assert_eq!(understand(&whole[..length]), None, "{length}");
        }
    }
}
