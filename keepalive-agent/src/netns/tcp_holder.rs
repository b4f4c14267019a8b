//! Whether a process holds TCP sockets, found without the kernel's table of all
//! sockets, which takes long to go through.

use std::io;

use rustix::{
    fs::{CWD, Dir, Mode, OFlags, getxattr, open, openat, readlinkat},
    io::Errno,
};

use super::own_link;

/// Whether one of the first `most` descriptors of a process leads to a TCP socket,
/// or there are more descriptors.
///
/// As elsewhere in this module nothing is asked but what only the kernel answers: a
/// descriptor can lead to a file of another user's file system at any time.
///
/// # Errors
///
/// When the process is gone, or may not be looked at.
pub fn holds_tcp(process: u32, most: usize) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open(format!("/proc/{process}/fd"), flags, Mode::empty())?;
    let mut seen = 0;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        seen += 1;
        if seen > most {
            return Ok(true);
        }
        let link = match readlinkat(&directory, name, Vec::new()) {
            // It was closed meanwhile.
            Err(Errno::NOENT) => continue,
            link => link?,
        };
        // Only the kernel makes such a name: those of files begin with a slash.
        if !link.to_bytes().starts_with(b"socket:[") {
            continue;
        }
        let handle = match openat(
            &directory,
            name,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Err(Errno::NOENT) => continue,
            handle => handle?,
        };
        // It may lead to something else by now; what is held here does not change.
        let link = readlinkat(CWD, own_link(&handle), Vec::new())?;
        if link.to_bytes().starts_with(b"socket:[") && is_tcp(&own_link(&handle))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the socket that a link leads to is one of TCP, or of MPTCP, below which
/// there are some (`sockfs_xattr_get()` in net/socket.c).
fn is_tcp(link: &str) -> io::Result<bool> {
    let mut protocol = [0; 32];
    let length = getxattr(link, "system.sockprotoname", &mut protocol)?;
    let protocol = protocol.get(..length).unwrap_or_default();
    Ok(protocol.starts_with(b"TCP") || protocol.starts_with(b"MPTCP"))
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, UdpSocket},
        os::{fd::OwnedFd, unix::net::UnixStream},
        process::{Command, Stdio},
    };

    use super::*;

    /// Whether a process holds TCP that is given this as its standard input.
    fn held(input: impl Into<Stdio>, most: usize) -> bool {
        let mut sleep = Command::new("sleep");
        sleep.arg("60").stdin(input);
        sleep.stdout(Stdio::null()).stderr(Stdio::null());
        let mut sleep = sleep.spawn().unwrap();
        let held = holds_tcp(sleep.id(), most);
        sleep.kill().unwrap();
        sleep.wait().unwrap();
        held.unwrap()
    }

    #[test]
    fn only_tcp_counts() {
        for address in ["127.0.0.1:0", "[::]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            assert!(held(OwnedFd::from(listener), 64), "{address}");
        }
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(!held(OwnedFd::from(datagrams), 64));
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(!held(OwnedFd::from(one), 64));
        assert!(!held(Stdio::piped(), 64));
        // More than are looked at.
        assert!(held(Stdio::null(), 2));
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        assert!(holds_tcp(u32::MAX, 64).is_err());
    }
}
