//! `doctor`: what stands in the way of packets.

use super::block_on;
use super::error::Error;
use super::table::{self, Output, line};
use crate::api::{ApiError, Run};
use crate::config::Config;
use crate::inspect::Context;
use crate::inspect::doctor::{Finding, examine};

/// `run` looks, and where it does not answer or there is none, this process.
async fn findings(config: Config) -> Result<Vec<Finding>, ApiError> {
    match Run::find(&config).await {
        Ok(Some(mut run)) => run.diagnose().await,
        Ok(None) => Ok(examine(&Context::outside(config)).await),
        Err(silent @ ApiError::NotAnswering { .. }) => {
            let mut found = examine(&Context::outside(config)).await;
            found.push(Finding::fault("run", silent.to_string(), "systemctl restart mqtt-fwd"));
            Ok(found)
        }
        Err(error) => Err(error),
    }
}

pub fn doctor(config: Config, output: Output) -> Result<(), Error> {
    let interface = config.interface.clone();
    let found = block_on(findings(config))?;
    if output.json {
        table::json(&found);
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
