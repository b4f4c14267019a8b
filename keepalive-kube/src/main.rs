//! `keepalive-kube`: the companion of keepalive-agent in Kubernetes.

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use keepalive_kube::{api, controller, crd, node, uninstall};
use kube::Config;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{Level, error, level_filters::LevelFilter};
use tracing_subscriber::{
    filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

/// Policies of Kubernetes for keepalive-agent
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write config for the agent of this node
    #[command(after_help = "Example:\n  keepalive-kube node --node worker-1 \
                            --drop-in-dir /run/keepalive/kubernetes --agent /run/keepalive/kubernetes/metrics.sock")]
    Node {
        /// The name of this node in the API
        #[arg(long, value_name = "NAME", env = "NODE_NAME")]
        node: String,

        /// The directory of drop-ins that it shares with the agent
        #[arg(long, value_name = "DIR")]
        drop_in_dir: PathBuf,

        /// The socket on which the agent serves its metrics
        #[arg(long, value_name = "SOCKET")]
        agent: PathBuf,
    },

    /// Write the status of policies, and events; one for a cluster
    #[command(after_help = "Example:\n  keepalive-kube controller")]
    Controller,

    /// Wait while it is uninstalled; the hooks of the Helm chart do
    #[command(after_help = "Example:\n  keepalive-kube wait-for detached")]
    WaitFor {
        /// What is waited for, in the namespace of this pod
        state: uninstall::State,
    },

    /// Print the custom resource definitions
    #[command(after_help = "Example:\n  keepalive-kube crds | kubectl apply -f -")]
    Crds,
}

fn main() -> ExitCode {
    let writer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // What fails is told where it is known what it was for.
    let told = Targets::new()
        .with_default(Level::INFO)
        .with_target("kube_client", LevelFilter::OFF);
    tracing_subscriber::registry()
        .with(writer)
        .with(told)
        .init();
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    if matches!(command, Command::Crds) {
        use std::io::Write as _;
        return std::io::stdout()
            .write_all(crd::manifest().as_bytes())
            .context("printing");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut ended = signal(SignalKind::terminate())?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        let until = async move {
            tokio::select! {
                _ = ended.recv() => {}
                _ = interrupted.recv() => {}
            }
        };
        let config = Config::infer()
            .await
            .context("finding the API of Kubernetes")?;
        let client = api::client(config)?;
        match command {
            Command::Node {
                node,
                drop_in_dir,
                agent,
            } => {
                let options = node::Options {
                    node,
                    directory: drop_in_dir,
                    agent,
                };
                node::run(client, &options, until).await
            }
            Command::Controller => controller::run(client, until).await,
            Command::WaitFor { state } => uninstall::wait(client, state).await,
            Command::Crds => Ok(()),
        }
    })
}
