//! Random writes, commits and rebases by us and by QEMU's tools in turn on one chain, against a plain disk in memory.
//!
//! `PROPTEST_CASES` sets the number of cases (default 32 here); a failure prints the smallest case.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::{Path, PathBuf};

use diskmill::convert::Monitor;
use diskmill::edit::{Commit, CommitOptions, Rebase, RebaseMode, ZeroHow};
use diskmill::{Allow, Format, Image, OpenOptions, OpenPolicy};
use diskmill_testkit::{ModelDisk, Op, Oracle, Step, legalise, ops, scratch, unpack};
use proptest::prelude::*;

/// One image of the chain.
#[derive(Clone, Debug)]
struct Layer {
    v2: bool,
    extended: bool,
    cluster_bits: u32,
    size: u64,
    steps: Vec<Step>,
}

impl Layer {
    fn options(&self) -> String {
        let mut options = format!("cluster_size={}", 1u64 << self.cluster_bits);
        options += if self.v2 { ",compat=v2" } else { "" };
        options += if self.extended { ",extended_l2=on" } else { "" };
        options
    }

    fn steps(&self) -> Vec<Step> {
        plain(&self.steps, self.size)
    }
}

fn layer() -> impl Strategy<Value = Layer> {
    (any::<[bool; 2]>(), 9..=17u32, 1..=1200u64).prop_flat_map(|([v2, extended], cluster_bits, sectors)| {
        let size = sectors * 512;
        ops(size, 1 << cluster_bits, 0..8).prop_map(move |steps| Layer {
            v2,
            extended: extended && !v2 && cluster_bits >= 14,
            cluster_bits,
            size,
            steps,
        })
    })
}

/// Steps whose outcome does not depend on clusters.
fn plain(steps: &[Step], size: u64) -> Vec<Step> {
    let mut steps = steps.to_vec();
    unpack(&mut steps);
    for step in &mut steps {
        if step.op == Op::Discard {
            step.op = Op::Zero { unmap: true };
        }
    }
    legalise(&mut steps, size, 512);
    steps
}

/// What the image on top may stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    Nothing,
    /// A qcow2 image.
    A,
    /// One over `A`.
    OverA,
    /// A raw one.
    Raw,
}

impl Backing {
    fn file(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Nothing => None,
            Self::A => Some(("a.qcow2", "qcow2")),
            Self::OverA => Some(("over-a.qcow2", "qcow2")),
            Self::Raw => Some(("b.raw", "raw")),
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    Write(Vec<Step>),
    /// To `A` if it is below and that is asked for, else to the next file; the image is emptied or not.
    Commit {
        deep: bool,
        keep: bool,
    },
    Rebase(Backing),
}

/// What is done, and whether by us or by QEMU's tools.
type Round = (bool, Act);

fn rounds(size: u64) -> impl Strategy<Value = Vec<Round>> {
    let backing =
        prop_oneof![Just(Backing::Nothing), Just(Backing::A), Just(Backing::OverA), Just(Backing::Raw)];
    let act = prop_oneof![
        3 => ops(size, 512, 1..6).prop_map(Act::Write),
        2 => any::<[bool; 2]>().prop_map(|[deep, keep]| Act::Commit { deep, keep }),
        3 => backing.prop_map(Act::Rebase),
    ];
    proptest::collection::vec((any::<bool>(), act), 1..8)
}

fn case() -> impl Strategy<Value = ([Layer; 3], Layer, Vec<Round>)> {
    ([layer(), layer(), layer()], layer()).prop_flat_map(|(below, top)| {
        let rounds = rounds(top.size);
        (Just(below), Just(top), rounds)
    })
}

fn options() -> OpenOptions {
    let policy = OpenPolicy { allow: Allow::OwnTree, paths: Vec::new() };
    OpenOptions { policy, ..OpenOptions::default() }
}

fn same(got: &[u8], want: &[u8], what: &str) {
    if got != want {
        let at = got.iter().zip(want).position(|(a, b)| a != b);
        panic!("{what}: {} and {} bytes, first difference at {at:?}", got.len(), want.len());
    }
}

/// The image on top, what it stands on, and what it must hold.
struct Chain {
    q: Oracle,
    dir: PathBuf,
    model: ModelDisk,
    on: Backing,
    v2: bool,
}

const TOP: &str = "top.qcow2";

impl Chain {
    fn new(dir: &Path, [a, over_a, raw]: [Layer; 3], top: &Layer) -> Option<Self> {
        let q = Oracle::find(dir)?;
        q.create("a.qcow2", &a.options(), a.size);
        q.write("a.qcow2", "qcow2", &a.steps());
        q.create_over("over-a.qcow2", &over_a.options(), over_a.size, ("a.qcow2", "qcow2"));
        q.write("over-a.qcow2", "qcow2", &over_a.steps());
        std::fs::write(dir.join("b.raw"), vec![0; usize::try_from(raw.size).unwrap()]).unwrap();
        q.write("b.raw", "raw", &raw.steps());
        q.create_over(TOP, &top.options(), top.size, ("over-a.qcow2", "qcow2"));
        let mut model = ModelDisk::holding(q.content(TOP, "qcow2"), 512);
        let steps = top.steps();
        q.write(TOP, "qcow2", &steps);
        steps.iter().for_each(|step| model.apply(step));
        Some(Self { q, dir: dir.to_owned(), model, on: Backing::OverA, v2: top.v2 })
    }

    fn write(&mut self, ours: bool, steps: &[Step]) {
        let steps = plain(steps, self.model.bytes().len() as u64);
        if ours {
            let image =
                Image::open(self.dir.join(TOP), &OpenOptions { writable: true, ..options() }).unwrap();
            for step in &steps {
                match step.op {
                    Op::Zero { unmap } => {
                        let how = if unmap { ZeroHow::MayUnmap } else { ZeroHow::KeepAllocated };
                        image.write_zeroes(step.start, step.len, how).unwrap();
                    }
                    _ => image.write_at(&step.bytes(), step.start).unwrap(),
                }
            }
            image.close().unwrap();
        } else {
            self.q.write(TOP, "qcow2", &steps);
        }
        steps.iter().for_each(|step| self.model.apply(step));
    }

    fn commit(&mut self, ours: bool, deep: bool, keep: bool) {
        let Some(next) = self.on.file() else { return };
        let deep = deep && self.on == Backing::OverA;
        let (base, format) = if deep { ("a.qcow2", "qcow2") } else { next };
        let mut want = self.q.content(base, format);
        let top = self.model.bytes();
        want.resize(want.len().max(top.len()), 0);
        want[..top.len()].copy_from_slice(top);
        if ours {
            let base = deep.then(|| self.dir.join(base));
            let options = CommitOptions { open: options(), base, keep_overlay: keep };
            Commit::open(self.dir.join(TOP), &options).unwrap().run(&Monitor::new()).unwrap();
        } else {
            let mut args = vec!["commit", "-q"];
            args.extend(keep.then_some("-d"));
            args.extend(if deep { vec!["-b", base] } else { Vec::new() });
            let outcome = self.q.img(args).arg(TOP).run();
            if outcome.code != Some(0) {
                // QEMU cannot grow a version 2 image over a longer backing file; we can.
                assert!(outcome.err().contains("Operation not supported"), "{outcome}");
                return;
            }
        }
        same(&self.q.content(base, format), &want, "the base");
    }

    fn rebase(&mut self, ours: bool, onto: Backing) {
        // QEMU 10 loses the zeros of a version 2 image that had no backing file.
        if ours || (self.v2 && self.on == Backing::Nothing) {
            let mut rebase = Rebase::open(self.dir.join(TOP), &options(), RebaseMode::Safe).unwrap();
            if let Some((name, format)) = onto.file() {
                rebase.onto(name, Some(format.parse::<Format>().unwrap())).unwrap();
            }
            rebase.run(&Monitor::new()).unwrap();
        } else {
            let mut args = vec!["rebase"];
            match onto.file() {
                Some((name, format)) => args.extend(["-b", name, "-F", format]),
                None => args.extend(["-b", ""]),
            }
            self.q.img(args).arg(TOP).ok();
        }
        self.on = onto;
    }

    fn check(&self) {
        same(&self.q.content(TOP, "qcow2"), self.model.bytes(), "qemu-img reads");
        let image = Image::open(self.dir.join(TOP), &options()).unwrap();
        let mut bytes = vec![0; self.model.bytes().len()];
        image.read_at(&mut bytes, 0).unwrap();
        same(&bytes, self.model.bytes(), "we read");
        let names: Vec<_> = image.chain().map(|(path, _)| path.file_name().unwrap().to_owned()).collect();
        assert_eq!(names.get(1).and_then(|name| name.to_str()), self.on.file().map(|(name, _)| name));
        [TOP, "a.qcow2", "over-a.qcow2"].iter().for_each(|image| self.q.check_clean(image));
    }
}

fn check((below, top, rounds): ([Layer; 3], Layer, Vec<Round>)) {
    let dir = scratch();
    let Some(mut chain) = Chain::new(dir.path(), below, &top) else { return };
    for (ours, act) in rounds {
        match act {
            Act::Write(steps) => chain.write(ours, &steps),
            Act::Commit { deep, keep } => chain.commit(ours, deep, keep),
            Act::Rebase(onto) => chain.rebase(ours, onto),
        }
        chain.check();
    }
}

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(32),
        max_shrink_iters: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn commits_and_rebases_by_us_and_by_qemu(case in case()) {
        check(case);
    }
}
