use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::probe::{Conversation, PATIENCE, encode};
use crate::{Options, Place, Program};

/// A running `crowd.c`: a process with many connections to itself.
#[derive(Debug)]
pub struct Crowd {
    conversation: Conversation,
    connections: u32,
}

/// How a [`Crowd`] makes connections and closes them again.
#[derive(Clone, Copy, Debug)]
pub struct Churn {
    /// For how long.
    pub time: Duration,
    /// How many in a second.
    pub rate: u32,
    /// The idle times that connections with keepalive may have.
    pub idle: [i32; 2],
}

/// What a [`Churn`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Churned {
    /// Connections that were made.
    pub made: u32,
    /// Ends that had keepalive and the one idle time or the other.
    pub with: [u32; 2],
    /// Ends that had neither.
    pub without: u32,
    /// Connections over which nothing went any more when they were to be closed.
    pub broken: u32,
}

impl Crowd {
    /// Starts it; it listens at this address.
    ///
    /// # Errors
    ///
    /// It does not build or start, or the address is taken.
    pub fn start<'a>(place: impl Into<Place<'a>>, address: &str) -> Result<Self> {
        let address: SocketAddr = address.parse()?;
        let mut command = place.into().command(Program::Crowd.path()?);
        let mut conversation = Conversation::start(&mut command)?;
        conversation.ask(&format!("listen {}", encode(address)), PATIENCE)?;
        Ok(Self {
            conversation,
            connections: 0,
        })
    }

    /// Makes so many more connections, of two ends each. A process has room for
    /// some 10,000.
    ///
    /// # Errors
    ///
    /// One does not come about.
    pub fn connect(&mut self, count: u32) -> Result<()> {
        self.ask(&format!("connect {count}"), Duration::from_secs(30))?;
        self.connections += count;
        Ok(())
    }

    /// Looks at both ends of every connection, and fails unless all have this.
    ///
    /// # Errors
    ///
    /// How many have not, and what one of them has.
    pub fn all_have(&mut self, expected: Options) -> Result<()> {
        let Options {
            keepalive,
            idle,
            interval,
            probes,
            user_timeout,
        } = expected;
        let keepalive = i32::from(keepalive);
        let question = format!("count {keepalive} {idle} {interval} {probes} {user_timeout}");
        let answer = self.ask(&question, PATIENCE)?;
        let &[count, keepalive, idle, interval, probes, user_timeout] = answer.as_slice() else {
            anyhow::bail!("`{question}` was answered with {answer:?}");
        };
        let other = Options {
            keepalive: keepalive != 0,
            idle,
            interval,
            probes,
            user_timeout,
        };
        let ends = 2 * self.connections;
        let others = ends - u32::try_from(count)?;
        ensure!(
            others == 0,
            "{others} of {ends} sockets have not {expected:?}, one has {other:?}"
        );
        Ok(())
    }

    /// Makes connections and closes them again, and asks both ends of each what
    /// they have as soon as it stands.
    ///
    /// # Errors
    ///
    /// One does not come about.
    pub fn churn(&mut self, churn: &Churn) -> Result<Churned> {
        let Churn { time, rate, idle } = churn;
        let milliseconds = time.as_millis();
        let question = format!("churn {milliseconds} {rate} {} {}", idle[0], idle[1]);
        let answer = self.ask(&question, *time + PATIENCE)?;
        let answer: Vec<u32> = answer
            .into_iter()
            .map(u32::try_from)
            .collect::<Result<_, _>>()?;
        let &[made, first, second, without, broken] = answer.as_slice() else {
            anyhow::bail!("`{question}` was answered with {answer:?}");
        };
        Ok(Churned {
            made,
            with: [first, second],
            without,
            broken,
        })
    }

    /// The same, again and again until `done`, but for ten minutes at the most.
    ///
    /// # Errors
    ///
    /// As [`Crowd::churn`].
    pub fn churn_until(&mut self, done: &AtomicBool, churn: &Churn) -> Result<Churned> {
        let start = Instant::now();
        let mut sum = self.churn(churn)?;
        while !done.load(Ordering::Relaxed) && start.elapsed() < Duration::from_mins(10) {
            let more = self.churn(churn)?;
            sum.made += more.made;
            sum.with[0] += more.with[0];
            sum.with[1] += more.with[1];
            sum.without += more.without;
            sum.broken += more.broken;
        }
        Ok(sum)
    }

    fn ask(&mut self, question: &str, patience: Duration) -> Result<Vec<i32>> {
        let answer = self.conversation.ask(question, patience)?;
        let numbers = answer.split(' ').map(str::parse);
        numbers
            .collect::<Result<_, _>>()
            .with_context(|| format!("`{question}` was answered `{answer}`"))
    }
}
