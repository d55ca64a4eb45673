//! Random writes into encrypted qcow2 images by us and by qemu-io in turn.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code"
)]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::SystemTime;

use diskmill::convert::TargetFormat;
use diskmill::create::{CreateOptions, create};
use diskmill::edit::ZeroHow;
use diskmill::{Allow, Image, Kind, OpenOptions, OpenPolicy, Secret, SnapshotRef};
use diskmill_testkit::{ModelDisk, Op, Oracle, Script, Step, scratch, steps};

const SECRET: &str = "secret,id=s,data=correct horse";
const OPTS: &str = "driver=qcow2,encrypt.key-secret=s,file.filename=a.qcow2";
const SIZE: u64 = 700 << 10;

fn options() -> OpenOptions {
    OpenOptions {
        writable: true,
        keys: vec![Secret::new(b"correct horse".to_vec())],
        policy: OpenPolicy { allow: Allow::OwnTree, ..OpenPolicy::default() },
        ..OpenOptions::default()
    }
}

fn encrypted(path: &Path, extra: &[(&str, &str)]) {
    let mut format = TargetFormat::named("qcow2").unwrap();
    for (name, value) in [("encrypt.format", "luks"), ("encrypt.iter-time", "5")].iter().chain(extra) {
        format.set(name, value).unwrap();
    }
    let TargetFormat::Qcow2(qcow2) = &mut format else { panic!("it is qcow2") };
    qcow2.encryption.as_mut().unwrap().key = Some(Secret::new(b"correct horse".to_vec()));
    create(path, &CreateOptions { format, size: SIZE, trust_backing: false }).unwrap();
}

fn write(image: &Image, step: &Step) {
    let done = match step.op {
        Op::Write(_) | Op::Compressed(_) => image.write_at(&step.bytes(), step.start),
        Op::Zero { unmap: false } => image.write_zeroes(step.start, step.len, ZeroHow::KeepAllocated),
        Op::Zero { unmap: true } => image.write_zeroes(step.start, step.len, ZeroHow::MayUnmap),
        Op::Discard => image.discard(step.start, step.len),
    };
    done.unwrap();
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn in_turn(extra: &[(&str, &str)], cluster: u64) {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let path = dir.join("a.qcow2");
    encrypted(&path, extra);
    let mut model = ModelDisk::new(SIZE, cluster);
    let mut snapshot = None;
    for turn in 0..8u64 {
        let steps = steps(turn ^ cluster, SIZE, cluster, 10, false);
        steps.iter().for_each(|step| model.apply(step));
        if turn % 3 == 1 {
            let io =
                q.io(["--object", SECRET, "--image-opts"]).args(Script::new(&steps).args()).arg(OPTS).ok();
            assert!(!io.out().contains("failed"), "{io}");
        } else {
            let mut image = Image::open(&path, &options()).unwrap();
            steps.iter().for_each(|step| write(&image, step));
            assert!(content(&image) == model.bytes(), "turn {turn}");
            if turn == 3 && !extra.iter().any(|(name, _)| *name == "data_file") {
                image.create_snapshot("s", SystemTime::UNIX_EPOCH).unwrap();
                snapshot = Some(model.clone());
            }
            image.close().unwrap();
        }
        std::fs::write(dir.join("model"), model.bytes()).unwrap();
        q.img(["check", "--object", SECRET, "--image-opts", OPTS]).ok();
        q.img(["compare", "--object", SECRET, "--image-opts", OPTS, "driver=raw,file.filename=model"]).ok();
        assert!(content(&Image::open(&path, &options()).unwrap()) == model.bytes(), "turn {turn}");
    }
    if let Some(model) = snapshot {
        let mut image = Image::open(&path, &options()).unwrap();
        image.apply_snapshot(&SnapshotRef::Any("s".to_owned())).unwrap();
        assert!(content(&image) == model.bytes());
    }
}

#[test]
fn encrypted_clusters() {
    in_turn(&[], 64 << 10);
}

#[test]
fn encrypted_small_clusters() {
    in_turn(&[("cluster_size", "512")], 512);
}

#[test]
fn encrypted_subclusters() {
    in_turn(&[("cluster_size", "32k"), ("extended_l2", "on")], 32 << 10);
}

#[test]
fn an_encrypted_data_file() {
    in_turn(&[("data_file", "data.raw")], 64 << 10);
}

#[test]
fn legacy_aes() {
    let aes = ("encrypt.format", "aes");
    in_turn(&[aes], 64 << 10);
    in_turn(&[aes, ("cluster_size", "512"), ("compat", "0.10")], 512);
    in_turn(&[aes, ("cluster_size", "32k"), ("extended_l2", "on")], 32 << 10);
    in_turn(&[aes, ("data_file", "data.raw")], 64 << 10);
}

#[test]
fn a_locked_image_shows_what_it_is_but_no_data() {
    let dir = scratch();
    fs::File::create(dir.path().join("base.raw")).unwrap().set_len(SIZE).unwrap();
    for format in ["luks", "aes"] {
        let path = dir.path().join(format);
        encrypted(&path, &[("encrypt.format", format)]);
        let path = dir.path().join(format!("{format}-overlay"));
        encrypted(&path, &[("encrypt.format", format), ("backing_file", "base.raw"), ("backing_fmt", "raw")]);
        let locked = OpenOptions { locked: true, writable: false, keys: Vec::new(), ..options() };
        let image = Image::open(&path, &locked).unwrap();
        assert_eq!((image.size(), image.chain().len()), (SIZE, 2));
        assert_eq!(image.map(0, 512).unwrap_err().error.kind(), Kind::Denied);
        assert_eq!(image.read_at(&mut [0; 512], 0).unwrap_err().kind(), Kind::Denied);
        drop(image);
        let error = Image::open(&path, &OpenOptions { writable: true, ..locked }).err().unwrap();
        assert_eq!(error.kind(), Kind::Invalid);
    }
}

#[test]
fn what_is_discarded_takes_no_space() {
    let dir = scratch();
    for format in ["luks", "aes"] {
        let path = dir.path().join(format);
        encrypted(&path, &[("encrypt.format", format)]);
        let blocks = || fs::metadata(&path).unwrap().blocks() * 512;
        let empty = blocks();
        let image = Image::open(&path, &options()).unwrap();
        image.write_at(&vec![1; usize::try_from(SIZE).unwrap()], 0).unwrap();
        image.flush().unwrap();
        assert!(blocks() > empty + SIZE / 2);
        image.discard(0, SIZE).unwrap();
        image.close().unwrap();
        // The L2 table stays.
        assert!(blocks() <= empty + (128 << 10), "{format}: {empty}, then {}", blocks());
        assert_eq!(
            content(&Image::open(&path, &options()).unwrap()),
            vec![0; usize::try_from(SIZE).unwrap()]
        );
    }
}
