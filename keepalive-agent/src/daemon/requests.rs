//! Requests: what users, people at the command line and other agents ask of the
//! daemon.

use std::time::Duration;

use anyhow::Result;
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use super::{
    ANOTHER_AGENT, Daemon, Leaves, PATIENCE, Reporter,
    control::{Asked, Control, Request},
    journal::What,
    reload::Why,
    self_service::{self, Answer, SelfServiceSocket},
};
use crate::{config::SelfService, datapath::chain, grant::Grant};

/// Sets that are built because users asked for more than the one in force has room
/// for follow each other in this time.
const FOR_USERS: Duration = Duration::from_secs(10);

impl Daemon {
    pub(super) async fn on_request(
        &mut self,
        asked: std::io::Result<Asked>,
        reporter: &mut dyn Reporter,
    ) -> Option<(&'static str, Leaves)> {
        let mut asked = match asked {
            Ok(asked) => asked,
            Err(error) => {
                self.part_failed("control socket", error.to_string());
                self.control = None;
                self.retry_later();
                return None;
            }
        };
        if asked.request == Request::StepAside {
            info!("another agent takes over");
            self.building = None;
            self.forget_early();
            self.end_sweep();
            if let Some(mut sweep) = self.earlier_sweep.take() {
                // What the other one does, it would undo.
                let over = async { while sweep.progress().await.is_some() {} };
                if timeout(PATIENCE, over).await.is_err() {
                    warn!("the sweep under way does not stop; the other agent does not wait");
                }
            }
        }
        if let Err(error) = asked.answer().await {
            debug!("answering on the control socket: {error}");
            self.reload(Why::GoesOn, reporter);
            return None;
        }
        match asked.request {
            Request::Events(wanted) => {
                self.read_dead_peers();
                self.journal.serve(wanted, asked.into_stream());
                self.dead_peers.follow();
            }
            Request::Observed => {
                self.read_dead_peers();
                self.dead_peers.serve_observed(asked.into_stream());
            }
            Request::Detach => return Some(("a request to detach", Leaves::Nothing)),
            Request::StepAside => self.successor = Some(asked),
            Request::TakenOver => {}
        }
        None
    }

    /// The agent that this one steps aside for has taken over, or is gone.
    pub(super) async fn on_successor(
        &mut self,
        request: Option<Request>,
        reporter: &mut dyn Reporter,
    ) -> Option<(&'static str, Leaves)> {
        let successor = self.successor.take();
        if request == Some(Request::TakenOver) {
            if let Some(mut successor) = successor {
                // The answer says that this one is about to end.
                let _ = successor.answer().await;
            }
            return Some((ANOTHER_AGENT, Leaves::AnotherAgent));
        }
        warn!("the agent that was about to take over is gone; this one goes on");
        self.reload(Why::GoesOn, reporter);
        None
    }

    pub(super) fn listen(&mut self) {
        self.listen_to_users();
        match Control::listen(&self.root.path) {
            Ok(control) => {
                self.control = Some(control);
                self.part("control socket", Ok(()));
            }
            Err(error) => {
                let error = format!("making the control socket: {error}");
                warn!("{error}; no other agent can take over, and `detach` cannot reach this one");
                self.part_failed("control socket", error);
            }
        }
    }

    /// Listens to users where the config lets them ask, and does not where not.
    pub(super) fn listen_to_users(&mut self) {
        const PART: &str = "self-service";
        if self.config.self_service.is_none() || self.options.dry_run {
            self.users = None;
            self.state.parts.remove(PART);
            return;
        }
        // Of two agents that know each other the other one listens still.
        if self.users.is_some() || self.ownership.is_none() {
            return;
        }
        match SelfServiceSocket::listen(&self.root.path) {
            Ok(users) => {
                self.users = Some(users);
                self.part(PART, Ok(()));
            }
            Err(error) => {
                let error = format!("making the socket for users: {error}");
                warn!("{error}; users cannot ask for policies");
                self.part_failed(PART, error);
                self.retry_later();
            }
        }
    }

    /// Gives a user a policy for a command, if it may have it.
    pub(super) fn grant(&mut self, uid: u32, request: &self_service::Request) -> Answer {
        let refused = |why: &str| Answer::Refused(why.to_owned());
        let Some(service) = self.config.self_service.clone() else {
            return refused("the operator does not let users ask any more");
        };
        if let Err(why) = service.allow(&request.wish) {
            return Answer::Refused(why);
        }
        let root = &self.root.path;
        let found = self_service::own_cgroup(&self.hierarchy, root, &request.cgroup, uid);
        let cgroup = match found {
            Ok(cgroup) => cgroup,
            Err(why) => return Answer::Refused(why),
        };
        if self.grants.iter().any(|grant| grant.cgroup == cgroup) {
            return refused("this command has its policy already");
        }
        if let Err(why) = self.has_room(&service, uid) {
            return Answer::Refused(why);
        }
        let Some(enforcement) = &mut self.enforcement else {
            return Answer::Busy("nothing is in force".to_owned());
        };
        let wish = request.wish.clone();
        let grant = Grant { cgroup, uid, wish };
        let cgroup = &grant.cgroup;
        let policies = self.claimants.claim_of(&cgroup.path);
        match enforcement.set.add_grant(&grant, &policies) {
            Ok(()) => {}
            Err(error) if error.is_full() => {
                if Instant::now() >= self.build_for_users {
                    info!("{error}: building one with more room");
                    self.build_for_users = Instant::now() + FOR_USERS;
                    self.build_again();
                }
                return Answer::Busy(error.to_string());
            }
            Err(error) => return Answer::Refused(chain(&error)),
        }
        self.grants.push(grant.clone());
        if let Err(error) = enforcement.set.record().set_grants(&self.grants) {
            self.grants.pop();
            if let Err(error) = enforcement.set.remove_cgroup(cgroup) {
                debug!("{}", chain(&error));
            }
            return Answer::Refused(chain(&error));
        }
        debug!(cgroup = %cgroup.path, uid, "a user has a policy for a command");
        self.journal.note(What::CgroupAssigned {
            cgroup: cgroup.path.clone(),
            policies: vec![grant.over(None).name],
        });
        Answer::Granted
    }

    /// Whether a user may have one more command with a policy of its own.
    fn has_room(&mut self, service: &SelfService, uid: u32) -> Result<(), String> {
        let counts = |grants: &[Grant]| {
            let own = grants.iter().filter(|grant| grant.uid == uid).count();
            (own, grants.len())
        };
        let fits = |(own, all): (usize, usize)| {
            own < service.commands_per_user as usize && all < service.commands as usize
        };
        if fits(counts(&self.grants)) {
            return Ok(());
        }
        // The kernel may not have told of all that are gone.
        self.forget_ended_grants();
        let counted = counts(&self.grants);
        if fits(counted) {
            Ok(())
        } else if counted.0 >= service.commands_per_user as usize {
            Err(format!(
                "{} commands of this user have policies of their own already, as many as                  [self-service] allows",
                counted.0
            ))
        } else {
            Err(format!(
                "{} commands have policies of their own already, as many as [self-service] allows",
                counted.1
            ))
        }
    }

    /// Forgets what was given to commands whose cgroups are gone.
    pub(super) fn forget_ended_grants(&mut self) {
        let hierarchy = &self.hierarchy;
        let exists = |grant: &Grant| {
            let found = hierarchy.lookup(&grant.cgroup.path);
            found.is_ok_and(|found| found.as_ref() == Some(&grant.cgroup))
        };
        self.grants.retain(exists);
    }
}
