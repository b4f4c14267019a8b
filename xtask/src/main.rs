//! `cargo xtask`: the one entry for building, running and testing keepalive.
#![forbid(unsafe_code)]

mod apt;
mod bench;
mod bpf;
mod build;
mod dist;
mod exec;
mod run;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The one entry for building, running and testing keepalive.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Build(build::Options),
    Bpf(bpf::Options),
    Run(run::Options),
    Test(test::Options),
    Dist(dist::Options),
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let result = match Options::parse().verb {
        Verb::Build(options) => build::main(&options).map(|()| ExitCode::SUCCESS),
        Verb::Bpf(options) => bpf::main(&options).map(|()| ExitCode::SUCCESS),
        Verb::Run(options) => run::main(&options).map(|never| match never {}),
        Verb::Test(options) => Ok(test::main(&options)),
        Verb::Dist(options) => dist::main(&options).map(|()| ExitCode::SUCCESS),
        Verb::Bench(options) => bench::main(&options).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        exec::say_error(&error);
        ExitCode::FAILURE
    })
}
