use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, RawFd};

use anyhow::Result;
use rustix::net::{getpeername, getsockname, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::{Cgroup, Options};

/// A TCP connection that a process holds, as `getsockopt` on a copy of its own
/// descriptor tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// What this end has.
    pub options: Options,
}

impl Connection {
    /// All that processes of this cgroup hold. What ends meanwhile is left out.
    ///
    /// # Errors
    ///
    /// The cgroup cannot be read.
    pub fn of(cgroup: &Cgroup) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for pid in fs::read_to_string(cgroup.directory().join("cgroup.procs"))?.lines() {
            let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) else {
                continue;
            };
            let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
                continue;
            };
            let descriptors = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero()));
            for entry in descriptors.into_iter().flatten().flatten() {
                let is_socket = fs::read_link(entry.path())
                    .is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
                let number = entry.file_name().to_string_lossy().parse::<RawFd>();
                if let (true, Ok(number)) = (is_socket, number)
                    && let Ok(copy) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())
                    && let Some(connection) = Self::at(copy)
                {
                    found.push(connection);
                }
            }
        }
        Ok(found)
    }

    /// The connection at this descriptor, if it is one.
    fn at(socket: impl AsFd) -> Option<Self> {
        let seconds = |time: std::time::Duration| i32::try_from(time.as_secs()).ok();
        Some(Self {
            peer: SocketAddr::try_from(getpeername(&socket).ok()??).ok()?,
            local: SocketAddr::try_from(getsockname(&socket).ok()?).ok()?,
            options: Options {
                keepalive: sockopt::socket_keepalive(&socket).ok()?,
                idle: seconds(sockopt::tcp_keepidle(&socket).ok()?)?,
                interval: seconds(sockopt::tcp_keepintvl(&socket).ok()?)?,
                probes: sockopt::tcp_keepcnt(&socket).ok()?.try_into().ok()?,
                user_timeout: sockopt::tcp_user_timeout(&socket).ok()?.try_into().ok()?,
            },
        })
    }
}
