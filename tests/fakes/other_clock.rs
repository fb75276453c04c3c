//! Gives a broker host's programs a clock that is off: `other-clock BPFFS MINUTES` replaces what `host up`
//! attached by a copy whose CLOCK_TAI is so many minutes ahead. Maps stay.

use std::path::Path;

use anyhow::{Context as _, Result};
use libbpf_rs::{Link, ObjectBuilder};
use mqtt_fwd::kernel::pins::{Object, Pins};

#[path = "edited.rs"]
mod edited;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let bpffs = args.next().context("BPFFS")?;
    let minutes: i64 = args.next().context("MINUTES")?.parse()?;
    let pins = Pins::new(Path::new(&bpffs), "eth0", None);

    let dir = tempfile::tempdir()?;
    let clock = "bpf_ktime_get_tai_ns()";
    let off = format!("({clock} + {}LL)", minutes * 60_000_000_000);
    let object = edited::compile(dir.path(), "broker/takeover", "lib/cookie.h", &[(clock, &off)])?;
    let mut open = ObjectBuilder::default().open_file(&object)?;
    for mut map in open.maps_mut() {
        let pin = pins.map_of(Object::BrokerHost, &map.name().to_string_lossy());
        if pin.exists() {
            map.reuse_pinned_map(&pin)?;
        }
    }
    let loaded = open.load()?;
    for program in loaded.progs_mut() {
        let pin = pins.program(&program.name().to_string_lossy());
        Link::open(&pin)
            .and_then(|mut link| link.update_prog(&program))
            .with_context(|| pin.display().to_string())?;
    }
    Ok(())
}
