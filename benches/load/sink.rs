//! The sink.

use std::collections::BTreeMap;
use std::io::Result;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use clap::Args;
use hdrhistogram::Histogram;
use mqtt_fwd::relay::scan;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

use crate::{enter, mqtt, now_ns};

#[derive(Debug, Args)]
pub struct Sink {
    /// Addresses to listen on
    #[arg(long, value_delimiter = ',')]
    listen: Vec<SocketAddr>,
    /// Named network namespaces, in each of which to listen, or to subscribe
    #[arg(long, value_delimiter = ',')]
    namespaces: Vec<String>,
    /// Broker to subscribe at, instead of listening
    #[arg(long, requires = "filters")]
    subscribe: Option<SocketAddr>,
    /// Filters, assigned to namespaces round-robin
    #[arg(long, value_delimiter = ',')]
    filters: Vec<String>,
}

struct Counts {
    messages: u64,
    connections: u64,
    latency: Histogram<u64>,
    /// By namespace and topic.
    arrivals: BTreeMap<String, BTreeMap<String, u64>>,
}

impl Sink {
    pub fn run(&self) -> Result<()> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(self.serve())
    }

    async fn serve(&self) -> Result<()> {
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds are right");
        let arrivals = BTreeMap::new();
        let counts =
            Arc::new(Mutex::new(Counts { messages: 0, connections: 0, latency, arrivals }));
        let here = [String::new()];
        let namespaces = if self.namespaces.is_empty() { &here[..] } else { &self.namespaces };
        for (n, namespace) in namespaces.iter().enumerate() {
            enter(namespace)?;
            if let Some(broker) = self.subscribe {
                let mut stream = TcpStream::connect(broker).await?;
                let id = format!("sink-{n}");
                let filter = self.filters[n % self.filters.len()].as_bytes();
                stream.write_all(&mqtt::connect_as(4, 0x02, id.as_bytes(), &[])).await?;
                stream.write_all(&mqtt::subscribe(filter)).await?;
                tokio::spawn(connection(stream, namespace.clone(), Arc::clone(&counts)));
            }
            for addr in &self.listen {
                let listener = TcpListener::bind(addr).await?;
                let (counts, namespace) = (Arc::clone(&counts), namespace.clone());
                tokio::spawn(async move {
                    while let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(connection(stream, namespace.clone(), Arc::clone(&counts)));
                    }
                });
            }
        }
        let mut end = signal(SignalKind::terminate())?;
        let mut report = signal(SignalKind::user_defined1())?;
        loop {
            let last = tokio::select! {
                _ = end.recv() => true,
                _ = report.recv() => false,
            };
            let mut counts = counts.lock().expect("no thread panics");
            counts.print();
            if last {
                return Ok(());
            }
            counts.latency.reset();
        }
    }
}

impl Counts {
    fn print(&self) {
        let c = self;
        let us = |q| c.latency.value_at_quantile(q) as f64 / 1000.0;
        println!(
            "{}",
            serde_json::json!({
                "messages": c.messages,
                "connections": c.connections,
                "p50_us": us(0.5),
                "p99_us": us(0.99),
                "p999_us": us(0.999),
                "max_us": c.latency.max() as f64 / 1000.0,
                "arrivals": c.arrivals,
            })
        );
    }
}

async fn connection(
    mut stream: TcpStream,
    namespace: String,
    counts: Arc<Mutex<Counts>>,
) -> Result<()> {
    counts.lock().expect("no thread panics").connections += 1;
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 64 << 10];
    let mut length = 0;
    loop {
        let n = stream.read(&mut buffer[length..]).await?;
        if n == 0 {
            return Ok(());
        }
        length += n;
        let mut at = 0;
        let (mut answers, mut ended) = (Vec::new(), false);
        {
            let now = now_ns();
            let mut counts = counts.lock().expect("no thread panics");
            while let Ok(Some(h)) = scan::header(&buffer[at..length]) {
                let Some(packet) = buffer[..length].get(at..at + h.total()) else { break };
                match h.kind() {
                    scan::kind::CONNECT => answers.extend([0x20, 2, 0, 0]),
                    scan::kind::DISCONNECT => ended = true,
                    scan::kind::PINGREQ => answers.extend([0xd0, 0]),
                    scan::kind::PUBLISH => {
                        let Ok(Some(p)) = scan::publish(packet, h, false) else { return Ok(()) };
                        let due = packet.get(p.payload_at..p.payload_at + 8);
                        let due =
                            due.map_or(0, |b| u64::from_be_bytes(b.try_into().expect("8 bytes")));
                        if due != 0 {
                            counts.messages += 1;
                            let topics = counts.arrivals.entry(namespace.clone()).or_default();
                            match topics.get_mut(p.topic) {
                                Some(count) => *count += 1,
                                None => {
                                    topics.insert(p.topic.to_owned(), 1);
                                }
                            }
                            counts.latency.saturating_record(now.saturating_sub(due).max(1));
                        }
                        if p.qos == 1 {
                            answers.extend([0x40, 2]);
                            answers.extend(p.id.to_be_bytes());
                        }
                    }
                    _ => {}
                }
                at += h.total();
            }
        }
        buffer.copy_within(at..length, 0);
        length -= at;
        if !answers.is_empty() {
            stream.write_all(&answers).await?;
        }
        if ended {
            return Ok(());
        }
    }
}
