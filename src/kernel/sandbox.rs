//! `mqtt_fwd`, loaded for this process alone: nothing is pinned, in no chain, on no interface. It is given
//! packets with BPF_PROG_TEST_RUN.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use libbpf_rs::skel::OpenSkel as _;
use libbpf_rs::{MapCore as _, MapFlags, OpenObject, RingBufferBuilder};

use super::abi::{Pod as _, limits};
use super::skeletons::mqtt_fwd::{MqttFwdSkel, MqttFwdSkelBuilder};
use super::{BpfError, Result, chain, load, test_run};
use crate::domain::MapSizes;

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// On to the balancer.
    Forwarded,
    /// Back to where it came from.
    Answered,
    Dropped,
    /// To the host's own stack.
    Passed,
}

/// Where the object is kept, by whoever loads it.
pub type Storage = MaybeUninit<OpenObject>;

/// The loaded program. Dropped, nothing is left of it.
pub struct Sandbox<'a> {
    skel: MqttFwdSkel<'a>,
    _end: OwnedFd,
}

impl<'a> Sandbox<'a> {
    /// Loads it. No budget of the datapath's is ever used up.
    pub fn load(sizes: &MapSizes, storage: &'a mut Storage) -> Result<Self> {
        load::check_privileges()?;
        let failed = |source| BpfError::Load { object: "mqtt_fwd", source };
        let mut open = load::open_skeleton(MqttFwdSkelBuilder::default(), "mqtt_fwd", storage)?;
        for mut map in open.open_object_mut().maps_mut() {
            let size = map.name().to_str().and_then(|name| sizes.of(name));
            if let Some(size) = size {
                map.set_max_entries(size).map_err(failed)?;
            }
        }
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            rodata.has_predecessor = 0;
            rodata.fleet = 0;
            rodata.connections_per_address = 0;
            rodata.messages_per_client = 0;
            rodata.cache_set_bits = sizes.cache_sets().ilog2();
            rodata.flow_sets = sizes.flow_places() / limits::FLOW_WAYS.0;
            rodata.untracked_bits = sizes.untracked().ilog2();
            rodata.flows_per_window = u32::MAX;
            rodata.topics_per_window = u32::MAX;
            rodata.rescues_per_window = u32::MAX;
            rodata.handovers_per_second = u32::MAX;
            rodata.handovers_per_window = u32::MAX;
            rodata.clients_per_second = u32::MAX;
            rodata.clients_per_window = u32::MAX;
        }
        let skel = open.load().map_err(failed)?;
        // Nothing else returns XDP_REDIRECT: what has this verdict came to the balancer's place.
        let kind = libbpf_sys::BPF_PROG_TYPE_XDP;
        let end = test_run::constant(libbpf_sys::XDP_REDIRECT, kind, libbpf_sys::BPF_XDP).map_err(
            |source| BpfError::Io {
                path: "BPF_PROG_LOAD".into(),
                action: "loading a program in the balancer's place",
                source,
            },
        )?;
        let fd = end.as_raw_fd().cast_unsigned();
        skel.maps
            .root_array
            .update(chain::BALANCER.bytes(), fd.bytes(), MapFlags::ANY)
            .map_err(failed)?;
        Ok(Self { skel, _end: end })
    }

    /// Its maps.
    pub fn maps(&self) -> &super::skeletons::mqtt_fwd::MqttFwdMaps<'a> {
        &self.skel.maps
    }

    /// Gives it an Ethernet frame. Returns what it made of it, and the frame as it is then.
    pub fn run(&self, frame: &[u8]) -> Result<(Verdict, Vec<u8>)> {
        let failed = |source| BpfError::Io {
            path: "BPF_PROG_TEST_RUN".into(),
            action: "running mqtt_fwd",
            source,
        };
        let run = test_run::run(self.skel.progs.mqtt_fwd.as_fd(), frame, 1).map_err(failed)?;
        let verdict = match run.verdict {
            libbpf_sys::XDP_REDIRECT => Verdict::Forwarded,
            libbpf_sys::XDP_TX => Verdict::Answered,
            libbpf_sys::XDP_PASS => Verdict::Passed,
            _ => Verdict::Dropped,
        };
        Ok((verdict, run.frame))
    }

    /// Throws away what was handed over to be rescued, so that there is room for more.
    pub fn discard_rescues(&self) -> Result<()> {
        let failed =
            |source| BpfError::Map { map: "rescues".to_owned(), action: "reading", source };
        let mut builder = RingBufferBuilder::new();
        builder.add(&self.skel.maps.rescues, |_| 0).map_err(failed)?;
        builder.build().and_then(|ring| ring.consume()).map_err(failed)
    }
}
