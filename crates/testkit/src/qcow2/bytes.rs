//! A finished image in memory, with what tests read of it and damage in it.

use std::path::Path;

use super::{COPIED, field};

/// The host offset in an L2 entry (bits 9 to 55).
const HOST: u64 = 0x00ff_ffff_ffff_fe00;

/// The bytes of a qcow2 image of any origin. What is asked for must be in them.
#[derive(Clone)]
pub struct ImageBytes(pub Vec<u8>);

impl ImageBytes {
    /// Those of a file.
    pub fn read(path: &Path) -> Self {
        Self(std::fs::read(path).expect("read the image"))
    }

    /// The big-endian number at `at`.
    pub fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.0[at as usize..at as usize + 8].try_into().expect("8 bytes"))
    }

    /// Puts `bytes` at `at`.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Puts a big-endian number at `at`.
    pub fn put64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    /// Bytes in a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.0[field::CLUSTER_BITS as usize + 3]
    }

    /// Where the active L1 table stands.
    pub fn l1(&self) -> u64 {
        self.u64(field::L1_TABLE_OFFSET)
    }

    /// Where entry `index` of the first L2 table stands.
    pub fn l2(&self, index: u64) -> u64 {
        let extended = self.is_v3() && self.u64(field::INCOMPATIBLE_FEATURES) & 16 != 0;
        (self.u64(self.l1()) & !COPIED) + index * if extended { 16 } else { 8 }
    }

    /// The host cluster in entry `index` of the first L2 table.
    pub fn host(&self, index: u64) -> u64 {
        self.u64(self.l2(index)) & HOST
    }

    /// Where the refcount table stands.
    pub fn refcount_table(&self) -> u64 {
        self.u64(field::REFCOUNT_TABLE_OFFSET)
    }

    /// Where the snapshot table stands.
    pub fn snapshots(&self) -> u64 {
        self.u64(field::SNAPSHOTS_OFFSET)
    }

    /// Sets the refcount, in the first refcount block, of the cluster at `offset`. Narrow ones are set to the largest
    /// they can hold at most.
    pub fn set_refcount(&mut self, offset: u64, count: u16) {
        let block = self.u64(self.refcount_table());
        let bits = 1 << if self.is_v3() { self.0[field::REFCOUNT_ORDER as usize + 3] } else { 4 };
        let cluster = offset / self.cluster();
        match bits {
            8.. => {
                let bytes = u64::from(count).to_be_bytes();
                let len = bits / 8;
                self.put(block + cluster * len as u64, &bytes[8 - len..]);
            }
            _ => {
                let at = (block + cluster * bits as u64 / 8) as usize;
                let shift = cluster * bits as u64 % 8;
                let mask = (1u8 << bits) - 1;
                let value = count.min(mask.into()) as u8;
                self.0[at] = self.0[at] & !(mask << shift) | value << shift;
            }
        }
    }

    fn is_v3(&self) -> bool {
        self.0[field::VERSION as usize + 3] >= 3
    }
}
