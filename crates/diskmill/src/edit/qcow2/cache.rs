//! Metadata tables in memory, written back later.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use diskmill_codec::is_zero;

use crate::edit::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::reader::read_full;
use crate::tables::SLICE;

/// Bytes of metadata that are kept, unless more than that is waiting to be written.
const CAPACITY: u64 = 16 << 20;
/// Changed bytes at which the owner should write them.
const MOST_DIRTY: u64 = CAPACITY / 2;
/// What file systems give room for, in bytes: usually their block.
const BLOCK: usize = 4 << 10;
const _: () = assert!(SLICE as usize / BLOCK <= u16::BITS as usize, "a bit for each block of a slice");

/// What a piece of metadata says, which decides when it may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Refcounts. Raised ones may be written at any time: at worst they leak clusters.
    Refcounts,
    /// L1 and L2 tables: what they point to must be durable and counted first.
    Mapping,
}

struct Slice {
    bytes: Arc<[u8]>,
    class: Class,
    /// The bytes that differ from the file.
    dirty: Range<usize>,
    /// Which of its blocks are sure to have room in the file, a bit for each: tables may have holes.
    roomy: u16,
    used: u64,
}

/// Slices of metadata by their offset in the file. A slice is always asked for with the same offset and length.
#[derive(Default)]
pub(super) struct Cache {
    slices: HashMap<u64, Slice>,
    held: u64,
    dirty: u64,
    clock: u64,
}

impl Cache {
    /// The `len` bytes at `at`.
    ///
    /// # Errors
    /// If they cannot be read, lie past the end of the file, or are known as metadata of the other class.
    pub(super) fn get(&mut self, disk: &Disk, at: u64, len: u64, class: Class) -> Result<Arc<[u8]>> {
        Ok(Arc::clone(&self.slice(disk, at, len, class)?.bytes))
    }

    /// The same bytes to be changed: those in `range`. They find room in the file when they are written: a full disk is to
    /// be met by the write of the guest that needs more, and not by all that comes with the next flush.
    pub(super) fn modify(
        &mut self,
        disk: &Disk,
        at: u64,
        len: u64,
        class: Class,
        range: Range<usize>,
    ) -> Result<&mut [u8]> {
        let slice = self.slice(disk, at, len, class)?;
        for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            let bit = 1u16.checked_shl(block as u32).unwrap_or(0);
            if slice.roomy & bit == 0 {
                // Not changed until now: these are the bytes of the file, which has no hole where they are not zeros.
                let (start, end) = (block * BLOCK, ((block + 1) * BLOCK).min(slice.bytes.len()));
                let there = slice.bytes.get(start..end).unwrap_or_default();
                if is_zero(there) {
                    disk.make_room(there, at + start as u64)?;
                }
                slice.roomy |= bit;
            }
        }
        let newly = slice.dirty.is_empty();
        slice.dirty = match newly {
            true => range,
            false => slice.dirty.start.min(range.start)..slice.dirty.end.max(range.end),
        };
        if newly {
            self.dirty += len;
        }
        let slice = self.slices.get_mut(&at).ok_or_else(|| Error::invalid("a slice vanished"))?;
        Ok(Arc::make_mut(&mut slice.bytes))
    }

    /// Takes `bytes` as what stands at `at`, whatever the file holds there. The caller has made room for them, or
    /// writes them at once.
    pub(super) fn put(&mut self, at: u64, bytes: Arc<[u8]>, class: Class) {
        self.forget(at..at.saturating_add(1));
        self.make_room();
        self.held += bytes.len() as u64;
        self.dirty += bytes.len() as u64;
        self.clock += 1;
        self.slices
            .insert(at, Slice { dirty: 0..bytes.len(), bytes, class, roomy: u16::MAX, used: self.clock });
    }

    /// Drops the slices that begin in `range`, changed or not: the clusters there are something else now.
    pub(super) fn forget(&mut self, range: Range<u64>) {
        // A cluster holds few slices; a range of many clusters is seldom dropped.
        let mut gone: Vec<u64> = Vec::new();
        if range.end.saturating_sub(range.start) <= 1 {
            gone.extend(self.slices.contains_key(&range.start).then_some(range.start));
        } else {
            gone.extend(self.slices.keys().filter(|at| range.contains(at)));
        }
        for at in gone {
            if let Some(slice) = self.slices.remove(&at) {
                let len = slice.bytes.len() as u64;
                self.held -= len;
                self.dirty -= if slice.dirty.is_empty() { 0 } else { len };
            }
        }
    }

    /// Drops the slices of the cluster at `host`.
    pub(super) fn forget_cluster(&mut self, host: u64, cluster_size: u64, slice: u64) {
        for at in (host..host.saturating_add(cluster_size)).step_by(slice as usize) {
            self.forget(at..at.saturating_add(1));
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        *self = Self { clock: self.clock, ..Self::default() };
    }

    /// Writes the changed slices that `which` chooses, in the order of their offsets.
    pub(super) fn write(&mut self, disk: &Disk, which: impl Fn(u64, Class) -> bool) -> Result<()> {
        if self.dirty == 0 {
            return Ok(());
        }
        let changed =
            |(&at, slice): (&u64, &Slice)| (!slice.dirty.is_empty() && which(at, slice.class)).then_some(at);
        let mut chosen: Vec<u64> = self.slices.iter().filter_map(changed).collect();
        chosen.sort_unstable();
        for at in chosen {
            let Some(slice) = self.slices.get_mut(&at) else { continue };
            let bytes = slice.bytes.get(slice.dirty.clone()).unwrap_or_default();
            disk.write(bytes, at + slice.dirty.start as u64)?;
            slice.dirty = 0..0;
            self.dirty -= slice.bytes.len() as u64;
        }
        Ok(())
    }

    pub(super) const fn is_dirty(&self) -> bool {
        self.dirty != 0
    }

    /// Whether so much has changed that it should be written now.
    pub(super) const fn is_full(&self) -> bool {
        self.dirty > MOST_DIRTY
    }

    fn slice(&mut self, disk: &Disk, at: u64, len: u64, class: Class) -> Result<&mut Slice> {
        self.clock += 1;
        let used = self.clock;
        if !self.slices.contains_key(&at) {
            let bytes = load(disk, at, len)?;
            self.make_room();
            self.held += len;
            self.slices.insert(at, Slice { bytes, class, dirty: 0..0, roomy: 0, used });
        }
        let slice = self.slices.get_mut(&at).ok_or_else(|| Error::invalid("a slice vanished"))?;
        if slice.class != class || slice.bytes.len() as u64 != len {
            return Err(Error::new(
                Kind::Corrupt,
                format!("two different structures share offset {at:#x}: the image is damaged"),
            ));
        }
        slice.used = used;
        Ok(slice)
    }

    /// Drops the half of the unchanged slices that was not used for longest, if there are too many.
    fn make_room(&mut self) {
        if self.held <= CAPACITY {
            return;
        }
        let clean = self.slices.values().filter(|slice| slice.dirty.is_empty());
        let mut ages: Vec<u64> = clean.map(|slice| slice.used).collect();
        let middle = ages.len() / 2;
        if middle == 0 {
            return;
        }
        let limit = *ages.select_nth_unstable(middle).1;
        let mut held = 0;
        self.slices.retain(|_, slice| {
            let stays = !slice.dirty.is_empty() || slice.used > limit;
            held += if stays { slice.bytes.len() as u64 } else { 0 };
            stays
        });
        self.held = held;
    }
}

fn load(disk: &Disk, at: u64, len: u64) -> Result<Arc<[u8]>> {
    let file_len = disk.len();
    let past_end = || {
        let message = format!(
            "offset {at:#x} lies past the end of the file ({file_len} bytes): the image is truncated"
        );
        Error::new(Kind::Corrupt, message)
    };
    if at.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(past_end());
    }
    // No caller asks for more than `SLICE` bytes.
    let mut bytes = vec![0; len as usize];
    if read_full(&**disk.storage(), &mut bytes, at)? < bytes.len() {
        return Err(past_end());
    }
    Ok(bytes.into())
}
