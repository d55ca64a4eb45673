//! `diskmill check` beside `qemu-img check`: a table of damage, made by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use diskmill_testkit::qcow2::{COPIED, ImageBytes};
use diskmill_testkit::{Oracle, Tool, args, scratch};
use serde_json::Value;

const CLUSTER: u64 = 65_536;
/// Past the end of any file here.
const FAR: u64 = 1 << 40;

fn tool() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

/// Data, a compressed cluster, and a snapshot whose second cluster was written since.
fn with_snapshot(q: &Oracle, dir: &Path) -> ImageBytes {
    q.create("base.qcow2", "", 10 << 20);
    q.io(["-c", "write -P 1 0 256k", "-c", "write -c -P 2 1M 64k", "base.qcow2"]).ok();
    q.snapshot("base.qcow2", "s1");
    q.io(["-c", "write -P 3 64k 64k", "base.qcow2"]).ok();
    ImageBytes::read(&dir.join("base.qcow2"))
}

/// The same in other kinds of images.
fn of_kind(q: &Oracle, dir: &Path, options: &str) -> ImageBytes {
    q.create("base.qcow2", options, 10 << 20);
    q.io(["-c", "write -P 1 0 256k", "base.qcow2"]).ok();
    let external = options.contains("data_file");
    if !external {
        q.io(["-c", "write -c -P 2 1M 64k", "base.qcow2"]).ok();
    }
    if !external && !options.contains("refcount_bits=1,") {
        q.snapshot("base.qcow2", "s1");
    }
    q.io(["-c", "write -P 3 64k 64k", "base.qcow2"]).ok();
    ImageBytes::read(&dir.join("base.qcow2"))
}

/// Data and a bitmap that has some bits.
fn with_bitmap(q: &Oracle, dir: &Path) -> ImageBytes {
    q.create("base.qcow2", "", 10 << 20);
    q.img(["bitmap", "--add", "base.qcow2", "the-bitmap"]).ok();
    q.io(["-c", "write -P 1 0 256k", "base.qcow2"]).ok();
    ImageBytes::read(&dir.join("base.qcow2"))
}

/// Two bitmaps.
fn with_two_bitmaps(q: &Oracle, dir: &Path) -> ImageBytes {
    with_bitmap(q, dir);
    q.img(["bitmap", "--add", "base.qcow2", "THE-bitmap"]).ok();
    ImageBytes::read(&dir.join("base.qcow2"))
}

/// What is to become of the image after `-r all`.
#[derive(Clone, Copy, PartialEq, Debug)]
enum After {
    /// No errors, and what it says of the guest's content is unchanged.
    Clean,
    /// The same; under qemu-img `-r leaks` gives free what may be the damaged entry's.
    Mended,
    /// As many errors as qemu-img's repair leaves.
    AsQemu,
    /// Refused, because too much is unknown; qemu-img's repair loses data here.
    Refused,
    /// QEMU cannot open the image; we can, report corruption, and keep what may belong to the damaged bitmap.
    Unopened,
    /// Some of it: what may belong to the damaged table is kept.
    Careful,
}

type Case = (&'static str, fn(&mut ImageBytes), After);

const SNAPSHOT_CASES: &[Case] = &[
    ("nothing", |_| {}, After::Clean),
    ("refcount too high", |d| d.set_refcount(d.l1(), 5), After::Clean),
    ("refcount of data too high", |d| d.set_refcount(d.host(2), 7), After::Clean),
    ("refcount too low", |d| d.set_refcount(d.host(2), 1), After::Clean),
    ("refcount 0 of data", |d| d.set_refcount(d.host(0), 0), After::Clean),
    ("refcount 0 of the header", |d| d.set_refcount(0, 0), After::Clean),
    ("leak", |d| d.0.resize(d.0.len() + 4 * CLUSTER as usize, 7), After::Clean),
    (
        "leak inside",
        |d| {
            let end = d.0.len() as u64;
            d.0.resize(end as usize + 4 * CLUSTER as usize, 7);
            d.set_refcount(end + CLUSTER, 1);
            d.set_refcount(end + 3 * CLUSTER, 9);
        },
        After::Clean,
    ),
    ("two on one cluster", |d| d.put64(d.l2(1), d.host(0)), After::Clean),
    ("data on the L1 table", |d| d.put64(d.l2(1), d.l1()), After::Clean),
    ("data past the end", |d| d.put64(d.l2(1), COPIED | FAR), After::AsQemu),
    ("data at the end", |d| d.put64(d.l2(1), COPIED | d.0.len() as u64), After::AsQemu),
    ("compressed past the end", |d| d.put64(d.l2(16), 1 << 62 | FAR), After::AsQemu),
    ("misaligned data", |d| d.put64(d.l2(1), COPIED | (d.host(0) + 512)), After::AsQemu),
    ("misaligned zero cluster", |d| d.put64(d.l2(1), COPIED | (d.host(0) + 512) | 1), After::Clean),
    ("misaligned L2 table", |d| d.put64(d.l1(), COPIED | (d.l2(0) + 512)), After::Careful),
    ("L2 table past the end", |d| d.put64(d.l1(), COPIED | FAR), After::Careful),
    ("copied flag clear", |d| d.put64(d.l2(1), d.u64(d.l2(1)) ^ COPIED), After::Clean),
    ("copied flag set", |d| d.put64(d.l2(0), d.u64(d.l2(0)) ^ COPIED), After::Clean),
    ("copied flag of the L2 table", |d| d.put64(d.l1(), d.u64(d.l1()) ^ COPIED), After::Clean),
    ("copied flag of a compressed cluster", |d| d.put64(d.l2(16), d.u64(d.l2(16)) | COPIED), After::AsQemu),
    ("reserved bits in L2", |d| d.put64(d.l2(1), d.u64(d.l2(1)) | 2), After::AsQemu),
    ("reserved bits in L1", |d| d.put64(d.l1(), d.u64(d.l1()) | 1), After::AsQemu),
    ("L1 entry of nothing but a flag", |d| d.put64(d.l1(), COPIED), After::Careful),
    ("L1 table past the end", |d| d.put64(40, FAR), After::Careful),
    ("snapshot: L1 misaligned", |d| d.put64(d.snapshots(), d.u64(d.snapshots()) + 512), After::Careful),
    ("snapshot: L1 past the end", |d| d.put64(d.snapshots(), FAR), After::Careful),
    ("snapshot: L1 too large", |d| d.put(d.snapshots() + 8, &0x7fff_ffffu32.to_be_bytes()), After::Careful),
    ("snapshot: L1 empty", |d| d.put(d.snapshots() + 8, &[0; 4]), After::Clean),
    ("snapshot count too high", |d| d.put(60, &3u32.to_be_bytes()), After::Clean),
    ("snapshot count far too high", |d| d.put(60, &70_000u32.to_be_bytes()), After::Clean),
    ("snapshot table misaligned", |d| d.put64(64, d.snapshots() + 512), After::Refused),
    ("snapshot table past the end", |d| d.put64(64, FAR), After::Careful),
    ("snapshot: little extra data", |d| d.put(d.snapshots() + 36, &8u32.to_be_bytes()), After::Clean),
    ("snapshot: much extra data", |d| d.put(d.snapshots() + 36, &2000u32.to_be_bytes()), After::Clean),
    ("snapshot: extra data of its length", |d| lengthen(d, 1000), After::Clean),
    ("snapshot: extra data beyond the limit", |d| lengthen(d, 2000), After::Clean),
    ("snapshot: endless extra data", |d| d.put(d.snapshots() + 36, &u32::MAX.to_be_bytes()), After::Clean),
    ("snapshot table of zeros", |d| d.put(d.snapshots(), &[0; 4096]), After::Careful),
    ("refcount block past the end", |d| d.put64(d.refcount_table(), FAR), After::Clean),
    (
        "refcount block misaligned",
        |d| d.put64(d.refcount_table(), d.u64(d.refcount_table()) + 512),
        After::Clean,
    ),
    (
        "refcount block: reserved bits",
        |d| d.put64(d.refcount_table(), d.u64(d.refcount_table()) | 1),
        After::Clean,
    ),
    ("no refcount block", |d| d.put64(d.refcount_table(), 0), After::Clean),
    ("refcount block twice", |d| d.put64(d.refcount_table() + 8, d.u64(d.refcount_table())), After::Clean),
    ("refcount block on data", |d| d.put64(d.refcount_table() + 8, d.host(0)), After::Clean),
    ("refcount table past the end", |d| d.put64(48, FAR), After::Clean),
    ("refcount table misaligned", |d| d.put64(48, d.refcount_table() + 512), After::Refused),
    ("L1 table misaligned", |d| d.put64(40, d.l1() + 512), After::Refused),
    ("a cluster cut off", |d| d.0.truncate(d.0.len() - CLUSTER as usize), After::AsQemu),
    ("half a cluster cut off", |d| d.0.truncate(d.0.len() - CLUSTER as usize / 2), After::AsQemu),
    ("four clusters cut off", |d| d.0.truncate(d.0.len() - 4 * CLUSTER as usize), After::Careful),
    ("dirty", |d| d.put64(72, d.u64(72) | 1), After::Clean),
    ("corrupt", |d| d.put64(72, d.u64(72) | 2), After::Clean),
    (
        "dirty, with a leak and a low refcount",
        |d| {
            d.put64(72, d.u64(72) | 1);
            d.set_refcount(d.l1(), 3);
            d.set_refcount(d.host(2), 1);
        },
        After::Clean,
    ),
];

/// Gives the snapshot's entry, which is the only one, extra data of `len` bytes.
fn lengthen(d: &mut ImageBytes, len: usize) {
    let extra = d.snapshots() as usize + 40;
    let (old, behind) = (24, d.0[extra + 24..][..64].to_vec());
    d.put(d.snapshots() + 36, &(len as u32).to_be_bytes());
    d.0[extra + old..][..len - old].fill(0xee);
    d.0[extra + len..][..64].copy_from_slice(&behind);
}

/// Where the directory stands, which begins with the entry of the bitmap.
fn bitmap(d: &ImageBytes) -> u64 {
    let extension = d.0.windows(4).position(|at| at == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64;
    d.u64(extension + 24)
}

const BITMAP_CASES: &[Case] = &[
    ("nothing", |_| {}, After::Clean),
    ("bitmap: table misaligned", |d| d.put64(bitmap(d), d.u64(bitmap(d)) + 512), After::Refused),
    ("bitmap: table past the end", |d| d.put64(bitmap(d), FAR), After::Careful),
    ("bitmap: table too large", |d| d.put(bitmap(d) + 8, &0x7fff_ffffu32.to_be_bytes()), After::Refused),
    ("bitmap: granularity", |d| d.put(bitmap(d) + 17, &[40]), After::Refused),
    ("bitmap: data past the end", |d| d.put64(d.u64(bitmap(d)), FAR), After::Careful),
    ("bitmap: data misaligned", |d| d.put64(d.u64(bitmap(d)), 0x5_0200), After::Unopened),
    ("bitmap: reserved bits", |d| d.put64(d.u64(bitmap(d)), 1 << 60), After::Unopened),
    ("bitmaps out of date", |d| d.put64(88, 0), After::Clean),
];

const TWO_BITMAPS_CASES: &[Case] = &[("bitmaps: of one name", rename_bitmap, After::Unopened)];

fn rename_bitmap(d: &mut ImageBytes) {
    let at = d.0.windows(10).position(|at| at == b"THE-bitmap").unwrap();
    d.put(at as u64, b"the");
}

const SUBCLUSTER_CASES: &[Case] = &[
    ("subclusters allocated and zero", |d| d.put64(d.l2(1) + 8, 1 << 32 | 1), After::Clean),
    ("subclusters without a cluster", |d| d.put64(d.l2(40) + 8, 1), After::Clean),
    ("compressed with subclusters", |d| d.put64(d.l2(16) + 8, 1), After::Mended),
    ("bit 0 of an extended entry", |d| d.put64(d.l2(1), d.u64(d.l2(1)) | 1), After::AsQemu),
    (
        "misaligned cluster of zeros",
        |d| {
            d.put64(d.l2(1), COPIED | (d.host(1) + 512));
            d.put64(d.l2(1) + 8, 0xffff_ffff << 32);
        },
        After::Clean,
    ),
];

const EXTERNAL_CASES: &[Case] = &[
    ("compressed", |d| d.put64(d.l2(16), 1 << 62 | 0x7_0000), After::AsQemu),
    ("data past the end of the data file", |d| d.put64(d.l2(40), COPIED | (40 * CLUSTER)), After::Clean),
    ("data at another offset", |d| d.put64(d.l2(1), COPIED | (2 * CLUSTER)), After::Clean),
];

/// Cases that are about something that these images do not have.
fn applies(case: &str, options: &str) -> bool {
    let without = |words: &[&str]| !words.iter().any(|word| case.contains(word));
    let v2 = options.contains("compat=0.10");
    let narrow = options.contains("refcount_bits=1,");
    let external = options.contains("data_file");
    (!v2 || without(&["dirty", "corrupt", "zero cluster", "extra data", "snapshot count too high"]))
        && (!options.contains("extended_l2") || without(&["zero cluster"]))
        && (!(narrow || external) || without(&["snapshot", "too high", "leak inside"]))
        && (!narrow || without(&["two on one", "on the L1", "on data", "block twice"]))
        && (!external
            || without(&[
                "data",
                "compressed",
                "misaligned zero",
                "two on one",
                "low",
                "copied flag set",
                "cut off",
            ]))
}

/// Exit code, JSON and the lines of findings (in any order).
fn verdict(out: &diskmill_testkit::Outcome) -> (Option<i32>, String, Vec<String>) {
    let mut lines: Vec<String> = out
        .err()
        .lines()
        // QEMU ends its warning about bitmaps without a new line.
        .filter_map(|line| line.find("ERROR").or_else(|| line.find("Leaked")).and_then(|at| line.get(at..)))
        .map(str::to_owned)
        .collect();
    lines.sort();
    (out.code, out.out(), lines)
}

fn run_table(name: &str, base: fn(&Oracle, &Path) -> ImageBytes, cases: &[Case]) {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let base = base(&q, dir.path());
    let mut wrong = Vec::new();
    for (case, damage, after) in cases {
        let mut disk = base.clone();
        damage(&mut disk);
        let case = format!("{name}: {case}");
        if let Err(why) = one(&q, dir.path(), &disk, *after) {
            wrong.push(format!("{case}: {why}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

fn run_kind(options: &str, more: &[Case]) {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let base = of_kind(&q, dir.path(), options);
    let mut wrong = Vec::new();
    let cases = SNAPSHOT_CASES.iter().filter(|(case, ..)| applies(case, options)).chain(more);
    for (case, damage, after) in cases {
        let mut disk = base.clone();
        damage(&mut disk);
        if let Err(why) = one(&q, dir.path(), &disk, *after) {
            wrong.push(format!("{options}: {case}: {why}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

fn corruptions(out: &diskmill_testkit::Outcome) -> u64 {
    serde_json::from_str::<Value>(&out.out()).map_or(0, |json| json["corruptions"].as_u64().unwrap_or(0))
}

fn one(q: &Oracle, dir: &Path, disk: &ImageBytes, after: After) -> Result<(), String> {
    let image = dir.join("d.qcow2");
    let fresh = || std::fs::write(&image, &disk.0).unwrap();
    fresh();
    let theirs = q.img(["check", "--output=json", "-f", "qcow2", "d.qcow2"]).run();
    let ours = tool().cmd(["check", "-v", "--output=json", "-f", "qcow2", "d.qcow2"]).dir(dir).run();
    let ensure = |good: bool, what: String| if good { Ok(()) } else { Err(what) };
    ensure(std::fs::read(&image).unwrap() == disk.0, "a check wrote".to_owned())?;
    let (a, b) = (verdict(&ours), verdict(&theirs));
    // What cannot be opened has no report; what is unreadable has one line for each cluster.
    let same = match after {
        After::Unopened => (a.0, b.0) == (Some(2), Some(1)),
        _ => a.0 == b.0 && (a.0 == Some(1) || a == b),
    };
    ensure(same, format!("ours {a:#?}\ntheirs {b:#?}\n{ours}\n{theirs}"))?;

    // Guest content, as far as there is any, must survive the repair.
    let content = |what: &str| {
        let raw = dir.join(what);
        let _ = std::fs::remove_file(&raw);
        let converted =
            q.img(["convert", "-f", "qcow2", "-O", "raw", "d.qcow2"]).arg(&raw).run().code == Some(0);
        converted.then(|| std::fs::read(&raw).unwrap())
    };
    let before = content("before");
    let qemu_left = {
        q.img(["check", "-q", "-r", "all", "d.qcow2"]).run();
        corruptions(&q.img(["check", "--output=json", "d.qcow2"]).run())
    };
    fresh();
    let repaired = tool().cmd(args!["check", "-r", "all", "-q", "d.qcow2"]).dir(dir).run();
    let rest = q.img(["check", "--output=json", "d.qcow2"]).run();
    let after_repair = content("after");
    // What could not be read before may be readable now.
    ensure(before.is_none() || after_repair == before, format!("the guest's content changed\n{repaired}"))?;
    leaks_alone(q, dir, disk, after)?;
    match after {
        After::Clean | After::Mended => {
            ensure(
                repaired.code == Some(0) && rest.code == Some(0),
                format!("not clean: {repaired}\n{rest}"),
            )?;
            // Nothing is left of dirty and corrupt bits either.
            let bits = ImageBytes::read(&image).u64(72);
            ensure(bits & 3 == 0, format!("feature bits {bits:#x}"))
        }
        After::AsQemu => {
            let left = corruptions(&rest);
            ensure(
                left == qemu_left,
                format!("{left} errors are left, and qemu-img leaves {qemu_left}: {repaired}"),
            )
        }
        After::Careful => ensure(
            corruptions(&rest) <= corruptions(&theirs) && repaired.code != Some(0),
            format!("worse than before: {repaired}\n{rest}"),
        ),
        After::Unopened => ensure(
            repaired.code == Some(2) && std::fs::read(&image).unwrap() == disk.0,
            format!("something was changed: {repaired}"),
        ),
        After::Refused => ensure(
            repaired.code == Some(1) && std::fs::read(&image).unwrap() == disk.0,
            format!("not refused: {repaired}"),
        ),
    }
}

/// `-r leaks` leaves what it leaves under qemu-img, where nothing is kept for damaged tables.
fn leaks_alone(q: &Oracle, dir: &Path, disk: &ImageBytes, after: After) -> Result<(), String> {
    if !matches!(after, After::Clean | After::AsQemu) {
        return Ok(());
    }
    let image = dir.join("leaks.qcow2");
    let left = |cmd: diskmill_testkit::Cmd| {
        std::fs::write(&image, &disk.0).unwrap();
        let out = cmd.run();
        let rest = q.img(["check", "--output=json", "-f", "qcow2", "leaks.qcow2"]).run();
        let count = |key: &str| {
            serde_json::from_str::<Value>(&rest.out()).map_or(0, |json| json[key].as_u64().unwrap_or(0))
        };
        (out.code, rest.code, count("corruptions"), count("leaks"), out.to_string())
    };
    let args = ["check", "-r", "leaks", "-f", "qcow2", "leaks.qcow2"];
    let (ours, theirs) = (left(tool().cmd(args).dir(dir)), left(q.img(args)));
    let same = (ours.0, ours.1, ours.2, ours.3) == (theirs.0, theirs.1, theirs.2, theirs.3);
    if same { Ok(()) } else { Err(format!("-r leaks: ours {ours:#?}\ntheirs {theirs:#?}")) }
}

#[test]
fn damage_in_extended_l2_entries() {
    run_kind("extended_l2=on", SUBCLUSTER_CASES);
}

#[test]
fn damage_beside_an_external_data_file() {
    run_kind("data_file=base.data", EXTERNAL_CASES);
}

#[test]
fn damage_of_version_2() {
    run_kind("compat=0.10", &[]);
}

#[test]
fn damage_with_other_refcounts() {
    // With one bit each a cluster counts one reference, whatever else is said to lie on it.
    let long_table: Case = ("refcount table over data", |d| d.put(56, &20u32.to_be_bytes()), After::Clean);
    for bits in ["1,", "64,"] {
        run_kind(&format!("refcount_bits={bits}cluster_size=65536"), &[long_table]);
    }
}

#[test]
fn damage_beside_a_snapshot() {
    run_table("snapshot", with_snapshot, SNAPSHOT_CASES);
}

#[test]
fn damage_of_bitmaps() {
    run_table("bitmap", with_bitmap, BITMAP_CASES);
    run_table("two bitmaps", with_two_bitmaps, TWO_BITMAPS_CASES);
}

#[test]
fn a_raw_data_file_that_is_not_there() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let path = dir.path().join("d.qcow2");
    let mut disk = with_bitmap(&q, dir.path());
    disk.put64(88, disk.u64(88) | 2);
    std::fs::write(&path, &disk.0).unwrap();
    q.img(["check", "d.qcow2"]).fails(1).says(&["data-file-raw"]);
    let check =
        |args: &[&str]| tool().cmd([&["check", "-v", "--json"], args, &["d.qcow2"]].concat()).dir(dir.path());
    for args in [&[][..], &["-r", "leaks"]] {
        let found = check(args).fails(2);
        assert_eq!(found.json()["corruptions"], 1, "{found}");
        found.says(&["data-file-raw"]);
        assert!(std::fs::read(&path).unwrap() == disk.0);
    }
    assert_eq!(check(&["-r", "all"]).ok().json()["corruptions-fixed"], 1);
    disk.put64(88, 1);
    assert!(std::fs::read(&path).unwrap() == disk.0, "only the bit was cleared");
    q.check_clean("d.qcow2");
}

/// Many snapshots whose L1 tables are the largest there can be, side by side in a hole of the file, and a refcount table
/// whose entries all name one block.
#[test]
fn tables_that_overlap_take_no_hours() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    q.create("d.qcow2", "", 1 << 30);
    let mut disk = ImageBytes::read(&dir.path().join("d.qcow2"));
    let table = (disk.0.len() as u64).next_multiple_of(CLUSTER);
    let count = 20_000u32;
    disk.0.resize(table as usize, 0);
    for index in 0..u64::from(count) {
        let mut entry = vec![0; 64];
        entry[..8].copy_from_slice(&(4096 * CLUSTER + index * CLUSTER).to_be_bytes());
        entry[8..12].copy_from_slice(&(4u32 << 20).to_be_bytes());
        entry[13] = 1;
        entry[39] = 16;
        entry[56] = b'1';
        disk.0.extend(entry);
    }
    disk.put(60, &count.to_be_bytes());
    disk.put64(64, table);
    let refcounts = (disk.0.len() as u64).next_multiple_of(CLUSTER);
    disk.0.resize(refcounts as usize, 0);
    disk.0.extend(disk.u64(disk.refcount_table()).to_be_bytes().repeat(1 << 18));
    disk.put64(48, refcounts);
    disk.put(56, &32u32.to_be_bytes());
    let path = dir.path().join("d.qcow2");
    std::fs::write(&path, &disk.0).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(8 << 30).unwrap();
    let limit = std::time::Duration::from_secs(60);
    let out = tool().cmd(["check", "-f", "qcow2", "d.qcow2"]).dir(dir.path()).limit(limit).run();
    assert_eq!(out.code, Some(2), "{out}");
}
