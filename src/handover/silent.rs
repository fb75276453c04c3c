//! Connections whose clients say nothing after CONNECT, and the keys in the datapath.

use std::os::fd::{AsFd as _, OwnedFd};

use libbpf_rs::Program;
use tracing::{debug, info};

use super::HandoverError;
use super::keys::{KeyFile, now};
use super::segment::Made;
use crate::config::Config;
use crate::datapath::{Datapath, Silent};
use crate::kernel::BpfError;
use crate::kernel::{test_run, xdp};

/// A client that has said nothing for so long after its CONNECT was answered is given to a broker as
/// it is: it may only listen to what its session or its will is for.
pub const SILENT_S: u64 = 3;

/// Brings the keys into the datapath: once, and whenever the file or the time says otherwise.
pub fn put_keys(config: &Config, datapath: &Datapath) -> Result<(), HandoverError> {
    if !config.uses_delayed_binding() {
        return Ok(());
    }
    let file = KeyFile::read(&config.handover_key)?;
    if datapath.put_cookie_keys(&file.cookie_keys(now()))? {
        let key = file.in_use(now());
        info!(epoch = key.epoch, fingerprint = key.fingerprint(), "handover key in use");
    }
    Ok(())
}

/// Binds connections whose clients are silent. Returns how many.
pub fn bind(config: &Config, datapath: &Datapath) -> Result<usize, HandoverError> {
    // In a fleet, another balancer may have gone on with it: that is asked first (`fleet`).
    if !config.uses_delayed_binding() || config.fleet.is_some() {
        return Ok(0);
    }
    let silent = datapath.silent_handovers(SILENT_S)?;
    if silent.is_empty() {
        return Ok(0);
    }
    let binder = Binder::open(config)?;
    let mut bound = 0;
    for connection in silent {
        bound += usize::from(binder.bind(datapath, &connection)?);
    }
    Ok(bound)
}

/// What binds them.
#[derive(Debug)]
pub struct Binder {
    program: OwnedFd,
    interface: i32,
}

impl Binder {
    /// By the pinned program.
    pub fn open(config: &Config) -> Result<Self, BpfError> {
        let path = config.pins().program("mqtt_fwd");
        let program = Program::fd_from_pinned_path(&path).map_err(|source| BpfError::Pin {
            path: path.clone(),
            action: "opening",
            source,
        })?;
        Ok(Self { program, interface: xdp::interface_index(&config.interface)? })
    }

    /// Whether it was still to be bound.
    pub fn bind(&self, datapath: &Datapath, connection: &Silent) -> Result<bool, HandoverError> {
        if !datapath.mark_silent(connection)? {
            return Ok(false);
        }
        debug!(client = %connection.client, "silent since CONNECT: bound without a message");
        test_run::inject(self.program.as_fd(), self.interface, &connect_again(connection))
            .map_err(HandoverError::Inject)?;
        Ok(true)
    }
}

/// The client's CONNECT, once more.
pub fn connect_again(s: &Silent) -> Vec<u8> {
    Made {
        client: s.client,
        service: s.service,
        seq: s.start,
        ack: s.server,
        timestamps: s.timestamps,
        payload: &s.connect,
    }
    .frame()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_injected_is_a_tcp_segment_with_right_checksums() {
        for (timestamps, client, service) in [
            (None, "10.1.1.1:40000", "10.1.50.200:1883"),
            (Some((1, 2)), "[fd01:1::1]:40000", "[fd01:50::200]:1883"),
        ] {
            let mut silent = Silent::between(client.parse().unwrap(), service.parse().unwrap());
            (silent.start, silent.server, silent.timestamps) = (1000, 5000, timestamps);
            silent.connect = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01c".to_vec();
            let frame = connect_again(&silent);
            let packet = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
            let tcp = packet.transport.unwrap().tcp().unwrap();
            assert_eq!((tcp.sequence_number, tcp.acknowledgment_number), (1000, 5000));
            let payload = packet.payload.slice();
            assert_eq!(payload, silent.connect);
            let right = match packet.net.unwrap() {
                etherparse::NetHeaders::Ipv4(ip, _) => {
                    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                    tcp.calc_checksum_ipv4(&ip, payload).unwrap()
                }
                etherparse::NetHeaders::Ipv6(ip, _) => {
                    tcp.calc_checksum_ipv6(&ip, payload).unwrap()
                }
                etherparse::NetHeaders::Arp(_) => unreachable!(),
            };
            assert_eq!(tcp.checksum, right);
        }
    }
}
