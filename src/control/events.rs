//! The datapath's events, with names for their numbers.

use std::ops::ControlFlow;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::Result;
use super::view::{self, Names};
use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::events::Events;
use crate::kernel::abi::{event, event_kind};

/// An event.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub time: f64,
    pub event: String,
    pub service: String,
    pub client: String,
    pub from_group: Option<String>,
    pub group: Option<String>,
    pub topic: Option<String>,
    pub by_prediction: bool,
    pub bound_by: Option<String>,
    pub why: Option<String>,
    pub ended: bool,
}

/// The one reader of events.
#[derive(Debug)]
pub struct Reader {
    config: Config,
    datapath: Datapath,
    events: Events,
    start: Duration,
}

impl Reader {
    /// From now on.
    pub fn open(config: &Config) -> Result<Self> {
        let pins = config.pins();
        Ok(Self {
            config: config.clone(),
            datapath: Datapath::open(&pins)?,
            events: Events::open(&pins)?,
            start: view::boot_time(),
        })
    }

    /// Those that nobody has read yet, too.
    #[must_use]
    pub fn with_backlog(self) -> Self {
        Self { start: Duration::ZERO, ..self }
    }

    /// Gives each to `handle` until that breaks off, or `poll` does, which is called some ten times a second.
    pub fn each(
        &self,
        mut handle: impl FnMut(Report) -> ControlFlow<()>,
        poll: impl FnMut() -> ControlFlow<()>,
    ) -> Result<()> {
        let mut names = Names::read(&self.config, &self.datapath)?;
        self.events.for_each(
            |event| {
                if u128::from(event.time_ns) < self.start.as_nanos() {
                    return ControlFlow::Continue(());
                }
                if names.group_now(event.to_group).is_none() {
                    // Perhaps a group that came after we began.
                    if let Ok(now) = Names::read(&self.config, &self.datapath) {
                        names = now;
                    }
                }
                handle(Report::of(event, &names))
            },
            poll,
        )?;
        Ok(())
    }
}

impl Report {
    fn of(event: &event, names: &Names) -> Self {
        let ago = view::boot_time().saturating_sub(Duration::from_nanos(event.time_ns));
        let time = Timestamp::now().saturating_sub(ago).unwrap_or_default();
        let group = |id| {
            if view::no_group(id) { None } else { names.group_now(id).map(str::to_owned) }
        };
        let kind = match event_kind(u32::from(event.kind)) {
            event_kind::EVENT_BOUND => "bound",
            event_kind::EVENT_LEARNED => "learned",
            event_kind::EVENT_MISPREDICTED => "mispredicted",
            event_kind::EVENT_RESYNCED => "resynced",
            event_kind::EVENT_UNFRAMED => "unframed",
            _ => "?",
        };
        let (bound_by, why) = view::way_text(event.way, event.why, event.by_prediction != 0);
        Self {
            time: time.as_microsecond() as f64 / 1e6,
            event: kind.to_owned(),
            service: names.service(event.service),
            client: view::event_client(event).to_string(),
            from_group: group(event.from_group),
            group: group(event.to_group),
            topic: (event.topic != 0).then(|| view::topic_text(&event.text, event.topic_length)),
            by_prediction: event.by_prediction != 0,
            bound_by: (kind == "bound").then(|| bound_by.to_owned()),
            why: why.map(str::to_owned),
            ended: event.ended != 0,
        }
    }
}
