//! The fleet's store: by TLS and with a password, and what is said if one of the two is wrong.

use std::process::Stdio;

use serde_json::Value;

use crate::support::authority::Authority;
use crate::support::net::{Background, CONFIG, Net, wait_for};

const PORT: u16 = 6390;

struct Bed {
    net: Net,
    _store: Background,
}

impl Bed {
    fn new() -> Self {
        let net = Net::new();
        let authority = Authority::new(&net.dir);
        authority.sign_for(&net.dir, "store", "store", &["localhost", "127.0.0.1"]);
        Authority::new(&net.dir.join("other").tap_dir());
        net.ok(&["keys", "new", "--file", net.dir.join("key").to_str().unwrap()]);
        let path = |file: &str| net.dir.join(file).to_str().unwrap().to_owned();
        let config = [
            "port 0".to_owned(),
            format!("tls-port {PORT}"),
            "save \"\"".to_owned(),
            format!("tls-cert-file {}", path("store.crt")),
            format!("tls-key-file {}", path("store.key")),
            format!("tls-ca-cert-file {}", path("ca.crt")),
            "tls-auth-clients no".to_owned(),
            "requirepass sesame".to_owned(),
            "user fleet on >s3same ~mqtt-fwd:* +@all".to_owned(),
        ];
        std::fs::write(path("redis.conf"), config.join("\n")).unwrap();
        let mut redis = net.command("redis-server");
        redis.arg(path("redis.conf"));
        let store = net.spawn_command(redis);
        let bed = Self { net, _store: store };
        wait_for("the store", || (bed.cli(&["ping"]).trim() == "PONG").then_some(()));
        bed
    }

    fn cli(&self, args: &[&str]) -> String {
        let mut cli = self.net.command("redis-cli");
        cli.args(["-p", &PORT.to_string(), "--tls", "--insecure", "--no-auth-warning"]);
        cli.args(["-a", "sesame"]).args(args).stderr(Stdio::null());
        String::from_utf8(cli.output().unwrap().stdout).unwrap()
    }

    fn configure(&self, store: &str, ca: &str) {
        let fleet = format!(
            "[fleet]\nname = \"lb1\"\nstore = \"rediss://{store}@localhost:{PORT}\"\nstore_ca = \"@DIR@/{ca}\"\n"
        );
        let text = CONFIG
            .replace("[maps]", "handover_key = \"@DIR@/key\"\n[maps]")
            .replace("201\" }", "201\", vip = \"10.1.50.101\" }")
            .replace("202\", weight", "202\", vip = \"10.1.50.102\", weight")
            .replace("203\" }", "203\", vip = \"10.1.50.103\" }");
        self.net.write_config(&(text + &fleet));
    }

    fn fleet(&self) -> Option<Value> {
        let status: Value = serde_json::from_str(&self.net.ok(&["status", "--json"])).ok()?;
        Some(status["fleet"].clone()).filter(Value::is_object)
    }
}

trait TapDir {
    fn tap_dir(self) -> Self;
}

impl TapDir for std::path::PathBuf {
    fn tap_dir(self) -> Self {
        std::fs::create_dir_all(&self).unwrap();
        self
    }
}

#[test]
fn the_store_is_used_by_tls_with_a_password() {
    let bed = Bed::new();
    bed.configure("fleet:s3same", "ca.crt");
    let _run = bed.net.spawn(&["run"]);
    let member = wait_for("this member in the store", || {
        let text = bed.cli(&["get", "mqtt-fwd:member:lb1"]);
        serde_json::from_str::<Value>(text.trim()).ok()
    });
    assert_eq!(member["fleet_version"], 1);
    let fleet = wait_for("the fleet", || bed.fleet());
    assert_eq!(fleet["store_error"], Value::Null, "{fleet}");
    assert_eq!(fleet["store"], format!("rediss://localhost:{PORT}"), "without its password");
    let ttl: u64 = bed.cli(&["ttl", "mqtt-fwd:member:lb1"]).trim().parse().unwrap();
    assert!((1..=5).contains(&ttl));
    for key in bed.cli(&["keys", "*"]).lines() {
        assert!(key.starts_with("mqtt-fwd:"), "{key}");
    }
    // Nothing that is printed has the password.
    for args in [&["fleet"][..], &["status"], &["doctor"], &["check"]] {
        let output = bed.net.mqtt_fwd(args);
        let said = [output.stdout, output.stderr].concat();
        assert!(!String::from_utf8_lossy(&said).contains("s3same"), "{args:?}");
    }

    for (store, ca, says) in [
        ("fleet:wrong", "ca.crt", "authentication failed"),
        ("fleet:s3same", "other/ca.crt", "certificate"),
    ] {
        bed.configure(store, ca);
        bed.net.mqtt_fwd(&["apply"]);
        let named = wait_for(says, || {
            let status: Value = serde_json::from_str(&bed.net.ok(&["status", "--json"])).ok()?;
            let problems = status["problems"].as_array()?.clone();
            let lost =
                problems.into_iter().find(|problem| problem["code"] == "store_unreachable")?;
            let text = lost["text"].as_str()?.to_owned();
            text.contains(says).then_some(text)
        });
        assert!(!named.contains("wrong@") && !named.contains("s3same"), "{named}");
    }
}

#[test]
fn a_store_that_cannot_be_one_is_refused_by_its_line() {
    let net = Net::new();
    let text = CONFIG.replace("201\" }", "201\", vip = \"10.1.50.101\" }");
    net.write_config(&format!(
        "{text}[fleet]\nname = \"lb1\"\nstore = \"memcached://x\"\nstore_ca = \"/x\"\n"
    ));
    let output = net.mqtt_fwd(&["check"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    for part in [
        "fleet.store = \"memcached://x\": write it like \"redis://10.1.12.9:6379\", or rediss:// for TLS",
        "fleet.store_ca = \"/x\": is for TLS; write store = \"rediss://…\"",
        "service[0].group[0].reals[1].vip: is missing; in a fleet each real has a group VIP of its own",
    ] {
        assert!(said.contains(part), "{said}");
    }
}
