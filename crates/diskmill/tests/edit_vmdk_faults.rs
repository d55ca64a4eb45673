//! Guest writes into VMDKs where something is wrong: power failures, damage, and extents of all kinds in one disk.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code"
)]

use std::fs;
use std::sync::Arc;

use diskmill::edit::ZeroHow;
use diskmill::{Allow, Image, ImageFile, Kind, OpenOptions, OpenPolicy};
use diskmill_io::{FaultyStorage, MemoryStorage, Moment, SharedStorage, Storage};
use diskmill_testkit::content::disk;
use diskmill_testkit::{Op, Oracle, Step, legalise, same, scratch, steps};

const GRAIN: u64 = 64 << 10;

fn options(writable: bool) -> OpenOptions {
    let policy = OpenPolicy { allow: Allow::OwnTree, paths: Vec::new() };
    OpenOptions { policy, writable, ..OpenOptions::default() }
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn act(image: &Image, step: &Step) {
    match step.op {
        Op::Write(_) | Op::Compressed(_) => image.write_at(&step.bytes(), step.start),
        Op::Zero { unmap: false } => image.write_zeroes(step.start, step.len, ZeroHow::KeepAllocated),
        Op::Zero { unmap: true } => image.write_zeroes(step.start, step.len, ZeroHow::MayUnmap),
        Op::Discard => image.discard(step.start, step.len),
    }
    .unwrap();
}

fn model(bytes: &mut [u8], step: &Step) {
    let range = step.start as usize..(step.start + step.len) as usize;
    if step.op != Op::Discard {
        bytes[range].copy_from_slice(&step.bytes());
    }
}

/// Steps that mean the same to every VMDK: what a discarded grain reads as depends on what is below.
fn plain(mut steps: Vec<Step>, size: u64) -> Vec<Step> {
    steps.retain(|step| step.op != Op::Discard);
    for step in &mut steps {
        if let Op::Compressed(pattern) = step.op {
            step.op = Op::Write(pattern);
        }
    }
    legalise(&mut steps, size, GRAIN);
    steps
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Sparse, flat and missing extents, at borders that are no grain's.
#[test]
fn a_write_runs_over_extents_of_all_kinds() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let sectors = [300u64, 201, 100, 77];
    let sparse = ["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"];
    for (name, sectors) in [("one", sectors[0]), ("two", sectors[3])] {
        q.img(sparse).args([format!("{name}.vmdk"), (sectors * 512).to_string()]).ok();
    }
    fs::write(dir.join("flat"), vec![9; 1024 + 201 * 512]).unwrap();
    let text = "# Disk DescriptorFile\nversion=1\nCID=11112222\nparentCID=ffffffff\ncreateType=\"custom\"\n\
                RW 300 SPARSE \"one-s001.vmdk\"\nRW 201 FLAT \"flat\" 2\nRW 100 ZERO\nRW 77 SPARSE \"two-s001.vmdk\"\n";
    fs::write(dir.join("all.vmdk"), text).unwrap();
    let image = Image::open(dir.join("all.vmdk"), &options(true)).unwrap();
    let mut want = vec![0; sectors.iter().sum::<u64>() as usize * 512];
    want[300 * 512..501 * 512].fill(9);
    same(&content(&image), &want, "before");
    let bytes = disk(3, 60_000);
    image.write_at(&bytes, 130_000).unwrap();
    want[130_000..190_000].copy_from_slice(&bytes);
    // What has no file can only be zeros.
    let last = 601 * 512 - 700;
    assert_eq!(image.write_at(&bytes[..600], last as u64).unwrap_err().kind(), Kind::Unsupported);
    image.write_zeroes(501 * 512 - 1000, 100 * 512 + 3000, ZeroHow::MayUnmap).unwrap();
    want[501 * 512 - 1000..501 * 512].fill(0);
    image.write_at(&bytes[..2000], 601 * 512).unwrap();
    want[601 * 512..][..2000].copy_from_slice(&bytes[..2000]);
    // All whole grains, and what is flat.
    image.discard(0, want.len() as u64).unwrap();
    want[300 * 512..501 * 512].fill(0);
    want[..131_072].fill(0);
    let end = 300 * 512;
    want[131_072..end].fill(0);
    want[601 * 512..].fill(0);
    same(&content(&image), &want, "after");
    image.close().unwrap();
    same(&fs::read(dir.join("flat")).unwrap()[..1024], &[9; 1024], "what is before the extent");
}

#[test]
fn changes_that_somebody_tracks_are_refused() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    q.img(["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "flat.vmdk", "1M"]).ok();
    let path = dir.path().join("flat.vmdk");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}\nchangeTrackPath=\"x-ctk.vmdk\"\n")).unwrap();
    let error = Image::open(&path, &options(true)).err().unwrap();
    assert!(error.kind() == Kind::Unsupported && error.to_string().contains("change tracking"), "{error}");
    Image::open(&path, &options(false)).unwrap();
}

/// An entry that points into the header or the tables must not let the guest write there.
#[test]
fn a_grain_among_the_metadata_is_not_written_to() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    q.img(["create", "-q", "-f", "vmdk", "a.vmdk", "1M"]).ok();
    let mut bytes = fs::read(dir.join("a.vmdk")).unwrap();
    let directory = u64_at(&bytes, 56) as usize * 512;
    let table = u32::from_le_bytes(bytes[directory..directory + 4].try_into().unwrap()) as usize * 512;
    bytes[table..table + 4].copy_from_slice(&1u32.to_le_bytes());
    fs::write(dir.join("a.vmdk"), &bytes).unwrap();
    let image = Image::open(dir.join("a.vmdk"), &options(true)).unwrap();
    for done in
        [image.write_at(&[1; 512], 0), image.write_zeroes(0, 512, ZeroHow::MayUnmap), image.discard(0, GRAIN)]
    {
        assert_eq!(done.unwrap_err().kind(), Kind::Corrupt);
    }
    drop(image);
    let now = fs::read(dir.join("a.vmdk")).unwrap();
    // The descriptor's CID was to change first.
    same(&now[table..], &bytes[table..], "the tables");
    // A header that says that grains may stand anywhere.
    bytes[64..72].fill(0);
    fs::write(dir.join("a.vmdk"), &bytes).unwrap();
    let error = Image::open(dir.join("a.vmdk"), &options(true)).err().unwrap();
    assert!(error.kind() == Kind::Unsupported && error.to_string().contains("among its grains"), "{error}");
}

fn memory(bytes: &[u8]) -> SharedStorage {
    let storage = MemoryStorage::new(64 << 20);
    storage.write_at(bytes, 0).unwrap();
    Arc::new(storage)
}

fn open_memory(files: &[(&str, &SharedStorage)], writable: bool) -> Result<Image, diskmill::Error> {
    let files: Vec<ImageFile> = files
        .iter()
        .map(|(path, storage)| ImageFile { storage: Arc::clone(storage), path: path.into() })
        .collect();
    Image::from_storages(&files, &options(writable))
}

/// At each moment and with each part of what was written since the last barrier, what was flushed is there, and the rest is
/// old or new.
#[test]
fn power_failures_lose_nothing_that_was_flushed() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let size = 700 << 10;
    let mut states = 0;
    for (seed, form) in
        ["subformat=monolithicSparse", "subformat=monolithicSparse,zeroed_grain=on"].iter().enumerate()
    {
        for backed in [false, true] {
            let name = format!("{seed}{backed}.vmdk");
            fs::write(dir.join("base.raw"), disk(7, size)).unwrap();
            q.img(["convert", "-f", "raw", "-O", "vmdk", "base.raw", "base.vmdk"]).ok();
            let parent: &[&str] = if backed { &["-b", "base.vmdk", "-F", "vmdk"] } else { &[] };
            let rest = if backed { String::new() } else { size.to_string() };
            let create = q.img(["create", "-q", "-f", "vmdk", "-o", form]).args(parent).arg(&name);
            if rest.is_empty() {
                create.ok()
            } else {
                create.arg(rest).ok()
            };
            let base = memory(&fs::read(dir.join("base.vmdk")).unwrap());
            states += crash(&fs::read(dir.join(&name)).unwrap(), &base, seed as u64);
        }
    }
    println!("{states} states after power failures");
    assert!(states > 300);
}

fn crash(start: &[u8], base: &SharedStorage, seed: u64) -> usize {
    let faulty = Arc::new(FaultyStorage::new(memory(start)));
    let storage: SharedStorage = Arc::<FaultyStorage>::clone(&faulty);
    let image = open_memory(&[("a.vmdk", &storage), ("base.vmdk", base)], true).unwrap();
    let mut flushed = content(&image);
    faulty.start_journal().unwrap();
    let size = image.size();
    let mut states = 0;
    let all = plain(steps(seed + 40, size, GRAIN, 30, false), size);
    for round in all.chunks(3) {
        let mut current = flushed.clone();
        let mut allowed = vec![current.clone()];
        for step in round {
            act(&image, step);
            model(&mut current, step);
            allowed.push(current.clone());
        }
        let before = faulty.moment();
        image.flush().unwrap();
        // Before the first barrier of the flush, between both, and at its end.
        let between = Moment { barriers: before.barriers + 1, changes: 0 };
        for moment in [before, all_of(&faulty, between), faulty.moment()] {
            for state in faulty.crash_states_at(moment, seed, 25) {
                let state = memory(&state.to_vec());
                let left = open_memory(&[("a.vmdk", &state), ("base.vmdk", base)], false).unwrap();
                assert!(says_unclean(&left), "{moment:?}");
                let seen = content(&left);
                for (at, sector) in seen.chunks(512).enumerate() {
                    let old = |old: &Vec<u8>| old[at * 512..][..sector.len()] == *sector;
                    // Writes to a part of it may arrive in any order.
                    let byte = |(i, byte): (usize, &u8)| allowed.iter().any(|old| old[at * 512 + i] == *byte);
                    let known = allowed.iter().any(old) || sector.iter().enumerate().all(byte);
                    assert!(known, "sector {at}, {moment:?}, {round:?}");
                }
                states += 1;
            }
        }
        flushed = current;
    }
    image.close().unwrap();
    let closed = open_memory(&[("a.vmdk", &storage), ("base.vmdk", base)], false).unwrap();
    assert!(!says_unclean(&closed));
    states
}

fn says_unclean(image: &Image) -> bool {
    image.warnings().iter().any(|warning| warning.contains("not closed cleanly"))
}

/// What another writer did not finish is not known, so its mark stays.
#[test]
fn the_mark_of_another_writer_stays() {
    let dir = scratch();
    let path = dir.path().join("a.vmdk");
    let Some(q) = Oracle::find(dir.path()) else { return };
    q.img(["create", "-q", "-f", "vmdk", "a.vmdk", "1M"]).ok();
    for unclean in [0, 1] {
        let mut bytes = fs::read(&path).unwrap();
        bytes[72] = unclean;
        fs::write(&path, bytes).unwrap();
        let image = Image::open(&path, &options(true)).unwrap();
        image.write_at(&[7; 512], 0).unwrap();
        assert_eq!(fs::read(&path).unwrap()[72], 1);
        image.close().unwrap();
        assert_eq!(fs::read(&path).unwrap()[72], unclean);
    }
}

/// The end of the epoch that `moment` is in, which has few changes.
fn all_of(faulty: &FaultyStorage, moment: Moment) -> Moment {
    let moments = (0..64).rev().map(|changes| Moment { changes, ..moment });
    moments.into_iter().find(|&at| faulty.crash_states_at(at, 0, 1).count() > 0).unwrap_or(moment)
}
