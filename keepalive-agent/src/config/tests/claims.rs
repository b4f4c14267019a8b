//! What a policy is for: cgroups, remote ends; and whether it is enforced.

use super::*;

fn policy(lines: &str) -> NamedPolicy {
    let config = good(&format!("[[policy]]\nname = 'a'\n{lines}\n"));
    config.policies[0].clone()
}

#[test]
fn remote_ends_are_networks_and_ports() {
    for (lines, remotes, ports) in [
        ("remote = '10.0.0.0/8'", &["10.0.0.0/8"][..], &[][..]),
        ("remote = '192.0.2.1'", &["192.0.2.1"], &[]),
        ("remote = '!10.0.0.0/8'", &["!10.0.0.0/8"], &[]),
        (
            "remote = ['10.0.0.0/8', '!10.1.0.0/16', '2001:db8::/32']",
            &["10.0.0.0/8", "!10.1.0.0/16", "2001:db8::/32"],
            &[],
        ),
        ("remote = '::ffff:10.0.0.0/104'", &["10.0.0.0/8"], &[]),
        ("port = 443", &[], &["443"]),
        ("port = '443'", &[], &["443"]),
        ("port = 0x1bb", &[], &["443"]),
        ("port = '8000-8999'", &[], &["8000-8999"]),
        ("port = [1, '2-3', 65535]", &[], &["1", "2-3", "65535"]),
        // Ranges may overlap: the narrowest one counts.
        ("port = ['1-10', 5]", &[], &["1-10", "5"]),
        (
            "remote = '10.0.0.0/8'\nport = 443",
            &["10.0.0.0/8"],
            &["443"],
        ),
    ] {
        let policy = policy(lines);
        assert!(policy.cgroups.is_empty(), "{lines}");
        let shown: Vec<_> = policy
            .rules
            .remotes
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(shown, remotes, "{lines}");
        let shown: Vec<_> = policy.rules.ports.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ports, "{lines}");
    }
    let both = policy("cgroup = '/a'\nremote = '10.0.0.0/8'");
    assert_eq!(both.cgroups.len(), 1);
    assert_eq!(both.rules.remotes.len(), 1);
    assert!(policy("cgroup = '/a'").rules.is_empty());
}

#[test]
fn units_and_containers_are_selected_by_name() {
    let selected = |lines: &str| policy(lines).selector.to_string();
    for (lines, selector) in [
        ("unit = 'redis.service'", "unit = redis.service"),
        ("unit = ['a@.service', 'b-*']", "unit = a@.service or b-*"),
        (
            "namespace = 'shop'\npod = 'web-*'\ncontainer = 'app'",
            "container = app, namespace = shop, pod = web-*",
        ),
        ("image = '*/redis:*'", "image = */redis:*"),
        (
            "label = { app = 'web', 'com.example/tier' = 'd?' }",
            "label app = web, label com.example/tier = d?",
        ),
    ] {
        assert_eq!(selected(lines), selector);
    }
    assert!(policy("cgroup = '/a'").selector.is_empty());
    let whole = policy("unit = 'a*'\nlabel = { b = 'c*' }");
    let json = serde_json::to_string(&whole).unwrap();
    assert_eq!(serde_json::from_str::<NamedPolicy>(&json).unwrap(), whole);
}

#[test]
fn a_selector_that_cannot_be_is_an_error() {
    let name = "must be a name, a glob or a list of them";
    let label = "must be a table of labels such as { app = \"web-*\" }";
    for (key, value, message) in [
        ("unit", "5", name),
        ("unit", "[]", name),
        ("unit", "\"\"", "must not be empty"),
        (
            "container",
            "\"[a\"",
            "not a glob: unclosed character class; missing ']'",
        ),
        ("label", "\"a\"", label),
        ("label", "{}", label),
    ] {
        let text = format!("[[policy]]\nname = 'a'\n{key} = {value}\n");
        assert_eq!(
            errors(&text),
            [format!("3: policy.{key} = {value}: {message}")]
        );
    }
    assert_eq!(
        errors("[[policy]]\nname = 'a'\nlabel = { a = 1 }\n"),
        [format!("3: policy.label = 1: {name}")]
    );
    assert_eq!(
        errors("[[policy]]\nname = 'a'\ncgroup = '/a'\nunit = 'b'\n"),
        [
            "3: policy.cgroup: stands beside unit: a policy is for cgroups by their paths or by \
             what they are; remove one of the two, or make it two policies"
        ]
    );
}

#[test]
fn a_remote_end_that_cannot_be_is_an_error() {
    let network = "must be a network such as \"10.0.0.0/8\", or a list of networks";
    let port = "must be a number, a range such as \"8000-8999\", or a list of both";
    for (key, value, message) in [
        ("remote", "5", network),
        ("remote", "[]", network),
        (
            "remote",
            "\"example.org\"",
            "`example.org` is not an IP address; a network is written like 10.0.0.0/8",
        ),
        (
            "remote",
            "\"10.0.0.1/8\"",
            "10.0.0.1 has bits set beyond its prefix; did you mean 10.0.0.0/8?",
        ),
        (
            "remote",
            "\"10.0.0.0/33\"",
            "`33` is not a prefix length from 0 to 32",
        ),
        ("port", "0", "out of range: 1 to 65535"),
        ("port", "-1", "out of range: 1 to 65535"),
        ("port", "65536", "out of range: 1 to 65535"),
        ("port", "4.5", port),
        ("port", "[]", port),
        ("port", "true", port),
        ("port", "\"https\"", "`https` is not a port from 1 to 65535"),
        (
            "port",
            "\"9-8\"",
            "the range 9-8 is empty; did you mean 8-9?",
        ),
    ] {
        let text = format!("[[policy]]\nname = 'a'\n{key} = {value}\n");
        assert_eq!(
            errors(&text),
            [format!("3: policy.{key} = {value}: {message}")]
        );
    }
    assert_eq!(
        errors("[[policy]]\nname = 'a'\nport = [\n  80,\n  'x',\n  0,\n]\n"),
        [
            "5: policy.port = 'x': `x` is not a port from 1 to 65535",
            "6: policy.port = 0: out of range: 1 to 65535",
        ]
    );
}

#[test]
fn what_is_said_twice_or_denied_is_an_error() {
    let text = "[[policy]]\nname = 'a'\nremote = [\n  '10.0.0.0/8',\n  '!10.1.0.0/16',\n  \
                '::ffff:10.0.0.0/104',\n  '10.1.0.0/16',\n]\nport = [443, '443', '1-2', '1-2']\n";
    assert_eq!(
        errors(text),
        [
            "6: policy.remote = '::ffff:10.0.0.0/104': 10.0.0.0/8 is in the list twice",
            "7: policy.remote = '10.1.0.0/16': 10.1.0.0/16 is in the list and excepted from it; \
             remove one of the two",
            "9: policy.port = '443': 443 is in the list twice",
            "9: policy.port = '1-2': 1-2 is in the list twice",
        ]
    );
}

#[test]
fn a_policy_is_for_something() {
    let message = "1: policy: has no cgroup, unit, container, remote, port or local-port: add cgroup = \"/…\", \
                   or use [default] for everything";
    assert_eq!(errors("[[policy]]\nname = 'a'\n"), [message]);
    // What is wrong is there all the same.
    assert_eq!(
        errors("[[policy]]\nname = 'a'\nport = 0\n"),
        ["3: policy.port = 0: out of range: 1 to 65535"]
    );
}

#[test]
fn enforcement_is_a_key_like_the_others() {
    let enforced = |text: &str| {
        let config = good(text);
        let policies = config
            .policies
            .iter()
            .map(|named| named.policy.is_enforced());
        policies
            .chain(config.default.map(|policy| policy.is_enforced()))
            .collect::<Vec<_>>()
    };
    let own = "[[policy]]\nname = 'a'\nport = 1\n";
    assert_eq!(enforced(own), [true]);
    assert_eq!(enforced(&format!("{own}enforce = false\n")), [false]);
    assert_eq!(enforced("[default]\nenforce = false\n"), [false]);
    let inherited = format!("[default]\nenforce = false\n{own}");
    assert_eq!(enforced(&inherited), [false, false]);
    assert_eq!(
        enforced(&format!("{inherited}enforce = true\n")),
        [true, false]
    );
    for value in ["\"no\"", "0", "{}"] {
        assert_eq!(
            errors_of(&format!("enforce = {value}")),
            [format!(
                "2: default.enforce = {value}: must be true or false; \
                 false: decided and counted, nothing is set"
            )]
        );
    }
}

#[test]
fn ten_thousand_of_anything_are_read_without_fuss() {
    use std::fmt::Write as _;

    let mut text = String::new();
    for index in 0..10_000 {
        writeln!(
            text,
            "[[policy]]\nname = 'p{index}'\ncgroup = '/p/{index}'\nidle = '60s'"
        )
        .unwrap();
    }
    text.push_str("[[policy]]\nname = 'remotes'\nremote = [\n");
    for index in 0..10_000 {
        writeln!(text, "  '10.{}.{}.0/24',", index / 256, index % 256).unwrap();
    }
    text.push_str("]\n");
    let config = good(&text);
    assert_eq!(config.policies.len(), 10_001);
    assert_eq!(config.policies[10_000].rules.remotes.len(), 10_000);
}
