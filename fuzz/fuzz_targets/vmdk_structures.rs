//! The binary structures of VMDK: sparse, COWD and seSparse headers, entries, footers, and the layouts that we write.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use diskmill_format::vmdk::{
    AdapterType, Chs, CowdHeader, SeSparseHeader, SeSparseVolatileHeader, SparseGeometry, SparseHeader,
    SparseLayout, geometry, marker, probe, sesparse, sparse,
};
use diskmill_format::{FormatError, Limits};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let limits = Limits::default();
    let _ = probe(data);
    // The places that are looked up come from the end, so that a seed that is a file stays one.
    let tail = &data[data.len().saturating_sub(64)..];
    let mut input = Unstructured::new(tail);
    let places: [u64; 6] = Arbitrary::arbitrary(&mut input).unwrap_or_default();

    if let Some(header) = read(SparseHeader::parse(data)) {
        assert_eq!(SparseHeader::parse(&header.encode()).as_ref(), Ok(&header));
        let _ = (header.doubts(), read(header.redundant_directory()));
        if let Some(Some((at, len))) = read(header.descriptor(&limits)) {
            assert!(len <= limits.vmdk_descriptor_bytes && at % 512 == 0 && len % 512 == 0);
        }
        geometry(read(header.geometry(&limits)), &limits, &places);
    }
    if let Some(header) = read(CowdHeader::parse(data)) {
        assert_eq!(CowdHeader::parse(&header.encode()).as_ref(), Ok(&header));
        let _ = read(header.directory_offset());
        geometry(read(header.geometry(&limits)), &limits, &places);
    }
    if let Some(header) = read(SeSparseHeader::parse(data)) {
        assert_eq!(SeSparseHeader::parse(&header.encode()).as_ref(), Ok(&header));
        geometry(read(header.geometry(&limits)), &limits, &places);
        let entries =
            places.into_iter().chain(sesparse::table_entries(data.get(512..).unwrap_or_default()).take(64));
        for entry in entries {
            if let Some(Some(at)) = read(header.table_offset(entry)) {
                assert!(at % 512 == 0 && at <= i64::MAX as u64);
            }
            if let Some(sesparse::SeGrain::Allocated(at)) = read(header.grain(entry)) {
                assert!(at % 512 == 0 && at <= i64::MAX as u64);
            }
        }
    }
    if let Some(header) = read(SeSparseVolatileHeader::parse(data)) {
        assert_eq!(SeSparseVolatileHeader::parse(&header.encode()), Ok(header));
    }
    if let Some(footer) = read(marker::find_footer(data)) {
        assert!(!footer.header.directory_in_footer());
        assert!(footer.position % 512 == 0 && footer.position + 512 <= data.len());
    }

    layout(&places, &limits);
    let entries: Vec<u32> = sparse::table_entries(data).collect();
    let encoded = sparse::encode_table(&entries);
    assert!(encoded.len() % 512 == 0 && encoded.starts_with(&data[..entries.len() * 4]));
});

fn read<T>(result: Result<T, FormatError>) -> Option<T> {
    if let Err(error) = &result {
        assert!(!error.to_string().is_empty());
    }
    result.ok()
}

fn geometry(found: Option<SparseGeometry>, limits: &Limits, places: &[u64]) {
    let Some(it) = found else { return };
    assert!(it.grain_bytes > 0 && it.grain_bytes <= limits.vmdk_grain_bytes);
    assert!(it.tables <= limits.vmdk_directory_entries);
    assert!(it.table_bytes % 512 == 0 && it.directory_bytes % 512 == 0);
    assert!(it.table_bytes >= it.table_entries * 4 && it.directory_bytes >= it.tables * 4);
    let last = it.capacity_bytes.wrapping_sub(1);
    for at in
        places.iter().flat_map(|&at| [at, at.checked_rem(it.capacity_bytes).unwrap_or(0)]).chain([0, last])
    {
        let Some((table, entry, within)) = it.locate(at) else {
            assert!(at >= it.capacity_bytes);
            continue;
        };
        assert!(table < it.tables && entry < it.table_entries && within < it.grain_bytes);
        assert_eq!(table * it.table_coverage + entry * it.grain_bytes + within, at);
        let grain = at / it.grain_bytes;
        assert!(within < it.grain_len(grain), "a byte of the disk lies in no grain");
    }
    assert_eq!(it.grain_len(it.capacity_bytes.div_ceil(it.grain_bytes)), 0);
}

/// A fresh extent: nothing overlaps, and the directories point at the tables.
fn layout(places: &[u64; 6], limits: &Limits) {
    let [capacity, shift, descriptor, ..] = *places;
    let capacity = capacity >> (shift % 64);
    let descriptor = descriptor % 64;
    let chs = Chs::of(capacity, &AdapterType::LsiLogic);
    assert!(chs.cylinders > 0 && chs.heads > 0);
    if capacity < 1 << 40 {
        assert_eq!(geometry::split(capacity).sum::<u64>(), capacity);
        assert!(geometry::split(capacity).all(|part| part > 0 && part <= geometry::SPLIT_SECTORS));
    }
    let Ok(it) = SparseLayout::new(capacity, descriptor, shift & 64 != 0, limits) else { return };
    assert_eq!(SparseHeader::parse(&it.header.encode()).as_ref(), Ok(&it.header));
    let sectors = |bytes: u64| bytes / 512;
    let (directory, tables) =
        (sectors(it.geometry.directory_bytes), sectors(it.geometry.table_bytes) * it.geometry.tables);
    let areas = [
        (0, 1),
        (it.header.descriptor_offset, it.header.descriptor_sectors),
        (it.header.rgd_offset, directory),
        (u64::from(it.redundant_tables), tables),
        (it.header.gd_offset, directory),
        (u64::from(it.tables), tables),
        (it.header.overhead, 0),
    ];
    let mut end = 0;
    for (at, len) in areas.into_iter().filter(|&(at, len)| len > 0 || at == it.header.overhead) {
        assert!(at >= end, "{areas:?} overlap");
        end = at + len;
    }
    assert_eq!(it.header.overhead % it.header.grain_sectors, 0);
    let bytes = it.directory(it.tables);
    assert_eq!(bytes.len() as u64, it.geometry.directory_bytes);
    let last =
        (it.geometry.tables as usize).checked_sub(1).and_then(|last| sparse::table_entries(&bytes).nth(last));
    let expected = u64::from(it.tables) + tables - sectors(it.geometry.table_bytes).min(tables);
    assert!(last.is_none_or(|last| u64::from(last) == expected));
}
