//! What is shown, and what keys make of it. Nothing here reads or writes anything.

use std::{cmp::Ordering, collections::HashMap, net::SocketAddr, sync::Arc};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::{Exposure, Place, Snapshot, Socket};
use crate::assignment::UNCLAIMED;

/// What connections are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum By {
    /// The cgroup that they were made in
    Cgroup,
    /// The policy that claims them
    Policy,
    /// The container or pod
    Container,
    /// The unit of systemd
    Unit,
}

impl By {
    /// All, in the order of the tab key.
    pub(super) const ALL: [Self; 4] = [Self::Cgroup, Self::Policy, Self::Container, Self::Unit];

    /// In a word.
    #[must_use]
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Policy => "policy",
            Self::Container => "container",
            Self::Unit => "unit",
        }
    }

    /// The group of a connection.
    fn group(self, socket: &Socket) -> Arc<str> {
        match self {
            Self::Policy => socket.policy.clone().unwrap_or_else(|| UNCLAIMED.into()),
            _ => self.of_place(&socket.place),
        }
    }

    fn of_place(self, place: &Place) -> Arc<str> {
        match self {
            Self::Cgroup | Self::Policy => place.cgroup.clone(),
            Self::Container => place.container.clone().unwrap_or_else(|| NONE.into()),
            Self::Unit => place.unit.clone().unwrap_or_else(|| NONE.into()),
        }
    }
}

/// Connections outside of any container or unit.
const NONE: &str = "(none)";

/// A row of the overview.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Its name.
    pub(super) name: Arc<str>,
    /// All of its connections.
    pub(super) connections: u64,
    /// Those that survive the path.
    pub(super) survive: u64,
    /// Those that do not.
    pub(super) at_risk: u64,
    /// Those that a policy changed.
    pub(super) changed: u64,
    /// Dead peers.
    pub(super) dead: u64,
    /// Connections that are new since the look before.
    pub(super) new: u64,
    /// Milliseconds until the path forgets the first of them.
    pub(super) forgotten_ms: Option<u64>,
}

impl Group {
    fn new(name: Arc<str>) -> Self {
        Self {
            name,
            connections: 0,
            survive: 0,
            at_risk: 0,
            changed: 0,
            dead: 0,
            new: 0,
            forgotten_ms: None,
        }
    }
}

/// A column of the overview to sort by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GroupKey {
    /// What will be forgotten first.
    Forgotten,
    /// By name.
    Name,
    /// Most connections first.
    Connections,
    /// Most that survive first.
    Survive,
    /// Most at risk first.
    AtRisk,
    /// Most changed first.
    Changed,
    /// Most dead peers first.
    Dead,
    /// Most new ones first.
    New,
}

impl GroupKey {
    const ALL: [Self; 8] = [
        Self::Forgotten,
        Self::Name,
        Self::Connections,
        Self::Survive,
        Self::AtRisk,
        Self::Changed,
        Self::Dead,
        Self::New,
    ];

    fn compare(self, one: &Group, other: &Group) -> Ordering {
        let order = match self {
            Self::Forgotten => soonest(one.forgotten_ms, other.forgotten_ms),
            Self::Name => Ordering::Equal,
            Self::Connections => other.connections.cmp(&one.connections),
            Self::Survive => other.survive.cmp(&one.survive),
            Self::AtRisk => other.at_risk.cmp(&one.at_risk),
            Self::Changed => other.changed.cmp(&one.changed),
            Self::Dead => other.dead.cmp(&one.dead),
            Self::New => other.new.cmp(&one.new),
        };
        order.then_with(|| one.name.cmp(&other.name))
    }
}

/// A column of the list of connections to sort by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SocketKey {
    /// What will be forgotten first.
    Forgotten,
    /// Longest silence first.
    Silent,
    /// By this end.
    Local,
    /// By the other end.
    Remote,
    /// By the name of the process.
    Process,
    /// Keepalive off first, then the longest idle time.
    Idle,
}

impl SocketKey {
    const ALL: [Self; 6] = [
        Self::Forgotten,
        Self::Silent,
        Self::Local,
        Self::Remote,
        Self::Process,
        Self::Idle,
    ];
}

fn soonest(one: Option<u64>, other: Option<u64>) -> Ordering {
    one.unwrap_or(u64::MAX).cmp(&other.unwrap_or(u64::MAX))
}

/// What is to be done about a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing more.
    None,
    /// The end.
    Quit,
    /// To look no more until told otherwise, or to go on.
    Pause(bool),
    /// To find out what `explain` says of a connection.
    Explain(SocketAddr, SocketAddr),
}

/// What is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// A row for each group.
    Groups,
    /// The connections of a group.
    Sockets(Arc<str>),
    /// What is explained of a connection.
    Explained {
        /// The group that it was found in.
        group: Arc<str>,
        /// Both ends of the connection.
        ends: (SocketAddr, SocketAddr),
        /// None until it is known.
        text: Option<String>,
    },
}

/// All connections together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    /// All of them.
    pub(super) connections: u64,
    /// Those that survive the path.
    pub(super) survive: u64,
    /// Those that do not.
    pub(super) at_risk: u64,
    /// Those that stay within this machine.
    pub(super) within: u64,
    /// Those that a policy changed.
    pub(super) changed: u64,
    /// Those that are new.
    pub(super) new: u64,
    /// Dead peers that the kernel has counted.
    pub(super) dead: u64,
}

impl Totals {
    /// How many of a thousand that pass the path survive it; none where none do.
    #[must_use]
    pub(super) fn coverage(&self) -> Option<u64> {
        let on_path = self.survive + self.at_risk;
        // Rounded down: 100 % is all of them.
        (on_path > 0).then(|| self.survive * 1000 / on_path)
    }
}

/// Everything that is shown.
#[expect(clippy::struct_excessive_bools, reason = "each is a state of its own")]
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// What was found at last; none before the first look is over.
    pub(super) snapshot: Option<Snapshot>,
    /// What went wrong at the last look.
    pub(super) error: Option<String>,
    /// What is shown.
    pub(super) view: View,
    /// What the overview counts by.
    pub(super) by: By,
    /// Column of the overview that it is sorted by.
    pub(super) group_key: GroupKey,
    /// Column of the list that it is sorted by.
    pub(super) socket_key: SocketKey,
    /// Whether the order is turned round.
    pub(super) reversed: bool,
    /// Only rows with this text in them are shown.
    pub(super) filter: String,
    /// Whether the filter is being typed.
    pub(super) is_typing: bool,
    /// Whether nothing is looked at any more.
    pub(super) is_paused: bool,
    /// Whether the keys are explained.
    pub(super) shows_help: bool,
    /// Whether colours may be used.
    pub(super) has_colours: bool,
    /// Rows of the overview, in their order.
    pub(super) groups: Vec<Group>,
    /// Rows of the list, as numbers of connections in the snapshot.
    pub(super) listed: Vec<usize>,
    /// All connections together.
    pub(super) totals: Totals,
    /// The row that the cursor is on.
    pub(super) selected: usize,
    /// The first row that is shown.
    pub(super) top: usize,
    /// Rows that there is room for.
    room: usize,
    /// Where the cursor was in the overview.
    left_at: Option<Arc<str>>,
}

impl Model {
    /// Nothing seen yet.
    #[must_use]
    pub(super) fn new(by: By, has_colours: bool) -> Self {
        Self {
            snapshot: None,
            error: None,
            view: View::Groups,
            by,
            group_key: GroupKey::Forgotten,
            socket_key: SocketKey::Forgotten,
            reversed: false,
            filter: String::new(),
            is_typing: false,
            is_paused: false,
            shows_help: false,
            has_colours,
            groups: Vec::new(),
            listed: Vec::new(),
            totals: Totals::default(),
            selected: 0,
            top: 0,
            room: 0,
            left_at: None,
        }
    }

    /// Takes what was found.
    pub(super) fn take(&mut self, snapshot: Snapshot) {
        let selected = self
            .selected_socket()
            .map(|socket| (socket.local, socket.remote));
        let group = self
            .groups
            .get(self.selected)
            .map(|group| group.name.clone());
        self.totals = totals(&snapshot);
        self.snapshot = Some(snapshot);
        self.error = None;
        self.arrange();
        // The cursor stays on what it was on, wherever that is now.
        let place = match self.view {
            View::Groups => {
                group.and_then(|name| self.groups.iter().position(|group| group.name == name))
            }
            View::Sockets(_) => selected.and_then(|ends| self.place_of(ends)),
            View::Explained { .. } => None,
        };
        // On the first row it stays there: what comes first has changed.
        if let Some(place) = place.filter(|_| self.selected > 0) {
            self.selected = place;
        }
        self.scroll();
    }

    /// Takes what is explained.
    pub(super) fn take_explanation(&mut self, explanation: String) {
        if let View::Explained { text, .. } = &mut self.view {
            *text = Some(explanation);
        }
    }

    /// Makes room for so many rows.
    pub(super) fn resize(&mut self, rows: usize) {
        self.room = rows;
        self.scroll();
    }

    /// Does what a key says.
    pub(super) fn press(&mut self, key: KeyEvent) -> Action {
        if key.kind == KeyEventKind::Release {
            return Action::None;
        }
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && key.code == KeyCode::Char('c') {
            return Action::Quit;
        }
        if self.is_typing {
            self.type_filter(key.code);
            return Action::None;
        }
        if self.shows_help {
            self.shows_help = false;
            return match key.code {
                KeyCode::Char('q') => Action::Quit,
                _ => Action::None,
            };
        }
        match key.code {
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Char('?') | KeyCode::F(1) => self.shows_help = true,
            KeyCode::Char('/') if self.is_list() => self.is_typing = true,
            KeyCode::Char('p' | ' ') => {
                self.is_paused = !self.is_paused;
                return Action::Pause(self.is_paused);
            }
            KeyCode::Char('d') if control => self.go(self.half()),
            KeyCode::Char('u') if control => self.go(-self.half()),
            KeyCode::Char('f') if control => self.go(self.page()),
            KeyCode::Char('b') if control => self.go(-self.page()),
            KeyCode::Char('j') | KeyCode::Down => self.go(1),
            KeyCode::Char('k') | KeyCode::Up => self.go(-1),
            KeyCode::PageDown => self.go(self.page()),
            KeyCode::PageUp => self.go(-self.page()),
            KeyCode::Char('g') | KeyCode::Home => self.go(isize::MIN),
            KeyCode::Char('G') | KeyCode::End => self.go(isize::MAX),
            KeyCode::Char('l') | KeyCode::Enter | KeyCode::Right => return self.enter(),
            KeyCode::Char('h') | KeyCode::Esc | KeyCode::Backspace | KeyCode::Left => self.leave(),
            KeyCode::Char('s') => self.sort(1),
            KeyCode::Char('S') => self.sort(-1),
            KeyCode::Char('r') if self.is_list() => {
                self.reversed = !self.reversed;
                self.arrange();
            }
            KeyCode::Tab => self.group_by(1),
            KeyCode::BackTab => self.group_by(By::ALL.len() - 1),
            _ => {}
        }
        Action::None
    }

    fn type_filter(&mut self, key: KeyCode) {
        /// No name is longer in a table.
        const LONGEST: usize = 200;
        match key {
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(character) if self.filter.len() < LONGEST => self.filter.push(character),
            _ => {}
        }
        self.selected = 0;
        self.arrange();
    }

    const fn is_list(&self) -> bool {
        !matches!(self.view, View::Explained { .. })
    }

    fn enter(&mut self) -> Action {
        match &self.view {
            View::Groups => {
                let Some(group) = self.groups.get(self.selected) else {
                    return Action::None;
                };
                let name = group.name.clone();
                self.left_at = Some(name.clone());
                self.show(View::Sockets(name));
                Action::None
            }
            View::Sockets(group) => {
                let Some(socket) = self.selected_socket() else {
                    return Action::None;
                };
                let (local, remote) = (socket.local, socket.remote);
                self.view = View::Explained {
                    group: group.clone(),
                    ends: (local, remote),
                    text: None,
                };
                self.selected = 0;
                self.top = 0;
                Action::Explain(local, remote)
            }
            View::Explained { .. } => Action::None,
        }
    }

    fn leave(&mut self) {
        match &self.view {
            View::Groups if !self.filter.is_empty() => {
                self.filter.clear();
                self.arrange();
            }
            View::Groups => {}
            View::Sockets(_) => {
                self.show(View::Groups);
                let name = self.left_at.take();
                let place = self
                    .groups
                    .iter()
                    .position(|group| Some(&group.name) == name.as_ref());
                self.selected = place.unwrap_or(0);
                self.scroll();
            }
            View::Explained { group, ends, .. } => {
                let (group, ends) = (group.clone(), *ends);
                self.show(View::Sockets(group));
                self.selected = self.place_of(ends).unwrap_or(0);
                self.scroll();
            }
        }
    }

    fn show(&mut self, view: View) {
        self.view = view;
        self.filter.clear();
        self.reversed = false;
        self.selected = 0;
        self.top = 0;
        self.arrange();
    }

    fn sort(&mut self, step: isize) {
        match self.view {
            View::Groups => {
                self.group_key = next(&GroupKey::ALL, &self.group_key, step);
            }
            View::Sockets(_) => {
                self.socket_key = next(&SocketKey::ALL, &self.socket_key, step);
            }
            View::Explained { .. } => return,
        }
        self.reversed = false;
        self.selected = 0;
        self.arrange();
    }

    fn group_by(&mut self, step: usize) {
        if self.view == View::Groups {
            self.by = next(&By::ALL, &self.by, step.cast_signed());
            self.selected = 0;
            self.arrange();
        }
    }

    fn half(&self) -> isize {
        (self.room / 2).max(1).cast_signed()
    }

    fn page(&self) -> isize {
        self.room.max(1).cast_signed()
    }

    /// Rows of what is shown.
    #[must_use]
    pub(super) fn rows(&self) -> usize {
        match &self.view {
            View::Groups => self.groups.len(),
            View::Sockets(_) => self.listed.len(),
            View::Explained { text, .. } => text.as_ref().map_or(0, |text| text.lines().count()),
        }
    }

    fn go(&mut self, by: isize) {
        let last = if self.is_list() {
            self.rows().saturating_sub(1)
        } else {
            // A text has no cursor: it scrolls.
            self.rows().saturating_sub(self.room)
        };
        self.selected = self.selected.saturating_add_signed(by).min(last);
        self.scroll();
    }

    /// Keeps the cursor in sight.
    fn scroll(&mut self) {
        if !self.is_list() {
            self.top = self.selected;
            return;
        }
        let rows = self.rows();
        self.selected = self.selected.min(rows.saturating_sub(1));
        let room = self.room.max(1);
        self.top = self
            .top
            .min(rows.saturating_sub(room))
            .min(self.selected)
            .max((self.selected + 1).saturating_sub(room));
    }

    /// The connections of the snapshot.
    #[must_use]
    pub(super) fn sockets(&self) -> &[Socket] {
        self.snapshot
            .as_ref()
            .map_or(&[], |snapshot| &snapshot.sockets)
    }

    fn selected_socket(&self) -> Option<&Socket> {
        match self.view {
            View::Sockets(_) => self.sockets().get(*self.listed.get(self.selected)?),
            _ => None,
        }
    }

    /// The row of a connection.
    fn place_of(&self, ends: (SocketAddr, SocketAddr)) -> Option<usize> {
        let sockets = self.sockets();
        self.listed.iter().position(|index| {
            let socket = sockets.get(*index);
            socket.is_some_and(|socket| (socket.local, socket.remote) == ends)
        })
    }

    /// Works out the rows anew.
    fn arrange(&mut self) {
        let Some(snapshot) = &self.snapshot else {
            return;
        };
        match &self.view {
            View::Groups => {
                let mut groups = groups(snapshot, self.by);
                let wanted = self.filter.to_lowercase();
                groups.retain(|group| contains(&group.name, &wanted));
                groups.sort_by(|one, other| self.group_key.compare(one, other));
                if self.reversed {
                    groups.reverse();
                }
                self.groups = groups;
            }
            View::Sockets(group) => {
                self.listed = listed(
                    snapshot,
                    |socket| self.by.group(socket) == *group,
                    &self.filter.to_lowercase(),
                    self.socket_key,
                );
                if self.reversed {
                    self.listed.reverse();
                }
            }
            View::Explained { .. } => {}
        }
        self.scroll();
    }
}

/// The one that is so many steps on, round and round.
fn next<T: Copy + PartialEq>(all: &[T], now: &T, step: isize) -> T {
    let place = all.iter().position(|one| one == now).unwrap_or(0);
    let length = all.len().cast_signed();
    let place = (place.cast_signed() + step).rem_euclid(length);
    all.get(place.unsigned_abs()).copied().unwrap_or(*now)
}

fn totals(snapshot: &Snapshot) -> Totals {
    let mut totals = Totals {
        dead: snapshot.policies.iter().map(|policy| policy.dead).sum(),
        ..Totals::default()
    };
    for socket in &snapshot.sockets {
        totals.connections += 1;
        totals.changed += u64::from(socket.is_changed);
        totals.new += u64::from(socket.is_new);
        match socket.exposure {
            Exposure::Survives => totals.survive += 1,
            Exposure::AtRisk => totals.at_risk += 1,
            Exposure::Within => totals.within += 1,
        }
    }
    totals
}

fn groups(snapshot: &Snapshot, by: By) -> Vec<Group> {
    let mut groups: HashMap<Arc<str>, Group> = HashMap::new();
    let group =
        |groups: &mut HashMap<Arc<str>, Group>, name: Arc<str>, add: &dyn Fn(&mut Group)| {
            let group = groups
                .entry(name.clone())
                .or_insert_with(|| Group::new(name));
            add(group);
        };
    for socket in &snapshot.sockets {
        let forgotten = socket.forgotten_ms(snapshot.timeout);
        group(&mut groups, by.group(socket), &|group| {
            group.connections += 1;
            group.survive += u64::from(socket.exposure == Exposure::Survives);
            group.at_risk += u64::from(socket.exposure == Exposure::AtRisk);
            group.changed += u64::from(socket.is_changed);
            group.new += u64::from(by != By::Policy && socket.is_new);
            group.forgotten_ms = match (group.forgotten_ms, forgotten) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
        });
    }
    if by == By::Policy {
        // The kernel counts those exactly.
        for policy in &snapshot.policies {
            group(&mut groups, policy.policy.clone(), &|group| {
                group.dead += policy.dead;
                group.new += policy.new;
            });
        }
    } else {
        for (place, dead) in &snapshot.dead {
            group(&mut groups, by.of_place(place), &|group| group.dead += dead);
        }
    }
    groups.into_values().collect()
}

fn contains(text: &str, wanted: &str) -> bool {
    wanted.is_empty() || text.to_lowercase().contains(wanted)
}

fn listed(
    snapshot: &Snapshot,
    is_of_group: impl Fn(&Socket) -> bool,
    wanted: &str,
    key: SocketKey,
) -> Vec<usize> {
    let is_wanted = |socket: &Socket| {
        let process = socket.process.as_ref();
        wanted.is_empty()
            || contains(&socket.local.to_string(), wanted)
            || contains(&socket.remote.to_string(), wanted)
            || process.is_some_and(|(pid, name)| contains(&format!("{name}/{pid}"), wanted))
    };
    let sockets = snapshot.sockets.iter().enumerate();
    let mut listed: Vec<(usize, &Socket)> = sockets
        .filter(|(_, socket)| is_of_group(socket) && is_wanted(socket))
        .collect();
    let forgotten = |socket: &Socket| socket.forgotten_ms(snapshot.timeout);
    listed.sort_by(|(_, one), (_, other)| {
        let order = match key {
            SocketKey::Forgotten => soonest(forgotten(one), forgotten(other)),
            SocketKey::Silent => other.silent_ms.cmp(&one.silent_ms),
            SocketKey::Local => Ordering::Equal,
            SocketKey::Remote => one.remote.cmp(&other.remote),
            SocketKey::Process => {
                let name = |socket: &Socket| {
                    let process = socket.process.clone();
                    process.map(|(pid, name)| (name, pid))
                };
                name(one).cmp(&name(other))
            }
            SocketKey::Idle => {
                let idle = |socket: &Socket| socket.idle.unwrap_or(u32::MAX);
                idle(other).cmp(&idle(one))
            }
        };
        let ends = |socket: &Socket| (socket.local, socket.remote);
        order.then_with(|| ends(one).cmp(&ends(other)))
    });
    listed.into_iter().map(|(index, _)| index).collect()
}
