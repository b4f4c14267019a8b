//! A real container, with namespaces of its own and nothing in its file system
//! but a static program: governed through the cgroup its runtime puts it in.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use keepalive_tests::{Agent, Cgroup, Container, Need, Options, require};

#[test]
fn two_containers_with_different_policies() -> Result<()> {
    require!(Need::Program("runc"), Need::Program("unshare"));
    let root = Cgroup::new()?;
    let (red, blue) = (root.child("red")?, root.child("blue")?);
    let config = format!(
        "[[policy]]\nname = \"red\"\ncgroup = \"{}\"\nidle = \"71s\"\n\
         [[policy]]\nname = \"blue\"\ncgroup = \"{}\"\nidle = \"72s\"\n",
        red.path(),
        blue.path()
    );
    let agent = Agent::start(&root, &config)?;
    // The cgroups of the containers themselves do not exist yet.
    for (parent, idle) in [(&red, 71), (&blue, 72)] {
        let path = format!("{}/container", parent.path());
        let mut container = Container::start(&path)?;
        let (connecting, accepting) = container.probe().connection()?;
        for socket in [connecting, accepting] {
            let options = container.probe().options(socket)?;
            assert_eq!(options, Options::on(idle, 10, 6));
        }
        let process = PathBuf::from(format!("/proc/{}", container.process()?));
        let cgroups = fs::read_to_string(process.join("cgroup"))?;
        let expected = format!("0::{path}");
        assert!(cgroups.lines().any(|line| line == expected), "{cgroups}");
        for namespace in ["net", "pid", "mnt"] {
            let link = |process: PathBuf| fs::read_link(process.join("ns").join(namespace));
            assert_ne!(link(process.clone())?, link(PathBuf::from("/proc/self"))?);
        }
        container.finish()?;
    }
    let finished = agent.stop()?;
    for name in ["red", "blue"] {
        assert_eq!(finished.count(name, "seen"), 2);
        assert_eq!(finished.count(name, "turned_on"), 2);
    }
    Ok(())
}
