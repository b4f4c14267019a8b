//! What the live tests use beside the agent. A test whose program is missing
//! skips and says so, therefore nothing here fails.

use std::{env, fs, path::Path};

use crate::{apt, exec};

/// A program or file that the live tests use, and the package that has it.
struct Need {
    /// The name of a program, or a path where `*` is any one directory.
    file: &'static str,
    package: &'static str,
}

const NEEDS: &[Need] = &[
    need("bpftool", "bpftool"),
    need("curl", "curl"),
    need("dockerd", "docker.io"),
    need("gcc", "gcc"),
    need("go", "golang-go"),
    need("haproxy", "haproxy"),
    need("ip", "iproute2"),
    need("javac", "default-jdk-headless"),
    need("nft", "nftables"),
    need("nginx", "nginx"),
    need("node", "nodejs"),
    need("prometheus", "prometheus"),
    need("promtool", "prometheus"),
    need("python3", "python3"),
    need("redis-server", "redis-server"),
    need("runc", "runc"),
    need("tcpdump", "tcpdump"),
    need("tmux", "tmux"),
    need("vsftpd", "vsftpd"),
    need("/usr/lib/postgresql/*/bin/postgres", "postgresql"),
    need(
        "/usr/lib/python3/dist-packages/grpc/__init__.py",
        "python3-grpcio",
    ),
    // Static programs are what LD_PRELOAD cannot reach.
    need("/usr/lib/*/libc.a", "libc6-dev"),
    need("/usr/lib/libkeepalive.so", "libkeepalive0"),
];

const fn need(file: &'static str, package: &'static str) -> Need {
    Need { file, package }
}

impl Need {
    fn is_met(&self) -> bool {
        if self.file.starts_with('/') {
            return match self.file.split_once("/*/") {
                Some((above, below)) => fs::read_dir(above)
                    .is_ok_and(|dirs| dirs.flatten().any(|dir| dir.path().join(below).exists())),
                None => Path::new(self.file).exists(),
            };
        }
        // Daemons and network tools are in directories that are on root's PATH only.
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|dir| dir.join(self.file).exists())
    }
}

/// Installs the packages of what is missing, and names what remains missing.
pub(super) fn install_missing() {
    let missing = missing();
    if missing.is_empty() {
        exec::say("live tests: all programs are there");
        return;
    }
    if apt::available() {
        exec::say(&format!(
            "installing for the live tests: {}",
            names(&missing)
        ));
        let packages: Vec<_> = missing.iter().map(|need| need.package).collect();
        // One package that cannot be installed must not cost all the others.
        if let Err(error) = apt::install(&packages) {
            exec::warn(&format!("{error:#}; trying one by one"));
            for package in packages {
                if let Err(error) = apt::install(&[package]) {
                    exec::warn(&format!("{error:#}"));
                }
            }
        }
    }
    let missing = self::missing();
    if !missing.is_empty() {
        exec::warn(&format!(
            "live tests that need these will be skipped: {}",
            names(&missing)
        ));
    }
}

fn missing() -> Vec<&'static Need> {
    NEEDS.iter().filter(|need| !need.is_met()).collect()
}

fn names(needs: &[&Need]) -> String {
    let files = needs.iter().map(|need| need.file).collect::<Vec<_>>();
    files.join(", ")
}
