//! Lists which processes hold which sockets and namespaces.

use anyhow::Result;
use aya::Ebpf;
use keepalive_common::{descriptor::DescriptorRecord, layout::Layout};

use super::{Room, create, load_iterator, prepare_iterator, program, run_records};

/// The program over all open files, loaded.
pub struct Files(Ebpf);

impl Files {
    /// Loads the program; nothing is attached.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with its reason.
    pub fn load(layout: &Layout) -> Result<Self> {
        let mut ebpf = create(layout, Room::NONE, 1)?;
        load_iterator(&mut ebpf, program::FILES, "task_file")?;
        Ok(Self(ebpf))
    }

    /// Hands on every descriptor of every process that is a socket or a
    /// namespace.
    ///
    /// # Errors
    ///
    /// When the listing breaks off.
    pub fn list(&mut self, mut each: impl FnMut(&DescriptorRecord)) -> Result<()> {
        let link = prepare_iterator(&mut self.0, program::FILES)?;
        run_records(link, |record| {
            each(record);
            Ok(())
        })?;
        Ok(())
    }
}
