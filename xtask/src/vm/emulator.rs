//! QEMU: found or fetched, and each boot ended when its time is up.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::apt::{Apt, Mirrors};
use crate::exec;

/// Older ones crash now and then under newer kernels (7.2 did, in one boot of
/// ten).
const OLDEST: u32 = 8;

const PROGRAM: &str = "qemu-system-x86_64";

/// Memory of a guest; it holds the programs and all they write too.
const MEMORY: &str = "2G";

/// An emulator that this machine can run.
pub(super) struct Emulator {
    program: PathBuf,
    /// Where it was unpacked, unless it is the machine's own.
    root: Option<PathBuf>,
    /// Its version, for the report.
    pub(super) version: String,
}

/// What a boot leaves.
pub(super) struct Boot {
    /// What the guest's init wrote.
    pub(super) transcript: String,
    /// What the kernel wrote.
    pub(super) console: String,
    /// The kernel's own types, where they were asked for.
    pub(super) types: Vec<u8>,
    /// Whether it had to be ended.
    pub(super) timed_out: bool,
    pub(super) took: Duration,
}

impl Emulator {
    /// The machine's own, or Debian's backport of it, with the libraries that
    /// this machine lacks, unpacked and not installed.
    pub(super) fn find_or_fetch(mirrors: &Mirrors, cache: &Path) -> Result<Self> {
        if let Ok(own) = Self::at(PathBuf::from(PROGRAM), None)
            && major(&own.version).is_some_and(|major| major >= OLDEST)
        {
            return Ok(own);
        }
        let codename = mirrors.codename.as_str();
        let backports = format!("{codename}-backports");
        let security = format!("{codename}-security");
        let apt = Apt::with(
            cache.join("emulator-apt"),
            mirrors,
            &[codename, &security, &backports],
        )?;
        let packages = apt.needed_for("qemu-system-x86", &backports)?;
        let version = packages
            .iter()
            .find_map(|package| package.strip_prefix("qemu-system-x86="))
            .context("apt does not know how to install qemu-system-x86")?
            .to_owned();
        let root = cache.join(format!("qemu-{}", version.replace(':', "_")));
        apt.unpack(&packages, &root)?;
        Self::at(root.join("usr/bin").join(PROGRAM), Some(root))
    }

    fn at(program: PathBuf, root: Option<PathBuf>) -> Result<Self> {
        let mut emulator = Self {
            program,
            root,
            version: String::new(),
        };
        let said = exec::output(emulator.command(Duration::from_mins(1)).arg("--version"))?;
        let first = said.lines().next().unwrap_or_default();
        let version = first.strip_prefix("QEMU emulator version ");
        version.unwrap_or(first).clone_into(&mut emulator.version);
        Ok(emulator)
    }

    /// Ends by itself when `limit` is over, also when nobody waits for it any more.
    fn command(&self, limit: Duration) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "--kill-after=5"])
            .arg(format!("{}s", limit.as_secs()))
            .arg(&self.program);
        if let Some(root) = &self.root {
            let mut libraries = OsString::new();
            for directory in ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"] {
                libraries.push(root.join(directory));
                libraries.push(":");
            }
            command.env("LD_LIBRARY_PATH", libraries);
            for directory in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(root.join(directory));
            }
        }
        command
    }

    /// Boots a kernel and waits until the machine stops or `limit` is over. The
    /// guest's three serial lines go to files in `directory`.
    pub(super) fn boot(
        &self,
        kernel: &Path,
        initramfs: &Path,
        arguments: &str,
        directory: &Path,
        limit: Duration,
    ) -> Result<Boot> {
        let lines = ["console", "transcript", "types"].map(|name| directory.join(name));
        let mut command = self.command(limit);
        // Emulated, not virtualised: build machines are virtual themselves. What
        // newer processors can do only takes time to emulate.
        command
            .args(["-accel", "tcg", "-cpu", "Nehalem"])
            .args(["-smp", "2", "-m", MEMORY])
            .args(["-M", "q35", "-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none"]);
        for line in &lines {
            fs::write(line, "").with_context(|| format!("cannot write {}", line.display()))?;
            command
                .arg("-serial")
                .arg(format!("file:{}", line.display()));
        }
        command.arg("-kernel").arg(kernel);
        command.arg("-initrd").arg(initramfs);
        command.arg("-append").arg(format!(
            "console=ttyS0 panic=-1 loglevel=5 mitigations=off {arguments}"
        ));
        let errors = directory.join("emulator.log");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(&errors)?);
        let start = Instant::now();
        let status = command.status().context("cannot start QEMU")?;
        // The two that `timeout` ends with, by its first and its second signal.
        let timed_out = matches!(status.code(), Some(124 | 137));
        ensure!(
            timed_out || status.success(),
            "QEMU failed, {status}: {}",
            fs::read_to_string(&errors).unwrap_or_default().trim()
        );
        let read = |line: &Path| fs::read(line).unwrap_or_default();
        let text = |line: &Path| String::from_utf8_lossy(&read(line)).replace('\r', "");
        Ok(Boot {
            console: text(&lines[0]),
            transcript: text(&lines[1]),
            types: read(&lines[2]),
            timed_out,
            took: start.elapsed(),
        })
    }
}

/// `10` of `10.0.2 (Debian 1:10.0.2+ds-2)`.
fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::vm::{judge, transcript::Transcript};

    /// A boot of a machine that a shell script stands in for; `$console` and
    /// `$transcript` are where it writes.
    fn boot(name: &str, script: &str) -> Boot {
        let own = format!("keepalive-{name}-{}", std::process::id());
        let directory = std::env::temp_dir().join(own);
        fs::create_dir_all(&directory).unwrap();
        let program = directory.join("qemu");
        let lines = format!(
            "#!/bin/sh\nconsole={0}/console\ntranscript={0}/transcript\n{script}\n",
            directory.display()
        );
        fs::write(&program, lines).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let emulator = Emulator {
            program,
            root: None,
            version: String::new(),
        };
        let nothing = Path::new("/dev/null");
        let limit = Duration::from_secs(2);
        let boot = emulator.boot(nothing, nothing, "", &directory, limit);
        fs::remove_dir_all(&directory).unwrap();
        boot.unwrap()
    }

    /// What is wrong with it, where one test program was to run.
    fn faults(boot: &Boot) -> Vec<String> {
        let transcript = Transcript::parse(&boot.transcript);
        judge::faults(1, &transcript, &boot.console, boot.timed_out)
    }

    const BEGIN: &str = "printf '@ begin a\\ntest b ... ok\\n@ end a 0 1\\n' >>$transcript";
    const END: &str = "echo '@ finished 1' >>$transcript";

    #[test]
    fn a_guest_that_goes_through_its_plan_is_without_fault() {
        let boot = boot("good", &format!("{BEGIN}\n{END}"));
        assert!(!boot.timed_out);
        assert_eq!(faults(&boot), [""; 0]);
    }

    /// The emulator ends with 0 all the same.
    #[test]
    fn a_guest_that_panics_is_at_fault() {
        let panic = "echo '[  9.1] Kernel panic - not syncing' >>$console";
        let boot = boot("panic", &format!("{BEGIN}\n{panic}"));
        let faults = faults(&boot);
        assert!(faults[0].contains("last line is missing"), "{faults:?}");
        assert!(faults[1].contains("Kernel panic"), "{faults:?}");
    }

    #[test]
    fn a_guest_that_hangs_is_ended_and_at_fault() {
        let boot = boot("hang", &format!("{BEGIN}\nexec sleep 60"));
        assert!(boot.timed_out && boot.took < Duration::from_secs(30));
        let faults = faults(&boot);
        assert!(faults[0].contains("did not stop in time"), "{faults:?}");
        assert!(faults[1].contains("last line is missing"), "{faults:?}");
    }

    #[test]
    fn a_guest_that_stops_in_the_midst_is_at_fault() {
        let faults = faults(&boot("stop", BEGIN));
        assert!(faults[0].contains("last line is missing"), "{faults:?}");
        assert_eq!(faults.len(), 1);
    }

    #[test]
    fn the_major_version_decides_whether_an_emulator_will_do() {
        assert_eq!(major("10.0.2 (Debian 1:10.0.2+ds-2)"), Some(10));
        assert_eq!(major("7.2.15"), Some(7));
        assert_eq!(major("unknown"), None);
    }
}
