//! Power failures during commits and rebases: whatever is left, every file of the chain is sound, the overlay shows what it
//! did, a base that is committed to has old or new bytes, and what was begun can be done again.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use diskmill::convert::Monitor;
use diskmill::edit::{Commit, CommitOptions, Rebase, RebaseMode};
use diskmill::{Format, Image, ImageFile};
use diskmill_testkit::content::Pattern;
use diskmill_testkit::{Op, Oracle, Step, TempDir, scratch, steps};

use crate::history::{content, first_foreign};
use crate::world::{BASE, DATA, IMAGE, State, World, writable};
use crate::{Count, Qemu, assert_sound, number, report};

/// States of one stop.
const STATES: usize = 100;
/// One in this many states is shown to qemu-img.
const SHOWN: usize = 40;
/// In one in this many states it is done again.
const AGAIN: usize = 5;

const BOTTOM: &str = "bottom.qcow2";
const OTHER: &str = "other.qcow2";
const RAW: &str = "base.raw";
const VMDK: &str = "base.vmdk";
const FIRST: &str = "first";

#[derive(Clone, Copy)]
enum What {
    /// Into this file; the overlay is emptied if it may be.
    Commit { base: &'static str, keep: bool },
    /// Onto this file.
    Rebase { onto: Option<&'static str>, mode: RebaseMode, how: How },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Plain,
    /// The name is longer than a sector.
    Long,
    Compressed,
}

const COMMIT: What = What::Commit { base: BASE, keep: false };
const FLATTEN: What = What::Rebase { onto: None, mode: RebaseMode::Safe, how: How::Plain };

const fn onto(name: &'static str) -> What {
    What::Rebase { onto: Some(name), mode: RebaseMode::Safe, how: How::Plain }
}

/// A chain, and what is done to it.
#[derive(Clone, Copy)]
struct Chain {
    what: What,
    /// Of the overlay.
    options: &'static str,
    cluster: u64,
    size: u64,
    /// What it stands on; that and `OTHER` stand on `BOTTOM` if they are qcow2.
    on: Option<&'static str>,
    base_options: &'static str,
    base_size: u64,
    /// Overlay and base have one.
    snapshots: bool,
}

const CHAIN: Chain = Chain {
    what: COMMIT,
    options: "",
    cluster: 4096,
    size: 300 << 10,
    on: Some(BASE),
    base_options: "cluster_size=4k",
    base_size: 200 << 10,
    snapshots: false,
};

fn format(name: &str) -> Format {
    let (_, extension) = name.rsplit_once('.').unwrap();
    extension.parse().unwrap()
}

impl What {
    fn run(self, files: &[ImageFile]) -> Result<(), diskmill::Error> {
        match self {
            Self::Commit { base, keep } => {
                let base = (base == BOTTOM).then(|| base.into());
                let options = CommitOptions { open: writable(), base, keep_overlay: keep };
                Commit::from_storages(files, &options)?.run(&Monitor::new())
            }
            Self::Rebase { onto, mode, how } => {
                let mut rebase = Rebase::from_storages(files, &writable(), mode)?;
                if let Some(name) = onto {
                    let long = "./".repeat(if how == How::Long { 200 } else { 0 }) + name;
                    rebase.onto(&long, Some(format(name)))?;
                }
                if how == How::Compressed {
                    rebase.compress()?;
                }
                rebase.run(&Monitor::new())
            }
        }
    }
}

impl Chain {
    /// Makes the files in a folder.
    fn make(&self, seed: u64) -> Option<(TempDir, Qemu)> {
        let dir = scratch();
        let q = Oracle::find(dir.path())?;
        let below = |seed: u64, name: &str, size: u64| {
            let data = |step: &Step| matches!(step.op, Op::Write(_));
            let mut steps = steps(seed, size, 4096, 12, false);
            steps.retain(data);
            q.write(name, format(name).name(), &steps);
        };
        q.create(BOTTOM, "cluster_size=8k", 260 << 10);
        below(seed ^ 1, BOTTOM, 260 << 10);
        q.create_over(OTHER, "cluster_size=2k", 240 << 10, (BOTTOM, "qcow2"));
        below(seed ^ 2, OTHER, 240 << 10);
        match self.on {
            Some(VMDK) => {
                q.img(["create", "-q", "-f", "vmdk", VMDK]).arg(self.base_size.to_string()).ok();
            }
            Some(BOTTOM) | None => {}
            Some(_) => {
                q.create_over(BASE, self.base_options, self.base_size, (BOTTOM, "qcow2"));
                if self.snapshots {
                    below(seed ^ 3, BASE, self.base_size);
                    q.snapshot(BASE, FIRST);
                }
            }
        }
        std::fs::write(dir.path().join(RAW), vec![0; self.base_size as usize]).unwrap();
        for name in [RAW].into_iter().chain(self.on) {
            below(seed ^ 4, name, self.base_size.min(260 << 10));
        }
        let q = Qemu { encrypted: self.options.contains("encrypt."), oracle: q };
        let options = format!("cluster_size={}{}", self.cluster, self.options);
        q.create(&options, self.size, self.on.map(|name| (name, format(name).name())));
        let packed = !self.options.contains("data_file");
        for step in steps(seed ^ 5, self.size, self.cluster, 10, packed) {
            // QEMU refuses some compressed writes after others.
            let _ = q.try_write(&step);
        }
        if self.snapshots {
            q.oracle.snapshot(IMAGE, FIRST);
            let step = Step { op: Op::Write(Pattern::Text), start: self.size / 3, len: self.size / 4, seed };
            q.try_write(&step).unwrap();
        }
        Some((dir, q))
    }
}

/// What must be seen, whatever happens.
struct Judge<'a> {
    chain: &'a Chain,
    q: &'a Qemu,
    dir: &'a Path,
    /// The overlay's disk over its old backing file, and over its new one.
    shown: [Vec<u8>; 2],
    /// The base that is committed to: its old disk, that in its new size, and its new one.
    base: Option<(&'static str, [Vec<u8>; 3])>,
    /// The snapshot of `BASE`.
    first: Option<Vec<u8>>,
    seen: HashSet<(u64, bool)>,
    count: Count,
}

impl<'a> Judge<'a> {
    fn new(chain: &'a Chain, q: &'a Qemu, dir: &'a Path, state: &State) -> Self {
        let shown = content(&state.open(None));
        assert!(shown == q.content(), "before anything happens");
        let over_other = match chain.what {
            What::Rebase { onto: Some(name), mode: RebaseMode::Unsafe, .. } => {
                let rebase = ["rebase", "-u", "-b", name, "-F", format(name).name()];
                q.oracle.img(rebase).args(q.image()).ok();
                let seen = q.content();
                state.save(dir);
                seen
            }
            _ => shown.clone(),
        };
        let base = match chain.what {
            What::Commit { base, .. } => {
                let old = content(&state.open_file(base, None));
                let mut grown = old.clone();
                grown.resize(old.len().max(shown.len()), 0);
                let mut new = grown.clone();
                new[..shown.len()].copy_from_slice(&shown);
                Some((base, [old, grown, new]))
            }
            What::Rebase { .. } => None,
        };
        let has_snapshot = chain.snapshots && chain.on == Some(BASE);
        let first = has_snapshot.then(|| content(&state.open_file(BASE, Some(FIRST))));
        Self {
            chain,
            q,
            dir,
            first,
            shown: [shown, over_other],
            base,
            seen: HashSet::new(),
            count: Count::default(),
        }
    }

    fn state(&mut self, state: &State, done: bool) {
        let mut hasher = DefaultHasher::new();
        state.hash(&mut hasher);
        if !self.seen.insert((hasher.finish(), done)) {
            return;
        }
        self.count.states += 1;
        self.look(state, done);
        if self.count.states.is_multiple_of(SHOWN) {
            self.shown(state);
        }
        if self.count.states.is_multiple_of(AGAIN) {
            self.count.continued += 1;
            let files = state.copies();
            self.chain.what.run(&files).unwrap();
            self.look(&state.after(&files), true);
        }
    }

    fn look(&self, state: &State, done: bool) {
        for (name, bytes) in state.written() {
            if name.ends_with(".qcow2") {
                assert_sound(bytes);
            }
        }
        let image = state.open(None);
        let on = image.chain().nth(1).map(|(path, _)| path.file_name().unwrap().to_str().unwrap());
        let (old, new) = match self.chain.what {
            What::Commit { .. } => (self.chain.on, self.chain.on),
            What::Rebase { onto, .. } => (self.chain.on, onto),
        };
        assert!(on == new || (on == old && !done), "it stands on {on:?}");
        let want = &self.shown[usize::from(on == new)];
        let difference = first_foreign(&content(&image), &[want]);
        assert!(difference.is_none(), "the overlay shows something else: {difference:?}");
        if let Some((name, disks)) = &self.base {
            let may_be = if done { &disks[2..] } else { &disks[..] };
            let may_be: Vec<&[u8]> = may_be.iter().map(Vec::as_slice).collect();
            let difference = first_foreign(&content(&state.open_file(name, None)), &may_be);
            assert!(difference.is_none(), "the base has something else: {difference:?}");
        }
        if let Some(first) = &self.first {
            assert!(content(&state.open_file(BASE, Some(FIRST))) == *first, "the base's snapshot");
        }
        if done && matches!(self.chain.what, What::Commit { keep: false, base } if base != BOTTOM) {
            assert!(is_empty(&image), "the overlay still has something of its own");
        }
    }

    /// qemu-img finds the state sound too, and reads the same.
    fn shown(&mut self, state: &State) {
        self.count.shown += 1;
        state.save(self.dir);
        self.q.check();
        for (name, _) in state.written().filter(|(name, _)| *name != IMAGE && *name != DATA) {
            match format(name) {
                Format::Raw => {}
                format => {
                    let check = self.q.oracle.img(["check", "-f", format.name(), name]).run();
                    assert!(matches!(check.code, Some(0 | 3)), "{check}");
                }
            }
        }
        assert!(self.q.content() == content(&state.open(None)), "qemu-img reads something else");
    }
}

fn is_empty(image: &Image) -> bool {
    image.extents(0..image.size()).all(|extent| {
        let extent = extent.unwrap();
        extent.depth > 0 || !extent.present
    })
}

fn run(chain: &Chain, seed: u64) -> Count {
    let Some((dir, q)) = chain.make(seed) else { return Count::default() };
    let dir = dir.path();
    let all = [IMAGE, DATA, BASE, RAW, VMDK, BOTTOM, OTHER];
    let target = match chain.what {
        What::Commit { base, .. } => Some(base),
        What::Rebase { .. } => None,
    };
    let (written, fixed): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|&name| [IMAGE, DATA].contains(&name) || Some(name) == target);
    let world = World::load(dir, &written, &fixed);
    let mut judge = Judge::new(chain, &q, dir, &world.now());
    chain.what.run(&world.files()).unwrap();
    world.begin(1);
    for (index, stop) in world.stops().iter().enumerate() {
        judge.count.stops += 1;
        let max = number("DISKMILL_CRASH_STATES", STATES);
        for state in world.states(stop, seed ^ (index as u64) << 8, max) {
            judge.state(&state, stop.operation == 1);
        }
    }
    judge.shown(&world.now());
    judge.count
}

macro_rules! crashes {
    ($($name:ident: $chain:expr;)*) => {$(
        #[test]
        fn $name() {
            report(stringify!($name), |seed| run(&$chain, seed));
        }
    )*};
}

crashes! {
    commit: CHAIN;
    commit_with_snapshots: Chain { snapshots: true, ..CHAIN };
    commit_of_small_clusters:
        Chain { cluster: 512, size: 120 << 10, options: ",refcount_bits=1", base_size: 60 << 10, ..CHAIN };
    commit_to_small_clusters: Chain { base_options: "cluster_size=512,refcount_bits=64", ..CHAIN };
    commit_to_large_clusters: Chain { base_options: "cluster_size=64k", base_size: 400 << 10, ..CHAIN };
    commit_to_subclusters:
        Chain { base_options: "cluster_size=16k,extended_l2=on", snapshots: true, ..CHAIN };
    commit_of_subclusters: Chain { cluster: 1 << 15, options: ",extended_l2=on", ..CHAIN };
    commit_of_version_2: Chain { options: ",compat=v2", base_options: "cluster_size=1k,compat=v2", ..CHAIN };
    commit_of_a_data_file: Chain { options: ",data_file=data.raw", ..CHAIN };
    commit_of_an_encrypted_overlay:
        Chain { options: ",encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1", ..CHAIN };
    commit_that_keeps_the_overlay: Chain { what: What::Commit { base: BASE, keep: true }, ..CHAIN };
    commit_to_the_bottom: Chain { what: What::Commit { base: BOTTOM, keep: false }, ..CHAIN };
    commit_to_a_raw_file: Chain { what: What::Commit { base: RAW, keep: false }, on: Some(RAW), ..CHAIN };
    commit_to_a_vmdk:
        Chain { what: What::Commit { base: VMDK, keep: false }, on: Some(VMDK), base_size: 400 << 10, ..CHAIN };
    rebase: Chain { what: onto(OTHER), ..CHAIN };
    rebase_with_snapshots: Chain { what: onto(OTHER), snapshots: true, ..CHAIN };
    rebase_to_a_raw_file: Chain { what: onto(RAW), ..CHAIN };
    rebase_from_a_raw_file: Chain { what: onto(OTHER), on: Some(RAW), ..CHAIN };
    rebase_to_the_bottom: Chain { what: onto(BOTTOM), cluster: 512, size: 150 << 10, ..CHAIN };
    rebase_from_nothing: Chain { what: onto(OTHER), on: None, ..CHAIN };
    rebase_of_subclusters: Chain { what: onto(OTHER), cluster: 1 << 14, options: ",extended_l2=on", ..CHAIN };
    rebase_of_version_2: Chain { what: onto(OTHER), options: ",compat=v2", ..CHAIN };
    rebase_of_a_data_file: Chain { what: onto(OTHER), options: ",data_file=data.raw", ..CHAIN };
    rebase_to_a_long_name:
        Chain { what: What::Rebase { onto: Some(BASE), mode: RebaseMode::Safe, how: How::Long }, on: Some(RAW), ..CHAIN };
    rebase_flattens: Chain { what: FLATTEN, ..CHAIN };
    rebase_flattens_and_packs: Chain {
        what: What::Rebase { onto: None, mode: RebaseMode::Safe, how: How::Compressed },
        snapshots: true,
        ..CHAIN
    };
    rebase_flattens_version_2: Chain { what: FLATTEN, options: ",compat=v2", snapshots: true, ..CHAIN };
    rebase_flattens_an_encrypted_image:
        Chain { what: FLATTEN, options: ",encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1", ..CHAIN };
    rebase_without_a_look:
        Chain { what: What::Rebase { onto: Some(OTHER), mode: RebaseMode::Unsafe, how: How::Plain }, ..CHAIN };
    rebase_without_a_look_to_a_long_name:
        Chain { what: What::Rebase { onto: Some(BASE), mode: RebaseMode::Unsafe, how: How::Long }, on: Some(RAW), ..CHAIN };
}
