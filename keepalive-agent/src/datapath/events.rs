//! Tells of cgroups that are made and removed, as it happens.

use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    maps::{Array, MapData, RingBuf},
    programs::{BtfTracePoint, loaded_links, tp_btf::BtfTracePointLink},
};
use keepalive_common::cgroup_event::{Header, Kind, PATH_SIZE};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::debug;

use super::{create, program, refused, types_of};
use crate::{
    hierarchy::{Cgroup, Hierarchy},
    kernel::layout::{Hook, Kernel},
};

/// The id of the root of the hierarchy, where a process sees all of it
/// (`kernfs_create_root()` in fs/kernfs/dir.c).
const ROOT: u64 = 1;

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
    _links: [BtfTracePointLink; 2],
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
    pub fn load(kernel: &Kernel, hierarchy: &Hierarchy) -> Result<Self> {
        let mount = hierarchy.mount();
        let root = mount
            .metadata()
            .with_context(|| format!("looking at {}", mount.display()))?;
        ensure!(
            root.ino() == ROOT,
            "this process sees only a part of the cgroup hierarchy, and the kernel names cgroups \
             by their paths in the whole: run it in the host's cgroup namespace"
        );
        // What the object has beside these programs goes away with it.
        let mut ebpf = create(
            &kernel.layout,
            &[(super::map::CGROUPS, 1), (super::map::DEATHS, 1)],
        )?;
        let mut attach = |name, to| attach(&mut ebpf, name, kernel, to);
        let links = [
            attach(program::CGROUP_MADE, Hook::CgroupMade)?,
            attach(program::CGROUP_REMOVED, Hook::CgroupRemoved)?,
        ];
        let mut take = |name: &str| {
            ebpf.take_map(name)
                .with_context(|| format!("the BPF object has no map {name}"))
        };
        let ring = RingBuf::try_from(take(super::map::EVENTS)?)?;
        let lost = Array::try_from(take(super::map::LOST)?)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the buffer keeps its descriptor open"
        )]
        let ring = AsyncFd::with_interest(ring, Interest::READABLE)
            .context("watching for cgroups that are made and removed")?;
        catch_up();
        Ok(Self {
            ring,
            lost,
            known: 0,
            _links: links,
        })
    }

    /// Waits for changes; hands over all there are, in their order, never none.
    /// May be dropped while it waits: nothing is lost by that.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked any more.
    pub async fn next(&mut self) -> Result<Vec<Change>> {
        loop {
            let mut guard = self
                .ring
                .readable_mut()
                .await
                .context("waiting for cgroups that are made and removed")?;
            let mut changes = drain(guard.get_inner_mut());
            if changes.len() < BATCH {
                guard.clear_ready();
            }
            // Asked for after the records were read: where there was no room
            // for one, there were others to be read.
            let lost = self.lost.get(&0, 0).context("counting what was lost")?;
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
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }

    /// What there is now, without waiting. A change has been written by the
    /// time that the call returns which made it.
    pub fn now(&mut self) -> Vec<Change> {
        drain(self.ring.get_mut())
    }
}

fn attach(
    ebpf: &mut Ebpf,
    name: &'static str,
    kernel: &Kernel,
    to: Hook,
) -> Result<BtfTracePointLink> {
    let types = types_of(kernel, to)?;
    let program: &mut BtfTracePoint = ebpf
        .program_mut(name)
        .with_context(|| format!("the BPF object has no program {name}"))?
        .try_into()?;
    program
        .load(to.name(), &types)
        .map_err(|error| refused(name, error))?;
    let link = program
        .attach()
        .with_context(|| format!("attaching program {name} to tracepoint {}", to.name()))?;
    Ok(program.take_link(link)?)
}

fn drain(ring: &mut RingBuf<MapData>) -> Vec<Change> {
    let mut changes = Vec::new();
    while changes.len() < BATCH
        && let Some(record) = ring.next()
    {
        changes.extend(understand(&record));
    }
    changes
}

/// What a record says; nothing where the cgroup has a name that no config could
/// have.
fn understand(record: &[u8]) -> Option<Change> {
    let (header, path) = record.split_at_checked(size_of::<Header>())?;
    let header: Header = bytemuck::pod_read_unaligned(header);
    let kind = Kind::from_number(header.kind)?;
    // It may have been longer: the kernel cuts off what does not fit.
    if path.len() == PATH_SIZE {
        return Some(Change::Lost);
    }
    let path = path.strip_suffix(b"\0")?;
    let cgroup = Cgroup {
        path: str::from_utf8(path).ok()?.to_owned(),
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

    /// A record as the program writes it.
    fn record(kind: u32, id: u64, path: &[u8]) -> Vec<u8> {
        let length = u32::try_from(path.len()).unwrap();
        let header = Header { id, kind, length };
        [bytemuck::bytes_of(&header), path].concat()
    }

    #[test]
    fn a_record_is_a_change() {
        let cgroup = Cgroup {
            path: "/a/b c/é".to_owned(),
            id: u64::MAX - 1,
        };
        let path = "/a/b c/é\0".as_bytes();
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
    fn a_path_that_may_have_been_cut_off_is_no_path() {
        let mut path = vec![b'a'; PATH_SIZE - 1];
        path.push(0);
        assert_eq!(understand(&record(1, 7, &path)), Some(Change::Lost));
        path.remove(0);
        assert!(matches!(
            understand(&record(1, 7, &path)),
            Some(Change::Made(cgroup)) if cgroup.path.len() == PATH_SIZE - 2
        ));
    }

    #[test]
    fn what_is_no_record_is_no_change() {
        assert_eq!(understand(&record(1, 7, b"/not-utf-8-\xff\0")), None);
        let whole = record(1, 7, b"/a\0");
        for length in 0..whole.len() {
            assert_eq!(understand(&whole[..length]), None, "{length}");
        }
    }
}
