//! Keys: what a policy can say, each described once. The reader knows keys by this
//! table, and so does whoever writes policies in another form than TOML.

use keepalive_common::policy::Keepalive;

use super::timer::{TABLE_KEYS, Timer};

/// A key of a policy.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// What its value looks like.
    pub form: Form,
    /// What it is for, in one line.
    pub about: &'static str,
}

/// What a value looks like.
#[derive(Clone, Copy, Debug)]
pub enum Form {
    /// A text.
    Text,
    /// A text, or a list of texts that is not empty.
    Texts,
    /// A table of texts.
    Labels,
    /// A port from 1 to 65535, a text such as `8000-8999`, or a list of both that
    /// is not empty.
    Ports,
    /// One of the words of [`WISHES`].
    Wish,
    /// True or false.
    Truth,
    /// The name of a path, or a duration.
    Path,
    /// A duration, or `leave`.
    GiveUp,
    /// A value or a table of bounds, see [`TimerForm`].
    Timer(TimerForm),
}

/// What a timer looks like: a value, a word for a default, or a table of these.
#[derive(Clone, Copy, Debug)]
pub struct TimerForm(pub(super) Timer);

impl TimerForm {
    /// The range of a number; none where values are durations.
    #[must_use]
    pub fn numbers(self) -> Option<(u32, u32)> {
        (self.0 == Timer::Probes).then(|| self.0.bounds())
    }

    /// The words that stand for a default.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        let words = ["leave", "sysctl", "derive"];
        words
            .into_iter()
            .filter(move |word| self.0.word(word).is_some())
    }

    /// The keys of the table, each with the words that may stand there.
    pub fn keys(self) -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
        TABLE_KEYS.into_iter().map(move |key| {
            let words = match key {
                "default" => self.words().collect(),
                "at-least" if self.0 == Timer::UserTimeout => vec!["derive"],
                _ => Vec::new(),
            };
            (key, words)
        })
    }
}

/// What can be wished of SO_KEEPALIVE.
pub const WISHES: [(&str, Keepalive); 5] = [
    ("on", Keepalive::On),
    ("always", Keepalive::Always),
    ("off", Keepalive::Off),
    ("never", Keepalive::Never),
    ("leave", Keepalive::Leave),
];

/// What only a `[[policy]]` understands: its name, and what it is for.
pub const CLAIM: [Key; 11] = [
    key("name", Form::Text, "What the policy is called"),
    key("cgroup", Form::Texts, "Paths of cgroups, or globs"),
    key("unit", Form::Texts, "Names of systemd's units, or globs"),
    key(
        "container",
        Form::Texts,
        "Names of containers, or globs; in a pod the names within it",
    ),
    key(
        "image",
        Form::Texts,
        "Images as the runtime keeps them, or globs",
    ),
    key("label", Form::Labels, "Labels that the container must have"),
    key(
        "namespace",
        Form::Texts,
        "Kubernetes namespaces of pods, or globs",
    ),
    key("pod", Form::Texts, "Names of pods, or globs"),
    key(
        "remote",
        Form::Texts,
        "Networks of the remote ends, such as 10.0.0.0/8; ! is an exception",
    ),
    key(
        "port",
        Form::Ports,
        "Ports of the remote end, such as 5432 or 8000-8999",
    ),
    key("local-port", Form::Ports, "Ports of this end"),
];

/// What every policy understands: what should hold.
pub const POLICY: [Key; 9] = [
    key(
        "keepalive",
        Form::Wish,
        "SO_KEEPALIVE; always and never hold whatever the application does",
    ),
    key(
        "idle",
        timer(Timer::Idle),
        "TCP_KEEPIDLE: silence before the first probe",
    ),
    key(
        "interval",
        timer(Timer::Interval),
        "TCP_KEEPINTVL: time between two unanswered probes",
    ),
    key(
        "probes",
        timer(Timer::Probes),
        "TCP_KEEPCNT: unanswered probes after which the peer counts as dead",
    ),
    key(
        "user-timeout",
        timer(Timer::UserTimeout),
        "TCP_USER_TIMEOUT: how long sent data, or a probe, may stay unacknowledged",
    ),
    key(
        "give-up",
        Form::GiveUp,
        "After how long data that nobody acknowledges ends the connection",
    ),
    key(
        "enforce",
        Form::Truth,
        "false: everything is decided and counted, nothing is set",
    ),
    key(
        "ignore",
        Form::Truth,
        "true: connections are claimed and not touched at all",
    ),
    key(
        "path",
        Form::Path,
        "What connections pass, or after how much silence it forgets them: chooses idle, interval and probes",
    ),
];

const fn key(name: &'static str, form: Form, about: &'static str) -> Key {
    Key { name, form, about }
}

const fn timer(timer: Timer) -> Form {
    Form::Timer(TimerForm(timer))
}
