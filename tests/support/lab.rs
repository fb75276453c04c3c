//! A lab of namespaces (scripts/lab), its clients and what its brokers got. With the embedded
//! balancer; where KATRAN_SERVER and KATRAN_BALANCER name a Katran, with that.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use super::net::wait_for;

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Lab {
    pub name: String,
}

/// A group's name, its VIP's last number, and its reals'.
pub type Group = (&'static str, u8, &'static [u8]);

pub fn config(groups: &[Group], routes: &[(&str, &str)]) -> String {
    let mut text = "interface = \"eth0\"\nbpffs = \"@BPFFS@\"\nbalancer = \"embedded\"\n\
                    gateway_mac = \"@GATEWAY_MAC@\"\n[maps]\nclients = 1000\nclient_ids = 4000\n\
                    flows = 1000\ntopics = 1000\nroute_states = 1000\nvips = 16\n"
        .to_owned();
    for (name, address, vip, real) in [
        ("mqtt", "10.1.50.200", "10.1.50.", "10.1.3."),
        ("mqtt6", "fd01:50::200", "fd01:50::", "fd01:3::"),
    ] {
        text += &format!(
            "[[service]]\nname = \"{name}\"\naddress = \"{address}\"\ndefault_group = \"default\"\n"
        );
        for (group, number, reals) in groups {
            text += &format!("[[service.group]]\nname = \"{group}\"\nvip = \"{vip}{number}\"\n");
            for r in *reals {
                text += &format!("[[service.group.reals]]\naddress = \"{real}{r}\"\n");
            }
        }
        for (topic, group) in routes {
            text += &format!("[[service.route]]\ntopic = \"{topic}\"\ngroup = \"{group}\"\n");
        }
    }
    text
}

/// Those of the lab's six that a configuration names; the others' hosts are there without a broker.
fn brokers_of(config: &str) -> String {
    let is_named = |i: &u32| {
        let mut addresses = [format!("10.1.3.20{i}"), format!("fd01:3::20{i}")].into_iter();
        addresses.any(|addr| config.contains(&addr))
    };
    (1..=6).filter(is_named).map(|i| i.to_string()).collect::<Vec<_>>().join(" ")
}

impl Lab {
    pub fn up(config: &str, options: &[&str]) -> Self {
        let name = format!("t{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let lab = Self { name };
        let file = std::env::temp_dir().join(format!("{}.toml", lab.name));
        std::fs::write(&file, config).unwrap();
        let output = lab
            .script("up")
            .args(["--config", file.to_str().unwrap()])
            .args(options)
            .args(std::env::var_os("KATRAN_SERVER").map(|_| "--katran"))
            .env("LAB_BROKERS", brokers_of(config))
            .output()
            .unwrap();
        std::fs::remove_file(&file).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        lab
    }

    pub fn script(&self, command: &str) -> Command {
        let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/lab"));
        script
            .arg(command)
            .env("LAB", &self.name)
            .env("MQTT_FWD", env!("CARGO_BIN_EXE_mqtt-fwd"))
            .env("MQTT_FWD_LOG", "warn");
        script
    }

    /// As `scripts/lab exec` does, of which tests need thousands.
    pub fn exec(&self, host: &str, command: &[&str]) -> Output {
        let mqtt_fwd = Path::new(env!("CARGO_BIN_EXE_mqtt-fwd"));
        let path = std::env::var("PATH").unwrap_or_default();
        let other = host.strip_prefix("lb").is_some_and(|n| !n.is_empty());
        let config = if other { format!("{host}.toml") } else { "config.toml".to_owned() };
        Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}-{host}", self.name))
            .args(command)
            .env("PATH", format!("{}:{path}", mqtt_fwd.parent().unwrap().display()))
            .env("MQTT_FWD_CONFIG", format!("/run/mqtt-fwd-lab/{}/{config}", self.name))
            .env("MQTT_FWD_LOG", "warn")
            .output()
            .unwrap()
    }

    pub fn ok(&self, host: &str, command: &[&str]) -> String {
        let output = self.exec(host, command);
        assert!(
            output.status.success(),
            "{host}: {command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// mosquitto_pub, one message a connection. Being reset is no error of the test.
    pub fn publish_once(&self, host: &str, topic: &str, message: &str) {
        self.exec(host, &["mosquitto_pub", "-h", "10.1.50.200", "-t", topic, "-m", message]);
    }

    /// scripts/publisher: many messages over one connection. Returns connections that it took.
    pub fn publish(&self, host: &str, args: &[&str]) -> usize {
        self.publish_counted(host, args).0
    }

    /// The same, with the number of messages.
    pub fn publish_counted(&self, host: &str, args: &[&str]) -> (usize, u64) {
        let output = self.script("publish").arg(host).args(args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let summary: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        let connections = summary["connections"].as_array().unwrap().len();
        (connections, summary["sent"].as_u64().unwrap())
    }

    pub fn received_file(&self, real: u32) -> PathBuf {
        PathBuf::from(format!("/run/mqtt-fwd-lab/{}/r{real}.received", self.name))
    }

    /// What brokers got: real → "topic payload" in order.
    pub fn received(&self) -> BTreeMap<u32, Vec<String>> {
        (1..=6)
            .map(|real| {
                let text = std::fs::read_to_string(self.received_file(real)).unwrap();
                let lines: Vec<_> = text
                    .lines()
                    .filter(|l| !l.starts_with("lab/"))
                    .map(|l| unpadded(l).to_owned())
                    .collect();
                (real, lines)
            })
            .filter(|(_, lines)| !lines.is_empty())
            .collect()
    }

    /// How often each payload arrived, and where.
    pub fn arrivals(&self) -> BTreeMap<String, Vec<u32>> {
        let mut all: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for (real, lines) in self.received() {
            for line in lines {
                let (_, payload) = line.split_once(' ').unwrap_or((&line, ""));
                all.entry(payload.to_owned()).or_default().push(real);
            }
        }
        all
    }

    /// The same, once all these have arrived.
    pub fn arrivals_of(&self, messages: &[&String]) -> BTreeMap<String, Vec<u32>> {
        wait_for(&format!("{} messages at the brokers", messages.len()), || {
            let all = self.arrivals();
            messages.iter().all(|m| all.contains_key(*m)).then_some(all)
        })
    }

    /// Waits until a message has arrived, and says where.
    pub fn wait_received(&self, message: &str) -> u32 {
        wait_for(&format!("{message:?} at a broker; there is {:?}", self.received()), || {
            let all = self.received();
            all.iter().find(|(_, lines)| lines.iter().any(|l| l == message)).map(|(r, _)| *r)
        })
    }

    pub fn mqtt_fwd(&self, args: &[&str]) -> String {
        self.ok("lb", &[&["mqtt-fwd"], args].concat())
    }

    pub fn counter(&self, name: &str) -> u64 {
        let counters: serde_json::Value =
            serde_json::from_str(&self.mqtt_fwd(&["counters", "--json"])).unwrap();
        counters["counters"][name].as_u64().unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = format!("/run/mqtt-fwd-lab/{}/mqtt-fwd.log", self.name);
            eprintln!("{}", std::fs::read_to_string(log).unwrap_or_default());
            let status = self.exec("lb", &["mqtt-fwd", "status"]);
            eprintln!("{}", String::from_utf8_lossy(&status.stdout));
        }
        let output = self.script("down").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

pub const ONE_REAL_EACH: &[Group] = &[("a", 1, &[201]), ("b", 2, &[202]), ("default", 250, &[203])];

/// A text without the dots that make it large. Not by trimming alone: that looks at each of a million dots, which takes
/// its time in a build without optimization.
pub fn unpadded(text: &str) -> &str {
    let begins = text.split("....").next().unwrap_or_default();
    begins.trim_end_matches('.')
}

/// Ethernet frames of a capture file (https://www.tcpdump.org/manpages/pcap-savefile.5.html).
pub fn frames(file: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(file).unwrap_or_default();
    let mut rest = bytes.get(24..).unwrap_or_default();
    let mut frames = Vec::new();
    while let Some(length) = rest.get(8..12) {
        let length = u32::from_ne_bytes(length.try_into().unwrap()) as usize;
        let Some(frame) = rest.get(16..16 + length) else { break };
        frames.push(frame.to_vec());
        rest = &rest[16 + length..];
    }
    frames
}
