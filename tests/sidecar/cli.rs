//! What people see who get something wrong: one line with the cause and what to do, and an exit code.

use std::process::Command;

use crate::support::net::{CONFIG, Net};

fn check(text: &str) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_mqtt-fwd"))
        .args(["--config", path.to_str().unwrap(), "check"])
        .output()
        .unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    (output.status.code(), text.replace(path.to_str().unwrap(), "config.toml"))
}

#[test]
fn every_problem_of_a_configuration_is_named_at_once() {
    let (code, text) = check(
        r#"
interface = "an-interface-name-that-is-too-long"
xdp_mode = "fast"
balancer = "embeded"
gateway_mac = "zz"
balancer_endpoint = "localhost"
bpfs = "/sys/fs/bpf"

[maps]
flows = 0
client = 10

[[service]]
name = "mqtt"
address = "10.1.50"
port = 70000
default_group = "defualt"
max_packet = 100
group = [
    { name = "a", vip = "fd01::1", reals = [{ address = "10.1.3.201", weight = 1001 }] },
    { name = "default", vip = "10.1.50.250", reals = [] },
    { name = "default", vip = "10.1.50.251", reals = [{ address = "10.1.3.1" }, { address = "10.1.3.1" }] },
]
route = [
    { topic = "a/#/b", group = "a" },
    { topic = "a", group = "nobody" },
    { topic = "a", group = "a" },
    { topic = "a", group = "default" },
]
"#,
    );
    assert_eq!(code, Some(2));
    insta::assert_snapshot!(text);
}

#[test]
fn problems_between_services_are_named() {
    let service = |name: &str, addr: &str, vip: &str, real: &str, topics: &str| {
        format!(
            "[[service]]\nname = {name:?}\naddress = {addr:?}\ndefault_group = \"d\"\n\
             group = [{{ name = \"d\", vip = {vip:?}, reals = [{{ address = {real:?} }}] }}]\n\
             route = [{topics}]\n"
        )
    };
    let route = |topic: &str| format!("{{ topic = {topic:?}, group = \"d\" }}, ");
    let text = [
        "interface = \"eth0\"\nbalancer = \"katran\"\n".to_owned(),
        service(
            "one",
            "10.1.50.200",
            "10.1.50.1",
            "fd01:3::1",
            &[route("#"), route("+/#")].concat(),
        ),
        service("one", "10.1.50.201", "10.1.50.1", "10.1.3.1", ""),
        service("six", "fd01:50::200", "10.1.50.2", "10.1.3.1", ""),
        service("six too", "fd01:50::201", "fd01:50::2", "10.1.3.1", ""),
    ]
    .concat();
    let (code, text) = check(&text);
    assert_eq!(code, Some(2));
    insta::assert_snapshot!(text);
}

#[test]
fn a_valid_configuration_is_summed_up() {
    let (code, text) = check(&CONFIG.replace("@DIR@", "/run"));
    assert_eq!(code, Some(0));
    insta::assert_snapshot!(text);
}

#[test]
fn the_lab_s_configuration_is_valid() {
    let text = include_str!("../../scripts/lab.toml")
        .replace("@BPFFS@", "/sys/fs/bpf")
        .replace("@GATEWAY_MAC@", "02:00:00:00:00:01");
    let (code, text) = check(&text);
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = check(include_str!("../../scripts/example.toml"));
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn every_metric_of_alerts_and_dashboard_is_one_that_there_is() {
    let known: std::collections::BTreeSet<&str> = [
        include_str!("../../src/inspect/metrics.rs"),
        include_str!("../../src/relay/stats.rs"),
        include_str!("../../src/metrics/mod.rs"),
    ]
    .into_iter()
    .flat_map(|source| source.split('"'))
    .collect();
    let alerts = include_str!("../../scripts/monitoring/alerts.yml");
    let dashboard = include_str!("../../scripts/monitoring/dashboard.json");
    let names = [alerts, dashboard]
        .into_iter()
        .flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'))
        .filter_map(|word| word.strip_prefix("mqtt_fwd_"));
    for name in names {
        assert!(known.contains(name.trim_end_matches("_total")), "{name}");
    }
    // Reasons are named, or all that begin so.
    let reasons: Vec<&str> = mqtt_fwd::kernel::reasons::REASONS.iter().map(|r| r.name).collect();
    let named = ["reason=~\\\"", "verdict=~\\\""].map(|label| dashboard.split(label).skip(1));
    for list in named.into_iter().flatten() {
        for name in list.split('\\').next().unwrap().split('|') {
            let prefix = name.trim_end_matches(".*");
            let is =
                |reason: &&&str| **reason == name || (prefix != name && reason.starts_with(prefix));
            assert!(reasons.iter().any(|reason| is(&reason)), "{name}");
        }
    }
}

#[test]
fn the_threat_model_names_tests_that_there_are() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/security.md")).unwrap();
    let named: Vec<_> =
        page.split('`').skip(1).step_by(2).filter_map(|code| code.split_once(".rs: ")).collect();
    assert!(named.len() > 20, "{named:?}");
    for (file, test) in named {
        let source = std::fs::read_to_string(root.join(format!("tests/{file}.rs"))).unwrap();
        assert!(source.contains(&format!("\nfn {test}(")), "{file}.rs has no test {test}");
    }
}

#[test]
fn the_runbook_has_every_problem_and_every_alert() {
    let page = include_str!("../../docs/runbook.md");
    for (code, _) in mqtt_fwd::domain::problem::CODES {
        assert!(page.contains(&format!("| `{code}` |")), "{code}");
    }
    let alerts = include_str!("../../scripts/monitoring/alerts.yml").lines();
    for alert in alerts.filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(page.contains(&format!("| `{alert}` |")), "{alert}");
    }
}

#[test]
fn a_configuration_that_is_not_there_or_not_toml_is_named() {
    let (code, text) = check("interface = eth0\n");
    assert_eq!(code, Some(2));
    assert!(text.contains("config.toml: not valid TOML"), "{text}");
    let output = Command::new(env!("CARGO_BIN_EXE_mqtt-fwd"))
        .args(["--config", "/nowhere.toml", "check"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "mqtt-fwd: /nowhere.toml: No such file or directory (os error 2); \
         name the file with --config or MQTT_FWD_CONFIG\n"
    );
}

#[test]
fn wrong_usage_ends_with_2() {
    let output = Command::new(env!("CARGO_BIN_EXE_mqtt-fwd")).arg("lod").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("'load'"));
}

#[test]
fn what_is_missing_is_named_with_the_mend() {
    let net = Net::new();
    let error = net.fails(1, &["apply"]);
    assert!(error.contains("run `mqtt-fwd load` first"), "{error}");
    let error = net.fails(1, &["events"]);
    assert!(error.contains("run `mqtt-fwd load` first"), "{error}");

    net.ok(&["load"]);
    let error = net.fails(1, &["apply"]);
    assert!(error.contains("balancer at unix:@DIR@/balancer.sock: not reachable"), "{error}");
    assert!(error.contains("is it running"), "{error}");

    net.write_config(&CONFIG.replace("\"eth0\"", "\"eth7\""));
    let error = net.fails(1, &["load"]);
    assert!(error.starts_with("mqtt-fwd: interface eth7: there is none"), "{error}");

    net.write_config(&CONFIG.replace("@DIR@/bpf", "@DIR@"));
    let error = net.fails(1, &["load"]);
    assert!(error.contains("@DIR@: no bpffs is mounted there"), "{error}");
}

#[test]
fn without_root_it_says_so() {
    let net = Net::new();
    net.sh(&format!("chmod 755 {0} {0}/config.toml", net.dir.display()));
    let binary = net.dir.join("mqtt-fwd");
    std::fs::copy(env!("CARGO_BIN_EXE_mqtt-fwd"), &binary).unwrap();
    let output = net
        .command("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"])
        .arg(&binary)
        .arg("load")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("this process lacks CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON; run it with sudo"),
        "{text}"
    );
}

#[test]
fn no_native_xdp_is_an_error_not_a_silent_change() {
    let net = Net::new();
    // lo has no native XDP.
    net.write_config(&CONFIG.replace("\"eth0\"", "\"lo\""));
    let error = net.fails(1, &["load"]);
    assert!(error.contains("interface lo: its driver does not take native XDP"), "{error}");
    assert!(error.contains("xdp_mode = \"generic\""), "{error}");
    assert!(!net.bpf("jmp_lo").exists(), "nothing half done");
    let generic = format!("xdp_mode = \"generic\"\n{}", CONFIG.replace("\"eth0\"", "\"lo\""));
    net.write_config(&generic);
    net.ok(&["load"]);
    assert!(net.ok(&["status"]).contains("generic XDP"));
    net.ok(&["unload"]);
}

#[test]
fn completions_are_printed() {
    let net = Net::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(net.ok(&["completions", shell]).contains("mqtt-fwd"));
    }
}

#[test]
fn a_topic_s_route_can_be_asked_for() {
    let net = Net::new();
    assert_eq!(
        net.ok(&["explain", "topic", "sensor/a"]),
        "topic sensor/a, service mqtt\n  route       sensor/a\n  belongs to  a: 10.1.3.201, 10.1.3.202\n"
    );
    assert!(net.ok(&["explain", "topic", "sensor/x"]).contains("none matches: the default group"));
}

#[test]
fn every_configuration_that_the_documents_show_is_valid() {
    let documents = [
        ("README.md", include_str!("../../README.md"), 1),
        ("docs/guide.md", include_str!("../../docs/guide.md"), 2),
    ];
    for (name, text, count) in documents {
        let blocks: Vec<_> =
            text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
        assert_eq!(blocks.len(), count, "{name}");
        for block in blocks {
            let (code, said) = check(block);
            assert_eq!(code, Some(0), "{name}: {said}");
        }
    }
}
