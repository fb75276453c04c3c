//! The command line. One file a subcommand; all it does itself is reading arguments and printing.

mod bundle;
mod chain;
mod change;
mod check;
mod clients;
mod doctor;
mod error;
mod events;
mod explain;
mod find;
mod fleet;
mod host;
mod katran;
mod keys;
mod reals;
mod replay;
mod run;
mod status;
mod table;
mod tables;
mod test;
#[cfg(feature = "top")]
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use self::error::{DONE, Error, USAGE};
use crate::api::{self, Run};
use crate::config::Config;

const DEFAULT_CONFIG: &str = "/etc/mqtt-fwd/config.toml";

#[derive(Debug, Parser)]
#[command(
    name = "mqtt-fwd",
    version,
    about = "MQTT load balancing by topic, at XDP speed, in front of Katran",
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.\n\
                  Start with `mqtt-fwd check`, then `mqtt-fwd run`. docs/ has the rest."
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
    /// Load, apply and watch, in the foreground; SIGHUP reloads the configuration
    Run,
    /// Run the embedded balancer alone, in the foreground
    Balancer,
    /// Run the relay, in the foreground: it routes each message to its group
    Relay,
    /// Check the configuration file and summarize it
    Check(table::Output),
    /// Show the state of chain, balancer and services, with counters
    Status(status::Show),
    /// Follow the packet path and report whatever blocks it
    Doctor(doctor::Doctor),
    /// Send messages to every broker, and report what arrived
    Test(test::Test),
    /// Show groups, reals, topics and clients on one screen, with rates
    #[cfg(feature = "top")]
    Top(top::Top),
    /// Show clients with their predictions; export and import them
    Clients(clients::Clients),
    /// Show flows with their groups: those that stand, and those that closed in the last minute
    Flows(table::Output),
    /// Show routes
    Routes(table::Output),
    /// Show groups with their reals and traffic
    Groups(table::Output),
    /// Show the fleet: members, who answers, and what became of other balancers' connections
    Fleet(table::Output),
    /// Show reals with their health
    Reals(table::Output),
    /// Show packet counters by reason
    Counters(tables::Counters),
    /// Print events as they happen: bound, learned, mispredicted, …
    Events(events::Events),
    /// Explain why a topic, client or flow goes where it goes
    Explain(explain::Explain),
    /// Replay a capture and report where each message would go
    Replay(replay::Replay),
    /// Show what differs between the file and the running state; exits with 1 if anything does
    Diff(table::Output),
    /// Load mqtt_fwd into the interface's XDP chain
    Load(chain::Load),
    /// Detach and unpin all programs, or only mqtt_fwd
    Unload(chain::Unload),
    /// Bring groups, reals, services and routes to what the file says
    Apply(run::Apply),
    /// Change routes, groups and reals at run time
    Change(change::Change),
    /// Stop sending new connections to a real; established ones continue
    Drain(reals::Drain),
    /// Put a drained real back into use
    Undrain(reals::Undrain),
    /// Show and change the balancer's VIPs, reals, weights and flags; show its statistics
    Katran(katran::Katran),
    /// Create, rotate and show the key that delayed binding shares with broker hosts
    Keys(keys::Keys),
    /// Prepare a broker host for direct server return, or undo it
    Host(host::Host),
    /// Attach a pass-all XDP program to a veth peer, so that XDP_TX reaches it
    VethPeer(host::VethPeer),
    /// Collect what somebody needs who is asked for help, in one archive
    Bundle(bundle::Bundle),
    /// Print the JSON Schema of the configuration, for editors
    Schema,
    /// Write the manual pages, one a command
    #[command(hide = true)]
    Man {
        /// Into this directory
        directory: PathBuf,
    },
    /// Print a shell's completions
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// The commands as `--help` lists them.
const GROUPS: [(&str, &[&str]); 5] = [
    ("Daemons", &["run", "balancer", "relay"]),
    (
        "Inspect",
        &[
            "check", "status", "doctor", "test", "top", "diff", "explain", "replay", "events",
            "counters", "flows", "clients", "routes", "groups", "reals", "fleet",
        ],
    ),
    ("Change", &["apply", "change", "drain", "undrain", "load", "unload", "katran"]),
    ("Broker hosts", &["host", "keys", "veth-peer"]),
    ("Other", &["bundle", "schema", "completions", "help"]),
];

/// The command line, with its commands under headings.
fn command() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    let mut list = String::new();
    for (heading, names) in GROUPS {
        let there = names.iter().filter_map(|name| command.find_subcommand(name));
        list.push_str(&format!("\n{heading}:\n"));
        for one in there {
            let about = one.get_about().map(ToString::to_string).unwrap_or_default();
            list.push_str(&format!("  {:<12} {about}\n", one.get_name()));
        }
    }
    Cli::command().help_template(format!(
        "{{about}}\n\n{{usage-heading}} {{usage}}\n{list}\nOptions:\n{{options}}\n\n{{after-help}}"
    ))
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // clap ends the process with 2 on wrong usage, and with 0 after --help.
    let parsed = Cli::from_arg_matches(&command().get_matches());
    let cli = parsed.unwrap_or_else(|error| error.exit());
    if let Err(problem) = crate::telemetry::init(&cli.log, cli.log_format) {
        table::complain(&problem);
        return USAGE.into();
    }
    match run(cli) {
        Ok(()) => DONE.into(),
        Err(error) => {
            table::complain(&error.to_string());
            error.exit_code().into()
        }
    }
}

fn run(cli: Cli) -> Result<(), Error> {
    let config = || Config::load(&cli.config);
    // A file that is wrong says nothing of what is in force.
    let known = || -> Result<Config, Error> {
        let error = match config() {
            Ok(config) => return Ok(config),
            Err(error) => error,
        };
        match block_on(api::in_force_by(&cli.config)) {
            Ok(Some(config)) => {
                table::complain(&format!("{error}\nwhat follows is what `run` works by"));
                Ok(config)
            }
            _ => Err(error.into()),
        }
    };
    // And that may have been changed since it was read from the file.
    let in_force = || -> Result<Config, Error> { block_on(api::in_force(known()?)) };
    match cli.command {
        Command::Check(output) => check::check(&config()?, output),
        Command::Load(args) => chain::load(&args, &config()?),
        Command::Unload(args) => args.run(&config()?),
        Command::Apply(args) => match config() {
            Ok(config) => args.run(&config),
            Err(error) => {
                if !args.is_dry_run() {
                    // What is wrong is said here already.
                    let _ = block_on(api::reload_by(&cli.config));
                }
                Err(error.into())
            }
        },
        Command::Diff(output) => run::diff(config()?, output),
        Command::Change(args) => args.run(&config()?),
        Command::Run => run::run(config()?),
        Command::Balancer => run::balancer(&config()?),
        Command::Status(args) => args.run(known()?),
        Command::Test(args) => args.run(&in_force()?),
        Command::Doctor(args) => args.run(known()?),
        Command::Clients(args) => args.run(&in_force()?),
        Command::Flows(output) => tables::flows(&in_force()?, output),
        Command::Routes(output) => {
            check::routes(&in_force()?, output);
            Ok(())
        }
        Command::Groups(output) => tables::groups(&in_force()?, output),
        Command::Reals(output) => reals::reals(&in_force()?, output),
        Command::Fleet(output) => fleet::fleet(&in_force()?, output),
        Command::Drain(args) => args.run(&in_force()?),
        Command::Undrain(args) => args.run(&in_force()?),
        Command::Counters(args) => args.run(&in_force()?),
        #[cfg(feature = "top")]
        Command::Top(args) => args.run(&in_force()?),
        Command::Events(args) => args.run(&in_force()?),
        Command::Explain(args) => args.run(&in_force()?),
        Command::Replay(args) => args.run(&config()?),
        Command::Katran(args) => args.run(config().map_err(Error::from)),
        Command::Keys(args) => args.run(),
        Command::Relay => crate::relay::run(&config()?).map_err(Error::from),
        Command::Host(args) => args.run(),
        Command::VethPeer(args) => args.run(),
        Command::Bundle(args) => args.run(&cli.config),
        Command::Schema => {
            table::line(&crate::config::schema::text());
            Ok(())
        }
        Command::Man { directory } => clap_mangen::generate_to(command(), &directory)
            .map_err(|source| Error::Io { what: directory.display().to_string(), source }),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command(), "mqtt-fwd", &mut text);
            table::line(String::from_utf8_lossy(&text).trim_end());
            Ok(())
        }
    }
}

/// What `run` says, and where there is none, what can be seen from here.
fn from_run_or<T>(
    config: &Config,
    ask: impl AsyncFnOnce(Run) -> api::Result<T>,
    here: impl AsyncFnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    block_on(async {
        match Run::find(config).await? {
            Some(run) => Ok(ask(run).await?),
            None => here().await,
        }
    })
}

/// Waits for what talks to `run` or the balancer.
fn block_on<T, E>(future: impl Future<Output = Result<T, E>>) -> Result<T, Error>
where
    Error: From<E>,
{
    Ok(executor()?.block_on(future)?)
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
        command().debug_assert();
    }

    #[test]
    fn help_lists_each_command_once() {
        let mut cli = Cli::command();
        cli.build();
        let shown = cli.get_subcommands().filter(|c| !c.is_hide_set()).map(clap::Command::get_name);
        let mut shown: Vec<_> = shown.collect();
        let mut listed: Vec<_> = GROUPS.iter().flat_map(|(_, names)| *names).copied().collect();
        shown.sort_unstable();
        listed.sort_unstable();
        assert_eq!(shown, listed);
    }
}
