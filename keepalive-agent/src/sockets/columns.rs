//! The columns of a listing, and which of them fit.

use clap::ValueEnum;

/// A column of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Column {
    /// Network namespace
    Netns,
    /// Pod, container, unit, or cgroup
    Where,
    /// Process that holds it
    Process,
    /// Local address
    Local,
    /// Remote address
    Remote,
    /// Whether keepalive is on
    Keepalive,
    /// Silence before the first probe
    Idle,
    /// Time between probes
    Interval,
    /// Unanswered probes until it is ended
    Probes,
    /// TCP_USER_TIMEOUT
    UserTimeout,
    /// When the next probe goes out
    NextProbe,
    /// When a dead peer is noticed
    Noticed,
    /// Policy that claims it
    Policy,
    /// Path of its cgroup
    Cgroup,
}

/// How many there are.
pub const COUNT: usize = 14;

impl Column {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; COUNT] = [
        Self::Netns,
        Self::Where,
        Self::Process,
        Self::Local,
        Self::Remote,
        Self::Keepalive,
        Self::Idle,
        Self::Interval,
        Self::Probes,
        Self::UserTimeout,
        Self::NextProbe,
        Self::Noticed,
        Self::Policy,
        Self::Cgroup,
    ];

    /// What is left out last comes first.
    const BY_IMPORTANCE: [Self; COUNT] = [
        Self::Remote,
        Self::Keepalive,
        Self::Idle,
        Self::Where,
        Self::Process,
        Self::Noticed,
        Self::Policy,
        Self::Interval,
        Self::Probes,
        Self::UserTimeout,
        Self::NextProbe,
        Self::Netns,
        Self::Local,
        Self::Cgroup,
    ];

    /// What stands above it.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Netns => "NETNS",
            Self::Where => "WHERE",
            Self::Process => "PROCESS",
            Self::Local => "LOCAL",
            Self::Remote => "REMOTE",
            Self::Keepalive => "KEEPALIVE",
            Self::Idle => "IDLE",
            Self::Interval => "INTERVAL",
            Self::Probes => "PROBES",
            Self::UserTimeout => "USER-TIMEOUT",
            Self::NextProbe => "NEXT PROBE",
            Self::Noticed => "NOTICED",
            Self::Policy => "POLICY",
            Self::Cgroup => "CGROUP",
        }
    }

    /// Its place in [`Self::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// How wide it is allowed to be where there is little room: names of others
    /// may be very long, addresses are no use in part.
    #[must_use]
    pub const fn widest(self) -> usize {
        match self {
            Self::Netns | Self::Policy => 16,
            Self::Where => 28,
            Self::Process => 20,
            _ => usize::MAX,
        }
    }
}

/// The columns that fit: the most important first, without those that say nothing.
/// `widths` has the widest cell of each, 0 where all say the same or nothing; `of`
/// works out the width of a row.
pub fn fitting(
    widths: &[usize; COUNT],
    available: usize,
    of: impl Fn(&[usize]) -> usize,
) -> Vec<Column> {
    let mut chosen: Vec<Column> = Vec::new();
    let mut taken = Vec::new();
    for column in Column::BY_IMPORTANCE {
        let width = widths[column.index()];
        if width == 0 {
            continue;
        }
        taken.push(width.min(column.widest()));
        if chosen.is_empty() || of(&taken) <= available {
            chosen.push(column);
        } else {
            taken.pop();
        }
    }
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(widths: &[usize]) -> usize {
        widths.iter().map(|width| width + 2).sum::<usize>() - 2
    }

    #[test]
    fn each_has_its_place() {
        for (index, column) in Column::ALL.into_iter().enumerate() {
            assert_eq!(column.index(), index);
            assert!(Column::BY_IMPORTANCE.contains(&column));
        }
    }

    #[test]
    fn what_matters_most_is_shown_and_it_fits() {
        let mut widths = [10; COUNT];
        widths[Column::Where.index()] = 1000;
        for available in 60..200 {
            let chosen = fitting(&widths, available, of);
            let taken: Vec<_> = chosen
                .iter()
                .map(|column| widths[column.index()].min(column.widest()))
                .collect();
            assert!(of(&taken) <= available, "{available}: {chosen:?}");
            assert!(chosen.contains(&Column::Remote) && chosen.contains(&Column::Keepalive));
            assert!(chosen.is_sorted());
        }
        assert_eq!(fitting(&widths, usize::MAX, of), Column::ALL);
        widths[Column::UserTimeout.index()] = 0;
        assert_eq!(fitting(&widths, usize::MAX, of).len(), COUNT - 1);
        assert_eq!(fitting(&widths, 1, of), [Column::Remote]);
    }
}
