//! Tables: maps whose elements are written and read many at a time, which aya does
//! not offer.

use std::{
    fmt, io,
    marker::PhantomData,
    os::fd::{AsFd as _, BorrowedFd},
};

use aya::{Pod, maps::Map};

use super::{Error, description::MapHandle, set_record::data, syscalls};

/// A map of records.
pub(super) struct Table<K, V> {
    map: MapHandle,
    capacity: u32,
    of: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// Takes a map.
    ///
    /// # Errors
    ///
    /// When its elements are of other sizes, as in an object of another build.
    pub(super) fn new(map: &Map) -> Result<Self, Error> {
        let data = data(map)?;
        let info = data.info().map_err(Error::map("looking at a map"))?;
        let sizes = [info.key_size(), info.value_size()].map(|size| size as usize);
        if sizes != [size_of::<K>(), size_of::<V>()] {
            return Err(Error::Object(format!(
                "the elements of map {} are of {sizes:?} bytes",
                info.name_as_str().unwrap_or_default()
            )));
        }
        Ok(Self {
            capacity: info.max_entries(),
            map: MapHandle::of(data)?,
            of: PhantomData,
        })
    }

    /// How many elements there can be.
    pub(super) const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Writes elements. Where one cannot be written those before it have been.
    ///
    /// # Errors
    ///
    /// E2BIG or ENOSPC where there is no room.
    pub(super) fn write(&self, elements: impl IntoIterator<Item = (K, V)>) -> io::Result<()> {
        write(self.map.fd.as_fd(), elements)
    }

    /// Removes an element, if it is there.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn remove(&self, key: &K) -> io::Result<()> {
        match syscalls::delete_element(self.map.fd.as_fd(), key) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            done => done,
        }
    }
}

impl<K, V> fmt::Debug for Table<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

/// Bytes that are written or read at once, so that no buffer grows with what there is.
const AT_ONCE: usize = 1 << 18;

/// Writes elements of a map, as [`Table::write`].
///
/// # Errors
///
/// As there.
pub(super) fn write<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    elements: impl IntoIterator<Item = (K, V)>,
) -> io::Result<()> {
    let count = (AT_ONCE / (size_of::<K>() + size_of::<V>())).max(1);
    let mut elements = elements.into_iter();
    loop {
        let (keys, values): (Vec<K>, Vec<V>) = elements.by_ref().take(count).unzip();
        if keys.is_empty() {
            return Ok(());
        }
        syscalls::update_elements(map, &keys, &values)?;
    }
}

/// Hands on each element of an array, by its index; one that is per CPU has a value for
/// each of `of_each` CPUs, and values of a multiple of eight bytes.
///
/// # Errors
///
/// The kernel's.
///
/// # Minimum kernel version
///
/// 5.13, for arrays that are per CPU (`percpu_array_map_ops` in kernel/bpf/arraymap.c).
pub(super) fn each_in_array<V: Pod + Default>(
    array: BorrowedFd<'_>,
    of_each: usize,
    mut each: impl FnMut(u32, &[V]),
) -> io::Result<()> {
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    // There can be hundreds of CPUs.
    let count = (AT_ONCE / (size_of::<V>() * of_each.max(1))).max(1);
    let mut keys = vec![0_u32; count];
    let mut values = vec![V::default(); count * of_each];
    let mut last = None;
    let mut index = 0;
    loop {
        let found = syscalls::lookup_elements(array, &mut last, &mut keys, &mut values)?;
        for of_one in values.chunks_exact(of_each).take(found) {
            each(index, of_one);
            index += 1;
        }
        if found < count {
            return Ok(());
        }
    }
}
