//! Loads programs that iterate over the kernel's sockets or files and need no
//! maps but the object's globals and what is kept beside sockets: those that list.
//!
//! aya's loader can do that too, but it creates every map of the object, and it
//! reads and parses all types of the kernel, for a kind of relocation that this
//! object has none of, and to look up the number of the iterator's type, which
//! [`Kernel`] knows: 60 ms and 15 MB for a command that lists in 5 ms.
#![expect(unsafe_code, reason = "bpf(2) takes a union and raw pointers")]

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read as _},
    mem,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    ptr,
};

use anyhow::{Context as _, Result, ensure};
use aya_obj::{
    EbpfSectionKind, Map, Object,
    generated::{bpf_attach_type, bpf_cmd, bpf_insn, bpf_prog_type},
};
use keepalive_common::layout::Layout;

use super::{
    LAYOUT,
    error::RefusedProgram,
    object,
    syscalls::{call, descriptor, empty, pointer},
};
use crate::kernel::layout::{Hook, Kernel};

/// Programs of the object on their way into the kernel.
pub(super) struct Iterators {
    kernel: Kernel,
    object: Object,
    /// The programs name maps by descriptor until they are loaded.
    _maps: Vec<OwnedFd>,
}

/// A program in the kernel.
#[derive(Debug)]
pub(super) struct Iterator {
    name: &'static str,
    program: OwnedFd,
}

impl Iterators {
    /// Puts the globals into the kernel, and lets these programs refer to them, and
    /// to what a policy set keeps beside sockets; without a set that is nothing.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a map, or a program needs another one.
    pub(super) fn new(
        kernel: &Kernel,
        programs: &[&str],
        originals: Option<BorrowedFd<'_>>,
    ) -> Result<Self> {
        let mut object = Object::parse(object()?).context("reading the BPF object")?;
        let layout = bytes_of(&kernel.layout);
        object
            .patch_map_data(HashMap::from([(LAYOUT, (layout, true))]))
            .context("telling the programs where the kernel keeps its fields")?;
        object
            .programs
            .retain(|name, _| programs.contains(&name.as_str()));
        // Programs refer to the descriptor of a map until they are loaded. Maps
        // that only other programs of the object use have none.
        let mut kept = Vec::new();
        let mut maps = Vec::new();
        for (name, map) in mem::take(&mut object.maps) {
            let creating = || format!("creating map {name} of the BPF object");
            let used = if map.section_kind() == EbpfSectionKind::Rodata {
                Some(create_globals(&name, &map).with_context(creating)?)
            } else if name == super::map::ORIGINALS {
                Some(match originals {
                    Some(shared) => shared.try_clone_to_owned().with_context(creating)?,
                    None => create_storage(&name, &map).with_context(creating)?,
                })
            } else {
                None
            };
            let descriptor = used.as_ref().map_or(-1, AsRawFd::as_raw_fd);
            kept.extend(used);
            maps.push((name, descriptor, map));
        }
        let text: HashSet<_> = object
            .functions
            .keys()
            .map(|(section, _)| *section)
            .collect();
        let by_name = maps
            .iter()
            .map(|(name, descriptor, map)| (name.as_str(), *descriptor, map));
        object.relocate_maps(by_name, &text)?;
        object.relocate_calls(&text)?;
        Ok(Self {
            kernel: *kernel,
            object,
            _maps: kept,
        })
    }

    /// Loads one of them.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with its reason, or has no such iterator.
    pub(super) fn load(&self, name: &'static str, over: Hook) -> Result<Iterator> {
        let instructions = self
            .object
            .programs
            .get(name)
            .and_then(|program| self.object.functions.get(&program.function_key()))
            .map(|function| function.instructions.as_slice())
            .with_context(|| format!("the BPF object has no program {name}"))?;
        let number = self.kernel.number(over)?;
        let program = load(name, instructions, number)
            .with_context(|| format!("the kernel refused program {name}"))?;
        Ok(Iterator { name, program })
    }
}

impl Iterator {
    /// Makes it ready to be run once, over what the calling thread's network
    /// namespace or pid namespace has.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub(super) fn open(&self) -> Result<File> {
        let preparing = || format!("preparing program {}", self.name);
        let program = self.program.as_raw_fd().cast_unsigned();
        let mut attr = empty();
        attr.link_create.__bindgen_anon_1.prog_fd = program;
        attr.link_create.attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
        let link = descriptor(bpf_cmd::BPF_LINK_CREATE, &mut attr).with_context(preparing)?;
        let mut attr = empty();
        attr.iter_create.link_fd = link.as_raw_fd().cast_unsigned();
        let file = descriptor(bpf_cmd::BPF_ITER_CREATE, &mut attr).with_context(preparing)?;
        Ok(File::from(file))
    }
}

/// Hands on the records of one kind that an iterator writes; tells how many.
///
/// # Errors
///
/// When the kernel breaks off, or `each` fails.
pub(super) fn read_records<T: bytemuck::AnyBitPattern>(
    mut file: File,
    mut each: impl FnMut(&T) -> Result<()>,
) -> Result<u64> {
    // The kernel's own buffer has eight pages, whatever their size; a smaller one
    // here only takes more reads.
    let mut buffer = vec![0; 64 * 1024];
    // A read may end within a record.
    let mut pending = Vec::new();
    let mut count = 0;
    loop {
        let length = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            // After a million objects without output the kernel pauses.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) =>
            {
                continue;
            }
            Err(error) => return Err(error).context("reading the iterator"),
        };
        pending.extend_from_slice(buffer.get(..length).unwrap_or_default());
        let mut records = pending.chunks_exact(size_of::<T>());
        for record in &mut records {
            each(&bytemuck::pod_read_unaligned(record))?;
            count += 1;
        }
        let left = records.remainder().len();
        pending.drain(..pending.len() - left);
    }
    ensure!(pending.is_empty(), "the listing ended within a record");
    Ok(count)
}

fn bytes_of(layout: &Layout) -> &[u8] {
    // SAFETY: plain numbers without padding, which a test holds its size against.
    unsafe { std::slice::from_raw_parts(ptr::from_ref(layout).cast(), size_of::<Layout>()) }
}

/// Creates a map of globals and keeps it from being changed.
fn create_globals(name: &str, map: &Map) -> io::Result<OwnedFd> {
    let created = create(name, map, None)?;
    let number = created.as_raw_fd().cast_unsigned();
    let first = 0_u32;
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = number;
    attr.__bindgen_anon_2.key = pointer(&raw const first);
    attr.__bindgen_anon_2.__bindgen_anon_1.value = pointer(map.data().as_ptr());
    call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr)?;
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = number;
    call(bpf_cmd::BPF_MAP_FREEZE, &mut attr)?;
    Ok(created)
}

/// Creates a map of what is kept beside sockets, with nothing in it. The kernel
/// takes one only with types: a number as key, and a value of its size
/// (`bpf_local_storage_map_check_btf()` in kernel/bpf/bpf_local_storage.c).
fn create_storage(name: &str, map: &Map) -> io::Result<OwnedFd> {
    /// The numbers of the two types.
    const INT: u32 = 1;
    const ARRAY: u32 = 2;
    let types = types_of_storage(map.value_size());
    let mut attr = empty();
    attr.__bindgen_anon_7.btf = pointer(types.as_ptr());
    attr.__bindgen_anon_7.btf_size = u32::try_from(types.len()).map_err(io::Error::other)?;
    let types = descriptor(bpf_cmd::BPF_BTF_LOAD, &mut attr)?;
    create(name, map, Some((&types, INT, ARRAY)))
}

/// In BTF: `int`, and an array of it of this size in bytes
/// (Documentation/bpf/btf.rst). aya-obj cannot make arrays.
fn types_of_storage(size: u32) -> Vec<u8> {
    const STRINGS: &[u8; 5] = b"\0int\0";
    const KIND_INT: u32 = 1 << 24;
    const KIND_ARRAY: u32 = 3 << 24;
    const SIGNED: u32 = 1 << 24;
    let types = [
        [1, KIND_INT, 4, SIGNED | 32].as_slice(),
        &[0, KIND_ARRAY, 0, 1, 1, size / 4],
    ]
    .concat();
    // Magic number, version and flags; lengths of the header, types and strings, and
    // where these begin.
    let header = [0x0001_eb9f, 6 * 4, 0, 10 * 4, 10 * 4, 5];
    let words = header.iter().chain(&types);
    let mut bytes: Vec<u8> = words.flat_map(|word: &u32| word.to_ne_bytes()).collect();
    bytes.extend(STRINGS);
    bytes
}

/// Creates a map, with the types of its keys and values.
fn create(name: &str, map: &Map, types: Option<(&OwnedFd, u32, u32)>) -> io::Result<OwnedFd> {
    let mut attr = empty();
    // SAFETY: the part of the union that this command looks at.
    let fields = unsafe { &mut attr.__bindgen_anon_1 };
    fields.map_type = map.map_type();
    fields.key_size = map.key_size();
    fields.value_size = map.value_size();
    fields.max_entries = map.max_entries();
    fields.map_flags = map.map_flags();
    if let Some((types, key, value)) = types {
        fields.btf_fd = types.as_raw_fd().cast_unsigned();
        fields.btf_key_type_id = key;
        fields.btf_value_type_id = value;
    }
    write_name(&mut fields.map_name, name);
    descriptor(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// Loads a program for the iterator whose type has this number.
fn load(name: &str, instructions: &[bpf_insn], number: u32) -> Result<OwnedFd> {
    /// Room for what the verifier says, of which the end is of interest: from
    /// Linux 6.4 on that is what it keeps.
    const LOG: usize = 1 << 20;
    const LICENSE: &std::ffi::CStr = c"GPL";
    let count = u32::try_from(instructions.len())?;
    let attempt = |log: &mut [u8]| {
        let mut attr = empty();
        // SAFETY: the part of the union that this command looks at.
        let fields = unsafe { &mut attr.__bindgen_anon_3 };
        fields.prog_type = bpf_prog_type::BPF_PROG_TYPE_TRACING as u32;
        fields.expected_attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
        fields.attach_btf_id = number;
        fields.insns = pointer(instructions.as_ptr());
        fields.insn_cnt = count;
        fields.license = pointer(LICENSE.as_ptr());
        write_name(&mut fields.prog_name, name);
        if let Ok(size @ 1..) = u32::try_from(log.len()) {
            fields.log_level = 1;
            fields.log_size = size;
            fields.log_buf = pointer(log.as_mut_ptr());
        }
        descriptor(bpf_cmd::BPF_PROG_LOAD, &mut attr)
    };
    attempt(&mut []).or_else(|_| {
        let mut log = vec![0; LOG];
        attempt(&mut log).map_err(|error| {
            let log = String::from_utf8_lossy(&log);
            RefusedProgram::with_log(&error, log.trim_end_matches('\0')).into()
        })
    })
}

/// Names end with a NUL and are cut off where there is no room.
fn write_name(field: &mut [std::ffi::c_char], name: &str) {
    let room = field.len().saturating_sub(1);
    for (to, from) in field.iter_mut().take(room).zip(name.bytes()) {
        // The kernel takes letters, digits, `_` and `.` only.
        *to = from.cast_signed();
    }
}
