//! `trace`: events as they happen.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use clap::Args;

use super::block_on;
use super::table::{line, time_of_day};
use crate::config::Config;
use crate::control::events::{Reader, Report};
use crate::control::{Error, api};

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

impl Trace {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let end = self.seconds.map(|s| Instant::now() + Duration::from_secs(s));
        let mut left = self.count.unwrap_or(u64::MAX);
        let mut print = |report: &Report| {
            line(&if self.json {
                serde_json::to_string(report).unwrap_or_default()
            } else {
                text(report)
            });
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let from_run = block_on(async {
            let Some(mut reports) = api::Reports::of(config, self.backlog).await? else {
                return Ok(false);
            };
            while let Some(report) = until(end, reports.next()).await? {
                if print(&report).is_break() {
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
            |report| print(&report),
            || if is_over() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) },
        )
    }
}

/// The next one, if it comes in time.
async fn until(
    end: Option<Instant>,
    next: impl Future<Output = Result<Option<Report>, Error>>,
) -> Result<Option<Report>, Error> {
    match end {
        Some(end) => tokio::time::timeout_at(end.into(), next).await.unwrap_or(Ok(None)),
        None => next.await,
    }
}

fn text(report: &Report) -> String {
    let time = time_of_day(report.time);
    let group = report.group.as_deref().unwrap_or("?");
    let topic = report.topic.as_deref().unwrap_or("?");
    let what = match report.event.as_str() {
        "bound" => {
            let by = match report.bound_by.as_deref() {
                Some("prediction") if report.topic.is_some() => {
                    format!("prediction (topic {topic})")
                }
                by => by.unwrap_or("default").to_owned(),
            };
            let why = report.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
            format!("to {group}, by {by}{why}")
        }
        "learned" => format!("topic {topic} → {group}"),
        "mispredicted" => format!(
            "topic {topic} is {group}'s, but the flow is {}'s: {}",
            report.from_group.as_deref().unwrap_or("?"),
            if report.ended { "ended" } else { "left there" }
        ),
        "resynced" => format!("framing found again (group {group})"),
        _ => format!("not MQTT, or malformed (group {group})"),
    };
    format!("{time}  {:<12}  {:<21}  {what}", report.event, report.client)
}
