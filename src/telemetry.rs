//! Logging: `tracing` to standard error, with libbpf's own messages in it.

use libbpf_rs::PrintLevel;
use tracing_subscriber::EnvFilter;

/// How many of the verifier's last lines are shown without asking.
const VERIFIER_TAIL: usize = 8;

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people
    Text,
    /// An object a line
    Json,
}

/// Sets up logging. `filter` is a level or a `tracing` directive.
pub fn init(filter: &str, format: Format) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|e| format!("--log {filter}: {e}; write a level such as info or debug"))?;
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(terminal)
        // It would report that standard error cannot be written, to standard error, and panic.
        .log_internal_errors(false);
    match format {
        Format::Text => log.init(),
        Format::Json => log.json().init(),
    }
    libbpf_rs::set_print(Some((PrintLevel::Debug, from_libbpf)));
    Ok(())
}

#[allow(clippy::needless_pass_by_value)] // libbpf-rs' signature
fn from_libbpf(level: PrintLevel, message: String) {
    let message = message.trim_end();
    if message.contains("BEGIN PROG LOAD LOG") {
        // The verifier tells its way from the start; the reason is at the end.
        let lines: Vec<&str> =
            message.lines().filter(|l| !l.contains("PROG LOAD LOG --")).collect();
        let tail = lines.len().saturating_sub(VERIFIER_TAIL);
        tracing::debug!("verifier:\n{}", lines[..tail].join("\n"));
        tracing::error!("verifier: {}", lines[tail..].join("\n"));
        return;
    }
    match level {
        PrintLevel::Warn => tracing::warn!("{message}"),
        PrintLevel::Info => tracing::info!("{message}"),
        PrintLevel::Debug => tracing::trace!("{message}"),
    }
}
