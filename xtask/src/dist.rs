//! `cargo xtask dist`: what one installs.

mod config_page;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::{exec, tool, workspace};

/// A user's programs, and what a container image is made of.
const MAX_BINARY: u64 = 6 << 20;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Build the static binary and what one installs: .deb, .rpm, a tarball,
/// checksums and an SBOM
///
/// What makes packages is built by `cargo install` on first use, below the
/// target directory.
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask dist\n\nLeaves everything in target/packages.")]
pub(crate) struct Options {
    /// Version of the packages, instead of the workspace's
    #[arg(long, value_name = "VERSION")]
    package_version: Option<String>,

    /// Build the companion in Kubernetes too, keepalive-kube
    #[arg(long)]
    kube: bool,
}

pub(crate) fn main(options: &Options) -> Result<()> {
    all(options.package_version.as_deref().unwrap_or(VERSION))?;
    if options.kube {
        static_binary(&directory(), "keepalive-kube")?;
    }
    Ok(())
}

/// Makes everything; the names of the .deb and the .rpm.
fn all(version: &str) -> Result<[String; 2]> {
    let dist = build()?;
    let deb = deb(&dist, version)?;
    let rpm = rpm(&dist, version)?;
    let tarball = tarball(&dist, version)?;
    let sbom = sbom(&dist, version)?;
    let files = [deb, rpm, tarball, sbom];
    checksums(&dist, &files)?;
    for file in &files {
        let size = fs::metadata(dist.join(file))?.len();
        exec::say(&format!(
            "{} {} KiB",
            dist.join(file).display(),
            size / 1024
        ));
    }
    let [deb, rpm, ..] = files;
    Ok([deb, rpm])
}

/// Builds everything, and beside it a .deb and an .rpm of a version before this
/// one: the same agent, for there is no release yet. Each as before and current.
pub(crate) fn pairs() -> Result<([PathBuf; 2], [PathBuf; 2])> {
    const BEFORE: &str = "0.1.0~before";
    let [now_deb, now_rpm] = all(VERSION)?;
    let dist = directory();
    let before_deb = deb(&dist, BEFORE)?;
    let before_rpm = rpm(&dist, BEFORE)?;
    Ok((
        [before_deb, now_deb].map(|name| dist.join(name)),
        [before_rpm, now_rpm].map(|name| dist.join(name)),
    ))
}

/// Holds what was built against what it says of itself: the checksums, the SBOM,
/// which has to name every crate, and the tarball's agent, which has to run.
pub(crate) fn verify() -> Result<()> {
    let dist = directory();
    let mut sums = Command::new("sha256sum");
    sums.args(["--check", "--strict", "SHA256SUMS"])
        .current_dir(&dist);
    exec::run(&mut sums)?;
    let named = fs::read_to_string(dist.join("SHA256SUMS"))?;
    for kind in [".deb", ".rpm", ".tar.gz", ".cdx.json"] {
        ensure!(
            named.lines().any(|line| line.ends_with(kind)),
            "SHA256SUMS names no {kind}"
        );
    }
    let bill = fs::read_to_string(dist.join(format!("keepalive-agent-{VERSION}.cdx.json")))?;
    let bill: Value = serde_json::from_str(&bill).context("the SBOM is no JSON")?;
    let listed: BTreeSet<_> = bill["components"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|part| Some((part["name"].as_str()?, part["version"].as_str()?)))
        .collect();
    let mut tree = workspace::cargo();
    tree.args(["tree", "--package", "keepalive-agent", "--edges", "normal"])
        .args(["--prefix", "none", "--format", "{p}"]);
    let tree = exec::output(&mut tree)?;
    let used: BTreeSet<_> = tree
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?, words.next()?.strip_prefix('v')?))
        })
        .filter(|(name, _)| *name != "keepalive-agent")
        .collect();
    ensure!(!used.is_empty(), "cargo tree names no crate");
    // It names some more: those that other members of the workspace have a
    // dependency use.
    let missing: Vec<_> = used.difference(&listed).collect();
    ensure!(missing.is_empty(), "the SBOM lacks {missing:?}");
    let tarball = format!("keepalive-agent-{VERSION}-{}.tar.gz", host()?);
    let unpacked = dist.join("unpacked");
    drop(fs::remove_dir_all(&unpacked));
    fs::create_dir(&unpacked)?;
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--file").arg(dist.join(tarball));
    exec::run(tar.arg("--directory").arg(&unpacked))?;
    let agent = unpacked.join(format!("keepalive-agent-{VERSION}/keepalive-agent"));
    let said = exec::output(Command::new(agent).arg("--version"))?;
    ensure!(
        said.contains(VERSION),
        "the tarball's agent is another version: {said}"
    );
    fs::remove_dir_all(&unpacked)?;
    Ok(())
}

/// Builds the static binary, and man pages and completions with it. Tells the
/// directory.
fn build() -> Result<PathBuf> {
    let dist = directory();
    fs::create_dir_all(&dist).with_context(|| format!("cannot create {}", dist.display()))?;
    let agent = static_binary(&dist, "keepalive-agent")?;
    let size = fs::metadata(&agent)?.len();
    ensure!(
        size <= MAX_BINARY,
        "{} has {size} bytes, more than {MAX_BINARY}",
        agent.display()
    );
    exec::run(Command::new(&agent).arg("generate").arg(&dist))?;
    let docs = workspace::root().join("docs/config.md");
    let docs =
        fs::read_to_string(&docs).with_context(|| format!("cannot read {}", docs.display()))?;
    let page = dist.join("man/keepalive.toml.5");
    fs::write(&page, config_page::render(&docs, &commit_date(), VERSION))
        .with_context(|| format!("cannot write {}", page.display()))?;
    Ok(dist)
}

/// Where all of it goes. The place is fixed: the manifest names it.
pub(crate) fn directory() -> PathBuf {
    workspace::root().join("target/packages")
}

/// Builds a package's binary into `dist`. Tells where it is.
fn static_binary(dist: &Path, package: &str) -> Result<PathBuf> {
    let target = host()?;
    exec::run(
        workspace::cargo()
            .args(["build", "--profile", "dist", "-p", package])
            // Named, so that the flags are not those of build scripts too.
            .args(["--target", &target])
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env_remove("CARGO_ENCODED_RUSTFLAGS"),
    )?;
    let binary = dist.join(package);
    let built = workspace::target_dir()
        .join(target)
        .join("dist")
        .join(package);
    fs::copy(&built, &binary).with_context(|| format!("cannot copy {}", built.display()))?;
    let size = fs::metadata(&binary)?.len();
    exec::say(&format!("static binary {package}: {} KiB", size / 1024));
    Ok(binary)
}

/// The .deb's name in `dist`.
fn deb(dist: &Path, version: &str) -> Result<String> {
    let name = format!("keepalive-agent_{version}.deb");
    let mut cargo = tool::cargo_with("cargo-deb", "3.8.0")?;
    cargo
        .args(["deb", "-p", "keepalive-agent", "--no-build", "--no-strip"])
        .args(["--deb-version", version, "-o"])
        .arg(dist.join(&name));
    exec::run(&mut cargo)?;
    Ok(name)
}

fn rpm(dist: &Path, version: &str) -> Result<String> {
    let name = format!("keepalive-agent-{version}.rpm");
    let mut cargo = tool::cargo_with("cargo-generate-rpm", "0.21.1")?;
    cargo
        .args([
            "generate-rpm",
            "-p",
            "keepalive-agent",
            "--auto-req",
            "disabled",
        ])
        .args(["--set-metadata", &format!("version = \"{version}\""), "-o"])
        .arg(dist.join(&name));
    exec::run(&mut cargo)?;
    Ok(name)
}

/// The binary, its documents and what packages install, with nothing of the
/// machine that made it.
fn tarball(dist: &Path, version: &str) -> Result<String> {
    let name = format!("keepalive-agent-{version}-{}.tar.gz", host()?);
    exec::run(
        workspace::at_root(&mut Command::new("tar"))
            .args([
                "--create",
                "--gzip",
                "--sort=name",
                "--owner=0",
                "--group=0",
            ])
            .args([
                "--numeric-owner",
                &format!("--mtime={}", commit_date()),
                "--file",
            ])
            .arg(dist.join(&name))
            .arg(format!("--transform=s,^,keepalive-agent-{version}/,"))
            .args([
                "README.md",
                "CHANGELOG.md",
                "LICENSE-APACHE",
                "LICENSE-MIT",
                "LICENSE-GPL-2.0",
            ])
            .args([
                "docs",
                "packaging/keepalive-agent.service",
                "packaging/keepalive.toml",
            ])
            .args([
                "--directory",
                "target/packages",
                "keepalive-agent",
                "man",
                "completions",
            ]),
    )?;
    Ok(name)
}

/// What is in the binary, as CycloneDX.
fn sbom(dist: &Path, version: &str) -> Result<String> {
    let name = format!("keepalive-agent-{version}.cdx.json");
    let stem = "target-packages-sbom";
    let mut cargo = tool::cargo_with("cargo-cyclonedx", "0.5.9")?;
    cargo
        .args(["cyclonedx", "--format", "json", "--no-build-deps"])
        .args(["--manifest-path", "keepalive-agent/Cargo.toml"])
        .args(["--override-filename", stem]);
    exec::run(&mut cargo)?;
    // It writes beside the manifest of every member of the workspace.
    for entry in fs::read_dir(workspace::root())? {
        let written = entry?.path().join(format!("{stem}.json"));
        if !written.exists() {
            continue;
        }
        if written
            .parent()
            .is_some_and(|member| member.ends_with("keepalive-agent"))
        {
            fs::copy(&written, dist.join(&name))?;
        }
        fs::remove_file(&written)?;
    }
    ensure!(dist.join(&name).exists(), "cargo cyclonedx wrote no SBOM");
    Ok(name)
}

fn checksums(dist: &Path, files: &[String]) -> Result<()> {
    let mut command = Command::new("sha256sum");
    command.args(files).current_dir(dist);
    let sums = exec::output(&mut command)?;
    fs::write(dist.join("SHA256SUMS"), sums).context("cannot write SHA256SUMS")
}

/// The triple of this machine, as its compiler calls it.
fn host() -> Result<String> {
    let version = exec::output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned)
        .context("rustc does not tell its host")
}

/// `YYYY-MM-DD` of the commit; empty outside a git checkout.
fn commit_date() -> String {
    let mut git = Command::new("git");
    git.args(["log", "-1", "--format=%cs"])
        .current_dir(workspace::root());
    exec::output(&mut git).map_or(String::new(), |date| date.trim().to_owned())
}
