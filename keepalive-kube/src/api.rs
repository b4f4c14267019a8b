//! The API: its names, each written here and nowhere else, and how it is asked.

use kube::{Client, Config, api::ApiResource};

/// The group of the custom resources. Nobody can own a domain below `internal`, so
/// it clashes with nothing.
pub const GROUP: &str = "keepalive.internal";

/// Their version.
pub const VERSION: &str = "v1alpha1";

/// On a pod: the name of a KeepalivePolicy in its namespace that claims it,
/// whatever that one selects.
pub const ANNOTATION: &str = "keepalive.internal/policy";

/// Who reports, in events and as the owner of fields.
pub const CONTROLLER: &str = "keepalive-kube";

/// A client that tries once: who asks knows best when to try again.
///
/// # Errors
///
/// The config names what cannot be read, such as a certificate.
pub fn client(mut config: Config) -> kube::Result<Client> {
    config.default_retry = false;
    Client::try_from(config)
}

/// The kinds of custom resources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// For pods of its own namespace.
    Policy,
    /// For pods of all namespaces; its bounds hold for the others.
    ClusterPolicy,
    /// What a node has in force.
    Node,
}

impl Kind {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Policy, Self::ClusterPolicy, Self::Node];

    /// As it stands in manifests.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Policy => "KeepalivePolicy",
            Self::ClusterPolicy => "ClusterKeepalivePolicy",
            Self::Node => "KeepaliveNode",
        }
    }

    /// As it stands in addresses.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Policy => "keepalivepolicies",
            Self::ClusterPolicy => "clusterkeepalivepolicies",
            Self::Node => "keepalivenodes",
        }
    }

    /// How the API is asked for it.
    #[must_use]
    pub fn resource(self) -> ApiResource {
        ApiResource {
            group: GROUP.to_owned(),
            version: VERSION.to_owned(),
            api_version: format!("{GROUP}/{VERSION}"),
            kind: self.name().to_owned(),
            plural: self.plural().to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_has_the_domain_has_the_same() {
        assert_eq!(ANNOTATION, format!("{GROUP}/policy"));
        let roles = include_str!("../../packaging/kubernetes/base/rbac.yaml");
        let groups = roles.lines().filter(|line| line.contains("apiGroups"));
        let ours: Vec<_> = groups.filter(|line| line.contains("keepalive")).collect();
        assert!(!ours.is_empty());
        assert!(ours.iter().all(|line| line.contains(GROUP)), "{ours:?}");
    }
}
