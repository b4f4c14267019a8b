//! How connections are written: rows for people, JSON lines for machines.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    io::{self, Write},
    net::IpAddr,
    time::Duration,
};

use keepalive_common::plan::Options;
use serde::Serialize;

use super::{
    Connection,
    cgroups::Known,
    columns::{self, Column},
    forecast::Noticed,
    source::{Setting, SettingsRecord, Source},
    summary::Summary,
};
use crate::{
    duration,
    hierarchy::CgroupPath,
    identity::{Identity, Runtime},
    names::{printable, to_json, write_json},
    paths::IdleTimeout,
};

/// The columns of [`summary_row`].
pub const SUMMARY_HEADER: [&str; 7] = [
    "CGROUP", "TOTAL", "ON", "OFF", "MIN IDLE", "MAX IDLE", "AT RISK",
];

/// What stands where nothing does.
const NONE: &str = "-";

/// Between what is and what would be.
const ARROW: &str = " → ";

/// Between what the application asked for and what a bound made of it.
const HELD: &str = "⇥";

/// A cgroup without a path.
const GONE: &str = "(gone)";

/// Instead of a process.
const KERNEL: &str = "(kernel)";

/// A connection as the cells of a row, in the order of [`Column::ALL`].
#[must_use]
pub fn row(connection: &Connection<'_>) -> [String; columns::COUNT] {
    let settings = &connection.settings;
    let has = connection.record.options();
    let would = connection.would.unwrap_or(has);
    // While keepalive is off its timers do nothing.
    let timer = |setting: Setting<u32>, has: u32, would_be: u32, show: fn(u32) -> String| {
        let shown = if settings.keepalive.value {
            marked(setting, show)
        } else {
            NONE.to_owned()
        };
        changing(
            shown,
            (would.keepalive && would_be != has).then(|| show(would_be)),
        )
    };
    let keepalive = changing(
        marked(settings.keepalive, on_or_off),
        (would.keepalive != has.keepalive).then(|| on_or_off(would.keepalive)),
    );
    let milliseconds = |set: u32| match set {
        0 => NONE.to_owned(),
        set => compact(Duration::from_millis(set.into())),
    };
    let user_timeout = match settings.user_timeout.value {
        0 => NONE.to_owned(),
        _ => marked(settings.user_timeout, milliseconds),
    };
    let user_timeout = changing(
        user_timeout,
        (would.user_timeout != has.user_timeout).then(|| milliseconds(would.user_timeout)),
    );
    [
        printable(&connection.netns.name).to_string(),
        location(connection),
        process(connection),
        connection.record.local().to_string(),
        connection.record.remote().to_string(),
        keepalive,
        timer(settings.idle, has.idle, would.idle, seconds),
        timer(settings.interval, has.interval, would.interval, seconds),
        timer(settings.probes, has.probes, would.probes, |probes| {
            probes.to_string()
        }),
        user_timeout,
        connection
            .forecast
            .next_probe
            .map_or_else(|| NONE.to_owned(), rounded),
        match connection.forecast.noticed {
            Noticed::After(milliseconds) => rounded(milliseconds),
            Noticed::Retransmitting(milliseconds) => format!("data {}", rounded(milliseconds)),
            Noticed::Never => "never".to_owned(),
        },
        connection
            .policy
            .map_or(NONE, |policy| policy.name.as_str())
            .to_owned(),
        path(connection),
    ]
}

fn on_or_off(on: bool) -> String {
    if on { "on" } else { "off" }.to_owned()
}

/// A cell, and what would stand in it.
fn changing(shown: String, would_be: Option<String>) -> String {
    match would_be {
        Some(would_be) => format!("{shown}{ARROW}{would_be}"),
        None => shown,
    }
}

/// A value with the letter of its source, and what the application asked for before
/// it, where that is something else.
fn marked<T: Copy>(setting: Setting<T>, show: impl Fn(T) -> String) -> String {
    let asked = setting
        .asked
        .map_or_else(String::new, |asked| show(asked) + HELD);
    format!("{asked}{} {}", show(setting.value), letter(setting.source))
}

const fn letter(source: Source) -> char {
    match source {
        Source::App => 'a',
        Source::Policy => 'p',
        Source::PolicyBound => 'b',
        Source::Sysctl => 's',
        Source::UserTimeout => 'u',
        Source::Kernel => 'k',
    }
}

/// What the letters, words and signs in some cells mean.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is something that was shown or not"
)]
#[derive(Clone, Debug, Default)]
pub struct Legend {
    letters: BTreeSet<char>,
    has_arrow: bool,
    has_off_by_application: bool,
    has_held: bool,
    has_gone: bool,
    has_kernel: bool,
    has_noticed: bool,
}

impl Legend {
    /// Takes in a cell that is shown.
    pub fn add(&mut self, column: Column, cell: &str) {
        match column {
            Column::Keepalive
            | Column::Idle
            | Column::Interval
            | Column::Probes
            | Column::UserTimeout => {
                let (now, would) = cell
                    .split_once(ARROW)
                    .map_or((cell, false), |(now, _)| (now, true));
                self.has_arrow |= would;
                self.has_off_by_application |= now == "off a";
                self.has_held |= now.contains(HELD);
                if let Some((_, letter)) = now.rsplit_once(' ') {
                    self.letters.extend(letter.chars());
                }
            }
            Column::Where => self.has_gone |= cell.starts_with(GONE),
            Column::Process => self.has_kernel |= cell == KERNEL,
            Column::Noticed => self.has_noticed = true,
            _ => {}
        }
    }

    /// The sentences, each a line.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let words = [
            (Source::App, "the application"),
            (Source::Policy, "the policy"),
            (Source::PolicyBound, "a bound of the policy"),
            (Source::Sysctl, "a sysctl of the namespace"),
            (
                Source::UserTimeout,
                "nobody (the application's user-timeout would end it too early)",
            ),
            (Source::Kernel, "nobody (the kernel's default)"),
        ];
        let meanings: Vec<_> = words
            .into_iter()
            .filter(|(source, _)| self.letters.contains(&letter(*source)))
            .map(|(source, words)| format!("{} {words}", letter(source)))
            .collect();
        if !meanings.is_empty() {
            lines.push(format!("set by: {}", meanings.join(", ")));
        }
        for (is_shown, line) in [
            (
                self.has_noticed,
                "noticed: when it would be found out that the peer is dead from now on",
            ),
            (
                self.has_off_by_application,
                "off a: turned off by the application, or by MPTCP, which has subflows that join \
                 take over what the application has set on the whole",
            ),
            (
                self.has_held,
                "2h⇥5m: the application asked for 2h and is held to 5m",
            ),
            (
                self.has_arrow,
                "→ what the policy would set, were it not in dry run",
            ),
            (
                self.has_gone,
                "(gone): the cgroup was removed or is out of sight; the root's policies count",
            ),
            (
                self.has_kernel,
                "(kernel): no process holds it, such as a mounted NFS or NVMe/TCP",
            ),
        ] {
            if is_shown {
                lines.push(line.to_owned());
            }
        }
        lines
    }
}

/// The path of its cgroup.
fn path(connection: &Connection<'_>) -> String {
    let cgroup = connection.cgroup.map(|cgroup| cgroup.path.to_string());
    cgroup.unwrap_or_else(|| NONE.to_owned())
}

/// The container, pod or unit where there is one, else the path of the cgroup.
fn location(connection: &Connection<'_>) -> String {
    let Some(cgroup) = connection.cgroup else {
        return match connection.record.cgroup {
            0 => NONE.to_owned(),
            id => format!("{GONE} {id}"),
        };
    };
    let known = cgroup.identity().filter(|identity| identity.is_known());
    known.map_or_else(|| cgroup.path.to_string(), Identity::to_string)
}

/// `nginx/1234`, and how many more hold it.
fn process(connection: &Connection<'_>) -> String {
    let Some(holder) = connection.holder else {
        let is_kernels = is_kernels(connection);
        return if is_kernels { KERNEL } else { NONE }.to_owned();
    };
    let first = format!("{}/{}", printable(holder.comm), holder.pid);
    match holder.count {
        0 | 1 => first,
        count => format!("{first} +{}", count - 1),
    }
}

/// Whether it looks like a connection of the kernel itself: sockets of NFS, NVMe/TCP
/// and their like belong to the root's cgroup and to root, whoever mounted, and no
/// process has a descriptor of them.
fn is_kernels(connection: &Connection<'_>) -> bool {
    let of_root = connection.cgroup.is_some_and(|own| own.path.depth() == 0);
    connection.is_held_by_nobody && of_root && connection.record.uid == 0
}

/// `4m10s`: a column has no room for spaces.
fn compact(time: Duration) -> String {
    duration::show(time).replace(' ', "")
}

fn seconds(seconds: u32) -> String {
    compact(Duration::from_secs(seconds.into()))
}

/// Milliseconds in whole seconds, for what passes anyway.
fn rounded(milliseconds: u64) -> String {
    compact(Duration::from_secs(milliseconds / 1000))
}

/// A connection as a line of JSON. The names are documented in docs/sockets.md
/// and stay.
#[derive(Serialize)]
struct Line<'a> {
    netns: &'a str,
    netns_id: u64,
    cgroup: Option<&'a CgroupPath>,
    cgroup_id: u64,
    #[serde(flatten)]
    identity: IdentityRecord<'a>,
    pid: Option<u32>,
    comm: Option<Cow<'a, str>>,
    holders: u32,
    kernel: bool,
    uid: u32,
    inode: u64,
    state: &'static str,
    local_address: IpAddr,
    local_port: u16,
    remote_address: IpAddr,
    remote_port: u16,
    policy: Option<&'a str>,
    #[serde(flatten)]
    settings: SettingsRecord,
    silent_ms: i64,
    next_probe_ms: Option<u64>,
    noticed_ms: Option<u64>,
    noticed_by: &'static str,
    would: Option<Would>,
}

/// What a cgroup is, for machines; null what is not known, or not so.
#[derive(Serialize)]
pub struct IdentityRecord<'a> {
    unit: Option<&'a str>,
    container: Option<&'a str>,
    container_name: Option<&'a str>,
    runtime: Option<Runtime>,
    image: Option<&'a str>,
    namespace: Option<&'a str>,
    pod: Option<&'a str>,
    pod_uid: Option<&'a str>,
}

impl<'a> IdentityRecord<'a> {
    /// Of an identity, if anything is known.
    #[must_use]
    pub fn new(identity: Option<&'a Identity>) -> Self {
        let names = identity.map(|identity| &*identity.names);
        Self {
            unit: identity.and_then(|identity| identity.unit.as_deref()),
            container: identity.and_then(|identity| identity.container.as_deref()),
            container_name: names.and_then(|names| names.name.as_deref()),
            runtime: identity.and_then(|identity| identity.runtime),
            image: names.and_then(|names| names.image.as_deref()),
            namespace: names.and_then(|names| names.namespace.as_deref()),
            pod: names.and_then(|names| names.pod.as_deref()),
            pod_uid: identity.and_then(|identity| identity.pod_uid.as_deref()),
        }
    }
}

/// What a policy in dry run would make of a connection; a timer is null that
/// stays unset.
#[derive(Serialize)]
struct Would {
    keepalive: bool,
    idle_s: Option<u32>,
    interval_s: Option<u32>,
    probes: Option<u32>,
    user_timeout_ms: Option<u32>,
    rto_max_ms: Option<u32>,
}

impl From<Options> for Would {
    fn from(wants: Options) -> Self {
        let set = |timer: u32| Some(timer).filter(|timer| *timer != 0);
        Self {
            keepalive: wants.keepalive,
            idle_s: set(wants.idle),
            interval_s: set(wants.interval),
            probes: set(wants.probes),
            user_timeout_ms: set(wants.user_timeout),
            rto_max_ms: set(wants.rto_max),
        }
    }
}

/// Writes a connection as a line of JSON.
///
/// # Errors
///
/// When it cannot be written.
pub fn json_line(connection: &Connection<'_>, out: &mut impl Write) -> io::Result<()> {
    let Connection {
        netns,
        record,
        cgroup,
        policy,
        holder,
        is_held_by_nobody: _,
        settings,
        would,
        forecast,
    } = connection;
    let (local, remote) = (record.local(), record.remote());
    let (noticed_ms, noticed_by) = match forecast.noticed {
        Noticed::After(milliseconds) => (Some(milliseconds), "keepalive"),
        Noticed::Retransmitting(_) => (None, "retransmission"),
        Noticed::Never => (None, "never"),
    };
    let line = Line {
        netns: &netns.name,
        netns_id: netns.id,
        cgroup: cgroup.map(|cgroup| &cgroup.path),
        cgroup_id: record.cgroup,
        identity: IdentityRecord::new(cgroup.and_then(Known::identity)),
        pid: holder.map(|holder| holder.pid),
        comm: holder.map(|holder| to_json(holder.comm)),
        holders: holder.map_or(0, |holder| holder.count),
        kernel: is_kernels(connection),
        uid: record.uid,
        inode: record.inode,
        state: state(record.state),
        local_address: local.ip(),
        local_port: local.port(),
        remote_address: remote.ip(),
        remote_port: remote.port(),
        policy: policy.map(|policy| policy.name.as_str()),
        settings: SettingsRecord::from(settings),
        silent_ms: record.silent_ms.max(0),
        next_probe_ms: forecast.next_probe,
        noticed_ms,
        noticed_by,
        would: would.map(Would::from),
    };
    write_json(&line, out)
}

/// The states in which a process holds a connection open, as `ss` calls them.
fn state(number: u32) -> &'static str {
    match number {
        1 => "established",
        4 => "fin-wait-1",
        5 => "fin-wait-2",
        8 => "close-wait",
        _ => "other",
    }
}

/// A summary as the cells of a row.
#[must_use]
pub fn summary_row(name: &str, summary: &Summary) -> [String; 7] {
    let idle = |idle: Option<u32>| idle.map_or_else(|| NONE.to_owned(), seconds);
    [
        name.to_owned(),
        summary.connections.to_string(),
        summary.protected.to_string(),
        summary.unprotected.to_string(),
        idle(summary.shortest_idle_s),
        idle(summary.longest_idle_s),
        summary.at_risk.to_string(),
    ]
}

/// A cgroup's summary as a line of JSON.
#[derive(Serialize)]
struct SummaryLine<'a> {
    cgroup: Option<&'a CgroupPath>,
    cgroup_id: u64,
    #[serde(flatten)]
    identity: IdentityRecord<'a>,
    #[serde(flatten)]
    summary: &'a Summary,
    at_risk_timeout_ms: u64,
}

/// Writes a cgroup's summary as a line of JSON.
///
/// # Errors
///
/// When it cannot be written.
pub fn summary_json_line(
    cgroup_id: u64,
    cgroup: Option<&Known>,
    summary: &Summary,
    timeout: IdleTimeout,
    out: &mut impl Write,
) -> io::Result<()> {
    let line = SummaryLine {
        cgroup: cgroup.map(|cgroup| &cgroup.path),
        cgroup_id,
        identity: IdentityRecord::new(cgroup.and_then(Known::identity)),
        summary,
        at_risk_timeout_ms: u64::try_from(timeout.duration().as_millis()).unwrap_or(u64::MAX),
    };
    write_json(&line, out)
}

#[cfg(test)]
mod tests {
    use keepalive_common::{plan::Options, policy::Policy};
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        assignment::Assigned,
        netns::{self, Namespace},
        rules::Rules,
        sockets::{
            cgroups::Known,
            holders::Holder,
            trial::{protected, record},
        },
    };

    fn own_netns() -> Namespace {
        netns::all().unwrap().remove(0)
    }

    fn json(connection: &Connection<'_>) -> Value {
        let mut line = Vec::new();
        json_line(connection, &mut line).unwrap();
        assert_eq!(
            line.iter().position(|byte| *byte == b'\n'),
            Some(line.len() - 1)
        );
        serde_json::from_slice(&line).unwrap()
    }

    #[test]
    fn a_claimed_connection_in_full() {
        let netns = own_netns();
        let mut found = protected(60);
        (found.timer_ms, found.silent_ms, found.uid) = (45_000, 15_000, 33);
        let cgroup = Known::unclaimed("/system.slice/nginx.service");
        let policy = Assigned {
            name: "web".to_owned(),
            policy: Policy::BUILT_IN,
            rules: Rules::default(),
        };
        let mut connection = Connection::new(&netns, &found, Some(&cgroup), Some(&policy));
        connection.holder = Some(Holder {
            pid: 7,
            comm: b"ng\tinx\x1b[2J",
            count: 3,
        });
        let expected = [
            "host",
            "nginx.service",
            "ng\\tinx\\u{1b}[2J/7 +2",
            "192.0.2.1:40000",
            "198.51.100.7:5432",
            "on p",
            "1m p",
            "10s p",
            "6 p",
            "-",
            "45s",
            "1m45s",
            "web",
            "/system.slice/nginx.service",
        ];
        assert_eq!(row(&connection), expected);
        let mut expected = json!({
                "netns": "host",
                "netns_id": netns.id,
                "cgroup": "/system.slice/nginx.service",
                "cgroup_id": 42,
                "unit": "nginx.service",
                "container": null,
                "container_name": null,
                "runtime": null,
                "image": null,
                "namespace": null,
                "pod": null,
                "pod_uid": null,
                "pid": 7,
                "comm": "ng\tinx\u{1b}[2J",
                "holders": 3,
                "kernel": false,
                "uid": 33,
                "inode": 4711,
                "state": "established",
                "local_address": "192.0.2.1",
                "local_port": 40000,
                "remote_address": "198.51.100.7",
                "remote_port": 5432,
                "policy": "web",
                "keepalive": true,
                "keepalive_source": "policy",
                "idle_s": 60,
                "idle_source": "policy",
                "interval_s": 10,
                "interval_source": "policy",
                "probes": 6,
                "probes_source": "policy",
                "user_timeout_ms": null,
                "user_timeout_source": "kernel",
                "gives_up_ms": 1_044_600,
                "user_timeout_conflict": false,
                "silent_ms": 15000,
                "next_probe_ms": 45000,
                "noticed_ms": 105_000,
                "noticed_by": "keepalive",
                "would": null,
        });
        // Nothing is held to a bound.
        for name in [
            "keepalive_asked",
            "idle_asked_s",
            "interval_asked_s",
            "probes_asked",
            "user_timeout_asked_ms",
        ] {
            expected[name] = Value::Null;
        }
        assert_eq!(json(&connection), expected);
    }

    #[test]
    fn an_unprotected_connection_nobody_claims() {
        let netns = own_netns();
        let options = Options {
            user_timeout: 1500,
            ..Options::default()
        };
        let mut found = record("[2001:db8::1]:1", "[2001:db8::2]:2", &options);
        let connection = Connection::new(&netns, &found, None, None);
        assert_eq!(
            row(&connection)[1..],
            [
                "(gone) 42",
                "-",
                "[2001:db8::1]:1",
                "[2001:db8::2]:2",
                "off k",
                "-",
                "-",
                "-",
                "1s500ms a",
                "-",
                "never",
                "-",
                "-"
            ]
        );
        let line = json(&connection);
        assert_eq!(line["idle_s"], 7200);
        assert_eq!(line["idle_source"], "sysctl");
        assert_eq!(line["user_timeout_ms"], 1500);
        assert_eq!(line["noticed_by"], "never");
        assert_eq!(line["pid"], Value::Null);
        found.packets_out = 1;
        let connection = Connection::new(&netns, &found, None, None);
        assert_eq!(row(&connection)[11], "data 1s");
        assert_eq!(json(&connection)["noticed_by"], "retransmission");
    }

    #[test]
    fn a_socket_of_the_kernel_is_shown_as_such() {
        let netns = own_netns();
        let found = protected(60);
        let root = Known::unclaimed("/");
        let mut connection = Connection::new(&netns, &found, Some(&root), None);
        assert_eq!(row(&connection)[Column::Process.index()], "-");
        connection.is_held_by_nobody = true;
        assert_eq!(row(&connection)[Column::Process.index()], "(kernel)");
        assert_eq!(json(&connection)["kernel"], true);
    }

    #[test]
    fn the_legend_explains_what_is_shown_and_no_more() {
        let mut legend = Legend::default();
        assert_eq!(legend.lines(), [""; 0]);
        legend.add(Column::Remote, "a p");
        legend.add(Column::Keepalive, "on p");
        legend.add(Column::Idle, "2h s");
        legend.add(Column::UserTimeout, "-");
        assert_eq!(
            legend.lines(),
            ["set by: p the policy, s a sysctl of the namespace"]
        );
        legend.add(Column::Keepalive, "off k → on");
        legend.add(Column::Where, "(gone) 7");
        legend.add(Column::Noticed, "never");
        assert_eq!(legend.lines().len(), 4);
    }

    #[test]
    fn a_container_is_shown_short_and_told_in_full() {
        let netns = own_netns();
        let id = "0123456789abcdef".repeat(4);
        let cgroup = Known::unclaimed(&format!("/system.slice/docker-{id}.scope/a.service"));
        let found = protected(60);
        let connection = Connection::new(&netns, &found, Some(&cgroup), None);
        assert_eq!(row(&connection)[1], "docker:0123456789ab");
        assert_eq!(json(&connection)["container"], id);
    }

    #[test]
    fn a_summary_reads_at_a_glance() {
        let summary = Summary {
            connections: 3,
            protected: 2,
            unprotected: 1,
            shortest_idle_s: Some(60),
            longest_idle_s: Some(7200),
            at_risk: 2,
        };
        assert_eq!(
            summary_row("/a", &summary),
            ["/a", "3", "2", "1", "1m", "2h", "2"]
        );
        let mut line = Vec::new();
        let timeout = crate::paths::GCP.into();
        let known = Known::unclaimed("/x.service");
        summary_json_line(9, Some(&known), &summary, timeout, &mut line).unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&line).unwrap(),
            json!({
                "cgroup": "/x.service",
                "cgroup_id": 9,
                "unit": "x.service",
                "container": null,
                "container_name": null,
                "runtime": null,
                "image": null,
                "namespace": null,
                "pod": null,
                "pod_uid": null,
                "connections": 3,
                "protected": 2,
                "unprotected": 1,
                "shortest_idle_s": 60,
                "longest_idle_s": 7200,
                "at_risk": 2,
                "at_risk_timeout_ms": 600_000,
            })
        );
    }
}
