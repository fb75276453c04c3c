//! The programs that make this host's kernel take over connections, where delayed binding is used.
//!
//! They are attached by links (tcx), whose pins are all there is of them: unpinned, they are gone.

use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;

use libbpf_rs::MapHandle;
use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};

use super::abi::{handover_keys, takeover_counter};
use super::maps::Table;
use super::pins::{self, Object, Pins};
use super::skeletons::takeover::TakeoverSkelBuilder;
use super::tcx::{self, Direction};
use super::{BpfError, Result};
use crate::domain::CookieKeys;

const LINKS: [(&str, Direction); 2] =
    [("takeover_ingress", Direction::Ingress), ("takeover_egress", Direction::Egress)];

/// Whether this kernel can take connections over (Linux 6.9, if it was built with BPF's socket
/// functions): asked of its BTF, not of its version.
pub fn supported() -> bool {
    // SAFETY: the pointer is checked, used for one call, and freed once.
    unsafe {
        let btf = libbpf_sys::btf__load_vmlinux_btf();
        if btf.is_null() {
            return false;
        }
        let id = libbpf_sys::btf__find_by_name_kind(
            btf,
            c"bpf_sk_assign_tcp_reqsk".as_ptr(),
            libbpf_sys::BTF_KIND_FUNC,
        );
        libbpf_sys::btf__free(btf);
        id > 0
    }
}

/// Whether the programs are attached.
pub fn is_attached(pins: &Pins) -> bool {
    LINKS.iter().all(|(name, _)| pins.program(name).exists())
}

/// Attaches the programs, behind `decap`; whether they were not.
pub fn attach(pins: &Pins, interface: &str, keys: &CookieKeys) -> Result<bool> {
    if is_attached(pins) {
        put_keys(pins, keys)?;
        return Ok(false);
    }
    if !supported() {
        return Err(BpfError::NoTakeover);
    }
    detach(pins)?;
    let failed = |source| BpfError::Load { object: "takeover", source };
    let mut storage = MaybeUninit::uninit();
    let mut open = TakeoverSkelBuilder::default().open(&mut storage).map_err(failed)?;
    let path = pins.map_of(Object::BrokerHost, "decap_vips");
    let vips = MapHandle::from_pinned_path(&path).map_err(|source| BpfError::Pin {
        path: path.clone(),
        action: "opening",
        source,
    })?;
    open.maps.decap_vips.reuse_fd(vips.as_fd()).map_err(failed)?;
    let mut skel = open.load().map_err(failed)?;
    Table::<u32, handover_keys>::of(&skel.maps.handover_keys)?.put(&0, &keys.into())?;

    let pin = |source| BpfError::Pin { path: pins.dir(), action: "pinning", source };
    skel.maps.handover_keys.pin(pins.map_of(Object::BrokerHost, "handover_keys")).map_err(pin)?;
    skel.maps
        .takeover_counters
        .pin(pins.map_of(Object::BrokerHost, "takeover_counters"))
        .map_err(pin)?;
    let programs = [skel.progs.takeover_ingress.as_fd(), skel.progs.takeover_egress.as_fd()];
    for ((name, place), program) in LINKS.into_iter().zip(programs) {
        let link = tcx::attach(program, interface, place)?;
        pins::pin(link.as_fd(), &pins.program(name))?;
    }
    Ok(true)
}

/// Takes the programs away; whether there were any.
pub fn detach(pins: &Pins) -> Result<bool> {
    let mut some = false;
    for (name, _) in LINKS {
        some |= pins::remove_pin(&pins.program(name))?;
    }
    for name in ["handover_keys", "takeover_counters"] {
        pins::remove_pin(&pins.map_of(Object::BrokerHost, name))?;
    }
    Ok(some)
}

/// Gives the programs other keys.
pub fn put_keys(pins: &Pins, keys: &CookieKeys) -> Result<()> {
    open_keys(pins)?.put(&0, &keys.into())
}

/// The programs' keys.
pub fn keys(pins: &Pins) -> Result<CookieKeys> {
    let held = open_keys(pins)?.get(&0)?.unwrap_or_default();
    Ok(CookieKeys { key: held.key, epoch: held.epoch })
}

fn open_keys(pins: &Pins) -> Result<Table<u32, handover_keys>> {
    Table::open(&pins.map_of(Object::BrokerHost, "handover_keys"))
}

/// What the programs counted, for people.
pub fn counters(pins: &Pins) -> Result<Vec<(&'static str, u64)>> {
    let table = Table::<u32, u64>::open(&pins.map_of(Object::BrokerHost, "takeover_counters"))?;
    let texts = [
        (takeover_counter::TAKEOVER_DONE, "connections taken over"),
        (takeover_counter::TAKEOVER_REFUSED, "connections that the kernel refused"),
        (
            takeover_counter::TAKEOVER_NO_COOKIE,
            "first segments without a valid cookie: another key, or a clock that is 20 minutes off?",
        ),
        (takeover_counter::TAKEOVER_EARLY, "segments before their connection was taken over"),
        (takeover_counter::TAKEOVER_ACK_HELD, "acknowledgements held back"),
        (takeover_counter::TAKEOVER_OLD_SOCKET, "older sockets on the same addresses ended"),
        (takeover_counter::TAKEOVER_RESET_HELD, "RSTs held back"),
        (takeover_counter::TAKEOVER_CONNACK_SAME, "CONNACKs as the balancer answered"),
        (takeover_counter::TAKEOVER_CONNACK_DIFFERENT, "CONNACKs that differed: connection reset"),
        (
            takeover_counter::TAKEOVER_CONNACK_NONE,
            "connections that their broker ended without CONNACK: reset",
        ),
        (
            takeover_counter::TAKEOVER_REPLAYED,
            "first segments repeated after their connection's end",
        ),
        (
            takeover_counter::TAKEOVER_FORGOTTEN,
            "connections that the kernel dropped before TCP got them: NAT on this host? (notrack)",
        ),
    ];
    texts
        .into_iter()
        .map(|(counter, text)| Ok((text, table.get_per_cpu(&counter.0)?.iter().sum())))
        .collect()
}
