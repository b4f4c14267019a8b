//! Presets: `path` keeps the path open, whatever an application sets.

use keepalive_common::{
    environment::Environment,
    plan::{Options, plan},
};

use super::*;
use crate::paths::{self, IdleTimeout};

#[test]
fn a_path_chooses_timers() {
    let seconds = |default, at_most| Range {
        default,
        at_least: 0,
        at_most,
    };
    let probes = Range {
        default: 6,
        at_least: 3,
        at_most: u32::MAX,
    };
    for (path, idle, interval) in [
        ("aws-nat", seconds(60, 175), seconds(10, 35)),
        ("aws-nlb", seconds(60, 175), seconds(10, 35)),
        ("azure-lb", seconds(60, 120), seconds(10, 24)),
        ("gcp", seconds(60, 300), seconds(10, 60)),
        ("ipvs", seconds(60, 450), seconds(10, 90)),
        ("10s", seconds(5, 5), seconds(1, 1)),
        ("19500ms", seconds(9, 9), seconds(1, 1)),
        ("1m", seconds(30, 30), seconds(6, 6)),
        ("2h", seconds(60, 3600), seconds(10, 720)),
        (
            "10years",
            seconds(60, MAX_SECONDS),
            seconds(10, MAX_SECONDS),
        ),
    ] {
        let mut expected = with_written(&ALL_TIMERS);
        expected.idle = idle;
        expected.interval = interval;
        expected.probes = probes;
        let text = format!("[default]\npath = '{path}'\n");
        assert_eq!(good(&text).default, Some(expected), "{path}");
    }
    let known = paths::ALL.map(|path| path.name).join(", ");
    for (value, message) in [
        (
            "\"aws\"",
            format!("neither a duration such as \"350s\" nor a known path: {known}"),
        ),
        ("\"0s\"", "must be longer than 0s".to_owned()),
        (
            "\"9s\"",
            "must be at least 10s: the shortest idle timeout that timers of whole seconds keep \
             a connection below, with room for two lost probes"
                .to_owned(),
        ),
        (
            "350",
            "must be the name of a path such as \"aws-nat\", or a duration such as \"350s\""
                .to_owned(),
        ),
    ] {
        assert_eq!(
            errors_of(&format!("path = {value}")),
            [format!("2: default.path = {value}: {message}")]
        );
    }
}

#[test]
fn what_the_table_says_itself_comes_first_and_the_rest_from_the_path() {
    let policy = default_of(
        "path = 'azure-lb'\nidle = { at-most = '90s' }\ninterval = { exactly = '5s' }\n\
         user-timeout = 'derive'",
    );
    let mut expected = with_written(&ALL_TIMERS).with_derived_user_timeout(true);
    // The default that is left out is that of the path.
    expected.idle.at_most = 90;
    expected.interval = Range::exactly(5);
    expected.probes.at_least = 3;
    assert_eq!(policy, expected);

    // It comes before what is inherited, and is inherited as timers.
    let config = good(
        "[default]\nidle = '10m'\nprobes = 2\n[[policy]]\nname = 'a'\nport = 1\npath = 'gcp'\n",
    );
    assert_eq!(policy_of(&config, "a").idle.default, 60);
    assert_eq!(policy_of(&config, "a").probes.default, 6);
    let config = good("[default]\npath = 'gcp'\n[[policy]]\nname = 'a'\nport = 1\nidle = '10m'\n");
    assert_eq!(policy_of(&config, "a").idle, Range::default_only(600));
    assert_eq!(policy_of(&config, "a").interval.at_most, 60);
}

#[test]
fn a_path_that_is_not_kept_open_is_a_warning() {
    let lost = "is not kept open with two probes lost";
    for (lines, expected) in [
        (
            "idle = \"6m\"",
            format!(
                "3: default.idle = \"6m\": path aws-nat (5m 50s) {lost}: \
                 idle 6m + 2 × interval 10s is not below it"
            ),
        ),
        (
            "interval = \"3m\"",
            format!(
                "3: default.interval = \"3m\": path aws-nat (5m 50s) {lost}: \
                 idle 1m + 2 × interval 3m is not below it"
            ),
        ),
        (
            "idle = \"2m\"",
            "3: default.idle = \"2m\": path aws-nat (5m 50s) is not kept open where an application \
             sets more: idle up to 9h 6m 7s and interval up to 35s are let through; lower at-most"
                .to_owned(),
        ),
        (
            "probes = 2",
            format!(
                "3: default.probes = 2: path aws-nat (5m 50s) {lost}: \
                 after probes = 2 the connection ends"
            ),
        ),
        (
            "probes = 5",
            format!(
                "3: default.probes = 5: path aws-nat (5m 50s) {lost} where an application sets \
                 fewer probes; add at-least = 3"
            ),
        ),
        (
            "keepalive = \"off\"",
            "3: default.keepalive = \"off\": path aws-nat (5m 50s) is not kept open: \
             keepalive is off, no probe goes out"
                .to_owned(),
        ),
    ] {
        assert_eq!(
            warnings(&format!("[default]\npath = \"aws-nat\"\n{lines}\n")),
            [expected],
            "{lines}"
        );
    }
    assert_eq!(
        warnings("[[policy]]\nname = 'a'\nport = 1\npath = '350s'\n[default]\nkeepalive = 'off'\n"),
        ["4: policy.path = '350s': path 350s is not kept open: \
          keepalive is off, no probe goes out"]
    );
    for lines in [
        "",
        "idle = { exactly = '4m' }",
        "interval = { default = '80s', at-most = '80s' }",
        "probes = { default = 3, at-least = 3 }",
        "keepalive = 'leave'",
    ] {
        assert_eq!(
            warnings(&format!("[default]\npath = 'aws-nat'\n{lines}\n")),
            [""; 0],
            "{lines}"
        );
    }
}

fn set_by_an_application() -> impl Strategy<Value = Options> {
    let maybe = |most: u32| prop_oneof![Just(0), 1..=most, 1..=600_u32.min(most)];
    (maybe(MAX_SECONDS), maybe(MAX_SECONDS), maybe(MAX_PROBES)).prop_map(
        |(idle, interval, probes)| Options {
            idle,
            interval,
            probes,
            ..Options::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn a_path_is_kept_open_whatever_the_application_sets(
        seconds in prop_oneof![10_u32..=1200, 10..=u32::MAX],
        name in prop::option::of(prop::sample::select(&paths::ALL[..])),
        has in set_by_an_application(),
    ) {
        let path = name.map_or_else(|| format!("{seconds}s"), |path| path.name.to_owned());
        let timeout: IdleTimeout = path.parse().expect("a path");
        let config = good(&format!("[default]\npath = '{path}'\n"));
        let policy = config.default.expect("there is one");
        let wants = plan(&policy, &has, &Environment::UNCHANGED).wants;
        prop_assert!(timeout.is_kept_open_by(wants.idle, wants.interval), "{path}: {wants:?}");
        prop_assert!(wants.probes >= 3, "{path}: {wants:?}");
        prop_assert!(wants.keepalive);
    }

    /// And where other keys are beside it, nobody is left without a warning.
    #[test]
    fn a_path_that_an_application_can_lose_is_warned_of(
        idle in (1_u32..=400, prop::option::of(1_u32..=400)),
        interval in (1_u32..=100, prop::option::of(1_u32..=100)),
        probes in (1_u32..=8, prop::option::of(1_u32..=8)),
        has in set_by_an_application(),
    ) {
        let seconds = |(default, at_most): (u32, Option<u32>)| match at_most {
            Some(at_most) => format!(
                "{{ default = '{}s', at-most = '{at_most}s' }}", default.min(at_most)
            ),
            None => format!("'{default}s'"),
        };
        let probes = match probes {
            (default, Some(least)) => {
                format!("{{ default = {}, at-least = {least} }}", default.max(least))
            }
            (default, None) => default.to_string(),
        };
        let text = format!(
            "[default]\npath = 'aws-nat'\nidle = {}\ninterval = {}\nprobes = {probes}\n",
            seconds(idle), seconds(interval),
        );
        let (config, warnings) = parse(&text).expect("nothing is wrong");
        let policy = config.default.expect("there is one");
        let wants = plan(&policy, &has, &Environment::UNCHANGED).wants;
        let timeout = IdleTimeout::from(paths::AWS_NAT);
        let kept = timeout.is_kept_open_by(wants.idle, wants.interval) && wants.probes >= 3;
        prop_assert!(kept || warnings.0.len() == 1, "{text} {wants:?}");
    }
}
