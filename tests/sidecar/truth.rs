//! What an operator is told when something is not as they think: alike by `status`, `/health` and the metric.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use serde_json::Value;

use crate::operation::{healthy, running};
use crate::support::net::{CONFIG, Net, wait_for};

fn text_of(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

/// What `/health` says, with its code behind it, and `/metrics`.
fn over_http(net: &Net) -> (String, String) {
    let get = |path: &str| {
        let url = format!("http://127.0.0.1:9469/{path}");
        text_of(&net.command("curl").args(["-s", "-w", "%{http_code}", &url]).output().unwrap())
    };
    (get("health"), get("metrics"))
}

fn with_metrics(net: &Net, text: &str) {
    net.write_config(&format!("metrics = \"127.0.0.1:9469\"\n{text}"));
}

#[test]
fn a_file_that_is_refused_is_a_problem_until_one_is_taken_over() {
    let net = Net::new();
    with_metrics(&net, CONFIG);
    let _run = running(&net);
    with_metrics(&net, &CONFIG.replace("group = \"a\"", "group = \"nosuch\""));
    // What systemd's ExecReload= runs.
    assert_eq!(net.mqtt_fwd(&["apply"]).status.code(), Some(2));
    let status = || text_of(&net.mqtt_fwd(&["status"]));
    wait_for("the problem", || {
        status().contains("the changed configuration file was refused").then_some(())
    });
    assert!(status().contains("nosuch"), "{}", status());
    assert_eq!(net.mqtt_fwd(&["status", "--check"]).status.code(), Some(1));
    // All is forwarded as before: no reason to take this balancer away.
    let (health, metrics) = over_http(&net);
    assert!(health.contains("was refused") && health.ends_with("200"), "{health}");
    for line in [
        "mqtt_fwd_config_last_reload_successful 0.0",
        "mqtt_fwd_problem{code=\"reload_refused\"} 1.0",
    ] {
        assert!(metrics.contains(line), "{line}");
    }
    with_metrics(&net, CONFIG);
    net.ok(&["apply"]);
    wait_for("health", || healthy(&net).then_some(()));
    wait_for("the metric", || {
        over_http(&net).1.contains("mqtt_fwd_config_last_reload_successful 1.0").then_some(())
    });
}

#[test]
fn a_key_file_that_others_may_read_is_a_problem_and_no_outage() {
    let net = Net::new();
    let key = net.dir.join("handover.key");
    let path = key.to_str().unwrap();
    net.ok(&["keys", "new", "--file", path]);
    let delayed = CONFIG.replace("default_group =", "binding = \"delayed\"\ndefault_group =");
    with_metrics(&net, &format!("handover_key = \"{path}\"\n{delayed}"));
    let _run = running(&net);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    wait_for("the problem", || (!healthy(&net)).then_some(()));
    let status = text_of(&net.mqtt_fwd(&["status"]));
    assert!(status.contains("others may read this secret (mode 0644)"), "{status}");
    let (health, metrics) = over_http(&net);
    assert!(health.contains("others may read") && health.ends_with("200"), "{health}");
    assert!(metrics.contains("mqtt_fwd_problem{code=\"handover_key\"} 1.0"), "{metrics}");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    wait_for("health", || healthy(&net).then_some(()));
    wait_for("the metric", || {
        over_http(&net).1.contains("mqtt_fwd_handover_key_epoch 1.0").then_some(())
    });
}

#[test]
fn differences_are_said_by_name_and_as_json() {
    let net = Net::new();
    let _run = running(&net);
    net.write_config(
        &CONFIG
            .replace("topic = \"sensor/a\"", "topic = \"sensor/b\"")
            .replace("{ address = \"10.1.3.201\" },", "{ address = \"10.1.3.209\" },"),
    );
    let names = [
        "service mqtt, group a, real 10.1.3.201: removed",
        "service mqtt, group a, real 10.1.3.209: added, weight 1",
        "service mqtt, route sensor/a: removed, was of a",
        "service mqtt, route sensor/b: added, to a",
    ];
    let diff = net.mqtt_fwd(&["diff"]);
    assert_eq!(diff.status.code(), Some(1));
    let said = text_of(&diff);
    for name in names {
        assert!(said.contains(name), "{name}: {said}");
    }
    for args in [&["diff", "--json"][..], &["apply", "--dry-run", "--json"], &["apply", "--json"]] {
        let said = net.mqtt_fwd(args).stdout;
        let said: Value = serde_json::from_slice(&said).unwrap();
        assert_eq!(said["schema"], 1, "{args:?}");
        let changes: Vec<&str> =
            said["changes"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
        assert_eq!(changes, names, "{args:?}");
    }
    for args in [
        &["check", "--json"][..],
        &["drain", "10.1.3.209", "--json"],
        &["undrain", "10.1.3.209", "--json"],
    ] {
        let said: Value = serde_json::from_slice(&net.mqtt_fwd(args).stdout).unwrap();
        assert_eq!(said["schema"], 1, "{args:?}");
    }
}

#[test]
fn who_is_not_root_is_told_that() {
    let net = Net::new();
    let _run = running(&net);
    // Where anybody may run it, and nobody may do anything.
    let binary = net.dir.join("mqtt-fwd");
    fs::copy(env!("CARGO_BIN_EXE_mqtt-fwd"), &binary).unwrap();
    fs::set_permissions(&net.dir, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    for args in [&["status"][..], &["drain", "10.1.3.201"], &["reals"], &["apply"], &["flows"]] {
        let mut command = net.command("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
        let said = command.arg(&binary).args(args).output().unwrap();
        assert_eq!(said.status.code(), Some(1), "{args:?}");
        assert!(
            text_of(&said).contains("answers root only: use sudo"),
            "{args:?}: {}",
            text_of(&said)
        );
    }
}

#[test]
fn a_level_that_there_is_not_is_refused_rather_than_all_errors_hidden() {
    let said = Command::new(env!("CARGO_BIN_EXE_mqtt-fwd"))
        .env("MQTT_FWD_LOG", "inof")
        .arg("check")
        .output()
        .unwrap();
    assert_eq!(said.status.code(), Some(2));
    assert!(text_of(&said).contains("off, error, warn, info, debug, trace"), "{}", text_of(&said));
}

#[test]
fn lines_of_the_log_have_their_priority_in_the_journal() {
    use std::os::fd::AsFd as _;
    let net = Net::new();
    let path = net.dir.join("journal");
    let log = fs::File::create(&path).unwrap();
    let stat = nix::sys::stat::fstat(log.as_fd()).unwrap();
    // A VIP that the balancer refuses is a warning.
    let mut command = net.command(env!("CARGO_BIN_EXE_mqtt-fwd"));
    command
        .env("JOURNAL_STREAM", format!("{}:{}", stat.st_dev, stat.st_ino))
        .args(["--log", "info", "run"])
        .stdout(std::process::Stdio::null())
        .stderr(log);
    let mut run = command.spawn().unwrap();
    wait_for("the sidecar", || healthy(&net).then_some(()));
    net.sh("ip link set eth0 xdp off");
    let text = wait_for("a warning", || {
        let text = fs::read_to_string(&path).unwrap();
        text.lines().any(|line| line.starts_with("<4>")).then_some(text)
    });
    run.kill().unwrap();
    run.wait().unwrap();
    assert!(text.lines().any(|line| line.starts_with("<6>")), "{text}");
    let strange = text.lines().find(|line| !line.starts_with('<'));
    assert_eq!(strange, None, "{text}");
}
