//! The sink.

use std::io::Result;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use clap::Args;
use hdrhistogram::Histogram;
use mqtt_fwd::relay::scan;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

use crate::now_ns;

#[derive(Debug, Args)]
pub struct Sink {
    /// Addresses to listen on
    #[arg(long, value_delimiter = ',')]
    listen: Vec<SocketAddr>,
}

struct Counts {
    messages: u64,
    connections: u64,
    latency: Histogram<u64>,
}

impl Sink {
    pub fn run(&self) -> Result<()> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(self.serve())
    }

    async fn serve(&self) -> Result<()> {
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds are right");
        let counts = Arc::new(Mutex::new(Counts { messages: 0, connections: 0, latency }));
        for addr in &self.listen {
            let listener = TcpListener::bind(addr).await?;
            let counts = Arc::clone(&counts);
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(connection(stream, Arc::clone(&counts)));
                }
            });
        }
        signal(SignalKind::terminate())?.recv().await;
        let c = counts.lock().expect("no thread panics");
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
            })
        );
        Ok(())
    }
}

async fn connection(mut stream: TcpStream, counts: Arc<Mutex<Counts>>) -> Result<()> {
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
        let mut answers = Vec::new();
        {
            let now = now_ns();
            let mut counts = counts.lock().expect("no thread panics");
            while let Ok(Some(h)) = scan::header(&buffer[at..length]) {
                let Some(packet) = buffer[..length].get(at..at + h.total()) else { break };
                match h.kind() {
                    scan::kind::CONNECT => answers.extend([0x20, 2, 0, 0]),
                    scan::kind::DISCONNECT => return Ok(()),
                    scan::kind::PINGREQ => answers.extend([0xd0, 0]),
                    scan::kind::PUBLISH => {
                        let Ok(Some(p)) = scan::publish(packet, h, false) else { return Ok(()) };
                        let due = packet.get(p.payload_at..p.payload_at + 8);
                        let due =
                            due.map_or(0, |b| u64::from_be_bytes(b.try_into().expect("8 bytes")));
                        if due != 0 {
                            counts.messages += 1;
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
    }
}
