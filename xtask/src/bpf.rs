//! `cargo xtask bpf`: builds the BPF object that `keepalive-ebpf` ships, so that
//! building the agent takes nothing but stable Rust.

mod toolchain;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::Args;
use object::build::elf::{Builder, SectionData};

use crate::{exec, workspace};
use metadata::{METADATA, Metadata, OBJECT};
use toolchain::Toolchain;

#[path = "../../keepalive-ebpf/object/metadata.rs"]
mod metadata;

/// Rebuild the BPF object that keepalive-ebpf ships
///
/// Installs what that takes: a Rust compiler with the source of `core`, and
/// bpf-linker.
#[derive(Args)]
#[command(
    after_help = "Example:\n  cargo xtask bpf --check\n\nAfter a merge conflict in keepalive-ebpf/object: cargo xtask bpf && git add keepalive-ebpf/object"
)]
pub(crate) struct Options {
    /// Change nothing; fail if the object differs from what this machine builds
    #[arg(long)]
    check: bool,
}

pub(crate) fn main(options: &Options) -> Result<()> {
    if options.check {
        return check();
    }
    let (object, metadata) = build()?;
    write_if_changed(&workspace::root().join(OBJECT), &object)?;
    write_if_changed(
        &workspace::root().join(METADATA),
        metadata.to_string().as_bytes(),
    )?;
    exec::say(&format!(
        "{OBJECT}: {} KiB, by {} and {}",
        object.len() / 1024,
        metadata.compiler,
        metadata.linker
    ));
    Ok(())
}

/// Fails if the shipped object is not what its sources come to: byte by byte
/// where this machine has the compiler and linker that it was built with.
pub(crate) fn check() -> Result<()> {
    let root = workspace::root();
    let shipped = metadata::current_object(&root).map_err(|reason| anyhow!(reason))?;
    let recorded = Metadata::read(&root).map_err(|reason| anyhow!(reason))?;
    let (built, own) = build()?;
    if own.compiler != recorded.compiler || own.linker != recorded.linker {
        exec::warn(&format!(
            "{OBJECT} is not compared byte by byte: it is by {} and {}, here are {} and {}",
            recorded.compiler, recorded.linker, own.compiler, own.linker
        ));
        return Ok(());
    }
    ensure!(
        built == shipped,
        "{OBJECT} is not what its sources come to with {} and {}; rebuild it with `cargo xtask bpf`",
        own.compiler,
        own.linker
    );
    exec::say(&format!(
        "{OBJECT} is byte by byte what its sources come to"
    ));
    Ok(())
}

/// Builds the programs that the benchmark compares with, which are not shipped.
pub(crate) fn build_bench_object() -> Result<PathBuf> {
    compile(&toolchain()?, "bench")
}

/// Finds the toolchain, the recorded one first, and installs what is missing.
fn toolchain() -> Result<Toolchain> {
    let metadata = Metadata::read(&workspace::root()).ok();
    Toolchain::find_or_install(metadata.as_ref().map(|metadata| &*metadata.compiler))
}

/// The object as it is shipped, and what describes it.
fn build() -> Result<(Vec<u8>, Metadata)> {
    let toolchain = toolchain()?;
    let sources =
        metadata::digest_of_sources(&workspace::root()).map_err(|reason| anyhow!(reason))?;
    let built = compile(&toolchain, "keepalive")?;
    let object = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    let object = without_dwarf(&object).with_context(|| format!("in {}", built.display()))?;
    let metadata = Metadata {
        compiler: toolchain.compiler().to_owned(),
        linker: toolchain.linker,
        sources,
        object: metadata::sha256(&object),
    };
    Ok((object, metadata))
}

/// Compiles one binary of the BPF crate.
fn compile(toolchain: &Toolchain, name: &str) -> Result<PathBuf> {
    let mut cargo = toolchain.cargo();
    cargo
        // Its own directory: another compiler with other flags would throw the
        // host's build away, and the other way round.
        .env(
            "CARGO_TARGET_DIR",
            workspace::target_dir().join("bpf-build"),
        )
        .env("CARGO_ENCODED_RUSTFLAGS", flags()?.join("\x1f"))
        .env_remove("RUSTFLAGS")
        .env(
            "CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER",
            &toolchain.linker_path,
        )
        // bpf-linker turns debug information into the BTF that the kernel and
        // bpftool show.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        // The verifier wants one function after another, fully optimised.
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        // The bindings are chosen by the architecture of the machine that
        // builds, unless they are named. What the programs use is the same for
        // all that are 64-bit and little-endian.
        .env("AYA_BPF_TARGET_ARCH", "x86_64")
        .args(["build", "--release", "-p", "keepalive-ebpf"])
        .args([
            "--bin",
            name,
            "--target",
            "bpfel-unknown-none",
            "-Z",
            "build-std=core",
        ]);
    exec::run(&mut cargo)?;
    Ok(workspace::bpf_binary(name))
}

/// Flags of the compiler. Line information names source files, which must not
/// depend on where the clone and cargo's registry are.
fn flags() -> Result<Vec<String>> {
    let mut flags = vec!["-Clink-arg=--btf".to_owned()];
    let mut remap = |prefix: PathBuf| {
        flags.push(format!("--remap-path-prefix={}/=", prefix.display()));
    };
    remap(workspace::root());
    // One directory for each registry; a mirror has another name than crates.io.
    let registries = workspace::cargo_home()
        .context("neither CARGO_HOME nor HOME is set")?
        .join("registry/src");
    exec::run(workspace::cargo().args(["fetch", "--quiet", "--locked"]))?;
    for entry in fs::read_dir(&registries)
        .with_context(|| format!("cannot read {}", registries.display()))?
    {
        remap(entry?.path());
    }
    Ok(flags)
}

/// The object without what only debuggers read. The BTF and the line
/// information that the kernel shows stay.
fn without_dwarf(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object).context("not an ELF file")?;
    for section in &mut builder.sections {
        let name = section.name.to_string();
        let name = name.strip_prefix(".rel").unwrap_or(&name);
        section.delete = name.starts_with(".debug");
    }
    builder.delete_orphans();
    // LLVM keeps the names of sections and of symbols in one table; the builder
    // writes two.
    let names = builder.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("cannot write it")?;
    Ok(stripped)
}

/// A file that did not change keeps its time stamp, or cargo would build the
/// agent again.
fn write_if_changed(to: &Path, content: &[u8]) -> Result<()> {
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    fs::write(to, content).with_context(|| format!("cannot write {}", to.display()))
}
