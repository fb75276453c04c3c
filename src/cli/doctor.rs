//! `doctor`: what stands in the way of packets.

use std::pin::pin;

use clap::Args;

use super::block_on;
use super::error::Error;
use super::find::{Found, find_or};
use super::table::{self, Output, counted, line};
use crate::api::{self, ApiError};
use crate::config::Config;
use crate::connectivity::{self, Outcome, Tested};
use crate::inspect::Context;
use crate::inspect::doctor::{Finding, examine};

/// `run` looks, and where it does not answer or there is none, this process.
async fn findings(config: Config) -> Result<Vec<Finding>, ApiError> {
    let context = Context::outside(config.clone());
    let here = pin!(examine(&context));
    match find_or(&config, here).await? {
        Found::Run(mut run) => run.diagnose().await,
        Found::Here(silent, mut found) => {
            let fault =
                |e: ApiError| Finding::fault("run", e.to_string(), "systemctl restart mqtt-fwd");
            found.extend(silent.map(fault));
            Ok(found)
        }
    }
}

#[derive(Debug, Args)]
pub struct Doctor {
    /// Also send messages to every broker, as `mqtt-fwd test` does
    #[arg(long)]
    deep: bool,

    #[command(flatten)]
    output: Output,
}

/// What `mqtt-fwd test` finds.
async fn tested(config: Config) -> Vec<Finding> {
    let config = api::in_force(config.clone()).await.unwrap_or(config);
    let tested = connectivity::test(&super::test::in_effect(&config).await, None, None).await;
    let tested = match tested {
        Ok(tested) => tested,
        Err(error) => return vec![Finding::fault("test", error.to_string(), "")],
    };
    let of = |outcome| tested.iter().filter(move |one| one.outcome == outcome);
    let arrived = counted(of(Outcome::Arrived).count(), "message");
    let mut found = vec![match of(Outcome::Arrived).count() {
        0 => Finding::fault("test", "no message arrived".to_owned(), ""),
        _ => Finding::ok("test", format!("{arrived} arrived")),
    }];
    found.extend(of(Outcome::Lost).map(|one| Finding::fault("test", format!("lost: {one}"), "")));
    let not_sent = |one: &Tested| Finding::warning("test", format!("not sent {one}"));
    found.extend(of(Outcome::NotSent).map(not_sent));
    found
}

impl Doctor {
    pub fn run(&self, config: Config) -> Result<(), Error> {
        let interface = config.interface.clone();
        let found = block_on(async {
            let mut found = findings(config.clone()).await?;
            if self.deep {
                found.extend(tested(config).await);
            }
            Ok::<_, ApiError>(found)
        })?;
        show(&found, interface, self.output)
    }
}

fn show(found: &[Finding], interface: String, output: Output) -> Result<(), Error> {
    if output.json {
        table::json_rows("findings", &found);
    } else {
        for (i, finding) in found.iter().enumerate() {
            let severity = match finding.severity.as_str() {
                "fault" => "FAULT",
                other => other,
            };
            line(&format!("{severity:<8}  {:<14}  {}", finding.about, finding.text));
            // Once for several that it is for.
            let again = found.get(i + 1).is_some_and(|next| next.remedy == finding.remedy);
            if let Some(remedy) = finding.remedy.as_ref().filter(|_| !again) {
                line(&format!("{:<26}  → {remedy}", ""));
            }
        }
    }
    let faults = found.iter().filter(|finding| finding.severity == "fault").count();
    if faults == 0 {
        return Ok(());
    }
    Err(Error::Unhealthy { interface, problems: table::counted(faults, "fault") })
}
