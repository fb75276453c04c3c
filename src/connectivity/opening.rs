//! Connections of a test: from this host, through its XDP program, to a real of choice; or over the network, as any
//! client's.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use libbpf_rs::Program;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::ConnectivityError;
use super::session::PATIENCE;
use crate::balancer::client::Client;
use crate::config::{Config, Service};
use crate::datapath::Datapath;
use crate::datapath::flows::{Flow, flows_from};
use crate::datapath::names::Names;
use crate::datapath::real_of_flow::RealOfFlow;
use crate::domain::client_record::{ClientRecord, IdentifiedBy};
use crate::domain::limits;
use crate::domain::vip::parse_mac;
use crate::kernel::as_client::AsClient;
use crate::kernel::{BpfError, route, xdp};

/// Ports that are tried for one that the balancer sends to a real.
const PORTS: u32 = 2000;

/// Where connections come from.
pub enum From {
    /// This host, by packets that come in on its interface.
    Here(Box<Here>),
    /// An address of this host, over the network.
    Network(IpAddr),
}

/// The datapath of this host.
pub struct Here {
    config: Config,
    frames: AsClient,
    balancer: Option<RealOfFlow>,
    datapath: Datapath,
    names: Names,
}

/// A connection.
pub struct Opened {
    pub stream: TcpStream,
    pub client: SocketAddr,
}

impl Here {
    /// With what is pinned. Clients' frames come from the balancer's gateway, so answers go there.
    pub async fn new(config: &Config) -> Result<Self, ConnectivityError> {
        let pins = config.pins();
        let gateway = Client::connect(&config.balancer_endpoint).await?.mac().await?;
        // As packets come in, if this process may have it: only by its pin without CAP_SYS_ADMIN.
        let attached = xdp::attached(&config.interface)?;
        let root = attached.and_then(|root| Program::fd_from_id(root.id).ok());
        let path = pins.program("mqtt_fwd");
        let program = match root {
            Some(root) => root,
            None => Program::fd_from_pinned_path(&path).map_err(|source| BpfError::Pin {
                path: path.clone(),
                action: "opening",
                source,
            })?,
        };
        let datapath = Datapath::open(&pins)?;
        Ok(Self {
            frames: AsClient::attach(
                &config.interface,
                program,
                parse_mac(&gateway).unwrap_or_default(),
            )?,
            config: config.clone(),
            balancer: RealOfFlow::open(config),
            names: Names::read(config, &datapath)?,
            datapath,
        })
    }

    /// The flow of a client, with its real.
    pub fn flow(&self, opened: SocketAddr, port: u16) -> Option<(Flow, Option<IpAddr>)> {
        let flow = flows_from(&self.datapath, &self.names, opened).ok()?.pop()?;
        let vip = flow.vip.as_ref().and_then(|vip| vip.parse::<IpAddr>().ok());
        let real = vip.and_then(|vip| self.real_of(opened, SocketAddr::new(vip, port)));
        Some((flow, real))
    }

    /// Makes this host a client that publishes to a group, or belongs to the relay.
    pub fn predict(&self, service: &Service, group: &str) -> Result<(), ConnectivityError> {
        let for_relay = service.relay.as_deref() == Some(group);
        Ok(self.datapath.put_client(
            &self.config,
            &ClientRecord {
                service: service.name.clone(),
                by: IdentifiedBy::Address,
                client: self.source(service)?.to_string(),
                topic: String::new(),
                groups: BTreeMap::from([(group.to_owned(), limits::WEIGHT)]),
                multi_group: false,
                for_relay,
                misjudged: false,
                group_changes: 0,
                age_s: 0,
            },
        )?)
    }

    /// Makes it one that nothing is known of.
    pub fn forget(&self, service: &Service) -> Result<(), ConnectivityError> {
        Ok(self.datapath.forget_client(&self.source(service)?.to_string())?)
    }

    /// Likewise of a client id.
    pub fn forget_id(&self, id: &str) {
        let _ = self.datapath.forget_client(id);
    }

    fn source(&self, service: &Service) -> std::io::Result<IpAddr> {
        route::source_towards(service.addr, Some(self.config.interface.as_bytes()))
    }

    fn real_of(&self, client: SocketAddr, vip: SocketAddr) -> Option<IpAddr> {
        self.balancer.as_ref()?.real_of(client, vip)
    }

    /// Binds a socket to a port that leads to a real; if that does not matter, or cannot be known, to any.
    fn bind(
        &self,
        socket: &Socket,
        from: IpAddr,
        to: Option<(SocketAddr, IpAddr)>,
    ) -> Result<(), String> {
        let mut others = Vec::new();
        let Some((vip, real)) = to.filter(|_| self.balancer.is_some()) else {
            return socket.bind(&SocketAddr::new(from, 0).into()).map_err(|e| e.to_string());
        };
        for _ in 0..PORTS {
            let port = 32_768 + (getrandom::u32().map_err(|e| e.to_string())? % 28_000) as u16;
            let real_of_new =
                |balancer: &RealOfFlow| balancer.real_of_new(SocketAddr::new(from, port), vip);
            match self.balancer.as_ref().and_then(real_of_new) {
                Some(it)
                    if it == real && socket.bind(&SocketAddr::new(from, port).into()).is_ok() =>
                {
                    return Ok(());
                }
                Some(other) if other != real && !others.contains(&other) => others.push(other),
                _ => {}
            }
        }
        Err(match &others[..] {
            [] => format!("the balancer sends nothing of {vip} to any real"),
            [one] => format!("clients are spread by address, and this host's go to {one}"),
            _ => format!("the balancer sends no port of this host to it, of {PORTS}"),
        })
    }
}

impl From {
    /// Connects to a service. `to`: to which real of which VIP, where that is to be chosen by the port. The error is
    /// whether that cannot be, and why.
    pub async fn open(
        &self,
        service: &Service,
        to: Option<(SocketAddr, IpAddr)>,
    ) -> Result<Opened, (bool, String)> {
        let failed = |e: std::io::Error| (false, format!("a socket: {e}"));
        let address = SocketAddr::new(service.addr, service.port);
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP));
        let socket = socket.map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        socket.set_tcp_nodelay(true).map_err(failed)?;
        match self {
            Self::Network(from) => {
                socket.bind(&SocketAddr::new(*from, 0).into()).map_err(failed)?;
            }
            Self::Here(here) => {
                let device = Some(here.config.interface.as_bytes());
                socket.bind_device(device).map_err(failed)?;
                let cookie = socket.cookie().map_err(failed)?;
                here.frames.add(cookie).map_err(|e| (false, e.to_string()))?;
                let from = here.source(service).map_err(failed)?;
                here.bind(&socket, from, to).map_err(|why| (true, why))?;
            }
        }
        let client = socket.local_addr().map_err(failed)?.as_socket().unwrap_or(address);
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(address);
        match tokio::time::timeout(PATIENCE, connecting).await {
            Ok(Ok(stream)) => Ok(Opened { client: stream.local_addr().unwrap_or(client), stream }),
            Ok(Err(e)) => Err((false, format!("connecting: {e}"))),
            Err(_) => Err((false, format!("no SYN-ACK in {} s", PATIENCE.as_secs()))),
        }
    }
}
