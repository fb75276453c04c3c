//! TLS from clients to their brokers: bound by server name.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::{
    self, ClientConfig, ClientConnection, RootCertStore, StreamOwned, pki_types::CertificateDer,
};

use crate::support::lab::Lab;
use crate::support::mqtt;
use crate::support::net::wait_for;
use crate::support::session::enter;
use crate::support::wire::{Fate, Wire};
use mqtt_fwd::kernel::takeover;

/// Two tenants, and all else, with the brokers of the lab that have their certificates.
const TENANTS: [(&str, &[u32]); 3] = [
    ("tenant-a.lab.example", &[1, 2]),
    ("tenant-b.lab.example", &[3, 4]),
    ("other.default.lab.example", &[5, 6]),
];
const SERVICES: [&str; 2] = ["10.1.50.200:8883", "[fd01:50::200]:8883"];

fn tls() -> Option<Lab> {
    if !takeover::supported() {
        eprintln!("skipped: this kernel has no bpf_sk_assign_tcp_reqsk (Linux 6.9)");
        return None;
    }
    let text = include_str!("../../scripts/lab.toml");
    Some(Lab::up(text, &["--tls"]))
}

/// A client's connection.
struct Session {
    name: &'static str,
    reals: &'static [u32],
    service: SocketAddr,
    messages: Vec<String>,
    qos: u8,
    /// Protocols of ALPN, which make a ClientHello longer than a segment.
    padding: usize,
    /// TCP_NODELAY.
    hurries: bool,
}

fn sessions(tag: &str, count: usize, padding: usize) -> Vec<Session> {
    (0..count)
        .map(|i| {
            let (name, reals) = TENANTS[i % 3];
            Session {
                name,
                reals,
                service: SERVICES[i / 3 % 2].parse().unwrap(),
                messages: (0..3).map(|m| format!("{tag}-{i}-{m}")).collect(),
                qos: (i / 6 % 2) as u8,
                padding,
                hurries: i / 12 % 2 == 0,
            }
        })
        .collect()
}

fn client_config(lab: &Lab, padding: usize) -> Arc<ClientConfig> {
    let ca = PathBuf::from(format!("/run/mqtt-fwd-lab/{}/tls/ca.crt", lab.name));
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    // No resumption: each is a whole ClientHello.
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = (0..padding).map(|i| format!("{i:050}").into_bytes()).collect();
    Arc::new(config)
}

impl Session {
    fn run(&self, lab: &Lab, host: &str, config: &Arc<ClientConfig>) -> std::io::Result<()> {
        enter(lab, host);
        // Six losses of one segment in a row take 13 s.
        let limit = Duration::from_secs(60);
        let tcp = TcpStream::connect_timeout(&self.service, limit)?;
        tcp.set_read_timeout(Some(limit))?;
        tcp.set_nodelay(self.hurries)?;
        let port = tcp.local_addr()?.port();
        let name = ServerName::try_from(self.name).unwrap();
        let connection = ClientConnection::new(Arc::clone(config), name).unwrap();
        let mut stream = StreamOwned::new(connection, tcp);
        self.talk(&mut stream)
            .map_err(|e| std::io::Error::other(format!("{} from port {port}: {e}", self.name)))
    }

    fn talk(&self, stream: &mut StreamOwned<ClientConnection, TcpStream>) -> std::io::Result<()> {
        let connect = mqtt::connect_as(4, 2, self.messages[0].as_bytes(), &[]);
        stream.write_all(&connect)?;
        let mut connack = [0; 4];
        stream.read_exact(&mut connack)?;
        assert_eq!(connack, [0x20, 2, 0, 0]);
        for message in &self.messages {
            stream.write_all(&mqtt::publish(b"tls/topic", self.qos, message.as_bytes()))?;
            if self.qos == 1 {
                let mut puback = [0; 4];
                stream.read_exact(&mut puback)?;
                assert_eq!(puback, [0x40, 2, 0, 7]);
            }
        }
        // Its broker closes: then it has read all of it.
        stream.write_all(&mqtt::disconnect())?;
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => Err(e),
            _ => Ok(()),
        }
    }
}

fn run_all(lab: &Lab, host: &str, sessions: &[Session], at_once: usize) {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(session) = sessions.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let config = client_config(lab, session.padding);
                    if let Err(error) = session.run(lab, host, &config) {
                        failed.lock().unwrap().push(error.to_string());
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {}: {failed:#?}", failed.len(), sessions.len());
}

/// Each message is at its tenant's brokers: once, or with QoS 1 at least once.
fn all_right(lab: &Lab, sessions: &[Session]) {
    let messages: Vec<_> = sessions.iter().flat_map(|s| &s.messages).collect();
    let all = lab.arrivals_of(&messages);
    for session in sessions {
        for message in &session.messages {
            let at = &all[message];
            assert!(at.iter().all(|r| session.reals.contains(r)), "{message}: {at:?}");
            assert!(session.qos == 1 || at.len() == 1, "{message} {} times", at.len());
        }
    }
}

#[test]
fn each_client_is_served_by_the_brokers_of_the_name_that_it_asks_for() {
    let Some(lab) = tls() else { return };
    let sessions = sessions("plain", 240, 0);
    run_all(&lab, "c1", &sessions, 8);
    all_right(&lab, &sessions);
    assert_eq!(lab.counter("bound_server_name"), 160);
    assert_eq!(lab.counter("fallback_no_server_name"), 80);
    let flows = lab.mqtt_fwd(&["flows"]);
    assert!(flows.contains("tenant-a.lab.example"), "{flows}");

    // Another stack, and a name that only a wildcard has.
    let hosts = format!("/run/mqtt-fwd-lab/{}/hosts", lab.name);
    std::fs::write(&hosts, "10.1.50.200 x.tenant-a.lab.example\n").unwrap();
    let ca = format!("/run/mqtt-fwd-lab/{}/tls/ca.crt", lab.name);
    let publish = format!(
        "mount --bind {hosts} /etc/hosts && mosquitto_pub -h x.tenant-a.lab.example -p 8883 --cafile {ca} -t \
         tls/topic -m from-mosquitto -q 1"
    );
    lab.ok("c2", &["unshare", "-m", "sh", "-c", &publish]);
    assert!([1, 2].contains(&lab.wait_received("tls/topic from-mosquitto")));
}

#[test]
fn a_name_in_a_later_segment_is_waited_for() {
    let Some(lab) = tls() else { return };
    // One segment of the name's may be in front of it, or two.
    for padding in [30, 60] {
        let sessions = sessions(&format!("long-{padding}"), 120, padding);
        run_all(&lab, "c1", &sessions, 8);
        all_right(&lab, &sessions);
    }
    assert!(lab.counter("hello_held") > 50, "{}", lab.mqtt_fwd(&["counters"]));
    assert_eq!(lab.counter("fallback_hello_cut"), 0);
}

#[test]
fn loss_delays_and_misplaces_nothing() {
    let Some(lab) = tls() else { return };
    let percent = Arc::new(Mutex::new(0u64));
    let rule = |mut state: u64| {
        let percent = Arc::clone(&percent);
        Box::new(move |_: Option<_>| {
            // xorshift (Marsaglia): the same losses each time.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if state % 100 < *percent.lock().unwrap() { Fate::Lost } else { Fate::Pass }
        })
    };
    let _client = Wire::of_client(&lab, "c1", rule(1883));
    let _balancer = Wire::of_balancer(&lab, rule(8883));
    for (share, count) in [(1, 120), (5, 60), (10, 60)] {
        for padding in [0, 30] {
            *percent.lock().unwrap() = share;
            let sessions = sessions(&format!("loss-{share}-{padding}"), count, padding);
            run_all(&lab, "c1", &sessions, 24);
            *percent.lock().unwrap() = 0;
            all_right(&lab, &sessions);
        }
    }
    println!("{}", lab.mqtt_fwd(&["counters"]));
    assert_eq!(lab.counter("fallback_hello_cut"), 0, "{}", lab.mqtt_fwd(&["counters"]));
}

/// The lab's configuration, with checks of its TLS services by this.
fn checked(check: &str) -> String {
    include_str!("../../scripts/lab.toml").replace(
        "#tls# protocol = \"tls\"\n",
        &format!("#tls# protocol = \"tls\"\n#tls# health_check = {{ {check}, interval = \"300ms\", timeout = \"250ms\" }}\n"),
    )
}

#[test]
fn checks_see_names_chains_and_expiry_and_a_test_reaches_every_broker() {
    if !takeover::supported() {
        return;
    }
    for check in ["type = \"tls\"", "type = \"mqtt\"", "type = \"mqtt\", path = \"encapsulated\""] {
        let lab = Lab::up(&checked(check), &["--tls"]);
        let reals = || lab.mqtt_fwd(&["reals", "--json"]);
        wait_for(&format!("all reals up by {check}: {}", reals()), || {
            let rows: serde_json::Value = serde_json::from_str(&reals()).unwrap();
            let rows = rows["reals"].as_array().unwrap().clone();
            let tls = rows.iter().filter(|r| r["service"].as_str().unwrap().starts_with("mqtts"));
            let up = tls.filter(|r| r["state"] == "up" && r["certificate_expires"].is_u64());
            (up.count() == 12).then_some(())
        });
        if check != "type = \"tls\"" {
            continue;
        }
        for service in ["mqtts", "mqtts6"] {
            let tested = lab.mqtt_fwd(&["test", "--service", service, "--json"]);
            let tested: serde_json::Value = serde_json::from_str(&tested).unwrap();
            let rows = tested["messages"].as_array().unwrap();
            // QoS 0, QoS 1, and one that fills a segment, to each of six brokers.
            assert_eq!(rows.iter().filter(|r| r["outcome"] == "arrived").count(), 18, "{tested:#}");
        }
        let explained = lab.mqtt_fwd(&["explain", "server-name", "X.Tenant-A.lab.example"]);
        assert!(explained.contains("sni *.tenant-a.lab.example"), "{explained}");
        assert!(explained.contains("tenant-a: 10.1.3.201, 10.1.3.202"), "{explained}");

        // One that expires soon is said, and one of another name is down.
        let run = format!("/run/mqtt-fwd-lab/{}", lab.name);
        let again = format!(
            "openssl x509 -req -in {run}/tls/tenant-a.csr -CA {run}/tls/ca.crt -CAkey {run}/tls/ca.key -days 5 \
             -copy_extensions copy -out {run}/tls/tenant-a.crt"
        );
        lab.ok("lb", &["sh", "-c", &again]);
        for kind in ["crt", "key"] {
            std::fs::copy(
                format!("{run}/tls/default.{kind}"),
                format!("{run}/tls/tenant-b.{kind}"),
            )
            .unwrap();
        }
        for real in ["r1", "r3"] {
            let pattern = format!("mosquitto -c {run}/{real}.conf");
            std::process::Command::new("pkill").args(["-HUP", "-f", &pattern]).status().unwrap();
        }
        wait_for(&format!("r3 to be down: {}", reals()), || {
            let text = lab.mqtt_fwd(&["reals"]);
            let is_it = |l: &str| l.contains("10.1.3.203") && l.contains("not valid for name");
            text.lines().any(|l| is_it(l) && l.contains("down")).then_some(())
        });
        wait_for("the certificate of r1 to be said to expire", || {
            let status = lab.exec("lb", &["mqtt-fwd", "status"]);
            let status = String::from_utf8_lossy(&status.stdout).into_owned();
            let said = "real 10.1.3.201 of group tenant-a (mqtts) shows a certificate that expires in 4 days";
            status.contains(said).then_some(())
        });
    }
}

#[test]
fn a_capture_is_replayed_by_its_server_names() {
    let Some(lab) = tls() else { return };
    let file = std::env::temp_dir().join(format!("{}.pcap", lab.name));
    let mut capture = lab
        .script("exec")
        .args(["gw", "tcpdump", "-U", "--immediate-mode", "-i", "any", "-s", "2048", "-w"])
        .args([file.to_str().unwrap(), "tcp dst port 8883"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let size = || std::fs::metadata(&file).map_or(0, |m| m.len());
    wait_for("the capture", || (size() >= 24).then_some(()));
    let mut all = sessions("replayed", 30, 0);
    all.extend(sessions("replayed-long", 30, 30));
    all.retain(|session| session.service.is_ipv4());
    run_all(&lab, "c1", &all, 4);
    all_right(&lab, &all);
    std::thread::sleep(Duration::from_millis(500));
    let pattern = format!("tcpdump.*{}", file.to_str().unwrap());
    std::process::Command::new("pkill").args(["-INT", "-f", &pattern]).status().unwrap();
    capture.wait().unwrap();
    let report = lab.mqtt_fwd(&["replay", file.to_str().unwrap(), "--json"]);
    std::fs::remove_file(&file).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let rows = report["tls"].as_array().unwrap();
    assert_eq!(rows.len(), all.len(), "{report:#}");
    for row in rows {
        let group = match row["server_name"].as_str().unwrap() {
            "tenant-a.lab.example" => "tenant-a",
            "tenant-b.lab.example" => "tenant-b",
            _ => "default",
        };
        assert_eq!(row["went_to"], group, "{row}");
    }
}

#[test]
fn who_asks_for_no_tenant_is_bound_by_what_was_imported_or_gets_a_relay_that_ends_tls() {
    let Some(lab) = tls() else { return };
    // Without a relay: an address whose topic somebody knows.
    let records = format!("/run/mqtt-fwd-lab/{}/records.csv", lab.name);
    std::fs::write(&records, "service,by,client,topic\nmqtts,address,10.1.1.3,tenant-b/meter\n")
        .unwrap();
    lab.mqtt_fwd(&["clients", "import", &records]);
    let session = |tag: &str, reals| Session {
        name: "other.default.lab.example",
        reals,
        service: SERVICES[0].parse().unwrap(),
        messages: vec![tag.to_owned()],
        qos: 1,
        padding: 0,
        hurries: true,
    };
    let config = client_config(&lab, 0);
    let error = std::thread::scope(|s| {
        s.spawn(|| session("imported", &[3, 4]).run(&lab, "c3", &config)).join().unwrap()
    });
    // Brokers of tenant-b have no certificate of that name: the client is told, and by them.
    let error = error.unwrap_err().to_string();
    assert!(error.contains("tenant-b.lab.example"), "{error}");
    let stranger = session("stranger", &[5, 6]);
    run_all(&lab, "c1", std::slice::from_ref(&stranger), 1);
    all_right(&lab, &[stranger]);
    drop(lab);

    let lab = Lab::up(include_str!("../../scripts/lab.toml"), &["--tls", "--relay"]);
    let config = client_config(&lab, 0);
    std::thread::scope(|s| {
        s.spawn(|| {
            enter(&lab, "c1");
            for service in SERVICES {
                let tcp = TcpStream::connect(service).unwrap();
                let name = ServerName::try_from("other.default.lab.example").unwrap();
                let connection = ClientConnection::new(Arc::clone(&config), name).unwrap();
                let mut stream = StreamOwned::new(connection, tcp);
                stream.write_all(&mqtt::connect_as(4, 2, service.as_bytes(), &[])).unwrap();
                let mut connack = [0; 4];
                stream.read_exact(&mut connack).unwrap();
                for topic in ["tenant-b/x", "other/x"] {
                    let message = format!("relayed {topic} {service}");
                    let publish = mqtt::publish(topic.as_bytes(), 1, message.as_bytes());
                    stream.write_all(&publish).unwrap();
                    let mut puback = [0; 4];
                    stream.read_exact(&mut puback).unwrap();
                }
                stream.write_all(&mqtt::disconnect()).unwrap();
            }
        });
    });
    // By topic, one connection to several groups; the tenants' own names go past the relay.
    for service in SERVICES {
        let of_tenant = lab.wait_received(&format!("tenant-b/x relayed tenant-b/x {service}"));
        assert!([3, 4].contains(&of_tenant));
        let other = lab.wait_received(&format!("other/x relayed other/x {service}"));
        assert!([5, 6].contains(&other));
    }
    let direct = sessions("direct", 12, 0);
    let direct: Vec<Session> =
        direct.into_iter().filter(|s| s.name.starts_with("tenant")).collect();
    run_all(&lab, "c1", &direct, 4);
    all_right(&lab, &direct);
    assert_eq!(lab.counter("bound_server_name"), direct.len() as u64);
    let events = lab.mqtt_fwd(&["events", "--backlog", "--seconds", "1"]);
    assert!(
        events.contains("to tenant-a, by server name, asks for tenant-a.lab.example"),
        "{events}"
    );
    assert!(events.contains("to relay, by"), "{events}");
}
