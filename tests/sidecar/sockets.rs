//! Sockets of `run`: the control socket, metrics and health over HTTP, and a disk that is full.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use crate::operation::{healthy, running};
use crate::support::net::{Background, CONFIG, Net, assert_within, wait_for};

#[test]
fn the_control_socket_is_roots_and_no_other_file_is_removed_for_it() {
    let net = Net::new();
    let run = running(&net);
    let mode = fs::metadata(net.dir.join("balancer.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(run);

    let precious = net.dir.join("precious");
    fs::write(&precious, "data").unwrap();
    net.write_config(&CONFIG.replace("balancer.sock", "precious"));
    let error = net.fails(1, &["run"]);
    assert!(error.contains("it exists and is not a socket"), "{error}");
    assert_eq!(fs::read_to_string(&precious).unwrap(), "data");

    net.write_config(&CONFIG.replace("unix:@DIR@/balancer.sock", "0.0.0.0:50051"));
    let error = net.fails(2, &["check"]);
    assert!(error.contains("can be reached by other hosts"), "{error}");
    net.write_config(&CONFIG.replace(
        "balancer_endpoint = \"unix:@DIR@/balancer.sock\"",
        "balancer_endpoint = \"0.0.0.0:50051\"\nallow_remote_control = true",
    ));
    net.ok(&["check"]);
}

#[test]
fn connections_to_the_control_socket_are_bounded() {
    let net = Net::new();
    let run = running(&net);
    let open: Vec<_> = (0..80)
        .map(|_| std::os::unix::net::UnixStream::connect(net.dir.join("balancer.sock")).unwrap())
        .collect();
    wait_for("the limit", || run.log().contains("too many connections").then_some(()));
    drop(open);
    wait_for("room again", || net.mqtt_fwd(&["katran", "list"]).status.success().then_some(()));
}

#[test]
fn a_full_disk_ends_no_service_and_fails_every_answer() {
    let net = Net::new();
    let mut command = net.command("sh");
    command.args(["-c", "exec \"$0\" --log debug run 2>/dev/full", env!("CARGO_BIN_EXE_mqtt-fwd")]);
    let mut run = net.spawn_command(command);
    wait_for("the sidecar", || healthy(&net).then_some(()));
    run.signal("HUP");
    std::thread::sleep(Duration::from_millis(1500));
    assert!(!run.ended());
    assert!(healthy(&net));
    for command in ["status --json", "flows", "counters", "check", "katran list"] {
        let output = net
            .command("sh")
            .args(["-c", &format!("\"$0\" {command} >/dev/full"), env!("CARGO_BIN_EXE_mqtt-fwd")])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{command}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("writing to standard output: No space left"), "{command}: {error}");
    }
}

/// The socket of this net's `run`.
fn run_socket(run: &Background) -> std::path::PathBuf {
    let namespace = fs::read_link(format!("/proc/{}/ns/net", run.id())).unwrap();
    let inode = namespace.to_str().unwrap().trim_matches(|c: char| !c.is_ascii_digit()).to_owned();
    format!("/run/mqtt-fwd/run-{inode}-eth0.sock").into()
}

#[test]
fn a_real_that_is_down_is_a_problem_however_many_connections_run_has() {
    let net = Net::new();
    let check = "health_check = { type = \"tcp\", interval = \"100ms\", timeout = \"50ms\" }";
    let text = fs::read_to_string(net.config()).unwrap();
    net.write_config(&text.replace("default_group", &format!("{check}\ndefault_group")));
    let run = net.spawn(&["--log", "info", "run"]);
    let codes = || {
        let said = net.mqtt_fwd(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&said.stdout).ok()?;
        let codes = status["problems"].as_array()?.iter().map(|p| p["code"].to_string());
        Some((status["healthy"].as_bool()?, codes.collect::<Vec<_>>().join(" ")))
    };
    wait_for("a real to be down", || codes()?.1.contains("real_down").then_some(()));
    // As many as leave room for one.
    let idle: Vec<_> = (0..63)
        .map(|_| std::os::unix::net::UnixStream::connect(run_socket(&run)).unwrap())
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let (healthy, problems) = codes().unwrap();
    assert!(!healthy && problems.contains("real_down"), "{problems}");
    assert!(net.fails(1, &["status", "--check"]).contains("is down"));
    // Without room, nothing is known, which is not healthy either. On a busy machine it takes a while until there is none.
    wait_for("no room", || {
        let _more: Vec<_> = (0..83)
            .map(|_| std::os::unix::net::UnixStream::connect(run_socket(&run)).unwrap())
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        let (healthy, problems) = codes()?;
        assert!(!healthy, "{problems}");
        problems.contains("run_not_answering").then_some(())
    });
    drop(idle);
}

#[test]
fn a_run_that_does_not_answer_is_said_within_seconds() {
    let net = Net::new();
    let run = running(&net);
    run.signal("STOP");
    for command in [&["status", "--check"][..], &["doctor"], &["flows"], &["drain", "10.1.3.201"]] {
        let start = std::time::Instant::now();
        let said = net.mqtt_fwd(command);
        let text = [said.stdout, said.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert_eq!(said.status.code(), Some(1), "{command:?}: {text}");
        assert!(text.contains("does not answer"), "{command:?}: {text}");
        assert_within(start.elapsed(), Duration::from_secs(10));
    }
    run.signal("CONT");
    wait_for("health", || healthy(&net).then_some(()));
}

#[test]
fn requests_for_metrics_that_do_not_end_are_ended() {
    let net = Net::new();
    let text = fs::read_to_string(net.config()).unwrap();
    net.write_config(&format!("metrics = \"127.0.0.1:9469\"\n{text}"));
    let _run = running(&net);
    let script = r#"
import socket, time
begun = [socket.create_connection(("127.0.0.1", 9469)) for _ in range(300)]
for one in begun:
    try: one.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ")
    except OSError: pass
start = time.time()
for one in begun:
    one.settimeout(max(0.1, 15 - (time.time() - start)))
    try:
        while one.recv(1000): pass
    except TimeoutError: raise SystemExit("still open")
    except OSError: pass
answer = socket.create_connection(("127.0.0.1", 9469))
answer.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
print(answer.recv(1000).decode().split("\r\n")[0])
"#;
    let said = net.command("python3").args(["-c", script]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&said.stdout), "HTTP/1.1 200 OK\n", "{said:?}");
}

#[test]
fn health_over_http_is_503_where_nothing_is_forwarded() {
    let net = Net::new();
    let text = CONFIG.replace("balancer = \"embedded\"", "balancer = \"katran\"");
    net.write_config(&format!("metrics = \"127.0.0.1:9469\"\n{text}"));
    let _run = net.spawn(&["run"]);
    wait_for("503", || {
        let mut curl = net.command("curl");
        let output =
            curl.args(["-s", "-w", "%{http_code}", "http://127.0.0.1:9469/health"]).output();
        let answer = String::from_utf8(output.unwrap().stdout).unwrap();
        (answer.contains("no program is in the balancer's position") && answer.ends_with("503"))
            .then_some(())
    });
}
