//! Failing disks: an error that says where, nothing under the final name, and salvage that goes on.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::sync::Arc;

use diskmill::convert::{ConvertOptions, Monitor, convert};
use diskmill::{Format, Image, Kind, OpenOptions};
use diskmill_io::{FaultyStorage, MemoryStorage, SharedStorage};

const LEN: usize = 8 << 20;
const BAD: std::ops::Range<u64> = 3_000_000..3_004_096;

fn bytes() -> Vec<u8> {
    (0..LEN).map(|at| (at % 251) as u8 + 1).collect()
}

fn failing_source() -> Image {
    let inner: SharedStorage = Arc::new(MemoryStorage::with_bytes(bytes(), LEN as u64));
    let faulty = FaultyStorage::new(inner);
    faulty.fail_reads(BAD);
    let options = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    Image::from_storage(Arc::new(faulty), "failing.raw", &options).unwrap()
}

#[test]
fn a_read_error_ends_the_conversion_and_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out.raw");
    std::fs::write(&target, b"old").unwrap();
    let error =
        convert(&[failing_source()], target.clone().into(), &ConvertOptions::default(), &Monitor::new())
            .expect_err("the source cannot be read");
    assert_eq!(error.kind(), Kind::Io);
    assert!(error.to_string().contains("failing.raw"), "{error}");
    assert_eq!(error.os_error().map(io::Error::raw_os_error), Some(Some(5)), "EIO: {error}");
    assert_eq!(std::fs::read(&target).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary is left");
}

#[test]
fn salvage_goes_on_and_tells_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out.raw");
    let options = ConvertOptions { salvage: true, ..ConvertOptions::default() };
    let done = convert(&[failing_source()], target.clone().into(), &options, &Monitor::new()).unwrap();
    let got = std::fs::read(&target).unwrap();
    let want = bytes();
    assert!(!done.bad_ranges.is_empty());
    let lost: u64 = done.bad_ranges.listed.iter().map(|range| range.len).sum();
    assert!(lost < 1 << 20, "{lost} bytes given up for one bad block of 4096");
    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
        let bad = done
            .bad_ranges
            .listed
            .iter()
            .any(|range| (range.start..range.start + range.len).contains(&(at as u64)));
        assert_eq!(*got, if bad { 0 } else { *want }, "at {at}");
    }
    assert!(BAD.clone().all(|at| {
        done.bad_ranges.listed.iter().any(|range| (range.start..range.start + range.len).contains(&at))
    }));
}

#[test]
fn a_cancelled_conversion_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let storage: SharedStorage = Arc::new(MemoryStorage::with_bytes(bytes(), LEN as u64));
    let image = Image::from_storage(storage, "a", &OpenOptions::default()).unwrap();
    let monitor = Monitor::new();
    monitor.cancel();
    let error = convert(&[image], dir.path().join("out").into(), &ConvertOptions::default(), &monitor)
        .expect_err("it was cancelled");
    assert_eq!(error.kind(), Kind::Cancelled);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
