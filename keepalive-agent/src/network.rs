//! Networks, as policies and filters name them: `10.0.0.0/8`, `2001:db8::/32`,
//! `192.0.2.1`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// The addresses that share a prefix. IPv4 and v4-mapped IPv6 are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// Bits of `::ffff:0:0/96`, below which IPv4 stands in IPv6.
const MAPPED: u8 = 96;

impl Network {
    /// The network around an address whose addresses share so many leading bits; of
    /// all bits where that is more than there are.
    #[must_use]
    pub fn around(address: IpAddr, prefix: u8) -> Self {
        let address = address.to_canonical();
        let prefix = prefix.min(if address.is_ipv4() { 32 } else { 128 });
        Self {
            address: masked(address, prefix),
            prefix,
        }
    }

    /// How many leading bits its addresses share; 0 to 32, or to 128 for IPv6.
    #[must_use]
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether it is a network of IPv4 addresses.
    #[must_use]
    pub const fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// The address and the length of the prefix in IPv6, where IPv4 stands in
    /// `::ffff:0:0/96`.
    #[must_use]
    pub const fn in_ipv6(&self) -> (u128, u8) {
        match self.address {
            IpAddr::V4(v4) => (v4.to_ipv6_mapped().to_bits(), MAPPED + self.prefix),
            IpAddr::V6(v6) => (v6.to_bits(), self.prefix),
        }
    }

    /// Whether an address belongs to it.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.address.is_ipv4() && masked(address, self.prefix) == self.address
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let written: IpAddr = address.parse().map_err(|_| {
            format!("`{address}` is not an IP address; a network is written like 10.0.0.0/8")
        })?;
        let width = if written.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => width,
            // `parse` would take a sign.
            Some(digits) => Some(digits)
                .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok())
                .filter(|prefix| *prefix <= width)
                .ok_or_else(|| format!("`{digits}` is not a prefix length from 0 to {width}"))?,
        };
        let network = masked(written, prefix);
        if network != written {
            return Err(format!(
                "{written} has bits set beyond its prefix; did you mean {network}/{prefix}?"
            ));
        }
        let canonical = written.to_canonical();
        if canonical.is_ipv4() && written.is_ipv6() && prefix >= MAPPED {
            return Ok(Self {
                address: canonical,
                prefix: prefix - MAPPED,
            });
        }
        Ok(Self {
            address: written,
            prefix,
        })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = if self.is_ipv4() { 32 } else { 128 };
        if self.prefix == width {
            self.address.fmt(f)
        } else {
            write!(f, "{}/{}", self.address, self.prefix)
        }
    }
}

/// The address with everything beyond the prefix zeroed.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contains_what_shares_the_prefix() {
        for (network, address, expected) in [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("10.0.0.0/8", "::ffff:10.1.2.3", true),
            ("10.0.0.0/8", "2001:db8::1", false),
            ("0.0.0.0/0", "192.0.2.1", true),
            ("0.0.0.0/0", "::1", false),
            ("::/0", "192.0.2.1", false),
            ("::/0", "::ffff:192.0.2.1", false),
            ("::/0", "2001:db8::1", true),
            ("::ffff:10.0.0.0/104", "10.1.2.3", true),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("2001:db8::/32", "2001:db8:ffff::", true),
            ("2001:db8::/32", "2001:db9::", false),
            ("::1", "::1", true),
        ] {
            let network: Network = network.parse().unwrap();
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(network.contains(address), expected, "{network:?} {address}");
        }
    }

    #[test]
    fn shows_what_was_written() {
        for text in [
            "10.0.0.0/8",
            "192.0.2.1",
            "0.0.0.0/0",
            "2001:db8::/32",
            "::1",
        ] {
            assert_eq!(text.parse::<Network>().unwrap().to_string(), text);
        }
        let mapped: Network = "::ffff:10.0.0.0/104".parse().unwrap();
        assert_eq!(mapped.to_string(), "10.0.0.0/8");
        assert_eq!(mapped.in_ipv6().1, 104);
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, part) in [
            ("", "is not an IP address"),
            ("10.0.0/8", "`10.0.0` is not an IP address"),
            ("example.org", "is not an IP address"),
            ("10.0.0.0/33", "`33` is not a prefix length from 0 to 32"),
            ("10.0.0.0/", "`` is not a prefix length"),
            ("10.0.0.0/+8", "`+8` is not a prefix length"),
            ("::/129", "from 0 to 128"),
            ("10.0.0.5/8", "did you mean 10.0.0.0/8?"),
            ("2001:db8::1/32", "did you mean 2001:db8::/32?"),
        ] {
            let error = text.parse::<Network>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
