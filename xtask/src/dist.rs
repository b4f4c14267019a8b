//! `cargo xtask dist`: what one installs.

mod config_page;

use std::{
    collections::BTreeSet,
    env, fs, mem,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::Value;

use crate::{build, exec, tool, workspace};

/// A user's programs, and what a container image is made of.
const MAX_BINARY: u64 = 6 << 20;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Build the static binary and what one installs: .deb, .rpm, a tarball,
/// checksums and an SBOM
///
/// What makes packages is built by `cargo install` on first use, below the
/// target directory.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  cargo xtask dist\n  cargo xtask dist --target aarch64-unknown-linux-gnu\n\nLeaves everything in target/packages."
)]
pub(crate) struct Options {
    /// Build for this machine instead of the one that builds; may be given more
    /// than once
    #[arg(long, value_name = "TRIPLE")]
    target: Vec<String>,

    /// Version of the packages, instead of the workspace's
    #[arg(long, value_name = "VERSION")]
    package_version: Option<String>,

    /// Build the companion in Kubernetes too, keepalive-kube
    #[arg(long)]
    kube: bool,
}

pub(crate) fn main(options: &Options) -> Result<()> {
    let host = Target::host()?;
    let version = options.package_version.as_deref().unwrap_or(VERSION);
    let targets = options.target.iter().map(|triple| Target::named(triple));
    let mut targets = targets.collect::<Result<Vec<_>>>()?;
    if targets.is_empty() {
        targets.push(host);
    }
    all(&targets, version)?;
    if options.kube {
        for target in &targets {
            static_binary(&directory(), "keepalive-kube", target)?;
        }
    }
    Ok(())
}

/// Makes everything; the names of the .deb and the .rpm of the last target.
fn all(targets: &[Target], version: &str) -> Result<[String; 2]> {
    let dist = directory();
    let mut files = Vec::new();
    for target in targets {
        build(target)?;
        files.push(tarball(&dist, version, target)?);
        files.push(deb(&dist, version, target)?);
        files.push(rpm(&dist, version, target)?);
    }
    files.push(sbom(&dist, version)?);
    checksums(&dist, &files)?;
    for file in &files {
        let size = fs::metadata(dist.join(file))?.len();
        exec::say(&format!(
            "{} {} KiB",
            dist.join(file).display(),
            size / 1024
        ));
    }
    let [.., deb, rpm, _] = &mut files[..] else {
        bail!("no target");
    };
    Ok([deb, rpm].map(mem::take))
}

/// A machine to build for.
struct Target {
    triple: String,
    /// What packages call it: .deb and .rpm.
    arch: [&'static str; 2],
    is_host: bool,
}

impl Target {
    /// The one that builds, as its compiler calls it.
    fn host() -> Result<Self> {
        let version = exec::output(Command::new("rustc").arg("-vV"))?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: "));
        let host = host.context("rustc does not tell its host")?;
        let named = Self::named(host)?;
        Ok(Self {
            is_host: true,
            ..named
        })
    }

    fn named(triple: &str) -> Result<Self> {
        Ok(Self {
            triple: triple.to_owned(),
            arch: match triple.split('-').next() {
                Some("x86_64") => ["amd64", "x86_64"],
                Some("aarch64") => ["arm64", "aarch64"],
                _ => bail!("{triple}: packages are made for x86_64 and aarch64"),
            },
            is_host: false,
        })
    }
}

/// Builds everything, and beside it a .deb and an .rpm of a version before this
/// one: the same agent, for there is no release yet. Each as before and current.
pub(crate) fn pairs() -> Result<([PathBuf; 2], [PathBuf; 2])> {
    const BEFORE: &str = "0.1.0~before";
    let targets = [Target::host()?];
    let [now_deb, now_rpm] = all(&targets, VERSION)?;
    let dist = directory();
    let before_deb = deb(&dist, BEFORE, &targets[0])?;
    let before_rpm = rpm(&dist, BEFORE, &targets[0])?;
    Ok((
        [before_deb, now_deb].map(|name| dist.join(name)),
        [before_rpm, now_rpm].map(|name| dist.join(name)),
    ))
}

/// Holds what was built against what it says of itself: the SBOM, which has to name
/// every crate, and the tarball's agent, which has to run.
pub(crate) fn verify() -> Result<()> {
    let dist = directory();
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
    let tarball = format!(
        "keepalive-agent-{VERSION}-{}.tar.gz",
        Target::host()?.triple
    );
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

/// Builds the static binary, and man pages and completions with it.
fn build(target: &Target) -> Result<()> {
    let dist = directory();
    fs::create_dir_all(&dist).with_context(|| format!("cannot create {}", dist.display()))?;
    let agent = static_binary(&dist, "keepalive-agent", target)?;
    let size = fs::metadata(&agent)?.len();
    ensure!(
        size <= MAX_BINARY,
        "{} has {size} bytes, more than {MAX_BINARY}",
        agent.display()
    );
    let runs_here = if target.is_host {
        agent
    } else {
        build::build()?;
        workspace::agent()
    };
    exec::run(Command::new(runs_here).arg("generate").arg(&dist))?;
    let docs = workspace::root().join("docs/config.md");
    let docs =
        fs::read_to_string(&docs).with_context(|| format!("cannot read {}", docs.display()))?;
    let page = dist.join("man/keepalive.toml.5");
    fs::write(
        &page,
        config_page::render(&docs, &committed("%cs"), VERSION),
    )
    .with_context(|| format!("cannot write {}", page.display()))
}

/// Where all of it goes. The place is fixed: the manifest names it.
pub(crate) fn directory() -> PathBuf {
    workspace::root().join("target/packages")
}

/// Builds a package's binary into `dist`. Tells where it is.
fn static_binary(dist: &Path, package: &str, target: &Target) -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo
        .args(["build", "--profile", "dist", "-p", package])
        // Named, so that the flags are not those of build scripts too.
        .args(["--target", &target.triple])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    let variable = target.triple.to_uppercase().replace('-', "_");
    let linker = format!("CARGO_TARGET_{variable}_LINKER");
    if !target.is_host && env::var_os(&linker).is_none() {
        // As Debian and Fedora call the compilers for other machines.
        cargo.env(linker, format!("{}-linux-gnu-gcc", target.arch[1]));
    }
    exec::run(&mut cargo)?;
    let binary = dist.join(package);
    let built = workspace::target_dir()
        .join(&target.triple)
        .join("dist")
        .join(package);
    fs::copy(&built, &binary).with_context(|| format!("cannot copy {}", built.display()))?;
    let size = fs::metadata(&binary)?.len();
    exec::say(&format!("static binary {package}: {} KiB", size / 1024));
    Ok(binary)
}

/// The .deb's name in `dist`.
fn deb(dist: &Path, version: &str, target: &Target) -> Result<String> {
    let name = format!("keepalive-agent_{version}_{}.deb", target.arch[0]);
    let mut packager = packager("cargo-deb", "3.8.0")?;
    packager
        .args(["deb", "-p", "keepalive-agent", "--no-build", "--no-strip"])
        .args(["--target", &target.triple])
        .args(["--deb-version", version, "-o"])
        .arg(dist.join(&name));
    exec::run(&mut packager)?;
    Ok(name)
}

fn rpm(dist: &Path, version: &str, target: &Target) -> Result<String> {
    let name = format!("keepalive-agent-{version}.{}.rpm", target.arch[1]);
    let mut packager = packager("cargo-generate-rpm", "0.21.1")?;
    packager
        .args(["generate-rpm", "-p", "keepalive-agent"])
        .args(["--auto-req", "disabled", "--arch", target.arch[1]])
        .args(["--set-metadata", &format!("version = \"{version}\""), "-o"])
        .arg(dist.join(&name));
    exec::run(&mut packager)?;
    Ok(name)
}

/// The binary, its documents and what packages install, with nothing of the
/// machine that made it.
fn tarball(dist: &Path, version: &str, target: &Target) -> Result<String> {
    let name = format!("keepalive-agent-{version}-{}.tar.gz", target.triple);
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
                &format!("--mtime=@{}", committed("%ct")),
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
    let mut packager = packager("cargo-cyclonedx", "0.5.9")?;
    packager
        .args(["cyclonedx", "--format", "json", "--no-build-deps"])
        .args(["--manifest-path", "keepalive-agent/Cargo.toml"])
        .args(["--override-filename", stem]);
    exec::run(&mut packager)?;
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

/// What makes packages; it writes the time of the commit, not that of the build.
fn packager(name: &str, version: &str) -> Result<Command> {
    let mut packager = tool::installed(name, version)?;
    packager.env("SOURCE_DATE_EPOCH", committed("%ct"));
    Ok(packager)
}

/// The time of the commit in one of git's formats; the epoch outside of a checkout.
fn committed(format: &str) -> String {
    let mut git = Command::new("git");
    git.args(["log", "-1", &format!("--format={format}")])
        .current_dir(workspace::root());
    let epoch = if format == "%ct" { "0" } else { "1970-01-01" };
    exec::output(&mut git).map_or_else(|_| epoch.to_owned(), |time| time.trim().to_owned())
}
