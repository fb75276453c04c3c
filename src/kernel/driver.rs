//! What an interface's driver counts of XDP itself (ethtool(8), `-S`): packets that XDP_TX or
//! XDP_REDIRECT could not send are in no other counter.

use std::collections::BTreeMap;
use std::io;

use super::ifreq;

/// Length of a counter's name (ETH_GSTRING_LEN).
const NAME: usize = 32;
/// ETH_SS_STATS of `enum ethtool_stringset`.
const SET: u32 = 1;
/// Entries more than the driver said that it has.
const ROOM: usize = 1024;
/// Of `<linux/ethtool.h>` and `<linux/sockios.h>`.
const GSTRINGS: u32 = 0x1b;
const GSTATS: u32 = 0x1d;
const GSSET_INFO: u32 = 0x37;
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// The counters whose names have to do with XDP, summed over queues.
pub fn xdp_counters(interface: &str) -> io::Result<BTreeMap<String, u64>> {
    let names = ask(interface, GSTRINGS, NAME)?;
    let values = ask(interface, GSTATS, size_of::<u64>())?;
    let mut sums = BTreeMap::new();
    for (name, value) in names.chunks(NAME).zip(values.chunks(size_of::<u64>())) {
        let name: Vec<u8> = name.iter().copied().take_while(|byte| *byte != 0).collect();
        let name = without_queue(&String::from_utf8_lossy(&name));
        if let (true, Ok(value)) = (name.contains("xdp"), value.try_into()) {
            *sums.entry(name).or_default() += u64::from_ne_bytes(value);
        }
    }
    Ok(sums)
}

/// `rx_queue_12_xdp_tx_errors` → `rx_xdp_tx_errors`, so that there are as many whatever the machine.
fn without_queue(name: &str) -> String {
    let parts = name.split('_').filter(|part| {
        *part != "queue" && !part.is_empty() && !part.bytes().all(|b| b.is_ascii_digit())
    });
    parts.collect::<Vec<_>>().join("_")
}

/// The array that follows `struct ethtool_gstrings` (command, set, count) or `struct ethtool_stats`
/// (command, count).
fn ask(interface: &str, command: u32, size: usize) -> io::Result<Vec<u8>> {
    // struct ethtool_sset_info: command, reserved, mask (u64), a number for each bit of the mask.
    let mut sets = [u64::from(GSSET_INFO), 1 << SET, 0];
    call(interface, &mut sets)?;
    let count = sets[2] as u32 as usize;
    let (header, argument) = if command == GSTRINGS { (3, SET) } else { (2, count as u32) };
    let mut buffer = vec![0u64; 2 + (count + ROOM) * size / 8];
    buffer[0] = u64::from(command) | u64::from(argument) << 32;
    call(interface, &mut buffer)?;
    let bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Ok(bytes[header * 4..].get(..count * size).unwrap_or_default().to_vec())
}

fn call(interface: &str, buffer: &mut [u64]) -> io::Result<()> {
    let data = buffer.as_mut_ptr().cast();
    // SAFETY: the kernel writes the header and as many entries as the driver has, for which there is
    // room: it said how many, and a driver would have to grow by ROOM between the calls.
    unsafe { ifreq::request(interface, SIOCETHTOOL, |r| r.ifr_ifru.ifru_data = data) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_summed_up() {
        assert_eq!(without_queue("rx_queue_12_xdp_tx_errors"), "rx_xdp_tx_errors");
        assert_eq!(without_queue("tx_queue_0_xdp_xmit"), "tx_xdp_xmit");
        assert!(xdp_counters("lo").is_err() || xdp_counters("lo").unwrap().is_empty());
    }
}
