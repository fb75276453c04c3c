//! Many connections through one relay at a time: RELAY_CONNECTIONS of them, by default as many as 20,000 open files are
//! enough for with clients, relay and brokers in one process. `scripts/kernels --relay` has 10,000.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mqtt_fwd::config::Config;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Barrier, Semaphore};

use crate::support::mqtt;

const RELAY: &str = "10.9.1.200:1883";
const CONFIG: &str = r#"
interface = "lo"
balancer = "embedded"
gateway_mac = "02:00:00:00:00:09"
[relay]
return_after = "0s"
connections = 100000
connections_per_address = 100000
connections_per_second = 100000
[[service]]
name = "mqtt"
address = "10.9.1.200"
default_group = "default"
relay = "relay"
group = [
    { name = "temp", vip = "10.9.2.1", reals = [{ address = "10.9.0.1" }, { address = "10.9.0.2" }] },
    { name = "hum", vip = "10.9.2.2", reals = [{ address = "10.9.0.3" }, { address = "10.9.0.4" }] },
    { name = "default", vip = "10.9.2.3", reals = [{ address = "10.9.0.5" }, { address = "10.9.0.6" }] },
    { name = "relay", vip = "10.9.2.4", reals = [{ address = "10.9.0.9" }] },
]
route = [{ topic = "temp/#", group = "temp" }, { topic = "hum/#", group = "hum" }]
"#;
const TOPICS: [&str; 3] = ["temp/x", "hum/x", "other"];

/// Clients that connect at the same time.
const AT_ONCE: usize = 200;

/// Reads a control packet (MQTT 3.1.1 §2.2) of less than 128 B behind its fixed header.
async fn packet(stream: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; 2];
    stream.read_exact(&mut head).await.ok()?;
    let mut body = vec![0; usize::from(head[1])];
    stream.read_exact(&mut body).await.ok()?;
    Some((head[0], body))
}

/// A broker that accepts everybody, acknowledges what is published, and counts it by topic.
async fn broker(listener: TcpListener, counts: Arc<[AtomicUsize; 3]>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let counts = Arc::clone(&counts);
        tokio::spawn(async move {
            while let Some((kind, body)) = packet(&mut stream).await {
                let answer = match kind >> 4 {
                    1 => vec![0x20, 2, 0, 0],
                    3 => {
                        let topic = &body[2..2 + usize::from(body[1])];
                        let which = TOPICS.iter().position(|t| t.as_bytes() == topic).unwrap();
                        counts[which].fetch_add(1, Ordering::Relaxed);
                        let id = &body[2 + topic.len()..][..2];
                        vec![0x40, 2, id[0], id[1]]
                    }
                    _ => continue,
                };
                if stream.write_all(&answer).await.is_err() {
                    return;
                }
            }
        });
    }
}

async fn client(n: usize, connecting: Arc<Semaphore>, all: Arc<Barrier>) {
    let permit = connecting.acquire().await.unwrap();
    let from: SocketAddr = format!("10.128.{}.{}:0", n / 250, n % 250 + 1).parse().unwrap();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(from).unwrap();
    let mut stream = socket.connect(RELAY.parse().unwrap()).await.unwrap();
    let id = format!("many-{n}");
    let mut connect = mqtt::connect_as(4, 2, id.as_bytes(), &[]);
    connect[10..12].fill(0); // no keep-alive: the others may take minutes
    stream.write_all(&connect).await.unwrap();
    assert_eq!(packet(&mut stream).await, Some((0x20, vec![0, 0])), "{id}");
    let topic = TOPICS[n % 3].as_bytes();
    publish(&mut stream, topic).await;
    drop(permit);
    all.wait().await;
    let _permit = connecting.acquire().await.unwrap();
    publish(&mut stream, topic).await;
}

async fn publish(stream: &mut TcpStream, topic: &[u8]) {
    stream.write_all(&mqtt::publish(topic, 1, b"x")).await.unwrap();
    let (kind, _) = packet(stream).await.expect("an acknowledgement");
    assert_eq!(kind, 0x40);
}

fn ip(args: &str) {
    let done = std::process::Command::new("ip").args(args.split(' ')).status();
    assert!(done.unwrap().success(), "ip {args}");
}

#[test]
fn many_clients_are_there_at_a_time_and_each_is_heard() {
    let wanted = std::env::var("RELAY_CONNECTIONS").ok().map(|n| n.parse::<usize>().unwrap());
    let connections = wanted.unwrap_or(2500);
    // Client, relay, the brokers' ends of two connections and the relay's.
    let files = connections as u64 * 6 + 1000;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let hard = most.max(files);
    setrlimit(Resource::RLIMIT_NOFILE, files, hard)
        .unwrap_or_else(|e| panic!("{files} open files for {connections} connections: {e}"));
    if wanted.is_none() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    }
    // Clients have an address each, since there are not so many ports.
    ip("link set lo up");
    ip("route add local 10.128.0.0/16 dev lo");
    ip("route add local 10.9.0.0/16 dev lo");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let counts = Arc::new([const { AtomicUsize::new(0) }; 3]);
        for n in 1..=6 {
            let listener = TcpListener::bind(format!("10.9.0.{n}:1883")).await.unwrap();
            tokio::spawn(broker(listener, Arc::clone(&counts)));
        }
        let config = Config::parse(std::path::Path::new("many.toml"), CONFIG).unwrap();
        std::thread::spawn(move || mqtt_fwd::relay::run(&config).unwrap());
        let started = Instant::now();
        while TcpStream::connect(RELAY).await.is_err() {
            assert!(started.elapsed() < Duration::from_secs(20), "the relay does not listen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let started = Instant::now();
        let connecting = Arc::new(Semaphore::new(AT_ONCE));
        let all = Arc::new(Barrier::new(connections));
        let clients: Vec<_> = (0..connections)
            .map(|n| tokio::spawn(client(n, Arc::clone(&connecting), Arc::clone(&all))))
            .collect();
        for client in clients {
            client.await.unwrap();
        }
        println!("{connections} connections at a time, two messages each: {:?}", started.elapsed());
        let got: Vec<_> = counts.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        assert_eq!(got.iter().sum::<usize>(), connections * 2, "{got:?}");
    });
}
