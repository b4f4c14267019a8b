//! Files: a record of every descriptor that is a socket or a namespace, for the
//! agent to read.

use keepalive_common::descriptor::{NSFS, SOCKFS};

use crate::kernel::FileIterator;

/// Appends the record of a file, if it is of interest.
#[inline(always)]
pub(crate) fn write(iterator: &FileIterator) {
    let Some(record) = iterator.record() else {
        return;
    };
    if record.magic == SOCKFS || record.magic == NSFS {
        iterator.write(&record);
    }
}
