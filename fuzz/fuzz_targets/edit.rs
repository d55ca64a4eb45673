//! Any bytes as an image that is written to and changed: the last bytes of the input choose what is done. Nothing panics,
//! hangs or grows past its room; a clean qcow2 stays clean, whatever fails, and its guest reads what a plain disk would.
#![no_main]

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use diskmill::check::{CheckOptions, Report, check_storage};
use diskmill::edit::{Amendment, Preallocation, ZeroHow};
use diskmill::qcow2::Compat;
use diskmill::{Format, FormatInfo, Image, OpenOptions, SnapshotRef};
use diskmill_io::MemoryStorage;
use libfuzzer_sys::fuzz_target;

/// Bytes to which the image may grow.
const ROOM: u64 = 16 << 20;
/// Guest bytes that are compared, and near which everything happens.
const WINDOW: u64 = 256 << 10;
/// What is done to the image.
const STEPS: usize = 10;
/// Bytes of the input that choose one step.
const STEP: usize = 6;

fuzz_target!(|data: &[u8]| {
    let Some(tail) = data.len().checked_sub(STEPS * STEP) else { return };
    let steps = data[tail..].as_chunks::<STEP>().0;
    for format in [Format::Qcow2, Format::Vmdk, Format::Raw] {
        edit(data, format, steps);
    }
});

fn edit(data: &[u8], format: Format, steps: &[[u8; STEP]]) {
    let storage = Arc::new(MemoryStorage::with_bytes(data.to_vec(), ROOM));
    let before = (format == Format::Qcow2).then(|| check(&storage)).flatten();
    // What a damaged image makes of a change is nobody's promise.
    let clean = before.filter(|report| report.corruptions == 0 && report.check_errors == 0);
    let mut disk = if format == Format::Raw || clean.is_some() { Disk::read(&storage, format) } else { None };
    let Some(mut image) = open(&storage, format, true) else { return };
    let mut failed = false;
    for step in steps {
        if step[0] % 16 == 15 {
            failed |= image.close().is_err();
            match open(&storage, format, true) {
                Some(again) => image = again,
                None => {
                    assert!(clean.is_none(), "an image that was clean does not open again");
                    return;
                }
            }
            continue;
        }
        let mut ignored = Disk::default();
        match carry_out(&mut image, step, disk.as_mut().unwrap_or(&mut ignored)) {
            Ok(()) => {}
            Err(error) => {
                assert!(!error.to_string().is_empty());
                failed = true;
                // What failed half-way left its range undefined.
                disk = None;
            }
        }
        if let Some(disk) = &mut disk {
            disk.compare(&image);
        }
    }
    failed |= image.close().is_err();
    if let Some(before) = &clean {
        let after = check(&storage).expect("a clean image can be checked after it was changed");
        assert!(after.corruptions == 0 && after.check_errors == 0, "{before:?} became {after:?}");
        // Refcounts of clusters behind the end of the file count once it is that long.
        let leaks = || {
            let mut longer = data.to_vec();
            longer.resize(storage.to_vec().len().max(data.len()), 0);
            check(&MemoryStorage::with_bytes(longer, 0)).map(|report| report.leaks)
        };
        assert!(
            failed || after.leaks <= before.leaks || Some(after.leaks) <= leaks(),
            "{before:?} became {after:?}"
        );
    }
    if let Some(mut disk) = disk.filter(|_| !failed) {
        disk.compare(&open(&storage, format, false).expect("what was closed opens"));
    }
}

fn check(storage: &MemoryStorage) -> Option<Report> {
    let mut options = CheckOptions::default();
    options.limits.check_bytes = 32 << 20;
    check_storage(storage, &options, &mut |_, _| ()).ok()
}

fn open(storage: &Arc<MemoryStorage>, format: Format, writable: bool) -> Option<Image> {
    let options = OpenOptions { format: Some(format), writable, ..OpenOptions::default() };
    let storage: Arc<MemoryStorage> = Arc::clone(storage);
    Image::from_storage(storage, "fuzz", &options).ok()
}

/// The start of a disk as it should be.
#[derive(Clone, Default)]
struct Disk {
    bytes: Vec<u8>,
    /// Bytes that may also have become zeros: they were discarded.
    discarded: Option<Range<usize>>,
    /// The snapshots that were taken, by their ids.
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Disk {
    /// As the image is now; `None` if not all of it can be read, or there are snapshots of other disks.
    fn read(storage: &Arc<MemoryStorage>, format: Format) -> Option<Self> {
        let image = open(storage, format, false).filter(|image| image.snapshots().is_empty())?;
        let mut bytes = vec![0xa5; image.size().min(WINDOW) as usize];
        image.read_at(&mut bytes, 0).ok()?;
        Some(Self { bytes, ..Self::default() })
    }

    /// What of `len` bytes at `at` is in the window.
    fn range(&self, at: u64, len: u64) -> Range<usize> {
        let all = self.bytes.len() as u64;
        at.min(all) as usize..(at + len).min(all) as usize
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let range = self.range(at, bytes.len() as u64);
        let len = range.len();
        self.bytes[range].copy_from_slice(&bytes[..len]);
    }

    /// Compares, and takes notice of what became of discarded bytes.
    fn compare(&mut self, image: &Image) {
        assert_eq!(self.bytes.len() as u64, image.size().min(WINDOW));
        let mut now = vec![0xa5; self.bytes.len()];
        image.read_at(&mut now, 0).expect("what could be read before");
        if let Some(range) = self.discarded.take() {
            for (was, now) in self.bytes[range.clone()].iter_mut().zip(&now[range]) {
                if *now == 0 {
                    *was = 0;
                }
            }
        }
        if let Some(at) = self.bytes.iter().zip(&now).position(|(was, now)| was != now) {
            panic!("{:#04x} at {at} reads as {:#04x}", self.bytes[at], now[at]);
        }
    }
}

/// One step, and the same on the plain disk.
fn carry_out(image: &mut Image, step: &[u8; STEP], disk: &mut Disk) -> Result<(), diskmill::Error> {
    let [kind, x, y, z, u, v] = *step;
    let window = image.size().min(WINDOW);
    let at = u64::from(u32::from_le_bytes([x, y, z, 0])) % window.max(1);
    let len = (u64::from(u16::from_le_bytes([u, v])) * if z & 1 == 0 { 1 } else { 16 }).min(window - at);
    match kind % 16 {
        0..=3 => {
            let bytes: Vec<u8> = (0..len).map(|n| (n as u8).wrapping_mul(x | 1).wrapping_add(v)).collect();
            image.write_at(&bytes, at)?;
            disk.put(at, &bytes);
        }
        4 => {
            let unit = cluster(image).min(WINDOW);
            let (at, len) = (at - at % unit, unit.min(image.size() - (at - at % unit)));
            let bytes = vec![v; len as usize];
            image.write_compressed(&bytes, at)?;
            disk.put(at, &bytes);
        }
        5 | 6 => {
            let how = if kind & 16 == 0 { ZeroHow::KeepAllocated } else { ZeroHow::MayUnmap };
            image.write_zeroes(at, len, how)?;
            let range = disk.range(at, len);
            disk.bytes[range].fill(0);
        }
        7 => {
            image.discard(at, len)?;
            disk.discarded = Some(disk.range(at, len));
        }
        8 => {
            let change = i64::from(i16::from_le_bytes([u, v])) * 512;
            let size = image.size().saturating_add_signed(change) & !511;
            let grows = size > image.size();
            image.resize(size, if grows { preallocation(y) } else { Preallocation::Off })?;
            disk.bytes.resize(size.min(WINDOW) as usize, 0);
        }
        9 => {
            let id = image.create_snapshot("s", SystemTime::UNIX_EPOCH + Duration::from_secs(u.into()))?;
            disk.snapshots.push((id, disk.bytes.clone()));
        }
        10 | 11 => {
            let all = image.snapshots();
            let chosen = all.get(usize::from(u) % all.len().max(1)).map(|snapshot| snapshot.id.clone());
            let id = String::from_utf8_lossy(&chosen.unwrap_or_default()).into_owned();
            let wanted = SnapshotRef::Exact { id: Some(id.clone()), name: None };
            let known = disk.snapshots.iter().position(|(known, _)| *known == id);
            if kind % 16 == 10 {
                image.delete_snapshot(&wanted)?;
                known.map(|index| disk.snapshots.remove(index));
            } else {
                image.apply_snapshot(&wanted)?;
                disk.bytes = known.map(|index| disk.snapshots[index].1.clone()).unwrap_or_default();
            }
        }
        12 => image.amend(&amendment(u, v))?,
        13 => {
            let name = if u & 1 == 0 { "a" } else { "b" };
            match v % 4 {
                0 => image.add_bitmap(name, None, u & 2 == 0)?,
                1 => image.remove_bitmap(name)?,
                2 => image.clear_bitmap(name)?,
                _ => image.enable_bitmap(name, u & 2 == 0)?,
            }
        }
        _ => image.flush()?,
    }
    Ok(())
}

fn cluster(image: &Image) -> u64 {
    match &image.info().specific {
        FormatInfo::Qcow2(info) => info.area.header.geometry.cluster_size(),
        _ => 65_536,
    }
}

fn preallocation(code: u8) -> Preallocation {
    match code % 8 {
        0 => Preallocation::Metadata,
        1 => Preallocation::Falloc,
        2 => Preallocation::Full,
        _ => Preallocation::Off,
    }
}

fn amendment(what: u8, value: u8) -> Amendment {
    let mut amendment = Amendment::default();
    match what % 4 {
        0 => amendment.compat = Some(if value & 1 == 0 { Compat::V2 } else { Compat::V3 }),
        1 => amendment.refcount_bits = Some(1 << (value % 8)),
        2 => amendment.lazy_refcounts = Some(value & 1 == 0),
        _ => amendment.data_file_raw = Some(value & 1 == 0),
    }
    amendment
}
