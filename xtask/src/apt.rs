//! Debian's packages.

use std::{
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, ensure};

use crate::{exec, workspace};

/// Installs its arguments. Packages that bring a daemon start it at once and at
/// every boot, which nobody wants on a developer's machine: a policy-rc.d that
/// answers 101 forbids the one and is taken away again, and what was enabled in
/// the meantime is disabled. A shell does it because its trap runs whatever
/// happens, also when the user interrupts.
const INSTALL: &str = r#"
policy=/usr/sbin/policy-rc.d
wants=/etc/systemd/system/multi-user.target.wants
before=$(ls "$wants" 2>/dev/null)
made=
stay_off() {
    [ -z "$made" ] || rm -f "$policy"
    for unit in $(ls "$wants" 2>/dev/null); do
        echo "$before" | grep -qxF "$unit" || systemctl disable --quiet "$unit"
    done
}
trap stay_off EXIT
trap 'exit 130' HUP INT TERM
if [ ! -e "$policy" ]; then
    made=yes
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends --no-remove "$@"
"#;

/// Whether this machine has apt.
pub(crate) fn available() -> bool {
    Path::new("/usr/bin/apt-get").exists()
}

/// Installs `packages` without starting their daemons and without removing
/// other packages. The lists are fetched first: those of a fresh machine can be
/// months old, and what they offer too old to build this.
pub(crate) fn install(packages: &[impl AsRef<str>]) -> Result<()> {
    update()?;
    let names = packages.iter().map(AsRef::as_ref).collect::<Vec<_>>();
    let mut shell = workspace::as_root("sh");
    shell.args(["-c", INSTALL, "sh"]).args(&names);
    exec::announce(
        Command::new("apt-get")
            .args(["install", "--no-install-recommends"])
            .args(&names),
    );
    let status = shell
        .status()
        .with_context(|| format!("cannot start `{}`", shell.get_program().display()))?;
    // The command itself is not shown: nobody wants to read that script here.
    ensure!(
        status.success(),
        "cannot install {}: {status}",
        names.join(" ")
    );
    Ok(())
}

/// Fetches the lists of packages, once in the life of this process.
fn update() -> Result<()> {
    static FETCHED: AtomicBool = AtomicBool::new(false);
    if FETCHED.load(Ordering::Relaxed) {
        return Ok(());
    }
    exec::run(workspace::as_root("apt-get").arg("update"))?;
    FETCHED.store(true, Ordering::Relaxed);
    Ok(())
}
