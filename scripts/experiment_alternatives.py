# SPDX-License-Identifier: Apache-2.0 OR MIT
"""The ways that scripts/experiment compares, each set up in the lab of scripts/lab."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MQTT_FWD = f"{TOP}/target/release/mqtt-fwd"
LOAD = f"{TOP}/target/release/examples/mqtt-load"
LAB = "experiment"
RUN = f"/run/mqtt-fwd-lab/{LAB}"
TOPICS = ["measurements/temperature", "measurements/humidity", "measurements/pressure"]
# Topic by topic, in the order in which connections are made.
REALS = [f"10.1.3.20{i}:1883" for i in (1, 3, 5, 2, 4, 6)]
GROUPS = {TOPICS[0]: {"r1", "r2"}, TOPICS[1]: {"r3", "r4"}, TOPICS[2]: {"r5", "r6"}}
MQTT_VIP = "10.1.50.200:1883"
PROXY = "10.1.2.102:1890"
ROOT = f"{RUN}/bpf/lb/mqtt_fwd/eth0/prog_xdp_root"


def say(text):
    print(f"==> {text}", file=sys.stderr, flush=True)


def run(*command, check=True, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if check and done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def in_ns(name, *command, **options):
    return run("nsenter", f"--net=/run/netns/{LAB}-{name}", *command, **options)


def start(name, *command):
    inside = ["nsenter", f"--net=/run/netns/{LAB}-{name}", *command]
    return subprocess.Popen(inside, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Setup:
    """How an alternative is set up: threads of a proxy, and whether mosquitto stays where sinks take its place."""

    def __init__(self, threads, brokers=False):
        self.threads, self.brokers = threads, brokers

    def lab(self, *options, more=""):
        down()
        # Whatever is below a topic is its group's, too.
        routes = re.sub(r'topic = "(.*?)"', r'topic = "\1/#"', open(f"{TOP}/scripts/lab.toml").read())
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
            config.write(routes + more)
            config.flush()
            env = dict(os.environ, LAB=LAB, MQTT_FWD=MQTT_FWD)
            done = subprocess.run([f"{TOP}/scripts/lab", "up", *options, "--config", config.name], env=env,
                                  capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"scripts/lab up: {done.stderr}")
        # The lab's subscribers write down every message: not here.
        for pid in open(f"{RUN}/pids").read().split():
            if "mosquitto_sub" in run("ps", "-o", "args=", "-p", pid, check=False):
                os.kill(int(pid), signal.SIGTERM)
        if not self.brokers:
            run("pkill", "-f", f"mosquitto.*{RUN}/", check=False)
        time.sleep(0.3)


def down():
    env = dict(os.environ, LAB=LAB, MQTT_FWD=MQTT_FWD)
    subprocess.run([f"{TOP}/scripts/lab", "down"], env=env, capture_output=True)


def cpu(pid):
    """Seconds that a process' threads have run, to the nanosecond where the kernel keeps them."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            total += int(open(f"/proc/{pid}/task/{task}/schedstat").read().split()[0]) / 1e9
        except FileNotFoundError:
            pass
    if total:
        return total
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:13]) / os.sysconf("SC_CLK_TCK")


def tree(pid):
    children = run("pgrep", "-P", str(pid), check=False).split()
    return [pid] + [p for child in children for p in tree(int(child))]


def resident(pid):
    found = re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read())
    return int(found[1]) if found else 0


def busy():
    """Seconds that all CPUs were not idle."""
    fields = [int(f) for f in open("/proc/stat").readline().split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def bpf_time(pinned):
    text = run("bpftool", "-j", "prog", "show", "pinned", pinned)
    return json.loads(text).get("run_time_ns", 0) / 1e9


class Up:
    """An alternative that is set up."""

    def __init__(self, to, processes=(), root=None, hub=False, hosts=("lb",)):
        self.to = to  # addresses to connect to
        self.processes = list(processes)  # started here, or numbers of those that the lab started
        self.root = root  # pinned XDP program of the balancer's host
        self.hub = hub  # brokers are subscribers
        self.hosts = hosts  # where balancing is done

    def pids(self):
        return [p for entry in self.processes for p in tree(entry if isinstance(entry, int) else entry.pid)]

    def stop(self):
        for entry in self.processes:
            if not isinstance(entry, int):
                entry.terminate()


def direct(setup):
    setup.lab()
    # Subscribers have to be where publishers are.
    return Up(REALS[:1] if setup.brokers else REALS, hosts=())


def haproxy(setup, sticky=False):
    setup.lab()
    # A client that comes back gets the server that its identifier got before.
    stick = ("  tcp-request inspect-delay 5s\n"
             "  tcp-request content reject unless { req.payload(0,0),mqtt_is_valid }\n"
             "  stick-table type string len 64 size 100k expire 30m\n"
             "  stick on req.payload(0,0),mqtt_field_value(connect,client_identifier)\n") if sticky else ""
    servers = "".join(f"  server r{i} 10.1.3.20{i}:1883\n" for i in range(1, 7))
    with open(f"{RUN}/haproxy.cfg", "w") as out:
        out.write(f"global\n  maxconn 8000\n  nbthread {setup.threads}\ndefaults\n  mode tcp\n  timeout connect 5s\n"
                  f"  timeout client 1h\n  timeout server 1h\nlisten mqtt\n  bind {PROXY}\n"
                  f"  balance roundrobin\n{stick}{servers}")
    return Up([PROXY], [start("lb", "haproxy", "-db", "-f", f"{RUN}/haproxy.cfg")])


def nginx(setup):
    setup.lab()
    servers = "".join(f"    server 10.1.3.20{i}:1883;\n" for i in range(1, 7))
    with open(f"{RUN}/nginx.conf", "w") as out:
        out.write("load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\n"
                  f"worker_processes {setup.threads};\npid {RUN}/nginx.pid;\nerror_log {RUN}/nginx.log;\n"
                  "worker_rlimit_nofile 10000;\nevents { worker_connections 8000; }\n"
                  f"stream {{\n  upstream mqtt {{\n{servers}  }}\n"
                  f"  server {{ listen {PROXY} backlog=4096; tcp_nodelay on; proxy_pass mqtt; }}\n}}\n")
    return Up([PROXY], [start("lb", "nginx", "-c", f"{RUN}/nginx.conf")])


def nftables(setup):
    """The kernel's own NAT, both ways, as cluster networks do it."""
    setup.lab()
    in_ns("lb", "sysctl", "-qw", "net.ipv4.ip_forward=1")
    addresses = ", ".join(f"{n} : 10.1.3.20{n + 1} . 1883" for n in range(6))
    host, port = PROXY.split(":")
    rules = (f"table ip mqtt {{\n chain in {{ type nat hook prerouting priority -100;\n"
             f"  ip daddr {host} tcp dport {port} dnat ip to numgen inc mod 6 map {{ {addresses} }}\n }}\n"
             " chain out { type nat hook postrouting priority 100; tcp dport 1883 masquerade\n }\n}\n")
    in_ns("lb", "nft", "-f", "-", input=rules)
    return Up([PROXY])


def hub(setup):
    """All publish to one mosquitto; what would be brokers are shared subscribers of it."""
    setup.lab()
    with open(f"{RUN}/hub.conf", "w") as out:
        out.write("listener 1890 10.1.2.102\nallow_anonymous true\nmax_queued_messages 0\n"
                  "set_tcp_nodelay true\n")
    return Up([PROXY], [start("lb", "mosquitto", "-c", f"{RUN}/hub.conf")], hub=True)


def vip_per_topic(setup, katran=False):
    """The bare balancer: devices know an address for each topic."""
    setup.lab(*(["--katran"] if katran else []))
    env = dict(os.environ, LAB=LAB, MQTT_FWD=MQTT_FWD)
    run(f"{TOP}/scripts/lab", "sidecar", "stop", env=env)
    def command(*args):
        return in_ns("lb", MQTT_FWD, "-c", f"{RUN}/config.toml", *args)
    balancer = [] if katran else [start("lb", MQTT_FWD, "-c", f"{RUN}/config.toml", "balancer")]
    time.sleep(1)
    command("unload", "--keep-state")
    vips = []
    for n, group in enumerate(GROUPS.values()):
        vip = f"10.1.50.{101 + n}"
        run("ip", "-n", f"{LAB}-gw", "route", "replace", vip, "via", "10.1.2.102")
        command("katran", "add-vip", f"{vip}:1883")
        for real in sorted(group):
            command("katran", "add-real", f"{vip}:1883", f"10.1.3.20{real[1]}")
            in_ns(real, MQTT_FWD, "host", "up", "--interface", "eth0", "--bpffs", f"{RUN}/bpf/{real}",
                  "--vip", "10.1.50.200", "--vip", "fd01:50::200", "--vip", vip)
        vips.append(f"{vip}:1883")
    return Up(vips, balancer, ROOT)


def ours(*options):
    def up(setup):
        # Subscribers need relays: what they want is at brokers of several groups.
        setup.lab(*options, *(["--relay"] if setup.brokers else []))
        return Up([MQTT_VIP], relays() if setup.brokers else [], ROOT)
    return up


def relayed(setup):
    """All clients alternate between the three topics, so all of them are the relays'."""
    setup.lab("--relay", more=f"\n[relay]\nthreads = {setup.threads}\n")
    return Up([MQTT_VIP], relays(), ROOT, hosts=("lb", "r7", "r8"))


def relays():
    return [int(open(f"{RUN}/relay-{name}.pid").read()) for name in ("r7", "r8")]


def pin(up):
    """Gives the last CPU to the balancer alone: its processes, and what its hosts' interfaces receive, which from now on
    threads do and not soft interrupts on whichever CPU sends. Returns those threads."""
    last = str(os.cpu_count() - 1)
    def napi():
        return set(run("pgrep", "^napi/", check=False).split())
    def thread(namespace, interface):
        # A veth interface without an XDP program has NAPI if it has GRO.
        run("ip", "netns", "exec", f"{LAB}-{namespace}", "ethtool", "-K", interface, "gro", "on")
        run("ip", "netns", "exec", f"{LAB}-{namespace}", "sh", "-c", f"echo 1 >/sys/class/net/{interface}/threaded")
    earlier = napi()
    for host in up.hosts:
        thread(host, "eth0")
    own = napi() - earlier
    for host in up.hosts:
        # What the balancer sends is received elsewhere.
        thread("gw", host)
    for pid in napi() - own - earlier:
        run("taskset", "-p", "-c", "0", pid)
    for pid in [*own, *map(str, up.pids())]:
        run("taskset", "-a", "-p", "-c", last, pid)
    return [int(pid) for pid in own]


ALTERNATIVES = {
    "direct": (direct, "clients know their brokers"),
    "haproxy": (haproxy, "HAProxy, TCP mode; no group is chosen"),
    "haproxy-id": (lambda setup: haproxy(setup, sticky=True),
                   "HAProxy, TCP mode, a client identifier keeps its broker; no group is chosen"),
    "nginx": (nginx, "NGINX stream; no group is chosen"),
    "nftables": (nftables, "the kernel's NAT in both directions, brokers in turn; no group is chosen"),
    "hub": (hub, "one mosquitto, brokers as shared subscribers"),
    "vip-per-topic": (vip_per_topic, "the bare balancer, an address for each topic"),
    "predicted": (ours(), "mqtt-fwd, embedded balancer, predicted binding"),
    "delayed": (ours("--delayed"), "mqtt-fwd, embedded balancer, delayed binding"),
    "relay": (relayed, "mqtt-fwd, all messages through the relay, each to its group"),
}
if os.environ.get("KATRAN_SERVER"):
    ALTERNATIVES |= {
        "katran-alone": (lambda setup: vip_per_topic(setup, katran=True), "Katran alone, an address for each topic"),
        "katran": (ours("--katran"), "mqtt-fwd in front of Katran, predicted binding"),
        "katran-delayed": (ours("--katran", "--delayed"), "mqtt-fwd in front of Katran, delayed binding"),
    }
# A message costs them BPF run time, and no process anything.
FAST_PATH = {"vip-per-topic", "predicted", "delayed", "katran-alone", "katran", "katran-delayed"}
NO_GROUPS = {"haproxy", "haproxy-id", "nginx", "nftables"}
