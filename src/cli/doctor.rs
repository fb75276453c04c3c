//! `doctor`: what stands in the way of packets.

use super::block_on;
use super::table::{self, Output, complain, line};
use crate::config::Config;
use crate::control::doctor::examine;
use crate::control::{Error, api};

pub fn doctor(config: &Config, output: Output) -> Result<(), Error> {
    let found = block_on(async {
        match api::diagnose(config).await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(error) => complain(&format!("{error}; looking from here instead")),
        }
        Ok(examine(config).await)
    })?;
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
    Err(Error::Unhealthy {
        interface: config.interface.clone(),
        problems: table::counted(faults, "fault"),
    })
}
