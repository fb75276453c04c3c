//! Sockets of this host whose packets go through the XDP program of an interface, as a client's do that come in there.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use etherparse::{NetHeaders, PacketHeaders, TransportHeader};
use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{MapHandle, RingBufferBuilder};
use tracing::{debug, warn};

use super::maps::Table;
use super::skeletons::as_client::AsClientSkelBuilder;
use super::tcx::{self, Direction};
use super::{BpfError, Result, ifreq, test_run, xdp};
use crate::domain::Mac;

/// Its length is in front of a frame.
const LENGTH: usize = size_of::<u32>();
/// Offset of the checksum in TCP's header.
const CHECKSUM: usize = 16;

/// The program that takes packets, and the thread that puts them in again, as long as it lives.
#[derive(Debug)]
pub struct AsClient {
    sockets: Table<u64, u8>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Only held.
    #[allow(dead_code)]
    link: OwnedFd,
}

impl AsClient {
    /// `program`: what frames are given to; `from`: their source, as of clients' frames.
    pub fn attach(interface: &str, program: OwnedFd, from: Mac) -> Result<Self> {
        let failed = |source| BpfError::Load { object: "as_client", source };
        let mut storage = MaybeUninit::uninit();
        let open = AsClientSkelBuilder::default().open(&mut storage).map_err(failed)?;
        let skel = open.load().map_err(failed)?;
        let frames = MapHandle::try_from(&skel.maps.client_frames).map_err(failed)?;
        let ends = Arc::new(AtomicBool::new(false));
        let injector = Injector {
            program,
            index: xdp::interface_index(interface)?,
            to: mac(interface)?,
            from,
        };
        let thread = {
            let ends = Arc::clone(&ends);
            std::thread::Builder::new().name("as_client".to_owned()).spawn(move || {
                if let Err(error) = injector.run(&frames, &ends) {
                    warn!(%error, "the test's packets are not read");
                }
            })
        };
        let thread = thread.map_err(|source| BpfError::Io {
            path: "as_client".into(),
            action: "starting a thread",
            source,
        })?;
        Ok(Self {
            sockets: Table::of(&skel.maps.client_sockets)?,
            ends,
            thread: Some(thread),
            link: tcx::attach(skel.progs.take_frame.as_fd(), interface, Direction::Egress)?,
        })
    }

    /// Takes what the socket with this cookie sends.
    pub fn add(&self, cookie: u64) -> Result<()> {
        self.sockets.put(&cookie, &1)
    }
}

impl Drop for AsClient {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Injector {
    program: OwnedFd,
    index: i32,
    to: Mac,
    from: Mac,
}

impl Injector {
    fn run(&self, frames: &MapHandle, ends: &AtomicBool) -> libbpf_rs::Result<()> {
        let mut builder = RingBufferBuilder::new();
        builder.add(frames, |bytes| {
            self.take(bytes);
            0
        })?;
        let ring = builder.build()?;
        while !ends.load(Ordering::Relaxed) {
            match ring.poll(Duration::from_millis(50)) {
                Err(error) if error.kind() != libbpf_rs::ErrorKind::Interrupted => {
                    return Err(error);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn take(&self, bytes: &[u8]) {
        let length = bytes.first_chunk::<LENGTH>().map_or(0, |n| u32::from_ne_bytes(*n) as usize);
        let Some(frame) = bytes.get(LENGTH..LENGTH + length) else { return };
        let mut frame = frame.to_vec();
        frame[..6].copy_from_slice(&self.to);
        frame[6..12].copy_from_slice(&self.from);
        if finish_checksum(&mut frame).is_none() {
            return;
        }
        if let Err(error) = test_run::inject(self.program.as_fd(), self.index, &frame) {
            debug!(%error, "a packet of the test is lost");
        }
    }
}

/// TCP's, which the kernel leaves to the card. `None`: it is no TCP.
fn finish_checksum(frame: &mut [u8]) -> Option<()> {
    let packet = PacketHeaders::from_ethernet_slice(frame).ok()?;
    let Some(TransportHeader::Tcp(tcp)) = &packet.transport else { return None };
    let payload = packet.payload.slice();
    let sum = match &packet.net {
        Some(NetHeaders::Ipv4(ip, _)) => tcp.calc_checksum_ipv4(ip, payload).ok()?,
        Some(NetHeaders::Ipv6(ip, _)) => tcp.calc_checksum_ipv6(ip, payload).ok()?,
        _ => return None,
    };
    let at = frame.len() - payload.len() - tcp.header_len() + CHECKSUM;
    frame.get_mut(at..at + 2)?.copy_from_slice(&sum.to_be_bytes());
    Some(())
}

fn mac(interface: &str) -> Result<Mac> {
    let failed = |source: io::Error| BpfError::Io {
        path: interface.into(),
        action: "asking for its MAC address",
        source,
    };
    // SAFETY: SIOCGIFHWADDR reads nothing of the union.
    let answer =
        unsafe { ifreq::request(interface, libc::SIOCGIFHWADDR, |_| {}) }.map_err(failed)?;
    // SAFETY: it has written this member.
    let bytes = unsafe { answer.ifr_ifru.ifru_hwaddr }.sa_data;
    Ok(std::array::from_fn(|i| bytes[i].cast_unsigned()))
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    #[test]
    fn a_checksum_that_was_left_to_the_card_is_finished() {
        for v6 in [false, true] {
            let ethernet = PacketBuilder::ethernet2([1; 6], [2; 6]);
            let ip = if v6 {
                ethernet.ipv6([1; 16], [2; 16], 9)
            } else {
                ethernet.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9)
            };
            let mut right = Vec::new();
            ip.tcp(40000, 1883, 7, 100).write(&mut right, b"payload").unwrap();
            let mut frame = right.clone();
            let at = frame.len() - 7 - 20 + CHECKSUM;
            frame[at..at + 2].copy_from_slice(&[0xab, 0xcd]);
            finish_checksum(&mut frame).unwrap();
            assert_eq!(frame, right);
        }
    }
}
