//! Records as lines of JSON, and as CSV.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};

use serde::{Deserialize, Serialize};

use crate::domain::client_record::{ClientRecord, IdentifiedBy};

/// Version of the format.
const SCHEMA: u32 = 1;

/// A format of files that people write and read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// service,by,client,topic: a client's group follows from the topic
    Csv,
    /// An object a line
    Json,
}

/// Why a text is no records.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("line {line}: {source}")]
    Line { line: usize, source: serde_json::Error },
    #[error("line {line}: {source}")]
    Unreadable { line: usize, source: io::Error },
    #[error("version {0} of the format; this build reads version {SCHEMA}")]
    Version(u32),
    #[error("it is truncated: the last line, with the number of records, is missing or wrong")]
    Truncated,
    #[error("record {number}: {source}")]
    Csv { number: usize, source: csv::Error },
}

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
struct Begin {
    mqtt_fwd_clients: u32,
}

/// The last line.
#[derive(Debug, Serialize, Deserialize)]
struct End {
    records: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct Row {
    service: String,
    by: IdentifiedBy,
    client: String,
    topic: String,
}

/// Writes lines of JSON, between a first and a last line that say so.
pub fn write_lines(records: &[ClientRecord], mut out: impl Write) -> io::Result<()> {
    let mut line = |value: String| writeln!(out, "{value}");
    line(serde_json::to_string(&Begin { mqtt_fwd_clients: SCHEMA })?)?;
    for record in records {
        line(serde_json::to_string(record)?)?;
    }
    line(serde_json::to_string(&End { records: records.len() })?)
}

/// Reads such lines; the first and the last one have to be there.
pub fn read_whole(reader: impl BufRead) -> Result<Vec<ClientRecord>, FormatError> {
    let lines = Lines::read(reader)?;
    if lines.begun && lines.ended == Some(lines.records.len()) {
        Ok(lines.records)
    } else {
        Err(FormatError::Truncated)
    }
}

#[derive(Default)]
struct Lines {
    records: Vec<ClientRecord>,
    begun: bool,
    /// The number in the last line.
    ended: Option<usize>,
}

impl Lines {
    fn read(reader: impl BufRead) -> Result<Self, FormatError> {
        let mut all = Self::default();
        for (line, text) in (1..).zip(reader.lines()) {
            let text = text.map_err(|source| FormatError::Unreadable { line, source })?;
            if text.trim().is_empty() {
                continue;
            }
            if let Ok(begin) = serde_json::from_str::<Begin>(&text) {
                if begin.mqtt_fwd_clients != SCHEMA {
                    return Err(FormatError::Version(begin.mqtt_fwd_clients));
                }
                all.begun = true;
            } else if let Ok(end) = serde_json::from_str::<End>(&text) {
                all.ended = Some(end.records);
            } else {
                let record = serde_json::from_str(&text);
                all.records.push(record.map_err(|source| FormatError::Line { line, source })?);
            }
        }
        Ok(all)
    }
}

/// Writes records for people.
pub fn export(records: &[ClientRecord], format: Format, out: impl Write) -> io::Result<()> {
    match format {
        Format::Json => write_lines(records, out),
        Format::Csv => {
            let mut csv = csv::Writer::from_writer(out);
            for record in records.iter().filter(|r| !r.topic.is_empty()).cloned() {
                let ClientRecord { service, by, client, topic, .. } = record;
                csv.serialize(Row { service, by, client, topic })?;
            }
            csv.flush()
        }
    }
}

/// Reads what people wrote.
pub fn import(format: Format, file: impl Read) -> Result<Vec<ClientRecord>, FormatError> {
    if format == Format::Json {
        return Ok(Lines::read(BufReader::new(file))?.records);
    }
    let mut csv = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(file);
    let record = |(number, row): (usize, csv::Result<Row>)| {
        let row = row.map_err(|source| FormatError::Csv { number, source })?;
        Ok(ClientRecord {
            service: row.service,
            by: row.by,
            client: row.client,
            topic: row.topic,
            groups: BTreeMap::new(),
            multi_group: false,
            for_relay: false,
            misjudged: false,
            group_changes: 0,
            age_s: 0,
        })
    };
    (1..).zip(csv.deserialize()).map(record).collect()
}
