//! The file that `run` writes.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter};
use std::path::Path;

use super::ClientsError;
use super::format::{read_whole, write_lines};
use crate::domain::client_record::ClientRecord;

/// Writes it, whole or not at all.
pub fn write(path: &Path, records: &[ClientRecord]) -> Result<(), ClientsError> {
    let write = || -> io::Result<()> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let beside = path.with_extension("new");
        let mut file = BufWriter::new(File::create(&beside)?);
        write_lines(records, &mut file)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| ClientsError::Io { path: path.to_owned(), source })
}

/// Reads it; one that is truncated, or of another version, is an error.
pub fn read(path: &Path) -> Result<Vec<ClientRecord>, ClientsError> {
    let file = File::open(path);
    let file = file.map_err(|source| ClientsError::Io { path: path.to_owned(), source })?;
    read_whole(BufReader::new(file))
        .map_err(|source| ClientsError::Format { path: path.to_owned(), source })
}
