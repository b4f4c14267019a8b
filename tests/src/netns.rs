use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cgroup::is_abandoned;
use crate::{Output, Place, Process, output, wait_until};

const LIMIT: Duration = Duration::from_secs(10);

/// Where `ip netns` keeps its namespaces.
const NAMED: &str = "/run/netns";

/// A network namespace with its loopback up. Should the test be killed, what holds
/// it goes too, and with it the namespace and its interfaces; only one that is
/// named stays, until the next test cleans up.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
    holder: Holder,
}

/// What keeps a namespace in existence.
#[derive(Debug)]
enum Holder {
    /// A process that waits for the end of its input.
    Process { _guard: Process },
    /// A bind mount below /run/netns.
    Name(String),
    /// A descriptor of this process, the test.
    Descriptor { _guard: File },
    /// Somebody else.
    Other,
}

impl Netns {
    /// Makes a namespace that a process is in.
    ///
    /// # Errors
    ///
    /// `unshare`, `nsenter` or `ip` fails.
    pub fn new() -> Result<Self> {
        let mut command = Place::default().command("unshare");
        command.args(["--net", "cat"]).stdin(Stdio::piped());
        let holder = Process::start(&mut command)?;
        let path = PathBuf::from(format!("/proc/{}/ns/net", holder.id()));
        let ours = fs::read_link("/proc/self/ns/net")?;
        wait_until(LIMIT, "a network namespace", || {
            Ok(fs::read_link(&path).context("unshare --net failed")? != ours)
        })?;
        let holder = Holder::Process { _guard: holder };
        let netns = Self { path, holder };
        netns.run("ip", "link set lo up")?;
        Ok(netns)
    }

    /// Makes a namespace as `ip netns` does: no process is in it, a bind mount
    /// holds it.
    ///
    /// # Errors
    ///
    /// `ip` fails.
    pub fn named() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(remove_abandoned);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kat-{}-{n}", std::process::id());
        ip_netns("add", &name)?;
        let netns = Self {
            path: Path::new(NAMED).join(&name),
            holder: Holder::Name(name),
        };
        netns.run("ip", "link set lo up")?;
        Ok(netns)
    }

    /// Makes a namespace that only a descriptor of this process holds.
    ///
    /// # Errors
    ///
    /// As [`Netns::new`].
    pub fn held_open() -> Result<Self> {
        let made = Self::new()?;
        let file = File::open(&made.path)?;
        let own = std::process::id();
        Ok(Self {
            path: format!("/proc/{own}/fd/{}", file.as_raw_fd()).into(),
            holder: Holder::Descriptor { _guard: file },
        })
    }

    /// The namespace that a process is in. The guard does not hold it.
    #[must_use]
    pub fn of_process(process: u32) -> Self {
        Self {
            path: format!("/proc/{process}/ns/net").into(),
            holder: Holder::Other,
        }
    }

    /// A file that stands for the namespace.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number by which the kernel tells it from others.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn id(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
    }

    /// Two namespaces with a cable between them: `eth0` in each, `10.99.0.1` and
    /// `fd99::1` in the first, `10.99.0.2` and `fd99::2` in the second.
    ///
    /// # Errors
    ///
    /// As [`Netns::new`].
    pub fn pair() -> Result<(Self, Self)> {
        let (near, far) = (Self::new()?, Self::new()?);
        near.run(
            "ip",
            &format!(
                "link add eth0 type veth peer name eth0 netns {}",
                far.path.display()
            ),
        )?;
        for (netns, n) in [(&near, 1), (&far, 2)] {
            netns.run("ip", &format!("addr add 10.99.0.{n}/24 dev eth0"))?;
            netns.run("ip", &format!("addr add fd99::{n}/64 dev eth0 nodad"))?;
            netns.run("ip", "link set eth0 up")?;
        }
        Ok((near, far))
    }

    /// Runs a program in the namespace; the arguments are split at spaces.
    ///
    /// # Errors
    ///
    /// It fails, or takes longer than ten seconds.
    pub fn run(&self, program: &str, arguments: &str) -> Result<Output> {
        let mut command = Place::from(self).command(program);
        command.args(arguments.split_whitespace());
        let output = output(&mut command, LIMIT)?;
        ensure!(
            output.code == Some(0),
            "{program} {arguments}: {}",
            output.stderr.trim()
        );
        Ok(output)
    }

    /// Sets a sysctl of the namespace, named as below `/proc/sys`.
    ///
    /// # Errors
    ///
    /// This kernel does not have it, or refuses the value.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        // /proc/sys shows the namespace of the process that opens the file.
        let mut command = Place::from(self).command("sh");
        command.args(["-c", r#"echo "$1" >"/proc/sys/$0""#, name, value]);
        let output = output(&mut command, LIMIT)?;
        ensure!(output.code == Some(0), "{name}: {}", output.stderr.trim());
        Ok(())
    }

    /// One of the counters that `/proc/net/netstat` shows for the namespace.
    ///
    /// # Errors
    ///
    /// This kernel does not have it.
    pub fn counter(&self, group: &str, name: &str) -> Result<u64> {
        let text = self.run("cat", "/proc/net/netstat")?.stdout;
        let mut rows = text
            .lines()
            .filter_map(|line| line.strip_prefix(group)?.strip_prefix(": "));
        let (names, values) = (rows.next(), rows.next());
        let mut pairs = names
            .unwrap_or_default()
            .split(' ')
            .zip(values.unwrap_or_default().split(' '));
        let (_, value) = pairs
            .find(|(key, _)| *key == name)
            .with_context(|| format!("no counter {group} {name}"))?;
        Ok(value.parse()?)
    }

    /// The argument with which `nsenter` finds the namespace.
    #[must_use]
    pub fn enter_argument(&self) -> String {
        format!("--net={}", self.path.display())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Holder::Name(name) = &self.holder
            && let Err(error) = ip_netns("delete", name)
        {
            eprintln!("{name} stays behind: {error:#}");
        }
    }
}

fn ip_netns(verb: &str, name: &str) -> Result<()> {
    let mut command = Place::default().command("ip");
    command.args(["netns", verb, name]);
    let output = output(&mut command, LIMIT)?;
    ensure!(output.code == Some(0), "ip netns: {}", output.stderr.trim());
    Ok(())
}

/// Named namespaces of a test process that was killed.
fn remove_abandoned() {
    for entry in fs::read_dir(NAMED).into_iter().flatten().flatten() {
        if let Some(name) = entry.file_name().to_str()
            && is_abandoned(name)
        {
            drop(ip_netns("delete", name));
        }
    }
}
