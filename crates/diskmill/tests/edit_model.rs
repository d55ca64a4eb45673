//! Random writes by us and by qemu-io in turn on one image, against a plain disk in memory.
//!
//! `PROPTEST_CASES` sets the number of cases (default 48 here); a failure prints the smallest case.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use diskmill::edit::ZeroHow;
use diskmill::{Allow, Image, OpenOptions, OpenPolicy};
use diskmill_testkit::{ModelDisk, Op, Oracle, Step, legalise, ops, scratch, unpack};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Kind {
    v2: bool,
    cluster_bits: u32,
    refcount_order: u32,
    extended: bool,
    lazy: bool,
    data_file: bool,
    data_file_raw: bool,
    backed: bool,
    preallocated: bool,
    size: u64,
}

impl Kind {
    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn options(&self) -> String {
        let mut o = format!("cluster_size={}", self.cluster());
        if self.v2 {
            return o + ",compat=v2";
        }
        o += &format!(",refcount_bits={}", 1u32 << self.refcount_order);
        o += if self.extended { ",extended_l2=on" } else { "" };
        o += if self.lazy { ",lazy_refcounts=on" } else { "" };
        o += if self.data_file { ",data_file=data.raw" } else { "" };
        o += if self.data_file_raw { ",data_file_raw=on" } else { "" };
        o += if self.preallocated { ",preallocation=metadata" } else { "" };
        o
    }
}

fn kind() -> impl Strategy<Value = Kind> {
    let cluster_bits = prop_oneof![3 => 9..=12u32, 3 => 13..=16u32, 1 => 17..=21u32];
    (any::<[bool; 5]>(), 0..7u32, cluster_bits, 1..=1600u64, 0..6u8).prop_map(
        |([v2, extended, lazy, backed, preallocated], refcount_order, cluster_bits, sectors, data)| {
            let extended = extended && cluster_bits >= 14 && !v2;
            let data_file = data < 2 && !v2;
            let data_file_raw = data == 0 && data_file && !backed;
            Kind {
                v2,
                cluster_bits,
                refcount_order,
                extended,
                lazy: lazy && !v2,
                data_file,
                data_file_raw,
                backed,
                preallocated: preallocated && !backed && !v2,
                size: sectors * 512 + 3 * (1 << cluster_bits) * u64::from(cluster_bits > 16),
            }
        },
    )
}

/// Steps, and whether we do them (or qemu-io).
type Round = (bool, Vec<Step>);

fn case() -> impl Strategy<Value = (Kind, Vec<Step>, Vec<Round>)> {
    kind().prop_flat_map(|kind| {
        let cluster = kind.cluster();
        let rounds = proptest::collection::vec((any::<bool>(), ops(kind.size, cluster, 1..14)), 1..5);
        (Just(kind.clone()), ops(kind.size, cluster, 1..8), rounds)
    })
}

fn options() -> OpenOptions {
    let policy = OpenPolicy { allow: Allow::OwnTree, paths: Vec::new() };
    OpenOptions { policy, writable: true, ..OpenOptions::default() }
}

fn act(image: &Image, step: &Step) {
    match step.op {
        Op::Write(_) | Op::Compressed(_) => image.write_at(&step.bytes(), step.start).unwrap(),
        Op::Zero { unmap: false } => {
            image.write_zeroes(step.start, step.len, ZeroHow::KeepAllocated).unwrap();
        }
        Op::Zero { unmap: true } => image.write_zeroes(step.start, step.len, ZeroHow::MayUnmap).unwrap(),
        Op::Discard => image.discard(step.start, step.len).unwrap(),
    }
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn same(got: &[u8], want: &[u8], what: &str) {
    if got != want {
        let at = got.iter().zip(want).position(|(a, b)| a != b);
        panic!("{what}: {} and {} bytes, first difference at {at:?}", got.len(), want.len());
    }
}

fn check((kind, base, rounds): (Kind, Vec<Step>, Vec<Round>)) {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let (size, cluster) = (kind.size, kind.cluster());
    let mut model = ModelDisk::new(size, cluster);
    if kind.backed {
        let mut base = base;
        legalise(&mut base, size, cluster);
        q.create("base.qcow2", &format!("cluster_size={cluster}"), size);
        if q.try_write("base.qcow2", "qcow2", &base).is_err() {
            return;
        }
        base.iter().for_each(|step| model.apply(step));
        q.create_over("a.qcow2", &kind.options(), size, ("base.qcow2", "qcow2"));
        model = ModelDisk::over(&model, size, cluster, kind.v2);
    } else {
        q.create("a.qcow2", &kind.options(), size);
    }
    let mut fresh = true;
    for (ours, mut steps) in rounds {
        // QEMU takes compressed writes only where nothing was written.
        if !fresh || kind.data_file || kind.preallocated {
            unpack(&mut steps);
        }
        legalise(&mut steps, size, cluster);
        fresh = false;
        if ours {
            we_write(&dir.join("a.qcow2"), &steps, &mut model);
        } else {
            if let Err(refusal) = q.try_write("a.qcow2", "qcow2", &steps) {
                assert!(steps.iter().any(|step| matches!(step.op, Op::Compressed(_))), "{refusal}");
                return;
            }
            steps.iter().for_each(|step| model.apply(step));
        }
        q.check_clean("a.qcow2");
        same(&q.content("a.qcow2", "qcow2"), model.bytes(), "qemu-img reads");
        if kind.data_file_raw {
            let raw = std::fs::read(dir.join("data.raw")).unwrap();
            same(&raw[..model.bytes().len()], model.bytes(), "the raw data file");
        }
    }
}

fn we_write(path: &Path, steps: &[Step], model: &mut ModelDisk) {
    let image = Image::open(path, &options()).unwrap();
    for (index, step) in steps.iter().enumerate() {
        act(&image, step);
        model.apply(step);
        same(&content(&image), model.bytes(), &format!("after step {index}, {step:?}"));
        if step.seed % 5 == 0 {
            image.flush().unwrap();
        }
    }
    image.close().unwrap();
}

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(48),
        max_shrink_iters: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn writes_by_us_and_by_qemu(case in case()) {
        check(case);
    }
}

#[test]
fn raw_images_are_written_in_place() {
    let dir = scratch();
    let path = dir.path().join("a.raw");
    std::fs::write(&path, vec![7; 10_000]).unwrap();
    let image = Image::open(&path, &options()).unwrap();
    assert_eq!(image.size(), 10_240);
    image.write_at(&[1; 300], 9_900).unwrap();
    image.write_zeroes(100, 5_000, ZeroHow::MayUnmap).unwrap();
    assert!(image.write_at(&[1], 10_240).is_err());
    let mut want = vec![7; 9_900];
    want.extend([1; 300]);
    want.resize(10_240, 0);
    want[100..5_100].fill(0);
    same(&content(&image), &want, "raw");
    // Nobody else may write meanwhile.
    assert_eq!(Image::open(&path, &options()).err().unwrap().kind(), diskmill::Kind::Busy);
    image.close().unwrap();
    same(&std::fs::read(&path).unwrap(), &want[..10_200], "the file");
}
