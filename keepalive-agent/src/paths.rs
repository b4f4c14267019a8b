//! Paths: what connections pass on their way, and after how much silence it
//! forgets them.
//!
//! Such a middlebox keeps a table of connections. One that stays silent longer
//! than its idle timeout is dropped from the table, mostly without telling
//! either end, and the next segment of it is lost or answered with a reset.

use std::{fmt, str::FromStr, time::Duration};

/// A middlebox on the path of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Middlebox {
    /// What it is called on the command line and in reports.
    pub name: &'static str,
    /// Silence after which it forgets a connection, in seconds, where nobody
    /// has configured another one.
    pub timeout: u32,
}

/// AWS NAT gateway: 350 s, not configurable.
/// Source: Amazon VPC user guide, "Troubleshoot NAT gateways", internet
/// connection drops after 350 seconds
/// (<https://docs.aws.amazon.com/vpc/latest/userguide/nat-gateway-troubleshooting.html>).
pub const AWS_NAT: Middlebox = Middlebox {
    name: "aws-nat",
    timeout: 350,
};

/// AWS Network Load Balancer: 350 s; TCP listeners can have 60 to 6000 s.
/// Source: user guide for Network Load Balancers, "Connection idle timeout"
/// (<https://docs.aws.amazon.com/elasticloadbalancing/latest/network/network-load-balancers.html>).
pub const AWS_NLB: Middlebox = Middlebox {
    name: "aws-nlb",
    timeout: 350,
};

/// Azure load balancer: 4 minutes, up to 100 when configured; drops silently
/// unless TCP reset is enabled.
/// Source: "Configure TCP reset and idle timeout in Azure Load Balancer"
/// (<https://learn.microsoft.com/azure/load-balancer/load-balancer-tcp-idle-timeout>).
pub const AZURE_LB: Middlebox = Middlebox {
    name: "azure-lb",
    timeout: 240,
};

/// Google Cloud: VPC firewalls track an idle connection for 10 minutes.
/// Source: Compute Engine, "General tips", network and firewall
/// (<https://cloud.google.com/compute/docs/troubleshooting/general-tips>).
pub const GCP: Middlebox = Middlebox {
    name: "gcp",
    timeout: 600,
};

/// Linux IPVS (kube-proxy in ipvs mode, Docker's swarm mode): 15 minutes.
/// Source: `tcp_timeouts[IP_VS_TCP_S_ESTABLISHED]` in
/// net/netfilter/ipvs/ip_vs_proto_tcp.c; `ipvsadm -l --timeout` shows what holds.
pub const IPVS: Middlebox = Middlebox {
    name: "ipvs",
    timeout: 900,
};

/// Every middlebox that is known by name.
pub const ALL: [Middlebox; 5] = [AWS_NAT, AWS_NLB, AZURE_LB, GCP, IPVS];

/// How long a path remembers a silent connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleTimeout(Duration);

impl IdleTimeout {
    /// The time itself.
    #[must_use]
    pub const fn duration(self) -> Duration {
        self.0
    }

    /// Whether keepalive with these timers, in seconds, keeps a connection
    /// alive on the path even when two probes in a row are lost: the third one
    /// goes out before the connection is forgotten.
    #[must_use]
    pub fn is_kept_open_by(self, idle: u32, interval: u32) -> bool {
        let third_probe = u64::from(idle) + 2 * u64::from(interval);
        Duration::from_secs(third_probe) < self.0
    }
}

impl From<Middlebox> for IdleTimeout {
    fn from(middlebox: Middlebox) -> Self {
        Self(Duration::from_secs(middlebox.timeout.into()))
    }
}

impl FromStr for IdleTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(known) = ALL.iter().find(|known| known.name == text) {
            return Ok((*known).into());
        }
        match humantime::parse_duration(text) {
            Ok(duration) if !duration.is_zero() => Ok(Self(duration)),
            Ok(_) => Err("must be longer than 0s".to_owned()),
            Err(_) => Err(format!(
                "neither a duration such as \"350s\" nor a known path: {}",
                ALL.map(|known| known.name).join(", ")
            )),
        }
    }
}

impl fmt::Display for IdleTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::duration::show(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_durations_and_names() {
        for (text, seconds) in [
            ("350s", 350),
            ("5m 50s", 350),
            ("aws-nat", 350),
            ("aws-nlb", 350),
            ("azure-lb", 240),
            ("gcp", 600),
            ("ipvs", 900),
        ] {
            let timeout: IdleTimeout = text.parse().unwrap();
            assert_eq!(timeout.duration(), Duration::from_secs(seconds), "{text}");
        }
        for text in ["", "350", "aws", "0s", "-5s", "AWS-NAT"] {
            assert!(text.parse::<IdleTimeout>().is_err(), "{text}");
        }
        let error = "aws".parse::<IdleTimeout>().unwrap_err();
        assert!(error.contains("aws-nat, aws-nlb, azure-lb"), "{error}");
    }

    #[test]
    fn two_probes_may_be_lost() {
        let timeout = IdleTimeout::from(AWS_NAT);
        for (idle, interval, kept) in [
            (60, 10, true),
            (329, 10, true),
            (330, 10, false),
            (300, 75, false),
            (7200, 75, false),
            (u32::MAX, u32::MAX, false),
        ] {
            assert_eq!(timeout.is_kept_open_by(idle, interval), kept, "{idle}");
        }
    }
}
