//! The layout of maps, as BTF has it: what their keys and values consist of, how one build's become
//! another's, and a hash by which pins of different builds are kept apart.

use std::ffi::{CStr, c_char};
use std::hash::Hasher as _;
use std::os::fd::AsFd as _;
use std::ptr::NonNull;

use libbpf_rs::{AsRawLibbpf as _, MapHandle, MapInfo, OpenObject};
use siphasher::sip::SipHasher13;

use super::catalog;

/// A number, or a run of bytes, somewhere in a key or value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Field {
    /// Such as `verdict[1].generation`.
    path: String,
    offset: usize,
    size: usize,
}

/// What a key or value consists of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Layout {
    size: usize,
    fields: Vec<Field>,
}

impl Layout {
    /// A value of `from`, as one of this layout: fields by name, numbers by value, what is new 0.
    pub fn convert(&self, from: &Self, value: &[u8]) -> Vec<u8> {
        let mut converted = vec![0; self.size];
        for field in &self.fields {
            let Some(old) = from.fields.iter().find(|f| f.path == field.path) else { continue };
            let size = field.size.min(old.size);
            // Of a number in little-endian order, the first bytes are the value's.
            converted[field.offset..field.offset + size]
                .copy_from_slice(&value[old.offset..old.offset + size]);
        }
        converted
    }

    /// Where a field begins.
    pub fn offset_of(&self, path: &str) -> Option<usize> {
        self.fields.iter().find(|field| field.path == path).map(|field| field.offset)
    }
}

// Fields are cut and extended at their end, which is right for numbers in this order only.
const _: () = assert!(cfg!(target_endian = "little"), "see Layout::convert");

/// Layouts of a map's key and value.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct MapLayout {
    /// Of the key.
    pub key: Layout,
    /// Of the value.
    pub value: Layout,
}

impl MapLayout {
    /// Of a loaded map, from the BTF that the kernel keeps with it; `None` if there is none.
    pub fn of_map(map: &MapHandle) -> Option<Self> {
        let info = MapInfo::new(map.as_fd()).ok()?.info;
        let btf = KernelBtf::load(info.btf_id)?;
        Some(Self {
            key: layout(btf.0.as_ptr(), info.btf_key_type_id)?,
            value: layout(btf.0.as_ptr(), info.btf_value_type_id)?,
        })
    }
}

/// A hash of all maps of an object that is not loaded yet: names, types, capacities and layouts. Of shared maps,
/// others decide.
pub fn hash_of(object: &OpenObject) -> String {
    let raw = object.as_libbpf_object().as_ptr();
    // SAFETY: the object is open; libbpf keeps the BTF as long as it is.
    let btf = unsafe { libbpf_sys::bpf_object__btf(raw) };
    let mut hasher = SipHasher13::new();
    for map in object.maps() {
        let name = map.name().to_string_lossy().into_owned();
        if name.contains('.') || catalog::role(&name) == catalog::Role::Shared {
            continue;
        }
        let raw = map.as_libbpf_object().as_ptr();
        // SAFETY: the map is the open object's.
        let (key, value) = unsafe {
            (libbpf_sys::bpf_map__btf_key_type_id(raw), libbpf_sys::bpf_map__btf_value_type_id(raw))
        };
        let text = format!(
            "{name} {:?} {} {:?} {:?}",
            map.map_type(),
            map.max_entries(),
            layout(btf, key),
            layout(btf, value)
        );
        hasher.write(text.as_bytes());
    }
    format!("{:016x}", hasher.finish())
}

/// BTF of the kernel's, freed at the end.
struct KernelBtf(NonNull<libbpf_sys::btf>);

impl KernelBtf {
    fn load(id: u32) -> Option<Self> {
        // SAFETY: takes a number, returns a new object or NULL.
        let btf = unsafe { libbpf_sys::btf__load_from_kernel_by_id(id) };
        NonNull::new(btf).map(Self)
    }
}

impl Drop for KernelBtf {
    fn drop(&mut self) {
        // SAFETY: `load` got it for us alone.
        unsafe { libbpf_sys::btf__free(self.0.as_ptr()) };
    }
}

// include/uapi/linux/btf.h
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KINDS_THAT_REFER: [u32; 5] = [8, 9, 10, 11, 18]; // typedef, volatile, const, restrict, tag
const MAX_DEPTH: u32 = 16;

/// Of a type; `None` if there is no such type.
fn layout(btf: *const libbpf_sys::btf, id: u32) -> Option<Layout> {
    if id == 0 || btf.is_null() {
        return None;
    }
    // SAFETY: `btf` is valid; an unknown number gives a negative size.
    let size = unsafe { libbpf_sys::btf__resolve_size(btf, id) };
    let mut layout = Layout { size: usize::try_from(size).ok()?, fields: Vec::new() };
    collect(btf, id, String::new(), 0, 0, &mut layout.fields)?;
    Some(layout)
}

fn collect(
    btf: *const libbpf_sys::btf,
    id: u32,
    path: String,
    offset: usize,
    depth: u32,
    fields: &mut Vec<Field>,
) -> Option<()> {
    // SAFETY: `btf` is valid; NULL for a number that it does not have.
    let kind = unsafe { libbpf_sys::btf__type_by_id(btf, id).as_ref() }?;
    // SAFETY: as above.
    let size = usize::try_from(unsafe { libbpf_sys::btf__resolve_size(btf, id) }).ok()?;
    let behind = std::ptr::from_ref(kind).wrapping_add(1);
    match kind.info >> 24 & 0x1f {
        _ if depth > MAX_DEPTH => return None,
        KIND_STRUCT | KIND_UNION => {
            let count = (kind.info & 0xffff) as usize;
            // SAFETY: a structure's type is followed by so many members.
            let members = unsafe {
                std::slice::from_raw_parts(behind.cast::<libbpf_sys::btf_member>(), count)
            };
            for member in members {
                let name = text(btf, member.name_off);
                let path = if path.is_empty() { name } else { format!("{path}.{name}") };
                // There are no bit fields in what programs and user space share.
                let at = offset + (member.offset & 0x00ff_ffff) as usize / 8;
                collect(btf, member.type_, path, at, depth + 1, fields)?;
            }
        }
        KIND_ARRAY => {
            // SAFETY: an array's type is followed by what it is an array of.
            let array = unsafe { behind.cast::<libbpf_sys::btf_array>().read() };
            let count = array.nelems as usize;
            if count == 0 || size == count {
                fields.push(Field { path, offset, size }); // bytes
                return Some(());
            }
            for i in 0..count {
                let at = offset + i * (size / count);
                collect(btf, array.type_, format!("{path}[{i}]"), at, depth + 1, fields)?;
            }
        }
        refers if KINDS_THAT_REFER.contains(&refers) => {
            // SAFETY: of these kinds, the union holds a type's number.
            let to = unsafe { kind.__bindgen_anon_1.type_ };
            collect(btf, to, path, offset, depth + 1, fields)?;
        }
        _ => fields.push(Field { path, offset, size }),
    }
    Some(())
}

fn text(btf: *const libbpf_sys::btf, offset: u32) -> String {
    // SAFETY: `btf` is valid; NULL for an offset that it does not have.
    let name: *const c_char = unsafe { libbpf_sys::btf__name_by_offset(btf, offset) };
    if name.is_null() {
        return String::new();
    }
    // SAFETY: a terminated string that lives as long as `btf`.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, fields: &[(&str, usize, usize)]) -> Layout {
        let field = |(path, offset, size): &(&str, usize, usize)| Field {
            path: (*path).to_owned(),
            offset: *offset,
            size: *size,
        };
        Layout { size, fields: fields.iter().map(field).collect() }
    }

    #[test]
    fn fields_are_found_by_name_wherever_they_are() {
        let old = layout(8, &[("a", 0, 2), ("gone", 2, 2), ("b", 4, 4)]);
        let new = layout(16, &[("b", 0, 4), ("new", 4, 4), ("a", 8, 4)]);
        let converted = new.convert(&old, &[1, 2, 9, 9, 3, 4, 5, 6]);
        assert_eq!(converted, [3, 4, 5, 6, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]);
    }
}
