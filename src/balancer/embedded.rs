//! Katran's gRPC service over the embedded balancer. Its own failures carry a reason.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonic::{Request, Response, Status};

use super::proto::katran_service_server::{KatranService, KatranServiceServer};
use super::proto::{self, Action};
use crate::datapath::embedded::{Embedded, Refusal};
use crate::domain::vip::{Vip, mac_text, parse_mac};
use crate::grpc::Peer;

type Reply<T> = Result<Response<T>, Status>;

/// Requests that asked for a change, of this process's service.
static CHANGES: AtomicU64 = AtomicU64::new(0);

/// How often somebody asked this process's service for a change; as long as that is the same, so is
/// what it holds.
pub fn changes() -> u64 {
    CHANGES.load(Ordering::Relaxed)
}

/// The service. One request at a time changes the maps.
#[derive(Debug)]
pub struct Server {
    balancer: Arc<Mutex<Embedded>>,
}

impl Server {
    /// For tonic's router.
    pub fn service(balancer: Arc<Mutex<Embedded>>) -> KatranServiceServer<Self> {
        KatranServiceServer::new(Self { balancer })
    }

    fn balancer(&self) -> MutexGuard<'_, Embedded> {
        // The state is in maps: a panic elsewhere left nothing half done in here.
        self.balancer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(
        &self,
        peer: &Peer,
        what: &str,
        change: impl FnOnce(&Embedded) -> Result<(), Refusal>,
    ) -> Reply<proto::Bool> {
        CHANGES.fetch_add(1, Ordering::Relaxed);
        match change(&self.balancer()) {
            Ok(()) => {
                if matches!(peer, Peer::Own) {
                    tracing::debug!(what, "changed");
                } else {
                    tracing::info!(%peer, "balancer changed: {what}");
                }
                Ok(Response::new(proto::Bool { success: true }))
            }
            Err(refusal) => {
                tracing::warn!(%peer, %refusal, "balancer refused: {what}");
                Err(status(refusal))
            }
        }
    }
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn status(refusal: Refusal) -> Status {
    match refusal {
        Refusal::Bpf(e) => Status::internal(e.to_string()),
        // As Katran, but with a reason.
        other => Status::cancelled(other.to_string()),
    }
}

fn vip_of(vip: Option<&proto::Vip>) -> Result<Vip, Status> {
    let vip = vip.ok_or_else(|| Status::invalid_argument("vip is missing"))?;
    Vip::try_from(vip).map_err(Status::invalid_argument)
}

fn reals_of(reals: &[proto::Real]) -> Result<BTreeMap<IpAddr, u32>, Status> {
    let real = |real: &proto::Real| {
        let addr = real.address.parse().map_err(|_| {
            Status::invalid_argument(format!("{:?} is no IP address", real.address))
        })?;
        let weight = u32::try_from(real.weight)
            .map_err(|_| Status::invalid_argument(format!("{} is no weight", real.weight)))?;
        Ok((addr, weight))
    };
    reals.iter().map(real).collect()
}

fn flags_of(flags: i64) -> Result<u32, Status> {
    u32::try_from(flags)
        .map_err(|_| Status::invalid_argument(format!("{flags:#x} is over 32 bits")))
}

fn stats((v1, v2): (u64, u64)) -> Response<proto::Stats> {
    Response::new(proto::Stats { v1, v2 })
}

fn not_here<T>(what: &str) -> Reply<T> {
    Err(Status::unimplemented(format!("the embedded balancer has no {what}")))
}

#[tonic::async_trait]
impl KatranService for Server {
    async fn change_mac(&self, request: Request<proto::Mac>) -> Reply<proto::Bool> {
        let peer = Peer::of(&request);
        let text = request.into_inner().mac;
        let mac = parse_mac(&text)
            .ok_or_else(|| Status::invalid_argument(format!("{text:?} is no MAC address")))?;
        self.change(&peer, &format!("changeMac {text}"), |b| b.set_mac(mac))
    }

    async fn get_mac(&self, _: Request<proto::Empty>) -> Reply<proto::Mac> {
        let mac = self.balancer().mac().map_err(status)?;
        Ok(Response::new(proto::Mac { mac: mac_text(mac) }))
    }

    async fn add_vip(&self, request: Request<proto::VipMeta>) -> Reply<proto::Bool> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let (vip, flags) = (vip_of(request.vip.as_ref())?, flags_of(request.flags)?);
        self.change(&peer, &format!("addVip {vip} flags {flags:#x}"), |b| b.add_vip(vip, flags))
    }

    async fn del_vip(&self, request: Request<proto::Vip>) -> Reply<proto::Bool> {
        let peer = Peer::of(&request);
        let vip = vip_of(Some(request.get_ref()))?;
        self.change(&peer, &format!("delVip {vip}"), |b| b.del_vip(vip))
    }

    async fn get_all_vips(&self, _: Request<proto::Empty>) -> Reply<proto::Vips> {
        let vips = self.balancer().vips().map_err(status)?;
        Ok(Response::new(proto::Vips { vips: vips.into_keys().map(Into::into).collect() }))
    }

    async fn modify_vip(&self, request: Request<proto::VipMeta>) -> Reply<proto::Bool> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let (vip, flags) = (vip_of(request.vip.as_ref())?, flags_of(request.flags)?);
        self.change(&peer, &format!("modifyVip {vip} flags {flags:#x} {}", request.set_flag), |b| {
            b.modify_vip(vip, flags, request.set_flag)
        })
    }

    async fn get_vip_flags(&self, request: Request<proto::Vip>) -> Reply<proto::Flags> {
        let vip = vip_of(Some(request.get_ref()))?;
        let flags = self.balancer().vip_flags(vip).map_err(status)?;
        Ok(Response::new(proto::Flags { flags: flags.into() }))
    }

    async fn add_real_for_vip(&self, request: Request<proto::RealForVip>) -> Reply<proto::Bool> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let vip = vip_of(request.vip.as_ref())?;
        let reals = reals_of(request.real.as_slice())?;
        self.change(&peer, &format!("addRealForVip {vip} {reals:?}"), |b| b.add_reals(vip, &reals))
    }

    async fn del_real_for_vip(&self, request: Request<proto::RealForVip>) -> Reply<proto::Bool> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let vip = vip_of(request.vip.as_ref())?;
        let reals = reals_of(request.real.as_slice())?;
        self.change(&peer, &format!("delRealForVip {vip} {reals:?}"), |b| b.del_reals(vip, &reals))
    }

    async fn modify_reals_for_vip(
        &self,
        request: Request<proto::ModifiedRealsForVip>,
    ) -> Reply<proto::Bool> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let vip = vip_of(request.vip.as_ref())?;
        let reals = reals_of(&request.real.clone().unwrap_or_default().reals)?;
        let what = format!("modifyRealsForVip {vip} {} {reals:?}", request.action().as_str_name());
        self.change(&peer, &what, |b| match request.action() {
            Action::Add => b.add_reals(vip, &reals),
            Action::Del => b.del_reals(vip, &reals),
        })
    }

    async fn get_reals_for_vip(&self, request: Request<proto::Vip>) -> Reply<proto::Reals> {
        let vip = vip_of(Some(request.get_ref()))?;
        let reals = self.balancer().reals(vip).map_err(status)?;
        let real = |(addr, weight): (IpAddr, u32)| proto::Real {
            address: addr.to_string(),
            weight: i32::try_from(weight).unwrap_or(i32::MAX),
            flags: 0,
        };
        Ok(Response::new(proto::Reals { reals: reals.into_iter().map(real).collect() }))
    }

    async fn get_stats_for_vip(&self, request: Request<proto::Vip>) -> Reply<proto::Stats> {
        let vip = vip_of(Some(request.get_ref()))?;
        Ok(stats(self.balancer().vip_stats(vip).map_err(status)?))
    }

    async fn get_lru_stats(&self, _: Request<proto::Empty>) -> Reply<proto::Stats> {
        Ok(stats(self.balancer().lru_stats().map_err(status)?))
    }

    async fn get_lru_miss_stats(&self, _: Request<proto::Empty>) -> Reply<proto::Stats> {
        Ok(stats(self.balancer().lru_miss_stats().map_err(status)?))
    }

    async fn get_lru_fallback_stats(&self, _: Request<proto::Empty>) -> Reply<proto::Stats> {
        // There is one connection table, and nothing to fall back from.
        Ok(stats((0, 0)))
    }

    async fn get_icmp_too_big_stats(&self, _: Request<proto::Empty>) -> Reply<proto::Stats> {
        // mqtt_fwd answers packets that are too big, before they get here.
        Ok(stats((0, 0)))
    }

    async fn modify_real(&self, _: Request<proto::RealMeta>) -> Reply<proto::Bool> {
        not_here("flags of reals")
    }

    async fn get_real_flags(&self, _: Request<proto::Real>) -> Reply<proto::Flags> {
        not_here("flags of reals")
    }

    async fn modify_quic_reals_mapping(
        &self,
        _: Request<proto::ModifiedQuicReals>,
    ) -> Reply<proto::Bool> {
        not_here("QUIC")
    }

    async fn get_quic_reals_mapping(&self, _: Request<proto::Empty>) -> Reply<proto::QuicReals> {
        not_here("QUIC")
    }

    async fn add_healthchecker_dst(&self, _: Request<proto::Healthcheck>) -> Reply<proto::Bool> {
        not_here("health checks")
    }

    async fn del_healthchecker_dst(&self, _: Request<proto::Somark>) -> Reply<proto::Bool> {
        not_here("health checks")
    }

    async fn get_healthcheckers_dst(&self, _: Request<proto::Empty>) -> Reply<proto::HcMap> {
        not_here("health checks")
    }
}
