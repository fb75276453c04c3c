//! Services that are changed while `run` is active, and the gRPC service that this goes through.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;

use crate::support::authority::Authority;
use crate::support::net::{Background, Net, wait_for};
use mqtt_fwd::api::proto::sidecar_client::SidecarClient;
use mqtt_fwd::api::proto::{self, change, route};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

fn running(net: &Net) -> Background {
    let run = net.spawn(&["--log", "info", "run"]);
    wait_for("the sidecar", || net.mqtt_fwd(&["status", "--check"]).status.success().then_some(()));
    run
}

fn routes(net: &Net) -> String {
    net.ok(&["routes", "--json"])
}

#[test]
fn a_change_is_in_force_at_once_and_gone_once_the_file_is_read_again() {
    let net = Net::new();
    let before = fs::read_to_string(net.config()).unwrap();
    let run = running(&net);
    assert_eq!(net.ok(&["diff"]), "all is as configured\n");

    let said = net.ok(&["change", "add-group", "b", "10.1.50.2", "10.1.3.203"]);
    assert!(said.starts_with("in force; not in "), "{said}");
    net.ok(&["change", "add-route", "sensor/b", "b"]);
    net.ok(&["change", "set-weight", "a", "10.1.3.202", "7"]);
    assert!(net.ok(&["katran", "list"]).contains("10.1.50.2:1883"));
    assert!(net.ok(&["groups"]).contains("10.1.3.202 (weight 7)"));
    assert!(routes(&net).contains("sensor/b"));
    assert_eq!(fs::read_to_string(net.config()).unwrap(), before);
    // What is in force is what `run` compares with, and nothing is wrong with it.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert!(!run.log().contains("put back"), "{}", run.log());
    net.ok(&["status", "--check"]);
    assert!(net.ok(&["status"]).contains("`mqtt-fwd diff` shows the difference"));
    let differs = net.fails(1, &["diff"]);
    assert!(differs.contains("is not what is in force"), "{differs}");

    net.ok(&["apply"]);
    assert!(!routes(&net).contains("sensor/b"));
    assert!(!net.ok(&["katran", "list"]).contains("10.1.50.2:1883"));
    assert_eq!(net.ok(&["diff"]), "all is as configured\n");
}

#[test]
fn a_change_that_persists_is_in_the_file_with_all_else_as_it_was() {
    let net = Net::new();
    let before = format!("# ours\n{}", fs::read_to_string(net.config()).unwrap());
    fs::write(net.config(), &before).unwrap();
    fs::set_permissions(net.config(), fs::Permissions::from_mode(0o640)).unwrap();
    let run = running(&net);
    let said = net.ok(&["change", "--persist", "add-route", "sensor/b", "a"]);
    assert!(said.starts_with("in force, and in "), "{said}");
    let after = fs::read_to_string(net.config()).unwrap();
    let added = "route = [{ topic = \"sensor/a\", group = \"a\" }, { topic = \"sensor/b\", group = \"a\" }]";
    assert_eq!(after, before.replace("route = [{ topic = \"sensor/a\", group = \"a\" }]", added));
    assert_eq!(fs::metadata(net.config()).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(net.ok(&["diff"]), "all is as configured\n");
    assert!(!net.ok(&["status"]).contains("mqtt-fwd diff"));
    run.signal("HUP");
    wait_for("the reload", || run.log().contains("configuration reloaded").then_some(()));
    assert!(routes(&net).contains("sensor/b"));
    // Without a route it is as it was.
    net.ok(&["change", "remove-route", "sensor/b", "--persist"]);
    assert_eq!(fs::read_to_string(net.config()).unwrap(), before);
}

#[test]
fn top_shows_what_is_in_force_and_how_fast_that_goes() {
    let net = Net::new();
    let _run = running(&net);
    let refused = net.fails(2, &["top"]);
    assert!(refused.contains("--iterations N prints text"), "{refused}");
    let top = net.spawn(&["top", "--iterations", "1", "--interval", "2"]);
    std::thread::sleep(std::time::Duration::from_millis(800));
    for port in 1..=20 {
        net.through_root(&Net::syn("10.1.1.1", port));
    }
    wait_for("the look", || top.log().contains("TOPIC").then_some(()));
    let shown = top.log();
    assert!(shown.contains("mqtt-fwd on eth0: healthy"), "{shown}");
    assert!(shown.contains("20 flows") && shown.contains(" new flows/s"), "{shown}");
    assert!(!shown.contains(" 0 new flows/s"), "{shown}");
}

#[test]
fn without_run_only_the_file_can_be_changed() {
    let net = Net::new();
    let refused = net.fails(1, &["change", "add-route", "x", "a"]);
    assert!(
        refused.contains("`mqtt-fwd run` is not running on eth0; --persist changes"),
        "{refused}"
    );
    let said = net.ok(&["change", "add-route", "x", "a", "--persist"]);
    assert!(said.contains("`mqtt-fwd apply` brings it into force"), "{said}");
    assert!(routes(&net).contains("\"x\""));
}

#[test]
fn a_change_that_cannot_be_is_refused_and_changes_nothing() {
    let net = Net::new();
    let before = fs::read_to_string(net.config()).unwrap();
    let _run = running(&net);
    let balancer = net.ok(&["katran", "list"]);
    for (args, expected) in [
        (&["add-route", "x", "none"][..], "service mqtt has no group none"),
        (&["add-route", "x/#/y", "a"], "x/#/y"),
        (
            &["add-route", "sensor/a", "default"],
            "has a route with topic = \"sensor/a\" already, to a",
        ),
        (&["remove-group", "a"], "group"),
        (&["add-group", "c", "10.1.50.1", "10.1.3.9"], "10.1.50.1"),
        (&["remove-real", "default", "fd01:3::203"], "reals"),
        (&["set-weight", "a", "10.1.3.201", "1001"], "1001"),
        (&["add-real", "a", "10.1.3.9", "--service", "other"], "there is no service other"),
    ] {
        let args = [&["change", "--persist"][..], args].concat();
        let refused = net.fails(2, &args);
        assert!(refused.contains(expected), "{args:?}: {refused}");
    }
    assert_eq!(fs::read_to_string(net.config()).unwrap(), before);
    assert_eq!(net.ok(&["katran", "list"]), balancer);
    assert_eq!(net.ok(&["diff"]), "all is as configured\n");
}

#[test]
fn more_groups_than_the_balancer_has_room_for_are_refused() {
    let net = Net::new();
    let _run = running(&net);
    // 8 VIPs fit, and two are there.
    for i in 1..=6 {
        net.ok(&["change", "add-group", &format!("g{i}"), &format!("10.1.51.{i}"), "10.1.3.9"]);
    }
    let refused = net.fails(2, &["change", "add-group", "g7", "10.1.51.7", "10.1.3.9"]);
    assert!(refused.contains("need 9 VIPs"), "{refused}");
    net.ok(&["status", "--check"]);
}

#[test]
fn a_file_that_cannot_be_written_leaves_everything_as_it_is() {
    let net = Net::new();
    let dir = net.dir.join("read-only");
    net.sh(&format!(
        "mkdir {0}; mount -t tmpfs none {0}; cp {1} {0}/; mount -o remount,ro {0}",
        dir.display(),
        net.config().display()
    ));
    let file = dir.join("config.toml");
    let file = file.to_str().unwrap();
    let run = net.spawn(&["--config", file, "run"]);
    let healthy = || net.mqtt_fwd(&["--config", file, "status", "--check"]).status.success();
    wait_for("the sidecar", || healthy().then_some(()));
    let change = ["--config", file, "change", "add-route", "x", "a"];
    let refused = net.fails(2, &[&change[..], &["--persist"]].concat());
    assert!(refused.contains("(nothing was changed)"), "{refused}");
    assert!(!net.ok(&["--config", file, "routes"]).contains("\nmqtt     x"));
    net.ok(&change);
    drop(run);
    net.sh(&format!("umount {}", dir.display()));
}

/// Where `run` listens: the path has the namespace's number.
fn socket(net: &Net) -> PathBuf {
    let namespace = fs::metadata(format!("/run/netns/{}", net.name)).unwrap().ino();
    format!("/run/mqtt-fwd/run-{namespace}-eth0.sock").into()
}

async fn channel(net: &Net) -> Channel {
    let endpoint = format!("unix:{}", socket(net).display());
    Endpoint::from_shared(endpoint).unwrap().connect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn several_changes_are_made_together_or_not_at_all() {
    let net = Net::new();
    let _run = running(&net);
    let mut sidecar = SidecarClient::new(channel(&net).await);
    let route = |topic: &str, group: &str| proto::Change {
        service: String::new(),
        change: Some(change::Change::AddRoute(proto::AddRoute {
            route: Some(proto::Route { by: Some(route::By::Topic(topic.to_owned())) }),
            group: group.to_owned(),
        })),
    };
    let changes = vec![route("x", "a"), route("y", "none")];
    let request = proto::ChangeServicesRequest { changes, persist: false };
    let refused = sidecar.change_services(request).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    assert!(!routes(&net).contains("\"x\""));

    let changes = vec![route("x", "a"), route("y", "default")];
    let request = proto::ChangeServicesRequest { changes, persist: false };
    sidecar.change_services(request).await.unwrap();
    assert!(routes(&net).contains("\"x\"") && routes(&net).contains("\"y\""));
    let there = sidecar.get_configuration(proto::GetConfigurationRequest {}).await.unwrap();
    assert!(there.into_inner().toml.contains("{ topic = \"y\", group = \"default\" }"));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_health_and_reflection_are_served() {
    let net = Net::new();
    let run = running(&net);
    let channel = channel(&net).await;

    let mut sidecar = SidecarClient::new(channel.clone());
    let watch = || proto::WatchEventsRequest { backlog: false };
    let mut events = sidecar.watch_events(watch()).await.unwrap().into_inner();
    let second = sidecar.watch_events(watch()).await.unwrap_err();
    assert_eq!(second.code(), tonic::Code::Unavailable, "{second}");
    net.through_root(&Net::syn("10.1.1.1", 1000));
    let event = events.message().await.unwrap().unwrap();
    assert_eq!((&event.kind[..], &event.client[..]), ("bound", "10.1.1.1:1000"));
    assert_eq!((&event.group[..], &event.service[..]), ("default", "mqtt"));
    drop(events);
    wait_for("room for another reader", || {
        net.mqtt_fwd(&["events", "--seconds", "0"]).status.success().then_some(())
    });

    let mut health = HealthClient::new(channel.clone());
    let mut is = async |expected: ServingStatus| {
        for _ in 0..100 {
            let request = HealthCheckRequest { service: String::new() };
            let status = health.check(request).await.unwrap().into_inner().status();
            if status == expected {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        panic!("never {expected:?}: {}", run.log());
    };
    is(ServingStatus::Serving).await;
    net.sh("ip link set eth0 xdp off; ip link add other0 type veth peer name other1");
    net.sh("ip link del eth0");
    is(ServingStatus::NotServing).await;

    let mut reflection = ServerReflectionClient::new(channel);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers =
        reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.contains(&"mqtt_fwd.v1.Sidecar".to_owned()), "{names:?}");
}

/// The API over TCP, from the namespace of `net`. The connection's own error, or the call's.
fn remote_reals(net: &Net, tls: ClientTlsConfig) -> Result<usize, String> {
    let namespace = fs::File::open(format!("/run/netns/{}", net.name)).unwrap();
    let call = async {
        let endpoint = Endpoint::from_static("https://127.0.0.1:9470").tls_config(tls).unwrap();
        let channel = endpoint.connect().await.map_err(|e| format!("{e:?}"))?;
        let mut client = SidecarClient::new(channel);
        let reals = client.list_reals(proto::ListRealsRequest {}).await;
        let count = reals.map_err(|e| format!("{e:?}"))?.into_inner().reals.len();
        let drain = proto::SetDrainRequest {
            address: "10.1.3.201".to_owned(),
            drained: true,
            end_per_second: 0,
        };
        client.set_drain(drain).await.map_err(|e| format!("{e:?}"))?;
        Ok(count)
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(call)
        });
        thread.join().unwrap()
    })
}

fn identity(dir: &std::path::Path, name: &str) -> Identity {
    let read = |kind| fs::read(dir.join(format!("{name}.{kind}"))).unwrap();
    Identity::from_pem(read("crt"), read("key"))
}

#[test]
fn other_hosts_need_a_certificate_of_the_right_authority() {
    let net = Net::new();
    let authority = Authority::new(&net.dir);
    authority.sign(&net.dir, "server", "the server");
    authority.sign(&net.dir, "alice", "alice");
    let trusted = fs::read(net.dir.join("ca.crt")).unwrap();
    let api = "[api]\nlisten = \"127.0.0.1:9470\"\ncertificate = \"@DIR@/server.crt\"\n\
               key = \"@DIR@/server.key\"\nclient_ca = \"@DIR@/ca.crt\"\n\n[maps]";
    net.write_config(&crate::support::net::CONFIG.replace("[maps]", api));
    let run = running(&net);
    let tls = || {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&trusted))
            .domain_name("relay.test")
    };

    // With TLS 1.3, a server says so behind the handshake, or closes before it is heard.
    remote_reals(&net, tls()).unwrap_err();
    // Another authority of the same name.
    let elsewhere = net.dir.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    Authority::new(&elsewhere).sign(&elsewhere, "mallory", "alice");
    remote_reals(&net, tls().identity(identity(&elsewhere, "mallory"))).unwrap_err();
    assert!(!run.log().contains("drained"), "{}", run.log());

    let alice = || tls().identity(identity(&net.dir, "alice"));
    assert_eq!(remote_reals(&net, alice()), Ok(3));
    assert!(run.log().contains("CN=alice (127.0.0.1:"), "{}", run.log());

    // Bad certificates leave what is served; good ones are taken over.
    let good = fs::read(net.dir.join("server.crt")).unwrap();
    fs::write(net.dir.join("server.crt"), "no certificate").unwrap();
    run.signal("HUP");
    wait_for("the refusal", || {
        run.log().contains("certificates of [api] were not taken over").then_some(())
    });
    assert_eq!(remote_reals(&net, alice()), Ok(3));
    fs::write(net.dir.join("server.crt"), good).unwrap();
    let taken = || run.log().matches("serving the API to holders").count();
    assert_eq!(taken(), 1);
    run.signal("HUP");
    wait_for("the new ones", || (taken() == 2).then_some(()));
    assert_eq!(remote_reals(&net, alice()), Ok(3));
}
