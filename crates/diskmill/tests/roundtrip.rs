//! The library converts there and back, and qemu-img agrees where it is installed.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::Command;

use diskmill::convert::{Compression, ConvertOptions, Monitor, TargetFormat, convert, convert_unnamed};
use diskmill::{Image, Kind, OpenOptions};
use diskmill_testkit::content::sample;

fn qcow2(options: &[(&str, &str)], compress: bool, threads: usize) -> ConvertOptions {
    let mut format = TargetFormat::named("qcow2").unwrap();
    for (name, value) in options {
        format.set(name, value).unwrap();
    }
    ConvertOptions {
        format,
        compress: compress.then(Compression::default),
        threads: Some(threads),
        ..ConvertOptions::default()
    }
}

fn run(from: &Path, to: &Path, options: &ConvertOptions) {
    let image = Image::open(from, &OpenOptions::default()).unwrap();
    convert(&[image], to.to_owned().into(), options, &Monitor::new()).unwrap();
}

fn qemu_img(args: &[&str]) {
    let Ok(output) = Command::new("qemu-img").args(args).output() else {
        eprintln!("SKIPPED: qemu-img is not installed");
        return;
    };
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
}

#[test]
fn there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("a.raw");
    let bytes = sample(5 * 1024 * 1024 + 1536);
    std::fs::write(&raw, &bytes).unwrap();
    let cases: [(&[(&str, &str)], bool); 14] = [
        (&[], false),
        (&[], true),
        (&[("compression_type", "zstd")], true),
        (&[("compat", "0.10")], false),
        (&[("compat", "0.10")], true),
        (&[("cluster_size", "512")], false),
        (&[("cluster_size", "512"), ("refcount_bits", "64")], true),
        (&[("cluster_size", "2M"), ("refcount_bits", "1")], false),
        (&[("cluster_size", "4k"), ("refcount_bits", "1")], true),
        (&[("extended_l2", "on"), ("cluster_size", "16k")], false),
        (&[("extended_l2", "on")], true),
        (&[("preallocation", "metadata")], false),
        (&[("preallocation", "full"), ("extended_l2", "on")], false),
        (&[("preallocation", "falloc"), ("lazy_refcounts", "on")], false),
    ];
    for (index, (options, compress)) in cases.iter().enumerate() {
        let image = dir.path().join(format!("{index}.qcow2"));
        let twin = dir.path().join(format!("{index}-3.qcow2"));
        let back = dir.path().join(format!("{index}.raw"));
        run(&raw, &image, &qcow2(options, *compress, 1));
        run(&raw, &twin, &qcow2(options, *compress, 3));
        assert!(
            std::fs::read(&image).unwrap() == std::fs::read(&twin).unwrap(),
            "{options:?}: threads change the output"
        );
        qemu_img(&["check", "-q", image.to_str().unwrap()]);
        qemu_img(&["compare", "-q", raw.to_str().unwrap(), image.to_str().unwrap()]);
        run(&image, &back, &ConvertOptions::default());
        assert!(std::fs::read(&back).unwrap() == bytes, "{options:?} {compress}");
    }
}

#[test]
fn an_unnamed_image_is_worked_on_beside_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, target) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
    let bytes = sample(1 << 20);
    std::fs::write(&raw, &bytes).unwrap();
    std::fs::write(&target, "old").unwrap();
    let source = [Image::open(&raw, &OpenOptions::default()).unwrap()];
    let options = ConvertOptions::default();
    let to = |path: &Path| convert_unnamed(&source, path, &options, &Monitor::new());
    let names = || std::fs::read_dir(dir.path()).unwrap().count();
    let (_, dropped) = to(&target).unwrap();
    assert_eq!((names(), std::fs::read(dropped.path()).unwrap() == bytes), (3, true));
    drop(dropped);
    assert_eq!((names(), std::fs::read(&target).unwrap()), (2, b"old".to_vec()));

    let (_, fresh) = to(&target).unwrap();
    let file = std::fs::File::options().write(true).open(fresh.path()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"worked on", 0).unwrap();
    fresh.publish(true).unwrap();
    let got = std::fs::read(&target).unwrap();
    assert!(names() == 2 && got.starts_with(b"worked on") && got[9..] == bytes[9..]);

    for (wrong, kind) in [(&raw, Kind::Invalid), (&dir.path().to_owned(), Kind::Unsupported)] {
        assert_eq!(to(wrong).err().unwrap().kind(), kind);
    }
    assert_eq!(names(), 2);
}

/// Its clusters could be freed, and used for something else, between the look at its tables and the read.
#[test]
fn a_source_that_is_open_for_writing_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, disk) = (dir.path().join("a.raw"), dir.path().join("a.qcow2"));
    std::fs::write(&raw, sample(1 << 20)).unwrap();
    run(&raw, &disk, &qcow2(&[], false, 1));
    let open = |writable| [Image::open(&disk, &OpenOptions { writable, ..OpenOptions::default() }).unwrap()];
    let (options, monitor) = (ConvertOptions::default(), Monitor::new());
    let target = dir.path().join("b.raw");
    let source = open(true);
    let errors = [
        convert(&source, target.clone().into(), &options, &monitor).unwrap_err(),
        convert_unnamed(&source, &target, &options, &monitor).err().unwrap(),
    ];
    for error in errors {
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("a.qcow2"), "{error}");
    }
    assert!(!target.exists());
    drop(source);
    convert(&open(false), target.clone().into(), &options, &monitor).unwrap();
    assert!(std::fs::read(&target).unwrap() == sample(1 << 20));
}
