//! A plain disk in memory, and random operations for it and for qemu-io.

use std::collections::BTreeSet;
use std::ops::Range;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use crate::content::{Pattern, fill};

/// What a guest does to a stretch of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write content.
    Write(Pattern),
    /// Write content as compressed clusters (whole clusters that were never written).
    Compressed(Pattern),
    /// Write zeros; `unmap` allows the host to free the space.
    Zero {
        /// qemu-io's `-u`.
        unmap: bool,
    },
    /// Discard.
    Discard,
}

/// One operation on the guest bytes `start..start + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub op: Op,
    /// First guest byte.
    pub start: u64,
    /// Number of bytes.
    pub len: u64,
    /// Seed of the content.
    pub seed: u64,
}

impl Step {
    /// The bytes that are written (for operations that write).
    pub fn bytes(&self) -> Vec<u8> {
        match self.op {
            Op::Write(p) | Op::Compressed(p) => fill(p, self.seed, index(self.len)),
            Op::Zero { .. } | Op::Discard => vec![0; index(self.len)],
        }
    }

    fn range(&self) -> Range<usize> {
        index(self.start)..index(self.start + self.len)
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("a disk that fits in memory")
}

/// The content that a guest would see.
#[derive(Clone)]
pub struct ModelDisk {
    bytes: Vec<u8>,
    cluster: u64,
    discards: bool,
}

impl ModelDisk {
    /// A disk of zeros, on an image with clusters of `cluster` bytes.
    pub fn new(size: u64, cluster: u64) -> Self {
        Self { bytes: vec![0; index(size)], cluster, discards: true }
    }

    /// A disk that holds `bytes`.
    pub fn holding(bytes: Vec<u8>, cluster: u64) -> Self {
        Self { bytes, cluster, discards: true }
    }

    /// A disk of `size` bytes over `backing`, which may be shorter (zeros follow) or longer (cut).
    ///
    /// `v2`: a version 2 image has no zero clusters, so QEMU ignores discards where a backing file
    /// would show through.
    pub fn over(backing: &Self, size: u64, cluster: u64, v2: bool) -> Self {
        let mut bytes = backing.bytes.clone();
        bytes.resize(index(size), 0);
        Self { bytes, cluster, discards: !v2 }
    }

    /// Whether discards zero whole clusters, as in version 3, or do nothing, as in version 2 over a backing file.
    pub fn set_discards(&mut self, discards: bool) {
        self.discards = discards;
    }

    /// Makes the disk `size` bytes long: a longer one has zeros at its end.
    pub fn resize(&mut self, size: u64) {
        self.bytes.resize(index(size), 0);
    }

    /// The content.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Does one step, as QEMU does it on qcow2: a discard zeroes the whole clusters inside its range
    /// (the last one may be cut by the end of the disk) and leaves the rest alone.
    pub fn apply(&mut self, step: &Step) {
        match step.op {
            Op::Discard if !self.discards => {}
            Op::Discard => {
                let size = self.bytes.len() as u64;
                let first = step.start.next_multiple_of(self.cluster);
                let end = step.start + step.len;
                let last = if end == size { size } else { end / self.cluster * self.cluster };
                if first < last {
                    self.bytes[index(first)..index(last)].fill(0);
                }
            }
            _ => self.bytes[step.range()].copy_from_slice(&step.bytes()),
        }
    }
}

/// Random steps inside a disk of `size` bytes (a multiple of 512), most of them beginning and ending
/// at or right beside cluster and sector boundaries.
pub fn ops(size: u64, cluster: u64, count: Range<usize>) -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(step(size, cluster), count)
}

fn position(size: u64, cluster: u64) -> impl Strategy<Value = u64> {
    let clusters = size / cluster;
    prop_oneof![
        4 => (0..=clusters).prop_map(move |c| c * cluster),
        2 => (0..=clusters, 0..5u64).prop_map(move |(c, s)| (c * cluster + s * 512).saturating_sub(1024)),
        2 => (0..=size / 512).prop_map(|s| s * 512),
        1 => 0..=size,
        1 => Just(size),
    ]
    .prop_map(move |at| at.min(size))
}

fn step(size: u64, cluster: u64) -> impl Strategy<Value = Step> {
    let pattern = prop_oneof![
        3 => any::<u8>().prop_map(Pattern::Byte),
        3 => Just(Pattern::Text),
        2 => Just(Pattern::Random),
        1 => Just(Pattern::Zero),
    ];
    let op = (0..10u8, pattern).prop_map(|(kind, pattern)| match kind {
        0..=3 => Op::Write(pattern),
        4 | 5 => Op::Compressed(pattern),
        6 => Op::Zero { unmap: false },
        7 => Op::Zero { unmap: true },
        _ => Op::Discard,
    });
    let ends = (position(size, cluster), position(size, cluster));
    (op, ends, any::<u64>()).prop_map(move |(op, (a, b), seed)| {
        let (start, end) = (a.min(b), a.max(b));
        let (start, end) = match (op, start == end) {
            (_, true) => (start.min(size - 512), start.min(size - 512) + 512),
            (_, false) => (start, end),
        };
        Step { op, start, len: end - start, seed }
    })
}

/// `count` legal steps for a fresh image, the same ones for the same seed: [`ops`] and [`legalise`]
/// without a test runner. Without `packed`, compressed writes become plain ones.
pub fn steps(seed: u64, size: u64, cluster: u64, count: usize, packed: bool) -> Vec<Step> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &key);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
    let tree = ops(size, cluster, count..count + 1).new_tree(&mut runner);
    let mut steps = tree.expect("steps").current();
    if !packed {
        unpack(&mut steps);
    }
    legalise(&mut steps, size, cluster);
    steps
}

/// Makes compressed writes plain ones, for images that cannot have them.
pub fn unpack(steps: &mut [Step]) {
    for step in steps {
        if let Op::Compressed(pattern) = step.op {
            step.op = Op::Write(pattern);
        }
    }
}

/// Makes the steps ones that qemu-io accepts, in this order, on one image: compressed writes become
/// plain ones unless they cover whole clusters that no step touched before, and discards are cut to
/// whole sectors (below that, QEMU's own rules change from version to version).
pub fn legalise(steps: &mut Vec<Step>, size: u64, cluster: u64) {
    let mut touched = BTreeSet::new();
    for step in &mut *steps {
        let end = step.start + step.len;
        let clusters = step.start / cluster..end.div_ceil(cluster);
        if let Op::Compressed(pattern) = step.op {
            let whole = step.start % cluster == 0 && (end % cluster == 0 || end == size);
            if !whole || clusters.clone().any(|c| touched.contains(&c)) {
                step.op = Op::Write(pattern);
            }
        }
        if step.op == Op::Discard {
            step.start = step.start.next_multiple_of(512);
            step.len = (end / 512 * 512).saturating_sub(step.start);
        }
        touched.extend(clusters);
    }
    steps.retain(|step| step.len > 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_discard_spares_partial_clusters() {
        let mut disk = ModelDisk::new(2048, 512);
        disk.apply(&Step { op: Op::Write(Pattern::Byte(1)), start: 0, len: 2048, seed: 0 });
        disk.apply(&Step { op: Op::Discard, start: 100, len: 1000, seed: 0 });
        assert_eq!(disk.bytes.iter().filter(|&&b| b == 0).count(), 512);
        assert_eq!(disk.bytes[512..1024], [0; 512]);
    }

    #[test]
    fn a_second_compressed_write_becomes_plain() {
        let packed = Step { op: Op::Compressed(Pattern::Text), start: 512, len: 512, seed: 0 };
        let mut steps = vec![packed, packed];
        legalise(&mut steps, 4096, 512);
        assert_eq!(steps[0].op, packed.op);
        assert_eq!(steps[1].op, Op::Write(Pattern::Text));
    }
}
