//! Wanted: whose connections a person asks for.

use super::{Identity, NamePattern};

/// Which identities are wanted; all that is given must match.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The unit, by name.
    pub unit: Option<NamePattern>,
    /// The container, by its name or the first digits of its id.
    pub container: Option<NamePattern>,
    /// The pod, by its name or by `namespace/name`.
    pub pod: Option<NamePattern>,
}

impl Wanted {
    /// Whether anything is asked for.
    #[must_use]
    pub fn is_any(&self) -> bool {
        self.unit.is_none() && self.container.is_none() && self.pod.is_none()
    }

    /// Whether an identity is wanted.
    #[must_use]
    pub fn includes(&self, identity: &Identity) -> bool {
        let meets = |pattern: &Option<NamePattern>, matches: &dyn Fn(&NamePattern) -> bool| {
            pattern.as_ref().is_none_or(matches)
        };
        let names = &identity.names;
        let is = |pattern: &NamePattern, name: Option<&str>| {
            name.is_some_and(|name| pattern.matches(name))
        };
        let unit = |pattern: &NamePattern| is(pattern, identity.unit.as_deref());
        let container = |pattern: &NamePattern| {
            let id = identity.container.as_deref().unwrap_or_default();
            is(pattern, names.name.as_deref())
                || (pattern.as_str().len() >= super::SHORT_ID && id.starts_with(pattern.as_str()))
        };
        let pod = |pattern: &NamePattern| {
            is(pattern, names.pod.as_deref()) || is(pattern, names.pod_with_namespace().as_deref())
        };
        meets(&self.unit, &unit) && meets(&self.container, &container) && meets(&self.pod, &pod)
    }
}
