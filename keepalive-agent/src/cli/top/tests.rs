use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    style::Color,
};

use super::{model::View, *};

const SILENT: u64 = 340_000;

fn place(cgroup: &str, unit: Option<&str>, container: Option<&str>) -> Arc<Place> {
    Arc::new(Place {
        cgroup: cgroup.into(),
        unit: unit.map(Into::into),
        container: container.map(Into::into),
    })
}

fn socket(place: &Arc<Place>, port: u16, silent_ms: u64, exposure: Exposure) -> Socket {
    let is_at_risk = exposure == Exposure::AtRisk;
    Socket {
        local: SocketAddr::from(([192, 0, 2, 1], port)),
        remote: SocketAddr::from(([198, 51, 100, 7], 5432)),
        place: place.clone(),
        policy: (!is_at_risk).then(|| "default".into()),
        process: Some((4711, "redis-server".into())),
        netns: "host".into(),
        idle: (!is_at_risk).then_some(60),
        is_changed: !is_at_risk,
        exposure,
        silent_ms,
        noticed: if is_at_risk {
            Noticed::Never
        } else {
            Noticed::After(95_000)
        },
        is_new: port == 40_000,
    }
}

/// Three connections of redis, one of them at risk, one of a container at risk, and
/// one that stays within the machine.
fn snapshot() -> Snapshot {
    let redis = place("/system.slice/redis.service", Some("redis.service"), None);
    let web = place(
        "/system.slice/docker-3f2a.scope",
        Some("docker-3f2a.scope"),
        Some("docker:web"),
    );
    Snapshot {
        sockets: vec![
            socket(&redis, 40_000, 1_500, Exposure::Survives),
            socket(&redis, 40_001, 59_000, Exposure::Survives),
            socket(&redis, 40_002, 100_000, Exposure::AtRisk),
            socket(&web, 40_003, SILENT, Exposure::AtRisk),
            socket(&redis, 40_004, 7_261_000, Exposure::Within),
        ],
        policies: vec![Counts {
            policy: "default".into(),
            new: 7,
            dead: 3,
        }],
        dead: vec![(redis, 2)],
        since_last: Some(Duration::from_secs(2)),
        in_force: vec!["agent 123 on /".to_owned()],
        unseen: Vec::new(),
        timeout: AWS_NAT.into(),
        at: "22:13:20".to_owned(),
    }
}

fn model() -> Model {
    let mut model = Model::new(By::Cgroup, true);
    model.take(snapshot());
    model
}

fn press(model: &mut Model, keys: &str) -> Action {
    let mut action = Action::None;
    for key in keys.chars() {
        let code = match key {
            '\n' => KeyCode::Enter,
            '\t' => KeyCode::Tab,
            '\x1b' => KeyCode::Esc,
            key => KeyCode::Char(key),
        };
        action = model.press(KeyEvent::new(code, KeyModifiers::NONE));
    }
    action
}

fn terminal(model: &mut Model, width: u16, height: u16) -> Terminal<TestBackend> {
    model.resize(draw::room(height));
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw::draw(model, frame)).unwrap();
    terminal
}

/// The lines of a picture, without spaces at their ends and empty lines.
fn picture(model: &mut Model, width: u16, height: u16) -> Vec<String> {
    let terminal = terminal(model, width, height);
    let buffer = terminal.backend().buffer();
    let line = |y| {
        let cells = (0..width).map(|x| buffer[(x, y)].symbol());
        cells.collect::<String>().trim_end().to_owned()
    };
    let lines = (0..height).map(line);
    lines.filter(|line| !line.is_empty()).collect()
}

#[track_caller]
fn assert_picture(model: &mut Model, (width, height): (u16, u16), expected: &[&str]) {
    let picture = picture(model, width, height);
    assert_eq!(picture, expected, "\n{}\n", picture.join("\n"));
}

#[test]
fn the_overview() {
    assert_picture(
        &mut model(),
        (80, 24),
        &[
            "keepalive  all connections by cgroup                                22:13:20 UTC",
            "[##########..........] 50.0% of 4 survive 5m 50s, 2 at risk; 1 stay here",
            "agent 123 on /; 3 changed, 3 dead peers, 0.5 new/s",
            "CGROUP                    CONNS SURVIVE AT RISK CHANGED   DEAD  NEW/S vFORGOTTEN",
            "…lice/docker-3f2a.scope       1       0       1       0      0      0     in 10s",
            "…em.slice/redis.service       4       2       1       3      2    0.5  in 4m 10s",
            "1 of 2; enter look inside, tab group, s sort, / filter, p pause, ? help, q quit",
        ],
    );
}

#[test]
fn the_overview_by_policy_container_and_unit() {
    let mut model = model();
    press(&mut model, "\t");
    assert_picture(
        &mut model,
        (80, 24),
        &[
            "keepalive  all connections by policy                                22:13:20 UTC",
            "[##########..........] 50.0% of 4 survive 5m 50s, 2 at risk; 1 stay here",
            "agent 123 on /; 3 changed, 3 dead peers, 0.5 new/s",
            "POLICY                    CONNS SURVIVE AT RISK CHANGED   DEAD  NEW/S vFORGOTTEN",
            "(unclaimed)                   2       0       2       0      0      0     in 10s",
            "default                       3       2       0       3      3    3.5          -",
            "1 of 2; enter look inside, tab group, s sort, / filter, p pause, ? help, q quit",
        ],
    );
    press(&mut model, "\t");
    assert_picture(
        &mut model,
        (80, 24),
        &[
            "keepalive  all connections by container                             22:13:20 UTC",
            "[##########..........] 50.0% of 4 survive 5m 50s, 2 at risk; 1 stay here",
            "agent 123 on /; 3 changed, 3 dead peers, 0.5 new/s",
            "CONTAINER                 CONNS SURVIVE AT RISK CHANGED   DEAD  NEW/S vFORGOTTEN",
            "docker:web                    1       0       1       0      0      0     in 10s",
            "(none)                        4       2       1       3      2    0.5  in 4m 10s",
            "1 of 2; enter look inside, tab group, s sort, / filter, p pause, ? help, q quit",
        ],
    );
    press(&mut model, "\t");
    assert_picture(
        &mut model,
        (80, 24),
        &[
            "keepalive  all connections by unit                                  22:13:20 UTC",
            "[##########..........] 50.0% of 4 survive 5m 50s, 2 at risk; 1 stay here",
            "agent 123 on /; 3 changed, 3 dead peers, 0.5 new/s",
            "UNIT                      CONNS SURVIVE AT RISK CHANGED   DEAD  NEW/S vFORGOTTEN",
            "docker-3f2a.scope             1       0       1       0      0      0     in 10s",
            "redis.service                 4       2       1       3      2    0.5  in 4m 10s",
            "1 of 2; enter look inside, tab group, s sort, / filter, p pause, ? help, q quit",
        ],
    );
}

#[test]
fn the_connections_of_a_group() {
    let mut model = model();
    press(&mut model, "j\n");
    assert_picture(
        &mut model,
        (80, 24),
        &[
            "keepalive  connections of cgroup /system.slice/redis.service        22:13:20 UTC",
            "[##########..........] 50.0% of 4 survive 5m 50s, 2 at risk; 1 stay here",
            "agent 123 on /; 3 changed, 3 dead peers, 0.5 new/s",
            "LOCAL              REMOTE             PROCESS          IDLE    SILENT vFORGOTTEN",
            "192.0.2.1:40002    198.51.100.7:5432  …-server/4711     off    1m 40s  in 4m 10s",
            "192.0.2.1:40000    198.51.100.7:5432  …-server/4711      1m        1s          -",
            "192.0.2.1:40001    198.51.100.7:5432  …-server/4711      1m       59s          -",
            "192.0.2.1:40004    198.51.100.7:5432  …-server/4711      1m     2h 1m          -",
            "1 of 4; enter explain, esc back, s sort, / filter, p pause, ? help, q quit",
        ],
    );
}

#[test]
fn a_wide_terminal_shows_more() {
    let mut model = model();
    press(&mut model, "j\n");
    assert_picture(
        &mut model,
        (200, 50),
        &[
            "keepalive  connections of cgroup /system.slice/redis.service                                                                                                                                22:13:20 UTC",
            "[##########..........] 50.0% of 4 survive 5m 50s, 2 at risk; 1 stay here",
            "agent 123 on /; 3 changed, 3 dead peers, 0.5 new/s",
            "LOCAL                                               REMOTE                                              PROCESS                     IDLE    SILENT vFORGOTTEN    NOTICED POLICY         NETNS",
            "192.0.2.1:40002                                     198.51.100.7:5432                                   redis-server/4711            off    1m 40s  in 4m 10s      never -              host",
            "192.0.2.1:40000                                     198.51.100.7:5432                                   redis-server/4711             1m        1s          -     1m 35s default        host",
            "192.0.2.1:40001                                     198.51.100.7:5432                                   redis-server/4711             1m       59s          -     1m 35s default        host",
            "192.0.2.1:40004                                     198.51.100.7:5432                                   redis-server/4711             1m     2h 1m          -     1m 35s default        host",
            "1 of 4; enter explain, esc back, s sort, / filter, p pause, ? help, q quit",
        ],
    );
}

#[test]
fn an_explanation() {
    let mut model = model();
    let action = press(&mut model, "\n\n");
    let ends = ["192.0.2.1:40003", "198.51.100.7:5432"].map(|end| end.parse().unwrap());
    assert_eq!(action, Action::Explain(ends[0], ends[1]));
    assert_picture(
        &mut model,
        (80, 24),
        &[
            "keepalive  192.0.2.1:40003 → 198.51.100.7:5432                      22:13:20 UTC",
            "[##########..........] 50.0% of 4 survive 5m 50s, 2 at risk; 1 stay here",
            "agent 123 on /; 3 changed, 3 dead peers, 0.5 new/s",
            "asking …",
            "esc back, j k scroll, ? help, q quit",
        ],
    );
    model.take_explanation("connection a → b\nin cgroup /\n".repeat(20));
    press(&mut model, "j");
    let lines = picture(&mut model, 80, 24);
    assert_eq!(lines[3], "in cgroup /");
    press(&mut model, "\x1b");
    assert!(
        matches!(&model.view, View::Sockets(group) if &**group == "/system.slice/docker-3f2a.scope")
    );
    press(&mut model, "h");
    assert_eq!(model.view, View::Groups);
}

#[test]
fn the_help_fits_and_any_key_ends_it() {
    let mut model = model();
    press(&mut model, "?");
    let lines = picture(&mut model, 80, 24);
    assert!(lines[3].starts_with("j k, arrows"), "{lines:?}");
    assert!(
        lines.iter().any(|line| line.contains("there is no such")),
        "{lines:?}"
    );
    assert!(draw::HELP.iter().all(|line| line.len() <= 80));
    press(&mut model, "x");
    assert!(!model.shows_help);
}

#[test]
fn before_the_first_look_it_says_so() {
    let mut model = Model::new(By::Unit, false);
    assert_picture(
        &mut model,
        (80, 24),
        &[
            "keepalive  all connections by unit                                           UTC",
            "looking at all connections …",
            "nothing; enter look inside, tab group, s sort, / filter, p pause, ? help, q quit",
        ],
    );
}

#[test]
fn rows_are_filtered_and_sorted() {
    let names = |model: &Model| -> Vec<String> {
        model
            .groups
            .iter()
            .map(|group| group.name.to_string())
            .collect()
    };
    let mut model = model();
    assert_eq!(
        names(&model)[0],
        "/system.slice/docker-3f2a.scope",
        "forgotten first"
    );
    press(&mut model, "ss");
    assert_eq!(
        names(&model)[0],
        "/system.slice/redis.service",
        "most connections"
    );
    press(&mut model, "r");
    assert_eq!(names(&model)[0], "/system.slice/docker-3f2a.scope");
    press(&mut model, "/REDIS");
    assert_eq!(names(&model), ["/system.slice/redis.service"]);
    // A letter is a letter while it is typed.
    press(&mut model, "q\x1b");
    assert_eq!(names(&model).len(), 2);
    press(&mut model, "/redis\n\n/40002\n");
    assert_eq!(model.listed, [2]);
    let footer = picture(&mut model, 80, 24).pop().unwrap();
    assert!(
        footer.starts_with("only with \"40002\", 1 of 1;"),
        "{footer}"
    );
}

#[test]
fn the_cursor_stays_on_its_row() {
    let mut model = model();
    press(&mut model, "j\nj");
    let before = model.sockets()[model.listed[model.selected]].local;
    let mut next = snapshot();
    next.sockets.rotate_left(2);
    next.sockets.retain(|socket| socket.local.port() != 40_002);
    model.take(next);
    assert_eq!(model.sockets()[model.listed[model.selected]].local, before);
    // What it was on is gone.
    let mut next = snapshot();
    next.sockets.clear();
    model.take(next);
    assert_eq!((model.selected, model.rows()), (0, 0));
    assert_eq!(press(&mut model, "\nGgjk"), Action::None);
}

#[test]
fn a_long_list_scrolls_and_only_what_is_seen_is_drawn() {
    let mut model = model();
    let redis = place("/a", None, None);
    let mut many = snapshot();
    many.sockets = (0..60_000)
        .map(|port| socket(&redis, port, 0, Exposure::AtRisk))
        .collect();
    model.take(many);
    press(&mut model, "\nG");
    let lines = picture(&mut model, 80, 24);
    assert!(lines[22].starts_with("192.0.2.1:59999"), "{lines:?}");
    press(&mut model, "k");
    let lines = picture(&mut model, 80, 24);
    assert!(
        lines[22].starts_with("192.0.2.1:59999"),
        "it scrolls no further than it must"
    );
    press(&mut model, "g");
    let lines = picture(&mut model, 80, 10);
    assert_eq!(lines.len(), 10);
    assert!(lines[4].starts_with("192.0.2.1:0"), "{lines:?}");
}

#[test]
fn it_is_paused_and_goes_on() {
    let mut model = model();
    assert_eq!(press(&mut model, "p"), Action::Pause(true));
    assert!(picture(&mut model, 80, 24)[0].ends_with("paused 22:13:20 UTC"));
    assert_eq!(press(&mut model, " "), Action::Pause(false));
    assert_eq!(press(&mut model, "q"), Action::Quit);
}

#[test]
fn colours_are_left_out_where_they_are_not_wanted() {
    let mut model = model();
    let coloured = |model: &mut Model| {
        let terminal = terminal(model, 80, 24);
        let cells = terminal.backend().buffer().content();
        cells.iter().filter(|cell| cell.fg != Color::Reset).count()
    };
    assert!(coloured(&mut model) > 0);
    model.has_colours = false;
    for keys in ["", "\n", "\n", "?"] {
        press(&mut model, keys);
        assert_eq!(coloured(&mut model), 0);
    }
}

#[test]
fn no_terminal_is_too_small() {
    for (width, height) in [(1, 1), (10, 3), (79, 5), (40, 24)] {
        for keys in ["", "\n", "\n", "?"] {
            let mut model = model();
            press(&mut model, keys);
            picture(&mut model, width, height);
        }
    }
}
