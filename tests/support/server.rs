//! The servers that the contract holds for. A real Katran is one of them where KATRAN_SERVER names
//! a katran_server_grpc and KATRAN_BALANCER its balancer.bpf.o, with our patches.

use mqtt_fwd::balancer::proto::katran_service_client::KatranServiceClient;
use mqtt_fwd::balancer::proto::{Vip, VipMeta};
use tonic::transport::Channel;

use super::net::{Background, Net, wait_for};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Embedded,
    /// A test double, as silent and forgetful as Katran.
    Silent,
    Katran,
}

impl Kind {
    pub fn all() -> Vec<Self> {
        [&[Self::Embedded][..], &Self::silent()].concat()
    }

    /// Katran and its double.
    pub fn silent() -> Vec<Self> {
        let katran = std::env::var_os("KATRAN_SERVER").map(|_| Self::Katran);
        [Self::Silent].into_iter().chain(katran).collect()
    }

    pub fn config(self, text: &str) -> String {
        match self {
            Self::Embedded => text.to_owned(),
            _ => text.replace("balancer = \"embedded\"", "balancer = \"katran\""),
        }
    }

    /// The reason of a refusal, as this server gives it.
    pub fn reason(self, text: &str) -> String {
        if self == Self::Embedded { text.to_owned() } else { String::new() }
    }

    /// Starts it and waits until it listens. The chain has to be there.
    pub fn start(self, net: &Net, endpoint: &str) -> Background {
        let server = match self {
            Self::Embedded => net.spawn(&["balancer"]),
            Self::Silent => net.spawn_command(net.command(example("silent-katran"))),
            Self::Katran => net.spawn_command(katran(net, endpoint)),
        };
        let server = std::cell::RefCell::new(server);
        let listening = || {
            let gone = server.borrow_mut().ended();
            assert!(!gone, "{self:?} ended: {}", server.borrow().log());
            if let Some(path) = endpoint.strip_prefix("unix:") {
                return std::os::unix::net::UnixStream::connect(path).ok().map(drop);
            }
            let inode = net.mqtt_fwd(&["katran", "--endpoint", endpoint, "mac"]);
            inode.status.success().then_some(())
        };
        wait_for(&format!("{self:?} at {endpoint}"), listening);
        server.into_inner()
    }
}

/// An example program of this package, which `cargo test` builds beside the tests.
pub fn example(name: &str) -> std::path::PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples").join(name)
}

fn katran(net: &Net, endpoint: &str) -> std::process::Command {
    let env = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let mut command = net.command(env("KATRAN_SERVER"));
    command.arg(format!("-balancer_prog={}", env("KATRAN_BALANCER")));
    command.arg(format!("-map_path={}", net.bpf("jmp_eth0").display()));
    command.args(["-intf=eth0", "-hc_forwarding=false"]);
    command.args(["-prog_pos=2", "-default_mac=02:00:00:00:00:09", "-lru_size=1000"]);
    command.args(["-forwarding_cores=0", "-numa_nodes=0", "-shutdown_delay=100"]);
    command.arg(format!("-server={endpoint}"));
    command
}

/// Adds a VIP in whatever text.
pub fn add_vip_verbatim(net: &Net, endpoint: &str, address: &str, port: u16) {
    let vip = Vip { address: address.to_owned(), port: port.into(), protocol: libc::IPPROTO_TCP };
    let request = VipMeta { vip: Some(vip), flags: 0, set_flag: true };
    call(net, endpoint, async |mut client| client.add_vip(request).await.map(drop));
}

/// Removes it, as written.
pub fn del_vip_verbatim(net: &Net, endpoint: &str, address: &str, port: u16) {
    let vip = Vip { address: address.to_owned(), port: port.into(), protocol: libc::IPPROTO_TCP };
    call(net, endpoint, async |mut client| client.del_vip(vip).await.map(drop));
}

/// The endpoint is the namespace's own, so a thread goes there for the call.
fn call<F>(net: &Net, endpoint: &str, rpc: F)
where
    F: AsyncFnOnce(KatranServiceClient<Channel>) -> Result<(), tonic::Status> + Send + 'static,
{
    let namespace = std::fs::File::open(format!("/run/netns/{}", net.name)).unwrap();
    let endpoint = format!("http://{endpoint}");
    let call = move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            rpc(KatranServiceClient::connect(endpoint).await.unwrap()).await.unwrap();
        });
    };
    std::thread::spawn(call).join().unwrap();
}
