//! The SYN cookies of delayed binding, as the balancer's program makes them (`bpf/lib/cookie.h`).

use std::net::{IpAddr, SocketAddr};

use siphasher::sip::SipHasher13;

use crate::domain::CookieKeys;

/// In milliseconds, of CLOCK_TAI.
const PERIOD_MS: u64 = 64_000;
/// No window scale, no SACK; and the largest MSS of the list, which the kernel bounds by the route's anyway.
const OPTIONS: u8 = 3 << 6 | 15;
/// The epoch's parity.
const EPOCH: u8 = 1 << 5;

/// The balancer's initial sequence number for a SYN without options, now.
pub fn make(
    keys: &CookieKeys,
    client: SocketAddr,
    service: SocketAddr,
    isn: u32,
) -> nix::Result<u32> {
    let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_TAI)?;
    let ms = clock.tv_sec().cast_unsigned() * 1000 + clock.tv_nsec().cast_unsigned() / 1_000_000;
    Ok(of_period(keys, client, service, isn, (ms / PERIOD_MS) as u32))
}

fn of_period(
    keys: &CookieKeys,
    client: SocketAddr,
    service: SocketAddr,
    isn: u32,
    period: u32,
) -> u32 {
    let parity = keys.epoch & 1;
    let options = OPTIONS | if parity == 1 { EPOCH } else { 0 };
    let [key0, key1] = keys.key[parity as usize];
    let mut input = Vec::with_capacity(47);
    // Both addresses, 32 bits of one and 32 of the other.
    match (client.ip(), service.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            input.extend(from.octets());
            input.extend(to.octets());
        }
        (from, to) => {
            let octets = |addr: IpAddr| match addr {
                IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
                IpAddr::V6(addr) => addr.octets(),
            };
            for (from, to) in octets(from).chunks(4).zip(octets(to).chunks(4)) {
                input.extend(from);
                input.extend(to);
            }
        }
    }
    input.extend(isn.to_le_bytes());
    input.extend(client.port().to_be_bytes());
    input.extend(service.port().to_be_bytes());
    // No timestamps.
    input.extend([options, 0]);
    input.extend(period.to_le_bytes());
    input.push(0);
    let hash = SipHasher13::new_with_keys(key0, key1).hash(&input);
    ((hash ^ hash >> 32) as u32 & !0xff) | u32::from(options)
}
