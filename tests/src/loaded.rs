use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{Cgroup, Place, agent_command, output};

const LIMIT: Duration = Duration::from_secs(30);

/// Runs bpftool and returns what it shows.
///
/// # Errors
///
/// It fails, such as for an object that does not exist.
pub fn bpftool(arguments: &[&str]) -> Result<Value> {
    let show = || {
        let mut command = Place::default().command("bpftool");
        output(command.arg("--json").args(arguments), LIMIT)
    };
    let mut shown = show()?;
    // A link of somebody else's that is just being made.
    for _ in 0..10 {
        if !shown.stdout.contains("temporarily unavailable") {
            break;
        }
        shown = show()?;
    }
    ensure!(shown.code == Some(0), "{arguments:?}: {}", shown.stdout);
    Ok(serde_json::from_str(&shown.stdout)?)
}

/// The kernel's objects by which something is in force on a cgroup, by their ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The link.
    pub link: u64,
    /// The program under it.
    pub program: u64,
    /// The maps that the program keeps alive.
    pub maps: Vec<u64>,
}

impl Loaded {
    /// What is attached to a cgroup, if anything is.
    ///
    /// # Errors
    ///
    /// bpftool fails.
    pub fn on(cgroup: &Cgroup) -> Result<Option<Self>> {
        Self::on_id(cgroup.id()?)
    }

    /// The same by the cgroup's id.
    ///
    /// # Errors
    ///
    /// As [`Self::on`].
    pub fn on_id(cgroup: u64) -> Result<Option<Self>> {
        let links = bpftool(&["link", "show"])?;
        let links = links.as_array().context("no list")?;
        let is_ours = |link: &&Value| {
            let hook = link["attach_type"].as_str();
            // There can be one for bounds as well.
            link["cgroup_id"] == cgroup && hook.is_some_and(|hook| hook.ends_with("sock_ops"))
        };
        let Some(link) = links.iter().find(is_ours) else {
            return Ok(None);
        };
        let program = link["prog_id"].as_u64().context("no program")?;
        let shown = bpftool(&["prog", "show", "id", &program.to_string()])?;
        let maps = shown["map_ids"].as_array().context("no maps")?;
        Ok(Some(Self {
            link: link["id"].as_u64().context("no id")?,
            program,
            maps: maps.iter().filter_map(Value::as_u64).collect(),
        }))
    }

    /// The map of this name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn map(&self, name: &str) -> Result<u64> {
        for id in &self.maps {
            // One of a set that is replaced meanwhile is gone.
            let shown = bpftool(&["map", "show", "id", &id.to_string()]);
            if shown.is_ok_and(|shown| shown["name"] == name) {
                return Ok(*id);
            }
        }
        anyhow::bail!("no map {name}")
    }

    /// What of it the kernel still has.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let maps = self.maps.iter().map(|map| ("map", *map));
        let all = [("link", self.link), ("prog", self.program)]
            .into_iter()
            .chain(maps);
        all.filter(|(kind, id)| bpftool(&[kind, "show", "id", &id.to_string()]).is_ok())
            .map(|(kind, id)| format!("{kind} {id}"))
            .collect()
    }
}

/// What `status` says of one cgroup.
#[derive(Clone, Debug)]
pub struct Status {
    /// The exit code.
    pub code: Option<i32>,
    /// The whole report.
    pub report: Value,
    /// What is in force there.
    pub set: Value,
}

/// Asks for it.
///
/// # Errors
///
/// The command fails.
pub fn status(cgroup: &Cgroup) -> Result<Status> {
    let mut command = agent_command();
    command.args(["status", "--json", "--cgroup", cgroup.path()]);
    let shown = output(&mut command, LIMIT)?;
    let report: Value = serde_json::from_str(&shown.stdout)
        .with_context(|| format!("{:?}: {}", shown.code, shown.stderr))?;
    let set = report["in_force"][0].clone();
    Ok(Status {
        code: shown.code,
        report,
        set,
    })
}

/// Runs `detach` for one cgroup, never for others.
///
/// # Errors
///
/// It fails.
pub fn detach(cgroup: &Cgroup) -> Result<()> {
    let mut command = agent_command();
    command.args(["detach", "--cgroup", cgroup.path()]);
    let done = output(&mut command, LIMIT)?;
    ensure!(done.code == Some(0), "{:?}: {}", done.code, done.stderr);
    Ok(())
}
