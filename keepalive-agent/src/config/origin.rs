//! Origins: which file and line a value of the merged config came from.

use std::{collections::BTreeMap, fmt, path::Path, sync::Arc};

use serde::{Serialize, Serializer, ser::SerializeStruct as _};

use crate::{
    identity::Attribute,
    names::{path_to_json, printable_path},
};

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Arc<Path>,
    /// The line, counted from 1.
    pub line: usize,
}

/// What a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody wrote it.
    BuiltIn,
    /// It is written there.
    Written(Place),
    /// It follows from a `path`.
    Preset {
        /// The path as written.
        path: String,
        /// Where it is written.
        place: Place,
    },
}

/// Where the values of a policy came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origins {
    /// The policy itself: where it is named first.
    pub table: Origin,
    /// `cgroup`, where it is written.
    pub cgroup: Option<Place>,
    /// `unit`, `container` and the like, where they are written.
    pub attributes: BTreeMap<Attribute, Place>,
    /// `label`, where it is written.
    pub label: Option<Place>,
    /// `remote`, where it is written.
    pub remote: Option<Place>,
    /// `port`, where it is written.
    pub port: Option<Place>,
    /// `local-port`, where it is written.
    pub local_port: Option<Place>,
    /// `keepalive`.
    pub keepalive: Origin,
    /// `idle`, `interval`, `probes` and `user-timeout`.
    pub timers: [TimerOrigin; 4],
    /// `give-up`.
    pub give_up: Origin,
    /// `enforce`.
    pub enforce: Origin,
    /// `ignore`.
    pub ignore: Origin,
    /// `path` as written in the policy's own table, and where.
    pub path: Option<(String, Place)>,
}

/// What a timer came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TimerOrigin {
    /// Its bounds, and its default where that is not from elsewhere.
    pub from: Origin,
    /// Its default, where the bounds were written without one.
    pub default_from: Option<Origin>,
}

/// Where the values of a config came from, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigOrigins {
    /// Those of the default policy, if there is one.
    pub default: Option<Origins>,
    /// Those of the named policies.
    pub policies: Vec<Origins>,
    /// Those of what users may ask for, where they may.
    pub self_service: Option<SelfServiceOrigins>,
}

/// Where `[self-service]` came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelfServiceOrigins {
    /// Where it is named first.
    pub table: Place,
    /// The keys that are written, and where.
    pub keys: BTreeMap<&'static str, Place>,
}

impl Origins {
    /// Those of the built-in policy.
    pub const BUILT_IN: Self = Self {
        table: Origin::BuiltIn,
        cgroup: None,
        attributes: BTreeMap::new(),
        label: None,
        remote: None,
        port: None,
        local_port: None,
        keepalive: Origin::BuiltIn,
        timers: [const { TimerOrigin::new(Origin::BuiltIn) }; 4],
        give_up: Origin::BuiltIn,
        enforce: Origin::BuiltIn,
        ignore: Origin::BuiltIn,
        path: None,
    };
}

impl TimerOrigin {
    /// All of it is from there.
    #[must_use]
    pub const fn new(from: Origin) -> Self {
        Self {
            from,
            default_from: None,
        }
    }

    /// Where the default is from.
    #[must_use]
    pub fn default_from(&self) -> &Origin {
        self.default_from.as_ref().unwrap_or(&self.from)
    }
}

impl Origin {
    /// The line that says it; none for what is built in.
    #[must_use]
    pub const fn place(&self) -> Option<&Place> {
        match self {
            Self::BuiltIn => None,
            Self::Written(place) | Self::Preset { place, .. } => Some(place),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", printable_path(&*self.file), self.line)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str("built in"),
            Self::Written(place) => place.fmt(f),
            Self::Preset { path, place } => write!(f, "preset {path} ({place})"),
        }
    }
}

impl fmt::Display for TimerOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.from.fmt(f)?;
        match &self.default_from {
            Some(default) => write!(f, ", default {default}"),
            None => Ok(()),
        }
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut place = serializer.serialize_struct("Place", 2)?;
        place.serialize_field("file", &path_to_json(&self.file))?;
        place.serialize_field("line", &self.line)?;
        place.end()
    }
}

/// For machines: file, line and preset, each null where there is none.
impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let place = self.place();
        let preset = match self {
            Self::Preset { path, .. } => Some(path),
            _ => None,
        };
        let mut origin = serializer.serialize_struct("Origin", 3)?;
        origin.serialize_field("file", &place.map(|place| path_to_json(&place.file)))?;
        origin.serialize_field("line", &place.map(|place| place.line))?;
        origin.serialize_field("preset", &preset)?;
        origin.end()
    }
}
