//! Runs programs that go through the kernel's sockets or files.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::{AsRawFd as _, OwnedFd},
};

use aya_obj::generated::{bpf_attach_type, bpf_cmd};

use super::{
    Error,
    object::{LoadedObject, Purpose},
    syscalls::{descriptor, empty, pointer},
};
use crate::kernel::layout::Hook;

/// A program in the kernel.
#[derive(Debug)]
pub(super) struct Iterator {
    name: &'static str,
    pub(super) program: OwnedFd,
}

impl Iterator {
    /// Loads it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with its reason, or has no such iterator.
    pub(super) fn load(
        object: &LoadedObject,
        name: &'static str,
        over: Hook,
    ) -> Result<Self, Error> {
        let program = object.load(name, Purpose::Iterator(over))?;
        Ok(Self { name, program })
    }

    /// Makes it ready to be run once, over what the calling thread's network
    /// namespace or pid namespace has.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub(super) fn open(&self) -> Result<File, Error> {
        self.open_over(None)
    }

    /// The same over the files of one process only.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it: there is no such process any more, or it is older.
    ///
    /// # Minimum kernel version
    ///
    /// 6.1 (`bpf_iter_attach_task()` in kernel/bpf/task_iter.c); 6.0 goes over all
    /// processes.
    pub(super) fn open_of_process(&self, process: u32) -> Result<File, Error> {
        // struct task of union bpf_iter_link_info: tid, pid, pid_fd.
        self.open_over(Some([0, process, 0]))
    }

    fn open_over(&self, task: Option<[u32; 3]>) -> Result<File, Error> {
        let preparing = || Error::call(format!("preparing program {}", self.name));
        let program = self.program.as_raw_fd().cast_unsigned();
        let mut attr = empty();
        attr.link_create.__bindgen_anon_1.prog_fd = program;
        attr.link_create.attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
        if let Some(task) = &task {
            attr.link_create.__bindgen_anon_3.__bindgen_anon_1.iter_info = pointer(task);
            attr.link_create
                .__bindgen_anon_3
                .__bindgen_anon_1
                .iter_info_len = u32::try_from(size_of_val(task)).unwrap_or_default();
        }
        let link = descriptor(bpf_cmd::BPF_LINK_CREATE, &mut attr).map_err(preparing())?;
        let mut attr = empty();
        attr.iter_create.link_fd = link.as_raw_fd().cast_unsigned();
        let file = descriptor(bpf_cmd::BPF_ITER_CREATE, &mut attr).map_err(preparing())?;
        Ok(File::from(file))
    }
}

/// Hands on what an iterator writes, as it comes. It goes no further than what fits
/// into the buffer before that is handed on.
///
/// # Errors
///
/// When the kernel breaks off, or `written` fails.
pub(super) fn read<E: From<Error>>(
    mut file: File,
    buffer: &mut [u8],
    mut written: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    loop {
        match file.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => written(buffer.get(..length).unwrap_or_default())?,
            // After a million objects without output the kernel pauses.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(error) => return Err(Error::call("reading the iterator")(error).into()),
        }
    }
}

/// Hands on the records of one kind that an iterator writes; tells how many.
///
/// # Errors
///
/// When the kernel breaks off, or `each` fails.
pub(super) fn read_records<T: bytemuck::AnyBitPattern, E: From<Error>>(
    file: File,
    mut each: impl FnMut(&T) -> Result<(), E>,
) -> Result<u64, E> {
    // The kernel's own buffer has eight pages, whatever their size; a smaller one
    // here only takes more reads.
    let mut buffer = vec![0; 64 * 1024];
    // A read may end within a record.
    let mut pending = Vec::new();
    let mut count = 0;
    read::<E>(file, &mut buffer, |bytes| {
        pending.extend_from_slice(bytes);
        let mut records = pending.chunks_exact(size_of::<T>());
        for record in &mut records {
            each(&bytemuck::pod_read_unaligned(record))?;
            count += 1;
        }
        let left = records.remainder().len();
        pending.drain(..pending.len() - left);
        Ok(())
    })?;
    if pending.is_empty() {
        Ok(count)
    } else {
        Err(Error::CutOff.into())
    }
}
