//! `keepalive-agent generate`: man pages and shell completions, for packages.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Args, Command, CommandFactory as _};
use clap_complete::{Generator as _, Shell};
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

use super::Cli;

const NAME: &str = "keepalive-agent";

/// Date of the commit that this was built from; empty outside a git checkout.
const DATE: &str = env!("KEEPALIVE_DATE");

/// What an agent reads and writes, as the man pages list it.
const FILES: [(&str, &str); 5] = [
    (
        "/etc/keepalive/keepalive.toml",
        "The config, where --config names no other; see keepalive.toml(5).",
    ),
    (
        "/etc/keepalive/conf.d, /run/keepalive/conf.d",
        "Drop-ins, *.toml in the order of their names, where --config names no other file.",
    ),
    (
        "/run/keepalive",
        "What a running agent tells other commands.",
    ),
    (
        "/run/keepalive-exec",
        "Where users ask a running agent, if its config lets them.",
    ),
    (
        "/sys/fs/bpf/keepalive",
        "Pins of what is in force, where run has --pin without a directory.",
    ),
];

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
    let mut command = without_hidden(&Cli::command());
    let completions = make("completions")?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        let file = completions.join(shell.file_name(NAME));
        fs::write(&file, completion(&command, shell))
            .with_context(|| format!("writing {}", file.display()))?;
    }
    command.build();
    write_pages(&command, &make("man")?)?;
    Ok(ExitCode::SUCCESS)
}

fn completion(command: &Command, shell: Shell) -> String {
    let mut script = Vec::new();
    // clap_complete 4.6 writes two different names for the functions of bash
    // where the program's name has a hyphen, and nothing is completed below the
    // first level.
    let name = match shell {
        Shell::Bash => NAME.replace('-', "_"),
        _ => NAME.to_owned(),
    };
    clap_complete::generate(shell, &mut command.clone(), &name, &mut script);
    let script = String::from_utf8_lossy(&script);
    script.replace(&format!(" {name}\n"), &format!(" {NAME}\n"))
}

/// The same command without what `--help` hides: completions would show it.
fn without_hidden(command: &Command) -> Command {
    let mut copy = Command::new(command.get_name().to_owned())
        .disable_help_subcommand(true)
        .args(command.get_arguments().filter(|found| !found.is_hide_set()))
        .subcommands(
            command
                .get_subcommands()
                .filter(|found| !found.is_hide_set())
                .map(without_hidden),
        );
    if let Some(about) = command.get_about() {
        copy = copy.about(about.clone());
    }
    if let Some(about) = command.get_long_about() {
        copy = copy.long_about(about.clone());
    }
    if let Some(help) = command.get_after_help() {
        copy = copy.after_help(help.clone());
    }
    match command.get_version() {
        Some(version) => copy.version(version.to_owned()),
        None => copy,
    }
}

/// The page of a command, and those of its subcommands.
fn write_pages(command: &Command, directory: &Path) -> Result<()> {
    let file = directory.join(format!("{}.1", page_name(command)));
    fs::write(&file, page(command)?).with_context(|| format!("writing {}", file.display()))?;
    command
        .get_subcommands()
        .try_for_each(|found| write_pages(found, directory))
}

/// `keepalive-agent-policy-set`
fn page_name(command: &Command) -> &str {
    command
        .get_display_name()
        .unwrap_or_else(|| command.get_name())
}

fn page(command: &Command) -> Result<Vec<u8>> {
    let name = page_name(command);
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .date(DATE)
        .source(concat!("keepalive ", env!("CARGO_PKG_VERSION")))
        .manual("keepalive manual");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let help = command.get_after_help().map(ToString::to_string);
    further_sections(name, help.as_deref().unwrap_or_default()).to_writer(&mut page)?;
    Ok(page)
}

/// What `--help` says below the options in sections of their own, and what it
/// does not say.
fn further_sections(name: &str, help: &str) -> Roff {
    let (notes, examples) = help.split_once("Examples:\n").unwrap_or((help, ""));
    let (exit_codes, notes): (Vec<_>, Vec<_>) = notes
        .split("\n\n")
        .map(str::trim)
        .filter(|paragraph| !paragraph.is_empty())
        .partition(|paragraph| paragraph.starts_with("Exit code"));
    let mut roff = Roff::new();
    let mut section = |title: &str, paragraphs: &[&str]| {
        if !paragraphs.is_empty() {
            roff.control("SH", [title]);
        }
        for paragraph in paragraphs {
            roff.control("PP", []);
            roff.text([roman(*paragraph)]);
        }
    };
    section("NOTES", &notes);
    if exit_codes.is_empty() {
        section(
            "EXIT STATUS",
            &["0 when done, 1 after a failure, which standard error names, 2 after wrong usage."],
        );
    } else {
        section("EXIT STATUS", &exit_codes);
    }
    roff.control("SH", ["FILES"]);
    for (file, meaning) in FILES {
        roff.control("TP", []);
        roff.text([bold(file)]);
        roff.text([roman(meaning)]);
    }
    if !examples.is_empty() {
        roff.control("SH", ["EXAMPLES"]);
        roff.control("nf", []);
        for line in examples.lines() {
            roff.text([roman(line)]);
        }
        roff.control("fi", []);
    }
    roff.control("SH", ["SEE ALSO"]);
    let others = ["keepalive-agent(1)", "keepalive.toml(5)", "ss(8)", "tcp(7)"];
    let own = format!("{name}(1)");
    let others = others.into_iter().filter(|page| *page != own);
    roff.text([roman(others.collect::<Vec<_>>().join(", "))]);
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: [&str; 10] = [
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
    ];

    fn generated() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let arguments = Arguments {
            directory: directory.path().to_owned(),
        };
        generate(&arguments).unwrap();
        directory
    }

    #[test]
    fn every_command_has_a_page_with_the_sections_people_expect() {
        let directory = generated();
        for name in PAGES {
            let page = directory
                .path()
                .join(format!("man/keepalive-agent{name}.1"));
            let page = fs::read_to_string(page).unwrap();
            let sections = page
                .lines()
                .filter_map(|line| line.strip_prefix(".SH "))
                .collect::<Vec<_>>();
            for section in [
                "NAME",
                "SYNOPSIS",
                "DESCRIPTION",
                "OPTIONS",
                "\"EXIT STATUS\"",
                "FILES",
                "EXAMPLES",
                "\"SEE ALSO\"",
            ] {
                assert!(
                    sections.contains(&section),
                    "{name}: {section} {sections:?}"
                );
            }
            assert!(!page.contains("Examples:"), "{name}");
        }
    }

    /// What bash offers for the last of these words.
    fn bash_offers(script: &Path, words: &[&str]) -> Vec<String> {
        let output = std::process::Command::new("bash")
            .args(["--norc", "-c"])
            .arg(
                r#"source "$1"; shift
                   COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
                   entry=$(complete -p "$1"); entry=${entry#*-F }
                   "${entry%% *}" "$1" "${!#}" "${COMP_WORDS[COMP_CWORD - 1]}"
                   printf '%s\n' "${COMPREPLY[@]}""#,
            )
            .arg("bash")
            .arg(script)
            .args(words)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn bash_completes_below_the_first_level_and_shows_nothing_hidden() {
        let directory = generated();
        let script = directory.path().join("completions/keepalive-agent.bash");
        let offers = |words: &[&str]| bash_offers(&script, words);
        let commands = offers(&["keepalive-agent", ""]);
        assert!(
            commands.iter().any(|word| word == "sockets"),
            "{commands:?}"
        );
        let hidden = super::super::trial::COMMAND;
        assert!(!commands.iter().any(|word| word == hidden), "{commands:?}");
        let policy = offers(&["keepalive-agent", "policy", "s"]);
        assert_eq!(policy, ["show", "set"]);
        let options = offers(&["keepalive-agent", "policy", "set", "--drop"]);
        assert_eq!(options, ["--drop-in-dir"]);
    }

    #[test]
    fn every_argument_is_consistent() {
        Cli::command().debug_assert();
    }
}
