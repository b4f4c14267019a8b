//! Lists connections, changes none.

use anyhow::Result;
use aya::Ebpf;
use keepalive_common::{layout::Layout, socket::SocketRecord};

use super::{Room, create, load_iterator, prepare_iterator, program, run_records};

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
    pub fn load(layout: &Layout) -> Result<Self> {
        let mut ebpf = create(layout, Room::NONE, 1)?;
        load_iterator(&mut ebpf, program::LIST, "tcp")?;
        Ok(Self(ebpf))
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
}
