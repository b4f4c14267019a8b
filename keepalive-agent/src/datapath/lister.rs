//! Lists connections and descriptors, changes none.

use std::{fs::File, os::fd::AsRawFd as _, process};

use keepalive_common::{
    descriptor::{DescriptorRecord, HeldRecord, Kind},
    socket::SocketRecord,
};

use super::{
    Error, chain, in_force,
    iterators::{Iterator, read_records},
    map,
    object::{LoadedObject, Maps},
    program,
};
use crate::{
    hierarchy::CgroupPath,
    kernel::layout::{Hook, Kernel},
    netns,
};

/// The listing programs.
#[derive(Debug)]
pub struct Lister {
    /// Goes through the sockets of one network namespace.
    sockets: Iterator,
    /// Goes through the descriptors of all processes.
    files: Result<Iterator, Error>,
    is_of_several: bool,
}

impl Lister {
    /// Loads the programs; nothing is attached. What applications asked for is
    /// listed where a policy set is in force that keeps it: of several, the one
    /// nearest above this cgroup.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program over sockets, with its reason.
    ///
    /// # Minimum kernel version
    ///
    /// 5.9, for TCP iterators.
    pub fn load(kernel: &Kernel, cgroup: &CgroupPath) -> Result<Self, Error> {
        // Without permission to look, values tell who set them, as far as they do.
        let sets = in_force().unwrap_or_default();
        let records = sets.iter().filter_map(|set| set.record.as_ref().ok());
        let set = records.max_by_key(|record| {
            let root = &record.root.path;
            root.contains(cgroup).then(|| root.depth())
        });
        let shared = set.map(|set| set.beside_sockets.shared());
        let maps = Maps {
            only: Some(&[map::ORIGINALS]),
            shared: shared.as_ref().map_or(&[], |shared| shared),
            ..Maps::default()
        };
        let object = LoadedObject::new(kernel, maps)?;
        Ok(Self {
            sockets: Iterator::load(&object, program::LIST, Hook::Tcp)?,
            files: Iterator::load(&object, program::FILES, Hook::Files),
            is_of_several: sets.len() > 1,
        })
    }

    /// Whether several policy sets are in force, so that it matters for which cgroup
    /// it was loaded.
    #[must_use]
    pub fn is_of_several(&self) -> bool {
        self.is_of_several
    }

    /// Hands on every connection of the calling thread's network namespace and
    /// returns how many there were.
    ///
    /// # Errors
    ///
    /// When the listing breaks off, or `each` fails.
    pub fn list<E: From<Error>>(
        &self,
        each: &mut dyn FnMut(&SocketRecord) -> Result<(), E>,
    ) -> Result<u64, E> {
        read_records(self.sockets.open()?, each)
    }

    /// Hands on every descriptor of every process, in whatever network
    /// namespace, that is a connection, a namespace, or tells of connections
    /// that have no descriptor. One that is held several times comes several
    /// times.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program over open files, or knows this process
    /// by another id than /proc: then it would show the descriptors of the
    /// processes in this pid namespace only, or under other ids.
    ///
    /// # Minimum kernel version
    ///
    /// 5.11, for bpf_sock_from_file.
    pub fn descriptors(&self, each: impl FnMut(&HeldRecord)) -> Result<(), Error> {
        match &self.files {
            Ok(files) => read_descriptors(files.open()?, each),
            Err(error) => Err(Error::NoFiles(chain(error))),
        }
    }
}

/// A record that tells of a descriptor.
pub(super) trait OfDescriptor: bytemuck::AnyBitPattern {
    /// Which one.
    fn descriptor(&self) -> &DescriptorRecord;
}

impl OfDescriptor for DescriptorRecord {
    fn descriptor(&self) -> &DescriptorRecord {
        self
    }
}

impl OfDescriptor for HeldRecord {
    fn descriptor(&self) -> &DescriptorRecord {
        &self.descriptor
    }
}

/// Hands on what a program over the descriptors of all processes writes.
///
/// # Errors
///
/// When it does not find the namespace that is held open here: then the program
/// does not know what a namespace looks like in this kernel, or this process sees
/// others under other ids than the kernel, being in a pid namespace.
pub(super) fn read_descriptors<T: OfDescriptor>(
    iterator: File,
    mut each: impl FnMut(&T),
) -> Result<(), Error> {
    let own = File::open(netns::OWN).map_err(Error::call(format!(
        "opening {}: is /proc mounted?",
        netns::OWN
    )))?;
    let number = own.as_raw_fd().cast_unsigned();
    let mut finds_own = false;
    read_records::<_, Error>(iterator, |record: &T| {
        let found = record.descriptor();
        finds_own |= Kind::from_number(found.kind) == Some(Kind::Namespace)
            && (found.process, found.descriptor) == (process::id(), number);
        each(record);
        Ok(())
    })?;
    if finds_own {
        Ok(())
    } else {
        Err(Error::OtherProcesses)
    }
}
