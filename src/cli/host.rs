//! `host` and `veth-peer`: hosts beside the balancer.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use ipnet::IpNet;

use super::error::Error;
use super::table::{self, line};
use crate::broker_host;
use crate::config::{XdpMode, address};
use crate::kernel::{BpfError, decap, takeover};

#[derive(Debug, Args)]
pub struct Host {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Decapsulate the balancer's packets and answer as MQTT_VIP
    Up {
        /// Interface that the balancer's packets come in on
        #[arg(long)]
        interface: String,
        /// Address of a service; may be repeated
        #[arg(long = "vip", required = true, value_parser = address, value_name = "ADDRESS")]
        vips: Vec<IpAddr>,
        /// Network that the balancer's outer headers come from; may be repeated; default: 172.16.0.0/16 and 100::/64,
        /// as Katran and the embedded balancer send (Katran with GUE: the sources that it was told)
        #[arg(long = "from", value_parser = network, value_name = "NETWORK")]
        sources: Vec<IpNet>,
        /// How the decapsulating program runs
        #[arg(long, value_enum, default_value_t = Mode::Native)]
        xdp_mode: Mode,
        /// MSS to advertise to clients; default: what leaves room for the encapsulation; 0: leave routes alone
        #[arg(long, value_parser = advmss, value_name = "BYTES")]
        advmss: Option<u32>,
        /// UDP port of GUE, if Katran was built with another GUE_DPORT
        #[arg(long, default_value_t = 6080, value_parser = clap::value_parser!(u16).range(1..))]
        gue_port: u16,
        /// Take connections over (delayed binding): the balancer's handover key
        #[arg(long, value_name = "FILE")]
        handover_key: Option<PathBuf>,
        /// Answer the questions of a fleet of balancers: their handover key, whatever the binding
        #[arg(long, value_name = "FILE")]
        fleet_key: Option<PathBuf>,
        /// UDP port of those questions, as [fleet] has it
        #[arg(long, default_value_t = 18_830, value_parser = clap::value_parser!(u16).range(1..))]
        ask_port: u16,
        /// Mount point of bpffs
        #[arg(long, default_value = "/sys/fs/bpf")]
        bpffs: PathBuf,
    },
    /// Show the host's state; ends with 1 if something is wrong
    Status(Status),
    /// Say whether this kernel can take connections over, as delayed binding needs
    Probe,
    /// Undo `up`
    Down {
        /// The interface given to `up`
        #[arg(long)]
        interface: String,
        /// Mount point of bpffs
        #[arg(long, default_value = "/sys/fs/bpf")]
        bpffs: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Status {
    /// The interface given to `up`
    #[arg(long)]
    interface: String,
    /// The key file, to compare with what the programs hold
    #[arg(long, value_name = "FILE")]
    handover_key: Option<PathBuf>,
    /// Mount point of bpffs
    #[arg(long, default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
    #[command(flatten)]
    output: table::Output,
}

impl Status {
    fn run(&self) -> Result<(), Error> {
        let status = broker_host::status::status(
            &self.interface,
            &self.bpffs,
            self.handover_key.as_deref(),
        )?;
        if self.output.json {
            table::json(&status);
        } else {
            print(&self.interface, &status);
        }
        if status.problems.is_empty() {
            return Ok(());
        }
        Err(Error::Unhealthy {
            interface: self.interface.clone(),
            problems: status.problems.join("; "),
        })
    }
}

fn print(interface: &str, status: &broker_host::status::Status) {
    let vips: Vec<_> = status.vips.iter().map(ToString::to_string).collect();
    if status.unwraps {
        line(&format!("{interface}: decapsulates packets for {}", vips.join(", ")));
        line(&format!("balancers send from {}", status.sources.join(", ")));
    } else {
        line(&format!("{interface}: does not decapsulate packets"));
    }
    match (status.takes_over, status.key_epoch) {
        (true, Some(epoch)) => {
            line(&format!("takes connections over, key of epoch {epoch} in use"));
        }
        _ if status.can_take_over => {
            line("takes no connections over (`host up --handover-key FILE` does)");
        }
        _ => line("takes no connections over: this kernel cannot (Linux 6.9 or later can)"),
    }
    match (status.answers_fleet, status.asked_s) {
        (false, _) => {}
        (true, Some(s)) => {
            line(&format!("answers a fleet's questions; the last one came {s} s ago"));
        }
        (true, None) => line("answers a fleet's questions; none has come yet"),
    }
    for (text, count) in &status.counters {
        line(&format!("{count:10}  {text}"));
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    Native,
    Generic,
}

fn advmss(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(bytes @ (0 | 256..=9000)) => Ok(bytes),
        _ => Err("0, or 256 to 9000".to_owned()),
    }
}

/// An address alone is that address.
fn network(text: &str) -> Result<IpNet, String> {
    let parsed: Option<IpNet> =
        text.parse().ok().or_else(|| text.parse().ok().map(|addr: IpAddr| addr.into()));
    match parsed {
        Some(network) if network.trunc() == network => Ok(network),
        Some(network) => {
            Err(format!("has bits behind its prefix; did you mean {}?", network.trunc()))
        }
        None => Err("a network as 172.16.0.0/16, or an address".to_owned()),
    }
}

impl Host {
    pub fn run(self) -> Result<(), Error> {
        let done = match self.action {
            Action::Up {
                interface,
                vips,
                sources,
                xdp_mode,
                advmss,
                gue_port,
                handover_key,
                fleet_key,
                ask_port,
                bpffs,
            } => {
                let mode = match xdp_mode {
                    Mode::Native => XdpMode::Native,
                    Mode::Generic => XdpMode::Generic,
                };
                broker_host::up(&broker_host::BrokerHost {
                    interface,
                    vips,
                    sources,
                    mode,
                    gue_port,
                    bpffs,
                    handover_key,
                    fleet_key,
                    ask_port,
                    advmss,
                })?
            }
            Action::Status(args) => return args.run(),
            Action::Probe if takeover::supported() => {
                line("this kernel can take connections over");
                return Ok(());
            }
            Action::Probe => return Err(BpfError::NoTakeover.into()),
            Action::Down { interface, bpffs } => broker_host::down(&interface, &bpffs)?,
        };
        for what in &done {
            line(what);
        }
        if done.is_empty() {
            line("nothing to do");
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub struct VethPeer {
    /// The other end's interface, in this network namespace
    #[arg(long)]
    interface: String,
}

impl VethPeer {
    pub fn run(&self) -> Result<(), Error> {
        decap::veth_peer_up(&self.interface)?;
        line(&format!("{} takes what native XDP sends", self.interface));
        Ok(())
    }
}
