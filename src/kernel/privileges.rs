//! The capabilities (capabilities(7)) that BPF takes, and giving up the others.

use caps::{CapSet, Capability, CapsHashSet};

/// Without these nothing can be loaded, attached or pinned.
const NEEDED: [Capability; 3] =
    [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];

/// To reload configuration and keys, whichever user owns them.
const FILES: Capability = Capability::CAP_DAC_READ_SEARCH;

/// To look at another process' BPF programs: a Katran's.
const OTHERS: [Capability; 2] = [Capability::CAP_SYS_ADMIN, Capability::CAP_SYS_PTRACE];

/// To send segments on that a fleet's balancer has held.
const FLEET: Capability = Capability::CAP_NET_RAW;

/// The names of those that this process lacks.
pub fn missing() -> Vec<String> {
    let has = effective();
    if has.contains(&Capability::CAP_SYS_ADMIN) && has.contains(&Capability::CAP_NET_ADMIN) {
        // It includes the other two (bpf(2)).
        return Vec::new();
    }
    NEEDED.iter().filter(|cap| !has.contains(cap)).map(ToString::to_string).collect()
}

/// Whether the kernel tells this process the layouts of maps, which moving them takes.
pub fn sees_layouts() -> bool {
    effective().contains(&Capability::CAP_SYS_ADMIN)
}

fn effective() -> CapsHashSet {
    caps::read(None, CapSet::Effective).unwrap_or_default()
}

/// Drops all capabilities that are no longer needed, for good. Returns those kept.
pub fn drop_others(
    beside_katran: bool,
    in_fleet: bool,
) -> Result<Vec<String>, caps::errors::CapsError> {
    let mut keep: CapsHashSet = NEEDED.into_iter().chain([FILES]).collect();
    if beside_katran || !NEEDED.iter().all(|cap| effective().contains(cap)) {
        keep.extend(OTHERS);
    }
    keep.extend(in_fleet.then_some(FLEET));
    let kept: CapsHashSet = effective().intersection(&keep).copied().collect();
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        let there = caps::read(None, set)?;
        caps::set(None, set, &there.intersection(&kept).copied().collect())?;
    }
    let mut names: Vec<String> = kept.iter().map(ToString::to_string).collect();
    names.sort();
    Ok(names)
}
