//! Durations as people write and read them: `90s`, `4m 10s`.

use std::time::Duration;

/// How a duration is shown: `4m 10s`, `1h`, `500ms`.
#[must_use]
pub fn show(duration: Duration) -> String {
    if duration.is_zero() {
        return "0s".to_owned();
    }
    humantime::format_duration(duration).to_string()
}

/// A number of seconds, shown.
#[must_use]
pub fn show_seconds(seconds: u32) -> String {
    show(Duration::from_secs(seconds.into()))
}

/// A number of milliseconds, shown.
#[must_use]
pub fn show_milliseconds(milliseconds: u32) -> String {
    show(Duration::from_millis(milliseconds.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_at_a_glance() {
        assert_eq!(show_seconds(0), "0s");
        assert_eq!(show_seconds(250), "4m 10s");
        assert_eq!(show_seconds(3600), "1h");
        assert_eq!(show_milliseconds(1500), "1s 500ms");
    }
}
