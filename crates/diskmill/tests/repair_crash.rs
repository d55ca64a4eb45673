//! Repairs that a power failure stops: what it leaves is no worse than before, and a second repair ends as the first
//! one would have.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;
use std::sync::Arc;

use diskmill::check::{CheckOptions, Finding, Repair, Report, check_storage};
use diskmill::{Image, OpenOptions};
use diskmill_io::{FaultyStorage, MemoryStorage, SharedStorage, Storage};
use diskmill_testkit::qcow2::{COPIED, ImageBytes};
use diskmill_testkit::{Oracle, scratch};

const LIMIT: u64 = 64 << 20;
const FAR: u64 = 1 << 40;

type Case = (&'static str, fn(&mut ImageBytes));

const CASES: &[Case] = &[
    ("refcounts too high", |d| {
        d.set_refcount(d.l1(), 5);
        d.set_refcount(d.host(2), 7);
    }),
    ("refcounts too low", |d| {
        d.set_refcount(d.host(2), 1);
        d.set_refcount(d.host(0), 0);
        d.set_refcount(0, 0);
    }),
    ("leaks", |d| {
        let (end, cluster) = (d.0.len().next_multiple_of(d.cluster() as usize) as u64, d.cluster());
        d.0.resize((end + 4 * cluster) as usize, 7);
        d.set_refcount(end + cluster, 1);
        d.set_refcount(end + 3 * cluster, 9);
    }),
    ("snapshots missing", |d| d.put(60, &5u32.to_be_bytes())),
    ("little extra data of a snapshot", |d| d.put(d.u64(64) + 36, &8u32.to_be_bytes())),
    ("two on one cluster", |d| d.put64(d.l2(1), d.u64(d.l2(4)))),
    ("copied flags", |d| {
        d.put64(d.l2(1), d.u64(d.l2(1)) ^ COPIED);
        d.put64(d.l2(0), d.u64(d.l2(0)) ^ COPIED);
        d.put64(d.l1(), d.u64(d.l1()) ^ COPIED);
    }),
    ("misaligned zero cluster", |d| d.put64(d.l2(1), COPIED | (d.host(1) + 512) | 1)),
    ("no refcount block", |d| d.put64(d.refcount_table(), 0)),
    ("refcount block past the end", |d| d.put64(d.refcount_table(), FAR)),
    ("refcount block misaligned", |d| d.put64(d.refcount_table(), d.u64(d.refcount_table()) + 512)),
    ("refcount block twice", |d| d.put64(d.refcount_table() + 8, d.u64(d.refcount_table()))),
    ("refcount block on data", |d| d.put64(d.refcount_table() + 8, d.host(0))),
    ("refcount table past the end", |d| d.put64(48, FAR)),
    ("all refcounts gone, and flags wrong", |d| {
        let block = d.u64(d.refcount_table());
        let len = d.cluster();
        d.put(block, &vec![0; len as usize]);
        d.put64(d.l2(1), d.u64(d.l2(1)) ^ COPIED);
    }),
    ("dirty and corrupt, with a leak and a low refcount", |d| {
        d.put64(72, 3);
        d.set_refcount(d.l1(), 3);
        d.set_refcount(d.host(2), 0);
    }),
];

/// Written data, some of it shared with a snapshot, and a bitmap.
fn base(q: &Oracle, dir: &Path, cluster: u64) -> ImageBytes {
    q.create("base.qcow2", &format!("cluster_size={cluster}"), 2 << 20);
    let io = |command: String| q.io(["-c", &command, "base.qcow2"]).ok();
    io(format!("write -P 1 0 {}", 6 * cluster));
    q.snapshot("base.qcow2", "s1");
    q.img(["bitmap", "--add", "base.qcow2", "b"]).ok();
    io(format!("write -P 3 {cluster} {}", 4 * cluster));
    ImageBytes::read(&dir.join("base.qcow2"))
}

fn memory(bytes: Vec<u8>) -> SharedStorage {
    Arc::new(MemoryStorage::with_bytes(bytes, LIMIT))
}

/// The report, and errors other than copied flags, which follow the refcounts one step behind.
fn check(storage: &dyn Storage, repair: Repair) -> Result<(Report, u64), diskmill::Error> {
    let mut errors = 0;
    let options = CheckOptions { repair, ..CheckOptions::default() };
    let report = check_storage(storage, &options, &mut |verdict, finding| {
        let flag = matches!(finding, Finding::L2Copied { .. } | Finding::DataCopied { .. });
        errors += u64::from(verdict == diskmill::check::Verdict::Error && !flag);
    })?;
    Ok((report, errors))
}

fn content(storage: SharedStorage) -> Option<Vec<u8>> {
    let image = Image::from_storage(storage, "a.qcow2", &OpenOptions::default()).ok()?;
    let mut bytes = vec![0; image.size() as usize];
    image.read_at(&mut bytes, 0).ok()?;
    Some(bytes)
}

#[test]
fn a_repair_may_stop_anywhere() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    let most: usize = std::env::var("CRASH_STATES").ok().and_then(|text| text.parse().ok()).unwrap_or(16);
    let (mut count, mut wrong) = (0u64, Vec::new());
    for cluster in [512, 4096, 65_536] {
        let base = base(&q, dir.path(), cluster);
        for (name, damage) in CASES {
            let mut disk = base.clone();
            damage(&mut disk);
            for repair in [Repair::Leaks, Repair::All] {
                let case = format!("{cluster}: {name}: {repair:?}");
                let before = check(&*memory(disk.0.clone()), Repair::Nothing).unwrap();
                let guest = content(memory(disk.0.clone()));
                let faulty = Arc::new(FaultyStorage::new(memory(disk.0.clone())));
                faulty.start_journal().unwrap();
                let ended = check(&*faulty, repair).map(|(report, _)| report.exit_code()).ok();
                for moment in faulty.moments() {
                    for state in faulty.crash_states_at(moment, 1, most) {
                        count += 1;
                        let state: SharedStorage = Arc::new(state);
                        if let Err(why) = judge(&state, &before, guest.as_deref(), repair, ended) {
                            wrong.push(format!("{case}: {moment:?}: {why}"));
                        }
                    }
                }
            }
        }
    }
    println!("{count} states that a power failure leaves of a repair");
    assert!(wrong.is_empty(), "{} of {count}\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
}

fn judge(
    state: &SharedStorage,
    before: &(Report, u64),
    guest: Option<&[u8]>,
    repair: Repair,
    ended: Option<u8>,
) -> Result<(), String> {
    let (now, errors) = check(&**state, Repair::Nothing).map_err(|error| error.to_string())?;
    if errors > before.1 || now.check_errors > before.0.check_errors {
        return Err(format!("{errors} errors, before {}: {now:?}, before {:?}", before.1, before.0));
    }
    if guest.is_some() && content(Arc::clone(state)).as_deref() != guest {
        return Err("the guest reads something else".to_owned());
    }
    // What the first one leaked may be kept for snapshots that are missing, until a repair that misses none.
    let again = || check(&**state, repair).map(|(report, _)| report.exit_code()).ok();
    let again = again().filter(|&code| Some(code) == ended || code != 3).or_else(again);
    if ended.is_some() && again != ended {
        return Err(format!("a second repair ends with {again:?}, the first one with {ended:?}"));
    }
    Ok(())
}
