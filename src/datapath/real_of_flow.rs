//! Which real has a flow: asked of the balancer's own program.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};

use etherparse::{LaxPacketHeaders, NetHeaders, PacketBuilder};
use libbpf_rs::Program;

use crate::config::Config;
use crate::kernel::chain::{self, Chain};
use crate::kernel::test_run;

/// The program in the balancer's position.
#[derive(Debug)]
pub struct RealOfFlow(OwnedFd);

impl RealOfFlow {
    /// `None`: there is none, or this process may not have it (of a Katran: CAP_SYS_ADMIN).
    pub fn open(config: &Config) -> Option<Self> {
        let pins = config.pins();
        if let Some((fd, _)) = pins.pinned_program("balancer_ingress") {
            return Some(Self(fd));
        }
        let chain = Chain::open(&pins).ok()??;
        Program::fd_from_id(chain.program_id(chain::BALANCER)?).ok().map(Self)
    }

    /// The real that a client's packets to a VIP are sent to: by a segment without data, which goes nowhere, and
    /// which the balancer counts as it counts any other.
    pub fn real_of(&self, client: SocketAddr, vip: SocketAddr) -> Option<IpAddr> {
        self.ask(client, vip, false)
    }

    /// The real that a new connection would be sent to: by its SYN, for which what the balancer remembers of an older
    /// one does not count.
    pub fn real_of_new(&self, client: SocketAddr, vip: SocketAddr) -> Option<IpAddr> {
        self.ask(client, vip, true)
    }

    fn ask(&self, client: SocketAddr, vip: SocketAddr, syn: bool) -> Option<IpAddr> {
        const HOPS: u8 = 64;
        let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let ip = match (client.ip(), vip.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => ethernet.ipv4(a.octets(), b.octets(), HOPS),
            (IpAddr::V6(a), IpAddr::V6(b)) => ethernet.ipv6(a.octets(), b.octets(), HOPS),
            _ => return None,
        };
        let mut frame = Vec::new();
        let tcp = ip.tcp(client.port(), vip.port(), 1, 1024);
        let tcp = if syn { tcp.syn() } else { tcp.ack(1) };
        tcp.write(&mut frame, &[]).ok()?;
        let run = test_run::run(self.0.as_fd(), &frame, 1).ok()?;
        if run.verdict != libbpf_sys::XDP_TX {
            return None;
        }
        // The outer header's destination.
        match LaxPacketHeaders::from_ethernet(&run.frame).ok()?.net? {
            NetHeaders::Ipv4(ip, _) => Some(ip.destination.into()),
            NetHeaders::Ipv6(ip, _) => Some(ip.destination.into()),
            NetHeaders::Arp(_) => None,
        }
    }
}
