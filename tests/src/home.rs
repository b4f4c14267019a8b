use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::{Cgroup, Netns, Place, Probe, Process, Program, Socket, output, postgres, wait_until};

const LIMIT: Duration = Duration::from_secs(30);

/// Cgroup, namespace and directory of a server that people run.
#[derive(Debug)]
pub struct Home {
    /// What governs the server, and not its clients.
    pub cgroup: Cgroup,
    /// Where both are.
    pub netns: Netns,
    /// For its files.
    pub directory: tempfile::TempDir,
}

impl Home {
    /// Makes all three.
    ///
    /// # Errors
    ///
    /// One cannot be made.
    pub fn new() -> Result<Self> {
        Ok(Self {
            cgroup: Cgroup::new()?,
            netns: Netns::new()?,
            directory: tempfile::tempdir()?,
        })
    }

    /// A command for a program in there. What it says goes to the log.
    ///
    /// # Errors
    ///
    /// The log cannot be written.
    pub fn start(&self, program: &str, arguments: &[&str], farewell: Signal) -> Result<Process> {
        let mut command = Place::from((&self.cgroup, &self.netns)).command(program);
        let log = fs::File::create(self.directory.path().join("log"))?;
        command.args(arguments).current_dir(&self.directory);
        command.stdout(log.try_clone()?).stderr(log);
        Ok(Process::start(&mut command)?.ended_by(farewell))
    }

    /// What the server said.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// A client outside the cgroup.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub fn client(&self) -> Result<Probe> {
        Probe::start(Program::Static, &self.netns)
    }

    /// Connects as soon as the server listens.
    ///
    /// # Errors
    ///
    /// It does not, with what it said.
    pub fn connect(&self, client: &mut Probe, port: u16) -> Result<Socket> {
        let address = format!("127.0.0.1:{port}").parse()?;
        let mut socket = None;
        wait_until(LIMIT, "the server", || {
            socket = client.connected(address).ok();
            Ok(socket.is_some())
        })
        .with_context(|| self.log())?;
        socket.context("no socket")
    }

    /// Sends a request and waits for the answer: from then on the connection is
    /// idle, and the server has set whatever it sets.
    ///
    /// # Errors
    ///
    /// There is no answer.
    pub fn converse(&self, client: &mut Probe, port: u16, request: &str) -> Result<Socket> {
        let socket = self.connect(client, port)?;
        client.send(socket, request)?;
        ensure!(client.wait(socket, LIMIT)?, "no answer: {}", self.log());
        ensure!(client.receive(socket)? > 0, "hung up: {}", self.log());
        Ok(socket)
    }

    /// An nginx that answers every request with "hello", with these addresses to
    /// listen on and their options.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub fn nginx(&self, listens: &[&str]) -> Result<Process> {
        let directory = self.directory.path().display();
        let listens = listens.join("; listen ");
        let config = format!(
            "daemon off; user root; worker_processes 1; pid {directory}/pid;
             error_log {directory}/errors;
             events {{ }}
             http {{
                 access_log off; keepalive_timeout 600s;
                 client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
                 fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
                 scgi_temp_path {directory}/scgi;
                 server {{ listen {listens}; location / {{ return 200 \"hello\"; }} }}
             }}"
        );
        let file = self.directory.path().join("nginx.conf");
        fs::write(&file, config)?;
        let file = file.to_str().context("a path in UTF-8")?;
        let errors = format!("{directory}/errors");
        self.start("nginx", &["-e", &errors, "-c", file], Signal::TERM)
    }

    /// A `PostgreSQL` with these settings, on port 5432.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub fn postgresql(&self, settings: &[&str]) -> Result<Process> {
        let programs = postgres().context("no PostgreSQL")?;
        let program = |name: &str| programs.join(name).display().to_string();
        let as_postgres = [
            "--reuid=postgres",
            "--regid=postgres",
            "--init-groups",
            "--",
        ];
        // The server runs as postgres and wants a directory that is its own.
        let data = self.directory.path().join("data");
        let data = data.to_str().context("a path in UTF-8")?;
        let mut command = Place::default().command("install");
        command.args(["-d", "-m", "700", "-o", "postgres", "-g", "postgres", data]);
        ensure!(output(&mut command, LIMIT)?.code == Some(0), "install");
        let mut command = Place::default().command("chmod");
        command.arg("711").arg(self.directory.path());
        ensure!(output(&mut command, LIMIT)?.code == Some(0), "chmod");
        let mut command = Place::default().command("setpriv");
        command.args(as_postgres).arg(program("initdb"));
        command.args(["-D", data, "-A", "trust", "--no-sync", "--no-locale"]);
        command.current_dir("/");
        let initdb = output(&mut command, Duration::from_mins(2))?;
        ensure!(initdb.code == Some(0), "initdb: {}", initdb.stderr);

        let server = program("postgres");
        let mut arguments = as_postgres.to_vec();
        arguments.extend([server.as_str(), "-D", data, "-p", "5432", "-F"]);
        arguments.extend(["-h", "127.0.0.1", "-k", ""]);
        arguments.extend(settings);
        self.start("setpriv", &arguments, Signal::INT)
    }

    /// A session of psql, idle: it waits for the end of its input.
    ///
    /// # Errors
    ///
    /// psql does not start.
    pub fn psql(&self, place: Place<'_>, options: &str) -> Result<Process> {
        let programs = postgres().context("no PostgreSQL")?;
        let mut command = place.command(programs.join("psql"));
        command.arg(format!(
            "host=127.0.0.1 user=postgres dbname=postgres {options}"
        ));
        command.args(["-X", "-q"]).stdin(Stdio::piped());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Process::start(&mut command)
    }
}
