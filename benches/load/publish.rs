//! Sends by the clock.

use std::io::{Error, Read as _, Result, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use clap::Args;

use crate::now_ns;

#[derive(Debug, Args)]
pub struct Publish {
    /// Where to connect to
    #[arg(long)]
    to: SocketAddr,
    /// How many connections
    #[arg(long, default_value_t = 100)]
    connections: usize,
    /// Messages a second, over all connections
    #[arg(long, default_value_t = 10_000.0)]
    rate: f64,
    /// Seconds to publish for
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Bytes of a message's payload, at least 8
    #[arg(long, default_value_t = 200)]
    size: usize,
    /// Topics; connection N uses the Nth of them, in turn
    #[arg(long, value_delimiter = ',', default_value = "load/topic")]
    topics: Vec<String>,
    /// Each connection uses all topics in turn
    #[arg(long)]
    alternate: bool,
    /// Only open connections, publish once, and close, so many a second
    #[arg(long)]
    churn: bool,
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    let mut length = body.len();
    while length > 0x7f {
        bytes.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend(body);
    bytes
}

fn connect(id: &str) -> Vec<u8> {
    packet(0x10, &[&text(b"MQTT")[..], &[4, 2, 0, 0], &text(id.as_bytes())].concat())
}

impl Publish {
    fn message(&self, topic: &str) -> Vec<u8> {
        let payload = vec![0; self.size.max(8)];
        packet(0x30, &[&text(topic.as_bytes())[..], &payload].concat())
    }

    fn open(&self, n: usize) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(self.to)?;
        stream.set_nodelay(true)?;
        stream.write_all(&connect(&format!("load-{}-{n}", std::process::id())))?;
        Ok(stream)
    }

    pub fn run(&self) -> Result<()> {
        // Sleep for as long as was asked, not up to 50 µs longer.
        nix::sys::prctl::set_timerslack(1)?;
        if self.churn { self.churn() } else { self.publish() }
    }

    fn publish(&self) -> Result<()> {
        let started = Instant::now();
        let mut streams = Vec::new();
        // Not more at a time than a backlog holds.
        for batch in 0..self.connections.div_ceil(256) {
            let end = (256 * (batch + 1)).min(self.connections);
            let mut opened: Vec<_> =
                (256 * batch..end).map(|n| self.open(n)).collect::<Result<_>>()?;
            for stream in &mut opened {
                let mut connack = [0; 4];
                stream.read_exact(&mut connack)?;
                if connack != [0x20, 2, 0, 0] {
                    return Err(Error::other(format!("CONNACK: {connack:02x?}")));
                }
            }
            streams.extend(opened);
        }
        let opening = started.elapsed();
        let mut messages: Vec<Vec<u8>> = self.topics.iter().map(|t| self.message(t)).collect();
        // Each connection's first message, which may have to wait for others to be opened: without a
        // time, so that it does not count.
        for (n, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&messages[n % self.topics.len()])?;
            std::thread::sleep(Duration::from_micros(250));
        }
        std::thread::sleep(Duration::from_millis(500));
        let begin = now_ns();
        let interval = 1e9 / self.rate;
        let total = (self.rate * self.seconds) as u64;
        let mut late = 0u64;
        for i in 0..total {
            let due = begin + (i as f64 * interval) as u64;
            loop {
                let now = now_ns();
                if now >= due {
                    late = late.max(now - due);
                    break;
                }
                // Not by spinning: whoever is measured may need this processor.
                std::thread::sleep(Duration::from_nanos(due - now));
            }
            let n = i as usize % streams.len();
            let topic = if self.alternate { i as usize / streams.len() + n } else { n };
            let message = &mut messages[topic % self.topics.len()];
            let at = message.len() - self.size.max(8);
            message[at..at + 8].copy_from_slice(&due.to_be_bytes());
            streams[n].write_all(message)?;
        }
        let took = (now_ns() - begin) as f64 / 1e9;
        println!(
            "{}",
            serde_json::json!({
                "sent": total,
                "seconds": took,
                "rate": total as f64 / took,
                "opened_per_second": self.connections as f64 / opening.as_secs_f64(),
                "latest_ms": late as f64 / 1e6,
            })
        );
        for mut stream in streams {
            let _ = stream.write_all(&[0xe0, 0]);
        }
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }

    fn churn(&self) -> Result<()> {
        let begin = now_ns();
        let interval = 1e9 / self.rate;
        let total = (self.rate * self.seconds) as u64;
        let mut open = std::collections::VecDeque::new();
        for i in 0..total {
            let due = begin + (i as f64 * interval) as u64;
            std::thread::sleep(Duration::from_nanos(due.saturating_sub(now_ns())));
            let mut stream = self.open(i as usize)?;
            let mut message = self.message(&self.topics[i as usize % self.topics.len()]);
            let at = message.len() - self.size.max(8);
            message[at..at + 8].copy_from_slice(&due.to_be_bytes());
            message.extend([0xe0, 0]);
            stream.write_all(&message)?;
            open.push_back(stream);
            if open.len() > self.connections {
                drop_read(open.pop_front())?;
            }
        }
        let took = (now_ns() - begin) as f64 / 1e9;
        while !open.is_empty() {
            drop_read(open.pop_front())?;
        }
        let rate = total as f64 / took;
        println!("{}", serde_json::json!({ "sent": total, "seconds": took, "rate": rate }));
        Ok(())
    }
}

/// Reads to the end, so that closing is no RST.
fn drop_read(stream: Option<TcpStream>) -> Result<()> {
    let mut rest = Vec::new();
    if let Some(mut stream) = stream {
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.read_to_end(&mut rest)?;
    }
    Ok(())
}
