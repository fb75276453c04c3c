//! The real programs, loaded into this kernel and run packet by packet (BPF_PROG_TEST_RUN).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::Path;

use libbpf_rs::{MapCore as _, MapFlags};
use mqtt_fwd::config::{Config, MapSizes};
use mqtt_fwd::datapath::Datapath;
use mqtt_fwd::datapath::clients::{self, Client};
use mqtt_fwd::datapath::flows::{self, Flow};
use mqtt_fwd::datapath::names::Names;
use mqtt_fwd::datapath::plan::MapPlan;
use mqtt_fwd::kernel::abi::Pod as _;
use mqtt_fwd::kernel::chain;
use mqtt_fwd::kernel::skeletons::mqtt_fwd::types::rodata;
use mqtt_fwd::kernel::test_run;

use super::pool::{self, Loaded};

pub const XDP_DROP: u32 = 1;
pub const XDP_PASS: u32 = 2;
pub const XDP_TX: u32 = 3;

/// What the sentinel in the balancer's position says. A packet has this verdict only if the
/// jump to position 2 was really taken.
pub const JUMPED: u32 = 4; // XDP_REDIRECT: nothing here returns it by itself

pub const SERVICE: &str = "10.1.50.200:1883";
pub const SERVICE6: &str = "[fd01:50::200]:1883";

/// Two services, IPv4 and IPv6, with groups a, b and default, of VIPs .1, .2 and .250.
pub const CONFIG: &str = r#"
interface = "lo"
balancer = "embedded"
gateway_mac = "02:00:00:00:00:09"

[[service]]
name = "mqtt"
address = "10.1.50.200"
default_group = "default"
max_packet = 1480
group = [
    { name = "a", vip = "10.1.50.1", reals = [{ address = "10.1.3.201" }] },
    { name = "b", vip = "10.1.50.2", reals = [{ address = "10.1.3.202" }] },
    { name = "default", vip = "10.1.50.250", reals = [{ address = "10.1.3.203" }] },
]
route = [
    { topic = "sensor/a", group = "a" },
    { topic = "sensor/b", group = "b" },
    { topic = "wild/+/a", group = "a" },
    { topic = "tree/#", group = "b" },
    { topic = "tree/leaf", group = "a" },
    { topic = "$SYS/#", group = "b" },
]

[[service]]
name = "mqtt6"
address = "fd01:50::200"
default_group = "default"
max_packet = 1460
group = [
    { name = "a", vip = "fd01:50::1", reals = [{ address = "fd01:3::201" }] },
    { name = "b", vip = "fd01:50::2", reals = [{ address = "fd01:3::202" }] },
    { name = "default", vip = "fd01:50::250", reals = [{ address = "fd01:3::203" }] },
]
route = [
    { topic = "sensor/a", group = "a" },
    { topic = "sensor/b", group = "b" },
]
"#;

pub fn config(text: &str) -> Config {
    Config::parse(Path::new("test.toml"), text).unwrap_or_else(|e| panic!("{e}"))
}

/// An XDP program that always says the same.
pub fn sentinel(verdict: u32) -> OwnedFd {
    test_run::constant(verdict, libbpf_sys::BPF_PROG_TYPE_XDP, libbpf_sys::BPF_XDP).unwrap()
}

/// A TC program that lets everything through.
pub fn sentinel_tc() -> OwnedFd {
    const TC_ACT_OK: u32 = 0;
    test_run::constant(TC_ACT_OK, libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, 0).unwrap()
}

/// What became of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: u32,
    pub packet: Vec<u8>,
}

/// Runs an XDP program on a packet; the outcome of the last run, and nanoseconds a run.
pub fn test_run(program: &impl AsFd, packet: &[u8], repeat: u32) -> (Outcome, u32) {
    let run = test_run::run(program.as_fd(), packet, repeat)
        .unwrap_or_else(|e| panic!("BPF_PROG_TEST_RUN of {} B: {e}", packet.len()));
    (Outcome { verdict: run.verdict, packet: run.frame }, run.ns)
}

/// Large enough for most tests.
pub const SMALL: MapSizes = MapSizes {
    clients: 4096,
    flows: 4096,
    client_ids: 4096,
    handovers: 1024,
    topics: 4096,
    route_states: 4096,
    groups: 64,
    vips: 16,
    fleet_reports: 1 << 20,
};

/// `mqtt_fwd` with a configuration in force and a sentinel behind it.
pub struct Fixture {
    pub skel: Loaded,
    pub datapath: Datapath,
    pub config: Config,
    sentinel: OwnedFd,
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(CONFIG)
    }

    pub fn with(text: &str) -> Self {
        Self::sized(text, &SMALL)
    }

    pub fn sized(text: &str, sizes: &MapSizes) -> Self {
        // Tests make more flows in a second than any stranger should.
        Self::loaded(text, sizes, |rodata| {
            rodata.flows_per_window = u32::MAX;
            rodata.topics_per_window = u32::MAX;
        })
    }

    /// With load-time configuration of the test's own.
    pub fn loaded(text: &str, sizes: &MapSizes, set: impl FnOnce(&mut rodata)) -> Self {
        let skel = pool::load(sizes, set);
        let datapath = Datapath::of(&skel.maps).unwrap();
        let fixture = Self { skel, datapath, config: config(text), sentinel: sentinel(JUMPED) };
        fixture.set_balancer(true);
        fixture.apply();
        fixture
    }

    /// Brings the maps to `self.config`.
    pub fn apply(&self) {
        let plan = MapPlan::of(&self.config, &self.datapath, 1500).unwrap();
        plan.carry_out(&self.datapath).unwrap();
    }

    /// Is somebody in the balancer's position?
    pub fn set_balancer(&self, there: bool) {
        let array = &self.skel.maps.root_array;
        if there {
            let fd = self.sentinel.as_raw_fd().cast_unsigned();
            array.update(chain::BALANCER.bytes(), fd.bytes(), MapFlags::ANY).unwrap();
        } else {
            array.delete(chain::BALANCER.bytes()).unwrap();
        }
    }

    pub fn send(&self, packet: &[u8]) -> Outcome {
        test_run(&self.skel.progs.mqtt_fwd.as_fd(), packet, 1).0
    }

    /// Counters that are not zero, by name.
    pub fn counters(&self) -> BTreeMap<&'static str, u64> {
        let counters = self.datapath.counters().unwrap();
        counters.iter().map(|(r, n)| (r.name, n)).filter(|(_, n)| *n > 0).collect()
    }

    /// Sends a packet and says by what the counters rose.
    pub fn send_counting(&self, packet: &[u8]) -> (Outcome, BTreeMap<&'static str, u64>) {
        let before = self.counters();
        let outcome = self.send(packet);
        let rose = self
            .counters()
            .into_iter()
            .map(|(name, n)| (name, n - before.get(name).copied().unwrap_or(0)))
            .filter(|(_, n)| *n > 0)
            .collect();
        (outcome, rose)
    }

    pub fn names(&self) -> Names {
        Names::read(&self.config, &self.datapath).unwrap()
    }

    pub fn client(&self, addr: &str) -> Option<Client> {
        let names = self.names();
        let mut rows = clients::clients(&self.datapath, &names).unwrap().map(Result::unwrap);
        rows.find(|row| row.client == addr)
    }

    pub fn flow(&self, client: SocketAddr) -> Option<Flow> {
        flows::flows_from(&self.datapath, &self.names(), client).unwrap().into_iter().next()
    }
}
