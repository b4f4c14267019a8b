//! The BPF object on its way into the kernel: its maps are made at once, its
//! programs loaded one by one.
//!
//! aya's own loader reads and parses all types of the kernel each time, for a kind of
//! relocation that this object has none of: 25 ms and 20 MB at each start and each
//! change of a config. All that loading a program takes of them is the number of its
//! hook, which [`Kernel`] knows.
#![expect(unsafe_code, reason = "bpf(2) takes a union and raw pointers")]

use std::{
    collections::{HashMap, HashSet},
    ffi::c_char,
    fmt::Display,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    ptr,
};

use aya::maps::{Map, MapData, MapError};
use aya_obj::{
    EbpfSectionKind, Function, Object,
    btf::BtfFeatures,
    generated::{bpf_attach_type, bpf_cmd, bpf_map_type, bpf_prog_type},
};
use keepalive_common::layout::Layout;
use rustix::param::page_size;

use super::{
    Error, LAYOUT,
    error::RefusedProgram,
    fault::{self, Operation},
    object, refused,
    syscalls::{call, descriptor, empty, pointer},
};
use crate::kernel::layout::{Hook, Kernel};

/// What a program is loaded for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// The life of TCP connections, for a cgroup.
    SockOps,
    /// What applications set, for a cgroup.
    Setsockopt,
    /// Going through what the kernel has.
    Iterator(Hook),
    /// Being told by the kernel.
    Tracepoint(Hook),
}

impl Purpose {
    const fn types(self) -> (bpf_prog_type, bpf_attach_type) {
        use bpf_attach_type::{
            BPF_CGROUP_SETSOCKOPT, BPF_CGROUP_SOCK_OPS, BPF_TRACE_ITER, BPF_TRACE_RAW_TP,
        };
        use bpf_prog_type::{
            BPF_PROG_TYPE_CGROUP_SOCKOPT, BPF_PROG_TYPE_SOCK_OPS, BPF_PROG_TYPE_TRACING,
        };
        match self {
            Self::SockOps => (BPF_PROG_TYPE_SOCK_OPS, BPF_CGROUP_SOCK_OPS),
            Self::Setsockopt => (BPF_PROG_TYPE_CGROUP_SOCKOPT, BPF_CGROUP_SETSOCKOPT),
            Self::Iterator(_) => (BPF_PROG_TYPE_TRACING, BPF_TRACE_ITER),
            Self::Tracepoint(_) => (BPF_PROG_TYPE_TRACING, BPF_TRACE_RAW_TP),
        }
    }

    const fn hook(self) -> Option<Hook> {
        match self {
            Self::Iterator(hook) | Self::Tracepoint(hook) => Some(hook),
            Self::SockOps | Self::Setsockopt => None,
        }
    }
}

/// Which maps are made, and how.
#[derive(Clone, Copy, Default)]
pub(super) struct Maps<'a> {
    /// Only these, beside the globals; all of them where that is not said.
    pub(super) only: Option<&'a [&'a str]>,
    /// How many elements some have room for.
    pub(super) sizes: &'a [(&'a str, u32)],
    /// Those that are there already and take the place of the object's own.
    pub(super) shared: &'a [(&'a str, BorrowedFd<'a>)],
}

/// The object, with its maps in the kernel.
pub(super) struct LoadedObject {
    kernel: Kernel,
    object: Object,
    types: OwnedFd,
    /// The programs name them by descriptor until they are loaded.
    maps: HashMap<String, MapData>,
}

impl LoadedObject {
    /// Makes the maps.
    ///
    /// # Errors
    ///
    /// When the kernel refuses one.
    pub(super) fn new(kernel: &Kernel, maps: Maps<'_>) -> Result<Self, Error> {
        fault::point(Operation::CreateMaps).map_err(Error::call("creating the BPF maps"))?;
        let mut parsed = Object::parse(object()?).map_err(unusable)?;
        let layout = bytes_of(&kernel.layout);
        parsed
            .patch_map_data(HashMap::from([(LAYOUT, (layout, true))]))
            .map_err(unusable)?;
        let types = load_types(&mut parsed)?;
        let mut made = HashMap::new();
        let mut definitions = Vec::new();
        for (name, mut map) in std::mem::take(&mut parsed.maps) {
            let is_wanted = map.section_kind() == EbpfSectionKind::Rodata
                || maps.only.is_none_or(|only| only.contains(&&*name));
            let size = maps.sizes.iter().find(|(of, _)| *of == name);
            if let Some((_, size)) = size {
                map.set_max_entries(*size);
            }
            if map.map_type() == bpf_map_type::BPF_MAP_TYPE_RINGBUF as u32 {
                // The kernel takes whole pages, a power of two of them.
                let page = u32::try_from(page_size()).unwrap_or(u32::MAX);
                map.set_max_entries(map.max_entries().next_power_of_two().max(page));
                map.set_value_size(0);
            }
            if is_wanted {
                let creating = || Error::map(format!("creating map {name}"));
                let shared = maps.shared.iter().find(|(of, _)| *of == name);
                let data = match shared {
                    Some((_, fd)) => fd
                        .try_clone_to_owned()
                        .map_err(Error::call(format!("sharing map {name}")))
                        .and_then(|fd| MapData::from_fd(fd).map_err(creating()))?,
                    None => MapData::create(map.clone(), &name, Some(types.as_fd()))
                        .map_err(creating())?,
                };
                if !map.data().is_empty() {
                    let is_frozen = map.section_kind() == EbpfSectionKind::Rodata;
                    write_globals(&data, map.data(), is_frozen)
                        .map_err(Error::call(format!("writing map {name}")))?;
                }
                made.insert(name.clone(), data);
            }
            definitions.push((name, map));
        }
        let text: HashSet<_> = parsed
            .functions
            .keys()
            .map(|(section, _)| *section)
            .collect();
        let by_name = definitions.iter().map(|(name, map)| {
            // What only programs use that are not loaded has none.
            let fd = made
                .get(name)
                .map_or(-1, |data| data.fd().as_fd().as_raw_fd());
            (name.as_str(), fd, map)
        });
        parsed.relocate_maps(by_name, &text).map_err(unusable)?;
        parsed.relocate_calls(&text).map_err(unusable)?;
        Ok(Self {
            kernel: *kernel,
            object: parsed,
            types,
            maps: made,
        })
    }

    /// One of the maps.
    ///
    /// # Errors
    ///
    /// When there is none of that name.
    pub(super) fn map(&self, name: &'static str) -> Result<Map, Error> {
        let using = || format!("using map {name}");
        let data = self.maps.get(name);
        let data = data.ok_or(Error::Missing { kind: "map", name })?;
        let fd = data.fd().as_fd().try_clone_to_owned();
        MapData::from_fd(fd.map_err(Error::call(using()))?)
            .and_then(Map::from_map_data)
            .map_err(Error::map(using()))
    }

    /// The same as its type.
    ///
    /// # Errors
    ///
    /// As [`Self::map`], or when it is of another type.
    pub(super) fn map_as<T>(&self, name: &'static str) -> Result<T, Error>
    where
        T: TryFrom<Map, Error = MapError>,
    {
        T::try_from(self.map(name)?).map_err(Error::map(format!("using map {name}")))
    }

    /// Loads one of the programs.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, with the verifier's last words, or has no such
    /// hook.
    pub(super) fn load(&self, name: &'static str, purpose: Purpose) -> Result<OwnedFd, Error> {
        fault::point(Operation::LoadProgram).map_err(|error| refused(name, error))?;
        let program = self.object.programs.get(name);
        let function = program
            .and_then(|program| self.object.functions.get(&program.function_key()))
            .ok_or(Error::Missing {
                kind: "program",
                name,
            })?;
        let number = match purpose.hook() {
            Some(hook) => self
                .kernel
                .number(hook)
                .map_err(|error| Error::Kernel(error.to_string()))?,
            None => 0,
        };
        self.attempt(name, function, purpose, number, &mut [])
            .or_else(|_| {
                /// Room for what the verifier says, of which the end is of interest:
                /// from Linux 6.4 on that is what it keeps.
                const LOG: usize = 1 << 20;
                let mut log = vec![0; LOG];
                self.attempt(name, function, purpose, number, &mut log)
                    .map_err(|error| {
                        let log = String::from_utf8_lossy(&log);
                        let log = log.trim_end_matches('\0');
                        refused(name, RefusedProgram::with_log(&error, log))
                    })
            })
    }

    fn attempt(
        &self,
        name: &str,
        function: &Function,
        purpose: Purpose,
        number: u32,
        log: &mut [u8],
    ) -> io::Result<OwnedFd> {
        let count = |length: usize| u32::try_from(length).map_err(io::Error::other);
        let lines = function.line_info.line_info_bytes();
        let functions = function.func_info.func_info_bytes();
        let (kind, attach_type) = purpose.types();
        let mut attr = empty();
        // SAFETY: the part of the union that this command looks at.
        let fields = unsafe { &mut attr.__bindgen_anon_3 };
        fields.prog_type = kind as u32;
        fields.expected_attach_type = attach_type as u32;
        fields.attach_btf_id = number;
        fields.insns = pointer(function.instructions.as_ptr());
        fields.insn_cnt = count(function.instructions.len())?;
        fields.license = pointer(self.object.license.as_ptr());
        fields.prog_btf_fd = self.types.as_raw_fd().cast_unsigned();
        fields.line_info = pointer(lines.as_ptr());
        fields.line_info_cnt = count(function.line_info.len())?;
        fields.line_info_rec_size = count(function.line_info_rec_size)?;
        fields.func_info = pointer(functions.as_ptr());
        fields.func_info_cnt = count(function.func_info.len())?;
        fields.func_info_rec_size = count(function.func_info_rec_size)?;
        // Cut off where there is no room; it ends with a NUL.
        let room = fields.prog_name.len().saturating_sub(1);
        for (to, from) in fields.prog_name.iter_mut().take(room).zip(name.bytes()) {
            // A C `char`: signed or not by the machine.
            *to = c_char::from_ne_bytes([from]);
        }
        if !log.is_empty() {
            fields.log_level = 1;
            fields.log_size = count(log.len())?;
            fields.log_buf = pointer(log.as_mut_ptr());
        }
        descriptor(bpf_cmd::BPF_PROG_LOAD, &mut attr)
    }
}

fn unusable(error: impl Display) -> Error {
    Error::Object(error.to_string())
}

/// The object's own types, of its maps and functions.
fn load_types(parsed: &mut Object) -> Result<OwnedFd, Error> {
    const LOADING: &str = "loading the types of the BPF object";
    // What 5.15 knows: functions, global ones, sections with variables and empty
    // ones, floating point; and not yet tags and enumerations of 64 bits.
    let features = BtfFeatures::new(true, true, true, true, true, false, false, false);
    let types = parsed.fixup_and_sanitize_btf(&features).map_err(unusable)?;
    let types = types.ok_or_else(|| unusable("it has no types"))?.to_bytes();
    let mut attr = empty();
    attr.__bindgen_anon_7.btf = pointer(types.as_ptr());
    attr.__bindgen_anon_7.btf_size = u32::try_from(types.len()).map_err(unusable)?;
    descriptor(bpf_cmd::BPF_BTF_LOAD, &mut attr).map_err(Error::call(LOADING))
}

/// Writes the globals of a section, and keeps them from being changed.
fn write_globals(map: &MapData, bytes: &[u8], is_frozen: bool) -> io::Result<()> {
    let number = map.fd().as_fd().as_raw_fd().cast_unsigned();
    let first = 0_u32;
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = number;
    attr.__bindgen_anon_2.key = pointer(&raw const first);
    attr.__bindgen_anon_2.__bindgen_anon_1.value = pointer(bytes.as_ptr());
    call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr)?;
    if is_frozen {
        let mut attr = empty();
        attr.__bindgen_anon_2.map_fd = number;
        call(bpf_cmd::BPF_MAP_FREEZE, &mut attr)?;
    }
    Ok(())
}

fn bytes_of(layout: &Layout) -> &[u8] {
    // SAFETY: plain numbers without padding, which a test holds its size against.
    unsafe { std::slice::from_raw_parts(ptr::from_ref(layout).cast(), size_of::<Layout>()) }
}
