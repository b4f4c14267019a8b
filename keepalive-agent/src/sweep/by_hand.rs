//! The other road: where the kernel lets no iterator set options (before Linux
//! 5.15), the agent takes a copy of each socket's descriptor out of its process
//! and sets them itself. The decision is the same code as in the kernel.
//!
//! A connection that waits to be accepted has no descriptor yet and is missed.

use std::{
    collections::HashMap,
    fs,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result};
use keepalive_common::{
    counters::Counters,
    environment::Environment,
    history::{Originals, application, known_by, replan},
    plan::Options,
    sweep::{Pass, Silence, arms, now},
};
use rustix::{
    fs::fstat,
    net::sockopt,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};
use tracing::debug;

use super::BATCH;
use crate::{
    bpf::{ByHand, Claimed},
    netns::{self, Namespace},
    sockets::holders::each_socket,
};

/// Lists connections in the kernel and changes them from outside.
pub(super) struct Hand {
    by_hand: ByHand,
}

/// A connection that may need a change.
struct Candidate {
    has: Options,
    silent_ms: i64,
    claimed: Claimed,
    environment: Environment,
}

/// Candidates by inode number.
type Candidates = HashMap<u64, Candidate>;

/// Candidates that are kept at a time: what fits into a hash map of 2^19 places,
/// 26 MB. However many connections there are, the agent stays small.
const ROOM: usize = 7 << 16;

/// The connections whose inode number leaves this remainder.
#[derive(Clone, Copy)]
struct Share {
    remainder: u64,
    divisor: u64,
}

impl Share {
    const ALL: Self = Self {
        remainder: 0,
        divisor: 1,
    };

    /// Shares that fill half of the room each: they are not quite equal, and
    /// there may be more connections by then.
    fn of(candidates: usize) -> impl Iterator<Item = Self> {
        let divisor = candidates.div_ceil(ROOM / 2) as u64;
        (0..divisor).map(move |remainder| Self { remainder, divisor })
    }

    const fn contains(self, inode: u64) -> bool {
        inode % self.divisor == self.remainder
    }
}

impl Hand {
    pub(super) const fn new(by_hand: ByHand) -> Self {
        Self { by_hand }
    }

    /// Makes a pass over the connections of a namespace, unless it is gone. With
    /// a `pause` the connections that probe at once are changed too, a batch at
    /// a time.
    pub(super) fn pass(
        &self,
        namespace: &Namespace,
        counts: bool,
        mut pause: Option<&mut (dyn FnMut() -> bool + Send)>,
    ) -> Result<Option<Pass>> {
        let mut pass = Pass::default();
        let Some((candidates, count)) =
            self.candidates(namespace, Share::ALL, counts, &mut pass.seen)?
        else {
            return Ok(None);
        };
        if count == candidates.len() {
            self.change_all(candidates, counts, &mut pause, &mut pass)?;
            return Ok(Some(pass));
        }
        drop(candidates);
        for share in Share::of(count) {
            let Some((candidates, _)) = self.candidates(namespace, share, false, &mut 0)? else {
                break;
            };
            if !self.change_all(candidates, counts, &mut pause, &mut pass)? {
                break;
            }
        }
        Ok(Some(pass))
    }

    /// Changes what is to be changed; whether to go on.
    fn change_all(
        &self,
        mut candidates: Candidates,
        counts: bool,
        pause: &mut Option<&mut (dyn FnMut() -> bool + Send)>,
        pass: &mut Pass,
    ) -> Result<bool> {
        for pid in processes()? {
            if candidates.is_empty() {
                break;
            }
            let mut held = Vec::new();
            // A process that has ended meanwhile holds nothing.
            let _ = each_socket(pid, |descriptor, inode| {
                if let Some(candidate) = candidates.remove(&inode) {
                    held.push((descriptor, inode, candidate));
                }
            });
            for (descriptor, inode, candidate) in held {
                let socket = match take(pid, descriptor, inode) {
                    Ok(socket) => socket,
                    Err(error) => {
                        debug!(pid, descriptor, "{error:#}");
                        continue;
                    }
                };
                let probes = self.change(&socket, &candidate, counts, pause.is_some(), pass);
                if let Some(pause) = pause.as_mut().filter(|_| probes) {
                    pass.in_batch += 1;
                    if pass.in_batch.is_multiple_of(BATCH) && !pause() {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// The connections of a share whose policy may want something, as many as
    /// there is room for, and how many there are. Adds what it has `seen`, and
    /// counts it under the policies where that is wanted.
    fn candidates(
        &self,
        namespace: &Namespace,
        share: Share,
        counts: bool,
        seen: &mut u64,
    ) -> Result<Option<(Candidates, usize)>> {
        let mut candidates = HashMap::new();
        let mut count = 0;
        let by_hand = &self.by_hand;
        let listed = namespace.enter(|| {
            let environment = netns::environment()?;
            by_hand.list(&mut |record| {
                *seen += 1;
                let Some(claimed) = by_hand.claimed(record) else {
                    return Ok(());
                };
                let Some(policy) = by_hand.policy(claimed.now) else {
                    return Ok(());
                };
                let before = by_hand.policy(claimed.before);
                let has = record.options();
                let none = Originals::default();
                let unknown = application(&has, &none, before, &environment);
                let is_right = replan(policy, &has, &unknown, &none, &environment).wants == has;
                if counts {
                    let done = Counters {
                        seen: 1,
                        left_alone: u64::from(is_right),
                        ..Counters::default()
                    };
                    by_hand.count(claimed.now, &done);
                }
                // Only the socket itself knows what was replaced on it.
                let may_want = !is_right || before.is_some_and(|before| before != policy);
                // 0 is one that waits to be accepted: no process holds it yet.
                if !may_want || record.inode == 0 || !share.contains(record.inode) {
                    return Ok(());
                }
                count += 1;
                if candidates.len() < ROOM {
                    let candidate = Candidate {
                        has,
                        silent_ms: record.silent_ms,
                        claimed,
                        environment,
                    };
                    candidates.insert(record.inode, candidate);
                }
                Ok(())
            })
        })?;
        listed
            .map(|listed| listed.map(|_| (candidates, count)))
            .transpose()
    }

    /// Sets what is to be set now; whether the connection probes at once.
    fn change(
        &self,
        socket: &OwnedFd,
        candidate: &Candidate,
        counts: bool,
        may_probe: bool,
        pass: &mut Pass,
    ) -> bool {
        let Candidate {
            has,
            silent_ms,
            claimed,
            environment,
        } = *candidate;
        let Some(policy) = self.by_hand.policy(claimed.now) else {
            return false;
        };
        let originals = self.by_hand.originals(socket);
        let before = self.by_hand.policy(claimed.before);
        let application = application(&has, &originals, before, &environment);
        let plan = replan(policy, &has, &application, &originals, &environment);
        let wants = plan.wants;
        let known = known_by(policy, &plan, &environment);
        if !policy.is_enforced() {
            let replaces = Originals::of(&application, &has, &known);
            self.remember(socket, &originals, &replaces);
            if counts {
                let done = set(None, &application, &has, &wants);
                self.by_hand.count(claimed.now, &done);
            }
            return false;
        }
        let silence = Silence::new(silent_ms, 1000, &environment.complete(&wants));
        let now = now(&has, &wants, silence, may_probe);
        pass.waiting += u64::from(now != wants);
        let replaces = Originals::of(&application, &now, &known);
        self.remember(socket, &originals, &replaces);
        if now == has {
            return false;
        }
        self.by_hand
            .count(claimed.now, &set(Some(socket), &application, &has, &now));
        silence.is_due && arms(&has, &now)
    }

    /// Keeps what is replaced on the socket, if that is another thing than before.
    fn remember(&self, socket: &OwnedFd, before: &Originals, replaces: &Originals) {
        if replaces != before
            && let Err(error) = self.by_hand.remember(socket, replaces)
        {
            debug!("keeping what a policy replaced: {error:#}");
        }
    }
}

/// All process ids.
fn processes() -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context("reading /proc")?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// Whether descriptors can be taken, tried on one of our own.
pub(super) fn works() -> bool {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .ok()
        .and_then(|socket| {
            let inode = fstat(&socket).ok()?.st_ino;
            take(std::process::id(), socket.as_raw_fd(), inode).ok()
        })
        .is_some()
}

/// A copy of a descriptor of another process, if it still is the same socket.
fn take(pid: u32, descriptor: i32, inode: u64) -> Result<OwnedFd> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .context("no process id")?;
    let process = pidfd_open(pid, PidfdFlags::empty()).context("opening the process")?;
    let socket = pidfd_getfd(&process, descriptor, PidfdGetfdFlags::empty())
        .context("taking its descriptor")?;
    let found = fstat(&socket).context("looking at its descriptor")?.st_ino;
    anyhow::ensure!(found == inode, "the descriptor is another one by now");
    Ok(socket)
}

/// Sets what differs, as `Setter::set` of the BPF program does. Without a socket
/// it is only counted.
fn set(
    socket: Option<&OwnedFd>,
    application: &Options,
    has: &Options,
    wants: &Options,
) -> Counters {
    let seconds = |value: u32| Duration::from_secs(value.into());
    let mut done = Counters::default();
    let mut timer = |application: u32,
                     has: u32,
                     wants: u32,
                     set: &dyn Fn(&OwnedFd) -> rustix::io::Result<()>| {
        if has == wants {
            return;
        }
        if socket.is_some_and(|socket| set(socket).is_err()) {
            done.failed += 1;
        } else if application == 0 {
            done.filled += 1;
        } else if application != wants {
            done.clamped += 1;
        }
    };
    timer(application.idle, has.idle, wants.idle, &|socket| {
        sockopt::set_tcp_keepidle(socket, seconds(wants.idle))
    });
    timer(
        application.interval,
        has.interval,
        wants.interval,
        &|socket| sockopt::set_tcp_keepintvl(socket, seconds(wants.interval)),
    );
    timer(application.probes, has.probes, wants.probes, &|socket| {
        sockopt::set_tcp_keepcnt(socket, wants.probes)
    });
    timer(
        application.user_timeout,
        has.user_timeout,
        wants.user_timeout,
        &|socket| sockopt::set_tcp_user_timeout(socket, wants.user_timeout),
    );
    if has.keepalive == wants.keepalive {
        return done;
    }
    let set = |socket| {
        sockopt::set_socket_keepalive(socket, wants.keepalive)?;
        if wants.keepalive {
            // Arms from the last activity instead of from now.
            let _ = sockopt::set_tcp_keepidle(socket, seconds(wants.idle));
        }
        rustix::io::Result::Ok(())
    };
    if socket.is_some_and(|socket| set(socket).is_err()) {
        done.failed += 1;
    } else if wants.keepalive {
        done.turned_on += 1;
    } else {
        done.turned_off += 1;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_a_descriptor_of_this_process() {
        assert!(works());
    }

    #[test]
    fn each_connection_is_in_one_share_and_shares_leave_room() {
        for count in [ROOM + 1, 1_000_000] {
            let shares: Vec<_> = Share::of(count).collect();
            let mut sizes = vec![0; shares.len()];
            for inode in 77..77 + count as u64 {
                let mut of = (0..shares.len()).filter(|index| shares[*index].contains(inode));
                sizes[of.next().unwrap()] += 1;
                assert_eq!(of.next(), None);
            }
            assert!(sizes.iter().all(|size| *size <= ROOM / 2 + 1), "{sizes:?}");
            assert!(sizes.iter().all(|size| *size > ROOM / 5), "{sizes:?}");
        }
    }
}
