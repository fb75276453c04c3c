//! `replay`: the outcome of captured traffic.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::error::Error;
use super::table::{self, Output, counted, line};
use crate::config::Config;
use crate::datapath::names::bound_by_words;
use crate::replay::{Message, Outcome, Report, replay};

#[derive(Debug, Args)]
pub struct Replay {
    /// pcap or pcapng, of whole packets (tcpdump -s 0)
    file: PathBuf,

    /// The address in the capture that stands for the service, if it was taken at a broker
    #[arg(long, value_name = "ADDRESS:PORT")]
    server: Option<SocketAddr>,

    /// Another configuration: show only what would come out otherwise
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,

    /// Show each message
    #[arg(long)]
    messages: bool,

    #[command(flatten)]
    output: Output,
}

const OUTCOMES: [Outcome; 5] =
    [Outcome::Right, Outcome::Rescued, Outcome::Misrouted, Outcome::Lost, Outcome::Waiting];

fn text(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Right => "right",
        Outcome::Rescued => "rescued",
        Outcome::Misrouted => "misrouted",
        Outcome::Lost => "lost",
        Outcome::Waiting => "waiting",
    }
}

impl Replay {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let report = replay(config, &self.file, self.server)?;
        if let Some(other) = &self.against {
            let other_config = Config::load(other)?;
            let against = replay(&other_config, &self.file, self.server)?;
            self.compare(config, &report, &other_config, &against);
        } else if self.output.json {
            table::json(&report);
        } else {
            line(&summary(config, &report));
            self.show(&report);
        }
        Ok(())
    }

    fn show(&self, report: &Report) {
        show_tls(report);
        if report.messages.is_empty() && !report.tls.is_empty() {
            return;
        }
        line("");
        if self.messages {
            table::print(
                &[
                    "time",
                    "client",
                    "client id",
                    "topic",
                    "belongs to",
                    "went to",
                    "outcome",
                    "bound by",
                ],
                report.messages.iter().map(|m| {
                    vec![
                        table::time_of_day(m.time),
                        m.client.to_string(),
                        m.client_id.clone(),
                        m.topic.clone(),
                        m.belongs_to.clone(),
                        m.went_to.clone().unwrap_or_else(|| "-".to_owned()),
                        text(m.outcome).to_owned(),
                        bound_by_words(m.bound_by, m.fallback_reason),
                    ]
                }),
            );
            return;
        }
        let mut rows: BTreeMap<(&str, &str), [usize; OUTCOMES.len()]> = BTreeMap::new();
        for message in &report.messages {
            let counts = rows.entry((&message.topic, &message.belongs_to)).or_default();
            counts[message.outcome as usize] += 1;
        }
        table::print(
            &["topic", "belongs to", ">right", ">rescued", ">misrouted", ">lost", ">waiting"],
            rows.into_iter().map(|((topic, group), counts)| {
                let counts = counts.map(|n| n.to_string());
                [&[topic.to_owned(), group.to_owned()][..], &counts].concat()
            }),
        );
        line("");
        let mut bound_by: BTreeMap<String, usize> = BTreeMap::new();
        for message in &report.messages {
            let text = bound_by_words(message.bound_by, message.fallback_reason);
            *bound_by.entry(text).or_default() += 1;
        }
        table::print(
            &["connection bound by", ">messages"],
            bound_by.into_iter().map(|(text, n)| vec![text, n.to_string()]),
        );
    }

    fn compare(&self, config: &Config, report: &Report, other: &Config, against: &Report) {
        let differing = || {
            report.messages.iter().zip(&against.messages).filter(|(here, there)| {
                (&here.went_to, here.outcome) != (&there.went_to, there.outcome)
            })
        };
        if self.output.json {
            let pairs: Vec<_> = differing().map(|(here, there)| Pair { here, there }).collect();
            table::json_rows("differing", &pairs);
            return;
        }
        line(&summary(config, report));
        line(&summary(other, against));
        line("");
        let came = |m: &Message| match &m.went_to {
            Some(group) => format!("{}, {group}", text(m.outcome)),
            None => text(m.outcome).to_owned(),
        };
        let mut rows: BTreeMap<(&str, String, String), usize> = BTreeMap::new();
        for (here, there) in differing() {
            *rows.entry((&here.topic, came(here), came(there))).or_default() += 1;
        }
        table::print(
            &["topic", "with the first", "with the second", ">messages"],
            rows.into_iter().map(|((topic, here, there), n)| {
                vec![topic.to_owned(), here, there, n.to_string()]
            }),
        );
    }
}

/// Connections whose messages cannot be read, by the names that they ask for.
fn show_tls(report: &Report) {
    if report.tls.is_empty() {
        return;
    }
    let mut rows: BTreeMap<(String, String, String), usize> = BTreeMap::new();
    for tls in &report.tls {
        let name = tls.server_name.clone().unwrap_or_else(|| "-".to_owned());
        let group = tls.went_to.clone().unwrap_or_else(|| "-".to_owned());
        let by = bound_by_words(tls.bound_by, tls.fallback_reason);
        *rows.entry((name, group, by)).or_default() += 1;
    }
    line("");
    table::print(
        &["server name", "went to", "bound by", ">connections"],
        rows.into_iter().map(|((name, group, by), n)| vec![name, group, by, n.to_string()]),
    );
}

#[derive(Serialize)]
struct Pair<'a> {
    here: &'a Message,
    there: &'a Message,
}

fn summary(config: &Config, report: &Report) -> String {
    let count = |outcome| report.messages.iter().filter(|m| m.outcome == outcome).count();
    let outcomes: Vec<_> = OUTCOMES
        .into_iter()
        .filter(|outcome| count(*outcome) > 0)
        .map(|outcome| format!("{} {}", count(outcome), text(outcome)))
        .collect();
    let mut summary = format!(
        "{}: {} of {}{}{}",
        config.path.display(),
        match report.messages.len() {
            1 => "1 PUBLISH".to_owned(),
            n => format!("{n} PUBLISHes"),
        },
        counted(report.connections, "connection"),
        if outcomes.is_empty() { "" } else { ": " },
        outcomes.join(", ")
    );
    if !report.tls.is_empty() {
        summary.push_str(&format!("; {} TLS", counted(report.tls.len(), "connection")));
    }
    if report.ended_connections > 0 {
        summary.push_str(&format!(
            "; {} would be ended, and lose what comes until their clients connect again",
            counted(report.ended_connections, "connection")
        ));
    }
    if report.unread_connections > 0 {
        summary.push_str(&format!(
            "; {} could not be read to the end (packets are missing, or it is no MQTT)",
            counted(report.unread_connections, "connection")
        ));
    }
    if report.unjudged_connections > 0 {
        let n = report.unjudged_connections;
        summary.push_str(&format!("; {n} more began before the capture, and are not judged"));
    }
    if report.messages.is_empty() && report.other_segments > 0 {
        summary.push_str(&format!(
            "; {} segments are for other addresses than services' (--server names the one that \
             stands for the service)",
            report.other_segments
        ));
    }
    summary
}
