//! TLS, WebSocket and the PROXY protocol.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{self, Message, WebSocket};

use crate::bed::{Bed, RELAY};
use crate::client::{Client, Wire, connect};
use crate::support::authority::Authority;

const LISTENERS: &str = r#"
listener = [
    { port = 8883, tls = { certificate = "@DIR@/relay.crt", key = "@DIR@/relay.key" } },
    { port = 8884, tls = { certificate = "@DIR@/relay.crt", key = "@DIR@/relay.key", client_ca = "@DIR@/ca.crt", username_from_certificate = "common_name" } },
    { port = 8083, websocket = true },
    { port = 8084, websocket = true, tls = { certificate = "@DIR@/relay.crt", key = "@DIR@/relay.key" } },
]
"#;

impl Wire for StreamOwned<ClientConnection, TcpStream> {
    fn patience(&mut self, patience: Duration) {
        self.sock.set_read_timeout(Some(patience)).unwrap();
    }
}

/// A stream of bytes in WebSocket messages, as awkward as it may be: each byte a message.
pub struct InMessages<S> {
    socket: WebSocket<S>,
    rest: Vec<u8>,
}

impl<S: Read + Write> Read for InMessages<S> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.rest.is_empty() {
            match self.socket.read() {
                Ok(Message::Binary(bytes)) => self.rest = bytes.to_vec(),
                Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed) => return Ok(0),
                Ok(_) => {}
                Err(tungstenite::Error::Io(e)) => return Err(e),
                Err(e) => return Err(std::io::Error::other(e)),
            }
        }
        let n = self.rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&self.rest[..n]);
        self.rest.drain(..n);
        Ok(n)
    }
}

impl<S: Read + Write> Write for InMessages<S> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            self.socket.send(Message::binary(vec![*byte])).map_err(std::io::Error::other)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<S: Read + Write + Wire> Wire for InMessages<S> {
    fn patience(&mut self, patience: Duration) {
        self.socket.get_mut().patience(patience);
    }
}

fn over_tls(
    bed: &Bed,
    port: u16,
    with_certificate: bool,
) -> StreamOwned<ClientConnection, TcpStream> {
    over_tls_to(bed, port, with_certificate, "relay.test")
}

fn trusting(bed: &Bed) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(bed.dir.join("ca.crt")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
}

fn over_tls_to(
    bed: &Bed,
    port: u16,
    with_certificate: bool,
    name: &str,
) -> StreamOwned<ClientConnection, TcpStream> {
    let builder = trusting(bed);
    let config = if with_certificate {
        with_certificate_of(bed, builder, "client")
    } else {
        builder.with_no_client_auth()
    };
    tls_client(bed, port, config, name)
}

fn with_certificate_of(
    bed: &Bed,
    builder: rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>,
    file: &str,
) -> ClientConfig {
    let path = |end: &str| bed.dir.join(format!("{file}.{end}"));
    let chain = vec![CertificateDer::from_pem_file(path("crt")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(path("key")).unwrap();
    builder.with_client_auth_cert(chain, key).unwrap()
}

fn tls_client(
    bed: &Bed,
    port: u16,
    config: ClientConfig,
    name: &str,
) -> StreamOwned<ClientConnection, TcpStream> {
    let name = name.to_owned().try_into().unwrap();
    let stream = bed.stream(("10.9.1.200", port));
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream)
}

pub fn over_websocket<S: Read + Write>(stream: S, protocol: &str) -> Option<InMessages<S>> {
    let mut request = "ws://relay.test/mqtt".into_client_request().unwrap();
    request.headers_mut().insert("Sec-WebSocket-Protocol", protocol.parse().unwrap());
    let (socket, response) = tungstenite::client(request, stream).ok()?;
    let chosen = if protocol == "mqttv3.1" { "mqttv3.1" } else { "mqtt" };
    assert_eq!(response.headers()["Sec-WebSocket-Protocol"], chosen);
    Some(InMessages { socket, rest: Vec::new() })
}

/// Publishes and subscribes, messages of all sizes.
fn try_out(bed: &Bed, wire: impl Wire + 'static, id: &str) {
    let mut client = Client::new(wire, 4);
    client.send(&connect(4, id).packet());
    client.expect(&[0x20, 2, 0, 0]);
    client.subscribe(&["hum/#"], 1);
    for size in [0, 1, 200, 5000] {
        client.publish_and_wait("temp/x", 1, &vec![1; size]);
    }
    let mut other = bed.client(&format!("{id}-other"));
    for size in [1, 70_000, 1 << 20] {
        other.publish_and_wait("hum/x", 1, &vec![2; size]);
        assert_eq!(client.message().payload, vec![2; size]);
    }
    client.ping();
    client.send(&[0xe0, 0]);
}

#[test]
fn mqtt_over_tls_and_websocket_is_mqtt() {
    let mut bed = Bed::empty("", LISTENERS);
    let authority = Authority::new(&bed.dir);
    authority.sign(&bed.dir, "relay", "relay.test");
    authority.sign(&bed.dir, "client", "device-7");
    for broker in 1..=6 {
        bed.start_broker(broker);
    }
    bed.start_relay();

    try_out(&bed, over_tls(&bed, 8883, false), "tls");
    try_out(&bed, over_tls(&bed, 8884, true), "certificate");
    let ws = over_websocket(bed.stream(("10.9.1.200", 8083)), "mqtt").unwrap();
    try_out(&bed, ws, "ws");
    let wss = over_websocket(over_tls(&bed, 8084, false), "mqttv3.1, mqtt");
    try_out(&bed, wss.unwrap(), "wss");

    // Whichever thread accepts them, one serves them all, each as its port says.
    let others = (0..3).flat_map(|n| {
        let ws = over_websocket(bed.stream(("10.9.1.200", 8083)), "mqtt").unwrap();
        let tls = over_tls(&bed, 8883, false);
        let all = [Client::new(bed.stream(RELAY), 4), Client::new(tls, 4), Client::new(ws, 4)];
        all.into_iter().enumerate().map(move |(kind, mut client)| {
            client.send(&connect(4, &format!("other{n}-{kind}")).packet());
            client.expect(&[0x20, 2, 0, 0]);
            client
        })
    });
    assert_eq!(others.collect::<Vec<_>>().len(), 9);

    // Without the subprotocol, without a certificate, without TLS.
    assert!(over_websocket(bed.stream(("10.9.1.200", 8083)), "chat").is_none());
    let mut refused = over_tls(&bed, 8884, false);
    refused.patience(Duration::from_secs(5));
    let _ = refused.write_all(&connect(4, "none").packet());
    assert!(!matches!(refused.read(&mut [0; 8]), Ok(n) if n > 0));
    let mut plain = bed.stream(("10.9.1.200", 8883));
    plain.write_all(&connect(4, "plain").packet()).unwrap();
    plain.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert_ne!(answer.first(), Some(&0x20), "{answer:02x?}");

    // A new authority and certificate; the old connections stay.
    let mut old = Client::new(over_tls(&bed, 8883, false), 4);
    old.send(&connect(4, "old").packet());
    old.expect(&[0x20, 2, 0, 0]);
    Authority::new(&bed.dir).sign(&bed.dir, "relay", "relay.test");
    bed.signal_relay(nix::sys::signal::Signal::SIGHUP);
    crate::support::net::wait_for("the new certificate", || {
        bed.relay_log().contains("certificate reloaded").then_some(())
    });
    try_out(&bed, over_tls(&bed, 8883, false), "renewed");
    old.ping();
    // One that cannot be read changes nothing.
    std::fs::write(bed.dir.join("relay.crt"), "nonsense").unwrap();
    bed.signal_relay(nix::sys::signal::Signal::SIGHUP);
    crate::support::net::wait_for("the warning", || {
        bed.relay_log().contains("certificate not reloaded").then_some(())
    });
    try_out(&bed, over_tls(&bed, 8883, false), "kept");
}

/// What a broker that is a listener of the test's reads first.
fn first_bytes(
    bed: &mut Bed,
    listeners: &[std::net::TcpListener],
    client: impl FnOnce(&Bed),
) -> Vec<u8> {
    client(bed);
    for listener in listeners {
        listener.set_nonblocking(true).unwrap();
    }
    let mut stream = crate::support::net::wait_for("the relay", || {
        listeners.iter().find_map(|l| l.accept().ok())
    })
    .0;
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut bytes = vec![0; 512];
    let mut length = 0;
    // Until the CONNECT is there.
    while !bytes[..length].windows(4).any(|w| w == b"MQTT") {
        length += stream.read(&mut bytes[length..]).unwrap();
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn brokers_get_the_clients_address_and_the_name_in_its_certificate() {
    let mut bed = Bed::empty("", LISTENERS);
    let file = bed.dir.join("config.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let text = text.replace("name = \"default\",", "name = \"default\", proxy_protocol = true,");
    std::fs::write(&file, text).unwrap();
    let authority = Authority::new(&bed.dir);
    authority.sign(&bed.dir, "relay", "relay.test");
    authority.sign(&bed.dir, "client", "device-7");
    let listeners: Vec<_> = bed
        .inside(|| (5..=6).map(|n| std::net::TcpListener::bind(Bed::broker(n)).unwrap()).collect());
    bed.start_relay();
    let mut port = 0;
    let mut kept = None;
    let bytes = first_bytes(&mut bed, &listeners, |bed| {
        let mut stream = over_tls(bed, 8884, true);
        port = stream.sock.local_addr().unwrap().port();
        stream.write_all(&connect(4, "id").packet()).unwrap();
        kept = Some(stream);
    });
    let header = ppp::v2::Header::try_from(&bytes[..]).unwrap();
    assert_eq!(header.command, ppp::v2::Command::Proxy);
    let ppp::v2::Addresses::IPv4(addresses) = header.addresses else { panic!("{header:?}") };
    assert_eq!((addresses.source_port, addresses.destination_port), (port, 8884));
    assert_eq!(addresses.destination_address.to_string(), "10.9.1.200");
    let connect = &bytes[header.len()..];
    assert!(connect.windows(8).any(|w| w == b"device-7"), "{connect:02x?}");
}

/// CONNECT (MQTT 3.1.1 §3.1) with a user name, and a password if there is one.
fn connect_as(level: u8, username: &str, password: Option<&str>) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u16).to_be_bytes()[..], text.as_bytes()].concat();
    let mut body = b"\x00\x04MQTT".to_vec();
    body.extend([level, 0x82 | if password.is_some() { 0x40 } else { 0 }, 0, 60]);
    body.extend(if level == 5 { &[0][..] } else { &[] });
    body.extend([text("id"), text(username)].concat());
    body.extend(password.map(text).unwrap_or_default());
    [&[0x10, body.len() as u8][..], &body].concat()
}

#[test]
fn nobody_gets_a_user_name_that_is_not_in_a_certificate() {
    let mut bed = Bed::empty("", &LISTENERS.replace('\n', ""));
    let authority = Authority::new(&bed.dir);
    authority.sign(&bed.dir, "relay", "relay.test");
    authority.sign(&bed.dir, "client", "device-7");
    authority.sign(&bed.dir, "nameless", "");
    for broker in 1..=6 {
        bed.start_broker(broker);
    }
    bed.start_relay();
    let answer = |mut stream: Box<dyn Wire>, connect: &[u8]| {
        stream.patience(Duration::from_secs(5));
        stream.write_all(connect).unwrap();
        let mut answer: Vec<u8> = Vec::new();
        let mut buffer = [0; 16];
        while answer.len() < 4 {
            match stream.read(&mut buffer) {
                Ok(n @ 1..) => answer.extend(&buffer[..n]),
                _ => break,
            }
        }
        answer
    };
    let nameless = || {
        let config = with_certificate_of(&bed, trusting(&bed), "nameless");
        Box::new(tls_client(&bed, 8884, config, "relay.test"))
    };
    // A certificate without a common name stands for nobody, whatever its client says.
    assert_eq!(answer(nameless(), &connect_as(4, "admin", None)), [0x20, 2, 0, 5]);
    assert_eq!(answer(nameless(), &connect_as(4, "admin", Some("x"))), [0x20, 2, 0, 5]);
    assert_eq!(answer(nameless(), &connect_as(5, "admin", None)), [0x20, 3, 0, 0x87, 0]);
    // Nor does a name without a password on a listener that asks for no certificate.
    let plain = || Box::new(bed.stream(RELAY));
    assert_eq!(answer(plain(), &connect_as(4, "admin", None)), [0x20, 2, 0, 5]);
    assert_eq!(answer(plain(), &connect_as(4, "admin", Some("x"))), [0x20, 2, 0, 0]);
    assert_eq!(answer(plain(), &connect(4, "anonymous").packet()), [0x20, 2, 0, 0]);
    let named = || Box::new(over_tls(&bed, 8884, true));
    assert_eq!(answer(named(), &connect_as(4, "admin", None)), [0x20, 2, 0, 0]);
}

#[test]
fn alpn_and_subprotocol_are_what_the_listener_speaks() {
    let mut bed = Bed::empty("", &LISTENERS.replace('\n', ""));
    let authority = Authority::new(&bed.dir);
    authority.sign(&bed.dir, "relay", "relay.test");
    for broker in 1..=6 {
        bed.start_broker(broker);
    }
    bed.start_relay();
    let chosen = |port, offered: &[&[u8]]| {
        let mut config = trusting(&bed).with_no_client_auth();
        config.alpn_protocols = offered.iter().map(|protocol| protocol.to_vec()).collect();
        let mut stream = tls_client(&bed, port, config, "relay.test");
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).ok()?;
        }
        stream.conn.alpn_protocol().map(<[u8]>::to_vec)
    };
    let both: &[&[u8]] = &[b"http/1.1", b"mqtt"];
    assert_eq!(chosen(8883, both), Some(b"mqtt".to_vec()));
    assert_eq!(chosen(8084, both), Some(b"http/1.1".to_vec()));
    let ws = over_websocket(bed.stream(("10.9.1.200", 8083)), "mqttv3.1").unwrap();
    try_out(&bed, ws, "old");
}

#[test]
fn each_name_has_its_certificate() {
    let listener = r#"listener = [{ port = 8883, tls = {
        certificate = "@DIR@/relay.crt", key = "@DIR@/relay.key",
        additional = [{ certificate = "@DIR@/other.crt", key = "@DIR@/other.key" }] } }]"#;
    let mut bed = Bed::empty("", &listener.replace('\n', ""));
    let authority = Authority::new(&bed.dir);
    authority.sign(&bed.dir, "relay", "first");
    authority.sign_for(&bed.dir, "other", "second", &["Other.test", "*.sites.test"]);
    for broker in 1..=6 {
        bed.start_broker(broker);
    }
    bed.start_relay();
    let shown = |name: &str| {
        let mut stream = over_tls_to(&bed, 8883, false, name);
        let sent = stream.write_all(&connect(4, name).packet()).and_then(|()| stream.flush());
        sent.and_then(|()| stream.read(&mut [0; 4])).ok()?;
        let chain = stream.conn.peer_certificates().unwrap();
        Some(chain[0].to_vec())
    };
    let of = |file: &str| {
        CertificateDer::from_pem_file(bed.dir.join(format!("{file}.crt"))).unwrap().to_vec()
    };
    assert_eq!(shown("relay.test"), Some(of("relay")));
    assert_eq!(shown("other.test"), Some(of("other")));
    assert_eq!(shown("OTHER.test"), Some(of("other")));
    assert_eq!(shown("a.sites.test"), Some(of("other")));
    // The first, which clients that check the name do not take.
    assert_eq!(shown("a.b.sites.test"), None);
    assert_eq!(shown("unknown.test"), None);
}

/// A broker with TLS alone, which wants the relay's certificate.
fn start_tls_broker(bed: &mut Bed, n: usize) {
    let dir = bed.dir.to_str().unwrap().to_owned();
    bed.start_broker_with(
        n,
        &format!(
            "listener 8883 10.9.0.{n}\nallow_anonymous true\npersistence false\nuser root\n\
             max_queued_messages 0\nmessage_size_limit 0\nlog_type none\n\
             cafile {dir}/ca.crt\ncertfile {dir}/broker{n}.crt\nkeyfile {dir}/broker{n}.key\n\
             require_certificate true\n"
        ),
        8883,
    );
}

#[test]
fn brokers_may_speak_tls() {
    let mut bed = Bed::empty("", LISTENERS);
    let file = bed.dir.join("config.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let dir = bed.dir.to_str().unwrap().to_owned();
    let tls = format!(
        "tls = {{ ca = \"{dir}/ca.crt\", certificate = \"{dir}/client.crt\", key = \"{dir}/client.key\" }}"
    );
    let text = text.replace("name = \"temp\",", &format!("name = \"temp\", {tls},")).replace(
        "name = \"hum\",",
        &format!("name = \"hum\", {},", tls.replace("{ ca", "{ server_name = \"hum.test\", ca")),
    );
    std::fs::write(&file, text).unwrap();
    let authority = Authority::new(&bed.dir);
    authority.sign(&bed.dir, "relay", "relay.test");
    authority.sign(&bed.dir, "client", "the relay");
    for n in 1..=4 {
        let name = if n <= 2 { format!("10.9.0.{n}") } else { "hum.test".to_owned() };
        authority.sign_for(&bed.dir, &format!("broker{n}"), "broker", &[&name]);
        start_tls_broker(&mut bed, n);
    }
    for n in 5..=6 {
        bed.start_broker(n);
    }
    bed.start_relay();
    try_out(&bed, bed.stream(("10.9.1.200", 1883)), "plain");
    try_out(&bed, over_tls(&bed, 8883, false), "tls");

    // A broker that another authority vouches for gets nothing.
    for n in 1..=2 {
        bed.kill_broker(n);
    }
    let other = tempfile::tempdir().unwrap();
    let stranger = Authority::new(other.path());
    for n in 1..=2 {
        stranger.sign_for(&bed.dir, &format!("broker{n}"), "broker", &[&format!("10.9.0.{n}")]);
        start_tls_broker(&mut bed, n);
    }
    let mut client = bed.client("deceived");
    client.publish("temp/x", 1, b"secret");
    assert_ne!(client.try_packet().ok().flatten().map(|p| p[0]), Some(0x40), "no PUBACK");
}

/// Another balancer in front, which says who the client is: HAProxy's `send-proxy` and `send-proxy-v2`.
#[test]
fn a_balancer_in_front_says_who_the_client_is() {
    let listeners = r#"listener = [
        { port = 1884, accept_proxy = ["127.0.0.0/8", "10.9.1.200"] },
        { port = 8883, accept_proxy = ["10.9.1.200"], tls = { certificate = "@DIR@/relay.crt", key = "@DIR@/relay.key" } },
    ]"#;
    let mut bed = Bed::empty("connections_per_address = 3", &listeners.replace('\n', ""));
    let file = bed.dir.join("config.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let text = text.replace("name = \"default\",", "name = \"default\", proxy_protocol = true,");
    std::fs::write(&file, text).unwrap();
    Authority::new(&bed.dir).sign(&bed.dir, "relay", "relay.test");
    let listeners: Vec<_> = bed
        .inside(|| (5..=6).map(|n| std::net::TcpListener::bind(Bed::broker(n)).unwrap()).collect());
    bed.start_relay();
    let v1 = b"PROXY TCP4 192.0.2.7 10.9.1.200 4000 1884\r\n".to_vec();
    let v2 = [
        &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x10\xc0\0\x02\x08\x10\x01\x10\x02\x0f\xa0\x07\x5c"[..],
        b"\x04\0\x01x",
    ]
    .concat();
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec();
    for (header, source) in [(v1, "192.0.2.7:4000"), (v2, "192.0.2.8:4000"), (local, "10.9.1.200")]
    {
        let mut kept = None;
        let bytes = first_bytes(&mut bed, &listeners, |bed| {
            let mut stream = bed.stream((RELAY.split(':').next().unwrap(), 1884));
            // Byte by byte, as it may come.
            for byte in [&header[..], &connect(4, "id").packet()].concat() {
                stream.write_all(&[byte]).unwrap();
            }
            kept = Some(stream);
        });
        let header = ppp::v2::Header::try_from(&bytes[..]).unwrap();
        let ppp::v2::Addresses::IPv4(addresses) = header.addresses else { panic!("{header:?}") };
        let from = format!("{}:{}", addresses.source_address, addresses.source_port);
        assert!(from.starts_with(source), "{from} instead of {source}");
        drop(kept);
        // The relay tries the group's other broker, too.
        std::thread::sleep(Duration::from_millis(300));
        while listeners.iter().any(|l| l.accept().is_ok()) {}
    }
    // In front of TLS; and limits are the client's, not the balancer's.
    let come = |port: u16, header: &str| {
        let mut stream = bed.stream(("10.9.1.200", port));
        stream.write_all(header.as_bytes()).unwrap();
        stream
    };
    let config = Arc::new(trusting(&bed).with_no_client_auth());
    let over_tls = |client: usize| {
        let stream = come(8883, &format!("PROXY TCP4 192.0.2.{client} 10.9.1.200 4000 8883\r\n"));
        let name = "relay.test".to_owned().try_into().unwrap();
        let connection = ClientConnection::new(Arc::clone(&config), name).unwrap();
        let mut stream = StreamOwned::new(connection, stream);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).ok()?;
        }
        Some(stream)
    };
    let ten: Vec<_> = (1..=10).map(|n| over_tls(n).expect("a client each")).collect();
    let mut of_one: Vec<_> = (0..3).map(|_| over_tls(99).expect("three")).collect();
    assert!(over_tls(99).is_none(), "a fourth");
    of_one.clear();
    drop(ten);
    // From an address that is not listed, a header is not a CONNECT.
    let mut stranger = bed.inside(|| {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&std::net::SocketAddr::from(([10, 9, 0, 1], 0)).into()).unwrap();
        let to: std::net::SocketAddr = "10.9.1.200:1884".parse().unwrap();
        socket.connect(&to.into()).unwrap();
        TcpStream::from(socket)
    });
    stranger.write_all(b"PROXY TCP4 192.0.2.7 10.9.1.200 4000 1884\r\n").unwrap();
    stranger.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert!(matches!(stranger.read(&mut [0; 4]), Ok(0) | Err(_)));
    // Nor does a balancer come without one.
    let mut without = bed.stream(("10.9.1.200", 1884));
    without.write_all(&connect(4, "id").packet()).unwrap();
    without.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert!(matches!(without.read(&mut [0; 4]), Ok(0) | Err(_)));
}

#[test]
fn a_certificates_other_names_can_be_the_user_name() {
    let listener = r#"listener = [{ port = 8884, tls = {
        certificate = "@DIR@/relay.crt", key = "@DIR@/relay.key", client_ca = "@DIR@/ca.crt",
        username_from_certificate = "san_dns" } }]"#;
    let mut bed = Bed::empty("", &listener.replace('\n', ""));
    let authority = Authority::new(&bed.dir);
    authority.sign(&bed.dir, "relay", "relay.test");
    authority.sign_for(&bed.dir, "client", "", &["device-9.test"]);
    let listeners: Vec<_> = bed
        .inside(|| (5..=6).map(|n| std::net::TcpListener::bind(Bed::broker(n)).unwrap()).collect());
    bed.start_relay();
    let mut kept = None;
    let bytes = first_bytes(&mut bed, &listeners, |bed| {
        let mut stream = over_tls(bed, 8884, true);
        stream.write_all(&connect(4, "id").packet()).unwrap();
        kept = Some(stream);
    });
    assert!(bytes.windows(13).any(|w| w == b"device-9.test"), "{bytes:02x?}");
}
