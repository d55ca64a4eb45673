//! The library converts there and back, and qemu-img agrees where it is installed.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::Command;

use diskmill::convert::{Compression, ConvertOptions, Monitor, TargetFormat, convert};
use diskmill::{Image, OpenOptions};

/// Compressible text, noise and holes, with an odd tail.
fn sample(len: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252u64;
    (0..len)
        .map(|at| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match at >> 14 & 7 {
                0 | 1 => b"all work and no play "[at % 21],
                2 => state as u8,
                3 if at % 5000 == 0 => 1,
                _ => 0,
            }
        })
        .collect()
}

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
