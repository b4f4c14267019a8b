//! Lists connections and descriptors, changes none.

use anyhow::{Result, bail};
use aya::Ebpf;
use keepalive_common::{descriptor::DescriptorRecord, socket::SocketRecord};

use super::{create, load_iterator, map, prepare_iterator, program, run_descriptors, run_records};
use crate::kernel::layout::{Hook, Kernel};

/// The listing program, loaded.
pub struct Lister {
    kernel: Kernel,
    ebpf: Ebpf,
    /// Whether the kernel takes the program over open files, once that was tried.
    can_list_files: Option<bool>,
}

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
        let mut ebpf = create(
            &kernel.layout,
            &[(map::CGROUPS, 1), (map::EVENTS, 1), (map::DEATHS, 1)],
        )?;
        load_iterator(&mut ebpf, program::LIST, kernel, Hook::Tcp)?;
        Ok(Self {
            kernel: *kernel,
            ebpf,
            can_list_files: None,
        })
    }

    /// Hands on every connection of the calling thread's network namespace and
    /// returns how many there were.
    ///
    /// # Errors
    ///
    /// When the listing breaks off, or `each` fails.
    pub fn list(&mut self, each: &mut dyn FnMut(&SocketRecord) -> Result<()>) -> Result<u64> {
        let link = prepare_iterator(&mut self.ebpf, program::LIST)?;
        run_records(link, each)
    }

    /// Hands on every descriptor of every process that is a socket or a
    /// namespace.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program over open files, with its reason the
    /// first time, or knows this process by another id than /proc.
    ///
    /// # Minimum kernel version
    ///
    /// 5.8, for iterators over files.
    pub fn descriptors(&mut self, each: impl FnMut(&DescriptorRecord)) -> Result<()> {
        match self.can_list_files {
            Some(true) => {}
            Some(false) => bail!("the kernel refused program {}", program::FILES),
            None => {
                let kernel = &self.kernel;
                let loaded = load_iterator(&mut self.ebpf, program::FILES, kernel, Hook::Files);
                self.can_list_files = Some(loaded.is_ok());
                loaded?;
            }
        }
        let link = prepare_iterator(&mut self.ebpf, program::FILES)?;
        run_descriptors(link, each)
    }
}
