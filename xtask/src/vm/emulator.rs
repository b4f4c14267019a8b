//! QEMU, each boot ended when its time is up.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

const PROGRAM: &str = "qemu-system-x86_64";

/// Memory of a guest; it holds the programs and all they write too.
const MEMORY: &str = "2G";

/// An emulator in a system of its own.
pub(super) struct Emulator {
    /// The root of that system.
    root: PathBuf,
    program: PathBuf,
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
    /// That of the system that `machine.sh` has made.
    pub(super) fn of(machine: &Path) -> Self {
        Self {
            root: machine.to_owned(),
            program: PROGRAM.into(),
        }
    }

    /// Ends by itself when `limit` is over, also when nobody waits for it any more.
    fn command(&self, limit: Duration) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "--kill-after=5"])
            .arg(format!("{}s", limit.as_secs()))
            .arg("chroot")
            .arg(&self.root)
            .arg(&self.program);
        command
    }

    /// The path of a file as the emulator sees it.
    fn inside(&self, file: &Path) -> PathBuf {
        let below = file.strip_prefix(&self.root).unwrap_or(file);
        Path::new("/").join(below)
    }

    /// Boots a kernel and waits until the machine stops or `limit` is over. The
    /// guest's three serial lines go to files in `directory`. All files are below
    /// the emulator's root.
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
                .arg(format!("file:{}", self.inside(line).display()));
        }
        command.arg("-kernel").arg(self.inside(kernel));
        command.arg("-initrd").arg(self.inside(initramfs));
        // On a busy machine the kernel would take its timer for broken, and panic.
        command.arg("-append").arg(format!(
            "console=ttyS0 panic=-1 loglevel=5 mitigations=off no_timer_check {arguments}"
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
        // As if the whole system were its own: that takes no root.
        let emulator = Emulator {
            root: "/".into(),
            program,
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
}
