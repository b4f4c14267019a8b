//! Hierarchy: a record of every cgroup that is made or removed, for the agent
//! to read.

use aya_ebpf::{
    btf_maps::{Array, PerCpuArray, RingBuf},
    macros::btf_map,
    programs::BtfTracePointContext,
};
use keepalive_common::cgroup_event::{CgroupEvent, Header, Kind, PATH_SIZE};

use crate::{
    enforce::count,
    kernel::{Cgroup, copy_string},
};

/// What happened, in its order. The agent makes it smaller where nobody reads it.
#[btf_map]
static EVENTS: RingBuf<CgroupEvent, { 64 * 1024 }> = RingBuf::new();

/// Where a record is put together: it is larger than the stack.
#[btf_map]
static SCRATCH: PerCpuArray<CgroupEvent, 1> = PerCpuArray::new();

/// How many records were lost, because the agent had not read the earlier ones.
#[btf_map]
static LOST: Array<u64, 1> = Array::new();

/// Tells the agent of a cgroup, if it is of the v2 hierarchy.
#[inline(always)]
pub(crate) fn tell(ctx: &BtfTracePointContext, kind: Kind) {
    let Some(cgroup) = Cgroup::of(ctx).filter(|cgroup| cgroup.is_v2()) else {
        return;
    };
    // The kernel holds a lock with interrupts off around the tracepoint: no
    // other run on this CPU uses the scratch record meanwhile.
    let (Some(event), Some(lost)) = (SCRATCH.get_ptr_mut(0), LOST.get_ptr(0)) else {
        return;
    };
    // SAFETY: a live element of a per-CPU map.
    let written = copy_string(ctx.arg(1), unsafe { &mut (*event).path });
    let Some(length) = written.filter(|length| *length <= PATH_SIZE) else {
        count(lost);
        return;
    };
    // SAFETY: as above.
    unsafe {
        (*event).header = Header {
            id: cgroup.id(),
            kind: kind as u32,
            #[expect(clippy::cast_possible_truncation, reason = "at most PATH_SIZE")]
            length: length as u32,
        };
    }
    // Read back and looked at again: the verifier of Linux 6.1 loses the bounds of
    // the length on the way from where it was looked at first.
    // SAFETY: it has just been written.
    let length = unsafe { (&raw const (*event).header.length).read_volatile() } as usize;
    if length > PATH_SIZE {
        return;
    }
    // SAFETY: the record is that long.
    let record =
        unsafe { core::slice::from_raw_parts(event.cast::<u8>(), size_of::<Header>() + length) };
    if EVENTS.output_untyped::<[u8]>(record, 0).is_err() {
        count(lost);
    }
}
