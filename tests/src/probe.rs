use std::fmt;
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::io::Errno;

use crate::process::lines;
use crate::{Cgroup, Netns, Options, Place, Process, Program, Sockopt};

/// How long an answer may take beyond the time that the question itself asks for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const SOCK_STREAM: u32 = 1;
const SOCK_NONBLOCK: u32 = 0o4000;
const IPPROTO_MPTCP: u32 = 262;
const SOL_SOCKET: i32 = 1;
const SO_ERROR: i32 = 4;
const MSG_FASTOPEN: u32 = 0x2000_0000;
const POLLIN: u32 = 1;
const POLLOUT: u32 = 4;

/// A program that answers one line of input with `ok VALUE` or `err ERRNO`.
#[derive(Debug)]
pub(crate) struct Conversation {
    process: Process,
    answers: Receiver<String>,
}

impl Conversation {
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(command)?;
        let answers = lines(process.child().stdout.take());
        Ok(Self { process, answers })
    }

    pub(crate) fn ask(&mut self, question: &str, patience: Duration) -> Result<String> {
        let input = self.process.child().stdin.as_mut().context("no input")?;
        // One write: half a line would be a question of its own.
        input
            .write_all(format!("{question}\n").as_bytes())
            .with_context(|| format!("nobody to ask `{question}`"))?;
        self.answer(question, patience)
    }

    /// Ends the input and waits for the program to end with it.
    fn finish(mut self) -> Result<()> {
        drop(self.process.child().stdin.take());
        let status = self.process.wait(PATIENCE)?;
        ensure!(status.success(), "the program failed: {status}");
        Ok(())
    }

    fn answer(&mut self, question: &str, patience: Duration) -> Result<String> {
        let answer = self
            .answers
            .recv_timeout(patience)
            .with_context(|| format!("no answer to `{question}`"))?;
        if let Some(value) = answer.strip_prefix("ok ") {
            return Ok(value.to_owned());
        }
        let errno = answer
            .strip_prefix("err ")
            .with_context(|| format!("`{question}` was answered `{answer}`"))?;
        Err(CallError {
            call: question.to_owned(),
            errno: Errno::from_raw_os_error(errno.parse()?),
        }
        .into())
    }
}

/// A system call that a helper program made on our behalf failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallError {
    /// The call as it was asked for.
    pub call: String,
    /// What the kernel said.
    pub errno: Errno,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.call, self.errno)
    }
}

impl std::error::Error for CallError {}

/// What kind of socket to make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kind {
    /// `AF_INET6` instead of `AF_INET`.
    pub v6: bool,
    /// `SOCK_NONBLOCK`.
    pub nonblocking: bool,
    /// `IPPROTO_MPTCP` instead of TCP.
    pub mptcp: bool,
}

impl Kind {
    /// The kind that reaches this address.
    #[must_use]
    pub fn of(address: SocketAddr) -> Self {
        Self {
            v6: address.is_ipv6(),
            ..Self::default()
        }
    }
}

/// A socket of a [`Probe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket(u32);

/// A running `probe.c`: a process whose sockets the test directs.
#[derive(Debug)]
pub struct Probe(Conversation);

impl Probe {
    /// Starts one of the three builds.
    ///
    /// # Errors
    ///
    /// It does not build or start.
    pub fn start<'a>(program: Program, place: impl Into<Place<'a>>) -> Result<Self> {
        Self::start_with(program, place, &[])
    }

    /// The same with variables added to its environment.
    ///
    /// # Errors
    ///
    /// As [`Probe::start`].
    pub fn start_with<'a>(
        program: Program,
        place: impl Into<Place<'a>>,
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let mut command = place.into().command("env");
        // Through env(1), so that LD_PRELOAD is not in force for nsenter and sh.
        command.args(
            variables
                .iter()
                .map(|(key, value)| format!("{key}={value}")),
        );
        command.arg(program.path()?);
        Ok(Self(Conversation::start(&mut command)?))
    }

    /// Starts it by a command of the caller's, at the other end of whose pipes it
    /// is.
    ///
    /// # Errors
    ///
    /// The command does not start.
    pub fn start_by(command: &mut Command) -> Result<Self> {
        Ok(Self(Conversation::start(command)?))
    }

    /// Lets the program end by itself.
    ///
    /// # Errors
    ///
    /// It does not, or fails.
    pub fn finish(self) -> Result<()> {
        self.0.finish()
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.process.id()
    }

    /// Moves the process to another cgroup. It has made no socket since the last
    /// answer, and makes none before the next question.
    ///
    /// # Errors
    ///
    /// The cgroup or the process is gone.
    pub fn move_to(&self, cgroup: &Cgroup) -> Result<()> {
        cgroup.take_in(self.id())
    }

    /// Makes a socket.
    ///
    /// # Errors
    ///
    /// [`CallError`], as from every call below.
    pub fn socket(&mut self, kind: Kind) -> Result<Socket> {
        let domain = if kind.v6 { AF_INET6 } else { AF_INET };
        let flags = if kind.nonblocking { SOCK_NONBLOCK } else { 0 };
        let protocol = if kind.mptcp { IPPROTO_MPTCP } else { 0 };
        self.ask(&format!(
            "socket {domain} {} {protocol}",
            SOCK_STREAM | flags
        ))
        .map(Socket)
    }

    /// Sets an option as the application.
    ///
    /// # Errors
    ///
    /// The kernel refuses the value.
    pub fn set(&mut self, socket: Socket, option: Sockopt, value: i32) -> Result<()> {
        let (level, number) = option.numbers();
        self.set_raw(socket, level, number, value)
    }

    /// Sets any option that takes an int.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn set_raw(&mut self, socket: Socket, level: i32, number: i32, value: i32) -> Result<()> {
        self.ask(&format!("set {} {level} {number} {value}", socket.0))?;
        Ok(())
    }

    /// Sets an option with a value of this length, of which an int is the beginning
    /// and the rest is zero.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn set_long(
        &mut self,
        socket: Socket,
        level: i32,
        number: i32,
        value: u32,
        length: u32,
    ) -> Result<()> {
        self.ask(&format!(
            "set {} {level} {number} {value} {length}",
            socket.0
        ))?;
        Ok(())
    }

    /// Sets several options as the application.
    ///
    /// # Errors
    ///
    /// The kernel refuses one.
    pub fn set_all(&mut self, socket: Socket, options: &[(Sockopt, i32)]) -> Result<()> {
        options
            .iter()
            .try_for_each(|&(option, value)| self.set(socket, option, value))
    }

    /// What the socket has, asked with `getsockopt` by the process it belongs to.
    ///
    /// # Errors
    ///
    /// There is no such socket.
    pub fn options(&mut self, socket: Socket) -> Result<Options> {
        Options::read(|option| {
            let (level, number) = option.numbers();
            let value = self.ask(&format!("get {} {level} {number}", socket.0))?;
            Ok(i32::try_from(value)?)
        })
    }

    /// Binds and listens, with port 0 on one that is free.
    ///
    /// # Errors
    ///
    /// The address is taken or not here.
    pub fn listen(&mut self, socket: Socket, address: SocketAddr) -> Result<SocketAddr> {
        self.ask(&format!("bind {} {}", socket.0, encode(address)))?;
        self.ask(&format!("listen {} 64", socket.0))?;
        self.name(socket)
    }

    /// Binds a socket that is to connect.
    ///
    /// # Errors
    ///
    /// The address is taken or not here.
    pub fn bind(&mut self, socket: Socket, address: SocketAddr) -> Result<()> {
        self.ask(&format!("bind {} {}", socket.0, encode(address)))?;
        Ok(())
    }

    /// A plain listening socket.
    ///
    /// # Errors
    ///
    /// As [`Probe::listen`].
    pub fn listener(&mut self, address: &str) -> Result<(Socket, SocketAddr)> {
        let address = address.parse()?;
        let socket = self.socket(Kind::of(address))?;
        Ok((socket, self.listen(socket, address)?))
    }

    /// Connects; a non-blocking socket is then waited for until it is connected.
    ///
    /// # Errors
    ///
    /// No connection comes about.
    pub fn connect(&mut self, socket: Socket, address: SocketAddr) -> Result<()> {
        if self.begin_to_connect(socket, address)? {
            return Ok(());
        }
        self.finish_connecting(socket, Duration::from_secs(5))
            .with_context(|| format!("no connection to {address}"))
    }

    /// Takes the connection off the socket, which can be connected again.
    ///
    /// # Errors
    ///
    /// It does not go.
    pub fn disconnect(&mut self, socket: Socket) -> Result<()> {
        let unspecified = "00".repeat(16);
        self.ask(&format!("connect {} {unspecified}", socket.0))
            .map(drop)
    }

    /// Connects; true if the socket is connected already, false if it is
    /// non-blocking and still at it.
    ///
    /// # Errors
    ///
    /// No connection comes about.
    pub fn begin_to_connect(&mut self, socket: Socket, address: SocketAddr) -> Result<bool> {
        match self.ask(&format!("connect {} {}", socket.0, encode(address))) {
            Ok(_) => Ok(true),
            Err(error) if errno(&error) == Some(Errno::INPROGRESS) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits until a non-blocking socket is connected.
    ///
    /// # Errors
    ///
    /// It is not in that time.
    pub fn finish_connecting(&mut self, socket: Socket, limit: Duration) -> Result<()> {
        let events = self.poll(socket, POLLOUT, limit)?;
        ensure!(events != 0, "waited {limit:?} in vain");
        let failed = self.ask(&format!("get {} {SOL_SOCKET} {SO_ERROR}", socket.0))?;
        ensure!(failed == 0, "errno {failed}");
        Ok(())
    }

    /// A plain socket, connected.
    ///
    /// # Errors
    ///
    /// As [`Probe::connect`].
    pub fn connected(&mut self, address: SocketAddr) -> Result<Socket> {
        let socket = self.socket(Kind::of(address))?;
        self.connect(socket, address)?;
        Ok(socket)
    }

    /// Connects with TCP Fast Open: the bytes go with the SYN.
    ///
    /// # Errors
    ///
    /// No connection comes about.
    pub fn connect_with_data(&mut self, socket: Socket, address: SocketAddr) -> Result<()> {
        let address = encode(address);
        self.ask(&format!("send {} {MSG_FASTOPEN} 6869 {address}", socket.0))?;
        Ok(())
    }

    /// Accepts a connection, waiting for one if need be.
    ///
    /// # Errors
    ///
    /// The socket does not listen.
    pub fn accept(&mut self, listener: Socket) -> Result<Socket> {
        self.ask(&format!("accept {}", listener.0)).map(Socket)
    }

    /// A connection of the process to itself over loopback: the connecting and
    /// the accepting side.
    ///
    /// # Errors
    ///
    /// It does not come about.
    pub fn connection(&mut self) -> Result<(Socket, Socket)> {
        let (listener, address) = self.listener("127.0.0.1:0")?;
        let connecting = self.connected(address)?;
        let accepting = self.accept(listener)?;
        self.close(listener)?;
        Ok((connecting, accepting))
    }

    /// The socket's own address.
    ///
    /// # Errors
    ///
    /// There is no such socket.
    pub fn name(&mut self, socket: Socket) -> Result<SocketAddr> {
        decode(&self.0.ask(&format!("name {}", socket.0), PATIENCE)?)
    }

    /// Sends text.
    ///
    /// # Errors
    ///
    /// The connection is broken.
    pub fn send(&mut self, socket: Socket, text: &str) -> Result<()> {
        let bytes = hex(text.as_bytes());
        self.ask(&format!("send {} 0 {bytes}", socket.0))?;
        Ok(())
    }

    /// Receives: the number of bytes, 0 at the end.
    ///
    /// # Errors
    ///
    /// [`CallError`] with what the connection died of.
    pub fn receive(&mut self, socket: Socket) -> Result<u32> {
        self.ask(&format!("recv {}", socket.0))
    }

    /// Waits until there is something to receive, an end or an error. False if
    /// the time was up first.
    ///
    /// # Errors
    ///
    /// There is no such socket.
    pub fn wait(&mut self, socket: Socket, limit: Duration) -> Result<bool> {
        Ok(self.poll(socket, POLLIN, limit)? != 0)
    }

    /// Closes.
    ///
    /// # Errors
    ///
    /// There is no such socket.
    pub fn close(&mut self, socket: Socket) -> Result<()> {
        self.ask(&format!("close {}", socket.0))?;
        Ok(())
    }

    /// Does something in another network namespace and comes back: its sockets
    /// stay there, the process does not.
    ///
    /// # Errors
    ///
    /// There is no such namespace, or what is done there fails.
    pub fn visit<T>(
        &mut self,
        netns: &Netns,
        inside: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let home = self.ask("open /proc/self/ns/net")?;
        let there = self.ask(&format!("open {}", netns.path().display()))?;
        self.ask(&format!("setns {there}"))?;
        let done = inside(self);
        self.ask(&format!("setns {home}"))?;
        for file in [home, there] {
            self.ask(&format!("close {file}"))?;
        }
        done
    }

    fn poll(&mut self, socket: Socket, events: u32, limit: Duration) -> Result<u32> {
        let question = format!("poll {} {events} {}", socket.0, limit.as_millis());
        Ok(self.0.ask(&question, limit + PATIENCE)?.parse()?)
    }

    fn ask(&mut self, question: &str) -> Result<u32> {
        Ok(self.0.ask(question, PATIENCE)?.parse()?)
    }
}

/// The errno of a [`CallError`].
#[must_use]
pub fn errno(error: &anyhow::Error) -> Option<Errno> {
    error.downcast_ref::<CallError>().map(|error| error.errno)
}

/// One end of a [`GoProbe`]'s connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that called `Dial`.
    Connecting,
    /// The one that `Accept` returned.
    Accepting,
}

/// A running `probe.go`: a connection to itself.
#[derive(Debug)]
pub struct GoProbe(Conversation);

impl GoProbe {
    /// Starts it, with Go's own keepalive settings or without any.
    ///
    /// # Errors
    ///
    /// It does not build or start.
    pub fn start<'a>(
        own_keepalive: bool,
        place: impl Into<Place<'a>>,
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let mut command = place.into().command("env");
        command.args(
            variables
                .iter()
                .map(|(key, value)| format!("{key}={value}")),
        );
        command.arg(Program::Go.path()?);
        command.arg(if own_keepalive { "own" } else { "plain" });
        Ok(Self(Conversation::start(&mut command)?))
    }

    /// What the socket of one side has.
    ///
    /// # Errors
    ///
    /// The program ended.
    pub fn options(&mut self, side: Side) -> Result<Options> {
        let side = match side {
            Side::Connecting => "connecting",
            Side::Accepting => "accepting",
        };
        Options::read(|option| {
            let (level, number) = option.numbers();
            let value = self
                .0
                .ask(&format!("get {side} {level} {number}"), PATIENCE)?;
            Ok(value.parse()?)
        })
    }
}

/// A running `neighbour.c`: somebody else's `sock_ops` program at a cgroup.
#[derive(Debug)]
pub struct Neighbour(Conversation);

impl Neighbour {
    /// Attaches it, as `link`, `shared` or `alone`.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn attach(cgroup: &Cgroup, how: &str) -> Result<Self> {
        let mut command = Command::new(Program::Neighbour.path()?);
        command.arg(cgroup.directory()).arg(how);
        let mut conversation = Conversation::start(&mut command)?;
        conversation.answer("attach", PATIENCE)?;
        Ok(Self(conversation))
    }

    /// How often the kernel called it.
    ///
    /// # Errors
    ///
    /// It ended.
    pub fn calls(&mut self) -> Result<u64> {
        Ok(self.0.ask("", PATIENCE)?.parse()?)
    }

    /// Detaches, and fails if it cannot: if somebody else did so before.
    ///
    /// # Errors
    ///
    /// It was not attached any more.
    pub fn detach(self) -> Result<()> {
        self.0.finish().context("the neighbour cannot detach")
    }
}

/// A `struct sockaddr_in` or `sockaddr_in6` in hexadecimal.
pub(crate) fn encode(address: SocketAddr) -> String {
    let mut bytes = Vec::new();
    match address {
        SocketAddr::V4(address) => {
            bytes.extend(AF_INET.to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend(address.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(address) => {
            bytes.extend(AF_INET6.to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(address.ip().octets());
            bytes.extend(address.scope_id().to_ne_bytes());
        }
    }
    hex(&bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn decode(text: &str) -> Result<SocketAddr> {
    let bytes: Vec<u8> = (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16))
        .collect::<Result<_, _>>()?;
    let short = || anyhow!("`{text}` is too short for an address");
    let family = u16::from_ne_bytes(*bytes.first_chunk().ok_or_else(short)?);
    let port = u16::from_be_bytes(*bytes[2..].first_chunk().ok_or_else(short)?);
    match family {
        AF_INET => {
            let ip: &[u8; 4] = bytes[4..].first_chunk().ok_or_else(short)?;
            Ok((*ip, port).into())
        }
        AF_INET6 => {
            let ip: &[u8; 16] = bytes[8..].first_chunk().ok_or_else(short)?;
            Ok((*ip, port).into())
        }
        other => bail!("address family {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_there_and_back() {
        for text in ["127.0.0.1:80", "[::1]:65535", "[::ffff:127.0.0.1]:1"] {
            let address: SocketAddr = text.parse().expect(text);
            assert_eq!(decode(&encode(address)).expect(text), address);
        }
        assert!(decode("0200").is_err());
        assert!(decode("").is_err());
    }
}
