//! Changes of what the balancer holds, by hand: checked before, and read back after, as Katran is silent about
//! failures.

use std::net::IpAddr;
use std::path::PathBuf;

use super::VerbatimVip;
use super::client::{BalancerError, Client};
use super::desired::desired_vips;
use super::flags::flag_names;
use crate::config::{Config, address};
use crate::domain::vip::{Mac, Vip, mac_text};

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ByHandError {
    #[error(transparent)]
    Balancer(#[from] BalancerError),
    #[error("{vip} is a group of {path}; change it there, then `mqtt-fwd apply`")]
    IsGroup { vip: VerbatimVip, path: PathBuf },
    #[error("{vip}: {problem}")]
    InvalidVip { vip: VerbatimVip, problem: String },
    #[error("{vip}: IPv6 packets cannot go to the IPv4 real {real}, though Katran would accept it")]
    MixedFamilies { vip: Vip, real: IpAddr },
    #[error("{vip}: it has no real {real}")]
    NoReal { vip: Vip, real: IpAddr },
    #[error(
        "{vip}: {real} is its only real, and would go on getting its packets; \
         `mqtt-fwd katran del-vip {vip}` stops them"
    )]
    LastReal { vip: Vip, real: IpAddr },
}

type Result<T> = std::result::Result<T, ByHandError>;

/// The sidecar would undo it, or worse: it is what the datapath sends packets to.
pub fn refuse_groups(verbatim: &VerbatimVip, config: &Config) -> Result<()> {
    let ours = Vip::try_from(&verbatim.0)
        .is_ok_and(|vip| desired_vips(config).contains_key(&vip) && verbatim.is_canonical());
    if !ours {
        return Ok(());
    }
    Err(ByHandError::IsGroup { vip: verbatim.clone(), path: config.path.clone() })
}

/// The VIP of a call. Only a deletion may name one in a form that is not canonical.
pub fn canonical(verbatim: &VerbatimVip) -> Result<Vip> {
    let invalid = |problem: String| ByHandError::InvalidVip { vip: verbatim.clone(), problem };
    let vip = Vip::try_from(&verbatim.0).map_err(invalid)?;
    address(&vip.addr.to_string()).map_err(invalid)?;
    if verbatim.is_canonical() {
        return Ok(vip);
    }
    Err(invalid(format!("Katran would take it for another VIP than {vip}; write {vip}")))
}

fn disagrees(client: &Client, difference: String) -> ByHandError {
    BalancerError::Disagrees { endpoint: client.endpoint().to_owned(), difference }.into()
}

/// Sets the gateway's MAC address.
pub async fn set_mac(client: &mut Client, mac: Mac) -> Result<()> {
    client.change_mac(mac).await?;
    let now = client.mac().await?;
    if now != mac_text(mac) {
        return Err(disagrees(client, format!("the MAC address is {now}")));
    }
    Ok(())
}

/// Takes flags from a VIP. Returns those that it has left.
pub async fn clear_flags(client: &mut Client, vip: Vip, flags: u32) -> Result<u32> {
    client.modify_vip(vip, flags, false).await?;
    let now = client.vip_flags(vip).await?;
    if now & flags != 0 {
        return Err(disagrees(client, format!("{vip} has flags {}", flag_names(now))));
    }
    Ok(now)
}

/// Adds a VIP, or gives it flags. Returns all that it has.
pub async fn add(client: &mut Client, vip: Vip, flags: u32) -> Result<u32> {
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
    Ok(now)
}

/// Removes a VIP. Returns another one that had the same entry in the datapath, and was rewritten.
pub async fn delete(client: &mut Client, verbatim: VerbatimVip) -> Result<Option<Vip>> {
    let mut rewritten = None;
    client.del_vip(verbatim.clone()).await?;
    // The datapath compares addresses, not texts: the removed entry was the other one's, too.
    if !verbatim.is_canonical()
        && let Ok(vip) = Vip::try_from(&verbatim.0)
        && client.vips().await?.contains(&vip)
    {
        let flags = client.vip_flags(vip).await?;
        client.modify_vip(vip, flags, true).await?;
        rewritten = Some(vip);
    }
    if client.verbatim_vips().await?.iter().any(|(_, other)| *other == verbatim) {
        return Err(disagrees(client, format!("VIP {verbatim} is still there")));
    }
    Ok(rewritten)
}

/// Adds a real to a VIP, or changes its weight.
pub async fn add_real(client: &mut Client, vip: Vip, real: IpAddr, weight: u32) -> Result<()> {
    if vip.addr.is_ipv6() && real.is_ipv4() {
        return Err(ByHandError::MixedFamilies { vip, real });
    }
    client.add_reals(vip, &[(real, weight)].into()).await?;
    match client.reals(vip).await?.get(&real) {
        Some(now) if *now == weight => Ok(()),
        now => Err(disagrees(client, format!("{vip} has {real} with weight {now:?}"))),
    }
}

/// Takes a real out of a VIP; its established connections stay.
pub async fn delete_real(client: &mut Client, vip: Vip, real: IpAddr) -> Result<()> {
    let reals = client.reals(vip).await?;
    if !reals.contains_key(&real) {
        return Err(ByHandError::NoReal { vip, real });
    }
    if reals.len() == 1 {
        return Err(ByHandError::LastReal { vip, real });
    }
    client.del_reals(vip, &[(real, 0)].into()).await?;
    if client.reals(vip).await?.contains_key(&real) {
        return Err(disagrees(client, format!("{vip} still has {real}")));
    }
    Ok(())
}
