//! `keepalive-agent policy`: what holds and where it is written; drop-ins by
//! command.

mod drop_in;
mod edit;
mod show;

use std::{
    fmt::Write as _,
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::{ArgGroup, Args, Subcommand};
use tracing::warn;

use super::{ConfigFiles, output};
use crate::{
    assignment::DEFAULT,
    config::{
        CgroupPattern, Config, Diagnostics, Merged, NamedPolicy, Origin, Origins,
        PERMANENT_DIRECTORY, RUNTIME_DIRECTORY,
    },
    datapath,
    enforcing::{Enforcing, enforcing, goes_by},
    identity::{Attribute, NamePattern, Selector},
    names::printable_path,
    rules::{Ports, Remote, Rules},
};
use drop_in::DropIn;
pub(super) use drop_in::{Key, timer};

/// How long a running agent is given to take a change over.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
                  keepalive-agent policy show\n  \
                  keepalive-agent policy set --cgroup /system.slice/redis.service --idle 30s\n  \
                  keepalive-agent policy unset --cgroup /system.slice/redis.service\n  \
                  keepalive-agent policy edit")]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the merged policy, with the file and line of every value
    Show(Show),
    /// Write a drop-in: a policy of its own, or keys of one that exists
    Set(Box<Set>),
    /// Remove the drop-in that `set` wrote
    Unset(Unset),
    /// Open the policy file in an editor, and put it in place if it is right
    Edit(edit::Arguments),
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
                  keepalive-agent policy show\n  \
                  keepalive-agent policy show --agent\n  \
                  keepalive-agent policy show --config my.toml --json")]
struct Show {
    #[command(flatten)]
    files: ConfigFiles,

    /// What is in force, whatever the files say by now
    #[arg(long)]
    agent: bool,

    /// Print one JSON object per policy instead of text for people
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
#[command(
    group(
        ArgGroup::new("which")
            .args(["default", "name", "cgroup", "unit", "container", "namespace", "pod", "remote", "port", "local_port"])
            .required(true)
            .multiple(true)
    ),
    group(
        ArgGroup::new("keys")
            .args(["keepalive", "idle", "interval", "probes", "user_timeout", "give_up", "ignore", "path", "enforce", "no_enforce"])
            .args(["idle_at_least", "idle_at_most", "idle_exactly", "interval_at_least", "interval_at_most", "interval_exactly"])
            .args(["probes_at_least", "probes_at_most", "probes_exactly"])
            .args(["user_timeout_at_least", "user_timeout_at_most", "user_timeout_exactly"])
            .required(true)
            .multiple(true)
    ),
    after_help = "The drop-in is gone with the boot, unless --permanent. Setting the same policy again \
                  keeps the keys that are not mentioned. Values are written as in the config file; \
                  a timer may be a table of bounds.\n\n\
                  Examples:\n  \
                  keepalive-agent policy set --default --idle 60s\n  \
                  keepalive-agent policy set --unit redis.service --idle-at-most 2m\n  \
                  keepalive-agent policy set --container 'db-*' --idle 30s\n  \
                  keepalive-agent policy set --cgroup /kubepods.slice --remote 10.0.0.0/8 --path aws-nat\n  \
                  keepalive-agent policy set --name database --idle '{ default = \"60s\", at-most = \"5m\" }'\n  \
                  keepalive-agent policy set --remote 192.0.2.0/24 --port 5432 --no-enforce"
)]
struct Set {
    /// The policy for what no other one claims
    #[arg(long, conflicts_with_all = ["name", "cgroup", "unit", "container", "namespace", "pod",
                                      "remote", "port", "local_port"])]
    default: bool,

    /// The policy; without it the one for this cgroup and remote end, or a new
    /// one that is named after them
    #[arg(long)]
    name: Option<String>,

    /// The cgroup that it claims: a path such as /system.slice, or a glob
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,

    #[command(flatten)]
    selector: SelectorArguments,

    /// Network of remote ends that it is for; `!` in front excepts one. May be
    /// given more than once
    #[arg(long, value_name = "CIDR")]
    remote: Vec<String>,

    /// Port of the remote end, or a range such as 8000-8999. May be given more
    /// than once
    #[arg(long)]
    port: Vec<String>,

    /// Port of this end, for what is accepted, or a range. May be given more than
    /// once
    #[arg(long, value_name = "PORT")]
    local_port: Vec<String>,

    /// SO_KEEPALIVE: on, always, off, never or leave
    #[arg(long, value_name = "WISH")]
    keepalive: Option<String>,

    /// Silence before the first probe: a time, sysctl or leave
    #[arg(long, value_name = "TIME")]
    idle: Option<String>,

    /// Time between two unanswered probes: a time, sysctl or leave
    #[arg(long, value_name = "TIME")]
    interval: Option<String>,

    /// Unanswered probes after which the peer counts as dead: a number, sysctl or
    /// leave
    #[arg(long, value_name = "COUNT")]
    probes: Option<String>,

    /// How long sent data may stay unacknowledged: a time, derive or leave
    #[arg(long, value_name = "TIME")]
    user_timeout: Option<String>,

    #[command(flatten)]
    bounds: Bounds,

    /// After how long sent data that nobody acknowledges ends the connection: a
    /// time or leave
    #[arg(long, value_name = "TIME")]
    give_up: Option<String>,

    /// Claim connections and leave them alone
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    ignore: Option<bool>,

    /// Path to keep open, which chooses the timers: aws-nat, 350s
    #[arg(long, value_name = "PATH")]
    path: Option<String>,

    /// Decide and count, set nothing
    #[arg(long)]
    no_enforce: bool,

    /// Set what is decided, after --no-enforce
    #[arg(long, conflicts_with = "no_enforce")]
    enforce: bool,

    #[command(flatten)]
    place: Place,
}

/// Bounds of timers, which hold whatever the application sets.
#[derive(Args, Debug)]
#[command(next_help_heading = "Bounds, which hold whatever the application sets")]
struct Bounds {
    /// The shortest idle time
    #[arg(long, value_name = "TIME")]
    idle_at_least: Option<String>,

    /// The longest idle time
    #[arg(long, value_name = "TIME")]
    idle_at_most: Option<String>,

    /// The one idle time
    #[arg(long, value_name = "TIME", conflicts_with_all = ["idle", "idle_at_least", "idle_at_most"])]
    idle_exactly: Option<String>,

    /// The shortest interval
    #[arg(long, value_name = "TIME")]
    interval_at_least: Option<String>,

    /// The longest interval
    #[arg(long, value_name = "TIME")]
    interval_at_most: Option<String>,

    /// The one interval
    #[arg(long, value_name = "TIME",
          conflicts_with_all = ["interval", "interval_at_least", "interval_at_most"])]
    interval_exactly: Option<String>,

    /// The fewest probes
    #[arg(long, value_name = "COUNT")]
    probes_at_least: Option<String>,

    /// The most probes
    #[arg(long, value_name = "COUNT")]
    probes_at_most: Option<String>,

    /// The one number of probes
    #[arg(long, value_name = "COUNT",
          conflicts_with_all = ["probes", "probes_at_least", "probes_at_most"])]
    probes_exactly: Option<String>,

    /// The shortest user-timeout: a time or derive
    #[arg(long, value_name = "TIME")]
    user_timeout_at_least: Option<String>,

    /// The longest user-timeout
    #[arg(long, value_name = "TIME")]
    user_timeout_at_most: Option<String>,

    /// The one user-timeout
    #[arg(long, value_name = "TIME",
          conflicts_with_all = ["user_timeout", "user_timeout_at_least", "user_timeout_at_most"])]
    user_timeout_exactly: Option<String>,
}

impl Bounds {
    /// Those of a timer, by their keys.
    fn of(&self, key: Key) -> impl Iterator<Item = (&'static str, &str)> {
        let [at_least, at_most, exactly] = match key {
            Key::Idle => [&self.idle_at_least, &self.idle_at_most, &self.idle_exactly],
            Key::Interval => [
                &self.interval_at_least,
                &self.interval_at_most,
                &self.interval_exactly,
            ],
            Key::Probes => [
                &self.probes_at_least,
                &self.probes_at_most,
                &self.probes_exactly,
            ],
            Key::UserTimeout => [
                &self.user_timeout_at_least,
                &self.user_timeout_at_most,
                &self.user_timeout_exactly,
            ],
            _ => [&None; 3],
        };
        [
            ("at-least", at_least),
            ("at-most", at_most),
            (drop_in::EXACTLY, exactly),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value.as_deref()?)))
    }
}

/// What the cgroup has to be that the policy claims.
#[derive(Args, Debug)]
struct SelectorArguments {
    /// The unit of systemd that it claims: a name such as redis.service, or a glob
    #[arg(long, value_name = "NAME", conflicts_with = "cgroup")]
    unit: Option<String>,

    /// The container that it claims: a name, or a glob
    #[arg(long, value_name = "NAME", conflicts_with = "cgroup")]
    container: Option<String>,

    /// The Kubernetes namespace of the pods that it claims: a name, or a glob
    #[arg(long, value_name = "NAME", conflicts_with = "cgroup")]
    namespace: Option<String>,

    /// The pod that it claims: a name, or a glob
    #[arg(long, value_name = "NAME", conflicts_with = "cgroup")]
    pod: Option<String>,
}

impl SelectorArguments {
    fn all(&self) -> impl Iterator<Item = (Attribute, &str)> {
        [
            (Attribute::Unit, &self.unit),
            (Attribute::Container, &self.container),
            (Attribute::Namespace, &self.namespace),
            (Attribute::Pod, &self.pod),
        ]
        .into_iter()
        .filter_map(|(attribute, value)| Some((attribute, value.as_deref()?)))
    }

    fn selector(&self) -> Result<Selector> {
        let pattern = |(attribute, text): (Attribute, &str)| {
            let pattern = NamePattern::new(text)
                .map_err(anyhow::Error::msg)
                .with_context(|| format!("--{} {text}", attribute.key()))?;
            anyhow::Ok((attribute, vec![pattern]))
        };
        Ok(Selector {
            attributes: self.all().map(pattern).collect::<Result<_>>()?,
            ..Selector::default()
        })
    }
}

#[derive(Args, Debug)]
#[command(
    group(ArgGroup::new("which").args(["default", "name", "cgroup"]).required(true)),
    after_help = "Examples:\n  \
                  keepalive-agent policy unset --default\n  \
                  keepalive-agent policy unset database\n  \
                  keepalive-agent policy unset --cgroup /system.slice/redis.service"
)]
struct Unset {
    /// The policy for what no other one claims
    #[arg(long)]
    default: bool,

    /// The policy
    name: Option<String>,

    /// The cgroup that it claims
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,

    #[command(flatten)]
    place: Place,
}

/// Where drop-ins are written.
#[derive(Args, Debug)]
struct Place {
    /// In /etc/keepalive/conf.d instead of /run/keepalive/conf.d
    #[arg(long, conflicts_with_all = ["config", "drop_in_dir"])]
    permanent: bool,

    #[command(flatten)]
    files: ConfigFiles,
}

impl Place {
    /// The directory, and what names of drop-ins there start with: those that
    /// are gone with the boot come after those that stay.
    fn directory(&self) -> Result<(PathBuf, &'static str)> {
        if self.permanent {
            return Ok((PERMANENT_DIRECTORY.into(), drop_in::PERMANENT));
        }
        match (self.files.drop_in_dir.last(), &self.files.config) {
            (Some(directory), _) => Ok((directory.clone(), drop_in::RUNTIME)),
            (None, None) => Ok((RUNTIME_DIRECTORY.into(), drop_in::RUNTIME)),
            (None, Some(file)) => bail!(
                "with --config only {} is read: name a directory of drop-ins with --drop-in-dir",
                printable_path(file)
            ),
        }
    }

    fn drop_in(&self, name: &str) -> Result<DropIn> {
        let (directory, prefix) = self.directory()?;
        DropIn::new(&directory, prefix, name)
    }

    fn read(&self) -> Result<Merged> {
        let read = self.files.sources().read();
        read.context("nothing is changed, because something is wrong already")
    }
}

pub(super) fn policy(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.command {
        Command::Show(arguments) => show::show(arguments),
        Command::Set(arguments) => set(arguments),
        Command::Unset(arguments) => unset(arguments),
        Command::Edit(arguments) => edit::edit(arguments),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn set(arguments: &Set) -> Result<()> {
    let place = &arguments.place;
    let before = place.read()?;
    let name = arguments.name_in(&before)?;
    let drop_in = place.drop_in(&name)?;
    let earlier = drop_in.keys()?;
    let mut keys = earlier.clone().unwrap_or_default();
    if name != DEFAULT {
        keys.insert(Key::Name, toml::Value::String(name.clone()));
    }
    keys.extend(arguments.keys(&keys)?);
    let text = drop_in::render(&keys);

    let sources = place.files.sources();
    let after = sources
        .read_as_if(drop_in.path(), Some(&text))
        .map_err(|errors| drop_in.as_arguments(errors))
        .context("nothing is written")?;
    for warning in &after.warnings.0 {
        warn!("{warning}");
    }
    let origins = origins_of(&after, &name).context("another file takes this drop-in out")?;
    let agents = Agents::find();
    drop_in.write(&text)?;
    output::text(format_args!("wrote {}\n", printable_path(drop_in.path())))?;
    for key in keys.keys() {
        let from = key.origin(origins);
        if let Some(other) = from.filter(|place| *place.file != *drop_in.path()) {
            output::text(format_args!(
                "but {}, which is read after it, has the last word on {}\n",
                other,
                key.name()
            ))?;
        }
    }
    let earlier = earlier.as_ref().map(drop_in::render);
    agents
        .report(Some(&before.config), &after.config)
        .or_else(|refused| drop_in::put_back([(drop_in.path(), earlier.as_deref())], refused))
}

fn unset(arguments: &Unset) -> Result<()> {
    let place = &arguments.place;
    let name = match (&arguments.name, &arguments.cgroup) {
        _ if arguments.default => DEFAULT.to_owned(),
        (Some(name), _) => name.clone(),
        (None, Some(cgroup)) => only_one_for(cgroup, &place.read()?)?,
        (None, None) => bail!("name a policy"),
    };
    let runtime = DropIn::new(RUNTIME_DIRECTORY.as_ref(), drop_in::RUNTIME, &name)?;
    let permanent = DropIn::new(PERMANENT_DIRECTORY.as_ref(), drop_in::PERMANENT, &name)?;
    let mut candidates = vec![place.drop_in(&name)?];
    if place.permanent {
        candidates.push(runtime);
    }
    let mut ours = Vec::new();
    for candidate in candidates {
        if let Some(keys) = candidate.keys()? {
            ours.push((candidate, drop_in::render(&keys)));
        }
    }

    let sources = place.files.sources();
    let before = sources.read();
    if ours.is_empty() {
        let read_by_default = place.files.config.is_none() && place.files.drop_in_dir.is_empty();
        if read_by_default && permanent.keys()?.is_some() {
            bail!(
                "policy {name} is set in {}: remove it with --permanent",
                printable_path(permanent.path())
            );
        }
        let before = before.context("nothing is changed, because something is wrong already")?;
        let origins = origins_of(&before, &name)
            .with_context(|| format!("there is no policy {name} in {}", files(&before)))?;
        let lines = lines_of(origins).join(", ");
        bail!("policy {name} is not from a drop-in of `policy set`; edit it where it is: {lines}");
    }
    let mut after = None;
    let agents = Agents::find();
    for (drop_in, _) in &ours {
        let without = sources.read_as_if(drop_in.path(), None);
        match (&before, without) {
            (Ok(_), Err(errors)) => {
                return Err(errors).with_context(|| {
                    let path = printable_path(drop_in.path());
                    format!("nothing is changed: without {path} the config would be wrong")
                });
            }
            (_, without) => after = without.ok(),
        }
        drop_in.remove()?;
        output::text(format_args!("removed {}\n", printable_path(drop_in.path())))?;
    }
    let Some(after) = after else {
        warn!("something else is wrong in the config; see `keepalive-agent policy show`");
        return Ok(());
    };
    if let Some(origins) = origins_of(&after, &name) {
        let lines = lines_of(origins);
        let lines = if lines.is_empty() {
            "built in".to_owned()
        } else {
            format!("in {}", lines.join(", "))
        };
        output::text(format_args!("policy {name} is still {lines}\n"))?;
    }
    let before = before.as_ref().ok().map(|before| &before.config);
    agents.report(before, &after.config).or_else(|refused| {
        let ours = ours.iter();
        drop_in::put_back(
            ours.map(|(drop_in, text)| (drop_in.path(), Some(&**text))),
            refused,
        )
    })
}

impl Set {
    /// What is mentioned. A bound is added to what a timer had before.
    fn keys(&self, before: &drop_in::Keys) -> Result<Vec<(Key, toml::Value)>> {
        let text = |text: &String| Ok(toml::Value::String(text.clone()));
        let mut keys = Vec::new();
        let mut add = |key, value: Option<Result<toml::Value>>| {
            keys.extend(value.transpose()?.map(|value| (key, value)));
            anyhow::Ok(())
        };
        let list =
            |values: Vec<toml::Value>| (!values.is_empty()).then(|| Ok(toml::Value::Array(values)));
        let remotes = self.remote.iter().map(String::as_str);
        let ports = |ports: &[String]| {
            list(
                ports
                    .iter()
                    .map(|port| drop_in::number_or_text(port))
                    .collect(),
            )
        };
        add(Key::Cgroup, self.cgroup.as_ref().map(text))?;
        for (attribute, value) in self.selector.all() {
            add(Key::Of(attribute), Some(Ok(value.into())))?;
        }
        add(Key::Remote, list(remotes.map(toml::Value::from).collect()))?;
        add(Key::Port, ports(&self.port))?;
        add(Key::LocalPort, ports(&self.local_port))?;
        add(Key::Keepalive, self.keepalive.as_ref().map(text))?;
        for (key, value) in [
            (Key::Idle, &self.idle),
            (Key::Interval, &self.interval),
            (Key::Probes, &self.probes),
            (Key::UserTimeout, &self.user_timeout),
        ] {
            let value = value.as_deref().map(|value| timer(key, value));
            let bounds: Vec<_> = self.bounds.of(key).collect();
            let value = if bounds.is_empty() {
                value
            } else {
                let default = value.transpose()?.or_else(|| before.get(&key).cloned());
                Some(Ok(drop_in::bounded(key, default, &bounds)))
            };
            add(key, value)?;
        }
        add(Key::GiveUp, self.give_up.as_ref().map(text))?;
        add(
            Key::Ignore,
            self.ignore.map(|ignore| Ok(toml::Value::Boolean(ignore))),
        )?;
        let enforce = (self.enforce || self.no_enforce).then_some(self.enforce);
        add(
            Key::Enforce,
            enforce.map(|enforce| Ok(toml::Value::Boolean(enforce))),
        )?;
        add(Key::Path, self.path.as_ref().map(text))?;
        Ok(keys)
    }

    /// The policy that is meant: by its name, or by what it is for.
    fn name_in(&self, merged: &Merged) -> Result<String> {
        if self.default {
            return Ok(DEFAULT.to_owned());
        }
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let rules = Rules {
            remotes: parsed::<Remote>("--remote", &self.remote)?,
            ports: parsed::<Ports>("--port", &self.port)?,
            local_ports: parsed::<Ports>("--local-port", &self.local_port)?,
        };
        let cgroup = self.cgroup.as_deref().map(pattern).transpose()?;
        let selector = self.selector.selector()?;
        let same: Vec<_> = named(merged)
            .filter(|(named, _)| {
                same_rules(&named.rules, &rules)
                    && named.selector == selector
                    && match &cgroup {
                        Some(cgroup) => named.cgroups.contains(cgroup),
                        None => named.cgroups.is_empty(),
                    }
            })
            .collect();
        if let Some((named, origins)) = same.first() {
            if named.cgroups.len() <= 1 {
                return Ok(named.name.clone());
            }
            bail!(
                "policy {name} ({at}) claims this cgroup together with others, and the first policy \
                 of a cgroup counts; change it for all of them with --name {quoted}, or take the \
                 cgroup out there",
                name = named.name,
                at = origins.table,
                quoted = quoted(&named.name),
            );
        }
        let selects = self.selector.all().map(|(_, value)| value);
        let claims = self.cgroup.as_deref().into_iter().chain(selects);
        let name = derived_name(claims, &self.remote, &self.port, &self.local_port);
        if let Some(origins) = origins_of(merged, &name) {
            bail!(
                "there is a policy {name} for something else ({}); choose a name with --name",
                origins.table
            );
        }
        Ok(name)
    }
}

/// What a policy is called that nobody named: by what it is for.
fn derived_name<'a>(
    claims: impl IntoIterator<Item = &'a str>,
    remotes: &'a [String],
    ports: &'a [String],
    local_ports: &'a [String],
) -> String {
    let claims = claims
        .into_iter()
        .map(|claim| match claim.trim_matches('/') {
            "" => "/",
            path => path,
        });
    let remote_ends = remotes.iter().chain(ports).map(String::as_str);
    let local_ports = local_ports.iter().flat_map(|port| ["local", port.as_str()]);
    let words: Vec<_> = claims.chain(remote_ends).chain(local_ports).collect();
    words.join(" ")
}

fn parsed<T: std::str::FromStr<Err = String>>(option: &str, texts: &[String]) -> Result<Vec<T>> {
    let parse = |text: &String| {
        let value = text.parse().map_err(anyhow::Error::msg);
        value.with_context(|| format!("{option} {text}"))
    };
    texts.iter().map(parse).collect()
}

fn pattern(text: &str) -> Result<CgroupPattern> {
    CgroupPattern::new(text)
        .map_err(anyhow::Error::msg)
        .with_context(|| format!("--cgroup {text}"))
}

/// Whether rules are for the same remote ends, in whatever order.
fn same_rules(one: &Rules, other: &Rules) -> bool {
    fn same<T: PartialEq>(one: &[T], other: &[T]) -> bool {
        one.len() == other.len() && one.iter().all(|item| other.contains(item))
    }
    same(&one.remotes, &other.remotes)
        && same(&one.ports, &other.ports)
        && same(&one.local_ports, &other.local_ports)
}

/// The one policy for a cgroup.
fn only_one_for(cgroup: &str, merged: &Merged) -> Result<String> {
    let pattern = [pattern(cgroup)?];
    let names: Vec<_> = named(merged)
        .filter(|(named, _)| named.cgroups == pattern)
        .map(|(named, _)| named.name.as_str())
        .collect();
    match names[..] {
        [] => bail!(
            "there is no policy for cgroup {cgroup} in {}",
            files(merged)
        ),
        [name] => Ok(name.to_owned()),
        _ => bail!(
            "there are several policies for cgroup {cgroup}; name one of them: {}",
            names.join(", ")
        ),
    }
}

fn named(merged: &Merged) -> impl Iterator<Item = (&NamedPolicy, &Origins)> {
    merged.config.policies.iter().zip(&merged.origins.policies)
}

/// Where the values of a policy are from, if there is one of this name.
fn origins_of<'a>(merged: &'a Merged, name: &str) -> Option<&'a Origins> {
    if name == DEFAULT {
        return merged.origins.default.as_ref();
    }
    let mut named = named(merged);
    let (_, origins) = named.find(|(named, _)| named.name == name)?;
    Some(origins)
}

/// Every line that a policy is made of, in no more than one place per file.
fn lines_of(origins: &Origins) -> Vec<String> {
    let mut places: Vec<_> = Key::ALL
        .iter()
        .filter_map(|key| key.origin(origins))
        .chain(origins.table.place())
        .collect();
    places.sort_by_key(|place| (&place.file, place.line));
    places.dedup_by_key(|place| &place.file);
    places.iter().map(ToString::to_string).collect()
}

/// The files of a config, for a message.
fn files(merged: &Merged) -> String {
    let main = merged.main.iter();
    let files: Vec<_> = main
        .chain(&merged.drop_ins)
        .map(|file| printable_path(file).to_string())
        .collect();
    if files.is_empty() {
        "the built-in policy".to_owned()
    } else {
        files.join(", ")
    }
}

/// A word of a shell command.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
    if word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The agents that run, and what they enforced before a change.
struct Agents {
    before: Result<Vec<Enforcing>, datapath::Error>,
}

impl Agents {
    fn find() -> Self {
        Self {
            before: enforcing(),
        }
    }

    /// Waits for those to take a change over that went by the config before it,
    /// and says what became of each. One that does not is an error.
    fn report(self, before: Option<&Config>, after: &Config) -> Result<()> {
        let agents = match self.before {
            Ok(agents) => agents,
            Err(error) => {
                warn!("cannot tell which agents run: {error:#}");
                return Ok(());
            }
        };
        let end = Instant::now() + PATIENCE;
        let now = loop {
            let mut now = enforcing()?;
            now.retain(|now| agents.iter().any(|agent| agent.agent == now.agent));
            let waits = |now: &Enforcing| {
                // One that has refused it, after it was written, will not change its mind.
                let refuses =
                    now.error.is_some() && !agents.iter().any(|agent| agent.error == now.error);
                before.is_some_and(|before| goes_by(now, before)) && !refuses
            };
            let waiting = now.iter().any(|now| waits(now) && !goes_by(now, after));
            // One that is just going over to another set is seen by neither.
            let is_seen = |agent: &Enforcing| now.iter().any(|now| now.agent == agent.agent);
            let waiting = waiting || !agents.iter().all(is_seen);
            if !waiting || Instant::now() > end {
                break now;
            }
            thread::sleep(PATIENCE / 100);
        };
        if now.is_empty() {
            return output::text("no agent is running\n");
        }
        let mut text = String::new();
        let mut refused = Vec::new();
        for agent in now {
            let name = agent.name();
            if goes_by(&agent, after) {
                writeln!(text, "{name} has taken it over")?;
            } else if before.is_some_and(|before| goes_by(&agent, before)) {
                let why = match agent.error {
                    Some(error) => error,
                    None => "see its log".to_owned(),
                };
                refused.push(format!("{name} has not taken it over: {why}"));
            } else {
                writeln!(text, "{name} goes by another config")?;
            }
        }
        output::text(text)?;
        if !refused.is_empty() {
            bail!(refused.join("\n  "));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_what_a_policy_is_for() {
        let name = |cgroup: Option<&str>, remotes: &[&str], ports: &[&str]| {
            let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
            derived_name(cgroup, &owned(remotes), &owned(ports), &[])
        };
        let local = ["22".to_owned()];
        assert_eq!(derived_name(None, &[], &[], &local), "local 22");
        assert_eq!(
            name(Some("/a.slice/b.service/"), &[], &[]),
            "a.slice/b.service"
        );
        assert_eq!(name(Some("/"), &[], &[]), "/");
        assert_eq!(
            name(Some("/a"), &["10.0.0.0/8", "!10.1.0.0/16"], &["443"]),
            "a 10.0.0.0/8 !10.1.0.0/16 443"
        );
        assert_eq!(name(None, &[], &["8000-8999"]), "8000-8999");
    }

    #[test]
    fn what_a_person_is_to_copy_is_quoted() {
        assert_eq!(quoted("a.slice/b-1"), "a.slice/b-1");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
