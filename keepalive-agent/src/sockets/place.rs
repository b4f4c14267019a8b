//! What a cgroup's path tells about who lives there: a container, a unit of
//! systemd.

use crate::hierarchy::CgroupPath;

/// Runtimes that put their name before the container's id in the name of a
/// cgroup.
const RUNTIMES: [&str; 5] = ["docker", "cri-containerd", "crio", "libpod", "nerdctl"];

/// Hexadecimal digits of a full container id.
const FULL_ID: usize = 64;

/// How much of a container id people read, as `docker ps` shows it.
const SHORT_ID: usize = 12;

/// Who lives in a cgroup, as far as its path shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place<'a> {
    /// Id of the innermost container, as long as it stands in the path.
    pub container: Option<&'a str>,
    /// The innermost service or scope; within a container only one that is
    /// inside of it.
    pub unit: Option<&'a [u8]>,
}

impl<'a> Place<'a> {
    /// Reads a path from the root of the hierarchy.
    #[must_use]
    pub fn of(path: &'a CgroupPath) -> Self {
        let mut unit = None;
        for part in path.as_bytes().rsplit(|byte| *byte == b'/') {
            if let Some(id) = container(part) {
                return Self {
                    container: Some(id),
                    unit,
                };
            }
            let is_unit = part.ends_with(b".service") || part.ends_with(b".scope");
            if unit.is_none() && is_unit {
                unit = Some(part);
            }
        }
        Self {
            container: None,
            unit,
        }
    }

    /// The container's id, shortened as `docker ps` does.
    #[must_use]
    pub fn short_container(&self) -> Option<&'a str> {
        self.container.map(|id| id.get(..SHORT_ID).unwrap_or(id))
    }
}

/// The id in the name of a container's cgroup: `docker-ID.scope`,
/// `cri-containerd-ID.scope`, `libpod-ID`, or the bare id that runtimes use
/// where systemd does not manage cgroups (`/docker/ID`, `/kubepods/podUID/ID`).
/// A monitor (`crio-conmon-ID.scope`) is not the container.
fn container(part: &[u8]) -> Option<&str> {
    let part = str::from_utf8(part).ok()?;
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let (id, least) = match name.rsplit_once('-') {
        Some((runtime, id)) if RUNTIMES.contains(&runtime) => (id, SHORT_ID),
        Some(_) => return None,
        None => (name, FULL_ID),
    };
    let is_id = (least..=FULL_ID).contains(&id.len())
        && id
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_id.then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_containers_and_units() {
        let id = "3f2a9c1b7d42".to_owned() + &"0".repeat(52);
        let full = Some(id.as_str());
        let short = Some("3f2a9c1b7d42");
        for (path, container, unit) in [
            ("/", None, None),
            ("/system.slice", None, None),
            ("/system.slice/nginx.service", None, Some("nginx.service")),
            ("/init.scope", None, Some("init.scope")),
            (
                "/user.slice/user-0.slice/session-3.scope",
                None,
                Some("session-3.scope"),
            ),
            (
                "/user.slice/user-1.slice/user@1.service/app.slice/x.service/sub",
                None,
                Some("x.service"),
            ),
            ("/system.slice/docker-ID.scope", full, None),
            (
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-ID.scope",
                full,
                None,
            ),
            (
                "/kubepods.slice/x.slice/crio-ID.scope/container",
                full,
                None,
            ),
            (
                "/machine.slice/libpod-conmon-ID.scope",
                None,
                Some("libpod-conmon-ID.scope"),
            ),
            ("/machine.slice/libpod-ID.scope", full, None),
            ("/libpod_parent/libpod-ID", full, None),
            ("/docker/ID", full, None),
            ("/system.slice/docker.service/docker/ID", full, None),
            ("/kubepods/burstable/podaa-bb/ID", full, None),
            (
                "/docker/ID/system.slice/nginx.service",
                full,
                Some("nginx.service"),
            ),
            ("/system.slice/docker-3f2a9c1b7d42.scope", short, None),
            ("/docker/3f2a9c1b7d42", None, None),
            (
                "/system.slice/docker-compose.service",
                None,
                Some("docker-compose.service"),
            ),
            ("/a/docker-XYZ.scope", None, Some("docker-XYZ.scope")),
        ] {
            let path = path.replace("ID", &id);
            let unit = unit.map(|unit| unit.replace("ID", &id));
            let cgroup = CgroupPath::from(path.as_str());
            let place = Place::of(&cgroup);
            assert_eq!(place.container, container, "{path}");
            assert_eq!(place.unit, unit.as_deref().map(str::as_bytes), "{path}");
            assert_eq!(place.short_container(), container.and(short), "{path}");
        }
    }
}
