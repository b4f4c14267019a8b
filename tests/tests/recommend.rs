//! Behind a NAT that forgets, connections die; what is recommended from that keeps
//! the next ones.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{
    Agent, Cgroup, ForgetfulNat, Need, Probe, Program, agent_command, output, require,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_mins(1);

fn recommend(cgroup: &Cgroup, more: &[&str]) -> Result<String> {
    let mut command = agent_command();
    command
        .args(["recommend", "--cgroup", cgroup.path()])
        .args(more);
    let output = output(&mut command, LIMIT)?;
    ensure!(output.code == Some(0), "{}", output.stderr);
    Ok(output.stdout)
}

#[test]
fn what_is_recommended_keeps_the_next_connection() -> Result<()> {
    require!(Need::Program("ip"), Need::Program("nft"));
    let cgroup = Cgroup::new()?;
    let behind = ForgetfulNat::new()?;
    // The first probe goes out 3 s too late.
    let config = "[default]\nidle = \"13s\"\ninterval = \"1s\"\nprobes = 3\n";
    let mut agent = Agent::start(&cgroup, config)?;
    let mut server = Probe::start(Program::Static, &behind.server)?;
    let (listener, address) = server.listener(&behind.listen())?;
    let mut ours = Probe::start(Program::Static, (&cgroup, &behind.client))?;

    let nothing = recommend(&cgroup, &[])?;
    ensure!(nothing.contains("nothing\n# to recommend"), "{nothing}");

    let socket = ours.connected(address)?;
    server.accept(listener)?;
    ensure!(ours.wait(socket, LIMIT)?, "the NAT has not forgotten it");
    ours.receive(socket).err().context("no error")?;
    let unsure = recommend(&cgroup, &[])?;
    ensure!(
        unsure.contains("cannot be known") && !unsure.contains("[[policy]]"),
        "{unsure}"
    );

    // The server answers another one.
    let again = ours.connected(address)?;
    server.accept(listener)?;
    sleep(Duration::from_millis(100));
    let found: Value = serde_json::from_str(&recommend(&cgroup, &["--json"])?)?;
    let network = &found["networks"][0];
    assert_eq!(network["network"], "10.98.0.0/24", "{found}");
    assert_eq!(
        (&network["policy"], &network["died"][0]["cause"]),
        (&"default".into(), &"probes".into())
    );
    assert_eq!(network["forgets"], true, "{found}");
    let within = network["within_ms"].as_u64().context("no bound")?;
    ensure!(
        (ForgetfulNat::AFTER * 1000..14_500).contains(&within),
        "{found}"
    );
    let idle = network["idle_s"].as_u64().context("no idle time")?;
    let interval = network["interval_s"].as_u64().context("no interval")?;
    ensure!(idle + 2 * interval < ForgetfulNat::AFTER, "{found}");
    assert_eq!(
        (&network["connections"], &network["idle"][0]["idle_s"]),
        (&1.into(), &13.into())
    );
    // Taken as it is printed, it keeps a connection.
    let recommended = recommend(&cgroup, &[])?;
    ours.close(again)?;
    agent.reload(&format!("{config}{recommended}"))?;
    let kept = ours.connected(address)?;
    let accepted = server.accept(listener)?;
    let has = ours.options(kept)?;
    assert_eq!(u64::try_from(has.idle)?, idle, "{recommended}");
    sleep(Duration::from_secs(ForgetfulNat::AFTER + 5));
    ours.send(kept, "are you there?")?;
    ensure!(
        server.wait(accepted, Duration::from_secs(5))?,
        "it was forgotten"
    );
    ensure!(server.receive(accepted)? > 0);
    Ok(())
}
