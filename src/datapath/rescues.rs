//! What misrouted clients sent, as the datapath hands it over (`bpf/forward/end/rescue.h`).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use libbpf_rs::{MapHandle, RingBufferBuilder};

use super::Datapath;
use super::names::boot_time;
use crate::kernel::abi::{Pod as _, rescue, rescue_flags, rescuer, words_addr};
use crate::kernel::pins::Pins;
use crate::kernel::{BpfError, Result};

/// Age of a piece that no client waits for: of before a restart.
const STALE: Duration = Duration::from_secs(20);

/// Names a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamKey {
    pub client: SocketAddr,
    /// The service's number.
    pub service: u16,
    /// Sequence number of the stream's first byte.
    pub start: u32,
}

/// A piece of a client's stream.
#[derive(Debug)]
pub struct Piece {
    pub key: StreamKey,
    /// Sequence number of its first byte.
    pub seq: u32,
    pub v5: bool,
    /// FIN is behind it.
    pub last: bool,
    pub bytes: Vec<u8>,
}

impl Piece {
    /// A record of the ring buffer; `None`: it is too old.
    fn read(record: &[u8]) -> Option<Self> {
        let (head, bytes) = record.split_at_checked(size_of::<rescue>())?;
        let head = rescue::from_bytes(head);
        let bytes = bytes.get(..usize::from(head.length))?;
        if boot_time().saturating_sub(Duration::from_nanos(head.time_ns)) > STALE {
            return None;
        }
        let has = |flag: rescue_flags| u32::from(head.flags) & flag.0 != 0;
        let addr = words_addr(head.client, has(rescue_flags::RESCUE_V6));
        Some(Self {
            key: StreamKey {
                client: SocketAddr::new(addr, u16::from_be(head.client_port)),
                service: head.service,
                start: head.start,
            },
            seq: head.seq,
            v5: has(rescue_flags::RESCUE_MQTT5),
            last: has(rescue_flags::RESCUE_LAST),
            bytes: bytes.to_vec(),
        })
    }
}

/// The pinned ring buffer.
#[derive(Debug)]
pub struct Rescues {
    ring: MapHandle,
    path: PathBuf,
}

impl Rescues {
    /// Opens it.
    pub fn open(pins: &Pins) -> Result<Self> {
        let path = pins.map("rescues");
        let ring = MapHandle::from_pinned_path(&path).map_err(|source| BpfError::Pin {
            path: path.clone(),
            action: "opening",
            source,
        })?;
        Ok(Self { ring, path })
    }

    /// Reads as long as `go_on` says how long to wait for the next piece; then takes what is there still. `take` gets
    /// each piece (`None`: one that is too old), and says whether to go on with what is there.
    pub fn read(
        &self,
        mut take: impl FnMut(Option<Piece>) -> bool,
        mut go_on: impl FnMut() -> Option<Duration>,
    ) -> Result<()> {
        let failed = |action| {
            let path = self.path.clone();
            move |source| BpfError::Pin { path, action, source }
        };
        let mut builder = RingBufferBuilder::new();
        // A negative number ends the reading of what is there: libbpf goes on as long as something comes.
        let handle = |bytes: &[u8]| if take(Piece::read(bytes)) { 0 } else { -libc::EAGAIN };
        builder.add(&self.ring, handle).map_err(failed("reading"))?;
        let ring = builder.build().map_err(failed("reading"))?;
        while let Some(wait) = go_on() {
            match ring.poll(wait) {
                Err(error) if !is_pause(&error) => return Err(failed("reading")(error)),
                _ => {}
            }
        }
        let _ = ring.consume();
        Ok(())
    }
}

fn is_pause(error: &libbpf_rs::Error) -> bool {
    matches!(error.kind(), libbpf_rs::ErrorKind::Interrupted | libbpf_rs::ErrorKind::WouldBlock)
}

impl Datapath {
    /// The rescuer's sign of life: the datapath relies on it `until` then (CLOCK_BOOTTIME), and begins no rescue
    /// while it is `full`.
    pub fn put_rescuer(&self, until: Duration, instance: u32, full: bool) -> Result<()> {
        let sign = rescuer {
            until: u64::try_from(until.as_nanos()).unwrap_or(u64::MAX),
            instance,
            full: full.into(),
        };
        self.rescuer.put(&0, &sign)
    }
}
