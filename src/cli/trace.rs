//! `trace`: events as they happen.

use std::ops::ControlFlow;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde::Serialize;

use super::table::line;
use crate::config::Config;
use crate::control::Error;
use crate::control::view::{self, Names};
use crate::datapath::Datapath;
use crate::datapath::events::Events;
use crate::kernel::abi::{event, event_kind};

#[derive(Debug, Args)]
pub struct Trace {
    /// End after this many events
    #[arg(long, short = 'n', value_name = "N")]
    count: Option<u64>,

    /// End after this many seconds
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,

    /// Begin with the events that nobody has read yet
    #[arg(long)]
    backlog: bool,

    /// Print a JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    time: f64,
    event: &'a str,
    service: String,
    client: String,
    from_group: Option<&'a str>,
    group: Option<&'a str>,
    topic: Option<String>,
    by_prediction: bool,
    bound_by: Option<&'static str>,
    why: Option<&'static str>,
    ended: bool,
}

impl Trace {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let pins = config.pins();
        let datapath = Datapath::open(&pins)?;
        let events = Events::open(&pins)?;
        let mut names = Names::read(config, &datapath)?;
        let start = view::boot_time();
        let mut left = self.count.unwrap_or(u64::MAX);
        events.for_each(
            |event| {
                if !self.backlog && u128::from(event.time_ns) < start.as_nanos() {
                    return ControlFlow::Continue(());
                }
                if names.group_now(event.to_group).is_none() {
                    // Perhaps a group that came after we began.
                    if let Ok(now) = Names::read(config, &datapath) {
                        names = now;
                    }
                }
                self.print(event, &names);
                left -= 1;
                if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
            || {
                let over = self
                    .seconds
                    .is_some_and(|s| view::boot_time() > start + Duration::from_secs(s));
                if over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        )?;
        Ok(())
    }

    fn print(&self, event: &event, names: &Names) {
        let since_boot = Duration::from_nanos(event.time_ns);
        let ago = view::boot_time().saturating_sub(since_boot);
        let time = SystemTime::now()
            .checked_sub(ago)
            .and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok())
            .unwrap_or_default();
        let group = |id| if view::no_group(id) { None } else { names.group_now(id) };
        let kind = match event_kind(u32::from(event.kind)) {
            event_kind::EVENT_BOUND => "bound",
            event_kind::EVENT_LEARNED => "learned",
            event_kind::EVENT_MISPREDICTED => "mispredicted",
            event_kind::EVENT_RESYNCED => "resynced",
            event_kind::EVENT_UNFRAMED => "unframed",
            _ => "?",
        };
        let (bound_by, why) = view::way_text(event.way, event.why, event.by_prediction != 0);
        let row = Line {
            time: time.as_secs_f64(),
            event: kind,
            service: names.service(event.service),
            client: view::event_client(event).to_string(),
            from_group: group(event.from_group),
            group: group(event.to_group),
            topic: (event.topic != 0).then(|| view::topic_text(&event.text, event.topic_length)),
            by_prediction: event.by_prediction != 0,
            bound_by: (kind == "bound").then_some(bound_by),
            why,
            ended: event.ended != 0,
        };
        if self.json {
            line(&serde_json::to_string(&row).unwrap_or_default());
        } else {
            line(&row.text());
        }
    }
}

impl Line<'_> {
    fn text(&self) -> String {
        let of_day = self.time % 86_400.0;
        let (h, m) = ((of_day / 3600.0) as u32, (of_day % 3600.0 / 60.0) as u32);
        let time = format!("{h:02}:{m:02}:{:06.3}", of_day % 60.0);
        let group = self.group.unwrap_or("?");
        let topic = self.topic.as_deref().unwrap_or("?");
        let what = match self.event {
            "bound" => {
                let by = match self.bound_by {
                    Some("prediction") if self.topic.is_some() => {
                        format!("prediction (topic {topic})")
                    }
                    by => by.unwrap_or("default").to_owned(),
                };
                let why = self.why.map(|why| format!(" ({why})")).unwrap_or_default();
                format!("to {group}, by {by}{why}")
            }
            "learned" => format!("topic {topic} → {group}"),
            "mispredicted" => format!(
                "topic {topic} is {group}'s, but the flow is {}'s: {}",
                self.from_group.unwrap_or("?"),
                if self.ended { "ended" } else { "left there" }
            ),
            "resynced" => format!("framing found again (group {group})"),
            _ => format!("not MQTT, or malformed (group {group})"),
        };
        format!("{time}  {:<12}  {:<21}  {what}", self.event, self.client)
    }
}
