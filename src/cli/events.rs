//! `events`: what the datapath reports, as it happens.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use clap::Args;

use super::block_on;
use super::error::Error;
use super::table::{line, time_of_day};
use crate::api::{self, Run};
use crate::config::Config;
use crate::datapath::events::{Event, Reader};
use crate::datapath::names::bound_by_words;

#[derive(Debug, Args)]
pub struct Events {
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

impl Events {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let end = self.seconds.map(|s| Instant::now() + Duration::from_secs(s));
        let mut left = self.count.unwrap_or(u64::MAX);
        let mut print = |event: &Event| {
            line(&if self.json {
                serde_json::to_string(event).unwrap_or_default()
            } else {
                text(event)
            });
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let from_run = block_on::<bool, api::ApiError>(async {
            let Some(mut run) = Run::find(config).await? else { return Ok(false) };
            let mut events = run.events(self.backlog).await?;
            while let Some(event) = until(end, events.next()).await? {
                if print(&event).is_break() {
                    break;
                }
            }
            Ok(true)
        })?;
        if from_run {
            return Ok(());
        }
        let reader = Reader::open(config)?;
        let reader = if self.backlog { reader.with_backlog() } else { reader };
        let is_over = || end.is_some_and(|end| Instant::now() > end);
        reader.each(
            |event| print(&event),
            || if is_over() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) },
        )?;
        Ok(())
    }
}

/// The next one, if it comes in time.
async fn until(
    end: Option<Instant>,
    next: impl Future<Output = api::Result<Option<Event>>>,
) -> api::Result<Option<Event>> {
    match end {
        Some(end) => tokio::time::timeout_at(end.into(), next).await.unwrap_or(Ok(None)),
        None => next.await,
    }
}

fn text(event: &Event) -> String {
    let time = time_of_day(event.time);
    let group = event.group.as_deref().unwrap_or("?");
    let topic = event.topic.as_deref().unwrap_or("?");
    let what = match event.event.as_str() {
        "bound" => {
            let by = event.bound_by.as_deref().unwrap_or("default");
            let text = bound_by_words(by, event.fallback_reason.as_deref());
            match (&event.server_name, &event.topic) {
                (Some(name), _) => format!("to {group}, by {text}, asks for {name}"),
                (None, Some(topic)) if by == "prediction" => {
                    format!("to {group}, by {text}, topic {topic}")
                }
                _ => format!("to {group}, by {text}"),
            }
        }
        "learned" => format!("topic {topic} → {group}"),
        "mispredicted" => format!(
            "topic {topic} is {group}'s, but the flow is {}'s: {}",
            event.from_group.as_deref().unwrap_or("?"),
            if event.ended { "ended" } else { "left there" }
        ),
        "resynced" => format!("framing found again (group {group})"),
        _ => format!("not MQTT, or malformed (group {group})"),
    };
    format!("{time}  {:<12}  {:<21}  {what}", event.event, event.client)
}
