//! The command line. One file a subcommand; all it does itself is reading arguments and printing.

mod chain;
mod change;
mod check;
mod clients;
mod doctor;
mod explain;
mod katran;
mod keys;
mod real;
mod reals;
mod replay;
mod sidecar;
mod status;
mod table;
mod tables;
mod top;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::config::Config;
use crate::control::{Error, api};

const DEFAULT_CONFIG: &str = "/etc/mqtt-fwd/config.toml";

/// Done.
const DONE: u8 = 0;
/// Something failed that is not the user's input.
const FAILED: u8 = 1;
/// The command line or the configuration is wrong.
const USAGE: u8 = 2;

#[derive(Debug, Parser)]
#[command(
    name = "mqtt-fwd",
    version,
    about = "MQTT load balancing by topic, at XDP speed, in front of Katran",
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.\n\
                  Start with `mqtt-fwd check`, then `mqtt-fwd run`; docs/ has the rest."
)]
struct Cli {
    /// The configuration file
    #[arg(
        short,
        long,
        global = true,
        env = "MQTT_FWD_CONFIG",
        default_value = DEFAULT_CONFIG,
        value_name = "FILE"
    )]
    config: PathBuf,

    /// What to log to standard error: error, warn, info, debug or trace
    #[arg(long, global = true, env = "MQTT_FWD_LOG", default_value = "info", value_name = "LEVEL")]
    log: String,

    /// How to log
    #[arg(
        long,
        global = true,
        env = "MQTT_FWD_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT"
    )]
    log_format: crate::telemetry::Format,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check the configuration and say what it means
    Check,
    /// Put mqtt_fwd into the chain on the interface
    Load(chain::Load),
    /// Take programs and pins out again, or only mqtt_fwd
    Unload(chain::Unload),
    /// Bring groups, reals, services and routes to what the configuration says
    Apply(sidecar::Apply),
    /// Print what of the configuration file is not in force; ends with 1 if anything is not
    Diff,
    /// Change routes, groups and reals at run time
    Change(change::Change),
    /// Load, apply and watch, in the foreground; SIGHUP reloads the configuration
    Run,
    /// Run only the embedded balancer, in the foreground
    Balancer,
    /// Show chain, services, balancer and counters
    Status(status::Show),
    /// Look for what stands in packets' way: host, interface, chain, balancer, brokers, clients
    Doctor(table::Output),
    /// Show clients with their predictions; export and import them
    Clients(clients::Clients),
    /// Show flows with their groups
    Flows(table::Output),
    /// Show routes
    Routes(table::Output),
    /// Say why a topic, client or flow goes where it goes
    Explain(explain::Explain),
    /// Show groups with their reals and traffic
    Groups(table::Output),
    /// Show reals with the state of their checks
    Reals(table::Output),
    /// Give a real no new connections; established ones stay
    Drain(reals::Drain),
    /// Give it new connections again
    Undrain(reals::Undrain),
    /// Show what packets met, by reason
    Counters(tables::Counters),
    /// Show groups, reals, topics and clients of several groups on one screen, with rates
    Top(top::Top),
    /// Print events as they happen: bound, learned, mispredicted, …
    Trace(trace::Trace),
    /// Say what would become of captured traffic: which group gets what, what is lost and why
    Replay(replay::Replay),
    /// Show and change what the balancer holds: VIPs, reals, weights, flags, statistics
    Katran(katran::Katran),
    /// Make, change and show the key that delayed binding shares with the broker hosts
    Keys(keys::Keys),
    /// Run the relay, in the foreground: every message its group, many brokers as one
    Relay,
    /// Prepare a broker host for direct server return, or undo it
    Real(real::Real),
    /// Make the other end of a veth pair take what a native XDP program sends
    VethPeer(real::VethPeer),
    /// Print the manual page
    #[command(hide = true)]
    Man,
    /// Print a shell's completions
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // clap ends the process with 2 on wrong usage, and with 0 after --help.
    let cli = Cli::parse();
    if let Err(problem) = crate::telemetry::init(&cli.log, cli.log_format) {
        table::complain(&problem);
        return USAGE.into();
    }
    match run(cli) {
        Ok(()) => DONE.into(),
        Err(error) => {
            table::complain(&error.to_string());
            exit_code(&error).into()
        }
    }
}

fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Config(_) | Error::Edit(_) | Error::Refused(_) | Error::Key(_) => USAGE,
        _ => FAILED,
    }
}

fn run(cli: Cli) -> Result<(), Error> {
    let config = || Config::load(&cli.config);
    // What `run` works by may have been changed since it was read from the file.
    let in_force = || -> Result<Config, Error> {
        let config = config()?;
        Ok(block_on(async { Ok(api::in_force(&config).await) })?.unwrap_or(config))
    };
    match cli.command {
        Command::Check => check::check(&config()?),
        Command::Load(args) => chain::load(&args, &config()?),
        Command::Unload(args) => args.run(&config()?),
        Command::Apply(args) => args.run(&config()?),
        Command::Diff => sidecar::diff(&config()?),
        Command::Change(args) => args.run(&config()?),
        Command::Run => sidecar::run(config()?),
        Command::Balancer => sidecar::balancer(&config()?),
        Command::Status(args) => args.run(&in_force()?),
        Command::Doctor(output) => doctor::doctor(&in_force()?, output),
        Command::Clients(args) => args.run(&in_force()?),
        Command::Flows(output) => tables::flows(&in_force()?, output),
        Command::Routes(output) => {
            check::routes(&in_force()?, output);
            Ok(())
        }
        Command::Groups(output) => tables::groups(&in_force()?, output),
        Command::Reals(output) => reals::reals(&in_force()?, output),
        Command::Drain(args) => args.run(&in_force()?),
        Command::Undrain(args) => args.run(&in_force()?),
        Command::Counters(args) => args.run(&in_force()?),
        Command::Top(args) => args.run(&in_force()?),
        Command::Trace(args) => args.run(&in_force()?),
        Command::Explain(args) => args.run(&in_force()?),
        Command::Replay(args) => args.run(&config()?),
        Command::Katran(args) => args.run(config().map_err(Error::from)),
        Command::Keys(args) => args.run(),
        Command::Relay => crate::relay::run(&config()?).map_err(Error::from),
        Command::Real(args) => args.run(),
        Command::VethPeer(args) => args.run(),
        Command::Man => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Cli::command())
                .render(&mut text)
                .map_err(|source| Error::Io { what: "the manual page".to_owned(), source })?;
            table::line(String::from_utf8_lossy(&text).trim_end());
            Ok(())
        }
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "mqtt-fwd", &mut text);
            table::line(String::from_utf8_lossy(&text).trim_end());
            Ok(())
        }
    }
}

/// What `run` says, and where there is none, what can be seen from here.
fn or_here<T>(
    from_run: impl Future<Output = Result<Option<T>, Error>>,
    here: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    block_on(from_run)?.map_or_else(here, Ok)
}

/// Waits for what talks to `run` or the balancer.
fn block_on<T>(future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    executor()?.block_on(future)
}

fn executor() -> Result<tokio::runtime::Runtime, Error> {
    // There is little to do at a time, and machines may have many processors.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| Error::Io { what: "starting the executor".to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
