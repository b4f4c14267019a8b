//! Node: writes config for the agent of this node, and reports what it has in
//! force.

use std::{
    collections::BTreeSet,
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{DynamicObject, PartialObjectMeta, Patch, PatchParams},
};
use serde_json::json;
use tempfile::NamedTempFile;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::{
    api::{CONTROLLER, Kind},
    config::{self, Rules},
    evidence,
    objects::{NodeReport, Objects},
    watch::{self, Audience, Watched},
};

/// The drop-in, between those of packages and of people.
pub const FILE: &str = "60-kubernetes.toml";

/// The directory for files that are not complete. One of its own, below that of the
/// drop-ins: in that one the agent is woken by each write.
const INCOMPLETE: &str = ".60-kubernetes";

/// How often is looked what the agent has in force, and reported if it is another.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// What a companion is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name of this node.
    pub node: String,
    /// The directory of drop-ins that it shares with the agent.
    pub directory: PathBuf,
    /// The socket on which the agent serves its metrics.
    pub agent: PathBuf,
}

/// Runs until the future ends.
///
/// # Errors
///
/// The directory cannot be written to at the start.
pub async fn run(client: Client, options: &Options, until: impl Future<Output = ()>) -> Result<()> {
    let audience = Audience::Node(options.node.clone());
    let mut changes = watch::changes(&client, &audience);
    let mut watched = Watched::default();
    let file = DropIn::open(&options.directory)?;
    let mut reporter = Reporter::new(client, options);
    let mut rules = None;
    let mut compiled = None;
    let mut written = file.names();
    let mut again = interval(REPORT_EVERY);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::pin!(until);
    loop {
        tokio::select! {
            () = &mut until => return Ok(()),
            change = changes.next() => {
                let Some(change) = change else { return Ok(()) };
                let news = watched.apply_all(change, &mut changes);
                if news.rules {
                    rules = None;
                }
                if !news.is_any() || !watched.is_complete(&audience) {
                    continue;
                }
                let objects = &watched.objects;
                let rules = rules
                    .get_or_insert_with(|| Rules::new(&objects.policies, &objects.namespaces));
                written.append(&mut rules.ahead());
                let new = rules.drop_in(&objects.pods, &written);
                written.clone_from(&new.names);
                compiled = Some((new.text, report(objects, rules)));
            }
            _ = again.tick() => {}
        }
        // Also what could not be written before.
        let Some((text, report)) = &compiled else {
            continue;
        };
        match file.write(text) {
            Ok(written) => reporter.report(report, written).await,
            Err(error) => warn!(
                "writing {}: {error}; what is there goes on",
                file.path.display()
            ),
        }
    }
}

/// Every policy that is written, with its generation.
fn report(objects: &Objects, rules: &Rules) -> NodeReport {
    let accepted = rules.verdicts.iter().filter(|(_, verdict)| verdict.is_ok());
    let generation = |id| {
        objects
            .policies
            .get(id)
            .map_or(0, |object| object.generation)
    };
    NodeReport(
        accepted
            .map(|(id, _)| (id.to_string(), generation(id)))
            .collect(),
    )
}

/// The file that the agent reads.
#[derive(Debug)]
pub struct DropIn {
    /// Where it is written.
    incomplete: PathBuf,
    path: PathBuf,
}

impl DropIn {
    /// The one in this directory, which is made where it does not exist.
    ///
    /// # Errors
    ///
    /// The directory cannot be made or read.
    pub fn open(directory: &Path) -> Result<Self> {
        let context = || format!("the directory of drop-ins {}", directory.display());
        let file = Self {
            incomplete: directory.join(INCOMPLETE),
            path: directory.join(FILE),
        };
        fs::create_dir_all(&file.incomplete).with_context(context)?;
        remove_leftovers(&file.incomplete).with_context(context)?;
        Ok(file)
    }

    /// What the policies in it are called.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        let text = fs::read_to_string(&self.path);
        text.map(|text| config::names(&text)).unwrap_or_default()
    }

    /// Writes it if it has another text; readers see the old text or the new one.
    /// When it was written last.
    ///
    /// # Errors
    ///
    /// It cannot be written; then it is as it was.
    pub fn write(&self, text: &str) -> io::Result<SystemTime> {
        if fs::read(&self.path).is_ok_and(|there| there == text.as_bytes()) {
            return fs::metadata(&self.path)?.modified();
        }
        let mut file = NamedTempFile::new_in(&self.incomplete)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        let file = file.persist(&self.path).map_err(|error| error.error)?;
        info!("{}: {} bytes", self.path.display(), text.len());
        file.metadata()?.modified()
    }
}

/// Removes what a companion left that was killed while it wrote. One that is just
/// going over to this one may be writing now.
fn remove_leftovers(directory: &Path) -> io::Result<()> {
    const OLD: Duration = Duration::from_mins(1);
    for entry in fs::read_dir(directory)?.flatten() {
        let age = || {
            entry
                .metadata()?
                .modified()?
                .elapsed()
                .map_err(io::Error::other)
        };
        if age().is_ok_and(|age| age > OLD) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Tells the API what this node has in force.
struct Reporter<'a> {
    api: Api<DynamicObject>,
    nodes: Api<PartialObjectMeta<Node>>,
    options: &'a Options,
    reported: Option<NodeReport>,
    asked: Option<tokio::time::Instant>,
}

impl<'a> Reporter<'a> {
    fn new(client: Client, options: &'a Options) -> Self {
        Self {
            api: Api::all_with(client.clone(), &Kind::Node.resource()),
            nodes: Api::all(client),
            options,
            reported: None,
            asked: None,
        }
    }

    /// Reports if there is anything new, and not more often than it has to.
    async fn report(&mut self, written: &NodeReport, at: SystemTime) {
        if self.reported.as_ref() == Some(written)
            || self
                .asked
                .is_some_and(|asked| asked.elapsed() < REPORT_EVERY)
        {
            return;
        }
        self.asked = Some(tokio::time::Instant::now());
        match evidence::is_in_force(&self.options.agent, at).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                warn!(
                    "asking the agent at {}: {error:#}",
                    self.options.agent.display()
                );
                return;
            }
        }
        match self.patch(written).await {
            Ok(()) => self.reported = Some(written.clone()),
            Err(error) => warn!("reporting what is in force: {error}"),
        }
    }

    async fn patch(&self, report: &NodeReport) -> kube::Result<()> {
        let node = self.nodes.get(&self.options.node).await?;
        let resource = Kind::Node.resource();
        let object = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {
                "name": self.options.node,
                // It goes with the node.
                "ownerReferences": [{
                    "apiVersion": "v1",
                    "kind": "Node",
                    "name": self.options.node,
                    "uid": node.metadata.uid,
                }],
            },
            "status": { "policies": report.0 },
        });
        let own = PatchParams::apply(CONTROLLER).force();
        self.api
            .patch(&self.options.node, &own, &Patch::Apply(object))
            .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_file_is_written_whole_and_only_when_it_changes() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("kubernetes");
        let file = DropIn::open(&below).unwrap();
        let inode = || fs::metadata(below.join(FILE)).unwrap().ino();
        let first = file.write("a").unwrap();
        let before = inode();
        assert_eq!(file.write("a").unwrap(), first);
        assert_eq!(inode(), before);
        file.write("b").unwrap();
        assert_ne!(inode(), before);
        assert_eq!(fs::read_to_string(below.join(FILE)).unwrap(), "b");
        assert_eq!(fs::read_dir(below.join(INCOMPLETE)).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_companion_left_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let incomplete = directory.path().join(INCOMPLETE);
        fs::create_dir(&incomplete).unwrap();
        let old = incomplete.join("old");
        let new = incomplete.join("new");
        let other = directory.path().join("50-mine.toml");
        for path in [&old, &new, &other] {
            fs::write(path, "half").unwrap();
        }
        let before = SystemTime::now() - Duration::from_mins(2);
        for path in [&old, &other] {
            fs::File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_modified(before)
                .unwrap();
        }
        DropIn::open(directory.path()).unwrap();
        assert!(!old.exists());
        assert!(new.exists() && other.exists());
    }

    #[test]
    fn what_cannot_be_written_leaves_what_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let file = DropIn::open(directory.path()).unwrap();
        file.write("a").unwrap();
        let path = directory.path().join(FILE);
        let gone = DropIn {
            incomplete: directory.path().join("gone"),
            path: path.clone(),
        };
        assert!(gone.write("b").is_err());
        assert_eq!(fs::read_to_string(path).unwrap(), "a");
    }
}
