//! Server: metrics and health over HTTP, on a thread of its own that sleeps until
//! somebody asks. Whoever is slow, or speaks no HTTP, is cut off.

use std::{
    convert::Infallible,
    fs, io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    thread,
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustix::net::AddressFamily;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tracing::debug;

use super::{Exposed, Snapshot, connections::Connections, openmetrics};
use crate::{datapath, kernel::layout::Kernel};

/// So many are served at once; the others wait to be accepted.
const CONNECTIONS: usize = 32;

/// A connection lasts so long at most, whatever is done on it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of a request's head, at most.
const HEAD: usize = 8 * 1024;

/// How a socket of the service manager is asked for.
const SYSTEMD: &str = "systemd";

/// Where to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An address and a port.
    Tcp(SocketAddr),
    /// The path of a socket, root's alone.
    Unix(PathBuf),
    /// On the one socket that the service manager has handed over: it listens where
    /// its unit says.
    Systemd,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Self::Unix(PathBuf::from(text)));
        }
        if text == SYSTEMD {
            return Ok(Self::Systemd);
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            "not an address with a port, such as 127.0.0.1:9464, nor the path of a socket, nor \
             \"systemd\""
                .to_owned()
        })
    }
}

impl Address {
    /// Whether other machines may reach it.
    #[must_use]
    pub fn is_public(&self) -> bool {
        matches!(self, Self::Tcp(address) if !address.ip().to_canonical().is_loopback())
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens there; `take_over` replaces a socket on which an agent still answers.
    fn bind(address: &Address, take_over: bool) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(listener))
            }
            Address::Unix(path) => {
                use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
                // That of an agent that is gone, or of the one that goes. Nothing
                // else is removed.
                let is_left = fs::symlink_metadata(path)
                    .is_ok_and(|found| found.file_type().is_socket())
                    && (take_over || std::os::unix::net::UnixStream::connect(path).is_err());
                if is_left {
                    fs::remove_file(path)?;
                }
                let listener = UnixListener::bind(path)?;
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(listener))
            }
            Address::Systemd => Self::handed_over(),
        }
    }

    /// The socket that the service manager has handed over (sd_listen_fds(3)).
    fn handed_over() -> io::Result<Self> {
        let mut handed = sd_notify::listen_fds()?;
        let (Some(socket), None) = (handed.next(), handed.next()) else {
            let message = "systemd has handed over no socket, or more than one";
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        };
        #[expect(
            unsafe_code,
            reason = "a descriptor that nothing else in the process owns"
        )]
        // SAFETY: the service manager made it for this process, and it is taken once:
        // metrics are started once.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let is_unix = rustix::net::getsockname(&socket)?.address_family() == AddressFamily::UNIX;
        if is_unix {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            Ok(Self::Unix(listener))
        } else {
            let listener = TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            Ok(Self::Tcp(listener))
        }
    }
}

/// Why metrics are not served.
#[derive(Debug, Error)]
pub enum Error {
    /// Nobody can listen there.
    #[error("listening for metrics on {place}")]
    Listening {
        /// The address.
        place: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no thread to do it.
    #[error("starting a thread for metrics")]
    Starting(#[source] io::Error),
}

/// Serves from now on, until the process ends. `take_over` takes a socket from an
/// agent that answers there; a port it cannot take.
///
/// # Errors
///
/// When nobody can listen there, or no thread can be started.
pub fn start(
    address: &Address,
    take_over: bool,
    exposed: Arc<Exposed>,
    kernel: &Kernel,
) -> Result<(), Error> {
    start_with(address, take_over, exposed, Connections::new(kernel))
}

fn start_with(
    address: &Address,
    take_over: bool,
    exposed: Arc<Exposed>,
    connections: Connections,
) -> Result<(), Error> {
    let place = match address {
        Address::Tcp(address) => address.to_string(),
        Address::Unix(path) => crate::names::printable_path(path).to_string(),
        Address::Systemd => "the socket of systemd".to_owned(),
    };
    let listener =
        Listener::bind(address, take_over).map_err(|source| Error::Listening { place, source })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(Error::Starting)?;
    thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(move || {
            let served = Arc::new(Served {
                exposed,
                connections,
            });
            if let Err(error) = runtime.block_on(serve(listener, served)) {
                tracing::warn!("metrics are not served any more: {error}");
            }
        })
        .map_err(Error::Starting)?;
    Ok(())
}

/// What is told of.
struct Served {
    exposed: Arc<Exposed>,
    connections: Connections,
}

async fn serve(listener: Listener, served: Arc<Served>) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    match listener {
        Listener::Tcp(listener) => {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let place = places
                    .clone()
                    .acquire_owned()
                    .await
                    .map_err(io::Error::other)?;
                match listener.accept().await {
                    Ok((stream, _)) => connect(stream, &served, place),
                    Err(error) => pause(&error).await,
                }
            }
        }
        Listener::Unix(listener) => {
            let listener = tokio::net::UnixListener::from_std(listener)?;
            loop {
                let place = places
                    .clone()
                    .acquire_owned()
                    .await
                    .map_err(io::Error::other)?;
                match listener.accept().await {
                    Ok((stream, _)) => connect(stream, &served, place),
                    Err(error) => pause(&error).await,
                }
            }
        }
    }
}

/// Such as no descriptors: some come free.
async fn pause(error: &io::Error) {
    debug!("accepting a connection for metrics: {error}");
    sleep(Duration::from_secs(1)).await;
}

/// Serves one connection in a task of its own, which holds its place.
fn connect(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    served: &Arc<Served>,
    place: tokio::sync::OwnedSemaphorePermit,
) {
    let served = served.clone();
    tokio::spawn(async move {
        let service = service_fn(async |request: Request<Incoming>| {
            Ok::<_, Infallible>(answer(&request, &served).await)
        });
        let connection = http1::Builder::new()
            .keep_alive(false)
            .max_buf_size(HEAD)
            .serve_connection(TokioIo::new(stream), service);
        match timeout(PATIENCE, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!("serving metrics: {error}"),
            Err(_) => debug!("a client for metrics was too slow"),
        }
        drop(place);
    });
}

async fn answer(request: &Request<Incoming>, served: &Served) -> Response<Full<Bytes>> {
    /// What Prometheus asks for (OpenMetrics 1.0.0, "Overall structure").
    const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    const TEXT: &str = "text/plain; charset=utf-8";
    let exposed = &served.exposed;
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => match scrape(served).await {
            Ok(text) => (StatusCode::OK, OPENMETRICS, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, TEXT, error + "\n"),
        },
        (&Method::GET | &Method::HEAD, "/healthz") => health(is_in_force(exposed)),
        (&Method::GET | &Method::HEAD, "/readyz") => {
            health(is_in_force(exposed).and_then(|()| is_settled(exposed)))
        }
        (&Method::GET | &Method::HEAD, _) => (
            StatusCode::NOT_FOUND,
            TEXT,
            "here are /metrics, /healthz and /readyz\n".to_owned(),
        ),
        _ => (
            StatusCode::METHOD_NOT_ALLOWED,
            TEXT,
            "only GET\n".to_owned(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

fn health(healthy: Result<(), String>) -> (StatusCode, &'static str, String) {
    const TEXT: &str = "text/plain; charset=utf-8";
    match healthy {
        Ok(()) => (StatusCode::OK, TEXT, "ok\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, TEXT, why + "\n"),
    }
}

async fn scrape(served: &Served) -> Result<String, String> {
    let source = served.exposed.source();
    let connections = match &source {
        Some(source) => served.connections.get(source).await,
        None => None,
    };
    let snapshot =
        Snapshot::of(source.as_deref(), connections).map_err(|error| datapath::chain(&error))?;
    openmetrics(snapshot).map_err(|error| error.to_string())
}

/// Whether the agent's program is the one that runs for the cgroup.
fn is_in_force(exposed: &Exposed) -> Result<(), String> {
    match exposed.source() {
        None => Err("nothing is in force".to_owned()),
        Some(source) if !source.evidence.holds() => {
            Err("another program than this agent's runs for the cgroup, or none".to_owned())
        }
        Some(_) => Ok(()),
    }
}

/// Whether existing connections have been brought along.
fn is_settled(exposed: &Exposed) -> Result<(), String> {
    let state = exposed.source().map(|source| source.record.state());
    match state {
        Some(Ok(state)) if state.settled => Ok(()),
        Some(Err(error)) => Err(datapath::chain(&error)),
        _ => Err("existing connections are still being brought along".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpStream,
        time::Instant,
    };

    use super::*;

    fn serving() -> SocketAddr {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let connections = Connections::counted_by(|_| unreachable!("nothing is in force"));
        start_with(&Address::Tcp(address), false, Arc::default(), connections).unwrap();
        address
    }

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        // One that is cut off may end with a reset.
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    fn get(address: SocketAddr, path: &str) -> String {
        ask(
            address,
            &format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n"),
        )
    }

    #[test]
    fn answers_what_it_knows_and_nothing_else() {
        let address = serving();
        let metrics = get(address, "/metrics");
        assert!(metrics.starts_with("HTTP/1.1 200 OK\r\n"), "{metrics}");
        assert!(metrics.contains("application/openmetrics-text; version=1.0.0"));
        assert!(metrics.ends_with("# EOF\n"), "{metrics}");
        for path in ["/healthz", "/readyz"] {
            let answer = get(address, path);
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
            assert!(answer.ends_with("nothing is in force\n"), "{answer}");
        }
        assert!(get(address, "/").starts_with("HTTP/1.1 404 "));
        let answer = ask(
            address,
            "POST /metrics HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n",
        );
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    }

    #[test]
    fn garbage_and_slow_clients_are_cut_off() {
        let address = serving();
        let answer = ask(address, "\x16\x03\x01\0\0 garbage\r\n\r\n");
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
            "{answer}"
        );
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(2 * HEAD));
        assert!(!ask(address, &long).starts_with("HTTP/1.1 200 "));
        // More than are served at once, none of which ever ends its request.
        let slow: Vec<_> = (0..2 * CONNECTIONS)
            .map(|_| {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
                stream
            })
            .collect();
        let begun = Instant::now();
        assert!(get(address, "/metrics").ends_with("# EOF\n"));
        assert!(begun.elapsed() < 4 * PATIENCE);
        for mut stream in slow {
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
        }
    }

    #[test]
    fn where_to_serve_is_an_address_or_a_path() {
        for (text, public) in [
            ("127.0.0.1:9464", false),
            ("[::1]:1", false),
            ("[::ffff:127.0.0.1]:1", false),
            ("/run/keepalive/metrics.sock", false),
            ("0.0.0.0:9464", true),
            ("192.0.2.1:9464", true),
            ("[::]:1", true),
            ("systemd", false),
        ] {
            assert_eq!(
                text.parse::<Address>().unwrap().is_public(),
                public,
                "{text}"
            );
        }
        for text in ["", "9464", "localhost", "127.0.0.1", "run/metrics.sock"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_socket_is_taken_only_from_an_agent_that_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.sock");
        let bind = |take_over| Listener::bind(&Address::Unix(path.clone()), take_over);
        let first = bind(false).unwrap();
        assert!(bind(false).is_err());
        let Ok(Listener::Unix(second)) = bind(true) else {
            panic!("it is not taken");
        };
        // Whoever asks now asks the second.
        let asking = std::os::unix::net::UnixStream::connect(&path).unwrap();
        second.set_nonblocking(false).unwrap();
        second.accept().unwrap();
        drop((first, second, asking));
        bind(false).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "a file").unwrap();
        assert!(bind(true).is_err());
    }
}
