//! The generator.

use std::io::{Error, Read as _, Result, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZero;
use std::time::{Duration, Instant};

use clap::Args;

use crate::{enter, mqtt, now_ns};

#[derive(Debug, Args)]
pub struct Publish {
    /// Addresses to connect to, assigned to connections round-robin
    #[arg(long, value_delimiter = ',', required = true)]
    to: Vec<SocketAddr>,
    /// Named network namespaces, assigned to connections round-robin
    #[arg(long, value_delimiter = ',')]
    namespaces: Vec<String>,
    /// Number of connections
    #[arg(long, default_value_t = 100)]
    connections: usize,
    /// Messages a second, in total
    #[arg(long, default_value_t = 10_000.0)]
    rate: f64,
    /// Duration in seconds
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Payload size in bytes, at least 8
    #[arg(long, default_value_t = 200)]
    size: usize,
    /// Topics, assigned to connections round-robin
    #[arg(long, value_delimiter = ',', default_value = "load/topic")]
    topics: Vec<String>,
    /// Every connection alternates between all topics
    #[arg(long)]
    alternate: bool,
    /// Open a new connection for each message
    #[arg(long)]
    churn: bool,
}

impl Publish {
    fn message(&self, topic: &str) -> Vec<u8> {
        mqtt::publish(topic.as_bytes(), 0, &vec![0; self.size.max(8)])
    }

    fn open(&self, n: usize) -> Result<TcpStream> {
        if let Some(count) = NonZero::new(self.namespaces.len()) {
            enter(&self.namespaces[n % count])?;
        }
        let mut stream = TcpStream::connect(self.to[n % self.to.len()])?;
        stream.set_nodelay(true)?;
        let id = format!("load-{}-{n}", std::process::id());
        stream.write_all(&mqtt::connect_as(4, 0x02, id.as_bytes(), &[]))?;
        Ok(stream)
    }

    pub fn run(&self) -> Result<()> {
        // The default timer slack is 50 µs.
        nix::sys::prctl::set_timerslack(1)?;
        if self.churn { self.churn() } else { self.publish() }
    }

    fn publish(&self) -> Result<()> {
        let started = Instant::now();
        let mut streams = Vec::new();
        // In batches that fit into a listen backlog.
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
        // Warm-up: a proxy may open connections for the first message. Without a time, it is not counted.
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
                // Do not spin: the CPU is shared with what is measured.
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
            let _ = stream.write_all(&mqtt::disconnect());
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
            message.extend(mqtt::disconnect());
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

/// Reads to end of file, to avoid RST.
fn drop_read(stream: Option<TcpStream>) -> Result<()> {
    let mut rest = Vec::new();
    if let Some(mut stream) = stream {
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.read_to_end(&mut rest)?;
    }
    Ok(())
}
