//! A network namespace with six brokers in three groups, and a relay in front of them.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

use crate::client::{Client, connect};
use crate::support::net::{sh, wait_for};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Where the relay listens.
pub const RELAY: &str = "10.9.1.200:1883";

/// Topics of the three groups; "other" is anything else.
pub const TOPICS: [&str; 3] = ["temp/x", "hum/x", "other"];

const CONFIG: &str = r#"
interface = "lo"
balancer = "embedded"
gateway_mac = "02:00:00:00:00:09"
[relay]
threads = 2
return_after = "0s"
connect_timeout = "2s"
#relay
[[service]]
name = "mqtt"
address = "10.9.1.200"
default_group = "default"
relay = "relay"
#service
group = [
    { name = "temp", vip = "10.9.2.1", reals = [{ address = "10.9.0.1" }, { address = "10.9.0.2" }] },
    { name = "hum", vip = "10.9.2.2", reals = [{ address = "10.9.0.3" }, { address = "10.9.0.4" }] },
    { name = "default", vip = "10.9.2.3", reals = [{ address = "10.9.0.5" }, { address = "10.9.0.6" }] },
    { name = "relay", vip = "10.9.2.4", reals = [{ address = "10.9.0.9" }] },
]
route = [
    { topic = "temp/#", group = "temp" },
    { topic = "hum/#", group = "hum" },
    { topic = "birth/#", group = "any" },
]
"#;

pub struct Bed {
    name: String,
    pub dir: PathBuf,
    relay: Option<Child>,
    brokers: Vec<Option<Child>>,
}

impl Bed {
    pub fn new() -> Self {
        Self::with("", "")
    }

    /// With more keys, of the relay and of the service.
    pub fn with(relay: &str, service: &str) -> Self {
        let mut bed = Self::empty(relay, service);
        for broker in 1..=6 {
            bed.start_broker(broker);
        }
        bed.start_relay();
        bed
    }

    /// Clients are sent to the fast path after some seconds.
    pub fn returning(seconds: u32) -> Self {
        let mut bed = Self::empty("", "");
        let file = bed.dir.join("config.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        let after = format!("return_after = \"{seconds}s\"");
        std::fs::write(&file, text.replace("return_after = \"0s\"", &after)).unwrap();
        for broker in 1..=6 {
            bed.start_broker(broker);
        }
        bed.start_relay();
        bed
    }

    /// Nothing runs yet.
    pub fn empty(relay: &str, service: &str) -> Self {
        let name = format!("rel{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(&name);
        std::fs::create_dir(&dir).unwrap();
        sh(&format!(
            "ip netns add {name}; ip -n {name} link set lo up; \
             for i in 1 2 3 4 5 6; do ip -n {name} addr add 10.9.0.$i/32 dev lo; done; \
             ip -n {name} addr add 10.9.1.200/32 dev lo"
        ));
        let brokers = (0..=6).map(|_| None).collect();
        let bed = Self { name, dir, relay: None, brokers };
        bed.configure(CONFIG, relay, service);
        bed
    }

    fn configure(&self, text: &str, relay: &str, service: &str) {
        let dir = self.dir.to_str().unwrap();
        let text = text.replace("#relay\n", &format!("{relay}\n"));
        let text = text.replace("#service\n", &format!("{service}\n")).replace("@DIR@", dir);
        std::fs::write(self.dir.join("config.toml"), text).unwrap();
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .arg(program)
            .stdin(Stdio::null())
            .env("MQTT_FWD_CONFIG", self.dir.join("config.toml"))
            .env("MQTT_FWD_LOG", "debug");
        command
    }

    pub fn start_broker(&mut self, n: usize) {
        let text = format!(
            "listener 1883 10.9.0.{n}\nallow_anonymous true\npersistence false\nuser root\n\
             max_queued_messages 0\nmessage_size_limit 0\nlog_type none\n"
        );
        self.start_broker_with(n, &text, 1883);
    }

    pub fn start_broker_with(&mut self, n: usize, text: &str, port: u16) {
        let conf = self.dir.join(format!("{n}.conf"));
        std::fs::write(&conf, text).unwrap();
        let child = self
            .command("mosquitto")
            .args(["-c", conf.to_str().unwrap()])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.brokers[n] = Some(child);
        let at = SocketAddr::new(Self::broker(n).ip(), port);
        wait_for("a broker", || self.inside(|| std::net::TcpStream::connect(at).ok()));
    }

    pub fn kill_broker(&mut self, n: usize) {
        let mut child = self.brokers[n].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn signal_broker(&self, n: usize, signal: nix::sys::signal::Signal) {
        let pid = self.brokers[n].as_ref().unwrap().id();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), signal).unwrap();
    }

    pub fn start_relay(&mut self) {
        let log = File::create(self.dir.join("relay.log")).unwrap();
        let child =
            self.command(env!("CARGO_BIN_EXE_mqtt-fwd")).arg("relay").stderr(log).spawn().unwrap();
        self.relay = Some(child);
        wait_for("the relay", || self.inside(|| std::net::TcpStream::connect(RELAY).ok()));
    }

    pub fn signal_relay(&self, signal: nix::sys::signal::Signal) {
        let pid = self.relay.as_ref().unwrap().id();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), signal).unwrap();
    }

    pub fn relay_pid(&self) -> u32 {
        self.relay.as_ref().unwrap().id()
    }

    pub fn relay_ended(&mut self) -> bool {
        self.relay.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    pub fn relay_log(&self) -> String {
        std::fs::read_to_string(self.dir.join("relay.log")).unwrap_or_default()
    }

    /// Where a broker listens.
    pub fn broker(n: usize) -> SocketAddr {
        SocketAddr::from(([10, 9, 0, n as u8], 1883))
    }

    /// Runs something in the namespace, where sockets that it makes stay.
    pub fn inside<T>(&self, what: impl FnOnce() -> T) -> T {
        let home = File::open("/proc/thread-self/ns/net").unwrap();
        let namespace = File::open(format!("/run/netns/{}", self.name)).unwrap();
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        let result = what();
        setns(home.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        result
    }

    /// A relay opens its listeners one after the other.
    pub fn stream(&self, to: impl std::net::ToSocketAddrs) -> std::net::TcpStream {
        wait_for("a listener", || self.inside(|| std::net::TcpStream::connect(&to).ok()))
    }

    /// A connection to the relay from an address of its own, so that any thread may serve it.
    pub fn stream_of_a_host(&self) -> std::net::TcpStream {
        let host = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let from = SocketAddr::from(([127, 1 + host[1], host[2], host[3]], 0));
        let to: SocketAddr = RELAY.parse().unwrap();
        self.inside(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind(&from.into()).unwrap();
            socket.connect(&to.into()).unwrap();
            socket.into()
        })
    }

    /// A client of the relay's, on a host of its own, that has its CONNACK.
    pub fn client(&self, id: &str) -> Client {
        let mut client = Client::new(self.stream_of_a_host(), 4);
        client.send(&connect(4, id).packet());
        client.expect(&[0x20, 2, 0, 0]);
        client
    }

    /// The same, MQTT 5.
    pub fn client5(&self, id: &str) -> Client {
        let mut client = Client::new(self.stream_of_a_host(), 5);
        client.send(&connect(5, id).packet());
        assert_eq!(client.packet().unwrap()[0], 0x20);
        client
    }

    /// A subscriber to everything at each broker, past the relay.
    pub fn watchers(&self) -> Vec<Client> {
        (1..=6)
            .map(|n| {
                let mut client = Client::new(self.stream(Self::broker(n)), 4);
                client.send(&connect(4, &format!("watch{n}")).packet());
                client.expect(&[0x20, 2, 0, 0]);
                client.subscribe(&["#"], 2);
                client
            })
            .collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.relay_log();
            let tail = log.lines().rev().take(30).collect::<Vec<_>>();
            eprintln!("{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        for child in self.brokers.iter_mut().chain([&mut self.relay]).flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        sh(&format!("ip netns del {}; rm -rf {}", self.name, self.dir.display()));
    }
}
