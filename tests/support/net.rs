//! A network namespace with a veth pair and a bpffs of its own, and our command line in it.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::datapath::Outcome;

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Net {
    pub name: String,
    pub dir: PathBuf,
}

/// Runs it here, and returns what it printed.
pub fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The configuration of these tests, with a place for its paths and for more keys.
pub const CONFIG: &str = r#"
interface = "eth0"
bpffs = "@DIR@/bpf"
balancer = "embedded"
balancer_endpoint = "unix:@DIR@/balancer.sock"
gateway_mac = "02:00:00:00:00:09"

[maps]
clients = 100
flows = 100
topics = 100
route_states = 100
vips = 8

[[service]]
name = "mqtt"
address = "10.1.50.200"
default_group = "default"
group = [
    { name = "a", vip = "10.1.50.1", reals = [
        { address = "10.1.3.201" },
        { address = "10.1.3.202", weight = 2 },
    ] },
    { name = "default", vip = "10.1.50.250", reals = [{ address = "fd01:3::203" }] },
]
route = [{ topic = "sensor/a", group = "a" }]
"#;

impl Net {
    pub fn new() -> Self {
        let name = format!("mft{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(&name);
        sh(&format!(
            "mkdir -p {dir}/bpf; mount -t bpf bpf {dir}/bpf; ip netns add {name}; \
             ip -n {name} link add eth0 type veth peer name peer0; \
             ip -n {name} link set eth0 up; ip -n {name} link set peer0 up; \
             ip -n {name} link set lo up",
            dir = dir.display()
        ));
        let net = Self { name, dir };
        net.write_config(CONFIG);
        net
    }

    pub fn bpf(&self, path: &str) -> PathBuf {
        self.dir.join("bpf").join(path)
    }

    pub fn config(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    pub fn write_config(&self, text: &str) {
        let text = text.replace("@DIR@", self.dir.to_str().unwrap());
        std::fs::write(self.config(), text).unwrap();
    }

    /// A command in the namespace.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .arg(program.as_ref())
            .env("MQTT_FWD_CONFIG", self.config())
            .env("MQTT_FWD_LOG", "warn");
        command
    }

    pub fn mqtt_fwd(&self, args: &[&str]) -> Output {
        self.command(env!("CARGO_BIN_EXE_mqtt-fwd")).args(args).output().unwrap()
    }

    /// Standard output of a call that has to succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.mqtt_fwd(args);
        assert!(output.status.success(), "{}", self.shown(args, &output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The last line of standard error of a call that has to fail with `code`. Paths of this
    /// test's own are written as @DIR@.
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.mqtt_fwd(args);
        assert_eq!(output.status.code(), Some(code), "{}", self.shown(args, &output));
        let text = String::from_utf8(output.stderr).unwrap();
        let text = text.replace(self.dir.to_str().unwrap(), "@DIR@");
        text.lines().last().unwrap_or_default().to_owned()
    }

    fn shown(&self, args: &[&str], output: &Output) -> String {
        format!(
            "mqtt-fwd {} in {} ended with {}\n--- stdout\n{}\n--- stderr\n{}",
            args.join(" "),
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    }

    pub fn sh(&self, command: &str) {
        let output = self.command("sh").args(["-ec", command]).output().unwrap();
        assert!(output.status.success(), "{command}\n{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The command line in the background, ended with the value.
    pub fn spawn(&self, args: &[&str]) -> Background {
        let mut command = self.command(env!("CARGO_BIN_EXE_mqtt-fwd"));
        command.args(args);
        self.spawn_command(command)
    }

    pub fn spawn_command(&self, mut command: Command) -> Background {
        let path = self.dir.join(format!("{}.log", NEXT.fetch_add(1, Ordering::Relaxed)));
        let log = std::fs::File::create(&path).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Background { child, log: path }
    }

    /// Sends a packet through what is attached to eth0, as its pinned root says.
    pub fn through_root(&self, packet: &[u8]) -> Outcome {
        let fd = libbpf_rs::Program::fd_from_pinned_path(self.bpf("mqtt_fwd/eth0/prog_xdp_root"))
            .unwrap();
        super::datapath::test_run(&fd, packet, 1).0
    }

    pub fn syn(client: &str, port: u16) -> Vec<u8> {
        let client: SocketAddr = format!("{client}:{port}").parse().unwrap();
        let service: SocketAddr = super::datapath::SERVICE.parse().unwrap();
        super::packet::tcp(client, service, 1000, 0, |h| h.syn = true, &[])
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        sh(&format!(
            "ip netns pids {name} | xargs -r kill -9; ip netns del {name}; \
             umount {dir}/bpf; rm -rf {dir}",
            name = self.name,
            dir = self.dir.display()
        ));
    }
}

pub struct Background {
    child: Child,
    log: PathBuf,
}

impl Background {
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: &str) {
        sh(&format!("kill -{signal} {}", self.child.id()));
    }

    pub fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// For what takes a second on an idle machine; at load 20, each process has a tenth of a CPU.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls until `ready` gives something.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What starting our program takes on a machine with nothing else to do.
const START: Duration = Duration::from_millis(20);

/// What happened took no longer than it may. On a busy machine that is longer, by as much as our program takes longer to
/// start there, now.
#[track_caller]
pub fn assert_within(took: Duration, limit: Duration) {
    if took < limit {
        return;
    }
    let start = |_| {
        let begun = Instant::now();
        Command::new(env!("CARGO_BIN_EXE_mqtt-fwd")).arg("--version").output().unwrap();
        begun.elapsed()
    };
    let start = (0..10).map(start).max().unwrap();
    let busy = start.div_duration_f64(START).max(1.0);
    assert!(took < limit.mul_f64(busy), "{took:?} of {limit:?}; a program starts in {start:?}");
}

/// What a client's next segment has as sequence and acknowledgement number.
pub fn numbers(client: &TcpStream) -> (u32, u32) {
    let set = |option, value: i32| {
        // SAFETY: the value lives through the call, and has the size given.
        let failed = unsafe {
            libc::setsockopt(
                client.as_raw_fd(),
                libc::IPPROTO_TCP,
                option,
                (&raw const value).cast(),
                size_of_val(&value) as u32,
            )
        };
        assert_eq!(failed, 0);
    };
    let of_queue = |queue| {
        set(libc::TCP_REPAIR_QUEUE, queue);
        let (mut seq, mut size) = (0u32, 4u32);
        // SAFETY: seq has the size given.
        let failed = unsafe {
            libc::getsockopt(
                client.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_QUEUE_SEQ,
                (&raw mut seq).cast(),
                &raw mut size,
            )
        };
        assert_eq!(failed, 0);
        seq
    };
    set(libc::TCP_REPAIR, 1);
    let both = (of_queue(2), of_queue(1));
    set(libc::TCP_REPAIR, 0);
    both
}
