//! `keys`: the secret of delayed binding.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::error::Error;
use super::table::{self, Output, age};
use crate::handover::keys::{KeyFile, now};

#[derive(Debug, Args)]
pub struct Keys {
    #[command(subcommand)]
    action: Action,

    /// The key file
    #[arg(
        long,
        global = true,
        env = "MQTT_FWD_HANDOVER_KEY",
        default_value = "/etc/mqtt-fwd/handover.key",
        value_name = "FILE"
    )]
    file: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make the first key
    New,
    /// Add a key to be used from later on; the one in use stays valid until the next rotation
    Rotate {
        /// Seconds until balancers use it: time to copy the file to all hosts
        #[arg(long, default_value_t = 600, value_name = "SECONDS")]
        after: u64,
    },
    /// Show epochs, fingerprints and ages
    Show(Output),
}

#[derive(Serialize)]
struct Row {
    epoch: u32,
    fingerprint: String,
    age_s: u64,
    state: String,
}

impl Keys {
    pub fn run(self) -> Result<(), Error> {
        let (file, output) = match self.action {
            Action::New => (KeyFile::create(&self.file)?, None),
            Action::Rotate { after } => (KeyFile::rotate(&self.file, after)?, None),
            Action::Show(output) => (KeyFile::read(&self.file)?, Some(output)),
        };
        let at = now();
        let in_use = file.in_use(at).epoch;
        let rows: Vec<Row> = file
            .keys()
            .iter()
            .map(|key| Row {
                epoch: key.epoch,
                fingerprint: key.fingerprint(),
                age_s: at.saturating_sub(key.made),
                state: match key.use_from.saturating_sub(at) {
                    _ if key.epoch == in_use => "in use".to_owned(),
                    0 => "accepted".to_owned(),
                    seconds => format!("accepted; in use in {seconds} s"),
                },
            })
            .collect();
        if output.is_some_and(|output| output.json) {
            table::json_rows("keys", &rows);
            return Ok(());
        }
        table::print(
            &[">epoch", "fingerprint", ">age", "state"],
            rows.into_iter()
                .map(|r| vec![r.epoch.to_string(), r.fingerprint, age(r.age_s), r.state]),
        );
        Ok(())
    }
}
