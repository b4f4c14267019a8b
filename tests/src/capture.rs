use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::{Netns, Place, Process, wait_until};

const LIMIT: Duration = Duration::from_secs(10);

const ETHERNET: u32 = 1;
const IPV4: [u8; 2] = [8, 0];

/// Records the TCP segments on a namespace's loopback, with `tcpdump`.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Process,
    segments: tempfile::NamedTempFile,
    log: tempfile::NamedTempFile,
}

/// A TCP segment over IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// When it went by, since the epoch.
    pub time: Duration,
    /// From whom.
    pub from: SocketAddrV4,
    /// To whom.
    pub to: SocketAddrV4,
    sequence: u32,
    acknowledged: u32,
}

impl Capture {
    /// Starts, and waits until nothing goes by unseen.
    ///
    /// # Errors
    ///
    /// `tcpdump` cannot be started.
    pub fn start(netns: &Netns) -> Result<Self> {
        let segments = tempfile::NamedTempFile::new()?;
        let log = tempfile::NamedTempFile::new()?;
        let mut command = Place::from(netns).command("tcpdump");
        command.args(["-i", "lo", "-n", "-s", "96", "-B", "16384", "-U", "-w", "-"]);
        command.args(["ip", "and", "tcp"]);
        command.stdout(segments.reopen()?).stderr(log.reopen()?);
        let tcpdump = Process::start(&mut command)?;
        let capture = Self {
            tcpdump,
            segments,
            log,
        };
        wait_until(LIMIT, "tcpdump", || {
            Ok(fs::read_to_string(&capture.log)?.contains("listening on"))
        })
        .with_context(|| fs::read_to_string(&capture.log).unwrap_or_default())?;
        Ok(capture)
    }

    /// What has gone by.
    ///
    /// # Errors
    ///
    /// `tcpdump` missed something, or wrote what cannot be read.
    pub fn stop(mut self) -> Result<Vec<Segment>> {
        self.tcpdump.signal(Signal::INT)?;
        let status = self.tcpdump.wait(LIMIT)?;
        let log = fs::read_to_string(&self.log)?;
        ensure!(status.success(), "tcpdump: {log}");
        ensure!(log.contains("\n0 packets dropped by kernel"), "{log}");
        let mut bytes = Vec::new();
        std::io::copy(&mut File::open(&self.segments)?, &mut bytes)?;
        parse(&bytes)
    }
}

/// When the first keepalive probe of each socket went out, by who sent it to whom.
///
/// A probe is the segment that goes back by one before what its peer expects.
#[must_use]
pub fn first_probes(segments: &[Segment]) -> BTreeMap<(SocketAddrV4, SocketAddrV4), Duration> {
    let expected: BTreeMap<_, _> = segments
        .iter()
        .map(|segment| ((segment.to, segment.from), segment.acknowledged))
        .collect();
    let mut first = BTreeMap::new();
    for segment in segments {
        let way = (segment.from, segment.to);
        if expected.get(&way) == Some(&segment.sequence.wrapping_add(1)) {
            first.entry(way).or_insert(segment.time);
        }
    }
    first
}

/// Reads a file of libpcap's, of this machine's byte order.
fn parse(file: &[u8]) -> Result<Vec<Segment>> {
    let word = |at: usize| -> Result<u32> {
        let bytes = file.get(at..at + 4).context("half a file")?;
        Ok(u32::from_ne_bytes(bytes.try_into()?))
    };
    ensure!(word(0)? == 0xa1b2_c3d4, "not what tcpdump writes");
    ensure!(word(20)? == ETHERNET, "not a loopback interface");
    let mut segments = Vec::new();
    let mut at = 24;
    while at < file.len() {
        let (seconds, micros) = (word(at)?, word(at + 4)?);
        let length = usize::try_from(word(at + 8)?)?;
        at += 16;
        let frame = file.get(at..at + length).context("half a frame")?;
        at += length;
        let time = Duration::from_secs(seconds.into()) + Duration::from_micros(micros.into());
        segments.push(segment(frame, time).context("no TCP over IPv4")?);
    }
    Ok(segments)
}

fn segment(frame: &[u8], time: Duration) -> Option<Segment> {
    let ip = frame.get(12..)?.strip_prefix(&IPV4)?;
    let tcp = ip.get(usize::from(ip.first()? & 15) * 4..)?;
    let address = |at: usize, port: usize| {
        let ip: [u8; 4] = *ip.get(at..)?.first_chunk()?;
        let port = u16::from_be_bytes(*tcp.get(port..)?.first_chunk()?);
        Some(SocketAddrV4::new(Ipv4Addr::from(ip), port))
    };
    let number = |at: usize| Some(u32::from_be_bytes(*tcp.get(at..)?.first_chunk()?));
    Some(Segment {
        time,
        from: address(12, 0)?,
        to: address(16, 2)?,
        sequence: number(4)?,
        acknowledged: number(8)?,
    })
}
