//! A test double of a Katran server: the embedded balancer's datapath behind a service that fails
//! as silently as Katran does, so that tests without a Katran meet it. Seen on Katran 19f08fec:
//! failures are CANCELLED without a word; invalid reals, unknown reals and reals past the limit are
//! "added" and "deleted" successfully; numbers are truncated; VIPs are known by their text; a second
//! server on the port starts without a word; and the state is in memory, gone with the server.
//!
//! `silent-katran` reads MQTT_FWD_CONFIG, as mqtt-fwd does.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mqtt_fwd::balancer::proto::katran_service_server::{KatranService, KatranServiceServer};
use mqtt_fwd::balancer::proto::{self, Action};
use mqtt_fwd::config::Config;
use mqtt_fwd::datapath::embedded::{Embedded, Refusal};
use mqtt_fwd::domain::vip::{Vip, mac_text, parse_mac};
use mqtt_fwd::kernel::chain::{self, Chain};
use mqtt_fwd::kernel::load;
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::{Request, Response, Status};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    mqtt_fwd::telemetry::init("info", mqtt_fwd::telemetry::Format::Text)
        .map_err(anyhow::Error::msg)?;
    let path =
        std::env::var_os("MQTT_FWD_CONFIG").expect("MQTT_FWD_CONFIG names the configuration");
    let config = Config::load(Path::new(&path))?;
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    load::load_balancer(&config.load_spec())?;
    let balancer = Embedded::open(&config.pins())?;
    if let Some(mac) = config.gateway_mac {
        balancer.set_mac(mac)?;
    }
    let mut builder = tonic::transport::Server::builder();
    let router = builder.add_service(Silent::service(balancer)?);
    let endpoint = config.balancer_endpoint.clone();
    let served = async {
        match endpoint.strip_prefix("unix:") {
            Some(path) => {
                let _ = std::fs::remove_file(path);
                let listener = UnixListener::bind(path)?;
                router.serve_with_incoming(UnixListenerStream::new(listener)).await?;
            }
            None => {
                let listener = shared_listener(endpoint.parse()?)?;
                router.serve_with_incoming(TcpListenerStream::new(listener)).await?;
            }
        }
        anyhow::Ok(())
    };
    tokio::select! {
        served = served => served?,
        // Katran empties its position when it is told to end, and only then.
        _ = term.recv() => clear_position(&config)?,
        _ = int.recv() => clear_position(&config)?,
    }
    Ok(())
}

fn clear_position(config: &Config) -> anyhow::Result<()> {
    if let Some(chain) = Chain::open(&config.pins())? {
        chain.clear(chain::BALANCER)?;
    }
    Ok(())
}

/// As gRPC's C++ servers listen: a second one does not fail.
fn shared_listener(addr: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(addr)?;
    socket.listen(1024)
}

type Reply<T> = Result<Response<T>, Status>;

/// Address as it was written, port, protocol.
type Key = (String, u16, u8);

#[derive(Debug, Default)]
struct Entry {
    flags: u32,
    reals: BTreeMap<IpAddr, u32>,
}

/// Katran's own limit is its `-max_reals`; this is one that a test reaches.
const MAX_REALS: usize = 8;

#[derive(Debug)]
struct State {
    vips: BTreeMap<Key, Entry>,
    balancer: Embedded,
}

/// The service.
#[derive(Debug)]
struct Silent(Mutex<State>);

impl Silent {
    /// Starts empty, as Katran does, and takes the datapath with it.
    fn service(balancer: Embedded) -> Result<KatranServiceServer<Self>, Refusal> {
        for vip in balancer.vips()?.into_keys() {
            balancer.del_vip(vip)?;
        }
        let state = State { vips: BTreeMap::new(), balancer };
        Ok(KatranServiceServer::new(Self(Mutex::new(state))))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // as Katran does
fn key(vip: Option<&proto::Vip>) -> Key {
    let vip = vip.cloned().unwrap_or_default();
    (vip.address, vip.port as u16, vip.protocol as u8)
}

fn vip_of((address, port, protocol): &Key) -> Result<Vip, Status> {
    let addr = address.parse().map_err(|_| no())?;
    Ok(Vip { addr, port: *port, protocol: *protocol })
}

/// Whatever went wrong.
fn no() -> Status {
    Status::cancelled("")
}

fn yes() -> Response<proto::Bool> {
    Response::new(proto::Bool { success: true })
}

fn stats((v1, v2): (u64, u64)) -> Response<proto::Stats> {
    Response::new(proto::Stats { v1, v2 })
}

impl State {
    fn entry(&mut self, key: &Key) -> Result<&mut Entry, Status> {
        self.vips.get_mut(key).ok_or_else(no)
    }

    fn modify_reals(&mut self, key: &Key, add: bool, reals: &[proto::Real]) -> Reply<proto::Bool> {
        let total: usize = self.vips.values().map(|entry| entry.reals.len()).sum();
        let mut room = MAX_REALS.saturating_sub(total);
        let entry = self.vips.get_mut(key).ok_or_else(no)?;
        for real in reals {
            let Ok(addr) = real.address.parse::<IpAddr>() else { continue };
            if !add {
                entry.reals.remove(&addr);
            } else if entry.reals.contains_key(&addr) || room > 0 {
                room -= usize::from(!entry.reals.contains_key(&addr));
                entry.reals.insert(addr, u32::try_from(real.weight).unwrap_or(0));
            }
        }
        let (vip, wanted) = (vip_of(key)?, entry.reals.clone());
        let has = self.balancer.reals(vip).map_err(|_| no())?;
        // Without a real, Katran's ring stays what it was.
        if !wanted.is_empty() {
            let _ = self.balancer.add_reals(vip, &wanted);
            let gone = has.into_iter().filter(|(addr, _)| !wanted.contains_key(addr)).collect();
            let _ = self.balancer.del_reals(vip, &gone);
        }
        Ok(yes())
    }
}

#[tonic::async_trait]
impl KatranService for Silent {
    async fn change_mac(&self, request: Request<proto::Mac>) -> Reply<proto::Bool> {
        let mac = parse_mac(&request.into_inner().mac).unwrap_or_default();
        self.state().balancer.set_mac(mac).map_err(|_| no())?;
        Ok(yes())
    }

    async fn get_mac(&self, _: Request<proto::Empty>) -> Reply<proto::Mac> {
        let mac = self.state().balancer.mac().map_err(|_| no())?;
        Ok(Response::new(proto::Mac { mac: mac_text(mac) }))
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    async fn add_vip(&self, request: Request<proto::VipMeta>) -> Reply<proto::Bool> {
        let request = request.into_inner();
        let (key, flags) = (key(request.vip.as_ref()), request.flags as u32);
        let mut state = self.state();
        let vip = vip_of(&key)?;
        if state.vips.contains_key(&key) {
            return Err(no());
        }
        // Another text for it may be there: one entry in the datapath, two VIPs here.
        let _ = state.balancer.del_vip(vip);
        state.balancer.add_vip(vip, flags).map_err(|_| no())?;
        state.vips.insert(key, Entry { flags, ..Entry::default() });
        Ok(yes())
    }

    async fn del_vip(&self, request: Request<proto::Vip>) -> Reply<proto::Bool> {
        let key = key(Some(request.get_ref()));
        let mut state = self.state();
        state.vips.remove(&key).ok_or_else(no)?;
        let _ = state.balancer.del_vip(vip_of(&key)?);
        Ok(yes())
    }

    async fn get_all_vips(&self, _: Request<proto::Empty>) -> Reply<proto::Vips> {
        let vip = |(address, port, protocol): &Key| proto::Vip {
            address: address.clone(),
            port: (*port).into(),
            protocol: (*protocol).into(),
        };
        Ok(Response::new(proto::Vips { vips: self.state().vips.keys().map(vip).collect() }))
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    async fn modify_vip(&self, request: Request<proto::VipMeta>) -> Reply<proto::Bool> {
        let request = request.into_inner();
        let (key, flags) = (key(request.vip.as_ref()), request.flags as u32);
        let mut state = self.state();
        let entry = state.entry(&key)?;
        entry.flags = if request.set_flag { entry.flags | flags } else { entry.flags & !flags };
        // The entry in the datapath is written, whether it was there or not.
        let (flags, reals, vip) = (entry.flags, entry.reals.clone(), vip_of(&key)?);
        let _ = state.balancer.del_vip(vip);
        state.balancer.add_vip(vip, flags).map_err(|_| no())?;
        let _ = state.balancer.add_reals(vip, &reals);
        Ok(yes())
    }

    async fn get_vip_flags(&self, request: Request<proto::Vip>) -> Reply<proto::Flags> {
        let flags = self.state().entry(&key(Some(request.get_ref())))?.flags.into();
        Ok(Response::new(proto::Flags { flags }))
    }

    async fn add_real_for_vip(&self, request: Request<proto::RealForVip>) -> Reply<proto::Bool> {
        let request = request.into_inner();
        self.state().modify_reals(&key(request.vip.as_ref()), true, request.real.as_slice())
    }

    async fn del_real_for_vip(&self, request: Request<proto::RealForVip>) -> Reply<proto::Bool> {
        let request = request.into_inner();
        self.state().modify_reals(&key(request.vip.as_ref()), false, request.real.as_slice())
    }

    async fn modify_reals_for_vip(
        &self,
        request: Request<proto::ModifiedRealsForVip>,
    ) -> Reply<proto::Bool> {
        let request = request.into_inner();
        let (key, add) = (key(request.vip.as_ref()), request.action() == Action::Add);
        self.state().modify_reals(&key, add, &request.real.unwrap_or_default().reals)
    }

    async fn get_reals_for_vip(&self, request: Request<proto::Vip>) -> Reply<proto::Reals> {
        let mut state = self.state();
        let entry = state.entry(&key(Some(request.get_ref())))?;
        let real = |(addr, weight): (&IpAddr, &u32)| proto::Real {
            address: addr.to_string(),
            weight: i32::try_from(*weight).unwrap_or(i32::MAX),
            flags: 0,
        };
        Ok(Response::new(proto::Reals { reals: entry.reals.iter().map(real).collect() }))
    }

    async fn get_stats_for_vip(&self, request: Request<proto::Vip>) -> Reply<proto::Stats> {
        let key = key(Some(request.get_ref()));
        let mut state = self.state();
        state.entry(&key)?;
        Ok(stats(state.balancer.vip_stats(vip_of(&key)?).map_err(|_| no())?))
    }

    async fn get_lru_stats(&self, _: Request<proto::Empty>) -> Reply<proto::Stats> {
        Ok(stats(self.state().balancer.lru_stats().map_err(|_| no())?))
    }

    async fn get_lru_miss_stats(&self, _: Request<proto::Empty>) -> Reply<proto::Stats> {
        Ok(stats(self.state().balancer.lru_miss_stats().map_err(|_| no())?))
    }

    async fn get_lru_fallback_stats(&self, _: Request<proto::Empty>) -> Reply<proto::Stats> {
        Ok(stats((0, 0)))
    }

    async fn get_icmp_too_big_stats(&self, _: Request<proto::Empty>) -> Reply<proto::Stats> {
        Ok(stats((0, 0)))
    }

    async fn modify_real(&self, _: Request<proto::RealMeta>) -> Reply<proto::Bool> {
        Err(no())
    }

    async fn get_real_flags(&self, _: Request<proto::Real>) -> Reply<proto::Flags> {
        Err(no())
    }

    async fn modify_quic_reals_mapping(
        &self,
        _: Request<proto::ModifiedQuicReals>,
    ) -> Reply<proto::Bool> {
        Err(no())
    }

    async fn get_quic_reals_mapping(&self, _: Request<proto::Empty>) -> Reply<proto::QuicReals> {
        Err(no())
    }

    async fn add_healthchecker_dst(&self, _: Request<proto::Healthcheck>) -> Reply<proto::Bool> {
        Err(no())
    }

    async fn del_healthchecker_dst(&self, _: Request<proto::Somark>) -> Reply<proto::Bool> {
        Err(no())
    }

    async fn get_healthcheckers_dst(&self, _: Request<proto::Empty>) -> Reply<proto::HcMap> {
        Err(no())
    }
}
