//! Unpacked units that several requests want.
//!
//! A guest reads a packed cluster of 64 KiB in pieces of 4 KiB, and a client that reads ahead has a unit's pieces in
//! several requests at once, each with another thread.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use diskmill::{Error, Reader};

/// Bytes that a cache holds, as long as that is enough for [`LEAST_UNITS`].
const CACHE_BYTES: u64 = 32 << 20;
const LEAST_UNITS: u64 = 8;
/// Units that are larger are not kept: few of them would fill the memory. (The largest cluster of qcow2 is 2 MiB.)
const LARGEST_UNIT: u64 = 4 << 20;

/// A unit's guest bytes, once somebody has read them. Those who want them meanwhile wait for the lock.
type Unit = Mutex<Option<Box<[u8]>>>;

/// Guest bytes by aligned blocks of the size of a packed unit.
pub(crate) struct UnitCache {
    unit: u64,
    /// Of the disk, in bytes.
    size: u64,
    capacity: usize,
    units: Mutex<Units>,
}

#[derive(Default)]
struct Units {
    by_number: HashMap<u64, (u64, Arc<Unit>)>,
    /// Counts uses.
    clock: u64,
}

impl UnitCache {
    /// A cache for a disk of `size` bytes whose packed units have `unit` bytes; `None` where it would not help.
    pub(crate) fn new(unit: u64, size: u64) -> Option<Self> {
        if !(1..=LARGEST_UNIT).contains(&unit) {
            return None;
        }
        // At most 32 MiB of bytes.
        let capacity = (CACHE_BYTES / unit).clamp(LEAST_UNITS, 4096) as usize;
        Some(Self { unit, size, capacity, units: Mutex::default() })
    }

    /// Fills `buf` with the guest bytes from `at` on, within the disk.
    pub(crate) fn read(&self, buf: &mut [u8], at: u64, reader: &mut Reader<'_>) -> Result<(), Error> {
        let mut rest = buf;
        let mut at = at;
        while !rest.is_empty() {
            let skip = at % self.unit;
            let len = (self.unit - skip).min(rest.len() as u64) as usize;
            let Some((part, behind)) = rest.split_at_mut_checked(len) else { break };
            self.read_one(part, at, skip as usize, reader)?;
            at = at.saturating_add(len as u64);
            rest = behind;
        }
        Ok(())
    }

    /// Fills `part` with what stands `skip` bytes into the unit around `at`.
    fn read_one(&self, part: &mut [u8], at: u64, skip: usize, reader: &mut Reader<'_>) -> Result<(), Error> {
        let unit = self.get(at / self.unit);
        let mut bytes = unit.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes.is_none() {
            let start = at - skip as u64;
            let mut whole = vec![0; self.unit.min(self.size - start) as usize].into_boxed_slice();
            if reader.read_at(&mut whole, start).is_err() {
                drop(bytes);
                // The damage may be elsewhere in the unit.
                return reader.read_at(part, at);
            }
            *bytes = Some(whole);
        }
        match bytes.as_deref().and_then(|whole| whole.get(skip..)?.get(..part.len())) {
            Some(found) => part.copy_from_slice(found),
            None => reader.read_at(part, at)?,
        }
        Ok(())
    }

    fn get(&self, number: u64) -> Arc<Unit> {
        let mut units = self.units.lock().unwrap_or_else(PoisonError::into_inner);
        units.clock += 1;
        let now = units.clock;
        if let Some((used, unit)) = units.by_number.get_mut(&number) {
            *used = now;
            return Arc::clone(unit);
        }
        if units.by_number.len() >= self.capacity {
            // Looking at all is nothing beside unpacking one.
            let oldest = units.by_number.iter().min_by_key(|(_, (used, _))| *used).map(|(number, _)| *number);
            oldest.map(|number| units.by_number.remove(&number));
        }
        let unit = Arc::default();
        units.by_number.insert(number, (now, Arc::clone(&unit)));
        unit
    }
}
