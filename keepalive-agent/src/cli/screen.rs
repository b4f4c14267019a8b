//! A terminal that a picture is drawn on again and again.

use std::{
    io::{self, Write as _},
    process, thread,
};

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

use super::table;

/// The alternate screen, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// To the top left; to the end of the line; to the end of the screen.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

/// The alternate screen of the terminal that standard output is. What was there
/// before comes back when this goes, and when a signal ends the process.
pub(super) struct Screen(());

impl Screen {
    /// Takes the screen; none where standard output is no terminal.
    ///
    /// # Errors
    ///
    /// When signals cannot be waited for.
    pub(super) fn take() -> Result<Option<Self>> {
        if table::terminal().is_none() {
            return Ok(None);
        }
        leave_on_signals(|| {
            // Nobody sees it if the terminal is gone.
            let _ = write(LEAVE);
        })?;
        write(ENTER).context("drawing on the terminal")?;
        Ok(Some(Self(())))
    }

    /// Draws lines in place of those that were there.
    ///
    /// # Errors
    ///
    /// When the terminal is gone.
    pub(super) fn draw(&self, lines: &[String]) -> io::Result<()> {
        let Self(()) = self;
        let lines = lines.join(&format!("{CLEAR_LINE}\r\n"));
        write(&format!("{HOME}{lines}{CLEAR_LINE}{CLEAR_BELOW}"))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nobody sees it if the terminal is gone.
        let _ = write(LEAVE);
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Gives the screen back when a signal ends the process, and ends it with the code
/// that a shell gives to that.
///
/// # Errors
///
/// When signals cannot be waited for.
pub(super) fn leave_on_signals(leave: impl FnOnce() + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("starting the runtime")?;
    let inside = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(inside);
    let wait = move || {
        let number = runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => SignalKind::interrupt(),
                _ = terminate.recv() => SignalKind::terminate(),
                _ = hangup.recv() => SignalKind::hangup(),
            }
        });
        // Held, so that nothing is drawn after it.
        let _out = io::stdout().lock();
        leave();
        process::exit(128 + number.as_raw_value());
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .context("starting a thread")?;
    Ok(())
}
