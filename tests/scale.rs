//! Huge sparse images: seconds of time and a bounded amount of memory, whatever the virtual size.
//!
//! The limits are for an unoptimised build on a busy machine of two processors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Duration;

use diskmill_testkit::content::{Pattern, Rng, fill};
use diskmill_testkit::{Cmd, Outcome, TempDir, Tool, args, scratch, skip};

const TIB: u64 = 1 << 40;
const MEMORY: u64 = 300 << 20;
/// Of a command that reads tables piece by piece.
const READERS_MEMORY: u64 = 64 << 20;

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

/// Runs it and panics unless it was quick and small.
fn bounded(cmd: Cmd, seconds: u64) -> Outcome {
    within(cmd, seconds, MEMORY)
}

/// Runs it and panics unless it took at most so many seconds and bytes of memory.
fn within(cmd: Cmd, seconds: u64, memory: u64) -> Outcome {
    let out = cmd.limit(Duration::from_secs(seconds)).ok();
    assert!(out.peak_rss < memory, "{} MiB of memory: {out}", out.peak_rss >> 20);
    out
}

/// A file of `size` bytes with `extents` short stretches of data, the last of them at the very end.
/// `None` where the file system cannot hold it.
fn sparse(path: &Path, size: u64, extents: u64) -> Option<Vec<(u64, Vec<u8>)>> {
    let file = File::create(path).unwrap();
    if let Err(e) = file.set_len(size) {
        skip(&format!("no file of {} TiB in {}: {e}", size / TIB, path.display()));
        return None;
    }
    let mut rng = Rng::new(size);
    let mut written = Vec::new();
    for i in 0..extents {
        let stride = size / extents;
        let at = if i + 1 == extents {
            size - 4096
        } else {
            (i * stride + rng.next_u64() % (stride / 2)) / 512 * 512
        };
        let bytes = fill(Pattern::Random, i, 512 * (1 + rng.below(8)));
        file.write_all_at(&bytes, at).unwrap();
        written.push((at, bytes));
    }
    Some(written)
}

fn holds(path: &Path, size: u64, extents: &[(u64, Vec<u8>)]) {
    let file = File::open(path).unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), size);
    // The rest must be holes: 128 KiB for each extent is generous.
    let limit = extents.len() as u64 * (128 << 10) + (1 << 20);
    assert!(meta.blocks() * 512 < limit, "{} bytes on disk", meta.blocks() * 512);
    for (at, want) in extents {
        let mut got = vec![0; want.len()];
        file.read_exact_at(&mut got, *at).unwrap();
        assert!(got == *want, "extent at {at:#x}");
    }
}

fn there_and_back(dir: &Path, size: u64, extents: u64, options: &str) {
    let [source, image, back] = ["in.raw", "image.qcow2", "back.raw"].map(|n| dir.join(n));
    let Some(written) = sparse(&source, size, extents) else { return };
    let convert = args!["convert", "-f", "raw", "-O", "qcow2", "-o", options, source, image];
    bounded(diskmill().cmd(convert), 60);
    bounded(diskmill().cmd(args!["convert", "-f", "qcow2", "-O", "raw", image, back]), 60);
    holds(&back, size, &written);
    bounded(diskmill().cmd(args!["compare", "-f", "raw", "-F", "raw", source, back]), 60);
    bounded(diskmill().cmd(args!["compare", "-f", "raw", "-F", "qcow2", source, image]), 60);
    bounded(diskmill().cmd(args!["map", "--output", "json", "-f", "qcow2", image]), 60);

    // One byte differs, far out.
    let (at, bytes) = &written[written.len() - 2];
    let file = File::options().write(true).open(&back).unwrap();
    file.write_all_at(&[!bytes[0]], *at).unwrap();
    let out = diskmill().cmd(args!["compare", "-f", "raw", "-F", "raw", source, back]).fails(1);
    assert_eq!(out.out(), format!("Content mismatch at offset {at}!\n"));
}

/// A folder on an ext4, xfs or similar file system, not on tmpfs.
fn on_disk() -> TempDir {
    scratch()
}

fn on_tmpfs() -> Option<TempDir> {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        skip("no /dev/shm");
        return None;
    }
    Some(tempfile::tempdir_in(shm).unwrap())
}

#[test]
fn fifteen_tib_with_a_thousand_extents() {
    let dir = on_disk();
    there_and_back(dir.path(), 15 * TIB, 1000, "cluster_size=2M");
}

#[test]
fn fifteen_tib_in_default_clusters() {
    let dir = on_disk();
    there_and_back(dir.path(), 15 * TIB, 1000, "cluster_size=64k");
}

#[test]
fn sixty_four_tib_on_tmpfs() {
    if let Some(dir) = on_tmpfs() {
        there_and_back(dir.path(), 64 * TIB, 1000, "cluster_size=2M");
    }
}

#[test]
fn sixty_four_tib_in_default_clusters_on_tmpfs() {
    if let Some(dir) = on_tmpfs() {
        there_and_back(dir.path(), 64 * TIB, 200, "cluster_size=64k");
    }
}

/// What is asked of an image without changing it, for an image that shows the same disk as `source`.
fn looks(source: &Path, image: &Path, format: &str) {
    let json = |args: &[OsString]| within(diskmill().cmd(args), 60, READERS_MEMORY).json();
    let size = std::fs::metadata(source).unwrap().len();
    assert_eq!(json(&args!["info", "--output", "json", image])["virtual-size"], size);
    let map = json(&args!["map", "--output", "json", image]);
    let last = map.as_array().unwrap().last().unwrap();
    assert_eq!(last["start"].as_u64().unwrap() + last["length"].as_u64().unwrap(), size);
    let check = json(&args!["check", "--output", "json", image]);
    assert_eq!((&check["check-errors"], &check["format"]), (&0.into(), &format.into()), "{check}");
    let measured = json(&args!["measure", "--output", "json", "-O", "qcow2", image]);
    assert!(measured["required"].as_u64().unwrap() < size >> 10, "{measured}");
    let same = within(diskmill().cmd(args!["compare", "-f", "raw", source, image]), 60, READERS_MEMORY);
    assert_eq!(same.out(), "Images are identical.\n");
}

/// The largest disks that L1 tables of 32 MiB, QEMU's limit, have room for.
#[test]
fn the_largest_l1_tables() {
    let dir = on_disk();
    for (cluster_size, size) in [(4096, 8 * TIB), (512, TIB / 8)] {
        let [source, image, none] = ["in.raw", "image.qcow2", "none.qcow2"].map(|name| dir.path().join(name));
        if sparse(&source, size, 100).is_none() {
            return;
        }
        let options = format!("cluster_size={cluster_size}");
        let convert =
            args!["convert", "-f", "raw", "-O", "qcow2", "--memory", "2M", "-o", &options, source, image];
        // The table, and the bytes of it that are written.
        within(diskmill().cmd(convert), 60, 110 << 20);
        looks(&source, &image, "qcow2");

        let create = |size: u64| {
            let size = size.to_string();
            diskmill().cmd(args!["create", "--force", "-q", "-f", "qcow2", "-o", &options, none, &size])
        };
        within(create(size), 60, 110 << 20);
        create(size + cluster_size).fails(1).says(&["L1 table", "cluster_size"]);
    }
}

#[test]
fn an_empty_disk_takes_no_longer_for_being_huge() {
    let dir = on_disk();
    for line in [
        "create -o cluster_size=2M a.qcow2 1E",
        "create -o cluster_size=2M -u -b gone -F raw b.qcow2 1E",
        "create a.vmdk 60T",
        "convert -f raw -O qcow2 -o cluster_size=2M huge.raw c.qcow2",
    ] {
        if line.starts_with("convert") {
            // Few file systems take such a file.
            let Some(tmpfs) = on_tmpfs() else { return };
            File::create(tmpfs.path().join("huge.raw")).unwrap().set_len(1 << 60).unwrap();
            bounded(diskmill().cmd(line.split(' ')).dir(tmpfs.path()), 5);
        } else {
            bounded(diskmill().cmd(line.split(' ')).dir(dir.path()), 5);
        }
    }
}

#[test]
fn a_sparse_vmdk_of_more_than_2_tib() {
    let dir = on_disk();
    let [source, image, back] = ["in.raw", "image.vmdk", "back.raw"].map(|name| dir.path().join(name));
    let size = 5 * TIB / 2;
    let Some(written) = sparse(&source, size, 100) else { return };
    within(diskmill().cmd(args!["convert", "-f", "raw", "-O", "vmdk", source, image]), 60, READERS_MEMORY);
    looks(&source, &image, "vmdk");
    within(diskmill().cmd(args!["convert", image, back]), 60, READERS_MEMORY);
    holds(&back, size, &written);
}

#[test]
fn a_hundred_empty_gib_take_less_than_a_second() {
    let dir = scratch();
    let dir = dir.path();
    File::create(dir.join("in.raw")).unwrap().set_len(100 << 30).unwrap();
    for (from, to, source, target) in [
        ("raw", "qcow2", "in.raw", "a.qcow2"),
        ("qcow2", "raw", "a.qcow2", "b.raw"),
        ("qcow2", "qcow2", "a.qcow2", "b.qcow2"),
    ] {
        let cmd = diskmill().cmd(["convert", "-f", from, "-O", to, source, target]);
        let out = bounded(cmd.dir(dir), 10);
        assert!(out.wall < Duration::from_secs(1), "{:?}: {out}", out.wall);
    }
    assert_eq!(std::fs::metadata(dir.join("b.raw")).unwrap().len(), 100 << 30);
    let out = bounded(diskmill().cmd(["compare", "in.raw", "b.qcow2"]).dir(dir), 10);
    assert!(out.wall < Duration::from_secs(1), "{:?}: {out}", out.wall);
}

#[test]
fn memory_stays_bounded_with_much_data_and_little_memory() {
    let dir = scratch();
    let dir = dir.path();
    // 400 MiB that must pass through 32 MiB.
    let file = File::create(dir.join("in.raw")).unwrap();
    let block = fill(Pattern::Text, 1, 4 << 20);
    for i in 0..100 {
        file.write_all_at(&block, i * block.len() as u64).unwrap();
    }
    for options in [&["-c"][..], &[]] {
        let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2", "--memory", "32M"]);
        let cmd = cmd.args(["--threads", "8"]).args(options).args(["in.raw", "out.qcow2"]);
        let out = bounded(cmd.dir(dir), 120);
        assert!(out.peak_rss < 128 << 20, "{} MiB: {out}", out.peak_rss >> 20);
        let compare = ["compare", "-f", "raw", "-F", "qcow2", "in.raw", "out.qcow2"];
        let same = diskmill().cmd(compare).dir(dir).ok();
        assert_eq!(same.out(), "Images are identical.\n");
    }
}
