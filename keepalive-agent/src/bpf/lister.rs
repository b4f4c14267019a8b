//! Lists connections, changes none.

use anyhow::{Result, ensure};
use aya::Ebpf;
use keepalive_common::{layout::Layout, socket::SocketRecord};

use super::{create, load_iterator, prepare_iterator, program, run_iterator};

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
        let mut ebpf = create(layout, 1, 1)?;
        load_iterator(&mut ebpf, program::LIST)?;
        Ok(Self(ebpf))
    }

    /// Hands on every connection of the calling thread's network namespace and
    /// returns how many there were.
    ///
    /// # Errors
    ///
    /// When the listing breaks off, or `each` fails.
    pub fn list(&mut self, each: &mut dyn FnMut(&SocketRecord) -> Result<()>) -> Result<u64> {
        const SIZE: usize = size_of::<SocketRecord>();
        let link = prepare_iterator(&mut self.0, program::LIST)?;
        let mut count = 0;
        let mut rest = Vec::new();
        // Larger than the kernel's own buffer of eight pages.
        let mut buffer = vec![0; 64 * 1024];
        run_iterator(link, &mut buffer, |mut bytes| {
            // A read may end within a record.
            if !rest.is_empty() {
                let missing = (SIZE - rest.len()).min(bytes.len());
                rest.extend_from_slice(&bytes[..missing]);
                bytes = &bytes[missing..];
                if rest.len() < SIZE {
                    return Ok(());
                }
                each(&bytemuck::pod_read_unaligned(&rest))?;
                count += 1;
                rest.clear();
            }
            let mut records = bytes.chunks_exact(SIZE);
            for record in &mut records {
                each(&bytemuck::pod_read_unaligned(record))?;
                count += 1;
            }
            rest.extend_from_slice(records.remainder());
            Ok(())
        })?;
        ensure!(rest.is_empty(), "the listing ended within a record");
        Ok(count)
    }
}
