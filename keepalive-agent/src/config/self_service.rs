//! Self-service: what users may ask for a command of their own, and within which
//! bounds. What they ask for counts as what an application sets: defaults of the
//! policies that would hold otherwise give way, their bounds hold.

use std::path::Path;

use keepalive_common::policy::{Keepalive, Policy};
use serde::{Deserialize, Serialize};

use super::{
    document::{self, Entry, Optional},
    text::{At, Findings, Text},
    timer::{Default as Given, Timer},
};

/// The keys of the table, after the timers.
pub(super) const COMMANDS: &str = "commands";
pub(super) const COMMANDS_PER_USER: &str = "commands-per-user";

/// Most commands that can be allowed at a time: each has a policy in the kernel.
pub(super) const MOST_COMMANDS: u32 = 1024;

/// What an operator lets users ask for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct SelfService {
    /// How many commands of all users may have a policy at a time.
    pub commands: u32,
    /// How many of one user.
    pub commands_per_user: u32,
    /// What may be asked of each timer, in its own unit.
    limits: [Limits; 4],
}

/// The least and the most of a timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Limits {
    pub(super) at_least: u32,
    pub(super) at_most: u32,
}

impl Limits {
    const NONE: Self = Self {
        at_least: 0,
        at_most: u32::MAX,
    };
}

/// The table as written.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) at: At,
    pub(super) commands: Optional<u32>,
    pub(super) commands_per_user: Optional<u32>,
    pub(super) limits: [Optional<Limits>; 4],
}

impl Table {
    /// Each key that the later table mentions is taken from there. The table
    /// keeps its own place.
    pub(super) fn override_with(&mut self, later: Self) {
        let Self {
            at: _,
            commands,
            commands_per_user,
            limits,
        } = later;
        if commands.is_some() {
            self.commands = commands;
        }
        if commands_per_user.is_some() {
            self.commands_per_user = commands_per_user;
        }
        for (own, later) in self.limits.iter_mut().zip(limits) {
            if later.is_some() {
                *own = later;
            }
        }
    }

    /// The keys that are written, and where.
    pub(super) fn written(&self) -> impl Iterator<Item = (&'static str, &At)> {
        fn at<T>(entry: Option<&Entry<T>>) -> Option<&At> {
            Some(&entry?.at)
        }
        let timers = Timer::ALL.map(Timer::key).into_iter();
        timers
            .zip(self.limits.iter().map(|entry| at(entry.as_deref())))
            .chain([
                (COMMANDS, at(self.commands.as_deref())),
                (COMMANDS_PER_USER, at(self.commands_per_user.as_deref())),
            ])
            .filter_map(|(key, at)| Some((key, at?)))
    }

    /// What it comes to, with what is built in.
    pub(super) fn complete(&self) -> SelfService {
        const BUILT_IN: (u32, u32) = (64, 8);
        let number = |entry: &Optional<u32>| entry.as_ref().and_then(|entry| entry.value);
        let limits = |timer: Timer| {
            let entry = self.limits[timer as usize].as_ref();
            entry.and_then(|entry| entry.value).unwrap_or(Limits::NONE)
        };
        SelfService {
            commands: number(&self.commands).unwrap_or(BUILT_IN.0),
            commands_per_user: number(&self.commands_per_user).unwrap_or(BUILT_IN.1),
            limits: Timer::ALL.map(limits),
        }
    }
}

/// What a user asks for a command. What is not mentioned comes from the policy that
/// would hold otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    keepalive: WishedKeepalive,
    timers: [Option<Given>; 4],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum WishedKeepalive {
    #[default]
    On,
    Off,
    Leave,
}

impl Wish {
    /// Reads the `[default]` of a config.
    ///
    /// # Errors
    ///
    /// When it has what users cannot ask for.
    pub fn read(text: &str) -> Result<Self, String> {
        const NOT_FOR_USERS: &str = "only root can ask for bounds: an application can be held to \
                                     what the operator wants, not to what its user wants";
        let texts = [Text::new(Path::new("the policy"), text.to_owned())];
        let mut findings = Findings::about(&texts);
        let table = document::read(&mut findings, 0).and_then(|document| document.default);
        let (errors, _) = findings.into_order();
        if !errors.0.is_empty() {
            return Err(errors.to_string());
        }
        let mut wish = Self::default();
        let Some(table) = table else { return Ok(wish) };
        if let Some(keepalive) = table.keepalive.and_then(|entry| entry.value) {
            wish.keepalive = match keepalive {
                Keepalive::On => WishedKeepalive::On,
                Keepalive::Off => WishedKeepalive::Off,
                Keepalive::Leave => WishedKeepalive::Leave,
                Keepalive::Always | Keepalive::Never => return Err(NOT_FOR_USERS.to_owned()),
            };
        }
        for (timer, entry) in wish.timers.iter_mut().zip(table.timers) {
            let Some(written) = entry.and_then(|entry| entry.value) else {
                continue;
            };
            if written.at_least.is_some() || written.at_most.is_some() {
                return Err(NOT_FOR_USERS.to_owned());
            }
            *timer = written.default;
        }
        Ok(wish)
    }

    /// What comes of it where a policy would hold otherwise. One that does nothing,
    /// or only counts, stays what it is.
    #[must_use]
    pub fn over(&self, policy: Policy) -> Policy {
        if policy.ignores() || !policy.is_enforced() {
            return policy;
        }
        let mut policy = policy;
        if !policy.keepalive().holds() {
            policy = policy.with_keepalive(match self.keepalive {
                WishedKeepalive::On => Keepalive::On,
                WishedKeepalive::Off => Keepalive::Off,
                WishedKeepalive::Leave => Keepalive::Leave,
            });
        }
        for (timer, given) in Timer::ALL.into_iter().zip(self.timers) {
            if let Some(given) = given {
                given.fill(timer, &mut policy);
            }
        }
        policy
    }
}

impl SelfService {
    /// Each key and what it comes to, as people read it.
    #[must_use]
    pub fn values(&self) -> [(&'static str, String); 6] {
        let [idle, interval, probes, user_timeout] = Timer::ALL.map(|timer| {
            let Limits { at_least, at_most } = self.limits[timer as usize];
            let value = match (at_least, at_most) {
                (0, u32::MAX) => "any".to_owned(),
                (least, u32::MAX) => format!("at least {}", timer.show(least)),
                (0, most) => format!("at most {}", timer.show(most)),
                (least, most) => format!("{} to {}", timer.show(least), timer.show(most)),
            };
            (timer.key(), value)
        });
        let commands = (COMMANDS, self.commands.to_string());
        let commands_per_user = (COMMANDS_PER_USER, self.commands_per_user.to_string());
        [
            idle,
            interval,
            probes,
            user_timeout,
            commands,
            commands_per_user,
        ]
    }

    /// Whether users may ask for this.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn allow(&self, wish: &Wish) -> Result<(), String> {
        for (timer, given) in Timer::ALL.into_iter().zip(wish.timers) {
            let Some(given) = given else { continue };
            let (key, limits) = (timer.key(), self.limits[timer as usize]);
            match given {
                Given::Value(value) => {
                    let (least, most) = timer.bounds();
                    if !(least..=most).contains(&value) {
                        return Err(format!("{key}: the kernel takes no such value"));
                    }
                    if value < limits.at_least {
                        return Err(format!(
                            "{key} {} is below {}, the least that [self-service] allows",
                            timer.show(value),
                            timer.show(limits.at_least)
                        ));
                    }
                    if value > limits.at_most {
                        return Err(format!(
                            "{key} {} is above {}, the most that [self-service] allows",
                            timer.show(value),
                            timer.show(limits.at_most)
                        ));
                    }
                }
                _ if timer.word(given.word()) != Some(given) => {
                    return Err(format!("{key} cannot be {}", given.word()));
                }
                // What comes of a word is not known here.
                _ if limits != Limits::NONE => {
                    return Err(format!(
                        "{key} = \"{}\": [self-service] has bounds for {key}, so that it takes a \
                         value",
                        given.word()
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use keepalive_common::policy::Range;

    use super::*;
    use crate::config::Config;

    fn service(text: &str) -> SelfService {
        let (config, _) = Config::parse("test.toml".as_ref(), text).unwrap();
        config.self_service.unwrap()
    }

    fn wish(text: &str) -> Wish {
        Wish::read(&format!("[default]\n{text}")).unwrap()
    }

    #[test]
    fn the_table_is_read_and_off_without_it() {
        let (config, _) = Config::parse("test.toml".as_ref(), "[default]\n").unwrap();
        assert_eq!(config.self_service, None);
        let found = service("[self-service]\n");
        assert_eq!((found.commands, found.commands_per_user), (64, 8));
        let found = service(
            "[self-service]\ncommands = 3\ncommands-per-user = 2\nidle = { at-least = '10s' }\n",
        );
        assert_eq!((found.commands, found.commands_per_user), (3, 2));
        assert_eq!(found.limits[0].at_least, 10);
        for wrong in [
            "[self-service]\ncommands = 0\n",
            "[self-service]\ncommands = 1025\n",
            "[self-service]\ncommands = '3'\n",
            "[self-service]\nidle = '10s'\n",
            "[self-service]\nidle = {}\n",
            "[self-service]\nidle = { exactly = '10s' }\n",
            "[self-service]\nidle = { at-least = '10s', at-most = '9s' }\n",
            "[self-service]\nkeepalive = 'on'\n",
            "self-service = 3\n",
        ] {
            assert!(
                Config::parse("test.toml".as_ref(), wrong).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn values_read_at_a_glance() {
        let service = service(
            "[self-service]\nidle = { at-least = '10s', at-most = '90s' }\n\
             probes = { at-least = 3 }\nuser-timeout = { at-most = '1500ms' }\n\
             commands-per-user = 4\n",
        );
        let values = service.values();
        assert_eq!(
            values.each_ref().map(|(key, value)| (*key, value.as_str())),
            [
                ("idle", "10s to 1m 30s"),
                ("interval", "any"),
                ("probes", "at least 3"),
                ("user-timeout", "at most 1s 500ms"),
                ("commands", "64"),
                ("commands-per-user", "4"),
            ]
        );
    }

    #[test]
    fn what_is_outside_of_the_bounds_is_refused() {
        let service = service(
            "[self-service]\nidle = { at-least = '10s', at-most = '5m' }\n\
             probes = { at-least = 3 }\n",
        );
        for (text, refusal) in [
            ("", None),
            ("idle = '10s'\nprobes = 3\ninterval = '1s'\n", None),
            ("user-timeout = 'derive'\ninterval = 'sysctl'\n", None),
            ("idle = '9s'\n", Some("idle 9s is below 10s")),
            ("idle = '6m'\n", Some("idle 6m is above 5m")),
            ("probes = 2\n", Some("probes 2 is below 3")),
            ("idle = 'leave'\n", Some("takes a value")),
        ] {
            let answer = service.allow(&wish(text));
            match refusal {
                None => assert_eq!(answer, Ok(()), "{text}"),
                Some(part) => assert!(answer.unwrap_err().contains(part), "{text}"),
            }
        }
    }

    #[test]
    fn what_no_config_could_say_is_refused() {
        let service = service("[self-service]\n");
        for timers in [
            "[{\"value\":0},null,null,null]",
            "[{\"value\":32768},null,null,null]",
            "[null,null,{\"value\":128},null]",
            "[\"derive\",null,null,null]",
            "[null,null,null,\"sysctl\"]",
        ] {
            let json = format!("{{\"keepalive\":\"on\",\"timers\":{timers}}}");
            let wish: Wish = serde_json::from_str(&json).unwrap();
            service.allow(&wish).unwrap_err();
        }
        for wrong in ["always", "never"] {
            let json = format!("{{\"keepalive\":\"{wrong}\",\"timers\":[null,null,null,null]}}");
            serde_json::from_str::<Wish>(&json).unwrap_err();
        }
    }

    #[test]
    fn bounds_are_not_for_users() {
        for wrong in [
            "keepalive = 'always'\n",
            "keepalive = 'never'\n",
            "idle = { exactly = '10s' }\n",
            "idle = { default = '10s', at-most = '20s' }\n",
        ] {
            let error = Wish::read(&format!("[default]\n{wrong}")).unwrap_err();
            assert!(error.contains("only root"), "{error}");
        }
    }

    #[test]
    fn defaults_give_way_and_bounds_hold() {
        let mut policy = Policy::BUILT_IN;
        policy.idle = Range {
            default: 60,
            at_least: 30,
            at_most: 90,
        };
        let asked = wish("idle = '20s'\nprobes = 4\n");
        let over = asked.over(policy);
        assert_eq!(
            over.idle,
            Range {
                default: 20,
                at_least: 30,
                at_most: 90
            }
        );
        assert_eq!(over.idle.effective(0), 30);
        assert_eq!(over.probes, Range::default_only(4));
        assert_eq!(over.interval, policy.interval);
        let never = policy.with_keepalive(Keepalive::Never);
        assert_eq!(asked.over(never).keepalive(), Keepalive::Never);
        let off = policy.with_keepalive(Keepalive::Off);
        assert_eq!(asked.over(off).keepalive(), Keepalive::On);
        let left = wish("keepalive = 'leave'\n").over(policy);
        assert_eq!(left.keepalive(), Keepalive::Leave);
        for alone in [policy.with_ignore(true), policy.with_enforcement(false)] {
            assert_eq!(asked.over(alone), alone);
        }
    }
}
