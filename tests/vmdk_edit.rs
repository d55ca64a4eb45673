//! What qemu-img does with VMDKs that exist, and what it refuses: `check`, `resize`, `commit`; and disks beyond 2 TiB.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[path = "support/pair.rs"]
mod pair;

use std::path::Path;

use diskmill_testkit::content::{Pattern, fill};
use diskmill_testkit::{Oracle, Tool, scratch};
use pair::Pair;

const KINDS: [&str; 5] =
    ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"];

fn tool() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

/// A disk of each kind, named by its kind, and an overlay that is longer.
fn disks(oracle: &Oracle) {
    oracle.img(["create", "-q", "-f", "raw", "a.raw", "3M"]).ok();
    oracle.io(["-f", "raw", "-c", "write -P 1 1M 200k", "a.raw"]).ok();
    for kind in KINDS {
        let (option, name) = (format!("subformat={kind}"), format!("{kind}.vmdk"));
        oracle.img(["convert", "-O", "vmdk", "-o", &option, "a.raw", &name]).ok();
        let overlay = format!("{kind}.qcow2");
        oracle.img(["create", "-q", "-f", "qcow2", "-b", &name, "-F", "vmdk", &overlay, "5M"]).ok();
        oracle.io(["-c", "write -P 2 4M 64k", &overlay]).ok();
    }
}

#[test]
fn kinds_are_checked_and_refused_as_by_qemu_img() {
    let Some(pair) = Pair::new(disks) else { return };
    for kind in KINDS {
        for line in [
            "check X.vmdk",
            "check --output=json X.vmdk",
            "check -q X.vmdk",
            "check -r leaks X.vmdk",
            "check -r all X.vmdk",
            "resize X.vmdk 4M",
            "resize --preallocation=full X.vmdk 4M",
        ] {
            pair.same(&line.replace('X', kind));
        }
        if kind == "streamOptimized" {
            // No guest can write to it here, so less is looked at before it is refused.
            continue;
        }
        pair.same(&format!("resize --shrink {kind}.vmdk 1M"));
        pair.same(&format!("resize {kind}.vmdk 1M"));
        pair.same(&format!("commit {kind}.qcow2"));
        let [before, after] = pair.path(&format!("{kind}.vmdk")).map(|path| std::fs::read(path).unwrap());
        assert!(before == after, "{kind} was changed");
    }
}

/// A monolithicSparse file in memory, with what tests patch.
#[derive(Clone)]
struct Disk(Vec<u8>);

impl Disk {
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
    }

    fn put(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Where the directory stands, or its redundant copy.
    fn directory(&self, redundant: bool) -> usize {
        self.u32(if redundant { 48 } else { 56 }) as usize * 512
    }

    /// Where entry `index` of the first grain table stands, or its redundant copy.
    fn grain(&self, index: usize, redundant: bool) -> usize {
        self.u32(self.directory(redundant)) as usize * 512 + index * 4
    }
}

/// Damage by hand: our exit code and qemu-img's. Ours is never the lesser one.
#[test]
fn damage_is_found() {
    type Damage = fn(&mut Disk);
    const FAR: u32 = 0x0700_0000;
    let cases: &[(&str, Damage, [i32; 2])] = &[
        ("nothing", |_| {}, [0, 0]),
        // The redundant copy of the entry is sound.
        ("grain past the end", |d| d.put(d.grain(16, false), FAR), [2, 1]),
        (
            "grain past the end, twice",
            |d| [false, true].iter().for_each(|&copy| d.put(d.grain(16, copy), FAR)),
            [2, 1],
        ),
        ("two on one grain", |d| d.put(d.grain(16, false), d.u32(d.grain(17, false))), [2, 0]),
        ("table past the end", |d| d.put(d.directory(false), FAR), [2, 0]),
        ("no table", |d| d.put(d.directory(false), 0), [2, 0]),
        ("directory past the end", |d| d.put(56, FAR), [2, 0]),
        ("redundant copy past the end", |d| d.put(d.grain(16, true), FAR), [0, 0]),
        ("a grain cut off", |d| d.0.truncate(d.0.len() - 65_536), [2, 1]),
        ("not closed", |d| d.0[72] = 1, [0, 0]),
    ];
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    disks(&q);
    let path = dir.path().join("monolithicSparse.vmdk");
    let sound = Disk(std::fs::read(&path).unwrap());
    for (case, damage, codes) in cases {
        let mut disk = sound.clone();
        damage(&mut disk);
        let bytes = disk.0;
        std::fs::write(&path, &bytes).unwrap();
        let ours = tool().cmd(["check", "monolithicSparse.vmdk"]).dir(dir.path()).run();
        let theirs = q.img(["check", "monolithicSparse.vmdk"]).run();
        assert_eq!([ours.code, theirs.code], codes.map(Some), "{case}: {ours}\n{theirs}");
        assert_eq!(ours.err().contains("not closed cleanly"), *case == "not closed", "{case}: {ours}");
        let repair = tool().cmd(["check", "-r", "all", "monolithicSparse.vmdk"]).dir(dir.path()).run();
        assert_eq!(repair.code, Some(63), "{case}: {repair}");
        assert!(std::fs::read(&path).unwrap() == bytes, "{case}: a check wrote");
    }
}

/// Only places in the file are sectors of 32 bits; the disk may be larger.
#[test]
fn sparse_disks_may_be_larger_than_their_file_can() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let ours = |words: &[&str]| tool().cmd(words.iter().copied()).dir(dir.path()).ok();
    ours(&["create", "-f", "vmdk", "a.vmdk", "2100G"]);
    q.io(["-c", "write -P 1 0 4k", "-c", "write -P 2 1500G 300k", "-c", "write -P 3 2150399M 1M", "a.vmdk"])
        .ok();
    ours(&["check", "a.vmdk"]);
    ours(&["convert", "-O", "qcow2", "a.vmdk", "b.qcow2"]);
    ours(&["convert", "-O", "vmdk", "b.qcow2", "c.vmdk"]);
    // qemu-img looks at each grain, which takes long.
    q.img(["compare", "b.qcow2", "c.vmdk"]).ok();
    ours(&["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "b.qcow2", "d.vmdk"]);
    ours(&["compare", "a.vmdk", "d.vmdk"]);
    write(&dir.path().join("c.vmdk"), 2_060 << 30);
    q.io(["-c", "read -P 3 2150399M 1M", "c.vmdk"]).ok();
    let part = "driver=raw,offset=2211908157440,size=204800,file.driver=vmdk,file.file.filename=c.vmdk";
    q.img(["convert", "--image-opts", part, "-O", "raw", "part.raw"]).ok();
    assert!(std::fs::read(dir.path().join("part.raw")).unwrap() == fill(Pattern::Random, 9, 200 << 10));
    // The limit of the directory, as QEMU has it.
    let refused = tool().cmd(["create", "-f", "vmdk", "e.vmdk", "1025T"]).dir(dir.path()).run();
    assert!(refused.code == Some(1) && refused.err().contains("grain directory entries"), "{refused}");
}

/// A commit changes the base's CID. The delta shows the same disk as before and follows it.
#[test]
fn a_delta_can_be_read_after_its_commit() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    for [base, delta] in
        [["monolithicSparse", "monolithicSparse"], ["monolithicFlat", "twoGbMaxExtentSparse"]]
    {
        let kind = |name: &str| format!("subformat={name}");
        q.img(["create", "-q", "-f", "vmdk", "-o", &kind(base), "base.vmdk", "2M"]).ok();
        q.io(["-c", "write -P 1 0 1M", "base.vmdk"]).ok();
        q.img([
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            &kind(delta),
            "-b",
            "base.vmdk",
            "-F",
            "vmdk",
            "delta.vmdk",
        ])
        .ok();
        q.io(["-c", "write -P 2 64k 64k", "delta.vmdk"]).ok();
        let ours = |words: &[&str]| tool().cmd(words.iter().copied()).dir(dir.path()).ok();
        ours(&["convert", "delta.vmdk", "before.raw"]);
        ours(&["commit", "delta.vmdk"]);
        for disk in ["delta.vmdk", "base.vmdk"] {
            ours(&["compare", disk, "before.raw"]);
            q.img(["compare", disk, "before.raw"]).ok();
        }
    }
}

fn write(path: &Path, at: u64) {
    let options = diskmill::OpenOptions { writable: true, ..diskmill::OpenOptions::default() };
    let image = diskmill::Image::open(path, &options).unwrap();
    image.write_at(&fill(Pattern::Random, 9, 200 << 10), at).unwrap();
    image.close().unwrap();
}
