//! Where the benchmark runs: cgroups, namespaces and processes of its own, that
//! go when it ends, whichever way it ends.

use std::{
    cell::Cell,
    env,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::NamedTempFile;

use crate::{exec, workspace};

const PREFIX: &str = "keepalive-bench-";

/// The stay of the benchmark on this machine.
pub(crate) struct Place {
    load: PathBuf,
    mount: PathBuf,
    stop: Arc<AtomicBool>,
    made: Cell<u32>,
}

impl Place {
    /// Builds the load program; from here on signals do not end the process but
    /// the benchmark, so that everything is cleaned up.
    pub(crate) fn prepare() -> Result<Self> {
        ensure!(
            workspace::is_root(),
            "the benchmark needs root, for cgroups, network namespaces and BPF: sudo -E cargo xtask bench"
        );
        let directory = workspace::target_dir().join("bench");
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let load = directory.join("load");
        exec::run(
            Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()))
                .args(["-O2", "-Wall", "-Wextra", "-pthread", "-o"])
                .arg(&load)
                .arg(workspace::root().join("xtask/bench/load.c")),
        )
        .context("the load program needs a C compiler, such as gcc")?;
        let mount = hierarchy()?;
        remove_abandoned(&mount);
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, stop.clone())?;
        }
        Ok(Self {
            load,
            mount,
            stop,
            made: Cell::new(0),
        })
    }

    /// Fails once somebody wants the benchmark to end.
    pub(crate) fn go_on(&self) -> Result<()> {
        ensure!(!self.stop.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    /// A cgroup below the root of the hierarchy.
    pub(crate) fn cgroup(&self) -> Result<Cgroup> {
        self.go_on()?;
        let number = self.made.replace(self.made.get() + 1);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        Cgroup::make(&self.mount, "", &name)
    }

    /// The load program; see the head of its source.
    pub(crate) fn load(&self, mode: &str) -> Command {
        let mut command = Command::new(&self.load);
        command.arg(mode);
        command
    }

    /// Runs a load to its end and returns the numbers that it prints.
    pub(crate) fn measure<const NUMBERS: usize>(
        &self,
        command: &mut Command,
    ) -> Result<[f64; NUMBERS]> {
        self.go_on()?;
        let output = exec::output(command);
        // What a signal broke off has no other explanation to look for.
        self.go_on()?;
        numbers(&output?)
    }

    /// Starts a program that ends with the benchmark, in a cgroup.
    pub(crate) fn start(&self, command: &mut Command) -> Result<Process> {
        self.go_on()?;
        Process::start(command)
    }
}

fn numbers<const NUMBERS: usize>(line: &str) -> Result<[f64; NUMBERS]> {
    let found = line
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<Vec<f64>, _>>();
    found
        .ok()
        .and_then(|found| found.try_into().ok())
        .with_context(|| format!("the load printed {line:?} instead of {NUMBERS} numbers"))
}

/// A file that goes with what is returned, where nobody else writes: the agent is
/// woken by what changes beside its config.
pub(crate) fn file(text: &str) -> Result<NamedTempFile> {
    let file = NamedTempFile::new_in(workspace::target_dir().join("bench"))
        .context("cannot make a temporary file")?;
    fs::write(file.path(), text)
        .with_context(|| format!("cannot write {}", file.path().display()))?;
    Ok(file)
}

/// A cgroup; what runs in it and what is below it go with it.
pub(crate) struct Cgroup {
    directory: PathBuf,
    path: String,
}

impl Cgroup {
    fn make(parent: &Path, parent_path: &str, name: &str) -> Result<Self> {
        let directory = parent.join(name);
        fs::create_dir(&directory)
            .with_context(|| format!("cannot make the cgroup {}", directory.display()))?;
        Ok(Self {
            directory,
            path: format!("{parent_path}/{name}"),
        })
    }

    /// A cgroup below this one.
    pub(crate) fn child(&self, name: &str) -> Result<Self> {
        Self::make(&self.directory, &self.path, name)
    }

    /// So many cgroups below this one, which go with it.
    pub(crate) fn crowd(&self, place: &Place, count: u32) -> Result<()> {
        for number in 0..count {
            if number % 1000 == 0 {
                place.go_on()?;
            }
            let directory = self.directory.join(format!("c{number}"));
            fs::create_dir(&directory)
                .with_context(|| format!("cannot make the cgroup {}", directory.display()))?;
        }
        Ok(())
    }

    /// Where it is in the file system.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its path in the hierarchy.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Where a process writes itself to get in.
    pub(crate) fn door(&self) -> PathBuf {
        self.directory.join("cgroup.procs")
    }

    /// Its id in the kernel.
    pub(crate) fn id(&self) -> Result<u64> {
        Ok(fs::metadata(&self.directory)?.ino())
    }

    /// To attach a program to.
    pub(crate) fn open(&self) -> Result<File> {
        File::open(&self.directory)
            .with_context(|| format!("cannot open {}", self.directory.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.directory);
    }
}

/// A killed process leaves its cgroup a moment later, hence more than one try.
fn remove(directory: &Path) {
    // Linux 5.14; before it the processes are ended one by one, by their guards.
    let _ = fs::write(directory.join("cgroup.kill"), "1");
    for _ in 0..100 {
        if remove_tree(directory) {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    exec::warn(&format!("{} stays behind", directory.display()));
}

fn remove_tree(directory: &Path) -> bool {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !remove_tree(&entry.path()) {
            return false;
        }
    }
    fs::remove_dir(directory).is_ok() || !directory.exists()
}

/// A benchmark that was killed could not clean up: the next one does.
fn remove_abandoned(mount: &Path) {
    for entry in fs::read_dir(mount).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove(&entry.path());
        }
    }
}

fn hierarchy() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    mounts
        .lines()
        .find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let point = mount.split(' ').nth(4)?;
            kind.starts_with("cgroup2 ").then(|| PathBuf::from(point))
        })
        .context("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

/// A process that ends with this value, by SIGTERM, or SIGKILL if it takes long.
pub(crate) struct Process {
    child: Child,
    /// Closing it ends some programs.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("a program without output")?;
        Ok(Self {
            child,
            input,
            output: BufReader::new(output),
        })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next line of its output.
    pub(crate) fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("a program ended before it was to: see above");
        }
        Ok(line)
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a process without id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// A number of its /proc/PID/status.
    pub(crate) fn status(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .with_context(|| format!("/proc/PID/status has no {field}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.signal(Signal::TERM);
        let patience = Instant::now() + Duration::from_secs(5);
        while Instant::now() < patience {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A network namespace that goes with this value.
pub(crate) struct Netns {
    holder: Process,
}

impl Netns {
    /// With its loopback up, all ports to use, and without TIME_WAIT, which would
    /// use them up.
    pub(crate) fn make(place: &Place) -> Result<Self> {
        let holder = place.start(place.load("guard").args(["-", "unshare", "--net", "cat"]))?;
        let netns = Self { holder };
        let ours = fs::read_link("/proc/self/ns/net")?;
        let patience = Instant::now() + Duration::from_secs(5);
        while fs::read_link(netns.path()).is_ok_and(|found| found == ours) {
            ensure!(
                Instant::now() < patience,
                "unshare made no network namespace"
            );
            thread::sleep(Duration::from_millis(2));
        }
        netns.run(&["ip", "link", "set", "lo", "up"])?;
        let ports = "net.ipv4.ip_local_port_range=1024 65535";
        netns.run(&["sysctl", "-qw", ports, "net.ipv4.tcp_max_tw_buckets=0"])?;
        Ok(netns)
    }

    /// Two of them with a cable between: 10.99.0.1 and 10.99.0.2.
    pub(crate) fn pair(place: &Place) -> Result<(Self, Self)> {
        let (near, far) = (Self::make(place)?, Self::make(place)?);
        let there = far.holder.id().to_string();
        let cable = "link add eth0 type veth peer name eth0 netns";
        near.run(&[&["ip"], &words(cable)[..], &[&there]].concat())?;
        for (netns, number) in [(&near, 1), (&far, 2)] {
            let address = format!("10.99.0.{number}/24");
            netns.run(&["ip", "addr", "add", &address, "dev", "eth0"])?;
            netns.run(&words("ip link set eth0 up"))?;
        }
        Ok((near, far))
    }

    /// A file that stands for it.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    /// The arguments that run a program in it.
    pub(crate) fn enter(&self) -> Vec<String> {
        vec![
            "nsenter".to_owned(),
            format!("--net={}", self.path().display()),
        ]
    }

    fn run(&self, words: &[&str]) -> Result<()> {
        let enter = self.enter();
        exec::output(Command::new(&enter[0]).args(&enter[1..]).args(words)).map(|_| ())
    }
}

fn words(command: &str) -> Vec<&str> {
    command.split(' ').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_prints_as_many_numbers_as_it_promised() {
        let [first, .., last] = numbers::<3>("3000 12 7\n").unwrap();
        assert_eq!(first.to_string() + &last.to_string(), "30007");
        assert!(numbers::<2>("3000 12 7\n").is_err());
        assert!(numbers::<1>("load: connect\n").is_err());
    }
}
