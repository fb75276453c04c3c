//! `katran`: the balancer's own view, whichever balancer it is.
//! What it changes is checked before, and read back after: Katran is silent about failures.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::table::{self, Output, line};
use super::{DEFAULT_CONFIG, block_on};
use crate::balancer::client::{BalancerError, Client, Stats};
use crate::balancer::listeners;
use crate::balancer::{VerbatimVip, Vip, mac_text};
use crate::config::{Config, ConfigError, address, endpoint, mac};
use crate::control::Error;
use crate::control::reconcile::plan;

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
        /// Its share of new connections, 1 to 1000
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

/// Katran's names, and ours.
const FLAGS: [(&str, u32); 11] = [
    ("NO_SRC_PORT", 1 << 0),
    ("NO_LRU", 1 << 1),
    ("QUIC_VIP", 1 << 2),
    ("DPORT_HASH", 1 << 3),
    ("SRC_ROUTING", 1 << 4),
    ("LOCAL_VIP", 1 << 5),
    ("GLOBAL_LRU", 1 << 6),
    ("HASH_SRC_DST_PORT", 1 << 7),
    ("UDP_STABLE_ROUTING", 1 << 8),
    ("UDP_FLOW_MIGRATION", 1 << 9),
    ("MQTT_GROUP", plan::GROUP_FLAG),
];

fn flag(text: &str) -> Result<u32, String> {
    if let Some((_, bit)) = FLAGS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)) {
        return Ok(*bit);
    }
    let number = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    number.map_err(|_| {
        let names: Vec<_> = FLAGS.iter().map(|(name, _)| *name).collect();
        format!("neither a number of 32 bits nor one of {}", names.join(", "))
    })
}

fn flag_names(flags: u32) -> String {
    let mut names: Vec<String> = FLAGS
        .iter()
        .filter(|(_, bit)| flags & bit != 0)
        .map(|(name, _)| (*name).to_owned())
        .collect();
    let others = flags & !FLAGS.iter().fold(0, |all, (_, bit)| all | bit);
    if others != 0 {
        names.push(format!("{others:#x}"));
    }
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
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
            refuse_groups(verbatim, config)?;
        }
        block_on(async {
            let mut client = Client::connect(&endpoint).await?;
            self.action.run(&mut client).await
        })
        .map_err(|error| match listeners::listeners(&endpoint).as_slice() {
            [] | [_] => error,
            several => Error::Busy(format!(
                "{error}; {} servers listen at {endpoint}, each with a state of its own, and any of \
                 them gets a call: {}",
                several.len(),
                several.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            )),
        })
    }
}

/// The sidecar would undo it, or worse: it is what the datapath sends packets to.
fn refuse_groups(verbatim: &VerbatimVip, config: &Config) -> Result<(), Error> {
    let ours = Vip::try_from(&verbatim.0)
        .is_ok_and(|vip| plan::wanted_vips(config).contains_key(&vip) && verbatim.is_canonical());
    if !ours {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "{verbatim} is a group of {}; change it there, then `mqtt-fwd apply`",
        config.path.display()
    )))
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

/// The VIP of a call. Only a deletion may name one as somebody else has spelled it.
fn canonical(verbatim: &VerbatimVip) -> Result<Vip, Error> {
    let wrong = |problem: String| Error::Refused(format!("{verbatim}: {problem}"));
    let vip = Vip::try_from(&verbatim.0).map_err(&wrong)?;
    address(&vip.addr.to_string()).map_err(&wrong)?;
    if verbatim.is_canonical() {
        return Ok(vip);
    }
    Err(wrong(format!("Katran would take it for another VIP than {vip}; write {vip}")))
}

fn disagrees(client: &Client, difference: String) -> Error {
    BalancerError::Disagrees { endpoint: client.endpoint().to_owned(), difference }.into()
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
                client.change_mac(mac).await?;
                let now = client.mac().await?;
                if now != mac_text(mac) {
                    return Err(disagrees(client, format!("the MAC address is {now}")));
                }
                line(&format!("gateway's MAC address is {now}"));
                Ok(())
            }
            Self::AddVip { vip, flags } => {
                add_vip(client, canonical(&vip)?, flags.into_iter().fold(0, |all, f| all | f)).await
            }
            Self::ClearFlags { vip, flags } => {
                let (vip, flags) = (canonical(&vip)?, flags.into_iter().fold(0, |all, f| all | f));
                client.modify_vip(vip, flags, false).await?;
                let now = client.vip_flags(vip).await?;
                if now & flags != 0 {
                    return Err(disagrees(client, format!("{vip} has flags {}", flag_names(now))));
                }
                line(&format!("{vip} has flags {}", flag_names(now)));
                Ok(())
            }
            Self::DelVip { vip } => del_vip(client, vip).await,
            Self::AddReal { vip, real, weight } => {
                add_real(client, canonical(&vip)?, real, weight).await
            }
            Self::DelReal { vip, real } => del_real(client, canonical(&vip)?, real).await,
        }
    }
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
        table::json(&rows);
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
            ("lru_miss", totals.lru_misses, "packets without a known connection"),
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

async fn add_vip(client: &mut Client, vip: Vip, flags: u32) -> Result<(), Error> {
    if client.vips().await?.contains(&vip) {
        client.modify_vip(vip, flags, true).await?;
    } else {
        client.add_vip(vip, flags).await?;
    }
    if !client.vips().await?.contains(&vip) {
        return Err(disagrees(client, format!("there is no VIP {vip}")));
    }
    let now = client.vip_flags(vip).await?;
    if now & flags != flags {
        return Err(disagrees(client, format!("{vip} has flags {}", flag_names(now))));
    }
    line(&format!("{vip} has flags {}", flag_names(now)));
    Ok(())
}

async fn del_vip(client: &mut Client, verbatim: VerbatimVip) -> Result<(), Error> {
    client.del_vip(verbatim.clone()).await?;
    // The datapath knows addresses, not texts: the entry that is gone was the other one's, too.
    if !verbatim.is_canonical()
        && let Ok(vip) = Vip::try_from(&verbatim.0)
        && client.vips().await?.contains(&vip)
    {
        let flags = client.vip_flags(vip).await?;
        client.modify_vip(vip, flags, true).await?;
        line(&format!("{vip} is written anew, as the two had one entry in the datapath"));
    }
    if client.verbatim_vips().await?.iter().any(|(_, other)| *other == verbatim) {
        return Err(disagrees(client, format!("VIP {verbatim} is still there")));
    }
    line(&format!("{verbatim} is removed"));
    Ok(())
}

async fn add_real(client: &mut Client, vip: Vip, real: IpAddr, weight: u32) -> Result<(), Error> {
    if vip.addr.is_ipv6() && real.is_ipv4() {
        return Err(Error::Refused(format!(
            "{vip}: IPv6 packets cannot go to the IPv4 real {real}, though Katran would take it"
        )));
    }
    client.add_reals(vip, &[(real, weight)].into()).await?;
    match client.reals(vip).await?.get(&real) {
        Some(now) if *now == weight => {
            line(&format!("{vip} has {real} with weight {weight}"));
            Ok(())
        }
        now => Err(disagrees(client, format!("{vip} has {real} with weight {now:?}"))),
    }
}

async fn del_real(client: &mut Client, vip: Vip, real: IpAddr) -> Result<(), Error> {
    let reals = client.reals(vip).await?;
    let refuse = |problem: String| Error::Refused(format!("{vip}: {problem}"));
    if !reals.contains_key(&real) {
        return Err(refuse(format!("it has no real {real}")));
    }
    if reals.len() == 1 {
        return Err(refuse(format!(
            "{real} is its only real, and would go on getting its packets; \
             `mqtt-fwd katran del-vip {vip}` stops them"
        )));
    }
    client.del_reals(vip, &[(real, 0)].into()).await?;
    if client.reals(vip).await?.contains_key(&real) {
        return Err(disagrees(client, format!("{vip} still has {real}")));
    }
    line(&format!("{vip} has no {real} any more; its established connections stay there"));
    Ok(())
}
