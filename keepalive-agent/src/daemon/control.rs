//! Control socket: how a command asks a running agent for something. One request
//! as a JSON line, one answer as a JSON line; after that of [`Request::Events`]
//! come more, for as long as the client reads.
//!
//! The file is root's alone, in a directory that is root's alone. Requests are read
//! by a task of its own, so that none is lost while the daemon does something else.

use std::{fs, io, os::unix::net::UnixStream as BlockingStream, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::mpsc::{Receiver, Sender, channel},
    task::AbortHandle,
    time::timeout,
};

use super::{journal::Wanted, ownership};
use crate::hierarchy::CgroupPath;

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Change nothing any more until the connection is closed or the next request
    /// comes: another agent is about to take over.
    StepAside,
    /// The other agent has taken over: end, and leave enforcement to it.
    TakenOver,
    /// End, and take enforcement off the cgroup.
    Detach,
    /// Tell what happens: more lines follow the answer, one for each
    /// [`super::journal::Entry`].
    Events(Wanted),
    /// Tell what was observed of silences: one line follows the answer, an
    /// [`super::observed::Observed`].
    Observed,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Answer {
    /// The agent's process id.
    pub pid: u32,
}

/// A request that waits for its answer.
#[derive(Debug)]
pub struct Asked {
    /// What was asked.
    pub request: Request,
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
}

/// The end at which an agent is asked.
#[derive(Debug)]
pub struct Control {
    asked: Receiver<io::Result<Asked>>,
    listening: AbortHandle,
    path: PathBuf,
}

/// Longer requests are no requests.
const LONGEST: usize = 4096;

/// For a client that does not say what it wants.
const PATIENCE: Duration = Duration::from_millis(500);

impl Control {
    /// Listens for one who owns the cgroup.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn listen(cgroup: &CgroupPath) -> io::Result<Self> {
        let path = ownership::socket_path(cgroup);
        let listener = ownership::listen_at(&path)?;
        // One is looked at at a time; the others wait.
        let (sender, asked) = channel(1);
        let listening = tokio::spawn(listen(listener, sender)).abort_handle();
        Ok(Self {
            asked,
            listening,
            path,
        })
    }

    /// Waits for a request. May be dropped while it waits: none is lost by that.
    ///
    /// # Errors
    ///
    /// When the socket does not work any more.
    pub async fn asked(&mut self) -> io::Result<Asked> {
        let ended = || Err(io::ErrorKind::BrokenPipe.into());
        self.asked.recv().await.unwrap_or_else(ended)
    }
}

async fn listen(listener: UnixListener, asked: Sender<io::Result<Asked>>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => BufReader::new(stream),
            Err(error) => {
                // Such as no descriptors: a loop would not make it better.
                let _ = asked.send(Err(error)).await;
                return;
            }
        };
        let mut client = Asked {
            request: Request::TakenOver,
            stream,
            line: Vec::new(),
        };
        if let Ok(Some(request)) = timeout(PATIENCE, client.next()).await {
            client.request = request;
            if asked.send(Ok(client)).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.listening.abort();
        // Nobody can do anything about it.
        let _ = fs::remove_file(&self.path);
    }
}

impl Asked {
    /// Answers.
    ///
    /// # Errors
    ///
    /// When whoever asked is gone.
    pub async fn answer(&mut self) -> io::Result<()> {
        let answer = Answer {
            pid: std::process::id(),
        };
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        match timeout(PATIENCE, self.stream.write_all(&line)).await {
            Ok(written) => written,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// The stream, for what follows the answer.
    #[must_use]
    pub fn into_stream(self) -> UnixStream {
        self.stream.into_inner()
    }

    /// Waits for the next request of the same client; none when it is gone. May be
    /// dropped while it waits.
    pub async fn next(&mut self) -> Option<Request> {
        loop {
            let part = self.stream.fill_buf().await.ok()?;
            if part.is_empty() || self.line.len() + part.len() > LONGEST {
                return None;
            }
            let end = part.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(part.len(), |end| end + 1);
            self.line.extend_from_slice(part.get(..taken)?);
            self.stream.consume(taken);
            if end.is_some() {
                let line = std::mem::take(&mut self.line);
                return serde_json::from_slice(&line).ok();
            }
        }
    }
}

/// A command that asks an agent.
#[derive(Debug)]
pub struct Client {
    stream: BlockingStream,
}

impl Client {
    /// Connects to the agent of a cgroup.
    ///
    /// # Errors
    ///
    /// When none answers there.
    pub fn connect(cgroup: &CgroupPath) -> io::Result<Self> {
        /// An agent answers between two things that it does.
        const PATIENCE: Duration = Duration::from_secs(10);
        let stream = BlockingStream::connect(ownership::socket_path(cgroup))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream })
    }

    /// Asks for something and waits for the answer.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn ask(&mut self, request: Request) -> io::Result<Answer> {
        use std::io::{BufRead as _, Write as _};
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        self.stream.write_all(&line)?;
        let mut answer = String::new();
        io::BufReader::new(&self.stream).read_line(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// Asks for what is answered by more than one line; the answer is the first.
    ///
    /// # Errors
    ///
    /// When the agent cannot be asked.
    pub fn ask_for_lines(self, request: Request) -> io::Result<io::BufReader<BlockingStream>> {
        use std::io::Write as _;
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        (&self.stream).write_all(&line)?;
        // There may be nothing to say for as long as it likes.
        self.stream.set_read_timeout(None)?;
        Ok(io::BufReader::new(self.stream))
    }
}
