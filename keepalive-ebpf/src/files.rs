//! Files: a record of every descriptor that is a socket or a namespace, for the
//! agent to read.

use keepalive_common::descriptor::{NSFS, SOCKFS};

use crate::kernel::FileIterator;

/// Appends the record of a file that is a socket or a namespace.
#[inline(always)]
pub(crate) fn write(iterator: &FileIterator) {
    write_if(iterator, |magic| magic == SOCKFS || magic == NSFS);
}

/// Appends the record of a file that is a namespace.
#[inline(always)]
pub(crate) fn write_namespace(iterator: &FileIterator) {
    write_if(iterator, |magic| magic == NSFS);
}

#[inline(always)]
fn write_if(iterator: &FileIterator, is_wanted: impl Fn(u64) -> bool) {
    if let Some(record) = iterator.record()
        && is_wanted(record.magic)
    {
        iterator.write(&record);
    }
}
