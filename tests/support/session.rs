//! An MQTT client's connection to a service, from a lab's client host: raw, so that a test says
//! what is written when.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use super::lab::Lab;
use super::mqtt;

pub const SERVICE: &str = "10.1.50.200:1883";
pub const SERVICE6: &str = "[fd01:50::200]:1883";

/// When a client writes its first messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// After CONNACK, as the standard's own example.
    Waits,
    /// At once, each packet a write of its own.
    Hurries,
    /// CONNECT and all messages in one write.
    OneWrite,
}

pub const STYLES: [Style; 3] = [Style::Waits, Style::Hurries, Style::OneWrite];

/// A client's connection.
#[derive(Debug, Clone)]
pub struct Session {
    pub host: String,
    pub service: SocketAddr,
    pub connect: Vec<u8>,
    pub style: Style,
    pub topic: String,
    pub messages: Vec<String>,
    pub qos: u8,
    /// Its own port, if it matters which.
    pub port: Option<u16>,
    /// At the end it goes away without a word: RST, and that may be lost.
    pub vanishes: bool,
}

impl Session {
    pub fn new(host: &str, service: &str, id: &str) -> Self {
        Self {
            host: host.to_owned(),
            service: service.parse().unwrap(),
            connect: mqtt::connect_as(4, 0x02, id.as_bytes(), &[]),
            style: Style::Waits,
            topic: String::new(),
            messages: Vec::new(),
            qos: 1,
            port: None,
            vanishes: false,
        }
    }

    /// Runs it to its end, in this thread, which is in the host's namespace from then on.
    pub fn run(&self, lab: &Lab) -> std::io::Result<()> {
        enter(lab, &self.host);
        let stream = match self.port {
            Some(port) => connect_from(port, self.service)?,
            None => TcpStream::connect_timeout(&self.service, Duration::from_secs(20))?,
        };
        let port = stream.local_addr()?.port();
        self.talk(stream).map_err(|e| std::io::Error::other(format!("port {port}: {e}")))
    }

    fn talk(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let publishes: Vec<Vec<u8>> = self
            .messages
            .iter()
            .map(|m| match (self.is_v5(), self.qos) {
                (true, 0) => mqtt::publish5(self.topic.as_bytes(), m.as_bytes()),
                _ => mqtt::publish(self.topic.as_bytes(), self.qos, m.as_bytes()),
            })
            .collect();
        match self.style {
            Style::Waits => {
                stream.write_all(&self.connect)?;
                self.connack(&mut stream)?;
                for publish in &publishes {
                    stream.write_all(publish)?;
                    self.acknowledged(&mut stream)?;
                }
            }
            Style::Hurries => {
                stream.write_all(&self.connect)?;
                for publish in &publishes {
                    stream.write_all(publish)?;
                }
            }
            Style::OneWrite => {
                let all = [&self.connect[..], &publishes.concat()].concat();
                stream.write_all(&all)?;
            }
        }
        if self.style != Style::Waits {
            self.connack(&mut stream)?;
            for _ in &publishes {
                self.acknowledged(&mut stream)?;
            }
        }
        if self.vanishes {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            set_option(&stream, libc::SOL_SOCKET, libc::SO_LINGER, &linger)?;
            return Ok(());
        }
        stream.write_all(&mqtt::disconnect())?;
        // With a port of its own, it lets the broker close first, and keep TIME_WAIT.
        if self.port.is_none() {
            stream.shutdown(Shutdown::Write)?;
        }
        // The broker closes: then it has read all of it.
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest)?;
        assert!(rest.is_empty(), "{rest:?}");
        Ok(())
    }

    fn is_v5(&self) -> bool {
        const LEVEL: usize = 8; // behind "MQTT"
        self.connect[LEVEL] == 5
    }

    /// With a return or reason code of 0; in MQTT 5 with any properties.
    fn connack(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        if !self.is_v5() {
            return expect(stream, &[0x20, 2, 0, 0]);
        }
        let mut header = [0; 4];
        stream.read_exact(&mut header)?;
        let mut properties = vec![0; usize::from(header[1]) - 2];
        stream.read_exact(&mut properties)?;
        if (header[0], header[3]) == (0x20, 0) {
            return Ok(());
        }
        Err(std::io::Error::other(format!("{header:02x?} instead of CONNACK")))
    }

    fn acknowledged(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        if self.qos == 1 { expect(stream, &[0x40, 2, 0, 7]) } else { Ok(()) }
    }
}

fn set_option<T>(stream: &impl AsRawFd, level: i32, name: i32, value: &T) -> std::io::Result<()> {
    // SAFETY: the value is valid for its size.
    let failed = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as u32,
        )
    };
    if failed == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Connects from a port, whatever was on it before. On a busy machine, the last acknowledgement of the connection before
/// may be on its way still, and this host has the port until then.
fn connect_from(port: u16, to: SocketAddr) -> std::io::Result<TcpStream> {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        match connect_once_from(port, to) {
            Err(e)
                if e.kind() == std::io::ErrorKind::AddrNotAvailable
                    && std::time::Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

fn connect_once_from(port: u16, to: SocketAddr) -> std::io::Result<TcpStream> {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket,
    };
    let (family, any): (_, std::net::IpAddr) = if to.is_ipv4() {
        (AddressFamily::Inet, std::net::Ipv4Addr::UNSPECIFIED.into())
    } else {
        (AddressFamily::Inet6, std::net::Ipv6Addr::UNSPECIFIED.into())
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, &1i32)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, port)))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(TcpStream::from(socket))
}

/// Puts this thread into a host's network namespace.
pub fn enter(lab: &Lab, host: &str) {
    let namespace = File::open(format!("/run/netns/{}-{host}", lab.name)).unwrap();
    setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
}

fn expect(stream: &mut TcpStream, expected: &[u8]) -> std::io::Result<()> {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes)?;
    if bytes == expected {
        return Ok(());
    }
    Err(std::io::Error::other(format!("{bytes:02x?} instead of {expected:02x?}")))
}

/// Runs sessions, so many at a time; what became of each.
pub fn run_all(lab: &Lab, sessions: &[Session], at_once: usize) -> Vec<std::io::Result<()>> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let done = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(session) = sessions.get(i) else { return };
                    let started = std::time::Instant::now();
                    let result = session.run(lab);
                    if started.elapsed() > Duration::from_millis(900) {
                        println!(
                            "{:?} {i} took {:?}: {result:?} {session:?}",
                            std::time::SystemTime::now(),
                            started.elapsed()
                        );
                    }
                    done.lock().unwrap().push((i, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}
