//! `mqtt_fwd` as loaded for tests before. To load it takes the verifier a second of processor time, of
//! which a hundred tests need as many; what a test has done with is emptied, and the next one's.

use std::mem::MaybeUninit;
use std::ops::Deref;
use std::sync::Mutex;

use libbpf_rs::skel::{OpenSkel as _, Skel as _, SkelBuilder as _};
use libbpf_rs::{Map, MapCore as _, MapFlags, MapType, OpenObject, RingBufferBuilder};
use mqtt_fwd::config::MapSizes;
use mqtt_fwd::kernel::abi::limits;
use mqtt_fwd::kernel::skeletons::mqtt_fwd::types::rodata;
use mqtt_fwd::kernel::skeletons::mqtt_fwd::{MqttFwdSkel, MqttFwdSkelBuilder};

/// Load-time configuration, byte for byte, and the maps' sizes.
type Kind = (Vec<u8>, MapSizes);

struct Idle(Kind, MqttFwdSkel<'static>);
// SAFETY: nothing of an object belongs to the thread that loaded it.
unsafe impl Send for Idle {}

static IDLE: Mutex<Vec<Idle>> = Mutex::new(Vec::new());

/// A loaded object, with nothing in its maps. Goes back when it is dropped, unless its test failed.
pub struct Loaded {
    kind: Option<Kind>,
    skel: Option<MqttFwdSkel<'static>>,
}

impl Deref for Loaded {
    type Target = MqttFwdSkel<'static>;

    fn deref(&self) -> &Self::Target {
        self.skel.as_ref().unwrap()
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let (Some(kind), Some(skel), false) =
            (self.kind.take(), self.skel.take(), std::thread::panicking())
        {
            IDLE.lock().unwrap().push(Idle(kind, skel));
        }
    }
}

pub fn load(sizes: &MapSizes, set: impl FnOnce(&mut rodata)) -> Loaded {
    libbpf_rs::set_print(None);
    let storage: &'static mut MaybeUninit<OpenObject> = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut open = MqttFwdSkelBuilder::default().open(storage).unwrap();
    for mut map in open.open_object_mut().maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if let Some(size) = sizes.of(&name) {
            map.set_max_entries(size).unwrap();
        }
    }
    let rodata = open.maps.rodata_data.as_deref_mut().unwrap();
    rodata.has_predecessor = 0;
    rodata.fleet = 0;
    rodata.misses_per_window = u32::MAX;
    rodata.connections_per_address = 0;
    rodata.messages_per_client = 0;
    rodata.handovers_per_second = u32::MAX;
    rodata.handovers_per_window = u32::MAX;
    rodata.clients_per_second = u32::MAX;
    rodata.clients_per_window = u32::MAX;
    rodata.cache_set_bits = sizes.cache_sets().ilog2();
    rodata.flow_sets = sizes.flow_places() / limits::FLOW_WAYS.0;
    rodata.untracked_bits = sizes.untracked().ilog2();
    set(rodata);
    // SAFETY: it is the image of a map, all of whose bytes are initialised.
    let image = unsafe {
        std::slice::from_raw_parts(std::ptr::from_ref(rodata).cast::<u8>(), size_of_val(rodata))
    };
    let kind = (image.to_vec(), *sizes);
    let idle = {
        let mut idle = IDLE.lock().unwrap();
        let at = idle.iter().position(|Idle(of, _)| *of == kind);
        at.map(|at| idle.swap_remove(at).1)
    };
    let skel = match idle {
        Some(skel) => {
            skel.object().maps().for_each(|map| empty(&map));
            skel
        }
        None => open.load().unwrap_or_else(|e| {
            panic!("mqtt_fwd does not load (root? clang?): {e}");
        }),
    };
    Loaded { kind: Some(kind), skel: Some(skel) }
}

/// Makes a map what it was when it was loaded.
fn empty(map: &Map) {
    let name = map.name().to_string_lossy().into_owned();
    match map.map_type() {
        MapType::Array if name.contains(".rodata") => {}
        MapType::Array => {
            let (count, size) = (map.max_entries(), map.value_size());
            let keys: Vec<u8> = (0..count).flat_map(u32::to_ne_bytes).collect();
            let zeros = vec![0; size as usize * count as usize];
            map.update_batch(&keys, &zeros, count, MapFlags::ANY, MapFlags::ANY)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        MapType::PercpuArray => {
            let processors = libbpf_rs::num_possible_cpus().unwrap();
            let zeros = vec![vec![0; map.value_size() as usize]; processors];
            for key in 0..map.max_entries() {
                map.update_percpu(&key.to_ne_bytes(), &zeros, MapFlags::ANY).unwrap();
            }
        }
        MapType::ProgArray if name == "stages" => {}
        MapType::RingBuf => {
            let mut all = RingBufferBuilder::new();
            all.add(map, |_| 0).unwrap();
            all.build().unwrap().consume().unwrap();
        }
        kind => {
            for key in map.keys().collect::<Vec<_>>() {
                let _ = map.delete(&key);
            }
            // An array has all its keys for ever.
            assert!(
                kind == MapType::ProgArray || map.keys().next().is_none(),
                "{name} is not empty"
            );
        }
    }
}
