//! Flags of VIPs, and their names.

/// The flag of group VIPs (`VIP_FLAG_INNER_DST` of `bpf/abi/config.h`).
pub const GROUP_FLAG: u32 = 1 << 30;

/// Katran's flag for VIPs whose clients find the same real again (F_HASH_NO_SRC_PORT).
pub const BY_ADDRESS_FLAG: u32 = 1 << 0;

/// The flags that are this product's to set and clear.
pub const OUR_FLAGS: u32 = GROUP_FLAG | BY_ADDRESS_FLAG;

/// Katran's names, and ours.
const FLAGS: [(&str, u32); 11] = [
    ("NO_SRC_PORT", 1 << 0),
    ("NO_LRU", 1 << 1),
    ("QUIC_VIP", 1 << 2),
    ("DPORT_HASH", 1 << 3),
    ("SRC_ROUTING", 1 << 4),
    ("LOCAL_VIP", 1 << 5),
    ("GLOBAL_LRU", 1 << 6),
    ("HASH_SRC_DST_PORT", 1 << 7),
    ("UDP_STABLE_ROUTING", 1 << 8),
    ("UDP_FLOW_MIGRATION", 1 << 9),
    ("INNER_DST", GROUP_FLAG),
];

/// A flag by name or number.
pub fn flag(text: &str) -> Result<u32, String> {
    if let Some((_, bit)) = FLAGS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)) {
        return Ok(*bit);
    }
    let number = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    number.map_err(|_| {
        let names: Vec<_> = FLAGS.iter().map(|(name, _)| *name).collect();
        format!("neither a number of 32 bits nor one of {}", names.join(", "))
    })
}

/// What people read.
pub fn flag_names(flags: u32) -> String {
    let mut names: Vec<String> = FLAGS
        .iter()
        .filter(|(_, bit)| flags & bit != 0)
        .map(|(name, _)| (*name).to_owned())
        .collect();
    let others = flags & !FLAGS.iter().fold(0, |all, (_, bit)| all | bit);
    if others != 0 {
        names.push(format!("{others:#x}"));
    }
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}
