//! Shared blocks where something is in the way: damage, encryption, layouts of every kind (needs root, for mounting).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use diskmill_testkit::content::{Pattern, fill};
use diskmill_testkit::{
    ModelDisk, Mounted, Oracle, Step, Tool, legalise, ops, proptest_config, scratch, unpack,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::Value;

const MIB: usize = 1 << 20;
const SIZE: u64 = 320 << 20;

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

fn convert(dir: &Path, args: &[&str]) -> Value {
    diskmill().cmd(["convert", "--json"]).args(args).dir(dir).ok().json()
}

fn cloned(report: &Value) -> u64 {
    report["bytes-cloned"].as_u64().unwrap_or_else(|| panic!("no bytes-cloned in {report}"))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A raw disk of `runs` runs of 128 KiB of data with holes between them: more than what is planned ahead.
fn write_runs(path: &Path, runs: usize) {
    let file = File::create(path).unwrap();
    file.set_len(((runs * 256) << 10) as u64).unwrap();
    for run in 0..runs {
        let bytes = fill(Pattern::Random, run as u64, 128 << 10);
        file.write_all_at(&bytes, ((run * 256) << 10) as u64).unwrap();
    }
}

#[test]
fn a_conversion_that_fails_half_way_leaves_nothing_behind() {
    let Some(mounted) = Mounted::fresh("xfs", SIZE) else { return };
    let dir = &mounted.path();
    let Some(q) = Oracle::find(dir) else { return };
    write_runs(&dir.join("good.raw"), 200);
    assert!(cloned(&convert(dir, &["-f", "raw", "-O", "qcow2", "good.raw", "good.qcow2"])) > 20 << 20);
    // The second source is damaged: its only L2 table begins inside a sector.
    q.create("bad.qcow2", "", 1 << 20);
    q.io(["-f", "qcow2", "-c", "write -P 1 0 1M", "bad.qcow2"]).ok();
    let bad = File::options().read(true).write(true).open(dir.join("bad.qcow2")).unwrap();
    let mut field = [0; 8];
    bad.read_exact_at(&mut field, 40).unwrap();
    let l1 = u64::from_be_bytes(field);
    bad.read_exact_at(&mut field, l1).unwrap();
    bad.write_all_at(&(u64::from_be_bytes(field) + 512).to_be_bytes(), l1).unwrap();
    drop(bad);
    fs::write(dir.join("old"), "what was there before").unwrap();
    let (files, used) = (names(dir), mounted.used());
    for format in ["raw", "qcow2"] {
        for target in ["old", "new"] {
            let args = ["convert", "-f", "qcow2", "-O", format, "good.qcow2", "bad.qcow2", target];
            diskmill().cmd(args).dir(dir).fails(1).says(&["bad.qcow2", "L2 table"]);
            assert_eq!(names(dir), files);
        }
    }
    assert_eq!(fs::read(dir.join("old")).unwrap(), b"what was there before");
    assert!(mounted.used() <= used + (256 << 10), "blocks are still shared, or lost");
}

#[test]
fn encrypted_blocks_are_not_shared() {
    const SECRET: &str = "secret,id=s,data=hush";
    let Some(mounted) = Mounted::fresh("xfs", SIZE) else { return };
    let dir = &mounted.path();
    let Some(q) = Oracle::find(dir) else { return };
    let content = fill(Pattern::Text, 5, 4 * MIB);
    fs::write(dir.join("plain"), &content).unwrap();
    let options = "encrypt.format=luks,encrypt.iter-time=5,encrypt.key-secret=s";
    q.img(["convert", "--object", SECRET, "-O", "qcow2", "-o", options, "plain", "locked"]).ok();
    for format in ["raw", "qcow2", "vmdk"] {
        let report = convert(dir, &["--object", SECRET, "-f", "qcow2", "-O", format, "locked", "out"]);
        assert_eq!(cloned(&report), 0, "{report}");
        assert!(q.content("out", format) == content, "{format}");
    }
    // Nor may what was plain stand in an encrypted image.
    fs::write(dir.join("key"), "hush").unwrap();
    let luks = "encrypt.format=luks,encrypt.iter-time=5";
    let args = ["--target-key-file", "key", "-f", "raw", "-O", "qcow2", "-o", luks, "plain", "ours"];
    assert_eq!(cloned(&convert(dir, &args)), 0);
    let held = fs::read(dir.join("ours")).unwrap();
    assert!(!held.windows(512).any(|window| window == &content[..512]));
    let report = convert(dir, &["--key-file", "key", "-f", "qcow2", "-O", "raw", "ours", "back"]);
    assert_eq!((cloned(&report), fs::read(dir.join("back")).unwrap() == content), (0, true));
}

#[derive(Clone, Copy, Debug)]
enum Source {
    /// A qcow2 overlay and its backing file.
    Chain,
    /// The same as one raw file with holes.
    Raw,
    /// The same as a flat VMDK.
    Flat,
}

/// What is done to a source, how its clusters are laid out, and the target.
#[derive(Clone, Debug)]
struct Case {
    source: Source,
    source_bits: u32,
    target: (&'static str, String),
    size: u64,
    base: Vec<Step>,
    top: Vec<Step>,
}

fn case() -> impl Strategy<Value = Case> {
    let source = prop_oneof![2 => Just(Source::Chain), 1 => Just(Source::Raw), 1 => Just(Source::Flat)];
    let target = prop_oneof![
        2 => (9..=21u32).prop_map(|bits| ("qcow2", format!("cluster_size={}", 1u64 << bits))),
        1 => (14..=18u32).prop_map(|bits| ("qcow2", format!("extended_l2=on,cluster_size={}", 1u64 << bits))),
        2 => Just(("raw", String::new())),
        1 => Just(("vmdk", "subformat=monolithicFlat".to_owned())),
        1 => Just(("vmdk", String::new())),
    ];
    (source, 12..=18u32, target, 1..=12_000u64).prop_flat_map(|(source, source_bits, target, sectors)| {
        let (size, cluster) = (sectors * 512, 1 << source_bits);
        (ops(size, cluster, 1..16), ops(size, cluster, 1..16)).prop_map(move |(mut base, mut top)| {
            for steps in [&mut base, &mut top] {
                unpack(steps);
                legalise(steps, size, cluster);
            }
            Case { source, source_bits, target: target.clone(), size, base, top }
        })
    })
}

/// Converts the case's disk; gives the bytes that were cloned.
fn check(case: &Case, dir: &Path) -> u64 {
    let Some(q) = Oracle::find(dir) else { return 0 };
    for name in names(dir) {
        fs::remove_file(dir.join(name)).unwrap();
    }
    let cluster = 1 << case.source_bits;
    let options = format!("cluster_size={cluster}");
    let mut model = ModelDisk::new(case.size, cluster);
    q.create("base", &options, case.size);
    q.write("base", "qcow2", &case.base);
    case.base.iter().for_each(|step| model.apply(step));
    q.create_over("top", &options, case.size, ("base", "qcow2"));
    model = ModelDisk::over(&model, case.size, cluster, false);
    q.write("top", "qcow2", &case.top);
    case.top.iter().for_each(|step| model.apply(step));
    let (source, format) = match case.source {
        Source::Chain => ("top", "qcow2"),
        Source::Raw => ("top.raw", "raw"),
        Source::Flat => ("top.vmdk", "vmdk"),
    };
    match case.source {
        Source::Chain => {}
        Source::Raw => drop(q.img(["convert", "-O", "raw", "top", source]).ok()),
        Source::Flat => {
            let options = ["-o", "subformat=monolithicFlat"];
            q.img(["convert", "-O", "vmdk"]).args(options).args(["top", source]).ok();
        }
    }
    assert!(q.content(source, format) == model.bytes(), "qemu-img reads something else than the model");
    let (target, options) = &case.target;
    let mut args = vec!["-f", format, "-O", target];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([source, "out"]);
    let report = convert(dir, &args);
    assert!(q.content("out", target) == model.bytes(), "{report}");
    if *target == "qcow2" {
        q.check_clean("out");
    }
    assert!(q.content(source, format) == model.bytes(), "the source was changed");
    cloned(&report)
}

#[test]
fn random_layouts_read_the_same_when_cloned() {
    let Some(mounted) = Mounted::fresh("xfs", SIZE) else { return };
    let dir = mounted.path();
    if Oracle::find(scratch().path()).is_none() {
        return;
    }
    let shared = Cell::new(0);
    TestRunner::new(proptest_config(48, 200))
        .run(&case(), |case| {
            shared.set(shared.get() + check(&case, &dir));
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
    assert!(shared.get() > 1 << 20, "hardly anything was cloned: {} bytes", shared.get());
}
