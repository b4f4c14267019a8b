//! keepalive-agent: TCP keepalive for every connection of the machine.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    keepalive_agent::cli::main()
}
