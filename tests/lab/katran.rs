//! What only a real Katran can do wrong (scripts/test --katran).

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use crate::support::lab::{Lab, config};
use crate::support::net::wait_for;

/// Connections that stand until there is a line of input.
const STANDING: &str = "import socket, sys
standing = [socket.create_connection(('10.1.50.200', 1883)) for _ in range(300)]
for n, c in enumerate(standing):
    c.sendall(bytes([16, 16, 0, 4]) + b'MQTT' + bytes([4, 2, 0, 0, 0, 4]) + b'%04d' % n)
    assert c.recv(4) == bytes([32, 2, 0, 0])
print('open', flush=True)
sys.stdin.read()";

#[test]
#[ignore = "beside a Katran: scripts/test --katran"]
fn a_katran_that_remembers_fewer_connections_than_stand_is_named_by_doctor() {
    let lab = Lab::up(&config(&[("default", 250, &[201, 202])], &[]), &[]);
    let doctor =
        || String::from_utf8_lossy(&lab.exec("lb", &["mqtt-fwd", "doctor"]).stdout).into_owned();
    let said = "Katran has room for ";
    let mut command = lab.script("exec");
    command.args(["c1", "python3", "-c", STANDING]);
    let mut standing = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut open = String::new();
    BufReader::new(standing.stdout.as_mut().unwrap()).read_line(&mut open).unwrap();
    assert_eq!(open, "open\n");
    assert!(!doctor().contains(said), "{}", doctor());

    for (lru_size, named) in [("100", true), ("100000", false)] {
        assert!(lab.script("katran").arg("kill").status().unwrap().success());
        let mut start = lab.script("katran");
        assert!(start.arg("start").env("KATRAN_LRU_SIZE", lru_size).status().unwrap().success());
        wait_for("Katran's table to be judged", || {
            (doctor().contains(said) == named).then_some(())
        });
    }
    drop(standing.stdin.take());
    standing.wait().unwrap();
}
