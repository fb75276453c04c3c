//! The datapath's events, as they happen, with names for their numbers.

use std::fs::File;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libbpf_rs::{MapHandle, RingBufferBuilder};
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use super::Datapath;
use super::names::{Names, binding_codes, boot_time, server_name_text, text_of};
use crate::config::Config;
use crate::kernel::abi::{Pod as _, event, event_kind, special_group, words_addr};
use crate::kernel::pins::{Object, Pins};
use crate::kernel::{BpfError, Result};

/// An event.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Event {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub time: f64,
    /// bound, learned, mispredicted, resynced or unframed.
    pub event: String,
    pub service: String,
    /// Address and port.
    pub client: String,
    /// The group that the flow was bound to, where that is another.
    pub from_group: Option<String>,
    pub group: Option<String>,
    pub topic: Option<String>,
    /// Of bound, TLS: that its ClientHello asked for.
    pub server_name: Option<String>,
    /// The flow was bound by a prediction.
    pub by_prediction: bool,
    /// Of bound: what the group was chosen by, and why not by the first message.
    pub bound_by: Option<String>,
    pub fallback_reason: Option<String>,
    /// Of mispredicted: the flow was ended.
    pub ended: bool,
}

/// The one reader of the ring buffer: two would take events from each other.
#[derive(Debug)]
pub struct Reader {
    config: Config,
    datapath: Datapath,
    ring: MapHandle,
    path: PathBuf,
    start: Duration,
    _lock: Flock<File>,
}

impl Reader {
    /// Opens the pinned ring buffer, for events from now on.
    pub fn open(config: &Config) -> Result<Self> {
        let pins: Pins = config.pins();
        let path = pins.map("events");
        let ring = MapHandle::from_pinned_path(&path).map_err(|_| BpfError::NotLoaded {
            path: path.clone(),
            what: "no events are pinned there",
        })?;
        let lock = lock(&pins.current(Object::MqttFwd))?;
        Ok(Self {
            config: config.clone(),
            datapath: Datapath::open(&pins)?,
            ring,
            path,
            start: boot_time(),
            _lock: lock,
        })
    }

    /// Those that nobody has read yet, too.
    #[must_use]
    pub fn with_backlog(self) -> Self {
        Self { start: Duration::ZERO, ..self }
    }

    /// Gives each event to `handle` until that breaks off, or `poll` does, which is called some ten times per second.
    pub fn each(
        &self,
        mut handle: impl FnMut(Event) -> ControlFlow<()>,
        mut poll: impl FnMut() -> ControlFlow<()>,
    ) -> Result<()> {
        let failed = |action| {
            let path = self.path.clone();
            move |source| BpfError::Pin { path, action, source }
        };
        let mut names = Names::read(&self.config, &self.datapath)?;
        let mut ended = false;
        let mut builder = RingBufferBuilder::new();
        builder
            .add(&self.ring, |bytes| {
                if bytes.len() == size_of::<event>() && !ended {
                    ended = self.take(&event::from_bytes(bytes), &mut names, &mut handle);
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
                // Ours, from above.
                Err(e) if is_canceled(&e) => return Ok(()),
                Err(e) => return Err(failed("reading")(e)),
            }
            if poll().is_break() {
                return Ok(());
            }
        }
    }

    /// One event; whether it was the last one.
    fn take(
        &self,
        event: &event,
        names: &mut Names,
        handle: &mut impl FnMut(Event) -> ControlFlow<()>,
    ) -> bool {
        // Those from before the call come first.
        if u128::from(event.time_ns) < self.start.as_nanos() {
            return false;
        }
        if names.group_now(event.to_group).is_none()
            // Perhaps a group that was added after we began.
            && let Ok(now) = Names::read(&self.config, &self.datapath)
        {
            *names = now;
        }
        handle(Event::of(event, names)).is_break()
    }
}

fn is_canceled(error: &libbpf_rs::Error) -> bool {
    let text = error.to_string();
    text.contains("ECANCELED") || text.contains("canceled")
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

impl Event {
    fn of(event: &event, names: &Names) -> Self {
        let ago = boot_time().saturating_sub(Duration::from_nanos(event.time_ns));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let group = |id: u16| {
            let is_none = u32::from(id) == special_group::NO_GROUP.0;
            if is_none { None } else { names.group_now(id).map(str::to_owned) }
        };
        let kind = match event_kind(u32::from(event.kind)) {
            event_kind::EVENT_BOUND => "bound",
            event_kind::EVENT_LEARNED => "learned",
            event_kind::EVENT_MISPREDICTED => "mispredicted",
            event_kind::EVENT_RESYNCED => "resynced",
            event_kind::EVENT_UNFRAMED => "unframed",
            _ => "?",
        };
        let (bound_by, reason) =
            binding_codes(event.bound_by, event.fallback_reason, event.by_prediction != 0);
        let client = words_addr(event.client, event.v6 != 0);
        let is_tls = names.is_tls(event.service);
        let has_text = event.topic != 0;
        Self {
            time: now.saturating_sub(ago).as_micros() as f64 / 1e6,
            event: kind.to_owned(),
            service: names.service(event.service),
            client: SocketAddr::new(client, u16::from_be(event.client_port)).to_string(),
            from_group: group(event.from_group),
            group: group(event.to_group),
            topic: (has_text && !is_tls).then(|| text_of(&event.text, event.topic_length)),
            server_name: (has_text && is_tls)
                .then(|| server_name_text(&event.text, event.topic_length)),
            by_prediction: event.by_prediction != 0,
            bound_by: (kind == "bound").then(|| bound_by.to_owned()),
            fallback_reason: reason.map(str::to_owned),
            ended: event.ended != 0,
        }
    }
}
