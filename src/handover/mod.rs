//! What delayed binding needs of user space: the secret that balancers make cookies with and broker hosts check, and
//! an end to waiting for clients that are silent after CONNECT.

pub mod cookie;
pub mod keys;
pub mod silent;
pub mod stuck;

use crate::kernel::BpfError;

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
