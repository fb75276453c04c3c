//! Logging: `tracing` to standard error, with libbpf's own messages in it.

use libbpf_rs::PrintLevel;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

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

/// The levels.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// A line's priority in the journal (sd-daemon(3)), in front of it.
struct Prioritized<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}

/// Whether standard error is the journal's (systemd.exec(5), JOURNAL_STREAM): device and inode.
fn is_journal() -> bool {
    use std::os::fd::AsFd as _;
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let stat = nix::sys::stat::fstat(std::io::stderr().as_fd());
    stat.is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Sets up logging. `filter` is a level or a `tracing` directive.
pub fn init(filter: &str, format: Format) -> Result<(), String> {
    // A word that is no level would be a target's name, and nothing else be logged, not even errors.
    if !filter.contains(['=', ',', '[']) && !LEVELS.contains(&filter.to_lowercase().as_str()) {
        let levels = LEVELS.join(", ");
        return Err(format!("--log {filter} (or MQTT_FWD_LOG): there are {levels}"));
    }
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
        // It has the time by itself.
        Format::Text if is_journal() => {
            log.without_time().with_level(false).map_event_format(Prioritized).init();
        }
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
