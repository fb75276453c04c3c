//! `explain`: why something goes where it goes.

use std::net::SocketAddr;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::error::Error;
use super::from_run_or;
use super::table::{self, Output, age, line};
use crate::config::Config;
use crate::datapath::names::{bound_by_words, words};
use crate::inspect::Context;
use crate::inspect::explain::{
    self, BeatenRoute, ClientExplanation, FlowExplanation, ServerNameExplanation, TopicExplanation,
    Trial,
};

#[derive(Debug, Args)]
pub struct Explain {
    #[command(subcommand)]
    what: What,

    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The route that a topic takes, and those that it beats
    Topic { topic: String },
    /// The route that a TLS client takes by its ClientHello, and those that it beats
    ServerName {
        /// As the client asks for it (SNI); "" for none
        name: String,
        /// A protocol that it offers (ALPN); repeat for several, the preferred first
        #[arg(long, value_name = "PROTOCOL")]
        alpn: Vec<String>,
    },
    /// A client's record, and the outcome of its next connections
    Client {
        /// Its address, or its client id where clients are identified by that
        client: String,
    },
    /// The group of a connection, how it was bound, and which real has it
    Flow {
        #[arg(value_name = "ADDRESS:PORT")]
        client: SocketAddr,
    },
}

impl Explain {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let here = || Context::outside(config.clone());
        match &self.what {
            What::Topic { topic } => {
                let found = from_run_or(
                    config,
                    async |mut run| run.explain_topic(topic).await,
                    async || Ok(explain::topic(config, topic)?),
                )?;
                self.print(&found, show_topic);
            }
            What::ServerName { name, alpn } => {
                let found = from_run_or(
                    config,
                    async |mut run| run.explain_server_name(name, alpn).await,
                    async || Ok(explain::server_name(config, name, alpn)),
                )?;
                if found.is_empty() {
                    return Err(Error::Failed("no service has protocol = \"tls\"".to_owned()));
                }
                self.print(&found, show_server_name);
            }
            What::Client { client } => {
                let found = from_run_or(
                    config,
                    async |mut run| run.explain_client(client).await,
                    async || Ok(explain::client(&here(), client)?),
                )?;
                self.print(&found, show_client);
            }
            What::Flow { client } => {
                let found = from_run_or(
                    config,
                    async |mut run| run.explain_flow(*client).await,
                    async || Ok(explain::flow(&here(), *client)?),
                )?;
                self.print(&found, show_flow);
            }
        }
        Ok(())
    }

    fn print<T: Serialize>(&self, found: &[T], show: fn(&T)) {
        if self.output.json {
            table::json_rows("explanations", &found);
        } else {
            found.iter().for_each(show);
        }
    }
}

fn item(name: &str, text: &str) {
    line(&format!("  {name:<12}{text}"));
}

fn show_topic(t: &TopicExplanation) {
    line(&format!("topic {}, service {}", t.topic, t.service));
    show_route(t);
}

fn show_route(t: &TopicExplanation) {
    item("route", t.route.as_deref().unwrap_or("none matches: the default group"));
    for beaten in &t.beaten {
        let BeatenRoute { route, belongs_to, at_level } = beaten;
        item("", &format!("before {route} ({belongs_to}), less specific at level {at_level}"));
    }
    if t.reals.is_empty() {
        item("belongs to", &format!("{}: follows its connection", t.belongs_to));
    } else {
        item("belongs to", &format!("{}: {}", t.belongs_to, t.reals.join(", ")));
    }
}

fn show_server_name(s: &ServerNameExplanation) {
    line(&format!("server name {:?}, service {}", s.server_name, s.service));
    item("route", s.route.as_deref().unwrap_or("none matches"));
    for beaten in &s.beaten {
        item("", &format!("before {beaten}"));
    }
    match &s.belongs_to {
        Some(group) if s.reals.is_empty() => item("belongs to", group),
        Some(group) => item("belongs to", &format!("{group}: {}", s.reals.join(", "))),
        None => item("belongs to", "nowhere: refused with the alert unrecognized_name"),
    }
}

fn show_client(c: &ClientExplanation) {
    let record = &c.record;
    let by = record.by.key().replace('_', " ");
    line(&format!("client {}, service {}, identified by {by}", record.client, record.service));
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
        (
            record.for_relay,
            "it subscribes, has a will of another group, or publishes more topics at once than are judged: with a relay, it belongs there",
        ),
    ] {
        if is {
            item("note", text);
        }
    }
    for Trial { opening, group, bound_by, fallback_reason } in &c.trials {
        let outcome = match group {
            Some(group) => {
                format!("to {group}, by {}", bound_by_words(bound_by, fallback_reason.as_deref()))
            }
            None => "answered; the first message decides".to_owned(),
        };
        item("next", &format!("{opening}: {outcome}"));
    }
    for flow in &c.flows {
        let by = bound_by_words(&flow.bound_by, flow.fallback_reason.as_deref());
        let state = words(&flow.state);
        item("flow", &format!("{}: to {}, by {by}, {state}", flow.client, flow.group));
    }
}

fn show_flow(f: &FlowExplanation) {
    let row = &f.flow;
    line(&format!("flow {}, service {}", row.client, row.service));
    if !row.client_id.is_empty() {
        item("client id", &row.client_id);
    }
    if !row.server_name.is_empty() {
        item("server name", &row.server_name);
    }
    let by = bound_by_words(&row.bound_by, row.fallback_reason.as_deref());
    item("bound to", &format!("{}, by {by}", row.group));
    match &f.real {
        Some(real) => item("real", &format!("{real}, as the balancer says")),
        None => item("real", "the balancer does not say"),
    }
    item("state", &words(&row.state));
    if let Some(route) = &f.route {
        item("last topic", &route.topic);
        show_route(route);
    }
    if row.misrouted {
        item("note", "its last topic belongs to another group than it is bound to");
    }
}
