//! The sink.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Result};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use clap::Args;
use hdrhistogram::Histogram;
use mqtt_fwd::mqtt::wire;
use tokio::io::AsyncWriteExt as _;
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
    /// Filters, assigned to subscribers round-robin
    #[arg(long, value_delimiter = ',')]
    filters: Vec<String>,
    /// Subscribers, assigned to namespaces round-robin; one in each if not given
    #[arg(long, requires = "subscribe")]
    connections: Option<usize>,
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
        if let Some(broker) = self.subscribe {
            for n in 0..self.connections.unwrap_or(namespaces.len()) {
                let namespace = &namespaces[n % namespaces.len()];
                enter(namespace)?;
                let mut stream = TcpStream::connect(broker).await?;
                stream.set_nodelay(true)?;
                let id = format!("sink-{n}");
                let filter = self.filters[n % self.filters.len()].as_bytes();
                stream.write_all(&mqtt::connect_as(4, 0x02, id.as_bytes(), &[])).await?;
                stream.write_all(&mqtt::subscribe(filter)).await?;
                tokio::spawn(connection(stream, namespace.clone(), Arc::clone(&counts)));
            }
        }
        for namespace in namespaces {
            enter(namespace)?;
            for addr in &self.listen {
                let listener = TcpListener::bind(addr).await?;
                // Accepted connections inherit it.
                socket2::SockRef::from(&listener).set_tcp_nodelay(true)?;
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

/// Bytes to read at a time.
const READ: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

async fn connection(
    mut stream: TcpStream,
    namespace: String,
    counts: Arc<Mutex<Counts>>,
) -> Result<()> {
    counts.lock().expect("no thread panics").connections += 1;
    let mut rest = Vec::new();
    loop {
        stream.readable().await?;
        let (mut answers, mut ended) = (Vec::new(), false);
        // One buffer for all connections, of which most are short or idle.
        let end = BUFFER.with_borrow_mut(|buffer| {
            let mut length = rest.len();
            if buffer.len() < length + READ {
                buffer.resize(length + READ, 0);
            }
            buffer[..length].copy_from_slice(&rest);
            match stream.try_read(&mut buffer[length..]) {
                Ok(0) => return Ok(true),
                Ok(n) => length += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
            let mut at = 0;
            let now = now_ns();
            let mut counts = counts.lock().expect("no thread panics");
            while let Ok(Some(h)) = wire::header(&buffer[at..length]) {
                let Some(packet) = buffer[..length].get(at..at + h.total()) else { break };
                match h.kind() {
                    wire::kind::CONNECT => answers.extend([0x20, 2, 0, 0]),
                    wire::kind::DISCONNECT => ended = true,
                    wire::kind::PINGREQ => answers.extend([0xd0, 0]),
                    wire::kind::PUBLISH => {
                        let Ok(Some(p)) = wire::publish(packet, h, false) else { return Ok(true) };
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
            rest.clear();
            rest.extend_from_slice(&buffer[at..length]);
            Ok(false)
        })?;
        if !answers.is_empty() {
            stream.write_all(&answers).await?;
        }
        if end || ended {
            return Ok(());
        }
    }
}
