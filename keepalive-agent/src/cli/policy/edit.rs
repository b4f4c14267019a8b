//! `policy edit`: the policy file in an editor, checked before it is put in place.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{IsTerminal as _, Write as _, stdin},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use tracing::warn;

use super::{Agents, ConfigFiles, drop_in, output};
use crate::{
    config::{Merged, Refusal, read_trusted},
    names::printable_path,
};

/// What stands in a file that does not exist yet.
const NEW: &str = "# Policy of the keepalive agent: keepalive.toml(5)\n\n[default]\n";

#[derive(Args, Debug)]
#[command(
    after_help = "The editor is that of VISUAL or EDITOR, else vi. It gets a copy. What is wrong is \
                  said, and nothing is changed: the copy can be edited again, or given up. Files are \
                  replaced in one step.\n\n\
                  Examples:\n  \
                  keepalive-agent policy edit\n  \
                  EDITOR=nano keepalive-agent policy edit --config my.toml"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    files: ConfigFiles,
}

pub(super) fn edit(arguments: &Arguments) -> Result<()> {
    let sources = arguments.files.sources();
    let main = sources.main();
    // Where it is a link, what that leads to is what a person means.
    let path = &fs::canonicalize(main).unwrap_or_else(|_| main.to_owned());
    if path.exists() && !path.is_file() {
        bail!("{}: not a regular file", printable_path(path));
    }
    let before = match read_trusted(path) {
        Ok(text) => Some(text),
        Err(Refusal::Absent) => None,
        Err(refusal) => return Err(refusal).with_context(|| printable_path(path).to_string()),
    };
    let directory = tempfile::tempdir().context("making a directory for the copy")?;
    let copy = directory.path().join("keepalive.toml");
    let text = before.as_deref().unwrap_or(NEW);
    fs::write(&copy, text).context("writing the copy")?;
    let (text, after) = loop {
        run(&editor(), &copy)?;
        let text = fs::read_to_string(&copy).context("reading the copy")?;
        if before.as_ref() == Some(&text) {
            return output::text("nothing is changed\n");
        }
        match sources.read_as_if(main, Some(&text)) {
            Ok(after) => break (text, after),
            Err(errors) if !asks_again(&errors)? => {
                return Err(errors).context("nothing is changed");
            }
            Err(_) => {}
        }
    };
    for warning in &after.warnings.0 {
        warn!("{warning}");
    }
    let known = sources.read().ok();
    let agents = Agents::find();
    drop_in::replace(path, &text)?;
    output::text(format_args!("wrote {}\n", printable_path(path)))?;
    agents
        .report(
            known.as_ref().map(|known: &Merged| &known.config),
            &after.config,
        )
        .or_else(|refused| drop_in::put_back([(path.as_path(), before.as_deref())], refused))
}

fn editor() -> OsString {
    let mut named = ["VISUAL", "EDITOR"].into_iter().filter_map(env::var_os);
    named
        .find(|editor| !editor.is_empty())
        .unwrap_or_else(|| "vi".into())
}

/// An editor may be a command with arguments, as for other programs.
fn run(editor: &OsStr, file: &Path) -> Result<()> {
    let status = Command::new("/bin/sh")
        .args(["-c", "eval \"$1 \\\"\\$2\\\"\"", "sh"])
        .args([editor, file.as_os_str()])
        .status()
        .context("starting the editor")?;
    if !status.success() {
        bail!("nothing is changed: the editor ended with {status}");
    }
    Ok(())
}

/// Says what is wrong, and asks whether to go on, if there is somebody to ask.
fn asks_again(errors: &dyn std::error::Error) -> Result<bool> {
    if !stdin().is_terminal() {
        return Ok(false);
    }
    let mut terminal = std::io::stderr();
    write!(terminal, "{errors}\nedit it again? [Y/n] ").context("asking")?;
    let mut answer = String::new();
    let read = stdin().read_line(&mut answer).context("asking")?;
    Ok(read > 0 && !answer.trim().eq_ignore_ascii_case("n"))
}
