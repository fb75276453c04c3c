//! `clients`: what is known of them, as a table, out of the maps and into them.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::error::Error;
use super::from_run_or;
use super::table::{self, Output, age, mark};
use crate::clients::ClientsError;
use crate::clients::format::{Format, export, import};
use crate::clients::validate::validate;
use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::clients::{Client, clients, restore, snapshot};
use crate::datapath::names::Names;
use crate::domain::client_record::ClientRecord;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Clients {
    #[command(flatten)]
    output: Output,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Print all clients' records, those learned last first
    Export {
        #[arg(long, value_enum, default_value = "csv")]
        format: Format,
    },
    /// Import records, so that clients' first connections go where they belong; what the datapath has
    /// learned itself stays
    Import {
        /// Columns service, by (address or client_id), client, topic; or lines as "export --format json"
        /// prints them; -: standard input
        file: PathBuf,
        /// Default: as the file begins
        #[arg(long, value_enum)]
        format: Option<Format>,
    },
}

impl Clients {
    pub fn run(self, config: &Config) -> Result<(), Error> {
        match self.what {
            None => show(config, self.output),
            Some(What::Export { format }) => {
                let records = from_run_or(
                    config,
                    async |mut run| run.export_clients().await,
                    async || Ok(snapshot(config, &Datapath::open(&config.pins())?, usize::MAX)?),
                )?;
                let mut text = Vec::new();
                export(&records, format, &mut text)
                    .map_err(|source| Error::Io { what: "the export".to_owned(), source })?;
                table::data(String::from_utf8_lossy(&text).trim_end());
                Ok(())
            }
            Some(What::Import { file, format }) => {
                let records = read(&file, format)?;
                validate(config, &records).map_err(ClientsError::from)?;
                let done = from_run_or(
                    config,
                    async |mut run| run.import_clients(&records).await,
                    async || {
                        Ok(restore(config, &Datapath::open(&config.pins())?, records.clone())?)
                    },
                )?;
                let instead = match done.without_group {
                    0 => String::new(),
                    n => format!(", {n} whose groups are not in force (`mqtt-fwd apply`)"),
                };
                let stayed = done.added - done.did_not_fit;
                let lost = match done.did_not_fit {
                    0 => String::new(),
                    n => format!(
                        ", {n} found no place beside the others (raise [maps] clients or client_ids)"
                    ),
                };
                table::line(&format!(
                    "{stayed} clients imported; {} had been learned already{instead}{lost}",
                    done.already_learned
                ));
                Ok(())
            }
        }
    }
}

fn read(path: &Path, format: Option<Format>) -> Result<Vec<ClientRecord>, Error> {
    let opened: io::Result<Box<dyn Read>> = if path == Path::new("-") {
        Ok(Box::new(io::stdin()))
    } else {
        File::open(path).map(|file| Box::new(file) as Box<dyn Read>)
    };
    let failed = |source| ClientsError::Io { path: path.to_owned(), source };
    let mut reader = BufReader::new(opened.map_err(failed)?);
    let begin = reader.fill_buf().map_err(failed)?.first();
    let found = if begin == Some(&b'{') { Format::Json } else { Format::Csv };
    let records = import(format.unwrap_or(found), reader)
        .map_err(|source| ClientsError::Format { path: path.to_owned(), source })?;
    Ok(records)
}

fn show(config: &Config, output: Output) -> Result<(), Error> {
    let rows: Vec<Client> = from_run_or(
        config,
        async |mut run| run.clients().await,
        async || {
            let datapath = Datapath::open(&config.pins())?;
            let names = Names::read(config, &datapath)?;
            Ok(clients(&datapath, &names)?.collect::<Result<_, _>>()?)
        },
    )?;
    if output.json {
        table::json_rows("clients", &rows);
        return Ok(());
    }
    table::print(
        &["service", "client", "by", "last topic", "group", ">age", ">hits", ">misses", "remark"],
        rows.into_iter().map(|r| {
            vec![
                r.service,
                r.client,
                r.by,
                r.topic,
                r.group,
                age(r.age_s),
                r.hits.to_string(),
                r.misses.to_string(),
                match (r.multi_group, r.misjudged, r.group_changes) {
                    (true, ..) => "multi-group".to_owned(),
                    (_, true, _) => "not by id alone".to_owned(),
                    (_, _, n) => mark(n > 0, "changed groups"),
                },
            ]
        }),
    );
    Ok(())
}
