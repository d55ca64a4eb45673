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

/// The header of a qcow2 image of version 3: log2 of the cluster size, size, L1 entries and where they stand, where the
/// refcount table stands, autoclear bits.
fn qcow2_header(cluster_bits: u32, size: u64, l1: (u32, u64), refcounts: u64, autoclear: u64) -> Vec<u8> {
    let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
    header.extend([0; 12]);
    header.extend(cluster_bits.to_be_bytes());
    header.extend(size.to_be_bytes());
    header.extend([0; 4]);
    header.extend(l1.0.to_be_bytes());
    header.extend(l1.1.to_be_bytes());
    header.extend(refcounts.to_be_bytes());
    header.extend(1u32.to_be_bytes());
    header.extend([0; 28]);
    header.extend(autoclear.to_be_bytes());
    header.extend(4u32.to_be_bytes());
    header.extend(104u32.to_be_bytes());
    header
}

/// A disk in which every other cluster of 512 bytes is damaged: `tables` L1 entries that all name one L2 table.
fn damaged_everywhere(path: &Path, tables: u32) -> u64 {
    let l2 = 4096 + u64::from(tables) * 8;
    let file = File::create(path).unwrap();
    let size = u64::from(tables) * 32_768;
    file.write_all_at(&qcow2_header(9, size, (tables, 4096), 512, 0), 0).unwrap();
    file.write_all_at(&1024u64.to_be_bytes(), 512).unwrap();
    file.write_all_at(&(l2 | 1 << 63).to_be_bytes().repeat(tables as usize), 4096).unwrap();
    let pair = [1u64.to_be_bytes(), (1u64 << 50).to_be_bytes()].concat();
    file.write_all_at(&pair.repeat(32), l2).unwrap();
    size
}

#[test]
fn damage_everywhere_takes_little_memory() {
    let dir = scratch();
    let [image, out] = ["d.qcow2", "d.raw"].map(|name| dir.path().join(name));
    let salvage = |source: &Path| {
        let args = args!["convert", "--json", "--memory", "16M", "--salvage", "-O", "raw", source, &out];
        let done = diskmill().cmd(args).limit(Duration::from_secs(60)).fails(3);
        assert!(done.peak_rss < READERS_MEMORY, "{} MiB of memory", done.peak_rss >> 20);
        done.json()
    };
    let size = damaged_everywhere(&image, 1 << 14);
    let json = salvage(&image);
    let listed = json["bad-ranges"].as_array().unwrap();
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let in_list: u64 = listed.iter().map(|range| number(&range["length"])).sum();
    assert_eq!(in_list + number(&json["more-bad-bytes"]), size / 2, "all of it is counted");
    assert_eq!(listed.len() as u64 + number(&json["more-bad-ranges"]), size / 1024);
    assert!(listed.len() < 50_000);

    // The same in qemu-img's words, and where an image that holds something is written into.
    let size = damaged_everywhere(&image, 1 << 9);
    let used = dir.path().join("used.qcow2");
    std::fs::write(dir.path().join("full.raw"), vec![7; size as usize]).unwrap();
    diskmill().cmd(args!["convert", "-O", "qcow2", dir.path().join("full.raw"), &used]).ok();
    let args = args!["convert", "--json", "--salvage", "-n", "-O", "qcow2", &image, &used];
    let json = diskmill().cmd(args).fails(3).json();
    let lost =
        json["bad-ranges"].as_array().unwrap().iter().map(|range| number(&range["length"])).sum::<u64>();
    assert_eq!(lost + number(&json["more-bad-bytes"]), size / 2);
    let said =
        diskmill().cmd(args!["qemu-img", "convert", "--salvage", "-O", "raw", &image, &out]).ok().err();
    assert!(said.lines().count() < 11_000 && said.contains("more places"), "{}", said.lines().count());
}

/// Bitmaps of 512 MiB each, whose table entries all are `entry`.
fn large_bitmaps(path: &Path, count: u32, entry: u64) {
    const TABLE: u64 = 16 << 20;
    let mut directory = Vec::new();
    for index in 0..count {
        directory.extend(TABLE.to_be_bytes());
        directory.extend(8192u32.to_be_bytes());
        directory.extend([0, 0, 0, 0, 1, 16, 0, 2, 0, 0, 0, 0, b'b', b'0' + index as u8, 0, 0, 0, 0, 0, 0]);
    }
    let file = File::create(path).unwrap();
    let mut header = qcow2_header(16, 1 << 48, (1 << 19, 1 << 21), 65_536, 1);
    header.extend(0x2385_2875_0000_0018u64.to_be_bytes());
    header.extend(count.to_be_bytes());
    header.extend([0; 4]);
    header.extend((directory.len() as u64).to_be_bytes());
    header.extend((6u64 << 20).to_be_bytes());
    header.extend([0; 8]);
    file.write_all_at(&header, 0).unwrap();
    file.write_all_at(&(128u64 << 10).to_be_bytes(), 65_536).unwrap();
    file.write_all_at(&directory, 6 << 20).unwrap();
    file.write_all_at(&entry.to_be_bytes().repeat(8192), TABLE).unwrap();
    file.write_all_at(&[0x55; 65_536], TABLE + 65_536).unwrap();
    file.set_len(17 << 20).unwrap();
}

#[test]
fn bitmaps_that_are_carried_over_take_little() {
    let dir = scratch();
    let [image, out] = ["b.qcow2", "out.qcow2"].map(|name| dir.path().join(name));
    let carry =
        || diskmill().cmd(args!["convert", "--memory", "64M", "--bitmaps", "-O", "qcow2", &image, &out]);
    // Bits that are all set.
    large_bitmaps(&image, 6, 1);
    within(carry(), 60, MEMORY / 4);
    assert!(std::fs::metadata(&out).unwrap().blocks() * 512 < 8 << 20);
    let info = diskmill().cmd(args!["info", "--json", &out]).ok().json();
    assert_eq!(info["format-specific"]["data"]["bitmaps"].as_array().unwrap().len(), 6);
    diskmill().cmd(args!["check", &out]).ok();
    // One cluster of bits that stands for all of them.
    large_bitmaps(&image, 6, (16 << 20) + 65_536);
    carry().fails(1).says(&["the bitmaps take more than 2147483648 bytes together"]);
}

/// A sparse VMDK with grains of 64 MiB, packed, of zeros.
fn large_grains(path: &Path, grains: u64) {
    const GRAIN: u64 = 64 << 20;
    let mut header = b"KDMV".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend(0x3_0001u32.to_le_bytes());
    for field in [grains * GRAIN / 512, GRAIN / 512, 0, 0] {
        header.extend(field.to_le_bytes());
    }
    header.extend(512u32.to_le_bytes());
    for field in [0u64, 1, 128] {
        header.extend(field.to_le_bytes());
    }
    header.extend(b"\0\n \r\n\x01\0");
    let mut payload = vec![0x78, 0x9c];
    payload.extend(diskmill_testkit::qcow2::payload::deflate_run(0, GRAIN as usize));
    payload.extend((((GRAIN % 65_521) << 16 | 1) as u32).to_be_bytes());
    let file = File::create(path).unwrap();
    file.write_all_at(&header, 0).unwrap();
    file.write_all_at(&2u32.to_le_bytes(), 512).unwrap();
    let room = (payload.len() as u64 + 12).next_multiple_of(512);
    for index in 0..grains {
        let at = 65_536 + index * room;
        file.write_all_at(&((at / 512) as u32).to_le_bytes(), 1024 + index * 4).unwrap();
        let marker =
            [&(index * GRAIN / 512).to_le_bytes()[..], &(payload.len() as u32).to_le_bytes()].concat();
        file.write_all_at(&[marker, payload.clone()].concat(), at).unwrap();
    }
    file.set_len(65_536 + grains * room).unwrap();
}

#[test]
fn threads_that_compare_large_units_are_few() {
    let dir = scratch();
    let [one, other] = ["a.vmdk", "b.vmdk"].map(|name| dir.path().join(name));
    large_grains(&one, 3);
    large_grains(&other, 3);
    let compare = diskmill().cmd(args!["compare", "--threads", "16", &one, &other]);
    let said = within(compare, 60, MEMORY).out();
    assert!(said.contains("identical"), "{said}");
}
