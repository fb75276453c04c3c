//! The program that wraps health checks as the balancer wraps clients' packets.

use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};

use super::abi::{addr_words, check_path};
use super::maps::Table;
use super::skeletons::wrap::WrapSkelBuilder;
use super::tcx::{self, Direction};
use super::{BpfError, Result, xdp};
use crate::domain::Mac;

/// The program on an interface, as long as it lives.
#[derive(Debug)]
pub struct Wrap {
    interface: String,
    /// Of the interface: one that is deleted and made again has another.
    index: i32,
    paths: Table<u64, check_path>,
    program: OwnedFd,
    /// Only held.
    #[allow(dead_code)]
    link: OwnedFd,
}

/// The encapsulation of one check.
#[derive(Debug, Clone, Copy)]
pub struct Outer {
    /// Where broker hosts expect it from.
    pub source: IpAddr,
    pub real: IpAddr,
    /// GUE in place of IPIP.
    pub gue: bool,
    /// The balancer's gateway; none: the kernel's own neighbour.
    pub mac: Option<Mac>,
    /// They are of a connection whose SYN was answered here (`bpf/abi/handover.h`).
    pub answered: bool,
}

impl Wrap {
    /// Attaches it.
    pub fn attach(interface: &str) -> Result<Self> {
        let failed = |source| BpfError::Load { object: "wrap", source };
        let mut storage = MaybeUninit::uninit();
        let open = WrapSkelBuilder::default().open(&mut storage).map_err(failed)?;
        let skel = open.load().map_err(failed)?;
        let program = skel.progs.wrap_check.as_fd();
        Ok(Self {
            interface: interface.to_owned(),
            index: xdp::interface_index(interface)?,
            paths: Table::of(&skel.maps.check_paths)?,
            program: program
                .try_clone_to_owned()
                .map_err(|source| BpfError::Tcx { interface: interface.to_owned(), source })?,
            link: tcx::attach(program, interface, Direction::Egress)?,
        })
    }

    /// Attaches it again if the interface has become another.
    pub fn renew(&mut self) -> Result<()> {
        let index = xdp::interface_index(&self.interface)?;
        if index != self.index {
            self.link = tcx::attach(self.program.as_fd(), &self.interface, Direction::Egress)?;
            self.index = index;
        }
        Ok(())
    }

    /// Wraps what the socket with this cookie sends.
    pub fn add(&self, cookie: u64, outer: Outer) -> Result<()> {
        let path = check_path {
            src: addr_words(outer.source),
            dst: addr_words(outer.real),
            v6: outer.real.is_ipv6().into(),
            gue: outer.gue.into(),
            answered: outer.answered.into(),
            has_mac: outer.mac.is_some().into(),
            mac: outer.mac.unwrap_or_default(),
            pad: [0; 6],
        };
        self.paths.put(&cookie, &path)
    }

    /// The inverse of [`Wrap::add`].
    pub fn remove(&self, cookie: u64) {
        let _ = self.paths.remove(&cookie);
    }
}
