//! Power failures: at each moment that a barrier separates from the next, and with each part of what was written since the
//! last barrier, the image is sound, and the guest finds what it flushed.
//!
//! Each barrier of a run is a stop. Of each stop all states are tried if there are at most `STATES` of them, else as many
//! at random (`FaultyStorage::crash_states` says how). `DISKMILL_CRASH_STATES` sets another number, `DISKMILL_CRASH_SEEDS`
//! more than one run per kind of image.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code"
)]

mod faults;
mod history;
mod world;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use diskmill::check::{CheckOptions, check_storage};
use diskmill::edit::Preallocation;
use diskmill_io::MemoryStorage;
use diskmill_testkit::content::{Pattern, Rng};
use diskmill_testkit::{ModelDisk, Op, Oracle, Step, TempDir, legalise, scratch, steps};

use history::{Act, Guest, History, content, write};
use world::{BASE, IMAGE, State, World};

/// States of one stop.
const STATES: usize = 40;
/// One in this many states is shown to qemu-img.
const SHOWN: usize = 40;
/// One in this many states is written to.
const CONTINUED: usize = 7;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A kind of image.
#[derive(Clone, Copy)]
struct Kind {
    options: &'static str,
    cluster: u64,
    size: u64,
    backed: bool,
    /// What it holds: this many bytes of data,
    full: u64,
    /// and this many random steps, some of them compressed clusters.
    filled: usize,
    /// What is done to it: this many random steps.
    steps: usize,
    snapshots: bool,
    resizes: bool,
}

const KIND: Kind = Kind {
    options: "",
    cluster: 4096,
    size: 160 << 10,
    backed: false,
    full: 0,
    filled: 6,
    steps: 24,
    snapshots: false,
    resizes: false,
};

const GROWING: Kind = Kind {
    options: ",refcount_bits=64",
    cluster: 512,
    size: 2560 << 10,
    full: 1900 << 10,
    filled: 0,
    steps: 14,
    ..KIND
};

impl Kind {
    fn v2(&self) -> bool {
        self.options.contains("compat=v2")
    }

    fn data_file(&self) -> bool {
        self.options.contains("data_file")
    }

    /// Makes the image in a folder.
    fn make(&self, seed: u64) -> Option<(TempDir, Oracle, ModelDisk)> {
        let dir = scratch();
        let q = Oracle::find(dir.path())?;
        let options = format!("cluster_size={}{}", self.cluster, self.options);
        let mut model = ModelDisk::new(self.size, self.cluster);
        if self.backed {
            // Shorter than the disk over it.
            let size = self.size / 4096 * 3072;
            let below = steps(seed ^ 1, size, self.cluster, 6, false);
            q.create(BASE, "", size);
            q.write(BASE, "qcow2", &below);
            let mut base = ModelDisk::new(size, 1 << 16);
            below.iter().for_each(|step| base.apply(step));
            q.create_over(IMAGE, &options, self.size, (BASE, "qcow2"));
            model = ModelDisk::over(&base, self.size, self.cluster, self.v2());
        } else {
            q.create(IMAGE, &options, self.size);
        }
        if self.full > 0 {
            let step = Step { op: Op::Write(Pattern::Random), start: 0, len: self.full, seed };
            q.write(IMAGE, "qcow2", &[step]);
            model.apply(&step);
        }
        let mut filled = steps(seed ^ 2, self.size, self.cluster, self.filled, self.packs());
        legalise(&mut filled, self.size, self.cluster);
        // QEMU refuses some compressed writes after others.
        for step in filled {
            if q.try_write(IMAGE, "qcow2", &[step]).is_ok() {
                model.apply(&step);
            }
        }
        Some((dir, q, model))
    }

    /// Whether it can have packed clusters.
    fn packs(&self) -> bool {
        !self.data_file() && !self.options.contains("preallocation")
    }

    /// The model of a disk that holds `bytes`.
    fn model_of(&self, bytes: Vec<u8>) -> ModelDisk {
        let disk = ModelDisk::holding(bytes, self.cluster);
        match self.v2() && self.backed {
            true => ModelDisk::over(&disk, self.size, self.cluster, true),
            false => disk,
        }
    }

    fn acts(&self, seed: u64) -> Vec<Act> {
        let mut rng = Rng::new(seed);
        let mut acts = Vec::new();
        let mut names: Vec<(String, u64)> = Vec::new();
        let mut size = self.size;
        for _ in 0..self.steps {
            acts.extend(
                steps(rng.next_u64(), size, self.cluster, 1, self.packs()).into_iter().map(Act::Step),
            );
            match rng.below(12) {
                0..=2 => acts.push(Act::Flush),
                3 if self.snapshots => {
                    names.push((format!("s{}", acts.len()), size));
                    acts.push(Act::Snapshot(names[names.len() - 1].0.clone()));
                }
                4 if !names.is_empty() => {
                    let (name, its_size) = &names[rng.below(names.len())];
                    size = *its_size;
                    acts.push(Act::Apply(name.clone()));
                }
                5 if names.len() > 1 => acts.push(Act::Delete(names.remove(rng.below(names.len())).0)),
                6 | 7 if self.resizes => {
                    let old = size;
                    size = 512 * (1 + rng.below(self.size as usize / 340) as u64);
                    let how = [
                        Preallocation::Off,
                        Preallocation::Metadata,
                        Preallocation::Falloc,
                        Preallocation::Full,
                    ];
                    acts.push(Act::Resize(size, how[if size > old { rng.below(4) } else { 0 }]));
                }
                _ => {}
            }
        }
        acts
    }
}

/// Runs what is to be done and judges all states. Returns how many were different.
fn run(kind: &Kind, seed: u64) -> Count {
    let Some((dir, q, model)) = kind.make(seed) else { return Count::default() };
    let world = World::load(dir.path());
    let mut history = History::new(Guest { disk: model, snapshots: Vec::new() });
    let mut image = world.open();
    for (index, act) in kind.acts(seed).into_iter().enumerate() {
        world.begin(index + 1);
        act.run(&mut image).unwrap();
        history.note(act);
        let same = content(&image) == history.now().disk.bytes();
        assert!(same, "operation {}: the guest sees something else already without a crash", index + 1);
    }
    let last = history.note_close(&world);
    image.close().unwrap();
    let mut judge = Judge {
        kind,
        q: &q,
        dir: dir.path(),
        history: &history,
        seen: HashSet::new(),
        count: Count::default(),
    };
    let stops = world.stops();
    for (index, stop) in stops.iter().enumerate() {
        judge.count.stops += 1;
        let max = number("DISKMILL_CRASH_STATES", STATES);
        for state in world.states(stop, seed ^ (index as u64) << 8, max) {
            judge.state(&state, stop.operation);
        }
    }
    judge.shown(&world.now(), last);
    judge.count
}

impl History {
    /// Notes that the image is closed. Returns the number of that operation.
    fn note_close(&mut self, world: &World) -> usize {
        self.note(Act::Close);
        world.begin(self.last());
        self.last()
    }
}

#[derive(Default)]
struct Count {
    stops: usize,
    states: usize,
    shown: usize,
    continued: usize,
}

struct Judge<'a> {
    kind: &'a Kind,
    q: &'a Oracle,
    dir: &'a Path,
    history: &'a History,
    seen: HashSet<(u64, usize)>,
    count: Count,
}

impl Judge<'_> {
    fn state(&mut self, state: &State, operation: usize) {
        let mut hasher = DefaultHasher::new();
        state.hash(&mut hasher);
        if !self.seen.insert((hasher.finish(), operation)) {
            return;
        }
        self.count.states += 1;
        assert_sound(state.image());
        self.history.judge(state, operation);
        if let Some(data) = state.data().filter(|_| self.kind.options.contains("data_file_raw")) {
            self.history.judge_raw(data, operation);
        }
        if self.count.states.is_multiple_of(SHOWN) {
            self.shown(state, operation);
        }
        if self.count.states.is_multiple_of(CONTINUED) {
            self.continued(state);
        }
    }

    /// qemu-img finds the state sound too, and reads the same.
    fn shown(&mut self, state: &State, operation: usize) {
        self.count.shown += 1;
        state.save(self.dir);
        let check = self.q.img(["check", "-f", "qcow2", IMAGE]).run();
        assert!(matches!(check.code, Some(0 | 3)), "operation {operation}: {check}");
        let same = self.q.content(IMAGE, "qcow2") == content(&state.open(None));
        assert!(same, "operation {operation}: qemu-img reads something else");
    }

    /// The next one who opens the image can go on.
    fn continued(&mut self, state: &State) {
        self.count.continued += 1;
        let (image, storage) = state.open_writable();
        let mut model = self.kind.model_of(content(&image));
        let seed = self.count.states as u64;
        for step in steps(seed, image.size(), self.kind.cluster, 4, false) {
            write(&image, &step).unwrap();
            model.apply(&step);
        }
        assert!(content(&image) == model.bytes(), "writes after the crash went elsewhere");
        image.close().unwrap();
        let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
        storage.read_at(&mut bytes, 0).unwrap();
        assert_sound(&bytes);
    }
}

/// At worst leaks.
fn assert_sound(image: &[u8]) {
    let storage = MemoryStorage::with_bytes(image.to_vec(), 0);
    let mut found = Vec::new();
    let report =
        check_storage(&storage, &CheckOptions::default(), &mut |_, finding| found.push(finding.to_string()));
    let report = report.unwrap();
    assert!(matches!(report.exit_code(), 0 | 3), "{report:?} {found:#?}");
}

fn crash(name: &str, kind: Kind) {
    let mut total = Count::default();
    for seed in 0..number("DISKMILL_CRASH_SEEDS", 2) as u64 {
        let outcome = std::panic::catch_unwind(|| run(&kind, seed));
        let Ok(count) = outcome else { panic!("{name}, seed {seed}: see above") };
        total.stops += count.stops;
        total.states += count.states;
        total.shown += count.shown;
        total.continued += count.continued;
    }
    println!(
        "{name}: {} stops, {} states judged, {} of them shown to qemu-img, {} written to",
        total.stops, total.states, total.shown, total.continued
    );
}

macro_rules! crashes {
    ($($(#[$about:meta])* $name:ident: $kind:expr;)*) => {$(
        $(#[$about])*
        #[test]
        fn $name() {
            crash(stringify!($name), $kind);
        }
    )*};
}

crashes! {
    clusters_of_4_kib: KIND;
    clusters_of_64_kib: Kind { cluster: 1 << 16, size: 1 << 20, ..KIND };
    clusters_of_512_bytes: Kind { cluster: 512, size: 75 << 10, options: ",refcount_bits=1", ..KIND };
    snapshots: Kind { snapshots: true, steps: 30, ..KIND };
    snapshots_of_many_tables: Kind { snapshots: true, cluster: 512, size: 75 << 10, ..KIND };
    snapshots_and_wide_refcounts:
        Kind { snapshots: true, cluster: 512, size: 75 << 10, options: ",refcount_bits=64", ..KIND };
    snapshots_over_a_backing_file: Kind { snapshots: true, backed: true, ..KIND };
    subclusters: Kind { cluster: 1 << 14, options: ",extended_l2=on", size: 300 << 10, ..KIND };
    subclusters_over_a_backing_file:
        Kind { cluster: 1 << 16, options: ",extended_l2=on", size: 600 << 10, backed: true, snapshots: true, ..KIND };
    over_a_backing_file: Kind { backed: true, options: ",refcount_bits=2", ..KIND };
    version_2: Kind { backed: true, options: ",compat=v2", snapshots: true, ..KIND };
    lazy_refcounts: Kind { options: ",lazy_refcounts=on", snapshots: true, ..KIND };
    an_external_data_file: Kind { options: ",data_file=data.raw", ..KIND };
    an_external_data_file_over_a_backing_file: Kind { options: ",data_file=data.raw", backed: true, ..KIND };
    a_raw_external_data_file: Kind { options: ",data_file=data.raw,data_file_raw=on", ..KIND };
    zstd: Kind { options: ",compression_type=zstd", filled: 20, snapshots: true, ..KIND };
    /// A refcount block counts 32 KiB here.
    new_refcount_blocks: Kind { cluster: 512, size: 200 << 10, options: ",refcount_bits=64", ..KIND };
    /// One cluster of the refcount table counts 2 MiB here.
    a_refcount_table_that_grows: GROWING;
    a_refcount_table_that_grows_with_snapshots: Kind { snapshots: true, ..GROWING };
    resizes: Kind { resizes: true, snapshots: true, steps: 30, ..KIND };
    resizes_of_many_tables: Kind { resizes: true, snapshots: true, cluster: 512, size: 75 << 10, ..KIND };
    resizes_with_subclusters:
        Kind { resizes: true, cluster: 1 << 14, options: ",extended_l2=on", size: 300 << 10, backed: true, ..KIND };
    resizes_of_a_data_file: Kind { resizes: true, options: ",data_file=data.raw", backed: true, ..KIND };
    resizes_of_version_2: Kind { resizes: true, options: ",compat=v2", ..KIND };
    preallocated: Kind { options: ",preallocation=metadata", snapshots: true, ..KIND };
}
