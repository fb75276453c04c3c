//! `explain`: why something goes where it goes.

use std::net::SocketAddr;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::or_here;
use super::table::{self, Output, age, line};
use crate::config::Config;
use crate::control::api::{self, proto};
use crate::control::{Error, explain};

#[derive(Debug, Args)]
pub struct Explain {
    #[command(subcommand)]
    what: What,

    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Which route a topic takes, and which it beats
    Topic { topic: String },
    /// What is known of a client, and what its next connections would come to
    Client {
        /// Its address, or its client id where those are what clients are known by
        client: String,
    },
    /// What a connection is bound to, by what, and which real has it
    Flow {
        #[arg(value_name = "ADDRESS:PORT")]
        client: SocketAddr,
    },
}

impl Explain {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        match &self.what {
            What::Topic { topic } => {
                let from_run = api::explain_topic(config, topic);
                self.print(&or_here(from_run, || explain::topic(config, topic))?, show_topic);
            }
            What::Client { client } => {
                let from_run = api::explain_client(config, client);
                self.print(&or_here(from_run, || explain::client(config, client))?, show_client);
            }
            What::Flow { client } => {
                let from_run = api::explain_flow(config, *client);
                self.print(&or_here(from_run, || explain::flow(config, *client))?, show_flow);
            }
        }
        Ok(())
    }

    fn print<T: Serialize>(&self, found: &[T], show: fn(&T)) {
        if self.output.json {
            table::json(&found);
        } else {
            found.iter().for_each(show);
        }
    }
}

fn item(name: &str, text: &str) {
    line(&format!("  {name:<12}{text}"));
}

fn show_topic(t: &proto::TopicExplanation) {
    line(&format!("topic {}, service {}", t.topic, t.service));
    show_route(t);
}

fn show_route(t: &proto::TopicExplanation) {
    item("route", t.route.as_deref().unwrap_or("none matches: the default group"));
    for beaten in &t.beaten {
        let proto::BeatenRoute { route, belongs_to, at_level } = beaten;
        item("", &format!("before {route} ({belongs_to}), less specific at level {at_level}"));
    }
    if t.reals.is_empty() {
        item("belongs to", &format!("{}: follows its connection", t.belongs_to));
    } else {
        item("belongs to", &format!("{}: {}", t.belongs_to, t.reals.join(", ")));
    }
}

fn show_client(c: &proto::ClientExplanation) {
    let Some(record) = &c.record else { return };
    let by = record.by.replace('_', " ");
    line(&format!("client {}, service {}, known by its {by}", record.client, record.service));
    if !record.topic.is_empty() {
        item("last topic", &format!("{}, {} ago", record.topic, age(record.age_s)));
    }
    let groups: Vec<_> =
        record.groups.iter().map(|(group, weight)| format!("{group} {weight}")).collect();
    item("messages", &format!("{} (of the recent ones)", groups.join(", ")));
    for (is, text) in [
        (record.multi_group, "it publishes to several groups in turn: no one group fits it"),
        (
            record.group_changes > 0 && !record.multi_group,
            "its group changed before: with a relay, it belongs there, unless it has an id",
        ),
        (record.misjudged, "its id alone decides no longer, since that was wrong once"),
        (record.subscribes, "it subscribes: with a relay, it belongs there"),
    ] {
        if is {
            item("note", text);
        }
    }
    for proto::Trial { opening, group, bound_by, why } in &c.trials {
        let outcome = match group {
            Some(group) => format!("to {group}, by {}", because(bound_by, why.as_deref())),
            None => "answered; the first message decides".to_owned(),
        };
        item("next", &format!("{opening}: {outcome}"));
    }
    for flow in &c.flows {
        let by = because(&flow.bound_by, flow.why.as_deref());
        item("flow", &format!("{}: to {}, by {by}, {}", flow.client, flow.group, flow.state));
    }
}

fn because(by: &str, why: Option<&str>) -> String {
    why.map_or_else(|| by.to_owned(), |why| format!("{by} (no better: {why})"))
}

fn show_flow(f: &proto::FlowExplanation) {
    let Some(row) = &f.flow else { return };
    line(&format!("flow {}, service {}", row.client, row.service));
    if !row.client_id.is_empty() {
        item("client id", &row.client_id);
    }
    item("bound to", &format!("{}, by {}", row.group, because(&row.bound_by, row.why.as_deref())));
    match &f.real {
        Some(real) => item("real", &format!("{real}, as the balancer says")),
        None => item("real", "the balancer does not say"),
    }
    item("state", &row.state);
    if let Some(topic) = &f.topic {
        item("last topic", &topic.topic);
        show_route(topic);
    }
    if row.misrouted {
        item("note", "its last topic belongs to another group than it is bound to");
    }
}
