//! The BPF side as Rust sees it: skeletons, shared types, pinned maps, loading.

pub mod abi;
pub mod adopt;
pub mod as_client;
pub mod ask;
pub mod catalog;
pub mod chain;
pub mod decap;
pub mod driver;
pub mod flow_table;
pub mod held;
pub mod ifreq;
pub mod layout;
pub mod load;
pub mod maps;
pub mod namespace;
pub mod pins;
pub mod privileges;
pub mod reasons;
pub mod route;
pub mod sandbox;
pub mod skeletons;
pub mod takeover;
pub mod tcp;
pub mod tcx;
pub mod test_run;
pub mod unload;
pub mod upgrade;
pub mod wire;
pub mod wrap;
pub mod xdp;

use std::path::PathBuf;
use std::time::Duration;

/// The clock that the datapath stamps with.
pub fn boot_time() -> Duration {
    // It exists since Linux 2.6.39.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(Duration::ZERO, Duration::from)
}

/// What can go wrong between here and the kernel, each with the way out of it.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    #[error("this process lacks {missing}; run it with sudo, or give it what it lacks")]
    Privileges { missing: String },
    #[error("{path}: no bpffs is mounted there; mount it with `mount -t bpf bpf {path}`")]
    NoBpffs { path: PathBuf },
    #[error("interface {name}: there is none of that name here; `ip link` lists them")]
    NoInterface { name: String },
    #[error(
        "interface {interface}: XDP program {program:?} (id {id}) is attached and does not use \
         {root_array}; detach it (`ip link set dev {interface} xdp off`) or give it a place in the chain; if it is ours \
         and its pins were removed, `mqtt-fwd load --adopt` takes it over"
    )]
    ForeignXdp { interface: String, program: String, id: u32, root_array: PathBuf },
    #[error(
        "{root_array} position {position} holds program {program:?} (id {id}), which is not known as ours; \
         take it out, or name another chain with `root_array` in the configuration; if its pins were \
         removed, `mqtt-fwd load --adopt` takes it over"
    )]
    ForeignProgram { root_array: PathBuf, position: u32, program: String, id: u32 },
    #[error(
        "interface {interface}: its driver does not take native XDP ({source}); on virtio_net, \
         `ethtool -K {interface} rx-gro-hw off` may help; else set `xdp_mode = \"generic\"`, which is slower"
    )]
    NoNativeXdp { interface: String, source: libbpf_rs::Error },
    #[error(
        "{path}: the pinned map is {found}, and {wanted} is wanted; another program made it, so \
         take that out and remove the pin"
    )]
    MapMismatch { path: PathBuf, found: String, wanted: String },
    #[error(
        "{path}: pinned by a build of another layout ({found} B, this one has {wanted} B); \
         `mqtt-fwd load` of this build moves what is there"
    )]
    OtherLayout { path: PathBuf, found: String, wanted: String },
    #[error(
        "{path}: the kernel tells no layout of this map (it takes CAP_SYS_ADMIN), so what it holds \
         cannot be moved; start once with that capability, or `mqtt-fwd unload` first"
    )]
    NoLayout { path: PathBuf },
    #[error(
        "map {map}: more is in use than the {capacity} entries that are configured; raise that \
         in [maps]"
    )]
    TooSmall { map: String, capacity: u32 },
    #[error(
        "{path}: another mqtt-fwd is loading, unloading or applying there; try again when it is done"
    )]
    Locked { path: PathBuf },
    #[error(
        "there is room for {capacity} groups, too few for the new ones beside those in force; raise \
         maps.groups, or apply it in two steps, removing groups first"
    )]
    NoRoom { capacity: usize },
    #[error(
        "{path}: these pins are the interface's of that name in another network namespace \
         (net:[{owner}]); give this one a bpffs of its own with `bpffs` in the configuration"
    )]
    OtherNamespace { path: PathBuf, owner: u64 },
    #[error("{path}: another `mqtt-fwd events` reads the events; stop that one first")]
    EventsTaken { path: PathBuf },
    #[error("{path}: {what}; run `mqtt-fwd load` first")]
    NotLoaded { path: PathBuf, what: &'static str },
    #[error(
        "this kernel cannot take connections over (no bpf_sk_assign_tcp_reqsk; Linux 6.9 or later has \
         it); use binding = \"predicted\" at the balancer, and `host up` without --handover-key"
    )]
    NoTakeover,
    #[error(
        "loading {object}: {source}; the log above has the kernel's reason (more with --log debug)"
    )]
    Load { object: &'static str, source: libbpf_rs::Error },
    #[error("map {map}: {action}: {source}")]
    Map { map: String, action: &'static str, source: libbpf_rs::Error },
    #[error("{path}: {action}: {source}")]
    Pin { path: PathBuf, action: &'static str, source: libbpf_rs::Error },
    #[error("{path}: {action}: {source}")]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    #[error("interface {interface}: attaching a TC program (tcx, Linux 6.6): {source}")]
    Tcx { interface: String, source: std::io::Error },
    #[error("interface {interface}: {action}: {source}")]
    Xdp { interface: String, action: &'static str, source: libbpf_rs::Error },
}

/// Result of anything that talks to the kernel.
pub type Result<T, E = BpfError> = std::result::Result<T, E>;
