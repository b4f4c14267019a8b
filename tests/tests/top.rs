//! The live view, driven in a terminal and looked at as a person would.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, Need, Netns, Probe, Program, Socket, agent_binary, output, require, wait_until,
};

const LIMIT: Duration = Duration::from_secs(30);

/// A terminal of this size with a shell command in it, in a tmux server of its own.
struct Terminal {
    /// Where the server's socket is.
    directory: tempfile::TempDir,
}

impl Terminal {
    fn start(size: (u32, u32), environment: &[&str], command: &str) -> Result<Self> {
        let terminal = Self {
            directory: tempfile::tempdir()?,
        };
        let (width, height) = (size.0.to_string(), size.1.to_string());
        let mut start = vec![
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            &width,
            "-y",
            &height,
        ];
        for variable in environment {
            start.extend(["-e", variable]);
        }
        start.push(command);
        terminal.tmux(&start)?;
        Ok(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(self.directory.path().join("tmux"));
        command.args(arguments);
        let output = output(&mut command, LIMIT)?;
        ensure!(
            output.code == Some(0),
            "tmux {arguments:?}: {}",
            output.stderr
        );
        Ok(output.stdout)
    }

    fn press(&self, keys: &[&str]) -> Result<()> {
        let mut arguments = vec!["send-keys"];
        arguments.extend(keys);
        self.tmux(&arguments).map(drop)
    }

    fn screen(&self) -> Result<String> {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits until the screen has all of these texts on it, and returns it.
    fn shows(&self, texts: &[&str]) -> Result<String> {
        let mut screen = String::new();
        wait_until(LIMIT, &format!("{texts:?} on the screen"), || {
            screen = self.screen()?;
            Ok(texts.iter().all(|text| screen.contains(text)))
        })
        .with_context(|| self.screen().unwrap_or_default())?;
        Ok(screen)
    }

    /// The first process of the terminal.
    fn process(&self) -> Result<String> {
        let pid = self.tmux(&["display-message", "-p", "#{pane_pid}"])?;
        Ok(pid.trim().to_owned())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may be over already.
        drop(self.tmux(&["kill-server"]));
    }
}

/// A cgroup with connections: one of each program that is at risk, and one that a
/// policy of an agent keeps open.
struct Place {
    cgroup: Cgroup,
    governed: Cgroup,
    _other: Cgroup,
    _near: Netns,
    ours: Probe,
    _others: [Probe; 2],
    remote: String,
}

impl Place {
    fn new() -> Result<Self> {
        let cgroup = Cgroup::new()?;
        let governed = cgroup.child("governed")?;
        let other = cgroup.child("other")?;
        let (near, far) = Netns::pair()?;
        let mut theirs = Probe::start(Program::Static, &far)?;
        let (_, address) = theirs.listener("10.99.0.2:0")?;
        let ours = Probe::start(Program::Static, (&governed, &near))?;
        let mut others = Probe::start(Program::Static, (&other, &near))?;
        let _: Socket = others.connected(address)?;
        Ok(Self {
            cgroup,
            governed,
            _other: other,
            _near: near,
            ours,
            _others: [theirs, others],
            remote: address.to_string(),
        })
    }

    fn connect(&mut self) -> Result<()> {
        self.ours.connected(self.remote.parse()?).map(drop)
    }

    /// `top` for the connections of this place.
    fn top(&self) -> String {
        format!(
            "{} top --every 1 --cgroup {}",
            agent_binary().display(),
            self.cgroup.path()
        )
    }
}

#[test]
fn a_person_looks_inside_and_ends_it() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("tmux"));
    let mut place = Place::new()?;
    let _agent = Agent::start(&place.governed, "[default]\nidle = \"30s\"\n")?;
    place.connect()?;
    let command = format!(
        "{}; echo ended with $?; stty -a; exec sleep 60",
        place.top()
    );
    let terminal = Terminal::start((80, 24), &[], &command)?;

    // What is at risk stands on top.
    let screen = terminal.shows(&["50.0% of 2 survive 5m 50s", "1 at risk"])?;
    let rows: Vec<_> = screen.lines().collect();
    ensure!(
        rows[4].contains("/other") && rows[4].contains("in 5m"),
        "{screen}"
    );
    ensure!(rows[5].contains("/governed"), "{screen}");
    ensure!(rows[23].contains("q quit"), "{screen}");
    ensure!(rows.iter().all(|row| row.chars().count() <= 80), "{screen}");
    let numbers: Vec<_> = rows[5].split_whitespace().skip(1).take(4).collect();
    ensure!(numbers == ["1", "1", "0", "1"], "{screen}");

    // By policy, down to the connection, and what is explained of it.
    terminal.press(&["Tab"])?;
    terminal.shows(&["all connections by policy", "default", "(unclaimed)"])?;
    // Other agents of this machine have policies too.
    terminal.press(&["/", "default", "Enter"])?;
    terminal.shows(&["only with \"default\", 1 of"])?;
    terminal.press(&["Enter"])?;
    terminal.shows(&["connections of policy default", &place.remote, "30s"])?;
    terminal.press(&["l"])?;
    terminal.shows(&[
        "policy default",
        "idle          30s, set by the policy",
        "survives",
    ])?;
    terminal.press(&["Escape"])?;
    terminal.shows(&["connections of policy default"])?;
    terminal.press(&["h"])?;
    terminal.shows(&["all connections by policy"])?;

    // A filter, the help, a pause, during which nothing changes.
    terminal.press(&["/", "unclaimed", "Enter"])?;
    let screen = terminal.shows(&["1 of 1"])?;
    ensure!(
        !screen.lines().any(|line| line.starts_with("default")),
        "{screen}"
    );
    terminal.press(&["Escape", "?"])?;
    terminal.shows(&["j k, arrows", "FORGOTTEN"])?;
    terminal.press(&["x", "p"])?;
    let paused = terminal.shows(&["paused"])?;
    place.connect()?;
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(terminal.screen()?, paused);
    terminal.press(&["p"])?;
    terminal.shows(&["66.6% of 3"])?;

    // It draws for the size that the terminal gets.
    terminal.tmux(&["resize-window", "-x", "200", "-y", "50"])?;
    let screen = terminal.shows(&["66.6% of 3"])?;
    wait_until(LIMIT, "the footer at the bottom", || {
        let screen = terminal.screen()?;
        Ok(screen
            .lines()
            .nth(49)
            .is_some_and(|line| line.contains("q quit")))
    })
    .context(screen)?;

    terminal.press(&["q"])?;
    let screen = terminal.shows(&["ended with 0", " echo "])?;
    ensure!(screen.contains(" icanon "), "{screen}");
    assert_restored(&terminal)
}

fn assert_restored(terminal: &Terminal) -> Result<()> {
    let flags = terminal.tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"])?;
    assert_eq!(
        flags.trim(),
        "0 1",
        "the alternate screen is left, the cursor is there"
    );
    Ok(())
}

/// At 200×50, without colours, without any agent; and a signal.
#[test]
fn a_signal_gives_the_terminal_back() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("tmux"));
    let mut place = Place::new()?;
    place.connect()?;
    let command = format!(
        "{}; echo ended with $?; stty -a; exec sleep 60",
        place.top()
    );
    let terminal = Terminal::start((200, 50), &["NO_COLOR=1"], &command)?;
    terminal.shows(&["0.0% of 2 survive", "2 at risk"])?;
    terminal.press(&["Enter"])?;
    let screen = terminal.shows(&["NETNS", "never", "off"])?;
    ensure!(screen.contains(&place.remote), "{screen}");
    let coloured = terminal.tmux(&["capture-pane", "-p", "-e"])?;
    ensure!(!coloured.contains("\x1b[31m"), "{coloured:?}");

    let shell = terminal.process()?;
    let mut children = Command::new("cat");
    children.arg(format!("/proc/{shell}/task/{shell}/children"));
    let children = output(&mut children, LIMIT)?.stdout;
    let top = children.split_whitespace().next().context("no child")?;
    let pid = rustix::process::Pid::from_raw(top.parse()?).context("no process")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    let screen = terminal.shows(&["ended with 143", " echo "])?;
    ensure!(screen.contains(" icanon "), "{screen}");
    assert_restored(&terminal)
}

#[test]
fn without_a_terminal_it_says_what_to_do() -> Result<()> {
    require!();
    let mut command = keepalive_tests::agent_command();
    let output = output(command.arg("top"), LIMIT)?;
    assert_eq!(output.code, Some(1));
    ensure!(
        output.stderr.contains("sockets --summary"),
        "{}",
        output.stderr
    );
    Ok(())
}
