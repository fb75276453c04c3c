//! The datapath's events, as they happen.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use libbpf_rs::{MapHandle, RingBufferBuilder};
use nix::fcntl::{Flock, FlockArg};

use crate::kernel::abi::{Pod as _, event};
use crate::kernel::pins::{Object, Pins};
use crate::kernel::{BpfError, Result};

/// The one reader of the ring buffer: two would take events from each other.
#[derive(Debug)]
pub struct Events {
    ring: MapHandle,
    path: std::path::PathBuf,
    _lock: Flock<File>,
}

impl Events {
    /// Opens the pinned ring buffer.
    pub fn open(pins: &Pins) -> Result<Self> {
        let path = pins.map("events");
        let ring = MapHandle::from_pinned_path(&path).map_err(|_| BpfError::NotLoaded {
            path: path.clone(),
            what: "no events are pinned there",
        })?;
        let lock = lock(&pins.current(Object::MqttFwd))?;
        Ok(Self { ring, path, _lock: lock })
    }

    /// Gives each event to `handle` until that breaks off or `poll` does. Events from before the
    /// call come first; `handle` can tell them by their time.
    pub fn for_each(
        &self,
        mut handle: impl FnMut(&event) -> ControlFlow<()>,
        mut poll: impl FnMut() -> ControlFlow<()>,
    ) -> Result<()> {
        let failed = |action| {
            let path = self.path.clone();
            move |source| BpfError::Pin { path, action, source }
        };
        let mut ended = false;
        let mut builder = RingBufferBuilder::new();
        builder
            .add(&self.ring, |bytes| {
                if bytes.len() == size_of::<event>() && !ended {
                    ended = handle(&event::from_bytes(bytes)).is_break();
                }
                // A negative number ends the reading of what is there.
                if ended { -libc::ECANCELED } else { 0 }
            })
            .map_err(failed("reading"))?;
        let ring = builder.build().map_err(failed("reading"))?;
        loop {
            match ring.poll(Duration::from_millis(100)) {
                Ok(()) => {}
                Err(e) if e.kind() == libbpf_rs::ErrorKind::Interrupted => {}
                Err(e) if e.to_string().contains("ECANCELED") || ended_by(&e) => return Ok(()),
                Err(e) => return Err(failed("reading")(e)),
            }
            if poll().is_break() {
                return Ok(());
            }
        }
    }
}

fn ended_by(error: &libbpf_rs::Error) -> bool {
    error.to_string().contains("canceled")
}

fn lock(dir: &Path) -> Result<Flock<File>> {
    let file = File::open(dir).map_err(|source| BpfError::Io {
        path: dir.to_owned(),
        action: "opening",
        source,
    })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| BpfError::EventsTaken { path: dir.to_owned() })
}
