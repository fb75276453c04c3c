//! `bundle`: what somebody needs who is asked for help, in one archive.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clap::Args;
use flate2::Compression;
use flate2::write::GzEncoder;
use tokio::process::Command;
use toml_edit::{DocumentMut, Item, Value};

use super::block_on;
use super::error::Error;
use super::table::line;
use crate::config::{Config, is_secret};
use crate::datapath::Datapath;
use crate::datapath::clients::clients;
use crate::datapath::flows::flows;
use crate::datapath::names::Names;
use crate::kernel;

/// For each command.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between the two times that counters are read.
const PAUSE: Duration = Duration::from_secs(5);
/// Of flows, and of clients.
const ROWS: usize = 100;

#[derive(Debug, Args)]
pub struct Bundle {
    /// The archive; default: mqtt-fwd-<time>.tar.gz in this directory
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Without addresses, client ids and topics of clients
    #[arg(long)]
    no_clients: bool,
}

/// A file of the archive: what it is, and its bytes, or why there are none.
struct Part {
    name: &'static str,
    what: &'static str,
    bytes: Result<Vec<u8>, String>,
}

/// Commands of this program: file, arguments, and what they say.
const OWN: [(&str, &[&str], &str); 9] = [
    ("check.json", &["check", "--json"], "what the configuration means"),
    ("status.json", &["status", "--json"], "chain, balancer, services, maps, problems"),
    ("doctor.json", &["doctor", "--json"], "what blocks packets"),
    ("diff.json", &["diff", "--json"], "what of the file is not in force"),
    ("reals.json", &["reals", "--json"], "brokers with their health"),
    ("groups.json", &["groups", "--json"], "groups with their traffic"),
    ("katran.txt", &["katran", "list"], "the balancer's own view"),
    ("katran-stats.txt", &["katran", "stats"], "and its statistics"),
    ("version.txt", &["--version"], "this program"),
];

/// Others, where they are installed.
const OTHERS: [(&str, &[&str], &str); 9] = [
    ("uname.txt", &["uname", "-a"], "the kernel"),
    ("link.txt", &["ip", "-details", "-statistics", "link"], "interfaces, with their XDP programs"),
    ("routes.txt", &["ip", "route", "show", "table", "all"], "routes"),
    ("neighbours.txt", &["ip", "neighbour"], "neighbours: the gateway"),
    ("bpf-programs.txt", &["bpftool", "prog", "show"], "all BPF programs"),
    ("bpf-maps.txt", &["bpftool", "map", "show"], "all BPF maps"),
    ("bpf-net.txt", &["bpftool", "net", "show"], "what is attached where"),
    ("journal.txt", &["journalctl", "--no-pager", "-n", "3000", "-u", "mqtt-fwd"], "the log"),
    ("pins.txt", &["ls", "-lR", "/sys/fs/bpf"], "what is pinned"),
];

impl Bundle {
    pub fn run(&self, file: &Path) -> Result<(), Error> {
        let now = chrono::DateTime::from_timestamp(crate::handover::keys::now().cast_signed(), 0);
        let now = now.unwrap_or_default().format("%Y%m%dT%H%M%SZ").to_string();
        let output = self.output.clone().unwrap_or_else(|| format!("mqtt-fwd-{now}.tar.gz").into());
        let failed = |source| Error::Io { what: output.display().to_string(), source };
        // Before anything is collected: a place where it cannot be written.
        let archive = File::options().write(true).create_new(true).mode(0o600).open(&output);
        let archive = archive.map_err(failed)?;
        let parts = block_on(async { Ok::<_, Error>(self.parts(file).await) })?;
        write(archive, &format!("mqtt-fwd-{now}"), &parts).map_err(failed)?;
        for part in &parts {
            line(&format!("{:<18} {}", part.name, described(part)));
        }
        line(&format!("\n{} is written; look at it before you send it", output.display()));
        Ok(())
    }

    async fn parts(&self, file: &Path) -> Vec<Part> {
        let me = std::env::current_exe().unwrap_or_else(|_| "mqtt-fwd".into());
        let own = async |arguments: &[&str]| {
            let mut command = Command::new(&me);
            command.arg("--config").arg(file).args(["--log", "warn"]).args(arguments);
            output(command).await
        };
        let mut parts = vec![Part {
            name: "config.toml",
            what: "the configuration, without passwords",
            bytes: without_secrets(file),
        }];
        let counters = "what packets met, twice, 5 s apart";
        let first = own(&["counters", "--json"]).await;
        parts.push(Part { name: "counters-1.json", what: counters, bytes: first });
        let begun = tokio::time::Instant::now();
        for (name, arguments, what) in OWN {
            parts.push(Part { name, what, bytes: own(arguments).await });
        }
        for (name, arguments, what) in OTHERS {
            let mut command = Command::new(arguments[0]);
            command.args(&arguments[1..]);
            parts.push(Part { name, what, bytes: output(command).await });
        }
        if !self.no_clients {
            let (flows, clients) = heads(file);
            parts.push(Part { name: "flows.json", what: "100 flows", bytes: flows });
            parts.push(Part { name: "clients.json", what: "100 clients", bytes: clients });
        }
        tokio::time::sleep_until(begun + PAUSE).await;
        let second = own(&["counters", "--json"]).await;
        parts.push(Part { name: "counters-2.json", what: counters, bytes: second });
        parts
    }
}

fn described(part: &Part) -> String {
    match &part.bytes {
        Ok(bytes) => format!("{} ({} B)", part.what, bytes.len()),
        Err(why) => format!("{}: not there, {why}", part.what),
    }
}

/// What a command prints; if that is nothing, what it complains of.
async fn output(mut command: Command) -> Result<Vec<u8>, String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(PATIENCE, command.output()).await {
        Ok(Ok(output)) if output.stdout.is_empty() => Ok(output.stderr),
        Ok(Ok(output)) => Ok(output.stdout),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no end in {} s", PATIENCE.as_secs())),
    }
}

/// The file, with comments as they are.
fn without_secrets(file: &Path) -> Result<Vec<u8>, String> {
    let text = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
    // One that cannot be read has secrets at places that nobody knows.
    let mut document: DocumentMut =
        text.parse().map_err(|e: toml_edit::TomlError| e.message().to_owned())?;
    document.iter_mut().for_each(|(key, item)| hide(key.get(), item));
    Ok(document.to_string().into_bytes())
}

fn hide(key: &str, item: &mut Item) {
    match item {
        Item::Table(table) => table.iter_mut().for_each(|(key, item)| hide(key.get(), item)),
        Item::ArrayOfTables(tables) => {
            for table in tables.iter_mut() {
                table.iter_mut().for_each(|(key, item)| hide(key.get(), item));
            }
        }
        Item::Value(value) => hide_value(key, value),
        Item::None => {}
    }
}

fn hide_value(key: &str, value: &mut Value) {
    match value {
        Value::InlineTable(table) => {
            table.iter_mut().for_each(|(key, value)| hide_value(key.get(), value));
        }
        Value::Array(values) => values.iter_mut().for_each(|value| hide_value(key, value)),
        _ if is_secret(key) => *value = "(removed)".into(),
        _ => {}
    }
}

/// The first flows and clients.
fn heads(file: &Path) -> (Result<Vec<u8>, String>, Result<Vec<u8>, String>) {
    let opened = || {
        let config = Config::load(file).map_err(|e| e.to_string())?;
        let datapath = Datapath::open(&config.pins()).map_err(|e| e.to_string())?;
        let names = Names::read(&config, &datapath).map_err(|e| e.to_string())?;
        Ok::<_, String>((datapath, names))
    };
    let (datapath, names) = match opened() {
        Ok(opened) => opened,
        Err(error) => return (Err(error.clone()), Err(error)),
    };
    (json(flows(&datapath, &names)), json(clients(&datapath, &names)))
}

fn json<T: serde::Serialize>(
    rows: kernel::Result<impl Iterator<Item = kernel::Result<T>>>,
) -> Result<Vec<u8>, String> {
    let rows = rows.and_then(|rows| rows.take(ROWS).collect::<kernel::Result<Vec<T>>>());
    serde_json::to_vec_pretty(&rows.map_err(|e| e.to_string())?).map_err(|e| e.to_string())
}

fn write(archive: File, directory: &str, parts: &[Part]) -> std::io::Result<()> {
    let mut archive = tar::Builder::new(GzEncoder::new(archive, Compression::default()));
    let list: Vec<String> =
        parts.iter().map(|part| format!("{:<18} {}\n", part.name, described(part))).collect();
    let list = list.concat().into_bytes();
    let files = parts.iter().filter_map(|part| Some((part.name, part.bytes.as_ref().ok()?)));
    for (name, bytes) in std::iter::once(("CONTENTS", &list)).chain(files) {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(crate::handover::keys::now());
        archive.append_data(&mut header, format!("{directory}/{name}"), &bytes[..])?;
    }
    archive.into_inner()?.finish()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_removed_wherever_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let text = "# kept\n[[service]]\nhealth_check = { type = \"mqtt\", username = \"u\", password = \"p4ss\" }\n\
                    [service.more]\nsecret_word = \"p4ss\"\n";
        std::fs::write(&file, text).unwrap();
        let kept = String::from_utf8(without_secrets(&file).unwrap()).unwrap();
        assert!(
            !kept.contains("p4ss") && kept.contains("# kept") && kept.contains("\"u\""),
            "{kept}"
        );
        assert_eq!(kept.matches("(removed)").count(), 2);
        std::fs::write(&file, "password = \"p4ss\"\n[").unwrap();
        assert!(without_secrets(&file).is_err());
    }
}
