//! Power failures: at each moment that a barrier separates from the next, and with each part of what was written since the
//! last barrier, the image is sound, and the guest finds what it flushed.
//!
//! Each barrier of a run is a stop. Of each stop all states are tried if there are at most `STATES` of them, else as many
//! at random (`FaultyStorage::crash_states` says how). Here an image is written to, in `chain` it is committed or rebased.
//! `DISKMILL_CRASH_STATES` sets another number, `DISKMILL_CRASH_SEEDS`
//! more than one run per kind of image.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code"
)]

mod chain;
mod faults;
mod history;
mod world;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::Duration;

use diskmill::check::{CheckOptions, check_storage};
use diskmill::edit::{Amendment, KeySlotChange, Preallocation};
use diskmill::{Error, FormatInfo, Image, Kind as ErrorKind, Secret};
use diskmill_io::MemoryStorage;
use diskmill_testkit::content::{Pattern, Rng};
use diskmill_testkit::{ModelDisk, Op, Oracle, Script, Step, TempDir, legalise, scratch, steps};

use history::{Act, Guest, History, content, discards, write};
use world::{BASE, DATA, IMAGE, KEY, RENAMED, State, World, read_all, writable};

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
    amends: bool,
    /// The backing file has a name that reaches far beyond the first sector.
    long_name: bool,
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
    amends: false,
    long_name: false,
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

    fn load(dir: &Path) -> World {
        World::load(dir, &[IMAGE, DATA], &[BASE])
    }

    /// Makes the image in a folder.
    fn make(&self, seed: u64) -> Option<(TempDir, Qemu, ModelDisk)> {
        let dir = scratch();
        let q = Oracle::find(dir.path())?;
        let options = format!("cluster_size={}{}", self.cluster, self.options);
        let q = Qemu { oracle: q, encrypted: options.contains("encrypt.") };
        let mut model = ModelDisk::new(self.size, self.cluster);
        if self.backed {
            // Shorter than the disk over it.
            let size = self.size / 4096 * 3072;
            let below = steps(seed ^ 1, size, self.cluster, 6, false);
            q.oracle.create(BASE, "", size);
            q.oracle.write(BASE, "qcow2", &below);
            let mut base = ModelDisk::new(size, 1 << 16);
            below.iter().for_each(|step| base.apply(step));
            let name = "./".repeat(if self.long_name { 200 } else { 0 }) + BASE;
            q.create(&options, self.size, Some((&name, "qcow2")));
            model = ModelDisk::over(&base, self.size, self.cluster, self.v2());
        } else {
            q.create(&options, self.size, None);
        }
        if self.full > 0 {
            let step = Step { op: Op::Write(Pattern::Random), start: 0, len: self.full, seed };
            q.try_write(&step).unwrap();
            model.apply(&step);
        }
        let mut filled = steps(seed ^ 2, self.size, self.cluster, self.filled, self.packs());
        legalise(&mut filled, self.size, self.cluster);
        // QEMU refuses some compressed writes after others.
        for step in filled {
            if q.try_write(&step).is_ok() {
                model.apply(&step);
            }
        }
        Some((dir, q, model))
    }

    /// Whether it can have packed clusters.
    fn packs(&self) -> bool {
        !["data_file", "preallocation", "encrypt."].iter().any(|option| self.options.contains(option))
    }

    /// The model of what this image holds.
    fn model_of(&self, image: &Image) -> ModelDisk {
        let mut disk = ModelDisk::holding(content(image), self.cluster);
        disk.set_discards(discards(image));
        disk
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
                8..=10 if self.amends => acts.push(Act::Amend(self.amendment(&mut rng))),
                _ => {}
            }
        }
        acts
    }
}

impl Kind {
    fn amendment(&self, rng: &mut Rng) -> Amendment {
        if self.options.contains("=luks") && rng.below(2) == 0 {
            // The first slot has the passphrase that all states are opened with.
            let keys = KeySlotChange {
                active: Some(rng.below(3) > 0),
                keyslot: Some(1 + rng.below(2) as u64),
                iter_time: Some(Duration::from_millis(1)),
                new: Some(Secret::new(b"another".to_vec())),
                keys: writable().keys,
                ..KeySlotChange::default()
            };
            let new = keys.new.clone().filter(|_| keys.active == Some(true));
            return Amendment { keys: Some(KeySlotChange { new, ..keys }), ..Amendment::default() };
        }
        let width = (1 << rng.below(7)).to_string();
        let onoff = ["on", "off"][rng.below(2)];
        let (name, value) = match rng.below(if self.data_file() { 8 } else { 6 }) {
            0 | 1 => ("compat", "v2"),
            2 => ("compat", "v3"),
            // The only one that version 2 can have, too.
            3 => ("refcount_bits", "16"),
            4 => ("refcount_bits", width.as_str()),
            5 => ("lazy_refcounts", onoff),
            6 => ("data_file", [DATA, RENAMED][rng.below(2)]),
            _ => ("data_file_raw", "off"),
        };
        let mut amendment = Amendment::default();
        amendment.set(name, value).unwrap();
        amendment
    }
}

/// QEMU's tools, with the key of an encrypted image.
struct Qemu {
    oracle: Oracle,
    encrypted: bool,
}

impl Qemu {
    /// The image as the other programs' arguments name it.
    fn image(&self) -> [String; 4] {
        let key = if self.encrypted { ",encrypt.key-secret=s" } else { "" };
        let image = format!("driver=qcow2,file.filename={IMAGE}{key}");
        ["--object".to_owned(), format!("secret,id=s,data={KEY}"), "--image-opts".to_owned(), image]
    }

    fn create(&self, options: &str, size: u64, backing: Option<(&str, &str)>) {
        let [object, secret, ..] = self.image();
        let backing = backing.map(|(name, format)| ["-b", name, "-F", format]);
        self.oracle
            .img(["create", "-q", &object, &secret, "-f", "qcow2", "-o", options])
            .args(backing.iter().flatten())
            .args([IMAGE, &size.to_string()])
            .ok();
    }

    fn try_write(&self, step: &Step) -> Result<(), String> {
        let [object, secret, flag, image] = self.image();
        let script = Script::new(&[*step]);
        let out = self.oracle.io([object, secret, flag]).args(script.args()).arg(image).run();
        let done = out.code == Some(0) && !out.out().contains("failed");
        if done { Ok(()) } else { Err(out.to_string()) }
    }

    /// Finds no more than leaks.
    fn check(&self) {
        let check = self.oracle.img(["check"]).args(self.image()).run();
        assert!(matches!(check.code, Some(0 | 3)), "{check}");
    }

    fn content(&self) -> Vec<u8> {
        self.oracle.img(["convert", "-O", "raw"]).args(self.image()).arg("content.raw").ok();
        std::fs::read(self.oracle.dir().join("content.raw")).unwrap()
    }
}

/// Runs what is to be done and judges all states. Returns how many were different.
fn run(kind: &Kind, seed: u64) -> Count {
    let Some((dir, q, model)) = kind.make(seed) else { return Count::default() };
    let world = Kind::load(dir.path());
    let mut image = world.open();
    let guest = Guest { disk: model, snapshots: Vec::new(), discards: discards(&image) };
    let mut history = History::new(guest);
    for (index, act) in kind.acts(seed).into_iter().enumerate() {
        world.begin(index + 1);
        let done = act.run(&mut image);
        history.note(match act {
            Act::Amend(_) => {
                let refused = |error: &Error| {
                    matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Unsupported | ErrorKind::Limit)
                };
                assert!(done.as_ref().err().is_none_or(refused), "{done:?}");
                Act::Amended(discards(&image))
            }
            act => {
                done.unwrap();
                act
            }
        });
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
    q: &'a Qemu,
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
        if let Some(data) = state.data().filter(|_| is_raw(state)) {
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
        self.q.check();
        let same = self.q.content() == content(&state.open(None));
        assert!(same, "operation {operation}: qemu-img reads something else");
    }

    /// The next one who opens the image can go on.
    fn continued(&mut self, state: &State) {
        self.count.continued += 1;
        let files = state.copies();
        let image = Image::from_storages(&files, &writable()).unwrap();
        let mut model = self.kind.model_of(&image);
        let seed = self.count.states as u64;
        for step in steps(seed, image.size(), self.kind.cluster, 4, false) {
            write(&image, &step).unwrap();
            model.apply(&step);
        }
        assert!(content(&image) == model.bytes(), "writes after the crash went elsewhere");
        image.close().unwrap();
        assert_sound(&read_all(&*files[0].storage));
    }
}

/// Whether the external data file is to be a valid raw image.
fn is_raw(state: &State) -> bool {
    let image = state.open(None);
    let FormatInfo::Qcow2(info) = &image.info().specific else { panic!("it is qcow2") };
    info.area.header.autoclear & 2 != 0
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

/// Says what the runs of this name have shown.
fn report(name: &str, run: impl Fn(u64) -> Count + std::panic::RefUnwindSafe) {
    let mut total = Count::default();
    for seed in 0..number("DISKMILL_CRASH_SEEDS", 2) as u64 {
        let outcome = std::panic::catch_unwind(|| run(seed));
        let Ok(count) = outcome else { panic!("{name}, seed {seed}: see above") };
        total.stops += count.stops;
        total.states += count.states;
        total.shown += count.shown;
        total.continued += count.continued;
    }
    println!(
        "{name}: {} stops, {} states judged, {} of them shown to qemu-img, {} gone on from",
        total.stops, total.states, total.shown, total.continued
    );
}

macro_rules! encrypted {
    ($more:literal) => {
        concat!(",encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1", $more)
    };
}

const ENCRYPTED: &str = encrypted!("");
const ENCRYPTED_SUBCLUSTERS: &str = encrypted!(",extended_l2=on");
const ENCRYPTED_DATA_FILE: &str = encrypted!(",data_file=data.raw");

macro_rules! crashes {
    ($($(#[$about:meta])* $name:ident: $kind:expr;)*) => {$(
        $(#[$about])*
        #[test]
        fn $name() {
            report(stringify!($name), |seed| run(&$kind, seed));
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
    amendments: Kind { amends: true, snapshots: true, resizes: true, steps: 40, ..KIND };
    amendments_of_many_tables:
        Kind { amends: true, snapshots: true, cluster: 512, size: 75 << 10, steps: 40, ..KIND };
    amendments_over_a_backing_file: Kind { amends: true, backed: true, steps: 40, ..KIND };
    amendments_over_a_long_name: Kind { amends: true, backed: true, long_name: true, steps: 40, ..KIND };
    amendments_of_a_data_file: Kind { amends: true, options: ",data_file=data.raw", steps: 40, ..KIND };
    amendments_of_a_raw_data_file:
        Kind { amends: true, options: ",data_file=data.raw,data_file_raw=on", steps: 40, ..KIND };
    encrypted: Kind { options: ENCRYPTED, snapshots: true, steps: 14, ..KIND };
    encrypted_over_a_backing_file:
        Kind { options: ENCRYPTED, cluster: 1 << 14, size: 300 << 10, backed: true, amends: true, resizes: true, steps: 12, ..KIND };
    encrypted_subclusters:
        Kind { options: ENCRYPTED_SUBCLUSTERS, cluster: 1 << 14, size: 300 << 10, snapshots: true, steps: 14, ..KIND };
    encrypted_in_the_legacy_way:
        Kind { options: ",encrypt.format=aes,encrypt.key-secret=s", backed: true, snapshots: true, ..KIND };
    an_encrypted_data_file: Kind { options: ENCRYPTED_DATA_FILE, amends: true, steps: 14, ..KIND };
}
