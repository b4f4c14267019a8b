//! Files: a record of every descriptor that is a socket or a namespace, for the
//! agent to read.

use keepalive_common::descriptor::{NSFS, SOCKFS};

use crate::kernel::FileIterator;

/// Appends the record of a file that is a socket or a namespace.
#[inline(always)]
pub(crate) fn write(iterator: &FileIterator) {
    if let Some(record) = iterator.record()
        && (record.magic == SOCKFS || record.magic == NSFS)
    {
        iterator.write(&record);
    }
}

/// Appends the record of a file that is a namespace.
#[inline(always)]
pub(crate) fn write_namespace(iterator: &FileIterator) {
    if let Some(record) = iterator.record_without_data()
        && record.magic == NSFS
    {
        iterator.write(&record);
    }
}
