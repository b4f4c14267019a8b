//! Builds the helper programs of the live tests into a directory, for
//! `KEEPALIVE_TEST_PROGRAMS` on a machine without compilers.

use std::path::PathBuf;

use anyhow::{Context, Result};
use keepalive_tests::Program;

fn main() -> Result<()> {
    let directory = std::env::args_os().nth(1);
    let directory = PathBuf::from(directory.context("which directory are they to be built in?")?);
    Program::build_all(&directory)
}
