//! What the image stands on, and its commits and rebases.

use diskmill::convert::Monitor;
use diskmill::edit::{Commit, CommitOptions, Rebase, RebaseMode};
use diskmill::{Format, Image, OpenOptions, SnapshotRef};
use diskmill_testkit::{ModelDisk, Op, Oracle, Step, legalise, ops, same, unpack};
use proptest::prelude::*;

use crate::{Disk, IMAGE, Kind, content, options};

/// An image that is stood on.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
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

    /// Its steps without those whose outcome depends on clusters.
    fn steps(&self) -> Vec<Step> {
        let mut steps = self.steps.clone();
        unpack(&mut steps);
        for step in &mut steps {
            if step.op == Op::Discard {
                step.op = Op::Zero { unmap: true };
            }
        }
        legalise(&mut steps, self.size, 512);
        steps
    }
}

pub(crate) fn layer() -> impl Strategy<Value = Layer> {
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

/// What the image may stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    Nothing,
    /// A qcow2 image.
    A,
    /// One over `A`.
    OverA,
    /// A raw one.
    Raw,
}

pub(crate) fn backing() -> impl Strategy<Value = Backing> {
    prop_oneof![Just(Backing::Nothing), Just(Backing::A), Just(Backing::OverA), Just(Backing::Raw)]
}

impl Backing {
    pub(crate) fn file(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Nothing => None,
            Self::A => Some(("a.qcow2", "qcow2")),
            Self::OverA => Some(("over-a.qcow2", "qcow2")),
            Self::Raw => Some(("b.raw", "raw")),
        }
    }

    /// What is seen of it.
    fn content(self, q: &Oracle) -> Vec<u8> {
        self.file().map_or_else(Vec::new, |(name, format)| q.content(name, format))
    }
}

/// Makes all files that the image may stand on.
pub(crate) fn make(q: &Oracle, [a, over_a, raw]: &[Layer; 3]) {
    q.create("a.qcow2", &a.options(), a.size);
    q.write("a.qcow2", "qcow2", &a.steps());
    q.create_over("over-a.qcow2", &over_a.options(), over_a.size, ("a.qcow2", "qcow2"));
    q.write("over-a.qcow2", "qcow2", &over_a.steps());
    std::fs::write(q.dir().join("b.raw"), vec![0; usize::try_from(raw.size).unwrap()]).unwrap();
    q.write("b.raw", "raw", &raw.steps());
}

/// What an image of `size` bytes shows that was just made over one of these.
pub(crate) fn fresh(q: &Oracle, kind: &Kind) -> ModelDisk {
    let below = ModelDisk::holding(kind.on.content(q), kind.cluster());
    ModelDisk::over(&below, kind.size, kind.cluster(), kind.v2 && kind.backed())
}

impl Disk {
    /// Commits to `A` if it is below and that is asked for, else to the next file; the image is emptied or not.
    pub(crate) fn commit(&mut self, kind: &Kind, ours: bool, deep: bool, keep: bool) {
        let Some(next) = kind.on.file() else { return };
        let deep = deep && kind.on == Backing::OverA;
        let (base, format) = if deep { ("a.qcow2", "qcow2") } else { next };
        let mut want = self.q.content(base, format);
        let top = self.model.bytes();
        want.resize(want.len().max(top.len()), 0);
        want[..top.len()].copy_from_slice(top);
        if ours {
            let base = deep.then(|| self.q.dir().join(base));
            let options = CommitOptions { open: options(), base, keep_overlay: keep };
            Commit::open(&self.path, &options).unwrap().run(&Monitor::new()).unwrap();
        } else {
            let mut args = vec!["commit", "-q"];
            args.extend(keep.then_some("-d"));
            args.extend(if deep { vec!["-b", base] } else { Vec::new() });
            let outcome = self.q.img(args).arg(IMAGE).run();
            if outcome.code != Some(0) {
                // QEMU cannot grow a version 2 image over a longer backing file, nor one that has snapshots; we can.
                assert!(outcome.err().contains("Operation not supported"), "{outcome}");
                return;
            }
        }
        same(&self.q.content(base, format), &want, "the base");
        self.look_at_snapshots(kind);
    }

    pub(crate) fn rebase(&mut self, kind: &mut Kind, ours: bool, onto: Backing) {
        // A raw external data file has all that the disk has.
        if kind.data_file_raw {
            return;
        }
        // QEMU 10 loses the zeros of a version 2 image that had no backing file, and zeroes memory beyond its buffer where the
        // old backing file ends in the middle of a cluster.
        let old = kind.on.content(&self.q).len() as u64;
        let in_a_cluster = old < self.model.bytes().len() as u64 && !old.is_multiple_of(kind.cluster());
        if ours || (kind.v2 && !kind.backed()) || in_a_cluster {
            let mut rebase = Rebase::open(&self.path, &options(), RebaseMode::Safe).unwrap();
            if let Some((name, format)) = onto.file() {
                rebase.onto(name, Some(format.parse::<Format>().unwrap())).unwrap();
            }
            rebase.run(&Monitor::new()).unwrap();
        } else {
            let mut args = vec!["rebase", "-f", "qcow2"];
            match onto.file() {
                Some((name, format)) => args.extend(["-b", name, "-F", format]),
                None => args.extend(["-b", ""]),
            }
            self.q.img(args).arg(IMAGE).ok();
        }
        kind.on = onto;
        self.model.set_discards(!(kind.v2 && kind.backed()));
        self.look_at_snapshots(kind);
    }

    /// What a snapshot does not have itself shows another backing file now: each sector is the old one or that.
    fn look_at_snapshots(&mut self, kind: &Kind) {
        let below = kind.on.content(&self.q);
        for (name, model) in &mut self.snapshots {
            let snapshot = Some(SnapshotRef::Any(name.clone()));
            let image =
                Image::open(&self.path, &OpenOptions { writable: false, snapshot, ..options() }).unwrap();
            let seen = content(&image);
            let (was, mut below) = (model.bytes(), below.clone());
            below.resize(was.len(), 0);
            assert_eq!(seen.len(), was.len(), "snapshot {name}");
            let sectors = seen.chunks(512).zip(was.chunks(512).zip(below.chunks(512)));
            for (index, (seen, (was, below))) in sectors.enumerate() {
                assert!(seen == was || seen == below, "snapshot {name}, sector {index}");
            }
            *model = ModelDisk::holding(seen, kind.cluster());
        }
    }

    /// The files under the image are sound, and it stands on what it should.
    pub(crate) fn check_chain(&self, kind: &Kind) {
        let image = Image::open(&self.path, &OpenOptions { writable: false, ..options() }).unwrap();
        same(&content(&image), self.model.bytes(), "we read");
        let names: Vec<_> = image.chain().map(|(path, _)| path.file_name().unwrap().to_owned()).collect();
        assert_eq!(names.get(1).and_then(|name| name.to_str()), kind.on.file().map(|(name, _)| name));
        ["a.qcow2", "over-a.qcow2"].iter().for_each(|image| self.q.check_clean(image));
    }
}
