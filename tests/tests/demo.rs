//! The demonstration that the README names.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Result, ensure};
use keepalive_tests::{Need, agent_binary, output, require};

/// Without the agent the connection hangs, with it the answer comes: the script
/// ends with 0 when both were seen.
#[test]
fn only_the_governed_connection_survives_a_nat_that_forgets() -> Result<()> {
    require!(
        Need::Program("ip"),
        Need::Program("nft"),
        Need::Program("python3"),
    );
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/nat.sh");
    let mut demo = Command::new(script);
    demo.env("KEEPALIVE_AGENT", agent_binary());
    let done = output(&mut demo, Duration::from_mins(2))?;
    ensure!(done.code == Some(0), "{done:?}");
    for line in [
        "without keepalive: no answer in 5 s: the connection hangs",
        "with keepalive:    the answer came",
    ] {
        ensure!(done.stdout.contains(line), "{line}: {done:?}");
    }
    Ok(())
}
