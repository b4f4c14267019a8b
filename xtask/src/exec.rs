//! Running other programs: says what it runs, and what went wrong.

use std::{
    env,
    ffi::OsStr,
    io::{self, BufRead as _, BufReader, IsTerminal, Write as _},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// Prints the command, runs it, and fails unless it succeeds.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    announce(command);
    let status = command.status().with_context(|| cannot_start(command))?;
    succeeded(command, status)
}

/// Like [`run`], and shows every line of standard output to `see` on its way
/// to the terminal.
pub(crate) fn run_and_read(command: &mut Command, mut see: impl FnMut(&str)) -> Result<()> {
    announce(command);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| cannot_start(command))?;
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            io::stdout().write_all(&line)?;
            see(&String::from_utf8_lossy(&line));
            line.clear();
        }
    }
    let status = child.wait()?;
    succeeded(command, status)
}

/// Runs a question silently and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| cannot_start(command))?;
    if !output.status.success() {
        bail!(
            "`{}` failed: {}\n{}",
            describe(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Prints the command on standard error the way one would type it.
pub(crate) fn announce(command: &Command) {
    eprintln!("{}", paint_err("2", &format!("$ {}", describe(command))));
}

/// Says on standard error what is about to be done, and why.
pub(crate) fn say(what: &str) {
    eprintln!("{} {what}", paint_err("1", "xtask:"));
}

/// Says on standard error what will not work, without failing.
pub(crate) fn warn(what: &str) {
    eprintln!("{} {what}", paint_err("1;33", "warning:"));
}

/// Says on standard error what went wrong, with everything that led to it.
pub(crate) fn say_error(error: &anyhow::Error) {
    eprintln!("{} {error:#}", paint_err("1;31", "error:"));
}

/// `text` in a terminal colour, if standard output wants it.
pub(crate) fn paint_out(code: &str, text: &str) -> String {
    paint(&io::stdout(), code, text)
}

/// Whether `stream` is a terminal whose user did not ask for no colours.
pub(crate) fn wants_colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn paint_err(code: &str, text: &str) -> String {
    paint(&io::stderr(), code, text)
}

fn paint(stream: &impl IsTerminal, code: &str, text: &str) -> String {
    if wants_colour(stream) {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

fn succeeded(command: &Command, status: ExitStatus) -> Result<()> {
    ensure!(status.success(), "`{}` failed: {status}", describe(command));
    Ok(())
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start `{}`", command.get_program().to_string_lossy())
}

fn describe(command: &Command) -> String {
    let envs = command
        .get_envs()
        // The same in every line; what differs is what one wants to read.
        .filter(|(name, _)| *name != "CARGO_TARGET_DIR")
        .filter_map(|(name, value)| {
            let value = quote(value?);
            Some(format!("{}={value}", name.display()))
        });
    let program = command.get_program();
    let program = if env::var_os("CARGO").is_some_and(|cargo| cargo == program) {
        "cargo".to_owned()
    } else {
        quote(program)
    };
    let args = command.get_args().map(quote);
    envs.chain([program])
        .chain(args)
        .collect::<Vec<_>>()
        .join(" ")
}

fn quote(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./,:@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    if word.contains('\x1f') {
        // What separates flags in CARGO_ENCODED_RUSTFLAGS.
        return format!("$'{}'", word.replace('\x1f', r"\x1f"));
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_described_command_can_be_pasted_into_a_shell() {
        let mut command = Command::new("echo");
        command
            .env("FLAGS", "-C debuginfo=2")
            .env_remove("RUSTC")
            .args(["plain", "two words", "it's", ""]);
        assert_eq!(
            describe(&command),
            r"FLAGS='-C debuginfo=2' echo plain 'two words' 'it'\''s' ''"
        );
    }
}
