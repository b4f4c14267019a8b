//! Identity: what a cgroup is to people. The unit, container or pod that its path
//! names, and the names that container runtimes left on disk for it.
//!
//! Nobody is asked: no API, no socket. A runtime writes what it knows of a
//! container before it makes the container's cgroup, so the first connection can
//! already be told whose it is.

mod container_names;
mod location;
mod root_file;
mod selector;
mod wanted;

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{hierarchy::CgroupPath, names::printable};
pub use container_names::{ContainerNames, Runtime};
pub(crate) use container_names::{DOCKER_FILE, STORED};
pub use location::{ContainerId, Location};
pub use selector::{Attribute, NamePattern, Renaming, Selector};
pub use wanted::Wanted;

/// Digits of a container's id that are shown, as `docker ps` does.
const SHORT_ID: usize = 12;

/// What a cgroup is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The unit of the system's service manager, such as `redis.service`; for a
    /// cgroup inside of a unit or container still the outer one.
    pub unit: Option<String>,
    /// The container's id.
    pub container: Option<String>,
    /// What runs the container, where that is known.
    pub runtime: Option<Runtime>,
    /// The pod's uid in Kubernetes.
    pub pod_uid: Option<String>,
    /// What else the container is called.
    pub names: Arc<ContainerNames>,
}

impl Identity {
    /// As far as the path says.
    #[must_use]
    pub fn of_path(path: &[u8]) -> Self {
        let location = Location::of(path);
        Self::new(&location, location.containers.first(), Arc::default())
    }

    fn new(
        location: &Location<'_>,
        container: Option<&ContainerId<'_>>,
        names: Arc<ContainerNames>,
    ) -> Self {
        Self {
            unit: location.unit.map(str::to_owned),
            container: container.map(|container| container.id.to_owned()),
            runtime: names
                .runtime
                .or(container.and_then(|container| container.runtime)),
            pod_uid: names.pod_uid.clone().or_else(|| {
                container
                    .map_or(&location.pod, |container| &container.pod)
                    .clone()
            }),
            names,
        }
    }

    /// The first digits of the container's id.
    #[must_use]
    pub fn short_container(&self) -> Option<&str> {
        let id = self.container.as_deref()?;
        Some(id.get(..SHORT_ID).unwrap_or(id))
    }

    /// Whether there is anything to show in place of the path.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.unit.is_some() || self.container.is_some() || self.pod_uid.is_some()
    }
}

/// In short: `shop/web-0/app`, `docker:web`, `docker:3f2a9c1b7d42`,
/// `redis.service`. ContainerNames are as whoever chose them wrote them: not harmless on a
/// terminal.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = &*self.names;
        let [name, namespace, pod, unit] = [&names.name, &names.namespace, &names.pod, &self.unit]
            .map(|name| {
                let name = name.as_deref()?;
                Some(printable(name))
            });
        if let (Some(namespace), Some(pod)) = (namespace, pod) {
            write!(f, "{namespace}/{pod}")?;
            return name.iter().try_for_each(|name| write!(f, "/{name}"));
        }
        if let Some(name) = name.or(self.short_container().map(printable)) {
            let runtime = self.runtime.map_or("container", Runtime::name);
            return write!(f, "{runtime}:{name}");
        }
        match (&self.pod_uid, unit) {
            (Some(uid), _) => write!(f, "pod:{}", printable(uid)),
            (None, Some(unit)) => write!(f, "{unit}"),
            (None, None) => Ok(()),
        }
    }
}

/// Where a runtime writes anew what it calls a container, when that changes while the
/// container runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NamesFile {
    /// Docker's file of one container, in one of these directories.
    Docker(Vec<PathBuf>),
    /// The files of podman's storage in this directory, and the container's id.
    Podman(PathBuf, String),
}

impl NamesFile {
    /// That of the container whose outermost cgroup has this path; none where it can be
    /// of neither.
    pub(crate) fn of(path: &[u8]) -> Option<Self> {
        let location = Location::of(path);
        let id = location.container_of_its_own?;
        let container = location.containers.first()?;
        if container.pod.is_some() || container.is_rootless {
            return None;
        }
        let files = container_names::Files::default();
        match container.runtime {
            None | Some(Runtime::Docker) => {
                Some(Self::Docker(files.docker_directories(id).collect()))
            }
            Some(Runtime::Podman) => Some(Self::Podman(files.storage_of(id)?, id.to_owned())),
            Some(Runtime::Containerd | Runtime::CriO) => None,
        }
    }
}

/// What podman calls its containers, by their ids, in a directory of its storage.
pub(crate) fn stored_names(directory: &Path) -> HashMap<String, String> {
    container_names::Files::default().stored_names(directory)
}

/// The identities of this machine's cgroups. What a container is called is read
/// once, and kept until its cgroup is forgotten.
#[derive(Debug, Default)]
pub struct Identities {
    files: container_names::Files,
    known: Mutex<HashMap<String, Known>>,
}

/// A container that is known.
#[derive(Clone, Debug)]
struct Known {
    names: Arc<ContainerNames>,
    /// The path of its outermost cgroup.
    cgroup: CgroupPath,
}

impl Identities {
    /// What the cgroup with this path is. Reads files of container runtimes where
    /// the path is a container's that is not known yet: local ones, of bounded
    /// size.
    ///
    /// Of containers inside of containers the outermost counts that this machine's
    /// runtimes know: in a node that is itself a container (kind) that is the
    /// inner one, seen from the machine around it the node.
    #[must_use]
    pub fn of(&self, path: &[u8]) -> Identity {
        let location = Location::of(path);
        for container in &location.containers {
            if let Some(names) = self.names(container) {
                return Identity::new(&location, Some(container), names);
            }
        }
        Identity::new(&location, location.containers.first(), Arc::default())
    }

    /// The cgroups of containers in pods that are known, those of which this is true by
    /// what their runtime tells of them.
    #[must_use]
    pub fn pods(&self, mut which: impl FnMut(&Identity) -> bool) -> Vec<CgroupPath> {
        let known = self.known();
        let pods = known.values().filter(|known| known.names.pod.is_some());
        let identity = |known: &&Known| Identity {
            names: known.names.clone(),
            ..Identity::default()
        };
        let found = pods.filter(|known| which(&identity(known)));
        found.map(|known| known.cgroup.clone()).collect()
    }

    /// Takes over what others have read of containers in pods, of which nothing changes
    /// while they live, and of those whose renames are followed.
    pub fn learn(&self, others: &Self) {
        let others = others.known();
        let is_followed = |runtime| matches!(runtime, Some(Runtime::Docker | Runtime::Podman));
        let stays = |names: &ContainerNames| names.pod.is_some() || is_followed(names.runtime);
        let learnt = others.iter().filter(|(_, known)| stays(&known.names));
        let learnt = learnt.map(|(id, known)| (id.clone(), known.clone()));
        self.known().extend(learnt);
    }

    /// Forgets what was read for the cgroup with this path, which is gone.
    pub fn forget(&self, path: &[u8]) {
        if let Some(id) = Location::of(path).container_of_its_own {
            self.known().remove(id);
        }
    }

    fn names(&self, container: &ContainerId<'_>) -> Option<Arc<ContainerNames>> {
        // Whoever runs it could have written anything.
        if container.is_rootless {
            return None;
        }
        if let Some(known) = self.known().get(container.id) {
            return Some(known.names.clone());
        }
        // What is not there may still come.
        let names = Arc::new(self.files.read(container.id, container.pod.is_some())?);
        let known = Known {
            names: names.clone(),
            cgroup: CgroupPath::from(container.cgroup),
        };
        self.known().insert(container.id.to_owned(), known);
        Some(names)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
