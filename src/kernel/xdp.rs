//! XDP programs: which one is attached or in a chain's slot, and attaching ours.

use std::mem::size_of;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::Path;

use libbpf_rs::{MapHandle, MapInfo, Program, Xdp, XdpFlags};

use super::{BpfError, Result, ifreq};
use crate::domain::XdpMode;

/// What the kernel tells of a loaded program.
#[derive(Debug, Clone)]
pub struct ProgramInfo {
    /// Identifier.
    pub id: u32,
    /// Name, at most 15 characters.
    pub name: String,
    /// Identifiers of the maps that it uses; `None`: the kernel tells those only with CAP_SYS_ADMIN.
    pub map_ids: Option<Vec<u32>>,
    /// Instructions after verification.
    pub instructions: u32,
    /// The kernel's hash of its instructions.
    pub tag: [u8; 8],
    /// How often it ran, and for how long, if the kernel measures that.
    pub runs: u64,
    pub run_time: std::time::Duration,
}

impl ProgramInfo {
    /// Of a program by its identifier; `None` if it is gone. Without CAP_SYS_ADMIN, the identifier is
    /// all that is known of it.
    pub fn by_id(id: u32) -> Option<Self> {
        match Program::fd_from_id(id) {
            Ok(fd) => Self::by_fd(fd.as_fd()),
            Err(e) if e.kind() == libbpf_rs::ErrorKind::PermissionDenied => Some(Self {
                id,
                name: "?".to_owned(),
                map_ids: None,
                instructions: 0,
                tag: [0; 8],
                runs: 0,
                run_time: std::time::Duration::ZERO,
            }),
            Err(_) => None,
        }
    }

    /// Whether the program uses a map; `None`: the kernel does not tell.
    pub fn uses_map(&self, id: u32) -> Option<bool> {
        self.map_ids.as_ref().map(|ids| ids.contains(&id))
    }

    /// Whether the program uses the map that is pinned at a path; `None`: the kernel does not tell.
    pub fn uses_pinned_map(&self, path: &Path) -> Option<bool> {
        match pinned_map_id(path) {
            Some(id) => self.uses_map(id),
            None => Some(false),
        }
    }

    /// Of a program by its descriptor.
    pub fn by_fd(fd: BorrowedFd<'_>) -> Option<Self> {
        // A chain's programs use few maps; the kernel fills in as many as fit.
        let mut map_ids = vec![0u32; 64];
        let mut info = libbpf_sys::bpf_prog_info {
            nr_map_ids: map_ids.len() as u32,
            map_ids: map_ids.as_mut_ptr() as u64,
            ..Default::default()
        };
        let mut length = size_of::<libbpf_sys::bpf_prog_info>() as u32;
        // SAFETY: `info` and `map_ids` are valid for the lengths given, for the whole call.
        let failed = unsafe {
            libbpf_sys::bpf_prog_get_info_by_fd(fd.as_raw_fd(), &raw mut info, &raw mut length)
        };
        if failed != 0 {
            return None;
        }
        map_ids.truncate(info.nr_map_ids as usize);
        let name: Vec<u8> =
            info.name.iter().take_while(|c| **c != 0).map(|c| c.cast_unsigned()).collect();
        Some(Self {
            id: info.id,
            name: String::from_utf8_lossy(&name).into_owned(),
            map_ids: Some(map_ids),
            instructions: info.xlated_prog_len / 8,
            tag: info.tag,
            runs: info.run_cnt,
            run_time: std::time::Duration::from_nanos(info.run_time_ns),
        })
    }
}

/// The kernel's identifier of a pinned map.
pub fn pinned_map_id(path: &Path) -> Option<u32> {
    let map = MapHandle::from_pinned_path(path).ok()?;
    MapInfo::new(map.as_fd()).ok().map(|info| info.info.id)
}

/// The index of an interface of this network namespace.
pub fn interface_index(name: &str) -> Result<i32> {
    nix::net::if_::if_nametoindex(name)
        .map(u32::cast_signed)
        .map_err(|_| BpfError::NoInterface { name: name.to_owned() })
}

/// The interface's MTU.
pub fn interface_mtu(name: &str) -> Result<u32> {
    interface_index(name)?;
    let io = |source| BpfError::Io { path: name.into(), action: "asking for its MTU", source };
    // SAFETY: SIOCGIFMTU reads nothing of the union.
    let answer = unsafe { ifreq::request(name, libc::SIOCGIFMTU, |_| {}) }.map_err(io)?;
    // SAFETY: it has written this member.
    Ok(unsafe { answer.ifr_ifru.ifru_mtu }.cast_unsigned())
}

fn failed(interface: &str, action: &'static str) -> impl FnOnce(libbpf_rs::Error) -> BpfError {
    let interface = interface.to_owned();
    move |source| BpfError::Xdp { interface, action, source }
}

/// The program attached to the interface, in whatever mode.
pub fn attached(interface: &str) -> Result<Option<ProgramInfo>> {
    let index = interface_index(interface)?;
    // The query is about the interface; the descriptor is not used for it.
    let stdin = std::io::stdin();
    let id = Xdp::new(stdin.as_fd())
        .query_id(index, XdpFlags::NONE)
        .map_err(failed(interface, "asking for its XDP program"))?;
    Ok((id != 0).then(|| ProgramInfo::by_id(id)).flatten())
}

fn flags(mode: XdpMode) -> XdpFlags {
    match mode {
        XdpMode::Native => XdpFlags::DRV_MODE,
        XdpMode::Generic => XdpFlags::SKB_MODE,
    }
}

/// Attaches a program where none is. Never another mode than the one asked for.
pub fn attach(interface: &str, program: BorrowedFd<'_>, mode: XdpMode) -> Result<()> {
    let index = interface_index(interface)?;
    Xdp::new(program).attach(index, flags(mode) | XdpFlags::UPDATE_IF_NOEXIST).map_err(|source| {
        let unsupported = source.kind() == libbpf_rs::ErrorKind::Other
            || source.to_string().contains("not supported");
        if mode == XdpMode::Native && unsupported {
            BpfError::NoNativeXdp { interface: interface.to_owned(), source }
        } else {
            failed(interface, "attaching the XDP program")(source)
        }
    })
}

/// Puts a program in the place of the attached one, in whatever mode that is; no packet meets none.
pub fn replace(interface: &str, program: BorrowedFd<'_>, old: BorrowedFd<'_>) -> Result<()> {
    let index = interface_index(interface)?;
    let mode = attached_mode(interface).unwrap_or(XdpMode::Native);
    let flags = flags(mode) | XdpFlags::REPLACE;
    let options = libbpf_sys::bpf_xdp_attach_opts {
        sz: size_of::<libbpf_sys::bpf_xdp_attach_opts>() as u64,
        old_prog_fd: old.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the options live through the call.
    let error = unsafe {
        libbpf_sys::bpf_xdp_attach(index, program.as_raw_fd(), flags.bits(), &raw const options)
    };
    if error == 0 {
        return Ok(());
    }
    let source = libbpf_rs::Error::from_raw_os_error(-error);
    Err(failed(interface, "replacing the XDP program")(source))
}

/// Detaches the interface's program if it is the one with this identifier; whether it was.
pub fn detach(interface: &str, id: u32) -> Result<bool> {
    let Some(program) = attached(interface)? else { return Ok(false) };
    if program.id != id {
        return Ok(false);
    }
    let index = interface_index(interface)?;
    let stdin = std::io::stdin();
    for mode in [XdpMode::Native, XdpMode::Generic] {
        let in_this_mode = Xdp::new(stdin.as_fd()).query_id(index, flags(mode));
        if in_this_mode.is_ok_and(|there| there == id) {
            Xdp::new(stdin.as_fd())
                .detach(index, flags(mode))
                .map_err(failed(interface, "detaching the XDP program"))?;
        }
    }
    Ok(true)
}

/// Native or generic, as it is attached.
pub fn attached_mode(interface: &str) -> Option<XdpMode> {
    let index = interface_index(interface).ok()?;
    let stdin = std::io::stdin();
    [XdpMode::Native, XdpMode::Generic]
        .into_iter()
        .find(|mode| Xdp::new(stdin.as_fd()).query_id(index, flags(*mode)).is_ok_and(|id| id != 0))
}
