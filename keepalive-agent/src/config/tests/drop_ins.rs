//! Several files: their order, what replaces what, where a value came from.

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use tempfile::TempDir;

use super::*;

/// A main file and two directories of drop-ins, as on every machine.
struct Files {
    root: TempDir,
    sources: Sources,
}

impl Files {
    /// The built-in policy stands in for a main file that is not there.
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let sources = Sources::below(root.path());
        Self { root, sources }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// `etc` and `run` are the directories of drop-ins.
    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, name: &str, target: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    fn read(&self) -> Merged {
        self.sources
            .read()
            .unwrap_or_else(|errors| panic!("{errors}"))
    }

    /// Without the directory's name.
    fn shown(&self, text: &impl ToString) -> String {
        let root = format!("{}/", self.root.path().display());
        text.to_string().replace(&root, "")
    }

    fn errors(&self) -> Vec<String> {
        match self.sources.read() {
            Ok(merged) => panic!("accepted: {merged:?}"),
            Err(errors) => errors.0.iter().map(|error| self.shown(error)).collect(),
        }
    }

    /// Idle of `[default]`.
    fn idle(&self) -> Option<u32> {
        Some(self.read().config.default?.idle.default)
    }
}

#[test]
fn without_a_main_file_the_built_in_policy_holds_below_the_drop_ins() {
    let files = Files::new();
    assert_eq!(files.read().config, Config::built_in());
    assert_eq!(files.read().main, None);

    files.write(
        "run/a.toml",
        "[[policy]]\nname = 'a'\nport = 1\nidle = '7s'\n",
    );
    let config = files.read().config;
    assert_eq!(config.default, Some(Policy::BUILT_IN));
    assert_eq!(policy_of(&config, "a").idle.default, 7);

    files.write("run/b.toml", "[default]\nprobes = 4\n");
    let config = files.read().config;
    assert_eq!(config.default.unwrap().probes.default, 4);
    assert_eq!(policy_of(&config, "a").probes.default, 4);
}

#[test]
fn with_a_main_file_unclaimed_connections_are_left_alone_until_a_default_comes() {
    let files = Files::new();
    files.write("main.toml", "");
    assert_eq!(files.read().config.default, None);
    files.write("etc/a.toml", "[[policy]]\nname = 'a'\nport = 1\n");
    assert_eq!(files.read().config.default, None);
    files.write("etc/b.toml", "[default]\n");
    assert_eq!(files.read().config.default, Some(Policy::BUILT_IN));
}

#[test]
fn a_main_file_that_is_named_must_be_there() {
    let files = Files::new();
    let main = files.path("main.toml");
    let sources = Sources::new(Some(&main), &[]);
    let errors = sources.read().unwrap_err();
    assert_eq!(
        files.shown(&errors),
        "1 error in the config, so none of it is used\n  \
         main.toml: cannot be read: No such file or directory (os error 2)"
    );
}

#[test]
fn drop_ins_are_merged_by_name_over_all_directories() {
    let files = Files::new();
    files.write("main.toml", "[default]\nidle = '1s'\n");
    assert_eq!(files.idle(), Some(1));
    files.write("run/10.toml", "[default]\nidle = '2s'\n");
    assert_eq!(files.idle(), Some(2));
    // A later name wins from an earlier directory too.
    files.write("etc/20.toml", "[default]\nidle = '3s'\n");
    assert_eq!(files.idle(), Some(3));
    // One of the same name is replaced, not merged.
    files.write("etc/30.toml", "[default]\nidle = '4s'\nprobes = 1\n");
    files.write("run/30.toml", "[default]\ninterval = '5s'\n");
    assert_eq!(files.idle(), Some(3));
    assert_eq!(files.read().config.default.unwrap().probes.default, 6);
    let read = |path: &PathBuf| files.shown(&path.display());
    let drop_ins = files.read().drop_ins;
    let names: Vec<_> = drop_ins.iter().map(read).collect();
    assert_eq!(names, ["run/10.toml", "etc/20.toml", "run/30.toml"]);
}

#[test]
fn other_files_are_not_read() {
    let files = Files::new();
    for name in [
        "etc/a.conf",
        "etc/a.toml~",
        "etc/a.toml.new",
        "etc/.a.toml",
        "etc/toml",
        "etc/sub/a.toml",
        "etc/sub.d/a.toml",
    ] {
        files.write(name, "= not TOML");
    }
    // What emacs leaves beside a file while it is edited.
    files.link("etc/.#a.toml", "user@host.1234");
    assert_eq!(files.read().config, Config::built_in());
}

#[test]
fn an_empty_file_or_dev_null_takes_another_one_out() {
    for (mask, by_link) in [("", false), ("/dev/null", true)] {
        let files = Files::new();
        files.write("etc/a.toml", "[default]\nidle = '2s'\n");
        files.write("etc/bad.toml", "= bad");
        assert!(!files.errors().is_empty());
        for name in ["run/a.toml", "run/bad.toml"] {
            if by_link {
                files.link(name, mask);
            } else {
                files.write(name, mask);
            }
        }
        assert_eq!(files.read().config, Config::built_in());
        assert!(files.read().drop_ins.is_empty());
    }
}

#[test]
fn later_files_override_key_by_key() {
    let files = Files::new();
    files.write(
        "main.toml",
        "[default]\nidle = { default = '60s', at-most = '5m' }\nprobes = 4\n\
         [[policy]]\nname = 'a'\ncgroup = ['/a', '/b']\nidle = '7s'\ninterval = '3s'\n\
         [[policy]]\nname = 'z'\nremote = '10.0.0.0/8'\n",
    );
    files.write(
        "etc/a.toml",
        "[[policy]]\nname = 'new'\nport = 1\n\
         [[policy]]\nname = 'a'\ncgroup = '/c'\nidle = { at-most = '30s' }\nenforce = false\n\
         [default]\nidle = { at-least = '10s' }\nkeepalive = 'leave'\n",
    );
    let config = files.read().config;
    let names: Vec<_> = config
        .policies
        .iter()
        .map(|named| &named.name[..])
        .collect();
    assert_eq!(names, ["a", "z", "new"]);

    // A timer is one key: its old bounds are gone, and its old default with
    // them. What is left out then comes from below, the built-in policy here.
    let default = config.default.unwrap();
    let mut expected = with_written(&[SysctlTimer::Probes]).with_keepalive(Keepalive::Leave);
    expected.idle.at_least = 10;
    expected.probes = Range::default_only(4);
    assert_eq!(default, expected);

    let a = &config.policies[0];
    assert_eq!(a.cgroups, [CgroupPattern::new("/c").unwrap()]);
    let mut expected = default
        .with_enforcement(false)
        .with_sysctl(SysctlTimer::Interval, false);
    expected.idle = Range {
        default: 60,
        at_least: 0,
        at_most: 30,
    };
    expected.interval = Range::default_only(3);
    assert_eq!(a.policy, expected);
    assert_eq!(config.policies[1].rules.remotes.len(), 1);
}

#[test]
fn a_policy_may_be_completed_by_another_file() {
    let files = Files::new();
    files.write("etc/a.toml", "[[policy]]\nname = 'a'\nidle = '7s'\n");
    assert_eq!(
        files.errors(),
        [
            "etc/a.toml:1: policy: has no cgroup, unit, container, remote, port or local-port: add cgroup = \"/…\", \
          or use [default] for everything"
        ]
    );
    files.write("etc/b.toml", "[[policy]]\nname = 'a'\ncgroup = '/a'\n");
    assert_eq!(files.read().config.policies.len(), 1);
}

#[test]
fn within_one_file_a_name_stands_once() {
    let files = Files::new();
    files.write("main.toml", "[[policy]]\nname = 'a'\nport = 1\n");
    files.write(
        "etc/a.toml",
        "[[policy]]\nname = 'a'\nport = 1\n[[policy]]\nname = 'a'\nport = 2\n",
    );
    assert_eq!(
        files.errors(),
        ["etc/a.toml:5: policy.name = 'a': line 2 has a policy of this name already"]
    );
}

#[test]
fn errors_of_all_files_come_at_once_in_their_order() {
    let files = Files::new();
    files.write("main.toml", "[default]\nidle = 5\nidel = 5\n");
    files.write("etc/b.toml", "\n[[policy]]\nname = 'a'\nport = 0\n");
    files.write("run/a.toml", "[default\n");
    // What is missing in `nobody` might be in the file that is not TOML.
    files.write("run/c.toml", "[[policy]]\nname = 'nobody'\n");
    assert_eq!(
        files.errors(),
        [
            "main.toml:2: default.idle = 5: a duration needs a unit, as in \"60s\" or \"2m\"",
            "main.toml:3: default.idel: unknown key; known here: \
             keepalive, idle, interval, probes, user-timeout, give-up, enforce, ignore, path",
            "run/a.toml:1: unclosed table, expected `]`",
            "etc/b.toml:4: policy.port = 0: out of range: 1 to 65535",
        ]
    );
}

#[test]
fn what_cannot_be_read_is_an_error_of_its_own() {
    let files = Files::new();
    files.write("etc/binary.toml", b"[default]\nidle = '\xff'\n");
    files.write("etc/directory.toml/x", "");
    files.link("etc/dangling.toml", "nowhere");
    files.link("etc/circle.toml", "circle.toml");
    files.write("etc/wrong.toml", "a = 1\n");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        files.path("etc/pipe.toml"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    assert_eq!(
        files.errors(),
        [
            "etc/binary.toml:2: not UTF-8, so not TOML",
            "etc/circle.toml: cannot be read: Too many levels of symbolic links (os error 40)",
            "etc/dangling.toml: a symbolic link to nowhere, which does not exist",
            "etc/directory.toml: not a regular file",
            "etc/pipe.toml: not a regular file",
            "etc/wrong.toml:1: a: unknown key; known here: default, policy, self-service",
        ]
    );

    let files = Files::new();
    files.link("main.toml", "nowhere");
    files.write("etc", "a file");
    assert_eq!(
        files.errors(),
        [
            "main.toml: a symbolic link to nowhere, which does not exist",
            "etc: cannot be read: Not a directory (os error 20)",
        ]
    );
}

#[test]
fn a_change_can_be_tried_before_it_is_made() {
    let files = Files::new();
    files.write("etc/a.toml", "[default]\nidle = '2s'\n");
    let idle = |path: &str, text| {
        let merged = files.sources.read_as_if(&files.path(path), text).unwrap();
        merged.config.default.unwrap().idle.default
    };
    assert_eq!(idle("run/b.toml", Some("[default]\nidle = '3s'\n")), 3);
    assert_eq!(idle("run/a.toml", Some("[default]\nprobes = 3\n")), 60);
    assert_eq!(idle("etc/a.toml", Some("[default]\nidle = '4s'\n")), 4);
    assert_eq!(idle("etc/a.toml", None), 60);
    assert_eq!(idle("etc/nothing.toml", None), 2);
    assert_eq!(files.idle(), Some(2));
}

#[test]
fn every_value_knows_its_line() {
    let files = Files::new();
    files.write(
        "main.toml",
        "[default]\nidle = '50s'\npath = 'gcp'\n\n[[policy]]\nname = 'a'\ncgroup = '/a'\n\
         probes = 3\n",
    );
    files.write(
        "run/a.toml",
        "[[policy]]\nname = 'a'\nidle = { at-most = '9s' }\nport = 1\npath = 'aws-nat'\n",
    );
    files.write("run/b.toml", "\n[default]\nenforce = false\n");
    let merged = files.read();
    let shown = |origins: &Origins| {
        let [idle, interval, probes, user_timeout] = &origins.timers;
        let place = |place: &Option<Place>| place.as_ref().map(ToString::to_string);
        let path = origins.path.as_ref();
        [
            Some(origins.table.to_string()),
            place(&origins.cgroup),
            place(&origins.remote),
            place(&origins.port),
            Some(origins.keepalive.to_string()),
            Some(idle.to_string()),
            Some(interval.to_string()),
            Some(probes.to_string()),
            Some(user_timeout.to_string()),
            Some(origins.enforce.to_string()),
            path.map(|(path, place)| format!("{path} {place}")),
        ]
        .map(|origin| {
            origin
                .map(|origin| files.shown(&origin))
                .unwrap_or_default()
        })
    };
    let default = merged.origins.default.as_ref().unwrap();
    assert_eq!(
        shown(default),
        [
            "main.toml:1",
            "",
            "",
            "",
            "built in",
            "main.toml:2",
            "preset gcp (main.toml:3)",
            "preset gcp (main.toml:3)",
            "built in",
            "run/b.toml:3",
            "gcp main.toml:3",
        ]
    );
    assert_eq!(
        shown(&merged.origins.policies[0]),
        [
            "main.toml:5",
            "main.toml:7",
            "",
            "run/a.toml:4",
            "built in",
            "run/a.toml:3, default preset aws-nat (run/a.toml:5)",
            "preset aws-nat (run/a.toml:5)",
            "main.toml:8",
            "built in",
            "run/b.toml:3",
            "aws-nat run/a.toml:5",
        ]
    );
    let files = Files::new();
    let merged = files.read();
    assert_eq!(merged.origins.default, Some(Origins::BUILT_IN));
}
