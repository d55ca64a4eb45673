//! Any bytes as an image: opened as probed and as each format, then mapped and read.
#![no_main]

use std::sync::Arc;

use diskmill::{Extent, Format, Image, OpenOptions, Reader, SnapshotRef, Source};
use diskmill_io::MemoryStorage;
use libfuzzer_sys::fuzz_target;

/// Extents that are walked from each starting point.
const EXTENTS: usize = 64;
/// Bytes that are read in all, and of one extent.
const BYTES: u64 = 512 << 10;
const BYTES_AT_ONCE: u64 = 32 << 10;
/// The limit of VMDK grains; clusters are smaller.
const LARGEST_UNIT: u64 = 64 << 20;

fuzz_target!(|data: &[u8]| {
    for format in [None, Some(Format::Raw), Some(Format::Qcow2), Some(Format::Vmdk), Some(Format::Ova)] {
        let options = OpenOptions { format, ..OpenOptions::default() };
        let Some(image) = open(data, &options) else { continue };
        walk(&image, data);
        if format != Some(Format::Qcow2) {
            continue;
        }
        // Nothing asked for: the first one.
        let snapshot = Some(SnapshotRef::Exact { id: None, name: None });
        if let Some(image) = open(data, &OpenOptions { snapshot, ..options.clone() }) {
            walk(&image, data);
        }
    }
    // What `info` does.
    open(data, &OpenOptions { metadata_only: true, ..OpenOptions::default() });
});

fn open(data: &[u8], options: &OpenOptions) -> Option<Image> {
    let storage = Arc::new(MemoryStorage::with_bytes(data.to_vec(), 0));
    match Image::from_storage(storage, "fuzz", options) {
        Ok(image) => Some(image),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

fn walk(image: &Image, data: &[u8]) {
    let size = image.size();
    assert!(size <= i64::MAX as u64, "a disk of {size} bytes");
    assert_eq!(image.chain().len(), 1, "no other file may be opened");
    let mut reader = image.reader();
    let mut budget = BYTES;
    // The input chooses a third starting point.
    let chosen = data.last_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    for start in [0, size / 2, chosen.checked_rem(size).unwrap_or(0)] {
        let mut at = start;
        for _ in 0..EXTENTS {
            if at >= size {
                break;
            }
            at += match image.map(at, size - at) {
                Ok(extent) => {
                    check(image, &extent, at, data);
                    read(&mut reader, &extent, data, &mut budget);
                    extent.guest.end - at
                }
                Err(error) => {
                    assert!(error.len > 0 && !error.error.to_string().is_empty());
                    assert!(error.len <= size - at, "the damage ends past the disk");
                    let mut byte = [0];
                    assert!(reader.read_at(&mut byte, at).is_err(), "read at {at}, which cannot be mapped");
                    error.len
                }
            };
        }
    }
    assert!(image.map(size, 1).is_err());
    let mut past = [1; 16];
    assert!(reader.read_at(&mut past, size).is_ok() && past == [0; 16]);
}

fn check(image: &Image, extent: &Extent, at: u64, data: &[u8]) {
    let (start, end) = (extent.guest.start, extent.guest.end);
    assert_eq!(start, at);
    assert!(end > start && end <= image.size(), "{extent:?}");
    let len = end - start;
    match extent.source {
        Source::Zero => {}
        Source::Raw { at, .. } => {
            assert!(at.get().checked_add(len).is_some_and(|end| end <= data.len() as u64), "{extent:?}");
        }
        Source::Packed { at, len: packed, unit, skip, .. } => {
            assert!(
                u64::from(skip) + len <= u64::from(unit) && u64::from(unit) <= LARGEST_UNIT,
                "{extent:?}"
            );
            assert!(
                at.get().checked_add(u64::from(packed)).is_some_and(|end| end <= data.len() as u64),
                "{extent:?}"
            );
        }
    }
    // Any part of the run, asked for by itself, comes from the same place.
    for inside in [start, start + len / 2, end - 1] {
        let part = image.map(inside, 1).expect("a part of a run that was mapped");
        assert_eq!(part.guest, inside..inside + 1);
        let past = inside - start;
        let expected = match extent.source {
            Source::Zero => Source::Zero,
            Source::Raw { file, at } => {
                Source::Raw { file, at: at.checked_add(past).expect("within the file") }
            }
            Source::Packed { file, at, len, unit, skip, codec } => {
                Source::Packed { file, at, len, unit, skip: skip + past as u32, codec }
            }
        };
        assert_eq!(part.source, expected);
        assert_eq!((part.depth, part.present), (extent.depth, extent.present));
    }
}

fn read(reader: &mut Reader, extent: &Extent, data: &[u8], budget: &mut u64) {
    let len = (extent.guest.end - extent.guest.start).min(BYTES_AT_ONCE);
    let Some(left) = budget.checked_sub(len) else { return };
    *budget = left;
    let len = len as usize;
    // Holds neither zeros nor, by chance, what is there.
    let mut bytes = vec![0xa5; len];
    match (reader.read_at(&mut bytes, extent.guest.start), extent.source) {
        (Ok(()), Source::Zero) => {
            assert!(bytes.iter().all(|&byte| byte == 0), "mapped as zeros, read as data")
        }
        (Ok(()), Source::Raw { at, .. }) => {
            assert!(bytes == data[at.get() as usize..][..len], "read from elsewhere")
        }
        (Ok(()), Source::Packed { .. }) => {
            // In two pieces, the second first: the unit that the reader keeps must not matter.
            let half = len / 2;
            let mut pieces = vec![0x5a; len];
            let (front, back) = pieces.split_at_mut(half);
            assert!(reader.read_at(back, extent.guest.start + half as u64).is_ok());
            assert!(reader.read_at(front, extent.guest.start).is_ok());
            assert!(pieces == bytes, "two reads differ from one");
        }
        (Err(error), Source::Packed { .. }) => assert!(!error.to_string().is_empty()),
        (Err(error), source) => panic!("{source:?} is mapped but cannot be read: {error}"),
    }
}
