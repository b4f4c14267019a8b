//! Location: what the path of a cgroup says about it, and nothing else.
//!
//! The names are those that systemd, the runtimes and the kubelet give; tests have
//! one path of each.

use std::str;

use super::Runtime;

/// What a path says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Location<'a> {
    /// The unit of the system's service manager, without the escaping of cgroup
    /// names: the first that is not a slice, as `cg_path_get_unit()` in systemd's
    /// src/basic/cgroup-util.c; else the innermost slice. What a user's manager or
    /// a container calls a unit inside of it does not count.
    pub unit: Option<&'a str>,
    /// The containers on the path, outermost first.
    pub containers: Vec<ContainerId<'a>>,
    /// The uid of the innermost pod, with dashes.
    pub pod: Option<String>,
    /// The container whose outermost cgroup this is.
    pub container_of_its_own: Option<&'a str>,
}

/// A container on a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerId<'a> {
    /// 64 hexadecimal digits.
    pub id: &'a str,
    /// The path of its outermost cgroup.
    pub cgroup: &'a [u8],
    /// What runs it, where the path says so.
    pub runtime: Option<Runtime>,
    /// The uid of the pod that it is in.
    pub pod: Option<String>,
    /// Whether it is below a user's service manager, where the user names cgroups.
    pub is_rootless: bool,
}

impl<'a> Location<'a> {
    /// Reads a path from the root of the hierarchy.
    #[must_use]
    pub fn of(path: &'a [u8]) -> Self {
        let mut location = Self::default();
        let mut slices = Slices::Within;
        let (mut in_kubepods, mut is_rootless) = (false, false);
        let mut above = "";
        let mut end = 0;
        for part in path.split(|byte| *byte == b'/') {
            end += part.len() + 1;
            location.container_of_its_own = None;
            if part.is_empty() {
                continue;
            }
            // No runtime or manager writes anything else.
            let Ok(part) = str::from_utf8(part) else {
                slices = Slices::Over;
                above = "";
                continue;
            };
            let unit = unit(part);
            match unit {
                Some(unit) if slices == Slices::Within => {
                    location.unit = Some(unit);
                    if unit.strip_suffix(".slice").is_none() {
                        slices = Slices::Over;
                        is_rootless = unit.starts_with("user@");
                    }
                }
                _ => slices = Slices::Over,
            }
            in_kubepods |= part.contains("kubepods");
            // What runc makes of a path for systemd where it does not use systemd.
            let mut parts = part.splitn(3, ':');
            let (first, second, third) = (parts.next(), parts.next(), parts.next());
            if in_kubepods && let Some(uid) = first.and_then(pod_uid) {
                location.pod = Some(uid);
            }
            let found = match (second, third) {
                (Some(runtime), Some(id)) => named_container(runtime, id),
                _ => container(part, above),
            };
            if let Some((runtime, id)) = found {
                location.containers.push(ContainerId {
                    id,
                    cgroup: path.get(..end - 1).unwrap_or(path),
                    runtime,
                    pod: location.pod.clone(),
                    is_rootless,
                });
                if location.containers.len() == 1 {
                    location.container_of_its_own = Some(id);
                }
            }
            above = part;
        }
        location
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Slices {
    Within,
    Over,
}

/// The unit that a cgroup is named after. An underscore before a name keeps it
/// apart from the kernel's own files (`cg_escape()` in systemd).
fn unit(part: &str) -> Option<&str> {
    const LONGEST: usize = 255;
    const KINDS: [&str; 6] = ["service", "scope", "slice", "socket", "mount", "swap"];
    let name = part.strip_prefix('_').unwrap_or(part);
    let (before, kind) = name.rsplit_once('.')?;
    let is_valid = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    (KINDS.contains(&kind)
        && !before.is_empty()
        && !before.starts_with('@')
        && name.len() <= LONGEST
        && before.chars().all(is_valid))
    .then_some(name)
}

/// The runtime and id in the name of a container's cgroup: `docker-ID.scope`,
/// `libpod-ID`, `cri-containerd-ID.scope`, or the bare id that runtimes use where
/// systemd does not manage cgroups (`/docker/ID`, `/kubepods/podUID/ID`).
fn container<'a>(part: &'a str, above: &str) -> Option<(Option<Runtime>, &'a str)> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    match name.rsplit_once('-') {
        Some((runtime, id)) => named_container(runtime, id),
        None if is_id(name) => Some(((above == "docker").then_some(Runtime::Docker), name)),
        None => None,
    }
}

/// A monitor (`libpod-conmon-ID.scope`) is not the container.
fn named_container<'a>(runtime: &str, id: &'a str) -> Option<(Option<Runtime>, &'a str)> {
    let runtime = match runtime {
        "docker" => Runtime::Docker,
        "libpod" | "libpod-payload" => Runtime::Podman,
        "cri-containerd" | "nerdctl" => Runtime::Containerd,
        "crio" => Runtime::CriO,
        _ => return None,
    };
    is_id(id).then_some((Some(runtime), id))
}

fn is_id(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The uid in the name of a pod's cgroup: `podUID`, or `kubepods-…-podUID.slice`
/// with underscores. Static pods have a hash instead, without dashes.
fn pod_uid(part: &str) -> Option<String> {
    let uid = match part.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1,
        None => part.strip_prefix("pod")?,
    };
    let uid = uid.replace('_', "-");
    let groups: Vec<_> = uid.split('-').map(str::len).collect();
    let is_uid = groups == [32] || groups == [8, 4, 4, 4, 12];
    (is_uid
        && uid
            .bytes()
            .all(|byte| byte == b'-' || byte.is_ascii_hexdigit()))
    .then_some(uid)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const UID: &str = "2f9a1c3b-7d42-4e5f-8a6b-0c1d2e3f4a5b";
    /// As a static pod has it.
    const HASH: &str = "0f9a1c3b7d424e5f8a6b0c1d2e3f4a5b";

    /// An id that begins so.
    fn id(digit: char) -> String {
        digit.to_string().repeat(64)
    }

    /// `AID`, `BID`, `PODUID` and `POD_UID` stand for what is in real paths.
    fn filled(path: &str) -> String {
        path.replace("AID", &id('a'))
            .replace("BID", &id('b'))
            .replace("PODUID", UID)
            .replace("POD_UID", &UID.replace('-', "_"))
            .replace("HASH", HASH)
    }

    #[test]
    fn units_are_those_of_the_systems_manager() {
        for (path, unit) in [
            ("/", None),
            ("/init.scope", Some("init.scope")),
            ("/system.slice", Some("system.slice")),
            ("/system.slice/redis.service", Some("redis.service")),
            ("/system.slice/redis.service/worker", Some("redis.service")),
            (
                "/system.slice/system-getty.slice/getty@tty1.service",
                Some("getty@tty1.service"),
            ),
            (
                "/system.slice/system-getty.slice",
                Some("system-getty.slice"),
            ),
            (
                "/system.slice/dev-disk-by\\x2dlabel.swap",
                Some("dev-disk-by\\x2dlabel.swap"),
            ),
            // A name that the kernel has files of.
            ("/system.slice/_cpu.service", Some("cpu.service")),
            ("/system.slice/worker", Some("system.slice")),
            (
                "/user.slice/user-0.slice/session-3.scope",
                Some("session-3.scope"),
            ),
            // Users name their units as they like.
            (
                "/user.slice/user-1.slice/user@1.service/app.slice/redis.service",
                Some("user@1.service"),
            ),
            (
                "/system.slice/a.service/system.slice/redis.service",
                Some("a.service"),
            ),
            // So do containers.
            ("/docker/AID/system.slice/redis.service", None),
            (
                "/machine.slice/libpod-AID.scope/init.scope",
                Some("libpod-AID.scope"),
            ),
            ("/.service", None),
            ("/@a.service", None),
            ("/a b.service", None),
            ("/system.slice/redis.servic", Some("system.slice")),
        ] {
            let (path, unit) = (filled(path), unit.map(filled));
            let found = Location::of(path.as_bytes());
            assert_eq!(found.unit, unit.as_deref(), "{path}");
        }
    }

    #[test]
    fn containers_of_every_stack() {
        let docker = Some(Runtime::Docker);
        let podman = Some(Runtime::Podman);
        let containerd = Some(Runtime::Containerd);
        let cri_o = Some(Runtime::CriO);
        for (path, runtime, pod) in [
            ("/system.slice/docker-AID.scope", docker, None),
            ("/docker/AID", docker, None),
            ("/anything/AID", None, None),
            ("/machine.slice/libpod-AID.scope", podman, None),
            ("/machine.slice/libpod-AID.scope/container", podman, None),
            ("/machine.slice/libpod-AID.scope/init.scope", podman, None),
            (
                "/machine.slice/libpod-AID.scope/system.slice/a.service",
                podman,
                None,
            ),
            ("/libpod_parent/libpod-AID", podman, None),
            (
                "/machine.slice/machine-libpod_pod_BID.slice/libpod-AID.scope",
                podman,
                None,
            ),
            ("/system.slice/q.service/libpod-payload-AID", podman, None),
            (
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podPOD_UID.slice/cri-containerd-AID.scope",
                containerd,
                Some(UID),
            ),
            (
                "/kubepods.slice/kubepods-podPOD_UID.slice/crio-AID.scope/container",
                cri_o,
                Some(UID),
            ),
            ("/kubepods/burstable/podPODUID/AID", None, Some(UID)),
            ("/kubepods/podHASH/AID", None, Some(HASH)),
            (
                "/kubepods.slice/kubepods-podHASH.slice/cri-containerd-AID.scope",
                containerd,
                Some(HASH),
            ),
            // containerd with cgroupfs where the kubelet uses systemd.
            (
                "/system.slice/containerd.service/kubepods-besteffort-podPOD_UID.slice:cri-containerd:AID",
                containerd,
                Some(UID),
            ),
            // Below a root of another hierarchy: a nested systemd, kind's kubelet.
            (
                "/machine.slice/systemd-nspawn@n1.service/payload/system.slice/docker-AID.scope",
                docker,
                None,
            ),
            (
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podPOD_UID.slice/cri-containerd-AID.scope",
                containerd,
                Some(UID),
            ),
        ] {
            let path = filled(path);
            let found = Location::of(path.as_bytes());
            let end = path.find(&id('a')).unwrap() + id('a').len();
            let end = end + path[end..].find('/').unwrap_or(path.len() - end);
            assert_eq!(
                found.containers,
                [ContainerId {
                    id: &id('a'),
                    cgroup: &path.as_bytes()[..end],
                    runtime,
                    pod: pod.map(str::to_owned),
                    is_rootless: false,
                }],
                "{path}"
            );
        }
    }

    #[test]
    fn what_only_looks_like_a_container_is_none() {
        for path in [
            "/",
            "/machine.slice/libpod-conmon-AID.scope",
            "/system.slice/crio-conmon-AID.scope",
            "/system.slice/docker.service",
            "/system.slice/docker-compose.service",
            "/docker/3f2a9c1b7d42",
            "/a/AIDa",
            "/a/docker-XYZ.scope",
            "/a/AID.service",
            "/podPODUID",
        ] {
            let path = filled(path);
            let found = Location::of(path.as_bytes());
            assert_eq!((found.containers, found.pod), (vec![], None), "{path}");
        }
    }

    #[test]
    fn containers_in_containers_are_told_outermost_first() {
        let path = filled(
            "/docker/AID/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podPOD_UID.slice/cri-containerd-BID.scope",
        );
        let found = Location::of(path.as_bytes());
        let ids: Vec<_> = found.containers.iter().map(|found| found.id).collect();
        assert_eq!(ids, [id('a'), id('b')]);
        assert_eq!(found.containers[0].pod, None);
        assert_eq!(found.pod.as_deref(), Some(UID));
    }

    #[test]
    fn a_containers_own_cgroup_is_the_outermost() {
        let own = |path: &str| {
            let path = filled(path);
            let found = Location::of(path.as_bytes());
            found.container_of_its_own.map(str::to_owned)
        };
        assert_eq!(own("/docker/AID"), Some(id('a')));
        assert_eq!(own("/docker/AID/container"), None);
        assert_eq!(own("/docker/AID/docker/BID"), None);
        assert_eq!(own("/docker"), None);
    }

    #[test]
    fn users_run_containers_rootless() {
        let path = filled(
            "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-AID.scope/container",
        );
        let found = Location::of(path.as_bytes());
        assert!(found.containers[0].is_rootless);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_path(path in vec(any::<u8>(), 0..200)) {
            let _ = Location::of(&path);
        }

        #[test]
        fn names_around_it_do_not_hide_a_container(
            above in vec("[a-z_.:-]{1,8}", 0..4),
            below in vec("[a-z_.:-]{1,8}", 0..4),
        ) {
            let middle = format!("docker-{}.scope", id('a'));
            let path: String = above
                .iter()
                .chain([&middle])
                .chain(&below)
                .flat_map(|part| ["/", part.as_str()])
                .collect();
            let found = Location::of(path.as_bytes());
            prop_assert_eq!(found.containers[0].id, id('a'));
            prop_assert_eq!(found.container_of_its_own.is_some(), below.is_empty());
        }
    }
}
