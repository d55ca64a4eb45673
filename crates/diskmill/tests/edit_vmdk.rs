//! Random writes by us and by qemu-io in turn on one VMDK, against a plain disk in memory.
//!
//! `PROPTEST_CASES` sets the number of cases (default 32 here); a failure prints the smallest case.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;
use std::sync::Arc;

use diskmill::check::{CheckOptions, check};
use diskmill::edit::ZeroHow;
use diskmill::{Allow, Image, Kind, OpenOptions, OpenPolicy};
use diskmill_io::{FaultyStorage, MemoryStorage};
use diskmill_testkit::content::{Pattern, fill};
use diskmill_testkit::{
    ModelDisk, Op, Oracle, Step, legalise, ops, proptest_config, same, scratch, steps, unpack,
};
use proptest::prelude::*;

const GRAIN: u64 = 64 << 10;

fn options() -> OpenOptions {
    let policy = OpenPolicy { allow: Allow::OwnTree, paths: Vec::new() };
    OpenOptions { policy, writable: true, ..OpenOptions::default() }
}

fn reading() -> OpenOptions {
    OpenOptions { writable: false, ..options() }
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What a discard leaves is left to the format: zeros are asked for instead.
fn plain(mut steps: Vec<Step>, size: u64) -> Vec<Step> {
    unpack(&mut steps);
    for step in &mut steps {
        if step.op == Op::Discard {
            step.op = Op::Zero { unmap: true };
        }
    }
    legalise(&mut steps, size, GRAIN);
    steps
}

fn we_write(path: &Path, steps: &[Step], model: &mut ModelDisk) {
    let image = Image::open(path, &options()).unwrap();
    for step in steps {
        match step.op {
            Op::Zero { unmap } => {
                let how = if unmap { ZeroHow::MayUnmap } else { ZeroHow::KeepAllocated };
                image.write_zeroes(step.start, step.len, how).unwrap();
            }
            _ => image.write_at(&step.bytes(), step.start).unwrap(),
        }
        model.apply(step);
        let mut got = vec![0; usize::try_from(step.len).unwrap()];
        image.read_at(&mut got, step.start).unwrap();
        let start = usize::try_from(step.start).unwrap();
        same(&got, &model.bytes()[start..start + got.len()], "what was just written");
    }
    same(&content(&image), model.bytes(), "before it is closed");
    image.close().unwrap();
}

#[derive(Clone, Debug)]
struct Disk {
    options: &'static str,
    backed: bool,
    size: u64,
}

fn disk() -> impl Strategy<Value = Disk> {
    let options = prop_oneof![
        Just("subformat=monolithicSparse"),
        Just("subformat=monolithicSparse,zeroed_grain=on"),
        Just("subformat=twoGbMaxExtentSparse"),
        Just("subformat=monolithicFlat"),
        Just("subformat=twoGbMaxExtentFlat"),
    ];
    (options, any::<bool>(), 1..=6000u64).prop_map(|(options, backed, sectors)| Disk {
        options,
        backed: backed && options.contains("monolithicSparse"),
        size: sectors * 512,
    })
}

type Case = (Disk, Vec<Step>, Vec<(bool, Vec<Step>)>);

fn case() -> impl Strategy<Value = Case> {
    disk().prop_flat_map(|disk| {
        let size = disk.size;
        let rounds = proptest::collection::vec((any::<bool>(), ops(size, GRAIN, 1..12)), 1..6);
        (Just(disk), ops(size, GRAIN, 1..8), rounds)
    })
}

fn run((disk, base, rounds): Case) {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let mut model = ModelDisk::new(disk.size, GRAIN);
    let size = disk.size.to_string();
    let create = ["create", "-q", "-f", "vmdk", "-o", disk.options];
    if disk.backed {
        q.img(["create", "-q", "-f", "vmdk", "base.vmdk", &size]).ok();
        we_write(&dir.join("base.vmdk"), &plain(base, disk.size), &mut model);
        q.img(create.iter().copied().chain(["-b", "base.vmdk", "-F", "vmdk", "a.vmdk"])).ok();
    } else {
        q.img(create.iter().copied().chain(["a.vmdk", &size])).ok();
    }
    let path = dir.join("a.vmdk");
    for (ours, steps) in rounds {
        let steps = plain(steps, disk.size);
        if ours {
            we_write(&path, &steps, &mut model);
        } else {
            q.write("a.vmdk", "vmdk", &steps);
            steps.iter().for_each(|step| model.apply(step));
        }
        same(&q.content("a.vmdk", "vmdk"), model.bytes(), "qemu-img reads");
        let image = Image::open(&path, &reading()).unwrap();
        same(&content(&image), model.bytes(), "we read");
        if disk.options.contains("Sparse") {
            q.img(["check", "-f", "vmdk", "a.vmdk"]).ok();
            let checking = CheckOptions { policy: options().policy, ..CheckOptions::default() };
            let report = check(&path, &checking, &mut |_, finding| panic!("{finding}"));
            assert_eq!(report.unwrap().corruptions, 0);
        }
    }
}

#[test]
fn ours_and_qemus_writes_in_turn() {
    proptest!(proptest_config(32, 200), |(case in case())| run(case));
}

#[test]
fn qemu_writes_to_a_split_disk_that_we_did_not_touch() {
    let step = |seed| Step { op: Op::Write(Pattern::Byte(0)), start: 0, len: 512, seed };
    let disk = Disk { options: "subformat=twoGbMaxExtentSparse", backed: false, size: 2_607_616 };
    run((disk, vec![step(0)], vec![(false, vec![step(356_734_884)])]));
}

#[test]
fn writes_across_the_files_of_a_split_disk() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let split = 4192256 * 512u64;
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let option = format!("subformat={subformat}");
        q.img(["create", "-q", "-f", "vmdk", "-o", &option, "split.vmdk", "4G"]).ok();
        let image = Image::open(dir.path().join("split.vmdk"), &options()).unwrap();
        let bytes = fill(Pattern::Random, 5, 300 << 10);
        let at = split - (130 << 10) - 512;
        image.write_at(&bytes, at).unwrap();
        image.write_zeroes(split - 1000, 5000, ZeroHow::MayUnmap).unwrap();
        image.close().unwrap();
        let mut expected = bytes;
        let zeros = usize::try_from(split - 1000 - at).unwrap();
        expected[zeros..zeros + 5000].fill(0);
        let window = format!(
            "driver=raw,offset={at},size={},file.driver=vmdk,file.file.filename=split.vmdk",
            expected.len()
        );
        q.img(["convert", "--image-opts", &window, "-O", "raw", "part.raw"]).ok();
        same(&std::fs::read(dir.path().join("part.raw")).unwrap(), &expected, subformat);
    }
}

#[test]
fn a_delta_notices_that_its_parent_was_written_to() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let path = |name: &str| dir.path().join(name);
    for option in ["subformat=monolithicSparse", "subformat=monolithicFlat"] {
        q.img(["create", "-q", "-f", "vmdk", "-o", option, "base.vmdk", "1M"]).ok();
        q.img(["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "delta.vmdk"]).ok();
        drop(Image::open(path("delta.vmdk"), &reading()).unwrap());
        let before = std::fs::read(path("base.vmdk")).unwrap();
        // Opened, and not written to.
        Image::open(path("base.vmdk"), &options()).unwrap().close().unwrap();
        assert!(std::fs::read(path("base.vmdk")).unwrap() == before);
        let image = Image::open(path("base.vmdk"), &options()).unwrap();
        image.write_at(b"new", 0).unwrap();
        image.close().unwrap();
        let error = Image::open(path("delta.vmdk"), &reading()).err().unwrap();
        assert!(error.to_string().contains("CID"), "{error}");
        q.img(["info", "base.vmdk"]).ok();
    }
}

#[test]
fn what_cannot_be_written_to_is_refused_and_stays_as_it_is() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let path = dir.path().join("a.vmdk");
    std::fs::write(dir.path().join("a.raw"), fill(Pattern::Text, 1, 1 << 20)).unwrap();
    q.img(["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "a.raw", "a.vmdk"]).ok();
    let before = std::fs::read(&path).unwrap();
    let error = Image::open(&path, &options()).err().unwrap();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("compressed grains"), "{error}");
    assert!(std::fs::read(&path).unwrap() == before);

    // A read-only extent in front of one that may be written to.
    let text = "# Disk DescriptorFile\nversion=1\nCID=00000007\nparentCID=ffffffff\ncreateType=\"custom\"\n\
                RDONLY 8 FLAT \"one.bin\" 0\nRW 8 FLAT \"two.bin\" 0\nRW 8 ZERO\n";
    std::fs::write(&path, text).unwrap();
    for name in ["one.bin", "two.bin"] {
        std::fs::write(dir.path().join(name), [9; 4096]).unwrap();
    }
    let image = Image::open(&path, &options()).unwrap();
    let error = image.write_at(&[1; 8192], 0).unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
    image.write_at(&[2; 4096], 4096).unwrap();
    let error = image.write_at(&[3], 8192).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    image.write_zeroes(4096, 8192, ZeroHow::MayUnmap).unwrap();
    image.close().unwrap();
    assert_eq!(std::fs::read(dir.path().join("one.bin")).unwrap(), [9; 4096]);
    assert_eq!(std::fs::read(dir.path().join("two.bin")).unwrap(), [0; 4096]);
}

/// Stops at every barrier, with each part of what was written since the last one: the extent can be read, what was flushed
/// is there, and every sector holds what it held at some time since.
#[test]
fn a_power_failure_loses_nothing_that_was_flushed() {
    const SIZE: u64 = 3 << 20;
    const STATES: usize = 30;
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let mut states = 0;
    for (seed, option) in (1..).zip(["monolithicSparse", "monolithicSparse,zeroed_grain=on"]) {
        let option = format!("subformat={option}");
        q.img(["create", "-q", "-f", "vmdk", "-o", &option, "a.vmdk", &SIZE.to_string()]).ok();
        let bytes = std::fs::read(dir.path().join("a.vmdk")).unwrap();
        let disk = Arc::new(FaultyStorage::new(Arc::new(MemoryStorage::with_bytes(bytes, 64 << 20))));
        disk.start_journal().unwrap();
        let image = Image::from_storage(Arc::clone(&disk) as _, "a.vmdk", &options()).unwrap();
        let mut steps = plain(steps(seed, SIZE, GRAIN, 60, false), SIZE);
        for step in &mut steps {
            step.start &= !511;
            step.len = step.len.next_multiple_of(512).min(SIZE - step.start);
        }
        let mut model = ModelDisk::new(SIZE, GRAIN);
        // What the disk held since the last flush began.
        let mut held = vec![model.bytes().to_vec()];
        for (turn, step) in steps.iter().enumerate() {
            match step.op {
                Op::Zero { .. } => image.write_zeroes(step.start, step.len, ZeroHow::MayUnmap).unwrap(),
                _ => image.write_at(&step.bytes(), step.start).unwrap(),
            }
            model.apply(step);
            held.push(model.bytes().to_vec());
            let flush = turn % 5 == 4;
            if flush {
                image.flush().unwrap();
                held.drain(..held.len() - 1);
            }
            for state in disk.crash_states(turn as u64, STATES) {
                states += 1;
                let left = Arc::new(MemoryStorage::with_bytes(state.to_vec(), 64 << 20));
                let image = Image::from_storage(left, "a.vmdk", &reading()).unwrap();
                let got = content(&image);
                for (index, sector) in got.chunks(512).enumerate() {
                    let at = index * 512;
                    let known = held.iter().any(|held| &held[at..at + 512] == sector);
                    assert!(
                        known,
                        "{option}, after step {turn}: offset {at:#x} holds what was never written"
                    );
                }
            }
        }
        image.close().unwrap();
    }
    println!("{states} states after a power failure");
    assert!(states > 1000);
}
