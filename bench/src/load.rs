//! The load: connections that are made and closed, in a process of its own.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsFd as _,
    path::PathBuf,
    sync::Barrier,
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::{
    thread::{CpuSet, LinkNameSpaceType, move_into_link_name_space, sched_setaffinity},
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};

use crate::stats::Summary;

/// Connections that each thread makes before it measures.
pub(crate) const WARM_UP: u32 = 50;

/// About a millisecond.
const BURST: u32 = 25;

/// What a load is to do.
#[derive(Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) threads: u32,
    /// Connections that each thread makes and measures.
    pub(crate) count: u32,
    pub(crate) address: Ipv4Addr,
    /// Whether it sets keepalive and its timers itself, on both ends.
    pub(crate) sets_options: bool,
    pub(crate) listeners: Spot,
    pub(crate) clients: Spot,
}

/// Where sockets are made: the directory of a cgroup, the file of a network
/// namespace.
#[derive(Serialize, Deserialize)]
pub(crate) struct Spot {
    pub(crate) cgroup: PathBuf,
    pub(crate) netns: PathBuf,
}

impl Spot {
    fn enter(&self) -> Result<()> {
        fs::write(self.cgroup.join("cgroup.procs"), "0")
            .with_context(|| format!("cannot enter {}", self.cgroup.display()))?;
        let netns = File::open(&self.netns)?;
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("cannot enter {}", self.netns.display()))
    }
}

/// Does it, and prints the nanoseconds of CPU that a connection takes.
pub(crate) fn main(load: &str) -> Result<()> {
    let load: Load = serde_json::from_str(load)?;
    load.listeners.enter()?;
    let listeners = (0..load.threads).map(|_| listen(load.address));
    let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
    load.clients.enter()?;
    let barrier = Barrier::new(listeners.len());
    let bursts = thread::scope(|scope| {
        let (load, barrier) = (&load, &barrier);
        let start = |(cpu, listener)| scope.spawn(move || work(load, listener, cpu, barrier));
        let threads: Vec<_> = listeners.iter().enumerate().map(start).collect();
        let results = threads.into_iter().map(ScopedJoinHandle::join);
        results
            .map(|result| result.unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))))
            .collect::<io::Result<Vec<_>>>()
    })?;
    // The median, so that a burst that was interrupted falls out.
    let cpu = Summary::of(&bursts.concat()).context("nothing was measured")?;
    println!("{}", cpu.median);
    Ok(())
}

fn listen(address: Ipv4Addr) -> io::Result<Socket> {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    listener.bind(&SocketAddr::from((address, 0)).into())?;
    listener.listen(128)?;
    Ok(listener)
}

/// Nanoseconds of CPU per connection, of each burst.
fn work(load: &Load, listener: &Socket, cpu: usize, barrier: &Barrier) -> io::Result<Vec<f64>> {
    if load.threads > 1 {
        let mut cpus = CpuSet::new();
        cpus.set(cpu);
        // Where it may not choose, the kernel does.
        let _ = sched_setaffinity(None, &cpus);
    }
    let address = listener.local_addr()?;
    turn(load, listener, &address, WARM_UP)?;
    barrier.wait();
    let burst = |_| {
        let start = clock_gettime(ClockId::ThreadCPUTime);
        turn(load, listener, &address, BURST)?;
        let took = clock_gettime(ClockId::ThreadCPUTime) - start;
        let took = Duration::try_from(took).map_err(io::Error::other)?;
        Ok(took.as_secs_f64() * 1e9 / f64::from(BURST))
    };
    (0..load.count / BURST).map(burst).collect()
}

fn turn(load: &Load, listener: &Socket, address: &SockAddr, count: u32) -> io::Result<()> {
    for _ in 0..count {
        let near = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        if load.sets_options {
            set_options(&near)?;
        }
        near.connect(address)?;
        let (far, _) = listener.accept()?;
        if load.sets_options {
            set_options(&far)?;
        }
        drop(near);
    }
    Ok(())
}

fn set_options(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(Duration::from_mins(1))
            .with_interval(Duration::from_secs(10))
            .with_retries(6),
    )
}
