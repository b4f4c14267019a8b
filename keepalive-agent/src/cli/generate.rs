//! `keepalive-agent generate`: man pages and shell completions, for packages.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Args, Command, CommandFactory as _};
use clap_complete::{Shell, generate_to};

use super::Cli;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
                        keepalive-agent generate target/generated\n  \
                        man -l target/generated/man/keepalive-agent.1")]
pub(super) struct Arguments {
    /// Directory to write to; gets `man` and `completions` below it
    directory: PathBuf,
}

pub(super) fn generate(arguments: &Arguments) -> Result<ExitCode> {
    let make = |name: &str| {
        let directory = arguments.directory.join(name);
        fs::create_dir_all(&directory)
            .with_context(|| format!("making {}", directory.display()))?;
        Ok::<_, anyhow::Error>(directory)
    };
    let mut command = Cli::command();
    command.build();
    let pages = make("man")?;
    write_pages(&command, &pages)?;
    let completions = make("completions")?;
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        generate_to(shell, &mut command, &name, &completions)
            .with_context(|| format!("writing the completions for {shell}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The page of a command, and those of its subcommands.
fn write_pages(command: &Command, directory: &Path) -> Result<()> {
    page(command, directory)?;
    command
        .get_subcommands()
        .filter(|found| !found.is_hide_set())
        .try_for_each(|found| write_pages(found, directory))
}

fn page(command: &Command, directory: &Path) -> Result<()> {
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name());
    let file = directory.join(format!("{name}.1"));
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone())
        .title(name)
        .render(&mut page)?;
    fs::write(&file, page).with_context(|| format!("writing {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_every_shell_a_completion() {
        let directory = tempfile::tempdir().unwrap();
        let arguments = Arguments {
            directory: directory.path().to_owned(),
        };
        generate(&arguments).unwrap();
        for name in [
            "",
            "-run",
            "-sweep",
            "-check",
            "-sockets",
            "-policy",
            "-policy-show",
            "-policy-set",
            "-policy-unset",
            "-generate",
        ] {
            let page = directory
                .path()
                .join(format!("man/keepalive-agent{name}.1"));
            let page = fs::read_to_string(page).unwrap();
            assert!(page.contains("Examples:"), "{name}");
        }
        let completions = directory.path().join("completions");
        assert_eq!(fs::read_dir(completions).unwrap().count(), 3);
    }

    #[test]
    fn every_argument_is_consistent() {
        Cli::command().debug_assert();
    }
}
