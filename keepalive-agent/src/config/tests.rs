//! What a config says, to the policy and to the word.

use keepalive_common::policy::{
    Keepalive, MAX_PROBES, MAX_SECONDS, MAX_USER_TIMEOUT, Range, SysctlTimer,
};
use proptest::{prelude::*, strategy::ValueTree as _};

use super::*;

mod claims;
mod drop_ins;
mod paths;

const EXAMPLE: &str = include_str!("../../keepalive.example.toml");

fn parse(text: &str) -> Result<(Config, Diagnostics), Diagnostics> {
    Config::parse(Path::new("k.toml"), text)
}

fn good(text: &str) -> Config {
    let (config, warnings) = parse(text).unwrap_or_else(|errors| panic!("{text}\n{errors}"));
    assert_eq!(rendered(&warnings), [""; 0], "{text}");
    config
}

/// The lines below the file's name, as a person reads them.
fn rendered(found: &Diagnostics) -> Vec<String> {
    found
        .0
        .iter()
        .map(|found| found.to_string().replacen("k.toml:", "", 1))
        .collect()
}

fn errors(text: &str) -> Vec<String> {
    match parse(text) {
        Ok((config, _)) => panic!("accepted: {text}\n{config:?}"),
        Err(errors) => rendered(&errors),
    }
}

fn warnings(text: &str) -> Vec<String> {
    let (_, warnings) = parse(text).unwrap_or_else(|errors| panic!("{text}\n{errors}"));
    rendered(&warnings)
}

/// Errors of a `[default]` table with this one line.
fn errors_of(line: &str) -> Vec<String> {
    errors(&format!("[default]\n{line}\n"))
}

/// The policy of a `[default]` table with these lines.
fn default_of(lines: &str) -> Policy {
    let text = format!("[default]\n{lines}\n");
    let (config, _) = parse(&text).unwrap_or_else(|errors| panic!("{text}\n{errors}"));
    config.default.expect("there is a [default]")
}

fn policy_of<'a>(config: &'a Config, name: &str) -> &'a Policy {
    let named = config.policies.iter().find(|policy| policy.name == name);
    &named.expect(name).policy
}

/// The built-in policy where the defaults of these timers are written: the
/// sysctl counts beside the others only.
fn with_written(timers: &[SysctlTimer]) -> Policy {
    let write = |policy: Policy, timer: &SysctlTimer| policy.with_sysctl(*timer, false);
    timers.iter().fold(Policy::BUILT_IN, write)
}

const ALL_TIMERS: [SysctlTimer; 3] = [
    SysctlTimer::Idle,
    SysctlTimer::Interval,
    SysctlTimer::Probes,
];

#[test]
fn all_errors_come_at_once_in_the_order_of_the_file() {
    let text = r#"
typo = 1

[[policy]]
idle = "0s"
name = "web"
cgroup = "system.slice/web"

[default]
user-timeout = "25d"
probes = 128
keepalive = "maybe"

[[policy]]
name = "web"
interval = { at-most = "10s", at-least = "40000s", at-laest = "5s" }
"#;
    assert_eq!(
        errors(text),
        [
            "2: typo: unknown key; known here: default, policy, self-service",
            "5: policy.idle = \"0s\": out of range: 1s to 32767s (9h 6m 7s)",
            "7: policy.cgroup = \"system.slice/web\": a cgroup path starts with `/`, \
             the root of the cgroup v2 hierarchy; did you mean \"/system.slice/web\"?",
            "10: default.user-timeout = \"25d\": out of range: \
             1ms to 2147483647ms (24days 20h 31m 23s 647ms)",
            "11: default.probes = 128: out of range: 1 to 127",
            "12: default.keepalive = \"maybe\": must be \"on\", \"always\", \"off\", \"never\" or \"leave\"",
            "14: policy: has no cgroup, unit, container, remote, port or local-port: add cgroup = \"/…\", \
             or use [default] for everything",
            "15: policy.name = \"web\": line 6 has a policy of this name already",
            "16: policy.interval.at-least = \"40000s\": out of range: 1s to 32767s (9h 6m 7s)",
            "16: policy.interval.at-laest: unknown key; known here: \
             default, at-least, at-most, exactly",
        ]
    );
}

#[test]
fn the_report_counts_and_names_the_file() {
    let report = |text| parse(text).expect_err("it is wrong").to_string();
    assert_eq!(
        report("a = 1"),
        "1 error in the config, so none of it is used\n  \
         k.toml:1: a: unknown key; known here: default, policy, self-service"
    );
    assert_eq!(
        report("a = 1\nb = 1\n"),
        "2 errors in the config, so none of it is used\n  \
         k.toml:1: a: unknown key; known here: default, policy, self-service\n  \
         k.toml:2: b: unknown key; known here: default, policy, self-service"
    );
}

#[test]
fn unknown_keys_are_errors_at_each_level() {
    let policy_keys =
        "keepalive, idle, interval, probes, user-timeout, give-up, enforce, ignore, path";
    assert_eq!(
        errors("[defualt]\nidle = \"60s\"\n"),
        ["1: defualt: unknown key; known here: default, policy, self-service"]
    );
    for key in [
        "kepalive",
        "Idle",
        "cgroup",
        "name",
        "remote",
        "port",
        "lock",
        "\"a\\nb\"",
    ] {
        assert_eq!(
            errors_of(&format!("{key} = 1")),
            [format!(
                "2: default.{key}: unknown key; known here: {policy_keys}"
            )]
        );
    }
    assert_eq!(
        errors("[[policy]]\nname = 'a'\ncgroup = '/a'\nremotes = '::/0'\n"),
        [format!(
            "4: policy.remotes: unknown key; known here: name, cgroup, unit, container, image, label, namespace, pod, remote, port, local-port, {policy_keys}"
        )]
    );
    assert_eq!(
        errors("[default.idle]\nat-most = '60s'\nmin = '1s'\n"),
        ["3: default.idle.min: unknown key; known here: default, at-least, at-most, exactly"]
    );
}

#[test]
fn tables_must_be_tables() {
    let default = "default: must be a table: write [default]";
    let policy = "policy: must be a list of tables: write [[policy]]";
    for (text, expected) in [
        ("default = 5", vec![format!("1: {default}")]),
        ("[[default]]", vec![format!("1: {default}")]),
        ("policy = 'x'", vec![format!("1: {policy}")]),
        ("\n[policy]\nname = 'x'\n", vec![format!("2: {policy}")]),
        (
            "policy = [\n  1,\n  'x',\n]",
            vec![format!("2: {policy}"), format!("3: {policy}")],
        ),
    ] {
        assert_eq!(errors(text), expected, "{text}");
    }
}

#[test]
fn keepalive_has_five_values() {
    for value in ["true", "1", "\"ON\"", "\"\"", "{ exactly = \"on\" }", "[]"] {
        assert_eq!(
            errors_of(&format!("keepalive = {value}")),
            [format!(
                "2: default.keepalive = {value}: must be \"on\", \"always\", \"off\", \"never\" or \"leave\""
            )]
        );
    }
}

#[test]
fn timers_are_held_to_what_the_kernel_takes() {
    let seconds = "out of range: 1s to 32767s (9h 6m 7s)";
    let milliseconds = "out of range: 1ms to 2147483647ms (24days 20h 31m 23s 647ms)";
    let probes = "out of range: 1 to 127";
    let whole = "must be whole seconds: the kernel knows no finer ones";
    let unit = "a duration needs a unit, as in \"60s\" or \"2m\"";
    let duration = "not a duration; write it like \"60s\", \"2m\" or \"1h 30m\"";
    let words = "must be a duration such as \"30s\", or \"derive\" or \"leave\"";
    let word = "must be a duration such as \"60s\", or \"sysctl\" or \"leave\"";
    let number = "must be a number, 1 to 127";
    let kind = |kind: &str| {
        format!("must be a duration such as \"60s\" or a table of bounds, not a TOML {kind}")
    };
    let huge = format!("\"{}s\"", "9".repeat(40));
    for key in ["idle", "interval"] {
        for (value, message) in [
            ("\"0s\"", seconds),
            ("\"32768s\"", seconds),
            ("\"10h\"", seconds),
            (&huge, seconds),
            ("\"500ms\"", whole),
            ("\"1500ms\"", whole),
            ("\"1s 1ns\"", whole),
            ("60", unit),
            ("0", unit),
            ("-1", unit),
            ("1.5", unit),
            ("\"60\"", duration),
            ("\"\"", word),
            ("\"-5s\"", duration),
            ("\"soon\"", word),
            ("\"derive\"", word),
            ("true", &kind("boolean")),
            ("[]", &kind("array")),
            ("1979-05-27", &kind("datetime")),
        ] {
            let expected = format!("2: default.{key} = {value}: {message}");
            assert_eq!(errors_of(&format!("{key} = {value}")), [expected]);
        }
    }
    for (value, message) in [
        ("0", probes),
        ("-1", probes),
        ("128", probes),
        ("0x80", probes),
        ("99999999999999999999999999999999999999999999", probes),
        ("\"6\"", number),
        ("6.0", number),
        ("\"6s\"", number),
        ("true", number),
        ("[6]", number),
    ] {
        let expected = format!("2: default.probes = {value}: {message}");
        assert_eq!(errors_of(&format!("probes = {value}")), [expected]);
    }
    for (value, message) in [
        ("\"0s\"", milliseconds),
        ("\"25d\"", milliseconds),
        ("\"2147483648ms\"", milliseconds),
        (
            "\"1us\"",
            "must be whole milliseconds: the kernel knows no finer ones",
        ),
        ("30000", unit),
        ("\"30\"", duration),
        ("\"\"", words),
        ("\"Derive\"", words),
        ("\"off\"", words),
        ("true", &kind("boolean")),
    ] {
        let expected = format!("2: default.user-timeout = {value}: {message}");
        assert_eq!(errors_of(&format!("user-timeout = {value}")), [expected]);
    }
}

#[test]
fn bounds_are_held_to_the_same_and_to_each_other() {
    for (line, expected) in [
        (
            "idle = {}",
            &["idle: is empty: it needs one of default, at-least, at-most, exactly"][..],
        ),
        (
            "idle = { exactly = 5 }",
            &["idle.exactly = 5: a duration needs a unit, as in \"60s\" or \"2m\""],
        ),
        (
            "interval = { exactly = \"10s\", at-most = \"30s\" }",
            &[
                "interval.exactly = \"10s\": leaves nothing to the other keys of the table: remove them",
            ],
        ),
        (
            "probes = { default = -1, at-least = 0, at-most = 200 }",
            &[
                "probes.default = -1: out of range: 1 to 127",
                "probes.at-least = 0: out of range: 1 to 127",
                "probes.at-most = 200: out of range: 1 to 127",
            ],
        ),
        (
            "idle = { at-least = \"5m\", at-most = \"1m\" }",
            &["idle = { at-least = \"5m\", at-most = \"1m\" }: at-least 5m is above at-most 1m"],
        ),
        (
            "idle = { default = \"10m\", at-most = \"5m\" }",
            &["idle = { default = \"10m\", at-most = \"5m\" }: default 10m is above at-most 5m"],
        ),
        (
            "probes = { default = 1, at-least = 2 }",
            &["probes = { default = 1, at-least = 2 }: default 1 is below at-least 2"],
        ),
        (
            "user-timeout = { default = \"1s\", at-least = \"1500ms\" }",
            &[
                "user-timeout = { default = \"1s\", at-least = \"1500ms\" }: \
               default 1s is below at-least 1s 500ms",
            ],
        ),
        (
            "user-timeout = { at-most = \"derive\" }",
            &[
                "user-timeout.at-most = \"derive\": not a duration; write it like \"60s\", \"2m\" or \"1h 30m\"",
            ],
        ),
    ] {
        let expected: Vec<_> = expected
            .iter()
            .map(|error| format!("2: default.{error}"))
            .collect();
        assert_eq!(errors_of(line), expected, "{line}");
    }
}

#[test]
fn a_table_over_several_lines_is_named_on_one() {
    assert_eq!(
        errors_of("idle = {\n  at-least = \"5m\",\n  at-most = \"1m\",\n}"),
        ["2: default.idle = { …: at-least 5m is above at-most 1m"]
    );
    assert_eq!(
        errors_of("keepalive = \"\"\"\nperhaps\"\"\""),
        [
            "2: default.keepalive = \"\"\" …: must be \"on\", \"always\", \"off\", \"never\" or \"leave\""
        ]
    );
    assert_eq!(
        errors("\n[default.idle]\nat-least = '5m'\nat-most = '1m'\n[default.probes]\n"),
        [
            "2: default.idle: at-least 5m is above at-most 1m",
            "5: default.probes: is empty: it needs one of default, at-least, at-most, exactly"
        ]
    );
}

#[test]
fn every_policy_has_a_name_of_its_own() {
    let long = "x".repeat(65);
    let form = "must have 1 to 64 characters, none of them invisible";
    for (value, message) in [
        ("5", "must be a string"),
        ("[\"a\"]", "must be a string"),
        ("\"\"", form),
        ("\"a\\tb\"", form),
        ("\"a\\u202Eb\"", form),
        (&format!("\"{long}\""), form),
        (
            "\"default\"",
            "is the name of the policy for unclaimed sockets: write it as [default]",
        ),
    ] {
        assert_eq!(
            errors(&format!("[[policy]]\ncgroup = '/a'\nname = {value}\n")),
            [format!("3: policy.name = {value}: {message}")]
        );
    }
    assert_eq!(
        errors("[[policy]]\ncgroup = '/a'\n"),
        ["1: policy: has no name: add name = \"…\""]
    );
    assert_eq!(
        errors(
            "[[policy]]\nname = 'a'\ncgroup = '/a'\n\
             [[policy]]\nname = 'b'\ncgroup = '/b'\n\
             [[policy]]\nname = \"a\"\ncgroup = '/c'\n"
        ),
        ["8: policy.name = \"a\": line 2 has a policy of this name already"]
    );
    let name = "é".repeat(64);
    let config = good(&format!("[[policy]]\nname = '{name}'\ncgroup = '/a'\n"));
    assert_eq!(config.policies[0].name, name);
}

#[test]
fn a_cgroup_is_a_path_from_the_root_or_a_glob() {
    let kind = "must be a path or a list of paths";
    let dots = "`.` and `..` are not allowed in a cgroup path";
    for (value, message) in [
        ("5", kind),
        ("[]", kind),
        ("{}", kind),
        (
            "\"\"",
            "must not be empty; the root of the hierarchy is \"/\"",
        ),
        (
            "\"a/b\"",
            "a cgroup path starts with `/`, the root of the cgroup v2 hierarchy; \
             did you mean \"/a/b\"?",
        ),
        (
            "\"*.service\"",
            "a cgroup path starts with `/`, the root of the cgroup v2 hierarchy; \
             did you mean \"/*.service\"?",
        ),
        ("\"/a/../b\"", dots),
        ("\"/./b\"", dots),
        (
            "\"/sys/fs/cgroup/a\"",
            "a cgroup path starts at the root of the hierarchy, not of the file system; \
             leave out /sys/fs/cgroup",
        ),
        (
            "\"/a/[\"",
            "not a glob: unclosed character class; missing ']'",
        ),
        ("\"/a/[z-a]\"", "not a glob: invalid range; 'z' > 'a'"),
        (
            "\"/a/{b\"",
            "not a glob: unclosed alternate group; missing '}' (maybe escape '{' with '[{]'?)",
        ),
    ] {
        assert_eq!(
            errors(&format!("[[policy]]\nname = 'a'\ncgroup = {value}\n")),
            [format!("3: policy.cgroup = {value}: {message}")]
        );
    }
    assert_eq!(
        errors("[[policy]]\nname = 'a'\ncgroup = [\n  '/a',\n  5,\n  'b',\n]\n"),
        [
            "5: policy.cgroup = 5: must be a path or a list of paths",
            "6: policy.cgroup = 'b': a cgroup path starts with `/`, \
             the root of the cgroup v2 hierarchy; did you mean \"/b\"?",
        ]
    );
}

#[test]
fn what_is_not_toml_is_named_by_its_line() {
    for (text, expected) in [
        ("[default", &["1: unclosed table, expected `]`"][..]),
        (
            "[default]\nidle = \"60s\nprobes = = 6\nx\n",
            &[
                "2: invalid basic string, expected `\"`",
                "3: extra `=`, expected nothing",
                "3: unexpected key or value, expected newline, `#`",
                "4: key with no value, expected `=`",
            ],
        ),
        (
            "[default]\nidle = '1s'\nidle = '2s'\n[default]\n",
            &["3: duplicate key", "4: duplicate key"],
        ),
        (
            "[default]\r\nidle = '1s'\r\nidle = '2s'\r\n",
            &["3: duplicate key"],
        ),
    ] {
        assert_eq!(errors(text), expected, "{text}");
    }
}

#[test]
fn without_a_default_what_is_unclaimed_is_left_alone() {
    let config = good("# nothing\n");
    assert_eq!(config.default, None);
    assert!(config.policies.is_empty());

    // A policy is completed from the built-in one then.
    let config = good("[[policy]]\nname = 'a'\ncgroup = '/a'\n");
    assert_eq!(config.default, None);
    assert_eq!(*policy_of(&config, "a"), Policy::BUILT_IN);
}

#[test]
fn an_empty_default_is_the_built_in_policy() {
    assert_eq!(good("[default]\n").default, Some(Policy::BUILT_IN));
    assert_eq!(Config::built_in().default, Some(Policy::BUILT_IN));
}

#[test]
fn every_key_reaches_the_policy() {
    let seconds = |range: fn(&Policy) -> Range, key: &str| {
        for (value, expected) in [
            ("'1s'", Range::default_only(1)),
            ("'32767s'", Range::default_only(MAX_SECONDS)),
            ("'1h 30m'", Range::default_only(5400)),
            ("'1m30s'", Range::default_only(90)),
            ("'2000ms'", Range::default_only(2)),
            ("{ default = '45s' }", Range::default_only(45)),
            ("{ exactly = '4m' }", Range::exactly(240)),
            (
                "{ default = '60s', at-least = '30s', at-most = '5m' }",
                Range {
                    default: 60,
                    at_least: 30,
                    at_most: 300,
                },
            ),
            (
                "{ default = '30s', at-least = '30s', at-most = '30s' }",
                Range::exactly(30),
            ),
        ] {
            assert_eq!(
                range(&default_of(&format!("{key} = {value}"))),
                expected,
                "{key} = {value}"
            );
        }
    };
    seconds(|policy| policy.idle, "idle");
    seconds(|policy| policy.interval, "interval");
    for (value, expected) in [
        ("1", Range::default_only(1)),
        ("127", Range::default_only(MAX_PROBES)),
        ("0x7f", Range::default_only(127)),
        ("1_0", Range::default_only(10)),
        ("+3", Range::default_only(3)),
        ("{ exactly = 4 }", Range::exactly(4)),
        (
            "{ at-least = 2, at-most = 9 }",
            Range {
                default: 6,
                at_least: 2,
                at_most: 9,
            },
        ),
    ] {
        let policy = default_of(&format!("probes = {value}"));
        assert_eq!(policy.probes, expected, "{value}");
    }
    for (value, expected, derives) in [
        ("'leave'", Range::LEAVE, false),
        ("'derive'", Range::LEAVE, true),
        ("'1ms'", Range::default_only(1), false),
        (
            "'2147483647ms'",
            Range::default_only(MAX_USER_TIMEOUT),
            false,
        ),
        ("{ exactly = '2m' }", Range::exactly(120_000), false),
        (
            "{ default = 'derive', at-most = '5m' }",
            Range {
                default: 0,
                at_least: 0,
                at_most: 300_000,
            },
            true,
        ),
        (
            "{ default = 'leave', at-least = '1s' }",
            Range {
                default: 0,
                at_least: 1000,
                at_most: u32::MAX,
            },
            false,
        ),
    ] {
        let policy = default_of(&format!("user-timeout = {value}"));
        assert_eq!(policy.user_timeout, expected, "{value}");
        assert_eq!(policy.derives_user_timeout(), derives, "{value}");
    }
    for (value, expected) in [
        ("on", Keepalive::On),
        ("always", Keepalive::Always),
        ("off", Keepalive::Off),
        ("never", Keepalive::Never),
        ("leave", Keepalive::Leave),
    ] {
        let policy = default_of(&format!("keepalive = '{value}'"));
        assert_eq!(policy.keepalive(), expected);
    }
}

#[test]
fn timers_can_be_left_to_the_sysctl() {
    for (key, timer, range) in [
        (
            "idle",
            SysctlTimer::Idle,
            (|policy| policy.idle) as fn(&Policy) -> Range,
        ),
        ("interval", SysctlTimer::Interval, |policy| policy.interval),
        ("probes", SysctlTimer::Probes, |policy| policy.probes),
    ] {
        for (value, expected, heeds) in [
            ("'sysctl'", Range::LEAVE, true),
            ("'leave'", Range::LEAVE, false),
            ("{ default = 'sysctl' }", Range::LEAVE, true),
        ] {
            let policy = default_of(&format!("{key} = {value}"));
            assert_eq!(range(&policy), expected, "{key} = {value}");
            assert_eq!(policy.heeds_sysctl(timer), heeds, "{key} = {value}");
            let mut other = policy.with_sysctl(timer, true);
            match timer {
                SysctlTimer::Idle => other.idle = Policy::BUILT_IN.idle,
                SysctlTimer::Interval => other.interval = Policy::BUILT_IN.interval,
                SysctlTimer::Probes => other.probes = Policy::BUILT_IN.probes,
            }
            assert_eq!(other, Policy::BUILT_IN, "nothing else has changed");
        }
    }
    // The default comes from above with what it heeds.
    let config = good(
        "[default]\nidle = 'sysctl'\n[[policy]]\nname = 'a'\nport = 1\nidle = { at-most = '5m' }\n",
    );
    let policy = policy_of(&config, "a");
    assert_eq!((policy.idle.default, policy.idle.at_most), (0, 300));
    assert!(policy.heeds_sysctl(SysctlTimer::Idle));
    let policy = default_of("idle = { at-most = '30s' }");
    assert!(policy.heeds_sysctl(SysctlTimer::Idle));
    assert!(!default_of("path = 'aws-nat'").heeds_sysctl(SysctlTimer::Idle));
    assert_eq!(
        errors_of("idle = { at-most = \"sysctl\" }"),
        [
            "2: default.idle.at-most = \"sysctl\": not a duration; write it like \"60s\", \"2m\" \
             or \"1h 30m\""
        ]
    );
}

#[test]
fn a_lower_bound_of_the_user_timeout_can_be_derived() {
    let policy = default_of("user-timeout = { at-least = 'derive' }");
    assert!(policy.derives_at_least() && !policy.derives_user_timeout());
    assert_eq!(policy.user_timeout, Range::LEAVE);
    // Bounds are not inherited.
    let config = good(
        "[default]\nuser-timeout = { at-least = 'derive' }\n\
         [[policy]]\nname = 'a'\nport = 1\nuser-timeout = { at-most = '1h' }\n\
         [[policy]]\nname = 'b'\nport = 2\n",
    );
    assert!(!policy_of(&config, "a").derives_at_least());
    assert!(policy_of(&config, "b").derives_at_least());
    assert_eq!(
        errors_of("idle = { at-least = \"derive\" }"),
        [
            "2: default.idle.at-least = \"derive\": not a duration; write it like \"60s\", \"2m\" \
             or \"1h 30m\""
        ]
    );
}

#[test]
fn connections_can_be_ignored() {
    assert!(default_of("ignore = true").ignores());
    let config = good(
        "[default]\nignore = true\nuser-timeout = '1s'\n\
         [[policy]]\nname = 'a'\nport = 1\nignore = false\nuser-timeout = 'leave'\n\
         [[policy]]\nname = 'b'\nport = 2\n",
    );
    assert!(!policy_of(&config, "a").ignores());
    assert!(policy_of(&config, "b").ignores());
    assert_eq!(
        errors_of("ignore = 1"),
        [
            "2: default.ignore = 1: must be true or false; true: connections are claimed and not \
             touched at all"
        ]
    );
}

#[test]
fn retransmission_is_bounded() {
    assert_eq!(default_of("give-up = '2m'").give_up, 120_000);
    let config = good(
        "[default]\ngive-up = '60s'\n\
         [[policy]]\nname = 'a'\nport = 1\ngive-up = 'leave'\n\
         [[policy]]\nname = 'b'\nport = 2\n",
    );
    assert_eq!(policy_of(&config, "a").give_up, 0);
    assert_eq!(policy_of(&config, "b").give_up, 60_000);
    for (value, message) in [
        ("\"999ms\"", "must be at least 1s"),
        ("60", "a duration needs a unit, as in \"60s\" or \"2m\""),
        (
            "\"derive\"",
            "not a duration; write it like \"60s\", \"2m\" or \"1h 30m\"",
        ),
    ] {
        assert_eq!(
            errors_of(&format!("give-up = {value}")),
            [format!("2: default.give-up = {value}: {message}")]
        );
    }
    assert_eq!(
        warnings("[default]\ngive-up = '30s'\n"),
        [
            "2: default.give-up = '30s': is below interval × (probes − 1) = 50s: an outage that \
             silent connections survive ends those that send during it"
        ]
    );
    assert_eq!(
        warnings("[default]\ngive-up = '60s'\n[[policy]]\nname = 'a'\nport = 1\nprobes = 9\n"),
        [
            "6: policy.probes = 9: give-up 1m is below interval × (probes − 1) = 1m 20s: an outage \
             that silent connections survive ends those that send during it"
        ]
    );
}

#[test]
fn each_way_to_write_a_table_is_the_same() {
    let expected = good("[default]\nidle = { at-least = '2m' }\nprobes = 2\n").default;
    for text in [
        "default.idle.at-least = '2m'\ndefault.probes = 2\n",
        "default = { idle = { at-least = '2m' }, probes = 2 }\n",
        "[default]\nprobes = 2\n[default.idle]\nat-least = '2m'\n",
        "[default]\r\nprobes = 2\r\nidle.at-least = '2m'\r\n",
    ] {
        assert_eq!(good(text).default, expected, "{text}");
    }
    let config = good("policy = [{ name = 'a', cgroup = '/a', probes = 2 }]\n");
    assert_eq!(policy_of(&config, "a").probes, Range::default_only(2));
}

#[test]
fn a_policy_is_completed_from_the_default_and_that_from_the_built_in_one() {
    let (config, _) = parse(
        "
        # Where [default] stands does not matter.
        [[policy]]
        name = 'plain'
        cgroup = '/plain'

        [default]
        keepalive = 'leave'
        idle = { default = '50s', at-least = '40s', at-most = '90s' }
        user-timeout = 'derive'

        [[policy]]
        name = 'own'
        cgroup = '/own'
        keepalive = 'on'
        idle = '70s'
        interval = { at-most = '8s' }
        probes = 3
        user-timeout = 'leave'

        [[policy]]
        name = 'bounds'
        cgroup = '/bounds'
        idle = { at-most = '30s' }
        user-timeout = { at-least = '1s' }

        [[policy]]
        name = 'exactly'
        cgroup = '/exactly'
        idle = { exactly = '20s' }
        ",
    )
    .unwrap();
    let default = config.default.expect("there is one");
    let mut expected = with_written(&[SysctlTimer::Idle])
        .with_keepalive(Keepalive::Leave)
        .with_derived_user_timeout(true);
    expected.idle = Range {
        default: 50,
        at_least: 40,
        at_most: 90,
    };
    assert_eq!(default, expected);

    // A timer that is not mentioned comes with its bounds.
    assert_eq!(*policy_of(&config, "plain"), default);

    let mut expected = with_written(&[SysctlTimer::Idle, SysctlTimer::Probes]);
    expected.idle = Range::default_only(70);
    expected.interval = Range {
        default: 10,
        at_least: 0,
        at_most: 8,
    };
    expected.probes = Range::default_only(3);
    assert_eq!(*policy_of(&config, "own"), expected);

    // A table without a default takes the default from above, not the bounds.
    let mut expected = default;
    expected.idle = Range {
        default: 50,
        at_least: 0,
        at_most: 30,
    };
    expected.user_timeout.at_least = 1000;
    assert_eq!(*policy_of(&config, "bounds"), expected);
    assert_eq!(expected.idle.effective(0), 30);

    let mut expected = default;
    expected.idle = Range::exactly(20);
    assert_eq!(*policy_of(&config, "exactly"), expected);
}

#[test]
fn policies_and_their_cgroups_keep_their_order() {
    let config = good(
        r"
        [[policy]]
        name = 'z'
        cgroup = ['/b/', '/a', '/']
        [[policy]]
        name = 'a'
        cgroup = '/system.slice/*\x2dx.service'
        ",
    );
    let found: Vec<_> = config
        .policies
        .iter()
        .map(|policy| {
            let cgroups = policy.cgroups.iter().map(ToString::to_string);
            (policy.name.as_str(), cgroups.collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(
        found,
        [
            ("z", vec!["/b".into(), "/a".into(), "/".into()]),
            ("a", vec![r"/system.slice/*\x2dx.service".into()]),
        ]
    );
}

#[test]
fn globs_match_as_documented() {
    for (pattern, path, expected) in [
        ("/a", "/a", true),
        ("/a", "/a/b", false),
        ("/a/*", "/a/b", true),
        ("/a/*", "/a", false),
        ("/a/*", "/a/b/c", false),
        ("/a/**", "/a/b/c", true),
        ("/a/**/c", "/a/c", true),
        ("/a/**/c", "/a/b/b/c", true),
        ("/a?", "/ab", true),
        ("/a?", "/a/", false),
        ("/[ab]", "/b", true),
        ("/{x,y}.service", "/y.service", true),
        (r"/*\x2dx.service", r"/a\x2dx.service", true),
        (r"/*\x2dx.service", "/a-x.service", false),
    ] {
        let pattern = CgroupPattern::new(pattern).expect(pattern);
        let matches = match pattern.glob() {
            Some(glob) => glob.compile_matcher().is_match(path),
            None => pattern.to_string() == path,
        };
        assert_eq!(matches, expected, "{pattern} {path}");
    }
}

#[test]
fn a_user_timeout_that_disagrees_with_the_probes_is_a_warning() {
    let cancels = "with a user-timeout the kernel gives up by time, here after";
    for (lines, expected) in [
        // Below idle.
        (
            "user-timeout = \"30s\"",
            "2: default.user-timeout = \"30s\": is below idle 1m: a dead peer is given up \
             after one unanswered probe, and unacknowledged data after 30s"
                .to_owned(),
        ),
        (
            "user-timeout = { default = \"derive\", at-most = \"30s\" }",
            "2: default.user-timeout = { default = \"derive\", at-most = \"30s\" }: \
             is below idle 1m: a dead peer is given up after one unanswered probe, \
             and unacknowledged data after 30s"
                .to_owned(),
        ),
        // Not what the probes come to.
        (
            "probes = 3\nuser-timeout = { exactly = \"5m\" }",
            format!(
                "3: default.user-timeout = {{ exactly = \"5m\" }}: cancels probes = 3: \
                 {cancels} 5m instead of idle + interval × probes = 1m 30s; \
                 \"derive\" makes them agree"
            ),
        ),
    ] {
        assert_eq!(
            warnings(&format!("[default]\n{lines}\n")),
            [expected],
            "{lines}"
        );
    }
    for lines in [
        "user-timeout = \"2m\"",
        "user-timeout = \"leave\"",
        "user-timeout = { at-least = \"derive\" }",
        "user-timeout = { at-most = \"1s\" }",
        "keepalive = \"off\"\nuser-timeout = \"1s\"",
    ] {
        assert_eq!(
            warnings(&format!("[default]\n{lines}\n")),
            [""; 0],
            "{lines}"
        );
    }
}

#[test]
fn a_policy_is_warned_of_what_it_inherits() {
    let policies = "
[[policy]]
name = \"slow\"
cgroup = \"/slow\"
idle = \"5m\"
[[policy]]
name = \"plain\"
cgroup = \"/plain\"
[[policy]]
name = \"more\"
cgroup = \"/more\"
probes = 9
[[policy]]
name = \"off\"
cgroup = \"/off\"
keepalive = \"off\"
idle = \"5m\"
";
    assert_eq!(
        warnings(&format!("{policies}[default]\nuser-timeout = \"2m\"\n")),
        [
            "5: policy.idle = \"5m\": user-timeout 2m of [default] is below idle 5m: \
             a dead peer is given up after one unanswered probe, \
             and unacknowledged data after 2m",
            "12: policy.probes = 9: user-timeout 2m of [default] cancels probes = 9: \
             with a user-timeout the kernel gives up by time, here after 2m \
             instead of idle + interval × probes = 2m 30s; \"derive\" makes them agree",
        ]
    );
    assert_eq!(
        warnings(&format!("{policies}[default]\nuser-timeout = \"derive\"\n")),
        [
            "19: default.user-timeout = \"derive\": also ends connections whose peer answers but \
             reads nothing for that long (here 2m); give-up spares them"
        ]
    );
}

#[test]
fn the_example_is_right_and_mentions_every_key() {
    let config = good(EXAMPLE);
    // What it shows as built in is that, but for the sysctls, which it has no
    // say beside.
    assert_eq!(config.default, Some(with_written(&ALL_TIMERS)));
    assert!(config.policies.len() >= 3);
    let patterns = || config.policies.iter().flat_map(|policy| &policy.cgroups);
    assert!(patterns().any(|pattern| pattern.glob().is_some()));
    assert!(patterns().any(|pattern| pattern.glob().is_none()));
    for key in [
        "keepalive =",
        "idle =",
        "interval =",
        "probes =",
        "user-timeout =",
        "name =",
        "cgroup =",
        "default =",
        "at-least =",
        "at-most =",
        "exactly =",
        "remote =",
        "port =",
        "local-port =",
        "give-up =",
        "ignore =",
        "path =",
        "enforce =",
        "commands =",
        "commands-per-user =",
    ] {
        let used = |line: &str| !line.starts_with('#') && line.contains(key);
        assert!(EXAMPLE.lines().any(used), "{key}");
    }
}

#[test]
fn what_the_documentation_shows_is_right() {
    for page in [
        include_str!("../../../README.md"),
        include_str!("../../../docs/config.md"),
    ] {
        let blocks = page.split("```toml\n").skip(1);
        let texts: Vec<_> = blocks.filter_map(|rest| rest.split("```").next()).collect();
        assert!(!texts.is_empty());
        for text in texts {
            good(text);
        }
    }
}

/// What changes the meaning of a config when it gets into a wrong place.
#[rustfmt::skip]
const PIECES: &[&str] = &[
    "\"", "'", "\"\"\"", "'''", "[", "]", "[[", "]]", "{", "}", "=", ".", ",", "#", "\n", "\r",
    "\r\n", "\\", "\\u0000", "\0", "\t", "\u{feff}", "é", "😀", "0", "-1", "128", "0xff", "1e999",
    "nan", "true", "1979-05-27", "99999999999999999999", "60s", "\"0s\"", "\"1M\"", "\"derive\"",
    "\"leave\"", "\"sysctl\"", "[default]\n", "[[policy]]\n", "[policy]\n", "default", "policy", "idle = ",
    "interval = ", "probes = ", "user-timeout = ", "keepalive = ", "name = ", "cgroup = ",
    "exactly = ", "at-least = ", "at-most = ", "/a/../b", "/[", "**", "{a,", "remote = ", "port = ",
    "enforce = ", "ignore = ", "give-up = ", "local-port = ", "path = ", "\"aws-nat\"", "\"9s\"", "\"10s\"", "\"!10.0.0.0/8\"", "\"10.0.0.0/33\"",
    "443", "\"8000-8999\"", "65536", "false", "[self-service]\n", "commands = ",
    "commands-per-user = ",
];

/// Another full example: every way to write a table, several lines.
const TERSE: &str = "default.user-timeout = 'derive'\n\
    default.idle = {\n  at-most = '5m',\n}\n\
    policy = [\n  { name = 'a', cgroup = ['/a', '/b/*'] },\n  \
    { name = 'b', cgroup = '/', probes.exactly = 3, path = '350s' },\n  \
    { name = 'c', remote = ['10.0.0.0/8', '!10.1.0.0/16'], port = [443, '8000-8999'] },\n]\n";

#[derive(Clone, Debug)]
enum Edit {
    Insert(prop::sample::Index, String),
    Remove(prop::sample::Index, usize),
    Swap(prop::sample::Index, prop::sample::Index),
    Repeat(prop::sample::Index, prop::sample::Index),
    End(prop::sample::Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<prop::sample::Index>;
    let piece = prop_oneof![
        8 => prop::sample::select(PIECES).prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    prop_oneof![
        6 => (at(), piece).prop_map(|(at, piece)| Edit::Insert(at, piece)),
        4 => (at(), 1_usize..20).prop_map(|(at, count)| Edit::Remove(at, count)),
        2 => (at(), at()).prop_map(|(one, other)| Edit::Swap(one, other)),
        2 => (at(), at()).prop_map(|(line, before)| Edit::Repeat(line, before)),
        1 => at().prop_map(Edit::End),
    ]
}

fn apply(text: &str, edit: &Edit) -> String {
    let characters: Vec<char> = text.chars().collect();
    let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
    match edit {
        Edit::Insert(at, piece) => {
            let (before, after) = characters.split_at(at.index(characters.len() + 1));
            before
                .iter()
                .chain(&piece.chars().collect::<Vec<_>>())
                .chain(after)
                .collect()
        }
        Edit::Remove(at, count) => {
            let start = at.index(characters.len() + 1);
            let rest = characters.iter().skip(start + count);
            characters[..start].iter().chain(rest).collect()
        }
        Edit::Swap(..) | Edit::Repeat(..) if lines.is_empty() => text.to_owned(),
        Edit::Swap(one, other) => {
            let count = lines.len();
            lines.swap(one.index(count), other.index(count));
            lines.concat()
        }
        Edit::Repeat(line, before) => {
            lines.insert(before.index(lines.len()), lines[line.index(lines.len())]);
            lines.concat()
        }
        Edit::End(at) => characters[..at.index(characters.len() + 1)]
            .iter()
            .collect(),
    }
}

/// Without its comments, which edits would mostly hit.
fn bare_example() -> String {
    EXAMPLE
        .split_inclusive('\n')
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        .collect()
}

fn within_the_kernels_bounds(policy: &Policy) -> bool {
    [
        (policy.idle, MAX_SECONDS),
        (policy.interval, MAX_SECONDS),
        (policy.probes, MAX_PROBES),
        (policy.user_timeout, MAX_USER_TIMEOUT),
    ]
    .iter()
    .all(|(range, max)| {
        range.default <= *max
            && range.at_least <= *max
            && (range.at_most == u32::MAX || (1..=*max).contains(&range.at_most))
            && range.at_least <= range.at_most
    })
}

#[test]
fn a_thousand_broken_configs_are_refused_with_a_line() {
    // The same ones in every run.
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let edits = prop::collection::vec(edit(), 1..4);
    let mut refused = 0;
    for tried in 0.. {
        assert!(tried < 4_000, "only {refused} of {tried} were refused");
        let good = [bare_example(), TERSE.to_owned()][tried % 2].clone();
        let edits = edits.new_tree(&mut runner).expect("edits").current();
        let text = edits.iter().fold(good, |text, edit| apply(&text, edit));
        let Err(errors) = parse(&text) else {
            continue;
        };
        let lines = 1 + text.matches('\n').count();
        for error in &errors.0 {
            let line = error.line.expect("it is a text");
            assert!((1..=lines).contains(&line), "{error}\n{text}");
        }
        assert!(!errors.0.is_empty(), "{text}");
        refused += 1;
        if refused == 1_000 {
            return;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_is_written_is_understood_or_refused_with_its_line(
        terse: bool,
        edits in prop::collection::vec(edit(), 1..8),
    ) {
        let good = if terse { TERSE.to_owned() } else { bare_example() };
        let text = edits.iter().fold(good, |text, edit| apply(&text, edit));
        let lines = 1 + text.matches('\n').count();
        let found = match parse(&text) {
            Ok((config, warnings)) => {
                let named = config.policies.iter().map(|named| &named.policy);
                for policy in named.chain(&config.default) {
                    prop_assert!(within_the_kernels_bounds(policy), "{policy:?}");
                }
                warnings
            }
            Err(errors) => {
                prop_assert!(!errors.0.is_empty());
                errors
            }
        };
        prop_assert!(found.0.is_sorted_by_key(|found| found.line));
        for found in &found.0 {
            let line = found.line.expect("it is a text");
            prop_assert!((1..=lines).contains(&line), "{found}");
            let shown = found.to_string();
            prop_assert!(!shown.contains(['\n', '\r']), "{shown:?}");
            prop_assert!(!found.message.is_empty());
        }
    }
}

#[test]
fn configs_that_differ_in_values_only() {
    let config = |default: u32, own: &str| {
        good(&format!(
            "[default]\nidle = '{default}s'\n\
             [[policy]]\nname = 'heir'\ncgroup = '/a'\n\
             [[policy]]\nname = 'own'\ncgroup = '/b'\n{own}\n"
        ))
    };
    let before = config(70, "idle = '90s'");
    assert_eq!(before.values_beside(&before), Some(Vec::new()));
    // Who inherits from the default differs too.
    for (after, places) in [
        (config(71, "idle = '90s'"), &[0, 1][..]),
        (config(70, "idle = '91s'"), &[2]),
        (config(71, "keepalive = 'never'"), &[0, 1, 2]),
    ] {
        let values = after.values_beside(&before).unwrap();
        let changed: Vec<_> = values.iter().map(|(place, _)| *place).collect();
        assert_eq!(changed, places);
        assert_eq!(after.changed_since(&before), places);
        assert_eq!(before.with_values(&values), after);
    }
    for other in [
        good("[default]\nidle = '70s'\n"),
        config(70, "idle = '90s'\nport = 22"),
        good("[[policy]]\nname = 'heir'\ncgroup = '/a'\n"),
        Config {
            default: None,
            ..before.clone()
        },
    ] {
        assert_eq!(other.values_beside(&before), None, "{other:?}");
    }
}

#[test]
fn what_is_new_and_what_is_gone() {
    let before = good(
        "[default]\n[[policy]]\nname = 'a'\ncgroup = '/a'\n[[policy]]\nname = 'b'\ncgroup = '/b'\n",
    );
    let after = good(
        "[[policy]]\nname = 'new'\ncgroup = '/n'\n[[policy]]\nname = 'b'\ncgroup = '/b'\n\
         [[policy]]\nname = 'a'\ncgroup = '/elsewhere'\n",
    );
    assert_eq!(after.changed_since(&before), [0, 2]);
    assert_eq!(before.removed_by(&after), ["default"]);
    assert_eq!(before.changed_since(&after), [0, 1]);
    assert_eq!(after.removed_by(&before), ["new"]);
}
