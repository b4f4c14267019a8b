//! Early connections: those that may have been made in a new cgroup before it was
//! given its policy, which a sweep has to bring along.
//!
//! A runtime makes a cgroup, puts a process of its own into it, and becomes the
//! container much later. So mostly there are none, and a look at what the processes
//! hold takes far less than a sweep of the node.

use std::collections::HashSet;

use crate::{
    hierarchy::{Cgroup, Hierarchy},
    netns,
};

/// More processes are not looked at, and of each not more descriptors: it is the
/// daemon that waits for this.
const PROCESSES: usize = 32;
const DESCRIPTORS: usize = 256;

/// Whether there may be any. Where that cannot be told there may be.
///
/// What is made after the cgroup was given its policy has it; so it does not matter
/// what the processes do meanwhile, unless one hands on what it holds to a process
/// that is not looked at: a new one in the cgroup is.
pub(super) fn may_be_in(cgroup: &Cgroup, hierarchy: &Hierarchy) -> bool {
    let mut seen = HashSet::new();
    loop {
        let Ok(processes) = hierarchy.processes(cgroup) else {
            return true;
        };
        let new: Vec<_> = processes
            .into_iter()
            .filter(|process| seen.insert(*process))
            .collect();
        if new.is_empty() {
            return false;
        }
        let holds = |process: &u32| netns::holds_tcp(*process, DESCRIPTORS).unwrap_or(true);
        if seen.len() > PROCESSES || new.iter().any(holds) {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        net::TcpListener,
        os::fd::OwnedFd,
        path::Path,
        process::{Child, Command, Stdio},
    };

    use super::*;

    fn sleep(input: impl Into<Stdio>) -> Child {
        let mut sleep = Command::new("sleep");
        sleep.arg("60").stdin(input);
        sleep.stdout(Stdio::null()).stderr(Stdio::null());
        sleep.spawn().unwrap()
    }

    #[test]
    fn only_a_process_with_tcp_can_have_connections() {
        let mount = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy::at(mount.path());
        let below = mount.path().join("made/below");
        fs::create_dir_all(&below).unwrap();
        let made = hierarchy.existing(Path::new("/made")).unwrap();
        let with = |above: &str, inside: &str| {
            fs::write(mount.path().join("made/cgroup.procs"), above).unwrap();
            fs::write(below.join("cgroup.procs"), inside).unwrap();
            may_be_in(&made, &hierarchy)
        };
        assert!(!with("", ""));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut processes = [sleep(Stdio::null()), sleep(OwnedFd::from(listener))];
        let [plain, connected] = processes.each_ref().map(|process| process.id().to_string());
        assert!(!with(&plain, ""));
        assert!(!with(&plain, &plain));
        assert!(with(&plain, &connected));
        assert!(with(&format!("{plain}\n{connected}\n"), ""));
        // What cannot be told: of another pid namespace, or gone.
        assert!(with("0", ""));
        assert!(with(&u32::MAX.to_string(), ""));
        for process in &mut processes {
            process.kill().unwrap();
            process.wait().unwrap();
        }
        let gone = Path::new("/made/below");
        let gone = hierarchy.existing(gone).unwrap();
        fs::remove_dir_all(&below).unwrap();
        assert!(!may_be_in(&gone, &hierarchy));
    }
}
