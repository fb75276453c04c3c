//! A client of Katran's gRPC service that does not take its silence for success.
//!
//! Katran fails with status CANCELLED and no text, and succeeds at things that it did not do.
//! So: what is sent is valid before it is sent, every error says what was tried and what the
//! likely causes are, and callers read back what they wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::VerbatimVip;
use super::proto::katran_service_client::KatranServiceClient;
use super::proto::{self, Action};
use crate::domain::vip::{Vip, mac_text};

/// Why a balancer did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum BalancerError {
    #[error(
        "balancer at {endpoint}: not reachable ({reason}); is it running, and is this the address \
         that it listens on (balancer_endpoint)?"
    )]
    Unreachable { endpoint: String, reason: String },
    #[error("balancer refused {call}{}; {causes}", .reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Refused { call: String, reason: Option<String>, causes: &'static str },
    #[error(
        "balancer at {endpoint} does not hold what was written to it: {difference}; likely \
         causes: it has as many reals as it can have, or another server or another client \
         shares this address"
    )]
    Disagrees { endpoint: String, difference: String },
    #[error(
        "balancer has {vip} as {verbatim}, which to Katran is another VIP over the \
         same packets; remove it: mqtt-fwd katran del-vip {verbatim}"
    )]
    NotCanonical { vip: Vip, verbatim: VerbatimVip },
    #[error("balancer returned an invalid {what}: {problem}")]
    Invalid { what: String, problem: String },
}

/// Two counters, as Katran reports them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stats {
    /// Packets, mostly.
    pub v1: u64,
    /// Bytes, mostly.
    pub v2: u64,
}

/// A connection to a balancer.
#[derive(Debug, Clone)]
pub struct Client {
    rpc: KatranServiceClient<Channel>,
    endpoint: String,
}

const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

const CAUSES_ADD_VIP: &str =
    "likely causes: it has this VIP already, or as many VIPs as it can have";
const CAUSES_UNKNOWN_VIP: &str =
    "likely cause: it has no such VIP (`mqtt-fwd katran list` shows them; a restart loses all)";
const CAUSES_REALS: &str = "likely causes: it has no such VIP, or as many reals as it can have";
const CAUSES_READ: &str = "likely cause: its state changed at the same time";

impl Client {
    /// Connects; `endpoint` is `host:port` or `unix:/path`.
    pub async fn connect(endpoint: &str) -> Result<Self, BalancerError> {
        let unreachable = |e: tonic::transport::Error| BalancerError::Unreachable {
            endpoint: endpoint.to_owned(),
            reason: innermost(&e),
        };
        let uri = if endpoint.starts_with("unix:") {
            endpoint.to_owned()
        } else {
            format!("http://{endpoint}")
        };
        // No HTTP/2 keepalive: the server answers idle pings with GOAWAY.
        let channel = Endpoint::from_shared(uri)
            .map_err(unreachable)?
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(CALL_TIMEOUT)
            .connect()
            .await
            .map_err(unreachable)?;
        Ok(Self { rpc: KatranServiceClient::new(channel), endpoint: endpoint.to_owned() })
    }

    /// Where it is connected to.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    fn failed(
        &self,
        call: String,
        causes: &'static str,
    ) -> impl FnOnce(Status) -> BalancerError + use<> {
        let endpoint = self.endpoint.clone();
        move |status| match status.code() {
            // What answered was something else than gRPC.
            _ if status.message().contains("h2 protocol error") => {
                let reason = "what answers there does not speak gRPC".to_owned();
                BalancerError::Unreachable { endpoint, reason }
            }
            Code::Unavailable | Code::DeadlineExceeded | Code::Unknown => {
                BalancerError::Unreachable { endpoint, reason: innermost(&status) }
            }
            // tonic's own word for CALL_TIMEOUT; Katran's CANCELLED has no text.
            Code::Cancelled if status.message() == "Timeout expired" => {
                BalancerError::Unreachable { endpoint, reason: "no answer in time".to_owned() }
            }
            _ => BalancerError::Refused {
                call,
                reason: Some(status.message().to_owned()).filter(|m| !m.is_empty()),
                causes,
            },
        }
    }

    /// All VIPs.
    pub async fn vips(&mut self) -> Result<BTreeSet<Vip>, BalancerError> {
        Ok(self.verbatim_vips().await?.into_iter().map(|(vip, _)| vip).collect())
    }

    /// All VIPs, each as the balancer spells it.
    pub async fn verbatim_vips(&mut self) -> Result<Vec<(Vip, VerbatimVip)>, BalancerError> {
        let failed = self.failed("getAllVips".to_owned(), CAUSES_READ);
        let reply = self.rpc.get_all_vips(proto::Empty {}).await.map_err(failed)?;
        // What cannot be read is no group's, and must not keep groups from being reconciled.
        let parse = |vip: proto::Vip| match Vip::try_from(&vip) {
            Ok(parsed) => Some((parsed, VerbatimVip(vip))),
            Err(problem) => {
                tracing::debug!("the balancer returned an invalid VIP: {problem}");
                None
            }
        };
        Ok(reply.into_inner().vips.into_iter().filter_map(parse).collect())
    }

    /// Adds a VIP that is not there.
    pub async fn add_vip(&mut self, vip: Vip, flags: u32) -> Result<(), BalancerError> {
        let request =
            proto::VipMeta { vip: Some(vip.into()), flags: i64::from(flags), set_flag: true };
        let failed = self.failed(format!("addVip {vip} (flags {flags:#x})"), CAUSES_ADD_VIP);
        self.rpc.add_vip(request).await.map_err(failed).map(drop)
    }

    /// Removes a VIP. This is the only way to stop its traffic.
    pub async fn del_vip(&mut self, vip: impl Into<VerbatimVip>) -> Result<(), BalancerError> {
        let verbatim = vip.into();
        let failed = self.failed(format!("delVip {verbatim}"), CAUSES_UNKNOWN_VIP);
        self.rpc.del_vip(verbatim.0).await.map_err(failed).map(drop)
    }

    /// Sets or clears bits of a VIP's flags.
    pub async fn modify_vip(
        &mut self,
        vip: Vip,
        flags: u32,
        set_flag: bool,
    ) -> Result<(), BalancerError> {
        let request = proto::VipMeta { vip: Some(vip.into()), flags: i64::from(flags), set_flag };
        let verb = if set_flag { "set" } else { "clear" };
        let call = format!("modifyVip {vip} ({verb} {flags:#x})");
        let failed = self.failed(call, CAUSES_UNKNOWN_VIP);
        self.rpc.modify_vip(request).await.map_err(failed).map(drop)
    }

    /// A VIP's flags.
    pub async fn vip_flags(&mut self, vip: Vip) -> Result<u32, BalancerError> {
        let failed = self.failed(format!("getVipFlags {vip}"), CAUSES_UNKNOWN_VIP);
        let reply = self.rpc.get_vip_flags(proto::Vip::from(vip)).await.map_err(failed)?;
        Ok(reply.into_inner().flags as u32)
    }

    /// A VIP's reals with their weights.
    pub async fn reals(&mut self, vip: Vip) -> Result<BTreeMap<IpAddr, u32>, BalancerError> {
        let failed = self.failed(format!("getRealsForVip {vip}"), CAUSES_UNKNOWN_VIP);
        let reply = self.rpc.get_reals_for_vip(proto::Vip::from(vip)).await.map_err(failed)?;
        let parse = |real: &proto::Real| {
            let invalid = |problem: String| BalancerError::Invalid {
                what: format!("real {} of {vip}", real.address),
                problem,
            };
            let addr = real.address.parse().map_err(|_| invalid("no IP address".to_owned()))?;
            let weight = u32::try_from(real.weight)
                .map_err(|_| invalid(format!("weight {}", real.weight)))?;
            Ok((addr, weight))
        };
        reply.into_inner().reals.iter().map(parse).collect()
    }

    /// Adds reals to a VIP, or changes the weights of those that it has, in one call.
    pub async fn add_reals(
        &mut self,
        vip: Vip,
        reals: &BTreeMap<IpAddr, u32>,
    ) -> Result<(), BalancerError> {
        self.modify_reals(Action::Add, vip, reals).await
    }

    /// Takes reals out of a VIP, in one call. Established connections stay on them.
    pub async fn del_reals(
        &mut self,
        vip: Vip,
        reals: &BTreeMap<IpAddr, u32>,
    ) -> Result<(), BalancerError> {
        self.modify_reals(Action::Del, vip, reals).await
    }

    async fn modify_reals(
        &mut self,
        action: Action,
        vip: Vip,
        reals: &BTreeMap<IpAddr, u32>,
    ) -> Result<(), BalancerError> {
        let names: Vec<_> = reals.keys().map(IpAddr::to_string).collect();
        let call =
            format!("modifyRealsForVip {vip} ({} {})", action.as_str_name(), names.join(", "));
        let real = |(addr, weight): (&IpAddr, &u32)| proto::Real {
            address: addr.to_string(),
            weight: i32::try_from(*weight).unwrap_or(i32::MAX),
            flags: 0,
        };
        let request = proto::ModifiedRealsForVip {
            action: action.into(),
            real: Some(proto::Reals { reals: reals.iter().map(real).collect() }),
            vip: Some(vip.into()),
        };
        let failed = self.failed(call, CAUSES_REALS);
        self.rpc.modify_reals_for_vip(request).await.map_err(failed).map(drop)
    }

    /// Packets and bytes of a VIP.
    pub async fn vip_stats(&mut self, vip: Vip) -> Result<Stats, BalancerError> {
        let failed = self.failed(format!("getStatsForVip {vip}"), CAUSES_UNKNOWN_VIP);
        let reply = self.rpc.get_stats_for_vip(proto::Vip::from(vip)).await.map_err(failed)?;
        Ok(reply.into_inner().into())
    }

    /// Packets of all VIPs, and how many of them missed the connection table.
    pub async fn lru_stats(&mut self) -> Result<Stats, BalancerError> {
        let failed = self.failed("getLruStats".to_owned(), CAUSES_READ);
        let reply = self.rpc.get_lru_stats(proto::Empty {}).await.map_err(failed)?;
        Ok(reply.into_inner().into())
    }

    /// Packets that went by the table for CPUs that have none of their own.
    pub async fn lru_fallback_stats(&mut self) -> Result<Stats, BalancerError> {
        let failed = self.failed("getLruFallbackStats".to_owned(), CAUSES_READ);
        let reply = self.rpc.get_lru_fallback_stats(proto::Empty {}).await.map_err(failed)?;
        Ok(reply.into_inner().into())
    }

    /// ICMP "too big" that the balancer sent: IPv4, IPv6.
    pub async fn icmp_too_big_stats(&mut self) -> Result<Stats, BalancerError> {
        let failed = self.failed("getIcmpTooBigStats".to_owned(), CAUSES_READ);
        let reply = self.rpc.get_icmp_too_big_stats(proto::Empty {}).await.map_err(failed)?;
        Ok(reply.into_inner().into())
    }

    /// Misses of the connection table: SYNs, and others.
    pub async fn lru_miss_stats(&mut self) -> Result<Stats, BalancerError> {
        let failed = self.failed("getLruMissStats".to_owned(), CAUSES_READ);
        let reply = self.rpc.get_lru_miss_stats(proto::Empty {}).await.map_err(failed)?;
        Ok(reply.into_inner().into())
    }

    /// The gateway's MAC address.
    pub async fn mac(&mut self) -> Result<String, BalancerError> {
        let failed = self.failed("getMac".to_owned(), CAUSES_READ);
        Ok(self.rpc.get_mac(proto::Empty {}).await.map_err(failed)?.into_inner().mac)
    }

    /// Changes the gateway's MAC address.
    pub async fn change_mac(&mut self, mac: [u8; 6]) -> Result<(), BalancerError> {
        let mac = mac_text(mac);
        let failed = self.failed(format!("changeMac {mac}"), CAUSES_READ);
        self.rpc.change_mac(proto::Mac { mac }).await.map_err(failed).map(drop)
    }
}

impl From<proto::Stats> for Stats {
    fn from(stats: proto::Stats) -> Self {
        Self { v1: stats.v1, v2: stats.v2 }
    }
}

/// tonic wraps "connection refused" in several layers of "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
