//! Persistent bitmaps: the same marks as QEMU sets, and what a power failure leaves of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use diskmill::check::{CheckOptions, check_storage};
use diskmill::convert::{CarryBitmaps, ConvertOptions, Monitor, TargetFormat, convert};
use diskmill::create::{CreateOptions, create};
use diskmill::edit::ZeroHow;
use diskmill::{Image, OpenOptions};
use diskmill_io::{FaultyStorage, MemoryStorage, SharedStorage, Storage};
use diskmill_testkit::{Oracle, scratch};

const SIZE: u64 = 3 << 20;
const LIMIT: u64 = 64 << 20;

fn writable() -> OpenOptions {
    OpenOptions { writable: true, ..OpenOptions::default() }
}

/// A bitmap: name, enabled, in use, and what it marks if that can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    name: String,
    enabled: bool,
    in_use: bool,
    marks: Option<Vec<Range<u64>>>,
}

fn seen(image: &Image) -> Vec<Seen> {
    let one = |bitmap: diskmill::qcow2::Bitmap| {
        let name = String::from_utf8(bitmap.name).unwrap();
        let marks = match bitmap.in_use {
            true => None,
            false => Some(image.dirty_bits(&name).unwrap().ranges().collect()),
        };
        Seen { name, enabled: bitmap.auto, in_use: bitmap.in_use, marks }
    };
    image.bitmaps().unwrap().into_iter().map(one).collect()
}

fn read(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.size() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[derive(Debug, Clone, Copy)]
enum Act {
    Add(&'static str, u64, bool),
    Remove(&'static str),
    Clear(&'static str),
    Enable(&'static str, bool),
    /// The first one gets the marks of the second one.
    Merge(&'static str, &'static str),
    Write(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
}

impl Act {
    fn run(self, mut image: Image) {
        match self {
            Self::Add(name, granularity, enabled) => {
                image.add_bitmap(name, Some(granularity), enabled).unwrap();
            }
            Self::Remove(name) => image.remove_bitmap(name).unwrap(),
            Self::Clear(name) => image.clear_bitmap(name).unwrap(),
            Self::Enable(name, enabled) => image.enable_bitmap(name, enabled).unwrap(),
            Self::Merge(to, from) => {
                let bits = image.dirty_bits(from).unwrap();
                image.merge_bitmap(to, &bits).unwrap();
            }
            Self::Write(at, len) => {
                image.write_at(&vec![at as u8 | 1; len as usize], at).unwrap();
                // A flush makes the data durable, not the bitmaps.
                image.flush().unwrap();
                image.write_at(&[9; 512], at / 2).unwrap();
            }
            Self::Zero(at, len) => image.write_zeroes(at, len, ZeroHow::MayUnmap).unwrap(),
            Self::Discard(at, len) => image.discard(at, len).unwrap(),
        }
        image.close().unwrap();
    }

    /// What it asks of QEMU, which has no bitmaps of its own here but those of the image.
    fn run_by_qemu(self, q: &Oracle, image: &str) {
        let bitmap = |args: &[&str]| q.img(["bitmap"].iter().chain(args)).ok();
        let io = |command: String| q.io(["-d", "unmap", "-c", &command, image]).ok();
        match self {
            Self::Add(name, granularity, enabled) => {
                let granularity = granularity.to_string();
                let mut args = vec!["--add", "-g", &granularity];
                args.extend((!enabled).then_some("--disable"));
                bitmap(&[&args[..], &[image, name]].concat())
            }
            Self::Remove(name) => bitmap(&["--remove", image, name]),
            Self::Clear(name) => bitmap(&["--clear", image, name]),
            Self::Enable(name, true) => bitmap(&["--enable", image, name]),
            Self::Enable(name, false) => bitmap(&["--disable", image, name]),
            Self::Merge(to, from) => bitmap(&["--merge", from, image, to]),
            Self::Write(at, len) => {
                io(format!("write -P {} {at} {len}", at as u8 | 1));
                io(format!("write -P 9 {} 512", at / 2))
            }
            Self::Zero(at, len) => io(format!("write -z -u {at} {len}")),
            Self::Discard(at, len) => io(format!("discard {at} {len}")),
        };
    }
}

const HISTORY: [Act; 22] = [
    Act::Write(0, 70_000 / 512 * 512),
    Act::Add("first", 65_536, true),
    Act::Write(1 << 20, 512),
    Act::Add("fine", 512, true),
    Act::Write(1_048_576 + 4096, 300 << 10),
    Act::Add("off", 4096, false),
    Act::Zero(1024, 200 << 10),
    Act::Merge("off", "fine"),
    Act::Clear("first"),
    Act::Write(2 << 20, 4096),
    Act::Enable("fine", false),
    Act::Discard(1 << 20, 512 << 10),
    Act::Merge("fine", "first"),
    Act::Enable("off", true),
    Act::Merge("off", "off"),
    Act::Write(2_359_296, 1024),
    Act::Remove("first"),
    Act::Add("a rather long name that goes on and on and on, so that entries are not alike", 1 << 31, true),
    Act::Write(0, 512),
    Act::Remove("fine"),
    Act::Remove("off"),
    Act::Remove("a rather long name that goes on and on and on, so that entries are not alike"),
];

#[test]
fn the_same_marks_as_qemu() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let data = ",data_file=data.raw,data_file_raw=on";
    for options in ["cluster_size=512", "cluster_size=4096", "", "extended_l2=on", data] {
        let make = |name: &str| {
            q.create(name, &options.replace("data.raw", &format!("{name}.raw")).replacen(',', "", 1), SIZE);
        };
        if options == data || options.is_empty() {
            make("ours.qcow2");
            make("theirs.qcow2");
        } else {
            q.create("ours.qcow2", options, SIZE);
            q.create("theirs.qcow2", options, SIZE);
        }
        let open = |name: &str, options: OpenOptions| {
            let policy = diskmill::OpenPolicy { allow: diskmill::Allow::OwnTree, paths: Vec::new() };
            Image::open(dir.path().join(name), &OpenOptions { policy, ..options }).unwrap()
        };
        for act in HISTORY {
            act.run(open("ours.qcow2", writable()));
            act.run_by_qemu(&q, "theirs.qcow2");
            let [ours, theirs] =
                ["ours.qcow2", "theirs.qcow2"].map(|name| seen(&open(name, OpenOptions::default())));
            assert_eq!(ours, theirs, "{options}: {act:?}");
            q.check_clean("ours.qcow2");
        }
    }
}

#[test]
fn both_write_into_one_image_in_turn() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    q.create("both.qcow2", "", SIZE);
    q.create("theirs.qcow2", "", SIZE);
    let open = |name: &str| Image::open(dir.path().join(name), &OpenOptions::default()).unwrap();
    for (turn, act) in HISTORY.into_iter().enumerate() {
        match turn % 3 {
            0 => act.run_by_qemu(&q, "both.qcow2"),
            _ => act.run(Image::open(dir.path().join("both.qcow2"), &writable()).unwrap()),
        }
        act.run_by_qemu(&q, "theirs.qcow2");
        assert_eq!(seen(&open("both.qcow2")), seen(&open("theirs.qcow2")), "{act:?}");
        q.check_clean("both.qcow2");
    }
}

fn memory(bytes: Vec<u8>) -> SharedStorage {
    Arc::new(MemoryStorage::with_bytes(bytes, LIMIT))
}

fn open(storage: SharedStorage, options: &OpenOptions) -> Image {
    Image::from_storage(storage, "a.qcow2", options).unwrap()
}

/// All the bytes that a storage has.
fn bytes(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    assert_eq!(storage.read_at(&mut bytes, 0).unwrap(), bytes.len());
    bytes
}

/// What is wrong with a state that a power failure left, if anything is.
fn judge(state: &[u8], before: &(Vec<Seen>, Vec<u8>), after: &(Vec<Seen>, Vec<u8>)) -> Result<(), String> {
    let storage = memory(state.to_vec());
    let report = check_storage(&*storage, &CheckOptions::default(), &mut |_, _| {})
        .map_err(|error| error.to_string())?;
    if report.corruptions > 0 || report.check_errors > 0 {
        return Err(format!("{report:?}"));
    }
    let image = open(storage, &OpenOptions::default());
    let (bitmaps, content) = (seen(&image), read(&image));
    // While there is no other bitmap, the header has no extension: adding the first and removing the last one goes
    // by way of none.
    if bitmaps.is_empty() && (before.0.is_empty() || after.0.is_empty()) {
        return Ok(());
    }
    let unmarked = |seen: &Seen| (seen.name.clone(), seen.enabled);
    let names = |all: &[Seen]| all.iter().map(unmarked).collect::<Vec<_>>();
    if names(&bitmaps) != names(&before.0) && names(&bitmaps) != names(&after.0) {
        return Err(format!(
            "{bitmaps:?} is neither {before:?} nor {after:?}",
            before = before.0,
            after = after.0
        ));
    }
    for bitmap in &bitmaps {
        let Some(marks) = &bitmap.marks else { continue };
        let known = before.0.iter().chain(&after.0).any(|seen| seen == bitmap);
        if !known {
            return Err(format!("{bitmap:?} is none that there was"));
        }
        // What changed is marked.
        let hidden = |at: &u64| {
            !marks.iter().any(|range| range.contains(at)) && before.1[*at as usize] != content[*at as usize]
        };
        if bitmap.enabled
            && let Some(at) = (0..SIZE).step_by(512).find(hidden)
        {
            return Err(format!("guest offset {at} changed, and {bitmap:?} does not say so"));
        }
    }
    Ok(())
}

#[test]
fn power_failures_leave_old_or_new_bitmaps() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let most: usize = std::env::var("CRASH_STATES").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    let mut count = 0u64;
    for options in ["cluster_size=512", "cluster_size=4096", "", "refcount_bits=1"] {
        q.create("a.qcow2", options, SIZE);
        let mut now = std::fs::read(dir.path().join("a.qcow2")).unwrap();
        for (turn, act) in HISTORY.into_iter().enumerate() {
            let faulty = Arc::new(FaultyStorage::new(memory(now.clone())));
            faulty.start_journal().unwrap();
            act.run(open(Arc::clone(&faulty) as SharedStorage, &writable()));
            let look = |bytes: &[u8]| {
                let image = open(memory(bytes.to_vec()), &OpenOptions::default());
                (seen(&image), read(&image))
            };
            let before = look(&now);
            now = bytes(&*faulty);
            let after = look(&now);
            for moment in faulty.moments() {
                for state in faulty.crash_states_at(moment, turn as u64, most) {
                    let state = state.to_vec();
                    count += 1;
                    if let Err(why) = judge(&state, &before, &after) {
                        panic!("{options}: {act:?}: {moment:?}: {why}");
                    }
                    if count.is_multiple_of(97) {
                        qemu_agrees(&q, dir.path(), &state);
                    }
                }
            }
        }
    }
    println!("{count} states that a power failure leaves while bitmaps change or record writes");
}

/// At worst leaks.
fn qemu_agrees(q: &Oracle, dir: &Path, state: &[u8]) {
    std::fs::write(dir.join("state.qcow2"), state).unwrap();
    let check = q.img(["check", "-f", "qcow2", "state.qcow2"]).run();
    assert!(matches!(check.code, Some(0 | 3)), "{check}");
}

fn empty(path: &Path, cluster_size: &str, size: u64) {
    let mut format = TargetFormat::named("qcow2").unwrap();
    format.set("cluster_size", cluster_size).unwrap();
    create(path, &CreateOptions { format, size, trust_backing: false }).unwrap();
}

fn carried(image: &Image, path: &Path, cluster_size: &str) -> Image {
    let mut format = TargetFormat::named("qcow2").unwrap();
    format.set("cluster_size", cluster_size).unwrap();
    let options = ConvertOptions { format, bitmaps: CarryBitmaps::All, ..ConvertOptions::default() };
    convert(std::slice::from_ref(image), path.into(), &options, &Monitor::new()).unwrap();
    Image::open(path, &OpenOptions::default()).unwrap()
}

fn marks(image: &Image) -> Vec<(Vec<u8>, Vec<Range<u64>>)> {
    let of = |bitmap: diskmill::qcow2::Bitmap| {
        let ranges = image.dirty_bits_of(&bitmap).unwrap().ranges().collect();
        (bitmap.name, ranges)
    };
    image.bitmaps().unwrap().into_iter().map(of).collect()
}

#[test]
fn names_that_are_no_text_are_carried_over() {
    let dir = scratch();
    let path = dir.path().join("a.qcow2");
    empty(&path, "65536", SIZE);
    let names = ["a<a", "a>a", "a\u{fffd}a"];
    for (name, at) in names.into_iter().zip([0, 1 << 20, 2 << 20]) {
        let mut image = Image::open(&path, &writable()).unwrap();
        image.add_bitmap(name, None, true).unwrap();
        image.write_at(&[1; 512], at).unwrap();
        image.enable_bitmap(name, false).unwrap();
        image.close().unwrap();
    }
    let mut bytes = std::fs::read(&path).unwrap();
    for (name, raw) in [(b"a<a", b"a\xfea"), (b"a>a", b"a\xffa")] {
        let at = bytes.windows(3).position(|at| at == name).unwrap();
        bytes[at..at + 3].copy_from_slice(raw);
    }
    std::fs::write(&path, bytes).unwrap();
    let image = Image::open(&path, &OpenOptions::default()).unwrap();
    let there = marks(&image);
    assert_eq!(there.iter().map(|(_, ranges)| ranges[0].start).collect::<Vec<_>>(), [0, 1 << 20, 2 << 20]);
    assert_eq!(marks(&carried(&image, &dir.path().join("b.qcow2"), "65536")), there);
}

/// Between clusters of any size, with ends of the disk that cut a byte of the bits, and bits that are all set.
#[test]
fn bits_are_carried_over_whatever_the_cluster_sizes() {
    let dir = scratch();
    let qemu = Oracle::find(dir.path());
    let size = (4 << 20) + 9 * 512;
    let path = dir.path().join("a.qcow2");
    for from in ["512", "4096", "65536"] {
        empty(&path, from, size);
        let mut image = Image::open(&path, &writable()).unwrap();
        for name in ["ones", "few", "most"] {
            image.add_bitmap(name, Some(512), name == "ones").unwrap();
        }
        image.write_zeroes(0, size, ZeroHow::MayUnmap).unwrap();
        image.enable_bitmap("ones", false).unwrap();
        image.enable_bitmap("few", true).unwrap();
        image.write_at(&[1; 512], 3 << 20).unwrap();
        image.enable_bitmap("few", false).unwrap();
        image.enable_bitmap("most", true).unwrap();
        image.write_zeroes(512, size - 512, ZeroHow::MayUnmap).unwrap();
        image.close().unwrap();
        let image = Image::open(&path, &OpenOptions::default()).unwrap();
        let there = marks(&image);
        assert_eq!(there[0].1, vec![0..size; 1]);
        assert_eq!(there[2].1, vec![512..size; 1]);
        for to in ["512", "4096", "2M"] {
            let target = dir.path().join("b.qcow2");
            assert_eq!(marks(&carried(&image, &target, to)), there, "{from} to {to}");
            let Some(q) = &qemu else { continue };
            q.check_clean("b.qcow2");
            // QEMU reads and writes them as it closes the image.
            q.img(["bitmap", "--add", "b.qcow2", "new", "-g", "512"]).ok();
            q.img(["bitmap", "--merge", "ones", "b.qcow2", "new"]).ok();
            let merged = marks(&Image::open(&target, &OpenOptions::default()).unwrap());
            assert_eq!(merged[..3], there[..]);
            assert_eq!(merged[3].1, vec![0..size; 1]);
        }
    }
}
