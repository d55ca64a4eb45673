//! Map look-ups, and conversions of small images whose bytes are in the page cache:
//! `cargo bench -p diskmill -- --sample-count 10` is the quick form.
#![allow(clippy::unwrap_used, reason = "benches")]

use std::path::Path;

use diskmill::convert::{Compression, ConvertOptions, Monitor, TargetFormat, convert};
use diskmill::create::{CreateOptions, create};
use diskmill::{Image, OpenOptions};
use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};

/// Bytes of the guest's disk.
const DISK: u64 = 64 << 20;

fn main() {
    divan::main();
}

fn image(path: &Path) -> [Image; 1] {
    [Image::open(path, &OpenOptions::default()).unwrap()]
}

fn options(format: &str, packed: bool) -> ConvertOptions {
    ConvertOptions {
        format: TargetFormat::named(format).unwrap(),
        compress: packed.then(Compression::default),
        ..ConvertOptions::default()
    }
}

fn run(source: &Path, target: &Path, options: &ConvertOptions) {
    convert(&image(source), target.into(), options, &Monitor::default()).unwrap();
}

/// A raw disk: of each 128 KiB, 96 KiB are packable data.
fn raw(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("disk.raw");
    let disk: Vec<u8> = (0..DISK as u32)
        .map(|at| if at % (128 << 10) < (96 << 10) { (at.wrapping_mul(at >> 7) >> 13) as u8 | 1 } else { 0 })
        .collect();
    std::fs::write(&path, disk).unwrap();
    path
}

/// Every extent of a disk, from one end to the other; items are clusters and grains of 64 KiB.
#[divan::bench(args = [("qcow2", false), ("qcow2", true), ("vmdk", false)])]
fn map(bencher: Bencher<'_, '_>, (format, packed): (&str, bool)) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    run(&raw(folder.path()), &path, &options(format, packed));
    bencher.counter(ItemsCount::new(DISK >> 16)).bench_local(|| {
        let [image] = &image(&path);
        let (mut at, mut extents) = (0, 0u64);
        while at < DISK {
            at = image.map(black_box(at), u64::MAX).unwrap().guest.end;
            extents += 1;
        }
        extents
    });
}

/// The qcow2 assembler, which gives each cluster of an empty disk its place and writes the tables; items are clusters.
#[divan::bench]
fn assemble_without_data(bencher: Bencher<'_, '_>) {
    let (folder, size) = (tempfile::tempdir().unwrap(), 64 << 30);
    let path = folder.path().join("disk.qcow2");
    let mut format = TargetFormat::named("qcow2").unwrap();
    format.set("preallocation", "metadata").unwrap();
    let options = CreateOptions { format, size, trust_backing: false };
    bencher.counter(ItemsCount::new(size >> 16)).bench_local(|| create(&path, &options).unwrap());
}

/// Planner, workers, placer and assembler together, on one thread.
#[divan::bench(args = [("raw", false), ("qcow2", false), ("qcow2", true), ("vmdk", false)])]
fn convert_one_thread(bencher: Bencher<'_, '_>, (format, packed): (&str, bool)) {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (raw(folder.path()), folder.path().join("target"));
    let options = ConvertOptions { threads: Some(1), ..options(format, packed) };
    bencher.counter(BytesCount::new(DISK)).bench_local(|| run(&source, &target, &options));
}
