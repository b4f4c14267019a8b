use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{Output, Place, Process, output, wait_until};

const LIMIT: Duration = Duration::from_secs(10);

/// A network namespace with its loopback up. A process that waits for the end of
/// its input holds it: should the test be killed, that process ends, and with it
/// the namespace and its interfaces.
#[derive(Debug)]
pub struct Netns {
    holder: Process,
}

impl Netns {
    /// Makes a namespace.
    ///
    /// # Errors
    ///
    /// `unshare`, `nsenter` or `ip` fails.
    pub fn new() -> Result<Self> {
        let mut command = Place::default().command("unshare");
        command.args(["--net", "cat"]).stdin(Stdio::piped());
        let netns = Self {
            holder: Process::start(&mut command)?,
        };
        let ours = fs::read_link("/proc/self/ns/net")?;
        let theirs = format!("/proc/{}/ns/net", netns.holder.id());
        wait_until(LIMIT, "a network namespace", || {
            Ok(fs::read_link(&theirs).context("unshare --net failed")? != ours)
        })?;
        netns.run("ip", "link set lo up")?;
        Ok(netns)
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
                far.holder.id()
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
        let path = format!("/proc/{}/net/netstat", self.holder.id());
        let text = fs::read_to_string(path)?;
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
        format!("--net=/proc/{}/ns/net", self.holder.id())
    }
}
