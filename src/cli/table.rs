//! Tables for people, JSON for programs.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table};
use serde::Serialize;

/// How to print.
#[derive(Debug, Args, Clone, Copy)]
pub struct Output {
    /// Print JSON instead of a table
    #[arg(long, global = true)]
    pub json: bool,
}

/// Of all JSON that is one value: it changes when a field goes or means something else.
const SCHEMA: u32 = 1;

#[derive(Serialize)]
struct Versioned<'a, T> {
    schema: u32,
    #[serde(flatten)]
    value: &'a T,
}

/// Prints rows as JSON, under a name.
pub fn json_rows(name: &str, rows: &impl Serialize) {
    json(&BTreeMap::from([(name, rows)]));
}

/// Prints a value with fields as JSON.
pub fn json(value: &impl Serialize) {
    match serde_json::to_string_pretty(&Versioned { schema: SCHEMA, value }) {
        Ok(text) => line(&text),
        Err(e) => complain(&e.to_string()),
    }
}

/// Prints a line. Client ids and topics are strangers' words: what would move a terminal's cursor is escaped.
pub fn line(text: &str) {
    verbatim(&printable(text));
}

/// The text with control characters, and those that turn the direction of writing, escaped.
fn printable(text: &str) -> Cow<'_, str> {
    let turns = |c: char| matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let is_hidden = |c: char| (c.is_control() && c != '\n') || turns(c);
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut all = String::new();
    for c in text.chars() {
        if is_hidden(c) {
            all.extend(c.escape_default());
        } else {
            all.push(c);
        }
    }
    Cow::Owned(all)
}

/// Prints what programs read, as it is; a terminal gets it as [`line`] does.
pub fn data(text: &str) {
    if std::io::stdout().is_terminal() { line(text) } else { verbatim(text) }
}

/// A reader that went away (`| head`) is no error; a full disk is.
fn verbatim(text: &str) {
    use std::io::Write as _;
    if is_closed() {
        complain("standard output is closed");
        std::process::exit(i32::from(super::error::FAILED));
    }
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => {
            complain(&format!("writing to standard output: {e}"));
            std::process::exit(i32::from(super::error::FAILED));
        }
    }
}

/// Whether this process was started without a standard output. Rust's runtime opens /dev/null in its place before
/// `main`; what looks here comes before that.
fn is_closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}

static CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look_at_stdout() {
    // SAFETY: it takes any number for a descriptor.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    CLOSED.store(flags == -1, Ordering::Relaxed);
}

// SAFETY: the C library calls what stands there before `main`, and the function needs nothing of Rust's runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_AT_STDOUT: extern "C" fn() = look_at_stdout;

/// Prints a line to standard error, if that can be written.
pub fn complain(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "mqtt-fwd: {}", printable(text));
}

/// Prints a table without frames: columns that line up, as `ss` and `kubectl` print them.
/// A column whose name begins with `>` is aligned to the right.
pub fn print(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|c| Cell::new(c.trim_start_matches('>').to_uppercase())));
    let mut any = false;
    for row in rows {
        table.add_row(row);
        any = true;
    }
    for (i, name) in columns.iter().enumerate() {
        if let Some(column) = table.column_mut(i) {
            column.set_padding((0, 2));
            if name.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    for text in table.lines() {
        line(text.trim_end());
    }
    if !any {
        line("(none)");
    }
}

/// A flag of a table's row.
pub fn mark(is: bool, text: &str) -> String {
    if is { text.to_owned() } else { "-".to_owned() }
}

/// A number of things.
pub fn counted(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// The time of day (UTC) of seconds since 1970-01-01T00:00:00Z.
pub fn time_of_day(seconds: f64) -> String {
    let time = chrono::DateTime::from_timestamp_micros((seconds * 1e6) as i64).unwrap_or_default();
    time.format("%H:%M:%S%.3f").to_string()
}

/// Seconds as people say them.
pub fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::{age, printable};

    #[test]
    fn strangers_words_do_not_move_the_cursor() {
        assert_eq!(printable("sensor/ä ✓\nnext"), "sensor/ä ✓\nnext");
        assert_eq!(printable("a\u{1b}[2Jb\r\u{202e}c\0"), "a\\u{1b}[2Jb\\r\\u{202e}c\\u{0}");
    }

    #[test]
    fn ages_have_two_units() {
        assert_eq!(age(59), "59s");
        assert_eq!(age(61), "1m01s");
        assert_eq!(age(3 * 3600 + 62), "3h01m");
        assert_eq!(age(86_400 * 2 + 3600), "2d01h");
    }
}
