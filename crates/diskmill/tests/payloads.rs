//! Compressed clusters that `commit` and `rebase` take over: the payloads that QEMU made are found again, byte for byte.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use diskmill::convert::{Monitor, TargetFormat};
use diskmill::create::{CreateOptions, create};
use diskmill::edit::{Commit, CommitOptions, Rebase, RebaseMode, ZeroHow};
use diskmill::{Allow, Image, Kind, OpenOptions, OpenPolicy, Source};
use diskmill_testkit::content::disk;
use diskmill_testkit::{Oracle, same, scratch};

const SIZE: usize = 6 << 20;

fn options() -> OpenOptions {
    let policy = OpenPolicy { allow: Allow::OwnTree, ..OpenPolicy::default() };
    OpenOptions { policy, ..OpenOptions::default() }
}

fn content(path: &Path) -> Vec<u8> {
    let image = Image::open(path, &options()).unwrap();
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The payloads of the image's chain, by their guest offsets. Tables tell lengths in sectors: what may belong to the next
/// payload is cut off.
fn payloads(path: &Path) -> BTreeMap<u64, Vec<u8>> {
    let image = Image::open(path, &options()).unwrap();
    let mut found = BTreeMap::new();
    for extent in image.extents(0..image.size()) {
        let extent = extent.unwrap();
        if let Source::Packed { file, at, len, .. } = extent.source {
            let bytes = fs::read(&image.files()[file.0 as usize].path).unwrap();
            let (at, len) = (usize::try_from(at.get()).unwrap(), len as usize);
            found.insert(extent.guest.start, bytes[at..at + len.saturating_sub(511).max(8)].to_vec());
        }
    }
    found
}

/// How many payloads of `one` are in `other` at the same guest offset.
fn taken_over(one: &BTreeMap<u64, Vec<u8>>, other: &BTreeMap<u64, Vec<u8>>) -> usize {
    let alike = |(at, payload): &(&u64, &Vec<u8>)| {
        let common =
            other.get(at).map_or(0, |there| there.iter().zip(*payload).take_while(|(a, b)| a == b).count());
        common > 0 && common + 511 >= payload.len()
    };
    one.iter().filter(alike).count()
}

/// What the overlay has: text, zeros, and what does not pack.
const CHANGED: [(u64, usize); 2] = [(1 << 20, 2 << 20), (5 << 20, 512 << 10)];

/// A base and an overlay, both compressed by QEMU with these options.
fn chain(oracle: &Oracle, base: &str, overlay: &str) {
    let dir = oracle.dir();
    fs::write(dir.join("base.raw"), disk(1, SIZE)).unwrap();
    oracle.img(["convert", "-c", "-O", "qcow2", "-o", base, "base.raw", "base.qcow2"]).ok();
    oracle.create_over("overlay.qcow2", overlay, SIZE as u64, ("base.qcow2", "qcow2"));
    for (seed, (at, len)) in CHANGED.into_iter().enumerate() {
        fs::write(dir.join("pattern"), disk(2 + seed as u64, len)).unwrap();
        let write = format!("write -q -c -s pattern {at} {len}");
        oracle.io(["-f", "qcow2", "-c", &write, "overlay.qcow2"]).ok();
    }
    oracle.img(["convert", "-O", "raw", "overlay.qcow2", "want.raw"]).ok();
}

fn rebased(dir: &Path) -> Result<(), diskmill::Error> {
    let mut rebase = Rebase::open(dir.join("overlay.qcow2"), &options(), RebaseMode::Safe)?;
    rebase.compress()?;
    rebase.run(&Monitor::new())
}

fn committed(dir: &Path) -> Result<(), diskmill::Error> {
    let options = CommitOptions { open: options(), ..CommitOptions::default() };
    Commit::open(dir.join("overlay.qcow2"), &options)?.run(&Monitor::new())
}

/// Options of base and overlay, and whether the clusters of the one can be those of the other.
const CHAINS: [(&str, &str, bool); 5] = [
    ("cluster_size=64k", "cluster_size=64k", true),
    ("cluster_size=64k,compression_type=zstd", "cluster_size=64k,compression_type=zstd", true),
    ("compat=0.10", "extended_l2=on", true),
    ("cluster_size=32k", "cluster_size=64k", false),
    ("compression_type=zstd", "compression_type=zlib", false),
];

#[test]
fn rebase_takes_payloads_over() {
    let dir = scratch();
    let dir = dir.path();
    let Some(oracle) = Oracle::find(dir) else { return };
    for (base, overlay, fits) in CHAINS {
        chain(&oracle, base, overlay);
        let (want, before) = (content(&dir.join("overlay.qcow2")), payloads(&dir.join("overlay.qcow2")));
        assert!(before.len() > 40, "{}", before.len());
        rebased(dir).unwrap();
        fs::remove_file(dir.join("base.qcow2")).unwrap();
        same(&content(&dir.join("overlay.qcow2")), &want, base);
        let after = payloads(&dir.join("overlay.qcow2"));
        let missed = before.len() - taken_over(&before, &after);
        assert_eq!(missed == 0, fits, "{base}: {missed} of {}", before.len());
        oracle.img(["check", "-q", "overlay.qcow2"]).ok();
        oracle.img(["compare", "-q", "want.raw", "overlay.qcow2"]).ok();
    }
}

#[test]
fn commit_takes_payloads_over() {
    let dir = scratch();
    let dir = dir.path();
    let Some(oracle) = Oracle::find(dir) else { return };
    for (base, overlay, fits) in CHAINS {
        chain(&oracle, base, overlay);
        let (want, before) = (content(&dir.join("overlay.qcow2")), payloads(&dir.join("overlay.qcow2")));
        committed(dir).unwrap();
        same(&content(&dir.join("base.qcow2")), &want, base);
        let after = payloads(&dir.join("base.qcow2"));
        let missed = before.len() - taken_over(&before, &after);
        assert_eq!(missed == 0, fits, "{base}: {missed} of {}", before.len());
        oracle.img(["check", "-q", "base.qcow2"]).ok();
        oracle.img(["compare", "-q", "want.raw", "base.qcow2"]).ok();
    }
}

#[test]
fn a_damaged_payload_is_not_taken_over() {
    let dir = scratch();
    let dir = dir.path();
    let Some(oracle) = Oracle::find(dir) else { return };
    for damage in ["base.qcow2", "overlay.qcow2"] {
        chain(&oracle, "cluster_size=64k", "cluster_size=64k");
        let image = Image::open(dir.join("overlay.qcow2"), &options()).unwrap();
        let depth = u32::from(damage == "base.qcow2");
        let packed =
            image.extents(0..image.size()).map(Result::unwrap).filter_map(|extent| match extent.source {
                Source::Packed { at, .. } if u32::from(extent.depth) == depth => Some(at.get()),
                _ => None,
            });
        let at = usize::try_from(packed.last().unwrap()).unwrap();
        drop(image);
        let mut bytes = fs::read(dir.join(damage)).unwrap();
        bytes[at..at + 32].fill(0xff);
        fs::write(dir.join(damage), &bytes).unwrap();
        let before = fs::read(dir.join("overlay.qcow2")).unwrap();
        let error = if damage == "base.qcow2" { rebased(dir) } else { committed(dir) }.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        let backing = Image::open(dir.join("overlay.qcow2"), &options()).unwrap();
        assert_eq!(backing.info().backing_name.as_deref(), Some("base.qcow2"));
        if damage == "overlay.qcow2" {
            assert!(fs::read(dir.join("overlay.qcow2")).unwrap() == before, "the overlay is as it was");
        }
    }
}

#[test]
fn a_payload_in_the_place_of_another_is_read_itself() {
    const CLUSTER: usize = 64 << 10;
    let dir = scratch();
    let path = dir.path().join("disk.qcow2");
    let format = TargetFormat::named("qcow2").unwrap();
    create(&path, &CreateOptions { format, size: 1 << 20, trust_backing: false }).unwrap();
    let image = Image::open(&path, &OpenOptions { writable: true, ..OpenOptions::default() }).unwrap();
    let mut reader = image.reader();
    let mut places = Vec::new();
    for pattern in [1, 2] {
        image.write_zeroes(0, CLUSTER as u64, ZeroHow::MayUnmap).unwrap();
        image.flush().unwrap();
        image.write_compressed(&[pattern; CLUSTER], 0).unwrap();
        image.flush().unwrap();
        places.push(image.map(0, CLUSTER as u64).unwrap().source);
        let mut bytes = vec![0; CLUSTER];
        image.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == [pattern; CLUSTER], "payload {pattern}, read by the image");
        reader.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == [pattern; CLUSTER], "payload {pattern}, read by a reader");
    }
    assert_eq!(places[0], places[1], "the test is of payloads in one place");
    // A part of a packed cluster is written with all the rest of it.
    image.write_at(b"!", 100).unwrap();
    image.close().unwrap();
    let mut want = vec![2; CLUSTER];
    want[100] = b'!';
    assert!(content(&path)[..CLUSTER] == want);
}
