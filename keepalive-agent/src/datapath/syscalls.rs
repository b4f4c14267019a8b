//! The calls of bpf(2) that aya does not offer for programs of cgroups: swapping
//! the program under a link, finding what is attached, and keeping maps alive by
//! a program.
#![expect(unsafe_code, reason = "bpf(2) takes a union and raw pointers")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::Pod;
use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_prog_info,
};

use rustix::thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query};

use super::fault::{self, Operation};

/// The kernel compares and swaps the program of a link (include/uapi/linux/bpf.h).
const BPF_F_REPLACE: u32 = 1 << 2;

/// Asks for the programs that run for a cgroup, those of its ancestors included.
const BPF_F_QUERY_EFFECTIVE: u32 = 1 << 0;

/// What the kernel says of the link of a cgroup program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CgroupLink {
    pub(super) id: u32,
    pub(super) program: u32,
    /// 0 when the cgroup is gone.
    pub(super) cgroup: u64,
    /// The number of the hook.
    pub(super) attach_type: u32,
}

/// What the kernel says of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProgramInfo {
    pub(super) id: u32,
    pub(super) name: String,
    /// Ids of the maps that it uses or that were bound to it.
    pub(super) maps: Vec<u32>,
    /// When it was loaded, in nanoseconds since boot.
    pub(super) loaded_at: u64,
    /// How many instructions the verifier went through; none where the kernel does
    /// not tell (before Linux 5.16).
    pub(super) verified_instructions: Option<u32>,
}

pub(super) fn call(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: the attributes are of the size that is told, and every pointer in
    // them points to memory that the caller holds until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The same for a command that returns a descriptor.
pub(super) fn descriptor(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let number = call(command, attr)?;
    let number = i32::try_from(number).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

pub(super) fn empty() -> bpf_attr {
    // SAFETY: a union of plain numbers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

pub(super) fn pointer<T: ?Sized>(to: *const T) -> u64 {
    to.cast::<u8>().expose_provenance() as u64
}

fn path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Attaches a program to a cgroup; other programs are always allowed beside it.
pub(super) fn link_create(
    program: impl AsFd,
    cgroup: impl AsFd,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    fault::point(Operation::LinkCreate)?;
    let mut attr = empty();
    attr.link_create.__bindgen_anon_1.prog_fd = number(program.as_fd());
    attr.link_create.__bindgen_anon_2.target_fd = number(cgroup.as_fd());
    attr.link_create.attach_type = attach_type as u32;
    descriptor(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// Puts another program under a link, if `old` is the one that is there.
///
/// The kernel swaps under `cgroup_mutex` (`cgroup_bpf_replace()` in
/// kernel/bpf/cgroup.c): EPERM where another program is there, ENOLINK where the
/// cgroup is gone.
pub(super) fn link_update(link: impl AsFd, new: impl AsFd, old: impl AsFd) -> io::Result<()> {
    fault::point(Operation::LinkUpdate)?;
    let mut attr = empty();
    attr.link_update.link_fd = number(link.as_fd());
    attr.link_update.__bindgen_anon_1.new_prog_fd = number(new.as_fd());
    attr.link_update.__bindgen_anon_2.old_prog_fd = number(old.as_fd());
    attr.link_update.flags = BPF_F_REPLACE;
    call(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Takes a link off its cgroup, whoever else holds it.
pub(super) fn link_detach(link: impl AsFd) -> io::Result<()> {
    fault::point(Operation::LinkDetach)?;
    let mut attr = empty();
    attr.link_detach.link_fd = number(link.as_fd());
    call(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// Lets a program keep a map alive that it does not use.
///
/// # Minimum kernel version
///
/// 5.10.
pub(super) fn bind_map(program: impl AsFd, map: impl AsFd) -> io::Result<()> {
    fault::point(Operation::BindMap)?;
    let mut attr = empty();
    attr.prog_bind_map.prog_fd = number(program.as_fd());
    attr.prog_bind_map.map_fd = number(map.as_fd());
    call(bpf_cmd::BPF_PROG_BIND_MAP, &mut attr).map(drop)
}

/// Names an object in a BPF file system.
pub(super) fn pin(object: impl AsFd, at: &Path) -> io::Result<()> {
    fault::point(Operation::Pin)?;
    let name = path(at)?;
    let mut attr = empty();
    attr.__bindgen_anon_4.pathname = pointer(name.as_ptr());
    attr.__bindgen_anon_4.bpf_fd = number(object.as_fd());
    call(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens an object by its name in a BPF file system.
pub(super) fn pinned(at: &Path) -> io::Result<OwnedFd> {
    let name = path(at)?;
    let mut attr = empty();
    attr.__bindgen_anon_4.pathname = pointer(name.as_ptr());
    descriptor(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// Opens a link by its id. Takes CAP_SYS_ADMIN.
pub(super) fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = empty();
    attr.__bindgen_anon_6.__bindgen_anon_1.link_id = id;
    descriptor(bpf_cmd::BPF_LINK_GET_FD_BY_ID, &mut attr)
}

/// Opens a program by its id. Takes CAP_SYS_ADMIN.
pub(super) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = empty();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    descriptor(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)
}

/// The ids of all links, in their order. Takes CAP_SYS_ADMIN.
pub(super) fn links() -> io::Result<Vec<u32>> {
    let mut ids = Vec::new();
    let mut last = 0;
    loop {
        let mut attr = empty();
        attr.__bindgen_anon_6.__bindgen_anon_1.start_id = last;
        match call(bpf_cmd::BPF_LINK_GET_NEXT_ID, &mut attr) {
            Ok(_) => {
                // SAFETY: the kernel has written the next id there.
                last = unsafe { attr.__bindgen_anon_6.next_id };
                ids.push(last);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ids),
            Err(error) => return Err(error),
        }
    }
}

fn info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = empty();
    attr.info.bpf_fd = number(object);
    attr.info.info = pointer(info);
    attr.info.info_len = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    call(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// What a link is, if it is one of a cgroup program.
pub(super) fn cgroup_link(link: impl AsFd) -> io::Result<Option<CgroupLink>> {
    // SAFETY: a structure of plain numbers and a union of such.
    let mut found: bpf_link_info = unsafe { std::mem::zeroed() };
    info(link.as_fd(), &mut found)?;
    if found.type_ != bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 {
        return Ok(None);
    }
    // SAFETY: of a link of this type, this is the field of the union.
    let cgroup = unsafe { found.__bindgen_anon_1.cgroup };
    Ok(Some(CgroupLink {
        id: found.id,
        program: found.prog_id,
        cgroup: cgroup.cgroup_id,
        attach_type: cgroup.attach_type,
    }))
}

/// What a program is.
pub(super) fn program_info(program: impl AsFd) -> io::Result<ProgramInfo> {
    /// More maps than any of our programs has.
    const MAPS: usize = 64;
    let mut maps = vec![0_u32; MAPS];
    // SAFETY: a structure of plain numbers.
    let mut found: bpf_prog_info = unsafe { std::mem::zeroed() };
    found.map_ids = pointer(maps.as_mut_ptr());
    found.nr_map_ids = u32::try_from(MAPS).map_err(io::Error::other)?;
    info(program.as_fd(), &mut found)?;
    maps.truncate(found.nr_map_ids as usize);
    let name = found
        .name
        .iter()
        .map(|byte| u8::from_ne_bytes(byte.to_ne_bytes()))
        .take_while(|byte| *byte != 0);
    Ok(ProgramInfo {
        id: found.id,
        name: String::from_utf8_lossy(&name.collect::<Vec<_>>()).into_owned(),
        maps,
        loaded_at: found.load_time,
        verified_instructions: Some(found.verified_insns).filter(|count| *count != 0),
    })
}

/// Writes elements of a map whose keys and values are of these types.
///
/// # Minimum kernel version
///
/// 5.6.
pub(super) fn update_elements<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    debug_assert_eq!(keys.len(), values.len());
    let mut attr = empty();
    attr.batch.map_fd = number(map);
    attr.batch.keys = pointer(keys);
    attr.batch.values = pointer(values);
    attr.batch.count = u32::try_from(keys.len()).map_err(io::Error::other)?;
    call(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr).map(drop)
}

/// Reads elements of an array, whose keys are numbers, from behind `last` on, as many
/// as there is room for keys; how many there were, and in `last` the last of them.
///
/// # Minimum kernel version
///
/// 5.6.
pub(super) fn lookup_elements<V: Pod>(
    array: BorrowedFd<'_>,
    last: &mut Option<u32>,
    keys: &mut [u32],
    values: &mut [V],
) -> io::Result<usize> {
    let mut end = 0_u32;
    let mut attr = empty();
    attr.batch.map_fd = number(array);
    attr.batch.in_batch = last.as_ref().map_or(0, |last| pointer(last));
    attr.batch.out_batch = pointer(&raw mut end);
    attr.batch.keys = pointer(keys.as_mut_ptr());
    attr.batch.values = pointer(values.as_mut_ptr());
    attr.batch.count = u32::try_from(keys.len()).map_err(io::Error::other)?;
    match call(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => {}
        // The end of the map.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => return Err(error),
    }
    *last = Some(end);
    // SAFETY: the kernel has written the number there.
    Ok(unsafe { attr.batch.count } as usize)
}

/// Removes an element of a map whose keys are of this type: ENOENT where there is none.
pub(super) fn delete_element<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let mut attr = empty();
    // SAFETY: of the union it is the part that this command reads.
    let asked = unsafe { &mut attr.__bindgen_anon_2 };
    asked.map_fd = number(map);
    asked.key = pointer(key);
    call(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr).map(drop)
}

/// How many keys a map has, `most` at the most: while elements come and go, the
/// kernel may begin anew.
pub(super) fn count_keys(map: BorrowedFd<'_>, key_size: u32, most: u32) -> io::Result<u64> {
    let mut key = vec![0_u8; key_size as usize];
    let mut next = key.clone();
    let mut attr = empty();
    // SAFETY: of the union it is the part that this command reads.
    let asked = unsafe { &mut attr.__bindgen_anon_2 };
    asked.map_fd = number(map);
    asked.__bindgen_anon_1.next_key = pointer(next.as_mut_ptr());
    for count in 0..u64::from(most) {
        match call(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(count),
            Err(error) => return Err(error),
        }
        key.copy_from_slice(&next);
        // SAFETY: as above.
        unsafe { &mut attr.__bindgen_anon_2 }.key = pointer(key.as_ptr());
    }
    Ok(most.into())
}

/// The ids of the programs of a hook that run for a cgroup, those of its
/// ancestors included, in the order in which they run.
pub(super) fn programs_on(cgroup: impl AsFd, attach_type: bpf_attach_type) -> io::Result<Vec<u32>> {
    /// As many as the kernel lets a cgroup have (`BPF_CGROUP_MAX_PROGS`), and more
    /// than that for those above it.
    const PROGRAMS: usize = 1024;
    let mut ids = vec![0_u32; PROGRAMS];
    let mut attr = empty();
    attr.query.__bindgen_anon_1.target_fd = number(cgroup.as_fd());
    attr.query.attach_type = attach_type as u32;
    attr.query.query_flags = BPF_F_QUERY_EFFECTIVE;
    attr.query.prog_ids = pointer(ids.as_mut_ptr());
    attr.query.__bindgen_anon_2.prog_cnt = u32::try_from(PROGRAMS).map_err(io::Error::other)?;
    call(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: the kernel has written the number there.
    let count = unsafe { attr.query.__bindgen_anon_2.prog_cnt };
    ids.truncate(count as usize);
    Ok(ids)
}

/// Whether [`wait_for_programs`] can: not where some CPUs have no clock tick (nohz_full).
pub(super) fn can_wait_for_programs() -> bool {
    membarrier_query().contains(MembarrierQuery::GLOBAL)
}

/// Waits until every program has ended that is running now, some 10 ms: they run as
/// readers of what RCU guards, and the kernel waits for all of those
/// (`synchronize_rcu()` in kernel/sched/membarrier.c).
pub(super) fn wait_for_programs() -> io::Result<()> {
    fault::point(Operation::Wait)?;
    Ok(membarrier(MembarrierCommand::Global)?)
}

/// Attaches a program that was loaded for a tracepoint; it runs as long as the link
/// is held.
pub(super) fn attach_to_tracepoint(program: impl AsFd) -> io::Result<OwnedFd> {
    fault::point(Operation::LinkCreate)?;
    let mut attr = empty();
    // Which one is known since it was loaded.
    attr.raw_tracepoint.prog_fd = number(program.as_fd());
    descriptor(bpf_cmd::BPF_RAW_TRACEPOINT_OPEN, &mut attr)
}
