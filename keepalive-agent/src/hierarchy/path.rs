//! The path of a cgroup.

use std::{
    borrow::Borrow, ffi::OsStr, fmt, iter, os::unix::ffi::OsStrExt as _, path::Path, sync::Arc,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::names;

/// The path of a cgroup from the root of the hierarchy, such as `/system.slice`;
/// the root is `/`. It begins with a slash and does not end with one.
///
/// A name in it is any bytes but `/`, NUL and newline: `cgroup_mkdir()` in
/// kernel/cgroup/cgroup.c refuses a newline, the file system the others. Printed,
/// it is harmless ([`names::printable`]); in JSON it is what [`names::to_json`]
/// makes of it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupPath(Arc<[u8]>);

impl CgroupPath {
    /// The root of the hierarchy.
    #[must_use]
    pub fn root() -> Self {
        Self::from("/")
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As a path of a file system, with the slash that it begins with.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// What follows the slash of the root; nothing for the root itself.
    fn below_root(&self) -> &[u8] {
        self.0.strip_prefix(b"/").unwrap_or(&self.0)
    }

    /// As a path relative to the root; empty for the root itself.
    #[must_use]
    pub fn relative(&self) -> &Path {
        Path::new(OsStr::from_bytes(self.below_root()))
    }

    /// Levels below the root, which has none.
    #[must_use]
    pub fn depth(&self) -> usize {
        let names = self.below_root().split(|byte| *byte == b'/');
        names.filter(|name| !name.is_empty()).count()
    }

    /// The path of a cgroup of this name just below.
    #[must_use]
    pub fn join(&self, name: &[u8]) -> Self {
        let own: &[u8] = if self.depth() == 0 { b"" } else { &self.0 };
        Self::from([own, b"/", name].concat().as_slice())
    }

    /// The path just above; none above the root.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        parent(&self.0).map(Self::from)
    }

    /// The path itself and the ones above it, up to the root.
    pub fn upward(&self) -> impl Iterator<Item = &[u8]> {
        iter::successors(Some(&*self.0), |path| parent(path))
    }

    /// Whether another path is this one or below it.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        let own: &[u8] = if self.depth() == 0 { b"" } else { &self.0 };
        let below = other.0.strip_prefix(own);
        below.is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
    }
}

fn parent(path: &[u8]) -> Option<&[u8]> {
    let slash = path.iter().rposition(|byte| *byte == b'/')?;
    match (slash, path.len()) {
        (0, 1) => None,
        (0, _) => Some(b"/"),
        _ => path.get(..slash),
    }
}

impl From<&[u8]> for CgroupPath {
    fn from(path: &[u8]) -> Self {
        Self(path.into())
    }
}

impl From<&str> for CgroupPath {
    fn from(path: &str) -> Self {
        Self::from(path.as_bytes())
    }
}

/// For maps: equal, ordered and hashed as its bytes are.
impl Borrow<[u8]> for CgroupPath {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for CgroupPath {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<Path> for CgroupPath {
    fn as_ref(&self) -> &Path {
        self.as_path()
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        names::printable(&self.0).fmt(f)
    }
}

impl fmt::Debug for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        names::printable(&self.0).fmt(f)
    }
}

impl Serialize for CgroupPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&names::to_json(&self.0))
    }
}

impl<'de> Deserialize<'de> for CgroupPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        names::from_json(&text)
            .filter(|path| path.starts_with(b"/"))
            .map(|path| Self::from(&*path))
            .ok_or_else(|| de::Error::invalid_value(de::Unexpected::Str(&text), &"a cgroup path"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn path(text: &str) -> CgroupPath {
        text.into()
    }

    #[test]
    fn a_path_contains_itself_and_what_is_below() {
        for (outer, inner, expected) in [
            ("/", "/", true),
            ("/", "/a/b", true),
            ("/a", "/a", true),
            ("/a", "/a/b", true),
            ("/a", "/ab", false),
            ("/a", "/", false),
            ("/a/b", "/a", false),
        ] {
            let found = path(outer).contains(&path(inner));
            assert_eq!(found, expected, "{outer} {inner}");
        }
    }

    #[test]
    fn the_way_up_ends_at_the_root() {
        let upward = |text: &str| -> Vec<String> {
            let path = path(text);
            let upward = path.upward().map(|path| CgroupPath::from(path).to_string());
            upward.collect()
        };
        assert_eq!(upward("/"), ["/"]);
        assert_eq!(upward("/a"), ["/a", "/"]);
        assert_eq!(upward("/a/b c"), ["/a/b c", "/a", "/"]);
    }

    proptest! {
        #[test]
        fn names_are_any_bytes(names in vec(vec(1_u8.., 1..6), 0..5)) {
            let name = |name: &Vec<u8>| -> Vec<u8> {
                name.iter().map(|byte| if *byte == b'/' { b'_' } else { *byte }).collect()
            };
            let names: Vec<_> = names.iter().map(name).collect();
            let built = names.iter().fold(CgroupPath::root(), |path, name| path.join(name));
            prop_assert_eq!(built.depth(), names.len());
            prop_assert_eq!(built.upward().count(), names.len() + 1);
            prop_assert!(CgroupPath::root().contains(&built));
            if let (Some(parent), Some(last)) = (built.parent(), names.last()) {
                prop_assert_eq!(parent.join(last), built.clone());
                prop_assert!(parent.contains(&built) && !built.contains(&parent));
            }
            let json = serde_json::to_string(&built).unwrap();
            prop_assert_eq!(serde_json::from_str::<CgroupPath>(&json).unwrap(), built);
        }
    }
}
