//! The network namespace of a socket that another process holds, by a copy of
//! its descriptor.
#![expect(unsafe_code, reason = "an ioctl")]

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, RawPid, pidfd_getfd, pidfd_open};

use super::Descriptor;

/// Asks a socket for a descriptor of its namespace (include/uapi/linux/sockios.h,
/// since Linux 4.10).
const SIOCGSKNS: libc::Ioctl = 0x894C;

/// A descriptor of the namespace that the socket is in; none where the descriptor
/// is no socket any more.
///
/// Nothing is opened: a copy of the descriptor is asked, whatever it leads to.
/// Takes what attaching a debugger to the process takes, and CAP_NET_ADMIN over
/// the namespace.
///
/// # Minimum kernel version
///
/// 5.6, for `pidfd_getfd`.
pub(super) fn open(socket: Descriptor) -> io::Result<Option<OwnedFd>> {
    let Some(process) = RawPid::try_from(socket.process)
        .ok()
        .and_then(Pid::from_raw)
    else {
        return Ok(None);
    };
    let Ok(number) = socket.number.try_into() else {
        return Ok(None);
    };
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let copy = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
    // Other files are not asked: what an ioctl of that number means to them is
    // not known.
    if rustix::net::sockopt::socket_type(&copy).is_err() {
        return Ok(None);
    }
    // SAFETY: takes no argument, and the descriptor is open.
    let namespace = unsafe { libc::ioctl(copy.as_raw_fd(), SIOCGSKNS) };
    if namespace < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(namespace) }))
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, process};

    use super::*;

    #[test]
    fn a_socket_leads_to_its_namespace_and_another_file_nowhere() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let of = |number: i32| Descriptor {
            process: process::id(),
            number: number.cast_unsigned(),
        };
        assert!(open(of(file.as_raw_fd())).unwrap().is_none());
        // Asking takes CAP_NET_ADMIN.
        if rustix::process::geteuid().is_root() {
            let namespace = open(of(socket.as_raw_fd())).unwrap().unwrap();
            let own = super::super::own_id().unwrap();
            assert!(super::super::leads_to(&namespace, own));
        }
    }
}
