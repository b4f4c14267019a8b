//! `cargo xtask setup`: finds or installs what the other verbs need.

mod apt;
mod compiler;
mod linker;
mod test_programs;

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::exec;
pub(crate) use compiler::Compiler;

/// Find or install what the BPF build needs: a Rust compiler with the source
/// of `core`, and bpf-linker
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask setup --tests")]
pub(crate) struct Options {
    /// Also install the programs that the live tests use
    #[arg(long)]
    tests: bool,
}

/// What turns Rust into a BPF object.
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
}

pub(crate) fn main(options: &Options) -> Result<()> {
    let toolchain = toolchain()?;
    exec::say(&format!("BPF compiler: {}", toolchain.compiler));
    exec::say(&format!("BPF linker: {}", toolchain.linker.display()));
    if options.tests {
        test_programs::install_missing();
    }
    Ok(())
}

/// The BPF toolchain; installs what is missing of it.
pub(crate) fn toolchain() -> Result<Toolchain> {
    let compiler = compiler::find_or_install()?;
    let linker = linker::find_or_install(&compiler)?;
    Ok(Toolchain { compiler, linker })
}
