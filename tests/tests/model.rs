//! Whatever an application sets, and whenever, whatever policy comes and whatever
//! becomes of the agent: each connection has what the formula of the documentation
//! says, at every moment.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::Sockopt::{Idle, Interval, Probes};
use keepalive_tests::{
    Agent, Cgroup, Kind, Options, Pins, Probe, Program, Random, Socket, Sockopt, agent_command,
    output, require, soak_or,
};

const LIMIT: Duration = Duration::from_mins(1);

/// How many connections there may be.
const MOST: usize = 8;

/// What a policy says of one timer.
#[derive(Clone, Copy, Debug)]
struct Timer {
    default: i32,
    least: i32,
    most: i32,
}

/// No bounds.
const fn default(default: i32) -> Timer {
    Timer {
        default,
        least: 1,
        most: i32::MAX,
    }
}

const fn within(least: i32, default: i32, most: i32) -> Timer {
    Timer {
        default,
        least,
        most,
    }
}

/// Idle, interval and probes.
type Policy = [Timer; 3];

/// No two have a value in common that an application sets too, or that is another
/// policy's: such values cannot be told apart where nothing is bounded.
const POLICIES: [Policy; 5] = [
    [default(60), default(10), default(6)],
    [default(80), default(12), default(5)],
    [within(50, 70, 90), within(8, 20, 30), within(3, 4, 8)],
    [within(100, 100, 100), default(14), within(10, 10, 10)],
    [within(1, 40, 45), within(5, 5, 5), default(12)],
];

/// What applications ask for.
const ASKED: [(Sockopt, &[i32]); 3] = [
    (Idle, &[7, 31, 53, 97, 211, 7001]),
    (Interval, &[1, 3, 17, 23, 97, 7001]),
    (Probes, &[1, 2, 7, 9, 31, 127]),
];

fn config(policy: &Policy) -> String {
    let keys = ["idle", "interval", "probes"];
    let lines = keys.iter().zip(policy).map(|(key, timer)| {
        let value = |value: i32| match *key {
            "probes" => value.to_string(),
            _ => format!("\"{value}s\""),
        };
        let bounds = match timer.most {
            i32::MAX => String::new(),
            most => format!(
                ", at-least = {}, at-most = {}",
                value(timer.least),
                value(most)
            ),
        };
        format!("{key} = {{ default = {}{bounds} }}\n", value(timer.default))
    });
    "[default]\n".to_owned() + &lines.collect::<String>()
}

/// An end of a connection, and what its application asked for; 0 is nothing.
#[derive(Clone, Copy, Debug)]
struct End {
    socket: Socket,
    asked: [i32; 3],
}

impl End {
    fn expected(&self, policy: &Policy) -> Options {
        let mut values = [0; 3];
        for ((value, asked), timer) in values.iter_mut().zip(self.asked).zip(policy) {
            let wish = if asked == 0 { timer.default } else { asked };
            *value = wish.clamp(timer.least, timer.most);
        }
        Options::on(values[0], values[1], values[2])
    }

    /// With nobody who has a say but the application: what it did not set was set
    /// once, and has the sysctl's value.
    fn restored(&self) -> Options {
        let [idle, interval, probes] = [7200, 75, 9];
        let or = |asked: i32, sysctl: i32| if asked == 0 { sysctl } else { asked };
        let [asked_idle, asked_interval, asked_probes] = self.asked;
        Options::on(
            or(asked_idle, idle),
            or(asked_interval, interval),
            or(asked_probes, probes),
        )
        .off()
    }
}

struct Node {
    cgroup: Cgroup,
    pins: Pins,
    probe: Probe,
    random: Random,
    policy: Policy,
    agent: Option<Agent>,
    ends: Vec<End>,
    /// What was done so far, for whoever looks at a failure.
    steps: Vec<String>,
}

impl Node {
    fn new() -> Result<Self> {
        let cgroup = Cgroup::new()?;
        let pins = Pins::new();
        let policy = POLICIES[0];
        let mut agent = Agent::start_pinned(&cgroup, &config(&policy), &pins, &[])?;
        agent.swept()?;
        Ok(Self {
            probe: Probe::start(Program::Static, &cgroup)?,
            cgroup,
            pins,
            random: Random::new(),
            policy,
            agent: Some(agent),
            ends: Vec::new(),
            steps: Vec::new(),
        })
    }

    /// A wish: which of the timers, and for how much.
    fn wish(&mut self) -> (usize, Sockopt, i32) {
        let timer = usize::try_from(self.random.below(3)).unwrap_or_default();
        let (option, values) = ASKED[timer];
        (timer, option, *self.random.one(values))
    }

    fn connect(&mut self) -> Result<()> {
        if self.ends.len() >= MOST {
            return Ok(());
        }
        let (listener, address) = self.probe.listener("127.0.0.1:0")?;
        let connecting = self.probe.socket(Kind::of(address))?;
        let mut asked = [[0; 3]; 2];
        for (socket, asked) in [connecting, listener].into_iter().zip(&mut asked) {
            for _ in 0..self.random.below(3) {
                let (timer, option, value) = self.wish();
                self.probe.set(socket, option, value)?;
                asked[timer] = value;
            }
        }
        self.probe.connect(connecting, address)?;
        let accepting = self.probe.accept(listener)?;
        self.probe.close(listener)?;
        for (socket, asked) in [connecting, accepting].into_iter().zip(asked) {
            self.ends.push(End { socket, asked });
        }
        self.steps.push(format!("connected, asking for {asked:?}"));
        Ok(())
    }

    fn set(&mut self) -> Result<()> {
        let Some(index) = self.ends.len().checked_sub(1) else {
            return Ok(());
        };
        let index = usize::try_from(self.random.below(index as u64 + 1))?;
        let (timer, option, value) = self.wish();
        let socket = self.ends[index].socket;
        self.probe.set(socket, option, value)?;
        self.ends[index].asked[timer] = value;
        self.steps
            .push(format!("end {index} sets {option:?} {value}"));
        Ok(())
    }

    fn reload(&mut self) -> Result<()> {
        let policy = *self.random.one(&POLICIES);
        let config = config(&policy);
        self.steps.push(config.clone());
        let agent = self.agent.as_mut().context("no agent")?;
        if config == self::config(&self.policy) {
            return Ok(());
        }
        self.policy = policy;
        agent.reload(&config)?;
        Ok(())
    }

    /// The agent ends, by itself or not, applications go on, and another one comes,
    /// perhaps with another policy.
    fn restart(&mut self) -> Result<()> {
        let agent = self.agent.take().context("no agent")?;
        if self.random.below(2) == 0 {
            agent.kill()?;
            self.steps.push("killed".to_owned());
        } else {
            agent.stop()?;
            self.steps.push("stopped".to_owned());
        }
        self.set()?;
        self.connect()?;
        self.holds()?;
        self.policy = *self.random.one(&POLICIES);
        let config = config(&self.policy);
        self.steps.push(format!("started with {config}"));
        let mut agent = Agent::start_pinned(&self.cgroup, &config, &self.pins, &[])?;
        agent.swept()?;
        self.agent = Some(agent);
        Ok(())
    }

    fn holds(&mut self) -> Result<()> {
        for (index, end) in self.ends.iter().enumerate() {
            let found = self.probe.options(end.socket)?;
            let expected = end.expected(&self.policy);
            ensure!(
                found == expected,
                "end {index} has {found:?} instead of {expected:?}: {end:?} {:#?}",
                self.steps
            );
        }
        Ok(())
    }

    fn restore(mut self) -> Result<()> {
        let mut command = agent_command();
        command.args(["detach", "--restore", "--cgroup", self.cgroup.path()]);
        command.args(["--pin", self.pins.name()]);
        let done = output(&mut command, LIMIT)?;
        ensure!(done.code == Some(0), "{done:?}");
        for (index, end) in self.ends.iter().enumerate() {
            let mut found = self.probe.options(end.socket)?;
            let expected = end.restored();
            // Outside of bounds, timers of the application tell that keepalive was
            // its wish too.
            found.keepalive &= end.asked == [0; 3];
            ensure!(
                found == expected,
                "restored, end {index} has {found:?} instead of {expected:?}: {end:?} {:#?}",
                self.steps
            );
        }
        Ok(())
    }
}

#[test]
fn whatever_happens_the_formula_holds() -> Result<()> {
    require!();
    for _ in 0..soak_or(40, 3) {
        let mut node = Node::new()?;
        for _ in 0..40 {
            match node.random.below(10) {
                0..=1 => node.connect()?,
                2..=6 => node.set()?,
                7..=8 => node.reload()?,
                _ => node.restart()?,
            }
            node.holds()?;
        }
        node.restore()?;
    }
    Ok(())
}
