//! `test`: real messages to every broker.

use std::net::IpAddr;

use clap::Args;
use serde::Serialize;

use super::block_on;
use super::error::Error;
use super::table::{self, Output, counted, line};
use crate::api::Run;
use crate::config::{Config, address};
use crate::connectivity::{self, Outcome, Tested};

#[derive(Serialize)]
struct Printed<'a> {
    arrived: usize,
    lost: usize,
    not_sent: usize,
    messages: &'a [Tested],
}

#[derive(Debug, Args)]
pub struct Test {
    /// Only this service
    #[arg(long, value_name = "NAME")]
    service: Option<String>,

    /// Connect over the network from this address of this host, which may be any host that has the configuration file
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    from: Option<IpAddr>,

    #[command(flatten)]
    output: Output,
}

impl Test {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        if let Some(name) = &self.service
            && !config.services.iter().any(|service| service.name == *name)
        {
            return Err(Error::Usage(format!("there is no service {name:?}")));
        }
        let tested: Vec<Tested> = block_on(async {
            let config = in_effect(config).await;
            connectivity::test(&config, self.service.as_deref(), self.from).await
        })?;
        let count = |outcome| tested.iter().filter(|one| one.outcome == outcome).count();
        let (arrived, lost, not_sent) =
            (count(Outcome::Arrived), count(Outcome::Lost), count(Outcome::NotSent));
        if self.output.json {
            table::json(&Printed { arrived, lost, not_sent, messages: &tested });
        } else {
            print(&tested);
            line("");
            let not_sent = if not_sent == 0 {
                String::new()
            } else {
                format!("; {} could not be sent to", counted(not_sent, "broker"))
            };
            line(&format!("{arrived} of {} arrived{not_sent}", counted(arrived + lost, "message")));
        }
        if lost > 0 {
            return Err(Error::Failed(format!("{} did not arrive", counted(lost, "message"))));
        }
        if arrived == 0 {
            return Err(Error::Failed("no message was sent".to_owned()));
        }
        Ok(())
    }
}

/// With the weights that reals have by their checks, if there is a `run` to ask.
pub async fn in_effect(config: &Config) -> Config {
    let mut config = config.clone();
    let Ok(Some(mut run)) = Run::find(&config).await else { return config };
    let Ok(states) = run.reals().await else { return config };
    for service in &mut config.services {
        for group in &mut service.groups {
            for real in &mut group.reals {
                let is_it = |state: &&crate::api::proto::Real| {
                    (&state.service, &state.group) == (&service.name, &group.name)
                        && state.address.parse() == Ok(real.addr)
                };
                if let Some(state) = states.iter().find(is_it) {
                    real.weight = state.effective_weight;
                }
            }
        }
    }
    config
}

fn print(tested: &[Tested]) {
    table::print(
        &["service", "group", "real", "binding", "message", ">ms", "outcome"],
        tested.iter().map(|one| {
            let outcome = match (one.outcome, &one.reason) {
                (Outcome::Arrived, _) => "arrived".to_owned(),
                (Outcome::Lost, reason) => {
                    format!("LOST: {}", reason.as_deref().unwrap_or_default())
                }
                (Outcome::NotSent, reason) => {
                    format!("not sent: {}", reason.as_deref().unwrap_or_default())
                }
            };
            vec![
                one.service.clone(),
                one.group.clone(),
                one.real.map_or_else(|| "-".to_owned(), |real| real.to_string()),
                one.binding.to_owned(),
                one.message.clone(),
                one.ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}")),
                outcome,
            ]
        }),
    );
}
