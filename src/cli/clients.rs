//! `clients`: what is known of them, as a table, out of the maps and into them.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read};
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::table::{self, Output, age, mark};
use super::{block_on, or_here};
use crate::config::Config;
use crate::control::known::{self, Format, Known};
use crate::control::view::{self, Names};
use crate::control::{Error, api};
use crate::datapath::Datapath;

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
    /// Print what is known of all clients, those learned last first
    Export {
        #[arg(long, value_enum, default_value = "csv")]
        format: Format,
    },
    /// Make clients known, so that their first connections go where they belong; what the datapath has
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
        let datapath = || Datapath::open(&config.pins());
        match self.what {
            None => show(config, self.output),
            Some(What::Export { format }) => {
                let records = match block_on(api::export_clients(config))? {
                    Some(records) => records
                        .into_iter()
                        .map(Known::try_from)
                        .collect::<Result<_, _>>()
                        .map_err(Error::Refused)?,
                    None => known::collect(config, &datapath()?, usize::MAX)?,
                };
                let mut text = Vec::new();
                known::export(&records, format, &mut text)
                    .map_err(|source| Error::Io { what: "the export".to_owned(), source })?;
                table::line(String::from_utf8_lossy(&text).trim_end());
                Ok(())
            }
            Some(What::Import { file, format }) => {
                let name = file.display().to_string();
                let opened: io::Result<Box<dyn Read>> = if name == "-" {
                    Ok(Box::new(io::stdin()))
                } else {
                    File::open(&file).map(|file| Box::new(file) as Box<dyn Read>)
                };
                let of_file = |source| Error::Io { what: name.clone(), source };
                let mut reader = BufReader::new(opened.map_err(of_file)?);
                let begin = reader.fill_buf().map_err(of_file)?.first();
                let found = if begin == Some(&b'{') { Format::Json } else { Format::Csv };
                let format = format.unwrap_or(found);
                let records = known::import(config, format, reader).map_err(|why| {
                    Error::Refused(format!("{name}: {why}; nothing was imported"))
                })?;
                let done = match block_on(api::import_clients(config, &records))? {
                    Some(done) => done,
                    None => known::restore(config, &datapath()?, records)?,
                };
                let instead = match done.without_group {
                    0 => String::new(),
                    n => format!(", {n} whose groups are not in force (`mqtt-fwd apply`)"),
                };
                table::line(&format!(
                    "{} clients made known; {} were already{instead}",
                    done.added, done.known_already
                ));
                Ok(())
            }
        }
    }
}

fn show(config: &Config, output: Output) -> Result<(), Error> {
    let rows = or_here(api::clients(config), || {
        let datapath = Datapath::open(&config.pins())?;
        view::clients(&datapath, &Names::read(config, &datapath)?)?.collect()
    })?;
    if output.json {
        table::json(&rows);
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
