//! What delayed binding needs of user space: the secret that balancers make cookies with and broker hosts check, an end
//! to waiting for clients that are silent after CONNECT, and ClientHellos that come in several segments.

pub mod cookie;
pub(crate) mod hello;
pub mod hellos;
pub mod keys;
mod segment;
pub mod silent;
pub mod stuck;

use crate::kernel::BpfError;

/// What is looked at on a broker host that does not take connections over.
pub const HOST_ADVICE: &str = "`mqtt-fwd host status` there says whether handover key and clock are right; its \
                               firewall must let segments pass that are no SYN, and its NAT must not track the \
                               service (notrack)";

/// What can go wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Key(#[from] keys::KeyError),
    #[error("handing a silent client's connection to a broker: {0}")]
    Inject(std::io::Error),
}
