//! What is found on disk, and what selectors make of it.

use std::{fs, os::unix::fs::PermissionsExt as _};

use serde_json::json;
use tempfile::TempDir;

use super::*;

/// The files of runtimes, in a directory of the test's own.
struct Disk(TempDir);

impl Disk {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn identities(&self) -> Identities {
        Identities {
            files: container_names::Files::below(self.0.path()),
            known: Mutex::default(),
        }
    }

    fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let file = self.0.path().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }

    fn docker(&self, digit: char, name: &str, labels: &serde_json::Value) {
        let file = format!("var/lib/docker/containers/{}/config.v2.json", id(digit));
        let config = json!({
            "State": {"Pid": 1},
            "Name": format!("/{name}"),
            "Config": {"Image": "bb:1", "Labels": labels, "Env": null},
        });
        self.write(&file, config.to_string());
    }

    fn containerd(&self, directory: &str, digit: char, annotations: &serde_json::Value) {
        let file = format!(
            "{directory}/io.containerd.runtime.v2.task/k8s.io/{}/config.json",
            id(digit)
        );
        let bundle = json!({"ociVersion": "1.0", "annotations": annotations});
        self.write(&file, bundle.to_string());
    }
}

fn id(digit: char) -> String {
    digit.to_string().repeat(64)
}

fn path(text: &str) -> Vec<u8> {
    text.replace("AID", &id('a'))
        .replace("BID", &id('b'))
        .into_bytes()
}

#[test]
fn docker_tells_names_images_and_labels() {
    let disk = Disk::new();
    disk.docker('a', "web", &json!({"app": "shop", "tier": "front"}));
    let identities = disk.identities();
    let found = identities.of(&path("/system.slice/docker-AID.scope/nested"));
    assert_eq!(found.to_string(), "docker:web");
    assert_eq!(found.names.image.as_deref(), Some("bb:1"));
    assert_eq!(found.names.labels["app"], "shop");
    assert_eq!(found.container, Some(id('a')));
    assert_eq!(found.unit, Some(format!("docker-{}.scope", id('a'))));
    // Another container, of which nothing is known.
    let found = identities.of(&path("/docker/BID"));
    assert_eq!(found.to_string(), "docker:bbbbbbbbbbbb");
    assert_eq!(*found.names, ContainerNames::default());
}

#[test]
fn dockers_data_may_be_elsewhere() {
    let disk = Disk::new();
    let config = json!({"Name": "/web", "Config": null}).to_string();
    let file = format!("srv/docker/containers/{}/config.v2.json", id('a'));
    disk.write(&file, config);
    disk.write("etc/docker/daemon.json", r#"{"data-root": "/srv/docker"}"#);
    let found = disk.identities().of(&path("/docker/AID"));
    assert_eq!(found.to_string(), "docker:web");
}

#[test]
fn containerd_tells_pods() {
    let disk = Disk::new();
    let pod = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.container-name": "app",
        "io.kubernetes.cri.image-name": "docker.io/library/shop:7",
        "io.kubernetes.cri.sandbox-name": "web-0",
        "io.kubernetes.cri.sandbox-namespace": "shop",
        "io.kubernetes.cri.sandbox-uid": "7-7",
    });
    disk.containerd("run/containerd", 'a', &pod);
    let mut sandbox = pod.clone();
    let fields = sandbox.as_object_mut().unwrap();
    fields.remove("io.kubernetes.cri.container-name");
    disk.containerd("run/k3s/containerd", 'b', &sandbox);
    let identities = disk.identities();
    let found = identities.of(&path("/kubepods/besteffort/pod7/AID"));
    assert_eq!(found.to_string(), "shop/web-0/app");
    assert_eq!(found.runtime, Some(Runtime::Containerd));
    assert_eq!(found.pod_uid.as_deref(), Some("7-7"));
    assert_eq!(
        found.names.image.as_deref(),
        Some("docker.io/library/shop:7")
    );
    let sandbox = identities.of(&path("/kubepods/besteffort/pod7/BID"));
    assert_eq!(sandbox.to_string(), "shop/web-0");
}

#[test]
fn podman_and_cri_o_share_a_storage() {
    let disk = Disk::new();
    let storage = "var/lib/containers/storage/overlay-containers";
    disk.write(
        &format!("{storage}/{}/userdata/config.json", id('a')),
        r#"{"annotations": {"io.container.manager": "libpod"}}"#,
    );
    let stored = json!([
        {"id": id('c'), "names": ["other"], "metadata": ""},
        {"id": id('a'), "names": ["db"], "metadata": r#"{"image-name":"localhost/bb:1","name":"db"}"#},
    ]);
    disk.write(&format!("{storage}/containers.json"), stored.to_string());
    disk.write(
        &format!(
            "run/containers/storage/overlay-containers/{}/userdata/config.json",
            id('b')
        ),
        json!({"annotations": {
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.container.name": "app",
            "io.kubernetes.pod.name": "web-0",
            "io.kubernetes.pod.namespace": "shop",
            "io.kubernetes.cri-o.Labels": r#"{"app":"shop"}"#,
        }})
        .to_string(),
    );
    let identities = disk.identities();
    let found = identities.of(&path("/libpod_parent/libpod-AID/container"));
    assert_eq!(found.to_string(), "podman:db");
    assert_eq!(found.names.image.as_deref(), Some("localhost/bb:1"));
    let files = container_names::Files::below(disk.0.path());
    let directory = files.storage_of(&id('a')).unwrap();
    assert_eq!(directory, disk.0.path().join(storage));
    assert_eq!(files.storage_of(&id('d')), None);
    let names = files.stored_names(&directory);
    assert_eq!(names[&id('a')], "db");
    assert_eq!(names[&id('c')], "other");
    let found = identities.of(&path("/kubepods.slice/crio-BID.scope"));
    assert_eq!(found.to_string(), "shop/web-0/app");
    assert_eq!(found.runtime, Some(Runtime::CriO));
    assert_eq!(found.names.labels["app"], "shop");
}

#[test]
fn of_nested_containers_the_outermost_that_is_known_counts() {
    let disk = Disk::new();
    let nested = path("/docker/AID/system.slice/docker-BID.scope");
    assert_eq!(disk.identities().of(&nested).container, Some(id('a')));
    disk.docker('b', "inner", &json!(null));
    assert_eq!(disk.identities().of(&nested).to_string(), "docker:inner");
    disk.docker('a', "outer", &json!(null));
    assert_eq!(disk.identities().of(&nested).to_string(), "docker:outer");
}

#[test]
fn what_users_run_borrows_no_names() {
    let disk = Disk::new();
    disk.docker('a', "db", &json!(null));
    let found = disk.identities().of(&path(
        "/user.slice/user-1.slice/user@1.service/user.slice/libpod-AID.scope",
    ));
    assert_eq!(found.to_string(), "podman:aaaaaaaaaaaa");
}

#[test]
fn names_are_kept_until_the_cgroup_is_gone() {
    let disk = Disk::new();
    let identities = disk.identities();
    let own = path("/docker/AID");
    let name = || identities.of(&own).names.name.clone();
    assert_eq!(name(), None);
    disk.docker('a', "web", &json!(null));
    assert_eq!(name().as_deref(), Some("web"));
    disk.docker('a', "renamed", &json!(null));
    identities.forget(&path("/docker/AID/below"));
    assert_eq!(name().as_deref(), Some("web"));
    identities.forget(&own);
    assert_eq!(name().as_deref(), Some("renamed"));
    identities.forget(&own);
    assert!(identities.known().is_empty());
}

#[test]
fn hostile_files_are_nothing() {
    let disk = Disk::new();
    let file = format!("var/lib/docker/containers/{}/config.v2.json", id('a'));
    let own = path("/docker/AID");
    let name = || disk.identities().of(&own).names.name.clone();
    let long = "x".repeat(4096);
    let deep = "[".repeat(100_000);
    for content in [
        String::new(),
        "null".to_owned(),
        "[]".to_owned(),
        "{".to_owned(),
        r#"{"Name": 7}"#.to_owned(),
        r#"{"Name": ""}"#.to_owned(),
        format!(r#"{{"Name": "/{long}"}}"#),
        format!(r#"{{"Name": "/a", "Deep": {deep}}}"#),
        format!(r#"{{"Name": "/a", "Pad": "{}"}}"#, "x".repeat(5 << 20)),
    ] {
        disk.write(&file, &content);
        assert_eq!(name(), None, "{content:.60}");
    }
    disk.write(&file, b"{\"Name\": \"/\xff\"}");
    assert_eq!(name(), None);
    disk.write(&file, r#"{"Name": "/a"}"#);
    assert_eq!(name().as_deref(), Some("a"));
    let shared = fs::Permissions::from_mode(0o666);
    fs::set_permissions(disk.0.path().join(&file), shared).unwrap();
    assert_eq!(name(), None);
}

#[test]
fn labels_without_measure_are_cut() {
    let disk = Disk::new();
    let mut labels: serde_json::Map<_, _> = (0..1000)
        .map(|number| (format!("k{number:04}"), json!("v")))
        .collect();
    labels.insert("a".repeat(256), json!("v"));
    labels.insert("b".to_owned(), json!("v".repeat(5000)));
    disk.docker('a', "web", &labels.into());
    let found = disk.identities().of(&path("/docker/AID"));
    assert_eq!(found.names.labels.len(), 256);
    assert!(found.names.labels.keys().all(|key| key.starts_with('k')));
}

fn selector(attributes: &[(Attribute, &[&str])], labels: &[(&str, &str)]) -> Selector {
    let pattern = |text: &&str| NamePattern::new(text).unwrap();
    Selector {
        attributes: attributes
            .iter()
            .map(|(attribute, names)| (*attribute, names.iter().map(pattern).collect()))
            .collect(),
        labels: labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), pattern(value)))
            .collect(),
    }
}

#[test]
fn selectors_want_all_that_they_name() {
    use Attribute::{Container, Image, Namespace, Pod, Unit};
    let disk = Disk::new();
    disk.docker('a', "db-1", &json!({"app": "shop/db", "empty": ""}));
    let container = disk.identities().of(&path("/docker/AID"));
    let unit = |name: &str| Identity::of_path(format!("/system.slice/{name}").as_bytes());
    let pod = json!({
        "io.kubernetes.cri.sandbox-name": "web-0",
        "io.kubernetes.cri.sandbox-namespace": "shop",
    });
    disk.containerd("run/containerd", 'b', &pod);
    let pod = disk.identities().of(&path("/kubepods/besteffort/pod7/BID"));
    for (identity, selector, expected) in [
        (&container, selector(&[], &[]), false),
        (&container, selector(&[(Container, &["db-*"])], &[]), true),
        (&container, selector(&[(Container, &["db"])], &[]), false),
        (
            &container,
            selector(&[(Container, &["x", "db-?"])], &[]),
            true,
        ),
        (&container, selector(&[(Image, &["*:1"])], &[]), true),
        (
            &container,
            selector(&[(Container, &["db-*"]), (Image, &["x"])], &[]),
            false,
        ),
        (&container, selector(&[], &[("app", "shop*")]), true),
        (&container, selector(&[], &[("empty", "*")]), true),
        (&container, selector(&[], &[("none", "*")]), false),
        (
            &container,
            selector(&[(Container, &["db-1"])], &[("app", "x")]),
            false,
        ),
        (&container, selector(&[(Namespace, &["*"])], &[]), false),
        (&container, selector(&[(Pod, &["*"])], &[]), false),
        (&pod, selector(&[(Pod, &["web-0"])], &[]), true),
        (&pod, selector(&[(Pod, &["shop/web-0"])], &[]), true),
        (&pod, selector(&[(Pod, &["shop/*"])], &[]), true),
        (&pod, selector(&[(Pod, &["bank/web-0"])], &[]), false),
        (
            &pod,
            selector(&[(Namespace, &["bank"]), (Pod, &["web-0"])], &[]),
            false,
        ),
        (
            &unit("redis.service"),
            selector(&[(Unit, &["redis.service"])], &[]),
            true,
        ),
        (
            &unit("a@b.service"),
            selector(&[(Unit, &["a@.service"])], &[]),
            true,
        ),
        (
            &unit("a@b.service"),
            selector(&[(Unit, &["a@c.service"])], &[]),
            false,
        ),
        (
            &unit("a-b@c.service"),
            selector(&[(Unit, &["a@.service"])], &[]),
            false,
        ),
        (
            &unit(r"a\x2db.service"),
            selector(&[(Unit, &[r"a\x2d?.service"])], &[]),
            true,
        ),
    ] {
        assert_eq!(selector.selects(identity), expected, "{selector}");
    }
}

#[test]
fn a_person_asks_by_name_or_id() {
    let disk = Disk::new();
    disk.docker('a', "db", &json!(null));
    let container = disk.identities().of(&path("/docker/AID"));
    let wanted = |text: &str| Wanted {
        container: Some(text.parse().unwrap()),
        ..Wanted::default()
    };
    assert!(wanted("d*").includes(&container));
    assert!(wanted("aaaaaaaaaaaa").includes(&container));
    // Too few digits to be an id.
    assert!(!wanted("aaa").includes(&container));
    assert!(!wanted("bbbbbbbbbbbb").includes(&container));
    assert!(Wanted::default().is_any());
    assert!(!wanted("db").is_any());
}
