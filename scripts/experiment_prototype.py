# SPDX-License-Identifier: Apache-2.0 OR MIT
"""The prototype's functional tests, 1 to 7, with real clients and brokers in the lab: what it published, and what comes now.

Test 8 (rewriting of payloads) was an oddity of the prototype's; 9, 11 and 12 are loads of scripts/experiment; 10 and 13 are its
alternatives `katran` and `katran-alone`, with the loads of 9 and 12.
"""

import glob
import json
import subprocess
import time

LONG = "aabbccddee" * 8
ROUTES = {"sensors/": "temperature", LONG: "temperature", "living-room/": "humidity", "sensor/a": "temperature",
          "sensor/b": "humidity"}
GROUPS = {"temperature": {"r1", "r2"}, "humidity": {"r3", "r4"}, "default": {"r5", "r6"}}
TOPIC_GROUP = dict(ROUTES, **{"measurements/temperature": "temperature", "measurements/humidity": "humidity"})
SIX = ["measurements/temperature"] * 2 + ["measurements/humidity"] * 3 + ["measurements/other"]

# What the prototype published: right of sent.
PUBLISHED = {
    "1": "2 of 3, then after a change of address 2 of 3",
    "2": "2 of 3, 3 of 3, 2 of 3",
    "3": "0 of 6, then on another connection 6 of 6",
    "4": "3 of 3",
    "5": "2 of 3, 2 of 3",
    "6": "99 of 100 of five clients, 100 of one",
    "7": "99 of 100 of each whose topic has a group, before and after",
}
ABOUT = {
    "1": "3 messages of `sensors/`, mosquitto_pub each; the same from another address",
    "2": "3 messages each of a topic of 80 B, `sensors/` and `living-room/`, from one address",
    "3": "6 messages of `living-room/` on one connection; again on another",
    "4": "3 messages of a topic without a route",
    "5": "3 messages of `sensor/a`, then 3 of `sensor/b`, from one address",
    "6": "six clients, 100 messages each, three topics",
    "7": "ten clients, 100 messages each; then all have other addresses",
}


class Lab:
    """A lab with its own brokers, and addresses for clients that nobody has seen."""

    def __init__(self, call, run, config, options):
        self.call, self.run, self.next = call, run, 150
        call("up", "--config", config, *options)

    def address(self):
        self.next += 1
        address = f"10.1.1.{self.next}"
        self.call("exec", "c1", "ip", "addr", "add", f"{address}/24", "dev", "eth0")
        return address

    def publish(self, address, name, topic, count):
        """With mosquitto_pub: a connection for each message."""
        for n in range(count):
            self.call("exec", "c1", "mosquitto_pub", "-h", "10.1.50.200", "-A", address, "-t", topic, "-m", f"{name} {n}")
            time.sleep(0.2)
        return name, topic, count

    def publishers(self, clients, count, interval):
        """One connection each, as devices do: (name, topic, address)."""
        running = [self.call("publish", "c1", "--bind", address, "--id", name, "--topic", topic, "--count", str(count),
                             "--interval", str(interval), "--no-wait", wait=False) for name, topic, address in clients]
        for process in running:
            process.wait(120)
        return [(name, topic, count) for name, topic, _ in clients]

    def right(self, *sent):
        """How many of each arrived at a broker of their group, once."""
        time.sleep(0.7)
        got = {}
        for path in glob.glob(f"{self.run}/r?.received"):
            real = path.rsplit("/", 1)[1].split(".")[0]
            for line in open(path):
                got.setdefault(tuple(line.split()[1:3]), []).append(real)
        def is_right(name, topic, n):
            there = got.get((name, str(n)), [])
            return len(there) == 1 and there[0] in GROUPS[TOPIC_GROUP.get(topic, "default")]
        return [(sum(is_right(name, topic, n) for n in range(count)), count) for name, topic, count in sent]


def test_1(lab):
    return lab.right(*(lab.publish(lab.address(), f"t1-{phase}", "sensors/", 3) for phase in "ab"))


def test_2(lab):
    one = lab.address()
    topics = (LONG, "sensors/", "living-room/")
    return lab.right(*[lab.publish(one, f"t2-{i}", topic, 3) for i, topic in enumerate(topics)])


def test_3(lab):
    one = lab.address()
    return lab.right(*[sent for phase in "ab" for sent in lab.publishers([(f"t3-{phase}", "living-room/", one)], 6, 1)])


def test_4(lab):
    return lab.right(lab.publish(lab.address(), "t4", "sensor", 3))


def test_5(lab):
    one = lab.address()
    return lab.right(*[lab.publish(one, f"t5-{topic[-1]}", topic, 3) for topic in ("sensor/a", "sensor/b")])


def test_6(lab):
    return lab.right(*lab.publishers([(f"t6-{i}", topic, lab.address()) for i, topic in enumerate(SIX)], 100, 0.05))


def test_7(lab):
    sent = []
    for phase in "ab":
        clients = [(f"t7-{phase}{i}", SIX[i % 6], lab.address()) for i in range(10)]
        sent += lab.publishers(clients, 100, 0.05)
    return lab.right(*sent)


TESTS = {"1": test_1, "2": test_2, "3": test_3, "4": test_4, "5": test_5, "6": test_6, "7": test_7}
MODES = {"predicted": [], "delayed": ["--delayed"], "relay": ["--relay"]}


def measure(top, lab_name, mqtt_fwd, run_dir, environment, out):
    """Rows {"test", "mode", "right", "sent"}, into prototype.jsonl."""
    text = open(f"{top}/scripts/lab.toml").read()
    more = "".join(f'    {{ topic = "{topic}", group = "{group}" }},\n' for topic, group in ROUTES.items())
    config = f"{out}/prototype.toml"
    with open(config, "w") as file:
        file.write(text.replace("route = [\n", f"route = [\n{more}"))
    env = dict(environment, LAB=lab_name, MQTT_FWD=mqtt_fwd)

    def call(*args, wait=True):
        command = [f"{top}/scripts/lab", *args]
        if not wait:
            return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # A publisher that was sent away ends with an error: what arrived says enough.
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    rows = []
    for mode, options in MODES.items():
        call("down")
        lab = Lab(call, run_dir, config, options)
        try:
            for number, test in TESTS.items():
                parts = test(lab)
                rows.append({"test": number, "mode": mode, "right": [r for r, _ in parts], "sent": [s for _, s in parts]})
                print(f"==> test {number}, {mode}: " + ", ".join(f"{r} of {s}" for r, s in parts), flush=True)
        finally:
            call("down")
    with open(f"{out}/prototype.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def table(rows):
    """(headings, rows) for the report."""
    def said(parts):
        if len(parts) > 3:
            sent, right = sum(s for _, s in parts), sum(r for r, _ in parts)
            return f"{right} of {sent}"
        return ", ".join(f"{r} of {s}" for r, s in parts)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines = []
    for number in ABOUT:
        by_mode = {row["mode"]: list(zip(row["right"], row["sent"])) for row in rows if row["test"] == number}
        if by_mode:
            lines.append([f"{number}: {ABOUT[number]}", PUBLISHED[number], *(said(by_mode.get(m, [])) for m in modes)])
    return ["test", "the prototype", *modes], lines
