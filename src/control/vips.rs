//! Changes of what the balancer holds, by hand: checked before, and read back after, as Katran is silent about
//! failures.

use std::net::IpAddr;

use super::reconcile::plan;
use super::{Error, Result};
use crate::balancer::client::{BalancerError, Client};
use crate::balancer::flags::flag_names;
use crate::balancer::{Mac, VerbatimVip, Vip, mac_text};
use crate::config::{Config, address};

/// The sidecar would undo it, or worse: it is what the datapath sends packets to.
pub fn refuse_groups(verbatim: &VerbatimVip, config: &Config) -> Result<()> {
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

/// The VIP of a call. Only a deletion may name one as somebody else has spelled it.
pub fn canonical(verbatim: &VerbatimVip) -> Result<Vip> {
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

/// Gives the gateway another MAC address.
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

/// Removes a VIP. Returns another one that had the same entry in the datapath, and was written anew.
pub async fn delete(client: &mut Client, verbatim: VerbatimVip) -> Result<Option<Vip>> {
    let mut anew = None;
    client.del_vip(verbatim.clone()).await?;
    // The datapath knows addresses, not texts: the entry that is gone was the other one's, too.
    if !verbatim.is_canonical()
        && let Ok(vip) = Vip::try_from(&verbatim.0)
        && client.vips().await?.contains(&vip)
    {
        let flags = client.vip_flags(vip).await?;
        client.modify_vip(vip, flags, true).await?;
        anew = Some(vip);
    }
    if client.verbatim_vips().await?.iter().any(|(_, other)| *other == verbatim) {
        return Err(disagrees(client, format!("VIP {verbatim} is still there")));
    }
    Ok(anew)
}

/// Adds a real to a VIP, or changes its weight.
pub async fn add_real(client: &mut Client, vip: Vip, real: IpAddr, weight: u32) -> Result<()> {
    if vip.addr.is_ipv6() && real.is_ipv4() {
        return Err(Error::Refused(format!(
            "{vip}: IPv6 packets cannot go to the IPv4 real {real}, though Katran would take it"
        )));
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
    Ok(())
}
