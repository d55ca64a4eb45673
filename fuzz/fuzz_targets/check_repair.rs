//! Any bytes as a qcow2 image: checked, then repaired in a copy. A check changes nothing; what a repair says of the image
//! is what the next check says; and what the guest could read it still reads.
#![no_main]

use std::collections::BTreeSet;
use std::sync::Arc;

use diskmill::check::{CheckOptions, Repair, Report, check_storage};
use diskmill::qcow2::HeaderArea;
use diskmill::{Format, FormatInfo, Image, Limits, OpenOptions, Source};
use diskmill_io::{MemoryStorage, Storage};
use libfuzzer_sys::fuzz_target;

/// Bytes to which a repair may grow the image: refcount structures of new places.
const ROOM: u64 = 16 << 20;
/// Extents that are read, and bytes of each.
const EXTENTS: usize = 64;
const BYTES: u64 = 16 << 10;

fuzz_target!(|data: &[u8]| {
    let file = storage(data);
    let found = check(&file, Repair::Nothing);
    assert!(bytes(&file) == data, "a check wrote");
    let guest = guest(data);
    for repair in [Repair::Leaks, Repair::All] {
        let file = storage(data);
        let Some(repaired) = check(&file, repair) else { continue };
        // -r all reads a damaged snapshot table that a check refuses.
        let Some(found) = &found else {
            assert!(repair == Repair::All, "a repair could do what the check could not");
            continue;
        };
        let left = check(&file, Repair::Nothing).expect("a repaired image can be checked");
        let counts = |report: &Report| (report.corruptions, report.leaks, report.check_errors);
        assert_eq!(counts(&repaired), counts(&left), "{repair:?}: before: {found:?}");
        assert!(left.check_errors <= found.check_errors, "{found:?} became {left:?}");
        for (at, seen) in &guest {
            let image = open(bytes(&file)).expect("a repaired image opens");
            let mut now = vec![0xa5; seen.len()];
            image.read_at(&mut now, *at).expect("what could be read before");
            assert!(now == *seen, "{repair:?} changed what the guest reads at {at}");
        }
    }
});

fn storage(data: &[u8]) -> MemoryStorage {
    MemoryStorage::with_bytes(data.to_vec(), ROOM)
}

fn bytes(file: &MemoryStorage) -> Vec<u8> {
    file.to_vec()
}

fn check(file: &dyn Storage, repair: Repair) -> Option<Report> {
    let mut limits = Limits::default();
    limits.check_bytes = 32 << 20;
    let options = CheckOptions { repair, limits, ..CheckOptions::default() };
    match check_storage(file, &options, &mut |_, finding| assert!(!finding.to_string().is_empty())) {
        Ok(report) => Some(report),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

fn open(data: Vec<u8>) -> Option<Image> {
    let options = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
    Image::from_storage(Arc::new(MemoryStorage::with_bytes(data, 0)), "fuzz", &options).ok()
}

/// What the guest reads, where that does not lie in a table of the image, which a repair may write.
fn guest(data: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut seen = Vec::new();
    let Some(image) = open(data.to_vec()) else { return seen };
    let FormatInfo::Qcow2(info) = &image.info().specific else { return seen };
    // The tables of snapshots would have to be known too.
    let Some(tables) = tables(data, &info.area).filter(|_| info.snapshots.is_empty()) else { return seen };
    let cluster_bits = info.area.header.geometry.cluster_bits();
    let mut at = 0;
    for _ in 0..EXTENTS {
        if at >= image.size() {
            break;
        }
        let (len, host) = match image.map(at, image.size() - at) {
            Ok(extent) => {
                let len = extent.guest.end - at;
                let host = match extent.source {
                    Source::Zero => Some(0..0),
                    Source::Raw { at, .. } => Some(at.get()..at.get() + len.min(BYTES)),
                    Source::Packed { at, len, .. } => Some(at.get()..at.get() + u64::from(len)),
                };
                (len, host)
            }
            Err(error) => (error.len, None),
        };
        if let Some(host) = host {
            let apart = host.is_empty()
                || tables.range(host.start >> cluster_bits..=(host.end - 1) >> cluster_bits).next().is_none();
            let mut bytes = vec![0; len.min(BYTES) as usize];
            if apart && image.read_at(&mut bytes, at).is_ok() {
                seen.push((at, bytes));
            }
        }
        at += len;
    }
    seen
}

/// The clusters of the header and of all tables that the active state has; `None` if they cannot be told.
fn tables(data: &[u8], area: &HeaderArea) -> Option<BTreeSet<u64>> {
    let header = &area.header;
    let (bits, size) = (header.geometry.cluster_bits(), header.geometry.cluster_size());
    let mut clusters = BTreeSet::from([0]);
    let mut add = |at: u64, len: u64| {
        let end = at.saturating_add(len.max(1) - 1);
        // Nothing else is in the file.
        clusters.extend(at >> bits..=end.min(data.len() as u64) >> bits);
    };
    let roots = [
        (header.l1_offset.get(), u64::from(header.l1_size) * 8),
        (header.refcount_table_offset.get(), u64::from(header.refcount_table_clusters) * size),
    ];
    for (at, len) in roots {
        add(at, len);
        let start = usize::try_from(at).ok()?.min(data.len());
        let end = usize::try_from(at.checked_add(len)?).ok()?.min(data.len());
        for entry in data[start..end].as_chunks::<8>().0 {
            let host = u64::from_be_bytes(*entry) & 0x00ff_ffff_ffff_fe00;
            if host < data.len() as u64 {
                add(host, size);
            }
        }
    }
    Some(clusters)
}
