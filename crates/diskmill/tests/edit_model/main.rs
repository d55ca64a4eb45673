//! Random writes, snapshots, resizes, amendments, commits and rebases by us and by QEMU's tools in turn on one image and
//! its chain, against a plain disk in memory.
//!
//! `PROPTEST_CASES` sets the number of cases (default 64 here); a failure prints the smallest case.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod chain;

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use diskmill::edit::{Amendment, Preallocation, ZeroHow};
use diskmill::{Allow, Image, OpenOptions, OpenPolicy, SnapshotRef};
use diskmill_testkit::{
    ModelDisk, Op, Oracle, Script, Step, legalise, ops, proptest_config, same, scratch, steps, unpack,
};
use proptest::prelude::*;

use chain::{Backing, Layer, backing, layer};

const IMAGE: &str = "top.qcow2";

#[derive(Clone, Debug)]
struct Kind {
    v2: bool,
    cluster_bits: u32,
    refcount_order: u32,
    extended: bool,
    lazy: bool,
    data_file: bool,
    data_file_raw: bool,
    on: Backing,
    preallocated: bool,
    size: u64,
}

impl Kind {
    fn backed(&self) -> bool {
        self.on != Backing::Nothing
    }

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
    (any::<[bool; 4]>(), 0..7u32, cluster_bits, 1..=1600u64, 0..6u8, backing()).prop_map(
        |([v2, extended, lazy, preallocated], refcount_order, cluster_bits, sectors, data, on)| {
            let backed = on != Backing::Nothing;
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
                on,
                preallocated: preallocated && !backed && !v2,
                size: sectors * 512 + 3 * (1 << cluster_bits) * u64::from(cluster_bits > 16),
            }
        },
    )
}

/// What is done, and whether by us or by QEMU's tools.
#[derive(Clone, Debug)]
struct Round {
    ours: bool,
    act: Act,
}

#[derive(Clone, Debug)]
enum Act {
    Write(Vec<Step>),
    Amend(Change),
    /// To this many sectors.
    Resize(u64, Preallocation),
    Commit {
        deep: bool,
        keep: bool,
    },
    Rebase(Backing),
    Snapshot,
    /// One of those that there are, by a number of any size.
    Apply(usize),
    Delete(usize),
}

#[derive(Clone, Copy, Debug)]
enum Change {
    V2(bool),
    /// The width of refcounts, as a power of two.
    Width(u32),
    Lazy(bool),
}

impl Change {
    fn option(self) -> (&'static str, String) {
        let on = |on| if on { "on" } else { "off" };
        match self {
            Self::V2(v2) => ("compat", if v2 { "0.10" } else { "1.1" }.to_owned()),
            Self::Width(order) => ("refcount_bits", (1u32 << order).to_string()),
            Self::Lazy(lazy) => ("lazy_refcounts", on(lazy).to_owned()),
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        2 => any::<bool>().prop_map(Change::V2),
        2 => (0..7u32).prop_map(Change::Width),
        1 => any::<bool>().prop_map(Change::Lazy),
    ]
}

fn preallocation() -> impl Strategy<Value = Preallocation> {
    prop_oneof![
        4 => Just(Preallocation::Off),
        1 => Just(Preallocation::Metadata),
        1 => Just(Preallocation::Falloc),
        1 => Just(Preallocation::Full),
    ]
}

fn round(size: u64, cluster: u64) -> impl Strategy<Value = Round> {
    let act = prop_oneof![
        6 => ops(size, cluster, 1..14).prop_map(Act::Write),
        2 => Just(Act::Snapshot),
        2 => change().prop_map(Act::Amend),
        3 => ((1..=3 * size / 512), preallocation()).prop_map(|(sectors, how)| Act::Resize(sectors, how)),
        2 => any::<[bool; 2]>().prop_map(|[deep, keep]| Act::Commit { deep, keep }),
        3 => backing().prop_map(Act::Rebase),
        1 => any::<usize>().prop_map(Act::Apply),
        1 => any::<usize>().prop_map(Act::Delete),
    ];
    (any::<bool>(), act).prop_map(|(ours, act)| Round { ours, act })
}

fn case() -> impl Strategy<Value = (Kind, [Layer; 3], Vec<Round>)> {
    kind().prop_flat_map(|kind| {
        let cluster = kind.cluster();
        let rounds = proptest::collection::vec(round(kind.size, cluster), 1..10);
        (Just(kind.clone()), [layer(), layer(), layer()], rounds)
    })
}

fn options() -> OpenOptions {
    let policy = OpenPolicy { allow: Allow::OwnTree, paths: Vec::new() };
    OpenOptions { policy, writable: true, ..OpenOptions::default() }
}

fn act(image: &Image, step: &Step) {
    match step.op {
        Op::Write(_) => image.write_at(&step.bytes(), step.start).unwrap(),
        Op::Compressed(_) => match image.write_compressed(&step.bytes(), step.start) {
            // Not whole clusters, or an image that cannot have packed ones.
            Err(error) if matches!(error.kind(), diskmill::Kind::Invalid | diskmill::Kind::Unsupported) => {
                image.write_at(&step.bytes(), step.start).unwrap();
            }
            done => done.unwrap(),
        },
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

fn check((mut kind, below, rounds): (Kind, [Layer; 3], Vec<Round>)) {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    chain::make(&q, &below);
    match kind.on.file() {
        Some(backing) => q.create_over(IMAGE, &kind.options(), kind.size, backing),
        None => q.create(IMAGE, &kind.options(), kind.size),
    }
    let model = chain::fresh(&q, &kind);
    let mut disk = Disk { q, path: dir.join(IMAGE), model, snapshots: Vec::new(), count: 0, fresh: true };
    for round in rounds {
        if !disk.round(&mut kind, round) {
            return;
        }
        disk.q.check_clean(IMAGE);
        same(&disk.q.content(IMAGE, "qcow2"), disk.model.bytes(), "qemu-img reads");
        disk.check_chain(&kind);
        if kind.data_file_raw {
            let raw = std::fs::read(dir.join("data.raw")).unwrap();
            same(&raw[..disk.model.bytes().len()], disk.model.bytes(), "the raw data file");
        }
        for (name, model) in &disk.snapshots {
            let snapshot = Some(SnapshotRef::Any(name.clone()));
            let image =
                Image::open(&disk.path, &OpenOptions { writable: false, snapshot, ..options() }).unwrap();
            same(&content(&image), model.bytes(), &format!("snapshot {name}"));
        }
    }
}

/// The image and what it must hold.
struct Disk {
    q: Oracle,
    path: PathBuf,
    model: ModelDisk,
    snapshots: Vec<(String, ModelDisk)>,
    /// Snapshots that were ever taken.
    count: u32,
    fresh: bool,
}

impl Disk {
    /// Does one round. Returns whether the case goes on.
    fn round(&mut self, kind: &mut Kind, Round { ours, act }: Round) -> bool {
        // Where refcounts overflow QEMU stops half-way.
        let ours = ours || (kind.refcount_order < 4 && !kind.v2 && !matches!(act, Act::Write(_)));
        match act {
            Act::Write(steps) => return self.write(kind, ours, steps),
            Act::Amend(change) => self.amend(kind, ours, change),
            Act::Commit { deep, keep } => self.commit(kind, ours, deep, keep),
            Act::Rebase(onto) => self.rebase(kind, ours, onto),
            Act::Resize(sectors, how) => return self.resize(kind, ours, sectors * 512, how),
            Act::Snapshot | Act::Apply(_) | Act::Delete(_) if kind.data_file => {}
            Act::Snapshot => {
                self.count += 1;
                let name = format!("s{}", self.count);
                if !ours {
                    self.q.img(["snapshot", "-c", &name, IMAGE]).ok();
                } else if let Err(error) = self.edit(|image| image.create_snapshot(&name, SystemTime::now()))
                {
                    assert!(kind.refcount_order < 4 && error.kind() == diskmill::Kind::Limit, "{error}");
                    return true;
                }
                self.snapshots.push((name, self.model.clone()));
            }
            Act::Apply(_) | Act::Delete(_) if self.snapshots.is_empty() => {}
            Act::Apply(which) => {
                let (name, model) = self.snapshots[which % self.snapshots.len()].clone();
                let wanted = SnapshotRef::Any(name.clone());
                if !ours {
                    self.q.img(["snapshot", "-a", &name, IMAGE]).ok();
                } else if let Err(error) = self.edit(|image| image.apply_snapshot(&wanted)) {
                    assert!(kind.refcount_order < 4 && error.kind() == diskmill::Kind::Limit, "{error}");
                    return true;
                }
                self.model = model;
                self.model.set_discards(!(kind.v2 && kind.backed()));
            }
            Act::Delete(which) => {
                let (name, _) = self.snapshots.remove(which % self.snapshots.len());
                if ours {
                    self.edit(|image| image.delete_snapshot(&SnapshotRef::Any(name))).unwrap();
                } else {
                    self.q.img(["snapshot", "-d", &name, IMAGE]).ok();
                }
            }
        }
        true
    }

    fn amend(&mut self, kind: &mut Kind, ours: bool, change: Change) {
        let (name, value) = change.option();
        let done = if ours {
            let mut amendment = Amendment::default();
            amendment.set(name, &value).unwrap();
            let done = self.edit(|image| image.amend(&amendment));
            // What the image cannot have is refused; nothing may fail.
            let refused = |error: &diskmill::Error| {
                matches!(
                    error.kind(),
                    diskmill::Kind::Invalid | diskmill::Kind::Unsupported | diskmill::Kind::Limit
                )
            };
            assert!(done.as_ref().err().is_none_or(refused), "{done:?}");
            done.is_ok()
        } else {
            let option = format!("{name}={value}");
            self.q.img(["amend", "-f", "qcow2", "-o", &option, IMAGE]).run().code == Some(0)
        };
        match change {
            _ if !done => {}
            Change::V2(v2) => kind.v2 = v2,
            Change::Width(order) => kind.refcount_order = order,
            Change::Lazy(lazy) => kind.lazy = lazy,
        }
        self.model.set_discards(!(kind.v2 && kind.backed()));
    }

    fn resize(&mut self, kind: &Kind, ours: bool, size: u64, how: Preallocation) -> bool {
        let old = self.model.bytes().len() as u64;
        let how = if size > old { how } else { Preallocation::Off };
        if kind.v2 && !self.snapshots.is_empty() {
            return true;
        }
        // QEMU shows what it finds behind the old end inside a cluster, cannot hide a backing file in version 2, and
        // fails where refcounts of other widths have to grow for preallocation.
        let plain = !kind.backed() && how == Preallocation::Off && old.is_multiple_of(kind.cluster());
        if ours || !(plain || size < old) {
            let done = self.edit(|image| image.resize(size, how));
            assert!(done.is_ok(), "{done:?}");
        } else {
            let size = size.to_string();
            self.q.img(["resize", "-q", "--shrink", "-f", "qcow2", IMAGE, &size]).ok();
        }
        self.model.resize(size);
        true
    }

    /// Changes the image, and reads it before it is closed.
    fn edit<T>(
        &self,
        change: impl FnOnce(&mut Image) -> Result<T, diskmill::Error>,
    ) -> Result<(), diskmill::Error> {
        let mut image = Image::open(&self.path, &options()).unwrap();
        let done = change(&mut image).map(drop);
        content(&image);
        image.close().unwrap();
        done
    }

    fn write(&mut self, kind: &Kind, ours: bool, mut steps: Vec<Step>) -> bool {
        // QEMU takes compressed writes only where nothing was written.
        if !self.fresh || kind.data_file || kind.preallocated {
            unpack(&mut steps);
        }
        let size = self.model.bytes().len() as u64;
        steps.retain(|step| step.start + step.len <= size);
        legalise(&mut steps, size, kind.cluster());
        self.fresh = false;
        if ours {
            we_write(&self.path, &steps, &mut self.model);
        } else {
            if let Err(refusal) = self.q.try_write(IMAGE, "qcow2", &steps) {
                assert!(steps.iter().any(|step| matches!(step.op, Op::Compressed(_))), "{refusal}");
                return false;
            }
            steps.iter().for_each(|step| self.model.apply(step));
        }
        true
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

proptest! {
    #![proptest_config(proptest_config(64, 200))]

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

#[test]
fn an_image_that_qemu_did_not_close_is_counted_anew() {
    for (options, cluster) in
        [("", 1u64 << 16), (",cluster_size=512", 512), (",cluster_size=4k,refcount_bits=1", 4096)]
    {
        let dir = scratch();
        let Some(q) = Oracle::find(dir.path()) else { return };
        let (path, size) = (dir.path().join(IMAGE), 300 << 10);
        q.create(IMAGE, &format!("lazy_refcounts=on{options}"), size);
        let mut model = ModelDisk::new(size, cluster);
        for turn in 0..3 {
            let theirs = steps(turn ^ cluster, size, cluster, 12, false);
            theirs.iter().for_each(|step| model.apply(step));
            let script = Script::new(&theirs);
            q.io(["-f", "qcow2"]).args(script.args()).args(["-c", "flush", "-c", "sigraise 9", IMAGE]).run();
            let dirty = q.info(IMAGE)["dirty-flag"] == true;
            assert!(dirty, "qemu-io closed the image all the same");
            let reader = Image::open(&path, &OpenOptions { writable: false, ..self::options() }).unwrap();
            same(&content(&reader), model.bytes(), "a dirty image is read");
            drop(reader);
            we_write(&path, &steps(!turn, size, cluster, 6, false), &mut model);
            q.check_clean(IMAGE);
            same(&q.content(IMAGE, "qcow2"), model.bytes(), "qemu-img reads");
            assert!(q.info(IMAGE)["dirty-flag"] == false, "the mark is still there");
        }
    }
}
