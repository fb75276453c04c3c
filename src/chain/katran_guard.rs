//! Of two Katran servers, each takes the program out of the balancer's position when it ends, even if that is the
//! other's: then nothing forwards, and the other does not notice. Programs seen there are kept by descriptor, and put
//! back if their server is still running.

use std::os::fd::{AsFd as _, OwnedFd};

use libbpf_rs::Program;
use tracing::{debug, warn};

use crate::balancer::listeners;
use crate::kernel::Result;
use crate::kernel::chain::{self, Chain};
use crate::kernel::pins::Pins;
use crate::kernel::xdp::{self, ProgramInfo};
use crate::state::Observed;

/// Programs that are remembered, those seen last.
const REMEMBERED: usize = 4;

#[derive(Debug)]
struct RememberedProgram {
    program: OwnedFd,
    info: ProgramInfo,
}

/// The programs that were in the balancer's position.
#[derive(Debug, Default)]
pub struct KatranProgramGuard {
    seen: Vec<RememberedProgram>,
    /// The position was empty at the last poll: a server that ends empties it a moment before it is gone.
    was_empty: bool,
}

impl KatranProgramGuard {
    /// Once.
    pub fn poll(&mut self, pins: &Pins, endpoint: &str, observed: &Observed) -> Result<()> {
        let Some(chain) = Chain::open(pins)? else { return Ok(()) };
        if let Some(id) = chain.program_id(chain::BALANCER) {
            self.was_empty = false;
            self.remember(id);
            return Ok(());
        }
        if !std::mem::replace(&mut self.was_empty, true) {
            return Ok(());
        }
        // Newest first.
        let Some(alive) = self.seen.iter().rev().find(|seen| seen.is_alive(pins, endpoint)) else {
            return Ok(());
        };
        chain.set(chain::BALANCER, alive.program.as_fd())?;
        observed.chain_repairs.add(1);
        warn!(
            program = alive.info.name,
            id = alive.info.id,
            "put back into the balancer's position: another server removed it, and its own is running"
        );
        Ok(())
    }

    fn remember(&mut self, id: u32) {
        if self.seen.last().is_some_and(|seen| seen.info.id == id) {
            return;
        }
        let found = Program::fd_from_id(id).ok().zip(ProgramInfo::by_id(id));
        let Some((program, info)) = found else {
            debug!(id, "the balancer's program cannot be kept (CAP_SYS_ADMIN)");
            return;
        };
        self.seen.retain(|seen| seen.info.id != id);
        if self.seen.len() == REMEMBERED {
            self.seen.remove(0);
        }
        self.seen.push(RememberedProgram { program, info });
    }
}

impl RememberedProgram {
    /// Whether a server that listens has its maps open, other than those that all share.
    fn is_alive(&self, pins: &Pins, endpoint: &str) -> bool {
        let shared = [pins.service_vips(), pins.root_array().to_owned()];
        let shared: Vec<u32> = shared.iter().filter_map(|path| xdp::pinned_map_id(path)).collect();
        let own = self.info.map_ids.iter().flatten().copied();
        let own: Vec<u32> = own.filter(|id| !shared.contains(id)).collect();
        listeners::listeners(endpoint).iter().any(|listener| listener.holds_any(&own))
    }
}
