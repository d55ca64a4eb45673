//! Writes that fail while the machine goes on: the image stays sound, what is not concerned stays as it was, and when the
//! disk works again everything does.

use diskmill::Kind as ErrorKind;
use diskmill_io::FaultyStorage;
use diskmill_testkit::ModelDisk;
use diskmill_testkit::content::Rng;

use crate::history::{Act, Guest, content, discards};
use crate::{KIND, Kind, assert_sound, number};

/// Each run has one fault, at a random place.
const RUNS: usize = 40;
/// Operations during which it lasts.
const LASTS: usize = 4;

fn break_down(disk: &FaultyStorage, rng: &mut Rng, len: usize) {
    match rng.below(4) {
        0 => disk.limit_space(rng.below(3000) as u64),
        1 => disk.limit_space(rng.below(100_000) as u64),
        2 => disk.fail_writes(0..512),
        _ => {
            let at = rng.below(len) as u64;
            disk.fail_writes(at..at + 4096);
        }
    }
}

/// One run. Returns how many operations failed.
fn run(kind: &Kind, dir: &std::path::Path, model: &ModelDisk, seed: u64) -> usize {
    let mut rng = Rng::new(seed);
    let world = Kind::load(dir);
    let mut image = world.open();
    let mut guest = Guest { disk: model.clone(), snapshots: Vec::new(), discards: discards(&image) };
    let acts = kind.acts(seed);
    let first = rng.below(acts.len());
    let mut failed = 0;
    for (index, act) in acts.iter().enumerate() {
        if index == first {
            let len = world.now().image().len() + (64 << 10);
            world.disks().for_each(|disk| break_down(disk, &mut rng, len));
        }
        if index == first + LASTS {
            world.disks().for_each(FaultyStorage::heal);
        }
        if let Act::Apply(name) | Act::Delete(name) = act
            && !guest.snapshots.iter().any(|(other, _)| other == name)
        {
            // Its creation failed.
            continue;
        }
        match act.run(&mut image) {
            Ok(()) => guest.apply(act),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Io, "{error}");
                failed += 1;
                let seen = content(&image);
                let (before, range) = match act {
                    Act::Step(step) => {
                        (guest.disk.bytes(), step.start as usize..(step.start + step.len) as usize)
                    }
                    _ => (guest.disk.bytes(), 0..0),
                };
                let same =
                    seen[..range.start] == before[..range.start] && seen[range.end..] == before[range.end..];
                assert!(same, "operation {index}, {act:?}, changed something else: {error}");
                guest.disk = kind.model_of(&image);
            }
        }
        assert!(content(&image) == guest.disk.bytes(), "operation {index}, {act:?}");
    }
    world.disks().for_each(FaultyStorage::heal);
    image.close().unwrap();
    let state = world.now();
    assert_sound(state.image());
    assert!(content(&state.open(None)) == guest.disk.bytes());
    for (name, disk) in &guest.snapshots {
        assert!(content(&state.open(Some(name))) == disk.bytes(), "snapshot {name}");
    }
    failed
}

fn faults(kind: Kind) {
    let Some((dir, q, model)) = kind.make(3) else { return };
    let mut failed = 0;
    for seed in 0..number("DISKMILL_FAULTS", RUNS) as u64 {
        let outcome = std::panic::catch_unwind(|| run(&kind, dir.path(), &model, seed));
        let Ok(count) = outcome else { panic!("seed {seed}: see above") };
        failed += count;
    }
    assert!(failed > 10, "only {failed} operations failed: that shows little");
    q.check();
    println!("{failed} operations failed");
}

#[test]
fn failing_writes() {
    faults(KIND);
}

#[test]
fn failing_writes_and_snapshots() {
    faults(Kind { snapshots: true, cluster: 512, size: 75 << 10, ..KIND });
}

#[test]
fn failing_writes_to_subclusters() {
    faults(Kind {
        cluster: 1 << 14,
        options: ",extended_l2=on",
        size: 300 << 10,
        backed: true,
        snapshots: true,
        ..KIND
    });
}

#[test]
fn failing_writes_to_a_data_file() {
    faults(Kind { options: ",data_file=data.raw", backed: true, ..KIND });
}

/// After a barrier that failed nobody knows what is on the disk: nothing more is written, and nothing said to be durable.
#[test]
fn a_failing_barrier() {
    let kind = Kind { snapshots: true, ..KIND };
    let Some((dir, _, _)) = kind.make(5) else { return };
    for seed in 0..12 {
        let world = Kind::load(dir.path());
        let mut image = world.open();
        let mut rng = Rng::new(seed);
        let acts = kind.acts(seed);
        let first = rng.below(acts.len() / 2);
        let mut lost = false;
        for (index, act) in acts.iter().enumerate() {
            if index == first {
                world.disks().for_each(|disk| disk.fail_sync(true));
            }
            let done = act.run(&mut image);
            if lost && matches!(act, Act::Flush) {
                assert_eq!(done.unwrap_err().kind(), ErrorKind::Io);
            } else if done.is_err() {
                // Even if the disk says that it works again.
                world.disks().for_each(|disk| disk.fail_sync(false));
                lost = true;
            }
        }
        assert!(lost);
        assert!(image.close().is_err());
        assert_sound(world.now().image());
    }
}
