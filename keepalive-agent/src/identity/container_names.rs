//! Container names: what a container is called, as its runtime left it on disk before it
//! made the container's cgroup.
//!
//! | runtime | file | what it tells |
//! |---|---|---|
//! | docker | `containers/ID/config.v2.json` in its data directory | name, image, labels |
//! | containerd | the bundle's `config.json`, in its annotations | of pods: container, image, namespace, pod, uid |
//! | CRI-O | the bundle's `config.json`, in its annotations | the same, and labels |
//! | podman | `containers.json` of the storage | name, image |

use std::{
    collections::{BTreeMap, HashMap},
    io,
    iter::once_with,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::debug;

use super::root_file::RootDirectory;

/// Characters of the longest name, and of the longest image or label.
const LONGEST_NAME: usize = 255;
const LONGEST_VALUE: usize = 4096;

/// Labels of a container that are looked at, in the order of their keys.
const MOST_LABELS: usize = 256;

/// What runs containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Runtime {
    /// dockerd.
    Docker,
    /// podman and its library libpod.
    Podman,
    /// containerd, with or without Kubernetes.
    Containerd,
    /// CRI-O.
    CriO,
}

impl Runtime {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Containerd => "containerd",
            Self::CriO => "cri-o",
        }
    }
}

/// What a container is called. Each is as somebody chose it, bounded in length and
/// otherwise any text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerNames {
    /// What runs it.
    pub runtime: Option<Runtime>,
    /// Its name; in Kubernetes within its pod, where a pod's sandbox has none.
    pub name: Option<String>,
    /// The image that it was made from.
    pub image: Option<String>,
    /// Its labels, where the runtime tells them.
    pub labels: BTreeMap<String, String>,
    /// The Kubernetes namespace of its pod.
    pub namespace: Option<String>,
    /// The name of its pod.
    pub pod: Option<String>,
    /// The uid of its pod.
    pub pod_uid: Option<String>,
}

/// The files of all runtimes.
#[derive(Debug)]
pub(super) struct Files {
    root: PathBuf,
    owner: u32,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            root: "/".into(),
            owner: 0,
        }
    }
}

/// A container of a storage.
#[derive(Deserialize)]
struct StoredContainer {
    id: String,
    names: Option<Vec<String>>,
    metadata: Option<String>,
}

/// Where docker keeps its data by itself, and its file of a container.
const DOCKER: &str = "var/lib/docker";
pub(crate) const DOCKER_FILE: &str = "config.v2.json";

/// Where containerd keeps bundles, by itself and in distributions of Kubernetes.
const CONTAINERD: [&str; 3] = [
    "run/containerd",
    "run/k3s/containerd",
    "var/snap/microk8s/common/run/containerd",
];

/// Where podman and CRI-O keep containers: the storage, and what is gone with the
/// boot.
const STORAGES: [&str; 2] = ["var/lib/containers/storage", "run/containers/storage"];

/// The files in which a storage has the names of its containers, all those of a kind
/// together.
pub(crate) const STORED: [&str; 2] = ["containers.json", "volatile-containers.json"];

/// What storage is called that has a driver's name before it.
const DRIVERS: [&str; 4] = ["overlay", "vfs", "btrfs", "zfs"];

impl Files {
    #[cfg(test)]
    pub(super) fn below(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            owner: rustix::process::getuid().as_raw(),
        }
    }

    /// What the container with this id is called; none where no runtime knows it. Where
    /// it is in a pod, docker is asked last.
    pub(super) fn read(&self, id: &str, is_in_pod: bool) -> Option<ContainerNames> {
        let docker = || self.docker(id);
        let others = || self.containerd(id).or_else(|| self.storage(id));
        let found = if is_in_pod {
            others().or_else(docker)
        } else {
            docker().or_else(others)
        };
        found.map(ContainerNames::bounded)
    }

    fn docker(&self, id: &str) -> Option<ContainerNames> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Container {
            name: Option<String>,
            config: Option<Config>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Config {
            image: Option<String>,
            labels: Option<BTreeMap<String, String>>,
        }
        let file = format!("containers/{id}/{DOCKER_FILE}");
        let container: Container = self
            .json(DOCKER.as_ref(), &file)
            .or_else(|| self.json(&self.docker_root()?, &file))?;
        let (image, labels) = container
            .config
            .map(|config| (config.image, config.labels))
            .unwrap_or_default();
        Some(ContainerNames {
            runtime: Some(Runtime::Docker),
            // It is kept with a slash before it.
            name: container
                .name
                .map(|name| name.trim_start_matches('/').to_owned()),
            image,
            labels: labels.unwrap_or_default(),
            ..ContainerNames::default()
        })
    }

    /// Where docker keeps its data, if its config says so.
    fn docker_root(&self) -> Option<PathBuf> {
        #[derive(Deserialize)]
        struct Daemon {
            #[serde(rename = "data-root")]
            data_root: Option<PathBuf>,
        }
        let daemon: Daemon = self.json("etc/docker".as_ref(), "daemon.json")?;
        Some(daemon.data_root?.strip_prefix("/").ok()?.to_owned())
    }

    /// The directories in which docker may keep its file of a container.
    pub(super) fn docker_directories(&self, id: &str) -> impl Iterator<Item = PathBuf> {
        let roots = once_with(|| Some(DOCKER.into())).chain(once_with(|| self.docker_root()));
        roots
            .flatten()
            .map(move |root: PathBuf| self.root.join(root).join("containers").join(id))
    }

    fn containerd(&self, id: &str) -> Option<ContainerNames> {
        /// The namespaces of Kubernetes, and of nerdctl.
        const NAMESPACES: [&str; 2] = ["k8s.io", "default"];
        CONTAINERD.iter().find_map(|directory| {
            NAMESPACES.iter().find_map(|namespace| {
                let file = format!("io.containerd.runtime.v2.task/{namespace}/{id}/config.json");
                let bundle: Bundle = self.json(directory.as_ref(), &file)?;
                Some(ContainerNames {
                    runtime: Some(Runtime::Containerd),
                    ..bundle.names()
                })
            })
        })
    }

    /// podman and CRI-O, which share a storage.
    fn storage(&self, id: &str) -> Option<ContainerNames> {
        STORAGES.iter().find_map(|storage| {
            DRIVERS.iter().find_map(|driver| {
                let file = format!("{driver}-containers/{id}/userdata/config.json");
                let bundle: Bundle = self.json(storage.as_ref(), &file)?;
                let names = bundle.names();
                if names.runtime == Some(Runtime::CriO) {
                    return Some(names);
                }
                let stored = self.stored(storage, driver, id).unwrap_or_default();
                Some(ContainerNames {
                    runtime: Some(Runtime::Podman),
                    name: stored.name.or(names.name),
                    image: stored.image.or(names.image),
                    ..names
                })
            })
        })
    }

    /// What the storage says of a container.
    fn stored(&self, storage: &str, driver: &str, id: &str) -> Option<ContainerNames> {
        #[derive(Deserialize)]
        struct Metadata {
            #[serde(rename = "image-name")]
            image_name: Option<String>,
        }
        let directory = Path::new(storage).join(format!("{driver}-containers"));
        let container = self
            .all_stored(&directory)
            .find(|container| container.id == id)?;
        let metadata = container.metadata.as_deref();
        let metadata: Option<Metadata> = metadata.and_then(|text| serde_json::from_str(text).ok());
        Some(ContainerNames {
            name: container.names.and_then(|names| names.into_iter().next()),
            image: metadata.and_then(|metadata| metadata.image_name),
            ..ContainerNames::default()
        })
    }

    fn all_stored(&self, directory: &Path) -> impl Iterator<Item = StoredContainer> {
        STORED.iter().flat_map(move |file| {
            let stored: Option<Vec<StoredContainer>> = self.json(directory, file);
            stored.into_iter().flatten()
        })
    }

    /// The directory of the storage that has a container.
    pub(super) fn storage_of(&self, id: &str) -> Option<PathBuf> {
        let directories = STORAGES.iter().flat_map(|storage| {
            let of = move |driver| self.root.join(storage).join(format!("{driver}-containers"));
            DRIVERS.iter().map(of)
        });
        directories
            .into_iter()
            .find(|directory| directory.join(id).symlink_metadata().is_ok())
    }

    /// What the containers in a directory of the storage are called, by their ids.
    pub(super) fn stored_names(&self, directory: &Path) -> HashMap<String, String> {
        let directory = directory.strip_prefix(&self.root).unwrap_or(directory);
        let name = |stored: StoredContainer| Some((stored.id, stored.names?.into_iter().next()?));
        self.all_stored(directory).filter_map(name).collect()
    }

    /// Reads a file of JSON below a directory; none where there is none, and where
    /// it is not to be trusted or understood.
    fn json<T: DeserializeOwned>(&self, directory: &Path, file: &str) -> Option<T> {
        let directory = self.root.join(directory);
        let read = || -> io::Result<Option<T>> {
            let Some(opened) = RootDirectory::open(&directory, self.owner)? else {
                return Ok(None);
            };
            let content = opened.read(file.as_ref())?;
            Ok(content
                .map(|content| serde_json::from_slice(&content))
                .transpose()?)
        };
        read().unwrap_or_else(|error| {
            debug!("{}/{file}: {error}", directory.display());
            None
        })
    }
}

/// What runc is given to make a container from.
#[derive(Deserialize)]
struct Bundle {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

impl Bundle {
    fn names(mut self) -> ContainerNames {
        let is_cri_o = self
            .annotations
            .contains_key("io.kubernetes.cri-o.ContainerType");
        let mut take = |keys: &[&str]| keys.iter().find_map(|key| self.annotations.remove(*key));
        // Of CRI-O first, which writes both for its sandboxes.
        ContainerNames {
            runtime: is_cri_o.then_some(Runtime::CriO),
            name: take(&[
                "io.kubernetes.container.name",
                "io.kubernetes.cri.container-name",
                "nerdctl/name",
            ])
            // What the kubelet calls a sandbox.
            .filter(|name| name != "POD"),
            image: take(&[
                "io.kubernetes.cri-o.ImageName",
                "io.kubernetes.cri.image-name",
            ]),
            namespace: take(&[
                "io.kubernetes.pod.namespace",
                "io.kubernetes.cri.sandbox-namespace",
            ]),
            pod: take(&["io.kubernetes.pod.name", "io.kubernetes.cri.sandbox-name"]),
            pod_uid: take(&["io.kubernetes.pod.uid", "io.kubernetes.cri.sandbox-uid"]),
            labels: take(&["io.kubernetes.cri-o.Labels"])
                .and_then(|labels| serde_json::from_str(&labels).ok())
                .unwrap_or_default(),
        }
    }
}

impl ContainerNames {
    /// The pod as people write it: `namespace/pod`.
    pub(super) fn pod_with_namespace(&self) -> Option<String> {
        let (namespace, pod) = self.namespace.as_ref().zip(self.pod.as_ref())?;
        Some(format!("{namespace}/{pod}"))
    }

    /// Without what is longer than anything that a person would select by.
    fn bounded(self) -> Self {
        let within = |value: Option<String>, longest| {
            value.filter(|value| !value.is_empty() && value.len() <= longest)
        };
        let label = |(key, value): &(String, String)| {
            key.len() <= LONGEST_NAME && value.len() <= LONGEST_VALUE
        };
        Self {
            runtime: self.runtime,
            name: within(self.name, LONGEST_NAME),
            image: within(self.image, LONGEST_VALUE),
            labels: self
                .labels
                .into_iter()
                .filter(label)
                .take(MOST_LABELS)
                .collect(),
            namespace: within(self.namespace, LONGEST_NAME),
            pod: within(self.pod, LONGEST_NAME),
            pod_uid: within(self.pod_uid, LONGEST_NAME),
        }
    }
}
