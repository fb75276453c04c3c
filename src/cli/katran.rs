//! `katran`: the balancer's own view, whichever balancer it is.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::error::Error;
use super::table::{self, Output, line};
use super::{DEFAULT_CONFIG, block_on};
use crate::balancer::client::{Client, Stats};
use crate::balancer::flags::{flag, flag_names};
use crate::balancer::{VerbatimVip, by_hand, listeners};
use crate::config::{Config, ConfigError, address, endpoint, mac};
use crate::domain::vip::mac_text;

#[derive(Debug, Args)]
pub struct Katran {
    /// Where the balancer listens; default: as the configuration says
    #[arg(long, global = true, value_parser = endpoint, value_name = "ENDPOINT")]
    endpoint: Option<String>,

    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// VIPs with their flags and reals
    List(Output),
    /// Packets and bytes, in all and of each VIP
    Stats(Output),
    /// Show the gateway's MAC address, or change it
    Mac {
        /// The new one
        #[arg(value_parser = mac, value_name = "MAC")]
        set: Option<[u8; 6]>,
    },
    /// Add a VIP, or give it flags
    AddVip {
        /// ADDRESS:PORT, with /udp for UDP
        vip: VerbatimVip,
        /// Flags by name (see `list`) or number; may be repeated
        #[arg(long = "flag", value_parser = flag, value_name = "FLAG")]
        flags: Vec<u32>,
    },
    /// Take flags from a VIP
    ClearFlags {
        /// ADDRESS:PORT
        vip: VerbatimVip,
        /// Flags by name or number; may be repeated
        #[arg(long = "flag", required = true, value_parser = flag, value_name = "FLAG")]
        flags: Vec<u32>,
    },
    /// Remove a VIP, which is the only way to stop its traffic
    DelVip { vip: VerbatimVip },
    /// Add a real to a VIP, or change its weight
    AddReal {
        /// ADDRESS:PORT
        vip: VerbatimVip,
        /// Address of the real, without a port
        #[arg(value_parser = address)]
        real: IpAddr,
        /// Its weight, the share of new connections, 1 to 1000
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
        weight: u32,
    },
    /// Take a real out of a VIP; its established connections stay
    DelReal {
        /// ADDRESS:PORT
        vip: VerbatimVip,
        /// Address of the real, without a port
        real: IpAddr,
    },
}

impl Katran {
    pub fn run(self, config: Result<Config, Error>) -> Result<(), Error> {
        let endpoint = match (&self.endpoint, &config) {
            // Without a configuration there are no MQTT groups; a broken one may have some.
            (Some(endpoint), Ok(_)) => endpoint.clone(),
            (Some(endpoint), Err(Error::Config(ConfigError::Unreadable { path, .. })))
                if path == Path::new(DEFAULT_CONFIG) =>
            {
                endpoint.clone()
            }
            (None, Ok(config)) => config.balancer_endpoint.clone(),
            (_, Err(_)) => return config.map(drop),
        };
        let changed = match &self.action {
            Action::List(_) | Action::Stats(_) | Action::Mac { .. } => None,
            Action::AddVip { vip, .. }
            | Action::ClearFlags { vip, .. }
            | Action::DelVip { vip }
            | Action::AddReal { vip, .. }
            | Action::DelReal { vip, .. } => Some(vip),
        };
        if let (Some(verbatim), Ok(config)) = (changed, &config) {
            by_hand::refuse_groups(verbatim, config)?;
        }
        block_on(async {
            let mut client = Client::connect(&endpoint).await?;
            self.action.run(&mut client).await as Result<(), Error>
        })
        .map_err(|error| match listeners::listeners(&endpoint).as_slice() {
            [] | [_] => error,
            several => Error::Failed(format!(
                "{error}; {} servers listen at {endpoint}, each with a state of its own, and any of \
                 them gets a call: {}",
                several.len(),
                several.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            )),
        })
    }
}

#[derive(Serialize)]
struct VipRow {
    vip: String,
    flags: String,
    reals: BTreeMap<IpAddr, u32>,
    packets: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Totals {
    packets: u64,
    lru_misses: u64,
    misses_syn: u64,
    misses_other: u64,
    fallback_table: u64,
    icmp_too_big_v4: u64,
    icmp_too_big_v6: u64,
    vips: Vec<VipRow>,
}

impl Action {
    async fn run(self, client: &mut Client) -> Result<(), Error> {
        match self {
            Self::List(output) => list(client, output).await,
            Self::Stats(output) => stats(client, output).await,
            Self::Mac { set: None } => {
                line(&client.mac().await?);
                Ok(())
            }
            Self::Mac { set: Some(mac) } => {
                by_hand::set_mac(client, mac).await?;
                line(&format!("gateway's MAC address is {}", mac_text(mac)));
                Ok(())
            }
            Self::AddVip { vip, flags } => {
                let vip = by_hand::canonical(&vip)?;
                let now = by_hand::add(client, vip, all_of(flags)).await?;
                line(&format!("{vip} has flags {}", flag_names(now)));
                Ok(())
            }
            Self::ClearFlags { vip, flags } => {
                let vip = by_hand::canonical(&vip)?;
                let now = by_hand::clear_flags(client, vip, all_of(flags)).await?;
                line(&format!("{vip} has flags {}", flag_names(now)));
                Ok(())
            }
            Self::DelVip { vip } => {
                if let Some(other) = by_hand::delete(client, vip.clone()).await? {
                    line(&format!(
                        "{other} is rewritten, as the two had one entry in the datapath"
                    ));
                }
                line(&format!("{vip} is removed"));
                Ok(())
            }
            Self::AddReal { vip, real, weight } => {
                let vip = by_hand::canonical(&vip)?;
                by_hand::add_real(client, vip, real, weight).await?;
                line(&format!("{vip} has {real} with weight {weight}"));
                Ok(())
            }
            Self::DelReal { vip, real } => {
                let vip = by_hand::canonical(&vip)?;
                by_hand::delete_real(client, vip, real).await?;
                line(&format!(
                    "{vip} has no {real} any more; its established connections stay there"
                ));
                Ok(())
            }
        }
    }
}

fn all_of(flags: Vec<u32>) -> u32 {
    flags.into_iter().fold(0, |all, flag| all | flag)
}

async fn rows(client: &mut Client) -> Result<Vec<VipRow>, Error> {
    let mut rows = Vec::new();
    for (vip, verbatim) in client.verbatim_vips().await? {
        if !verbatim.is_canonical() {
            // Asked for by its canonical text, it would be unknown.
            rows.push(VipRow {
                vip: format!("{verbatim} (not canonical)"),
                flags: "?".to_owned(),
                reals: BTreeMap::new(),
                packets: 0,
                bytes: 0,
            });
            continue;
        }
        let Stats { v1: packets, v2: bytes } = client.vip_stats(vip).await?;
        let (flags, reals) = (client.vip_flags(vip).await?, client.reals(vip).await?);
        rows.push(VipRow { vip: vip.to_string(), flags: flag_names(flags), reals, packets, bytes });
    }
    rows.sort_by(|a, b| a.vip.cmp(&b.vip));
    Ok(rows)
}

async fn list(client: &mut Client, output: Output) -> Result<(), Error> {
    let rows = rows(client).await?;
    if output.json {
        table::json_rows("vips", &rows);
        return Ok(());
    }
    let lines = rows.into_iter().flat_map(|row| {
        // The VIP's name stands beside its first real only.
        let mut head = (row.vip, row.flags);
        let none = row.reals.is_empty().then(|| ("-".to_owned(), "-".to_owned()));
        let reals =
            row.reals.into_iter().map(|(real, weight)| (real.to_string(), weight.to_string()));
        reals
            .chain(none)
            .map(move |(real, weight)| {
                let (vip, flags) = std::mem::take(&mut head);
                vec![vip, flags, real, weight]
            })
            .collect::<Vec<_>>()
    });
    table::print(&["vip", "flags", "real", ">weight"], lines);
    Ok(())
}

async fn stats(client: &mut Client, output: Output) -> Result<(), Error> {
    let (lru, miss) = (client.lru_stats().await?, client.lru_miss_stats().await?);
    let (fallback, too_big) =
        (client.lru_fallback_stats().await?, client.icmp_too_big_stats().await?);
    let totals = Totals {
        packets: lru.v1,
        lru_misses: lru.v2,
        misses_syn: miss.v1,
        misses_other: miss.v2,
        fallback_table: fallback.v1,
        icmp_too_big_v4: too_big.v1,
        icmp_too_big_v6: too_big.v2,
        vips: rows(client).await?,
    };
    if output.json {
        table::json(&totals);
        return Ok(());
    }
    table::print(
        &["of all VIPs", ">count", "meaning"],
        [
            ("packets", totals.packets, "all of them"),
            ("lru_miss", totals.lru_misses, "packets whose connection is in no table"),
            ("lru_miss_syn", totals.misses_syn, "of these: new connections"),
            (
                "lru_miss_other",
                totals.misses_other,
                "of these: others; the table is too small, or new",
            ),
            (
                "lru_fallback",
                totals.fallback_table,
                "packets on CPUs that have no table of their own",
            ),
            ("icmp_too_big_v4", totals.icmp_too_big_v4, "answers that a packet is too big"),
            ("icmp_too_big_v6", totals.icmp_too_big_v6, "the same for IPv6"),
        ]
        .map(|(name, n, meaning)| vec![name.to_owned(), n.to_string(), meaning.to_owned()]),
    );
    line("");
    table::print(
        &["vip", ">packets", ">bytes"],
        totals
            .vips
            .into_iter()
            .map(|row| vec![row.vip, row.packets.to_string(), row.bytes.to_string()]),
    );
    Ok(())
}
