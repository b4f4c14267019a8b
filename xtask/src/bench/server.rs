//! A real server and a real load generator, a connection for every request.

use std::{process::Command, thread, time::Duration};

use anyhow::{Context as _, Result};
use tempfile::NamedTempFile;

use super::{
    Bench, churn,
    peer::{NOTHING, OURS, OWN, Peer},
    place::{self, Netns, Place, Process},
    report::Table,
};
use crate::exec;

/// `server`: nginx and wrk, without HTTP keep-alive.
pub(crate) fn server(bench: &mut Bench) -> Result<()> {
    for program in ["nginx", "wrk"] {
        if Command::new(program).arg("-v").output().is_err() {
            let what = format!("server: apt-get install {program}");
            bench.report.missing.push(what);
            return Ok(());
        }
    }
    let netns = Netns::make(&bench.place)?;
    let peers = churn::peers(bench)?;
    let servers = (8000..)
        .zip(peers)
        .map(|(port, peer)| Server::start(&bench.place, &netns, peer, port))
        .collect::<Result<Vec<_>>>()?;
    // They have nothing to wait for but their own start.
    thread::sleep(Duration::from_millis(500));
    let mut table = Table::new(
        "server",
        "nginx and wrk, a connection for every request: time of a request",
        "µs",
        &[NOTHING],
    );
    for server in bench.in_turns(&servers) {
        table.add(&server.peer.name, None, server.load(&bench.place, &netns)?);
    }
    let goal = table.goal(
        "nginx and wrk, of nothing attached",
        OURS,
        NOTHING,
        None,
        1.03,
    );
    bench.report.goals.push(goal);
    bench.report.take(table);
    Ok(())
}

/// An nginx under one of the peers.
struct Server {
    port: u16,
    _nginx: Process,
    _files: [NamedTempFile; 2],
    peer: Peer,
}

impl Server {
    fn start(place: &Place, netns: &Netns, peer: Peer, port: u16) -> Result<Self> {
        let options = if peer.name == OWN {
            " so_keepalive=60s:10s:6"
        } else {
            ""
        };
        // nginx removes it when it ends, so it must be a file of our own.
        let pid = place::file("")?;
        let config = place::file(&format!(
            "daemon off; master_process off; pid {}; error_log /dev/null;\n\
                 events {{ worker_connections 1024; }}\n\
                 http {{ access_log off; server {{ listen 127.0.0.1:{port}{options};\n\
                 location / {{ return 200 ok; }} }} }}\n",
            pid.path().display()
        ))?;
        let mut command = place.load("guard");
        command
            .arg(peer.door())
            .args(netns.enter())
            .args(["nginx", "-c"])
            .arg(config.path());
        peer.prepare(&mut command);
        Ok(Self {
            port,
            _nginx: place.start(&mut command)?,
            _files: [config, pid],
            peer,
        })
    }

    /// Microseconds per request, of one second of load.
    fn load(&self, place: &Place, netns: &Netns) -> Result<f64> {
        place.go_on()?;
        let mut command = place.load("guard");
        command
            .arg(self.peer.door())
            .args(netns.enter())
            .args(["wrk", "-t1", "-c16", "-d1s", "-HConnection: close"])
            .arg(format!("http://127.0.0.1:{}/", self.port));
        self.peer.prepare(&mut command);
        let output = exec::output(&mut command)?;
        let rate = output
            .lines()
            .find_map(|line| line.trim().strip_prefix("Requests/sec:"))
            .and_then(|rate| rate.trim().parse::<f64>().ok())
            .filter(|rate| *rate > 0.0)
            .with_context(|| format!("wrk made no requests:\n{output}"))?;
        Ok(1e6 / rate)
    }
}
