//! Lists connections and descriptors, changes none.

use anyhow::Result;
use aya::Ebpf;
use keepalive_common::{descriptor::DescriptorRecord, socket::SocketRecord};

use super::{Room, create, load_iterator, prepare_iterator, program, run_records};
use crate::kernel::layout::{Hook, Kernel};

/// The listing program, loaded.
pub struct Lister(Ebpf);

impl Lister {
    /// Loads the program; nothing is attached.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with its reason.
    ///
    /// # Minimum kernel version
    ///
    /// 5.9, for TCP iterators.
    pub fn load(kernel: &Kernel) -> Result<Self> {
        let mut ebpf = create(&kernel.layout, Room::NONE, 1)?;
        load_iterator(&mut ebpf, program::LIST, kernel, Hook::Tcp)?;
        Ok(Self(ebpf))
    }

    /// Loads the program over all open files too, for [`Self::descriptors`].
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with its reason.
    ///
    /// # Minimum kernel version
    ///
    /// 5.8, for iterators over files.
    pub fn load_files(&mut self, kernel: &Kernel) -> Result<()> {
        load_iterator(&mut self.0, program::FILES, kernel, Hook::Files)
    }

    /// Hands on every connection of the calling thread's network namespace and
    /// returns how many there were.
    ///
    /// # Errors
    ///
    /// When the listing breaks off, or `each` fails.
    pub fn list(&mut self, each: &mut dyn FnMut(&SocketRecord) -> Result<()>) -> Result<u64> {
        let link = prepare_iterator(&mut self.0, program::LIST)?;
        run_records(link, each)
    }

    /// Hands on every descriptor of every process that is a socket or a
    /// namespace.
    ///
    /// # Errors
    ///
    /// When the program is not loaded, or the listing breaks off.
    pub fn descriptors(&mut self, mut each: impl FnMut(&DescriptorRecord)) -> Result<()> {
        let link = prepare_iterator(&mut self.0, program::FILES)?;
        run_records(link, |record| {
            each(record);
            Ok(())
        })?;
        Ok(())
    }
}
